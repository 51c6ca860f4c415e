"""The kinds of paired preference losses: of one margin, without a reference, on means, by rank, of a whole step."""

from typing import Any, ClassVar, TypedDict, get_args

import torch
from torch import Tensor

from rlloss._checks import check_choice, check_flag, check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput, Mean, Moments
from rlloss.preference import Logps, PreferenceLoss, Sides, logistic_loss
from rlloss.preference_inputs import Divergence, divergence_score
from rlloss.reduce import Normalizer, check_normalizer, reduce_sequences

__all__ = ["MarginLoss", "MarginOptions", "MeanPreferenceLoss", "RankedLoss", "ReferenceFreeLoss", "StepStatisticLoss"]


class MarginOptions(TypedDict, total=False):
    """What every loss of one margin takes: see `MarginLoss`."""

    beta: float
    reference_free: bool
    length_normalized: bool
    divergence: Divergence
    divergence_alpha: float


class MarginLoss(PreferenceLoss):
    """Base of the losses of one margin, that of two log-ratios or of what another divergence makes of them.

    Base class: inputs, optional inputs and metrics. Under `divergence`, h and the rewards are made of
    `rlloss.divergence_score` of the log-ratios, and score_bounded_frac is the share of pairs with an exponent at its
    bound of 20, which have no gradient through that answer.

    Args:
        beta: Strength of the pull to the reference.
        reference_free: Takes the reference as uniform.
        length_normalized: The inputs are means per token, not sums; a beta for sums is none for means.
        divergence: What pulls to the reference: `reverse_kl`, `forward_kl`, `jensen_shannon` or `alpha`.
        divergence_alpha: The exponent of `alpha`, in (0, 1].
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        reference_free: bool = False,
        length_normalized: bool = False,
        divergence: Divergence = "reverse_kl",
        divergence_alpha: float = 0.5,
    ) -> None:
        super().__init__(beta=beta, reference_free=reference_free)
        check_flag(self._who, "length_normalized", length_normalized)
        check_choice(self._who, "divergence", divergence, get_args(Divergence))
        check_range(self._who, "divergence_alpha", divergence_alpha, 0, 1, open_low=True)
        if divergence != "reverse_kl" and (reference_free or length_normalized):
            option = "reference_free" if reference_free else "length_normalized"
            raise ValueError(
                f"{self._who}: {divergence=} is a function of whole answers' ratios to the reference, which "
                f"{option}=True leaves out; set divergence='reverse_kl' or {option}=False"
            )
        self.length_normalized = length_normalized
        self.divergence: Divergence = divergence
        self.divergence_alpha = divergence_alpha

    @property
    def score_exponent(self) -> float:
        """Of the forward KL and of `alpha`."""
        return {"forward_kl": 1.0, "alpha": self.divergence_alpha}.get(self.divergence, 0.0)

    def score(self, log_ratio: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """The log-ratio under the divergence."""
        return divergence_score(log_ratio, self.divergence, self.divergence_alpha)


class ReferenceFreeLoss(PreferenceLoss):
    """Base of the preference losses that know no reference."""

    def __init__(self, *, beta: float) -> None:
        super().__init__(beta=beta, reference_free=True)

    def extra_repr(self) -> str:
        """The hyperparameters, of which `reference_free` is none."""
        return super().extra_repr().replace(", reference_free=True", "")


class MeanPreferenceLoss(ReferenceFreeLoss):
    """Base of the preference losses on means per token: forward(chosen_mean_logps, rejected_mean_logps), each `[B]`."""

    length_normalized = True
    _inputs = ("chosen_mean_logps", "rejected_mean_logps")

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        chosen_mean_logps: Float[Tensor, " B"],
        rejected_mean_logps: Float[Tensor, " B"],
        *,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        beta: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the docstring of `rlloss.PreferenceLoss` says what the optional ones mean."""
        return self._output((chosen_mean_logps, rejected_mean_logps, None, None), mask, weights, beta, normalizer)


class RankedLoss(PreferenceLoss):
    """Base of the losses that compare two samples quantile by quantile, and not the answers to one prompt.

    Rows meet by rank, so that no split adds up: a step in parts goes through `rlloss.waist_gradient`. A pair's weight
    or beta would fall on whatever it meets, so that both raise.

    forward: as of `rlloss.PreferenceLoss`, with `mask` (pairs that count) and `normalizer`.

    Metrics: accuracy (share of ranks with h > 0), margin (beta h, with margin_std), chosen_reward and rejected_reward
    (beta times each log-ratio).

    Args:
        beta: Scale of h.
        label_smoothing: Share of labels taken to be flipped, in [0, 0.5].
        reference_free: Takes the reference as uniform.
    """

    exactness = "waist"

    def __init__(self, *, beta: float = 0.1, label_smoothing: float = 0.0, reference_free: bool = False) -> None:
        super().__init__(beta=beta, reference_free=reference_free)
        check_range(self._who, "label_smoothing", label_smoothing, 0, 0.5)
        self.label_smoothing = label_smoothing

    def samples(self, policy: Sides, reference: Sides) -> tuple[Tensor, Tensor]:
        """The sample that is to lie above, and the one below it, from the log-probs of both answers."""
        raise NotImplementedError

    def pair_loss(self, h: Float[Tensor, " B"], beta: Tensor | float) -> Float[Tensor, " B"]:
        """The smoothed logistic loss of beta h."""
        return logistic_loss(beta * h, self.label_smoothing)

    def forward(
        self,
        chosen_logps: Float[Tensor, " B"],
        rejected_logps: Float[Tensor, " B"],
        ref_chosen_logps: Float[Tensor, " B"] | None = None,
        ref_rejected_logps: Float[Tensor, " B"] | None = None,
        *,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        beta: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        for name, given in (("weights", weights), ("beta", beta)):
            if given is not None:
                raise ValueError(f"{self._who}: pairs are sorted apart, so that {name} would act on no pair; pass None")
        check_normalizer(self._who, normalizer)
        logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
        mask, policy, reference = self._door(logps, mask, {})
        ranks = mask.sort(descending=True).values
        above, below = (
            torch.where(ranks, torch.where(mask, x, torch.inf).sort().values, 0)
            for x in self.samples(policy, reference)
        )
        h = above - below
        loss = reduce_sequences(self.pair_loss(h, self.beta), ranks, normalizer=normalizer)
        chosen, rejected = ((x - ref).detach() for x, ref in zip(policy, reference, strict=True))
        metrics = self._metrics(chosen, rejected, self.beta, mask)
        metrics["accuracy"] = Mean.of((h > 0).to(h.dtype), ranks)
        metrics["margin"] = Moments.of(self.beta * h, ranks)
        return LossOutput(loss, metrics)


class StepStatisticLoss(PreferenceLoss):
    """Base of the losses with one number of the whole step: the mean over its pairs of what a subclass names.

    Under a split pass that number to `forward` by its name (`statistics` computes it from the whole step's numbers);
    without a split it is taken from the call. It carries no gradient, and pairs of weight 0 are not in it.
    """

    exactness = "statistic"
    statistic: ClassVar[str]

    def of_pair(self, chosen: Tensor, rejected: Tensor, beta: Tensor | float) -> Tensor:
        """What the statistic is the mean of."""
        raise NotImplementedError

    def statistics(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        beta: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """What `forward` needs of the whole step under a split, from its detached numbers."""
        with torch.no_grad():
            logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
            mask, chosen, rejected = self._log_ratios(logps, mask, {"weights": weights, "beta": beta})
            counts = mask if weights is None else mask & (weights != 0)
            values = self.of_pair(chosen, rejected, self.beta if beta is None else beta)
            return {self.statistic: reduce_sequences(values, counts)}

    def _of_step(
        self, given: Tensor | float | None, normalizer: Normalizer | None, logps: Logps, **optional: Tensor | None
    ) -> Tensor:
        """The statistic as given, else that of this call."""
        if given is None:
            if normalizer is not None:
                raise ValueError(
                    f"{self._who}: normalizer= says that this call is part of a step, and then it needs the step's "
                    f"{self.statistic}: pass {self.statistic}=loss_fn.statistics(...)[{self.statistic!r}] of the "
                    "whole step"
                )
            return self.statistics(*logps, **optional)[self.statistic]
        if not isinstance(given, Tensor):
            check_range(self._who, self.statistic, given)
            return logps[0].new_full((), given)
        if given.ndim:
            raise ValueError(
                f"{self._who}: {self.statistic} must be one number for the whole step, got shape {list(given.shape)}"
            )
        return given.detach().to(logps[0])
