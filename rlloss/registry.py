"""Losses by name, as papers, configs and command lines spell them."""

import inspect
from typing import Any

from rlloss._checks import nearest
from rlloss.losses.a2c import A2CLoss
from rlloss.losses.a_star_po import AStarPOLoss
from rlloss.losses.actor_critic import ActorCriticLoss
from rlloss.losses.alpha_po import AlphaPOLoss
from rlloss.losses.aot import AOTLoss
from rlloss.losses.aot_unpaired import AOTUnpairedLoss
from rlloss.losses.apo_down import APODownLoss
from rlloss.losses.apo_zero import APOZeroLoss
from rlloss.losses.apo_zero_unpaired import APOZeroUnpairedLoss
from rlloss.losses.bco import BCOLoss
from rlloss.losses.bco_pair import BCOPairLoss
from rlloss.losses.beta_dpo import BetaDPOLoss
from rlloss.losses.bradley_terry import BradleyTerryLoss
from rlloss.losses.cal_dpo import CalDPOLoss
from rlloss.losses.cispo import CISPOLoss
from rlloss.losses.clip_cov import ClipCovLoss
from rlloss.losses.conservative_ppo import ConservativePPOLoss
from rlloss.losses.cpgd import CPGDLoss
from rlloss.losses.cpo import CPOLoss
from rlloss.losses.dapo import DAPOLoss
from rlloss.losses.davidson import DavidsonLoss
from rlloss.losses.decoupled_ppo import DecoupledPPOLoss
from rlloss.losses.dft import DFTLoss
from rlloss.losses.discopop import DiscoPOPLoss
from rlloss.losses.distillation import DistillationLoss
from rlloss.losses.dpo import DPOLoss
from rlloss.losses.dppo import DPPOLoss
from rlloss.losses.dr_grpo import DrGRPOLoss
from rlloss.losses.dro import DROLoss
from rlloss.losses.exo import EXOLoss
from rlloss.losses.gmpo import GMPOLoss
from rlloss.losses.gpg import GPGLoss
from rlloss.losses.grpo import GRPOLoss
from rlloss.losses.gspo import GSPOLoss
from rlloss.losses.gspo_token import GSPOTokenLoss
from rlloss.losses.hinge import HingeLoss
from rlloss.losses.importance_sampling import ImportanceSamplingLoss
from rlloss.losses.ipo import IPOLoss
from rlloss.losses.kimi import KimiLoss
from rlloss.losses.kl_cov import KLCovLoss
from rlloss.losses.kto import KTOLoss
from rlloss.losses.luspo import LUSPOLoss
from rlloss.losses.m2po import M2POLoss
from rlloss.losses.margin_ranking import MarginRankingLoss
from rlloss.losses.nca import NCALoss
from rlloss.losses.opsm import OPSMLoss
from rlloss.losses.orpo import ORPOLoss
from rlloss.losses.plackett_luce import PlackettLuceLoss
from rlloss.losses.ppo import PPOLoss
from rlloss.losses.process_reward import ProcessRewardLoss
from rlloss.losses.rao_kupper import RaoKupperLoss
from rlloss.losses.reinforce import REINFORCELoss
from rlloss.losses.reward_regression import RewardRegressionLoss
from rlloss.losses.rloo import RLOOLoss
from rlloss.losses.robust import RobustDPOLoss
from rlloss.losses.sapo import SAPOLoss
from rlloss.losses.sft import SFTLoss
from rlloss.losses.simpo import SimPOLoss
from rlloss.losses.sppo import SPPOLoss
from rlloss.losses.tdpo import TDPOLoss
from rlloss.losses.tis import TISLoss
from rlloss.losses.topr import TOPRLoss
from rlloss.losses.tpo import TPOLoss
from rlloss.losses.value import ValueLoss
from rlloss.losses.vespo import VESPOLoss
from rlloss.losses.xpo import XPOLoss
from rlloss.protocol import Family, Loss

__all__ = ["get_loss", "list_losses", "loss_family", "loss_hyperparameters", "loss_name", "spelled_as_key"]

_LOSSES: dict[str, type[Loss]] = {
    "a2c": A2CLoss,
    "a_star_po": AStarPOLoss,
    "actor_critic": ActorCriticLoss,
    "alpha_po": AlphaPOLoss,
    "aot": AOTLoss,
    "aot_unpaired": AOTUnpairedLoss,
    "apo_down": APODownLoss,
    "apo_zero": APOZeroLoss,
    "apo_zero_unpaired": APOZeroUnpairedLoss,
    "bco": BCOLoss,
    "bco_pair": BCOPairLoss,
    "beta_dpo": BetaDPOLoss,
    "bradley_terry": BradleyTerryLoss,
    "cal_dpo": CalDPOLoss,
    "cispo": CISPOLoss,
    "clip_cov": ClipCovLoss,
    "conservative_ppo": ConservativePPOLoss,
    "cpgd": CPGDLoss,
    "cpo": CPOLoss,
    "dapo": DAPOLoss,
    "davidson": DavidsonLoss,
    "decoupled_ppo": DecoupledPPOLoss,
    "dft": DFTLoss,
    "discopop": DiscoPOPLoss,
    "distillation": DistillationLoss,
    "dpo": DPOLoss,
    "dppo": DPPOLoss,
    "dr_grpo": DrGRPOLoss,
    "dro": DROLoss,
    "exo": EXOLoss,
    "gmpo": GMPOLoss,
    "gpg": GPGLoss,
    "grpo": GRPOLoss,
    "gspo": GSPOLoss,
    "gspo_token": GSPOTokenLoss,
    "hinge": HingeLoss,
    "importance_sampling": ImportanceSamplingLoss,
    "ipo": IPOLoss,
    "kimi": KimiLoss,
    "kl_cov": KLCovLoss,
    "kto": KTOLoss,
    "luspo": LUSPOLoss,
    "m2po": M2POLoss,
    "margin_ranking": MarginRankingLoss,
    "nca": NCALoss,
    "opsm": OPSMLoss,
    "orpo": ORPOLoss,
    "plackett_luce": PlackettLuceLoss,
    "ppo": PPOLoss,
    "process_reward": ProcessRewardLoss,
    "rao_kupper": RaoKupperLoss,
    "reinforce": REINFORCELoss,
    "reward_regression": RewardRegressionLoss,
    "rloo": RLOOLoss,
    "robust": RobustDPOLoss,
    "sapo": SAPOLoss,
    "sft": SFTLoss,
    "simpo": SimPOLoss,
    "sppo": SPPOLoss,
    "tdpo": TDPOLoss,
    "tis": TISLoss,
    "topr": TOPRLoss,
    "tpo": TPOLoss,
    "value": ValueLoss,
    "vespo": VESPOLoss,
    "xpo": XPOLoss,
}
_ALIASES = {
    "a*_po": "a_star_po",
    "a*po": "a_star_po",
    "a2po": "a_star_po",
    "a3c": "a2c",
    "alphapo": "alpha_po",
    "aot_pair": "aot",
    "apodown": "apo_down",
    "apozero": "apo_zero",
    "astarpo": "a_star_po",
    "bcopair": "bco_pair",
    "betadpo": "beta_dpo",
    "bradley_terry_ties": "rao_kupper",
    "bt": "bradley_terry",
    "btt": "rao_kupper",
    "caldpo": "cal_dpo",
    "causal_lm": "sft",
    "clipcov": "clip_cov",
    "conservativeppo": "conservative_ppo",
    "decoupledppo": "decoupled_ppo",
    "drgrpo": "dr_grpo",
    "dynamic_beta_dpo": "beta_dpo",
    "dynamic_fine_tuning": "dft",
    "exo_pair": "exo",
    "generalized_jsd": "distillation",
    "geo_mean": "gmpo",
    "gkd": "distillation",
    "gspotoken": "gspo_token",
    "kd": "distillation",
    "kimi15": "kimi",
    "kimi_k15": "kimi",
    "kimi_k1_5": "kimi",
    "klcov": "kl_cov",
    "length_normalized_dpo": "sigmoid_norm",
    "list_mle": "plackett_luce",
    "listmle": "plackett_luce",
    "log_exp": "bradley_terry",
    "logexp": "bradley_terry",
    "nca_pair": "nca",
    "nll": "sft",
    "prm": "process_reward",
    "r_dpo": "robust",
    "rdpo": "robust",
    "reward": "bradley_terry",
    "reward_hinge": "margin_ranking",
    "reward_mse": "reward_regression",
    "robust_dpo": "robust",
    "rso": "hinge",
    "sigmoid": "dpo",
    "slic": "slic_hf",
    "sppo_hard": "sppo",
    "tdpo2": "tdpo",
    "truncated_importance_sampling": "tis",
}
# names of a loss with some options
_PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid_norm": ("dpo", {"length_normalized": True}),
    "slic_hf": ("hinge", {"reference_free": True}),
    "tdpo1": ("tdpo", {"alpha": 1.0, "stop_chosen": False}),
    "tpo_l": ("tpo", {"length_normalized": True, "margin": 0.5}),
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
    loss, options = _named(key)
    return loss(**options | hyperparameters)


def loss_name(name: str, *, who: str = "get_loss") -> str:
    """The registry's own name of what a paper, a config or a command line calls `name`.

    >>> loss_name("Dr.GRPO")
    'dr_grpo'
    """
    key = spelled_as_key(name)
    key = _ALIASES.get(key, key)
    if key not in _LOSSES and key not in _PRESETS:
        raise ValueError(
            f"{who}: unknown loss {name!r}{nearest(key, [*_LOSSES, *_ALIASES, *_PRESETS])} "
            f"Known: {', '.join(list_losses())}"
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
    return _named(loss_name(name))[0].family


def loss_hyperparameters(name: str) -> tuple[str, ...]:
    """What the constructor of the loss of that name takes.

    >>> loss_hyperparameters("simpo")
    ('beta', 'margin', 'label_smoothing')
    """
    names: dict[str, None] = {}
    loss, _ = _named(loss_name(name))
    for base in loss.__mro__[: loss.__mro__.index(Loss)]:
        init = base.__dict__.get("__init__")
        if init is not None:
            parameters = inspect.signature(init).parameters.values()
            names |= {p.name: None for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
            if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
                break  # what the base classes take, this one does not pass on
    return tuple(names)


def _named(key: str) -> tuple[type[Loss], dict[str, Any]]:
    """The class that one of the registry's own names stands for, and what the name says of its options."""
    name, options = _PRESETS.get(key, (key, {}))
    return _LOSSES[name], options
