"""The lines of the losses around a region of trust, and of those that choose among a step's tokens, in the tables."""

from typing import Any

import torch
from loss_cases import Case, Draw, Step, bare_policy, policy
from torch import Tensor

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
)


def bare_referred(mask: Tensor, draw: Draw) -> Step:
    step = bare_policy(mask, draw)
    return step.but(ref_logprobs=step["logprobs"] + 0.6 * draw(*mask.shape))


def sampled(mask: Tensor, draw: Draw) -> Step:
    step = policy(mask, draw)
    return step.but(rollout_logprobs=step["old_logprobs"] + 0.5 * draw(*mask.shape))


def bare_sampled(mask: Tensor, draw: Draw) -> Step:
    step = bare_policy(mask, draw)
    return step.but(rollout_logprobs=step["old_logprobs"] + 0.5 * draw(*mask.shape))


TERMS: dict[str, Any] = {"kl_coef": 0.3, "entropy_coef": 0.05}
CLIP: dict[str, Any] = {"clip_eps_low": 0.2, "clip_eps_high": 0.3}
NARROW: dict[str, Any] = {"clip_eps_low": 0.1, "clip_eps_high": 0.05}
DRAWN: dict[str, Any] = {"fraction": 0.3, "cov_min": 0.05, "cov_max": 2.0}

CASES = [
    Case("kimi_bare", KimiLoss, bare_policy),
    Case("kimi", KimiLoss, policy, TERMS | {"tau": 0.7}),
    Case("kimi_token", KimiLoss, policy, TERMS | {"tau": 0.7, "ratio_level": "token"}),
    Case("dro_bare", DROLoss, bare_referred),
    Case("dro", DROLoss, policy, TERMS | {"tau": 0.4}),
    Case("dro_token_old", DROLoss, policy, TERMS | {"tau": 0.4, "ratio_level": "token", "anchor": "old"}),
    Case("a_star_po_bare", AStarPOLoss, bare_referred, {"beta": 0.3}),
    Case("a_star_po", AStarPOLoss, policy, TERMS | {"beta": 0.5}),
    Case("cpgd_bare", CPGDLoss, bare_policy),
    Case("cpgd", CPGDLoss, policy, TERMS | NARROW | {"drift_coef": 0.4, "drift_clip": 0.15}),
    Case("cpgd_open", CPGDLoss, policy, {"clip_eps_low": 1.0, "clip_eps_high": 0.1, "drift_clip": 0.5}),
    Case("dppo_bare", DPPOLoss, bare_policy, {"threshold_low": 0.05, "threshold_high": 0.05}),
    Case("dppo", DPPOLoss, policy, TERMS | {"threshold_low": 0.05, "threshold_high": 0.02, "ratio_max": 1.2}),
    Case("dppo_kl", DPPOLoss, policy, TERMS | {"divergence": "kl", "threshold_low": 0.005, "threshold_high": 0.01}),
    Case("opsm_bare", OPSMLoss, bare_policy, CLIP | {"threshold": 0.02}),
    Case("opsm", OPSMLoss, policy, TERMS | CLIP | {"threshold": 0.05, "dual_clip": 1.4}),
    Case("decoupled_ppo_bare", DecoupledPPOLoss, bare_sampled, CLIP),
    Case("decoupled_ppo", DecoupledPPOLoss, sampled, TERMS | CLIP | {"ratio_max": 1.5, "dual_clip": 1.4}),
    Case("clip_cov_bare", ClipCovLoss, bare_policy, DRAWN | CLIP),
    Case("clip_cov", ClipCovLoss, policy, TERMS | DRAWN | CLIP | {"seed": 3, "dual_clip": 1.4}),
    Case("kl_cov_bare", KLCovLoss, bare_policy, {"fraction": 0.3}),
    Case("kl_cov", KLCovLoss, policy, TERMS | {"fraction": 0.3, "penalty_coef": 0.7}),
    Case("kl_cov_k3", KLCovLoss, policy, TERMS | {"fraction": 0.3, "penalty": "k3"}),
    Case("m2po_bare", M2POLoss, bare_policy),
    Case("m2po", M2POLoss, policy, TERMS | {"threshold": 0.005}),
]


def log_ratio(step: Step) -> Tensor:
    return step["logprobs"] - step["old_logprobs"]


def row_sum(x: Tensor, step: Step) -> Tensor:
    return (x * step.mask).sum(-1, keepdim=True)


def quadratic(loss_fn: Any, step: Step, advantages: Tensor, weights: Tensor) -> Tensor:
    d = step["logprobs"] - step["ref_logprobs" if loss_fn.anchor == "reference" else "old_logprobs"]
    if loss_fn.ratio_level == "token":
        return weights * (loss_fn.tau * d - advantages)
    # half from the token's own share of the square, half from its part in D
    square = loss_fn.tau / 2 * (weights * row_sum(d, step) + row_sum(weights * d, step))
    return square - weights * advantages


def regressed(loss_fn: Any, step: Step, advantages: Tensor, weights: Tensor) -> Tensor:
    drift = row_sum(step["logprobs"] - step["ref_logprobs"], step)
    return row_sum(2 * loss_fn.beta * weights * (loss_fn.beta * drift - advantages), step)


def drifting(loss_fn: Any, step: Step, advantages: Tensor, weights: Tensor) -> Tensor:
    r = log_ratio(step).exp()
    beyond = torch.where(advantages > 0, r > 1 + loss_fn.clip_eps_high, r < 1 - loss_fn.clip_eps_low)
    drift = loss_fn.drift_coef * (r - 1).clamp(max=loss_fn.drift_clip)
    return weights * (drift - torch.where(beyond, 0, advantages))


def divergent(loss_fn: Any, step: Step, advantages: Tensor, weights: Tensor) -> Tensor:
    p, q, r = step["logprobs"].exp(), step["old_logprobs"].exp().clamp(max=1), log_ratio(step).exp()
    kl = q * (q / p).log() + torch.xlogy(1 - q, (1 - q) / (1 - p))
    apart = kl if loss_fn.divergence == "kl" else (p - q).abs()
    cut = torch.where(advantages > 0, (r > 1) & (apart > loss_fn.threshold_high), False)
    cut |= torch.where(advantages < 0, (r < 1) & (apart > loss_fn.threshold_low), False)
    return torch.where(cut, 0, -weights * r.clamp(max=loss_fn.ratio_max) * advantages)


def clipped(loss_fn: Any, step: Step, advantages: Tensor, weights: Tensor) -> Tensor:
    r = log_ratio(step).exp()
    beyond = torch.where(advantages > 0, r > 1 + loss_fn.clip_eps_high, r < 1 - loss_fn.clip_eps_low)
    if loss_fn.dual_clip is not None:
        beyond |= (advantages < 0) & (r > loss_fn.dual_clip)
    return torch.where(beyond, 0, -weights * r * advantages)


def masked(loss_fn: Any, step: Step, advantages: Tensor, weights: Tensor) -> Tensor:
    fallen = -row_sum(log_ratio(step), step) / step.mask.sum(-1, keepdim=True)
    dropped = (advantages < 0) & (fallen > loss_fn.threshold)
    return torch.where(dropped, 0, clipped(loss_fn, step, advantages, weights))


def chosen(loss_fn: Any, step: Step) -> Tensor:
    selected = loss_fn.statistics(**step)["selected"]
    assert selected.any()
    assert (step.mask & ~selected).any()
    return selected


def clip_cov(loss_fn: Any, step: Step, advantages: Tensor, weights: Tensor) -> Tensor:
    return torch.where(chosen(loss_fn, step), 0, clipped(loss_fn, step, advantages, weights))


def kl_cov(loss_fn: Any, step: Step, advantages: Tensor, weights: Tensor) -> Tensor:
    d = log_ratio(step)
    price = d.sign() if loss_fn.penalty == "abs" else d.exp() - 1
    return weights * (loss_fn.penalty_coef * price * chosen(loss_fn, step) - d.exp() * advantages)


def m2po(loss_fn: Any, step: Step, advantages: Tensor, weights: Tensor) -> Tensor:
    return torch.where(chosen(loss_fn, step), 0, -weights * log_ratio(step).exp() * advantages)


# in the sense of closed_forms.SLOPES
SLOPES = {
    AStarPOLoss: regressed,
    CPGDLoss: drifting,
    ClipCovLoss: clip_cov,
    DPPOLoss: divergent,
    DROLoss: quadratic,
    DecoupledPPOLoss: clipped,
    KLCovLoss: kl_cov,
    KimiLoss: quadratic,
    M2POLoss: m2po,
    OPSMLoss: masked,
}


def with_rollout_weights(loss_fn: Any, step: Step) -> Step:
    """What turns decoupled PPO into PPO: the ratio to the sampler among the token weights."""
    ratio = (step["old_logprobs"] - step["rollout_logprobs"]).exp().clamp(max=loss_fn.ratio_max)
    return step.but(token_weights=ratio * step.get("token_weights", torch.ones_like(ratio)))
