"""The lines of the paired preference losses in the tables of the laws."""

import math
from typing import Any

import torch
from loss_cases import Case, Draw, Step, mean_pairs, pairs, reference_free_pairs, unweighted_pairs
from torch import Tensor

from rlloss import (
    AlphaPOLoss,
    AOTLoss,
    AOTUnpairedLoss,
    APODownLoss,
    APOZeroLoss,
    BCOPairLoss,
    BetaDPOLoss,
    CalDPOLoss,
    CPOLoss,
    DiscoPOPLoss,
    DPOLoss,
    EXOLoss,
    HingeLoss,
    IPOLoss,
    NCALoss,
    ORPOLoss,
    RobustDPOLoss,
    SimPOLoss,
    SPPOLoss,
    TDPOLoss,
    TPOLoss,
)


def near_pairs(mask: Tensor, draw: Draw) -> Step:
    """Log-ratios of about a nat, where exponentials of them are still smooth."""
    step = pairs(mask, draw)
    near = {f"ref_{side}_logps": step[f"{side}_logps"] + draw(mask.shape[0]) for side in ("chosen", "rejected")}
    return step.but(**near)


def bare_pairs(mask: Tensor, draw: Draw) -> Step:
    step = near_pairs(mask, draw)
    del step["weights"]
    return step


def strengths(mask: Tensor, draw: Draw) -> Tensor:
    return draw(mask.shape[0]).abs() + 0.05


def pairs_with_betas(mask: Tensor, draw: Draw) -> Step:
    return near_pairs(mask, draw).but(beta=strengths(mask, draw))


def softly_labelled(mask: Tensor, draw: Draw) -> Step:
    return pairs_with_betas(mask, draw).but(soft_labels=draw(mask.shape[0]).sigmoid())


def pairs_with_win_rates(mask: Tensor, draw: Draw) -> Step:
    rates = {f"{side}_win_rate": draw(mask.shape[0]).sigmoid() for side in ("chosen", "rejected")}
    return pairs_with_betas(mask, draw).but(**rates)


def pairs_with_kl(mask: Tensor, draw: Draw) -> Step:
    sums = {f"{side}_kl": 3 * draw(mask.shape[0]).abs() for side in ("chosen", "rejected")}
    return near_pairs(mask, draw).but(**sums)


def bare_free_pairs(mask: Tensor, draw: Draw) -> Step:
    step = reference_free_pairs(mask, draw)
    del step["weights"]
    return step


def free_pairs_with_betas(mask: Tensor, draw: Draw) -> Step:
    return reference_free_pairs(mask, draw).but(beta=strengths(mask, draw))


def triples(mask: Tensor, draw: Draw) -> Step:
    return reference_free_pairs(mask, draw).but(gold_logps=4 * draw(mask.shape[0]) - 10)


def triples_with_betas(mask: Tensor, draw: Draw) -> Step:
    return triples(mask, draw).but(beta=strengths(mask, draw))


def mean_pairs_with_betas(mask: Tensor, draw: Draw) -> Step:
    return mean_pairs(mask, draw).but(beta=strengths(mask, draw))


def likely_pairs(mask: Tensor, draw: Draw) -> Step:
    """Means that a model can have: below 0."""
    step = mean_pairs_with_betas(mask, draw)
    return step.but(**{k: -draw(mask.shape[0]).abs() - 0.05 for k in step.waist})


def bare_likely_pairs(mask: Tensor, draw: Draw) -> Step:
    return Step({k: x for k, x in likely_pairs(mask, draw).items() if k not in ("weights", "beta")})


def divergence(kind: str, alpha: float = 0.5) -> dict[str, Any]:
    return {"beta": 0.3, "divergence": kind, "divergence_alpha": alpha}


CASES = [
    Case("dpo_betas", DPOLoss, pairs_with_betas, {"label_smoothing": 0.1}),
    Case("dpo_soft", DPOLoss, softly_labelled),
    Case("dpo_means", DPOLoss, near_pairs, {"length_normalized": True}),
    Case("dpo_forward_kl", DPOLoss, near_pairs, divergence("forward_kl")),
    Case("dpo_jensen_shannon", DPOLoss, near_pairs, divergence("jensen_shannon")),
    Case("dpo_alpha", DPOLoss, near_pairs, divergence("alpha", 0.3)),
    Case("ipo_betas", IPOLoss, pairs_with_betas),
    Case("ipo_alpha", IPOLoss, near_pairs, divergence("alpha", 0.3)),
    Case("simpo_betas", SimPOLoss, mean_pairs_with_betas, {"margin": 0.7}),
    Case("hinge_bare", HingeLoss, bare_pairs),
    Case("hinge", HingeLoss, pairs_with_betas, {"divergence": "jensen_shannon"}),
    Case("hinge_reference_free", HingeLoss, reference_free_pairs, {"beta": 0.2, "reference_free": True}),
    Case("robust_bare", RobustDPOLoss, bare_pairs),
    Case("robust", RobustDPOLoss, pairs_with_betas, {"label_smoothing": 0.3, "divergence": "forward_kl"}),
    Case("exo_bare", EXOLoss, bare_pairs),
    Case("exo", EXOLoss, pairs_with_betas, {"label_smoothing": 0.2, "divergence": "alpha"}),
    Case("discopop_bare", DiscoPOPLoss, bare_pairs),
    Case("discopop", DiscoPOPLoss, pairs_with_betas, {"tau": 0.4, "divergence": "jensen_shannon"}),
    Case("nca_bare", NCALoss, bare_pairs),
    Case("nca", NCALoss, pairs_with_betas),
    Case("sppo_bare", SPPOLoss, bare_pairs, {"beta": 0.4}),
    Case("sppo", SPPOLoss, pairs_with_win_rates),
    Case("apo_zero_bare", APOZeroLoss, bare_pairs),
    Case("apo_zero", APOZeroLoss, pairs_with_betas),
    Case("apo_down_bare", APODownLoss, bare_pairs),
    Case("apo_down", APODownLoss, pairs_with_betas),
    Case("bco_pair_bare", BCOPairLoss, bare_pairs),
    Case("bco_pair", BCOPairLoss, pairs_with_betas),
    Case("cal_dpo_bare", CalDPOLoss, bare_pairs, {"beta": 0.4}),
    Case("cal_dpo", CalDPOLoss, pairs_with_betas),
    Case("beta_dpo_bare", BetaDPOLoss, bare_pairs),
    Case("beta_dpo", BetaDPOLoss, near_pairs, {"beta": 0.3, "alpha": 0.4, "min_beta": 0.01}),
    Case("beta_dpo_least", BetaDPOLoss, near_pairs, {"alpha": 9.0, "min_beta": 0.7}),
    Case("tdpo", TDPOLoss, pairs_with_kl, {"beta": 0.3}),
    Case("tdpo1", TDPOLoss, pairs_with_kl, {"beta": 0.3, "alpha": 1.0, "stop_chosen": False}),
    Case("aot", AOTLoss, unweighted_pairs, {"beta": 0.2}),
    Case("aot_smoothed", AOTLoss, unweighted_pairs, {"beta": 0.3, "label_smoothing": 0.1}),
    Case("aot_reference_free", AOTLoss, bare_free_pairs, {"reference_free": True}),
    Case("aot_unpaired", AOTUnpairedLoss, unweighted_pairs, {"beta": 0.2}),
    Case("aot_unpaired_smoothed", AOTUnpairedLoss, unweighted_pairs, {"beta": 0.3, "label_smoothing": 0.1}),
    Case("cpo_bare", CPOLoss, bare_free_pairs),
    Case("cpo", CPOLoss, free_pairs_with_betas, {"nll_coef": 0.3, "label_smoothing": 0.1}),
    Case("tpo", TPOLoss, triples, {"beta": 0.2}),
    Case("tpo_l", TPOLoss, triples_with_betas, {"margin": 0.5, "label_smoothing": 0.1, "length_normalized": True}),
    Case("tpo_without_gold", TPOLoss, bare_free_pairs, {"nll_coef": 0.0}),
    Case("alpha_po_bare", AlphaPOLoss, bare_likely_pairs),
    Case("alpha_po", AlphaPOLoss, mean_pairs_with_betas, {"alpha": -0.3, "margin": 0.2, "label_smoothing": 0.1}),
    Case("alpha_po_0", AlphaPOLoss, mean_pairs, {"alpha": 0.0}),
    Case("orpo_bare", ORPOLoss, bare_likely_pairs),
    Case("orpo", ORPOLoss, likely_pairs, {"nll_coef": 0.3}),
]


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def score_slope(loss_fn, log_ratio):
    """The score's slope in the log-ratio, and the score."""
    kind = getattr(loss_fn, "divergence", "reverse_kl")
    alpha = {"forward_kl": 1.0, "alpha": getattr(loss_fn, "divergence_alpha", 0.0)}.get(kind, 0.0)
    alpha = getattr(loss_fn, "alpha", 0.0) if isinstance(loss_fn, AlphaPOLoss) else alpha
    u = log_ratio.exp()
    if kind == "jensen_shannon":
        return 1 / (1 + u), (2 * u / (1 + u)).log()
    return u**-alpha, (1 - u**-alpha) / alpha if alpha else log_ratio


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def dpo(loss_fn, step, h, beta):
    label = step.get("soft_labels", 1 - number(loss_fn.label_smoothing))
    return beta * (sigmoid(beta * h) - label)


def ipo(loss_fn, step, h, beta):
    return 2 * (h - 1 / (2 * beta))


def with_target(loss_fn, step, h, beta):
    return beta * (sigmoid(beta * h - loss_fn.margin) - 1 + loss_fn.label_smoothing)


def hinge(loss_fn, step, h, beta):
    return -beta * (beta * h < 1)


def robust(loss_fn, step, h, beta):
    e = loss_fn.label_smoothing
    return beta * (sigmoid(beta * h) - (1 - e) / (1 - 2 * e))


def exo(loss_fn, step, h, beta):
    q, e = sigmoid(beta * h), loss_fn.label_smoothing
    return beta * q * (1 - q) * (beta * h - math.log((1 - e) / e))


def discopop(loss_fn, step, h, beta):
    x = beta * h
    g = sigmoid(x / loss_fn.tau)
    hump = g * (1 - g) / loss_fn.tau * ((-x).exp() + sigmoid(x).log())
    return beta * (hump - (1 - g) * sigmoid(-x) - g * (-x).exp())


def beta_dpo(loss_fn, step, h, beta):
    beta = (loss_fn.beta * (1 + loss_fn.alpha * of_step(step, h))).clamp(min=loss_fn.min_beta)
    return beta * (sigmoid(beta * h) - 1)


def of_step(step, values):
    counts = step.mask & (step.get("weights", torch.ones_like(values)) != 0)
    return values[counts].mean()


def of_margin(slope):
    """From the slope in h to those in both answers."""

    def both(loss_fn, step, chosen, rejected, beta):
        (c, chosen_score), (r, rejected_score) = score_slope(loss_fn, chosen), score_slope(loss_fn, rejected)
        dh = slope(loss_fn, step, chosen_score - rejected_score, beta)
        return dh * c, -dh * r

    return both


def nca(loss_fn, step, c, r, beta):
    return beta * (sigmoid(beta * c) / 2 - sigmoid(-beta * c)), beta * sigmoid(beta * r) / 2


def sppo(loss_fn, step, c, r, beta):
    wins = step.get("chosen_win_rate", number(1.0)), step.get("rejected_win_rate", number(0.0))
    return 2 * (c - (wins[0] - 0.5) / beta), 2 * (r - (wins[1] - 0.5) / beta)


def bump(x):
    return sigmoid(x) * sigmoid(-x)


def apo_zero(loss_fn, step, c, r, beta):
    return -beta * bump(beta * c), beta * bump(beta * r)


def apo_down(loss_fn, step, c, r, beta):
    apart = beta * bump(beta * (c - r))
    return beta * bump(beta * c) - apart, apart


def bco_pair(loss_fn, step, c, r, beta):
    delta = of_step(step, beta * (c + r) / 2)
    return -beta * sigmoid(delta - beta * c), beta * sigmoid(beta * r - delta)


def cal_dpo(loss_fn, step, c, r, beta):
    lost = sigmoid(r - c)
    return -lost + 2 * (c - 1 / (2 * beta)), lost + 2 * (r + 1 / (2 * beta))


def tdpo(loss_fn, step, c, r, beta):
    apart = step["rejected_kl"] - step["chosen_kl"]
    slope = -beta * sigmoid(-beta * (c - r - loss_fn.alpha * apart))
    return slope, -slope


def cpo(loss_fn, step, c, r, beta):
    slope = beta * (sigmoid(beta * (c - r)) - 1 + loss_fn.label_smoothing)
    return slope - loss_fn.nll_coef, -slope


def orpo(loss_fn, step, c, r, beta):
    p, q = c.exp(), r.exp()
    lost = 1 / (1 + p / (1 - p) * (1 - q) / q)
    return -loss_fn.nll_coef - beta * lost / (1 - p), beta * lost / (1 - q)


def gradients(slopes):
    """From slopes per pair to gradients by name, under the step's weights and number of pairs."""

    def by_name(loss_fn, step):
        sides = [name for name in step if name in step.waist and name.startswith(("chosen", "rejected"))]
        (chosen, rejected), weights = sides[:2], step.get("weights", number(1.0)) / step.mask.sum()
        c, r = (step[name] - step.get(f"ref_{name}", number(0.0)) for name in (chosen, rejected))
        both = slopes(loss_fn, step, c, r, step.get("beta", number(loss_fn.beta)))
        made = dict(zip((chosen, rejected), (weights * x for x in both), strict=True))
        if "gold_logps" in step:
            made["gold_logps"] = -loss_fn.nll_coef * weights.expand_as(c)
        if "rejected_kl" in step:
            made["rejected_kl"] = -loss_fn.alpha * made[chosen]
            made["chosen_kl"] = 0 * c if loss_fn.stop_chosen else -made["rejected_kl"]
        return made

    return by_name


def ranked(loss_fn, step):
    """Each row has the slope of its rank."""
    names = ("chosen_logps", "rejected_logps")
    c, r = (step[name] for name in names)
    ref_c, ref_r = (step.get(f"ref_{name}", torch.zeros_like(c)) for name in names)
    paired = isinstance(loss_fn, AOTLoss)
    above, below = (c - r, ref_c - ref_r) if paired else (c - ref_c, r - ref_r)
    rows = step.mask.nonzero()[:, 0]
    upper, lower = (rows[x[rows].argsort()] for x in (above, below))
    h = above[upper] - below[lower]
    slope = loss_fn.beta * (sigmoid(loss_fn.beta * h) - 1 + loss_fn.label_smoothing) / len(rows)
    of_chosen = torch.zeros_like(c).scatter(0, upper, slope)
    of_rejected = -of_chosen if paired else -torch.zeros_like(c).scatter(0, lower, slope)
    return dict(zip(names, (of_chosen, of_rejected), strict=True))


# in the sense of closed_forms.CLOSED_FORMS
CLOSED_FORMS = {
    loss: gradients(of_margin(slope))
    for loss, slope in {
        AlphaPOLoss: with_target,
        BetaDPOLoss: beta_dpo,
        DPOLoss: dpo,
        DiscoPOPLoss: discopop,
        EXOLoss: exo,
        HingeLoss: hinge,
        IPOLoss: ipo,
        RobustDPOLoss: robust,
        SimPOLoss: with_target,
        TPOLoss: with_target,
    }.items()
} | {
    loss: gradients(slopes)
    for loss, slopes in {
        APODownLoss: apo_down,
        APOZeroLoss: apo_zero,
        BCOPairLoss: bco_pair,
        CPOLoss: cpo,
        CalDPOLoss: cal_dpo,
        NCALoss: nca,
        ORPOLoss: orpo,
        SPPOLoss: sppo,
        TDPOLoss: tdpo,
    }.items()
}
CLOSED_FORMS |= dict.fromkeys((AOTLoss, AOTUnpairedLoss), ranked)
