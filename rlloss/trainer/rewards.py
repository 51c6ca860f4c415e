"""The rewards of a run, as users name them: functions, their names, a reward model, or one that is trained first."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlloss.loop.batch import Batch, collate
from rlloss.loop.data import Tokens
from rlloss.loop.frozen import frozen_copy
from rlloss.loop.pretrained import default_device, load_causal_lm, load_tokenizer
from rlloss.loop.rewards import RewardFunction, Rewards
from rlloss.loop.scalar_folder import save_scalar_model
from rlloss.loop.session import Session
from rlloss.losses.value import ValueLoss
from rlloss.rewards.registry import get_reward
from rlloss.rewards.reward_model import RewardModel
from rlloss.scalar import ScalarModel
from rlloss.trainer.algorithms import WHO
from rlloss.trainer.models import Models

__all__ = ["reward_functions", "rewards_of"]

_OF_POLICY = "coherence"  # under the policy as it is before training
_OF_CUSTOM = ("reward_training_texts", "reward_functions", "reward_training_base_model", "reward_training_output_dir")
_LONGEST_TEXT = 512  # tokens of a text that a reward model is trained on, where max_seq_length says nothing
_WAYS = (
    "reward_functions=[a function, or names such as 'length' and 'sentiment'], reward_model_name='folder or hub name', "
    "or train_custom_reward_model=True with reward_training_texts and reward_functions"
)


def reward_functions(values: Mapping[str, Any]) -> list[Any]:
    """The reward functions that were given, by name too; a ValueError names the three ways to give a reward.

    Nothing is loaded for it, so that what is missing is missed before any model is.
    """
    named = _named(values)
    if len(named) > 1:
        raise ValueError(f"{WHO}: reward_model_name and reward_model_path name one model; give one")
    if values["train_custom_reward_model"]:
        if named:
            raise ValueError(f"{WHO}: train_custom_reward_model makes the reward model, and {named[0]!r} names one")
        missing = [name for name in _OF_CUSTOM if values[name] is None]
        if missing:
            raise ValueError(f"{WHO}: train_custom_reward_model=True needs {', '.join(missing)}, got None")
    given = values["reward_functions"]
    functions = [given] if isinstance(given, str) or callable(given) else list(given or [])
    if not functions and not named:
        raise ValueError(f"{WHO}: an online algorithm needs a reward; pass {_WAYS}")
    return [get_reward(f) if isinstance(f, str) and f != _OF_POLICY else f for f in functions]


def rewards_of(values: Mapping[str, Any], models: Models) -> Rewards:
    """The rewards of an online run, whose `reward_functions` are those of that function."""
    named = _named(values)
    if values["train_custom_reward_model"]:
        return Rewards([RewardModel(model=_trained(values, models))])  # it was trained on texts: no family to share
    functions = [_function(f, models) for f in values["reward_functions"]]
    functions += [_scored_by(source, values, models) for source in named]
    weights = values["reward_function_weights"]
    if weights is not None and named and len(weights) == len(functions) - 1:
        weights = [*weights, 1.0]
    return Rewards(functions, weights)


def _named(values: Mapping[str, Any]) -> list[str | Path]:
    return [values[name] for name in ("reward_model_name", "reward_model_path") if values[name] is not None]


def _function(given: str | RewardFunction, models: Models) -> RewardFunction:
    if not isinstance(given, str):
        return given
    return get_reward(given, model=frozen_copy(models.model), tokenizer=models.tokenizer)


def _scored_by(source: str | Path, values: Mapping[str, Any], models: Models) -> RewardModel:
    model = RewardModel(model=source, quantization=values["reward_model_quantization"])
    if not values["reward_on_text"] and not _same_tokenizer(model.tokenizer, models.tokenizer):
        raise ValueError(
            f"{WHO}: the reward model {str(source)!r} ({type(model.tokenizer).__name__}, {len(model.tokenizer)} "
            f"tokens) and the policy ({type(models.tokenizer).__name__}, {len(models.tokenizer)} tokens) are of "
            "different families: their tokenizers differ. Take a reward model of the policy's family, or pass "
            "reward_on_text=True, which scores the decoded text"
        )
    return model


def _same_tokenizer(first: Any, second: Any) -> bool:
    """One family: the same tokens under the same numbers, added ones aside."""
    vocabularies = [
        {token: number for token, number in t.get_vocab().items() if token not in t.get_added_vocab()}
        for t in (first, second)
    ]
    return vocabularies[0] == vocabularies[1]


def _trained(values: Mapping[str, Any], models: Models) -> Path:
    """The folder of a regression head on a causal LM that has learned what the reward functions say of the texts."""
    texts: Sequence[str] = values["reward_training_texts"]
    base = values["reward_training_base_model"]
    tokenizer = load_tokenizer(base)
    functions = [_function(f, models) for f in values["reward_functions"]]
    rewards = Rewards(functions, values["reward_function_weights"])
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    longest = values["max_seq_length"] or _LONGEST_TEXT
    targets = rewards([""] * len(texts), texts, {"completion_ids": ids}).total
    torch.manual_seed(values["seed"])
    model = load_causal_lm(base, dtype=torch.float32).to(default_device())
    critic = ScalarModel(model)
    session = Session(model, tokenizer, critic=critic, learning_rate=1e-5, critic_learning_rate=1e-3)
    order = random.Random(values["seed"])
    for _ in range(values["reward_training_steps"]):
        chosen = order.sample(range(len(texts)), min(8, len(texts)))
        batch = _regression([Tokens(ids[i][:longest], []) for i in chosen], targets[torch.tensor(chosen)])
        session.forward_backward(batch, ValueLoss(value_clip=None))
        session.optim_step()
    folder = save_scalar_model(critic, values["reward_training_output_dir"])
    tokenizer.save_pretrained(folder)
    return folder


def _regression(rows: Sequence[Tokens], targets: torch.Tensor) -> Batch:
    """One target per row, for the value after its last token."""
    batch = collate([Tokens(row.input_ids, [False] * len(row.input_ids)) for row in rows])
    last = batch.lengths[:, None] - 1
    batch.loss_mask = torch.zeros_like(batch.loss_mask).scatter(1, last, True)
    batch.fields["returns"] = torch.zeros(batch.loss_mask.shape).masked_scatter(batch.loss_mask, targets)
    return batch
