"""Divergences where only the teacher's likeliest tokens are known: K of them, and one bucket for all others."""

import math
from typing import Literal

import torch
from torch import Tensor

from rlloss._checks import check_choice, check_full_precision, check_like, check_mask, check_range
from rlloss._typing import Bool, Float, Int

__all__ = ["top_k_divergence", "top_k_logprobs"]


def top_k_logprobs(
    logits: Float[Tensor, "*tokens V"],
    ids: Int[Tensor, "*tokens K"],
    *,
    temperature: float = 1.0,
    loss_mask: Bool[Tensor, "*tokens"] | None = None,
) -> tuple[Float[Tensor, "*tokens K"], Float[Tensor, "*tokens"]]:
    """Log-probs of K tokens under softmax(logits / temperature), and that of all others together, the tail.

    The tail is summed over the others, not as 1 - sum p, which has no digits left where the K have nearly all: there a
    student that is too sure of them is to learn otherwise. Both are float32 (float64 from float64) with gradient.

    Args:
        ids: Each once; below 0 for none, of log-prob -inf.
        loss_mask: False gives 0, with gradient 0, whatever stands in that row.

    >>> logprobs, tail = top_k_logprobs(torch.tensor([[0.0, 0.0, -1.0, -1.0]]), torch.tensor([[0, 1]]))
    >>> round(float(logprobs.exp().sum() + tail.exp()), 6)
    1.0
    """
    who = "top_k_logprobs"
    check_range(who, "temperature", temperature, 0, open_low=True)
    if ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"{who}: ids must have the rows of the logits, {list(logits.shape[:-1])}, and K each, got {list(ids.shape)}"
        )
    if loss_mask is not None:
        _check_rows(who, loss_mask, logits)
        logits = torch.where(loss_mask[..., None], logits, 0)
        ids = torch.where(loss_mask[..., None], ids, -1)
    z = (logits if logits.dtype is torch.float64 else logits.float()) / temperature
    total = z.logsumexp(-1)
    is_one, places = ids >= 0, ids.clamp(min=0).long()
    logprobs = torch.where(is_one, z.gather(-1, places) - total[..., None], -torch.inf)
    # one more column takes what stands for none
    width = z.shape[-1]
    taken = torch.zeros(*z.shape[:-1], width + 1, dtype=torch.bool, device=z.device)
    taken = taken.scatter(-1, torch.where(is_one, places, width), True)[..., :width]
    rest = z.masked_fill(taken, -torch.inf)
    some = (rest > -torch.inf).any(-1)  # of nothing the sum's gradient is NaN
    tail = torch.where(some[..., None], rest, 0).logsumexp(-1) - total
    tail = torch.where(some, tail, -torch.inf)
    if loss_mask is not None:
        logprobs, tail = torch.where(loss_mask[..., None], logprobs, 0), torch.where(loss_mask, tail, 0)
    return logprobs, tail


def top_k_divergence(
    logprobs: Float[Tensor, "*tokens K"],
    teacher_logprobs: Float[Tensor, "*tokens K"],
    *,
    tail: Float[Tensor, "*tokens"] | None = None,
    teacher_tail: Float[Tensor, "*tokens"] | None = None,
    divergence: Literal["forward_kl", "reverse_kl", "js"] = "forward_kl",
    beta: float = 0.5,
    loss_mask: Bool[Tensor, "*tokens"] | None = None,
) -> Float[Tensor, "*tokens"]:
    """The divergence of a student from a teacher over K tokens and the bucket of all others: for `DistillationLoss`.

    With p of the student, q of the teacher, and the bucket's p = 1 - sum_k p_k among them:

        forward_kl = sum_k q_k log(q_k / p_k),   reverse_kl = sum_k p_k log(p_k / q_k),   js of `DistillationLoss`

    Merging tokens makes no divergence larger, so that each is a lower bound of the one over the vocabulary, never below
    0, and forward_kl has the gradient p_k - q_k in the logits of the K. Without the bucket it would be least for a
    student who puts all on the K.

    A tail that is not given is 1 - sum p in float64, at least the rounding error of the log-probs' dtype; its gradient
    goes on below that bound, as -p_k / bound, which is too little to hold a student that is surer than that: for one,
    take the tail of `top_k_logprobs`. The teacher gets no gradient.

    Args:
        logprobs: The student's, of the whole vocabulary's softmax, at the ids that the teacher gave.
        teacher_logprobs: The teacher's at the same ids; -inf in both for none.
        tail: The student's log-prob of all other tokens together.
        teacher_tail: The teacher's.
        beta: The teacher's share of the mixture of js, between 0 and 1.
        loss_mask: False gives 0, with gradient 0, whatever stands in that row.

    >>> teacher = torch.tensor([[0.5, 0.25]]).log()
    >>> float(top_k_divergence(teacher, teacher))
    0.0
    >>> round(float(top_k_divergence(torch.tensor([[0.25, 0.25]]).log(), teacher)), 4)  # (log 2)/2 - (log 2)/4
    0.1733
    """
    who = "top_k_divergence"
    check_choice(who, "divergence", divergence, ("forward_kl", "reverse_kl", "js"))
    check_range(who, "beta", beta, 0, 1, open_low=True)
    if beta == 1:
        raise ValueError(f"{who}: js is 0 at beta=1; divergence='reverse_kl' is what it tends to")
    check_full_precision(who, "logprobs", logprobs)
    check_like(who, "teacher_logprobs", teacher_logprobs, "logprobs", logprobs)
    if not logprobs.shape[-1]:
        raise ValueError(f"{who}: needs at least one token per row, got {list(logprobs.shape)}")
    for name, x in {"tail": tail, "teacher_tail": teacher_tail}.items():
        if x is not None:
            check_like(who, name, x, "logprobs[..., 0]", logprobs[..., 0])
    if loss_mask is not None:
        _check_rows(who, loss_mask, logprobs)
    student = _buckets(logprobs, tail, loss_mask)
    teacher = _buckets(teacher_logprobs.detach(), None if teacher_tail is None else teacher_tail.detach(), loss_mask)
    if divergence == "forward_kl":
        found = _kl(teacher, student)
    elif divergence == "reverse_kl":
        found = _kl(student, teacher)
    else:
        mixture = _mixture(teacher, student, beta)
        found = beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)
    return found if loss_mask is None else torch.where(loss_mask, found, 0)


def _buckets(logprobs: Tensor, tail: Tensor | None, loss_mask: Tensor | None) -> Tensor:
    """The log-probs of K tokens and, behind them, of all others."""
    if loss_mask is not None:
        logprobs = torch.where(loss_mask[..., None], logprobs, 0)
        tail = None if tail is None else torch.where(loss_mask, tail, 0)
    tail = _complement(logprobs) if tail is None else tail
    return torch.cat([logprobs, tail[..., None]], -1)


def _complement(logprobs: Tensor) -> Tensor:
    """log(1 - sum p), at least the rounding error, with the gradient -p / (1 - sum p) also there."""
    x = logprobs.double()
    largest, place = x.detach().max(-1, keepdim=True)
    others = x.detach().exp().scatter(-1, place, 0).sum(-1)
    known = -torch.expm1(largest[..., 0]) - others  # keeps the digits of the largest's 1 - p
    held = known.clamp(min=torch.finfo(logprobs.dtype).eps)
    mass = 1 - x.exp().sum(-1)
    return (mass + (held - mass).detach()).log().to(logprobs.dtype)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The sum of p log(p / q), where p = 0 adds nothing."""
    here = log_p > -torch.inf
    return torch.where(here, torch.where(here, log_p, 0).exp() * torch.where(here, log_p - log_q, 0), 0).sum(-1)


def _mixture(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p)."""
    nowhere = (log_q == -torch.inf) & (log_p == -torch.inf)  # of which logaddexp has no gradient
    log_q, log_p = (torch.where(nowhere, 0, x) for x in (log_q, log_p))
    return torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))


def _check_rows(who: str, loss_mask: Tensor, x: Tensor) -> None:
    check_mask(who, "loss_mask", loss_mask)
    if loss_mask.shape != x.shape[:-1]:
        raise ValueError(f"{who}: loss_mask must be {list(x.shape[:-1])}, a row per token, got {list(loss_mask.shape)}")
