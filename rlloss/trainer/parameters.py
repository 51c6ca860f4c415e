"""The words of AlignTune and TRL, each with the place in this library that it reaches: one table, read by the trainer.

`docs/trainer.md` shows it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rlloss._checks import nearest
from rlloss.trainer.algorithms import WHO, Algorithm, Kind
from rlloss.trainer.checks import check_values

__all__ = ["PARAMETERS", "Parameter", "parsed", "table"]

Group = Literal["run", "data", "model", "sampling", "reward", "loss"]

EVERY: tuple[Kind, ...] = get_args(Kind)
OFFLINE: tuple[Kind, ...] = ("likelihood", "preference", "unpaired", "reward")
ONLINE: tuple[Kind, ...] = ("policy", "critic")
REFERENCED: tuple[Kind, ...] = ("preference", "unpaired", "policy", "critic")


@dataclass(frozen=True)
class Parameter:
    """One word that users bring.

    Args:
        default: None where the algorithm, or the library behind, has its own.
        kinds: Of the algorithms that it belongs to.
        meaning: What it reaches, in this library's words.
        also: Other spellings.
    """

    name: str
    group: Group
    default: Any
    kinds: tuple[Kind, ...]
    meaning: str
    also: tuple[str, ...] = ()


def _group(group: Group, *rows: tuple[Any, ...]) -> list[Parameter]:
    return [Parameter(row[0], group, *row[1:]) for row in rows]


PARAMETERS: list[Parameter] = [
    *_group(
        "run",
        ("backend", "auto", EVERY, "there is one implementation; `trl` and `unsloth` print a line and change nothing"),
        ("output_dir", "./output", EVERY, "`folder` of the run: metrics.jsonl, checkpoint/, model/"),
        ("num_epochs", 1, EVERY, "passes over the data, a fraction too", ("num_train_epochs",)),
        ("max_steps", None, EVERY, "`steps`, in place of `num_epochs`"),
        ("batch_size", 4, EVERY, "examples (or prompts) that are in memory at once", ("per_device_train_batch_size",)),
        ("gradient_accumulation_steps", 1, EVERY, "an update takes `batch_size` times as many examples"),
        ("learning_rate", None, EVERY, "of AdamW; the algorithm's where None"),
        ("critic_learning_rate", None, ("critic",), "of the critic's own parameters; `learning_rate` where None"),
        ("weight_decay", 0.0, EVERY, "of AdamW, on matrices alone"),
        ("warmup_steps", 0, EVERY, "updates over which the learning rate grows from 0; below 1 a share of all updates"),
        ("warmup_ratio", None, EVERY, "the share of all updates, in place of `warmup_steps`"),
        ("scheduler", "linear", EVERY, "`linear` to 0, `cosine` to 0, or `constant`", ("lr_scheduler_type",)),
        ("max_grad_norm", 1.0, EVERY, "`Session(max_grad_norm=...)`"),
        ("seed", 0, EVERY, "of order, sampling, adapters and heads"),
        ("eval_steps", None, EVERY, "`evaluate_every`; without it `train()` does not evaluate"),
        ("save_steps", None, EVERY, "`save_every`"),
        ("resume", False, EVERY, "goes on from the checkpoint in `output_dir`, if any", ("resume_from_checkpoint",)),
        ("progress", True, EVERY, "shows a bar"),
    ),
    *_group(
        "data",
        ("split", "train", EVERY, "`load_rows(split=...)`"),
        ("column_mapping", None, EVERY, "`load_rows(columns=...)`: ours from theirs, or theirs from ours"),
        ("percent", None, EVERY, "the first so many per cent of the rows"),
        ("max_samples", None, EVERY, "at most so many rows, after `percent`"),
        ("eval_dataset", None, EVERY, "what `evaluate()` is about; else a part held out of the dataset"),
        ("eval_split", None, EVERY, "of `eval_dataset`, where it has splits: see above"),
        ("eval_fraction", 0.05, EVERY, "the part that is held out where there is no `eval_dataset`; 0 for none"),
        ("max_seq_length", 512, OFFLINE, "tokens per sequence, prompt and completion; None for all", ("max_length",)),
        (
            "max_seq_length",
            None,
            ONLINE,
            "tokens of prompt and completion: a prompt keeps the end that `max_new_tokens` leaves room for",
            ("max_length",),
        ),
        ("max_prompt_length", None, EVERY, "tokens per prompt, of which the end is kept"),
        ("truncation_mode", "keep_start", OFFLINE, "which end of a sequence that is too long is kept: `keep_end`, ..."),
        ("padding_free", False, EVERY, "`Session(padding_free=...)`"),
        (
            "precompute_ref_log_probs",
            False,
            ("preference", "unpaired"),
            "the reference's log-probs once, before training, and then no copy of it",
        ),
    ),
    *_group(
        "model",
        (
            "reference",
            None,
            REFERENCED,
            "the frozen model of the KL, loaded or named; else the policy as it starts",
        ),
        ("critic", None, ("critic",), "a `ScalarModel` of your own"),
        ("torch_dtype", None, EVERY, "of the weights; float32 where None", ("dtype",)),
        ("bf16", False, EVERY, "forward passes under autocast, weights in float32; online a bfloat16 copy samples"),
        ("use_peft", False, EVERY, "LoRA by peft; the reference is the model with its adapters off"),
        ("peft_config", None, EVERY, "a peft config of your own, in place of the `lora_` parameters"),
        ("lora_r", 16, EVERY, "rank of the adapters"),
        ("lora_alpha", 32, EVERY, "their scale is `lora_alpha / lora_r`"),
        ("lora_dropout", 0.0, EVERY, "dropout of the adapters' input, where a gradient is made"),
        ("lora_target_modules", None, EVERY, "which layers are adapted; all linear ones where None"),
        ("quantization", None, EVERY, '`{"load_in_4bit": True}` and other options of BitsAndBytesConfig'),
        ("reference_quantization", None, REFERENCED, "of a reference that is loaded a second time, in 8 bits say"),
        ("use_gradient_checkpointing", False, EVERY, "computes a layer's activations again in its backward"),
    ),
    *_group(
        "sampling",
        (
            "temperature",
            1.0,
            EVERY,
            "`Session(temperature=...)`, in sampling and scoring alike, and in `predict`; of a reward model its loss's",
        ),
        (
            "group_size",
            None,
            ("policy", "critic"),
            "completions per prompt; 8, or 1 with a critic",
            ("num_generations",),
        ),
        (
            "max_new_tokens",
            128,
            EVERY,
            "of a completion, in `predict` too",
            ("max_completion_length", "response_length"),
        ),
        ("num_ppo_epochs", None, ONLINE, "`epochs_per_step`; 1, or 4 with a critic", ("ppo_epochs", "num_iterations")),
        ("mini_batch_size", None, ONLINE, "completions per update; all of a step where None"),
    ),
    *_group(
        "reward",
        ("reward_functions", None, ONLINE, "names, functions, or several of them", ("reward_funcs",)),
        ("reward_function_weights", None, ONLINE, "`Rewards(weights=...)`", ("reward_weights",)),
        ("reward_model_name", None, ONLINE, "folder or hub name of a reward model"),
        ("reward_model_path", None, ONLINE, "the same, of a local folder"),
        ("reward_model_quantization", None, ONLINE, "of that model"),
        ("reward_on_text", False, ONLINE, "scores decoded text, by the reward model's own tokenizer"),
        ("normalize_rewards", False, ONLINE, "`RunningRewardNorm` over all rewards so far"),
        ("train_custom_reward_model", False, ONLINE, "a regression head learns what `reward_functions` say of texts"),
        ("reward_training_texts", None, ONLINE, "those texts"),
        ("reward_training_base_model", None, ONLINE, "whose backbone it gets"),
        ("reward_training_output_dir", None, ONLINE, "where it is saved"),
        ("reward_training_steps", 100, ONLINE, "its updates, of 8 texts each"),
    ),
    *_group(
        "loss",
        ("loss_type", None, EVERY, "another loss of the same family by its name; `sigmoid` is dpo, `nll` is sft"),
        ("beta", None, REFERENCED, "the loss's `beta`; of policy losses their `kl_coef`"),
        (
            "kl_coef",
            None,
            ONLINE,
            "weight of the KL: in the reward with a critic and of rloo and reinforce, else in the loss",
        ),
        ("init_kl_coef", None, ("critic",), "where `AdaptiveKLController` starts"),
        ("target_kl", None, ("critic",), "the KL per sequence that it holds"),
        ("kl_penalty", None, ("critic",), "estimator of the KL in the reward: `kl` is k1, `abs`, `mse` is k2"),
        ("cliprange", None, ONLINE, "`clip_eps_low` and `clip_eps_high`", ("clip_range",)),
        ("cliprange_value", None, ("critic",), "`ValueLoss(value_clip=...)`"),
        ("vf_coef", None, ("critic",), "`ActorCriticLoss(value_coef=...)`; 0.1 where None"),
        (
            "advantages",
            None,
            ("policy",),
            "`GroupAdvantages(name)`: a name of `rlloss.list_advantages()`; the algorithm's own where None",
            ("adv_estimator", "advantage_estimator"),
        ),
        ("scale_rewards", None, ("policy",), "`GroupAdvantages(scale=...)`: `group`, `batch` or `none`"),
        ("gamma", None, ("critic",), "`CriticAdvantages(gamma=...)`"),
        ("lam", None, ("critic",), "`CriticAdvantages(gae_lambda=...)`", ("gae_lambda",)),
        ("shared_trunk", False, ("critic",), "the critic is a head on the policy, not a model of its own"),
        ("simpo_gamma", None, ("preference",), "`SimPOLoss(margin=...)`"),
        ("reference_free", None, ("preference",), "as the loss has it"),
    ),
]


def _spelled(parameters: Iterable[Parameter]) -> dict[str, Parameter]:
    return {name: p for p in parameters for name in (p.name, *p.also)}


_KNOWN = _spelled(PARAMETERS)


def parsed(algorithm: Algorithm, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every parameter of the algorithm with its value, checked, and hyperparameters that only the loss knows."""
    values, of_loss, seen = _sorted(algorithm, given)
    values |= {name: own for name, own in algorithm.defaults.items() if name in values and values[name] is None}
    check_values(algorithm, values, seen)
    return values, of_loss


def _sorted(algorithm: Algorithm, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Parameters with their values, hyperparameters of the loss, and the spelling of each parameter that was given."""
    hyperparameters = {name for name in algorithm.hyperparameters if name not in _KNOWN}
    mine = _spelled(p for p in PARAMETERS if algorithm.kind in p.kinds)
    values = {p.name: p.default for p in mine.values()}
    of_loss: dict[str, Any] = {}
    seen: dict[str, str] = {}
    for name, value in given.items():
        if name in mine:
            parameter = mine[name]
            if parameter.name in seen:
                raise ValueError(f"{WHO}: {seen[parameter.name]} and {name} are one parameter; give one")
            seen[parameter.name] = name
            values[parameter.name] = value
        elif name in hyperparameters:
            of_loss[name] = value
        elif name in _KNOWN:
            kinds = ", ".join(_KNOWN[name].kinds)
            raise ValueError(
                f"{WHO}: {name} ({_KNOWN[name].meaning}) is no parameter of {algorithm.name!r}, of the kind "
                f"{algorithm.kind!r}, and would reach nothing; leave it out. It belongs to the kinds {kinds}"
            )
        else:
            known = sorted([*mine, *hyperparameters])
            raise ValueError(
                f"{WHO}: unknown parameter {name!r} of {algorithm.name!r}{nearest(name, known)}; docs/trainer.md lists "
                f"them, and the loss has: {', '.join(sorted(hyperparameters))}"
            )
    return values, of_loss, seen


def table() -> str:
    """All parameters as Markdown, group by group."""
    lines = []
    for group in get_args(Group):
        lines += [
            f"### {group.capitalize()}",
            "",
            "| parameter | default | of | what it reaches |",
            "|---|---|---|---|",
        ]
        for p in (p for p in PARAMETERS if p.group == group):
            names = ", ".join(f"`{name}`" for name in (p.name, *p.also))
            kinds = "all" if p.kinds == EVERY else ", ".join(p.kinds)
            lines.append(f"| {names} | `{p.default!r}` | {kinds} | {p.meaning} |")
        lines.append("")
    return "\n".join(lines)
