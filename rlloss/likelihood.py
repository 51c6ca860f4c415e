"""What the losses over tokens of given texts share: layout, mask at the door, weights, reduction."""

from collections.abc import Callable
from typing import get_args

from torch import Tensor

from rlloss._checks import check_choice, check_count, check_like, check_tokens_layout
from rlloss.protocol import Loss
from rlloss.reduce import (
    Normalizer,
    Reduction,
    check_normalizer,
    reduce_tokens,
    weighted,
    within_sequences,
    zero_masked,
)

__all__ = ["LikelihoodLoss"]


class LikelihoodLoss(Loss):
    """Base of the losses over tokens: a subclass writes its loss as one expression of what each token has.

    forward(what each token has, loss_mask): `[B, T]`, or packed `[N]` with `cu_seqlens`, aligned with the ids that are
    scored.

    Optional: `token_weights` (scale a token; 0 rejects it and keeps the denominator), `normalizer` (`rlloss.count` of
    the mask, summed over the step's micro-batches and ranks), `cu_seqlens`.

    Args:
        reduction: How tokens are averaged: see `rlloss.reduce_tokens`.
        max_length: The constant of `fixed_length`.
    """

    family = "likelihood"

    def __init__(self, *, reduction: Reduction = "token_mean", max_length: int | None = None) -> None:
        super().__init__()
        check_choice(self._who, "reduction", reduction, get_args(Reduction))
        if (reduction == "fixed_length") != (max_length is not None):
            raise ValueError(
                f"{self._who}: max_length is for fixed_length and only for it, got {reduction=} {max_length=}"
            )
        if max_length is not None:
            check_count(self._who, "max_length", max_length)
        self.reduction: Reduction = reduction
        self.max_length = max_length

    def _door(
        self, inputs: dict[str, Tensor], loss_mask: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The tokens that count, and the inputs with zeros elsewhere."""
        check_tokens_layout(self._who, loss_mask, cu_seqlens)
        for name, x in inputs.items():
            check_like(self._who, name, x, "loss_mask", loss_mask)
        loss_mask = within_sequences(loss_mask, cu_seqlens)
        return loss_mask, {name: zero_masked(loss_mask, x)[0] for name, x in inputs.items()}

    def _reduced(
        self,
        token_loss: Callable[..., Tensor],
        inputs: dict[str, Tensor],
        loss_mask: Tensor,
        token_weights: Tensor | None,
        normalizer: Normalizer | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """The reduction of `token_loss(**inputs)`; a token of weight 0 enters as zeros, whatever stands there."""
        check_normalizer(self._who, normalizer)
        if token_weights is not None:
            check_like(self._who, "token_weights", token_weights, "loss_mask", loss_mask)
            (token_weights,) = zero_masked(loss_mask, token_weights.detach())
            inputs = {name: zero_masked(token_weights != 0, x)[0] for name, x in inputs.items()}
        return reduce_tokens(
            weighted(token_loss(**inputs), token_weights),
            loss_mask,
            self.reduction,
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
            max_length=self.max_length,
        )
