"""Keywords of TRL's configs that reach nothing here: what each one means here instead, or the way out."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ELSEWHERE", "Elsewhere", "checked_elsewhere"]


@dataclass(frozen=True)
class Elsewhere:
    """A keyword that can be left aside without changing what is trained.

    Args:
        says: What stands in its place here; printed once per config.
        harmless: The values for which that holds; None for all.
        way_out: For any other value.
    """

    says: str
    harmless: tuple[Any, ...] | None = None
    way_out: str = ""


_SAMPLER = Elsewhere("completions come from rlloss's own sampler")
_LOG = Elsewhere("the numbers of every step go to metrics.jsonl in output_dir")
_UPLOAD = Elsewhere(
    "nothing is uploaded",
    harmless=(False, None),
    way_out="train, write the model by trainer.save_model(folder), and upload that folder with huggingface_hub",
)
_PROCESSES = Elsewhere("rows become tokens in this process")
_WHOLE = "completions are drawn from the whole distribution, which the loss scores"
_LEAVE = "leave it out, or draw from a sharper one by temperature"
_EVALUATES = Elsewhere("train() evaluates every eval_steps", ("no", "steps"), "pass eval_steps, a number of updates")

ELSEWHERE: dict[str, Elsewhere] = {
    **dict.fromkeys(("use_vllm", "vllm_mode", "vllm_tensor_parallel_size", "vllm_gpu_memory_utilization"), _SAMPLER),
    **dict.fromkeys(("vllm_server_base_url", "vllm_server_host", "vllm_server_port"), _SAMPLER),
    **dict.fromkeys(("logging_steps", "logging_strategy", "logging_dir", "report_to", "log_with", "run_name"), _LOG),
    "logging_first_step": _LOG,
    "push_to_hub": _UPLOAD,
    **dict.fromkeys(("dataset_num_proc", "dataloader_num_workers"), _PROCESSES),
    "model_name": Elsewhere("the model that the trainer is given is the one that trains"),
    "remove_unused_columns": Elsewhere("rewards see every column of the rows, losses those that they need"),
    "fp16": Elsewhere("forward passes run in the weights' own dtype", (False, None), "pass bf16=True"),
    "packing": Elsewhere("sequences stay apart", (False, None), "pass padding_free=True, which wastes nothing either"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), _EVALUATES),
    "per_device_eval_batch_size": Elsewhere("evaluation is cut into parts as training is"),
    "save_strategy": Elsewhere(
        "a checkpoint is written every save_steps, and at the end",
        ("no", "steps"),
        "pass save_steps, a number of updates",
    ),
    "save_total_limit": Elsewhere("output_dir holds one checkpoint, the last"),
    "optim": Elsewhere(
        "the optimiser is AdamW",
        ("adamw_torch", "adamw_torch_fused"),
        "for another one give rlloss.Session an optimizer, and train it by rlloss.loop.train_offline or train_online",
    ),
    "gradient_checkpointing_kwargs": Elsewhere("activations are computed again without re-entrance"),
    "disable_dropout": Elsewhere(
        "the model's own dropout is off; that of adapters is as their config says",
        (True, None),
        "for the model's own give rlloss.Session dropout=True, and train it by rlloss.loop.train_offline",
    ),
    "assistant_only_loss": Elsewhere(
        "of messages what the assistant writes is trained",
        (True, None),
        "rows of 'text', as tokenizer.apply_chat_template(messages, tokenize=False) makes them, are trained whole",
    ),
    "completion_only_loss": Elsewhere(
        "of prompt and completion the completion is trained", (True, None), "rows of 'text' are trained whole"
    ),
    "top_p": Elsewhere(_WHOLE, (1, None), _LEAVE),
    "top_k": Elsewhere(_WHOLE, (0, -1, None), _LEAVE),
    "min_p": Elsewhere(_WHOLE, (0, None), _LEAVE),
    "repetition_penalty": Elsewhere(_WHOLE, (1, None), _LEAVE),
}


def checked_elsewhere(who: str, words: Mapping[str, Any]) -> Iterable[str]:
    """One line for each meaning among the words of `ELSEWHERE`; ValueError for a value that would be missed."""
    lines: dict[str, list[str]] = {}
    for word, value in words.items():
        entry = ELSEWHERE[word]
        if entry.harmless is not None and value not in entry.harmless:
            raise ValueError(f"{who}: {word}={value!r} does nothing here: {entry.says}; {entry.way_out}")
        lines.setdefault(entry.says, []).append(word)
    return [f"{who}: {', '.join(given)}: {says}" for says, given in lines.items()]
