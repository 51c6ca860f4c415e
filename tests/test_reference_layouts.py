"""The specification of the policy losses reads every layout alike, and nothing that is masked."""

import math
from typing import Any

import numpy as np
import pytest

from rlloss.reference import (
    conservative_ppo,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    policy_metrics,
    ppo,
    reinforce,
    rloo,
)

NAN, INF = math.nan, math.inf


def close(value):
    return pytest.approx(value, rel=1e-12, abs=1e-14)


POLICY = {
    "ppo": (ppo, {"dual_clip": 1.5}),
    "dapo": (dapo, {}),
    "reinforce": (reinforce, {}),
    "rloo": (rloo, {"clip_eps_high": 0.4}),
    "grpo": (grpo, {"dual_clip": 1.5}),
    "grpo_k1": (grpo, {"kl": "k1"}),
    "grpo_k2": (grpo, {"kl": "k2"}),
    "grpo_forward": (grpo, {"kl_grad": "forward"}),
    "dr_grpo": (dr_grpo, {"max_completion_length": 7}),
    "gspo": (gspo, {"clip_eps_low": 0.1, "clip_eps_high": 0.3}),
    "conservative_batch": (conservative_ppo, {}),
    "conservative_sequence": (conservative_ppo, {"level": "sequence", "conservative_coef": 2.0}),
}
policy_losses = pytest.mark.parametrize("name", POLICY)
LENGTHS = (3, 5, 1)


def batch(seed=0) -> dict[str, Any]:
    """Three answers of 3, 5 and 1 tokens, padded to 5."""
    rng = np.random.default_rng(seed)
    names = ("logprobs", "old_logprobs", "ref_logprobs", "entropy", "token_weights")
    data: dict[str, Any] = {name: rng.normal(size=(3, 5)) for name in names}
    data["loss_mask"] = np.arange(5) < np.array(LENGTHS)[:, None]
    data["advantages"] = np.array([1.0, -0.5, 2.0])
    return data


def policy_loss(name, data, **options):
    loss, choices = POLICY[name]
    return loss(**data, kl_coef=0.3, entropy_coef=0.2, **choices, **options)


@policy_losses
def test_policy_packed_equals_padded(name):
    padded = batch()
    mask = padded["loss_mask"]
    packed = {key: x[mask] for key, x in padded.items() if key != "advantages"}
    expected, cu_seqlens = policy_loss(name, padded), [0, 3, 8, 9]
    packed["advantages"] = np.repeat(padded["advantages"], LENGTHS)
    assert policy_loss(name, packed, cu_seqlens=cu_seqlens) == close(expected)
    packed["advantages"] = padded["advantages"]
    assert policy_loss(name, packed, cu_seqlens=cu_seqlens) == close(expected)
    assert policy_loss(name, packed, cu_seqlens=[0, 4, 8, 9]) != close(expected)


@policy_losses
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_policy_masked_positions_change_nothing(name, garbage):
    data = batch()
    expected = policy_loss(name, data)
    for key, x in data.items():
        if key not in ("loss_mask", "advantages"):
            x[~data["loss_mask"]] = garbage
    assert policy_loss(name, data) == expected
    data["advantages"] = np.where(data["loss_mask"], data["advantages"][:, None], garbage)
    assert policy_loss(name, data) == expected


@policy_losses
def test_policy_padding_and_order_of_rows_change_nothing(name):
    data = batch()
    expected = policy_loss(name, data)
    for left, right, rows in ((0, 4, 0), (2, 0, 0), (1, 1, 2)):
        widths: Any = ((0, rows), (left, right))
        wide = {k: np.pad(x, widths) for k, x in data.items() if k != "advantages"}
        wide["advantages"] = np.pad(data["advantages"], (0, rows))
        assert policy_loss(name, wide) == close(expected)
    assert policy_loss(name, {key: x[[2, 0, 1]] for key, x in data.items()}) == close(expected)


@policy_losses
def test_policy_without_tokens_is_zero(name):
    data = batch()
    data["loss_mask"][:] = False
    assert policy_loss(name, data) == 0.0
    # an empty answer is not a sequence either
    data = batch()
    data["loss_mask"][1] = False
    assert policy_loss(name, data) == close(policy_loss(name, {key: x[[0, 2]] for key, x in data.items()}))


def test_policy_metrics_share_the_layouts():
    data = batch()
    del data["token_weights"]
    mask = data["loss_mask"]
    clip = {"clip_eps_low": 0.2, "clip_eps_high": 0.2, "ratio_level": "geometric"}
    expected = policy_metrics(**data, **clip)
    packed = {key: x[mask] for key, x in data.items() if key != "advantages"}
    packed["advantages"] = data["advantages"]
    assert policy_metrics(**packed, cu_seqlens=[0, 3, 8, 9], **clip) == close(expected)
    data["logprobs"][~mask] = NAN
    assert policy_metrics(**data, **clip) == expected
    data["loss_mask"] = np.zeros_like(mask)
    assert set(policy_metrics(**data, **clip).values()) == {0.0}
