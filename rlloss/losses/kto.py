"""KTO: thumbs up and thumbs down, without pairs."""

import torch
from torch import Tensor

from rlloss._checks import check_full_precision, check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput, Mean
from rlloss.reduce import Normalizer
from rlloss.unpaired import UnpairedLoss

__all__ = ["KTOLoss", "kto_kl"]


def kto_kl(log_ratio: Mean) -> Float[Tensor, ""]:
    """KTO's reference point z_0, section 4.1 of https://arxiv.org/abs/2402.01306: the KL to the reference, at least 0.

    It is the mean log-ratio of mismatched pairs, a prompt with the answer to another. Sums and counts of the whole
    step come first, then the bound, so that any split of the step gives the same number:

        kl = max(0, sum (kl_logps - ref_kl_logps) / count)

    Args:
        log_ratio: `Mean.of(kl_logps - ref_kl_logps, mask)`, added over micro-batches and ranks.

    >>> part = Mean.of(torch.tensor([0.5, -2.0]), torch.tensor([True, True]))
    >>> kto_kl(part + Mean.of(torch.tensor([4.5]), torch.tensor([True]))), kto_kl(part)
    (tensor(1.), tensor(0.))
    """
    if not isinstance(log_ratio, Mean):
        raise ValueError(
            "kto_kl: log_ratio must be the rlloss.Mean of kl_logps - ref_kl_logps over the step's mismatched pairs, "
            f"got {type(log_ratio).__name__}; write kto_kl(Mean.of(kl_logps - ref_kl_logps, mask))"
        )
    return log_ratio.value.clamp(min=0)


class KTOLoss(UnpairedLoss):
    """KTO, equation 8 of https://arxiv.org/abs/2402.01306.

    Each answer is judged alone, against what the policy gains anywhere: a gain counts if it exceeds the KL to the
    reference. Saturating on both sides, it leaves answers alone that are far on either.

        x_i = beta ((logps_i - ref_logps_i) - kl) if desirable, else beta (kl - (logps_i - ref_logps_i))
        loss = (1/B) sum_i w_i (1 - sigmoid(x_i)),   w_i = desirable_weight or undesirable_weight
        dloss/dlogps_i = -(1/B) beta w_i sigmoid(x_i) sigmoid(-x_i) if desirable, with + if not

    forward(logps, ref_logps, desirable, kl=...): as `rlloss.UnpairedLoss`, with the KL of the whole step, from
    `rlloss.kto_kl`; it carries no gradient, and stands among the metrics.

    Args:
        beta: Strength of the pull to the reference.
        desirable_weight: Weight of rows with thumbs up; the paper keeps the ratio of the summed weights of the two
            classes between 1 and 3/2.
        undesirable_weight: Weight of rows with thumbs down.

    >>> logps = torch.tensor([-5.0, -6.0])
    >>> KTOLoss()(logps, logps, torch.tensor([True, False]), kl=0.0).loss  # at the reference
    tensor(0.5000)
    """

    needs_kl = True

    def row_loss(self, x: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """1 - sigmoid(x)."""
        return torch.sigmoid(-x)

    def forward(
        self,
        logps: Float[Tensor, " B"],
        ref_logps: Float[Tensor, " B"],
        desirable: Bool[Tensor, " B"],
        *,
        kl: Tensor | float,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        check_full_precision(self._who, "logps", logps)
        kl = self._number(kl, logps)
        loss, metrics = self._output(logps, ref_logps, desirable, kl, mask, weights, normalizer)
        counted = torch.ones_like(desirable) if mask is None else mask
        return LossOutput(loss, metrics | {"kl": Mean.constant(kl, counted.sum())})

    def _number(self, kl: Tensor | float, logps: Tensor) -> Tensor:
        if not isinstance(kl, Tensor):
            check_range(self._who, "kl", kl, 0)
        kl = kl.detach().to(logps) if isinstance(kl, Tensor) else logps.new_full((), kl)
        if kl.ndim != 0:
            raise ValueError(
                f"{self._who}: kl must be one number for the whole step, got shape {list(kl.shape)}; "
                "rlloss.kto_kl makes it"
            )
        return kl
