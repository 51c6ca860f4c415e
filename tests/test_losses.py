"""What every loss shares: its name, its defaults, and what callers and subclasses may rely on."""

import math

import pytest
import torch

import rlloss
from rlloss import (
    BradleyTerryLoss,
    ConservativePPOLoss,
    DAPOLoss,
    DPOLoss,
    DrGRPOLoss,
    GRPOLoss,
    GSPOLoss,
    IPOLoss,
    KTOLoss,
    PPOLoss,
    REINFORCELoss,
    RLOOLoss,
    SFTLoss,
    SimPOLoss,
    ValueLoss,
    scalars,
)

RAGGED = torch.tensor([[True, True], [True, False]])


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_and_slope(loss_fn, logprobs, *inputs, **extra):
    leaf = logprobs.clone().requires_grad_()
    loss = loss_fn(leaf, *inputs, **extra).loss
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


# SFT


def test_sft_by_hand():
    logprobs = tensor([-1.0, -2.0], [-6.0, -9.0])
    assert SFTLoss()(logprobs, RAGGED).loss == close(3)  # (1 + 2 + 6) / 3
    assert SFTLoss(reduction="sequence_mean")(logprobs, RAGGED).loss == close(3.75)  # (3 / 2 + 6) / 2
    weights = tensor([1.0, 0.0], [0.5, 1.0])
    out = SFTLoss()(logprobs, RAGGED, token_weights=weights)
    assert out.loss == close(4 / 3)  # (1 * 1 + 0 * 2 + 0.5 * 6) / 3
    assert scalars(out.metrics) == {"nll": close(3)}  # unweighted


# what all policy losses do

POLICY_LOSSES = [
    PPOLoss(),
    DAPOLoss(),
    REINFORCELoss(),
    RLOOLoss(),
    GRPOLoss(),
    DrGRPOLoss(max_completion_length=3),
    GSPOLoss(),
    ConservativePPOLoss(),
]


def kind(loss_fn):
    return type(loss_fn).__name__


@pytest.mark.parametrize("loss_fn", POLICY_LOSSES, ids=kind)
def test_no_advantage_no_policy_gradient(loss_fn):
    new, old, mask = draws(3, 4), draws(3, 4, seed=1), draws(3, 4, seed=2) > -1
    extra = {"ref_logprobs": new} if loss_fn.needs_reference else {}
    loss, slope = loss_and_slope(loss_fn, new, old, torch.zeros(3, dtype=torch.float64), mask, **extra)
    assert loss == 0
    assert not slope.any()


@pytest.mark.parametrize("loss_fn", POLICY_LOSSES, ids=kind)
def test_no_old_logprobs_means_the_policy_itself(loss_fn):
    new, advantages, mask = draws(3, 4), draws(3, seed=1), draws(3, 4, seed=2) > -1
    extra = {"ref_logprobs": draws(3, 4, seed=3)} if loss_fn.needs_reference else {}
    loss, slope = loss_and_slope(loss_fn, new, None, advantages, mask, **extra)
    same_loss, same_slope = loss_and_slope(loss_fn, new, new, advantages, mask, **extra)
    assert loss == same_loss
    assert torch.equal(slope, same_slope)
    assert slope.any()
    assert scalars(loss_fn(new, None, advantages, mask, **extra).metrics)["ratio"] == 1


@pytest.mark.parametrize("loss_fn", POLICY_LOSSES, ids=kind)
def test_one_advantage_per_sequence_is_one_for_each_of_its_tokens(loss_fn):
    new, old, advantages, mask = draws(3, 4), draws(3, 4, seed=1), draws(3, seed=2), draws(3, 4, seed=3) > -1
    extra = {"ref_logprobs": draws(3, 4, seed=4)} if loss_fn.needs_reference else {}
    per_token = advantages[:, None].expand(3, 4)
    assert loss_fn(new, old, advantages, mask, **extra).loss == loss_fn(new, old, per_token, mask, **extra).loss


@pytest.mark.parametrize("loss_fn", POLICY_LOSSES, ids=kind)
def test_on_policy_every_slope_points_along_the_advantage(loss_fn):
    logprobs, advantages = tensor([-1.0, -2.0], [-3.0, -4.0]), tensor(2.0, -1.0)
    extra = {"ref_logprobs": logprobs} if loss_fn.needs_reference else {}
    _, slope = loss_and_slope(loss_fn, logprobs, logprobs, advantages, RAGGED, **extra)
    assert torch.equal(slope.sign(), tensor([-1.0, -1.0], [1.0, 0.0]))


@pytest.mark.parametrize("loss_fn", POLICY_LOSSES, ids=kind)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_a_surrogate_sees_zeros_where_masked(loss_fn, poison):
    mask = draws(3, 4) > -0.5
    inputs = [torch.where(mask, draws(3, 4, seed=seed), poison) for seed in range(6)]
    optional = dict(zip(("ref_logprobs", "entropy", "token_weights"), inputs[3:], strict=True))
    batch = loss_fn.door(*inputs[:3], mask, **optional)
    behind = (batch.logprobs, batch.old_logprobs, batch.advantages)
    behind += (batch.ref_logprobs, batch.entropy, batch.token_weights)
    for x, given in zip(behind, inputs, strict=True):
        assert torch.equal(x, given.masked_fill(~mask, 0))
    assert batch.log_ratio.isfinite().all()
    assert batch.ratio.isfinite().all()


# units


@pytest.mark.parametrize(
    ("loss_fn", "unit"),
    [
        (PPOLoss(), "tokens"),
        (DAPOLoss(), "tokens"),
        (REINFORCELoss(), "sequences"),
        (RLOOLoss(), "sequences"),
        (GRPOLoss(), "sequences"),
        (GSPOLoss(), "sequences"),
        (DrGRPOLoss(max_completion_length=4), "sequences"),
        (ValueLoss(), "tokens"),
    ],
    ids=lambda x: x if isinstance(x, str) else kind(x),
)
def test_a_plain_number_is_a_normalizer_of_the_losss_own_unit(loss_fn, unit):
    new, old, mask = draws(3, 4), draws(3, 4, seed=3), draws(3, 4, seed=2) > -1
    number = int(getattr(rlloss.count(mask), unit))
    inputs = (new, old, draws(3, 4, seed=1), mask)
    assert loss_fn(*inputs, normalizer=2 * number).loss * 2 == close(loss_fn(*inputs).loss.item())


def test_a_plain_number_counts_the_tokens_of_sft():
    new, mask = draws(3, 4), draws(3, 4, seed=2) > -1
    tokens = int(rlloss.count(mask).tokens)
    assert SFTLoss()(new, mask, normalizer=2 * tokens).loss * 2 == close(SFTLoss()(new, mask).loss.item())


@pytest.mark.parametrize(
    ("loss_fn", "inputs"),
    [
        (DPOLoss(), draws(4, 3)),
        (IPOLoss(), draws(4, 3)),
        (SimPOLoss(), draws(2, 3)),
        (BradleyTerryLoss(), draws(2, 3)),
    ],
    ids=lambda x: kind(x),
)
def test_a_plain_number_counts_pairs(loss_fn, inputs):
    assert loss_fn(*inputs, normalizer=6).loss * 2 == close(loss_fn(*inputs).loss.item())


TAILED = [SFTLoss(), GRPOLoss(), PPOLoss(), DAPOLoss(), REINFORCELoss(), RLOOLoss(), ValueLoss()]


@pytest.mark.parametrize("loss_fn", TAILED, ids=kind)
def test_tokens_behind_the_last_boundary_count_for_nothing(loss_fn):
    logprobs, mask = torch.tensor([-1.0, -2.0, -9.0]), torch.ones(3, dtype=torch.bool)
    cu_seqlens = torch.tensor([0, 2])

    def run(mask):
        inputs = (logprobs, mask) if loss_fn.family == "likelihood" else (logprobs, logprobs - 0.1, logprobs, mask)
        return loss_fn(*inputs, cu_seqlens=cu_seqlens)

    with_tail, without = run(mask), run(torch.tensor([True, True, False]))
    assert with_tail.loss == without.loss
    assert scalars(with_tail.metrics) == scalars(without.metrics)


# names


def test_losses_are_found_by_name():
    options = {
        "actor_critic": {"policy": PPOLoss(), "value": ValueLoss()},
        "cispo": {"ratio_max": 5.0},
        "dr_grpo": {"max_completion_length": 8},
        "opsm": {"threshold": 0.1},
    }
    for name in rlloss.list_losses():
        loss_fn = rlloss.get_loss(name, **options.get(name, {}))
        assert type(loss_fn).__module__ == f"rlloss.losses.{name}"
        assert getattr(rlloss, type(loss_fn).__name__) is type(loss_fn)


@pytest.mark.parametrize("name", ["dr_grpo", "Dr.GRPO", "dr-grpo", "DR GRPO", "drgrpo", "DrGRPO"])
def test_names_forgive_case_dots_and_dashes(name):
    assert isinstance(rlloss.get_loss(name, max_completion_length=8), DrGRPOLoss)


@pytest.mark.parametrize(
    ("alias", "loss"),
    [
        ("bt", BradleyTerryLoss),
        ("reward", BradleyTerryLoss),
        ("nll", SFTLoss),
        ("causal_lm", SFTLoss),
        ("ConservativePPO", ConservativePPOLoss),
        ("SimPO", SimPOLoss),
    ],
)
def test_losses_have_the_names_that_the_field_gives_them(alias, loss):
    assert isinstance(rlloss.get_loss(alias), loss)
    assert alias not in rlloss.list_losses()


def test_get_loss_passes_hyperparameters_of_every_base():
    loss_fn = rlloss.get_loss("conservative_ppo", max_kl=0.5, clip_eps_high=0.28, kl_coef=0.1, kl="k2")
    assert (loss_fn.max_kl, loss_fn.clip_eps_high, loss_fn.kl_coef, loss_fn.kl) == (0.5, 0.28, 0.1, "k2")
    assert "clip_eps_high=0.28" in repr(loss_fn)


def test_defaults_are_the_papers():
    shared = "kl_coef=0.0, kl='k3', kl_grad='reverse', entropy_coef=0.0, max_log_ratio=20.0"
    clip = "clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None"
    assert repr(PPOLoss()) == f"PPOLoss({shared}, {clip})"
    assert repr(GRPOLoss()) == f"GRPOLoss({shared}, {clip})"
    assert repr(RLOOLoss()) == f"RLOOLoss({shared}, {clip})"
    assert repr(DAPOLoss()) == f"DAPOLoss({shared}, clip_eps_low=0.2, clip_eps_high=0.28, dual_clip=None)"
    assert repr(REINFORCELoss()) == f"REINFORCELoss({shared})"
    assert (GSPOLoss().clip_eps_low, GSPOLoss().clip_eps_high) == (3e-4, 4e-4)
    margin = "beta=0.1, reference_free=False, length_normalized=False, divergence='reverse_kl', divergence_alpha=0.5"
    assert repr(DPOLoss()) == f"DPOLoss({margin}, label_smoothing=0.0)"
    assert repr(IPOLoss()) == f"IPOLoss({margin})"
    assert repr(SimPOLoss()) == "SimPOLoss(beta=2.0, margin=0.5, label_smoothing=0.0)"
    assert repr(KTOLoss()) == "KTOLoss(beta=0.1, desirable_weight=1.0, undesirable_weight=1.0)"
    assert repr(BradleyTerryLoss()) == "BradleyTerryLoss(temperature=1.0, label_smoothing=0.0, center_coef=0.0)"
    assert repr(ValueLoss()) == "ValueLoss(value_clip=0.2, halve=True)"


def test_a_loss_says_whether_it_needs_a_reference():
    needing = [DPOLoss(), IPOLoss(), KTOLoss(), ConservativePPOLoss(), PPOLoss(kl_coef=0.1), REINFORCELoss(kl_coef=0.1)]
    free = [DPOLoss(reference_free=True), IPOLoss(reference_free=True), SimPOLoss(), BradleyTerryLoss(), ValueLoss()]
    free += [PPOLoss(), DAPOLoss(), REINFORCELoss(), RLOOLoss(), SFTLoss()]
    assert all(loss_fn.needs_reference for loss_fn in needing)
    assert not any(loss_fn.needs_reference for loss_fn in free)


def test_a_loss_says_whether_it_takes_means():
    sums = [DPOLoss(), IPOLoss()]
    assert not any(loss_fn.length_normalized for loss_fn in sums)
    assert IPOLoss(length_normalized=True).length_normalized


@pytest.mark.unhooked
def test_simpo_takes_means():
    assert SimPOLoss().length_normalized
    with pytest.raises(ValueError, match=r"SimPOLoss: .* rlloss\.sequence_mean_logps\(logprobs, loss_mask\) makes it"):
        SimPOLoss()(torch.zeros(2, 3), torch.zeros(2, 3))
