"""SPPO: self-play preference optimisation, which regresses log-ratios on win rates."""

from torch import Tensor

from rlloss._typing import Bool, Float
from rlloss.output import LossOutput
from rlloss.preference import PreferenceLoss
from rlloss.reduce import Normalizer

__all__ = ["SPPOLoss"]


class SPPOLoss(PreferenceLoss):
    """SPPO, https://arxiv.org/abs/2405.00675; `beta` is the inverse of its eta.

    One step of multiplicative weights towards the Nash equilibrium, as a regression: an answer's log-ratio is what it
    wins over a coin. Each answer has a target, so that the chosen one's likelihood cannot sink.

        loss = (c - (P_c - 1/2) / beta)^2 + (r - (P_r - 1/2) / beta)^2
        dloss/dc = 2 (c - (P_c - 1/2) / beta)        dloss/dr = 2 (r - (P_r - 1/2) / beta)

    P_c and P_r are `chosen_win_rate` and `rejected_win_rate` per pair, in [0, 1], against the policy that sampled, as
    a preference model estimates them. Left out they are 1 and 0: the hard labels of pairs without such a model.

    Base class: inputs, options and metrics.

    >>> import torch
    >>> pair = torch.tensor([-5.0]), torch.tensor([-6.0])
    >>> SPPOLoss(beta=0.25)(*pair, *pair).loss  # both are 2 nats from their targets
    tensor(8.)
    """

    def forward(
        self,
        chosen_logps: Float[Tensor, " B"],
        rejected_logps: Float[Tensor, " B"],
        ref_chosen_logps: Float[Tensor, " B"] | None = None,
        ref_rejected_logps: Float[Tensor, " B"] | None = None,
        *,
        chosen_win_rate: Float[Tensor, " B"] | None = None,
        rejected_win_rate: Float[Tensor, " B"] | None = None,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        beta: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        return self._output(
            (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps),
            mask,
            weights,
            beta,
            normalizer,
            chosen_win_rate=None if chosen_win_rate is None else chosen_win_rate.detach(),
            rejected_win_rate=None if rejected_win_rate is None else rejected_win_rate.detach(),
        )

    def answers_loss(
        self,
        chosen: Float[Tensor, " B"],
        rejected: Float[Tensor, " B"],
        beta: Tensor | float,
        chosen_win_rate: Tensor | float = 1.0,
        rejected_win_rate: Tensor | float = 0.0,
    ) -> Float[Tensor, " B"]:
        """The squared distances of both log-ratios from their targets."""
        above = (chosen - (chosen_win_rate - 0.5) / beta).square()
        return above + (rejected - (rejected_win_rate - 0.5) / beta).square()
