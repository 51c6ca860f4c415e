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

ELSEWHERE: dict[str, Elsewhere] = {
    **dict.fromkeys(("use_vllm", "vllm_mode", "vllm_tensor_parallel_size", "vllm_gpu_memory_utilization"), _SAMPLER),
    **dict.fromkeys(("vllm_server_base_url", "vllm_server_host", "vllm_server_port"), _SAMPLER),
    **dict.fromkeys(("logging_steps", "logging_strategy", "logging_dir", "report_to", "log_with", "run_name"), _LOG),
    "push_to_hub": _UPLOAD,
    **dict.fromkeys(("dataset_num_proc", "dataloader_num_workers"), _PROCESSES),
    "model_name": Elsewhere("the model that the trainer is given is the one that trains"),
    "remove_unused_columns": Elsewhere("rewards see every column of the rows, losses those that they need"),
    "fp16": Elsewhere("forward passes run in the weights' own dtype", (False, None), "pass bf16=True"),
    "packing": Elsewhere("sequences stay apart", (False, None), "pass padding_free=True, which wastes nothing either"),
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
