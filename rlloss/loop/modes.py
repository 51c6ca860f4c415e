"""What is in training mode while a gradient is made, in a model that is otherwise in eval mode."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["gradient_mode"]


@contextmanager
def gradient_mode(*models: nn.Module | None, dropout: bool = False) -> Iterator[None]:
    """Layers that compute their activations again in the backward do so only in training mode; dropout is a choice.

    Only these modules change, and for as long as the context lasts: their children stay in eval mode.

    >>> layer = nn.Dropout().eval()
    >>> with gradient_mode(layer, dropout=True):
    ...     layer.training
    True
    >>> layer.training
    False
    """
    modules = {module for model in models if model is not None for module in model.modules()}
    woken = [m for m in modules if _recomputes(m) or (dropout and isinstance(m, nn.Dropout))]
    woken = [module for module in woken if not module.training]
    for module in woken:
        module.training = True
    try:
        yield
    finally:
        for module in woken:
            module.training = False


def _recomputes(module: nn.Module) -> bool:
    """Whether transformers' checkpointing is switched on in this layer."""
    return getattr(module, "gradient_checkpointing", False) is True
