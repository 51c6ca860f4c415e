"""Adapters of PEFT: a policy gets them, and its reference is the policy without them, no second copy of the weights."""

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["WithoutAdapters", "with_adapters"]


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
        _check_frozen(model)
        self._model = [model]  # in a list, since it is no part of this module: its state is the policy's

    @property
    def model(self) -> Any:
        """The policy."""
        return self._model[0]


def with_adapters(model: Any, config: Any, *, lora: Mapping[str, Any], quantized: bool) -> Any:
    """The causal LM with new adapters, by `peft.get_peft_model`.

    Args:
        config: One of peft's; None for LoRA.
        lora: The options of LoRA, of peft's LoraConfig.
        quantized: Whether the model was loaded in 4 or 8 bits.
    """
    import peft

    if config is None:
        config = peft.LoraConfig(**lora, task_type="CAUSAL_LM")
    if quantized:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return peft.get_peft_model(model, config)


def _check_frozen(model: Any) -> None:
    """Raises ValueError where something trains that `disable_adapter` leaves on, so that the reference would move."""
    adapters = set(model.peft_config)
    left_on = [
        name for name, p in model.named_parameters() if p.requires_grad and not adapters.intersection(name.split("."))
    ]
    if left_on:
        raise ValueError(
            f"WithoutAdapters: {len(left_on)} trainable parameters of the model are no adapters, {left_on[0]!r} first, "
            "so that the model without its adapters moves too (as by bias='all' or 'lora_only' of a peft config); "
            "take bias='none', or a copy as the reference: reference=frozen_copy(model)"
        )
