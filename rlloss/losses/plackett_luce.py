"""Plackett-Luce: a reward model from ranked lists."""

import torch
from torch import Tensor

from rlloss._checks import check_full_precision, check_like, check_mask
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput, Mean, Moments
from rlloss.preference import mean_of_rows
from rlloss.protocol import Loss
from rlloss.reduce import Normalizer, check_normalizer

__all__ = ["PlackettLuceLoss"]


class PlackettLuceLoss(Loss):
    """Plackett-Luce, https://doi.org/10.2307/2346567, over ranked lists: ListMLE, https://doi.org/10.1145/1390156.1390306.

    A ranking is the best of all answers, then the best of the others, and so on: one likelihood for the list, where its
    K (K - 1) / 2 pairs would be counted as if they were independent. A list of two has the loss of Bradley and Terry.

        loss_i = -sum_k log(exp(r_k) / sum_{j >= k} exp(r_j))        over the answers of list i, the best first
        dloss_i/dr_j = sum_{k <= j} exp(r_j) / sum_{l >= k} exp(r_l) - 1

    forward(rewards, mask): one reward per answer `[B, K]`, float32 or float64, in the order of the ranking; False in
    `mask` stands where a list is shorter, or for an answer that was not ranked. The mean is over lists with an answer.

    Optional: `weights` (scale a list `[B]`; 0 rejects it and keeps the denominator), `normalizer` (`rlloss.count` of
    the mask, summed over the step's micro-batches and ranks).

    Metrics: accuracy (share of neighbours in rank with rewards in that order), margin (their difference, with
    margin_std), reward.

    >>> rewards, mask = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[True, True, False]])
    >>> loss, metrics = PlackettLuceLoss()(rewards, mask)
    >>> round(loss.item(), 4)  # -log sigmoid(2)
    0.1269
    """

    family = "ranking"

    def forward(
        self,
        rewards: Float[Tensor, "B K"],
        mask: Bool[Tensor, "B K"],
        *,
        weights: Float[Tensor, " B"] | None = None,
        normalizer: Normalizer | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        check_normalizer(self._who, normalizer)
        check_mask(self._who, "mask", mask, ndim=(2,))
        check_like(self._who, "rewards", rewards, "mask", mask)
        lists = mask.any(-1)
        if weights is not None:
            check_full_precision(self._who, "weights", weights)
            if weights.shape != lists.shape:
                raise ValueError(
                    f"{self._who}: weights must be one number per list, {list(lists.shape)}, got {list(weights.shape)}"
                )
        order = torch.argsort((~mask).to(torch.uint8), dim=-1, stable=True)  # what counts comes first, in its order
        rewards, mask = rewards.gather(-1, order), mask.gather(-1, order)
        # a list of weight 0 enters as zeros, whatever stands there
        kept = rewards if weights is None else torch.where((weights.detach() != 0)[:, None], rewards, 0)
        difference = rewards[:, :-1] - rewards[:, 1:]
        return LossOutput(
            mean_of_rows(lambda: _list_loss(kept, mask), (), lists, weights, normalizer),
            {
                "accuracy": Mean.of((difference > 0).to(difference.dtype), mask[:, 1:]),
                "margin": Moments.of(difference, mask[:, 1:]),
                "reward": Mean.of(rewards, mask),
            },
        )


def _list_loss(rewards: Tensor, mask: Tensor) -> Tensor:
    """The negative log-likelihood of every list, whose answers stand before its padding."""
    # finite, so that no difference of two of them is NaN in the backward pass
    absent = torch.finfo(rewards.dtype).min
    of_the_rest = torch.where(mask, rewards, absent).flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(mask, of_the_rest - rewards, 0).sum(-1)
