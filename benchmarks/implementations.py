"""Ours and what PyTorch alone offers. A builder gets a case and its tensors, and returns the call that is measured."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import exact
import plain
import torch
import torch.nn.functional as F
from cases import TOKEN_BYTES, Case
from inputs import Inputs
from torch import Tensor

import rlloss

Call = Callable[[], tuple[Tensor, ...]]


class UnavailableError(Exception):
    """Why an implementation cannot run here."""


class Implementation(NamedTuple):
    """One way to compute a kind of case. It returns per-token outputs, or their scalar product with the upstream."""

    build: Callable[[Case, Inputs], Call]
    gives_entropy: bool = True
    compiles: bool = False  # its first call compiles
    dense: bool = False  # takes every token's upstream gradient, also where the case has few
    rounds: int | None = None  # at most so many: it is very slow


def ours_logits(case: Case, x: Inputs) -> Call:
    options = {"outputs": case.outputs, **_chosen(case, x)}
    return lambda: _outputs(case, rlloss.token_logprobs(x.logits, x.ids, **options))


def ours_head(case: Case, x: Inputs) -> Call:
    options = {"outputs": case.outputs, **_chosen(case, x)}
    if case.cached:
        _need(rlloss.linear_logprobs, "cache_bytes")
        options["cache_bytes"] = case.tokens * case.vocabulary * TOKEN_BYTES["float32"]
    return lambda: _outputs(case, rlloss.linear_logprobs(x.hidden, x.weight, x.ids, **options))


def ours_recomputing(case: Case, x: Inputs) -> Call:
    return ours_head(replace(case, cached=False), x)


def ours_grpo(case: Case, x: Inputs) -> Call:
    loss, mask, options = rlloss.GRPOLoss(), _every_token(case, x), _chosen(case, x)

    def call() -> tuple[Tensor, ...]:
        logprobs = rlloss.linear_logprobs(x.hidden, x.weight, x.ids, **options).logprobs.view(mask.shape)
        return (loss(logprobs, x.old_logprobs.view(mask.shape), x.advantages, mask).loss,)

    return call


def ours_dpo(case: Case, x: Inputs) -> Call:
    loss, mask, options = rlloss.DPOLoss(beta=0.1, reference_free=True), _every_token(case, x), _chosen(case, x)

    def call() -> tuple[Tensor, ...]:
        logprobs = rlloss.linear_logprobs(x.hidden, x.weight, x.ids, **options).logprobs.view(mask.shape)
        chosen, rejected = rlloss.sequence_logps(logprobs, mask).chunk(2)
        return (loss(chosen, rejected).loss,)

    return call


def ours_kl(case: Case, x: Inputs) -> Call:
    of_logits = case.kind == "logits_kl"
    divergences = getattr(rlloss, "token_divergences" if of_logits else "linear_divergences", None)
    if divergences is None:
        raise UnavailableError("rlloss has no divergences between two models")
    options = {"outputs": case.outputs, **_chosen(case, x)}
    if "impl" in options:
        _need(divergences, "impl")
    models = (x.logits, x.ref_logits) if of_logits else (x.hidden, x.weight, x.ref_hidden, x.ref_weight)
    return lambda: _outputs(case, divergences(*models, **options))


def ours_gae(case: Case, x: Inputs) -> Call:
    options = _chosen(case, x)
    rewards, values = x.rewards, x.values
    if case.packed:
        length = x.values.shape[1]
        rewards, values = x.rewards.view(-1), x.values.view(-1)
        options["cu_seqlens"] = torch.arange(0, case.tokens + 1, length, dtype=torch.int32, device=x.values.device)
    mask = torch.ones_like(values, dtype=torch.bool)

    def call() -> tuple[Tensor, ...]:
        advantages, _ = rlloss.gae(rewards, values, mask, exact.GAMMA, exact.GAE_LAMBDA, **options)
        return (advantages.view(x.values.shape),)

    return call


def naive_gae(case: Case, x: Inputs) -> Call:
    return lambda: (plain.gae(x.rewards, x.values, exact.GAMMA, exact.GAE_LAMBDA),)


def naive(case: Case, x: Inputs) -> Call:
    if case.kind == "logits":
        return lambda: plain.log_softmax_statistics(x.logits, x.ids, case.entropy)
    return lambda: plain.log_softmax_statistics(x.hidden @ x.weight.t(), x.ids, case.entropy)


def naive_loss(case: Case, x: Inputs) -> Call:
    def call() -> tuple[Tensor, ...]:
        (logprobs,) = plain.log_softmax_statistics(x.hidden @ x.weight.t(), x.ids, False)
        rows = logprobs.view(case.rows, -1)
        if case.kind == "dpo":
            return (plain.dpo_loss(rows),)
        return (plain.grpo_loss(rows, x.old_logprobs.view_as(rows), x.advantages),)

    return call


def naive_kl(case: Case, x: Inputs) -> Call:
    def logits(which: str) -> Tensor:
        if case.kind == "logits_kl":
            return getattr(x, f"{which}logits")
        return getattr(x, f"{which}hidden") @ getattr(x, f"{which}weight").t()

    def call() -> tuple[Tensor, ...]:
        student = F.log_softmax(logits("").float(), -1)
        teacher = F.log_softmax(logits("ref_").float(), -1)
        pairs = {"forward_kl": (teacher, student), "reverse_kl": (student, teacher)}
        return tuple((p.exp() * (p - q)).sum(-1) for p, q in (pairs[name] for name in case.outputs))

    return call


def compiled(case: Case, x: Inputs) -> Call:
    return torch.compile(naive(case, x), dynamic=False)


def cross_entropy(case: Case, x: Inputs) -> Call:
    def call() -> tuple[Tensor, ...]:
        logits = x.hidden @ x.weight.t() if x.logits is None else x.logits
        return (-F.cross_entropy(logits.float(), x.ids, reduction="none"),)

    return call


def linear_cross_entropy(case: Case, x: Inputs) -> Call:
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()  # without them it makes the logits
    return lambda: (-F.linear_cross_entropy(x.hidden, x.weight, x.ids, reduction="none", options=options),)


def _outputs(case: Case, stats: rlloss.TokenStats | rlloss.TokenDivergences) -> tuple[Tensor, ...]:
    return tuple(getattr(stats, name) for name in case.outputs)


def _chosen(case: Case, x: Inputs) -> dict[str, Any]:
    """The options that a case asks for, and nothing where it leaves them alone."""
    options: dict[str, Any] = {} if case.impl == "auto" else {"impl": case.impl}
    return options if x.loss_mask is None else {**options, "loss_mask": x.loss_mask}


def _every_token(case: Case, x: Inputs) -> Tensor:
    return torch.ones(case.rows, case.tokens // case.rows, dtype=torch.bool, device=x.ids.device)


def _need(function: Callable, argument: str) -> None:
    if argument not in inspect.signature(function).parameters:
        raise UnavailableError(f"rlloss.{function.__name__} has no {argument}")


LOGITS = {
    "ours": Implementation(ours_logits),
    "naive": Implementation(naive),
    "cross_entropy": Implementation(cross_entropy, gives_entropy=False),
    "compiled": Implementation(compiled, compiles=True),
}
HEAD = {
    "ours": Implementation(ours_head),
    "naive": Implementation(naive),
    "cross_entropy": Implementation(cross_entropy, gives_entropy=False),
    "compiled": Implementation(compiled, compiles=True),
    "linear_cross_entropy": Implementation(linear_cross_entropy, gives_entropy=False, rounds=1),
}
LOSSES = {
    "grpo": {"ours": Implementation(ours_grpo), "naive": Implementation(naive_loss)},
    "dpo": {"ours": Implementation(ours_dpo), "naive": Implementation(naive_loss)},
    "kl": {"ours": Implementation(ours_kl), "naive": Implementation(naive_kl)},
    "logits_kl": {"ours": Implementation(ours_kl), "naive": Implementation(naive_kl)},
    "gae": {"ours": Implementation(ours_gae), "naive": Implementation(naive_gae)},
}


def from_torch(case: Case) -> dict[str, Implementation]:
    """Ours first, then what needs nothing but PyTorch."""
    if case.kind == "logits":
        return LOGITS
    if case.kind != "head":
        return LOSSES[case.kind]
    head = dict(HEAD)
    if case.active < 1 and not case.masked:
        head["ours-dense"] = Implementation(ours_head, dense=True)
    if case.cached:
        head["ours-recomputing"] = Implementation(ours_recomputing)
    return head
