"""CPGD: a policy gradient whose log-ratio is clipped, held near the old policy by a drift."""

import math
from typing import Unpack

import torch
from torch import Tensor

from rlloss._checks import check_range
from rlloss.output import Mean, Metric
from rlloss.policy import PolicyBatch, PolicyLoss, PolicyOptions

__all__ = ["CPGDLoss"]


class CPGDLoss(PolicyLoss):
    """Clipped policy gradient optimisation with policy drift, equation 2 of https://arxiv.org/abs/2505.12504.

    No ratio multiplies the gradient, so that none can make it explode: the clip cuts the log-ratio, and beyond it the
    drift alone is left, which pulls back to the old policy.

        d_t = l_t - old_t
        loss = (1/N) sum_t [max(-d A, -clip(d, log(1 - clip_eps_low), log(1 + clip_eps_high)) A)
                            + drift_coef sg[min(r - 1, drift_clip)] l]
        dloss/dl_t = (1/N) (-A_t where the clip does not bind + drift_coef min(r_t - 1, drift_clip))

    The drift has the gradient of k3 of KL(old||pi), whose ratio is cut and not the estimate itself: so a token far
    above still comes back. The paper takes the mean over prompts of each group's token mean: token_weights of
    N times `rlloss.prompt_mean_weights` do so. Its weights per prompt belong to the advantages (`std` is GRPO's).

    Base class: inputs, options and metrics; adds clip_frac, and drift_clip_frac, the share of tokens whose drift is
    cut.

    Args:
        clip_eps_low: The ratio's room below 1.
        clip_eps_high: The ratio's room above 1.
        drift_coef: Weight of the drift. The paper names no number; this and the next are its authors' own defaults.
        drift_clip: Largest r - 1 in the drift.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> l, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> CPGDLoss(drift_coef=0.0)(l, l - 1, torch.tensor([-2.0]), mask).loss  # pushed down, as far as it is above
    tensor(2.)
    """

    reduction = "token_mean"

    def __init__(
        self,
        *,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        drift_coef: float = 0.01,
        drift_clip: float = 0.2,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(**options)
        check_range(self._who, "clip_eps_low", clip_eps_low, 0, 1)
        check_range(self._who, "clip_eps_high", clip_eps_high, 0)
        check_range(self._who, "drift_coef", drift_coef, 0)
        check_range(self._who, "drift_clip", drift_clip, 0, open_low=True)
        self.clip_eps_low, self.clip_eps_high = clip_eps_low, clip_eps_high
        self.drift_coef, self.drift_clip = drift_coef, drift_clip

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """The clipped log-ratio times the advantage, and the drift."""
        low = math.log1p(-self.clip_eps_low) if self.clip_eps_low < 1 else -math.inf
        high = math.log1p(self.clip_eps_high)
        log_ratio, advantages, mask = batch.log_ratio, batch.advantages, batch.loss_mask
        token_loss = torch.maximum(-log_ratio * advantages, -log_ratio.clamp(low, high) * advantages)
        is_clipped = torch.where(advantages >= 0, (log_ratio > high) & (advantages > 0), log_ratio < low)
        excess = batch.ratio.detach() - 1
        drift = excess.clamp(max=self.drift_clip) * batch.logprobs
        return token_loss + self.drift_coef * drift, {
            "clip_frac": Mean.of(is_clipped.to(drift.dtype), mask),
            "drift_clip_frac": Mean.of((excess > self.drift_clip).to(drift.dtype), mask),
        }
