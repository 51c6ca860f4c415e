"""Masks, shift, sums, means, counts and reductions, each by hand."""

import math
from typing import Any

import pytest
import torch

import rlloss
from rlloss import Counts
from rlloss.reduce import weighted, zero_masked

REDUCTIONS = ["token_mean", "sequence_mean", "sequence_sum", "fixed_length", "sum"]

# three sequences of 3, 1 and 0 trained tokens; what is masked must not matter
X = torch.tensor([[1.0, math.nan, 2.0, 3.0], [5.0, 7.0, math.inf, 8.0], [9.0, 9.0, 9.0, 9.0]])
MASK = torch.tensor([[True, False, True, True], [True, False, False, False], [False] * 4])
# the same, packed, with a tail that belongs to no sequence
PACKED_X = torch.tensor([1.0, math.nan, 2.0, 3.0, 5.0, 9.0])
PACKED_MASK = torch.tensor([True, False, True, True, True, False])
CU_SEQLENS = torch.tensor([0, 4, 5, 5])
LAYOUTS = [pytest.param(X, MASK, None, id="padded"), pytest.param(PACKED_X, PACKED_MASK, CU_SEQLENS, id="packed")]


def length_option(reduction) -> dict[str, Any]:
    return {"max_length": 10} if reduction == "fixed_length" else {}


@pytest.mark.parametrize(("x", "mask", "cu_seqlens"), LAYOUTS)
def test_sequences_by_hand(x, mask, cu_seqlens):
    assert rlloss.sequence_lengths(mask, cu_seqlens).tolist() == [3, 1, 0]
    assert rlloss.sequence_sum(x, mask, cu_seqlens).tolist() == [6.0, 5.0, 0.0]
    assert rlloss.sequence_mean(x, mask, cu_seqlens).tolist() == [2.0, 5.0, 0.0]
    assert rlloss.count(mask, cu_seqlens) == Counts(torch.tensor(4), torch.tensor(2))


def test_sequences_accept_int32_boundaries():
    assert rlloss.sequence_mean(PACKED_X, PACKED_MASK, CU_SEQLENS.int()).tolist() == [2.0, 5.0, 0.0]


def test_tokens_get_the_value_of_their_sequence():
    values = torch.tensor([1.0, 2.0, 3.0])
    assert rlloss.to_tokens(values, MASK).tolist() == [[1.0] * 4, [2.0] * 4, [3.0] * 4]
    assert rlloss.to_tokens(values, PACKED_MASK, CU_SEQLENS).tolist() == [1.0, 1.0, 1.0, 1.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", 2.75),  # (1 + 2 + 3 + 5) / 4
        ("sequence_mean", 3.5),  # (6 / 3 + 5 / 1) / 2
        ("sequence_sum", 5.5),  # (6 + 5) / 2
        ("fixed_length", 0.55),  # (6 + 5) / (2 * 10)
        ("sum", 11.0),
    ],
)
@pytest.mark.parametrize(("x", "mask", "cu_seqlens"), LAYOUTS)
def test_reductions_by_hand(reduction, expected, x, mask, cu_seqlens):
    loss = rlloss.reduce_tokens(x, mask, reduction, cu_seqlens=cu_seqlens, **length_option(reduction))
    assert float(loss) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", 1.1),  # 11 / 10
        ("sequence_mean", 1.4),  # (6 / 3 + 5 / 1) / 5: the length stays the sequence's own
        ("sequence_sum", 2.2),  # 11 / 5
        ("fixed_length", 0.22),  # 11 / (5 * 10)
        ("sum", 11.0),
    ],
)
def test_a_normalizer_replaces_the_count_of_its_unit(reduction, expected):
    step = Counts(torch.tensor(10), torch.tensor(5))
    options = length_option(reduction)
    assert float(rlloss.reduce_tokens(X, MASK, reduction, normalizer=step, **options)) == pytest.approx(expected)
    if reduction != "sum":
        unit = 10 if reduction == "token_mean" else 5
        for number in (unit, float(unit), torch.tensor(unit)):
            loss = rlloss.reduce_tokens(X, MASK, reduction, normalizer=number, **options)
            assert float(loss) == pytest.approx(expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_over_nothing_is_zero(reduction):
    normalizers = [None, Counts(torch.tensor(0), torch.tensor(0))]
    normalizers += [] if reduction == "sum" else [0, 0.0, torch.tensor(0)]
    for normalizer in normalizers:
        options = length_option(reduction)
        assert rlloss.reduce_tokens(X, torch.zeros_like(MASK), reduction, normalizer=normalizer, **options) == 0


def test_the_mean_over_rows_leaves_out_masked_rows():
    x, mask = torch.tensor([1.0, math.nan, 4.0]), torch.tensor([True, False, True])
    assert rlloss.reduce_sequences(x, mask) == 2.5
    assert rlloss.reduce_sequences(x, mask, normalizer=10) == 0.5
    assert rlloss.reduce_sequences(x, mask, normalizer=Counts(torch.tensor(99), torch.tensor(5))) == 1.0
    assert rlloss.reduce_sequences(x, mask & False) == 0


def test_counts_add_over_micro_batches():
    parts = [rlloss.count(row[None]) for row in MASK]
    assert sum(parts) == rlloss.count(MASK)
    assert rlloss.count(torch.tensor([True, False, True])) == Counts(torch.tensor(2), torch.tensor(2))  # pairs


def test_shift_aligns_every_row_with_the_token_that_it_predicts():
    ids, mask = rlloss.shift(
        torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24]]),
        torch.tensor([[False, False, True, True], [False, True, True, False]]),
    )
    assert ids[:, :3].tolist() == [[12, 13, 14], [22, 23, 24]]
    assert mask.tolist() == [[False, True, True, False], [True, True, False, False]]


def test_shift_predicts_nothing_across_a_boundary():
    input_ids = torch.tensor([11, 12, 13, 21, 22, 31, 0])
    loss_mask = torch.tensor([True, True, True, True, True, True, False])
    before = loss_mask.clone()
    ids, mask = rlloss.shift(input_ids, loss_mask, torch.tensor([0, 3, 5, 6]))
    assert ids[mask].tolist() == [12, 13, 22]
    assert mask.tolist() == [True, True, False, True, False, False, False]
    assert torch.equal(loss_mask, before)


def test_shift_packed_is_shift_padded():
    generator = torch.Generator().manual_seed(0)
    lengths = [4, 1, 6, 2]
    rows = [torch.randint(1, 99, (n,), generator=generator) for n in lengths]
    masks = [torch.rand(n, generator=generator) > 0.3 for n in lengths]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    ids, mask = rlloss.shift(torch.cat(rows), torch.cat(masks), cu_seqlens)
    alone = [rlloss.shift(row[None], row_mask[None]) for row, row_mask in zip(rows, masks, strict=True)]
    assert torch.equal(mask, torch.cat([m[0] for _, m in alone]))
    assert torch.equal(ids[mask], torch.cat([i[0] for i, _ in alone])[mask])


@pytest.mark.parametrize(("x", "mask", "cu_seqlens"), LAYOUTS)
def test_prompt_mean_weights_average_prompts(x, mask, cu_seqlens):
    together = rlloss.prompt_mean_weights(mask, torch.tensor([4, 4, 4]), cu_seqlens)
    apart = rlloss.prompt_mean_weights(mask, torch.tensor([4, 9, -1]), cu_seqlens)
    x = torch.where(mask, x, 0)
    assert float((together * x).sum()) == pytest.approx(11 / 4)  # one prompt: the mean of its tokens
    assert float((apart * x).sum()) == pytest.approx((6 / 3 + 5 / 1) / 2)  # the third prompt has no token, no vote
    assert not together[~mask].any()
    assert not rlloss.prompt_mean_weights(mask & False, torch.tensor([4, 9, 9]), cu_seqlens).any()


def test_the_mask_at_the_door_has_no_gradient_behind_it():
    x = torch.tensor([1.0, -math.inf], requires_grad=True)
    (entered,) = zero_masked(torch.tensor([True, False]), x)
    assert entered.tolist() == [1.0, 0.0]
    assert torch.autograd.grad(entered.exp().sum(), x)[0].tolist() == [pytest.approx(math.e), 0.0]


def test_weight_zero_rejects_and_no_weights_change_nothing():
    x = torch.tensor([math.inf, math.nan, 3.0])
    assert weighted(x, torch.tensor([0.0, 0.0, 2.0])).tolist() == [0.0, 0.0, 6.0]
    assert weighted(x, None) is x
