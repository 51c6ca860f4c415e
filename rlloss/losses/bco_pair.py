"""BCO on pairs: each answer is told good from bad by a classifier with a threshold."""

from torch import Tensor

from rlloss._typing import Bool, Float
from rlloss.output import LossOutput
from rlloss.preference import logistic_loss
from rlloss.preference_margins import StepStatisticLoss
from rlloss.reduce import Normalizer

__all__ = ["BCOPairLoss"]


class BCOPairLoss(StepStatisticLoss):
    """BCO on pairs, https://arxiv.org/abs/2404.04656.

    A binary classifier on the implicit reward bounds DPO's loss from above; the shift delta, the mean reward of both
    kinds, makes the bound tight where rewards drift as a whole.

        loss = -log sigmoid(beta c - delta) - log sigmoid(delta - beta r)
        delta = (1/2) (mean beta c + mean beta r), without gradient
        dloss/dc = -beta sigmoid(delta - beta c)        dloss/dr = beta sigmoid(beta r - delta)

    `delta` is a number of the whole step, or the running mean of the paper, of the metrics chosen_reward and
    rejected_reward; left out, it is this call's own (base class). Public code's bco_pair has no shift: `delta=0.0`.

    MPO, https://arxiv.org/abs/2411.10442, joins preference, quality and generation:
    `combine(preference=0.8 * DPOLoss()(*logps), quality=0.2 * BCOPairLoss()(*logps), generation=SFTLoss()(...))`.

    Base class of that: inputs, options and metrics; adds delta.

    >>> import torch
    >>> chosen, rejected, ref = torch.tensor([8.0]), torch.tensor([6.0]), torch.zeros(1)
    >>> out = BCOPairLoss(beta=0.5)(chosen, rejected, ref, ref)  # rewards 4 and 3
    >>> round(out.loss.item(), 4), float(out.metrics["delta"])  # 2 softplus(-1/2)
    (0.9482, 3.5)
    """

    statistic = "delta"

    def of_pair(self, chosen: Tensor, rejected: Tensor, beta: Tensor | float) -> Tensor:
        """The mean reward of a pair."""
        return beta * (chosen + rejected) / 2

    def forward(
        self,
        chosen_logps: Float[Tensor, " B"],
        rejected_logps: Float[Tensor, " B"],
        ref_chosen_logps: Float[Tensor, " B"] | None = None,
        ref_rejected_logps: Float[Tensor, " B"] | None = None,
        *,
        delta: Tensor | float | None = None,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        beta: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
        delta = self._of_step(delta, normalizer, logps, mask=mask, weights=weights, beta=beta)
        of_pairs = delta.expand_as(chosen_logps)
        return self._output(logps, mask, weights, beta, normalizer, {"delta": delta}, delta=of_pairs)

    def answers_loss(
        self,
        chosen: Float[Tensor, " B"],
        rejected: Float[Tensor, " B"],
        beta: Tensor | float,
        delta: Tensor | float = 0.0,
    ) -> Float[Tensor, " B"]:
        """The classifier's loss of both answers."""
        return logistic_loss(beta * chosen - delta) + logistic_loss(delta - beta * rejected)
