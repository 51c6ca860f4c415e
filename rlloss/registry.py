"""Losses by name, as papers, configs and command lines spell them."""

import inspect
from typing import Any

from rlloss._checks import nearest
from rlloss.losses.a2c import A2CLoss
from rlloss.losses.a_star_po import AStarPOLoss
from rlloss.losses.actor_critic import ActorCriticLoss
from rlloss.losses.bradley_terry import BradleyTerryLoss
from rlloss.losses.cispo import CISPOLoss
from rlloss.losses.clip_cov import ClipCovLoss
from rlloss.losses.conservative_ppo import ConservativePPOLoss
from rlloss.losses.cpgd import CPGDLoss
from rlloss.losses.dapo import DAPOLoss
from rlloss.losses.decoupled_ppo import DecoupledPPOLoss
from rlloss.losses.dpo import DPOLoss
from rlloss.losses.dppo import DPPOLoss
from rlloss.losses.dr_grpo import DrGRPOLoss
from rlloss.losses.dro import DROLoss
from rlloss.losses.gmpo import GMPOLoss
from rlloss.losses.gpg import GPGLoss
from rlloss.losses.grpo import GRPOLoss
from rlloss.losses.gspo import GSPOLoss
from rlloss.losses.gspo_token import GSPOTokenLoss
from rlloss.losses.importance_sampling import ImportanceSamplingLoss
from rlloss.losses.ipo import IPOLoss
from rlloss.losses.kimi import KimiLoss
from rlloss.losses.kl_cov import KLCovLoss
from rlloss.losses.kto import KTOLoss
from rlloss.losses.luspo import LUSPOLoss
from rlloss.losses.m2po import M2POLoss
from rlloss.losses.opsm import OPSMLoss
from rlloss.losses.ppo import PPOLoss
from rlloss.losses.reinforce import REINFORCELoss
from rlloss.losses.rloo import RLOOLoss
from rlloss.losses.sapo import SAPOLoss
from rlloss.losses.sft import SFTLoss
from rlloss.losses.simpo import SimPOLoss
from rlloss.losses.tis import TISLoss
from rlloss.losses.topr import TOPRLoss
from rlloss.losses.value import ValueLoss
from rlloss.losses.vespo import VESPOLoss
from rlloss.protocol import Family, Loss

__all__ = ["get_loss", "list_losses", "loss_family", "loss_hyperparameters", "loss_name", "spelled_as_key"]

_LOSSES: dict[str, type[Loss]] = {
    "a2c": A2CLoss,
    "a_star_po": AStarPOLoss,
    "actor_critic": ActorCriticLoss,
    "bradley_terry": BradleyTerryLoss,
    "cispo": CISPOLoss,
    "clip_cov": ClipCovLoss,
    "conservative_ppo": ConservativePPOLoss,
    "cpgd": CPGDLoss,
    "dapo": DAPOLoss,
    "decoupled_ppo": DecoupledPPOLoss,
    "dpo": DPOLoss,
    "dppo": DPPOLoss,
    "dr_grpo": DrGRPOLoss,
    "dro": DROLoss,
    "gmpo": GMPOLoss,
    "gpg": GPGLoss,
    "grpo": GRPOLoss,
    "gspo": GSPOLoss,
    "gspo_token": GSPOTokenLoss,
    "importance_sampling": ImportanceSamplingLoss,
    "ipo": IPOLoss,
    "kimi": KimiLoss,
    "kl_cov": KLCovLoss,
    "kto": KTOLoss,
    "luspo": LUSPOLoss,
    "m2po": M2POLoss,
    "opsm": OPSMLoss,
    "ppo": PPOLoss,
    "reinforce": REINFORCELoss,
    "rloo": RLOOLoss,
    "sapo": SAPOLoss,
    "sft": SFTLoss,
    "simpo": SimPOLoss,
    "tis": TISLoss,
    "topr": TOPRLoss,
    "value": ValueLoss,
    "vespo": VESPOLoss,
}
_ALIASES = {
    "a*_po": "a_star_po",
    "a*po": "a_star_po",
    "a2po": "a_star_po",
    "a3c": "a2c",
    "astarpo": "a_star_po",
    "bt": "bradley_terry",
    "causal_lm": "sft",
    "clipcov": "clip_cov",
    "conservativeppo": "conservative_ppo",
    "decoupledppo": "decoupled_ppo",
    "drgrpo": "dr_grpo",
    "geo_mean": "gmpo",
    "gspotoken": "gspo_token",
    "kimi15": "kimi",
    "kimi_k15": "kimi",
    "kimi_k1_5": "kimi",
    "klcov": "kl_cov",
    "nll": "sft",
    "reward": "bradley_terry",
    "truncated_importance_sampling": "tis",
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
