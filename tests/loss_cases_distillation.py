"""The lines of the token losses in the tables of the laws: SFT with its options, DFT, distillation and XPO's term."""

import torch
from loss_cases import Case, Draw, Step, likelihood

from rlloss import DFTLoss, DistillationLoss, SFTLoss, XPOLoss

ONE = torch.tensor(1.0, dtype=torch.float64)


def whole_vocabulary(mask: torch.Tensor, draw: Draw) -> Step:
    """A likelihood's inputs with the mean log-prob and the normaliser."""
    step = likelihood(mask, draw)
    return step.but(mean_logprob=-3 - draw(*mask.shape).abs(), logsumexp=draw(*mask.shape))


def bare_vocabulary(mask: torch.Tensor, draw: Draw) -> Step:
    step = whole_vocabulary(mask, draw)
    del step["token_weights"]
    return step


def bare_likelihood(mask: torch.Tensor, draw: Draw) -> Step:
    return Step(logprobs=-draw(*mask.shape).abs(), loss_mask=mask)


def divergences(mask: torch.Tensor, draw: Draw) -> Step:
    return bare_divergences(mask, draw).but(token_weights=draw(*mask.shape).clamp(min=0))


def bare_divergences(mask: torch.Tensor, draw: Draw) -> Step:
    return Step(divergence=draw(*mask.shape).abs(), loss_mask=mask)


FIXED = {"reduction": "fixed_length", "max_length": 9}

CASES = [
    Case("sft_smoothed", SFTLoss, whole_vocabulary, {"label_smoothing": 0.1}),
    Case("sft_z_bare", SFTLoss, bare_vocabulary, {"z_coef": 0.3}),
    Case("sft_z", SFTLoss, whole_vocabulary, {"z_coef": 0.3}),
    Case("sft_whole", SFTLoss, whole_vocabulary, {"label_smoothing": 0.2, "z_coef": 0.1, "reduction": "sequence_mean"}),
    Case("dft_bare", DFTLoss, bare_likelihood),
    Case("dft", DFTLoss, likelihood, {"reduction": "sequence_mean"}),
    Case("distillation_bare", DistillationLoss, bare_divergences),
    Case("distillation", DistillationLoss, divergences, FIXED, None),
    Case("xpo_bare", XPOLoss, bare_likelihood, {"alpha": 0.3}),
    Case("xpo", XPOLoss, likelihood, {"alpha": 0.3, "reduction": "token_mean"}),
]


def per_token(loss_fn, step, slope):
    from closed_forms import divisor

    return step.get("token_weights", ONE) * slope / divisor(loss_fn, step.mask)


def sft(loss_fn, step):
    slopes = {"logprobs": -(1 - loss_fn.label_smoothing) * ONE}
    if "mean_logprob" in step:
        slopes["mean_logprob"] = -loss_fn.label_smoothing * ONE
        slopes["logsumexp"] = 2 * loss_fn.z_coef * step["logsumexp"]
    return {name: per_token(loss_fn, step, slope) for name, slope in slopes.items()}


def dft(loss_fn, step):
    return {"logprobs": per_token(loss_fn, step, -step["logprobs"].exp())}


def distillation(loss_fn, step):
    return {"divergence": per_token(loss_fn, step, ONE)}


def xpo(loss_fn, step):
    return {"logprobs": per_token(loss_fn, step, loss_fn.alpha * ONE)}


# in the sense of closed_forms.CLOSED_FORMS
CLOSED_FORMS = {DFTLoss: dft, DistillationLoss: distillation, SFTLoss: sft, XPOLoss: xpo}
