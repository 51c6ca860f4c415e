"""Token likelihood, and the divergence from a teacher."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from rlloss.reference.divergence import kl
from rlloss.reference.reduce import reduced, rows


def weighted_tokens(
    token_loss: Callable[..., float],
    inputs: list[ArrayLike | None],
    loss_mask: ArrayLike,
    token_weights: ArrayLike | None,
    cu_seqlens: ArrayLike | None,
) -> list[list[float]]:
    """The losses of the counted tokens of each row, from what each of them has; weight 0 rejects a token."""
    mask = rows(loss_mask, cu_seqlens)
    weight = mask if token_weights is None else rows(token_weights, cu_seqlens)  # a counted token weighs 1
    given = [rows(x, cu_seqlens) for x in inputs]
    losses: list[list[float]] = []
    for i in range(len(mask)):
        losses.append([])
        for t in range(len(mask[i])):
            if not mask[i][t]:
                continue
            rejected = weight[i][t] == 0.0
            has = [x[i][t] if x else None for x in given]
            losses[i].append(0.0 if rejected else weight[i][t] * token_loss(*has))
    return losses


def sft(
    logprobs: ArrayLike,
    loss_mask: ArrayLike,
    *,
    mean_logprob: ArrayLike | None = None,
    logsumexp: ArrayLike | None = None,
    token_weights: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    z_coef: float = 0.0,
    reduction: str = "token_mean",
    max_completion_length: int | None = None,
) -> float:
    """Supervised fine-tuning, step 1 of https://arxiv.org/abs/2203.02155: the negative log-likelihood.

    loss_t = -weight_t * logprob_t

    The label's share is (1 - label_smoothing), and every token of the vocabulary has an equal part of the rest,
    https://arxiv.org/abs/1512.00567; z_coef log^2 Z is added, https://arxiv.org/abs/2204.02311.

    >>> sft([[-1.0, -3.0, -9.0]], [[True, True, False]])
    2.0
    """

    def token_loss(logprob: float, mean: float | None, log_z: float | None) -> float:
        loss = -logprob
        if label_smoothing:
            assert mean is not None
            loss = -(1.0 - label_smoothing) * logprob - label_smoothing * mean
        if z_coef:
            assert log_z is not None
            loss += z_coef * log_z * log_z
        return loss

    losses = weighted_tokens(token_loss, [logprobs, mean_logprob, logsumexp], loss_mask, token_weights, cu_seqlens)
    return reduced(losses, reduction, max_completion_length)


def dft(
    logprobs: ArrayLike,
    loss_mask: ArrayLike,
    *,
    token_weights: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    reduction: str = "token_mean",
    max_completion_length: int | None = None,
    frozen_logprobs: ArrayLike | None = None,
) -> float:
    """Dynamic fine-tuning, https://arxiv.org/abs/2508.05629, where the probability carries no gradient.

    loss_t = -weight_t * p_t * logprob_t, p_t = exp(frozen logprob_t)

    >>> round(dft([[math.log(0.5), -9.0]], [[True, False]]), 12) == round(math.log(2) / 2, 12)
    True
    """
    frozen = logprobs if frozen_logprobs is None else frozen_logprobs
    losses = weighted_tokens(
        lambda logprob, frozen: -math.exp(frozen) * logprob, [logprobs, frozen], loss_mask, token_weights, cu_seqlens
    )
    return reduced(losses, reduction, max_completion_length)


def distillation(
    divergence: ArrayLike,
    loss_mask: ArrayLike,
    *,
    token_weights: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    reduction: str = "token_mean",
    max_completion_length: int | None = None,
) -> float:
    """The mean of a divergence per token: `divergence_of` says of which.

    >>> distillation([[1.0, 3.0]], [[True, True]])
    2.0
    """
    losses = weighted_tokens(lambda d: d, [divergence], loss_mask, token_weights, cu_seqlens)
    return reduced(losses, reduction, max_completion_length)


def xpo(
    logprobs: ArrayLike,
    loss_mask: ArrayLike,
    *,
    token_weights: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    alpha: float = 1e-5,
    reduction: str = "sequence_sum",
    max_completion_length: int | None = None,
) -> float:
    """The exploration term of XPO, https://arxiv.org/abs/2405.21046: alpha log pi of the reference's answers.

    >>> xpo([[-1.0, -3.0]], [[True, True]], alpha=0.5)
    -2.0
    """
    losses = weighted_tokens(lambda logprob: alpha * logprob, [logprobs], loss_mask, token_weights, cu_seqlens)
    return reduced(losses, reduction, max_completion_length)


def divergence_of(student: ArrayLike, teacher: ArrayLike, divergence: str, beta: float = 0.5) -> float:
    """The divergence of two probability vectors: KL either way, or equation 1 of https://arxiv.org/abs/2306.13649.

    js = beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student

    >>> divergence_of([0.5, 0.5], [1.0, 0.0], "forward_kl") == math.log(2)
    True
    """
    p, q = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    if divergence == "forward_kl":
        return kl(q, p)
    if divergence == "reverse_kl":
        return kl(p, q)
    m = beta * q + (1.0 - beta) * p
    return beta * kl(q, m) + (1.0 - beta) * kl(p, m)


def top_k_divergence(
    student: ArrayLike, teacher: ArrayLike, ids: ArrayLike, divergence: str, beta: float = 0.5
) -> float:
    """That of two probability vectors whose tokens outside of `ids` are one token.

    >>> top_k_divergence([0.5, 0.2, 0.3], [0.5, 0.3, 0.2], [0], "forward_kl")
    0.0
    """

    def merged(p: ArrayLike) -> list[float]:
        whole, kept = np.asarray(p, np.float64).tolist(), np.asarray(ids).tolist()
        rest = [whole[v] for v in range(len(whole)) if v not in kept]
        return [*(whole[v] for v in kept), math.fsum(rest)]

    return divergence_of(merged(student), merged(teacher), divergence, beta)
