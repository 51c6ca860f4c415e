"""Rewards by name, as configs and command lines spell them."""

import inspect
from typing import Any

from rlloss._checks import nearest
from rlloss.registry import spelled_as_key
from rlloss.rewards.answers import ExactMatch, NumericAnswer
from rlloss.rewards.coherence import Coherence
from rlloss.rewards.forms import Format, Json, Regex
from rlloss.rewards.reward import Reward
from rlloss.rewards.reward_model import RewardModel
from rlloss.rewards.texts import DistinctN, Keywords, Length, Repetition
from rlloss.rewards.tone import Safety, Sentiment

__all__ = ["get_reward", "list_rewards"]

_REWARDS: dict[str, type[Reward]] = {
    "coherence": Coherence,
    "distinct_n": DistinctN,
    "exact_match": ExactMatch,
    "format": Format,
    "json": Json,
    "keywords": Keywords,
    "length": Length,
    "numeric_answer": NumericAnswer,
    "regex": Regex,
    "repetition": Repetition,
    "reward_model": RewardModel,
    "safety": Safety,
    "sentiment": Sentiment,
}
_ALIASES = {
    "distinct": "distinct_n",
    "exact": "exact_match",
    "gsm8k": "numeric_answer",
    "keyword": "keywords",
    "numeric": "numeric_answer",
    "pattern": "regex",
    "perplexity": "coherence",
    "vader": "sentiment",
}


def list_rewards() -> list[str]:
    """The names that `get_reward` knows, without aliases.

    >>> "length" in list_rewards()
    True
    """
    return sorted(_REWARDS)


def get_reward(name: str, **options: Any) -> Reward:
    """The reward function of that name (case, dots and dashes do not matter), with its options.

    >>> get_reward("Exact-Match", case=False)(["Capital of France?"], ["PARIS"], answer=["Paris"])
    [1.0]
    """
    key = spelled_as_key(name)
    key = _ALIASES.get(key, key)
    if key not in _REWARDS:
        raise ValueError(
            f"get_reward: unknown reward {name!r}{nearest(key, [*_REWARDS, *_ALIASES])}; "
            f"known: {', '.join(list_rewards())}"
        )
    known = inspect.signature(_REWARDS[key]).parameters
    for option in options:
        if option not in known:
            raise ValueError(
                f"get_reward: {key} has no option {option!r}{nearest(option, known)}; "
                f"known: {', '.join(known) or 'none'}"
            )
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise ValueError(f"get_reward: {key} needs the option {option!r}: get_reward({key!r}, {option}=...)")
    return _REWARDS[key](**options)
