"""How many tokens a scoring model reads, and what of a longer row it is given."""

from torch import nn

from rlloss._checks import check_count
from rlloss.heads import text_config

__all__ = ["Window", "max_positions"]


def max_positions(model: nn.Module) -> int | None:
    """The longest row that a model of transformers was made for; None where its config names no length.

    >>> max_positions(nn.Linear(2, 1))
    """
    positions = getattr(text_config(getattr(model, "backbone", model)), "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    # RoBERTa's kind counts positions from behind its padding token
    learned = [m for name, m in model.named_modules() if name.endswith("position_embeddings")]
    reserved = [m.padding_idx + 1 for m in learned if isinstance(m, nn.Embedding) and m.padding_idx is not None]
    return positions - max(reserved, default=0)


class Window:
    """What is kept of a row: all of a short one, else the completion and the end of its prompt, or as much as fits.

    Args:
        who: The reward, for its log.
        max_length: Tokens of a row; the model's own limit where None.

    >>> window = Window("reward_model", 4, nn.Linear(2, 1))
    >>> window.fits(4), window.kept(6, start=3), window.kept(9, start=3)
    (True, slice(2, 6, None), slice(3, 7, None))
    """

    def __init__(self, who: str, max_length: int | None, model: nn.Module) -> None:
        if max_length is not None:
            check_count(who, "max_length", max_length)
        self.max_length = max_positions(model) if max_length is None else max_length
        self._who, self._lengths, self._is_reported = who, list[int](), False

    def fits(self, length: int) -> bool:
        """Whether a row of that length is read as a whole; asked once per row, which is what `report` counts."""
        self._lengths.append(length)
        return self.max_length is None or length <= self.max_length

    def kept(self, length: int, *, start: int) -> slice:
        """Which tokens are kept of a row that is too long and whose completion begins at `start`."""
        assert self.max_length is not None
        first = min(length - self.max_length, start)
        return slice(first, first + self.max_length)

    def report(self) -> None:
        """Logs, the first time that a row was cut, how many of the latest rows were."""
        from rlloss.loop.truncation import report_cut

        lengths, self._lengths = self._lengths, []
        if self.max_length is not None and not self._is_reported and max(lengths, default=0) > self.max_length:
            report_cut(self._who, "rows", "max_length", self.max_length, lengths, "; later rows are cut without a word")
            self._is_reported = True
