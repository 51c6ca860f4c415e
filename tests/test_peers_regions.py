"""Losses around a region of trust against the formulas of the systems that have them, in float64.

Every formula is written from that system's documented equation; where it differs from ours on purpose, the test says
by how much.
"""

import math

import pytest
import torch

from rlloss import (
    AStarPOLoss,
    ClipCovLoss,
    CPGDLoss,
    DecoupledPPOLoss,
    DPPOLoss,
    DROLoss,
    KimiLoss,
    KLCovLoss,
    M2POLoss,
    OPSMLoss,
    optimal_value,
)


def batch(seed, rows=6, columns=9):
    """logprobs, old, ref, rollout, advantages per token (one per row), mask."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    logprobs = -draw(rows, columns).abs() - 0.05
    old = (logprobs + 0.4 * draw(rows, columns)).clamp(max=-0.01)
    ref, rollout = old + 0.3 * draw(rows, columns), (old + 0.4 * draw(rows, columns)).clamp(max=-0.01)
    mask = draw(rows, columns) > -0.5
    mask[:, 0] = True
    return logprobs.requires_grad_(), old, ref, rollout, draw(rows, 1).expand(rows, columns), mask


def agree(ours, theirs, logprobs):
    """Gradients within 1e-6 of one another."""
    mine, others = (torch.autograd.grad(loss, logprobs, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(mine, others, rtol=1e-6, atol=1e-9)
    assert others.abs().max() > 1e-3


SEEDS = pytest.mark.parametrize("seed", range(3))


@SEEDS
def test_kimi_per_token_is_rolls(seed):
    logprobs, old, _, _, advantages, mask = batch(seed)
    tau = 0.1
    token = -advantages * logprobs + 0.5 * tau * (logprobs - old).square()
    theirs = (token * mask).sum(-1).mean()  # its aggregation seq-mean-token-sum
    ours = KimiLoss(tau=tau, ratio_level="token")(logprobs, old, advantages, mask).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    agree(ours, theirs, logprobs)


@SEEDS
def test_dro_per_token_is_tinkers(seed):
    logprobs, old, _, _, advantages, mask = batch(seed)
    beta = 0.05
    theirs = -(
        (advantages * logprobs - 0.5 * beta * (logprobs - old).square()) * mask
    ).sum()  # sums, divides by nothing
    ours = DROLoss(tau=beta, ratio_level="token", anchor="old")(logprobs, old, advantages, mask).loss
    assert len(mask) * ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    agree(len(mask) * ours, theirs, logprobs)


@SEEDS
def test_a_star_po_is_its_authors_and_trls(seed):
    logprobs, _, ref, _, _, mask = batch(seed)
    beta1, beta2, generator = 0.5, 1e-1, torch.Generator().manual_seed(seed)
    sampled = (torch.rand(len(mask), 8, generator=generator, dtype=torch.float64) > 0.5).double()
    rewards = (torch.rand(len(mask), generator=generator) > 0.5).double()
    v_star = beta1 * (sampled / beta1).exp().mean(-1).log()
    log_ratio = (logprobs * mask).sum(-1) - (ref * mask).sum(-1)
    theirs = (beta2 * log_ratio + v_star - rewards).square().mean()
    values = optimal_value(sampled.flatten(), torch.arange(len(mask)).repeat_interleave(8), beta1).view(-1, 8)[:, 0]
    torch.testing.assert_close(values, v_star, rtol=1e-6, atol=0)
    ours = AStarPOLoss(beta=beta2)(logprobs, None, rewards - values, mask, ref_logprobs=ref).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    agree(ours, theirs, logprobs)


@SEEDS
def test_cpgd_is_siirls(seed):
    logprobs, old, _, _, advantages, mask = batch(seed)
    eps, coef, cut = 0.2, 0.3, 2.0
    # the log-prob itself is clipped, on the side of the advantage
    up, down = logprobs.minimum(old + math.log(1 + eps)), logprobs.maximum(old + math.log(1 - eps))
    policy = -torch.where(advantages > 0, up, down) * advantages
    drift = ((logprobs.detach() - old).exp() - 1).clamp(max=cut) * logprobs
    theirs = ((policy + coef * drift) * mask).sum() / mask.sum()
    ours = CPGDLoss(drift_coef=coef, drift_clip=cut)(logprobs, old, advantages, mask).loss
    agree(ours, theirs, logprobs)
    # theirs takes the log-prob where the paper has the log-ratio: another value, the same gradient
    offset = (-old * advantages * mask).sum() / mask.sum()
    assert ours.item() == pytest.approx((theirs - offset).item(), rel=1e-6)


@SEEDS
@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_dppo_is_trls_and_skyrls(seed, divergence):
    logprobs, old, _, _, advantages, mask = batch(seed)
    threshold, cap = {"tv": 0.05, "kl": 0.01}[divergence], 1.3
    p, q = logprobs.detach().exp(), old.exp()
    apart = (p - q).abs()
    if divergence == "kl":
        apart = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    too_high, too_low = (apart > threshold) & (p > q), (apart > threshold) & (p < q)
    keep = ~torch.where(advantages > 0, too_high, too_low) & mask
    assert not keep[mask].all()
    weights = (logprobs.detach() - old).exp().clamp(max=cap)
    total = -(advantages * weights * keep * logprobs).sum()
    loss_fn = DPPOLoss(divergence=divergence, threshold_low=threshold, threshold_high=threshold, ratio_max=cap)
    ours = loss_fn(logprobs, old, advantages, mask).loss
    # SkyRL divides by the trained tokens, TRL by those that are kept, prime-rl by those of all ranks: a factor
    for unit in (mask.sum(), keep.sum()):
        agree(len(mask) / unit * ours, total / unit, logprobs)


@SEEDS
def test_opsm_is_slimes_and_trls(seed):
    logprobs, old, _, _, advantages, mask = batch(seed)
    delta, eps = 0.02, 0.2
    lengths = mask.sum(-1, keepdim=True)
    fallen = ((old - logprobs.detach()) * mask).sum(-1, keepdim=True) / lengths
    keep = ~((advantages < 0) & (fallen > delta))
    assert not keep.all()
    r = (logprobs - old).exp()
    token = -torch.minimum(r * advantages, r.clamp(1 - eps, 1 + eps) * advantages) * keep
    theirs = ((token * mask).sum(-1) / lengths[:, 0]).mean()
    ours = OPSMLoss(threshold=delta)(logprobs, old, advantages, mask).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    agree(ours, theirs, logprobs)


@SEEDS
def test_decoupled_ppo_is_areals(seed):
    logprobs, proximal, _, behaviour, advantages, mask = batch(seed)
    eps, cap = 0.2, 1.3
    r = (logprobs - proximal).exp()
    token = torch.maximum(-advantages * r, -advantages * r.clamp(1 - eps, 1 + eps))
    weights = (proximal - behaviour).exp()
    inputs = (logprobs, proximal, advantages, mask)
    whole = (token * weights * mask).sum() / mask.sum()
    clamped = (token * weights.clamp(max=cap) * mask).sum() / mask.sum()  # its rejection_sampling with action=clamp
    for loss_fn, theirs in ((DecoupledPPOLoss(), whole), (DecoupledPPOLoss(ratio_max=cap), clamped)):
        ours = loss_fn(*inputs, rollout_logprobs=behaviour).loss
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
        agree(ours, theirs, logprobs)


def covariances(logprobs, advantages, mask):
    new, a = logprobs.detach()[mask], advantages[mask]
    return torch.zeros_like(advantages).masked_scatter(mask, (new - new.mean()) * (a - a.mean()))


@SEEDS
def test_kl_cov_is_verls(seed):
    logprobs, old, _, _, advantages, mask = batch(seed)
    fraction, coef = 0.2, 1.0
    cov = covariances(logprobs, advantages, mask)[mask]
    k = max(1, int(fraction * len(cov)))  # at least one, where the paper takes the floor
    top = torch.zeros(len(cov), dtype=torch.bool)
    top[cov.topk(k).indices] = True
    log_ratio = (logprobs - old)[mask]
    theirs = (-log_ratio.exp() * advantages[mask] + coef * top * log_ratio.abs()).mean()
    ours = KLCovLoss(fraction=fraction, penalty_coef=coef)(logprobs, old, advantages, mask).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    agree(ours, theirs, logprobs)


@SEEDS
def test_clip_cov_is_verls_but_for_who_is_drawn(seed):
    logprobs, old, _, _, advantages, mask = batch(seed)
    loss_fn = ClipCovLoss(fraction=0.2, cov_min=0.02, cov_max=5.0)
    drawn = loss_fn.statistics(logprobs, old, advantages, mask)["selected"]
    cov = covariances(logprobs, advantages, mask)
    candidates = mask & (cov > 0.02) & (cov < 5.0)
    assert drawn.sum() == min(max(int(0.2 * mask.sum()), 1), int(candidates.sum()))
    assert not (drawn & ~candidates).any()
    r = (logprobs - old).exp()
    theirs = torch.maximum(-r * advantages, -r.clamp(0, 2) * advantages)
    theirs = (theirs * ~drawn * mask).sum() / mask.sum()
    ours = loss_fn(logprobs, old, advantages, mask).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    agree(ours, theirs, logprobs)


@SEEDS
def test_m2po_is_areals_where_every_token_is_in_the_region(seed):
    logprobs, old, _, _, _, mask = batch(seed)
    threshold, log_ratio = 0.04, (logprobs - old).detach()
    square = log_ratio.square()[mask].sort(descending=True)
    suffix = square.values.flip(0).cumsum(0).flip(0) / torch.arange(len(square.values), 0, -1)
    dropped = int((suffix >= threshold).sum())  # it stops below the threshold, the paper at it
    keep = torch.ones(len(square.values), dtype=torch.bool)
    keep[square.indices[:dropped]] = False
    loss_fn, toward = M2POLoss(threshold=threshold), log_ratio.sign()  # advantages that all ratios move with
    selected = loss_fn.statistics(logprobs, old, toward, mask)["selected"]
    assert dropped > 0
    assert torch.equal(selected[mask], ~keep)
    # with advantages of another sign the paper leaves a token be, and AReaL cuts it all the same
    assert not loss_fn.statistics(logprobs, old, -toward, mask)["selected"].any()
    # AReaL takes what it cut out of the count as well
    ratio = (logprobs - old).exp()
    theirs = -(ratio * toward)[mask][keep].sum() / keep.sum()
    ours = loss_fn(logprobs, old, toward, mask).loss
    agree(mask.sum() / keep.sum() * ours, theirs, logprobs)
