"""Which split of a source of rows `evaluate()` is about, where the user names none."""

import json
import re
from pathlib import Path
from typing import Any

from rlloss.loop.files import SUFFIXES

__all__ = ["eval_split"]


def eval_split(source: Any, trained: str) -> str:
    """The only split that there is, else the test or validation split that goes with the one that is trained on.

    Where there is none of these it is the split of that name, and `train` of what has no splits.

    >>> from datasets import DatasetDict
    >>> eval_split(DatasetDict({"train_prefs": [], "test_prefs": [], "train_sft": []}), "train_prefs")
    'test_prefs'
    >>> eval_split([{"prompt": "2+2="}], "train_prefs")
    'train'
    """
    splits = _splits(source)
    if len(splits) == 1:
        return splits[0]
    beside = [trained.replace("train", name) for name in ("test", "validation")]
    candidates = [name for name in (*beside, "test", "validation") if name != trained]
    return next((name for name in (*candidates, trained) if name in splits), "train")


def _splits(source: Any) -> list[str]:
    """The names of splits, of a folder those of its files; none of a list, a Dataset or a file."""
    import datasets

    if isinstance(source, datasets.DatasetDict):
        return [str(name) for name in source]
    if not isinstance(source, str | Path):
        return []
    path = Path(source).expanduser()
    if path.is_dir():
        return _splits_of_folder(path)
    return [] if path.is_file() else _splits_of_hub(str(source))


def _splits_of_folder(folder: Path) -> list[str]:
    if (folder / "dataset_dict.json").is_file():
        return json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    return sorted({part for name in names for part in (re.sub(r"-\d+-of-\d+.*", "", name.stem), *name.parts[:-1])})


def _splits_of_hub(name: str) -> list[str]:
    import datasets

    try:
        return [str(split) for split in datasets.load_dataset_builder(name).info.splits or {}]
    except (OSError, ValueError):  # `load_rows` will fail likewise, and say more
        return []
