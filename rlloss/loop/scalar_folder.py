"""Reward models and critics as folders: the backbone as transformers writes it, the head beside it."""

import copy
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from rlloss.loop.pretrained import load_causal_lm
from rlloss.scalar import ScalarModel

__all__ = ["holds_scalar_model", "load_scalar_model", "save_scalar_model"]

_HEAD = "scalar_head.safetensors"


def save_scalar_model(model: ScalarModel, folder: str | Path) -> Path:
    """Writes the backbone by its own `save_pretrained`, and the head as scalar_head.safetensors.

    Adapters of PEFT are merged into the weights that they adapt, of a copy: the folder is that of an ordinary model.
    """
    backbone: Any = _merged(model.backbone)
    backbone.save_pretrained(folder)
    save_file({name: x.contiguous() for name, x in model.head.state_dict().items()}, Path(folder) / _HEAD)
    return Path(folder)


def holds_scalar_model(folder: str | Path) -> bool:
    """Whether a folder is one that `save_scalar_model` wrote."""
    return (Path(folder) / _HEAD).exists()


def load_scalar_model(folder: str | Path, **options: Any) -> ScalarModel:
    """Reads what `save_scalar_model` wrote.

    Args:
        folder: Holds config.json, the backbone's safetensors and scalar_head.safetensors.
        **options: Of `AutoModelForCausalLM.from_pretrained`, such as `dtype`; the head is float32 at least.
    """
    if not holds_scalar_model(folder):
        raise ValueError(
            f"load_scalar_model: {folder} has no {_HEAD}, which Session.save_model writes of a ScalarModel"
        )
    head = load_file(Path(folder) / _HEAD)
    loaded = load_causal_lm(folder, output_loading_info=True, **options)
    model, info = ScalarModel(loaded[0], bias="bias" in head), loaded[1]
    known = {name for name, _ in model.backbone.named_parameters()}
    missing = sorted(name for name in info["missing_keys"] if name.split(".", 1)[-1] in known or name in known)
    if missing:
        raise ValueError(f"load_scalar_model: {folder} lacks {len(missing)} of the backbone's weights: {missing[:3]}")
    model.head.load_state_dict(head)
    return model


def _merged(backbone: nn.Module) -> nn.Module:
    """The backbone, or where layers are adapted a copy whose own weights are what the adapted layers compute."""
    if not any(hasattr(module, "base_layer") for module in backbone.modules()):
        return backbone
    merged = copy.deepcopy(backbone)
    for name, module in list(merged.named_modules()):
        if hasattr(module, "base_layer"):
            layer: Any = module
            layer.merge()
            merged.set_submodule(name, layer.get_base_layer())
    return merged
