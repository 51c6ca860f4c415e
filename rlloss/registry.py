"""Losses by name, as papers, configs and command lines spell them."""

import inspect
from typing import Any

from rlloss._checks import nearest
from rlloss.losses.actor_critic import ActorCriticLoss
from rlloss.losses.bradley_terry import BradleyTerryLoss
from rlloss.losses.conservative_ppo import ConservativePPOLoss
from rlloss.losses.dapo import DAPOLoss
from rlloss.losses.dpo import DPOLoss
from rlloss.losses.dr_grpo import DrGRPOLoss
from rlloss.losses.grpo import GRPOLoss
from rlloss.losses.gspo import GSPOLoss
from rlloss.losses.importance_sampling import ImportanceSamplingLoss
from rlloss.losses.ipo import IPOLoss
from rlloss.losses.kto import KTOLoss
from rlloss.losses.ppo import PPOLoss
from rlloss.losses.reinforce import REINFORCELoss
from rlloss.losses.rloo import RLOOLoss
from rlloss.losses.sft import SFTLoss
from rlloss.losses.simpo import SimPOLoss
from rlloss.losses.value import ValueLoss
from rlloss.protocol import Family, Loss

__all__ = ["get_loss", "list_losses", "loss_family", "loss_hyperparameters", "loss_name", "spelled_as_key"]

_LOSSES: dict[str, type[Loss]] = {
    "actor_critic": ActorCriticLoss,
    "bradley_terry": BradleyTerryLoss,
    "conservative_ppo": ConservativePPOLoss,
    "dapo": DAPOLoss,
    "dpo": DPOLoss,
    "dr_grpo": DrGRPOLoss,
    "grpo": GRPOLoss,
    "gspo": GSPOLoss,
    "importance_sampling": ImportanceSamplingLoss,
    "ipo": IPOLoss,
    "kto": KTOLoss,
    "ppo": PPOLoss,
    "reinforce": REINFORCELoss,
    "rloo": RLOOLoss,
    "sft": SFTLoss,
    "simpo": SimPOLoss,
    "value": ValueLoss,
}
_ALIASES = {
    "bt": "bradley_terry",
    "causal_lm": "sft",
    "conservativeppo": "conservative_ppo",
    "drgrpo": "dr_grpo",
    "nll": "sft",
    "reward": "bradley_terry",
}


def list_losses() -> list[str]:
    """The names that `get_loss` knows, without aliases.

    >>> "grpo" in list_losses()
    True
    """
    return sorted(_LOSSES)


def get_loss(name: str, **hyperparameters: Any) -> Loss:
    """The loss of that name (its file's name; case, dots and dashes do not matter).

    >>> get_loss("Dr.GRPO", max_completion_length=512).max_length
    512
    """
    key = loss_name(name)
    known = loss_hyperparameters(key)
    for option in hyperparameters:
        if option not in known:
            raise ValueError(
                f"get_loss: {key} has no hyperparameter {option!r}{nearest(option, known)} Known: {', '.join(known)}"
            )
    return _LOSSES[key](**hyperparameters)


def loss_name(name: str, *, who: str = "get_loss") -> str:
    """The registry's own name of what a paper, a config or a command line calls `name`.

    >>> loss_name("Dr.GRPO")
    'dr_grpo'
    """
    key = spelled_as_key(name)
    key = _ALIASES.get(key, key)
    if key not in _LOSSES:
        raise ValueError(
            f"{who}: unknown loss {name!r}{nearest(key, [*_LOSSES, *_ALIASES])} Known: {', '.join(list_losses())}"
        )
    return key


def spelled_as_key(name: str) -> str:
    """A name as the keys of a registry are spelled: lower case, with underscores for dashes, dots and blanks.

    >>> spelled_as_key("Dr.GRPO")
    'dr_grpo'
    """
    return name.lower().replace("-", "_").replace(".", "_").replace(" ", "_")


def loss_family(name: str) -> Family:
    """The family of the loss of that name."""
    return _LOSSES[loss_name(name)].family


def loss_hyperparameters(name: str) -> tuple[str, ...]:
    """What the constructor of the loss of that name takes.

    >>> loss_hyperparameters("simpo")
    ('beta', 'margin', 'label_smoothing')
    """
    names: dict[str, None] = {}
    loss = _LOSSES[loss_name(name)]
    for base in loss.__mro__[: loss.__mro__.index(Loss)]:
        init = base.__dict__.get("__init__")
        if init is not None:
            parameters = inspect.signature(init).parameters.values()
            names |= {p.name: None for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
            if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
                break  # what the base classes take, this one does not pass on
    return tuple(names)
