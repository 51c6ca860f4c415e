"""Signal's batches as the loop's: tensors padded on any side in, rows of real tokens out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from rlloss._checks import check_full_precision, nearest
from rlloss.advantages.shaping import kl_shaped_rewards
from rlloss.loop.batch import Batch, collate
from rlloss.loop.data import Tokens

__all__ = ["BatchData", "Rows", "answer_rows", "check_finite", "language_rows", "pair_rows"]

# keys of other systems, and what says the same here
_WAYS_OUT = {
    "labels": "; say which tokens count by response_mask = (labels != -100)",
    "loss_mask": "; call it response_mask",
    "completion_mask": "; call it response_mask",
    "old_logprobs": "; call it old_log_probs",
}


class Rows(NamedTuple):
    """A batch of the loop, and which entries of the caller's `[B, T]` tensors its trained tokens are."""

    who: str
    batch: Batch
    trained: Tensor

    def place(self, name: str, values: Tensor) -> Tensor:
        """A tensor that says something about each token, where the loop has that token; 0 elsewhere."""
        if values.shape != self.trained.shape:
            raise ValueError(
                f"{self.who}: {name} must have one value per token, {list(self.trained.shape)}, got "
                f"{list(values.shape)}"
            )
        check_finite(self.who, name, values[self.trained])
        placed = torch.zeros(self.batch.ids.shape, dtype=values.dtype)
        return placed.masked_scatter_(self.batch.loss_mask, values[self.trained])

    def rewards(self, values: Tensor) -> Tensor:
        """Rewards per token as the loop has them; one per sequence is paid at its last trained token."""
        if values.ndim == 2:
            if bool((values[~self.trained] != 0).any()):
                row, t = (~self.trained & (values != 0)).nonzero()[0].tolist()
                raise ValueError(
                    f"{self.who}: rewards[{row}, {t}] is {float(values[row, t]):g}, but token {t} is padding, the "
                    "first of its row or outside the response, where it would be lost; put it on a trained token, or "
                    "pass one reward per sequence"
                )
            values = self.place("rewards", values)
        elif values.shape != self.trained.shape[:1]:
            raise ValueError(
                f"{self.who}: rewards must have one value per sequence, [{len(self.trained)}], or per token, "
                f"{list(self.trained.shape)}, got {list(values.shape)}"
            )
        check_finite(self.who, "rewards", values)
        no_kl = torch.zeros(self.batch.ids.shape, dtype=values.dtype)
        return kl_shaped_rewards(values, no_kl, self.batch.loss_mask, 0.0)


@dataclass(frozen=True)
class BatchData:
    """What the caller passed, read key by key: tensors or nested lists; real ids are below `num_ids`."""

    who: str
    data: Mapping[str, Any]
    num_ids: int | None = None

    def check_keys(self, required: Sequence[str], optional: Sequence[str]) -> None:
        """Raises ValueError for a key that is missing and for one that this loss does not read."""
        if not isinstance(self.data, Mapping):
            raise ValueError(
                f"{self.who}: batch_data must be a dict of tensors, got {type(self.data).__name__}; it needs "
                f"{', '.join(required)}"
            )
        known = [*required, *optional]
        for key in self.data:
            if key not in known:
                way_out = _WAYS_OUT.get(str(key), nearest(key, known)) if "response_mask" in known else ""
                raise ValueError(
                    f"{self.who}: batch_data has an unknown key {key!r}{way_out or nearest(key, known)}. "
                    f"Known: {', '.join(known)}"
                )
        for key in required:
            if self.data.get(key) is None:
                raise ValueError(f"{self.who}: batch_data needs {key!r}, got {sorted(self.data)}")

    def __contains__(self, name: str) -> bool:
        return self.data.get(name) is not None

    def ids(self, name: str, ndim: int = 2) -> Tensor:
        """Token ids."""
        ids = self._tensor(name, (ndim,))
        if ids.is_floating_point() or ids.dtype is torch.bool:
            raise ValueError(f"{self.who}: {name} must hold integer token ids, got {ids.dtype}")
        return ids.long()

    def mask(self, name: str, like_name: str, like: Tensor) -> Tensor:
        """A mask of zeros and ones, or bools, in the shape of some ids."""
        mask = self._tensor(name, (like.ndim,))
        if mask.shape != like.shape:
            raise ValueError(
                f"{self.who}: {name} must have the shape of {like_name}, {list(like.shape)}, got {list(mask.shape)}"
            )
        if bool(((mask != 0) & (mask != 1)).any()):
            raise ValueError(f"{self.who}: {name} must hold zeros and ones (1 = real), got other values")
        return mask != 0

    def floats(self, name: str, *ndims: int) -> Tensor:
        """Real numbers in float32 or float64."""
        values = self._tensor(name, ndims)
        values = values if values.is_floating_point() else values.float()
        check_full_precision(self.who, name, values)
        return values

    def per_response(self, name: str) -> Tensor:
        """A tensor in the shape of `response_ids`, as rows of prompt and response; 0 over the prompt."""
        like = self._tensor("response_ids", (2, 3))
        values = self.floats(name, like.ndim)
        if values.shape != like.shape:
            raise ValueError(
                f"{self.who}: {name} must have the shape of response_ids, {list(like.shape)}, got {list(values.shape)}"
            )
        return F.pad(values.flatten(0, -2), (self._tensor("prompt_ids", (2,)).shape[1], 0))

    def _tensor(self, name: str, ndims: Sequence[int]) -> Tensor:
        try:
            tensor = torch.as_tensor(self.data[name]).detach().cpu()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.who}: {name} must be a tensor or nested lists of one length, got "
                f"{type(self.data[name]).__name__} ({error}); pad shorter rows and mask the padding"
            ) from error
        if tensor.ndim not in ndims:
            wanted = " or ".join(f"{n}-D" for n in ndims)
            raise ValueError(f"{self.who}: {name} must be {wanted}, got shape {list(tensor.shape)}")
        return tensor


def check_finite(who: str, name: str, values: Tensor) -> None:
    """Raises ValueError for NaN or infinity among values that count."""
    if not bool(values.isfinite().all()):
        raise ValueError(f"{who}: {name} must be finite where tokens count, got NaN or inf")


def language_rows(data: BatchData) -> Rows:
    """Rows of `input_ids` and `attention_mask`; all real tokens after the first count, or those of `response_mask`."""
    input_ids = data.ids("input_ids")
    real = data.mask("attention_mask", "input_ids", input_ids)
    counts = data.mask("response_mask", "input_ids", input_ids) if "response_mask" in data else real
    return _rows(data, input_ids, real, counts & real)


def answer_rows(data: BatchData, *, num_samples: int | None = None) -> Rows:
    """Rows of prompt and response: `[B, P]` with `[B, L]`, or `[B, N, L]` where each prompt has N samples.

    Tensors in the shape of `response_ids` are read by `BatchData.per_response`.
    """
    prompt_ids, response_ids = data.ids("prompt_ids"), data.ids("response_ids", 2 if num_samples is None else 3)
    if len(prompt_ids) != len(response_ids):
        raise ValueError(
            f"{data.who}: prompt_ids and response_ids must have one row per prompt, got {list(prompt_ids.shape)} and "
            f"{list(response_ids.shape)}"
        )
    in_response = data.mask("response_masks", "response_ids", response_ids)
    if "prompt_masks" in data:
        in_prompt = data.mask("prompt_masks", "prompt_ids", prompt_ids)
    else:
        in_prompt = torch.ones_like(prompt_ids, dtype=torch.bool)
    if num_samples is not None:
        prompt_ids, in_prompt = (repeat(x, "b p -> (b n) p", n=num_samples) for x in (prompt_ids, in_prompt))
        response_ids, in_response = (rearrange(x, "b n l -> (b n) l") for x in (response_ids, in_response))
    _check_no_gap(data.who, in_response)
    real = torch.cat([in_prompt, in_response], 1)
    return _rows(data, torch.cat([prompt_ids, response_ids], 1), real, torch.cat([in_prompt & False, in_response], 1))


def pair_rows(data: BatchData) -> Batch:
    """Chosen and rejected rows in turn; the tokens that count are those of `..._response_mask`, where given."""
    sides = []
    for side in ("chosen", "rejected"):
        ids = data.ids(f"{side}_input_ids")
        real = data.mask(f"{side}_attention_mask", f"{side}_input_ids", ids)
        name = f"{side}_response_mask"
        counts = data.mask(name, f"{side}_input_ids", ids) & real if name in data else real
        tokens, trained = _tokens(data, f"{data.who}: {side}", ids, real, counts)
        if not bool(trained.any(-1).all()):
            row = int((~trained.any(-1)).nonzero()[0])
            raise ValueError(f"{data.who}: {side} row {row} has no token that counts; it needs one behind its first")
        sides.append(tokens)
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"{data.who}: pairs must be complete, got {len(sides[0])} chosen and {len(sides[1])} rejected")
    return collate([tokens for pair in zip(*sides, strict=True) for tokens in pair], rows_per_example=2)


def _rows(data: BatchData, ids: Tensor, real: Tensor, counts: Tensor) -> Rows:
    tokens, trained = _tokens(data, data.who, ids, real, counts)
    if not bool(trained.any()):
        raise ValueError(
            f"{data.who}: no token counts: nothing predicts the first token of a row, and masks hide the rest"
        )
    return Rows(data.who, collate(tokens), trained)


def _tokens(data: BatchData, who: str, ids: Tensor, real: Tensor, counts: Tensor) -> tuple[list[Tokens], Tensor]:
    """The rows without their padding, and which entries of `ids` are trained tokens."""
    if not bool(real.any(-1).all()):
        row = int((~real.any(-1)).nonzero()[0])
        raise ValueError(f"{who}: row {row} holds no real token, only padding; leave it out")
    unknown = real & ((ids < 0) | (ids >= (torch.iinfo(ids.dtype).max if data.num_ids is None else data.num_ids)))
    if bool(unknown.any()):
        row, t = unknown.nonzero()[0].tolist()
        known = "" if data.num_ids is None else f" to {data.num_ids - 1}"
        raise ValueError(
            f"{who}: row {row} holds the token id {int(ids[row, t])}, but the model's vocabulary is 0{known}; is it "
            "another model's tokenizer, or padding that the mask calls real?"
        )
    trained = counts & (real.cumsum(-1) > 1)
    rows = zip(ids, real, trained, strict=True)
    return [Tokens(row[keep].tolist(), mask[keep].tolist()) for row, keep, mask in rows], trained


def _check_no_gap(who: str, in_response: Tensor) -> None:
    ends = (~in_response[:, 1:] & in_response[:, :-1]).cumsum(1) > 0  # behind the end of the first stretch
    behind_a_gap = ends & in_response[:, 1:]
    if bool(behind_a_gap.any()):
        raise ValueError(
            f"{who}: response_masks marks padding, and has a gap in row {int(behind_a_gap.nonzero()[0, 0])}; for "
            "tokens within a response that the model has read but not written, pass input_ids, attention_mask and "
            "response_mask to loss_fn='enhanced_ppo'"
        )
