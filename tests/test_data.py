import json
import logging
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlloss.loop.data import Pair, Prompt, Tokens, completions, load_rows, pairs, prompts

DATA = Path(__file__).parents[2] / "shared" / "data"
ROWS = [
    {"prompt": "2+2=", "completion": "4", "note": "a,b"},
    {"prompt": 'a "quoted"\nline', "completion": "ü\u2028x", "note": "-"},
    {"prompt": "NA", "completion": "007", "note": "None"},
]

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
MARKED_TURN = (
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
)
TOOL_TURN = "<|im_start|>{{ m.role }}\n{{ m.content or m.tool_calls | tojson }}<|im_end|>\n"
# As reasoning models do: only the last answer keeps its thoughts.
FORGETFUL = "<|im_start|>{{ m.role }}\n{{ m.content if loop.last else m.content.split('~')[-1] }}<|im_end|>\n"
FORGETFUL_MARKED = FORGETFUL.replace("{{ m.content if", "{% generation %}{{ m.content if").replace(
    "<|im_end|>", "<|im_end|>{% endgeneration %}"
)


def chat_template(turn: str, header: str = "<|im_start|>assistant\n") -> str:
    prompt = "{% if add_generation_prompt %}" + header + "{% endif %}"
    return "{% for m in messages %}" + turn + "{% endfor %}" + prompt


def letters(
    turn: str | None = TURN, *, bos: bool = True, eos: bool = False, words: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters (or of words, which drops white space) that decodes to exactly its input."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocabulary = [
        *special,
        *(chr(i) for i in range(32, 127)),
        "\n",
        *(["user", "assistant", "Hi", "ho"] if words else []),
    ]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    whole = pre_tokenizers.WhitespaceSplit()
    tokenizer.pre_tokenizer = whole if words else pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    around = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": special[3:]})
    fast.chat_template = None if turn is None else chat_template(turn)
    return fast


def trained(tokenizer: Any, tokens: Tokens) -> list[str]:
    """The decoded runs of trained tokens."""
    runs: list[list[int]] = []
    for t, is_trained in enumerate(tokens.loss_mask):
        if is_trained and not (t and tokens.loss_mask[t - 1]):
            runs.append([])
        if is_trained:
            runs[-1].append(tokens.input_ids[t])
    assert len(tokens.loss_mask) == len(tokens.input_ids)
    return [tokenizer.decode(run) for run in runs]


def chat(*texts: str, first: str = "user") -> list[dict[str, str]]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def written(folder: Path, name: str, rows: Sequence[dict[str, Any]] = ROWS) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), "utf-8-sig")
    elif path.suffix == ".csv":
        cells = [rows[0].keys(), *(row.values() for row in rows)]
        lines = [",".join('"' + str(cell).replace('"', '""') + '"' for cell in line) for line in cells]
        path.write_text("\r\n".join(lines) + "\r\n", "utf-8", newline="")
    else:
        datasets.Dataset.from_list(list(rows)).to_parquet(path)
    return path


@pytest.fixture(autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name)
    assert load_rows(path).to_list() == ROWS
    assert load_rows(str(path)).to_list() == ROWS
    assert load_rows(tmp_path).to_list() == ROWS


def test_rows_in_memory_or_saved_by_datasets_are_the_same_rows(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    splits = datasets.DatasetDict({"train": rows, "test": rows.select([2])})
    rows.save_to_disk(tmp_path / "one")
    splits.save_to_disk(tmp_path / "two")
    for source in (ROWS, tuple(ROWS), rows, splits, tmp_path / "one", tmp_path / "two"):
        assert load_rows(source).to_list() == ROWS
    for source in (splits, tmp_path / "two"):
        assert load_rows(source, split="test").to_list() == ROWS[2:]
        with pytest.raises(ValueError, match=r"has splits \['test', 'train'\], not 'tests'; did you mean 'test'"):
            load_rows(source, split="tests")
    for source in (ROWS, rows, tmp_path / "one", written(tmp_path, "rows.json")):
        with pytest.raises(ValueError, match="has no splits to choose 'test' from"):
            load_rows(source, split="test")


def test_folder_gives_one_split_and_never_mixes_two(tmp_path: Path) -> None:
    for i, row in enumerate(ROWS):
        written(tmp_path, f"shards/train-0000{i}-of-00003.parquet", [row])
        written(tmp_path, f"nested/{['train', 'train', 'test'][i]}/{i}.jsonl", [row])
        written(tmp_path, f"plain/{i}.csv", [row])
        written(tmp_path, f"words/{['math_train', 'math_test', 'latest'][i]}.json", [row])
    written(tmp_path, "shards/test-00000-of-00001.parquet", ROWS[:1])
    written(tmp_path, "plain/.cache/3.csv", ROWS)
    assert load_rows(tmp_path / "shards").to_list() == ROWS
    assert load_rows(tmp_path / "shards", split="test").to_list() == ROWS[:1]
    assert load_rows(tmp_path / "nested").to_list() == ROWS[:2]
    assert load_rows(tmp_path / "nested", split="test").to_list() == ROWS[2:]
    assert load_rows(tmp_path / "plain").to_list() == ROWS
    for folder, split in (("plain", "test"), ("words", "train"), ("nested", "validation")):
        with pytest.raises(ValueError, match=f"has no files of split '{split}'.*pass the file itself"):
            load_rows(tmp_path / folder, split=split)
    with pytest.raises(ValueError, match=r"both \.csv and \.json and \.jsonl and \.parquet files"):
        load_rows(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.jsonl, \.json, \.csv, \.parquet file"):
        load_rows(tmp_path / "empty")
    written(tmp_path, "unlike/0.jsonl", [{"a": 1}])
    written(tmp_path, "unlike/1.jsonl", [{"a": "x"}])
    with pytest.raises(ValueError, match="unlike do not fit together"):
        load_rows(tmp_path / "unlike")


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": }\n', r"a\.jsonl, line 2: malformed JSON: Expecting value at column 7"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n', r"a\.jsonl, line 2: malformed JSON: the line is blank"),
        ("a.jsonl", "", r"a\.jsonl, line 1: malformed JSON: the line is blank"),
        ("a.jsonl", '{"a": 1}\n["b"]\n', r"a\.jsonl, line 2: expected an object .* got list \['b'\]"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": 2}\n{"a": "b"}\n{"a": 3}',
            r"a\.jsonl, line 3: field 'a' is 'b', which does not fit",
        ),
        ("a.jsonl", '{"a": 1, "b": []}\n{"b": [1]}\n{"b": 2}', r"a\.jsonl, line 3: field 'b' is 2, which does not fit"),
        ("a.json", '[{"a": 1},\n {"a": ]', r"a\.json, line 2: malformed JSON: Expecting value at column 8"),
        ("a.json", '{"a": 1}\n{"a": 2}', r"a\.json, line 2: malformed JSON.*is it JSON lines\? then name it \.jsonl"),
        ("a.json", '{"rows": []}', r"expected a list of objects, got dict with keys \['rows'\]"),
        ("a.json", '["once upon a time"]', r"a\.json, row 1: expected an object .* got str 'once upon a time'"),
        ("a.json", "[]", r"a\.json holds no rows"),
        ("a.csv", "a,b\n1,2\n3\n", r"a\.csv, row 2: 1 cells under a header of 2"),
        ("a.csv", "a,b\n1,2\n3,4,5\n", r"a\.csv, row 2: 3 cells under a header of 2"),
        ("a.csv", "a,b\n1,2\n\n3,4\n", r"a\.csv, row 2: 0 cells under a header of 2"),
        ("a.csv", "a,a\n1,2\n", r"the header names a column twice"),
        ("a.csv", 'a,b\n1,"2\n', r"a\.csv, line 2: malformed CSV: unexpected end of data"),
        ("a.csv", "", r"a\.csv holds no rows"),
        ("a.parquet", "not parquet", r"a\.parquet: not a readable Parquet file"),
        ("a.txt", "hello", r"a\.txt: cannot read \.txt; use \.jsonl"),
        ("a", "hello", r"a: cannot read a file without suffix"),
        ("a.jsonl", b'{"a": "\xff"}', r"a\.jsonl: byte 7 is not UTF-8 text"),
    ],
)
def test_malformed_file_is_one_error_with_file_and_row(
    tmp_path: Path, name: str, text: str | bytes, match: str
) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=match):
        load_rows(tmp_path / name)


def test_fields_that_only_later_rows_have_are_kept() -> None:
    assert load_rows([{"a": 1}, {"a": 2, "b": "x"}]).to_list() == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


@pytest.mark.unhooked
@pytest.mark.parametrize(("source", "match"), [([{"a": 1}, "b"], "row 2: expected an object"), (7, "rows from int")])
def test_what_holds_no_rows_is_refused(source: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load_rows(source)


def test_absent_file_is_reported_and_the_hub_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    written(tmp_path, "rows.jsonl")
    for source in (tmp_path / "row.jsonl", str(tmp_path / "row.jsonl")):
        with pytest.raises(FileNotFoundError, match=r"row\.jsonl does not exist; did you mean 'rows\.jsonl'"):
            load_rows(source)
    for source in (
        "no_such.jsonl",
        "./folder",
        "../x",
        "~/x",
        "a/b/c",
        "data/train.parquet",
        "C:\\x",
        Path("openai/gsm8k"),
    ):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            load_rows(source)


def test_unreachable_hub_teaches() -> None:
    with pytest.raises(OSError, match=r"'rlloss-nobody/nothing-v1.5' is no local file.*hub.*Offline.*save_to_disk"):
        load_rows("rlloss-nobody/nothing-v1.5")


def test_hub_is_asked_for_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or datasets.Dataset.from_list(ROWS)
    )
    rows = load_rows("openai/gsm8k", split="test[:3]", columns={"completion": "note", "note": "completion"})
    assert asked == [(("openai/gsm8k",), {"split": "test[:3]"})]
    assert rows["completion"][:] == [row["note"] for row in ROWS]


def test_columns_are_renamed_ours_from_theirs() -> None:
    given = datasets.Dataset.from_list(ROWS)
    rows = load_rows(given, columns={"chosen": "completion", "note": "note"})
    assert rows.to_list() == [{"prompt": r["prompt"], "chosen": r["completion"], "note": r["note"]} for r in ROWS]
    assert given.to_list() == ROWS
    with pytest.raises(ValueError, match=r"no column 'completions', only \['prompt', .*; did you mean 'completion'"):
        load_rows(ROWS, columns={"chosen": "completions"})
    with pytest.raises(ValueError, match="already has a column 'prompt'"):
        load_rows(ROWS, columns={"prompt": "completion"})
    with pytest.raises(ValueError, match="uses one column twice"):
        load_rows(ROWS, columns={"chosen": "completion", "rejected": "completion"})


def test_error_names_the_line_only_while_rows_are_those_of_the_file(tmp_path: Path) -> None:
    bad = [*ROWS, {"prompt": " ", "completion": "x", "note": ""}]
    rows = load_rows(written(tmp_path, "a.jsonl", bad), columns={"hint": "note"})
    with pytest.raises(
        ValueError, match=r"prompts: .*a\.jsonl, line 4: field 'prompt' must be a non-empty text .* got ' '"
    ):
        prompts(rows, letters())
    changed = rows.filter(lambda row: row["prompt"] != "NA").filter(lambda row: True)
    with pytest.raises(ValueError, match=r"^prompts: row 3: field 'prompt'"):
        prompts(changed, letters())
    with pytest.raises(ValueError, match=r"^prompts: row 4: field 'prompt'"):
        prompts(bad, letters())
    written(tmp_path, "parts/0.csv")
    written(tmp_path, "parts/1.csv", bad)
    with pytest.raises(ValueError, match=r"prompts: .*1\.csv, row 4: field 'prompt'"):
        prompts(load_rows(tmp_path / "parts"), letters())
    written(tmp_path, "parts/0.csv", bad)
    with pytest.raises(ValueError, match=r"prompts: .*0\.csv, row 4: field 'prompt'"):
        prompts(load_rows(tmp_path / "parts"), letters())


def test_prompt_text_is_raw_and_prompt_messages_go_through_the_template() -> None:
    tokenizer = letters()
    messages = chat("Hi", "Ho", "And?")
    text, said = prompts([{"prompt": "2+2=", "answer": 4}, {"prompt": messages, "answer": 5}], tokenizer)
    assert text == Prompt(tokenizer("2+2=").input_ids, "2+2=", {"answer": 4})
    assert tokenizer.decode(text.ids) == "<s>2+2="
    assert str(tokenizer.decode(said.ids)).endswith("<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")
    assert said.ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert (said.text, said.columns) == (messages, {"answer": 5})


def test_long_prompt_keeps_its_end_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "abcdef"}, {"prompt": "ab"}, {"prompt": chat("Hi")}]
    tokenizer = letters()
    whole = prompts(rows, tokenizer)
    assert caplog.records == []
    cut = prompts(rows, tokenizer, max_prompt_length=3)
    assert [p.ids for p in cut] == [p.ids[-3:] for p in whole]
    assert [r.getMessage() for r in caplog.records] == [
        "prompts: 2 of 3 sequences are longer than max_prompt_length=3 and were cut "
        f"(longest: {len(whole[2].ids)} tokens)"
    ]
    assert caplog.records[0].levelno == logging.WARNING
    for limit in (0, -1):
        with pytest.raises(ValueError, match="max_prompt_length must be an integer"):
            prompts(rows, tokenizer, max_prompt_length=limit)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"promt": "x"}, r"row 2: no column 'prompt' among \['promt'\]; did you mean 'promt'.*columns={'prompt'"),
        ({"prompt": ""}, "row 2: field 'prompt' must be a non-empty text or a list of messages, got ''"),
        ({"prompt": " \n"}, "row 2: .*must be a non-empty text"),
        ({"prompt": None}, "row 2: .*got None"),
        ({"prompt": 42}, "row 2: .*got 42"),
        ({"prompt": []}, "row 2: field 'prompt' holds no messages"),
        ({"prompt": ["Hi"]}, r"row 2: message 1 of field 'prompt' must be \{'role'.*got str 'Hi'"),
        ({"prompt": [{"from": "human", "value": "Hi"}]}, r"message 1 .* got keys \['from', 'value'\]"),
        (
            {"prompt": [{"role": "user", "content": " "}]},
            r"message 1 .*\(user\) needs a non-empty text as content, got ' '",
        ),
        ({"prompt": [{"role": "user", "content": ["Hi"]}]}, r"needs a non-empty text as content, got \['Hi'\]"),
        ({"prompt": chat("Hi", "Ho")}, "row 2: the prompt ends with the assistant's message"),
        ({"prompt": "Hi</s>"}, "row 2: the prompt's tokens end with the end-of-sequence token 2"),
        pytest.param("Hi", "row 2 must be a dict of columns, got str", marks=pytest.mark.unhooked),
    ],
)
def test_bad_prompt_is_one_error_with_its_row(row: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        prompts([{"prompt": "fine"}, row], letters())


def test_tokenizer_that_ends_every_text_is_refused() -> None:
    for rows, read in (([{"prompt": "Hi"}], prompts), ([{"text": "Hi"}], completions)):
        with pytest.raises(ValueError, match="add_eos_token=False"):
            read(rows, letters(eos=True))


def test_completion_text_is_trained_with_its_end_of_sequence() -> None:
    tokenizer = letters()
    rows = [{"prompt": "2+2=", "completion": "4!"}, {"prompt": "2+2=", "completion": "4!</s>", "text": "ignored"}]
    one, two = completions(rows, tokenizer)
    assert tokenizer.decode(one.input_ids) == "<s>2+2=4!</s>"
    assert one.loss_mask == [False] * 5 + [True] * 3
    assert two == one  # an end of sequence in the text is not doubled


def test_plain_text_is_trained_whole_but_for_what_precedes_every_text() -> None:
    for bos in (True, False):
        tokenizer = letters(bos=bos)
        [tokens] = completions([{"text": "Once"}], tokenizer)
        assert tokenizer.decode(tokens.input_ids) == "<s>" * bos + "Once</s>"
        assert trained(tokenizer, tokens) == ["Once</s>"]


def test_beginning_of_sequence_that_is_also_its_end_is_no_finished_prompt() -> None:
    tokenizer = letters()
    tokenizer.eos_token = "<s>"
    [tokens] = completions([{"text": "Once"}], tokenizer)
    assert tokenizer.decode(tokens.input_ids) == "<s>Once<s>"
    assert tokens.loss_mask == [False] + [True] * 5


def test_tokenizer_without_end_of_sequence_teaches() -> None:
    tokenizer = letters()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"row 1: the tokenizer has no eos_token.*set tokenizer\.eos_token"):
        completions([{"prompt": "a", "completion": "b"}], tokenizer)


CONVERSATION = [{"role": "system", "content": "Be\nkind"}, *chat("Hi  you", " I am: x\n", "Why", "So"), *chat("Bye")]


@pytest.mark.parametrize("turn", [TURN, MARKED_TURN])
def test_chat_trains_exactly_the_assistant_texts_and_their_ends(turn: str) -> None:
    tokenizer = letters(turn)
    [tokens] = completions([{"messages": CONVERSATION}], tokenizer)
    assert tokens.input_ids == tokenizer.apply_chat_template(CONVERSATION, return_dict=False)
    assert trained(tokenizer, tokens) == [" I am: x\n<|im_end|>", "So<|im_end|>"]


@pytest.mark.parametrize("turn", [TURN, MARKED_TURN])
def test_completion_messages_are_trained_and_those_of_the_prompt_are_not(turn: str) -> None:
    tokenizer = letters(turn)
    rows = [
        {"prompt": chat("Hi", "Ho", "Why"), "completion": chat("So", "Ah", "Yes", first="assistant")},
        {"prompt": chat("Hi", "Ho", "Why"), "completion": "So"},
        {"prompt": "raw", "completion": "text"},
    ]
    made = completions(rows, tokenizer)
    assert [trained(tokenizer, tokens) for tokens in made] == [
        ["So<|im_end|>", "Yes<|im_end|>"],
        ["So<|im_end|>"],
        ["text</s>"],
    ]
    whole = chat("Hi", "Ho", "Why", "So", "Ah", "Yes")
    assert made[0].input_ids == tokenizer.apply_chat_template(whole, return_dict=False)


@pytest.mark.parametrize("turn", [TURN, MARKED_TURN])
def test_order_of_many_rows_is_kept(turn: str) -> None:
    tokenizer = letters(turn)
    rows = [{"messages": chat("Hi", f"{i}")} if i % 3 else {"prompt": "Hi", "completion": f"{i}"} for i in range(1600)]
    ends = ["<|im_end|>" if i % 3 else "</s>" for i in range(1600)]
    assert [trained(tokenizer, t) for t in completions(rows, tokenizer)] == [
        [f"{i}{end}"] for i, end in enumerate(ends)
    ]


def test_tool_calls_are_trained_and_tool_results_are_not() -> None:
    tokenizer = letters(TOOL_TURN)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    messages = [*chat("Hi"), call, {"role": "tool", "content": "42"}, {"role": "assistant", "content": "It is 42"}]
    rows = load_rows([{"messages": messages}])  # Arrow gives every message tool_calls, and the call a content, of None
    assert set(rows[0]["messages"][0]) == {"role", "content", "tool_calls"}
    [tokens] = completions(rows, tokenizer)
    assert trained(tokenizer, tokens) == ['[{"name": "f"}]<|im_end|>', "It is 42<|im_end|>"]


def test_end_of_turn_without_a_special_token_is_kept() -> None:
    tokenizer = letters()
    tokenizer.chat_template = chat_template("{{ m.role }}: {{ m.content }}\n", "assistant: ")
    [tokens] = completions([{"messages": chat("Hi", "Ho", "Why", "So")}], tokenizer)
    assert trained(tokenizer, tokens) == ["Ho\n", "So\n"]
    [tokens] = completions([{"messages": chat("Hi", "a<|im_end|>b")}], tokenizer)
    assert trained(tokenizer, tokens) == ["a<|im_end|>b\n"]


def test_template_that_rewrites_history_is_refused_unless_it_marks_the_assistant() -> None:
    messages = chat("Hi", "think~Ho", "Why", "hm~So")
    with pytest.raises(ValueError, match=r"row 1: message 2: .*not prefix-stable.*'think~Ho.*'Ho.*generation %"):
        completions([{"messages": messages}], letters(FORGETFUL))
    row = {"prompt": messages[:3], "completion": messages[3:]}
    assert trained(letters(FORGETFUL), completions([row], letters(FORGETFUL))[0]) == ["hm~So<|im_end|>"]
    marked = letters(
        MARKED_TURN.replace(
            "{% generation %}{{ m.content }}",
            "{% generation %}" + "{{ m.content if loop.last else m.content.split('~')[-1] }}",
        )
    )
    assert trained(marked, completions([{"messages": messages}], marked)[0]) == ["Ho<|im_end|>", "hm~So<|im_end|>"]


def test_header_that_merges_with_the_answer_is_refused() -> None:
    tokenizer = letters("{{ m.role }}{{ m.content }} ", words=True)
    tokenizer.chat_template = chat_template("{{ m.role }}{{ m.content }} ", "assistant")
    with pytest.raises(ValueError, match="message 2: the chat template is not prefix-stable"):
        completions([{"messages": chat("Hi", "Ho")}], tokenizer)


def test_marks_that_the_tokenizer_cannot_place_are_refused() -> None:
    # White space belongs to no token here: transformers drops the span that begins on it, and all spans after it.
    turn = MARKED_TURN.replace("{% generation %}", "{% generation %} ")
    with pytest.raises(
        ValueError, match=r"row 1: .*generation %} marks give 0 spans of tokens for 2 assistant messages"
    ):
        completions([{"messages": chat("Hi", "ho", "Hi", "ho")}], letters(turn, words=True))
    # Here a span ends on it, and transformers would train everything to the end.
    turn = MARKED_TURN.replace("{% endgeneration %}", " {% endgeneration %}")
    with pytest.raises(
        ValueError, match=r"row 1: .*generation %} marks give 1 spans of tokens for 2 assistant messages"
    ):
        completions([{"messages": chat("Hi", "ho", "Hi", "ho")}], letters(turn, words=True))


def test_template_errors_name_the_row() -> None:
    with pytest.raises(ValueError, match=r"row 1: chat messages need a chat template.*set tokenizer\.chat_template"):
        completions([{"messages": chat("Hi", "Ho")}], letters(None))
    with pytest.raises(ValueError, match=r"row 1: chat messages need a chat template"):
        prompts([{"prompt": chat("Hi")}], letters(None))
    strict = letters("{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}" + TURN)
    rows = [
        {"messages": chat("Hi", "Ho")},
        {"messages": [*chat("Hi"), {"role": "tool", "content": "x"}, *chat("a", "b")]},
    ]
    with pytest.raises(ValueError, match=r"row 2: the chat template refuses messages 1 to 3: no tools here"):
        completions(rows, strict)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "a"}, r"row 2: needs the columns 'prompt' and 'completion', .*got \['prompt'\]"),
        ({"question": "a"}, r"got \['question'\]; rename yours"),
        ({"prompt": "a", "text": "b"}, r"got \['prompt', 'text'\]"),
        ({"prompt": "a", "completion": " "}, "row 2: field 'completion' must be a non-empty text"),
        ({"prompt": "a", "completion": None}, "row 2: field 'completion' must be a non-empty text"),
        (
            {"prompt": "a", "completion": chat("b", first="assistant")},
            "row 2: the prompt is a text but 'completion' holds",
        ),
        (
            {"prompt": chat("a"), "completion": chat("b")},
            "'completion' must answer the prompt .* got 'user' after 'user'",
        ),
        ({"prompt": chat("a", "b"), "completion": "c"}, "must answer the prompt .* got 'assistant' after 'assistant'"),
        ({"prompt": "a", "completion": "b", "messages": chat("a", "b")}, "has both 'messages' and 'prompt'"),
        ({"messages": "a"}, "field 'messages' must be a list of messages, got a text"),
        ({"text": chat("a", "b")}, "field 'text' must be a text, got messages"),
        (
            {"messages": chat("a")},
            r"row 2: no message has the role 'assistant', so nothing is trained; roles: \['user'\]",
        ),
        ({"messages": chat("a", first="assistant")}, "row 2: the first message is the assistant's"),
    ],
)
def test_bad_completion_row_is_one_error(row: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        completions([{"prompt": "fine", "completion": "fine"}, row], letters())


def test_long_sequence_loses_its_end_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = letters()
    rows = [{"prompt": "ab", "completion": "cdef"}, {"prompt": "a", "completion": "b"}, {"messages": chat("H", "Ho")}]
    whole = completions(rows[:2], tokenizer)
    assert completions(rows[:2], tokenizer, max_length=8) == whole
    assert caplog.records == []
    cut = completions(rows[:2], tokenizer, max_length=5)
    assert [(t.input_ids, t.loss_mask) for t in cut] == [(t.input_ids[:5], t.loss_mask[:5]) for t in whole]
    assert [r.getMessage() for r in caplog.records] == [
        "completions: 1 of 2 sequences are longer than max_length=5 and were cut (longest: 8 tokens); "
        "3 of 7 trained tokens were lost"
    ]
    with pytest.raises(
        ValueError, match=r"row 1: of its 8 tokens none is trained within max_length=3: the first is token 3"
    ):
        completions(rows, tokenizer, max_length=3)
    with pytest.raises(ValueError, match=r"row 3: of its \d+ tokens none is trained within max_length=8"):
        completions(rows, tokenizer, max_length=8)
    with pytest.raises(ValueError, match="max_length must be an integer"):
        completions(rows, tokenizer, max_length=0)


def test_mask_of_the_first_token_alone_trains_nothing() -> None:
    tokenizer = letters(bos=False)
    with pytest.raises(
        ValueError, match="row 1: of its 2 tokens none is trained within max_length=1: the first is token 1"
    ):
        completions([{"text": "a"}], tokenizer, max_length=1)


GOOD, BAD = chat("Good", first="assistant"), chat("Bad", first="assistant")
SHAPES = {
    "answers": {"prompt": chat("Hi"), "chosen": GOOD, "rejected": BAD},
    "texts_after_messages": {"prompt": chat("Hi"), "chosen": "Good", "rejected": "Bad"},
    "whole": {"chosen": chat("Hi", "Good"), "rejected": chat("Hi", "Bad")},
    "whole_with_prompt": {"prompt": chat("Hi"), "chosen": chat("Hi", "Good"), "rejected": chat("Hi", "Bad")},
    "whole_with_prompt_text": {"prompt": "Hi", "chosen": chat("Hi", "Good"), "rejected": chat("Hi", "Bad")},
}


@pytest.mark.parametrize("turn", [TURN, MARKED_TURN])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_chat_pair_gives_the_same_tokens(shape: str, turn: str) -> None:
    tokenizer = letters(turn)
    [pair] = pairs(load_rows([SHAPES[shape]]), tokenizer)
    assert pair.chosen.input_ids == tokenizer.apply_chat_template(chat("Hi", "Good"), return_dict=False)
    assert pair.rejected.input_ids == tokenizer.apply_chat_template(chat("Hi", "Bad"), return_dict=False)
    assert trained(tokenizer, pair.chosen) == ["Good<|im_end|>"]
    assert trained(tokenizer, pair.rejected) == ["Bad<|im_end|>"]


def test_pair_of_texts_shares_the_prompt_tokens() -> None:
    tokenizer = letters()
    [pair] = pairs([{"prompt": "Hi ", "chosen": "Good", "rejected": "Bad"}], tokenizer)
    expected = completions([{"prompt": "Hi ", "completion": text} for text in ("Good", "Bad")], tokenizer)
    assert pair == Pair(*expected)
    assert pair.chosen.input_ids[:4] == pair.rejected.input_ids[:4]


def test_conversations_part_at_the_first_answer_that_differs() -> None:
    tokenizer = letters()
    rows = [
        {"chosen": chat("Hi", "Ho", "Why", "Good"), "rejected": chat("Hi", "Ho", "Why", "Bad")},
        {"chosen": chat("Hi", "Good", "So", "Yes"), "rejected": chat("Hi", "Bad", "Oh", "No")},
        {"chosen": chat("Hi", "Ho"), "rejected": chat("Hi", "Ho", "Why", "Bad")},
        {"chosen": chat("Hi", "Ho", "Why", "Same"), "rejected": chat("Hi", "Ho", "Why", "Same")},
        {"prompt": chat("Hi"), "chosen": chat("Hi", "Ho", "Why", "Good"), "rejected": chat("Hi", "Ho", "Why", "Bad")},
    ]
    made = [[trained(tokenizer, t) for t in (pair.chosen, pair.rejected)] for pair in pairs(rows, tokenizer)]
    end = "<|im_end|>"
    assert made == [
        [[f"Good{end}"], [f"Bad{end}"]],
        [[f"Good{end}", f"Yes{end}"], [f"Bad{end}", f"No{end}"]],
        [[f"Ho{end}"], [f"Ho{end}", f"Bad{end}"]],
        [[f"Same{end}"], [f"Same{end}"]],
        [[f"Ho{end}", f"Good{end}"], [f"Ho{end}", f"Bad{end}"]],
    ]


def test_prompt_is_recognised_in_conversations_of_other_keys_or_that_begin_with_the_assistant() -> None:
    tokenizer = letters()
    named = [
        {"role": "assistant", "content": "Good", "name": "A"}
    ]  # gives the user's message of `chosen` a name of None
    rows = load_rows([{"prompt": chat("Hi"), "chosen": chat("Hi") + named, "rejected": chat("Hi", "Bad")}])
    greeted = chat("Hello", "Hi", first="assistant")
    more = {"prompt": greeted, "chosen": greeted + GOOD, "rejected": greeted + BAD}
    for pair in pairs([*rows.to_list(), more], tokenizer):
        assert trained(tokenizer, pair.chosen) == ["Good<|im_end|>"]
        assert trained(tokenizer, pair.rejected) == ["Bad<|im_end|>"]
        assert str(tokenizer.decode(pair.chosen.input_ids)).count("Hi") == 1


def test_identical_pairs_are_kept_and_counted_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": chat("a"), "chosen": GOOD, "rejected": GOOD},
        {"prompt": "a", "chosen": "this", "rejected": "that"},
    ]
    made = pairs(rows, letters())
    assert len(made) == 3
    assert made[0].chosen == made[0].rejected
    assert [r.getMessage() for r in caplog.records] == [
        "pairs: 2 of 3 pairs have identical chosen and rejected tokens (zero gradient)"
    ]
    assert caplog.records[0].levelno == logging.WARNING
    caplog.clear()
    pairs(rows[2:], letters())
    assert caplog.records == []
    pairs(rows[2:], letters(), max_length=4)  # the cut makes them equal
    assert [r.getMessage()[:22] for r in caplog.records] == ["pairs: 2 of 2 sequence", "pairs: 1 of 1 pairs ha"]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "a", "chosen": "b"}, r"row 2: no column 'rejected' among"),
        ({"chosen": "b", "rejected": "c"}, r"row 2: no column 'prompt' among \['chosen', 'rejected'\]"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "row 2: field 'rejected' must be a non-empty text"),
        ({"prompt": "a", "chosen": "b", "rejected": BAD}, "one of 'chosen' and 'rejected' is a text"),
        ({"prompt": "a", "chosen": GOOD, "rejected": BAD}, "the prompt is a text but 'chosen' holds messages"),
        ({"chosen": GOOD, "rejected": BAD}, r"part at message 1 \(of assistant and assistant\)"),
        ({"chosen": chat("a", "b"), "rejected": chat("c", "d")}, r"part at message 1 \(of user and user\)"),
        (
            {"chosen": chat("a", "b", "c", "d"), "rejected": chat("a", "b", "e", "f")},
            r"part at message 3 \(of user and user\); .* must be identical",
        ),
        ({"prompt": chat("a"), "chosen": chat("b", "c"), "rejected": chat("b", "d")}, "must begin with the 1 messages"),
        (
            {"prompt": chat("a"), "chosen": chat("a", "c"), "rejected": BAD},
            "must begin with the 1 messages of 'prompt'",
        ),
        ({"prompt": chat("a"), "chosen": chat("a"), "rejected": chat("a", "d")}, "must begin with the 1 messages"),
        ({"prompt": "x", "chosen": chat("a", "b"), "rejected": chat("a", "c")}, "the text of 'prompt' is no message"),
        ({"prompt": None, "chosen": chat("a", "b"), "rejected": chat("a", "c")}, "field 'prompt' must be a non-empty"),
        ({"chosen": chat("a"), "rejected": chat("a")}, r"part at message 1 \(of user and user\)"),
    ],
)
def test_bad_pair_is_one_error(row: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pairs([{"prompt": "fine", "chosen": "a", "rejected": "b"}, row], letters())


@pytest.fixture(scope="module")
def stories() -> Any:
    if not DATA.is_dir():
        pytest.skip(f"needs the datasets in {DATA}")
    return AutoTokenizer.from_pretrained(DATA / "stories260k")


def test_real_preference_files_become_pairs(stories: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = load_rows(DATA / "llms_from_scratch_preference_1100.json", columns={"prompt": "instruction"})
    made = pairs(rows, stories)
    assert len(made) == 1100
    assert "pairs: 6 of 1100 pairs have identical" in caplog.text
    for row, pair in zip(rows.to_list(), made, strict=True):
        assert [trained(stories, t) for t in (pair.chosen, pair.rejected)] == [
            [f"{row['chosen']}</s>"],
            [f"{row['rejected']}</s>"],
        ]
    rows = load_rows(DATA / "ultrafeedback_train_1000.jsonl")
    with pytest.raises(
        ValueError, match=r"ultrafeedback_train_1000\.jsonl, line 479: field 'rejected' .* got ''; fill it, or"
    ):
        pairs(rows, stories)
    made = pairs(rows.select(range(6)), stories, max_length=1000)
    assert max(len(t.input_ids) for pair in made for t in (pair.chosen, pair.rejected)) == 1000


def test_real_prompts_keep_their_columns(stories: Any) -> None:
    made = prompts(load_rows(DATA / "gsm8k_test.jsonl", columns={"prompt": "question"}), stories)
    assert len(made) == 1319
    assert made[0].columns["answer"].endswith("#### 18")
    assert made[0].ids[0] == stories.bos_token_id
    assert stories.decode(made[0].ids, skip_special_tokens=True) == made[0].text


def test_real_chats_train_the_assistant_alone(stories: Any) -> None:
    rows = load_rows(DATA / "llamafactory_kto_en_300.json").select(range(0, 300, 5))
    tokenizer = letters()
    for row, tokens in zip(rows.to_list(), completions(rows, tokenizer), strict=True):
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        ids = tokenizer([f"{answer}<|im_end|>" for answer in answers], add_special_tokens=False).input_ids
        assert [i for i, m in zip(tokens.input_ids, tokens.loss_mask, strict=True) if m] == [*chain(*ids)]
    with pytest.raises(ValueError, match="row 1: chat messages need a chat template"):
        completions(rows, stories)


def test_real_stories_are_texts_to_imitate(stories: Any) -> None:
    texts = json.loads((DATA / "tinystories_1000.json").read_text("utf-8"))
    made = completions(load_rows([{"text": text} for text in texts]), stories)
    assert len(made) == 1000
    assert trained(stories, made[7]) == [f"{texts[7]}</s>"]
    assert made[7].loss_mask == [False] + [True] * (len(made[7].input_ids) - 1)
