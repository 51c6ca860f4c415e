"""The specification of the losses over pairs and single answers against arithmetic done by hand."""

import math

import pytest

from rlloss.reference import bradley_terry, dpo, ipo, kto, kto_kl, simpo

# sigmoid(log 3) = 3/4: -log sigmoid is log(4/3) at log 3 and log 4 at -log 3
NAN, INF, LOG2, LOG3 = math.nan, math.inf, math.log(2), math.log(3)


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


def test_dpo_at_the_reference_is_log_2():
    assert dpo([-5.0, -1.0], [-2.0, -9.0], [-5.0, -1.0], [-2.0, -9.0], beta=3.0) == close(LOG2)
    # and whatever the smoothing
    assert dpo([-5.0], [-2.0], [-5.0], [-2.0], label_smoothing=0.3) == close(LOG2)


def test_dpo_margin_and_smoothing_by_hand():
    # margin = 0.5 * ((-1 + 3) - (-4 + 2)) = 2: loss log(1 + e^-2), and the flipped label costs 2 more
    pair = ([-1.0], [-4.0], [-3.0], [-2.0])
    loss = math.log(1 + math.exp(-2))
    assert dpo(*pair, beta=0.5) == close(loss)
    assert dpo(*pair, beta=0.5, label_smoothing=0.1) == close(loss + 0.1 * 2)
    # without a reference: margin = 0.5 * (-1 + 4) = 1.5
    assert dpo(*pair, beta=0.5, reference_free=True) == close(math.log(1 + math.exp(-1.5)))
    assert dpo(*pair[:2], beta=0.5, reference_free=True) == close(math.log(1 + math.exp(-1.5)))
    with pytest.raises(ValueError, match="reference_free=True"):
        dpo(*pair[:2])


def test_dpo_default_beta():
    # margin = 0.1 * 10
    assert dpo([-1.0], [-11.0], [0.0], [0.0]) == close(math.log(1 + math.exp(-1)))


def test_dpo_mask_and_weights():
    # losses log 2 (margin 0), masked, log(1 + 1/3) (margin log 3): (2 log 2 + 0.5 log(4 / 3)) / 2
    chosen, rejected, zero = [0.0, NAN, math.log(3)], [0.0, INF, 0.0], [0.0, -INF, 0.0]
    mask = [True, False, True]
    options = {"mask": mask, "beta": 1.0}
    loss = dpo(chosen, rejected, zero, zero, weights=[2.0, 5.0, 0.5], **options)
    assert loss == close((2 * LOG2 + 0.5 * math.log(4 / 3)) / 2)
    # weight 0 rejects the pair and keeps the denominator
    chosen[0] = NAN
    loss = dpo(chosen, rejected, zero, zero, weights=[0.0, 5.0, 1.0], **options)
    assert loss == close(math.log(4 / 3) / 2)
    assert dpo(chosen, rejected, zero, zero, mask=[False] * 3) == 0.0


def test_dpo_survives_huge_margins():
    # -log sigmoid(-1000) = 1000, -log sigmoid(1000) = 0
    assert dpo([0.0], [1000.0], [0.0], [0.0], beta=1.0) == close(1000.0)
    assert dpo([1000.0], [0.0], [0.0], [0.0], beta=1.0) == 0.0


# h = (-4 + 6) - (-7 + 6) = 3 and (-5 + 5) - (-2 + 4) = -2
PAIRS = ([-4.0, -5.0], [-7.0, -2.0], [-6.0, -5.0], [-6.0, -4.0])


def test_ipo_is_the_squared_distance_from_its_target():
    # targets 1 / (2 * 0.25) = 2 and 1 / (2 * 0.1) = 5
    assert ipo(*PAIRS, beta=0.25) == close((1 + 16) / 2)
    assert ipo(*PAIRS) == close((4 + 49) / 2)
    # without a reference, h = 3 and -3
    assert ipo(*PAIRS[:2], beta=0.25, reference_free=True) == close((1 + 25) / 2)
    # the formula of means is the same
    assert ipo(*PAIRS, beta=0.25, length_normalized=True) == close(8.5)
    with pytest.raises(ValueError, match="reference_free=True"):
        ipo(*PAIRS[:2])


def test_ipo_at_its_target_is_zero():
    # h = 2
    assert ipo([-3.0], [-6.0], [-4.0], [-5.0], beta=0.25) == 0.0


def test_simpo_by_hand():
    # 4 * (log 3 / 4 + 0.25) - 1 = log 3
    chosen, rejected = [(LOG3 + 1) / 4 - 2], [-2.0]
    assert simpo(chosen, rejected, beta=4.0, margin=1.0) == close(math.log(4 / 3))
    # turned round: -(log 3 + 1) - 1
    assert simpo(rejected, chosen, beta=4.0, margin=1.0) == close(math.log(1 + 3 * math.exp(2)))
    smoothed = simpo(chosen, rejected, beta=4.0, margin=1.0, label_smoothing=0.2)
    assert smoothed == close(0.8 * math.log(4 / 3) + 0.2 * math.log(4))
    # by default 2 * 0.25 - 0.5 = 0
    assert simpo([-1.0], [-1.25]) == close(LOG2)


# log-ratios 1 + 2 log 3, 1 + 2 log 3, 1 - 2 log 3 and 1, so that 0.5 (r - 1) is log 3, log 3, -log 3 and 0

REF = [-10.0, -20.0, -30.0, -4.0]
LOGPS = [-9 + 2 * LOG3, -19 + 2 * LOG3, -29 - 2 * LOG3, -3.0]
DESIRABLE = [True, False, False, True]


def test_kto_by_hand():
    # 2 * 1/4, 3 * 3/4, 3 * 1/4 and 2 * 1/2
    weights = {"desirable_weight": 2.0, "undesirable_weight": 3.0}
    assert kto(LOGPS, REF, DESIRABLE, kl=1.0, beta=0.5, **weights) == close((0.5 + 2.25 + 0.75 + 1.0) / 4)
    assert kto(LOGPS[:1], REF[:1], [True], kl=1.0, beta=0.5) == close(0.25)
    assert kto(LOGPS[:1], REF[:1], [False], kl=1.0, beta=0.5) == close(0.75)
    # at the reference and kl = 0, half the weight; by default beta = 0.1 and both weights are 1
    assert kto([-5.0], [-5.0], [True], kl=0.0, desirable_weight=1.3) == close(0.65)
    assert kto([-5.0], [-5.0], [False], kl=0.0, undesirable_weight=0.7) == close(0.35)
    assert kto([10 * LOG3], [0.0], [True], kl=0.0) == close(0.25)


def test_kto_saturates():
    for up, down in ((1e4, -1e4), (-1e4, 1e4)):
        assert kto([up, down], [0.0, 0.0], [True, False], kl=0.0) == (0.0 if up > 0 else 1.0)


def test_kto_kl_is_never_below_zero():
    assert kto_kl([0.5, -2.0, 4.5], [0.0, 0.0, 0.0]) == 1.0
    assert kto_kl([0.5, -2.0], [0.0, 0.0]) == 0.0
    assert kto_kl([-1.0, NAN, -3.0], [-2.0, INF, -5.0], [True, False, True]) == 1.5
    assert kto_kl([1.0], [0.0], [False]) == 0.0


# (r_w - r_l - margin) / 2 = log 3 and -log 3; the sums of the pairs are 1 and -3

CHOSEN, REJECTED, MARGIN = [0.5 + LOG3, -1 - LOG3], [0.5 - LOG3, -2 + LOG3], [0.0, 1.0]


def test_bradley_terry_by_hand():
    plain = (math.log(4 / 3) + math.log(4)) / 2
    assert bradley_terry(CHOSEN, REJECTED, margin=MARGIN, temperature=2.0) == close(plain)
    # 0.1 * (1^2 + 3^2) / 2 more
    centred = bradley_terry(CHOSEN, REJECTED, margin=MARGIN, temperature=2.0, center_coef=0.1)
    assert centred == close(plain + 0.5)
    smoothed = bradley_terry([LOG3], [0.0], label_smoothing=0.2)
    assert smoothed == close(0.8 * math.log(4 / 3) + 0.2 * math.log(4))
    # without a margin: differences 2 log 3 and 1 - 2 log 3
    bare = (math.log(1 + 1 / 9) + math.log(1 + 9 / math.e)) / 2
    assert bradley_terry(CHOSEN, REJECTED) == close(bare)


# two rows each, of which the second has the loss below
BATCHES = [
    (ipo, PAIRS, {"beta": 0.25}, 16.0),
    (simpo, ([0.0, 0.0], [-1.0, LOG3]), {"beta": 1.0, "margin": 0.0}, math.log(4)),
    (kto, (LOGPS[:2], REF[:2], DESIRABLE[:2]), {"kl": 1.0, "beta": 0.5}, 0.75),
    (bradley_terry, (CHOSEN, REJECTED), {"margin": MARGIN, "temperature": 2.0}, math.log(4)),
]


@pytest.mark.parametrize(("loss", "inputs", "options", "second"), BATCHES)
def test_masks_take_rows_out_and_weights_scale_them(loss, inputs, options, second):
    for garbage in (0.0, NAN, INF):
        poisoned = ([garbage, inputs[0][1]], *inputs[1:])
        assert loss(*poisoned, **options, mask=[False, True]) == close(second)
        # weight 0 rejects the first row and keeps it in the denominator
        assert loss(*poisoned, **options, weights=[0.0, 3.0]) == close(1.5 * second)
    assert loss(*inputs, **options, mask=[False, False]) == 0.0
