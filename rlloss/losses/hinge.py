"""The hinge loss of SLiC-HF and RSO: a pair that wins by its margin is left alone."""

from torch import Tensor

from rlloss._typing import Float
from rlloss.preference_margins import MarginLoss

__all__ = ["HingeLoss"]


class HingeLoss(MarginLoss):
    """The hinge loss of RSO, https://arxiv.org/abs/2309.06657, and of SLiC-HF, https://arxiv.org/abs/2305.10425.

    Where DPO pushes every pair for ever, a support vector machine's loss stops at a margin of 1 / beta nats.

        loss = max(0, 1 - beta h)
        dloss/dh = -beta where beta h < 1, else 0

    This is RSO's, on log-ratios. SLiC-HF has no reference and its margin in nats:
    max(0, delta - h) = delta * HingeLoss(beta=1 / delta, reference_free=True); its regulariser is a likelihood, joined
    by `rlloss.combine`.

    Base class: options; `beta` is the inverse of the margin.

    >>> import torch
    >>> chosen, rejected, ref = torch.tensor([-3.0]), torch.tensor([-6.0]), torch.tensor([-5.0])
    >>> HingeLoss(beta=0.25)(chosen, rejected, ref, ref).loss  # h = 3 of 4
    tensor(0.2500)
    """

    def pair_loss(self, h: Float[Tensor, " B"], beta: Tensor | float) -> Float[Tensor, " B"]:
        """What beta h lacks of 1."""
        return (1 - beta * h).relu()
