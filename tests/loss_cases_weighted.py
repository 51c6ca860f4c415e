"""The lines of A2C, CISPO, GMPO, GPG, GSPO-token, LUSPO, SAPO, TIS, TOPR and VESPO in the tables of the laws."""

from typing import Any

import torch
from loss_cases import Case, bare_policy, policy

from rlloss import (
    A2CLoss,
    CISPOLoss,
    GMPOLoss,
    GPGLoss,
    GSPOTokenLoss,
    LUSPOLoss,
    SAPOLoss,
    TISLoss,
    TOPRLoss,
    VESPOLoss,
)

TERMS: dict[str, Any] = {"kl_coef": 0.3, "entropy_coef": 0.05}
NARROW: dict[str, Any] = {"clip_eps_low": 0.1, "clip_eps_high": 0.15}
TAPERED = {"positive_min": 0.7, "positive_max": 1.5, "negative_min": 0.4, "negative_max": 1.2}
KERNELS = {"k_pos": 1.5, "lambda_pos": 0.7, "k_neg": 1.2, "lambda_neg": 1.1}

CASES = [
    Case("a2c_bare", A2CLoss, bare_policy, {"entropy_coef": 0.0}),
    Case("a2c", A2CLoss, policy, {"kl_coef": 0.3}),
    Case("gpg_bare", GPGLoss, bare_policy),
    Case("gpg", GPGLoss, policy, TERMS),
    Case("cispo_bare", CISPOLoss, bare_policy, {"ratio_max": 1.2}),
    Case("cispo", CISPOLoss, policy, TERMS | {"ratio_min": 0.8, "ratio_max": 1.3}),
    Case("cispo_unbounded", CISPOLoss, policy, TERMS | {"ratio_max": torch.inf}),
    Case("tis_bare", TISLoss, bare_policy),
    Case("tis", TISLoss, policy, TERMS | {"ratio_max": 1.5}),
    Case("tis_token", TISLoss, policy, TERMS | {"ratio_level": "token"}),
    Case("topr_bare", TOPRLoss, bare_policy),
    Case("topr", TOPRLoss, policy, TERMS | TAPERED),
    Case("vespo_bare", VESPOLoss, bare_policy),
    Case("vespo", VESPOLoss, policy, TERMS | KERNELS),
    Case("sapo_bare", SAPOLoss, bare_policy),
    Case("sapo", SAPOLoss, policy, TERMS | {"tau_pos": 2.0, "tau_neg": 5.0}),
    Case("gspo_token_bare", GSPOTokenLoss, bare_policy, NARROW),
    Case("gspo_token", GSPOTokenLoss, policy, TERMS | NARROW | {"dual_clip": 1.2}),
    Case("gmpo_bare", GMPOLoss, bare_policy, {"clip_log_ratio_low": 0.2, "clip_log_ratio_high": 0.3}),
    Case("gmpo", GMPOLoss, policy, TERMS | {"clip_log_ratio_low": 0.3, "clip_log_ratio_high": 0.2}),
    Case("luspo_bare", LUSPOLoss, bare_policy, NARROW),
    Case("luspo", LUSPOLoss, policy, TERMS | NARROW | {"dual_clip": 1.2}),
]


def log_ratio(step):
    return step["logprobs"] - step["old_logprobs"]


def row_sum(x, step):
    return (x * step.mask).sum(-1, keepdim=True)


def row_mean(x, step):
    return row_sum(x, step) / step.mask.sum(-1, keepdim=True)


def unweighted(loss_fn, step, advantages, weights):
    return -weights * advantages


def cispo(loss_fn, step, advantages, weights):
    return -weights * log_ratio(step).exp().clamp(loss_fn.ratio_min, loss_fn.ratio_max) * advantages


def tis(loss_fn, step, advantages, weights):
    of = log_ratio(step)
    of = of if loss_fn.ratio_level == "token" else row_sum(of, step)
    return -weights * of.exp().clamp(max=loss_fn.ratio_max) * advantages


def topr(loss_fn, step, advantages, weights):
    ratio = row_sum(log_ratio(step), step).exp()
    good = ratio.clamp(loss_fn.positive_min, loss_fn.positive_max)
    bad = ratio.clamp(loss_fn.negative_min, loss_fn.negative_max)
    return -weights * torch.where(advantages >= 0, good, bad) * advantages


def vespo(loss_fn, step, advantages, weights):
    w = row_sum(log_ratio(step), step).exp()
    good = w**loss_fn.k_pos * torch.exp(loss_fn.lambda_pos * (1 - w))
    bad = w**loss_fn.k_neg * torch.exp(loss_fn.lambda_neg * (1 - w))
    return -weights * torch.where(advantages >= 0, good, bad) * advantages


def sapo(loss_fn, step, advantages, weights):
    r = log_ratio(step).exp()
    tau = torch.where(advantages > 0, torch.full_like(r, loss_fn.tau_pos), loss_fn.tau_neg)
    return -weights * r * advantages / torch.cosh(tau * (r - 1) / 2) ** 2


def beyond(loss_fn, ratio, advantages):
    clipped = torch.where(advantages > 0, ratio > 1 + loss_fn.clip_eps_high, ratio < 1 - loss_fn.clip_eps_low)
    if loss_fn.dual_clip is not None:
        clipped |= (advantages < 0) & (ratio > loss_fn.dual_clip)
    return clipped


def gspo_token(loss_fn, step, advantages, weights):
    s = row_mean(log_ratio(step), step).exp()
    return torch.where(beyond(loss_fn, s, advantages), 0, -weights * s * advantages)


def gmpo(loss_fn, step, advantages, weights):
    of = log_ratio(step)
    good, bad = (advantages * (advantages > 0) * weights), (advantages * (advantages < 0) * weights)
    above = row_mean(of.clamp(max=loss_fn.clip_log_ratio_high), step).exp()
    below = row_mean(of.clamp(min=-loss_fn.clip_log_ratio_low), step).exp()
    up = -above * row_mean(good, step) * (of < loss_fn.clip_log_ratio_high)
    return up - below * row_mean(bad, step) * (of > -loss_fn.clip_log_ratio_low)


def luspo(loss_fn, step, advantages, weights):
    return row_mean(gspo_token(loss_fn, step, advantages, weights), step)


# in the sense of closed_forms.SLOPES
SLOPES = {
    A2CLoss: unweighted,
    CISPOLoss: cispo,
    GMPOLoss: gmpo,
    GPGLoss: unweighted,
    GSPOTokenLoss: gspo_token,
    LUSPOLoss: luspo,
    SAPOLoss: sapo,
    TISLoss: tis,
    TOPRLoss: topr,
    VESPOLoss: vespo,
}
