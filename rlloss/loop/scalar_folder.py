"""Reward models and critics as folders: the backbone as transformers writes it, the head beside it."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlloss.loop.state import restore_model
from rlloss.scalar import ScalarModel

__all__ = ["load_scalar_model", "save_scalar_model"]

_HEAD = "scalar_head.safetensors"


def save_scalar_model(model: ScalarModel, folder: str | Path) -> Path:
    """Writes the backbone by its own `save_pretrained`, and the head as scalar_head.safetensors."""
    backbone: Any = model.backbone
    backbone.save_pretrained(folder)
    save_file({name: x.contiguous() for name, x in model.head.state_dict().items()}, Path(folder) / _HEAD)
    return Path(folder)


def load_scalar_model(folder: str | Path, **options: Any) -> ScalarModel:
    """Reads what `save_scalar_model` wrote.

    Args:
        folder: Holds config.json, the backbone's safetensors and scalar_head.safetensors.
        **options: Of `AutoModelForCausalLM.from_pretrained`, such as `dtype`.
    """
    path = Path(folder) / _HEAD
    if not path.exists():
        raise ValueError(
            f"load_scalar_model: {folder} has no {_HEAD}, which Session.save_model writes of a ScalarModel"
        )
    head = load_file(path)
    model = ScalarModel(AutoModelForCausalLM.from_pretrained(folder, **options), bias="bias" in head)
    restore_model(model.head, head)
    return model
