"""Copies of a model that take no gradient."""

import copy

import torch
from torch import nn

__all__ = ["frozen_copy"]


def frozen_copy(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy that takes no gradient: the usual reference, or a sampler in half precision.

    `dtype` is that of the parameters; buffers stay as they are, since rotary frequencies lose positions in bfloat16.

    >>> frozen_copy(nn.Linear(2, 2)).weight.requires_grad
    False
    """
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    for parameter in frozen.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return frozen
