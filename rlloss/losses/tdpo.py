"""TDPO: token-level DPO, whose margin also counts how far the policy has drifted along both answers."""

from torch import Tensor

from rlloss._checks import check_flag, check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput
from rlloss.preference import PreferenceLoss, logistic_loss
from rlloss.reduce import Normalizer

__all__ = ["TDPOLoss"]


class TDPOLoss(PreferenceLoss):
    """TDPO2, https://arxiv.org/abs/2404.11999.

    DPO bounds the drift at the sampled tokens alone; derived per token, its margin also has the exact KL(ref || pi)
    of the whole vocabulary, summed along each answer, which balances the drift of the two.

        x = beta (h - alpha (K_r - K_c))
        loss = -log sigmoid(x)
        dloss/dh = beta (sigmoid(x) - 1)        dloss/dK_r = alpha beta (1 - sigmoid(x))

    forward(..., chosen_kl=..., rejected_kl=...): K_c and K_r, per-sequence sums `[B]` of `forward_kl` of
    `rlloss.linear_divergences` or `rlloss.token_divergences`. K_c carries no gradient: the rejected answer's drift is
    pulled towards the chosen one's. With `stop_chosen=False, alpha=1.0` it is TDPO1, where it does.

    Base class: the other inputs and the metrics, which are without K.

    Args:
        beta: Strength of the pull to the reference.
        alpha: Weight of the difference of drifts.
        stop_chosen: Whether K_c is without gradient.

    >>> import torch
    >>> pair, drift = (torch.tensor([-5.0]), torch.tensor([-6.0])), torch.tensor([2.0])
    >>> loss, metrics = TDPOLoss()(*pair, *pair, chosen_kl=drift, rejected_kl=drift)
    >>> round(loss.item(), 4)  # at the reference, or drifted alike: log 2
    0.6931
    """

    def __init__(self, *, beta: float = 0.1, alpha: float = 0.5, stop_chosen: bool = True) -> None:
        super().__init__(beta=beta)
        check_range(self._who, "alpha", alpha, 0)
        check_flag(self._who, "stop_chosen", stop_chosen)
        self.alpha, self.stop_chosen = alpha, stop_chosen

    def extra_repr(self) -> str:
        """The hyperparameters; the reference is always there."""
        return super().extra_repr().replace("reference_free=False, ", "")

    def forward(
        self,
        chosen_logps: Float[Tensor, " B"],
        rejected_logps: Float[Tensor, " B"],
        ref_chosen_logps: Float[Tensor, " B"] | None = None,
        ref_rejected_logps: Float[Tensor, " B"] | None = None,
        *,
        chosen_kl: Float[Tensor, " B"] | None = None,
        rejected_kl: Float[Tensor, " B"] | None = None,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        beta: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        if chosen_kl is None or rejected_kl is None:
            name = "chosen_kl" if chosen_kl is None else "rejected_kl"
            raise ValueError(
                f"{self._who}: needs {name}, got None; rlloss.sequence_sum(divergences.forward_kl, loss_mask) of "
                "rlloss.linear_divergences makes it"
            )
        logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
        chosen_kl = chosen_kl.detach() if self.stop_chosen else chosen_kl
        return self._output(logps, mask, weights, beta, normalizer, chosen_kl=chosen_kl, rejected_kl=rejected_kl)

    def answers_loss(
        self,
        chosen: Float[Tensor, " B"],
        rejected: Float[Tensor, " B"],
        beta: Tensor | float,
        chosen_kl: Tensor | float = 0.0,
        rejected_kl: Tensor | float = 0.0,
    ) -> Float[Tensor, " B"]:
        """The logistic loss of the margin less the difference of drifts."""
        return logistic_loss(beta * (chosen - rejected - self.alpha * (rejected_kl - chosen_kl)))
