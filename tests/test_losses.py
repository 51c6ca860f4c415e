"""Every loss against arithmetic done by hand, and the identities between losses."""

import math
from typing import Any

import pytest
import torch

import rlloss
from rlloss import ConservativePPOLoss, DPOLoss, DrGRPOLoss, GRPOLoss, GSPOLoss, SFTLoss, scalars

LOG2 = math.log(2)
EVERY = torch.ones(2, 2, dtype=torch.bool)
RAGGED = torch.tensor([[True, True], [True, False]])
ZEROS = torch.zeros(2, 2, dtype=torch.float64)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def logs(*rows):
    """Log-probs whose ratios to old log-probs of 0 are given."""
    return tensor(*rows).log()


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


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


# DPO

PAIRS = tensor([-4.0, -5.0], [-7.0, -2.0], [-6.0, -5.0], [-6.0, -4.0])  # h = 2 - (-1) = 3 and 0 - 2 = -2


def test_dpo_by_hand():
    # softplus(-0.5 * 3) and softplus(0.5 * 2)
    expected = [math.log1p(math.exp(-1.5)), math.log1p(math.exp(1.0))]
    out = DPOLoss(beta=0.5)(*PAIRS)
    assert out.loss == close(sum(expected) / 2)
    assert scalars(out.metrics) == {
        "accuracy": close(0.5),
        "margin": close(0.25),  # (1.5 - 1) / 2
        "margin_std": close(1.25),
        "chosen_reward": close(0.5),  # 0.5 * (2 + 0) / 2
        "rejected_reward": close(0.25),  # 0.5 * (-1 + 2) / 2
    }
    assert DPOLoss(beta=0.5)(*PAIRS, mask=torch.tensor([False, True])).loss == close(expected[1])
    assert DPOLoss(beta=0.5)(*PAIRS, weights=torch.tensor([0.0, 3.0]).double()).loss == close(1.5 * expected[1])


def test_dpo_smoothed_and_reference_free_by_hand():
    # 0.9 softplus(-x) + 0.1 softplus(x) at x = 1.5 and -1
    smoothed = [0.9 * math.log1p(math.exp(-x)) + 0.1 * math.log1p(math.exp(x)) for x in (1.5, -1.0)]
    assert DPOLoss(beta=0.5, label_smoothing=0.1)(*PAIRS).loss == close(sum(smoothed) / 2)
    # without a reference, h = -4 + 7 = 3 and -5 + 2 = -3
    free = [math.log1p(math.exp(-1.5)), math.log1p(math.exp(1.5))]
    assert DPOLoss(beta=0.5, reference_free=True)(*PAIRS[:2]).loss == close(sum(free) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_dpo_at_the_reference_is_log_2(smoothing):
    out = DPOLoss(beta=0.7, label_smoothing=smoothing)(PAIRS[0], PAIRS[1], PAIRS[0], PAIRS[1])
    assert out.loss == close(LOG2)
    assert scalars(out.metrics)["accuracy"] == 0


def test_dpo_far_from_the_reference_is_linear_in_the_margin():
    far = torch.tensor([-1e5])
    assert DPOLoss(beta=0.1, reference_free=True)(far, torch.zeros(1)).loss == pytest.approx(1e4)


# policy losses: ratios of 1.5 and 0.5 to old log-probs of 0

RATIOS = logs([1.5, 0.5], [1.5, 0.5])
ADVANTAGES = tensor(2.0, -1.0)
# the clip to [0.8, 1.3] binds at 1.5 for A > 0 and at 0.5 for A < 0
CLIP: dict[str, Any] = {"clip_eps_low": 0.2, "clip_eps_high": 0.3}
TERMS = tensor([-1.3 * 2, -0.5 * 2], [1.5, 0.8])
SLOPES = tensor([0.0, -0.5 * 2], [1.5, 0.0])


@pytest.mark.parametrize(
    ("loss_fn", "mask", "divisors"),
    [
        (GRPOLoss(**CLIP), EVERY, [[4, 4], [4, 4]]),
        (GRPOLoss(**CLIP), RAGGED, [[4, 4], [2, math.inf]]),  # 2 sequences of 2 tokens and of 1
        (DrGRPOLoss(**CLIP, max_completion_length=5), EVERY, [[10, 10], [10, 10]]),  # 2 sequences, C = 5
        (DrGRPOLoss(**CLIP, max_completion_length=5), RAGGED, [[10, 10], [10, math.inf]]),
        (ConservativePPOLoss(**CLIP), EVERY, [[4, 4], [4, 4]]),
        (ConservativePPOLoss(**CLIP), RAGGED, [[3, 3], [3, math.inf]]),  # 3 tokens
    ],
)
def test_clipped_losses_by_hand(loss_fn, mask, divisors):
    extra = {"ref_logprobs": RATIOS} if loss_fn.needs_reference else {}  # at the reference the hinge is 0
    loss, slope = loss_and_slope(loss_fn, RATIOS, ZEROS, ADVANTAGES, mask, **extra)
    assert loss == close(float((TERMS / tensor(*divisors)).sum()))
    torch.testing.assert_close(slope, SLOPES / tensor(*divisors), rtol=1e-12, atol=0)


def test_policy_metrics_by_hand():
    ref = RATIOS - tensor([1.0, 1.0], [1.0, 0.0])
    metrics = scalars(
        GRPOLoss(**CLIP)(RATIOS, ZEROS, ADVANTAGES, RAGGED, ref_logprobs=ref, entropy=ZEROS + 0.5).metrics
    )
    mean = (1.5 + 0.5 + 1.5) / 3
    assert metrics == {
        "ratio": close(mean),
        "ratio_std": close(math.sqrt((2 * (1.5 - mean) ** 2 + (0.5 - mean) ** 2) / 3)),
        "ratio_max": close(1.5),
        "ratio_min": close(0.5),
        # k3 of KL(old||pi): r - 1 - log r
        "approx_kl": close((2 * (0.5 - math.log(1.5)) + (-0.5 - math.log(0.5))) / 3),
        "bounded_frac": 0.0,
        "ref_kl": close(math.exp(-1)),  # k3 at log(pi/ref) = 1: e^-1 - 1 + 1
        "entropy": close(0.5),
        "clip_frac": close(1 / 3),  # 1.5 with A = 2; 1.5 with A = -1 moves back to the range
    }


def test_gspo_by_hand():
    # the geometric means are sqrt(1.5 * 0.5) = 0.866, inside the range, and 1.5 for the single token
    s = math.sqrt(0.75)
    loss, slope = loss_and_slope(GSPOLoss(**CLIP), RATIOS, ZEROS, ADVANTAGES, RAGGED)
    assert loss == close((-2 * s + 1.5) / 2)
    expected = tensor([-2 * s / 4, -2 * s / 4], [1.5 / 2, 0.0])
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=0)


def test_gspo_clips_a_whole_sequence():
    # s = sqrt(2 * 1) = 1.414 > 1.3: the token at ratio 1 has no gradient either
    loss_fn = GSPOLoss(**CLIP)
    loss, slope = loss_and_slope(loss_fn, logs([2.0, 1.0]), ZEROS[:1], tensor(1.0), EVERY[:1])
    assert loss == close(-1.3)
    assert not slope.any()
    metrics = scalars(loss_fn(logs([2.0, 1.0]), ZEROS[:1], tensor(1.0), EVERY[:1]).metrics)
    assert metrics["clip_frac"] == 1
    assert metrics["ratio"] == close(math.sqrt(2))


def test_conservative_ppo_by_hand():
    # at A = 0 only the hinge is left; k2 = 1/2 * (1^2, 2^2, 3^2) and r = 1, so that KL = (0.5 + 2 + 4.5) / 3 = 7/3
    ref = -tensor([1.0, 2.0], [3.0, 9.0])
    inputs = (ZEROS, ZEROS, ZEROS, RAGGED)
    batch = ConservativePPOLoss(conservative_coef=0.3, max_kl=1.0, kl="k2")
    loss, slope = loss_and_slope(batch, *inputs, ref_logprobs=ref)
    assert loss == close(0.3 * (4 / 3) ** 2)
    expected = 2 * 0.3 * (4 / 3) * tensor([1.0, 2.0], [3.0, 0.0]) / 3
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=0)
    hinge_metrics = batch(*inputs, ref_logprobs=ref).metrics
    assert hinge_metrics["kl_penalty"].count == 3  # tokens
    metrics = scalars(hinge_metrics)
    assert metrics["kl_violation"] == close(4 / 3)
    assert metrics["kl_penalty"] == close(0.3 * (4 / 3) ** 2)
    assert metrics["max_kl"] == 1

    # per sequence: KL = 1.25 and 4.5, so that the violations are 0.25 and 3.5
    sequence = ConservativePPOLoss(conservative_coef=0.3, max_kl=1.0, kl="k2", level="sequence")
    loss, slope = loss_and_slope(sequence, *inputs, ref_logprobs=ref)
    assert loss == close(0.3 * (0.25**2 + 3.5**2) / 2)
    expected = 2 * 0.3 * tensor([0.25 * 1 / 4, 0.25 * 2 / 4], [3.5 * 3 / 2, 0.0])
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=0)
    assert scalars(sequence(*inputs, ref_logprobs=ref).metrics)["kl_violation"] == close(1.875)


def test_conservative_ppo_below_its_limit_is_free():
    inputs = (RATIOS, ZEROS, ADVANTAGES, EVERY)
    free = ConservativePPOLoss(**CLIP, conservative_coef=9.0, max_kl=50.0)(*inputs, ref_logprobs=ZEROS - 1)
    assert free.loss == close(float(TERMS.mean()))


def test_kl_term_adds_its_coefficient_times_the_estimate():
    # at A = 0 and r = 1: k3 = e^-2 + 1 for every token
    for coefficient in (0.5, 2.0):
        loss_fn = GRPOLoss(kl_coef=coefficient)
        loss = loss_fn(ZEROS, ZEROS, ADVANTAGES * 0, EVERY, ref_logprobs=ZEROS - 2).loss
        assert loss == close(coefficient * (math.exp(-2) + 1))


# identities


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_dr_grpo_is_grpo_where_every_length_is_its_constant():
    inputs = (draws(4, 6), draws(4, 6, seed=1), draws(4, seed=2), torch.ones(4, 6, dtype=torch.bool))
    options: dict[str, Any] = {"kl_coef": 0.2, "entropy_coef": 0.1, "dual_clip": 2.0}
    extra = {"ref_logprobs": draws(4, 6, seed=3), "entropy": draws(4, 6, seed=4)}
    loss, slope = loss_and_slope(GRPOLoss(**options), *inputs, **extra)
    same_loss, same_slope = loss_and_slope(DrGRPOLoss(max_completion_length=6, **options), *inputs, **extra)
    assert loss == close(same_loss)
    torch.testing.assert_close(slope, same_slope, rtol=1e-12, atol=1e-15)


def test_gspo_is_grpo_where_every_length_is_1():
    inputs = (draws(8, 1), draws(8, 1, seed=1), draws(8, seed=2), torch.ones(8, 1, dtype=torch.bool))
    loss, slope = loss_and_slope(GRPOLoss(**CLIP), *inputs)
    same_loss, same_slope = loss_and_slope(GSPOLoss(**CLIP), *inputs)
    assert loss == close(same_loss)
    torch.testing.assert_close(slope, same_slope, rtol=1e-12, atol=1e-15)


POLICY_LOSSES = [GRPOLoss(), DrGRPOLoss(max_completion_length=3), GSPOLoss(), ConservativePPOLoss()]


@pytest.mark.parametrize("loss_fn", POLICY_LOSSES, ids=repr)
def test_no_advantage_no_policy_gradient(loss_fn):
    new, old, mask = draws(3, 4), draws(3, 4, seed=1), draws(3, 4, seed=2) > -1
    extra = {"ref_logprobs": new} if loss_fn.needs_reference else {}
    loss, slope = loss_and_slope(loss_fn, new, old, torch.zeros(3, dtype=torch.float64), mask, **extra)
    assert loss == 0
    assert not slope.any()


@pytest.mark.parametrize("loss_fn", POLICY_LOSSES, ids=repr)
def test_no_old_logprobs_means_the_policy_itself(loss_fn):
    new, advantages, mask = draws(3, 4), draws(3, seed=1), draws(3, 4, seed=2) > -1
    extra = {"ref_logprobs": draws(3, 4, seed=3)} if loss_fn.needs_reference else {}
    loss, slope = loss_and_slope(loss_fn, new, None, advantages, mask, **extra)
    same_loss, same_slope = loss_and_slope(loss_fn, new, new, advantages, mask, **extra)
    assert loss == same_loss
    assert torch.equal(slope, same_slope)
    assert slope.any()


@pytest.mark.parametrize("loss_fn", POLICY_LOSSES, ids=repr)
def test_one_advantage_per_sequence_is_one_for_each_of_its_tokens(loss_fn):
    new, old, advantages, mask = draws(3, 4), draws(3, 4, seed=1), draws(3, seed=2), draws(3, 4, seed=3) > -1
    extra = {"ref_logprobs": draws(3, 4, seed=4)} if loss_fn.needs_reference else {}
    per_token = advantages[:, None].expand(3, 4)
    assert loss_fn(new, old, advantages, mask, **extra).loss == loss_fn(new, old, per_token, mask, **extra).loss


@pytest.mark.parametrize("loss_fn", [GRPOLoss(entropy_coef=0.25), GSPOLoss(entropy_coef=0.25)], ids=repr)
def test_the_entropy_bonus_is_not_weighted(loss_fn):
    out = loss_fn(ZEROS, ZEROS, ADVANTAGES, EVERY, entropy=ZEROS + 2, token_weights=ZEROS)
    assert out.loss == close(-0.25 * 2)


def test_a_plain_number_is_a_normalizer_of_the_losss_own_unit():
    new, advantages, mask = draws(3, 4), draws(3, seed=1), draws(3, 4, seed=2) > -1
    counts = rlloss.count(mask)
    sequences, tokens = int(counts.sequences), int(counts.tokens)
    for loss_fn, unit in (
        (GRPOLoss(), sequences),
        (GSPOLoss(), sequences),
        (DrGRPOLoss(max_completion_length=4), sequences),
    ):
        assert loss_fn(new, None, advantages, mask, normalizer=2 * unit).loss * 2 == close(
            loss_fn(new, None, advantages, mask).loss.item()
        )
    assert SFTLoss()(new, mask, normalizer=2 * tokens).loss * 2 == close(SFTLoss()(new, mask).loss.item())
    assert DPOLoss(beta=0.5)(*PAIRS, normalizer=4).loss * 2 == close(DPOLoss(beta=0.5)(*PAIRS).loss.item())


# what a subclass may rely on


@pytest.mark.parametrize("loss_fn", POLICY_LOSSES, ids=repr)
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_a_surrogate_sees_zeros_where_masked(loss_fn, poison):
    mask = draws(3, 4) > -0.5
    inputs = [torch.where(mask, draws(3, 4, seed=seed), poison) for seed in range(6)]
    batch = loss_fn.door(*inputs[:3], mask, *inputs[3:], None)
    behind = (batch.logprobs, batch.old_logprobs, batch.advantages)
    behind += (batch.ref_logprobs, batch.entropy, batch.token_weights)
    for x, given in zip(behind, inputs, strict=True):
        assert torch.equal(x, given.masked_fill(~mask, 0))
    assert batch.log_ratio.isfinite().all()
    assert batch.ratio.isfinite().all()


def test_a_pair_loss_sees_zeros_where_masked():
    class Seen(DPOLoss):
        def pair_loss(self, margin):
            seen.append(margin)
            return super().pair_loss(margin)

    seen = []
    mask = torch.tensor([True, False])
    for i in range(4):
        Seen()(*[torch.where(mask, x, math.nan) if i == j else x for j, x in enumerate(PAIRS)], mask=mask)
    assert [margin.tolist() for margin in seen] == [[3.0, 0.0]] * 4


# names


def test_losses_are_found_by_name():
    options = {"dr_grpo": {"max_completion_length": 8}}
    for name in rlloss.list_losses():
        loss_fn = rlloss.get_loss(name, **options.get(name, {}))
        assert type(loss_fn).__module__ == f"rlloss.losses.{name}"
        assert getattr(rlloss, type(loss_fn).__name__) is type(loss_fn)


@pytest.mark.parametrize("name", ["dr_grpo", "Dr.GRPO", "dr-grpo", "DR GRPO", "drgrpo", "DrGRPO"])
def test_names_forgive_case_dots_and_dashes(name):
    assert isinstance(rlloss.get_loss(name, max_completion_length=8), DrGRPOLoss)


def test_get_loss_passes_hyperparameters_of_every_base():
    loss_fn = rlloss.get_loss("conservative_ppo", max_kl=0.5, clip_eps_high=0.28, kl_coef=0.1, kl="k2")
    assert (loss_fn.max_kl, loss_fn.clip_eps_high, loss_fn.kl_coef, loss_fn.kl) == (0.5, 0.28, 0.1, "k2")
    assert "clip_eps_high=0.28" in repr(loss_fn)


def test_defaults_are_the_papers():
    assert repr(GRPOLoss()) == (
        "GRPOLoss(kl_coef=0.0, kl='k3', kl_grad='reverse', entropy_coef=0.0, max_log_ratio=20.0, "
        "clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None)"
    )
    assert (GSPOLoss().clip_eps_low, GSPOLoss().clip_eps_high) == (3e-4, 4e-4)
    assert DPOLoss().beta == 0.1


@pytest.mark.parametrize("loss_fn", [rlloss.SFTLoss(), rlloss.GRPOLoss()], ids=["sft", "grpo"])
def test_tokens_behind_the_last_boundary_count_for_nothing(loss_fn):
    logprobs, mask = torch.tensor([-1.0, -2.0, -9.0]), torch.ones(3, dtype=torch.bool)
    cu_seqlens = torch.tensor([0, 2])

    def run(mask):
        inputs = (logprobs, mask) if loss_fn.family == "likelihood" else (logprobs, logprobs - 0.1, logprobs, mask)
        return loss_fn(*inputs, cu_seqlens=cu_seqlens)

    with_tail, without = run(mask), run(torch.tensor([True, True, False]))
    assert with_tail.loss == without.loss
    assert rlloss.scalars(with_tail.metrics) == rlloss.scalars(without.metrics)
