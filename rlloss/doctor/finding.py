"""What the doctor says: findings, and the report that a person reads."""

import difflib
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Diagnosis", "Finding", "Severity", "counted", "diagnosis", "indices", "likely", "listed"]

Severity = Literal["error", "warning", "note"]

_ORDER: tuple[Severity, ...] = ("error", "warning", "note")
_WIDTH = 100  # columns: a report is read in a terminal
_MISSPELT = 0.8  # the likeness of words that differ by one or two letters; "solution" and "completion" have 0.67
_SHOWN_ROWS = 12  # numbers of rows in print; `rows` has them all


@dataclass(frozen=True)
class Finding:
    """One thing that stands out: `what` was seen, `why` it is so and matters, the `fix`, and its `rows` (from 0).

    An `error` makes the loss wrong or refuse the batch, a `warning` is most likely a mistake, a `note` is worth
    knowing. `name` is stable, for code that asks for it.

    >>> Finding("note", "groups_of_one", "1 of 4", "nobody to compare with", "sample more", (2,)).rows
    (2,)
    """

    severity: Severity
    name: str
    what: str
    why: str
    fix: str
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = [("seen", self.what), ("means", self.why), ("do", self.fix)]
        if self.rows:
            more = len(self.rows) - _SHOWN_ROWS
            shown = ", ".join(map(str, self.rows[:_SHOWN_ROWS]))
            parts.append(("rows", shown + (f" and {more} more" if more > 0 else "")))
        return "\n".join([f"{self.severity.upper()}: {self.name}", *(_paragraph(*part) for part in parts)])


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found, errors first: `print` it, ask `ok`, or walk through `findings`.

    >>> print(Diagnosis("8 rows", ()))
    rlloss.doctor looked at 8 rows: nothing stands out.
    """

    subject: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error and no warning; notes do not count."""
        return all(finding.severity == "note" for finding in self.findings)

    @property
    def names(self) -> list[str]:
        """The names of the findings, in their order."""
        return [finding.name for finding in self.findings]

    def __str__(self) -> str:
        if not self.findings:
            return f"rlloss.doctor looked at {self.subject}: nothing stands out."
        each = [sum(finding.severity == severity for finding in self.findings) for severity in _ORDER]
        told = [counted(n, severity) for n, severity in zip(each, _ORDER, strict=True) if n]
        head = textwrap.fill(f"rlloss.doctor looked at {self.subject}: {', '.join(told)}.", _WIDTH)
        return "\n\n".join([head, *map(str, self.findings)])


def diagnosis(subject: str, findings: Iterable[Finding]) -> Diagnosis:
    """The findings in the order of their weight; those of one weight stay as they were made."""
    return Diagnosis(subject, tuple(sorted(findings, key=lambda finding: _ORDER.index(finding.severity))))


def counted(n: int, noun: str, plural: str = "") -> str:
    """`1 row`, `2 rows`; `plural` where it is not the noun and an s."""
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def listed(names: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *firsts, last = names
    return f"{', '.join(firsts)} and {last}" if firsts else last


def indices(where: Tensor | Sequence[bool]) -> tuple[int, ...]:
    """The numbers of the rows that are True, or that have something True."""
    rows = torch.as_tensor(where)
    return tuple((rows.flatten(1).any(-1) if rows.ndim > 1 else rows).nonzero().flatten().tolist())


def likely(word: object, known: Iterable[str]) -> str:
    """The known name that this one is meant to be, as far as the spelling tells; else the empty text."""
    return next(iter(difflib.get_close_matches(str(word), list(known), n=1, cutoff=_MISSPELT)), "")


def _paragraph(label: str, text: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=f"  {label:<7}",
        subsequent_indent=" " * 9,
        break_on_hyphens=False,
        break_long_words=False,
    )
