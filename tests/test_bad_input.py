"""Every check names who complains, what was expected, what came, and the way out."""

# pyright: reportArgumentType=false, reportCallIssue=false

import re

import numpy as np
import pytest
import torch

import rlloss
from rlloss import (
    ConservativePPOLoss,
    Counts,
    DPOLoss,
    DrGRPOLoss,
    GRPOLoss,
    GSPOLoss,
    LossOutput,
    SFTLoss,
    group_advantages,
)

pytestmark = pytest.mark.unhooked

X = torch.zeros(2, 4)
MASK = torch.ones(2, 4, dtype=torch.bool)
A = torch.zeros(2)
PACKED, PACKED_MASK, CU_SEQLENS = torch.zeros(8), torch.ones(8, dtype=torch.bool), torch.tensor([0, 4, 8])
TWO_UNITS = ConservativePPOLoss(level="sequence")
NUMBERS = Counts(torch.tensor(8), torch.tensor(2))


def grpo(logprobs=X, old=X, advantages=A, mask=MASK, **extra):
    return GRPOLoss()(logprobs, old, advantages, mask, **extra)


def packed(cu_seqlens, **extra):
    inputs = {"logprobs": PACKED, "old_logprobs": PACKED, "advantages": PACKED, "loss_mask": PACKED_MASK} | extra
    return GRPOLoss()(**inputs, cu_seqlens=cu_seqlens)


def dpo(*logps, reference_free=False, **extra):
    return DPOLoss(reference_free=reference_free)(*(logps or (A, A, A, A)), **extra)


BAD_TENSORS = [
    # shapes
    (lambda: grpo(logprobs=X[:, :3]), "GRPOLoss: logprobs must have the shape of loss_mask, [2, 4], got [2, 3]"),
    (lambda: grpo(old=X[:1]), "GRPOLoss: old_logprobs must have the shape of logprobs, [2, 4], got [1, 4]"),
    (lambda: grpo(ref_logprobs=X.T), "GRPOLoss: ref_logprobs must have the shape of logprobs, [2, 4], got [4, 2]"),
    (lambda: grpo(entropy=A), "GRPOLoss: entropy must have the shape of logprobs, [2, 4], got [2]"),
    (lambda: grpo(token_weights=A), "GRPOLoss: token_weights must have the shape of logprobs, [2, 4], got [2]"),
    (
        lambda: grpo(advantages=torch.zeros(3)),
        "GRPOLoss: advantages must have one value per token [2, 4] or per sequence [2], got [3]",
    ),
    (
        lambda: grpo(advantages=torch.tensor(1.0)),
        "GRPOLoss: advantages must have one value per token [2, 4] or per sequence [2], got []",
    ),
    (lambda: grpo(mask=MASK[None]), "GRPOLoss: loss_mask must be 1-D or 2-D, got shape [1, 2, 4]"),
    (lambda: SFTLoss()(X[:1], MASK), "SFTLoss: logprobs must have the shape of loss_mask, [2, 4], got [1, 4]"),
    (
        lambda: SFTLoss()(X, MASK, token_weights=A),
        "SFTLoss: token_weights must have the shape of loss_mask, [2, 4], got [2]",
    ),
    (lambda: dpo(X, X, X, X), "DPOLoss: chosen_logps must be one sum per pair [B], got [2, 4]; rlloss.sequence_logps"),
    (lambda: dpo(A, A[:1], A, A), "DPOLoss: rejected_logps must have the shape of chosen_logps, [2], got [1]"),
    (lambda: dpo(weights=X), "DPOLoss: weights must have the shape of chosen_logps, [2], got [2, 4]"),
    (lambda: dpo(mask=MASK[0]), "DPOLoss: mask must be [2] as chosen_logps, got [4]"),
    (lambda: dpo(mask=MASK), "DPOLoss: mask must be 1-D, got shape [2, 4]"),
    (lambda: rlloss.shift(A.long(), MASK), "shift: input_ids [2] and loss_mask [2, 4] must have one shape"),
    (
        lambda: rlloss.prompt_mean_weights(MASK, torch.zeros(3).long()),
        "prompt_mean_weights: group_ids must have one entry per sequence, [2], got [3]",
    ),
    (
        lambda: group_advantages(X, A.long()),
        "group_advantages: rewards [B] and integer group_ids [B] must match, got [2, 4] and torch.int64 [2]",
    ),
    # dtypes
    (
        lambda: grpo(logprobs=X.bfloat16()),
        "GRPOLoss: logprobs must be float32 or float64, got torch.bfloat16; half precision is off by up to 0.05 nats",
    ),
    (lambda: grpo(old=X.half()), "GRPOLoss: old_logprobs must be float32 or float64, got torch.float16"),
    (lambda: grpo(ref_logprobs=X.half()), "ref_logprobs must be float32 or float64, got torch.float16"),
    (lambda: grpo(advantages=A.half()), "GRPOLoss: advantages must be float32 or float64, got torch.float16"),
    (lambda: grpo(advantages=A.long()), "GRPOLoss: advantages must be float32 or float64, got torch.int64"),
    (lambda: grpo(token_weights=MASK), "GRPOLoss: token_weights must be float32 or float64, got torch.bool"),
    (lambda: grpo(mask=MASK.float()), "GRPOLoss: loss_mask must be a bool tensor (True = counts), got torch.float32"),
    (lambda: grpo(mask=MASK.long()), "write `mask.bool()` if every non-zero entry counts"),
    (lambda: grpo(mask=MASK.numpy()), "GRPOLoss: loss_mask must be a bool tensor (True = counts), got ndarray"),
    (lambda: grpo(logprobs=X.tolist()), "GRPOLoss: logprobs must be a tensor, got list"),
    (lambda: grpo(advantages=None), "GRPOLoss: advantages must be a tensor, got NoneType"),
    (lambda: grpo(advantages=1.0), "GRPOLoss: advantages must be a tensor, got float"),
    (lambda: SFTLoss()(X.half(), MASK), "SFTLoss: logprobs must be float32 or float64, got torch.float16"),
    (lambda: SFTLoss()(X, MASK.int()), "SFTLoss: loss_mask must be a bool tensor (True = counts), got torch.int32"),
    (lambda: dpo(A.half(), A, A, A), "DPOLoss: chosen_logps must be float32 or float64, got torch.float16"),
    (lambda: dpo(mask=A), "DPOLoss: mask must be a bool tensor (True = counts), got torch.float32"),
    (lambda: rlloss.count(X), "count: loss_mask must be a bool tensor (True = counts), got torch.float32"),
    (lambda: group_advantages(A.half(), A.long()), "group_advantages: rewards must be float32 or float64"),
    (lambda: group_advantages(A, A), "integer group_ids [B] must match, got [2] and torch.float32 [2]"),
    (lambda: group_advantages(A, A.long(), valid=A), "group_advantages: valid must be a bool tensor"),
    # devices
    (lambda: grpo(old=X.to("meta")), "GRPOLoss: old_logprobs is on meta but logprobs is on cpu; move one of them"),
    (lambda: grpo(mask=MASK.to("meta")), "GRPOLoss: logprobs is on cpu but loss_mask is on meta; move one of them"),
    (lambda: grpo(advantages=A.to("meta")), "GRPOLoss: advantages is on meta but"),
    (lambda: dpo(A, A.to("meta"), A, A), "DPOLoss: rejected_logps is on meta but chosen_logps is on cpu"),
    (lambda: dpo(mask=MASK[:, 0].to("meta")), "DPOLoss: mask is on meta but chosen_logps is on cpu"),
    (lambda: packed(CU_SEQLENS.to("meta")), "GRPOLoss: cu_seqlens is on meta but loss_mask is on cpu"),
    # packing
    (lambda: packed(None), "GRPOLoss: a packed loss_mask [8] needs cu_seqlens (the boundaries [0, ..., N])"),
    (
        lambda: grpo(cu_seqlens=CU_SEQLENS),
        "GRPOLoss: cu_seqlens goes with packed [N] tensors, got loss_mask of shape [2",
    ),
    (lambda: packed(CU_SEQLENS.float()), "GRPOLoss: cu_seqlens must be int32 or int64 boundaries [0, ..., N]"),
    (lambda: packed(CU_SEQLENS[None]), "of shape [S + 1], got torch.int64 of shape [1, 3]"),
    (lambda: packed(CU_SEQLENS[:0]), "of shape [S + 1], got torch.int64 of shape [0]"),
    (lambda: packed([0, 4, 8]), "GRPOLoss: cu_seqlens must be int32 or int64 boundaries"),
    (lambda: SFTLoss()(PACKED, PACKED_MASK), "SFTLoss: a packed loss_mask [8] needs cu_seqlens"),
    # what must come together
    (
        lambda: GRPOLoss(kl_coef=0.04)(X, X, A, MASK),
        "GRPOLoss: kl_coef=0.04 needs ref_logprobs, got None",
    ),
    (
        lambda: GSPOLoss(entropy_coef=0.01)(X, X, A, MASK),
        'GSPOLoss: entropy_coef=0.01 needs entropy, got None; ask the log-prob functions for outputs=("logprobs"',
    ),
    (lambda: ConservativePPOLoss()(X, X, A, MASK), "ConservativePPOLoss: needs ref_logprobs, got None"),
    (lambda: dpo(A, A), "DPOLoss: needs ref_chosen_logps, got None; or set reference_free=True"),
    (lambda: dpo(A, A, A), "DPOLoss: needs ref_rejected_logps, got None; or set reference_free=True"),
    (
        lambda: dpo(reference_free=True),
        "DPOLoss: reference_free=True takes no reference, got ref_chosen_logps; pass None",
    ),
    # normalizers
    (lambda: grpo(normalizer="all"), "GRPOLoss: normalizer must be rlloss.Counts or a number, got str"),
    (lambda: grpo(normalizer=True), "GRPOLoss: normalizer must be rlloss.Counts or a number, got bool"),
    (
        lambda: grpo(normalizer=Counts(8, 2)),
        "GRPOLoss: normalizer.tokens must be a 0-dim tensor, got 8; use rlloss.count(mask)",
    ),
    (lambda: grpo(normalizer=A), "normalizer: must be Counts or one number, got a tensor of shape [2]"),
    (lambda: grpo(normalizer=-1), "normalizer: the number of sequences must be a number in [0, inf], got -1"),
    (lambda: dpo(normalizer="all"), "DPOLoss: normalizer must be rlloss.Counts or a number, got str"),
    (lambda: SFTLoss()(X, MASK, normalizer=[8]), "SFTLoss: normalizer must be rlloss.Counts or a number, got list"),
    (
        lambda: SFTLoss(reduction="sum")(X, MASK, normalizer=8),
        "the reduction 'sum' divides by nothing, got normalizer=8",
    ),
    (
        lambda: TWO_UNITS(X, X, A, MASK, ref_logprobs=X, normalizer=8),
        "ConservativePPOLoss: divides by tokens and by sequences, so normalizer must be rlloss.Counts, got 8",
    ),
    (
        lambda: TWO_UNITS(X, X, A, MASK, ref_logprobs=X, kl=0.1),
        "ConservativePPOLoss: level='sequence' takes no kl=; each sequence has its own",
    ),
    (
        lambda: ConservativePPOLoss()(X, X, A, MASK, ref_logprobs=X, normalizer=NUMBERS),
        "pass kl=loss_fn.statistics(...)['kl'] of the whole step, or set level='sequence'",
    ),
    # functions
    (
        lambda: rlloss.reduce_tokens(X, MASK, "mean"),
        "'sequence_mean', 'sequence_sum', 'fixed_length', 'sum'], got 'mean'; did you mean 'token_mean'",
    ),
    (
        lambda: rlloss.reduce_tokens(X, MASK, "fixed_length"),
        "reduce_tokens: max_length is for fixed_length and only for it",
    ),
    (lambda: rlloss.reduce_tokens(X, MASK, "sum", max_length=4), "reduction='sum' max_length=4"),
    (
        lambda: group_advantages(A, A.long(), "std"),
        "group_advantages: scale must be one of ['group', 'batch', 'none'], got 'std'",
    ),
    (lambda: group_advantages(A, A.long(), eps=-1.0), "group_advantages: eps must be a number in [0, inf], got -1.0"),
    (
        lambda: rlloss.combine(),
        "combine: needs at least one named LossOutput, as in combine(policy=out, nll=0.1 * out2)",
    ),
    (lambda: rlloss.combine(policy=A), "combine: policy must be a LossOutput, got Tensor"),
    (lambda: rlloss.waist_gradient(lambda x: x.sum(), A), "waist_gradient: loss must return a LossOutput, got Tensor"),
]


@pytest.mark.parametrize(("call", "message"), BAD_TENSORS, ids=[message[:60] for _, message in BAD_TENSORS])
def test_bad_tensors_teach(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


BAD_HYPERPARAMETERS = [
    (GRPOLoss, {"kl_coef": -0.1}, "GRPOLoss: kl_coef must be a number in [0, inf], got -0.1"),
    (GRPOLoss, {"kl_coef": float("nan")}, "GRPOLoss: kl_coef must be a number in [0, inf], got nan"),
    (GRPOLoss, {"kl_coef": "0.1"}, "GRPOLoss: kl_coef must be a number in [0, inf], got '0.1'"),
    (GRPOLoss, {"kl_coef": True}, "GRPOLoss: kl_coef must be a number in [0, inf], got True"),
    (GRPOLoss, {"kl": "k4"}, "GRPOLoss: kl must be one of ['k1', 'k2', 'k3'], got 'k4'; did you mean"),
    (GRPOLoss, {"kl_grad": "revers"}, "got 'revers'; did you mean 'reverse'"),
    (GRPOLoss, {"kl": "k1", "kl_grad": "forward"}, "k1 has zero expected gradient; only k3 descends KL(ref||pi)"),
    (GRPOLoss, {"kl": "k2", "kl_grad": "forward"}, "k2 descends KL(pi||ref); only k3 descends KL(ref||pi)"),
    (GRPOLoss, {"kl": "k1", "kl_grad": "literal"}, "regularises nothing; use kl_grad='reverse'"),
    (GRPOLoss, {"entropy_coef": float("nan")}, "GRPOLoss: entropy_coef must be a number in [-inf, inf], got nan"),
    (GRPOLoss, {"max_log_ratio": 0}, "GRPOLoss: max_log_ratio must be a number in (0, "),
    (GRPOLoss, {"max_log_ratio": 45.0}, "got 45.0"),  # r k3 reaches exp(90), beyond float32
    (ConservativePPOLoss, {"max_log_ratio": 25.0}, "got 25.0"),  # and its square exp(100)
    (GRPOLoss, {"clip_eps_low": 1.5}, "GRPOLoss: clip_eps_low must be a number in [0, 1], got 1.5"),
    (GRPOLoss, {"clip_eps_high": -0.2}, "GRPOLoss: clip_eps_high must be a number in [0, inf], got -0.2"),
    (GSPOLoss, {"dual_clip": 1.0}, "GSPOLoss: dual_clip must be a number in (1, inf], got 1.0"),
    (DrGRPOLoss, {"max_completion_length": 0}, "max_completion_length must be an integer of at least 1, got 0"),
    (
        DrGRPOLoss,
        {"max_completion_length": 2.5},
        "DrGRPOLoss: max_completion_length must be an integer of at least 1, got 2.5",
    ),
    (
        ConservativePPOLoss,
        {"conservative_coef": -1},
        "ConservativePPOLoss: conservative_coef must be a number in [0, inf], got -1",
    ),
    (ConservativePPOLoss, {"max_kl": -0.1}, "ConservativePPOLoss: max_kl must be a number in [0, inf], got -0.1"),
    (
        ConservativePPOLoss,
        {"level": "token"},
        "ConservativePPOLoss: level must be one of ['batch', 'sequence'], got 'token'",
    ),
    (DPOLoss, {"beta": 0}, "DPOLoss: beta must be a number in (0, inf], got 0"),
    (DPOLoss, {"label_smoothing": 0.6}, "DPOLoss: label_smoothing must be a number in [0, 0.5], got 0.6"),
    (SFTLoss, {"reduction": "mean"}, "SFTLoss: reduction must be one of ['token_mean', "),
    (SFTLoss, {"reduction": "fixed_length"}, "SFTLoss: max_length is for fixed_length and only for it"),
    (SFTLoss, {"max_length": 8}, "SFTLoss: max_length is for fixed_length and only for it"),
    (
        SFTLoss,
        {"reduction": "fixed_length", "max_length": 0},
        "SFTLoss: max_length must be an integer of at least 1, got 0",
    ),
]


@pytest.mark.parametrize(("loss", "options", "message"), BAD_HYPERPARAMETERS)
def test_bad_hyperparameters_teach(loss, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        loss(**options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpro", {}, "get_loss: unknown loss 'gpro'; did you mean 'gspo' or 'grpo'"),
        ("dpo2", {}, "did you mean 'dpo'"),
        ("zzz", {}, "get_loss: unknown loss 'zzz'"),
        ("zzz", {}, "Known: conservative_ppo, dpo, dr_grpo, grpo, gspo, sft"),
        ("grpo", {"klcoef": 0.1}, "get_loss: grpo has no hyperparameter 'klcoef'; did you mean 'kl_coef'"),
        ("dpo", {"clip_eps_low": 0.1}, "get_loss: dpo has no hyperparameter 'clip_eps_low'"),
        ("dpo", {"betta": 0.1}, "did you mean 'beta'"),
        ("grpo", {"kl_coef": -1.0}, "GRPOLoss: kl_coef must be a number in [0, inf], got -1.0"),
    ],
)
def test_bad_names_teach(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rlloss.get_loss(name, **options)


def test_hyperparameters_are_keywords():
    for loss in (GRPOLoss, DPOLoss, SFTLoss):
        with pytest.raises(TypeError):
            loss(0.1)


def test_numpy_numbers_are_numbers():
    assert GRPOLoss(kl_coef=np.float64(0.1)).kl_coef == 0.1


def test_what_is_legal_passes():
    assert isinstance(grpo(advantages=X), LossOutput)
    assert isinstance(packed(CU_SEQLENS, advantages=A), LossOutput)
    assert isinstance(packed(CU_SEQLENS.int()), LossOutput)
    assert isinstance(TWO_UNITS(X, X, A, MASK, ref_logprobs=X, normalizer=NUMBERS), LossOutput)
    assert isinstance(dpo(mask=MASK[:, 0], normalizer=NUMBERS), LossOutput)
