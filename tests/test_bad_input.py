"""Every check names who complains, what was expected, what came, and the way out."""

# pyright: reportArgumentType=false, reportCallIssue=false

import re

import numpy as np
import pytest
import torch

import rlloss
from rlloss import (
    BradleyTerryLoss,
    ConservativePPOLoss,
    Counts,
    DAPOLoss,
    DPOLoss,
    DrGRPOLoss,
    GRPOLoss,
    GSPOLoss,
    IPOLoss,
    KTOLoss,
    LossOutput,
    PPOLoss,
    REINFORCELoss,
    RLOOLoss,
    SFTLoss,
    SimPOLoss,
    ValueLoss,
    group_advantages,
    kto_kl,
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


def ipo(*logps, **extra):
    return IPOLoss()(*(logps or (A, A, A, A)), **extra)


def simpo(chosen=A, rejected=A, **extra):
    return SimPOLoss()(chosen, rejected, **extra)


def kto(logps=A, ref=A, desirable=A > 0, kl=0.0, **extra):
    return KTOLoss()(logps, ref, desirable, kl=kl, **extra)


def bradley_terry(chosen=A, rejected=A, **extra):
    return BradleyTerryLoss()(chosen, rejected, **extra)


def value(values=X, old=X, returns=X, mask=MASK, **extra):
    return ValueLoss()(values, old, returns, mask, **extra)


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
    (
        lambda: dpo(X, X, X, X),
        "DPOLoss: chosen_logps must be one number per row [B], got [2, 4]; "
        "rlloss.sequence_logps(logprobs, loss_mask) makes it",
    ),
    (lambda: ipo(X, X, X, X), "IPOLoss: chosen_logps must be one number per row [B], got [2, 4]"),
    (lambda: ipo(A, A, A, A[:1]), "IPOLoss: ref_rejected_logps must have the shape of chosen_logps, [2], got [1]"),
    (lambda: simpo(X, X), "logps must be one number per row [B], got [2, 4]"),
    (lambda: simpo(A, A[:1]), "logps, [2], got [1]"),
    (lambda: simpo(weights=X), "SimPOLoss: weights must have the shape of chosen_"),
    (lambda: kto(X, X, X > 0), "KTOLoss: logps must be one number per row [B], got [2, 4]"),
    (lambda: kto(ref=A[:1]), "KTOLoss: ref_logps must have the shape of logps, [2], got [1]"),
    (lambda: kto(weights=X), "KTOLoss: weights must have the shape of logps, [2], got [2, 4]"),
    (lambda: kto(mask=MASK[0]), "KTOLoss: mask must be [2] as logps, got [4]"),
    (lambda: kto(desirable=MASK), "KTOLoss: desirable must be 1-D, got shape [2, 4]"),
    (lambda: kto(desirable=MASK[0]), "KTOLoss: desirable must be [2] as logps, got [4]"),
    (
        lambda: kto(kl=A),
        "KTOLoss: kl must be one number for the whole step, got shape [2]; rlloss.kto_kl makes it",
    ),
    (lambda: kto(kl=A[:1]), "KTOLoss: kl must be one number for the whole step, got shape [1]"),
    (lambda: kto(kl=None), "KTOLoss: kl must be a number in [0, inf], got None"),
    (lambda: kto(kl=True), "KTOLoss: kl must be a number in [0, inf], got True"),
    (lambda: kto(kl=-3.0), "KTOLoss: kl must be a number in [0, inf], got -3.0"),
    (lambda: kto(kl=float("nan")), "KTOLoss: kl must be a number in [0, inf], got nan"),
    (lambda: kto(ref=None), "KTOLoss: ref_logps must be a tensor, got NoneType"),
    (lambda: BradleyTerryLoss()(A, None), "BradleyTerryLoss: rejected_rewards must be a tensor, got NoneType"),
    (
        lambda: bradley_terry(X, X),
        "chosen_rewards must be one number per row [B], got [2, 4]; rlloss.ScalarModel.score",
    ),
    (lambda: DPOLoss(reference_free=True)(A, None), "DPOLoss: rejected_logps must be a tensor, got NoneType"),
    (lambda: ValueLoss()(X, X, None, MASK), "ValueLoss: returns must be a tensor, got NoneType"),
    (
        lambda: simpo(X, X),
        "SimPOLoss: chosen_mean_logps must be one number per row [B], got [2, 4]; rlloss.sequence_mean_logps(",
    ),
    (lambda: simpo(A, A[:1]), "SimPOLoss: rejected_mean_logps must have the shape of chosen_mean_logps, [2], got [1]"),
    (lambda: bradley_terry(X, X), "BradleyTerryLoss: chosen_rewards must be one number per row [B], got [2, 4]"),
    (
        lambda: bradley_terry(rejected=A[:1]),
        "BradleyTerryLoss: rejected_rewards must have the shape of chosen_rewards, [2], got [1]",
    ),
    (
        lambda: bradley_terry(margin=A[:1]),
        "BradleyTerryLoss: margin must have the shape of chosen_rewards, [2], got [1]",
    ),
    (lambda: bradley_terry(margin=torch.tensor(1.0)), "margin must have the shape of chosen_rewards, [2], got []"),
    (lambda: bradley_terry(mask=MASK), "BradleyTerryLoss: mask must be 1-D, got shape [2, 4]"),
    (lambda: value(values=X[:, :3]), "ValueLoss: values must have the shape of loss_mask, [2, 4], got [2, 3]"),
    (lambda: value(old=X[:1]), "ValueLoss: old_values must have the shape of values, [2, 4], got [1, 4]"),
    (lambda: value(returns=A), "ValueLoss: returns must have the shape of values, [2, 4], got [2]"),
    (lambda: value(token_weights=A), "ValueLoss: token_weights must have the shape of values, [2, 4], got [2]"),
    (lambda: value(mask=MASK[None]), "ValueLoss: loss_mask must be 1-D or 2-D, got shape [1, 2, 4]"),
    (
        lambda: RLOOLoss()(X, X, torch.zeros(3), MASK),
        "RLOOLoss: advantages must have one value per token [2, 4] or per sequence [2], got [3]",
    ),
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
    (lambda: ipo(A.half(), A, A, A), "IPOLoss: chosen_logps must be float32 or float64, got torch.float16"),
    (lambda: ipo(A, A, A, A.long()), "IPOLoss: ref_rejected_logps must be float32 or float64, got torch.int64"),
    (lambda: simpo(rejected=A.bfloat16()), "logps must be float32 or float64, got torch.bfloat16"),
    (lambda: kto(logps=A.half()), "KTOLoss: logps must be float32 or float64, got torch.float16"),
    (lambda: kto(weights=A > 0), "KTOLoss: weights must be float32 or float64, got torch.bool"),
    (
        lambda: kto(desirable=A),
        "KTOLoss: desirable must be a bool tensor (True = counts), got torch.float32; write `mask.bool()`",
    ),
    (lambda: kto(desirable=A.long()), "KTOLoss: desirable must be a bool tensor (True = counts), got torch.int64"),
    (lambda: kto(desirable=[True, False]), "KTOLoss: desirable must be a bool tensor (True = counts), got list"),
    (lambda: kto(mask=A), "KTOLoss: mask must be a bool tensor (True = counts), got torch.float32"),
    (
        lambda: kto_kl(A),
        "kto_kl: log_ratio must be the rlloss.Mean of kl_logps - ref_kl_logps over the step's mismatched pairs, got "
        "Tensor; write kto_kl(Mean.of(kl_logps - ref_kl_logps, mask))",
    ),
    (lambda: kto_kl(0.5), "over the step's mismatched pairs, got float"),
    (
        lambda: bradley_terry(chosen=A.bfloat16()),
        "BradleyTerryLoss: chosen_rewards must be float32 or float64, got torch.bfloat16",
    ),
    (lambda: bradley_terry(margin=A.long()), "BradleyTerryLoss: margin must be float32 or float64, got torch.int64"),
    (lambda: bradley_terry(margin=1.0), "BradleyTerryLoss: margin must be a tensor, got float"),
    (lambda: value(values=X.half()), "ValueLoss: values must be float32 or float64, got torch.float16"),
    (lambda: value(returns=X.long()), "ValueLoss: returns must be float32 or float64, got torch.int64"),
    (lambda: value(mask=X), "ValueLoss: loss_mask must be a bool tensor (True = counts), got torch.float32"),
    (lambda: PPOLoss()(X.half(), X, A, MASK), "PPOLoss: logprobs must be float32 or float64, got torch.float16"),
    (
        lambda: REINFORCELoss()(X, X, A.long(), MASK),
        "REINFORCELoss: advantages must be float32 or float64, got torch.int64",
    ),
    (lambda: rlloss.count(X), "count: loss_mask must be a bool tensor (True = counts), got torch.float32"),
    (lambda: group_advantages(A.half(), A.long()), "group_advantages: rewards must be float32 or float64"),
    (lambda: group_advantages(A, A), "integer group_ids [B] must match, got [2] and torch.float32 [2]"),
    (lambda: group_advantages(A, A.long(), valid=A), "group_advantages: valid must be a bool tensor"),
    (lambda: group_advantages(A, A.long(), valid=MASK[0]), "group_advantages: valid must be [2] as rewards, got [4]"),
    # devices
    (lambda: grpo(old=X.to("meta")), "GRPOLoss: old_logprobs is on meta but logprobs is on cpu; move one of them"),
    (lambda: grpo(mask=MASK.to("meta")), "GRPOLoss: logprobs is on cpu but loss_mask is on meta; move one of them"),
    (lambda: grpo(advantages=A.to("meta")), "GRPOLoss: advantages is on meta but"),
    (lambda: dpo(A, A.to("meta"), A, A), "DPOLoss: rejected_logps is on meta but chosen_logps is on cpu"),
    (lambda: dpo(mask=MASK[:, 0].to("meta")), "DPOLoss: mask is on meta but chosen_logps is on cpu"),
    (lambda: packed(CU_SEQLENS.to("meta")), "GRPOLoss: cu_seqlens is on meta but loss_mask is on cpu"),
    (lambda: ipo(A, A, A.to("meta"), A), "IPOLoss: ref_chosen_logps is on meta but chosen_logps is on cpu"),
    (lambda: simpo(A, A.to("meta")), "logps is on meta but"),
    (lambda: kto(ref=A.to("meta")), "KTOLoss: ref_logps is on meta but logps is on cpu; move one of them"),
    (lambda: kto(desirable=(A > 0).to("meta")), "KTOLoss: desirable is on meta but logps is on cpu; move one of them"),
    (
        lambda: bradley_terry(margin=A.to("meta")),
        "BradleyTerryLoss: margin is on meta but chosen_rewards is on cpu; move one of them",
    ),
    (lambda: value(old=X.to("meta")), "ValueLoss: old_values is on meta but values is on cpu; move one of them"),
    (lambda: value(mask=MASK.to("meta")), "ValueLoss: values is on cpu but loss_mask is on meta; move one of them"),
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
    (lambda: value(PACKED, PACKED, PACKED, PACKED_MASK), "ValueLoss: a packed loss_mask [8] needs cu_seqlens"),
    (
        lambda: value(cu_seqlens=CU_SEQLENS),
        "ValueLoss: cu_seqlens goes with packed [N] tensors, got loss_mask of shape",
    ),
    # what must come together
    (lambda: PPOLoss(kl_coef=0.04)(X, X, A, MASK), "PPOLoss: kl_coef=0.04 needs ref_logprobs, got None"),
    (lambda: DAPOLoss(entropy_coef=0.1)(X, X, A, MASK), "DAPOLoss: entropy_coef=0.1 needs entropy, got None"),
    (lambda: ipo(A, A), "IPOLoss: needs ref_chosen_logps, got None; or set reference_free=True"),
    (
        lambda: IPOLoss(reference_free=True)(A, A, None, A),
        "IPOLoss: reference_free=True takes no reference, got ref_rejected_logps; pass None",
    ),
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
    (lambda: kto(normalizer="all"), "KTOLoss: normalizer must be rlloss.Counts or a number, got str"),
    (lambda: kto(normalizer=Counts(2, 2)), "KTOLoss: normalizer.tokens must be a 0-dim tensor, got 2"),
    (lambda: simpo(normalizer=True), "SimPOLoss: normalizer must be rlloss.Counts or a number, got bool"),
    (lambda: bradley_terry(normalizer=[2]), "BradleyTerryLoss: normalizer must be rlloss.Counts or a number, got list"),
    (lambda: value(normalizer="all"), "ValueLoss: normalizer must be rlloss.Counts or a number, got str"),
    (lambda: value(normalizer=-1), "normalizer: the number of tokens must be a number in [0, inf], got -1"),
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
        "group_advantages: scale must be one of ['group', 'batch', 'none', 'mean', 'whiten'], got 'std'",
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
    (GRPOLoss, {"kl": "k4"}, "GRPOLoss: kl must be one of ['k1', 'k2', 'k3', 'abs', 'exact'], got 'k4'; did you mean"),
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
    (IPOLoss, {"beta": 0.0}, "IPOLoss: beta must be a number in (0, inf], got 0.0"),
    (IPOLoss, {"beta": float("nan")}, "IPOLoss: beta must be a number in (0, inf], got nan"),
    (IPOLoss, {"beta": True}, "IPOLoss: beta must be a number in (0, inf], got True"),
    (ValueLoss, {"halve": 3}, "ValueLoss: halve must be True or False, got 3"),
    (IPOLoss, {"length_normalized": "no"}, "IPOLoss: length_normalized must be True or False, got 'no'"),
    (DPOLoss, {"reference_free": 1}, "DPOLoss: reference_free must be True or False, got 1"),
    (SimPOLoss, {"beta": -2.0}, "SimPOLoss: beta must be a number in (0, inf], got -2.0"),
    (SimPOLoss, {"margin": float("nan")}, "SimPOLoss: margin must be a number in [-inf, inf], got nan"),
    (SimPOLoss, {"margin": "0.5"}, "SimPOLoss: margin must be a number in [-inf, inf], got '0.5'"),
    (SimPOLoss, {"label_smoothing": -0.1}, "SimPOLoss: label_smoothing must be a number in [0, 0.5], got -0.1"),
    (SimPOLoss, {"label_smoothing": 0.6}, "SimPOLoss: label_smoothing must be a number in [0, 0.5], got 0.6"),
    (KTOLoss, {"beta": 0}, "KTOLoss: beta must be a number in (0, inf], got 0"),
    (KTOLoss, {"beta": None}, "KTOLoss: beta must be a number in (0, inf], got None"),
    (KTOLoss, {"desirable_weight": -1.0}, "KTOLoss: desirable_weight must be a number in [0, inf], got -1.0"),
    (KTOLoss, {"desirable_weight": True}, "KTOLoss: desirable_weight must be a number in [0, inf], got True"),
    (
        KTOLoss,
        {"undesirable_weight": float("nan")},
        "KTOLoss: undesirable_weight must be a number in [0, inf], got nan",
    ),
    (BradleyTerryLoss, {"temperature": 0}, "BradleyTerryLoss: temperature must be a number in (0, inf], got 0"),
    (BradleyTerryLoss, {"temperature": True}, "BradleyTerryLoss: temperature must be a number in (0, inf], got True"),
    (
        BradleyTerryLoss,
        {"label_smoothing": 0.51},
        "BradleyTerryLoss: label_smoothing must be a number in [0, 0.5], got 0.51",
    ),
    (BradleyTerryLoss, {"center_coef": -0.1}, "BradleyTerryLoss: center_coef must be a number in [0, inf], got -0.1"),
    (ValueLoss, {"value_clip": 0}, "ValueLoss: value_clip must be a number in (0, inf], got 0"),
    (ValueLoss, {"value_clip": -0.2}, "ValueLoss: value_clip must be a number in (0, inf], got -0.2"),
    (ValueLoss, {"value_clip": float("nan")}, "ValueLoss: value_clip must be a number in (0, inf], got nan"),
    (ValueLoss, {"value_clip": False}, "ValueLoss: value_clip must be a number in (0, inf], got False"),
    (PPOLoss, {"clip_eps_low": 1.5}, "PPOLoss: clip_eps_low must be a number in [0, 1], got 1.5"),
    (PPOLoss, {"clip_eps_high": True}, "PPOLoss: clip_eps_high must be a number in [0, inf], got True"),
    (PPOLoss, {"dual_clip": 0.5}, "PPOLoss: dual_clip must be a number in (1, inf], got 0.5"),
    (DAPOLoss, {"clip_eps_high": -0.28}, "DAPOLoss: clip_eps_high must be a number in [0, inf], got -0.28"),
    (REINFORCELoss, {"entropy_coef": True}, "REINFORCELoss: entropy_coef must be a number in [-inf, inf], got True"),
    (REINFORCELoss, {"kl_coef": -0.1}, "REINFORCELoss: kl_coef must be a number in [0, inf], got -0.1"),
    (RLOOLoss, {"clip_eps_low": float("nan")}, "RLOOLoss: clip_eps_low must be a number in [0, 1], got nan"),
    (RLOOLoss, {"max_log_ratio": 25.0}, "RLOOLoss: max_log_ratio must be a number in (0, 20], got 25.0"),
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
        ("dpo2", {}, "did you mean 'tdpo2' or 'dpo'"),
        ("zzz", {}, "get_loss: unknown loss 'zzz'"),
        ("zzz", {}, f"Known: {', '.join(rlloss.list_losses())}"),
        ("simop", {}, "get_loss: unknown loss 'simop'; did you mean 'simpo'"),
        ("bradley_tery", {}, "did you mean 'bradley_terry'"),
        ("grpo", {"klcoef": 0.1}, "get_loss: grpo has no hyperparameter 'klcoef'; did you mean 'kl_coef'"),
        ("dpo", {"clip_eps_low": 0.1}, "get_loss: dpo has no hyperparameter 'clip_eps_low'"),
        ("dpo", {"betta": 0.1}, "did you mean 'beta'"),
        ("reinforce", {"clip_eps_low": 0.1}, "get_loss: reinforce has no hyperparameter 'clip_eps_low'"),
        ("simpo", {"reference_free": True}, "get_loss: simpo has no hyperparameter 'reference_free'"),
        ("simpo", {"gamma": 0.5}, "get_loss: simpo has no hyperparameter 'gamma'"),
        ("ipo", {"tau": 0.1}, "get_loss: ipo has no hyperparameter 'tau'"),
        ("bt", {"temprature": 2.0}, "get_loss: bradley_terry has no hyperparameter 'temprature'; did you mean 'temper"),
        ("value", {"clip": 0.2}, "get_loss: value has no hyperparameter 'clip'"),
        ("kto", {"beta": 0}, "KTOLoss: beta must be a number in (0, inf], got 0"),
        ("grpo", {"kl_coef": -1.0}, "GRPOLoss: kl_coef must be a number in [0, inf], got -1.0"),
    ],
)
def test_bad_names_teach(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rlloss.get_loss(name, **options)


def test_hyperparameters_are_keywords():
    for loss in (BradleyTerryLoss, DPOLoss, GRPOLoss, IPOLoss, KTOLoss, PPOLoss, SFTLoss, SimPOLoss, ValueLoss):
        with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
            loss(0.1)


def test_what_a_loss_does_not_take_is_no_argument_of_it():
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'kl'"):
        KTOLoss()(A, A, A > 0)
    with pytest.raises(TypeError, match="takes 3 positional arguments but 5 were given"):
        SimPOLoss()(A, A, A, A)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ref_chosen_logps'"):
        simpo(ref_chosen_logps=A)
    with pytest.raises(TypeError, match="unexpected keyword argument 'reference_free'"):
        SimPOLoss(reference_free=False)
    with pytest.raises(TypeError, match="takes 3 positional arguments but 4 were given"):
        BradleyTerryLoss()(A, A, A)


def test_numpy_numbers_are_numbers():
    assert GRPOLoss(kl_coef=np.float64(0.1)).kl_coef == 0.1


def test_what_is_legal_passes():
    assert isinstance(grpo(advantages=X), LossOutput)
    assert isinstance(packed(CU_SEQLENS, advantages=A), LossOutput)
    assert isinstance(packed(CU_SEQLENS.int()), LossOutput)
    assert isinstance(TWO_UNITS(X, X, A, MASK, ref_logprobs=X, normalizer=NUMBERS), LossOutput)
    assert isinstance(dpo(mask=MASK[:, 0], normalizer=NUMBERS), LossOutput)
    assert isinstance(kto(kl=torch.tensor(0.5), mask=MASK[:, 0], normalizer=NUMBERS), LossOutput)
    assert isinstance(bradley_terry(margin=A, weights=A, normalizer=2), LossOutput)
    assert isinstance(value(old=None, token_weights=X, normalizer=8), LossOutput)
    assert isinstance(value(PACKED, PACKED, PACKED, PACKED_MASK, cu_seqlens=CU_SEQLENS), LossOutput)
    assert SimPOLoss(margin=-0.5).margin == -0.5
    assert SimPOLoss(margin=0).margin == 0
    assert DAPOLoss(clip_eps_low=1, clip_eps_high=0).clip_eps_low == 1
    assert ValueLoss(value_clip=None).value_clip is None
