"""A2C: the policy gradient of an actor whose critic makes the advantages."""

from typing import Any

from rlloss.advantages.running import AdaptiveEntropyController
from rlloss.policy_surrogates import WeightedPolicyLoss

__all__ = ["A2CLoss"]


class A2CLoss(WeightedPolicyLoss):
    """A2C, the synchronous advantage actor-critic of https://arxiv.org/abs/1602.01783.

    One update per rollout, so neither ratio nor clip; the advantages are those of a critic (`rlloss.gae`), and an
    entropy bonus, on by default as in the paper, keeps the policy from settling early.

        loss = -(1/N) sum_t (A_t l_t + entropy_coef H_t)    (N trained tokens)
        dloss/dl_t = -(1/N) A_t,    dloss/dH_t = -(1/N) entropy_coef

    The critic's loss joins by `rlloss.ActorCriticLoss(policy=A2CLoss(), value=...)`. Base class: inputs, options and
    metrics; `old_logprobs` enters the metrics and the KL term alone.

    Args:
        entropy_coef: Weight of the entropy bonus, which needs `entropy`; 0 for none.
        **options: The others of `rlloss.PolicyOptions`.

    >>> import torch
    >>> l, mask = torch.tensor([[-1.0, -2.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> A2CLoss()(l, None, torch.tensor([[1.0, -2.0]]), mask, entropy=-3 * l).loss  # (1 - 4) / 2 - 0.01 * (3 + 6) / 2
    tensor(-1.5450)
    """

    reduction = "token_mean"

    def __init__(self, *, entropy_coef: float | AdaptiveEntropyController = 0.01, **options: Any) -> None:
        super().__init__(entropy_coef=entropy_coef, **options)
