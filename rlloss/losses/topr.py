"""TOPR: supervised on what was good, truncated importance sampling on what was not."""

from typing import Unpack

import torch
from torch import Tensor

from rlloss._checks import check_range
from rlloss.output import Mean, Metric
from rlloss.policy import PolicyBatch, PolicyOptions
from rlloss.policy_surrogates import WeightedPolicyLoss

__all__ = ["TOPRLoss"]


class TOPRLoss(WeightedPolicyLoss):
    """Tapered off-policy REINFORCE, equations 7 and 8 of https://arxiv.org/abs/2503.14286.

    A good answer is worth learning however unlikely it has become; a bad one, pushed down whether or not it is still
    likely, would drive its probability to 0 and the policy into the ground, so its weight tapers with its probability.

        w_i = exp(sum_t (l_t - old_t))
        v_t = clip(w_i, positive_min, positive_max) where A_t >= 0, clip(w_i, negative_min, negative_max) where A_t < 0
        loss = -(1/S) sum_i sum_t sg[v_t] A_t l_t
        dloss/dl_t = -(1/S) v_t A_t

    `old_logprobs` are those of the policy that wrote the answers. Other methods are other bounds (positive_min,
    positive_max, negative_min, negative_max), as table 1 of the paper has them: naive REINFORCE (1, 1, 1, 1),
    importance sampling (0, inf, 0, inf), TIS (0, 1, 0, 1), supervised on the good answers alone (1, 1, 0, 0). The
    paper's runs divide each answer's loss by its length: `token_weights` of 1/L_i do so.

    Base class: inputs, options and metrics (ratio is the one before the clip; the KL term keeps each token's own);
    adds weight, the mean weight, and clip_frac, the share whose weight is clipped among the tokens with A < 0.

    Args:
        positive_min: Least weight where A >= 0.
        positive_max: Largest weight where A >= 0.
        negative_min: Least weight where A < 0; above 0 a bad answer is pushed down for ever.
        negative_max: Largest weight where A < 0.
        **options: `rlloss.PolicyOptions`.

    >>> import torch
    >>> l, mask = torch.tensor([[-1.0], [-1.0]]), torch.ones(2, 1, dtype=torch.bool)
    >>> old = l + torch.tensor([[0.5], [2.0]]).log()  # their weights: 2 held at 1, and 0.5
    >>> TOPRLoss()(l, old, torch.tensor([1.0, -1.0]), mask).loss  # (1 - 0.5) / 2
    tensor(0.2500)
    """

    reduction = "sequence_sum"
    ratio_level = "sequence"

    def __init__(
        self,
        *,
        positive_min: float = 1.0,
        positive_max: float = 1.0,
        negative_min: float = 0.0,
        negative_max: float = 1.0,
        **options: Unpack[PolicyOptions],
    ) -> None:
        super().__init__(**options)
        check_range(self._who, "positive_min", positive_min, 0)
        check_range(self._who, "positive_max", positive_max, positive_min)
        check_range(self._who, "negative_min", negative_min, 0)
        check_range(self._who, "negative_max", negative_max, negative_min)
        self.positive_min, self.positive_max = positive_min, positive_max
        self.negative_min, self.negative_max = negative_min, negative_max

    def weights(self, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
        """The ratio of the sequence, held within the bounds of the advantage's sign."""
        ratio, is_negative = batch.ratio.detach(), batch.advantages < 0
        tapered = ratio.clamp(self.negative_min, self.negative_max)
        weights = torch.where(is_negative, tapered, ratio.clamp(self.positive_min, self.positive_max))
        return weights, {
            "weight": Mean.of(weights, batch.loss_mask),
            "clip_frac": Mean.of((tapered != ratio).to(ratio.dtype), batch.loss_mask & is_negative),
        }
