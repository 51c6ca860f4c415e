"""Preference data in every form that users bring: labels, ties, dialogues in one text, prompts for online training."""

from typing import Any

import datasets
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlloss
from rlloss.loop import (
    Session,
    completions,
    dialogue_rows,
    labelled,
    load_rows,
    pairs,
    preference_rows,
    prompts,
    train_online,
    without_ties,
)

TURNS = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}<eos>{% endfor %}"
ASKED = "{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "<eos>", "<u>", "<a>", "\n", *map(chr, range(32, 127))]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    fast.add_special_tokens({"additional_special_tokens": ["<u>", "<a>"]})
    fast.chat_template = TURNS + ASKED
    return fast


def said(tokenizer: Any, tokens: Any) -> tuple[str, str]:
    """What is not trained, and what is, of a sequence that trains its end."""
    first = tokens.loss_mask.index(True)
    assert all(tokens.loss_mask[first:])
    return str(tokenizer.decode(tokens.input_ids[:first])), str(tokenizer.decode(tokens.input_ids[first:]))


# rows from labels


def build_preference_dataset(prompts: Any, completions_a: Any, completions_b: Any, labels: Any) -> Any:
    """As users have it in their notes."""
    records = []
    for prompt, a, b, label in zip(prompts, completions_a, completions_b, labels, strict=False):
        chosen, rejected = (a, b) if label == "a" else (b, a)
        records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return datasets.Dataset.from_list(records)


def test_rows_from_labels_are_those_of_the_usual_function() -> None:
    columns = (["p", "q", "r"], ["a1", "a2", "a3"], ["b1", "b2", "b3"], ["a", "b", "a"])
    made = preference_rows(*columns)
    assert isinstance(made, datasets.Dataset)
    assert made.to_list() == build_preference_dataset(*columns).to_list()
    assert made[1] == {"prompt": "q", "chosen": "b2", "rejected": "a2"}
    given = datasets.Dataset.from_dict({"p": columns[0], "a": columns[1], "b": columns[2], "l": columns[3]})
    assert preference_rows(given["p"], given["a"], given["b"], given["l"]).to_list() == made.to_list()
    messages = [[{"role": "user", "content": text}] for text in columns[0]]
    assert preference_rows(messages, *columns[1:])[2]["prompt"] == messages[2]


def test_labelled_ties_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    made = preference_rows([*"pqr"], [*"abc"], [*"xyz"], ["tie", "b", "tie"])
    assert made.to_list() == [{"prompt": "q", "chosen": "y", "rejected": "b"}]
    assert [r.getMessage() for r in caplog.records] == ["preference_rows: 2 of 3 labels are ties and were left out"]
    with pytest.raises(ValueError, match="no row has a label 'a' or 'b'"):
        preference_rows(["p"], ["a"], ["b"], ["tie"])


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ((["p"], ["a"], ["b"], [0]), r"labels\[0\] must be 'a', 'b' or 'tie', got 0; .*\{0: 'a', 1: 'b'\}\[label\]"),
        ((["p"], ["a"], ["b"], ["A"]), r"labels\[0\] must be 'a', 'b' or 'tie', got 'A'"),
        ((["p"], ["a"], ["b"], [None]), r"got None"),
        ((["p", "q"], ["a"], ["b", "b"], ["a"]), r"as many of each, got \{'prompts': 2, 'completions_a': 1, .*'labels"),
        (("p", "a", "b", "a"), r"prompts must be a list with one entry per row, got str"),
        (([], [], [], []), "no row has a label"),
    ],
)
def test_bad_labels_are_refused(columns: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        preference_rows(*columns)


# ties


SCORED = [
    {"chosen": "good", "rejected": "bad", "up": 3.0, "down": 1.0},
    {"chosen": "same", "rejected": "same", "up": 3.0, "down": 1.0},
    {"chosen": "good", "rejected": "fine", "up": 2.0, "down": 1.5},
    {"chosen": "bad", "rejected": "good", "up": 1.0, "down": 2.0},
    {"chosen": "good", "rejected": "even", "up": 2.0, "down": 2.0},
]


def test_ties_are_dropped_by_kind_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    assert without_ties(SCORED).to_list() == [SCORED[0], *SCORED[2:]]
    assert without_ties(SCORED, scores=("up", "down")).to_list() == [SCORED[0], SCORED[2], SCORED[3]]
    assert without_ties(SCORED, scores=("up", "down"), min_gap=0.5).to_list() == [SCORED[0], SCORED[3]]
    assert [r.getMessage() for r in caplog.records] == [
        "without_ties: dropped 1 of 5 pairs: 1 have identical answers",
        "without_ties: dropped 2 of 5 pairs: 1 have identical answers, 1 score within min_gap=0",
        "without_ties: of 1 pairs the chosen answer scores less than the rejected one; they are kept",
        "without_ties: dropped 3 of 5 pairs: 1 have identical answers, 2 score within min_gap=0.5",
        "without_ties: of 1 pairs the chosen answer scores less than the rejected one; they are kept",
    ]
    caplog.clear()
    assert without_ties(SCORED[:1], scores=("up", "down")).to_list() == SCORED[:1]
    assert caplog.records == []


def test_messages_that_arrow_filled_with_none_are_the_same_messages() -> None:
    plain, named = {"role": "assistant", "content": "Hi"}, {"role": "assistant", "content": "Hi", "name": "A"}
    rows = load_rows([{"chosen": [plain], "rejected": [plain]}, {"chosen": [named], "rejected": [plain]}])
    assert rows[0]["chosen"] != rows[0]["rejected"]  # `chosen` has a name of None
    assert without_ties(rows).to_list() == rows.to_list()[1:]


def test_bad_ties_are_refused() -> None:
    with pytest.raises(ValueError, match="all 1 pairs are ties"):
        without_ties(SCORED[1:2])
    with pytest.raises(ValueError, match=r"no column 'ups' among .*; did you mean 'up'"):
        without_ties(SCORED, scores=("ups", "down"))
    with pytest.raises(ValueError, match=r"min_gap=0\.5 needs the columns of the scores"):
        without_ties(SCORED, min_gap=0.5)
    with pytest.raises(ValueError, match=r"min_gap must be a number in \[0"):
        without_ties(SCORED, scores=("up", "down"), min_gap=-1.0)
    for score in (None, "3", float("nan")):
        with pytest.raises(ValueError, match="row 1: 'up' must be a finite number, got"):
            without_ties([{**SCORED[0], "up": score}], scores=("up", "down"))


# dialogues in one text


def dialogue(*turns: str) -> str:
    return "".join(f"\n\n{'Assistant' if i % 2 else 'Human'}:{turn}" for i, turn in enumerate(turns))


DIALOGUES = {
    "answers of other lengths": (dialogue(" Hi", " Hello, you"), dialogue(" Hi", " No"), dialogue(" Hi", "")),
    "a first sentence in common": (dialogue(" Hi", " I am. Fine"), dialogue(" Hi", " I am. Not"), dialogue(" Hi", "")),
    "one begins the other": (dialogue(" Hi", " Ho"), dialogue(" Hi", " Ho, ho"), dialogue(" Hi", "")),
    "several turns before": (
        dialogue(" Hi", " Ho", " Why", " So"),
        dialogue(" Hi", " Ho", " Why", " No"),
        dialogue(" Hi", " Ho", " Why", ""),
    ),
    "several turns after": (
        dialogue(" Hi", " Ho", " Why", " So"),
        dialogue(" Hi", " Ha", " Why", " So"),
        dialogue(" Hi", ""),
    ),
    "one goes on": (dialogue(" Hi", " Ho"), dialogue(" Hi", " Ho", " Why", " No"), dialogue(" Hi", "")),
    "identical": (dialogue(" Hi", " Ho", " Why", " So"),) * 2 + (dialogue(" Hi", " Ho", " Why", ""),),
}


@pytest.mark.parametrize("name", DIALOGUES)
def test_the_common_beginning_of_two_dialogues_is_their_prompt(tokenizer: Any, name: str) -> None:
    chosen, rejected, prompt = DIALOGUES[name]
    row = {"chosen": chosen, "rejected": rejected}
    [made] = dialogue_rows([row]).to_list()
    assert made == {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
    [pair], [explicit] = pairs([row], tokenizer), pairs([made], tokenizer)
    assert pair == explicit
    assert said(tokenizer, pair.rejected) == (prompt, rejected[len(prompt) :] + "<eos>")
    [asked] = prompts([row], tokenizer)
    assert (tokenizer.decode(asked.ids), asked.text, asked.columns) == (prompt, prompt, row)
    [imitated] = completions([row], tokenizer)
    assert imitated == pair.chosen


def test_other_columns_of_dialogues_stay() -> None:
    rows = load_rows([{"chosen": c, "rejected": r, "source": i} for i, (c, r, _) in enumerate(DIALOGUES.values())])
    shuffled = rows.shuffle(seed=1).select(range(4))
    made = dialogue_rows(shuffled).to_list()
    assert [row["source"] for row in made] == shuffled["source"][:]
    for row in made:
        chosen, rejected, prompt = list(DIALOGUES.values())[row["source"]]
        assert row["prompt"] == prompt
        assert (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]) == (chosen, rejected)


def test_imitating_the_chosen_is_said(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "d", "chosen": "x"}]
    made = completions(rows, tokenizer)
    assert [said(tokenizer, tokens) for tokens in made] == [("a", "b<eos>"), ("a", "d<eos>")]
    assert [r.getMessage() for r in caplog.records] == [
        "completions: 1 of 2 rows are pairs, of which the chosen answer is taken"
    ]


def test_texts_that_share_no_dialogue_are_refused(tokenizer: Any) -> None:
    rows = [{"chosen": dialogue(" Hi", " Ho"), "rejected": dialogue(" Ha", " Ho")}]
    for read in (pairs, prompts, completions):
        with pytest.raises(
            ValueError,
            match=rf"{read.__name__}: row 1: no column 'prompt' among .*share no beginning that ends with "
            r"'\\n\\nAssistant:' .*load_rows\(\.\.\., columns=\{'prompt'",
        ):
            read(rows, tokenizer)
    with pytest.raises(ValueError, match=r"dialogue_rows: row 1: .*share no beginning"):
        dialogue_rows(rows)
    with pytest.raises(ValueError, match="dialogue_rows: the rows have a column 'prompt' already"):
        dialogue_rows([{"prompt": "Hi", "chosen": "a", "rejected": "b"}])
    with pytest.raises(
        ValueError, match=r"dialogue_rows: row 1: .*must be dialogues written as one text, got messages"
    ):
        dialogue_rows([{"chosen": [turn("user", "Hi")], "rejected": [turn("user", "Hi")]}])


def test_an_empty_answer_is_refused_with_a_filter_that_works(tokenizer: Any) -> None:
    fine, empty = (dialogue(" Hi", " Ho"), dialogue(" Hi", " No")), (dialogue(" Hi", " Ho"), dialogue(" Hi", " "))
    rows = load_rows([{"chosen": chosen, "rejected": rejected} for chosen, rejected in (fine, empty)])
    with pytest.raises(ValueError, match=r"pairs: row 2: 'rejected' ends with .* so its answer is empty") as error:
        pairs(rows, tokenizer)
    way_out = str(error.value).partition("drop such rows: ")[2]
    datasets.disable_progress_bars()
    assert len(pairs(eval(way_out, {"rows": rows}), tokenizer)) == 1
    assert len(prompts(rows, tokenizer)) == 2  # which reads no answer


# prompts of pairs, for online training


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_prompts_of_pairs_are_those_that_pairs_makes(tokenizer: Any) -> None:
    asked = [turn("user", "Hi"), turn("assistant", "Ho"), turn("user", "Why")]
    good, bad = [turn("assistant", "So")], [turn("assistant", "No")]
    rows = [
        {"chosen": asked + good, "rejected": asked + bad},
        {"prompt": "Why", "chosen": asked + good, "rejected": asked + bad, "score": 3.0},
        {"prompt": asked, "chosen": asked + good, "rejected": asked + bad},
        {"prompt": asked, "chosen": good, "rejected": bad},
        {"prompt": asked, "chosen": "So", "rejected": "No"},
    ]
    for row, prompt, pair in zip(rows, prompts(rows, tokenizer), pairs(rows, tokenizer), strict=True):
        assert prompt.text == asked
        assert prompt.ids == pair.chosen.input_ids[: pair.chosen.loss_mask.index(True)]
        assert tokenizer.decode(prompt.ids) == "<u>Hi<eos><a>Ho<eos><u>Why<eos><a>"
        assert prompt.columns == {name: value for name, value in row.items() if name != "prompt"}
    [text] = prompts([{"prompt": "Hi", "chosen": "a", "rejected": "b"}], tokenizer)
    assert (text.text, tokenizer.decode(text.ids)) == ("Hi", "Hi")
    silent = {"prompt": "Why", "chosen": asked + good, "rejected": [*asked, turn("assistant", "")]}
    assert prompts([silent], tokenizer)[0].text == asked  # the answers are not read
    with pytest.raises(ValueError, match="the text of 'prompt' is no message"):
        prompts([{**rows[1], "prompt": "What"}], tokenizer)
    with pytest.raises(ValueError, match=r"part at message 1 \(of assistant and assistant\)"):
        prompts([{"chosen": good, "rejected": bad}], tokenizer)


def test_a_policy_trains_online_on_dialogues_of_pairs(tokenizer: Any) -> None:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    rows = [{"chosen": chosen, "rejected": rejected} for chosen, rejected, _ in DIALOGUES.values()]
    seen = []

    def reward(prompts: Any, completions: Any, chosen: Any, rejected: Any, **columns: Any) -> list[float]:
        seen.extend(zip(prompts, chosen, strict=True))
        return [float(len(completion)) for completion in completions]

    session = Session(model, tokenizer)
    questions = prompts(rows, tokenizer)
    train_online(
        session,
        questions,
        reward,
        rlloss.GRPOLoss(),
        steps=1,
        prompts_per_step=7,
        group_size=2,
        max_new_tokens=2,
        progress=False,
    )
    assert sorted(set(seen)) == sorted({(prompt, chosen) for chosen, _, prompt in DIALOGUES.values()})


# another name of a column


def test_a_response_is_a_completion(tokenizer: Any) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": [turn("user", "a")], "completion": "b"}]
    renamed = [{"prompt": row["prompt"], "response": row["completion"]} for row in rows]
    assert completions(renamed, tokenizer) == completions(rows, tokenizer)
    thumbs = [{**row, "label": True} for row in renamed]
    assert [one.tokens for one in labelled(thumbs, tokenizer)] == completions(rows, tokenizer)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (
            {"prompt": "a", "completion": "b", "response": "c"},
            "'completion' and 'response' are two names of one column",
        ),
        ({"prompt": "a", "response": ""}, r"field 'response' must be a non-empty text .*row\['response'\]"),
        ({"prompt": "a", "response": "b", "messages": []}, "both 'messages' and 'prompt' with 'response'"),
        ({"prompt": "a", "response": [turn("assistant", "b")]}, "the prompt is a text but 'response' holds messages"),
        ({"response": "b"}, r"needs the columns 'prompt' and 'completion', or 'response'.*got \['response'\]"),
    ],
)
def test_a_bad_response_is_called_by_its_name(tokenizer: Any, row: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        completions([row], tokenizer)
