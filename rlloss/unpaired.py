"""What all losses over single judged answers share: mask at the door, log-ratio, side, class weights, metrics."""

from typing import ClassVar

import torch
from torch import Tensor

from rlloss._checks import check_device, check_mask, check_range
from rlloss._typing import Float
from rlloss.output import LossOutput, Mean
from rlloss.preference import mean_of_rows, row_mask
from rlloss.protocol import Loss
from rlloss.reduce import Normalizer, check_normalizer, zero_masked

__all__ = ["UnpairedLoss"]


class UnpairedLoss(Loss):
    """Base of the losses on thumbs up and down: a subclass writes its loss as one expression of x, how right a row is.

    forward(logps, ref_logps, desirable): sums per sequence `[B]` (`rlloss.sequence_logps`) and thumbs up as bool `[B]`.
    With the reward r_i = beta (logps_i - ref_logps_i) and a point c that it is compared with,

        x_i = r_i - c if desirable, else c - r_i
        loss = (1/B) sum_i w_i row_loss(x_i),   w_i = desirable_weight or undesirable_weight

    One row, or rows of one class, are a batch as any other.

    Optional: `mask` (rows that count), `weights` (scale a row; 0 rejects it and keeps the denominator), `normalizer`
    (`rlloss.count` of the rows, summed over the step's micro-batches and ranks).

    Metrics: accuracy (share of rows with x_i > 0), desirable_reward and undesirable_reward (r, each over its class; 0
    where the class is absent).
    """

    family = "unpaired"
    needs_kl: ClassVar[bool] = False  # whether `forward` takes the KL of the whole step

    def __init__(self, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        super().__init__()
        check_range(self._who, "beta", beta, 0, open_low=True)
        check_range(self._who, "desirable_weight", desirable_weight, 0)
        check_range(self._who, "undesirable_weight", undesirable_weight, 0)
        self.beta, self.desirable_weight, self.undesirable_weight = beta, desirable_weight, undesirable_weight

    @property
    def needs_reference(self) -> bool:
        """Always."""
        return True

    def row_loss(self, x: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The loss of each row as a function of x."""
        raise NotImplementedError

    def _output(
        self,
        logps: Tensor,
        ref_logps: Tensor,
        desirable: Tensor,
        log_ratio_of_c: Tensor | float,
        mask: Tensor | None,
        weights: Tensor | None,
        normalizer: Normalizer | None,
    ) -> LossOutput:
        """The output where c is beta times that log-ratio."""
        check_normalizer(self._who, normalizer)
        mask = row_mask(
            self._who,
            mask,
            {"logps": logps, "ref_logps": ref_logps},
            {"weights": weights},
            hint="rlloss.sequence_logps(logprobs, loss_mask) makes it",
        )
        self._check_desirable(desirable, logps)
        logps, ref_logps = zero_masked(mask, logps, ref_logps.detach())
        log_ratio = logps - ref_logps
        side = torch.where(desirable, torch.ones_like(log_ratio), -1)
        of_class = torch.where(desirable, torch.full_like(log_ratio, self.desirable_weight), self.undesirable_weight)

        def row_loss(log_ratio: Tensor) -> Tensor:
            return of_class * self.row_loss(side * self.beta * (log_ratio - log_ratio_of_c))

        loss = mean_of_rows(row_loss, (log_ratio,), mask, weights, normalizer)
        return LossOutput(
            loss,
            {
                "accuracy": Mean.of((side * (log_ratio - log_ratio_of_c) > 0).to(log_ratio.dtype), mask),
                "desirable_reward": Mean.of(self.beta * log_ratio, mask & desirable),
                "undesirable_reward": Mean.of(self.beta * log_ratio, mask & ~desirable),
            },
        )

    def _check_desirable(self, desirable: Tensor, logps: Tensor) -> None:
        check_mask(self._who, "desirable", desirable, ndim=(1,))
        if desirable.shape != logps.shape:
            raise ValueError(
                f"{self._who}: desirable must be {list(logps.shape)} as logps, got {list(desirable.shape)}"
            )
        check_device(self._who, "desirable", desirable, "logps", logps)
