"""GSPO-token: the sequence's ratio, and a gradient of each token's own."""

from typing import Unpack

from torch import Tensor

from rlloss.output import Metric
from rlloss.policy import PolicyBatch, PolicyOptions
from rlloss.policy_surrogates import ClippedPolicyLoss
from rlloss.surrogate import bounded

__all__ = ["GSPOTokenLoss"]


class GSPOTokenLoss(ClippedPolicyLoss):
    """GSPO-token, equations 13 and 14 of https://arxiv.org/abs/2507.18071.

    For advantages that differ within a sequence, as over several turns: every token has the value of the sequence's
    ratio and the gradient of its own log-prob, so that its advantage moves itself, where in GSPO the mean of all
    advantages moves every token. With one advantage per sequence the two agree in value and gradient.

        s_t = sg[s_i] exp(l_t - sg[l_t]),    s_i = exp((1/L_i) sum_t (l_t - old_t))
        loss = (1/S) sum_i (1/L_i) sum_t max(-s_t A_t, -clip(s_t, 1 - clip_eps_low, 1 + clip_eps_high) A_t)
        dloss/dl_t = -(1/S) (1/L_i) s_i A_t    where the clip does not bind, else 0

    Base class: inputs, options and metrics; adds clip_frac.

    Args:
        clip_eps_low: The ratio's room below 1.
        clip_eps_high: The ratio's room above 1.
        dual_clip: Bound c > 1 of the ratio where A < 0; None for no bound.
        **options: `rlloss.PolicyOptions`; the KL term stays per token.

    >>> import torch
    >>> old, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> GSPOTokenLoss()(old + torch.tensor([[0.1, -0.1]]), old, torch.tensor([[0.5, 1.5]]), mask).loss
    tensor(-1.)
    """

    reduction = "sequence_mean"
    ratio_level = "geometric"

    def __init__(
        self,
        *,
        clip_eps_low: float = 3e-4,
        clip_eps_high: float = 4e-4,
        dual_clip: float | None = None,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, dual_clip=dual_clip, **options)

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """PPO's clipped surrogate of s_t."""
        nothing = batch.logprobs - batch.logprobs.detach()  # but for its gradient
        ratio = bounded(batch.log_ratio.detach() + nothing, self.max_log_ratio).exp()
        return super().surrogate(batch._replace(ratio=ratio))
