"""Advantages by name in the loop and in the trainer."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportCallIssue=false

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rlloss
from rlloss import create_rl_trainer
from rlloss.loop import GroupAdvantages, Session, prompts, train_online

PROMPTS = [{"prompt": "ab"}, {"prompt": "cdefg"}, {"prompt": "h"}]


class Spy(rlloss.GRPOLoss):
    """GRPO that remembers the advantages that it was called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, logprobs, old_logprobs, advantages, loss_mask, **keywords):
        self.seen.append(advantages)
        return super().forward(logprobs, old_logprobs, advantages, loss_mask, **keywords)


class Rewards:
    """Letters a, and how long; it remembers what it gave."""

    def __init__(self):
        self.given = []

    def __call__(self, prompts, completions, **columns):
        self.given.append([c.count("a") + 0.1 * len(c) for c in completions])
        return self.given[-1]


def session_of():
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "<eos>", *"abcdefgh"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=10, pad_token_id=0, eos_token_id=1, **size))
    return Session(model, tokenizer, learning_rate=0.0)


def step(advantages, *, session=None, group_size=4):
    """One step's rewards by call, its advantages in the order of the update, and its numbers."""
    session, rewards, loss_fn = session or session_of(), Rewards(), Spy()
    (numbers,) = train_online(
        session,
        prompts(PROMPTS, session.tokenizer),
        rewards,
        loss_fn,
        steps=1,
        prompts_per_step=3,
        group_size=group_size,
        max_new_tokens=5,
        advantages=advantages,
        progress=False,
    )
    (given,) = loss_fn.seen
    return rewards.given, given, numbers


@pytest.mark.parametrize("name", rlloss.list_advantages())
def test_every_name_reaches_the_loss(name):
    (rewards, *greedy), advantages, numbers = step(name)
    inputs = {}
    if name in ("opo", "reinforce_pp_baseline"):
        inputs["weights"] = lengths_of(rewards)
    if name == "remax":
        inputs["baselines"] = torch.tensor(greedy[0]).repeat_interleave(4)
        assert numbers["greedy_reward"] == pytest.approx(sum(greedy[0]) / 3)
    else:
        assert not greedy  # nobody pays for a greedy completion
    expected = rlloss.preset_advantages(name, torch.tensor(rewards), torch.arange(3).repeat_interleave(4), **inputs)
    assert expected.unique().numel() > 3
    assert sorted(advantages.tolist()) == pytest.approx(sorted(expected.tolist()), rel=1e-5, abs=1e-6)


def lengths_of(rewards):
    """Tokens of the same rollout, in the order of its rewards."""
    seen = {}

    class Lengths(GroupAdvantages):
        def forward(self, session, batch):
            seen["lengths"], seen["rewards"] = batch.loss_mask.sum(1), batch.fields["rewards"]
            return super().forward(session, batch)

    step(Lengths())
    assert seen["rewards"].tolist() == pytest.approx(rewards)
    return seen["lengths"]


def test_a_name_costs_no_forward_pass_that_nobody_needs(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("old log-probs of one update are those of the policy itself")

    session = session_of()
    monkeypatch.setattr(session, "logprobs", refuse)
    step("rloo", session=session)


def test_a_greedy_baseline_is_in_the_rewards_units():
    norm = rlloss.RunningRewardNorm()
    given, advantages, _ = step(GroupAdvantages("remax", reward_norm=norm))
    rewards, greedy = (norm(torch.tensor(x)) for x in given)
    expected = rewards - greedy.repeat_interleave(4)
    assert sorted(advantages.tolist()) == pytest.approx(sorted(expected.tolist()), rel=1e-5, abs=1e-6)


def test_a_group_of_one_is_enough_where_nobody_is_compared():
    _, advantages, _ = step("remax", group_size=1)
    assert advantages.any()
    step(GroupAdvantages("lite_ppo", baseline="batch"), group_size=1)
    for name in set(rlloss.list_advantages()) - {"remax"}:
        with pytest.raises(ValueError, match="group_size=1 leaves nothing to compare with"):
            step(name, group_size=1)


def test_an_unknown_name_teaches_the_list():
    with pytest.raises(
        ValueError, match=r"GroupAdvantages: unknown advantages 'rlo'; did you mean 'rloo'.* Known: dr_g"
    ):
        step("rlo")
    with pytest.raises(ValueError, match=r"floor=0.1 bounds the deviation of a group, and scale='none' has none"):
        GroupAdvantages("rloo", floor=0.1)
    with pytest.raises(ValueError, match="scale must be one of"):
        GroupAdvantages(scale="std")


def trainer(algorithm, tmp_path, **parameters):
    session = session_of()
    return create_rl_trainer(
        session.model,
        PROMPTS,
        algorithm,
        tokenizer=session.tokenizer,
        reward_functions=lambda prompts, completions, **columns: [float(len(c)) for c in completions],
        max_new_tokens=3,
        progress=False,
        eval_fraction=0,
        max_steps=1,
        output_dir=tmp_path,
        **parameters,
    )


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("grpo", {"scale": "group", "baseline": "mean"}),
        ("dapo", {"scale": "group", "baseline": "mean"}),
        ("dr_grpo", {"scale": "none", "baseline": "mean"}),
        ("rloo", {"scale": "none", "baseline": "leave_one_out"}),
        ("reinforce", {"scale": "none", "baseline": "leave_one_out"}),
        ("gpg", {"scale": "none", "baseline": "mean", "per_informative": True}),
    ],
)
def test_an_algorithm_has_the_advantages_of_its_paper(algorithm, options, tmp_path):
    assert trainer(algorithm, tmp_path).advantages.options == options


@pytest.mark.parametrize("name", rlloss.list_advantages())
def test_every_name_trains(name, tmp_path):
    run = trainer("dapo", tmp_path, advantages=name)
    assert run.advantages.options.items() >= GroupAdvantages(name).options.items()
    (numbers,) = run.train()
    assert ("greedy_reward" in numbers) == (name == "remax")


def test_a_trainer_teaches_the_names(tmp_path):
    with pytest.raises(ValueError, match=r"unknown advantages 'loo'.* Known: dr_grpo, gpg, grpo, lite_ppo, max_rl"):
        trainer("grpo", tmp_path, advantages="loo")
    with pytest.raises(ValueError, match="advantages='max_rl' has a scale of its own; leave scale_rewards out"):
        trainer("grpo", tmp_path, advantages="max_rl", scale_rewards="none")
