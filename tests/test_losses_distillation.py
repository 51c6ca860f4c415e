"""Token losses and what a teacher says, against arithmetic done by hand and exact expectations over a tiny language."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closed_forms import ONE
from test_laws_meaning import Language

import rlloss
import rlloss.reference
from rlloss import (
    Counts,
    DFTLoss,
    DistillationLoss,
    DPOLoss,
    REINFORCELoss,
    SFTLoss,
    XPOLoss,
    combine,
    distillation_advantages,
    minillm_advantages,
    nash_md_advantages,
    scalars,
    token_divergences,
    token_logprobs,
    top_k_divergence,
    top_k_logprobs,
)

LOG2 = math.log(2)
DIVERGENCES: list[Any] = ["forward_kl", "reverse_kl", "js"]


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_and_slope(loss_fn, x, *inputs, **extra):
    leaf = x.clone().requires_grad_()
    loss = loss_fn(leaf, *inputs, **extra).loss
    return loss.item(), torch.autograd.grad(loss, leaf)[0].tolist()


# SFT's options

MASK = torch.tensor([[True, True, False], [True, False, False]])
LOGPROBS = tensor([-1.0, -3.0, math.nan], [-2.0, math.nan, math.nan])


def test_sft_smoothed_and_held_by_hand():
    means, logsumexp = tensor([-4.0, -5.0, math.nan], [-6.0, 0.0, 0.0]), tensor([1.0, 2.0, math.nan], [4.0, 0.0, 0.0])
    extra = {"mean_logprob": means, "logsumexp": logsumexp}
    # 0.9 * 6 + 0.1 * 15 and (1 + 4 + 16) / 2 of three tokens
    assert SFTLoss(label_smoothing=0.1)(LOGPROBS, MASK, **extra).loss == close(6.9 / 3)
    assert SFTLoss(z_coef=0.5)(LOGPROBS, MASK, **extra).loss == close((6 + 10.5) / 3)
    whole = SFTLoss(label_smoothing=0.1, z_coef=0.5)(LOGPROBS, MASK, **extra)
    assert whole.loss == close((6.9 + 10.5) / 3)
    assert scalars(whole.metrics) == {"nll": close(2.0), "logsumexp": close(7 / 3)}
    assert scalars(SFTLoss()(LOGPROBS, MASK).metrics) == {"nll": close(2.0)}
    # what is not asked for is not seen
    assert SFTLoss()(LOGPROBS, MASK, **extra).loss == close(2.0)


def test_sft_smoothed_is_the_cross_entropy_of_smoothed_labels():
    logits, ids = draws(2, 3, 7).requires_grad_(), torch.tensor([[0, 3, 6], [5, 5, 1]])
    stats = token_logprobs(logits, ids, outputs=("logprobs", "mean_logprob", "logsumexp"))
    loss_fn, mask = SFTLoss(label_smoothing=0.3, z_coef=0.01), torch.ones_like(ids).bool()
    loss = loss_fn(stats.logprobs, mask, mean_logprob=stats.mean_logprob, logsumexp=stats.logsumexp).loss
    expected = F.cross_entropy(logits.flatten(0, 1), ids.flatten(), label_smoothing=0.3)
    expected = expected + 0.01 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    slopes = [torch.autograd.grad(x, logits)[0] for x in (loss, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-14)


def test_the_z_loss_of_a_rejected_token_is_not_seen():
    logsumexp = tensor([math.inf, 1.0]).requires_grad_()
    weights, mask = tensor([0.0, 1.0]), torch.ones(1, 2).bool()
    out = SFTLoss(z_coef=1.0)(tensor([0.0, 0.0]), mask, logsumexp=logsumexp, token_weights=weights)
    assert out.loss.item() == close(0.5)
    assert torch.autograd.grad(out.loss, logsumexp)[0].tolist() == [[0.0, 1.0]]


# DFT


def test_dft_by_hand():
    logprobs = torch.tensor([[0.5, 0.25, 9.0], [0.5, 9.0, 9.0]], dtype=torch.float64).log()
    loss, slope = loss_and_slope(DFTLoss(), logprobs, MASK)
    assert loss == close((LOG2 / 2 + LOG2 / 2 + LOG2 / 2) / 3)
    assert slope == [close([-0.5 / 3, -0.25 / 3, 0.0]), close([-0.5 / 3, 0.0, 0.0])]
    assert scalars(DFTLoss()(logprobs, MASK).metrics) == {"nll": close(4 * LOG2 / 3), "probability": close(1.25 / 3)}
    by_sequence = DFTLoss(reduction="sequence_mean")(logprobs, MASK).loss
    assert by_sequence == close(LOG2 / 2)


def test_dft_is_sft_weighted_by_probability():
    logprobs, mask = -draws(3, 5).abs(), draws(3, 5, seed=1) > 0
    dft, slope = loss_and_slope(DFTLoss(), logprobs, mask)
    sft, expected = loss_and_slope(SFTLoss(), logprobs, mask, token_weights=logprobs.exp())
    assert (dft, slope) == (sft, expected)


def test_dft_leaves_what_cannot_be_alone():
    logprobs, mask = torch.tensor([[-math.inf, -1e4, -200.0]]), torch.ones(1, 3).bool()
    assert loss_and_slope(DFTLoss(), logprobs, mask) == (0.0, [[0.0, 0.0, 0.0]])


# XPO


def test_xpo_by_hand():
    # -4 and -2 over two answers
    loss, slope = loss_and_slope(XPOLoss(alpha=0.5), torch.where(MASK, LOGPROBS, 0), MASK)
    assert loss == close(0.5 * -6 / 2)
    assert slope == [[0.25, 0.25, 0.0], [0.25, 0.0, 0.0]]  # down goes what the reference says
    assert scalars(XPOLoss()(LOGPROBS, MASK).metrics) == {"logprob": close(-2.0)}


def test_xpo_joins_dpo():
    pair, refs = draws(2, 3), draws(2, 3, seed=1)
    dpo, term = DPOLoss()(*pair, *refs), XPOLoss(alpha=0.1)(LOGPROBS, MASK)
    joined = combine(dpo=dpo, xpo=term)
    assert joined.loss == close(dpo.loss.item() - 0.1 * 3)
    assert joined.metrics["xpo/logprob"] is term.metrics["logprob"]


# what all losses over tokens do


@pytest.mark.parametrize("name", ["dft", "distillation", "process_reward", "sft", "xpo"])
def test_what_stands_behind_the_last_boundary_counts_for_nothing(name):
    loss_fn: Any = rlloss.get_loss(name)
    inputs = (tensor(-1.0, -2.0, -9.0),) * (2 if name == "process_reward" else 1)
    cu_seqlens = torch.tensor([0, 2])
    with_tail, without = (
        loss_fn(*inputs, torch.tensor([True, True, tail]), cu_seqlens=cu_seqlens) for tail in (True, False)
    )
    assert with_tail.loss == without.loss
    assert scalars(with_tail.metrics) == scalars(without.metrics)


# distillation


def test_distillation_by_hand():
    divergence = tensor([1.0, 3.0, math.nan], [8.0, math.nan, math.nan])
    for name in DIVERGENCES:
        out = DistillationLoss(divergence=name)(divergence, MASK)
        assert out.loss == close(4.0)
        assert scalars(out.metrics) == {name: close(4.0)}
    assert DistillationLoss(reduction="sequence_mean")(divergence, MASK).loss == close(5.0)
    weights = tensor([0.0, 2.0, 1.0], [1.0, 1.0, 1.0])
    assert DistillationLoss()(divergence, MASK, token_weights=weights).loss == close(14 / 3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distillation_names_what_token_divergences_make(divergence):
    student, teacher = draws(2, 3, 5), draws(2, 3, 5, seed=1)
    loss_fn = DistillationLoss(divergence=divergence, beta=0.3 if divergence == "js" else None)
    found = token_divergences(student, teacher, outputs=(loss_fn.divergence,), beta=loss_fn.beta)
    loss = loss_fn(getattr(found, divergence), torch.ones(2, 3).bool()).loss
    rows = zip(student.softmax(-1).flatten(0, 1), teacher.softmax(-1).flatten(0, 1), strict=True)
    expected = [rlloss.reference.divergence_of(p, q, divergence, loss_fn.beta) for p, q in rows]
    assert loss == close(sum(expected) / 6)


@pytest.mark.parametrize(("beta", "limit"), [(1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")])
def test_js_lies_between_both_kls(beta, limit):
    student, teacher = draws(1, 5), draws(1, 5, seed=1)
    js = token_divergences(student, teacher, outputs=("js",), beta=beta).js / min(beta, 1 - beta)
    torch.testing.assert_close(
        js, getattr(token_divergences(student, teacher, outputs=(limit,)), limit), rtol=1e-4, atol=0
    )


# the teacher's likeliest tokens


def top_k_of(student, teacher, ids, *, tails=True, **options):
    """The divergence from logits, and its gradient in the student's."""
    leaf = student.clone().requires_grad_()
    (logprobs, tail), (teacher_logprobs, teacher_tail) = top_k_logprobs(leaf, ids), top_k_logprobs(teacher, ids)
    given = {"tail": tail, "teacher_tail": teacher_tail} if tails else {}
    found = top_k_divergence(logprobs, teacher_logprobs, **given, **options)
    return found.detach(), torch.autograd.grad(found.sum(), leaf)[0]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tails", [True, False])
def test_top_k_agrees_with_its_specification(divergence, tails):
    student, teacher = draws(6, 9), draws(6, 9, seed=1)
    ids = teacher.topk(3).indices
    found, _ = top_k_of(student, teacher, ids, tails=tails, divergence=divergence, beta=0.3)
    for i in range(6):
        p, q = student[i].softmax(-1), teacher[i].softmax(-1)
        assert found[i] == close(rlloss.reference.top_k_divergence(p, q, ids[i], divergence, 0.3))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_of_all_tokens_is_the_divergence_itself(divergence):
    student, teacher = draws(2, 3, 5), draws(2, 3, 5, seed=1)
    found, slope = top_k_of(student, teacher, torch.arange(5).expand(2, 3, 5), divergence=divergence, beta=0.3)
    leaf = student.clone().requires_grad_()
    whole = getattr(token_divergences(leaf, teacher, outputs=(divergence,), beta=0.3), divergence)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slope, torch.autograd.grad(whole.sum(), leaf)[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_bounds_the_divergence_from_below(divergence):
    student, teacher = draws(20, 9), draws(20, 9, seed=1)
    whole = getattr(token_divergences(student, teacher, outputs=(divergence,)), divergence)
    smaller = torch.zeros(20, dtype=torch.float64)
    for k in (1, 3, 6):
        found, _ = top_k_of(student, teacher, teacher.topk(k).indices, divergence=divergence)
        assert (found >= smaller - 1e-15).all()
        assert (found <= whole).all()
        smaller = found
    assert (smaller > 0).all()


@pytest.mark.parametrize("tails", [True, False])
def test_top_k_forward_kl_has_the_gradient_of_probabilities(tails):
    student, teacher = draws(4, 9), draws(4, 9, seed=1)
    ids = teacher.topk(3).indices
    _, slope = top_k_of(student, teacher, ids, tails=tails)
    p, q = student.softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(slope.gather(-1, ids), (p - q).gather(-1, ids), rtol=1e-11, atol=1e-13)
    # the others share what the bucket lacks as they share its mass
    inside = torch.zeros_like(p).scatter(-1, ids, 1).bool()
    share = torch.where(inside, 0, p) / torch.where(inside, 0, p).sum(-1, keepdim=True)
    bucket = torch.where(inside, 0, p - q).sum(-1, keepdim=True)
    torch.testing.assert_close(torch.where(inside, 0, slope), share * bucket, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("nats", [20.0, 100.0])
def test_top_k_corrects_a_student_that_is_too_sure(nats):
    # in float32 the two have all of the probability, and 1 - sum p is 0
    student, teacher = torch.tensor([[nats, nats - 1, 0.0, 0.0]]), torch.tensor([[1.0, 0.5, 0.0, -1.0]])
    ids = torch.tensor([[0, 1]])
    found, slope = top_k_of(student, teacher, ids)
    exact, expected = top_k_of(student.double(), teacher.double(), ids)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-5, atol=1e-6)
    q = teacher.softmax(-1)[0, 2:].sum()
    assert slope[0, 2:].tolist() == pytest.approx([-float(q) / 2] * 2, rel=1e-5)
    # without the tail, its gradient goes on, and too little of it
    bounded, bounded_slope = top_k_of(student, teacher, ids, tails=False)
    assert bounded.isfinite().all()
    assert bounded_slope.isfinite().all()
    assert bounded[0] < found[0]


def test_the_complement_keeps_the_digits_of_one_sure_token():
    # 1 - p = 1e-5 has two digits in float32, and the log-prob all
    logprobs = torch.tensor([[-1e-5, -20.0]], requires_grad=True)
    teacher = torch.tensor([[0.5, 0.25]]).log()
    found = top_k_divergence(logprobs, teacher)
    tail = -math.expm1(-1e-5) - math.exp(-20.0)
    expected = 0.5 * (math.log(0.5) + 1e-5) + 0.25 * (math.log(0.25) + 20) + 0.25 * (math.log(0.25) - math.log(tail))
    assert found.item() == pytest.approx(expected, rel=1e-6)
    slope = torch.autograd.grad(found.sum(), logprobs)[0]
    # -q_k + q_tail p_k / p_tail
    by_hand = [-0.5 + 0.25 * math.exp(-1e-5) / tail, -0.25 + 0.25 * math.exp(-20) / tail]
    assert slope[0].tolist() == pytest.approx(by_hand, rel=1e-5)


def test_the_complements_gradient_goes_on_below_its_bound():
    # 1 - sum p is 2e-10, which no sum of float32 knows
    logprobs = torch.tensor([[-1e-9, -21.0]], requires_grad=True)
    found = top_k_divergence(logprobs, torch.tensor([[0.5, 0.25]]).log())
    bound = torch.finfo(torch.float32).eps
    expected = 0.5 * math.log(0.5) + 0.25 * (math.log(0.25) + 21) + 0.25 * (math.log(0.25) - math.log(bound))
    assert found.item() == pytest.approx(expected, rel=1e-6)
    slope = torch.autograd.grad(found.sum(), logprobs)[0]
    assert slope[0].tolist() == pytest.approx([0.25 / bound - 0.5, 0.25 * math.exp(-21) / bound - 0.25], rel=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("given", [(), ("tail",), ("tail", "teacher_tail")])
def test_top_k_divergence_sees_no_masked_log_probs(divergence, poison, given):
    mask = torch.tensor([True, False])

    def run(fill):
        x, teacher = (torch.where(mask[:, None], -1 - draws(2, 3, seed=s).abs(), fill) for s in (0, 1))
        x.requires_grad_()
        tails: dict[str, Any] = dict.fromkeys(given, torch.where(mask, -0.5 * torch.ones(2).double(), fill))
        found = top_k_divergence(x, teacher, **tails, divergence=divergence, loss_mask=mask)
        return found.detach(), torch.autograd.grad(found.sum(), x)[0]

    for one, other in zip(run(poison), run(-2.0), strict=True):
        assert torch.equal(one, other)
        assert not one[1].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_at_its_teacher_is_at_rest(divergence):
    teacher = draws(3, 7)
    found, slope = top_k_of(teacher, teacher, teacher.topk(2).indices, divergence=divergence)
    torch.testing.assert_close(found, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-15)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_takes_fewer_ids_and_forbidden_tokens(divergence):
    student, teacher = draws(2, 6), draws(2, 6, seed=1)
    student[:, 5] = teacher[:, 5] = -math.inf
    found, slope = top_k_of(student, teacher, torch.tensor([[1, 3, 5], [2, 0, -1]]), divergence=divergence)
    few, _ = top_k_of(student[:, :5], teacher[:, :5], torch.tensor([[1, 3], [2, 0]]), divergence=divergence)
    torch.testing.assert_close(found, few, rtol=1e-13, atol=1e-15)
    assert slope.isfinite().all()
    assert not slope[:, 5].any()
    # of the tokens that are left none may be said
    student[:, 4] = teacher[:, 4] = -math.inf
    whole = torch.arange(4).expand(2, 4)
    found, slope = top_k_of(student, teacher, whole, divergence=divergence)
    expected, expected_slope = top_k_of(student[:, :4], teacher[:, :4], whole, divergence=divergence)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(slope, F.pad(expected_slope, (0, 2)), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_top_k_sees_nothing_where_masked(divergence, poison):
    mask, ids = torch.tensor([True, False, True]), torch.tensor([[0, 1], [7, 99], [3, 2]])

    def run(fill):
        student, teacher = (torch.where(mask[:, None], draws(3, 5, seed=s), fill) for s in (0, 1))
        student.requires_grad_()
        logprobs, tail = top_k_logprobs(student, ids, loss_mask=mask)
        teacher_logprobs, teacher_tail = top_k_logprobs(teacher, ids, loss_mask=mask)
        teacher_logprobs = torch.where(mask[:, None], teacher_logprobs, fill)
        given: dict[str, Any] = {"tail": tail, "teacher_tail": torch.where(mask, teacher_tail, fill)}
        found = top_k_divergence(logprobs, teacher_logprobs, **given, divergence=divergence, loss_mask=mask)
        return found.detach(), torch.autograd.grad(found.sum(), student)[0]

    for x, expected in zip(run(poison), run(0.5), strict=True):
        assert torch.equal(x, expected)
        assert not x[1].any()


def test_top_k_logprobs_are_of_the_tempered_softmax_in_full_precision():
    logits, ids = draws(2, 6).bfloat16(), torch.tensor([[1, 4], [0, -1]])
    logprobs, tail = top_k_logprobs(logits, ids, temperature=0.5)
    assert logprobs.dtype is tail.dtype is torch.float32
    table = (logits.double() / 0.5).log_softmax(-1)
    expected = torch.stack([table[0, 1], table[0, 4], table[1, 0]])
    assert logprobs.flatten()[:3].tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert logprobs[1, 1] == -math.inf
    mass = torch.stack([1 - table[0, [1, 4]].exp().sum(), 1 - table[1, 0].exp()])
    assert tail.exp().tolist() == pytest.approx(mass.tolist(), rel=1e-6)


def test_the_teacher_gets_no_gradient():
    student, teacher = draws(2, 4).requires_grad_(), draws(2, 4, seed=1).requires_grad_()
    ids = torch.tensor([[0, 1], [2, 3]])
    for divergence in DIVERGENCES:
        (logprobs, tail), (known, known_tail) = top_k_logprobs(student, ids), top_k_logprobs(teacher, ids)
        both: dict[str, Any] = {"tail": tail, "teacher_tail": known_tail}
        for given in ({}, both):
            top_k_divergence(logprobs, known, **given, divergence=divergence).sum().backward(retain_graph=True)
    assert teacher.grad is None
    assert student.grad is not None


# a teacher as the reward


def test_distillation_advantages_by_hand():
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    student = tensor([-1.0, math.nan, -2.0, -1.0], [math.nan, -3.0, math.nan, math.nan])
    teacher = tensor([-2.0, math.nan, -1.0, -5.0], [math.nan, -1.0, math.nan, math.nan])
    assert distillation_advantages(student, teacher, mask).tolist() == [[-1.0, 0.0, 1.0, -4.0], [0.0, 2.0, 0.0, 0.0]]
    to_go = distillation_advantages(student, teacher, mask, gamma=0.5)
    assert to_go.tolist() == [[-1.5, 0.0, -1.0, -4.0], [0.0, 2.0, 0.0, 0.0]]
    # what follows: (1 - 4) / 2 and -4
    assert minillm_advantages(student, teacher, mask).tolist() == [[-1.5, 0.0, -4.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "advantages",
    [
        distillation_advantages,
        lambda *x, **extra: distillation_advantages(*x, gamma=0.7, **extra),
        minillm_advantages,
    ],
    ids=["gamma_0", "gamma", "minillm"],
)
def test_teachers_advantages_are_the_same_packed(advantages):
    student, teacher, lengths = -draws(3, 4).abs(), -draws(3, 4, seed=1).abs(), torch.tensor([4, 1, 3])
    mask = torch.arange(4) < lengths[:, None]
    padded = advantages(student.requires_grad_(), teacher.requires_grad_(), mask)
    assert not padded.requires_grad
    assert not padded[~mask].any()
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    packed = advantages(student[mask], teacher[mask], torch.ones(8).bool(), cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed, padded[mask], rtol=1e-13, atol=1e-14)
    tailed = [F.pad(x, (0, 2), value=math.nan) for x in (student[mask], teacher[mask])]
    behind = advantages(*tailed, torch.ones(10).bool(), cu_seqlens=cu_seqlens)
    torch.testing.assert_close(behind, F.pad(padded[mask], (0, 2)), rtol=1e-13, atol=1e-14)


def expected_gradient(language, advantages, *terms):
    """Of REINFORCE, and of further terms per token, under the language's own samples."""
    extra: dict[str, Any] = {"token_weights": language.weights(), "normalizer": Counts(ONE, ONE)}
    out = REINFORCELoss()(language.logprobs, language.logprobs.detach(), advantages, language.mask, **extra)
    for term in terms:
        out = combine(policy=out, single=term(language.mask, **extra))
    return language.gradient(out.loss)


def sequence_kl(language, other):
    """KL of whole sequences, a number that is differentiated with all it depends on."""
    return (language.probabilities * (language.logprobs - other.logprobs.detach()).sum(-1)).sum()


def context_kl(language, teacher):
    """KL of the next token over the contexts that the language reaches, which are not differentiated."""
    p, q = language.table, teacher.table.detach()
    reach = torch.where(torch.arange(4) == 1, 0, language.reach) if not language.mask.all() else language.reach
    return (reach * (p.exp() * (p - q)).sum(-1)).sum()


@pytest.mark.parametrize("end", [False, True])
def test_on_policy_distillation_descends_the_reverse_kl(end):
    language, teacher = Language(1, end=end), Language(2, end=end)
    student, said = language.logprobs.detach(), teacher.logprobs.detach()
    myopic = expected_gradient(language, distillation_advantages(student, said, language.mask))
    torch.testing.assert_close(myopic, language.gradient(context_kl(language, teacher)), rtol=1e-11, atol=1e-14)
    whole = expected_gradient(language, distillation_advantages(student, said, language.mask, gamma=1.0))
    torch.testing.assert_close(whole, language.gradient(sequence_kl(language, teacher)), rtol=1e-11, atol=1e-14)
    assert (whole - myopic).abs().max() > 0.01


@pytest.mark.parametrize("end", [False, True])
def test_minillms_two_terms_descend_the_reverse_kl_of_sequences(end):
    # of two tokens, of which at most one follows: there is nothing to normalise
    language, teacher = Language(1, end=end), Language(2, end=end)
    contexts = torch.stack([torch.zeros_like(language.first), 1 + language.first], -1)
    pair = language.logits[contexts], teacher.logits[contexts]
    exact = token_divergences(*pair, loss_mask=language.mask, outputs=("reverse_kl",)).reverse_kl
    advantages = minillm_advantages(language.logprobs.detach(), teacher.logprobs.detach(), language.mask)
    single = DistillationLoss(divergence="reverse_kl", reduction="sequence_sum")
    gradient = expected_gradient(language, advantages, lambda mask, **extra: single(exact, mask, **extra))
    truth = language.gradient(sequence_kl(language, teacher))
    torch.testing.assert_close(gradient, truth, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("tau", [0.0, 0.3])
@pytest.mark.parametrize("end", [False, True])
def test_nash_md_ascends_the_preference_less_the_kl(tau, end):
    language, ref = Language(1, end=end), Language(2, end=end)
    preferences = draws(len(language.mask)).sigmoid()
    logps, ref_logps = (x.logprobs.sum(-1) for x in (language, ref))
    advantages = nash_md_advantages(preferences, logps, ref_logps, tau=tau)
    assert not advantages.requires_grad
    aim = (language.probabilities * preferences).sum() - tau * sequence_kl(language, ref)
    gradient = expected_gradient(language, advantages)
    torch.testing.assert_close(gradient, -language.gradient(aim), rtol=1e-11, atol=1e-14)


def test_nash_md_by_hand():
    assert nash_md_advantages(tensor(1.0, 0.25), tensor(-2.0, -4.0), tensor(-5.0, -4.0), tau=0.1).tolist() == [
        close(0.2),
        close(-0.25),
    ]


# what cannot be asked for

ROW, ROWS = torch.zeros(2, 3), torch.ones(2, 3).bool()
UNKNOWN: Any = "kl"
BAD: list[tuple[Any, str]] = [
    (lambda: SFTLoss(label_smoothing=1.5), "SFTLoss: label_smoothing must be a number in [0, 1], got 1.5"),
    (lambda: SFTLoss(z_coef=-1), "SFTLoss: z_coef must be a number in [0, inf], got -1"),
    (
        lambda: SFTLoss(label_smoothing=0.1)(ROW, ROWS),
        "SFTLoss: label_smoothing=0.1 needs mean_logprob, got None; rlloss.token_logprobs(..., outputs=('logprobs', "
        "'mean_logprob')) makes it",
    ),
    (lambda: SFTLoss(z_coef=0.1)(ROW, ROWS, mean_logprob=ROW), "SFTLoss: z_coef=0.1 needs logsumexp, got None"),
    (
        lambda: SFTLoss()(ROW, ROWS, mean_logprob=ROW[:1]),
        "SFTLoss: mean_logprob must have the shape of loss_mask, [2, 3], got [1, 3]",
    ),
    (lambda: DFTLoss(reduction=UNKNOWN), "DFTLoss: reduction must be one of ['token_mean', "),
    (lambda: XPOLoss(alpha=-1e-5), "XPOLoss: alpha must be a number in [0, inf], got -1e-05"),
    (lambda: DistillationLoss(divergence=UNKNOWN), "DistillationLoss: divergence must be one of ['forward_kl', "),
    (
        lambda: DistillationLoss(beta=0.5),
        "DistillationLoss: beta is of divergence='js' alone, got divergence='forward_kl' beta=0.5",
    ),
    (lambda: DistillationLoss(divergence="js", beta=1), "js is 0 at beta=1; divergence='reverse_kl' is what it tends"),
    (lambda: DistillationLoss(divergence="js", beta=0.0), "DistillationLoss: beta must be a number in (0, 1], got 0.0"),
    (lambda: top_k_divergence(ROW, ROW, divergence=UNKNOWN), "top_k_divergence: divergence must be one of"),
    (lambda: top_k_divergence(ROW, ROW, divergence="js", beta=1), "top_k_divergence: js is 0 at beta=1"),
    (lambda: top_k_divergence(ROW, ROW[:1]), "teacher_logprobs must have the shape of logprobs, [2, 3], got [1, 3]"),
    (lambda: top_k_divergence(ROW, ROW, tail=ROW), "tail must have the shape of logprobs[..., 0], [2], got [2, 3]"),
    (
        lambda: top_k_divergence(ROW[:, :0], ROW[:, :0]),
        "needs at least one token per row, got [2, 0]",
    ),
    (lambda: top_k_divergence(ROW, ROW, loss_mask=ROWS), "loss_mask must be [2], a row per token, got [2, 3]"),
    (lambda: top_k_logprobs(ROW, torch.zeros(1, 2).long()), "ids must have the rows of the logits, [2], and K each"),
    (lambda: top_k_logprobs(ROW, torch.zeros(2, 1).long(), temperature=0), "temperature must be a number in (0, inf]"),
    (lambda: distillation_advantages(ROW, ROW, ROWS, gamma=2.0), "gamma must be a number in [0, 1], got 2.0"),
    (
        lambda: minillm_advantages(ROW, ROW[:1], ROWS),
        "minillm_advantages: teacher_logprobs must have the shape of loss_mask, [2, 3], got [1, 3]",
    ),
    (
        lambda: nash_md_advantages(ROW[0], ROW[0], ROW[0], tau=-1),
        "tau must be a number in [0, inf], got -1",
    ),
]


@pytest.mark.unhooked
@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_bad_distillation_teaches(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


DEFAULTS = {
    "dft": "DFTLoss(reduction='token_mean', max_length=None)",
    "distillation": "DistillationLoss(reduction='token_mean', max_length=None, divergence='forward_kl', beta=0.5)",
    "sft": "SFTLoss(reduction='token_mean', max_length=None, label_smoothing=0.0, z_coef=0.0)",
    "xpo": "XPOLoss(reduction='sequence_sum', max_length=None, alpha=1e-05)",
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_losses_have_these_defaults(name):
    assert repr(rlloss.get_loss(name)) == DEFAULTS[name]


@pytest.mark.parametrize(
    ("alias", "loss"),
    [
        ("gkd", DistillationLoss),
        ("generalized-jsd", DistillationLoss),
        ("kd", DistillationLoss),
        ("dynamic_fine_tuning", DFTLoss),
    ],
)
def test_token_losses_have_the_names_that_the_field_gives_them(alias, loss):
    assert isinstance(rlloss.get_loss(alias), loss)


# last, since it takes longest


class Student(torch.nn.Module):
    """Next-token logits from two tokens of context, through few hidden units."""

    def __init__(self, hidden):
        super().__init__()
        self.embedding = torch.nn.Embedding(8, hidden)
        self.out = torch.nn.Linear(2 * hidden, 8)

    def forward(self, contexts):
        return self.out(torch.tanh(self.embedding(contexts).flatten(-2)))


def contexts_of(seed, number):
    return torch.randint(0, 8, (4, number, 2), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("divergence", [*DIVERGENCES, "top_k"])
def test_a_student_comes_closer_to_its_teacher_on_texts_that_it_never_saw(divergence):
    torch.manual_seed(0)
    teacher, student = Student(6), Student(4)
    teacher.out.weight.data *= 4
    loss_fn = DistillationLoss(divergence="forward_kl" if divergence == "top_k" else divergence)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    held_out = contexts_of(99, 64)

    def kl():
        with torch.no_grad():
            return float(
                token_divergences(student(held_out), teacher(held_out), outputs=("reverse_kl",)).reverse_kl.mean()
            )

    def divergence_on(contexts):
        logits, teacher_logits = student(contexts), teacher(contexts).detach()
        if divergence != "top_k":
            return getattr(token_divergences(logits, teacher_logits, outputs=(divergence,)), divergence)
        ids = teacher_logits.topk(3, -1).indices
        logprobs, tail = top_k_logprobs(logits, ids)
        return top_k_divergence(logprobs, teacher_logits.log_softmax(-1).gather(-1, ids), tail=tail)

    before = kl()
    for step in range(40):
        contexts = contexts_of(step, 12)
        loss = loss_fn(divergence_on(contexts), torch.ones(contexts.shape[:-1]).bool()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before > 0.3
    assert kl() < 0.4 * before
