"""What all policy losses share: mask at the door, ratio, weights, KL term, entropy bonus, reduction, metrics."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, TypedDict

from torch import Tensor

from rlloss._checks import check_full_precision, check_like, check_range, check_tokens_layout
from rlloss._typing import Bool, Float
from rlloss.advantages.running import AdaptiveEntropyController
from rlloss.divergence import KLEstimator, KLGradient, check_kl, kl_k3, kl_term
from rlloss.output import LossOutput, Max, Mean, Metric, Min, Moments
from rlloss.protocol import Loss
from rlloss.reduce import (
    Normalizer,
    Reduction,
    check_normalizer,
    reduce_tokens,
    sequence_lengths,
    sequence_sum,
    to_tokens,
    weighted,
    within_sequences,
    zero_masked,
)
from rlloss.surrogate import RatioLevel, bounded, log_ratios

__all__ = ["PolicyBatch", "PolicyLoss", "PolicyOptions"]


class PolicyOptions(TypedDict, total=False):
    """Hyperparameters of every policy loss.

    kl_coef: Weight of the KL penalty to the reference; needs `ref_logprobs`, or `ref_kl` with kl="exact".
    kl, kl_grad: Estimator and the divergence that its gradient descends: see `rlloss.kl_term`. "exact" is that of the
        whole vocabulary, given as `ref_kl`.
    entropy_coef: Weight of the entropy bonus, or `rlloss.AdaptiveEntropyController`; needs `entropy`.
    max_log_ratio: Bound of every exponentiated log-ratio, in nats.
    """

    kl_coef: float
    kl: KLEstimator
    kl_grad: KLGradient
    entropy_coef: float | AdaptiveEntropyController
    max_log_ratio: float


_OPTIONAL = {"ref_logprobs", "ref_kl", "rollout_logprobs", "entropy", "token_weights"}
_WITH_GRADIENT = {"ref_kl", "entropy"}


class PolicyBatch(NamedTuple):
    """The inputs of a policy loss behind the door: zero where masked, old and ref without gradient."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor
    ref_logprobs: Tensor | None
    ref_kl: Tensor | None
    rollout_logprobs: Tensor | None
    entropy: Tensor | None
    token_weights: Tensor | None
    cu_seqlens: Tensor | None
    log_ratio: Tensor  # at the loss's ratio level, not yet bounded
    ratio: Tensor  # its exponential, within bounds
    selected: Tensor | None = None  # the tokens that a loss has chosen among those of the whole step
    drift: Tensor | None = None  # the log-ratio to what a loss squares it against, at its ratio level


class PolicyLoss(Loss):
    """Base of the policy losses: a subclass names its ratio level and reduction and writes its surrogate.

    forward(logprobs, old_logprobs, advantages, loss_mask): per-token tensors `[B, T]`, or packed `[N]` with
    `cu_seqlens`, aligned with the ids that they score (`rlloss.shift`), in float32 or float64.
    `old_logprobs=None` means the policy itself, detached. `advantages` may hold one value per sequence.

    Optional: `ref_logprobs` (frozen reference), `ref_kl` (with kl="exact": what `rlloss.token_divergences` or
    `rlloss.linear_divergences` gives per token, with its gradient), `entropy` (per token), `token_weights` (scale
    surrogate and KL but not the entropy bonus; 0 rejects a token's own term and keeps the denominator, but a ratio of
    the whole sequence goes on counting the token), `normalizer` (`rlloss.count` summed over the step's micro-batches
    and ranks; without it the call's own counts serve), and for losses that name it `rollout_logprobs` (the sampler's).

    Metrics: ratio (with ratio_std), ratio_max, ratio_min, approx_kl (to old), bounded_frac, and where given ref_kl (per
    token), ref_kl_seq (summed over each sequence) and entropy. An all-masked batch gives exactly 0 with zero gradient.
    """

    family = "policy"
    reduction: ClassVar[Reduction]
    ratio_level: ClassVar[RatioLevel] = "token"
    max_length: int | None = None  # the constant of the reduction `fixed_length`

    def __init__(
        self,
        *,
        kl_coef: float = 0.0,
        kl: KLEstimator = "k3",
        kl_grad: KLGradient = "reverse",
        entropy_coef: float | AdaptiveEntropyController = 0.0,
        max_log_ratio: float = 20.0,
    ) -> None:
        super().__init__()
        check_range(self._who, "kl_coef", kl_coef, 0)
        check_kl(self._who, kl, kl_grad)
        if not isinstance(entropy_coef, AdaptiveEntropyController):
            check_range(self._who, "entropy_coef", entropy_coef)
        check_range(self._who, "max_log_ratio", max_log_ratio, 0, 20, open_low=True)
        self.kl_coef = kl_coef
        self.kl: KLEstimator = kl
        self.kl_grad: KLGradient = kl_grad
        self.entropy_coef, self.max_log_ratio = entropy_coef, max_log_ratio

    def after_step(self, metrics: Mapping[str, Metric]) -> None:
        """Shows the update's mean entropy to the controller of the bonus, where there is one."""
        if isinstance(self.entropy_coef, AdaptiveEntropyController):
            self.entropy_coef.update(metrics["entropy"].value)

    @property
    def needs_reference(self) -> bool:
        """True with a KL penalty whose estimator is of the sampled token."""
        return self._reads_kl and self.kl != "exact"

    @property
    def _reads_kl(self) -> bool:
        return bool(self.kl_coef)

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """The per-token policy term to minimise, and the metrics that only this loss has."""
        raise NotImplementedError

    def forward(
        self,
        logprobs: Float[Tensor, "*tokens"],
        old_logprobs: Float[Tensor, "*tokens"] | None,
        advantages: Float[Tensor, "..."],
        loss_mask: Bool[Tensor, "*tokens"],
        *,
        ref_logprobs: Float[Tensor, "*tokens"] | None = None,
        ref_kl: Float[Tensor, "*tokens"] | None = None,
        rollout_logprobs: Float[Tensor, "*tokens"] | None = None,
        entropy: Float[Tensor, "*tokens"] | None = None,
        token_weights: Float[Tensor, "*tokens"] | None = None,
        normalizer: Normalizer | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        check_normalizer(self._who, normalizer)
        batch = self.door(
            logprobs,
            old_logprobs,
            advantages,
            loss_mask,
            ref_logprobs=ref_logprobs,
            ref_kl=ref_kl,
            rollout_logprobs=rollout_logprobs,
            entropy=entropy,
            token_weights=token_weights,
            cu_seqlens=cu_seqlens,
        )
        return self.objective(batch, normalizer)

    def door(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        loss_mask: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        **optional: Tensor | None,
    ) -> PolicyBatch:
        """Checks every input and zeroes what is masked, before any exp, product or sum can see it."""
        who = self._who
        check_tokens_layout(who, loss_mask, cu_seqlens)
        check_like(who, "logprobs", logprobs, "loss_mask", loss_mask)
        old_logprobs = logprobs if old_logprobs is None else old_logprobs
        for name, x in {"old_logprobs": old_logprobs, **optional}.items():
            if x is not None:
                check_like(who, name, x, "logprobs", logprobs)
        self._check_given(optional)
        advantages = _token_advantages(who, advantages, loss_mask, cu_seqlens)
        loss_mask = within_sequences(loss_mask, cu_seqlens)

        logprobs, old_logprobs, advantages = zero_masked(
            loss_mask, logprobs, old_logprobs.detach(), advantages.detach()
        )
        entered = dict.fromkeys(_OPTIONAL)
        for name, x in optional.items():
            if x is not None:
                entered[name] = zero_masked(loss_mask, x if name in _WITH_GRADIENT else x.detach())[0]
        log_ratio = log_ratios(logprobs, old_logprobs, loss_mask, self.ratio_level, cu_seqlens)
        return PolicyBatch(
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            advantages=advantages,
            loss_mask=loss_mask,
            cu_seqlens=cu_seqlens,
            log_ratio=log_ratio,
            ratio=bounded(log_ratio, self.max_log_ratio).exp(),
            **entered,
        )

    def _check_given(self, given: dict[str, Tensor | None]) -> None:
        """Raises ValueError for a term without its input, and for an input that no term would read."""
        who, absent = self._who, {name for name, x in given.items() if x is None} | (_OPTIONAL - given.keys())
        if self.needs_reference and "ref_logprobs" in absent:
            raise ValueError(f"{who}: kl_coef={self.kl_coef} needs ref_logprobs, got None")
        if self._reads_kl and self.kl == "exact" and "ref_kl" in absent:
            raise ValueError(
                f"{who}: kl='exact' needs ref_kl, got None; rlloss.token_divergences and rlloss.linear_divergences "
                f"give it as {self.kl_grad}_kl"
            )
        if self.kl != "exact" and "ref_kl" not in absent:
            raise ValueError(f"{who}: ref_kl is for kl='exact', got it with kl={self.kl!r}")
        if self.needs_rollout == ("rollout_logprobs" in absent):
            raise ValueError(
                f"{who}: needs rollout_logprobs, the sampler's, got None"
                if self.needs_rollout
                else f"{who}: takes no rollout_logprobs; rlloss.importance_correction makes token_weights of them"
            )
        if self._has_entropy_bonus and "entropy" in absent:
            raise ValueError(
                f"{who}: entropy_coef={self.entropy_coef} needs entropy, got None; "
                'ask the log-prob functions for outputs=("logprobs", "entropy")'
            )

    @property
    def _has_entropy_bonus(self) -> bool:
        return isinstance(self.entropy_coef, AdaptiveEntropyController) or self.entropy_coef != 0

    def objective(self, batch: PolicyBatch, normalizer: Normalizer | None) -> LossOutput:
        """Weights * (surrogate + kl_coef * KL) - entropy_coef * entropy, reduced, with its metrics."""
        accepted = _without_rejected(batch)
        token_loss, metrics = self.surrogate(accepted)
        if self.kl_coef:
            token_loss = token_loss + self.kl_coef * self.ref_kl(accepted)
        token_loss = weighted(token_loss, batch.token_weights)
        if self._has_entropy_bonus and batch.entropy is not None:
            token_loss = token_loss - self._entropy_weight(batch.entropy) * batch.entropy
        loss = reduce_tokens(
            token_loss,
            batch.loss_mask,
            self.reduction,
            normalizer=normalizer,
            cu_seqlens=batch.cu_seqlens,
            max_length=self.max_length,
        )
        return LossOutput(loss, self._metrics(batch) | metrics)

    def ref_kl(self, batch: PolicyBatch) -> Tensor:
        """The per-token KL penalty, with the gradient that `kl_grad` names."""
        if batch.ref_kl is not None:
            return batch.ref_kl
        assert batch.ref_logprobs is not None  # the door has checked it
        return kl_term(
            batch.logprobs, batch.old_logprobs, batch.ref_logprobs, self.kl, self.kl_grad, self.max_log_ratio
        )

    def _entropy_weight(self, like: Tensor) -> Tensor | float:
        coef = self.entropy_coef
        return coef.entropy_coef.to(like) if isinstance(coef, AdaptiveEntropyController) else coef

    def _metrics(self, batch: PolicyBatch) -> dict[str, Metric]:
        mask, ratio = batch.loss_mask, batch.ratio
        out_of_bounds = batch.log_ratio.abs() > self.max_log_ratio
        metrics: dict[str, Metric] = {
            "ratio": Moments.of(ratio, mask),
            "ratio_max": Max.of(ratio, mask),
            "ratio_min": Min.of(ratio, mask),
            "approx_kl": Mean.of(kl_k3(batch.old_logprobs, batch.logprobs, self.max_log_ratio), mask),
            "bounded_frac": Mean.of(out_of_bounds.to(ratio.dtype), mask),
        }
        kl = batch.ref_kl
        if kl is None and batch.ref_logprobs is not None:
            kl = kl_k3(batch.logprobs, batch.ref_logprobs, self.max_log_ratio)
        if kl is not None:
            metrics["ref_kl"] = Mean.of(kl, mask)
            lengths = sequence_lengths(mask, batch.cu_seqlens)
            metrics["ref_kl_seq"] = Mean.of(sequence_sum(kl, mask, batch.cu_seqlens), lengths > 0)
        if batch.entropy is not None:
            metrics["entropy"] = Mean.of(batch.entropy, mask)
        return metrics


def _without_rejected(batch: PolicyBatch) -> PolicyBatch:
    """Zero where the weight is 0: a product's backward would make 0 * inf a NaN. Ratios are bounded as they are."""
    if batch.token_weights is None:
        return batch
    accepted = batch.token_weights != 0
    logprobs, advantages = zero_masked(accepted, batch.logprobs, batch.advantages)
    drift = None if batch.drift is None else zero_masked(accepted, batch.drift)[0]
    return batch._replace(logprobs=logprobs, advantages=advantages, drift=drift)


def _token_advantages(who: str, advantages: Tensor, loss_mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    num_sequences = loss_mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check_full_precision(who, "advantages", advantages)
    if advantages.ndim == 1 and advantages.shape != loss_mask.shape and advantages.shape[0] == num_sequences:
        check_like(who, "advantages", advantages, "one value per sequence", loss_mask.new_empty(num_sequences))
        return to_tokens(advantages, loss_mask, cu_seqlens)
    if advantages.shape != loss_mask.shape:
        raise ValueError(
            f"{who}: advantages must have one value per token {list(loss_mask.shape)} or per sequence "
            f"[{num_sequences}], got {list(advantages.shape)}"
        )
    check_like(who, "advantages", advantages, "loss_mask", loss_mask)
    return advantages
