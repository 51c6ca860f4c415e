"""What can be said against a run's parameters before anything is loaded."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlloss._checks import check_choice, check_count, check_range
from rlloss.loop.checkpoint import has_checkpoint
from rlloss.protocol import Loss
from rlloss.trainer.algorithms import WHO, Algorithm

__all__ = ["check_reference", "check_values", "resumes"]

_COUNTS = (
    *("batch_size", "gradient_accumulation_steps", "max_steps", "eval_steps", "save_steps", "max_samples"),
    *("max_seq_length", "max_prompt_length", "max_new_tokens", "group_size", "num_ppo_epochs", "mini_batch_size"),
    *("lora_r", "reward_training_steps"),
)
_ABOVE_0 = {"num_epochs": math.inf, "max_grad_norm": math.inf, "temperature": math.inf, "percent": 100}
_FROM_0 = {
    "learning_rate": math.inf,
    "critic_learning_rate": math.inf,
    "weight_decay": math.inf,
    "warmup_steps": math.inf,
    "warmup_ratio": 1,
    "eval_fraction": 0.5,
    "lora_dropout": 1,
}
_OPTIONAL = {"max_steps", "eval_steps", "save_steps", "max_samples", "max_seq_length", "max_prompt_length", "percent"}
_OPTIONAL |= {"mini_batch_size", "critic_learning_rate", "warmup_ratio"}
_OF_CUSTOM_REWARD = ("texts", "base_model", "output_dir", "steps")
_BELONGS = {f"reward_training_{name}": ("train_custom_reward_model",) for name in _OF_CUSTOM_REWARD}
_BELONGS |= dict.fromkeys(("reward_on_text", "reward_model_quantization"), ("reward_model_name", "reward_model_path"))


def check_values(algorithm: Algorithm, values: Mapping[str, Any], given: Iterable[str]) -> None:
    """Raises ValueError for a value that is none, and for a parameter that reaches nothing without another one.

    Args:
        values: Of all parameters of the algorithm.
        given: Those that the user has set.
    """
    for name, number in values.items():
        if name in _OPTIONAL and values[name] is None:
            continue
        if name in _COUNTS:
            check_count(WHO, name, number)
        elif name in _ABOVE_0:
            check_range(WHO, name, number, 0, _ABOVE_0[name], open_low=True)
        elif name in _FROM_0:
            check_range(WHO, name, number, 0, _FROM_0[name])
    check_choice(WHO, "backend", values["backend"], ("auto", "trl", "unsloth"))
    check_choice(WHO, "scheduler", values["scheduler"], ("linear", "cosine", "constant"))
    if values["warmup_ratio"] is not None and values["warmup_steps"]:
        raise ValueError(f"{WHO}: warmup_ratio and warmup_steps both say how long the warm-up is; give one")
    resumes(values["resume"], values["output_dir"])
    _check_belongings(values, given)
    if algorithm.kind in ("policy", "critic"):
        _check_step(values)


def check_reference(values: Mapping[str, Any], loss_fn: Loss, *, needed: bool) -> None:
    """Raises ValueError where something is said of a reference that no loss and no reward asks."""
    if needed:
        return
    for name in ("reference", "reference_quantization", "precompute_ref_log_probs"):
        is_measured = loss_fn.family == "policy" and (name == "reference" or values["reference"] is not None)
        if values.get(name) and not is_measured:
            way_out = "pass kl_coef too, or reference, which is measured against" if loss_fn.family == "policy" else ""
            raise ValueError(
                f"{WHO}: {name} would reach nothing, since {loss_fn} has no reference; {way_out or 'leave it out'}"
            )


def resumes(resume: Any, output_dir: str | Path) -> bool:
    """Whether a run goes on from its checkpoint: True, or the path of that very checkpoint."""
    if resume is None or isinstance(resume, bool):
        return bool(resume)
    own = Path(output_dir) / "checkpoint"
    if not isinstance(resume, str | Path) or Path(resume).resolve() != own.resolve():
        raise ValueError(
            f"{WHO}: resume must be True, False or the checkpoint of output_dir, {str(own)!r}, got {resume!r}; a run "
            "goes on in its own folder: pass that as output_dir, with resume=True"
        )
    if not has_checkpoint(own):
        raise FileNotFoundError(f"{WHO}: resume={str(resume)!r} does not exist; resume=True begins anew where it must")
    return True


def _check_belongings(values: Mapping[str, Any], given: Iterable[str]) -> None:
    for name in given:
        needed = _BELONGS.get(name)
        if needed and values[name] and not any(values[other] for other in needed):
            raise ValueError(f"{WHO}: {name} would reach nothing without {' or '.join(needed)}; leave it out")
        if name.startswith("lora_") and (values["peft_config"] is not None or not values["use_peft"]):
            reason = "use_peft=True" if values["peft_config"] is None else "no peft_config, which says it itself"
            raise ValueError(f"{WHO}: {name} needs {reason}")


def _check_step(values: Mapping[str, Any]) -> None:
    """What a step of an online algorithm must make of its completions."""
    size = values["mini_batch_size"]
    completions = values["batch_size"] * values["gradient_accumulation_steps"] * values["group_size"]
    if size is not None and completions % size:
        raise ValueError(
            f"{WHO}: mini_batch_size={size} must divide the {completions} completions of a step (batch_size x "
            "gradient_accumulation_steps x group_size)"
        )
    length, new = values["max_seq_length"], values["max_new_tokens"]
    if length is not None and length <= new:
        raise ValueError(
            f"{WHO}: max_seq_length={length} leaves no room for a prompt before max_new_tokens={new}; raise the one or "
            "lower the other"
        )
