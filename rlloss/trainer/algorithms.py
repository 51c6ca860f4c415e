"""What each algorithm's name stands for: a loss, the data it trains on, its advantages, its usual learning rate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlloss.advantages.presets import list_advantages
from rlloss.advantages.running import AdaptiveKLController, RunningRewardNorm
from rlloss.loop.advantages import CriticAdvantages, GroupAdvantages, ShapedAdvantages
from rlloss.losses.actor_critic import ActorCriticLoss
from rlloss.losses.value import ValueLoss
from rlloss.protocol import Loss
from rlloss.registry import get_loss, loss_family, loss_hyperparameters, loss_name

__all__ = ["Algorithm", "Kind", "advantages_of", "algorithm_named", "loss_of"]

Kind = Literal["likelihood", "preference", "unpaired", "reward", "policy", "critic"]

WHO = "create_rl_trainer"
_OF_CRITIC = ("actor_critic", "conservative_ppo", "ppo")  # policy losses that train beside a critic
_IN_REWARD = (
    "reinforce",
    "rloo",
)  # whose papers put the KL into the reward, and leave the row itself out of its baseline
_LEARNING_RATES: dict[Kind, float] = {
    "likelihood": 2e-5,
    "preference": 5e-6,
    "unpaired": 5e-6,
    "reward": 1e-5,
    "policy": 1e-6,
    "critic": 1e-6,
}
_NOT_HERE = {  # what the loop makes no batch of
    **dict.fromkeys(("tdpo", "tdpo1"), "the KL over the whole vocabulary along both answers"),
    **dict.fromkeys(("tpo", "tpo_l"), "a third, gold answer to every prompt"),
    "xpo": "an answer of the reference to every prompt",
}
_OWN_LOSS = {"cpo": "sigmoid", "dpo": "sigmoid", "sft": "nll"}  # what TRL's configs call an algorithm's own loss


@dataclass(frozen=True)
class Algorithm:
    """A name that `create_rl_trainer` knows.

    Args:
        name: Of its loss in the registry; ppo's is that of its policy loss.
        kind: The loss's family, with `critic` for policy losses that need one.
    """

    name: str
    kind: Kind

    @property
    def defaults(self) -> dict[str, Any]:
        """Of parameters that the user leaves at None."""
        one, many = (1, 4) if self.kind == "critic" else (8, 1)
        return {"learning_rate": _LEARNING_RATES[self.kind], "group_size": one, "num_ppo_epochs": many}

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Of the loss's constructor."""
        return loss_hyperparameters(self.name)


def algorithm_named(name: str, loss_type: str | None = None) -> Algorithm:
    """The algorithm of that name; `loss_type` picks another loss of the same family, as TRL's configs do."""
    algorithm = _algorithm(name)
    if loss_type is None or loss_type == _OWN_LOSS.get(algorithm.name):
        return algorithm
    other = _algorithm(loss_type)
    base_names = ("dpo", "grpo", "sft", "kto")
    if other.name != algorithm.name and (other.kind != algorithm.kind or algorithm.name not in base_names):
        raise ValueError(
            f"{WHO}: algorithm={name!r} and loss_type={loss_type!r} contradict each other: that loss is "
            f"{other.name!r} of the kind {other.kind!r}; give algorithm={other.name!r} alone"
        )
    return other


def _algorithm(name: str) -> Algorithm:
    loss = loss_name(name, who=WHO)
    family = loss_family(loss)
    if family == "value":
        raise ValueError(f"{WHO}: {name!r} trains a critic alone; algorithm='ppo' trains one beside its policy")
    if loss in _NOT_HERE or family not in _LEARNING_RATES:
        needs = _NOT_HERE.get(loss, f"other data than rows of text (its family is {family!r})")
        raise ValueError(
            f"{WHO}: {name!r} needs {needs}, which this trainer does not make; rlloss.get_loss({loss!r}) is for a "
            "loop of your own"
        )
    return Algorithm("ppo" if loss == "actor_critic" else loss, "critic" if loss in _OF_CRITIC else family)


def loss_of(algorithm: Algorithm, values: Mapping[str, Any], of_loss: Mapping[str, Any]) -> Loss:
    """The algorithm's loss from the users' words (`values`) and from hyperparameters in the loss's own."""
    given = _hyperparameters(algorithm, values, of_loss)
    for name in of_loss:
        if name in given:
            raise ValueError(f"{WHO}: {name}={of_loss[name]!r} is given twice, by another parameter as {given[name]!r}")
    loss = get_loss(algorithm.name, **given, **of_loss)
    if algorithm.kind != "critic":
        return loss
    clip = {} if values["cliprange_value"] is None else {"value_clip": values["cliprange_value"]}
    return ActorCriticLoss(policy=loss, value=ValueLoss(**clip), value_coef=_given(values, "vf_coef", 0.1))


def advantages_of(algorithm: Algorithm, values: Mapping[str, Any]) -> ShapedAdvantages | None:
    """The algorithm's advantages, with the KL in the reward where it belongs there; None where there are none."""
    if algorithm.kind not in ("policy", "critic"):
        return None
    norm = RunningRewardNorm() if values["normalize_rewards"] else None
    if algorithm.kind == "critic":
        estimators = {"kl": "k1", "abs": "abs", "mse": "k2"}
        penalty = _given(values, "kl_penalty", "kl")
        if penalty not in estimators:
            raise ValueError(f"{WHO}: kl_penalty must be one of {sorted(estimators)}, got {penalty!r}")
        return CriticAdvantages(
            gamma=_given(values, "gamma", 1.0),
            gae_lambda=_given(values, "lam", 0.95),
            kl_coef=_kl_coef(values),
            kl=estimators[penalty],
            reward_norm=norm,
        )
    in_reward, of_name = algorithm.name in _IN_REWARD, algorithm.name in list_advantages()
    own = algorithm.name if of_name else "rloo" if in_reward else "grpo"
    scale = values["scale_rewards"]
    if scale is not None and values["advantages"] is not None:
        raise ValueError(f"{WHO}: advantages={values['advantages']!r} has a scale of its own; leave scale_rewards out")
    kl_coef = _one_of(values, "kl_coef", "beta") if in_reward else 0.0
    return GroupAdvantages(
        _given(values, "advantages", own),
        kl_coef=0.05 if kl_coef is None else kl_coef,
        reward_norm=norm,
        **({} if scale is None else {"scale": scale}),
    )


def _hyperparameters(algorithm: Algorithm, values: Mapping[str, Any], of_loss: Mapping[str, Any]) -> dict[str, Any]:
    """The loss's own hyperparameters from the users' words for them."""
    known = algorithm.hyperparameters
    made: dict[str, Any] = {}
    if "max_completion_length" in known:
        made["max_completion_length"] = values["max_new_tokens"]
    if "max_length" in known and of_loss.get("reduction") == "fixed_length":
        made["max_length"] = values["max_seq_length"]
    if "temperature" in known:
        made["temperature"] = values["temperature"]
    if algorithm.kind == "policy":
        kl_coef = _one_of(values, "kl_coef", "beta")
        if kl_coef is not None and algorithm.name not in _IN_REWARD:
            made["kl_coef"] = kl_coef
    ours = {"simpo_gamma": ("margin",), "reference_free": ("reference_free",)}
    ours |= {"cliprange": ("clip_eps_low", "clip_eps_high")}
    ours |= {"beta": ("beta",)} if algorithm.kind in ("preference", "unpaired") else {}
    for word, names in ours.items():
        if values.get(word) is None:
            continue
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(
                f"{WHO}: {word}={values[word]!r} is {missing[0]}, which {algorithm.name} has not; leave it out. Its "
                f"hyperparameters: {', '.join(known)}"
            )
        made |= dict.fromkeys(names, values[word])
    return made


def _kl_coef(values: Mapping[str, Any]) -> float | AdaptiveKLController:
    """Fixed, or a controller where the users name its start or its target, with TRL's target of 6 nats."""
    kl_coef = _one_of(values, "kl_coef", "beta", "init_kl_coef")
    if values["target_kl"] is None and values["init_kl_coef"] is None:
        return 0.05 if kl_coef is None else kl_coef
    return AdaptiveKLController(0.2 if kl_coef is None else kl_coef, target_kl=_given(values, "target_kl", 6.0))


def _one_of(values: Mapping[str, Any], *names: str) -> Any:
    given = [name for name in names if values.get(name) is not None]
    if len(given) > 1:
        raise ValueError(f"{WHO}: {' and '.join(given)} both set the weight of the KL; give one")
    return values[given[0]] if given else None


def _given(values: Mapping[str, Any], name: str, default: Any) -> Any:
    return default if values[name] is None else values[name]
