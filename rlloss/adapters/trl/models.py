"""Models as TRL's users load them, in the forms that this library trains: value heads, classifiers, reward models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from rlloss.loop.pretrained import default_device, load_causal_lm, load_tokenizer
from rlloss.rewards.readers import DecoderReader, reader_of
from rlloss.rewards.registry import get_reward, list_rewards
from rlloss.rewards.reward_model import RewardModel
from rlloss.scalar import ScalarModel

__all__ = [
    "AutoModelForCausalLMWithValueHead",
    "on_device",
    "one_of",
    "reward_of",
    "scalar_model_of",
    "tokenizer_of",
]


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A causal LM with a value head on its trunk: `pretrained_model`, and `critic`, a `rlloss.ScalarModel` on it."""

    def __init__(self, pretrained_model: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = pretrained_model
        self.critic = ScalarModel(pretrained_model)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> "AutoModelForCausalLMWithValueHead":
        """Loads the causal LM by transformers' `from_pretrained`; the head is new, and starts at zero."""
        return cls(load_causal_lm(name, **options))

    @property
    def v_head(self) -> nn.Linear:
        """The head itself."""
        return self.critic.head

    @property
    def config(self) -> Any:
        """The causal LM's."""
        return self.pretrained_model.config


def on_device(model: Any) -> Any:
    """A loaded model on the GPU where there is one, as TRL places it; quantised and dispatched ones stay."""
    is_placed = getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    return model if is_placed or not isinstance(model, nn.Module) else model.to(default_device())


def one_of(first: str, given: Any, second: str, other: Any) -> Any:
    """What was given under one of two names."""
    if given is not None and other is not None:
        raise ValueError(f"{first} and {second} are one parameter; give one")
    return other if given is None else given


def tokenizer_of(model: Any, processing_class: Any, tokenizer: Any = None) -> Any:
    """The one that was given, or else that of the place where a loaded model comes from; None for a model's name."""
    given, name = one_of("processing_class", processing_class, "tokenizer", tokenizer), _origin(model)
    return load_tokenizer(name) if given is None and name else given


def reward_of(given: Any, tokenizer: Any = None) -> Callable[..., Any]:
    """A reward function, from one, from a named reward, or from a sequence classifier or its name.

    A reward model scores the decoded text with its own tokenizer, so it may be of another family than the policy.
    """
    if isinstance(given, str) and given in list_rewards():
        return get_reward(given)
    if isinstance(given, nn.Module):
        return RewardModel(model=on_device(given), tokenizer=tokenizer_of(given, tokenizer))
    return RewardModel(model=given, tokenizer=tokenizer) if isinstance(given, str | Path) else given


def scalar_model_of(who: str, model: Any, tokenizer: Any) -> Any:
    """A sequence classifier as a `ScalarModel` of the same backbone and the same head; other models as they are.

    Both train the same parameters, and a row has the score that the classifier gives to it, read at its last token.
    Transformers itself reads it at the last token that is not padding, another one where a text ends in the padding
    token, as with `pad_token = eos_token`.
    """
    if isinstance(model, str | Path | ScalarModel) or model.get_output_embeddings() is not None:
        return model
    try:
        reader = reader_of(model.eval(), tokenizer, label=None, append_eos=True)
    except ValueError as error:
        raise ValueError(f"{who}: {error}, or pass the causal LM, whose backbone gets a new head") from error
    head = getattr(model, "score", None)
    if not isinstance(reader, DecoderReader) or not isinstance(head, nn.Linear):
        raise ValueError(
            f"{who}: {type(model).__name__} gathers its score in another way than by a linear head at a row's last "
            "token, which is all that a rlloss.ScalarModel can; pass the causal LM, whose backbone gets a new head"
        )
    scalar = ScalarModel(model, bias=head.bias is not None)
    scalar.head = head
    return scalar


def _origin(model: Any) -> str:
    return getattr(getattr(model, "config", None), "_name_or_path", "") if isinstance(model, nn.Module) else ""
