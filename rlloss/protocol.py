"""What every loss module is: keyword-only hyperparameters, tensors in, a LossOutput out."""

from collections.abc import Mapping
from typing import ClassVar, Literal

from torch import nn

from rlloss.output import Metric

__all__ = ["Exactness", "Family", "Loss"]

Exactness = Literal["sum", "statistic", "waist"]
Family = Literal[
    "policy",
    "value",
    "likelihood",
    "distillation",
    "preference",
    "unpaired",
    "reward",
    "ranking",
    "regression",
    "process",
]


class Loss(nn.Module):
    """Base of all losses. `forward` takes tensors, never changes state and returns a `LossOutput`.

    `family` names the signature of `forward`, so that a loop can call any member of it:
    `policy` (logprobs, old_logprobs, advantages, loss_mask), `value` (values, old_values, returns, loss_mask),
    `likelihood` (logprobs, loss_mask), `distillation` (divergence, loss_mask), `preference` (chosen_logps,
    rejected_logps, ref_chosen_logps, ref_rejected_logps), `unpaired` (logps, ref_logps, desirable; KTO's with kl=...),
    `reward` (chosen_rewards, rejected_rewards), `ranking` (rewards, mask), `regression` (rewards, targets), `process`
    (logits, labels, loss_mask).

    `exactness` says how micro-batches and ranks reproduce the loss, gradient and metrics of the whole step:
    `sum`: given the step's `Counts` as `normalizer`, parts add up; `statistic`: also given what the loss's
    `statistics` method computes from the whole step's detached numbers; `waist`: through `rlloss.waist_gradient`.
    """

    family: ClassVar[Family]
    exactness: ClassVar[Exactness] = "sum"
    needs_rollout: ClassVar[bool] = False  # whether `forward` takes the log-probs of the sampler

    @property
    def needs_reference(self) -> bool:
        """Whether `forward`, with these hyperparameters, needs the log-probs of a frozen reference."""
        return False

    @property
    def needs_critic(self) -> bool:
        """Whether `forward` also takes the values of a critic."""
        return False

    @property
    def extra_outputs(self) -> tuple[str, ...]:
        """What of `rlloss.TokenStats` `forward` takes by keyword besides the tensors of its family."""
        return ()

    def after_step(self, metrics: Mapping[str, Metric]) -> None:
        """Learns what a loss keeps running from the metrics of an update, merged over its parts; most keep nothing."""

    @property
    def _who(self) -> str:
        return type(self).__name__

    def extra_repr(self) -> str:
        """The hyperparameters, for `print(loss_fn)`."""
        return ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_") and k != "training")
