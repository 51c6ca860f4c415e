"""A step's sequences as right-padded tensors, and micro-batches of similar length cut from them by token budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlloss._checks import check_count
from rlloss.loop.data import Tokens
from rlloss.reduce import shift

__all__ = ["Batch", "collate", "micro_batches"]


@dataclass
class Batch:
    """Rows of right-padded tokens. `ids`, `loss_mask` and per-token fields are aligned as `rlloss.shift` aligns them.

    `fields` holds what a loss wants besides log-probs, `[B]` or `[B, T]`: advantages, old_logprobs, ref_logprobs,
    token_weights, and of rows or pairs weights and margin; an entry without dimensions is a number of the whole step,
    which every part of it keeps. Rows of a preference batch stand chosen, rejected, chosen, rejected:
    `rows_per_example` is 2, and a pair's own number stands in both.
    """

    input_ids: Tensor
    attention_mask: Tensor
    ids: Tensor
    loss_mask: Tensor
    rows_per_example: int = 1
    fields: dict[str, Tensor] = field(default_factory=dict)

    @property
    def lengths(self) -> Tensor:
        """Tokens per row, padding aside."""
        return self.attention_mask.sum(-1)

    @property
    def last_index(self) -> Tensor:
        """Where in `input_ids` each row's last trained token stands; 0 in a row without any."""
        # a row's mask is one step to the left of its tokens
        positions = torch.arange(1, self.loss_mask.shape[1] + 1, device=self.loss_mask.device)
        return (positions * self.loss_mask).amax(-1)

    def select(self, rows: Tensor, device: torch.device | str | None = None) -> "Batch":
        """Some rows, cut to the longest of them, on `device`."""
        width = int(self.lengths[rows].max()) if len(rows) else 0
        return self._map(lambda x: (x[rows, :width] if x.ndim == 2 else x[rows] if x.ndim else x).to(device))

    def to(self, device: torch.device | str) -> "Batch":
        """The whole batch on `device`."""
        return self._map(lambda x: x.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        own = (self.input_ids, self.attention_mask, self.ids, self.loss_mask)
        fields = {name: function(x) for name, x in self.fields.items()}
        return Batch(*map(function, own), rows_per_example=self.rows_per_example, fields=fields)


def collate(sequences: Sequence[Tokens], *, rows_per_example: int = 1) -> Batch:
    """Pads sequences to the right and aligns ids and mask with the model's rows.

    >>> batch = collate([Tokens([5, 6, 7], [False, True, True]), Tokens([8, 9], [False, True])])
    >>> batch.ids[batch.loss_mask].tolist()
    [6, 7, 9]
    """
    if not sequences:
        raise ValueError("collate: needs at least one sequence, got none")
    lengths = torch.tensor([len(s.input_ids) for s in sequences])
    attention_mask = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids = torch.zeros(attention_mask.shape, dtype=torch.long)
    loss_mask = torch.zeros_like(attention_mask)
    input_ids[attention_mask] = torch.tensor([i for s in sequences for i in s.input_ids])
    loss_mask[attention_mask] = torch.tensor([m for s in sequences for m in s.loss_mask])
    ids, loss_mask = shift(input_ids, loss_mask)
    return Batch(input_ids, attention_mask, ids, loss_mask, rows_per_example)


def micro_batches(batch: Batch, max_tokens: int) -> list[Tensor]:
    """Row indices of micro-batches of at most `max_tokens` padded tokens each, longest rows first.

    Sorting by length keeps the padding small; the step's normaliser makes the cut exact. Rows of one example stay
    together. An example that alone exceeds the budget gets a micro-batch of its own.

    >>> rows = [Tokens([1] * n, [True] * n) for n in (2, 9, 3, 2)]
    >>> [part.tolist() for part in micro_batches(collate(rows), max_tokens=9)]
    [[1], [2, 0, 3]]
    """
    check_count("micro_batches", "max_tokens", max_tokens)
    per_example = batch.lengths.view(-1, batch.rows_per_example).amax(1)
    parts: list[list[int]] = []
    width = 0
    for example in torch.argsort(per_example, descending=True, stable=True).tolist():
        rows = list(range(example * batch.rows_per_example, (example + 1) * batch.rows_per_example))
        if not parts or (len(parts[-1]) + len(rows)) * width > max_tokens:
            parts.append([])
            width = int(per_example[example])
        parts[-1] += rows
    return [torch.tensor(rows) for rows in parts]
