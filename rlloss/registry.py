"""Losses by name, as papers, configs and command lines spell them."""

import inspect
from typing import Any

from rlloss._checks import nearest
from rlloss.losses.conservative_ppo import ConservativePPOLoss
from rlloss.losses.dpo import DPOLoss
from rlloss.losses.dr_grpo import DrGRPOLoss
from rlloss.losses.grpo import GRPOLoss
from rlloss.losses.gspo import GSPOLoss
from rlloss.losses.sft import SFTLoss
from rlloss.protocol import Loss

__all__ = ["get_loss", "list_losses"]

_LOSSES: dict[str, type[Loss]] = {
    "conservative_ppo": ConservativePPOLoss,
    "dpo": DPOLoss,
    "dr_grpo": DrGRPOLoss,
    "grpo": GRPOLoss,
    "gspo": GSPOLoss,
    "sft": SFTLoss,
}
_ALIASES = {"drgrpo": "dr_grpo", "conservativeppo": "conservative_ppo", "nll": "sft", "causal_lm": "sft"}


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
    key = name.lower().replace("-", "_").replace(".", "_").replace(" ", "_")
    key = _ALIASES.get(key, key)
    if key not in _LOSSES:
        raise ValueError(
            f"get_loss: unknown loss {name!r}{nearest(key, [*_LOSSES, *_ALIASES])} Known: {', '.join(list_losses())}"
        )
    known = _hyperparameters(_LOSSES[key])
    for option in hyperparameters:
        if option not in known:
            raise ValueError(
                f"get_loss: {key} has no hyperparameter {option!r}{nearest(option, known)} Known: {', '.join(known)}"
            )
    return _LOSSES[key](**hyperparameters)


def _hyperparameters(loss: type[Loss]) -> list[str]:
    names: dict[str, None] = {}
    for base in loss.__mro__[: loss.__mro__.index(Loss)]:
        init = base.__dict__.get("__init__")
        if init is not None:
            parameters = inspect.signature(init).parameters.values()
            names |= {p.name: None for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return list(names)
