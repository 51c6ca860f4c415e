"""The reference of an adapted policy is the policy without its adapters: no second copy of the weights."""

from typing import Any

from torch import nn

__all__ = ["WithoutAdapters"]


class WithoutAdapters(nn.Module):
    """A PEFT model with its adapters off, as a session's `reference`.

    Args:
        model: The policy itself, as `peft.get_peft_model` gave it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if not hasattr(model, "disable_adapter"):
            raise ValueError(
                f"WithoutAdapters: needs a model with adapters, got {type(model).__name__}; "
                "peft.get_peft_model makes one, and frozen_copy(model) is the reference of any other"
            )
        self._model = [model]  # in a list, since it is no part of this module: its state is the policy's

    @property
    def model(self) -> Any:
        """The policy."""
        return self._model[0]
