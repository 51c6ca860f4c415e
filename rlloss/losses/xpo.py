"""XPO: optimism about answers that the reference gives."""

from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Bool, Float
from rlloss.likelihood import LikelihoodLoss
from rlloss.output import LossOutput, Mean
from rlloss.reduce import Normalizer, Reduction

__all__ = ["XPOLoss"]


class XPOLoss(LikelihoodLoss):
    """The exploration term of XPO, https://arxiv.org/abs/2405.21046, that makes online DPO optimistic.

    It takes probability from answers of the reference, so that new ones are tried where preferences do not say
    otherwise: a bonus for all that was not seen, of which the rewards know nothing.

        loss = alpha (1/S) sum_i sum_t l_it        dloss/dl_it = alpha / S        (sequence_sum; S answers)

    forward(logprobs, loss_mask): the policy's log-probs of answers that the reference sampled; as
    `rlloss.LikelihoodLoss`. It is one term, unbounded below, and the paper's loss is that with DPO's:

        combine(dpo=dpo(...), xpo=xpo(logprobs, loss_mask))

    Metrics: logprob (mean over trained tokens, in nats; unweighted).

    Args:
        alpha: Weight of the optimism.
        reduction: How tokens are averaged: see `rlloss.reduce_tokens`; the paper's is sequence_sum.
        max_length: The constant of `fixed_length`.

    >>> import torch
    >>> XPOLoss(alpha=0.5)(torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]])).loss
    tensor(-2.)
    """

    def __init__(
        self, *, alpha: float = 1e-5, reduction: Reduction = "sequence_sum", max_length: int | None = None
    ) -> None:
        super().__init__(reduction=reduction, max_length=max_length)
        check_range(self._who, "alpha", alpha, 0)
        self.alpha = alpha

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
        loss_mask, inputs = self._door({"logprobs": logprobs}, loss_mask, cu_seqlens)
        loss = self._reduced(self.token_loss, inputs, loss_mask, token_weights, normalizer, cu_seqlens)
        return LossOutput(loss, {"logprob": Mean.of(inputs["logprobs"], loss_mask)})

    def token_loss(self, logprobs: Tensor) -> Tensor:
        """The weighted log-prob of each token."""
        return self.alpha * logprobs
