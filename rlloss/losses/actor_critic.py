"""Actor and critic under one objective."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlloss._checks import check_range
from rlloss._typing import Bool, Float
from rlloss.output import LossOutput, Metric
from rlloss.protocol import Exactness, Loss
from rlloss.reduce import Normalizer, check_normalizer

__all__ = ["ActorCriticLoss"]


class ActorCriticLoss(Loss):
    """A policy loss and the loss of its critic, equation 9 of https://arxiv.org/abs/1707.06347.

    One backward serves a value head on the policy's trunk; with a trunk of its own the two do not meet. The
    equation's entropy bonus is the policy loss's `entropy_coef`.

        loss = policy(logprobs, old_logprobs, advantages) + value_coef value(values, old_values, returns)
        dloss/dl_t is that of `policy`, dloss/dv_t is value_coef times that of `value`

    forward(logprobs, old_logprobs, advantages, loss_mask, values=..., old_values=..., returns=...), all aligned; other
    keywords (`ref_logprobs`, `entropy`, `kl`) go to the policy loss, `token_weights` to both. `normalizer` is
    `rlloss.Counts`. Metrics: those of both.

    Args:
        policy: Any policy loss, such as `rlloss.PPOLoss()`.
        value: The critic's loss, such as `rlloss.ValueLoss()`.
        value_coef: The paper's c_1.

    >>> l, v, mask = torch.tensor([[-1.0]]), torch.tensor([[0.0]]), torch.ones(1, 1, dtype=torch.bool)
    >>> from rlloss.losses.ppo import PPOLoss
    >>> from rlloss.losses.value import ValueLoss
    >>> loss_fn = ActorCriticLoss(policy=PPOLoss(), value=ValueLoss(), value_coef=0.1)
    >>> loss_fn(l, l, torch.tensor([1.0]), mask, values=v, old_values=v, returns=v + 2).loss  # -1 + 0.1 * 2
    tensor(-0.8000)
    """

    family = "policy"

    def __init__(self, *, policy: Loss, value: Loss, value_coef: float = 0.5) -> None:
        super().__init__()
        check_range(self._who, "value_coef", value_coef, 0)
        for name, part, family in (("policy", policy, "policy"), ("value", value, "value")):
            if getattr(part, "family", None) != family:
                raise ValueError(
                    f"{self._who}: {name} must be a loss of the family {family!r}, got {type(part).__name__} of the "
                    f"family {getattr(part, 'family', None)!r}"
                )
        self.policy, self.value, self.value_coef = policy, value, value_coef

    @property
    def exactness(self) -> Exactness:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the policy loss: a critic's loss is exact by Counts alone."""
        return self.policy.exactness

    @property
    def needs_reference(self) -> bool:
        """As the policy loss does."""
        return self.policy.needs_reference

    @property
    def needs_rollout(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As the policy loss does."""
        return self.policy.needs_rollout

    @property
    def needs_critic(self) -> bool:
        """Always."""
        return True

    def after_step(self, metrics: Mapping[str, Metric]) -> None:
        """As the policy loss does."""
        self.policy.after_step(metrics)

    def statistics(self, *inputs: Tensor | None, **keywords: Any) -> dict[str, Tensor]:
        """What the policy loss needs of the whole step under a split, where its exactness is `statistic`."""
        for name in ("values", "old_values", "returns"):
            keywords.pop(name, None)
        policy: Any = self.policy
        return policy.statistics(*inputs, **keywords)

    def forward(
        self,
        logprobs: Float[Tensor, "*tokens"],
        old_logprobs: Float[Tensor, "*tokens"] | None,
        advantages: Float[Tensor, "..."],
        loss_mask: Bool[Tensor, "*tokens"],
        *,
        values: Float[Tensor, "*tokens"],
        old_values: Float[Tensor, "*tokens"] | None,
        returns: Float[Tensor, "*tokens"],
        token_weights: Float[Tensor, "*tokens"] | None = None,
        normalizer: Normalizer | None = None,
        cu_seqlens: Tensor | None = None,
        **of_policy: Any,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        check_normalizer(self._who, normalizer, plain_number=False)
        shared: dict[str, Any] = {"token_weights": token_weights, "normalizer": normalizer, "cu_seqlens": cu_seqlens}
        actor = self.policy(logprobs, old_logprobs, advantages, loss_mask, **shared, **of_policy)
        critic = self.value(values, old_values, returns, loss_mask, **shared)
        return LossOutput(
            torch.stack([actor.loss, self.value_coef * critic.loss]).sum(), actor.metrics | critic.metrics
        )
