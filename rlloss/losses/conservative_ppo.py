"""Conservative PPO: PPO-clip that may drift from the reference for free, up to a limit."""

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from rlloss._checks import check_choice, check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput, Mean
from rlloss.policy import PolicyBatch, PolicyOptions
from rlloss.policy_surrogates import ClippedPolicyLoss
from rlloss.protocol import Exactness
from rlloss.reduce import (
    Normalizer,
    check_normalizer,
    reduce_sequences,
    reduce_tokens,
    sequence_lengths,
    sequence_mean,
)

__all__ = ["ConservativePPOLoss"]


class ConservativePPOLoss(ClippedPolicyLoss):
    """PPO-clip, equation 7 of https://arxiv.org/abs/1707.06347, plus a squared hinge on the KL to the reference.

    The hinge is the last term of algorithm 1 of https://arxiv.org/abs/1707.02286: nothing below `max_kl`,
    a quadratic wall above it.

        loss = (1/N) sum_t max(-r A, -clip(r, 1 - clip_eps_low, 1 + clip_eps_high) A)
               + conservative_coef max(0, KL - max_kl)^2
        dloss/dl_t = -(1/N) r_t A_t [not clipped] + 2 conservative_coef max(0, KL - max_kl) (1/N) dKL_t/dl_t

    KL is the per-token mean over the batch of the estimator `kl` (r k3 by default: dKL_t/dl_t = r_t (l_t - ref_t)),
    so the hinge couples all tokens of a step: under a split pass the step's value as `kl=` (`statistics` computes
    it), and loss, gradient and metrics stay exact. `level="sequence"` takes the hinge of each sequence's own mean
    KL and averages over sequences; it is exact by Counts alone. `token_weights` do not scale the hinge.

    Base class: inputs, options and metrics; adds clip_frac, kl_penalty, kl_violation and max_kl.

    Args:
        conservative_coef: Weight of the hinge.
        max_kl: KL in nats per token that costs nothing.
        level: `batch` or `sequence`: whose mean KL the hinge sees.
        clip_eps_low: The ratio's room below 1.
        clip_eps_high: The ratio's room above 1.
        dual_clip: Bound c > 1 of the ratio where A < 0; None for no bound.
        **options: `rlloss.PolicyOptions`.

    >>> l, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> loss_fn = ConservativePPOLoss(conservative_coef=1.0, max_kl=0.1, kl="k2")
    >>> loss_fn(l, l, torch.tensor([0.5]), mask, ref_logprobs=l - 1).loss  # -0.5 + (0.5 - 0.1)^2
    tensor(-0.3400)
    """

    reduction = "token_mean"

    def __init__(
        self,
        *,
        conservative_coef: float = 0.1,
        max_kl: float = 0.01,
        level: Literal["batch", "sequence"] = "batch",
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, dual_clip=dual_clip, **options)
        check_range(self._who, "conservative_coef", conservative_coef, 0)
        check_range(self._who, "max_kl", max_kl, 0)
        check_choice(self._who, "level", level, ("batch", "sequence"))
        self.conservative_coef, self.max_kl, self.level = conservative_coef, max_kl, level

    @property
    def exactness(self) -> Exactness:  # pyright: ignore[reportIncompatibleVariableOverride]
        """`statistic` under level `batch`, whose hinge couples the step's tokens; else `sum`."""
        return "statistic" if self.level == "batch" else "sum"

    @property
    def _reads_kl(self) -> bool:
        return True  # the hinge does

    def forward(
        self,
        logprobs: Float[Tensor, "*tokens"],
        old_logprobs: Float[Tensor, "*tokens"] | None,
        advantages: Float[Tensor, "..."],
        loss_mask: Bool[Tensor, "*tokens"],
        *,
        normalizer: Normalizer | None = None,
        kl: Tensor | float | None = None,
        **optional: Any,
    ) -> LossOutput:
        """The loss and its metrics; `kl` is the whole step's KL where this call sees only a part of it."""
        self._check(optional, normalizer, kl)
        batch = self.door(logprobs, old_logprobs, advantages, loss_mask, **optional)
        loss, metrics = self.objective(batch, normalizer)
        if self.level == "batch":
            penalty, hinge_metrics = self._batch_hinge(batch, normalizer, kl)
        else:
            penalty, hinge_metrics = self._sequence_hinge(batch, normalizer)
        hinge_metrics["max_kl"] = Mean.constant(penalty.new_full((), self.max_kl), hinge_metrics["kl_penalty"].count)
        return LossOutput(loss + penalty, metrics | hinge_metrics)

    def statistics(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor | None,
        advantages: Tensor,
        loss_mask: Tensor,
        **keywords: Any,
    ) -> dict[str, Tensor]:
        """What `forward` needs of the whole step under a split: `{"kl": KL}`, from the step's detached numbers."""
        optional = {name: x for name, x in keywords.items() if name not in ("kl", "normalizer", "token_weights")}
        with torch.no_grad():
            batch = self.door(logprobs, old_logprobs, advantages, loss_mask, **optional)
            kl = reduce_tokens(self.ref_kl(batch), batch.loss_mask, "token_mean", cu_seqlens=batch.cu_seqlens)
        return {"kl": kl}

    def _batch_hinge(
        self, batch: PolicyBatch, normalizer: Normalizer | None, kl: Tensor | float | None
    ) -> tuple[Tensor, dict[str, Mean]]:
        def part(values: Tensor) -> Tensor:
            return reduce_tokens(
                values, batch.loss_mask, "token_mean", normalizer=normalizer, cu_seqlens=batch.cu_seqlens
            )

        kl_part = part(self.ref_kl(batch))
        if kl is None:
            kl = kl_part.detach()
        kl = kl.detach().to(kl_part) if isinstance(kl, Tensor) else kl_part.new_full((), kl)
        violation = (kl - self.max_kl).clamp(min=0)
        value = self.conservative_coef * violation.square()
        # the value is shared out by tokens; the gradient is the chain rule through this part's share of the mean
        share = part(torch.ones_like(batch.logprobs))
        penalty = share * value + 2 * self.conservative_coef * violation * (kl_part - kl_part.detach())
        tokens = sequence_lengths(batch.loss_mask, batch.cu_seqlens).sum()
        return penalty, {
            "kl_penalty": Mean.constant(value, tokens),
            "kl_violation": Mean.constant(violation, tokens),
        }

    def _sequence_hinge(self, batch: PolicyBatch, normalizer: Normalizer | None) -> tuple[Tensor, dict[str, Mean]]:
        mask, cu_seqlens = batch.loss_mask, batch.cu_seqlens
        violation = (sequence_mean(self.ref_kl(batch), mask, cu_seqlens) - self.max_kl).clamp(min=0)
        value = self.conservative_coef * violation.square()
        rows = sequence_lengths(mask, cu_seqlens) > 0
        penalty = reduce_sequences(value, rows, normalizer=normalizer)
        return penalty, {"kl_penalty": Mean.of(value, rows), "kl_violation": Mean.of(violation, rows)}

    def _check(self, optional: dict[str, Any], normalizer: Normalizer | None, kl: Tensor | float | None) -> None:
        check_normalizer(self._who, normalizer, plain_number=self.level == "batch")
        if self.needs_reference and optional.get("ref_logprobs") is None:
            raise ValueError(f"{self._who}: needs ref_logprobs, got None; the hinge is on the KL to the reference")
        if self.level == "sequence" and kl is not None:
            raise ValueError(f"{self._who}: level='sequence' takes no kl=; each sequence has its own")
        if self.level == "batch" and normalizer is not None and kl is None:
            raise ValueError(
                f"{self._who}: normalizer= says that this call is part of a step, and then the hinge needs the step's "
                "KL: pass kl=loss_fn.statistics(...)['kl'] of the whole step, or set level='sequence'"
            )
