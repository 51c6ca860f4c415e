"""DPPO: PPO whose trust region is a divergence of the policies and not the ratio of one token."""

import math
from typing import Literal, Unpack

import torch
from torch import Tensor

from rlloss._checks import check_choice, check_range
from rlloss.output import Mean, Metric
from rlloss.policy import PolicyBatch, PolicyLoss, PolicyOptions

__all__ = ["DPPOLoss"]

_THRESHOLDS = {"tv": 0.15, "kl": 0.05}  # appendix C.1 of the paper


class DPPOLoss(PolicyLoss):
    """Divergence PPO, equations 12 to 14 of https://arxiv.org/abs/2602.04879, with its binary divergences.

    A rare token may double its probability, which moves no mass, and a likely one may not lose a fifth of its own: a
    token's gradient is cut where the policies have drifted too far apart and it would drive them further.

        p = exp(l), q = exp(old)
        D = |q - p|                                              (`tv`)
        D = q log(q / p) + (1 - q) log((1 - q) / (1 - p))        (`kl`)
        M_t = 0 where D > threshold and A (r - 1) > 0, else 1
        loss = -(1/S) sum_i sum_t M_t min(r_t, ratio_max) A_t
        dloss/dl_t = -(1/S) M_t min(r_t, ratio_max) A_t

    `old_logprobs` are the sampler's own: the paper anchors the region at the policy that wrote the answers and finds
    that recomputed log-probs let it collapse. M carries no gradient, and neither does the cap of the ratio, so that a
    capped token still teaches. Base class: inputs, options and metrics; adds divergence, the mean of D, and clip_frac,
    the share of tokens that are cut.

    Args:
        divergence: `tv` or `kl` (KL(old||pi)), of the sampled token against all others.
        threshold_low: Largest divergence where A < 0; the paper's of its stability runs (tv 0.15, kl 0.05) where None.
            Its larger runs take 0.2 for tv.
        threshold_high: Largest divergence where A > 0; as above.
        ratio_max: Largest ratio as a weight, equation 23; no bound there by default, 5 in the paper's larger runs.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> old, new = torch.tensor([[0.9, 0.01]]).log(), torch.tensor([[0.7, 0.02]]).log()
    >>> loss_fn, mask = DPPOLoss(), torch.ones(1, 2, dtype=torch.bool)
    >>> [float(loss_fn(new, old, torch.tensor([a]), mask).metrics["clip_frac"]) for a in (1.0, -1.0)]
    [0.0, 0.5]
    """

    reduction = "sequence_sum"

    def __init__(
        self,
        *,
        divergence: Literal["tv", "kl"] = "tv",
        threshold_low: float | None = None,
        threshold_high: float | None = None,
        ratio_max: float = math.inf,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(**options)
        check_choice(self._who, "divergence", divergence, tuple(_THRESHOLDS))
        self.divergence = divergence
        self.threshold_low = _THRESHOLDS[divergence] if threshold_low is None else threshold_low
        self.threshold_high = _THRESHOLDS[divergence] if threshold_high is None else threshold_high
        check_range(self._who, "threshold_low", self.threshold_low, 0)
        check_range(self._who, "threshold_high", self.threshold_high, 0)
        check_range(self._who, "ratio_max", ratio_max, 1)
        self.ratio_max = ratio_max

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """-M min(r, ratio_max) A per token."""
        divergence = self._divergence(batch)
        too_high = (batch.advantages > 0) & (batch.log_ratio > 0) & (divergence > self.threshold_high)
        too_low = (batch.advantages < 0) & (batch.log_ratio < 0) & (divergence > self.threshold_low)
        is_cut = too_high | too_low
        held = batch.ratio * (self.ratio_max / batch.ratio.detach()).clamp(max=1)
        clip_frac = Mean.of(is_cut.to(divergence.dtype), batch.loss_mask)
        return torch.where(is_cut, 0, -held * batch.advantages), {"clip_frac": clip_frac}

    def _metrics(self, batch: PolicyBatch) -> dict[str, Metric]:
        return super()._metrics(batch) | {"divergence": Mean.of(self._divergence(batch), batch.loss_mask)}

    def _divergence(self, batch: PolicyBatch) -> Tensor:
        """That of two coins: the sampled token, or any other."""
        # rounding may leave a log-prob above 0
        new, old = batch.logprobs.detach().clamp(max=0), batch.old_logprobs.clamp(max=0)
        if self.divergence == "tv":
            return (old.exp() - new.exp()).abs()
        rest, old_rest = -torch.expm1(new).clamp(max=-torch.finfo(new.dtype).tiny), -torch.expm1(old)
        return old.exp() * (old - new) + torch.special.xlogy(old_rest, old_rest / rest)
