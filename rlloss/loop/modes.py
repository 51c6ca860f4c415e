"""Which modules are in training mode for as long as a context lasts: few for a gradient, none for a measurement."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["adapter_modules", "eval_mode", "gradient_mode"]


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """All modules are in eval mode for as long as the context lasts; those that were in training mode return to it.

    >>> layer = nn.Dropout()
    >>> with eval_mode(layer):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    # by their flags: model.train() would wake what was frozen in eval mode, and an override of it may do more
    awake = [module for model in models for module in model.modules() if module.training]
    for module in awake:
        module.training = False
    try:
        yield
    finally:
        for module in awake:
            module.training = True


@contextmanager
def gradient_mode(*models: nn.Module | None, dropout: bool = False) -> Iterator[None]:
    """Layers that compute their activations again in the backward do so only in training mode; dropout is a choice.

    It is that of the adapters where there are some, else that of all layers. Only these modules change, and for as long
    as the context lasts: their children stay in eval mode, and the rates of dropout that a layer which computes its
    activations again has itself are 0.

    >>> layer = nn.Dropout().eval()
    >>> with gradient_mode(layer, dropout=True):
    ...     layer.training
    True
    >>> layer.training
    False
    """
    modules = {module for model in models if model is not None for module in model.modules()}
    recomputing = {module for module in modules if _recomputes(module)}
    dropping = _dropping(modules) if dropout else set()
    woken = [module for module in recomputing | dropping if not module.training]
    rates = [rate for module in recomputing for rate in _dropout_rates(module)]
    try:
        for owner, name, _ in rates:
            setattr(owner, name, 0.0)
        for module in woken:
            module.training = True
        yield
    finally:
        for module in woken:
            module.training = False
        for owner, name, rate in rates:
            setattr(owner, name, rate)


def adapter_modules(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """PEFT's layers among the modules, each with all that it has beside the layer that it adapts."""
    layers = [module for module in modules if "base_layer" in dict(module.named_children())]
    beside = [child for layer in layers for name, child in layer.named_children() if name != "base_layer"]
    return {*layers, *(part for child in beside for part in child.modules())}


def _dropping(modules: set[nn.Module]) -> set[nn.Module]:
    # an adapted layer is asked itself too: DoRA, LoHa and LoKr drop out in their forward
    return adapter_modules(modules) or {module for module in modules if isinstance(module, nn.Dropout)}


def _recomputes(module: nn.Module) -> bool:
    """Whether transformers' checkpointing is switched on in this layer."""
    return getattr(module, "gradient_checkpointing", False) is True


def _dropout_rates(module: nn.Module) -> list[tuple[Any, str, float]]:
    """What a layer's forward gives to `F.dropout(..., training=self.training)`: numbers of its own, or its config's."""
    return [
        (owner, name, rate)
        for owner in (module, getattr(module, "config", None))
        for name, rate in getattr(owner, "__dict__", {}).items()
        if isinstance(rate, float) and (name in ("dropout", "layerdrop") or name.endswith("_dropout"))
    ]
