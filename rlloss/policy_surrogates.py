"""The surrogates that several papers share: clipped, weighted without gradient, and over tokens chosen of a step."""

import math
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rlloss._checks import check_choice, check_mask, check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput, Mean, Metric
from rlloss.policy import PolicyBatch, PolicyLoss
from rlloss.protocol import Exactness
from rlloss.reduce import Normalizer, check_normalizer
from rlloss.surrogate import clipped_surrogate, log_ratios

__all__ = [
    "ClippedPolicyLoss",
    "QuadraticPolicyLoss",
    "SelectivePolicyLoss",
    "TruncatedPolicyLoss",
    "WeightedPolicyLoss",
    "held_ratio",
]


class ClippedPolicyLoss(PolicyLoss):
    """Base of the losses over PPO's clipped surrogate; adds clip_frac, the share of tokens where the clip binds."""

    def __init__(
        self, *, clip_eps_low: float, clip_eps_high: float, dual_clip: float | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        check_range(self._who, "clip_eps_low", clip_eps_low, 0, 1)
        check_range(self._who, "clip_eps_high", clip_eps_high, 0)
        if dual_clip is not None:
            check_range(self._who, "dual_clip", dual_clip, 1, open_low=True)
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """PPO's clipped surrogate per token, `rlloss.clipped_surrogate`."""
        token_loss, is_clipped = clipped_surrogate(
            batch.ratio, batch.advantages, self.clip_eps_low, self.clip_eps_high, self.dual_clip
        )
        return token_loss, {"clip_frac": Mean.of(is_clipped.to(token_loss.dtype), batch.loss_mask)}


class WeightedPolicyLoss(PolicyLoss):
    """Base of the losses -w A l, whose weight w carries no gradient: log-probs teach, however far the policy is.

    A subclass names its `weights`; with weights of 1 it is the policy gradient.
    """

    def weights(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """The weight of every token, and the metrics that only this loss has."""
        return torch.ones_like(batch.ratio), {}

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """-sg[w] A l per token."""
        weights, metrics = self.weights(batch)
        return -weights.detach() * batch.advantages * batch.logprobs, metrics


def held_ratio(batch: PolicyBatch, ratio_min: float, ratio_max: float) -> tuple[Tensor, dict[str, Metric]]:
    """The ratio within bounds, as a weight, and clip_frac, the share of tokens whose ratio lies beyond them."""
    weights = batch.ratio.detach().clamp(ratio_min, ratio_max)
    is_clipped = (batch.ratio < ratio_min) | (batch.ratio > ratio_max)
    return weights, {"clip_frac": Mean.of(is_clipped.to(weights.dtype), batch.loss_mask)}


class TruncatedPolicyLoss(WeightedPolicyLoss):
    """Base of truncated importance sampling: REINFORCE under the ratio held within bounds; adds clip_frac.

    The KL term stays per token, under each token's own ratio, held to the same bounds as the weights, since one answer
    of long ago would outweigh all others.
    """

    reduction = "sequence_sum"

    def __init__(
        self, *, ratio_level: Literal["sequence", "token"], ratio_min: float, ratio_max: float, **options: Any
    ) -> None:
        super().__init__(**options)
        check_choice(self._who, "ratio_level", ratio_level, ("sequence", "token"))
        check_range(self._who, "ratio_min", ratio_min, 0, 1)
        check_range(self._who, "ratio_max", ratio_max, 1)
        self.ratio_level = ratio_level  # pyright: ignore[reportAttributeAccessIssue]
        self.ratio_min, self.ratio_max = ratio_min, ratio_max

    def weights(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """The ratio, clipped."""
        return held_ratio(batch, self.ratio_min, self.ratio_max)

    def ref_kl(self, batch: PolicyBatch) -> Tensor:
        """The KL penalty per token, its own ratio held within the bounds of the weights."""
        if batch.ref_kl is not None:
            return batch.ref_kl
        low, high = (math.log(r) if r else -math.inf for r in (self.ratio_min, self.ratio_max))
        now = batch.logprobs.detach()
        # an old log-prob that gives the held ratio, and leaves the gradient of the log-prob as it is
        return super().ref_kl(batch._replace(old_logprobs=batch.old_logprobs.clamp(now - high, now - low)))


class QuadraticPolicyLoss(PolicyLoss):
    """Base of the losses with the square of a log-ratio D: where it is least, log-probs fit the advantages.

    D is the log-ratio to the `anchor`, the old policy or the reference, of the whole sequence or of the token. Over
    the tokens of a sequence, with d_t the token's own, -A l_t + (tau / 2) D d_t sums to -A sum_t l_t + (tau / 2) D^2.
    D is not exponentiated and has no bound: the further the policy is, the harder the square pulls. Adds drift, the
    mean of D over the tokens.
    """

    reduction = "sequence_sum"
    ratio_level = "sequence"
    anchor: Literal["old", "reference"] = "old"
    tau: float

    @property
    def needs_reference(self) -> bool:
        """True with a reference for an anchor, or with a KL penalty that reads it."""
        # written out: under torch.compile the property of super() is always true
        return self.anchor == "reference" or (self._reads_kl and self.kl != "exact")

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """-A l + (tau / 2) D d per token."""
        assert batch.drift is not None  # the door has made it
        own = batch.logprobs - self._anchored(batch)
        return -batch.advantages * batch.logprobs + self.tau / 2 * batch.drift * own, {}

    def door(
        self, logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, loss_mask: Tensor, **optional: Any
    ) -> PolicyBatch:
        """The base class's, and the log-ratio to the anchor."""
        if self.anchor == "reference" and optional.get("ref_logprobs") is None:
            raise ValueError(f"{self._who}: needs ref_logprobs, got None; its square is of the log-ratio to them")
        batch = super().door(logprobs, old_logprobs, advantages, loss_mask, **optional)
        drift = log_ratios(batch.logprobs, self._anchored(batch), batch.loss_mask, self.ratio_level, batch.cu_seqlens)
        return batch._replace(drift=drift)

    def _metrics(self, batch: PolicyBatch) -> dict[str, Metric]:
        assert batch.drift is not None  # the door has made it
        return super()._metrics(batch) | {"drift": Mean.of(batch.drift, batch.loss_mask)}

    def _anchored(self, batch: PolicyBatch) -> Tensor:
        if self.anchor == "old":
            return batch.old_logprobs
        assert batch.ref_logprobs is not None  # the door has checked it
        return batch.ref_logprobs


class SelectivePolicyLoss(PolicyLoss):
    """Base of the losses that treat some tokens differently, chosen by how they compare with the whole step's.

    forward takes `selected`, bool per token: the choice made over the whole step, `statistics(...)["selected"]`,
    whose rows go with their tokens into micro-batches, ranks and packs. Without it (and without `normalizer`) the call
    is the whole step and chooses for itself. Tokens with weight 0 are not chosen and have no say. Adds selected_frac.
    """

    exactness: ClassVar[Exactness] = "statistic"

    def selection(self, batch: PolicyBatch, counted: Tensor) -> Tensor:
        """True for the tokens of a whole step that are chosen among those `counted`, from numbers without gradient."""
        raise NotImplementedError

    def statistics(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        loss_mask: Tensor,
        **keywords: Any,
    ) -> dict[str, Tensor]:
        """What `forward` needs of the whole step under a split: `{"selected": bool per token}`."""
        for name in ("normalizer", "selected"):
            keywords.pop(name, None)
        return {"selected": self._selected(self.door(logprobs, old_logprobs, advantages, loss_mask, **keywords))}

    def forward(
        self,
        logprobs: Float[Tensor, "*tokens"],
        old_logprobs: Float[Tensor, "*tokens"] | None,
        advantages: Float[Tensor, "..."],
        loss_mask: Bool[Tensor, "*tokens"],
        *,
        selected: Bool[Tensor, "*tokens"] | None = None,
        normalizer: Normalizer | None = None,
        **keywords: Any,
    ) -> LossOutput:
        """The loss and its metrics; `selected` is the whole step's choice where this call sees only a part of it."""
        check_normalizer(self._who, normalizer)
        batch = self.door(logprobs, old_logprobs, advantages, loss_mask, **keywords)
        if selected is None:
            if normalizer is not None:
                raise ValueError(
                    f"{self._who}: normalizer= says that this call is part of a step, and then its tokens are chosen "
                    "among the step's: pass selected=loss_fn.statistics(...)['selected'] of the whole step, cut as the "
                    "tokens are"
                )
            selected = self._selected(batch)
        check_mask(self._who, "selected", selected)
        if selected.shape != loss_mask.shape:
            raise ValueError(
                f"{self._who}: selected must have the shape of loss_mask, {list(loss_mask.shape)}, "
                f"got {list(selected.shape)}"
            )
        batch = batch._replace(selected=selected & batch.loss_mask)
        loss, metrics = self.objective(batch, normalizer)
        chosen = Mean.of(selected.to(batch.ratio.dtype), batch.loss_mask)
        return LossOutput(loss, metrics | {"selected_frac": chosen})

    def _selected(self, batch: PolicyBatch) -> Tensor:
        counted = batch.loss_mask if batch.token_weights is None else batch.loss_mask & (batch.token_weights != 0)
        with torch.no_grad():
            return self.selection(batch, counted) & counted
