"""Dr. GRPO: GRPO without the length and difficulty biases."""

from typing import Unpack

from rlloss._checks import check_count
from rlloss.policy import PolicyOptions
from rlloss.policy_surrogates import ClippedPolicyLoss

__all__ = ["DrGRPOLoss"]


class DrGRPOLoss(ClippedPolicyLoss):
    """Dr. GRPO, section 3.2 of https://arxiv.org/abs/2503.20783.

    Divides by a constant instead of each sequence's own length, so that long wrong answers are not favoured; pair
    it with `rlloss.group_advantages(..., scale="none")`.

        loss = (1 / (S C)) sum_i sum_t [max(-r A, -clip(r, 1 - clip_eps_low, 1 + clip_eps_high) A) + kl_coef KL]
        dloss/dl_t = -(1 / (S C)) r_t A_t    where the clip does not bind, else 0    (kl_coef = 0)

    Base class: inputs, options and metrics; adds clip_frac.

    Args:
        max_completion_length: The constant C: the generation budget, the same at every step.
        clip_eps_low: The ratio's room below 1.
        clip_eps_high: The ratio's room above 1.
        dual_clip: Bound c > 1 of the ratio where A < 0; None for no bound.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> logprobs, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> DrGRPOLoss(max_completion_length=4)(logprobs, logprobs, torch.tensor([0.5]), mask).loss
    tensor(-0.2500)
    """

    reduction = "fixed_length"

    def __init__(
        self,
        *,
        max_completion_length: int,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, dual_clip=dual_clip, **options)
        check_count(self._who, "max_completion_length", max_completion_length)
        self.max_length = max_completion_length
