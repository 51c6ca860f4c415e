"""Conservative PPO: the clipped surrogate and a squared hinge on the KL."""

from typing import Any

from numpy.typing import ArrayLike

from rlloss.reference.divergence import kl_term
from rlloss.reference.policy import token_losses
from rlloss.reference.reduce import mean, reduced, rows


def token_kls(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    ref_logprobs: ArrayLike,
    loss_mask: ArrayLike,
    *,
    cu_seqlens: ArrayLike | None,
    frozen_logprobs: ArrayLike | None,
    kl: str,
    kl_grad: str,
    max_log_ratio: float,
) -> list[list[float]]:
    """The KL term of every counted token, one row per sequence."""
    mask = rows(loss_mask, cu_seqlens)
    new = rows(logprobs, cu_seqlens)
    frozen = new if frozen_logprobs is None else rows(frozen_logprobs, cu_seqlens)
    old = frozen if old_logprobs is None else rows(old_logprobs, cu_seqlens)
    ref = rows(ref_logprobs, cu_seqlens)
    kls: list[list[float]] = []
    for i in range(len(mask)):
        kls.append([])
        for t in range(len(mask[i])):
            if not mask[i][t]:
                continue
            term = kl_term(new[i][t], old[i][t], ref[i][t], frozen[i][t], kl, kl_grad, max_log_ratio)
            kls[i].append(term)
    return kls


def conservative_ppo(
    logprobs: ArrayLike,
    old_logprobs: ArrayLike | None,
    advantages: ArrayLike,
    loss_mask: ArrayLike,
    *,
    ref_logprobs: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    frozen_logprobs: ArrayLike | None = None,
    conservative_coef: float = 0.1,
    max_kl: float = 0.01,
    level: str = "batch",
    kl: str = "k3",
    kl_grad: str = "reverse",
    max_log_ratio: float = 20.0,
    **terms: Any,
) -> float:
    """Conservative PPO: equation 7 of https://arxiv.org/abs/1707.06347 and a squared hinge on the KL.

    The hinge is the last term of algorithm 1 of https://arxiv.org/abs/1707.02286, against the reference policy.

    loss = sum_it loss_it / tokens + conservative_coef * max(0, KL - max_kl)^2, with `token_losses` of `terms`

    KL is the mean of the KL term over the tokens of the batch; `level="sequence"` takes the hinge of each
    sequence's own mean and averages the hinges over the sequences. Token weights do not touch it.

    >>> conservative_ppo([[-1.0]], None, [0.5], [[True]], ref_logprobs=[[-1.0]])
    -0.5
    """
    if ref_logprobs is None:
        raise ValueError("conservative_ppo: its penalty needs ref_logprobs, got None")
    losses = token_losses(
        logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        ref_logprobs=ref_logprobs,
        cu_seqlens=cu_seqlens,
        frozen_logprobs=frozen_logprobs,
        kl=kl,
        kl_grad=kl_grad,
        max_log_ratio=max_log_ratio,
        **terms,
    )
    kls = token_kls(
        logprobs,
        old_logprobs,
        ref_logprobs,
        loss_mask,
        cu_seqlens=cu_seqlens,
        frozen_logprobs=frozen_logprobs,
        kl=kl,
        kl_grad=kl_grad,
        max_log_ratio=max_log_ratio,
    )
    if level == "batch":
        penalty = max(0.0, reduced(kls, "token_mean") - max_kl) ** 2
    elif level == "sequence":
        penalty = mean([max(0.0, mean(sequence) - max_kl) ** 2 for sequence in kls if sequence])
    else:
        raise ValueError(f"conservative_ppo: level must be 'batch' or 'sequence', got {level!r}")
    return reduced(losses, "token_mean") + conservative_coef * penalty
