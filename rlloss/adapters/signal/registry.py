"""Signal's loss names: the keys of their batches, their keyword arguments, and the checks of both."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rlloss._checks import check_flag, check_range, nearest
from rlloss.adapters.signal import losses
from rlloss.adapters.signal.batches import BatchData
from rlloss.adapters.signal.models import num_ids
from rlloss.adapters.signal.run import Run
from rlloss.scalar import ScalarModel

__all__ = ["LOSSES", "SignalLoss", "prepared"]


class SignalLoss(NamedTuple):
    """A loss name of Signal: what makes its step, whose keyword-only parameters are its loss_kwargs, and its keys."""

    make: Callable[..., losses.Step]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def loss_kwargs(self) -> dict[str, Any]:
        """The keyword arguments and their defaults."""
        parameters = inspect.signature(self.make).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


_TEXT = ("input_ids", "attention_mask")
_ANSWERS = ("prompt_ids", "response_ids", "rewards", "response_masks")
_PAIRS = tuple(f"{side}_{name}" for side in ("chosen", "rejected") for name in _TEXT)
LOSSES = {
    "causal_lm": SignalLoss(losses.causal_lm, _TEXT, ("response_mask",)),
    "dpo": SignalLoss(losses.dpo, _PAIRS, ("chosen_response_mask", "rejected_response_mask")),
    "grpo": SignalLoss(losses.grpo, _ANSWERS, ("prompt_masks", "old_log_probs")),
    "ppo": SignalLoss(losses.ppo, _ANSWERS, ("prompt_masks", "old_log_probs", "values", "old_values")),
    "enhanced_ppo": SignalLoss(
        losses.enhanced_ppo, (*_TEXT, "old_log_probs", "rewards"), ("values", "old_values", "response_mask")
    ),
    "importance_sampling": SignalLoss(
        losses.importance_sampling, (*_TEXT, "behavior_log_probs"), ("rewards", "advantages", "response_mask")
    ),
    "conservative_ppo": SignalLoss(
        losses.conservative_ppo, (*_TEXT, "old_log_probs"), ("rewards", "advantages", "response_mask")
    ),
    "reward_modeling": SignalLoss(losses.reward_modeling, _PAIRS),
}

_RANGES = {
    "beta": (0, math.inf),
    "clip_epsilon": (0, 1),
    "clip_ratio": (1, math.inf),
    "conservative_coef": (0, math.inf),
    "entropy_coef": (0, math.inf),
    "gae_lambda": (0, 1),
    "gamma": (0, 1),
    "label_smoothing": (0, 0.5),
    "margin": (-math.inf, math.inf),
    "max_kl_divergence": (0, math.inf),
    "value_loss_coef": (0, math.inf),
}
_FLAGS = ("adaptive_kl", "clip_value_loss", "use_gae")
_POSITIVE = ("max_grad_norm", "temperature")


def prepared(run: Run, loss_fn: str, batch_data: Mapping[str, Any], loss_kwargs: Mapping[str, Any]) -> losses.Step:
    """Checks what the caller passed and makes the step of it; nothing of the run has changed when this raises."""
    if loss_fn not in LOSSES:
        raise ValueError(
            f"forward_backward: unknown loss_fn {loss_fn!r}{nearest(loss_fn, LOSSES)}. Known: {', '.join(LOSSES)}"
        )
    loss = LOSSES[loss_fn]
    data = BatchData(loss_fn, batch_data, num_ids(run.session.model))
    is_reward_model, wants = isinstance(run.session.model, ScalarModel), loss_fn == "reward_modeling"
    if is_reward_model != wants:
        kind = "a reward model; make one by create_run(..., reward_model=True)" if wants else "a language model"
        raise ValueError(f"{loss_fn}: trains {kind}; this run's model is a {type(run.session.model).__name__}")
    hyperparameters = _checked(loss_fn, loss_kwargs, loss.loss_kwargs)
    data.check_keys(loss.required, loss.optional)
    if loss_fn == "enhanced_ppo" and loss_kwargs.get("use_gae") is False and "gae_lambda" in loss_kwargs:
        raise ValueError(f"{loss_fn}: use_gae=False is gae_lambda=1, whole returns; leave one of the two out")
    return loss.make(run, data, **hyperparameters)


def _checked(who: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The given keyword arguments, whole numbers as floats."""
    checked = dict(given)
    for name, value in given.items():
        if name not in known:
            raise ValueError(
                f"{who}: unknown loss_kwargs {name!r}{nearest(name, known)}. Known: {', '.join(known) or 'none'}"
            )
        if name in _FLAGS:
            check_flag(who, name, value)
        elif name in _RANGES:
            check_range(who, name, value, *_RANGES[name])
            checked[name] = float(value)
        elif name in _POSITIVE and not (name == "max_grad_norm" and value is None):
            check_range(who, name, value, 0, open_low=True)
            checked[name] = float(value)
    return checked
