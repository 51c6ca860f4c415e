"""A batch as the checks read it: every name known, every tensor of its shape, a pack unpacked to padded rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlloss.doctor.finding import Finding, counted, likely

__all__ = ["LOGPROBS", "Sheet", "read"]

LOGPROBS = ("logprobs", "old_logprobs", "rollout_logprobs", "ref_logprobs", "teacher_logprobs")
_TOKENS = {
    *LOGPROBS, "advantages", "rewards", "token_rewards", "returns", "values", "old_values", "entropy", "token_weights",
    "ref_entropy", "divergence", "log_kept_mass", "segment_ids", "turn_ids", "position_ids",
}  # fmt: skip
_ROWS = {
    "advantages", "rewards", "group_ids", "finished", "desirable", "logps", "ref_logps", "mean_logps", "weights",
    "baselines", "valid", "lengths",
}  # fmt: skip
_PAIRS = {
    f"{ref}{side}_{kind}" for ref in ("", "ref_") for side in ("chosen", "rejected") for kind in ("logps", "mean_logps")
} | {"chosen_rewards", "rejected_rewards", "margin", "mask", "ties"}
_SEQUENCES = {"input_ids", "ids", "loss_mask", "attention_mask"}
_SIDES = {f"{side}_{kind}" for side in ("chosen", "rejected") for kind in ("ids", "input_ids", "mask", "loss_mask")}
_NUMBERS = {"normalizer", "kl", "temperature"}
_KNOWN = _TOKENS | _ROWS | _PAIRS | _SEQUENCES | _SIDES | _NUMBERS | {"cu_seqlens"}
_MASKS = {"loss_mask", "attention_mask", "finished", "desirable", "valid", "mask", "ties", "chosen_mask",
          "rejected_mask", "chosen_loss_mask", "rejected_loss_mask"}  # fmt: skip
_WHOLE = {"input_ids", "ids", "group_ids", "segment_ids", "turn_ids", "position_ids", "lengths"}
_MAY_BE_INTEGER = {"attention_mask"}  # as tokenizers return it
_MAY_LACK = {"rewards", "chosen_rewards", "rejected_rewards"}  # a reward function may give no number

# Other systems' words, which are too far from ours for a spelling to tell.
_ELSEWHERE = {
    "response_mask": "loss_mask", "completion_mask": "loss_mask", "action_mask": "loss_mask",
    "per_token_logps": "logprobs", "log_probs": "logprobs", "old_per_token_logps": "old_logprobs",
    "old_log_probs": "old_logprobs", "ref_per_token_logps": "ref_logprobs", "ref_log_prob": "ref_logprobs",
    "sampling_logprobs": "rollout_logprobs", "sampling_per_token_logps": "rollout_logprobs",
    "inference_logprobs": "rollout_logprobs", "generation_logprobs": "rollout_logprobs", "uid": "group_ids",
    "policy_chosen_logps": "chosen_logps", "policy_rejected_logps": "rejected_logps",
    "reference_chosen_logps": "ref_chosen_logps", "reference_rejected_logps": "ref_rejected_logps",
    "reward": "rewards", "scores": "rewards", "labels": "desirable", "label": "desirable",
}  # fmt: skip


@dataclass
class Sheet:
    """The batch in the shapes that the checks share; checks narrow `mask`, `sound` and `shifted` for those behind them.

    `tokens` are `[B, T]` in float64, `per_row` `[B]`, `pairs` `[P]`, `sides` as given. `given_mask` is the mask as the
    user wrote it, `mask` that (or a guess, where there is none) without padding, and `sound[name]` says where a
    log-prob of that name is one.
    """

    tokens: dict[str, Tensor] = field(default_factory=dict)
    per_row: dict[str, Tensor] = field(default_factory=dict)
    pairs: dict[str, Tensor] = field(default_factory=dict)
    sides: dict[str, list[Tensor]] = field(default_factory=dict)
    given_mask: Tensor | None = None
    mask: Tensor | None = None
    attention: Tensor | None = None
    input_ids: Tensor | None = None
    ids: Tensor | None = None
    unshifted: bool = False  # input_ids and attention_mask have the columns of loss_mask, so no shift is in the slices
    packed: bool = False
    sound: dict[str, Tensor] = field(default_factory=dict)
    shifted: set[frozenset[str]] = field(default_factory=set)

    @property
    def logprobs(self) -> dict[str, Tensor]:
        """The per-token log-probs that are there."""
        return {name: self.tokens[name] for name in LOGPROBS if name in self.tokens}

    def on_rows(self, x: Tensor) -> Tensor:
        """One number per row: `[B]` as it is, of `[B, T]` the mean over the trained tokens (0 where there are none)."""
        if x.ndim == 1 or self.mask is None:
            return x
        return torch.where(self.mask, x, 0).sum(-1) / self.mask.sum(-1).clamp(min=1)

    def __str__(self) -> str:
        if self.mask is not None:
            layout, told = "packed" if self.packed else "padded", self.given_mask is not None
            tokens = counted(int(self.mask.sum()), "trained token" if told else "position")
            return f"a {layout} batch of {counted(len(self.mask), 'row')} with {tokens}"
        if self.pairs:
            return f"a batch of {counted(len(next(iter(self.pairs.values()))), 'pair')}"
        return f"a batch of {counted(len(next(iter(self.per_row.values()), ())), 'row')}"


def read(batch: Mapping[str, Any]) -> tuple[Sheet, list[Finding]]:
    """The sheet of a batch, and what is wrong with its form; what has no usable form is left out of the sheet."""
    findings = list(_names(batch))
    sheet, given = Sheet(), {}
    for name, value in batch.items():
        if name not in _KNOWN - _NUMBERS or value is None:
            continue
        try:
            if name in _SIDES:
                sheet.sides[name] = [torch.as_tensor(row).detach().cpu() for row in value]
            else:
                given[name] = _tensor(name, value)
        except (TypeError, ValueError, RuntimeError) as error:
            findings.append(_no_tensor(name, value, error))
    findings += _kinds(given)
    bounds = given.pop("cu_seqlens", None)
    given = {name: _number(name, x) for name, x in given.items()}
    if bounds is not None:
        given, wrong = _unpacked(given, bounds)
        findings += wrong
        sheet.packed = not wrong
    findings += _placed(sheet, given)
    return sheet, findings


def _names(batch: Mapping[str, Any]) -> Iterator[Finding]:
    for name in batch:
        if name in _KNOWN:
            continue
        word = _ELSEWHERE.get(str(name).lower()) or likely(name, sorted(_KNOWN))
        guess = f"; did you mean {word!r}?" if word else ""
        yield Finding(
            "warning" if guess else "note",
            "unknown_name",
            f"{name!r} is no name that the doctor knows{guess}",
            "it was not looked at, and no loss of rlloss takes it by that name",
            "rename it, so that it is examined too" if guess else "nothing, if it is a column of your own",
        )


def _tensor(name: str, value: Any) -> Tensor:
    if name in _MAY_LACK and isinstance(value, list | tuple):
        value = [float("nan") if one is None else one for one in value]
    x = torch.as_tensor(value).detach().cpu()
    if x.ndim == 0:
        raise ValueError("it is a single number")
    return x


def _no_tensor(name: str, value: Any, error: Exception) -> Finding:
    return Finding(
        "error",
        "not_a_tensor",
        f"{name} is a {type(value).__name__} that makes no tensor ({error})",
        "a batch holds tensors of one shape; ragged lists must be padded or packed first",
        "pad to [B, T] and mark the real tokens in loss_mask, or pack to [N] with cu_seqlens",
    )


def _kinds(given: Mapping[str, Tensor]) -> Iterator[Finding]:
    for name, x in given.items():
        if name in _MASKS and x.dtype is not torch.bool and not (name in _MAY_BE_INTEGER and not x.is_floating_point()):
            values = x[~x.isnan()].unique() if x.is_floating_point() else x.unique()
            shown = ", ".join(f"{v:g}" for v in values[:5].tolist()) + (", ..." if len(values) > 5 else "")
            weights = "" if set(values.tolist()) <= {0, 1} else "; values other than 0 and 1 are weights, no mask"
            yield Finding(
                "error",
                "mask_not_bool",
                f"{name} is {x.dtype} with the values {shown}{weights}",
                "code reads it in different ways: ~mask of integers is -1 and -2, and x[mask] takes rows 0 and 1",
                f"write {name}.bool() if every non-zero entry counts; pass real weights as token_weights or weights",
            )
        elif name not in _MASKS and x.dtype in (torch.float16, torch.bfloat16) and "logp" in name:
            yield Finding(
                "error",
                "half_precision",
                f"{name} is {x.dtype}",
                "half precision is off by up to 0.05 nats on one token, 5% of its ratio; the losses refuse it",
                "compute log-probs in float32 from the logits on (rlloss.token_logprobs does from any dtype); "
                "casting now does not bring the lost digits back",
            )


def _number(name: str, x: Tensor) -> Tensor:
    if name in _MASKS:
        return x if x.dtype is torch.bool else x != 0
    return x.double() if x.is_floating_point() or name not in _WHOLE else x


def _unpacked(given: dict[str, Tensor], bounds: Tensor) -> tuple[dict[str, Tensor], list[Finding]]:
    """Packed `[N]` tensors as padded rows, so that every check is written once."""
    first = next((given[n] for n in ("loss_mask", *LOGPROBS, "input_ids", "ids") if n in given), None)
    if first is None:
        return given, []
    total = len(first)
    steps = bounds.diff() if bounds.ndim == 1 else bounds
    sound = bounds.ndim == 1 and len(bounds) > 1 and not bounds.is_floating_point() and first.ndim == 1
    if not sound or bounds[0] != 0 or bool((steps < 0).any()) or bounds[-1] > total:
        shown = bounds.flatten()[:6].tolist()
        return {name: x for name, x in given.items() if x.ndim == 1 and len(x) != total}, [
            Finding(
                "error",
                "bad_boundaries",
                f"cu_seqlens {shown}{'...' if bounds.numel() > 6 else ''} with tokens of shape {list(first.shape)}",
                "the boundaries of a packed batch begin at 0, never fall, end at most at N, and go with [N] tensors",
                "cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)); leave cu_seqlens out of a padded batch",
            )
        ]
    columns = torch.arange(int(steps.max()))
    real = columns < steps[:, None]
    places = (bounds[:-1, None] + columns).clamp(max=total - 1)
    padded = {
        name: torch.where(real, x[places], torch.zeros((), dtype=x.dtype))
        for name, x in given.items()
        if x.ndim == 1 and len(x) == total and (name in _TOKENS | _SEQUENCES)
    }
    padded.setdefault("loss_mask", real)
    padded.setdefault("attention_mask", real)
    return {**{name: x for name, x in given.items() if name not in padded}, **padded}, []


def _placed(sheet: Sheet, given: dict[str, Tensor]) -> Iterator[Finding]:
    """Puts each tensor where its shape belongs; yields those whose shape is that of no other."""
    first = ("loss_mask", *LOGPROBS, "ids", *sorted(_TOKENS))
    model = next((name for name in first if name in given and given[name].ndim == 2), None)
    shape = given[model].shape if model else None
    rows = next((n for n in ("rewards", "advantages", "group_ids", "logps", "desirable") if n in given), None)
    length = shape[0] if shape else len(given[rows]) if rows else None
    pair = next((n for n in given if n in _PAIRS), None)
    for name, x in given.items():
        if name in _PAIRS and pair is not None:
            if x.shape == given[pair].shape and x.ndim == 1:
                sheet.pairs[name] = x
            else:
                yield _misfit(name, x, f"one number per pair, as {pair} {list(given[pair].shape)}")
        elif name in _ROWS and x.ndim == 1:
            if length in (None, len(x)):
                sheet.per_row[name] = x
            else:
                yield _misfit(name, x, f"one number per row of {model or rows} {list(given[model or str(rows)].shape)}")
        elif name in ("input_ids", "attention_mask"):
            # prompts may stand before the scored columns, and [B, T - 1] log-probs go with [B, T] ids
            fits = x.ndim == 2 and (shape is None or (len(x) == shape[0] and x.shape[1] >= shape[1]))
            if fits:
                aligned = x if shape is None else x[:, x.shape[1] - shape[1] :]
                setattr(sheet, "input_ids" if name == "input_ids" else "attention", aligned)
                sheet.unshifted = aligned.shape == x.shape
            else:
                yield _misfit(name, x, f"[B, T] or wider, as {model} {list(shape or ())}")
        elif x.ndim == 2 and x.shape == shape and name in _TOKENS | _SEQUENCES:
            _into_tokens(sheet, name, x)
        else:
            per_row = name in _ROWS - _TOKENS
            like = f"the shape of {model} {list(shape)}" if shape else "[B, T], or packed [N] with cu_seqlens"
            like = "[B], one number per row" if per_row else like
            yield _misfit(name, x, like)
    if sheet.mask is None and shape:
        sheet.mask = sheet.attention.bool() if sheet.attention is not None else torch.ones(shape, dtype=torch.bool)
        yield Finding(
            "note",
            "no_loss_mask",
            f"there is no loss_mask; {'attention_mask' if sheet.attention is not None else 'every position'} was taken",
            "whether prompts and padding are trained on cannot be told without it",
            "pass the loss_mask that the loss will get",
        )


def _into_tokens(sheet: Sheet, name: str, x: Tensor) -> None:
    if name == "loss_mask":
        sheet.given_mask = sheet.mask = x
    elif name == "ids":
        sheet.ids = x
    else:
        sheet.tokens[name] = x


def _misfit(name: str, x: Tensor, expected: str) -> Finding:
    return Finding(
        "error",
        "shape_mismatch",
        f"{name} has shape {list(x.shape)}; expected {expected}",
        "broadcasting may line tokens up with the wrong rows without a word; it was left out of the examination",
        "slice or pad it as the others; a difference of one column is most often a shift done on one side only",
    )
