"""Losses over pairs and over single answers against arithmetic done by hand, and the identities between them."""

import math
from typing import Any

import pytest
import torch

from rlloss import (
    BradleyTerryLoss,
    DPOLoss,
    IPOLoss,
    KTOLoss,
    Mean,
    SimPOLoss,
    kto_kl,
    logistic_loss,
    merge_metrics,
    scalars,
)

# sigmoid(log 3) = 3/4: -log sigmoid is log(4/3) at log 3 and log 4 at -log 3
LOG2, LOG3 = math.log(2), math.log(3)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_and_slopes(loss_fn, *inputs, **extra):
    """The loss, and its slopes in the first two inputs (chosen and rejected)."""
    chosen, rejected = (x.clone().requires_grad_() for x in inputs[:2])
    loss = loss_fn(chosen, rejected, *inputs[2:], **extra).loss
    return loss.item(), *(x.tolist() for x in torch.autograd.grad(loss, (chosen, rejected)))


def loss_and_slope(loss_fn, logps, *inputs, **extra):
    leaf = logps.clone().requires_grad_()
    loss = loss_fn(leaf, *inputs, **extra).loss
    return loss.item(), torch.autograd.grad(loss, leaf)[0].tolist()


def softplus(x):
    return math.log1p(math.exp(x))


# DPO

PAIRS = tensor([-4.0, -5.0], [-7.0, -2.0], [-6.0, -5.0], [-6.0, -4.0])  # h = 2 - (-1) = 3 and 0 - 2 = -2


def test_dpo_by_hand():
    # softplus(-0.5 * 3) and softplus(0.5 * 2), of slopes -0.5 sigmoid(-1.5) and -0.5 sigmoid(1)
    expected, slopes = [softplus(-1.5), softplus(1.0)], [-0.5 / (1 + math.exp(1.5)), -0.5 / (1 + math.exp(-1.0))]
    loss, chosen, rejected = loss_and_slopes(DPOLoss(beta=0.5), *PAIRS)
    assert loss == close(sum(expected) / 2)
    assert chosen == close([slopes[0] / 2, slopes[1] / 2])
    assert rejected == close([-slopes[0] / 2, -slopes[1] / 2])
    assert scalars(DPOLoss(beta=0.5)(*PAIRS).metrics) == {
        "accuracy": close(0.5),
        "margin": close(0.25),  # (1.5 - 1) / 2
        "margin_std": close(1.25),
        "chosen_reward": close(0.5),  # 0.5 * (2 + 0) / 2
        "rejected_reward": close(0.25),  # 0.5 * (-1 + 2) / 2
    }


def test_dpo_smoothed_and_reference_free_by_hand():
    # 0.9 softplus(-x) + 0.1 softplus(x) at x = 1.5 and -1
    smoothed = [0.9 * softplus(-x) + 0.1 * softplus(x) for x in (1.5, -1.0)]
    assert DPOLoss(beta=0.5, label_smoothing=0.1)(*PAIRS).loss == close(sum(smoothed) / 2)
    # without a reference, h = -4 + 7 = 3 and -5 + 2 = -3
    free = [softplus(-1.5), softplus(1.5)]
    assert DPOLoss(beta=0.5, reference_free=True)(*PAIRS[:2]).loss == close(sum(free) / 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_dpo_at_the_reference_is_log_2(smoothing):
    out = DPOLoss(beta=0.7, label_smoothing=smoothing)(PAIRS[0], PAIRS[1], PAIRS[0], PAIRS[1])
    assert out.loss == close(LOG2)
    assert scalars(out.metrics)["accuracy"] == 0


def test_dpo_far_from_the_reference_is_linear_in_the_margin():
    far = torch.tensor([-1e5])
    assert DPOLoss(beta=0.1, reference_free=True)(far, torch.zeros(1)).loss == pytest.approx(1e4)


# IPO


def test_ipo_by_hand():
    # target 1 / (2 * 0.25) = 2: ((3 - 2)^2 + (-2 - 2)^2) / 2, of slopes 2 * 1 / 2 and 2 * (-4) / 2
    loss, chosen, rejected = loss_and_slopes(IPOLoss(beta=0.25), *PAIRS)
    assert loss == close(8.5)
    assert chosen == close([1.0, -4.0])
    assert rejected == close([-1.0, 4.0])
    assert scalars(IPOLoss(beta=0.25)(*PAIRS).metrics) == {
        "accuracy": 0.5,
        "margin": close(0.125),  # 0.25 * (3 - 2) / 2
        "margin_std": close(0.625),
        "chosen_reward": close(0.25),  # 0.25 * (2 + 0) / 2
        "rejected_reward": close(0.125),  # 0.25 * (-1 + 2) / 2
    }


def test_ipo_reference_free_by_hand():
    # h = 3 and -3, target 1 / (2 * 0.1) = 5: (4 + 64) / 2, of slopes 2 * (-2) / 2 and 2 * (-8) / 2
    loss, chosen, rejected = loss_and_slopes(IPOLoss(reference_free=True), *PAIRS[:2])
    assert loss == close(34.0)
    assert chosen == close([-2.0, -8.0])
    assert rejected == close([2.0, 8.0])


def test_ipo_rests_at_its_target():
    # h = 2 = 1 / (2 * 0.25)
    at_target = tensor([-3.0], [-6.0], [-4.0], [-5.0])
    assert loss_and_slopes(IPOLoss(beta=0.25), *at_target) == (0.0, [0.0], [0.0])
    # beyond it the pair is pulled back, where DPO still pushes
    beyond = tensor([0.0], [-6.0], [-4.0], [-5.0])
    assert loss_and_slopes(IPOLoss(beta=0.25), *beyond)[1] == close([6.0])  # 2 * (5 - 2)
    assert loss_and_slopes(DPOLoss(beta=0.25), *beyond)[1][0] < 0


def test_ipo_takes_means_by_the_same_formula():
    sums, means = IPOLoss(beta=0.25), IPOLoss(beta=0.25, length_normalized=True)
    assert loss_and_slopes(sums, *PAIRS) == loss_and_slopes(means, *PAIRS)


# SimPO

MEANS = tensor([-1.0, -2.0], [-1.5, -1.25])  # h = 0.5 and -0.75


def test_simpo_by_hand():
    # 2 * 0.5 - 0.5 = 0.5 and 2 * (-0.75) - 0.5 = -2: slopes 2 (sigmoid - 1) / 2
    loss, chosen, rejected = loss_and_slopes(SimPOLoss(), *MEANS)
    assert loss == close((softplus(-0.5) + softplus(2.0)) / 2)
    slopes = [-1 / (1 + math.exp(0.5)), -1 / (1 + math.exp(-2.0))]
    assert chosen == close(slopes)
    assert rejected == close([-slopes[0], -slopes[1]])
    assert scalars(SimPOLoss()(*MEANS).metrics) == {
        "accuracy": 0.5,
        "margin": close(-0.25),  # (1 - 1.5) / 2: beta h, without the target
        "margin_std": close(1.25),
        "chosen_reward": close(-3.0),  # 2 * (-1 - 2) / 2
        "rejected_reward": close(-2.75),  # 2 * (-1.5 - 1.25) / 2
    }


def test_simpo_smoothed_by_hand():
    # 4 h - margin = log 3: 0.8 log(4/3) + 0.2 log 4, of slope 4 (3/4 - 1 + 0.2)
    loss_fn = SimPOLoss(beta=4.0, margin=1.0, label_smoothing=0.2)
    loss, chosen, rejected = loss_and_slopes(loss_fn, tensor((LOG3 + 1) / 4 - 2), tensor(-2.0))
    assert loss == close(0.8 * math.log(4 / 3) + 0.2 * math.log(4))
    assert chosen == close([-0.2])
    assert rejected == close([0.2])


def test_simpo_at_its_margin_is_log_2():
    # h = 0.25 = 0.5 / 2, of slope -beta / 2
    loss, chosen, rejected = loss_and_slopes(SimPOLoss(beta=2.0, margin=0.5), tensor(-1.0), tensor(-1.25))
    assert (loss, chosen, rejected) == (close(LOG2), close([-1.0]), close([1.0]))


# KTO

# log-ratios 1 + 2 log 3, 1 + 2 log 3, 1 - 2 log 3 and 1, so that beta (r - kl) is log 3, log 3, -log 3 and 0
REF = tensor(-10.0, -20.0, -30.0, -4.0)
LOGPS = REF + tensor(1 + 2 * LOG3, 1 + 2 * LOG3, 1 - 2 * LOG3, 1.0)
DESIRABLE = torch.tensor([True, False, False, True])


def test_kto_by_hand():
    # 2 * 1/4, 3 * 3/4, 3 * 1/4 and 2 * 1/2 over 4 rows; slopes -+ 0.5 w sigmoid(x) sigmoid(-x), 3/16 or 1/4
    loss_fn = KTOLoss(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    loss, slope = loss_and_slope(loss_fn, LOGPS, REF, DESIRABLE, kl=1.0)
    assert loss == close(4.5 / 4)
    assert slope == close([-0.1875 / 4, 0.28125 / 4, 0.28125 / 4, -0.25 / 4])
    assert scalars(loss_fn(LOGPS, REF, DESIRABLE, kl=1.0).metrics) == {
        "accuracy": 0.5,  # the first and the third; the last stands at kl, which is no win
        "desirable_reward": close(0.5 * (2 + 2 * LOG3) / 2),
        "undesirable_reward": close(0.5 * 2 / 2),
        "kl": 1.0,
    }


@pytest.mark.parametrize("desirable", [True, False])
def test_kto_takes_a_single_row(desirable):
    # at the reference and kl = 0: half its weight, of slope -+ beta w / 4
    weight, sign = (1.3, -1) if desirable else (0.7, 1)
    loss_fn = KTOLoss(beta=0.2, desirable_weight=1.3, undesirable_weight=0.7)
    row = (tensor(-5.0), tensor(-5.0), torch.tensor([desirable]))
    loss, slope = loss_and_slope(loss_fn, *row, kl=0.0)
    assert loss == close(0.5 * weight)
    assert slope == close([sign * 0.2 * weight / 4])
    # log-ratio 0 against kl = 5 log 3 is log 3 too little: a good row loses 3/4 of its weight, a bad one 1/4
    assert loss_fn(*row, kl=5 * tensor(LOG3)[0]).loss == close(weight * (0.75 if desirable else 0.25))


@pytest.mark.parametrize("desirable", [True, False])
def test_kto_takes_rows_of_one_class(desirable):
    # x = +- log 3 and 0: the good row loses 1/4 and 1/2, the bad one 3/4 and 1/2
    rows = (LOGPS[[0, 3]], REF[[0, 3]], torch.tensor([desirable, desirable]))
    out = KTOLoss(beta=0.5)(*rows, kl=1.0)
    assert out.loss == close((0.25 + 0.5) / 2 if desirable else (0.75 + 0.5) / 2)
    metrics = scalars(out.metrics)
    present, absent = ("desirable_reward", "undesirable_reward")[:: 1 if desirable else -1]
    assert metrics[present] == close(0.5 * (2 + 2 * LOG3) / 2)
    assert metrics[absent] == 0


def test_kto_class_rewards_are_means_over_their_class_alone():
    parts = [KTOLoss(beta=0.5)(LOGPS[i], REF[i], DESIRABLE[i], kl=1.0).metrics for i in ([0, 1, 2], [3])]
    assert scalars(merge_metrics(parts)) == close(scalars(KTOLoss(beta=0.5)(LOGPS, REF, DESIRABLE, kl=1.0).metrics))


def test_kto_leaves_far_rows_alone():
    logps = torch.tensor([-1e4, 1e4])
    for desirable in ([True, False], [False, True]):
        loss, slope = loss_and_slope(KTOLoss(), logps, torch.zeros(2), torch.tensor(desirable), kl=0.0)
        assert loss == float(desirable[0])  # both wrong, or both right
        assert slope == [0.0, 0.0]


def test_kto_thumbs_down_is_the_opposite_of_thumbs_up():
    logps, ref, up = draws(5), draws(5, seed=1), torch.ones(5, dtype=torch.bool)
    loss, slope = loss_and_slope(KTOLoss(beta=0.7), logps, ref, up, kl=0.25)
    opposite, opposite_slope = loss_and_slope(KTOLoss(beta=0.7), logps, ref, ~up, kl=0.25)
    assert loss + opposite == close(1)
    assert slope == close([-x for x in opposite_slope])
    assert min(opposite_slope) > 0
    # and of what lies as far on the other side of kl: ref + kl - (logps - ref - kl)
    mirrored = 2 * (ref + 0.25) - logps
    assert KTOLoss(beta=0.7)(mirrored, ref, ~up, kl=0.25).loss == close(loss)


def test_kto_kl_is_bounded_after_the_parts_have_met():
    parts = [tensor(0.5, -2.0), tensor(4.5)]
    means = [Mean.of(part, torch.ones_like(part, dtype=torch.bool)) for part in parts]
    assert kto_kl(means[0] + means[1]) == 1.0  # (0.5 - 2 + 4.5) / 3
    assert [float(kto_kl(mean)) for mean in means] == [0.0, 4.5]  # of mean 1.5 over the three rows
    assert kto_kl(means[0]) == 0.0  # (0.5 - 2) / 2 is below 0
    masked = Mean.of(tensor(0.5, math.nan, 2.5), torch.tensor([True, False, True]))
    assert kto_kl(masked) == 1.5


def test_kto_kl_carries_no_gradient():
    kl_logps = draws(3).requires_grad_()
    of_step = kto_kl(Mean.of(kl_logps + 5, torch.ones(3, dtype=torch.bool)))
    assert not of_step.requires_grad
    kl, logps = torch.tensor(0.5, requires_grad=True), LOGPS.float().requires_grad_()
    out = KTOLoss()(logps, REF.float(), DESIRABLE, kl=kl)
    out.loss.backward()
    assert kl.grad is None
    assert logps.grad is not None


def test_kto_kl_may_be_a_number_or_of_another_precision():
    kl = tensor(0.1)[0]
    expected = KTOLoss()(LOGPS, REF, DESIRABLE, kl=kl).loss
    assert KTOLoss()(LOGPS, REF, DESIRABLE, kl=0.1).loss == expected  # not rounded to float32 on its way
    single = LOGPS.float(), REF.float(), DESIRABLE
    assert KTOLoss()(*single, kl=kl).loss == KTOLoss()(*single, kl=0.1).loss == pytest.approx(expected.item(), rel=1e-6)


# Bradley-Terry

# (r_w - r_l - margin) / 2 = log 3 and -log 3; the sums of the pairs are 1 and -3
REWARDS = tensor([0.5 + LOG3, -1 - LOG3], [0.5 - LOG3, -2 + LOG3])
MARGIN = tensor(0.0, 1.0)


def test_bradley_terry_by_hand():
    # log(4/3) and log 4; slopes (3/4 - 1) / 2 / 2 and (1/4 - 1) / 2 / 2
    loss, chosen, rejected = loss_and_slopes(BradleyTerryLoss(temperature=2.0), *REWARDS, margin=MARGIN)
    assert loss == close((math.log(4 / 3) + math.log(4)) / 2)
    assert chosen == close([-0.0625, -0.1875])
    assert rejected == close([0.0625, 0.1875])
    assert scalars(BradleyTerryLoss(temperature=2.0)(*REWARDS, margin=MARGIN).metrics) == {
        "accuracy": 0.5,
        # differences 2 log 3 and 1 - 2 log 3, whatever the margin that is asked for and the temperature
        "margin": close(0.5),
        "margin_std": close(2 * LOG3 - 0.5),
        "chosen_reward": close(-0.25),  # (0.5 - 1) / 2
        "rejected_reward": close(-0.75),  # (0.5 - 2) / 2
    }


def test_bradley_terry_centred_by_hand():
    # adds 0.1 * (1^2 + 3^2) / 2, of slopes 2 * 0.1 * (1, -3) / 2 in both rewards
    loss_fn = BradleyTerryLoss(temperature=2.0, center_coef=0.1)
    loss, chosen, rejected = loss_and_slopes(loss_fn, *REWARDS, margin=MARGIN)
    assert loss == close((math.log(4 / 3) + math.log(4)) / 2 + 0.5)
    assert chosen == close([-0.0625 + 0.1, -0.1875 - 0.3])
    assert rejected == close([0.0625 + 0.1, 0.1875 - 0.3])


def test_bradley_terry_smoothed_by_hand():
    # 0.8 log(4/3) + 0.2 log 4, of slope 3/4 - 1 + 0.2
    loss, chosen, rejected = loss_and_slopes(BradleyTerryLoss(label_smoothing=0.2), tensor(LOG3), tensor(0.0))
    assert loss == close(0.8 * math.log(4 / 3) + 0.2 * math.log(4))
    assert chosen == close([-0.05])
    assert rejected == close([0.05])


def test_bradley_terry_sees_differences_until_it_is_centred():
    plain, centred = BradleyTerryLoss(), BradleyTerryLoss(center_coef=0.01)
    assert plain(*(REWARDS + 7)).loss == close(plain(*REWARDS).loss.item())
    # sums 1 and -3 become 15 and 11: 0.01 * ((225 - 1) + (121 - 9)) / 2
    assert centred(*(REWARDS + 7)).loss == close(centred(*REWARDS).loss.item() + 1.68)


@pytest.mark.parametrize(
    "loss_fn", [BradleyTerryLoss(), DPOLoss(reference_free=True), SimPOLoss()], ids=lambda x: type(x).__name__
)
def test_a_tie_is_no_win(loss_fn):
    # differences 0.25, 0 and -0.25
    out = loss_fn(tensor(-1.0, -2.0, -3.0), tensor(-1.25, -2.0, -2.75))
    assert scalars(out.metrics)["accuracy"] == close(1 / 3)


# what all of them do

# two rows each, of which the second has the loss below
BATCHES = [
    (DPOLoss(beta=0.5), (*PAIRS,), {}, softplus(1.0)),
    (IPOLoss(beta=0.25), (*PAIRS,), {}, 16.0),
    (SimPOLoss(), (*MEANS,), {}, softplus(2.0)),
    (KTOLoss(beta=0.5), (LOGPS[:2], REF[:2], DESIRABLE[:2]), {"kl": 1.0}, 0.75),
    (BradleyTerryLoss(temperature=2.0), (*REWARDS,), {"margin": MARGIN}, math.log(4)),
]


@pytest.mark.parametrize(("loss_fn", "inputs", "extra", "second"), BATCHES)
def test_masks_take_rows_out_and_weights_scale_them(loss_fn, inputs, extra, second):
    assert loss_fn(*inputs, **extra, mask=torch.tensor([False, True])).loss == close(second)
    # weight 0 rejects the first row and keeps it in the denominator: 3 * second / 2
    assert loss_fn(*inputs, **extra, weights=tensor(0.0, 3.0)).loss == close(1.5 * second)


@pytest.mark.parametrize(("loss_fn", "inputs", "extra", "second"), BATCHES)
def test_metrics_are_unweighted_and_masked(loss_fn, inputs, extra, second):
    plain = scalars(loss_fn(*inputs, **extra).metrics)
    assert scalars(loss_fn(*inputs, **extra, weights=tensor(0.0, 3.0)).metrics) == plain
    masked = scalars(loss_fn(*inputs, **extra, mask=torch.tensor([False, True])).metrics)
    alone = {k: x[1:] if isinstance(x, torch.Tensor) else x for k, x in extra.items()}
    assert masked == scalars(loss_fn(*(x[1:] for x in inputs), **alone).metrics)
    assert masked != plain


@pytest.mark.parametrize("loss_fn", [DPOLoss(), IPOLoss(), SimPOLoss()], ids=lambda x: type(x).__name__)
def test_pairs_see_differences_alone(loss_fn):
    inputs = draws(4 if loss_fn.needs_reference else 2, 5)
    loss = loss_fn(*inputs).loss.item()
    assert loss_fn(inputs[0] + 3, inputs[1] + 3, *inputs[2:]).loss == close(loss)
    if loss_fn.needs_reference:
        assert loss_fn(inputs[0] + 3, inputs[1], inputs[2] + 3, inputs[3]).loss == close(loss)
        assert loss_fn(inputs[0], inputs[1] - 2, inputs[2], inputs[3] - 2).loss == close(loss)


@pytest.mark.parametrize("loss_fn", [DPOLoss(), IPOLoss(), SimPOLoss()], ids=lambda x: type(x).__name__)
def test_a_pair_loss_sees_zeros_where_masked(loss_fn):
    class Seen(type(loss_fn)):
        def pair_loss(self, h, beta):
            seen.append(h.tolist())
            return super().pair_loss(h, beta)

    seen = []
    mask, inputs = torch.tensor([True, False]), PAIRS[: 4 if loss_fn.needs_reference else 2]
    for i in range(len(inputs)):
        Seen()(*[torch.where(mask, x, math.nan) if i == j else x for j, x in enumerate(inputs)], mask=mask)
    assert seen == [[3.0, 0.0]] * len(inputs)


@pytest.mark.parametrize("x", [2 * LOG2, -2 * LOG2])
def test_half_the_labels_flipped_leave_no_preference(x):
    # log(2 cosh(x / 2)) = log(2 + 1/2), of slope sigmoid(x) - 1/2 = +- (4/5 - 1/2)
    logits = tensor(x).requires_grad_()
    loss = logistic_loss(logits, 0.5)
    assert loss.item() == close(math.log(2.5))
    assert torch.autograd.grad(loss.sum(), logits)[0].item() == close(math.copysign(0.3, x))


@pytest.mark.parametrize("smoothing", [0.0, 0.2, 0.5])
def test_swapping_a_pair_swaps_its_label(smoothing):
    chosen, rejected = draws(2, 5)
    for loss in (DPOLoss, BradleyTerryLoss):
        free: Any = {"reference_free": True} if loss is DPOLoss else {}
        loss_fn = loss(label_smoothing=smoothing, **free)
        there, back = loss_fn(chosen, rejected).loss.item(), loss_fn(rejected, chosen).loss.item()
        assert (there == close(back)) == (smoothing == 0.5)


# identities


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo_without_a_margin_is_dpo_without_a_reference(smoothing):
    options = {"beta": 1.7, "label_smoothing": smoothing}
    simpo, dpo = SimPOLoss(margin=0.0, **options), DPOLoss(reference_free=True, **options)
    assert loss_and_slopes(simpo, *draws(2, 6)) == loss_and_slopes(dpo, *draws(2, 6))
    assert scalars(simpo(*draws(2, 6)).metrics) == scalars(dpo(*draws(2, 6)).metrics)


def test_bradley_terry_at_a_temperature_is_dpo_at_its_inverse():
    rewards = draws(2, 6)
    for smoothing in (0.0, 0.1):
        bradley_terry = BradleyTerryLoss(temperature=2.5, label_smoothing=smoothing)
        dpo = DPOLoss(beta=1 / 2.5, reference_free=True, label_smoothing=smoothing)
        for one, other in zip(loss_and_slopes(bradley_terry, *rewards), loss_and_slopes(dpo, *rewards), strict=True):
            assert one == close(other)


def test_bradley_terry_with_one_margin_is_simpo():
    rewards, margin = draws(2, 6), torch.full((6,), 1.5, dtype=torch.float64)
    bradley_terry = loss_and_slopes(BradleyTerryLoss(temperature=2.5), *rewards, margin=margin)
    simpo = loss_and_slopes(SimPOLoss(beta=1 / 2.5, margin=1.5 / 2.5), *rewards)
    for one, other in zip(bradley_terry, simpo, strict=True):
        assert one == close(other)


@pytest.mark.parametrize("loss_fn", [DPOLoss(reference_free=True), SimPOLoss(), BradleyTerryLoss()], ids=repr)
def test_a_rejected_answer_that_cannot_be_leaves_nothing_to_learn(loss_fn):
    chosen, rejected = torch.tensor([-1.0], requires_grad=True), torch.tensor([-math.inf])
    loss = loss_fn(chosen, rejected).loss
    assert loss.item() == 0
    assert torch.autograd.grad(loss, chosen)[0].item() == 0
