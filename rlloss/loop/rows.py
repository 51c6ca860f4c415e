"""Rows from anywhere: a file, a folder, a list, a `datasets.Dataset` or the Hugging Face hub."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from rlloss._checks import nearest
from rlloss.loop.files import ARROW_ERRORS, SUFFIXES, read_file, row_unit, table

if TYPE_CHECKING:
    import datasets

__all__ = ["load_rows", "place"]

_SPLIT_WORDS = {"train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "evaluation"}
_FILE_SUFFIXES = {*SUFFIXES, ".txt", ".tsv", ".zip", ".gz", ".bz2", ".xz", ".zst", ".arrow", ".xlsx", ".pkl", ".pt"}


class _File(NamedTuple):
    """Where a file's rows begin in a dataset, and what its rows are called."""

    first: int
    name: str
    unit: str


# By identity: a filtered or shuffled copy is another object, whose rows are no longer the lines of the files.
_ORIGINS: "WeakKeyDictionary[datasets.Dataset, list[_File]]" = WeakKeyDictionary()


def load_rows(
    source: "str | Path | Sequence[Mapping[str, Any]] | datasets.Dataset | datasets.DatasetDict",
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
) -> "datasets.Dataset":
    """The rows of a file, folder, list, dataset or hub name, as a `datasets.Dataset`.

    Nothing is guessed and nothing is skipped: a malformed line, a ragged CSV row or a column of mixed types is an error
    that names the file and the row. A field that only other rows have reads None.

    Args:
        source: a .jsonl, .json (a list of objects), .csv (every cell is text) or .parquet file; a folder of such files
            or one written by `save_to_disk`; a list of dicts; a Dataset or DatasetDict; or else a name on the hub.
        split: chooses among the splits of a DatasetDict, a hub dataset or a folder that holds `train.jsonl`,
            `test-00000-of-00002.parquet`, `validation/0.csv` and so on. A folder without such names is all train.
        columns: renames, ours from theirs: `{"prompt": "question"}`.

    >>> load_rows([{"question": "2+2=", "answer": "4"}], columns={"prompt": "question"}).column_names
    ['prompt', 'answer']
    """
    rows, files = _loaded(source, split)
    if len(rows) == 0:
        raise ValueError(f"load_rows: {_shown(source)} holds no rows")
    rows = _renamed(rows, columns or {}, _shown(source))
    _ORIGINS[rows] = files
    return rows


def place(rows: object, index: int) -> str:
    """How an error names row `index` (from 0): by file and line where `rows` came from `load_rows` unaltered.

    >>> place([{"prompt": "a"}, {"prompt": ""}], 1)
    'row 2'
    """
    files = next((files for owner, files in _ORIGINS.items() if owner is rows), [])
    if not files:
        return f"row {index + 1}"
    file = max(file for file in files if file.first <= index)
    return f"{file.name}, {file.unit} {index - file.first + 1}"


def _loaded(source: Any, split: str) -> "tuple[datasets.Dataset, list[_File]]":
    import datasets

    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_dir():
            return _folder(path, split)
        if not path.is_file():
            return _hub(source, split)
        _check_whole(source, split)
        return read_file(path), [_entry(path, 0)]
    if isinstance(source, datasets.DatasetDict):
        return _split(source, split, "the DatasetDict"), []
    _check_whole(source, split)
    if isinstance(source, datasets.Dataset):
        return source, []
    if isinstance(source, Sequence):
        return table(source, lambda index: f"row {index + 1}"), []
    raise ValueError(
        f"load_rows: cannot read rows from {type(source).__name__}; pass a path, a list of dicts, a Dataset or a hub "
        "name (of a streaming dataset: `list(stream.take(1000))`)"
    )


def _check_whole(source: object, split: str) -> None:
    if split != "train":
        raise ValueError(
            f"load_rows: {_shown(source)} has no splits to choose {split!r} from; leave split out, or pass "
            "the folder, DatasetDict or hub name that has them"
        )


def _split(splits: "datasets.DatasetDict", split: str, name: str) -> "datasets.Dataset":
    if split not in splits:
        raise ValueError(
            f"load_rows: {name} has splits {sorted(splits)}, not {split!r}{nearest(split, map(str, splits))}"
        )
    return splits[split]


def _hub(source: str | Path, split: str) -> "tuple[datasets.Dataset, list[_File]]":
    import datasets

    name = str(source)
    is_path = isinstance(source, Path) or name[:1] in {".", "/", "~"} or name.count("/") > 1 or "\\" in name
    if is_path or Path(name).suffix.lower() in _FILE_SUFFIXES:
        folder = Path(name).expanduser().parent
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        absent = "" if folder.is_dir() else f" (nor does the folder {folder})"
        raise FileNotFoundError(f"load_rows: {name} does not exist{absent}{nearest(Path(name).name, names)}")
    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise (ValueError if isinstance(error, ValueError) else OSError)(
            f"load_rows: {name!r} is no local file or folder, and the Hugging Face hub gave no such dataset: {error}; "
            "without network save it elsewhere with `save_to_disk` and pass that folder; for a configuration pass "
            f"`datasets.load_dataset({name!r}, config, split={split!r})` itself"
        ) from error
    return rows, [_File(0, name, "row")]


def _folder(folder: Path, split: str) -> "tuple[datasets.Dataset, list[_File]]":
    import datasets

    if (folder / "dataset_dict.json").is_file():
        return _split(datasets.DatasetDict.load_from_disk(str(folder)), split, str(folder)), []
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        _check_whole(folder, split)
        return datasets.Dataset.load_from_disk(str(folder)), []
    parts, files, first = [], [], 0
    for path in _split_files(folder, split):
        parts.append(read_file(path))
        files.append(_entry(path, first))
        first += len(parts[-1])
    try:
        return datasets.concatenate_datasets(parts), files
    except ARROW_ERRORS as error:
        raise ValueError(f"load_rows: the files of {folder} do not fit together: {error}") from error


def _split_files(folder: Path, split: str) -> list[Path]:
    paths = [path for path in sorted(folder.rglob("[!.]*.*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    names = {path: path.relative_to(folder) for path in paths}
    paths = [path for path in paths if not any(part.startswith(".") for part in names[path].parts)]
    kinds = sorted({path.suffix.lower() for path in paths})
    if len(kinds) != 1:
        found = f"both {' and '.join(kinds)} files" if kinds else f"no {', '.join(SUFFIXES)} file"
        raise ValueError(f"load_rows: {folder} holds {found}; pass one file, or a folder of files of one kind")
    chosen = [p for p in paths if split in (re.sub(r"-\d+-of-\d+.*", "", p.stem), *names[p].parts[:-1])]
    # A word such as "test" in any name means that the folder has splits: to read them all would train on the test set.
    marked = any(_SPLIT_WORDS & set(re.split("[^a-z]+", str(names[path]).lower())) for path in paths)
    if not chosen and (marked or split != "train"):
        raise ValueError(
            f"load_rows: {folder} has no files of split {split!r}; a split is a file {split}{kinds[0]} or a folder "
            f"{split}/, and this folder holds {[str(names[path]) for path in paths]}; pass the file itself"
        )
    return chosen or paths


def _entry(path: Path, first: int) -> _File:
    return _File(first, str(path), row_unit(path))


def _renamed(rows: "datasets.Dataset", columns: Mapping[str, str], name: str) -> "datasets.Dataset":
    present = rows.column_names
    for ours, theirs in columns.items():
        if theirs not in present:
            raise ValueError(
                f"load_rows: columns={{{ours!r}: {theirs!r}}}: {name} has no column {theirs!r}, only {present}"
                f"{nearest(theirs, present)}"
            )
        if ours in present and ours not in columns.values():
            raise ValueError(
                f"load_rows: columns={{{ours!r}: {theirs!r}}}: {name} already has a column {ours!r}; "
                f"rename that too, or drop it with `rows.remove_columns({ours!r})`"
            )
    if len(set(columns.values())) != len(columns):
        raise ValueError(f"load_rows: columns={dict(columns)} uses one column twice; copy it in the data first")
    return rows.rename_columns({theirs: ours for ours, theirs in columns.items() if ours != theirs})


def _shown(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else f"the {type(source).__name__}"
