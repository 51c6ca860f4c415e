"""What every loss module is: keyword-only hyperparameters, tensors in, a LossOutput out."""

from typing import ClassVar, Literal

from torch import nn

__all__ = ["Exactness", "Loss"]

Exactness = Literal["sum", "statistic", "waist"]


class Loss(nn.Module):
    """Base of all losses. `forward` takes tensors, never changes state and returns a `LossOutput`.

    `exactness` says how micro-batches and ranks reproduce the loss, gradient and metrics of the whole step:
    `sum`: given the step's `Counts` as `normalizer`, parts add up; `statistic`: also given what the loss's
    `statistics` method computes from the whole step's detached numbers; `waist`: through `rlloss.waist_gradient`.
    """

    exactness: ClassVar[Exactness] = "sum"

    @property
    def _who(self) -> str:
        return type(self).__name__

    def extra_repr(self) -> str:
        """The hyperparameters, for `print(loss_fn)`."""
        return ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_") and k != "training")
