"""Tokens that are trained though nobody wrote them, rows that train nothing, and rows that are there twice."""

from collections.abc import Iterator

import torch
from torch import Tensor

from rlloss.doctor.finding import Finding, counted, indices, listed
from rlloss.doctor.sheet import Sheet

__all__ = ["duplicated_rows", "empty_rows", "ids_alignment", "padding_trained", "tails", "truncated_rows"]

# The same float32 four times in a row is no chance; the log-probs of four certain tokens are all 0, which is why zeros
# count only where they are rare elsewhere.
TAIL = 4
RARE_ZEROS = 0.01
# Where another policy finds a token less likely than e^-1, exactly 0 (certainty) is no estimate but a hole.
UNCERTAIN = -1.0
HOLES = 3
# Short answers ("yes", one number) have one length by nature; of longer ones half a batch ends together by a limit.
LONG_ENOUGH = 32
CUT_SHARE = 0.5
ROWS_ENOUGH = 4
# Two rows agree by chance where they hold a token or two.
TOKENS_TO_COMPARE = 4


def ids_alignment(sheet: Sheet) -> Iterator[Finding]:
    """`ids` that are the input itself: each row of the model would be scored against its own input."""
    if sheet.ids is None or sheet.input_ids is None or not sheet.unshifted or sheet.ids.shape[1] < 2:
        return
    assert sheet.mask is not None
    inside = sheet.mask[:, :-1]
    same = (sheet.ids == sheet.input_ids)[:, :-1][inside]
    following = (sheet.ids[:, :-1] == sheet.input_ids[:, 1:])[inside]
    if len(same) and bool(same.all()) and not bool(following.all()):
        yield Finding(
            "error",
            "unshifted_ids",
            f"ids equals input_ids at all {len(same)} trained positions",
            "row t of a causal model predicts token t + 1: against unshifted ids it is scored on repeating its input",
            "ids, loss_mask = rlloss.shift(input_ids, loss_mask)",
        )


def padding_trained(sheet: Sheet) -> Iterator[Finding]:
    """True in loss_mask where attention_mask is 0; narrows `sheet.mask` to the real tokens."""
    if sheet.attention is None or sheet.mask is None:
        return
    real = sheet.attention.bool()
    shifted = sheet.ids is not None and sheet.input_ids is not None and sheet.unshifted and sheet.ids.shape[1] > 1
    if shifted:
        assert sheet.ids is not None
        assert sheet.input_ids is not None
        both = real[:, :-1] & real[:, 1:]
        shifted = bool((sheet.ids[:, :-1] == sheet.input_ids[:, 1:])[both].all())
    if shifted:  # then ids[t] is token t + 1, and real only if that is
        real = torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], dim=-1)
    wrong = sheet.mask & ~real
    sheet.mask = sheet.mask & real
    if sheet.given_mask is None or not wrong.any():
        return
    n, trained = int(wrong.sum()), wrong.any(-1)
    one_each = shifted and bool((wrong.sum(-1)[trained] == 1).all()) and bool(trained.float().mean() > CUT_SHARE)
    if one_each:
        yield Finding(
            "error",
            "unshifted_mask",
            f"ids are input_ids one step to the left, but loss_mask is not: its last True token of {counted(n, 'row')} "
            "is padding",
            "each answer trains the token behind its end and misses its first one",
            "shift both at once: ids, loss_mask = rlloss.shift(input_ids, loss_mask)",
            indices(wrong),
        )
    else:
        yield Finding(
            "error",
            "padding_trained",
            f"loss_mask is True at {counted(n, 'position')} where attention_mask is 0",
            "padding is trained on as if the model had written it, and counts in every mean",
            "loss_mask = loss_mask & attention_mask.bool(), and look where the mask is made",
            indices(wrong),
        )


def tails(sheet: Sheet) -> Iterator[Finding]:
    """Rows that end in one repeated number, whole placeholders, and zeros where other policies are far from sure."""
    found: dict[str, Tensor] = {}
    for name, x in sheet.logprobs.items():
        sound = sheet.sound[name]
        values = x[sound]
        if len(values) > TAIL and bool((values == values[0]).all()):
            yield Finding(
                "error",
                "placeholder_logprobs",
                f"{name} is {float(values[0]):g} at all {len(values)} trained positions",
                "nobody has computed it: this is the value that the tensor was made with",
                f"compute {name}, or leave it out (old_logprobs=None is the policy itself)",
            )
            del sheet.tokens[name]
            continue
        tail = _tail(x, sound)
        zeros = sound & (x == 0)
        if int((zeros & ~tail).sum()) > RARE_ZEROS * int(sound.sum()):
            tail &= x != 0
        if tail.any():
            found[name] = tail
    if found:
        everywhere = torch.stack(list(found.values())).any(0)
        assert sheet.mask is not None
        sheet.mask = sheet.mask & ~everywhere
        if sheet.given_mask is not None:
            yield _constant_tail(sheet, found, everywhere)
        for name, sound in sheet.sound.items():
            sheet.sound[name] = sound & ~everywhere
    yield from _holes(sheet)


def _tail(x: Tensor, sound: Tensor) -> Tensor:
    """Where the trained entries of a row are equal to its last one, up to the end, if there are `TAIL` of them."""
    if not sound.any():
        return sound
    columns = torch.arange(x.shape[1])
    last = torch.where(sound, columns, 0).amax(-1, keepdim=True)
    differs = sound & (x != x.gather(1, last))
    tail = sound & (columns > torch.where(differs, columns, -1).amax(-1, keepdim=True))
    return tail & (tail.sum(-1, keepdim=True) >= TAIL)


def _constant_tail(sheet: Sheet, found: dict[str, Tensor], everywhere: Tensor) -> Finding:
    name, tail = next(iter(found.items()))
    values = ", ".join(f"{v:g}" for v in sheet.tokens[name][tail].unique()[:3].tolist())
    return Finding(
        "error",
        "constant_tail",
        f"{counted(int(everywhere.any(-1).sum()), 'row')} of {listed(found)} end in one repeated value "
        f"({values}), {int(everywhere.sum(-1).amax())} tokens long at most, and loss_mask is True there",
        "padding is trained on as if the model had written it, and counts in every mean",
        "make loss_mask False from the first token behind the end of sequence on",
        indices(everywhere),
    )


def _holes(sheet: Sheet) -> Iterator[Finding]:
    for name, x in sheet.logprobs.items():
        for other, y in sheet.logprobs.items():
            if other == name or frozenset((name, other)) in sheet.shifted:
                continue
            holes = sheet.sound[name] & sheet.sound[other] & (x == 0) & (y < UNCERTAIN)
            if int(holes.sum()) >= HOLES:
                yield Finding(
                    "error",
                    "zero_logprobs",
                    f"{name} is exactly 0 at {counted(int(holes.sum()), 'trained position')} where {other} is "
                    f"{float(y[holes].mean()):.2f} on average",
                    "0 says that the token was certain; these tokens were not scored, and keep the zero of a buffer",
                    f"score them in {name}, or make loss_mask False there",
                    indices(holes),
                )
                sheet.sound[name] = sheet.sound[name] & ~holes
                break


def empty_rows(sheet: Sheet) -> Iterator[Finding]:
    """Rows without a True in the mask."""
    if sheet.given_mask is None:
        return
    empty = ~sheet.given_mask.any(-1)
    if empty.any():
        nothing = bool(empty.all())
        yield Finding(
            "error" if nothing else "warning",
            "empty_rows",
            f"{int(empty.sum())} of {counted(len(empty), 'row')} have no trained token",
            "the loss is exactly 0 and teaches nothing"
            if nothing
            else "such a row costs a forward pass, teaches nothing and counts in no mean; most often its prompt filled "
            "the length, or a filter emptied it",
            "drop these rows; if the answer was cut away with the end of the sequence, allow more tokens",
            indices(empty),
        )


def truncated_rows(sheet: Sheet) -> Iterator[Finding]:
    """Many rows cut by a limit: by `finished`, or by lengths that are all the largest."""
    finished = sheet.per_row.get("finished")
    if finished is not None:
        cut = ~finished
        if len(cut) >= ROWS_ENOUGH and int(cut.sum()) > CUT_SHARE * len(cut):
            yield _truncated(f"finished is False in {int(cut.sum())} of {len(cut)} rows", indices(cut))
        return
    sampled = {"rewards", "advantages", "rollout_logprobs", "old_logprobs"} & {*sheet.tokens, *sheet.per_row}
    if sheet.mask is None or not sampled:
        return
    lengths = sheet.mask.sum(-1)
    longest = max(lengths.tolist(), default=0)
    cut = lengths == longest
    if longest >= LONG_ENOUGH and len(lengths) >= ROWS_ENOUGH and int(cut.sum()) > CUT_SHARE * len(lengths):
        yield _truncated(
            f"{int(cut.sum())} of {len(cut)} rows have exactly {longest} trained tokens, the longest of the batch, and "
            "there is no `finished` to tell which of them ended",
            indices(cut),
        )


def _truncated(what: str, rows: tuple[int, ...]) -> Finding:
    return Finding(
        "warning",
        "truncated_rows",
        what,
        "answers that a limit has cut are judged as if they were whole: a reward of 0 then punishes length, or "
        "thoughts that had not ended",
        "allow more new tokens; or mask cut rows (DAPO's overlong filtering), or use rlloss.overlong_penalty",
        rows,
    )


def duplicated_rows(sheet: Sheet) -> Iterator[Finding]:
    """Rows that hold the same tokens; without ids, rows whose log-probs agree to the last bit."""
    if sheet.mask is None:
        return
    tokens = sheet.ids if sheet.ids is not None else sheet.input_ids
    source = tokens if tokens is not None else next(iter(sheet.logprobs.values()), None)
    if source is None:
        return
    real = sheet.attention.bool() | sheet.mask if sheet.attention is not None and tokens is not None else sheet.mask
    groups = sheet.per_row.get("group_ids")
    first: dict[tuple[object, ...], int] = {}
    twice: list[tuple[int, int]] = []
    for row, (values, where, trained) in enumerate(zip(source, real, sheet.mask, strict=True)):
        if int(trained.sum()) < TOKENS_TO_COMPARE:
            continue
        key = (tuple(values[where].tolist()), tuple(trained[where].tolist()))
        if key in first:
            twice.append((first[key], row))
        first.setdefault(key, row)
    within = [pair for pair in twice if groups is not None and groups[pair[0]] == groups[pair[1]]]
    across = [pair for pair in twice if pair not in within]
    kind = "tokens" if tokens is not None else "log-probs to the last bit"
    if across:
        yield Finding(
            "warning",
            "duplicated_rows",
            f"{len(across)} of {counted(len(source), 'row')} repeat an earlier one"
            + (" of another group" if groups is not None else "")
            + f": the same {kind} (row {across[0][1]} is row {across[0][0]})",
            "they count twice in every mean; most often a sampler or a shard hands the same data out twice",
            "drop the copies, or use a weight; look at seeds and at how the data are split over workers",
            tuple(row for _, row in across),
        )
    if within:
        yield Finding(
            "note",
            "repeated_answers",
            f"{len(within)} of {counted(len(source), 'row')} repeat an answer of their own group",
            "the policy answers this prompt in the same words, so that the group compares fewer answers than it seems",
            "nothing where answers are short; else a higher temperature, or look at the sampler's seeds",
            tuple(row for _, row in within),
        )
