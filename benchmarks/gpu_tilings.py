"""Other tilings of the products than the one that is built in, for the forward pass and for the gradient."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

from cases import Case
from gate import relative_error
from gpu_checks import ours, results
from gpu_measure import Host, Timed, roofline
from inputs import Inputs, make
from jobs import Record
from rlloss_kernels.gpu import operands
from rlloss_kernels.gpu.tiling import Tiling, tiling
from torch import Tensor

TILINGS = (
    Tiling(128, 256, 64, 4, 8, 3),
    Tiling(128, 256, 64, 4, 8, 4),
    Tiling(128, 256, 64, 8, 8, 3),
    Tiling(128, 256, 64, 4, 8, 3, panel=8),
    Tiling(128, 256, 64, 4, 8, 3, panel=32),
    Tiling(128, 128, 64, 8, 4, 4),
    Tiling(128, 128, 64, 8, 8, 4),
    Tiling(256, 128, 64, 8, 8, 3),
    Tiling(64, 256, 64, 4, 4, 4),
    Tiling(128, 256, 32, 4, 8, 4),
)
QUICK = (Tiling(16, 32, 16, 2, 4, 1, panel=2), Tiling(16, 64, 32, 1, 4, 1, panel=3))
SAME_OUTPUT, SAME_GRADIENT = 1e-5, 1e-2
ROUNDS = 5


def tiled(case: Case, cut: Tiling, device: Host) -> Record:
    """Seconds of a head's passes with that tiling, and their share of `torch.mm`; "failures" where it is wrong."""
    inputs = make(case, device.kind)
    call = ours(case, inputs)
    right, right_gradient = outputs_and_hidden_gradient(call)
    with everywhere(cut):
        found, gradient = outputs_and_hidden_gradient(call)
        failures = []
        if not float((found - right).abs().max()) <= SAME_OUTPUT:
            failures.append("outputs differ from those of the tiling that is built in")
        if not relative_error(gradient, right_gradient.double()) <= SAME_GRADIENT:
            failures.append("the gradient differs from that of the tiling that is built in")
        probe = roofline(case, device)
        rounds = [(probe(), Timed(call, device).seconds()) for _ in range(ROUNDS)]
        frozen_case = replace(case, frozen=True)
        frozen_call = ours(frozen_case, without_weight_gradient(inputs))
        whole_of_frozen = [Timed(frozen_call, device).seconds().wall for _ in range(ROUNDS)]
    product = 2.0 * case.tokens * case.hidden * case.vocabulary
    median = statistics.median
    return {
        "tiling": cut._asdict(),
        "failures": failures,
        "forward_s": median(t.forward for _, t in rounds),
        "backward_s": median(t.backward for _, t in rounds),
        "frozen_s": median(whole_of_frozen),
        "forward_share": median(product / t.forward / rate for rate, t in rounds),
        "backward_share": median(3 * product / t.backward / rate for rate, t in rounds),
    }


def outputs_and_hidden_gradient(call) -> tuple:
    found = results(call)
    return found["output 0"], found["gradient of hidden"]


def without_weight_gradient(x: Inputs) -> Inputs:
    return x._replace(weight=x.weight.detach())


@contextmanager
def everywhere(cut: Tiling) -> Iterator[None]:
    """That tiling wherever a kernel of one head asks for one."""
    assert operands.tiling is tiling

    def chosen(x: Tensor, accumulators: int = 1) -> Tiling:
        return cut if accumulators == 1 else tiling(x, accumulators)

    with patch.object(operands, "tiling", chosen):
        yield
