"""Where a reward model's score of one prompt and completion stands, for the three kinds of such models."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlloss._checks import nearest
from rlloss.heads import backbone_of, causal_lm
from rlloss.models import backbone_hidden
from rlloss.rewards.prompts import is_chat, messages_of, plain_text, prompt_ids
from rlloss.rewards.window import Window
from rlloss.scalar import ScalarModel

__all__ = ["Reader", "reader_of"]

_WHO = "reward_model"
_WAY_OUT = "pass a model ...ForSequenceClassification of transformers, or a rlloss.ScalarModel"


class ScalarReader:
    """A `ScalarModel`: the score stands at the last token that it was trained on, its end of turn or of sequence."""

    def __init__(self, model: ScalarModel, tokenizer: Any, append_eos: bool, window: Window) -> None:
        self.model, self.tokenizer, self.append_eos, self.window = model, tokenizer, append_eos, window

    def row(self, prompt: Any, completion: str) -> Any:
        """The tokens as `rlloss.loop.pairs` makes them to train on."""
        from rlloss.loop.chat import Chat, chat_tokens
        from rlloss.loop.data import Tokens

        if is_chat(prompt, self.tokenizer):
            chat = Chat(_WHO, [*messages_of(prompt), {"role": "assistant", "content": completion}], first=len(prompt))
            [(ids, mask)] = chat_tokens(self.tokenizer, [chat], or_last=True)
            if not self.window.fits(len(ids)):
                kept = self.window.kept(len(ids), start=mask.index(True))
                ids, mask = ids[kept], mask[kept]
            return Tokens(ids, mask)
        return _text_row(prompt, completion, self.tokenizer, self.append_eos, self.window)

    def length(self, row: Any) -> int:
        """How many tokens a row has."""
        return len(row.input_ids)

    def scores(self, rows: Sequence[Any]) -> Tensor:
        """The scores `[B]` of rows."""
        batch = _batch(rows, self.model)
        return self.model.score(batch.input_ids, batch.last_index, attention_mask=batch.attention_mask)


class DecoderReader:
    """A decoder of transformers with a head `score`, which is read at the row's last token.

    Its own forward looks for the last token that is not the padding token. That is another one where a text ends in
    the padding token (which often is the end of sequence too), so backbone and head are run one by one here.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, append_eos: bool, column: int, window: Window) -> None:
        self.tokenizer, self.append_eos, self.column, self.window = tokenizer, append_eos, column, window
        inner: Any = causal_lm(model, who=_WHO, way_out=_WAY_OUT)
        self.backbone, self.head = backbone_of(inner, who=_WHO, way_out=_WAY_OUT), inner.score

    def row(self, prompt: Any, completion: str) -> Any:
        """The whole conversation as the template writes it, or the texts one after the other."""
        if not is_chat(prompt, self.tokenizer):
            return _text_row(prompt, completion, self.tokenizer, self.append_eos, self.window)
        ids = self._conversation(prompt, completion)
        if not self.window.fits(len(ids)):
            bare = self._conversation(prompt, "")
            both = enumerate(zip(ids, bare, strict=False))
            start = next((t for t, (one, other) in both if one != other), min(len(ids), len(bare)))
            ids = ids[self.window.kept(len(ids), start=start)]
        return _scored_at_its_end(ids)

    def length(self, row: Any) -> int:
        """How many tokens a row has."""
        return len(row.input_ids)

    def scores(self, rows: Sequence[Any]) -> Tensor:
        """The scores `[B]` of rows."""
        batch = _batch(rows, self.backbone)
        hidden = backbone_hidden(_WHO, self.backbone, batch.input_ids, attention_mask=batch.attention_mask)
        last = hidden[torch.arange(len(rows), device=hidden.device), batch.last_index.to(hidden.device)]
        return self.head(last)[:, self.column]

    def of_ids(self, rows: Sequence[list[int]]) -> Tensor:
        """The scores of given tokens."""
        return self.scores([_scored_at_its_end(ids) for ids in rows])

    def _conversation(self, prompt: Any, completion: str) -> list[int]:
        conversation = [*messages_of(prompt), {"role": "assistant", "content": completion}]
        text = self.tokenizer.apply_chat_template(conversation, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class EncoderReader:
    """An encoder of transformers, which reads a pair of texts and gathers its score at the first token."""

    def __init__(self, model: nn.Module, tokenizer: Any, column: int, window: Window) -> None:
        self.model, self.tokenizer, self.column, self.window = model, tokenizer, column, window
        self._from_the_left = copy.copy(tokenizer)
        self._from_the_left.truncation_side = "left"

    def row(self, prompt: Any, completion: str) -> Any:
        """The two texts, or the completion after an empty prompt, with the tokenizer's own marks around them."""
        before = plain_text(prompt)
        pair = ([before], [completion]) if before.strip() else ([completion],)  # of a list: "" is no second text alone
        row = {name: column[0] for name, column in self.tokenizer(*pair).items()}
        room = self.window.max_length
        if self.window.fits(self.length(row)) or room is None:
            return row
        own = len(self.tokenizer(completion, add_special_tokens=False)["input_ids"])
        if len(pair) == 2 and own + self.tokenizer.num_special_tokens_to_add(pair=True) < room:
            return dict(self._from_the_left(before, completion, truncation="only_first", max_length=room))
        return dict(self.tokenizer(completion, truncation=True, max_length=room))

    def length(self, row: Any) -> int:
        """How many tokens a row has."""
        return len(row["input_ids"])

    def scores(self, rows: Sequence[Any]) -> Tensor:
        """The scores `[B]` of rows."""
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        batch = self.tokenizer.pad(columns, padding_side="right", return_tensors="pt")
        return self.model(**batch.to(_device(self.model))).logits[:, self.column]

    def of_ids(self, rows: Sequence[list[int]]) -> Tensor:
        """The scores of given tokens."""
        return self.scores([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows])


Reader = ScalarReader | DecoderReader | EncoderReader


def reader_of(
    model: nn.Module, tokenizer: Any, *, label: int | str | None, append_eos: bool, max_length: int | None = None
) -> Reader:
    """The reader of a model's kind, proved on three tokens where transformers has a forward of its own."""
    window = Window(_WHO, max_length, model)
    if isinstance(model, ScalarModel):
        if label is not None:
            raise ValueError(f"{_WHO}: a ScalarModel has one output, got label={label!r}; leave it out")
        return ScalarReader(model, tokenizer, append_eos, window)
    inner: Any = causal_lm(model, who=_WHO, way_out=_WAY_OUT)
    if isinstance(getattr(inner, "score", None), nn.Module):
        reader = DecoderReader(model, tokenizer, append_eos, _column(inner, label), window)
    elif getattr(tokenizer, "cls_token_id", None) is not None:
        reader = EncoderReader(model, tokenizer, _column(inner, label), window)
    else:
        raise ValueError(
            f"{_WHO}: {type(inner).__name__} has no head `score` and its tokenizer no CLS token, so that the place of "
            f"its score is unknown; {_WAY_OUT}"
        )
    _prove(model, reader)
    return reader


def _text_row(prompt: Any, completion: str, tokenizer: Any, append_eos: bool, window: Window) -> Any:
    end = []
    if append_eos:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"{_WHO}: append_eos needs a tokenizer with an end of sequence, got none; pass append_eos=False for a "
                "model that was trained without one"
            )
        end = [tokenizer.eos_token_id]
    ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    before = prompt_ids(prompt, tokenizer)
    whole = before + (ids if ids[-1:] == end else ids + end)
    return _scored_at_its_end(whole if window.fits(len(whole)) else whole[window.kept(len(whole), start=len(before))])


def _scored_at_its_end(ids: Sequence[int]) -> Any:
    from rlloss.loop.data import Tokens

    if not ids:
        raise ValueError(f"{_WHO}: an empty prompt with an empty completion has no token to score; drop such rows")
    return Tokens(list(ids), [False] * (len(ids) - 1) + [True])


def _batch(rows: Sequence[Any], model: nn.Module) -> Any:
    from rlloss.loop.batch import collate

    return collate(rows).to(_device(model))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _column(model: Any, label: int | str | None) -> int:
    """Which output of a classifier is the score."""
    names: Mapping[int, str] = model.config.id2label
    if label is None and len(names) != 1:
        raise ValueError(
            f"{_WHO}: {type(model).__name__} has {len(names)} outputs, {dict(names)}, and one must be the score; "
            "pass label=, its name or number"
        )
    if isinstance(label, str):
        if label not in names.values():
            raise ValueError(
                f"{_WHO}: label must be one of {list(names.values())}, got {label!r}{nearest(label, names.values())}"
            )
        return next(number for number, name in names.items() if name == label)
    number = label or 0
    if isinstance(label, bool) or number not in names:
        raise ValueError(f"{_WHO}: label must be one of the outputs {dict(names)}, got {label!r}")
    return number


@torch.no_grad()
def _prove(model: Any, reader: DecoderReader | EncoderReader) -> None:
    """Raises ValueError unless three tokens score beside a longer row what the model's own forward gives them alone."""
    padding = {getattr(model.config, "pad_token_id", None), getattr(reader.tokenizer, "pad_token_id", None)}
    ids = [token for token in range(5) if token not in padding][:3]
    own = model(input_ids=torch.tensor([ids], device=_device(model))).logits[0, reader.column]
    ours = reader.of_ids([ids, [*ids, *ids]])[0]
    tolerance = max(16 * torch.finfo(own.dtype).eps, 1e-3) * max(1.0, abs(float(own)))
    if not abs(float(own) - float(ours)) <= tolerance:  # a NaN compares False
        raise ValueError(
            f"{_WHO}: three tokens score {float(own):.4g} alone and {float(ours):.4g} in a padded batch, so that "
            f"{type(model).__name__} does not score a row as rewards need it; {_WAY_OUT}"
        )
