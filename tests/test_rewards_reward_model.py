"""Rewards by a reward model: against the same model, row by row, without padding and without the library."""

import json
import os
from typing import Any

import pytest
import torch
from torch import nn

from rlloss.loop import Session, pairs
from rlloss.loop.chat import Chat, chat_tokens
from rlloss.rewards import RewardModel, get_reward
from rlloss.rewards.window import max_positions
from rlloss.scalar import ScalarModel

os.environ["HF_HUB_OFFLINE"] = "1"
tokenizers = pytest.importorskip("tokenizers", reason="builds tiny Hugging Face models")
transformers = pytest.importorskip("transformers", reason="builds tiny Hugging Face models")

SPECIAL = ["<pad>", "<s>", "</s>", "<turn>", "[CLS]", "[SEP]"]
VOCABULARY = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz ?.,:\n"]
TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
SIZE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}
PROMPTS = ["who?", "", "a question that is rather long, is it not?", "b"]
COMPLETIONS = ["me", "an answer to nothing", "", "a very long answer to a very short question, over and over again"]
CHATS = [[{"role": "user", "content": prompt or "x"}] for prompt in PROMPTS]


def letters(*, bos=True, template=None, side="right", pad="<pad>") -> Any:
    """A tokenizer of single characters."""
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, "<pad>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    raw.decoder = tokenizers.decoders.Fuse()
    single = "<s> $A" if bos else "$A"
    raw.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1)])
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": pad, "additional_special_tokens": ["<turn>"]}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, padding_side=side, **marks)
    made.chat_template = template
    return made


def classifier(kind="Llama", *, labels=1, seed=0, **options) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**SIZE | {"num_labels": labels} | options)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


def causal_lm(seed=0) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZE)).eval()


def ids_of(tokenizer, prompt, completion, end=(2,)):
    first = [tokenizer.bos_token_id] * (tokenizer("a")["input_ids"][0] == 1)
    return [*first, *map(VOCABULARY.index, prompt + completion), *end]


def by_hand(model, ids, output=0):
    """The score of one row alone, at its last token."""
    with torch.no_grad():
        return float(model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1])[output])


def close(scores, expected):
    assert len({round(x, 3) for x in expected}) == len(expected)  # else a wrong order would not show
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected), rtol=2e-5, atol=2e-5, check_dtype=False)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("pad", ["<pad>", "</s>", None], ids=["pad", "pad-is-eos", "no-pad"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reward_model_scores_as_row_by_row_without_padding(side, pad, batch_size):
    tokenizer = letters(side=side, pad=pad)
    model = classifier(pad_token_id=tokenizer.pad_token_id)
    reward = get_reward("reward_model", model=model, tokenizer=tokenizer, batch_size=batch_size)
    rows = [ids_of(tokenizer, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    close(reward(PROMPTS, COMPLETIONS), [by_hand(model, ids) for ids in rows])


def test_rows_of_similar_length_go_together_and_without_gradient():
    seen = []
    model = classifier()
    reward = RewardModel(model=model, tokenizer=letters(), batch_size=2)
    model.model.register_forward_pre_hook(
        lambda _, args, options: seen.append((*options["input_ids"].shape, torch.is_grad_enabled())), with_kwargs=True
    )
    reward([""] * 4, ["a" * 30, "b", "a" * 31, "bc"])
    assert seen == [(2, 33, False), (2, 4, False)]
    assert reward([], []) == []


def test_texts_end_with_the_end_of_sequence_unless_told():
    model, tokenizer = classifier(), letters()
    rows = [ids_of(tokenizer, p, c, ()) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    without = RewardModel(model=model, tokenizer=tokenizer, append_eos=False)
    close(without(PROMPTS, COMPLETIONS), [by_hand(model, ids) for ids in rows])
    once = RewardModel(model=model, tokenizer=tokenizer)
    assert once(["who?"], ["me</s>"]) == once(["who?"], ["me"])


def test_messages_go_through_the_template():
    tokenizer, model = letters(template=TEMPLATE), classifier()
    reward = RewardModel(model=model, tokenizer=tokenizer)
    expected = []
    for [message], completion in zip(CHATS, COMPLETIONS, strict=True):
        ids = [3, *ids_of(tokenizer, "user\n", message["content"])[1:], VOCABULARY.index("\n")]
        ids += [3, *ids_of(tokenizer, "assistant\n", completion)[1:], VOCABULARY.index("\n")]
        expected.append(by_hand(model, ids))
    close(reward(CHATS, COMPLETIONS), expected)


def test_without_messages_or_a_template_texts_are_joined():
    tokenizer, model = letters(), classifier()
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who?"}]
    expected = by_hand(model, ids_of(tokenizer, "be brief\nwho?", "me"))
    assert RewardModel(model=model, tokenizer=tokenizer)([chat], ["me"]) == pytest.approx([expected], rel=1e-5)
    with_template = RewardModel(model=model, tokenizer=letters(template=TEMPLATE))
    assert with_template(["be brief\nwho?"], ["me"]) == pytest.approx([expected], rel=1e-5)


def test_one_of_several_outputs_is_chosen_by_name_or_number():
    names = {"id2label": {0: "bad", 1: "good", 2: "so"}, "label2id": {"bad": 0, "good": 1, "so": 2}}
    model, tokenizer = classifier(labels=3, **names), letters()
    rows = [ids_of(tokenizer, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    for label in (1, "good"):
        reward = RewardModel(model=model, tokenizer=tokenizer, label=label)
        close(reward(PROMPTS, COMPLETIONS), [by_hand(model, ids, 1) for ids in rows])
    with pytest.raises(ValueError, match=r"has 3 outputs, \{0: 'bad', 1: 'good', 2: 'so'\}, and one must be the score"):
        RewardModel(model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"label must be one of .*, got 'god'; did you mean 'good'"):
        RewardModel(model=model, tokenizer=tokenizer, label="god")
    with pytest.raises(ValueError, match=r"label must be one of the outputs .*, got 3"):
        RewardModel(model=model, tokenizer=tokenizer, label=3)


@pytest.mark.parametrize("kind", ["GPT2", "Qwen3"])
def test_other_decoders_have_their_head_found(kind):
    other = {"n_embd": 16, "n_layer": 2, "n_head": 2, "head_dim": 8, "num_key_value_heads": 2}
    model, tokenizer = classifier(kind, **other), letters()
    rows = [ids_of(tokenizer, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        expected = [float(model(torch.tensor([ids])).logits[0, 0]) for ids in rows]
    close(RewardModel(model=model, tokenizer=tokenizer)(PROMPTS, COMPLETIONS), expected)


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_an_encoder_reads_a_pair_of_texts(kind):
    tokenizer = letters()
    special = [("[CLS]", 4), ("[SEP]", 5)]
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    types = 2 if kind == "Bert" else 1
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"][:: 1 if types == 2 else 2]
    model = classifier(kind, type_vocab_size=types)
    reward = RewardModel(model=model, tokenizer=tokenizer, batch_size=3)
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        one, two = (list(map(VOCABULARY.index, text)) for text in (prompt, completion))
        before = [4, *one, 5] if prompt else [4]
        kinds = torch.tensor([[0] * len(before) + [int(bool(prompt))] * (len(two) + 1)])
        options = {"token_type_ids": kinds} if types == 2 else {}
        with torch.no_grad():
            expected.append(float(model(torch.tensor([[*before, *two, 5]]), **options).logits[0, 0]))
    close(reward(PROMPTS, COMPLETIONS), expected)


def scalar_model(seed=0) -> ScalarModel:
    model = ScalarModel(causal_lm(seed), bias=False)
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["texts", "chat"])
def test_a_folder_of_a_scalar_model_scores_where_it_was_trained(tmp_path, template):
    tokenizer, model = letters(template=template), scalar_model()
    folder = Session(model, tokenizer).save_model(tmp_path / "model")
    prompts, completions = (PROMPTS if template is None else CHATS)[::3], COMPLETIONS[::3]
    rows = [{"prompt": p, "chosen": c, "rejected": "no"} for p, c in zip(prompts, completions, strict=True)]
    expected = []
    for pair in pairs(rows, tokenizer):
        last = max(t for t, is_trained in enumerate(pair.chosen.loss_mask) if is_trained)
        with torch.no_grad():
            expected.append(float(model(torch.tensor([pair.chosen.input_ids]))[0, last]))
    reward: Any = get_reward("reward_model", model=folder)
    assert isinstance(reward.model, ScalarModel)
    close(reward(prompts, completions), expected)
    assert reward(prompts, completions) == RewardModel(model=model, tokenizer=tokenizer)(prompts, completions)
    assert len(reward(prompts, ["", ""])) == 2


def test_a_folder_of_transformers_is_loaded_with_its_tokenizer(tmp_path):
    model, tokenizer = classifier(), letters()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reward: Any = get_reward("reward_model", model=str(tmp_path))
    assert reward(PROMPTS, COMPLETIONS) == RewardModel(model=model, tokenizer=tokenizer)(PROMPTS, COMPLETIONS)


def saved(model, folder, architecture=None):
    model.save_pretrained(folder)
    letters().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | ({"architectures": [architecture]} if architecture else {}))
    )
    return folder


def test_a_model_without_a_trained_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is a LlamaForCausalLM, no sequence classifier; .* has no scalar_head"):
        RewardModel(model=saved(causal_lm(), tmp_path / "lm"))
    folder = saved(causal_lm(), tmp_path / "headless", "LlamaForSequenceClassification")
    with pytest.raises(ValueError, match=r"has no weights for \['score.weight'\], which would be drawn at random"):
        RewardModel(model=folder)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no head `score` and its tokenizer no CLS token"):
        RewardModel(model=causal_lm(), tokenizer=letters())


def test_a_head_that_does_more_than_it_seems_is_refused():
    class Squashed(transformers.LlamaForSequenceClassification):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.tanh() + 1
            return output

    torch.manual_seed(0)
    model = Squashed(transformers.LlamaConfig(**SIZE, num_labels=1)).eval()
    with pytest.raises(ValueError, match=r"three tokens score .* alone and .* in a padded batch"):
        RewardModel(model=model, tokenizer=letters())


def test_quantization_and_device_reach_the_loader(tmp_path, monkeypatch):
    folder, asked = saved(classifier(), tmp_path), {}
    load = transformers.AutoModelForSequenceClassification.from_pretrained

    def recorded(source, **options):
        asked.update(options)
        return load(source, output_loading_info=True)

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", recorded)
    RewardModel(model=folder, quantization={"load_in_8bit": True, "llm_int8_threshold": 5.0}, device="cpu")
    assert asked["quantization_config"].load_in_8bit
    assert asked["quantization_config"].llm_int8_threshold == 5.0
    assert asked["device_map"] == {"": "cpu"}
    with pytest.raises(ValueError, match=r"no option 'load_in_4bits'; did you mean 'load_in_4bit'"):
        RewardModel(model=folder, quantization={"load_in_4bits": True})
    with pytest.raises(ValueError, match="quantization is for a model that is loaded here"):
        RewardModel(model=classifier(), tokenizer=letters(), quantization={"load_in_4bit": True})


def test_a_loaded_model_moves_only_when_told(monkeypatch):
    moved = []
    monkeypatch.setattr(nn.Module, "to", lambda self, place: moved.append(place) or self)
    RewardModel(model=classifier(), tokenizer=letters())
    assert moved == []
    RewardModel(model=classifier(), tokenizer=letters(), device="cpu")
    assert moved == ["cpu"]


def test_scores_are_those_of_eval_mode():
    assert not RewardModel(model=scalar_model().train(), tokenizer=letters()).model.training


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"needs a model, got None; pass get_reward\('reward_model', model='folder or hub name'\)"),
        ({"model": nn.Linear(2, 1)}, "a loaded Linear needs its tokenizer, got None"),
        ({"model": "x", "batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"model": "x", "max_length": 0}, "max_length must be an integer of at least 1"),
        ({"model": "x", "append_eos": 1}, "append_eos must be True or False"),
    ],
)
def test_bad_options_teach(options, message):
    with pytest.raises(ValueError, match=f"reward_model: {message}"):
        RewardModel(**options)


CONTENT_ALONE = (
    "{% for m in messages %}<turn>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


@pytest.mark.parametrize("before", [[], [{"role": "assistant", "content": "me"}, {"role": "user", "content": "no"}]])
def test_a_turn_that_says_nothing_is_scored_at_the_end_of_the_conversation(before):
    tokenizer, model = letters(template=CONTENT_ALONE), scalar_model()
    chat = [{"role": "user", "content": "who?"}, *before]
    ids = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": ""}])["input_ids"]
    with torch.no_grad():
        expected = float(model(torch.tensor([ids]))[0, -1])
    reward = RewardModel(model=model, tokenizer=tokenizer)
    assert reward([chat] * 2, ["", "me"])[0] == pytest.approx(expected, rel=1e-5)
    # what a policy would be trained on stays refused
    with pytest.raises(ValueError, match="spans of tokens"):
        list(chat_tokens(tokenizer, [Chat("row 1", [*chat, {"role": "assistant", "content": ""}])]))


def test_a_turn_without_any_token_is_scored_at_the_end_of_the_conversation():
    tokenizer = letters(template="{% for m in messages %}{{ m.content }}{% endfor %}")
    reward = RewardModel(model=(model := scalar_model()), tokenizer=tokenizer)
    with torch.no_grad():
        expected = float(model(torch.tensor([list(map(VOCABULARY.index, "who?"))]))[0, -1])
    assert reward([[{"role": "user", "content": "who?"}]], [""]) == pytest.approx([expected], rel=1e-5)


def short(model_kind):
    """A model of twelve positions with its tokenizer, and what it scores of ids alone."""
    tokenizer = letters()
    if model_kind == "ScalarModel":
        torch.manual_seed(0)
        lm = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**SIZE | {"max_position_embeddings": 12, "n_head": 2})
        )
        model: Any = ScalarModel(lm.eval(), bias=False)
        nn.init.normal_(model.head.weight)
        return model, tokenizer, lambda ids: float(model(torch.tensor([ids]))[0, -1].detach())
    model = classifier(max_position_embeddings=12)
    return model, tokenizer, lambda ids: by_hand(model, ids)


@pytest.mark.parametrize("kind", ["Llama", "ScalarModel"])
@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}</s>{% endfor %}"])
def test_a_long_row_loses_its_prompts_beginning_then_its_completions_end(kind, template, caplog):
    model, tokenizer, score = short(kind)
    tokenizer.chat_template = template
    prompts: list[Any] = ["a question", "b", "a question"]
    if template is not None:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    reward = RewardModel(model=model, tokenizer=tokenizer)
    completions = ["an answer", "c", "an answer that is long"]
    end = [] if template is None else [2]
    # of 12 tokens
    rows = [[*map(VOCABULARY.index, "question"), *end, *map(VOCABULARY.index, "an answer"), 2][-12:]]
    rows += [[*([1] if template is None else []), *map(VOCABULARY.index, "b"), *end, VOCABULARY.index("c"), 2]]
    rows += [[*map(VOCABULARY.index, "an answer th")]]
    close(reward(prompts, completions), [score(ids) for ids in rows])
    assert "reward_model: 2 of 3 rows are longer than max_length=12 and were cut (longest: " in caplog.text
    caplog.clear()
    reward(prompts, completions)
    assert not caplog.text  # said once


def test_max_length_is_the_models_own_or_what_is_asked_for():
    model, tokenizer = classifier(), letters()
    short = RewardModel(model=model, tokenizer=tokenizer, max_length=4)
    assert short(["who"], ["me"]) == pytest.approx([by_hand(model, [*map(VOCABULARY.index, "ome"), 2])], rel=1e-5)
    assert "max_length=4" in repr(short)
    assert max_positions(model) == 128
    assert max_positions(classifier("Roberta", max_position_embeddings=130, pad_token_id=1)) == 128
    assert max_positions(ScalarModel(causal_lm())) == 128


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_a_long_pair_loses_its_prompts_beginning_then_all_of_it(kind):
    tokenizer = letters()
    marks = [("[CLS]", 4), ("[SEP]", 5)]
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=marks
    )
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model = classifier(kind, max_position_embeddings=13, pad_token_id=0)
    reward = RewardModel(model=model, tokenizer=tokenizer, batch_size=2, max_length=None if kind == "Roberta" else 12)

    def score(before, completion):
        ids = [4, *map(VOCABULARY.index, before), *([5] if before else []), *map(VOCABULARY.index, completion), 5]
        assert len(ids) <= 12
        with torch.no_grad():
            return float(model(torch.tensor([ids])).logits[0, 0])

    expected = [score("estion", "abc"), score("b", "c"), score("", "an answer "), score("", "an answer ")]
    given = reward(["a question", "b", "a question", ""], ["abc", "c", "an answer that", "an answer that"])
    torch.testing.assert_close(torch.tensor(given), torch.tensor(expected), rtol=2e-5, atol=2e-5)
    # the tokenizer is as it was
    assert tokenizer.truncation_side == "right"
    assert len(tokenizer("a question that is long")["input_ids"]) == 25


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "user", "content": None}], r"prompt: message 1 \(user\) needs a text as content, got None"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
            r"message 1 \(user\) needs a text .*got \[\{'t",
        ),
        (
            [{"role": "user", "content": "a"}, "b"],
            r"prompt: message 2 must be \{'role': ..., 'content': ...\}, got 'b'",
        ),
        (None, "prompt: must be a text or a list of messages, got NoneType"),
    ],
)
def test_prompts_that_say_no_text_teach(template, prompt, message):
    for model in (classifier(), scalar_model()):
        with pytest.raises(ValueError, match=message):
            RewardModel(model=model, tokenizer=letters(template=template))([prompt], ["a"])


def test_rows_that_cannot_be_scored_teach():
    tokenizer = letters(bos=False)
    with pytest.raises(ValueError, match="an empty prompt with an empty completion has no token to score"):
        RewardModel(model=classifier(), tokenizer=tokenizer, append_eos=False)([""], [""])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="append_eos needs a tokenizer with an end of sequence"):
        RewardModel(model=classifier(), tokenizer=tokenizer)(["a"], ["b"])
    with pytest.raises(ValueError, match=r"a ScalarModel has one output, got label='good'"):
        RewardModel(model=scalar_model(), tokenizer=letters(), label="good")
