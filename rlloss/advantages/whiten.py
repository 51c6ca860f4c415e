"""Zero mean and unit variance over the trained tokens of a step."""

import torch
from torch import Tensor

from rlloss._checks import check_full_precision, check_like, check_mask, check_range, check_tokens_layout
from rlloss._typing import Bool, Float
from rlloss.output import Moments
from rlloss.reduce import within_sequences

__all__ = ["whiten"]


def whiten(
    x: Float[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"],
    *,
    moments: Moments | None = None,
    center: bool = True,
    eps: float = 1e-8,
    cu_seqlens: Tensor | None = None,
) -> Float[Tensor, "*tokens"]:
    """Whitened advantages (or rewards), the normalisation that PPO's implementations share; 0 at masked positions.

        (x - mean) / sqrt(var + eps),   var with n - 1

    A part of a step is whitened by the statistics of the whole step: add the `rlloss.Moments` of all micro-batches
    and ranks and pass them as `moments`. Identical values give exact zeros, as does a single one. The result
    carries no gradient.

    Args:
        x: Per token, `[B, T]` or packed `[N]`; or one value per row, `[B]` with a mask `[B]`.
        moments: Of the whole step, best as `Moments.of(x.double(), loss_mask)`; those of this call where None.
        center: False adds the mean back: values are scaled around it.
        eps: Added to the variance.
        cu_seqlens: Boundaries of a packed batch; what lies behind the last one does not count.

    >>> x, mask = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([True, True, True, False])
    >>> whiten(x, mask).tolist()
    [-1.0, 0.0, 1.0, 0.0]
    >>> step = Moments.of(x[:1], mask[:1]) + Moments.of(x[1:], mask[1:])
    >>> whiten(x[:1], mask[:1], moments=step).tolist()
    [-1.0]
    """
    who = "whiten"
    check_full_precision(who, "x", x)
    check_mask(who, "loss_mask", loss_mask)
    if cu_seqlens is not None:
        check_tokens_layout(who, loss_mask, cu_seqlens)
    check_like(who, "x", x, "loss_mask", loss_mask)
    check_range(who, "eps", eps, 0)
    check_moments(who, moments)

    mask = within_sequences(loss_mask, cu_seqlens)
    values = x.detach().double()
    moments = Moments.of(values, mask) if moments is None else moments
    centred = deviation(values, moments.mean)
    whitened = torch.where(centred == 0, 0, centred * (sample_variance(moments) + eps).rsqrt())
    return torch.where(mask, whitened if center else whitened + moments.mean, 0).to(x.dtype)


def deviation(x: Tensor, mean: Tensor) -> Tensor:
    """`x - mean`, exactly 0 where it is no more than the mean's rounding, which 1 / sqrt(eps) would blow up."""
    centred = x - mean
    return torch.where(centred.abs() <= rounding(mean), 0, centred)


def rounding(mean: Tensor) -> Tensor:
    """How far a mean of identical values, summed over parts, may lie from them."""
    return 16 * torch.finfo(mean.dtype).eps * mean.abs()


def sample_variance(moments: Moments) -> Tensor:
    """The unbiased variance; 0 of fewer than two values."""
    return moments.m2.double() / (moments.count - 1).clamp(min=1)


def check_moments(who: str, moments: Moments | None) -> None:
    """Raises ValueError for what is neither None nor `Moments`."""
    if moments is not None and not isinstance(moments, Moments):
        raise ValueError(
            f"{who}: moments must be rlloss.Moments, got {type(moments).__name__}; "
            "sum(Moments.of(x, mask) for each part) gives those of a step"
        )
