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


@pytest.mark.parametrize(
    "make",
    [clipped, lambda f: scaled(f, 1.0), lambda f: normalized(f, center=False), lambda f: Ensemble([f])],
    ids=["clip", "scale", "norm", "ens"],
)
def test_a_combined_function_gets_what_it_would_get_alone(make):
    loop = pytest.importorskip("rlloss.loop")
    functions = [
        lambda prompts, completions: [float(len(c)) for c in completions],
        lambda completions: [float(len(c)) for c in completions],
        lambda completions, prompts: [float(len(c)) for c in completions],
        lambda prompts, completions, answer: [float(len(c) + len(answer[0]) - 1) for c in completions],
        letters,
    ]
    columns = {"answer": ["x"], "completion_ids": [[1]]}
    for function in functions:
        assert loop.Rewards(make(function))(["long prompt"], ["aaa"], columns).total.tolist() == [3.0]


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
        ("mean_minus_variance", [2 - 2 / 3, 5.0]),
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


class Letters:
    """A tokenizer of single letters."""

    eos_token_id = 0

    def __call__(self, texts, add_special_tokens):
        return {"input_ids": [[ord(c) - 96 for c in text] for text in texts]}

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(chr(96 + i) for i in ids if i) for ids in rows]


def session_of_letters():
    loop, transformers = pytest.importorskip("rlloss.loop"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, **size))
    return loop.Session(model, Letters(), learning_rate=1e-2), loop.prompts([{"prompt": p} for p in "abcd"], Letters())


@pytest.mark.unhooked  # whole runs of the loop are left out there
@pytest.mark.parametrize(
    "wrap",
    [lambda norm: norm, lambda norm: clipped(norm, -5, 5), lambda norm: Ensemble([letters, scaled(norm, 2.0)])],
    ids=["alone", "clipped", "in an ensemble"],
)
def test_a_resumed_run_continues_with_the_statistics(tmp_path, wrap):
    loop = pytest.importorskip("rlloss.loop")

    def run(folder, *, steps, resume=False):
        session, rows = session_of_letters()
        norm = normalized(letters)
        options = {"steps": steps, "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 6, "progress": False}
        options |= {"advantages": lambda rewards, group_ids: rewards}  # so that the statistics matter
        loss_fn = rlloss.GRPOLoss()
        history = loop.train_online(session, rows, wrap(norm), loss_fn, folder=folder, resume=resume, **options)
        return history, norm

    whole, _ = run(tmp_path / "whole", steps=4)
    first, norm = run(tmp_path / "parts", steps=2)
    assert float(norm.norm.count) == 16
    rest, norm = run(tmp_path / "parts", steps=4, resume=True)
    assert first + rest == whole
    assert float(norm.norm.count) == 32


@pytest.mark.unhooked
def test_an_evaluation_leaves_the_statistics_alone():
    loop = pytest.importorskip("rlloss.loop")
    session, rows = session_of_letters()
    norm = normalized(letters)
    norm(["", ""], ["a", "aaa"])
    loop.evaluate_online(session, rows, Ensemble([clipped(norm, -5, 5)]), max_new_tokens=4)
    assert float(norm.norm.count) == 2
    assert norm.training


def test_frozen_rewards_come_back_as_they_were():
    loop = pytest.importorskip("rlloss.loop")
    asleep, awake = normalized(letters).eval(), normalized(letters)
    rewards = loop.Rewards([clipped(asleep), awake])

    def interrupted():
        with rewards.frozen():
            assert not awake.training
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert awake.training
    assert awake.norm.training
    assert not asleep.training


def test_the_modules_of_rewards_are_those_within_too():
    loop = pytest.importorskip("rlloss.loop")
    one, two = normalized(letters), normalized(scaled(normalized(letters), 2.0))
    rewards = loop.Rewards([one, clipped(Ensemble([letters, two])), letters])
    modules = rewards.modules()
    assert modules["reward_0"] is one
    assert list(modules) == ["reward_0", "reward_1_3", "reward_1_5"]
    assert modules["reward_1_3"] is two


@pytest.mark.parametrize(
    "make",
    [clipped, lambda f: scaled(f, 2.0), normalized, lambda f: Ensemble([f, f])],
    ids=["clip", "scale", "norm", "ens"],
)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([math.nan, 1.0], "returned nan for completion 0 .*; return a finite number"),
        ([1.0, math.inf], "returned inf for completion 1 .*; return a finite number"),
        ([1.0, None], "returned None for completion 1 .*; return a finite number, such as 0.0"),
        ([1.0, "x"], "returned 'x' for completion 1 .*; return a finite number"),
        ([1.0], "got 2 completions but returned 1 rewards"),
        ([[1.0], [2.0]], "rewards per token cannot be combined"),
        (torch.ones(2, 1).unbind(), "rewards per token cannot be combined"),
        (None, "must return one number per completion, got None"),
    ],
)
def test_what_is_no_reward_raises_and_leaves_no_trace(make, given, message):
    made = make(lambda prompts, completions: given)
    with pytest.raises(ValueError, match=f"lambda>: {message}"):
        of(made, 2)
    if isinstance(made, Normalized):
        assert float(made.norm.count) == 0


@pytest.mark.unhooked
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: clipped(letters, 2, 1), r"clipped: high must be a number in \[2, inf\], got 1"),
        (lambda: clipped(letters, math.nan), "clipped: low must be a number"),
        (lambda: clipped(letters, math.inf), "clipped: low must be a number in"),
        (lambda: clipped(letters, high=-math.inf), "clipped: high must be a number in"),
        (lambda: scaled(letters, math.inf), "scaled: factor must be a number in"),
        (lambda: scaled(letters, 1, shift=-math.inf), "scaled: shift must be a number in"),
        (lambda: Ensemble([letters], std_coef=math.inf), "Ensemble: std_coef must be a number in"),
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


@pytest.mark.parametrize("given", [[None, 1.0], [math.nan, 1.0], [1e39, 1.0]])
def test_a_reward_that_is_none_is_named(given):
    loop = pytest.importorskip("rlloss.loop")
    with pytest.raises(
        ValueError, match=r"reward function '<lambda>': returned .* for completion 0 \('a'\); return a f"
    ):
        loop.Rewards(lambda prompts, completions: given)(["", ""], ["a", "b"], {})
    with pytest.raises(ValueError, match="Rewards: weight must be a number in"):
        loop.Rewards(letters, weights=[math.inf])
