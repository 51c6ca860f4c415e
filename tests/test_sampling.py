import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from rlloss.loop.sampling import Completion, sample

VOCAB = 61
PROMPTS = [[5, 9, 33], [7, 12, 60, 41, 8, 19, 22, 30, 11, 54, 3], [17], [25, 44, 6, 13, 58, 40, 21]]
EOS = list(range(3, 12))
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WINDOWED: dict[str, Any] = {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
ARCHITECTURES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, **WINDOWED)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    # convolution states next to keys and values: a selection of the cache must take both
    "lfm2": lambda: transformers.Lfm2ForCausalLM(transformers.Lfm2Config(**SIZES, full_attn_idxs=[1, 3])),
}


def causal_lm(name: str) -> Any:
    torch.manual_seed(0)
    model = ARCHITECTURES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # far from uniform, so that a wrong position or mask is seen
    return model


class Table(nn.Module):
    """The next token depends on the last one alone; its forward takes the required arguments and nothing else."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits, requires_grad=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past_key_values: object, use_cache: bool) -> object:
        cache = past_key_values or SimpleNamespace(reorder_cache=lambda rows: None)
        return SimpleNamespace(logits=self.logits[input_ids], past_key_values=cache)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def full_forward_logprobs(model: nn.Module, prompt: list[int], ids: list[int], temperature: float) -> Tensor:
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float() / temperature, -1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


def batch_sizes(model: nn.Module, call: Callable[[], list[Completion]]) -> list[int]:
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    call()
    hook.remove()
    return sizes


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_equal_full_forward(name: str, temperature: float) -> None:
    model = causal_lm(name)
    completions = sample(
        model,
        PROMPTS,
        group_size=6,
        max_new_tokens=12,
        temperature=temperature,
        eos_token_id=EOS,
        generator=generator(0),
    )
    assert len(completions) == 24
    assert len({len(c.ids) for c in completions}) > 3  # rows left the batch at different times
    for i, completion in enumerate(completions):
        expected = full_forward_logprobs(model, PROMPTS[i // 6], completion.ids, temperature)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_argmax_without_a_cache(name: str) -> None:
    model = causal_lm(name)
    completions = sample(model, PROMPTS, group_size=2, max_new_tokens=8, temperature=0, eos_token_id=None)
    for i, completion in enumerate(completions):
        prompt, ids = PROMPTS[i // 2], []
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(model.eval()(input_ids=torch.tensor([prompt + ids])).logits[0, -1].argmax()))
        assert completion.ids == ids
        expected = full_forward_logprobs(model, prompt, ids, temperature=1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


def test_prompts_are_prefilled_once() -> None:
    model = causal_lm("llama")
    sizes = batch_sizes(model, lambda: sample(model, PROMPTS, group_size=5, max_new_tokens=3, eos_token_id=None))
    assert sizes == [4, 20, 20]  # no forward pass follows the last token


def test_ended_rows_leave_the_batch() -> None:
    stop_half = torch.full((4, 4), -math.inf)
    stop_half[:, 1] = stop_half[:, 2] = 0.0
    model = Table(stop_half)
    sizes = batch_sizes(
        model,
        lambda: sample(model, [[3]], group_size=64, max_new_tokens=30, eos_token_id=1, generator=generator(0)),
    )
    assert sizes[:2] == [1, sizes[1]]
    assert sizes[1] < 50
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert sizes[-1] < 4
    assert len(sizes) < 30  # and the loop stops when none is left


@pytest.mark.parametrize("max_rows", [1, 3, 4, 6, 11, 100])
def test_max_rows_bounds_the_batch_and_changes_nothing(max_rows: int) -> None:
    model = causal_lm("llama")

    def draw(max_rows: int | None = None) -> list[Completion]:
        return sample(
            model, PROMPTS, group_size=4, max_new_tokens=6, eos_token_id=EOS, generator=generator(1), max_rows=max_rows
        )  # fmt: skip

    whole, chunked = draw(), draw(max_rows)
    assert [c.ids for c in chunked] == [c.ids for c in whole]
    for a, b in zip(chunked, whole, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert max(batch_sizes(model, lambda: draw(max_rows))) <= max_rows


def test_seed_fixes_the_completions() -> None:
    model = causal_lm("gpt2")

    def draw(generator: torch.Generator) -> list[Completion]:
        return sample(model, PROMPTS, group_size=3, max_new_tokens=6, eos_token_id=EOS, generator=generator)

    first, again, other = generator(0), generator(0), generator(1)
    assert draw(first) == draw(again) != draw(other)
    assert draw(first) == draw(again)  # the generators moved on, and together
    torch.manual_seed(5)
    default = sample(model, PROMPTS, max_new_tokens=6, eos_token_id=EOS)
    torch.manual_seed(5)
    assert sample(model, PROMPTS, max_new_tokens=6, eos_token_id=EOS) == default


def test_generator_moves_by_the_same_amount_whatever_is_drawn() -> None:
    short, long = generator(0), generator(0)
    sample(Table(torch.zeros(4, 4)), [[3]], group_size=8, max_new_tokens=9, eos_token_id=[0, 1, 2], generator=short)
    sample(Table(torch.zeros(4, 4)), [[3]], group_size=8, max_new_tokens=9, eos_token_id=None, generator=long)
    assert torch.equal(short.get_state(), long.get_state())


def test_completions_of_a_group_differ_and_stand_together() -> None:
    logits = torch.full((6, 6), -math.inf)
    logits[0, 2:4] = 0.0  # prompt 0 is followed by 2 or 3, prompt 1 by 4 or 5
    logits[1, 4:6] = 0.0
    completions = sample(Table(logits), [[0], [1, 1, 1], [0, 0]], group_size=16, max_new_tokens=1, eos_token_id=None)
    firsts = [{c.ids[0] for c in completions[i : i + 16]} for i in (0, 16, 32)]
    assert firsts == [{2, 3}, {4, 5}, {2, 3}]


def test_completion_ends_with_its_first_stop_token() -> None:
    model = Table(torch.zeros(5, 5))
    completions = sample(model, [[3]], group_size=200, max_new_tokens=4, eos_token_id=[1, 0], generator=generator(0))
    assert {c.finished for c in completions} == {True, False}
    for c in completions:
        assert len(c.ids) == len(c.logprobs)
        assert not {0, 1} & set(c.ids[:-1])
        assert c.finished == (c.ids[-1] in (0, 1))
        assert c.finished or len(c.ids) == 4
    endless = sample(model, [[3]], group_size=9, max_new_tokens=4, eos_token_id=None)
    assert all(not c.finished and len(c.ids) == 4 for c in endless)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_match_the_softmax(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, -2.0, 2.5, -math.inf, -4.0, 0.3, -math.inf])
    n = 20_000
    completions = sample(
        Table(logits.repeat(8, 1)), [[1]], group_size=n, max_new_tokens=1, temperature=temperature,
        eos_token_id=None, generator=generator(0),
    )  # fmt: skip
    seen = torch.bincount(torch.tensor([c.ids[0] for c in completions]), minlength=8).double()
    expected = n * torch.softmax(logits.double() / temperature, -1)
    possible = expected > 0
    assert seen[~possible].sum() == 0
    chi_square = ((seen - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: one seed in a thousand is above


@pytest.mark.parametrize(("noise", "token"), [(0.0, 2), (1 - 2**-53, 5)])
def test_impossible_tokens_are_not_drawn_at_the_ends(noise: float, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([-math.inf, -math.inf, 0.0, -1.0, 0.5, 0.1, -math.inf])
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, noise, dtype=torch.float64))
    [completion] = sample(Table(logits.repeat(7, 1)), [[1]], max_new_tokens=1, eos_token_id=None)
    assert completion.ids == [token]


def test_logprobs_are_float32_whatever_the_dtype() -> None:
    logits = torch.linspace(-3, 3, 40).bfloat16().repeat(40, 1)
    completions = sample(Table(logits), [[1]], group_size=50, max_new_tokens=1, temperature=0.7, eos_token_id=None)
    expected = torch.log_softmax(logits[0].float() / 0.7, -1)
    for c in completions:
        assert c.logprobs == [pytest.approx(float(expected[c.ids[0]]), abs=1e-6)]


def test_model_is_evaluated_and_left_as_it_was() -> None:
    model = causal_lm("gpt2")
    model.train()
    model.transformer.h[0].eval()  # frozen by its owner
    modes = [m.training for m in model.modules()]
    completions = sample(model, PROMPTS, max_new_tokens=4, eos_token_id=None)
    assert [m.training for m in model.modules()] == modes
    expected = full_forward_logprobs(model, PROMPTS[0], completions[0].ids, 1.0)  # GPT-2 has dropout when training
    torch.testing.assert_close(torch.tensor(completions[0].logprobs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_raise_and_leave_the_model_as_it_was(bad: float) -> None:
    model = Table(torch.tensor([[0.0, 1.0], [0.0, bad]])).train()
    with pytest.raises(ValueError, match="must be finite or -inf, got NaN or inf"):
        sample(model, [[0], [1], [0]], max_new_tokens=1, eos_token_id=None)
    assert model.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": [[3], []]}, r"prompts\[1\] is empty"),
        ({"prompts": [[3], [4, VOCAB]]}, rf"prompts\[1\] holds token ids from 4 to {VOCAB}, but .* 0 to {VOCAB - 1}"),
        ({"prompts": [[-1]]}, r"prompts\[0\] holds token ids from -1"),
        ({"prompts": [[3], [4] * 60]}, r"prompts\[1\] has 60 tokens, .* max_new_tokens=5 .* 64 positions"),
        ({"eos_token_id": [2, 99]}, "eos_token_id holds token ids from 2 to 99"),
        ({"pad_token_id": -100}, "pad_token_id holds"),
        ({"group_size": 0}, "group_size must be an integer of at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ({"max_rows": 0}, "max_rows must be an integer of at least 1, got 0"),
        ({"temperature": -0.5}, r"temperature must be a number in \[0"),
    ],
)
def test_bad_input_is_refused_before_any_work(changes: dict, message: str) -> None:
    model = causal_lm("llama")
    model.forward = lambda *args, **kwargs: pytest.fail("the model ran")
    arguments = {"prompts": PROMPTS, "max_new_tokens": 5, "eos_token_id": 2} | changes
    with pytest.raises(ValueError, match=message):
        sample(model, **arguments)


def test_longest_prompt_that_fits_is_accepted() -> None:
    [completion] = sample(causal_lm("gpt2"), [[4] * 59], max_new_tokens=5, eos_token_id=None)
    assert len(completion.ids) == 5


def test_model_without_a_cache_is_refused() -> None:
    class Cacheless(nn.Linear):
        def forward(self, input_ids: Tensor, **rest: object) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
            return SimpleNamespace(logits=self.weight[input_ids])

    with pytest.raises(ValueError, match="Cacheless must return past_key_values with a reorder_cache method, got None"):
        sample(Cacheless(4, 4), [[1]], max_new_tokens=2, eos_token_id=None)
