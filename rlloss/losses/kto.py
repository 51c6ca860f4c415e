"""KTO: thumbs up and thumbs down, without pairs."""

import torch
from torch import Tensor

from rlloss._checks import check_device, check_mask, check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput, Mean
from rlloss.preference import mean_of_rows, row_mask
from rlloss.protocol import Loss
from rlloss.reduce import Normalizer, check_normalizer, zero_masked

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


class KTOLoss(Loss):
    """KTO, equation 8 of https://arxiv.org/abs/2402.01306.

    Each answer is judged alone, against what the policy gains anywhere: a gain counts if it exceeds the KL to the
    reference. Saturating on both sides, it leaves answers alone that are far on either.

        x_i = beta ((logps_i - ref_logps_i) - kl) if desirable, else beta (kl - (logps_i - ref_logps_i))
        loss = (1/B) sum_i w_i (1 - sigmoid(x_i)),   w_i = desirable_weight or undesirable_weight
        dloss/dlogps_i = -(1/B) beta w_i sigmoid(x_i) sigmoid(-x_i) if desirable, with + if not

    forward(logps, ref_logps, desirable, kl=...): sums per sequence `[B]` (`rlloss.sequence_logps`), thumbs up as bool
    `[B]`, and the KL of the whole step, from `rlloss.kto_kl`; it carries no gradient. One row, or rows of one class,
    are a batch as any other.

    Optional: `mask` (rows that count), `weights` (scale a row; 0 rejects it and keeps the denominator), `normalizer`
    (`rlloss.count` of the rows, summed over the step's micro-batches and ranks).

    Metrics: accuracy (share of rows with x_i > 0), desirable_reward and undesirable_reward (beta times the log-ratio,
    each over its class; 0 where the class is absent), kl.

    Args:
        beta: Strength of the pull to the reference.
        desirable_weight: Weight of rows with thumbs up; the paper keeps the ratio of the summed weights of the two
            classes between 1 and 3/2.
        undesirable_weight: Weight of rows with thumbs down.

    >>> logps = torch.tensor([-5.0, -6.0])
    >>> KTOLoss()(logps, logps, torch.tensor([True, False]), kl=0.0).loss  # at the reference
    tensor(0.5000)
    """

    family = "unpaired"

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
        check_normalizer(self._who, normalizer)
        mask = row_mask(
            self._who,
            mask,
            {"logps": logps, "ref_logps": ref_logps},
            {"weights": weights},
            hint="rlloss.sequence_logps(logprobs, loss_mask) makes it",
        )
        kl = self._checked(logps, desirable, kl)
        logps, ref_logps = zero_masked(mask, logps, ref_logps.detach())
        log_ratio = logps - ref_logps
        one = torch.ones_like(log_ratio)
        side = torch.where(desirable, one, -1)
        of_class = torch.where(desirable, self.desirable_weight * one, self.undesirable_weight)

        def row_loss(log_ratio: Tensor) -> Tensor:
            return of_class * torch.sigmoid(-side * self.beta * (log_ratio - kl))

        loss = mean_of_rows(row_loss, (log_ratio,), mask, weights, normalizer)
        return LossOutput(
            loss,
            {
                "accuracy": Mean.of((side * (log_ratio - kl) > 0).to(log_ratio.dtype), mask),
                "desirable_reward": Mean.of(self.beta * log_ratio, mask & desirable),
                "undesirable_reward": Mean.of(self.beta * log_ratio, mask & ~desirable),
                "kl": Mean.constant(kl, mask.sum()),
            },
        )

    def _checked(self, logps: Tensor, desirable: Tensor, kl: Tensor | float) -> Tensor:
        check_mask(self._who, "desirable", desirable, ndim=(1,))
        if desirable.shape != logps.shape:
            raise ValueError(
                f"{self._who}: desirable must be {list(logps.shape)} as logps, got {list(desirable.shape)}"
            )
        check_device(self._who, "desirable", desirable, "logps", logps)
        if not isinstance(kl, Tensor):
            check_range(self._who, "kl", kl, 0)
        kl = kl.detach().to(logps) if isinstance(kl, Tensor) else logps.new_full((), kl)
        if kl.ndim != 0:
            raise ValueError(
                f"{self._who}: kl must be one number for the whole step, got shape {list(kl.shape)}; "
                "rlloss.kto_kl makes it"
            )
        return kl
