"""SAPO: a soft gate in the place of the clip."""

from typing import Unpack

import torch
from torch import Tensor

from rlloss._checks import check_range
from rlloss.output import Mean, Metric
from rlloss.policy import PolicyBatch, PolicyLoss, PolicyOptions

__all__ = ["SAPOLoss"]


class SAPOLoss(PolicyLoss):
    """SAPO, equations 5 and 6 of https://arxiv.org/abs/2511.20347.

    Where PPO's clip is a cliff, the token's gradient fades smoothly as its ratio leaves 1, to either side; faster
    where A <= 0, because pushing a token down lifts all others of the vocabulary.

        loss = -(1/S) sum_i (1/L_i) sum_t (4/tau) sigmoid(tau (r_t - 1)) A_t    (tau_pos where A_t > 0, else tau_neg)
        dloss/dl_t = -(1/S) (1/L_i) 4 p (1 - p) r_t A_t    with p = sigmoid(tau (r_t - 1))

    At r = 1 the gradient is the policy gradient whatever tau, and the value is -(2/tau) A. Base class: inputs, options
    and metrics; adds gate, the mean of 4 p (1 - p): the share of the gradient that is left.

    Args:
        tau_pos: How fast the gate closes where A > 0.
        tau_neg: How fast the gate closes where A <= 0.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> logprobs, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> SAPOLoss()(logprobs, logprobs, torch.tensor([0.5]), mask).loss
    tensor(-1.)
    """

    reduction = "sequence_mean"

    def __init__(self, *, tau_pos: float = 1.0, tau_neg: float = 1.05, **options: Unpack[PolicyOptions]) -> None:
        super().__init__(**options)
        check_range(self._who, "tau_pos", tau_pos, 0, open_low=True)
        check_range(self._who, "tau_neg", tau_neg, 0, open_low=True)
        self.tau_pos, self.tau_neg = tau_pos, tau_neg

    def surrogate(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """The gated advantage per token."""
        tau = torch.where(batch.advantages > 0, torch.full_like(batch.ratio, self.tau_pos), self.tau_neg)
        p = torch.sigmoid(tau * (batch.ratio - 1))
        return -4 / tau * p * batch.advantages, {"gate": Mean.of(4 * p * (1 - p), batch.loss_mask)}
