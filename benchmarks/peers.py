"""The libraries that we are held against, called as their own trainers call them."""

import importlib
from typing import Any

import torch
from cases import Case
from implementations import Call, Implementation, from_torch
from inputs import Inputs
from torch import Tensor

TRL_COLUMNS = 32768  # the width of its tiles that TRL's trainers take
MODULES = {
    "trl": ("trl.trainer.utils", "trl.kernels"),
    "liger": ("liger_kernel.chunked_loss", "liger_kernel.ops.fused_linear_scaled_cross_entropy"),
}


def loaded(names: list[str]) -> None:
    """Imports the peers, once for all processes to come; one that is missing says so when a case asks for it."""
    importlib.import_module("torch._dynamo")  # what PyTorch would load in the first backward pass of each process
    for name in names:
        for module in MODULES.get(name, ()):
            try:
                importlib.import_module(module)
            except Exception:  # whatever it is, the case that asks for the peer reports it
                break


def _module(name: str) -> Any:
    """By name, so that type checkers do not ask for peers either."""
    return importlib.import_module(name)


def trl_logits(case: Case, x: Inputs) -> Call:
    utils = _module("trl.trainer.utils")
    ids = x.ids.view(8, -1)

    def call() -> tuple[Tensor, ...]:
        logits = x.logits.view(*ids.shape, -1)
        if not case.entropy:
            return (utils.selective_log_softmax(logits, ids).view(-1),)
        logprobs, entropy = utils.selective_log_softmax_and_entropy(logits, ids)
        return logprobs.view(-1), entropy.view(-1)

    return call


def trl_head(case: Case, x: Inputs) -> Call:
    apply = _module("trl.kernels").ChunkedLogProbFunction.apply
    extra = ("entropy",) if case.entropy else ()

    def call() -> tuple[Tensor, ...]:
        outputs = apply(x.hidden, x.weight, None, x.ids, 1.0, TRL_COLUMNS, None, 1.0, extra)
        return outputs[: len(case.outputs)]

    return call


def trl_kl(case: Case, x: Inputs) -> Call:
    apply = _module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction.apply
    heads = (x.hidden, x.weight, None, x.ref_hidden, x.ref_weight, None)
    return lambda: apply(*heads, 0.0)[:1]


def liger_head(case: Case, x: Inputs) -> Call:
    module = _module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    apply = module.LigerFusedLinearScaledCrossEntropyFunction.apply

    def call() -> tuple[Tensor, ...]:
        if not case.entropy:
            return (-apply(x.hidden, x.weight, x.ids),)
        nll, entropy = apply(x.hidden, x.weight, x.ids, return_entropy=True)
        return -nll, entropy

    return call


def liger_grpo(case: Case, x: Inputs) -> Call:
    loss = _module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="grpo", compiled=False
    )
    ids, old_logprobs = x.ids.view(case.rows, -1), x.old_logprobs.view(case.rows, -1)
    mask = torch.ones(ids.shape)

    def call() -> tuple[Tensor, ...]:
        hidden = x.hidden.view(*ids.shape, -1)
        return loss(hidden, x.weight, ids, mask, x.advantages, old_per_token_logps=old_logprobs)[:1]

    return call


def liger_dpo(case: Case, x: Inputs) -> Call:
    loss = _module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False, compiled=False)
    ids = x.ids.view(case.rows, -1)
    return lambda: loss(x.weight, x.hidden.view(*ids.shape, -1), ids)[:1]


def liger_kl(case: Case, x: Inputs) -> Call:
    loss = _module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False
    )
    return lambda: (loss(x.hidden, x.weight, x.ref_hidden, x.ref_weight, x.ids),)


PEERS = {
    "logits": {"trl": Implementation(trl_logits)},
    "head": {"trl": Implementation(trl_head), "liger": Implementation(liger_head)},
    "grpo": {"liger": Implementation(liger_grpo)},
    "dpo": {"liger": Implementation(liger_dpo)},
    "kl": {"trl": Implementation(trl_kl), "liger": Implementation(liger_kl)},
    "gae": {},
}


def implementations(case: Case, names: tuple[str, ...] = ()) -> dict[str, Implementation]:
    """All that can compute the case, ours first; of them those in `names` and in the case's own choice, where given."""
    every = from_torch(case) | PEERS[case.kind]
    chosen = {
        name: implementation
        for name, implementation in every.items()
        if (not names or name in names) and (not case.only or name in case.only)
    }
    return {name: one for name, one in chosen.items() if one.gives_entropy or not case.entropy}
