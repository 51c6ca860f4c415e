"""IPO: preferences as a squared distance of the margin from a target."""

from torch import Tensor

from rlloss._typing import Float
from rlloss.preference_margins import MarginLoss

__all__ = ["IPOLoss"]


class IPOLoss(MarginLoss):
    """IPO, equation 17 of https://arxiv.org/abs/2310.12036; `beta` is its tau.

    The margin is pulled to a finite target instead of being pushed for ever: preferences that are nearly certain do
    not carry the policy away from the reference.

        loss = (h - 1 / (2 beta))^2
        dloss/dh = 2 (h - 1 / (2 beta))

    The paper's h is made of sequence sums, which is the default. The other published reading takes means per token,
    so that the target is one of nats per token: `length_normalized=True`, and then every input is a mean
    (`rlloss.sequence_mean_logps`). The formula is the same; a beta for sums is none for means.

    Base class: options; `beta` is half the inverse of the margin that is aimed at.

    >>> import torch
    >>> chosen, rejected, ref = torch.tensor([-3.0]), torch.tensor([-6.0]), torch.tensor([-5.0])
    >>> IPOLoss(beta=0.1)(chosen, rejected, ref, ref).loss  # h = 3, and the target is 5
    tensor(4.)
    """

    def pair_loss(self, h: Float[Tensor, " B"], beta: Tensor | float) -> Float[Tensor, " B"]:
        """The squared distance of h from 1 / (2 beta)."""
        return (h - 1 / (2 * beta)).square()
