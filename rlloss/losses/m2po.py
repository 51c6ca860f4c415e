"""M2PO: stale answers teach, but for the few tokens that make the ratios vary."""

from typing import Unpack

import torch
from torch import Tensor

from rlloss._checks import check_range
from rlloss.output import Metric
from rlloss.policy import PolicyBatch, PolicyOptions
from rlloss.policy_surrogates import SelectivePolicyLoss

__all__ = ["M2POLoss"]


class M2POLoss(SelectivePolicyLoss):
    """Second-moment trust policy optimisation, equations 4 and 5 and algorithm 1 of https://arxiv.org/abs/2510.01161.

    A clip of every ratio cuts most where the answers are old, and of those the tokens of high entropy, which teach the
    most. This one bounds the step's second moment of the log-ratio and cuts no more tokens than that takes.

        d_t = l_t - old_t
        T = the tokens with A d > 0, where PPO's clip could bind
        M_t = 0 for the tokens of T of largest d^2, as many as it takes for mean_{T, M = 1} d^2 <= threshold; else 1
        loss = -(1/N) sum_t M_t r_t A_t
        dloss/dl_t = -(1/N) M_t r_t A_t

    `old_logprobs` are those of the policy that wrote the answers. The tokens with M = 0 are `selected`: under a split
    pass the whole step's, `statistics(...)["selected"]`. N counts them too, as in the paper. Base class: inputs,
    options and metrics; adds selected_frac, the share that is cut.

    Args:
        threshold: Largest second moment of the tokens of T that are kept.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> old, mask = torch.full((1, 3), -2.0), torch.ones(1, 3, dtype=torch.bool)
    >>> new = old + torch.tensor([[0.1, 0.9, -0.9]])
    >>> M2POLoss().statistics(new, old, torch.tensor([1.0]), mask)["selected"]  # the last one moves towards A
    tensor([[False,  True, False]])
    """

    reduction = "token_mean"

    def __init__(self, *, threshold: float = 0.04, **options: Unpack[PolicyOptions]) -> None:
        super().__init__(**options)
        check_range(self._who, "threshold", threshold, 0)
        self.threshold = threshold

    def selection(self, batch: PolicyBatch, counted: Tensor) -> Tensor:
        """The tokens with M = 0."""
        candidates = counted & (batch.advantages.sign() * batch.log_ratio > 0)
        ascending, order = torch.where(candidates, batch.log_ratio, torch.inf).flatten().double().square().sort()
        # of a token and all smaller ones: what is left once the larger ones are gone
        moment = ascending.cumsum(0) / torch.arange(1, len(order) + 1, device=order.device)
        is_cut = torch.empty_like(order, dtype=torch.bool).scatter(0, order, moment > self.threshold)
        return is_cut.view_as(counted) & candidates

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """-r A where M = 1."""
        assert batch.selected is not None  # forward has chosen
        return torch.where(batch.selected, 0, -batch.ratio * batch.advantages), {}
