"""What random inputs of a usual size do not show: whether the bits are the same every time, and large indices."""

from dataclasses import replace

import exact
import torch
from cases import Case
from gate import failures, largest_error, relative_error
from gpu_measure import Host
from gpu_peers import implementations
from inputs import Inputs, make
from jobs import Record
from measure import Prepared, prepared
from torch import Tensor


def twice(case: Case, device: Host) -> Record:
    """Whether a second run gives the same outputs and gradients, to the bit."""
    call = ours(case, make(case, device.kind))
    first, second = (results(call) for _ in range(2))
    return {"differing": [name for name, x in first.items() if not same_bits(x, second[name])]}


def alone(case: Case, device: Host) -> Record:
    """Whether a row's outputs are the same, to the bit, without the rest of the batch."""
    inputs = make(case, device.kind)
    batch = ours(case, inputs).call()
    differing = []
    for rows in (slice(0, 1), slice(case.tokens // 2, case.tokens // 2 + 3), slice(case.tokens - 1, case.tokens)):
        part = rows_of(inputs, rows)
        outputs = ours(replace(case, tokens=len(part.ids)), part).call()
        for name, whole, y in zip(case.outputs, batch, outputs, strict=True):
            if not same_bits(whole[rows].detach(), y.detach()):
                differing.append(f"{name} of rows {rows.start} to {rows.stop - 1}")
    return {"differing": differing}


def large(case: Case, device: Host) -> Record:
    """Errors of a few rows, as the gate has them for all, or "skipped"."""
    needed = memory_needed(case)
    if device.free_bytes() < needed:
        return {"skipped": f"needs {needed / 1e9:.0f} GB, of which {device.free_bytes() / 1e9:.0f} are free"}
    inputs = make(case, device.kind)
    call = ours(case, inputs)
    outputs = call.run()
    few = sorted({0, 1, case.tokens // 2, case.tokens // 2 + 1, case.tokens - 2, case.tokens - 1})
    rows = torch.tensor(few, device=inputs.ids.device)
    part = rows_of(inputs, rows)
    if part.weight is not None:
        part = part._replace(weight=part.weight.detach())  # whose gradient takes all rows
    truth = exact.judged(replace(case, tokens=len(few)), part)
    error = max(
        largest_error(y.detach()[rows], true, upstream)
        for y, true, upstream in zip(outputs, truth.outputs, part.upstream, strict=True)
    )
    gradients = {name: leaf.grad for name, leaf in inputs.leaves().items() if leaf.grad is not None}
    errors = {name: relative_error(gradients[name][rows], true) for name, true in truth.gradients.items()}
    found = failures(case, error, errors, truth.floors)
    return {"max_error": error, "gradient_errors": errors, "gradient_floors": truth.floors, "failures": found}


def memory_needed(case: Case) -> int:
    """At least: what is drawn in float32, what it becomes, and its gradient; for a head also a range of columns."""
    elements = case.tokens * (case.vocabulary if case.kind == "logits" else case.hidden)
    head = 0 if case.kind == "logits" else case.vocabulary * case.hidden
    return 10 * (elements + head) + (4 * case.tokens * 4096 if head else 0)


def ours(case: Case, inputs: Inputs) -> Prepared:
    return prepared(implementations(case, ("ours",))["ours"], case, inputs)


def results(call: Prepared) -> dict[str, Tensor]:
    outputs = call.run()
    found = {f"output {i}": y.detach().clone() for i, y in enumerate(outputs)}
    for name, leaf in call.inputs.leaves().items():
        assert leaf.grad is not None
        found[f"gradient of {name}"] = leaf.grad
    call.clear()
    return found


def same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def rows_of(x: Inputs, rows: slice | Tensor) -> Inputs:
    """The inputs of some tokens alone; a head stays whole."""

    def part(tensor: Tensor) -> Tensor:
        return tensor.detach()[rows].clone().requires_grad_(tensor.requires_grad)

    names = ("ids", "loss_mask", "logits", "ref_logits", "hidden", "ref_hidden")
    of_tokens = {name: part(tensor) for name in names if (tensor := getattr(x, name)) is not None}
    upstream, dense = (tuple(g[rows] for g in gradients) for gradients in (x.upstream, x.dense_upstream))
    return x._replace(upstream=upstream, dense_upstream=dense, **of_tokens)
