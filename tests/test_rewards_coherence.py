"""The coherence reward: against the geometric mean of a model's own probabilities, one row at a time."""

import os
from typing import Any

import pytest
import torch

from rlloss.loop import frozen_copy
from rlloss.rewards import Coherence, get_reward

os.environ["HF_HUB_OFFLINE"] = "1"
tokenizers = pytest.importorskip("tokenizers", reason="builds tiny Hugging Face models")
transformers = pytest.importorskip("transformers", reason="builds tiny Hugging Face models")

VOCABULARY = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz ?\n"]
PROMPTS = ["who", "a question that is rather long", "", "b"]
COMPLETIONS = ["me", "a", "an answer to nothing that goes on and on", "so it is"]


def letters(*, bos=True, template=None) -> Any:
    """A tokenizer of single characters, which puts <s> before a text if `bos`."""
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({t: i for i, t in enumerate(VOCABULARY)}, "<pad>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    single = "<s> $A" if bos else "$A"
    raw.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1)])
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **marks)
    made.chat_template = template
    return made


def tiny() -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(VOCABULARY), initializer_range=0.4, **size)
    return transformers.LlamaForCausalLM(config)


def by_hand(model, before, completion):
    after = [VOCABULARY.index(c) for c in completion]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([before + after])).logits[0].double()
    product = 1.0
    for t, token in enumerate(after, start=len(before)):
        product *= float(torch.softmax(logits[t - 1], -1)[token])
    return product ** (1 / len(after))


def text_ids(text):
    return [VOCABULARY.index(c) for c in text]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_it_is_the_geometric_mean_of_the_probabilities(batch_size):
    model = tiny().train()
    reward = get_reward("coherence", model=model, tokenizer=letters(), batch_size=batch_size)
    assert not model.training
    expected = [by_hand(model, [1, *text_ids(p)], c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, rel=1e-5)
    assert all(0 < x < 1 for x in expected)


def test_rows_of_similar_length_go_together_and_without_gradient():
    model, seen = tiny(), []
    reward = Coherence(model=model, tokenizer=letters(), batch_size=3)
    reward(["a"], ["b"])  # the first call also proves the head
    model.model.register_forward_pre_hook(
        lambda _, args, options: seen.append((*options["input_ids"].shape, torch.is_grad_enabled())), with_kwargs=True
    )
    reward([""] * 4, ["a" * 30, "b", "a" * 31, "bc"])
    assert seen == [(3, 32, False), (1, 2, False)]


def test_an_empty_completion_earns_nothing_and_disturbs_nobody():
    reward = Coherence(model=tiny(), tokenizer=letters())
    [alone] = reward(["who"], ["me"])
    assert reward(["x", "who", "x"], ["", "me", ""]) == pytest.approx([0.0, alone, 0.0])
    assert reward(["x"], [""]) == [0.0]
    assert reward([], []) == []


def test_a_model_that_knows_nothing_gives_one_over_the_vocabulary():
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    reward = Coherence(model=model, tokenizer=letters())
    assert reward(["a"], ["bcd"]) == pytest.approx([1 / len(VOCABULARY)])  # every token is as likely as the others


def test_a_text_without_a_prompt_begins_after_the_mark_of_beginnings():
    model, tokenizer = tiny(), letters(bos=False)
    assert Coherence(model=model, tokenizer=tokenizer)([""], ["me"]) == pytest.approx([by_hand(model, [1], "me")])
    tokenizer.bos_token = None
    assert Coherence(model=model, tokenizer=tokenizer)([""], ["me"]) == pytest.approx([by_hand(model, [2], "me")])
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"nothing stands before the first token .* set tokenizer.bos_token"):
        Coherence(model=model, tokenizer=tokenizer)([""], ["me"])


def test_messages_are_read_up_to_where_the_answer_begins():
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}so {% endif %}"
    model, chat = tiny(), [{"role": "user", "content": "who"}]
    with_template = Coherence(model=model, tokenizer=letters(template=template))
    assert with_template([chat], ["me"]) == pytest.approx([by_hand(model, text_ids("who\nso "), "me")])
    without = Coherence(model=model, tokenizer=letters())
    assert without([chat], ["me"]) == pytest.approx([by_hand(model, [1, *text_ids("who")], "me")])


def test_a_long_row_loses_its_prompts_beginning_then_its_completions_end(caplog):
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "initializer_range": 0.4}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(VOCABULARY), **size))
    reward = Coherence(model=model, tokenizer=letters())
    expected = [by_hand(model, text_ids("ion"), "is it"), by_hand(model, text_ids("n"), "is it s")]
    assert reward(["a question"] * 2, ["is it", "is it so"]) == pytest.approx(expected, rel=1e-5)
    assert "coherence: 2 of 2 rows are longer than max_length=8 and were cut" in caplog.text
    narrow = Coherence(model=model, tokenizer=letters(), max_length=2)
    assert narrow(["who"], ["me"]) == pytest.approx([by_hand(model, text_ids("o"), "m")], rel=1e-5)


def test_likelier_text_earns_more():
    model, tokenizer = tiny(), letters()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor([[1, *text_ids("the cat sat on the mat")]])
    for _ in range(30):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learnt, jumbled = Coherence(model=frozen_copy(model), tokenizer=tokenizer)(["the cat"] * 2, [" sat on", " no ats"])
    assert learnt > 0.5 > jumbled


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r".* got model=None and tokenizer=None; .* pass get_reward\('coherence', model=frozen_copy\(policy\)"),
        ({"model": "gpt2", "tokenizer": object()}, "needs a loaded causal LM and its tokenizer, got model='gpt2'"),
        ({"model": torch.nn.Linear(1, 1)}, "needs a loaded causal LM and its tokenizer"),
        ({"model": torch.nn.Linear(1, 1), "tokenizer": object(), "batch_size": 0}, "batch_size must be an integer"),
        (
            {"model": torch.nn.Linear(1, 1), "tokenizer": object(), "max_length": 1},
            r"max_length must be a number in \[2",
        ),
    ],
)
def test_bad_options_teach(options, message):
    with pytest.raises(ValueError, match=f"coherence: {message}"):
        get_reward("coherence", **options)
