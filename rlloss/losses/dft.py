"""DFT: every token as much as the model already believes it."""

from torch import Tensor

from rlloss._typing import Bool, Float
from rlloss.likelihood import LikelihoodLoss
from rlloss.output import LossOutput, Mean
from rlloss.reduce import Normalizer, weighted

__all__ = ["DFTLoss"]


class DFTLoss(LikelihoodLoss):
    """Dynamic fine-tuning, https://arxiv.org/abs/2508.05629: SFT with each token's own probability as its weight.

    As a policy gradient SFT has a reward of 1/p, which is largest where the model is most surprised; the weight takes
    it back, and unlikely tokens, often noise of the demonstration, teach little.

        loss = -(1/N) sum_t sg(p_t) l_t,   p_t = exp(l_t)        dloss/dl_t = -p_t / N        (token_mean)

    forward(logprobs, loss_mask): as `rlloss.LikelihoodLoss`.

    Metrics: nll (mean over trained tokens, in nats; unweighted), probability (mean p_t).

    Args:
        reduction: How tokens are averaged: see `rlloss.reduce_tokens`.
        max_length: The constant of `fixed_length`.

    >>> import torch
    >>> loss, metrics = DFTLoss()(torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[True, True]]))
    >>> round(loss.item(), 4)  # (log 2 / 2 + log 4 / 4) / 2
    0.3466
    """

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
        logprobs = inputs["logprobs"]
        return LossOutput(
            loss,
            {"nll": Mean.of(-logprobs, loss_mask), "probability": Mean.of(_probability(logprobs), loss_mask)},
        )

    def token_loss(self, logprobs: Tensor) -> Tensor:
        """The weighted negative log-likelihood of each token."""
        return weighted(-logprobs, _probability(logprobs))  # -inf, of probability 0, teaches nothing


def _probability(logprobs: Tensor) -> Tensor:
    """P of each token, without gradient; a log-prob above 0 is a rounding error."""
    return logprobs.detach().clamp(max=0).exp()
