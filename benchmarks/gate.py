"""The gate before any clock: outputs and gradients against float64. Ours must pass; peers are reported."""

import math
from typing import NamedTuple

import torch
from cases import Case
from exact import Exact
from measure import Prepared
from torch import Tensor

FULL_PRECISION_NATS = 1e-5  # float32, the logits entry, whose inputs are the exact logits, and sums in registers
HEAD_NATS = 2e-3  # bfloat16 heads, where a tile may pass through bfloat16
FULL_PRECISION_GRADIENT = 1e-5
ABOVE_THE_FLOOR = 1.5
# further off, a peer computes something else than the case: it was called in a wrong way, or is broken
PEER_NATS = 0.5
PEER_LOSS = 0.02
PEER_GRADIENT = 0.1


class Verdict(NamedTuple):
    """Errors of one implementation, and what of them is out of bounds."""

    max_error: float
    gradient_errors: dict[str, float]
    gradient_floors: dict[str, float]
    failures: list[str]


def verdict(case: Case, prepared: Prepared, exact: Exact) -> Verdict:
    prepared.clear()  # of what another left when it raised
    outputs = prepared.run()
    max_error = max(
        largest_error(y.detach(), truth, upstream)
        for y, truth, upstream in zip(outputs, exact.outputs, prepared.upstream or (None,), strict=True)
    )
    gradients = {name: leaf.grad for name, leaf in prepared.inputs.leaves().items()}
    errors = {name: relative_error(gradients[name], truth) for name, truth in exact.gradients.items()}
    prepared.clear()
    if prepared.upstream is not prepared.inputs.upstream:  # nobody has judged gradients of that one
        errors = {}
    return Verdict(max_error, errors, exact.floors, failures(case, max_error, errors, exact.floors))


def something_else(case: Case, found: Verdict) -> str | None:
    """Why a peer does not belong beside ours, if it does not."""
    bound = PEER_LOSS if case.kind in ("grpo", "dpo") or case.is_pair else PEER_NATS
    if not found.max_error <= bound:
        return f"computes something else: outputs are off by {found.max_error:.2g}, more than {bound}"
    for name, error in found.gradient_errors.items():
        if not error <= PEER_GRADIENT:
            return f"computes something else: the gradient of {name} is off by {error:.2g} of its norm"
    return None


def nats_bound(case: Case) -> float:
    may_round = case.dtype == "bfloat16" and case.kind not in ("logits", "logits_kl") and case.impl != "triton"
    return HEAD_NATS if may_round else FULL_PRECISION_NATS


def gradient_bound(case: Case, floor: float) -> float:
    return FULL_PRECISION_GRADIENT if case.dtype == "float32" else ABOVE_THE_FLOOR * floor


def failures(case: Case, max_error: float, errors: dict[str, float], floors: dict[str, float]) -> list[str]:
    bounds = [("outputs", max_error, nats_bound(case))]
    bounds += [(f"gradient of {name}", error, gradient_bound(case, floors[name])) for name, error in errors.items()]
    # `not <=`, since NaN is above no bound
    return [f"{what}: error {error:.2e} above {bound:.2e}" for what, error, bound in bounds if not error <= bound]


def largest_error(y: Tensor, truth: Tensor, upstream: Tensor | None) -> float:
    if upstream is not None and y.ndim < truth.ndim:
        truth = (upstream.double() * truth).sum()
    if y.shape != truth.shape:
        return math.nan
    return float((y.double() - truth).abs().max())


def relative_error(gradient: Tensor | None, truth: Tensor) -> float:
    if gradient is None or gradient.shape != truth.shape:
        return math.nan
    missed = total = torch.zeros((), dtype=torch.float64, device=truth.device)
    for part, true_part in zip(gradient.split(4096), truth.split(4096), strict=True):
        missed = missed + (part.double() - true_part).square().sum()
        total = total + true_part.square().sum()
    return float((missed / total).sqrt())
