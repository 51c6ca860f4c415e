"""Models and tokenizers of transformers by name or folder: the one place that loads them."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from rlloss._checks import nearest

__all__ = [
    "architecture",
    "check_quantization",
    "default_device",
    "load_causal_lm",
    "load_classifier",
    "load_tokenizer",
    "own_tokenizer",
    "quantization_config",
]


def default_device() -> torch.device:
    """Where a model that is loaded here goes, if nobody says.

    >>> default_device().type in ("cuda", "cpu")
    True
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_causal_lm(name: str | Path, **options: Any) -> Any:
    """A causal LM, by transformers' `from_pretrained`."""
    return AutoModelForCausalLM.from_pretrained(name, **options)


def load_classifier(name: str | Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A sequence classifier, and what was found of its weights."""
    return AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True, **options)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a folder or hub name."""
    return AutoTokenizer.from_pretrained(name)


def own_tokenizer(who: str, source: str | Path | nn.Module) -> Any:
    """The tokenizer of the folder or hub name of a model; a ValueError for a loaded model, which holds none."""
    if isinstance(source, nn.Module):
        raise ValueError(f"{who}: a loaded {type(source).__name__} needs its tokenizer, got None; pass tokenizer=")
    return load_tokenizer(source)


def architecture(name: str | Path) -> str:
    """What kind of model a folder or hub name holds, as its config has it."""
    return (AutoConfig.from_pretrained(name).architectures or ["model of an unknown kind"])[0]


def check_quantization(who: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that transformers' BitsAndBytesConfig has not, and would drop without a word."""
    known = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    for name in options:
        if name not in known:
            raise ValueError(f"{who}: quantization has no option {name!r}{nearest(name, known)}; known: {known}")


def quantization_config(options: Mapping[str, Any]) -> BitsAndBytesConfig:
    """`{"load_in_4bit": True}` and other options of BitsAndBytesConfig, as `from_pretrained` wants them."""
    return BitsAndBytesConfig(**options)
