"""Regression: a reward model from ratings."""

from torch import Tensor

from rlloss._typing import Bool, Float
from rlloss.output import ExplainedVariance, LossOutput, Mean
from rlloss.preference import mean_of_rows, row_mask
from rlloss.protocol import Loss
from rlloss.reduce import Normalizer, check_normalizer, zero_masked

__all__ = ["RewardRegressionLoss"]


class RewardRegressionLoss(Loss):
    """Least squares on ratings, as the regression reward models of HelpSteer2, https://arxiv.org/abs/2406.08673.

    Ratings on a scale say how good an answer is, where pairs say only which is better: rewards have a zero and a unit.

        loss = (1/B) sum_i (r_i - target_i)^2
        dloss/dr_i = (2/B) (r_i - target_i)

    forward(rewards, targets): one of each per answer `[B]`, float32 or float64. Several attributes of an answer are as
    many rows, `rewards.flatten()`, and an attribute that was not rated a row that `mask` leaves out.

    Optional: `mask` (rows that count), `weights` (scale a row; 0 rejects it and keeps the denominator), `normalizer`
    (`rlloss.count` of the rows, summed over the step's micro-batches and ranks).

    Metrics: explained_variance, absolute_error, reward, target.

    >>> import torch
    >>> RewardRegressionLoss()(torch.tensor([3.0, 1.0]), torch.tensor([4.0, 1.0])).loss
    tensor(0.5000)
    """

    family = "regression"

    def forward(
        self,
        rewards: Float[Tensor, " B"],
        targets: Float[Tensor, " B"],
        *,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        check_normalizer(self._who, normalizer)
        mask = row_mask(
            self._who,
            mask,
            {"rewards": rewards, "targets": targets},
            {"weights": weights},
            hint="rlloss.ScalarModel.score makes it",
        )
        rewards, targets = zero_masked(mask, rewards, targets.detach())
        return LossOutput(
            mean_of_rows(lambda r, target: (r - target).square(), (rewards, targets), mask, weights, normalizer),
            {
                "explained_variance": ExplainedVariance.of(rewards, targets, mask),
                "absolute_error": Mean.of((rewards - targets).abs(), mask),
                "reward": Mean.of(rewards, mask),
                "target": Mean.of(targets, mask),
            },
        )
