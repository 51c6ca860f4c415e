"""The reference's log-probs of fixed examples, computed once: training then needs no reference in memory."""

import dataclasses
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rlloss._checks import nearest
from rlloss._typing import Float
from rlloss.loop.batch import Batch, collate
from rlloss.loop.checkpoint import read_checkpoint, write_checkpoint
from rlloss.loop.data import Pair, Tokens
from rlloss.loop.labelled import Labelled
from rlloss.loop.peft import WithoutAdapters
from rlloss.loop.session import Session

__all__ = ["ref_logprobs_of", "with_ref_logprobs"]

logger = logging.getLogger("rlloss")

AnyExample = TypeVar("AnyExample", Tokens, Pair, Labelled)

_WHO = "with_ref_logprobs"
_CHUNK = 1024  # sequences per batch: sorted into micro-batches by length, and never the whole dataset as one tensor
_FORMAT = "reference log-probs"


def with_ref_logprobs(
    session: Session, examples: Sequence[AnyExample], folder: str | Path | None = None
) -> list[AnyExample]:
    """The examples with the reference's log-probs of every sequence of theirs, KTO's mismatched ones included.

    `offline_batch`, and so `train_offline` and `evaluate_offline`, read these instead of asking the reference, which
    need not exist any more: `session.reference = None` frees its memory.

    Args:
        session: Its reference, temperature and autocast dtype are those of the training.
        examples: From `completions`, `pairs` or `labelled`.
        folder: Written with what was computed (safetensors and JSON), or read where it exists. What was written for
            other tokens, another reference, temperature or autocast dtype raises. A session without a reference takes
            the folder's word for the weights, which is logged.
    """
    if not examples:
        return []
    wanted = {_digest(tokens): tokens for example in examples for tokens in _sequences(example)}
    if folder is not None and _holds_something(Path(folder)):
        known = _read(session, folder, wanted)
    else:
        known = _computed(session, wanted)
        if folder is not None:
            _write(session, folder, known)
    return [_attached(example, known) for example in examples]


def ref_logprobs_of(sequences: Sequence[Tokens], batch: Batch) -> Float[Tensor, "B T"] | None:
    """What `with_ref_logprobs` attached, aligned with the batch that `collate` made of the sequences; None for none."""
    cached = [tokens.ref_logprobs for tokens in sequences if tokens.ref_logprobs is not None]
    if not cached:
        return None
    if len(cached) < len(sequences):
        raise ValueError(
            f"offline_batch: {len(cached)} of {len(sequences)} sequences have the reference's log-probs; pass all "
            f"examples through {_WHO}, or none"
        )
    whole = cached[0].new_zeros(batch.input_ids.shape)
    whole[batch.attention_mask] = torch.cat(cached)
    return F.pad(whole[:, 1:], (0, 1))  # row t of a batch is about token t + 1


def _computed(session: Session, wanted: Mapping[bytes, Tokens]) -> dict[bytes, Tensor]:
    by_length = sorted(wanted.items(), key=lambda item: len(item[1].input_ids))
    known = {}
    for i in range(0, len(by_length), _CHUNK):
        chunk = by_length[i : i + _CHUNK]
        batch = collate([tokens for _, tokens in chunk])
        aligned = F.pad(session.logprobs(batch, reference=True)[:, :-1], (1, 0))
        for (digest, tokens), row in zip(chunk, aligned, strict=True):
            known[digest] = row[: len(tokens.input_ids)].clone()  # a view would keep the padding in memory
    return known


def _sequences(example: Tokens | Pair | Labelled) -> Iterator[Tokens]:
    if isinstance(example, Tokens):
        yield example
    else:
        yield from (part for part in vars(example).values() if isinstance(part, Tokens))


def _attached(example: AnyExample, known: Mapping[bytes, Tensor]) -> AnyExample:
    if isinstance(example, Tokens):
        return dataclasses.replace(example, ref_logprobs=known[_digest(example)])
    parts = {name: _attached(part, known) for name, part in vars(example).items() if isinstance(part, Tokens)}
    return dataclasses.replace(example, **parts)


def _digest(tokens: Tokens) -> bytes:
    return blake2b(array("q", tokens.input_ids).tobytes() + bytes(tokens.loss_mask), digest_size=16).digest()


# the folder


def _holds_something(folder: Path) -> bool:
    return folder.is_file() or (folder.is_dir() and any(folder.iterdir()))


def _write(session: Session, folder: str | Path, known: Mapping[bytes, Tensor]) -> None:
    values = list(known.values())
    tensors = {
        "ref_logprobs": torch.cat(values),
        "lengths": torch.tensor([len(value) for value in values]),
        "digests": torch.frombuffer(bytearray(b"".join(known)), dtype=torch.uint8),
    }
    info = {"kind": _FORMAT, "weights": _weights(session), "settings": _settings(session)}
    write_checkpoint(folder, tensors, info)


def _read(session: Session, folder: str | Path, wanted: Mapping[bytes, Tokens]) -> dict[bytes, Tensor]:
    tensors, info = read_checkpoint(folder)
    if info.get("kind") != _FORMAT:
        raise ValueError(f"{_WHO}: {folder} holds another checkpoint, no {_FORMAT}; choose another folder")
    way_out = "; delete the folder to compute it again, or choose another"
    for name, value in _settings(session).items():
        if info["settings"].get(name) != value:
            raise ValueError(
                f"{_WHO}: {folder} was made with {name}={info['settings'].get(name)!r}, the session has "
                f"{value!r}{way_out}"
            )
    if session.reference is None:
        logger.warning("%s: the session has no reference to compare the weights of %s with", _WHO, folder)
    else:
        _check_weights(folder, info["weights"], _weights(session), way_out)
    digests = tensors["digests"].numpy().tobytes()
    names = (digests[i : i + 16] for i in range(0, len(digests), 16))
    known = dict(zip(names, tensors["ref_logprobs"].split(tensors["lengths"].tolist()), strict=True))
    missing = [number for number, digest in enumerate(wanted) if digest not in known]
    if missing:
        raise ValueError(
            f"{_WHO}: {folder} lacks {len(missing)} of {len(wanted)} sequences, the first of which is number "
            f"{missing[0] + 1} and begins with the tokens {list(wanted.values())[missing[0]].input_ids[:8]}: other "
            f"rows, or the same cut or tokenized otherwise{way_out}"
        )
    return known


def _check_weights(folder: str | Path, was: Mapping[str, str], now: Mapping[str, str], way_out: str) -> None:
    for names, other, whose in ((was, now, "its reference"), (now, was, "this one")):
        for name in names:
            if name not in other:
                raise ValueError(
                    f"{_WHO}: {folder} was made by another reference: only {whose} has {name!r}{nearest(name, other)}"
                    f"{way_out}"
                )
    differ = [name for name in was if was[name] != now[name]]
    if differ:
        raise ValueError(
            f"{_WHO}: {folder} was made by another reference: {len(differ)} of {len(was)} weights differ, the first is "
            f"{differ[0]!r}{way_out}"
        )


def _settings(session: Session) -> dict[str, Any]:
    dtype = session.autocast_dtype
    return {"temperature": session.temperature, "autocast_dtype": None if dtype is None else str(dtype)}


def _weights(session: Session) -> dict[str, str]:
    """A digest of each of the reference's tensors; what the session trains, such as adapters, is none of them."""
    reference = session.reference
    module = reference.model if isinstance(reference, WithoutAdapters) else reference
    assert module is not None
    trained = {id(p) for group in session.optimizer.param_groups for p in group["params"]}
    state = module.state_dict(keep_vars=True)
    kept = {name: x.detach() for name, x in state.items() if isinstance(x, Tensor) and id(x) not in trained}
    return {name: _tensor_digest(x) for name, x in kept.items()}


def _tensor_digest(tensor: Tensor) -> str:
    content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {blake2b(content, digest_size=16).hexdigest()}"
