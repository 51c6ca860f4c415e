"""Reward functions by name, all in the loop's form: `(prompts, completions, **columns)` to a number per completion."""

from rlloss.rewards.answers import ExactMatch, NumericAnswer
from rlloss.rewards.coherence import Coherence
from rlloss.rewards.combine import Ensemble, Normalized, clipped, normalized, scaled
from rlloss.rewards.forms import Format, Json, Regex
from rlloss.rewards.registry import get_reward, list_rewards
from rlloss.rewards.reward import Reward
from rlloss.rewards.reward_model import RewardModel
from rlloss.rewards.texts import DistinctN, Keywords, Length, Repetition
from rlloss.rewards.tone import SAFETY_PATTERNS, SAFETY_WORDS, Safety, Sentiment

__all__ = [
    "SAFETY_PATTERNS",
    "SAFETY_WORDS",
    "Coherence",
    "DistinctN",
    "Ensemble",
    "ExactMatch",
    "Format",
    "Json",
    "Keywords",
    "Length",
    "Normalized",
    "NumericAnswer",
    "Regex",
    "Repetition",
    "Reward",
    "RewardModel",
    "Safety",
    "Sentiment",
    "clipped",
    "get_reward",
    "list_rewards",
    "normalized",
    "scaled",
]
