"""Models by name or folder: what a run trains, and the frozen references of its losses, each loaded once."""

import threading
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from rlloss.heads import text_config
from rlloss.loop.peft import WithoutAdapters
from rlloss.loop.pretrained import load_causal_lm
from rlloss.loop.scalar_folder import holds_scalar_model, load_scalar_model
from rlloss.loop.session import Session
from rlloss.scalar import ScalarModel

__all__ = [
    "References",
    "Version",
    "check_vocabulary",
    "frozen_module",
    "load_language_model",
    "load_reward_model",
    "num_ids",
    "version_of",
]

Version = tuple[str, tuple[tuple[str, int, int], ...]]


def load_language_model(name: str | Path, **options: Any) -> nn.Module:
    """A causal LM from a folder or the hub."""
    if holds_scalar_model(name):
        raise ValueError(
            f"{name} holds a reward model, which has no language-model head; pass create_run(..., reward_model=True)"
        )
    return load_causal_lm(name, **options)


def load_reward_model(name: str | Path, **options: Any) -> ScalarModel:
    """A reward model that was saved as one, or a new one on the backbone of a causal LM."""
    if holds_scalar_model(name):
        return load_scalar_model(name, **options)
    return ScalarModel(load_language_model(name, **options), bias=False)


class References:
    """Frozen models by name, each in memory once per dtype and device, whatever the number of runs that ask.

    A folder that was written anew is loaded anew. Models live as long as a run keeps them.
    """

    def __init__(self) -> None:
        self._models: WeakValueDictionary[tuple[Any, ...], nn.Module] = WeakValueDictionary()
        self._lock = threading.Lock()

    def find(self, who: str, name: str | Path, session: Session, version: Version | None = None) -> nn.Module:
        """The reference for a session's model, in its dtype and on its device; of an older version if it is there."""
        like = next(session.model.parameters())
        with self._lock:
            now = version_of(name)
            key = (*(now if version is None else version), like.dtype, like.device)
            model = self._models.get(key)
            if model is None:
                if version not in (None, now):
                    raise ValueError(
                        f"{who}: reference_model='base' is what the run started from, and the folder {name} has been "
                        "written since; save to another one, or pass a copy of what was there"
                    )
                loaded: Any = load_language_model(name, dtype=like.dtype)
                model = self._models[key] = loaded.to(like.device).requires_grad_(False).eval()
        return model


def version_of(name: str | Path) -> Version:
    """A folder and when its files were written; of a hub name only that.

    >>> version_of("Qwen/Qwen3-0.6B")
    ('Qwen/Qwen3-0.6B', ())
    """
    folder = Path(name)
    if not folder.is_dir():
        return str(name), ()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return str(folder.resolve()), tuple((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in files)


def frozen_module(who: str, model: nn.Module, session: Session) -> nn.Module:
    """A module as a reference, frozen and in eval mode from now on; a ValueError for one that is trained."""
    if isinstance(model, WithoutAdapters):
        return model
    trained = {id(p) for group in session.optimizer.param_groups for p in group["params"]}
    if model is session.model or any(id(p) in trained for p in model.parameters()):
        raise ValueError(
            f"{who}: reference_model holds the weights that this run trains, and would move with them; pass "
            "rlloss.loop.frozen_copy(model), made before the training, or WithoutAdapters(model) of a PEFT model"
        )
    return model.requires_grad_(False).eval()


def check_vocabulary(who: str, reference: nn.Module, session: Session) -> None:
    """Raises ValueError for a reference that reads other tokens than a session's model."""
    sizes = [_vocab_size(m) for m in (session.model, reference)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise ValueError(
            f"{who}: reference_model has a vocabulary of {sizes[1]} tokens and the run's model one of {sizes[0]}; "
            "a reference must read the same tokens"
        )


def num_ids(model: Any) -> int | None:
    """How many token ids a model can read; None where it does not say."""
    backbone: Any = model.backbone if isinstance(model, ScalarModel) else model
    embeddings = backbone.get_input_embeddings() if hasattr(backbone, "get_input_embeddings") else None
    rows = getattr(embeddings, "num_embeddings", None)
    return rows if isinstance(rows, int) else _vocab_size(backbone)


def _vocab_size(model: Any) -> int | None:
    return getattr(text_config(model), "vocab_size", None)
