"""The libraries that we are held against, called as their own trainers call them."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from cases import Case
from implementations import Call, Implementation, UnavailableError, from_torch
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


def imported(name: str) -> Any:
    """By name, so that type checkers do not ask for peers either."""
    return importlib.import_module(name)


def trl_logits(case: Case, x: Inputs) -> Call:
    utils = imported("trl.trainer.utils")
    ids = x.ids.view(8, -1)

    def call() -> tuple[Tensor, ...]:
        logits = x.logits.view(*ids.shape, -1)
        if not case.entropy:
            return (utils.selective_log_softmax(logits, ids).view(-1),)
        logprobs, entropy = utils.selective_log_softmax_and_entropy(logits, ids)
        return logprobs.view(-1), entropy.view(-1)

    return call


def trl_head(case: Case, x: Inputs) -> Call:
    apply = imported("trl.kernels").ChunkedLogProbFunction.apply
    extra = ("entropy",) if case.entropy else ()

    def call() -> tuple[Tensor, ...]:
        outputs = apply(x.hidden, x.weight, None, x.ids, 1.0, TRL_COLUMNS, None, 1.0, extra)
        return outputs[: len(case.outputs)]

    return call


def trl_kl(case: Case, x: Inputs) -> Call:
    apply = imported("trl.kernels.chunked_divergence").ChunkedDivergenceFunction.apply
    heads = (x.hidden, x.weight, None, x.ref_hidden, x.ref_weight, None)
    beta = jsd_beta(case)
    return lambda: apply(*heads, beta)[:1]


def liger_head(case: Case, x: Inputs) -> Call:
    module = imported("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    apply = module.LigerFusedLinearScaledCrossEntropyFunction.apply

    def call() -> tuple[Tensor, ...]:
        if not case.entropy:
            return (-apply(x.hidden, x.weight, x.ids),)
        nll, entropy = apply(x.hidden, x.weight, x.ids, return_entropy=True)
        return -nll, entropy

    return call


def liger_grpo(case: Case, x: Inputs, compiled: bool = False) -> Call:
    loss = imported("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="grpo", compiled=compiled
    )
    ids, old_logprobs = x.ids.view(case.rows, -1), x.old_logprobs.view(case.rows, -1)
    mask = torch.ones(ids.shape, device=ids.device)

    def call() -> tuple[Tensor, ...]:
        hidden = x.hidden.view(*ids.shape, -1)
        return loss(hidden, x.weight, ids, mask, x.advantages, old_per_token_logps=old_logprobs)[:1]

    return call


def liger_dpo(case: Case, x: Inputs) -> Call:
    loss = imported("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False, compiled=False)
    ids = x.ids.view(case.rows, -1)
    return lambda: loss(x.weight, x.hidden.view(*ids.shape, -1), ids)[:1]


def liger_kl(case: Case, x: Inputs) -> Call:
    loss = imported("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=jsd_beta(case), compiled=False
    )
    return lambda: (loss(x.hidden, x.weight, x.ref_hidden, x.ref_weight, x.ids),)


def jsd_beta(case: Case) -> float:
    """At which both libraries' Jensen-Shannon divergence is the one of the case."""
    if len(case.outputs) > 1:
        raise UnavailableError("gives one divergence at a time")
    return {"forward_kl": 0.0, "reverse_kl": 1.0}[next(iter(case.outputs))]


PEERS = {
    "logits": {"trl": Implementation(trl_logits)},
    "head": {"trl": Implementation(trl_head), "liger": Implementation(liger_head)},
    "grpo": {"liger": Implementation(liger_grpo)},
    "dpo": {"liger": Implementation(liger_dpo)},
    "kl": {"trl": Implementation(trl_kl), "liger": Implementation(liger_kl)},
    "logits_kl": {},
    "gae": {},
}


def implementations(
    case: Case, names: tuple[str, ...] = (), more: Mapping[str, Implementation] | None = None
) -> dict[str, Implementation]:
    """All that can compute the case, ours first; of them those in `names` and in the case's own choice, where given."""
    every = {**from_torch(case), **PEERS[case.kind], **(more or {})}
    chosen = {
        name: implementation
        for name, implementation in every.items()
        if (not names or name in names) and (not case.only or name in case.only)
    }
    return {name: one for name, one in chosen.items() if one.gives_entropy or not case.entropy}
