"""What is trained and by which optimiser: the policy's parameters, and those that are the critic's alone."""

from collections.abc import Sequence

import torch
from torch import nn

from rlloss._checks import check_range
from rlloss.scalar import ScalarModel

__all__ = ["adamw", "check_optimizer", "clipped_apart", "trainable_parameters"]


def trainable_parameters(model: nn.Module, critic: ScalarModel | None) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The model's trainable parameters, and those that are the critic's alone."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("Session: no parameter of the model requires a gradient; unfreeze what should train")
    own = set(model.parameters())
    of_critic = [] if critic is None else [p for p in critic.parameters() if p.requires_grad]
    return trainable, [p for p in of_critic if p not in own]


def adamw(
    trainable: list[nn.Parameter],
    of_critic: list[nn.Parameter],
    learning_rate: float,
    critic_learning_rate: float | None,
) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.95) and no weight decay, the critic's own parameters at their own rate."""
    rate = learning_rate if critic_learning_rate is None else critic_learning_rate
    check_range("Session", "learning_rate", learning_rate, 0)
    check_range("Session", "critic_learning_rate", rate, 0)
    groups = [{"params": trainable}, {"params": of_critic, "lr": rate}][: 2 if of_critic else 1]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def check_optimizer(
    optimizer: torch.optim.Optimizer, trainable: Sequence[nn.Parameter], of_critic: Sequence[nn.Parameter]
) -> None:
    """Raises ValueError where an optimiser of the user's would leave something untrained, its gradients piling up."""
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for name, parameters in {"model": trainable, "critic": of_critic}.items():
        missing = sum(p not in held for p in parameters)
        if missing:
            raise ValueError(
                f"Session: {missing} of the {len(parameters)} trainable parameters of the {name} are not in the "
                "optimizer; add them, or freeze them with requires_grad_(False)"
            )


def clipped_apart(
    optimizer: torch.optim.Optimizer, model: nn.Module, critic: ScalarModel | None
) -> dict[str, list[nn.Parameter]]:
    """Parameters whose gradients are clipped together, under the name of their norm."""
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    if critic is None or critic.shares_backbone_with(model):
        return {"grad_norm": everything}
    of_critic = set(critic.parameters())
    return {
        "grad_norm": [p for p in everything if p not in of_critic],
        "critic_grad_norm": [p for p in everything if p in of_critic],
    }
