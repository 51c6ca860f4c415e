"""BCO: a classifier of good and bad answers whose logit is the policy's own log-ratio."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlloss._checks import check_full_precision, check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput, Mean, Metric
from rlloss.preference import logistic_loss
from rlloss.reduce import Normalizer
from rlloss.unpaired import UnpairedLoss

__all__ = ["BCOLoss"]


class BCOLoss(UnpairedLoss):
    """BCO, https://arxiv.org/abs/2404.04656: binary cross-entropy of the reward, shifted by what rewards have been.

    The classifier's loss bounds DPO's from above, and the shift delta, halfway between the mean rewards of the two
    classes, brings the bound close. Unlike KTO, it does not saturate on rows that are wrong.

        x_i = beta (logps_i - ref_logps_i) - delta if desirable, else delta - beta (logps_i - ref_logps_i)
        loss = -(1/B) sum_i w_i log sigmoid(x_i),   w_i = desirable_weight or undesirable_weight
        dloss/dlogps_i = -(1/B) beta w_i sigmoid(-x_i) if desirable, with + if not

    forward(logps, ref_logps, desirable): as `rlloss.UnpairedLoss`; adds the metric delta. Where bad answers come from
    other prompts than good ones, `weights` take the paper's density ratio, p(good | prompt) / p(bad | prompt) for each
    bad answer and 1 for each good one.

    `update` learns a step's mean rewards, which a call leaves among its metrics; until the first one delta is 0, the
    reward at the reference. Its sums are float64 buffers, which `state_dict` carries. Delta is a number of the steps
    before, so that micro-batches and ranks add up; other systems mix the micro-batch's own mean into it.

    Args:
        beta: Scale of the reward.
        decay: What each update leaves of the rewards before it; 1 keeps all of them alike.
        desirable_weight: Weight of rows with thumbs up.
        undesirable_weight: Weight of rows with thumbs down.

    >>> loss_fn, ref, up = BCOLoss(beta=1.0), torch.tensor([-5.0, -6.0]), torch.tensor([True, False])
    >>> loss, metrics = loss_fn(torch.tensor([-2.0, -5.0]), ref, up)  # rewards 3 and 1
    >>> loss_fn.update(metrics["desirable_reward"], metrics["undesirable_reward"])
    >>> loss_fn.delta
    tensor(2., dtype=torch.float64)
    """

    totals: Tensor
    counts: Tensor

    def __init__(
        self,
        *,
        beta: float = 0.1,
        decay: float = 1.0,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> None:
        super().__init__(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
        check_range(self._who, "decay", decay, 0, 1)
        self.decay = decay
        # of good answers and of bad ones
        self.register_buffer("totals", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.float64))

    @property
    def delta(self) -> Float[Tensor, ""]:
        """Halfway between the mean rewards of the two classes; a class that was never seen has mean 0."""
        return (self.totals / torch.where(self.counts > 0, self.counts, 1)).mean()

    def update(self, desirable_reward: Metric, undesirable_reward: Metric) -> None:
        """Learns a step's rewards: the metrics of those names, merged over micro-batches and ranks."""
        means = [self._mean(desirable_reward, "desirable_reward"), self._mean(undesirable_reward, "undesirable_reward")]
        self.totals = self.decay * self.totals + torch.stack([mean.total.detach() for mean in means]).to(self.totals)
        self.counts = self.decay * self.counts + torch.stack([mean.count for mean in means]).to(self.counts)

    def after_step(self, metrics: Mapping[str, Metric]) -> None:
        """`update` with what a call has left there."""
        self.update(metrics["desirable_reward"], metrics["undesirable_reward"])

    def _mean(self, metric: Metric, name: str) -> Mean:
        if not isinstance(metric, Mean):
            raise ValueError(
                f"{self._who}.update: {name} must be the rlloss.Mean of that name, got {type(metric).__name__}; pass "
                f"metrics[{name!r}], merged over the step's micro-batches and ranks"
            )
        return metric

    def row_loss(self, x: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """-log sigmoid(x)."""
        return logistic_loss(x)

    def forward(
        self,
        logps: Float[Tensor, " B"],
        ref_logps: Float[Tensor, " B"],
        desirable: Bool[Tensor, " B"],
        *,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        check_full_precision(self._who, "logps", logps)
        delta = self.delta.to(logps.device)
        loss, metrics = self._output(
            logps, ref_logps, desirable, (delta / self.beta).to(logps.dtype), mask, weights, normalizer
        )
        counted = torch.ones_like(desirable) if mask is None else mask
        return LossOutput(loss, metrics | {"delta": Mean.constant(delta.to(logps.dtype), counted.sum())})
