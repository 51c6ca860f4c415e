"""beta-DPO: DPO whose strength follows how far apart a batch's answers are."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput, Metric
from rlloss.preference import logistic_loss
from rlloss.preference_margins import StepStatisticLoss
from rlloss.reduce import Normalizer

__all__ = ["BetaDPOLoss"]


class BetaDPOLoss(StepStatisticLoss):
    """beta-DPO, https://arxiv.org/abs/2407.08639, at the level of batches.

    Pairs that are hard to tell apart want a small beta, which learns boldly; pairs far apart a large one, which keeps
    to the reference. One beta for the step, from its mean margin M against a running mean M_0:

        beta_step = max(min_beta, beta (1 + alpha (M - M_0))),   M = mean h, without gradient
        loss = -log sigmoid(beta_step h)
        dloss/dh = beta_step (sigmoid(beta_step h) - 1)

    M_0 is the buffer `running_margin`, 0 at first, which `update(M)` moves by a share 1 - momentum: loops do so after
    a step (`after_step`), the paper's code before it. M is in nats, as there. `step_margin=` is M under a split (base
    class). The paper also leaves a share of pairs out, at random by how unusual their h is: pass that as `mask`.

    Base class of that: inputs, options and metrics, whose margin and rewards are of beta_step; adds beta and
    step_margin. It takes no beta per pair.

    Args:
        beta: Strength of the pull to the reference where M is M_0.
        alpha: Share of beta per nat of M - M_0.
        momentum: Share that M_0 keeps at an update.
        min_beta: The least beta.
        reference_free: Takes the reference as uniform.

    >>> chosen, rejected, ref = torch.tensor([3.0, 1.0]), torch.zeros(2), torch.zeros(2)
    >>> loss_fn = BetaDPOLoss(beta=0.25, alpha=0.5)
    >>> float(loss_fn(chosen, rejected, ref, ref).metrics["beta"])  # 0.25 (1 + 0.5 * 2)
    0.5
    >>> loss_fn.update(loss_fn.statistics(chosen, rejected, ref, ref)["step_margin"])
    >>> round(float(loss_fn.running_margin), 4)  # 0.9 * 0 + 0.1 * 2
    0.2
    """

    statistic = "step_margin"
    running_margin: Tensor

    def __init__(
        self,
        *,
        beta: float = 0.1,
        alpha: float = 0.6,
        momentum: float = 0.9,
        min_beta: float = 1e-3,
        reference_free: bool = False,
    ) -> None:
        super().__init__(beta=beta, reference_free=reference_free)
        check_range(self._who, "alpha", alpha, 0)
        check_range(self._who, "momentum", momentum, 0, 1)
        check_range(self._who, "min_beta", min_beta, 0, open_low=True)
        self.alpha, self.momentum, self.min_beta = alpha, momentum, min_beta
        self.register_buffer("running_margin", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, step_margin: Tensor | float) -> None:
        """Moves M_0 towards the step's mean margin; once per optimizer step."""
        self.running_margin.mul_(self.momentum).add_((1 - self.momentum) * step_margin)

    def after_step(self, metrics: Mapping[str, Metric]) -> None:
        """`update` with the M that a step has left there."""
        self.update(metrics["step_margin"].value.to(self.running_margin))

    def of_pair(self, chosen: Tensor, rejected: Tensor, beta: Tensor | float) -> Tensor:
        """The margin of a pair."""
        return chosen - rejected

    def forward(
        self,
        chosen_logps: Float[Tensor, " B"],
        rejected_logps: Float[Tensor, " B"],
        ref_chosen_logps: Float[Tensor, " B"] | None = None,
        ref_rejected_logps: Float[Tensor, " B"] | None = None,
        *,
        step_margin: Tensor | float | None = None,
        mask: Bool[Tensor, " B"] | None = None,
        weights: Float[Tensor, " B"] | None = None,
        beta: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        if beta is not None:
            raise ValueError(f"{self._who}: sets beta by the step's mean margin; pass no beta, or use DPOLoss")
        logps = chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
        step_margin = self._of_step(step_margin, normalizer, logps, mask=mask, weights=weights)
        apart = step_margin - self.running_margin.to(step_margin)
        strength = (self.beta * (1 + self.alpha * apart)).clamp(min=self.min_beta)
        of_pairs = strength.expand_as(chosen_logps)
        step = {"beta": strength, "step_margin": step_margin}
        return self._output(logps, mask, weights, of_pairs, normalizer, step)

    def pair_loss(self, h: Float[Tensor, " B"], beta: Tensor | float) -> Float[Tensor, " B"]:
        """The logistic loss of beta h."""
        return logistic_loss(beta * h)
