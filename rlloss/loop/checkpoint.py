"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all; nothing is ever pickled."""

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlloss._checks import nearest
from rlloss.loop.state import (
    memory_of,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
    restore_rng,
    rng_tensors,
)

__all__ = [
    "has_checkpoint",
    "optimizer_tensors",
    "read_checkpoint",
    "restore_model",
    "restore_optimizer",
    "restore_rng",
    "rng_tensors",
    "write_checkpoint",
]

logger = logging.getLogger("rlloss")

_FORMAT, _VERSION = "rlloss checkpoint", 1
_INFO, _TENSORS = "checkpoint.json", "tensors.safetensors"


def write_checkpoint(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    info: Mapping[str, Any],
    *,
    extra: Callable[[Path], object] | None = None,
) -> Path:
    """Writes tensors and `info` into `folder`, replacing the checkpoint there at once.

    Everything is written and synced under a hidden name beside the folder, which is then renamed; whenever the writer
    dies, `read_checkpoint` returns the old checkpoint or the new one, whole. One writer per folder.

    Args:
        folder: Created with its parents. A folder that holds anything but a checkpoint is not replaced.
        tensors: Any dense tensors; names that share one tensor (tied weights) share it again after reading.
        info: What JSON holds, and beyond that tuples and keys that are not text, all of which come back as they were.
        extra: Puts more files into the same checkpoint: `lambda path: model.save_pretrained(path / "model")`.

    >>> import tempfile
    >>> folder = write_checkpoint(tempfile.mkdtemp(), {"weight": torch.ones(2)}, {"step": 3, "betas": (0.9, 0.95)})
    >>> read_checkpoint(folder)
    ({'weight': tensor([1., 1.])}, {'step': 3, 'betas': (0.9, 0.95)})
    """
    folder = Path(folder)
    target = folder.resolve()  # a link is followed, not replaced
    stored, names = _stored(tensors)
    text = json.dumps(
        {"format": _FORMAT, "version": _VERSION, "tensors": names, "info": _encoded(info, "info")}, indent=1
    )
    _check_replaceable(target)
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)  # of a writer that died
    fresh.mkdir(parents=True)
    try:
        if extra is not None:
            extra(fresh)
        if taken := [name for name in (_INFO, _TENSORS) if (fresh / name).exists()]:
            raise ValueError(
                f"write_checkpoint: extra wrote {taken[0]}, a name of the checkpoint itself; choose another"
            )
        (fresh / _INFO).write_text(text, "utf-8")
        save_file(stored, fresh / _TENSORS)
        (fresh / _TENSORS).chmod((fresh / _INFO).stat().st_mode)  # safetensors would keep it from the owner's group
        _sync(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    _replace(fresh, target)
    return folder


def read_checkpoint(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the `info` of a checkpoint, bit for bit as `write_checkpoint` got them.

    >>> read_checkpoint("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: read_checkpoint: no/such/folder does not exist
    """
    source = _readable(Path(folder))
    try:
        content = json.loads((source / _INFO).read_text("utf-8"))
        format_, version = content.get("format"), content.get("version")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"read_checkpoint: {source / _INFO} is damaged: {error}; take an earlier checkpoint"
        ) from error
    if format_ != _FORMAT or version != _VERSION:
        raise ValueError(
            f"read_checkpoint: {source} has format {format_!r} version {version!r}, this rlloss reads {_FORMAT!r} "
            f"version {_VERSION}; read it with the rlloss that wrote it"
        )
    try:
        stored = load_file(source / _TENSORS)
        tensors = {name: stored[kept] for name, kept in content["tensors"].items()}
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"read_checkpoint: {source / _TENSORS} is damaged: {error}; take an earlier checkpoint"
        ) from error
    return tensors, _decoded(content["info"])


def has_checkpoint(folder: str | Path) -> bool:
    """Whether something stands for `read_checkpoint` to read: also where a write was interrupted, and the old one does.

    >>> has_checkpoint("no/such/folder")
    False
    """
    target = Path(folder).resolve()
    return target.exists() or _aside(target).exists()


def _stored(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, one per memory, and for every name the name that its tensor is written under."""
    stored: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach() if isinstance(tensor, Tensor) else tensor  # a Parameter becomes a plain Tensor
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_meta:
            got = f"{tensor.layout} on {tensor.device}" if type(tensor) is Tensor else type(tensor).__name__
            raise ValueError(
                f"write_checkpoint: tensors[{name!r}] must be a plain dense tensor, got {got}; gather it first"
            )
        if tensor.dtype is torch.complex128 or name == "__metadata__":
            raise ValueError(
                f"write_checkpoint: safetensors holds no {tensor.dtype} named {name!r}; store its real view"
            )
        names[name] = seen.setdefault(memory_of(tensor), name)
        if names[name] == name:
            # safetensors writes a lazy conjugate as if it were none, and refuses two views of one memory.
            dense = tensor.resolve_conj().resolve_neg().contiguous()
            storage = (dense.device, dense.untyped_storage().data_ptr())
            stored[name] = dense.clone() if storage in storages else dense
            storages.add(storage)
    return stored, names


def _encoded(value: Any, path: str) -> Any:
    """Plain JSON, with `$tuple` and `$dict` for what JSON would return as a list or with text for keys."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_encoded(entry, f"{path}[{i}]") for i, entry in enumerate(value)]
    if type(value) is tuple:
        return {"$tuple": [_encoded(entry, f"{path}[{i}]") for i, entry in enumerate(value)]}
    if isinstance(value, Mapping):
        entries = [[_encoded(key, path), _encoded(entry, f"{path}[{key!r}]")] for key, entry in value.items()]
        is_plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(entries) if is_plain else {"$dict": entries}
    hint = "put it into `tensors`" if isinstance(value, Tensor) else "convert it to numbers, text, lists and dicts"
    raise ValueError(f"write_checkpoint: {path} is of type {type(value).__name__}, which JSON cannot hold; {hint}")


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if list(value) == ["$tuple"]:
        return tuple(_decoded(value["$tuple"]))
    if list(value) == ["$dict"]:
        return {_decoded(key): _decoded(entry) for key, entry in value["$dict"]}
    return {key: _decoded(entry) for key, entry in value.items()}


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _check_replaceable(target: Path) -> None:
    if target.is_file():
        raise ValueError(f"write_checkpoint: {target} is a file; a checkpoint is a folder")
    if target.is_dir() and not (target / _INFO).is_file() and (names := sorted(os.listdir(target))):
        raise ValueError(
            f"write_checkpoint: {target} holds no checkpoint but {names[:5]}, which would be deleted; "
            "choose another folder"
        )


def _sync(folder: Path) -> None:
    """Brings files and folders to the disk, so that a rename never shows a file whose content is not there yet."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(fresh: Path, target: Path) -> None:
    aside = _aside(target)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
    os.rename(fresh, target)
    _sync_one(target.parent)
    if aside.exists():
        os.rename(aside, fresh)  # so that a half-deleted checkpoint never has the name that readers fall back on
        shutil.rmtree(fresh)


def _readable(folder: Path) -> Path:
    source, aside = folder.resolve(), _aside(folder.resolve())
    if not source.exists() and aside.exists():
        logger.warning("read_checkpoint: a write to %s was interrupted; reading the checkpoint before it", source)
        return aside
    if (source / _INFO).is_file():
        return source
    if not source.exists():
        beside = sorted(os.listdir(source.parent)) if source.parent.is_dir() else []
        raise FileNotFoundError(f"read_checkpoint: {folder} does not exist{nearest(source.name, beside)}")
    inner = sorted(path.parent.name for path in source.glob(f"*/{_INFO}"))
    names = sorted(os.listdir(source)) if source.is_dir() else []
    hint = f"; pass one of its checkpoints {inner}" if inner else ""
    if "config.json" in names:
        hint = "; a folder with config.json is a model, which transformers reads: from_pretrained"
    raise ValueError(f"read_checkpoint: {folder} is no checkpoint, it has no {_INFO} but {names[:8]}{hint}")
