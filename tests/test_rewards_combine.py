"""Rewards made of rewards: clipped, scaled, normalised and in a conservative ensemble."""

import math

import pytest
import torch
from torch import nn

import rlloss
from rlloss.rewards import Ensemble, Length, Normalized, clipped, get_reward, normalized, scaled


def fixed(*numbers):
    def given(prompts, completions, **columns):
        return list(numbers)

    return given


def of(function, number):
    return function([""] * number, [""] * number)


def letters(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]


def test_clipped_holds_both_ends():
    assert of(clipped(fixed(-5, -1, 0.5, 7), -1.0, 2.0), 4) == [-1.0, -1.0, 0.5, 2.0]
    assert of(clipped(fixed(-5, 7), low=0.0), 2) == [0.0, 7.0]
    assert of(clipped(fixed(-5, 7), high=0.0), 2) == [-5.0, 0.0]


def test_scaled_multiplies_and_shifts():
    assert of(scaled(fixed(1, -2), 3.0), 2) == [3.0, -6.0]
    assert of(scaled(fixed(1, -2), -0.5, shift=1.0), 2) == [0.5, 2.0]


def test_combinators_pass_prompts_and_columns_on():
    def answer_length(prompts, completions, answer):
        return [len(p) + 10 * len(c) + 100 * len(a) for p, c, a in zip(prompts, completions, answer, strict=True)]

    for made in (clipped(answer_length), scaled(answer_length, 1.0), Ensemble([answer_length, answer_length])):
        assert made(["p"], ["cc"], answer=["aaa"]) == [321.0]
    assert normalized(answer_length)(["p"], ["cc"], answer=["aaa"]) == [0.0]


def test_names_say_what_was_done_to_what():
    inner = scaled(Length(), 2.0)
    assert clipped(inner, 0.0, 1.0).__name__ == "clipped_scaled_length"
    assert repr(clipped(inner, 0.0, 1.0)).startswith("clipped(scaled(length(min_length=10,")
    assert normalized(letters).__name__ == "normalized_letters"
    assert Ensemble([letters], reduce="min").__name__ == "ensemble_min"
    assert "reduce='min'" in repr(Ensemble([letters], reduce="min"))


@pytest.mark.parametrize(
    ("reduce", "rewards"),
    [
        ("mean", [2.0, 5.0]),
        ("min", [1.0, 5.0]),
        # of 1, 2, 3 the variance is 2/3; where all agree nothing is taken away
        ("mean_minus_std", [2 - math.sqrt(2 / 3), 5.0]),
    ],
)
def test_ensemble_trusts_what_all_agree_on(reduce, rewards):
    assert of(Ensemble([fixed(1, 5), fixed(3, 5), fixed(2, 5)], reduce=reduce), 2) == pytest.approx(rewards, abs=1e-15)


def test_std_coef_weighs_the_disagreement():
    assert of(Ensemble([fixed(1), fixed(4)], reduce="mean_minus_std", std_coef=2.0), 1) == [2.5 - 2 * 1.5]
    assert of(Ensemble([fixed(1), fixed(4)], std_coef=2.0), 1) == [2.5]


def test_normalized_is_in_units_of_all_that_was_seen():
    norm = normalized(letters)
    first = norm(["", ""], ["a", "aaa"])
    assert first == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])  # mean 2, variance 2
    third = norm([""], ["aaaaa"])
    assert third == pytest.approx([(5 - 3) / 2])  # of 1, 3, 5: mean 3, variance 4
    uncentered = normalized(letters, center=False)
    assert uncentered(["", ""], ["a", "aaa"]) == pytest.approx([1 / math.sqrt(2), 3 / math.sqrt(2)])
    assert normalized(letters, eps=2.0)(["", ""], ["a", "aaa"]) == pytest.approx([-0.5, 0.5])


def test_normalized_keeps_float64():
    norm = normalized(fixed(1e8 + 1, 1e8 + 3), eps=0.0)
    assert of(norm, 2) == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


def test_normalized_only_reads_in_eval_mode():
    norm = normalized(letters)
    norm(["", ""], ["a", "aaa"])
    state = {name: x.clone() for name, x in norm.state_dict().items()}
    assert norm.eval()([""], ["aaaa"]) == pytest.approx([2 / math.sqrt(2)])
    assert all(torch.equal(x, state[name]) for name, x in norm.state_dict().items())
    assert norm.train()([""], ["aaaa"]) != pytest.approx([2 / math.sqrt(2)])


def test_the_state_is_the_statistics_alone():
    class Judge(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 1)

        def forward(self, prompts, completions):
            return [0.0] * len(completions)

    norm = normalized(Judge())
    assert set(norm.state_dict()) == {"norm.count", "norm.mean", "norm.m2"}
    assert not list(norm.parameters())
    norm(["", ""], ["a", "b"])
    fresh = normalized(letters)
    fresh.load_state_dict(norm.state_dict())
    assert float(fresh.norm.count) == 2


@pytest.mark.unhooked  # whole runs of the loop are left out there
def test_a_resumed_run_continues_with_the_statistics(tmp_path):
    loop, transformers = pytest.importorskip("rlloss.loop"), pytest.importorskip("transformers")

    class Letters:
        eos_token_id = 0

        def __call__(self, texts, add_special_tokens):
            return {"input_ids": [[ord(c) - 96 for c in text] for text in texts]}

        def batch_decode(self, rows, skip_special_tokens):
            return ["".join(chr(96 + i) for i in ids if i) for ids in rows]

    def run(folder, *, steps, resume=False):
        torch.manual_seed(0)
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, **size))
        session = loop.Session(model, Letters(), learning_rate=1e-2)
        norm = normalized(letters)
        session.track(reward_norm=norm)
        rows = loop.prompts([{"prompt": p} for p in "abcd"], Letters())
        options = {"steps": steps, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 6, "progress": False}
        options |= {"advantages": lambda rewards, group_ids: rewards}  # so that the statistics matter
        history = loop.train_online(session, rows, norm, rlloss.GRPOLoss(), folder=folder, resume=resume, **options)
        return history, norm

    whole, _ = run(tmp_path / "whole", steps=4)
    first, norm = run(tmp_path / "parts", steps=2)
    assert float(norm.norm.count) == 16
    rest, norm = run(tmp_path / "parts", steps=4, resume=True)
    assert first + rest == whole
    assert float(norm.norm.count) == 32


@pytest.mark.parametrize(
    "make",
    [clipped, lambda f: scaled(f, 2.0), normalized, lambda f: Ensemble([f, f])],
    ids=["clip", "scale", "norm", "ens"],
)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([math.nan, 1.0], "one finite number for each of the 2 completions, got"),
        ([math.inf, 1.0], "one finite number for each of the 2 completions, got"),
        ([1.0], "one finite number for each of the 2 completions, got"),
        ([[1.0], [2.0]], "one number per completion, .* per token cannot be combined"),
        (None, "one number per completion, got None"),
    ],
)
def test_what_is_no_reward_raises_and_leaves_no_trace(make, given, message):
    made = make(lambda prompts, completions: given)
    with pytest.raises(ValueError, match=f"lambda> must return {message}"):
        of(made, 2)
    if isinstance(made, Normalized):
        assert float(made.norm.count) == 0


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: clipped(letters, 2, 1), r"clipped: high must be a number in \[2, inf\], got 1"),
        (lambda: clipped(letters, math.nan), "clipped: low must be a number"),
        (lambda: scaled(letters, math.nan), "scaled: factor must be a number"),
        (lambda: scaled(letters, 1, shift=math.nan), "scaled: shift must be a number"),
        (lambda: normalized(letters, eps=-1), "RunningRewardNorm: eps must be a number in"),
        (lambda: Ensemble([]), "Ensemble: needs a list of reward functions, got"),
        (lambda: Ensemble(letters), "Ensemble: needs a list of reward functions, got"),  # pyright: ignore[reportArgumentType]
        (lambda: Ensemble([letters], reduce="max"), "Ensemble: reduce must be one of .*, got 'max'"),
        (lambda: Ensemble([letters], std_coef=-1), "Ensemble: std_coef must be a number in"),
    ],
)
def test_bad_options_teach(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rewards_weighs_what_is_combined():
    loop = pytest.importorskip("rlloss.loop")
    both = loop.Rewards([clipped(letters, high=2.0), get_reward("regex", pattern="b")], weights=[1.0, 0.5])
    assert both(["", ""], ["aaa", "b"], {}).total.tolist() == [2.0, 1.5]
    assert both.names == ["clipped_letters", "regex"]
