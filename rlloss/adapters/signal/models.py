"""Models by name or folder: what a run trains, and the frozen references of its losses, each loaded once."""

import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlloss.loop.scalar_folder import load_scalar_model
from rlloss.loop.session import Session
from rlloss.scalar import ScalarModel

__all__ = ["References", "load_language_model", "load_reward_model", "load_tokenizer"]

_HEAD = "scalar_head.safetensors"  # what a reward model's folder holds beside its backbone


def load_language_model(name: str | Path, **options: Any) -> nn.Module:
    """A causal LM from a folder or the hub."""
    if (Path(name) / _HEAD).exists():
        raise ValueError(
            f"{name} holds a reward model, which has no language-model head; pass create_run(..., reward_model=True)"
        )
    return AutoModelForCausalLM.from_pretrained(name, **options)


def load_reward_model(name: str | Path, **options: Any) -> ScalarModel:
    """A reward model that was saved as one, or a new one on the backbone of a causal LM."""
    if (Path(name) / _HEAD).exists():
        return load_scalar_model(name, **options)
    return ScalarModel(load_language_model(name, **options), bias=False)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a folder or hub name."""
    return AutoTokenizer.from_pretrained(name)


class References:
    """Frozen models by name, each in memory once per dtype and device, whatever the number of runs that ask."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, torch.dtype, torch.device], nn.Module] = {}
        self._lock = threading.Lock()

    def find(self, who: str, reference: str | Path | nn.Module, session: Session) -> nn.Module:
        """The reference for a session's model: of its vocabulary, in its dtype and on its device."""
        if isinstance(reference, nn.Module):
            model = reference
        else:
            like = next(session.model.parameters())
            key = (str(reference), like.dtype, like.device)
            with self._lock:
                if key not in self._models:
                    loaded: Any = load_language_model(reference, dtype=like.dtype)
                    self._models[key] = loaded.to(like.device).requires_grad_(False).eval()
                model = self._models[key]
        sizes = [_vocab_size(m) for m in (session.model, model)]
        if None not in sizes and sizes[0] != sizes[1]:
            raise ValueError(
                f"{who}: reference_model has a vocabulary of {sizes[1]} tokens and the run's model one of {sizes[0]}; "
                "a reference must read the same tokens"
            )
        return model


def _vocab_size(model: Any) -> int | None:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "vocab_size", None)
