"""Datasets of queries, as the loops of TRL's PPOTrainer have them, to prompts and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlloss.loop.data import Prompt
from rlloss.loop.rows import load_rows

__all__ = ["columns_of", "prompt_rows", "query_row"]


def prompt_rows(dataset: Any, tokenizer: Any) -> Any:
    """The dataset with a column `prompt` for its `query`, or for the text of its `input_ids`; any other as it is."""
    if dataset is None or isinstance(dataset, str | Path | Mapping):
        return dataset
    rows = load_rows(dataset)
    columns = set(rows.column_names)
    if {"prompt", "chosen"} & columns or not {"query", "input_ids"} & columns:
        return dataset
    if "query" in columns:
        return load_rows(rows, columns={"prompt": "query"})
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows["input_ids"]]
    return rows.add_column("prompt", texts)


def query_row(prompt: Prompt) -> dict[str, Any]:
    """A prompt as such a loop reads it: its columns, its text as `query`, its tokens as a tensor."""
    tokens = torch.as_tensor(prompt.columns.get("input_ids", prompt.ids))
    return {**prompt.columns, "query": prompt.text, "input_ids": tokens}


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """A batch as a dict of lists."""
    return {name: [row[name] for row in rows] for name in rows[0]}
