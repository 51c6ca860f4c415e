"""GMPO: the geometric mean of a sequence's token ratios, each clipped."""

from typing import Unpack

import torch
from torch import Tensor

from rlloss._checks import check_range
from rlloss.output import Mean, Metric
from rlloss.policy import PolicyBatch, PolicyLoss, PolicyOptions
from rlloss.reduce import sequence_mean, to_tokens
from rlloss.surrogate import bounded

__all__ = ["GMPOLoss"]


class GMPOLoss(PolicyLoss):
    """GMPO, https://arxiv.org/abs/2507.20673: GRPO with the geometric mean of a sequence's ratios.

    One wild token moves a geometric mean little, which allows a clip far wider than GRPO's, (e^-0.4, e^0.4). GSPO
    clips that mean; here each token is clipped on the side that the advantage asks for, and then the mean is taken.

        c_t = min(l_t - old_t, clip_log_ratio_high) where A > 0, max(l_t - old_t, -clip_log_ratio_low) where A < 0
        loss = -(1/S) sum_i g_i A_i,    g_i = exp((1/L_i) sum_t c_t)
        dloss/dl_t = -(1/S) (1/L_i) g_i A_i    where the clip does not bind at t, else 0

    Where advantages differ within a sequence, each token's meets the geometric mean of all tokens clipped on its own
    side, and the mean is taken, so that the surrogate stays a lower bound; verl has the mean of the advantages meet a
    mean in which each token is clipped on the side of its own. The KL term is per token, and averaged over a sequence.

    Base class: inputs, options and metrics (ratio and bounded_frac are those of tokens; the bound itself holds g_i);
    adds clip_frac, the share of tokens where the clip binds.

    Args:
        clip_log_ratio_low: The log-ratio's room below 0, in nats.
        clip_log_ratio_high: The log-ratio's room above 0, in nats.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> old, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> GMPOLoss()(old + torch.tensor([[1.0, -0.4]]), old, torch.tensor([0.5]), mask).loss  # 1 held at 0.4
    tensor(-0.5000)
    """

    reduction = "sequence_mean"

    def __init__(
        self, *, clip_log_ratio_low: float = 0.4, clip_log_ratio_high: float = 0.4, **options: Unpack[PolicyOptions]
    ) -> None:
        super().__init__(**options)
        check_range(self._who, "clip_log_ratio_low", clip_log_ratio_low, 0)
        check_range(self._who, "clip_log_ratio_high", clip_log_ratio_high, 0)
        self.clip_log_ratio_low, self.clip_log_ratio_high = clip_log_ratio_low, clip_log_ratio_high

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """The advantage times the geometric mean of the ratios clipped on its side, per token."""
        log_ratio, advantages = batch.log_ratio, batch.advantages
        low, high = -self.clip_log_ratio_low, self.clip_log_ratio_high
        above = self._geometric_mean(log_ratio.clamp(max=high), batch)
        below = self._geometric_mean(log_ratio.clamp(min=low), batch)
        is_clipped = (advantages > 0) & (log_ratio > high) | (advantages < 0) & (log_ratio < low)
        clip_frac = Mean.of(is_clipped.to(advantages.dtype), batch.loss_mask)
        return -torch.where(advantages > 0, above, below) * advantages, {"clip_frac": clip_frac}

    def _geometric_mean(self, log_ratio: Tensor, batch: PolicyBatch) -> Tensor:
        mean = sequence_mean(log_ratio, batch.loss_mask, batch.cu_seqlens)
        return to_tokens(bounded(mean, self.max_log_ratio).exp(), batch.loss_mask, batch.cu_seqlens)
