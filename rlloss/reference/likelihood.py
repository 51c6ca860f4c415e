"""Token likelihood."""

from numpy.typing import ArrayLike

from rlloss.reference.reduce import reduced, rows


def sft(
    logprobs: ArrayLike,
    loss_mask: ArrayLike,
    *,
    token_weights: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    reduction: str = "token_mean",
    max_completion_length: int | None = None,
) -> float:
    """Supervised fine-tuning, step 1 of https://arxiv.org/abs/2203.02155: the negative log-likelihood.

    loss_t = -weight_t * logprob_t

    >>> sft([[-1.0, -3.0, -9.0]], [[True, True, False]])
    2.0
    """
    mask = rows(loss_mask, cu_seqlens)
    logprob = rows(logprobs, cu_seqlens)
    weight = mask if token_weights is None else rows(token_weights, cu_seqlens)  # a counted token weighs 1
    losses: list[list[float]] = []
    for i in range(len(mask)):
        losses.append([])
        for t in range(len(mask[i])):
            if not mask[i][t]:
                continue
            rejected = weight[i][t] == 0.0
            losses[i].append(0.0 if rejected else -weight[i][t] * logprob[i][t])
    return reduced(losses, reduction, max_completion_length)
