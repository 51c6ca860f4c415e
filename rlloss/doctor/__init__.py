"""What is wrong with a batch or a data file, in plain words, before it is trained on."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rlloss.doctor.alignment import shifted_logprobs
from rlloss.doctor.drift import ratios
from rlloss.doctor.finding import Diagnosis, Finding, diagnosis
from rlloss.doctor.numbers import log_probs, not_finite, row_numbers
from rlloss.doctor.padding import (
    duplicated_rows,
    empty_rows,
    ids_alignment,
    padding_trained,
    tails,
    truncated_rows,
)
from rlloss.doctor.pairs import identical_pairs
from rlloss.doctor.rows import doctor_rows
from rlloss.doctor.sheet import Sheet, read
from rlloss.doctor.signal import advantages, groups

__all__ = ["Diagnosis", "Finding", "doctor", "doctor_rows"]

# In this order: each leaves the sheet without what it has found, so that a defect is told once and not by its symptoms.
_CHECKS: list[Callable[[Sheet], Iterator[Finding]]] = [
    empty_rows,
    ids_alignment,
    padding_trained,
    not_finite,
    log_probs,
    shifted_logprobs,
    tails,
    ratios,
    truncated_rows,
    duplicated_rows,
    row_numbers,
    groups,
    advantages,
    identical_pairs,
]


def doctor(batch: Mapping[str, Any]) -> Diagnosis:
    """What is wrong with a batch of RL or preference data, in plain words, before it is trained on.

    The names are those that losses take: `logprobs`, `old_logprobs`, `rollout_logprobs`, `ref_logprobs`, `loss_mask`,
    `advantages`, `rewards`, `group_ids`, `finished`, `values`, `returns`, `chosen_logps`, `rejected_logps`, `logps`,
    `desirable` and so on, besides `input_ids`, `attention_mask`, `ids`, `chosen_ids` and `rejected_ids`; each is
    optional, and the more there are, the more can be told. Per-token tensors are padded `[B, T]`, or packed `[N]` with
    `cu_seqlens`. `input_ids` and `attention_mask` may be wider: then their last T columns are those of the others.

    It reads the numbers (and so waits for the device), changes nothing and raises nothing on bad data. Thresholds are
    named constants beside each check; a quiet report is no proof, as a batch of few tokens shows little.

    >>> import torch
    >>> mask = torch.tensor([[True, True], [False, False]])
    >>> seen = doctor({"logprobs": torch.tensor([[-1.5, 0.7], [0.0, 0.0]]), "loss_mask": mask})
    >>> seen.ok, [(finding.severity, finding.name, finding.rows) for finding in seen.findings]
    (False, [('error', 'positive_logprobs', (0,)), ('warning', 'empty_rows', (1,))])
    """
    sheet, findings = read(batch)
    subject = str(sheet)
    for check in _CHECKS:
        findings += check(sheet)
    return diagnosis(subject, findings)
