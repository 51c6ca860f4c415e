"""APO-zero over single answers: likelier than the reference if good, less likely if bad."""

import torch
from torch import Tensor

from rlloss._typing import Bool, Float
from rlloss.output import LossOutput
from rlloss.reduce import Normalizer
from rlloss.unpaired import UnpairedLoss

__all__ = ["APOZeroUnpairedLoss"]


class APOZeroUnpairedLoss(UnpairedLoss):
    """The unpaired APO-zero, each half of equation 7 of https://arxiv.org/abs/2408.06266 by itself.

    KTO whose point of comparison is the reference itself: good answers are to become likelier than they are there, bad
    ones less likely, and no KL has to be measured. It is for answers that are better than the policy's own.

        x_i = beta (logps_i - ref_logps_i) if desirable, else beta (ref_logps_i - logps_i)
        loss = (1/B) sum_i w_i (1 - sigmoid(x_i)),   w_i = desirable_weight or undesirable_weight
        dloss/dlogps_i = -(1/B) beta w_i sigmoid(x_i) sigmoid(-x_i) if desirable, with + if not

    A pair's two rows come to the paper's loss of that pair, over two rows. Inputs and metrics: `rlloss.UnpairedLoss`.

    Args:
        beta: Strength of the pull to the reference.
        desirable_weight: Weight of rows with thumbs up.
        undesirable_weight: Weight of rows with thumbs down.

    >>> import torch
    >>> ref, up = torch.tensor([-5.0, -6.0]), torch.tensor([True, False])
    >>> loss, metrics = APOZeroUnpairedLoss(beta=1.0)(torch.tensor([-4.0, -7.0]), ref, up)
    >>> round(loss.item(), 4), float(metrics["accuracy"])  # 1 - sigmoid(1)
    (0.2689, 1.0)
    """

    def row_loss(self, x: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """1 - sigmoid(x)."""
        return torch.sigmoid(-x)

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
        return self._output(logps, ref_logps, desirable, 0.0, mask, weights, normalizer)
