"""A*-PO: regression of the answer's log-ratio on the advantage of the optimal policy."""

from typing import Unpack

from torch import Tensor

from rlloss._checks import check_range
from rlloss.output import Metric
from rlloss.policy import PolicyBatch, PolicyOptions
from rlloss.policy_surrogates import QuadraticPolicyLoss

__all__ = ["AStarPOLoss"]


class AStarPOLoss(QuadraticPolicyLoss):
    """A*-PO, optimal advantage regression, https://arxiv.org/abs/2505.20686.

    One answer per prompt and no critic: what a prompt is worth to the optimal policy is estimated once, from answers
    of the reference, and least squares fit beta log(pi / ref) to what the answer's reward adds to it.

        D_i = sum_t (l_t - ref_t)
        loss = (1/S) sum_i (beta D_i - A_i)^2
        dloss/dl_t = (2 beta / S) (beta D_i - A_i)

    The advantage is A = r - V*, with V* = `rlloss.optimal_value(rewards, group_ids, beta_1)` over answers of the
    reference (beta_1 is 0.5 there, far above this beta). On-policy at pi = ref the gradient is 2 beta times the policy
    gradient. Given per token, an advantage is one target per token, and the square is the mean of theirs. Base class:
    inputs, options and metrics (ratio and approx_kl are those to old); adds drift, the mean of D over the tokens.

    Args:
        beta: Temperature of the KL-regularised reward.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> l, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> AStarPOLoss(beta=0.5)(l, None, torch.tensor([3.0]), mask, ref_logprobs=l - 1).loss  # (0.5 * 2 - 3)^2
    tensor(4.)
    """

    reduction = "sequence_mean"
    anchor = "reference"

    def __init__(self, *, beta: float = 1e-3, **options: Unpack[PolicyOptions]) -> None:
        super().__init__(**options)
        check_range(self._who, "beta", beta, 0, open_low=True)
        self.beta = beta

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """(beta D - A)^2 at every token of the sequence, whose mean it is."""
        assert batch.drift is not None  # the door has made it
        return (self.beta * batch.drift - batch.advantages).square(), {}
