"""DAPO: a wider clip above, and every token of a step weighs the same."""

from typing import Unpack

from rlloss.policy import PolicyOptions
from rlloss.policy_surrogates import ClippedPolicyLoss

__all__ = ["DAPOLoss"]


class DAPOLoss(ClippedPolicyLoss):
    """DAPO, equation 8 of https://arxiv.org/abs/2503.14476.

    GRPO with two changes here: "clip-higher" leaves unlikely tokens more room to grow, and the mean is taken over all
    tokens of the step (equation 12), so that long answers are not diluted. The paper's other two stand where they act:
    `rlloss.overlong_penalty` and, for dynamic sampling, `rlloss.informative_groups`.

        loss = (1/N) sum_i sum_t max(-r A, -clip(r, 1 - clip_eps_low, 1 + clip_eps_high) A)    (N trained tokens)
        dloss/dl_t = -(1/N) r_t A_t    where the clip does not bind, else 0

    N is that of the whole step: pass `normalizer` where a step is split. Base class: inputs, options and metrics; adds
    clip_frac.

    Args:
        clip_eps_low: The ratio's room below 1.
        clip_eps_high: The ratio's room above 1.
        dual_clip: Bound c > 1 of the ratio where A < 0; None for no bound.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> old, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> DAPOLoss()(old + 1, old, torch.tensor([1.0]), mask).loss  # both ratios are e
    tensor(-1.2800)
    """

    reduction = "token_mean"

    def __init__(
        self,
        *,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.28,
        dual_clip: float | None = None,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, dual_clip=dual_clip, **options)
