"""Learning rates over a run, by the names that users know."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from rlloss.loop.optimizer import trainable_parameters
from rlloss.scalar import ScalarModel

__all__ = ["optimizer_of", "scheduler_of"]


def optimizer_of(model: nn.Module, critic: ScalarModel | None, values: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW over policy and critic, with weight decay on matrices alone."""
    learning_rate, critic_rate = values["learning_rate"], values.get("critic_learning_rate")
    critic_rate = learning_rate if critic_rate is None else critic_rate
    trainable, of_critic = trainable_parameters(model, critic)
    groups = []
    for parameters, rate in ((trainable, learning_rate), (of_critic, critic_rate)):
        for is_matrix, decay in ((True, values["weight_decay"]), (False, 0.0)):
            chosen = [p for p in parameters if (p.ndim >= 2) == is_matrix]
            if chosen:
                groups.append({"params": chosen, "lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def scheduler_of(name: str, warmup: float | int, updates: int) -> Callable[[torch.optim.Optimizer], Any]:
    """Warm-up from 0, then `linear` or `cosine` down to 0 at the last update, or `constant`.

    Args:
        warmup: Its number of updates, or below 1 its share of them.

    >>> optimizer = torch.optim.SGD([torch.ones(1)], lr=1.0)
    >>> scheduler = scheduler_of("linear", 2, 4)(optimizer)
    >>> scheduler.get_last_lr()
    [0.5]
    """
    warmup = math.ceil(warmup * updates) if warmup < 1 else int(warmup)

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        left = max(updates - update, 0) / max(updates - warmup, 1)
        return {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[name]

    return lambda optimizer: LambdaLR(optimizer, factor)
