"""What all paired preference losses share: mask at the door, the margin, reduction, metrics."""

import torch
from torch import Tensor

from rlloss._checks import check_device, check_full_precision, check_like, check_mask, check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput, Mean, Moments
from rlloss.protocol import Loss
from rlloss.reduce import Normalizer, check_normalizer, reduce_sequences, weighted, zero_masked

__all__ = ["PreferenceLoss"]


class PreferenceLoss(Loss):
    """Base of the paired preference losses: a subclass writes its loss as one expression of the margin.

    forward(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps): per-sequence sums `[B]`
    (`rlloss.sequence_logps`), float32 or float64. The margin of a pair, in nats, is

        h = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)

    With `reference_free=True` the reference is uniform: the two ref tensors are None and drop out of h.

    Optional: `mask` (pairs that count), `weights` (scale a pair; 0 rejects it and keeps the denominator),
    `normalizer` (`rlloss.count` of the pairs, summed over the step's micro-batches and ranks).

    Metrics: accuracy (share of pairs with h > 0), margin (beta * h, with margin_std), chosen_reward and
    rejected_reward (beta times each log-ratio). An all-masked batch gives exactly 0 with zero gradient.
    """

    family = "preference"

    def __init__(self, *, beta: float = 0.1, reference_free: bool = False) -> None:
        super().__init__()
        check_range(self._who, "beta", beta, 0, open_low=True)
        self.beta, self.reference_free = beta, reference_free

    @property
    def needs_reference(self) -> bool:
        """True unless the reference is taken as uniform."""
        return not self.reference_free

    def pair_loss(self, margin: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The loss of each pair as a function of its margin h."""
        raise NotImplementedError

    def forward(
        self,
        chosen_logps: Float[Tensor, " B"],
        rejected_logps: Float[Tensor, " B"],
        ref_chosen_logps: Float[Tensor, " B"] | None = None,
        ref_rejected_logps: Float[Tensor, " B"] | None = None,
        *,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        check_normalizer(self._who, normalizer)
        mask = self._checked_mask(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, mask, weights)
        chosen, rejected = zero_masked(mask, chosen_logps, rejected_logps)
        if ref_chosen_logps is not None and ref_rejected_logps is not None:
            ref_chosen, ref_rejected = zero_masked(mask, ref_chosen_logps.detach(), ref_rejected_logps.detach())
            chosen, rejected = chosen - ref_chosen, rejected - ref_rejected
        margin = chosen - rejected
        if weights is not None:
            (weights,) = zero_masked(mask, weights.detach())
        loss = reduce_sequences(weighted(self.pair_loss(margin), weights), mask, normalizer=normalizer)
        return LossOutput(
            loss,
            {
                "accuracy": Mean.of((margin > 0).to(margin.dtype), mask),
                "margin": Moments.of(self.beta * margin, mask),
                "chosen_reward": Mean.of(self.beta * chosen, mask),
                "rejected_reward": Mean.of(self.beta * rejected, mask),
            },
        )

    def _checked_mask(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None,
        ref_rejected_logps: Tensor | None,
        mask: Tensor | None,
        weights: Tensor | None,
    ) -> Tensor:
        who, refs = (
            self._who,
            {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps},
        )
        check_full_precision(who, "chosen_logps", chosen_logps)
        if chosen_logps.ndim != 1:
            raise ValueError(
                f"{who}: chosen_logps must be one sum per pair [B], got {list(chosen_logps.shape)}; "
                "rlloss.sequence_logps(logprobs, loss_mask) makes it"
            )
        for name, ref in refs.items():
            if self.reference_free and ref is not None:
                raise ValueError(f"{who}: reference_free=True takes no reference, got {name}; pass None")
            if not self.reference_free and ref is None:
                raise ValueError(f"{who}: needs {name}, got None; or set reference_free=True")
        for name, x in {"rejected_logps": rejected_logps, **refs, "weights": weights}.items():
            if x is not None:
                check_like(who, name, x, "chosen_logps", chosen_logps)
        if mask is None:
            return torch.ones_like(chosen_logps, dtype=torch.bool)
        check_mask(who, "mask", mask, ndim=(1,))
        if mask.shape != chosen_logps.shape:
            raise ValueError(f"{who}: mask must be {list(chosen_logps.shape)} as chosen_logps, got {list(mask.shape)}")
        check_device(who, "mask", mask, "chosen_logps", chosen_logps)
        return mask
