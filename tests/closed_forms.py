"""Gradients in closed form, as the docstrings state them: a new policy loss joins by one line in SLOPES."""

import torch
from loss_cases_distillation import CLOSED_FORMS as DISTILLATION
from loss_cases_preference import CLOSED_FORMS as PREFERENCE
from loss_cases_regions import SLOPES as REGIONS
from loss_cases_regions import with_rollout_weights
from loss_cases_rewards import CLOSED_FORMS as REWARDS
from loss_cases_weighted import SLOPES as WEIGHTED

from rlloss import (
    ActorCriticLoss,
    BradleyTerryLoss,
    ConservativePPOLoss,
    DAPOLoss,
    DecoupledPPOLoss,
    DrGRPOLoss,
    GRPOLoss,
    GSPOLoss,
    ImportanceSamplingLoss,
    KTOLoss,
    PPOLoss,
    REINFORCELoss,
    RLOOLoss,
    TruncatedPolicyLoss,
    ValueLoss,
)

ONE = torch.tensor(1.0, dtype=torch.float64)


def divisor(loss_fn, mask):
    """What each token's term is divided by."""
    lengths = mask.sum(-1, keepdim=True).double()
    sequences = (lengths > 0).sum().double()
    return {
        "token_mean": lengths.sum(),
        "sequence_mean": sequences * lengths,
        "sequence_sum": sequences,
        "fixed_length": sequences * (loss_fn.max_length or 1),
        "sum": ONE,
    }[loss_fn.reduction]


def row_mean(x, mask):
    return (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)


def row_sum(x, mask):
    return (x * mask).sum(-1, keepdim=True)


def kl_slope(loss_fn, step):
    """dKL_t/dl_t of every estimator."""
    r = (step["logprobs"] - step["old_logprobs"]).exp()
    if isinstance(loss_fn, TruncatedPolicyLoss):
        r = r.clamp(loss_fn.ratio_min, loss_fn.ratio_max)
    d = step["logprobs"] - step["ref_logprobs"]
    return {
        ("k1", "reverse"): r * (1 + d),
        ("k2", "reverse"): r * d,
        ("k3", "reverse"): r * d,
        ("k3", "forward"): r * (1 - (-d).exp()),
        ("k2", "literal"): d,
        ("k3", "literal"): 1 - (-d).exp(),
        ("abs", "literal"): d.sign(),
    }[loss_fn.kl, loss_fn.kl_grad]


def kl_value(loss_fn, step):
    r = (step["logprobs"] - step["old_logprobs"]).exp()
    d = step["logprobs"] - step["ref_logprobs"]
    return {"k2": r * d**2 / 2, "k3": r * ((-d).exp() - 1 + d)}[loss_fn.kl]


def plain_slope(loss_fn, step, advantages, weights):
    return -weights * advantages


def weighted_slope(loss_fn, step, advantages, weights):
    log_ratio = step["logprobs"] - step["old_logprobs"]
    r = (row_sum(log_ratio, step.mask) if loss_fn.ratio_level == "sequence" else log_ratio).exp()
    return -weights * r.clamp(loss_fn.ratio_min, loss_fn.ratio_max) * advantages


def clipped_slope(loss_fn, step, advantages, weights):
    mask, log_ratio = step.mask, step["logprobs"] - step["old_logprobs"]
    per_row = {"geometric": row_mean, "sequence": row_sum}.get(loss_fn.ratio_level)
    r = (per_row(log_ratio, mask) if per_row else log_ratio).exp()
    clipped = torch.where(advantages > 0, r > 1 + loss_fn.clip_eps_high, r < 1 - loss_fn.clip_eps_low)
    if loss_fn.dual_clip is not None:
        clipped |= (advantages < 0) & (r > loss_fn.dual_clip)
    slope = torch.where(clipped, 0, -weights * r * advantages)
    return per_row(slope, mask) if per_row else slope


# (loss, step, token advantages, token weights) -> d(weight * surrogate of the sequence)/dl_t, before any reduction
SLOPES = (
    {
        ConservativePPOLoss: clipped_slope,
        DAPOLoss: clipped_slope,
        DrGRPOLoss: clipped_slope,
        GRPOLoss: clipped_slope,
        GSPOLoss: clipped_slope,
        ImportanceSamplingLoss: weighted_slope,
        PPOLoss: clipped_slope,
        REINFORCELoss: plain_slope,
        RLOOLoss: clipped_slope,
    }
    | WEIGHTED
    | REGIONS
)


HINGED = {ConservativePPOLoss}


def hinge_slope(loss_fn, step):
    mask, kl = step.mask, kl_value(loss_fn, step)
    whose = row_mean(kl, mask) if loss_fn.level == "sequence" else (kl * mask).sum() / mask.sum()
    hinge = 2 * loss_fn.conservative_coef * (whose - loss_fn.max_kl).clamp(min=0)
    own = mask.sum() if loss_fn.level == "batch" else mask.sum(-1, keepdim=True) * mask.any(-1).sum()
    return hinge * kl_slope(loss_fn, step) * divisor(loss_fn, mask) / own


def policy_gradient(loss_fn, step):
    mask, advantages = step.mask, step["advantages"]
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    weights = step.get("token_weights", ONE).expand(mask.shape)
    slope = SLOPES[type(loss_fn)](loss_fn, step, advantages.expand(mask.shape), weights)
    if loss_fn.kl_coef and loss_fn.kl != "exact":
        slope = slope + weights * loss_fn.kl_coef * kl_slope(loss_fn, step)
    if type(loss_fn) in HINGED:
        slope = slope + hinge_slope(loss_fn, step)
    gradients = {"logprobs": slope / divisor(loss_fn, mask)}
    if "ref_kl" in step:
        gradients["ref_kl"] = weights * loss_fn.kl_coef / divisor(loss_fn, mask)
    if "entropy" in step:
        gradients["entropy"] = -loss_fn.entropy_coef / divisor(loss_fn, mask).expand(mask.shape)
    return gradients


def decoupled_gradient(loss_fn, step):
    return policy_gradient(loss_fn, with_rollout_weights(loss_fn, step))


def kto_gradient(loss_fn, step):
    gain = loss_fn.beta * (step["logps"] - step["ref_logps"] - step["kl"])
    both = torch.sigmoid(gain) * torch.sigmoid(-gain)
    up, down = -loss_fn.desirable_weight * both, loss_fn.undesirable_weight * both
    return {"logps": step["weights"] * loss_fn.beta * torch.where(step["desirable"], up, down) / step.mask.sum()}


def bradley_terry_gradient(loss_fn, step):
    chosen, rejected = step["chosen_rewards"], step["rejected_rewards"]
    x = (chosen - rejected - step.get("margin", 0 * ONE)) / loss_fn.temperature
    slope = (torch.sigmoid(x) - 1 + loss_fn.label_smoothing) / loss_fn.temperature
    centre = 2 * loss_fn.center_coef * (chosen + rejected)
    weights = step.get("weights", ONE) / step.mask.sum()
    return {"chosen_rewards": weights * (slope + centre), "rejected_rewards": weights * (centre - slope)}


def value_gradient(loss_fn, step):
    v, old, target = step["values"], step["old_values"], step["returns"]
    slope = (1 if loss_fn.halve else 2) * (v - target)
    if loss_fn.value_clip is not None:
        near = old + (v - old).clamp(-loss_fn.value_clip, loss_fn.value_clip)
        beyond = (v - old).abs() > loss_fn.value_clip
        slope = torch.where(beyond & ((near - target).abs() > (v - target).abs()), 0, slope)
    return {"values": step.get("token_weights", ONE) * slope / step.mask.sum()}


def actor_critic_gradient(loss_fn, step):
    gradients = policy_gradient(loss_fn.policy, step)
    return gradients | {k: loss_fn.value_coef * x for k, x in value_gradient(loss_fn.value, step).items()}


CLOSED_FORMS = dict.fromkeys(SLOPES, policy_gradient) | {
    ActorCriticLoss: actor_critic_gradient,
    BradleyTerryLoss: bradley_terry_gradient,
    DecoupledPPOLoss: decoupled_gradient,
    KTOLoss: kto_gradient,
    ValueLoss: value_gradient,
}
CLOSED_FORMS |= DISTILLATION | REWARDS
CLOSED_FORMS |= PREFERENCE
