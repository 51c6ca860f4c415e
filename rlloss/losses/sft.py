"""SFT: the negative log-likelihood of the trained tokens."""

from typing import get_args

from torch import Tensor

from rlloss._checks import check_choice, check_count, check_like, check_tokens_layout
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput, Mean
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

__all__ = ["SFTLoss"]


class SFTLoss(Loss):
    """Supervised fine-tuning: maximum likelihood of demonstrations, step 1 of https://arxiv.org/abs/2203.02155.

    With one normaliser for the whole step a short answer's tokens weigh what a long answer's do.

        loss = -(1/N) sum_t l_t        dloss/dl_t = -1/N        (token_mean; N trained tokens)

    forward(logprobs, loss_mask): `[B, T]`, or packed `[N]` with `cu_seqlens`, aligned with the ids that they score.

    Metrics: nll (mean over trained tokens, in nats; unweighted).

    Args:
        reduction: How tokens are averaged: see `rlloss.reduce_tokens`.
        max_length: The constant of `fixed_length`.

    >>> import torch
    >>> SFTLoss()(torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]])).loss
    tensor(2.)
    """

    family = "likelihood"

    def __init__(self, *, reduction: Reduction = "token_mean", max_length: int | None = None) -> None:
        super().__init__()
        check_choice("SFTLoss", "reduction", reduction, get_args(Reduction))
        if (reduction == "fixed_length") != (max_length is not None):
            raise ValueError(f"SFTLoss: max_length is for fixed_length and only for it, got {reduction=} {max_length=}")
        if max_length is not None:
            check_count("SFTLoss", "max_length", max_length)
        self.reduction: Reduction = reduction
        self.max_length = max_length

    def forward(
        self,
        logprobs: Float[Tensor, "*tokens"],
        loss_mask: Bool[Tensor, "*tokens"],
        *,
        token_weights: Float[Tensor, "*tokens"] | None = None,
        normalizer: Normalizer | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> LossOutput:
        """The loss and its metrics; `token_weights` scale the numerator, and 0 rejects a token."""
        check_normalizer("SFTLoss", normalizer)
        check_tokens_layout("SFTLoss", loss_mask, cu_seqlens)
        check_like("SFTLoss", "logprobs", logprobs, "loss_mask", loss_mask)
        loss_mask = within_sequences(loss_mask, cu_seqlens)
        if token_weights is not None:
            check_like("SFTLoss", "token_weights", token_weights, "loss_mask", loss_mask)
            (token_weights,) = zero_masked(loss_mask, token_weights.detach())
        (logprobs,) = zero_masked(loss_mask, logprobs)
        loss = reduce_tokens(
            weighted(-logprobs, token_weights),
            loss_mask,
            self.reduction,
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
            max_length=self.max_length,
        )
        return LossOutput(loss, {"nll": Mean.of(-logprobs, loss_mask)})
