"""Process reward model: whether each step of a solution is right."""

import torch.nn.functional as F
from torch import Tensor

from rlloss._typing import Bool, Float
from rlloss.likelihood import LikelihoodLoss
from rlloss.output import LossOutput, Mean
from rlloss.reduce import Normalizer

__all__ = ["ProcessRewardLoss"]


class ProcessRewardLoss(LikelihoodLoss):
    """The process reward model of https://arxiv.org/abs/2211.14275 and https://arxiv.org/abs/2305.20050.

    A classifier of steps, not of answers: it reads a score at the last token of each step, which the mask points to.

        loss = -(1/N) sum_t label_t log sigmoid(x_t) + (1 - label_t) log sigmoid(-x_t)        (token_mean; N steps)
        dloss/dx_t = (sigmoid(x_t) - label_t) / N

    forward(logits, labels, loss_mask): the model's number and the label at each position, `[B, T]` or packed `[N]`,
    with a mask of the ends of steps. A label in between 0 and 1 is a probability, such as the share of continuations
    from that step that came out right, https://arxiv.org/abs/2312.08935. An outcome reward model is the same with one
    step per answer, `rlloss.last_tokens`.

    Optional: as `rlloss.LikelihoodLoss`, of which each step is a token.

    Metrics: accuracy (share of steps with x_t > 0 just where the label is above 1/2), probability (mean sigmoid(x_t)),
    label.

    Args:
        reduction: How steps are averaged: see `rlloss.reduce_tokens`.
        max_length: The constant of `fixed_length`.

    >>> import torch
    >>> x, labels = torch.tensor([[0.0, 5.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.5]])
    >>> loss, metrics = ProcessRewardLoss()(x, labels, torch.tensor([[True, False, True]]))
    >>> round(loss.item(), 4)  # log 2
    0.6931
    """

    family = "process"

    def forward(
        self,
        logits: Float[Tensor, "*tokens"],
        labels: Float[Tensor, "*tokens"],
        loss_mask: Bool[Tensor, "*tokens"],
        *,
        token_weights: Float[Tensor, "*tokens"] | None = None,
        normalizer: Normalizer | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> LossOutput:
        """The loss and its metrics; `token_weights` scale the numerator, and 0 rejects a step."""
        loss_mask, inputs = self._door({"logits": logits, "labels": labels}, loss_mask, cu_seqlens)
        inputs["labels"] = inputs["labels"].detach()
        loss = self._reduced(self.token_loss, inputs, loss_mask, token_weights, normalizer, cu_seqlens)
        logits, labels = inputs["logits"], inputs["labels"]
        return LossOutput(
            loss,
            {
                "accuracy": Mean.of(((logits > 0) == (labels > 0.5)).to(logits.dtype), loss_mask),
                "probability": Mean.of(logits.sigmoid(), loss_mask),
                "label": Mean.of(labels, loss_mask),
            },
        )

    def token_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy of each step."""
        return -labels * F.logsigmoid(logits) - (1 - labels) * F.logsigmoid(-logits)
