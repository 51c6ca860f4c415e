"""The judge: outputs and gradients of a case in float64 from the same inputs, tile by tile.

It also gives the floor of each gradient, which bfloat16 cannot do much better than: the error that is left when the
gradient of the logits is rounded to bfloat16 and all products after that are exact, or when the exact gradient is
rounded to bfloat16 itself, whichever is larger.
"""

from collections.abc import Callable
from typing import NamedTuple

import plain
import torch
from cases import Case
from inputs import Inputs, columns
from torch import Tensor

GAMMA, GAE_LAMBDA = 0.99, 0.95
Scores = Callable[[slice], Tensor]


class Exact(NamedTuple):
    """What every implementation is held against, by leaf; `floors` are relative errors."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    floors: dict[str, float]


class Softmax(NamedTuple):
    """Per token: log-sum of the scores' exponentials, the chosen id's score, and the mean score under p."""

    log_sum: Tensor
    chosen: Tensor
    mean: Tensor


def judged(case: Case, inputs: Inputs) -> Exact:
    if case.kind == "gae":
        advantages = plain.gae(inputs.rewards.double(), inputs.values.double(), GAMMA, GAE_LAMBDA)
        return Exact((advantages,), {}, {})
    if case.is_pair:
        return _divergence(case, inputs)
    z = _scores(inputs.hidden, inputs.weight) if inputs.logits is None else _logits(inputs.logits)
    softmax = _softmax(z, case.vocabulary, inputs.ids)
    logprobs, entropy = softmax.chosen - softmax.log_sum, softmax.log_sum - softmax.mean
    if case.kind in ("grpo", "dpo"):
        outputs, upstream = _through_loss(case, inputs, logprobs)
    else:
        outputs, upstream = (logprobs, entropy)[: len(case.outputs)], [g.double() for g in inputs.upstream]
        if inputs.loss_mask is not None:
            outputs = tuple(torch.where(inputs.loss_mask, y, 0) for y in outputs)
            upstream = [torch.where(inputs.loss_mask, g, 0) for g in upstream]
    if not case.backward:
        return Exact(outputs, {}, {})
    tokens = torch.arange(len(logprobs), device=logprobs.device)

    def gradient(tile: slice) -> Tensor:
        log_p = z(tile) - softmax.log_sum[:, None]
        dz = log_p.exp() * -upstream[0][:, None]
        here = (inputs.ids >= tile.start) & (inputs.ids < tile.stop)
        dz[tokens[here], inputs.ids[here] - tile.start] += upstream[0][here]
        if len(upstream) == 2:
            dz -= upstream[1][:, None] * log_p.exp() * (log_p + entropy[:, None])
        return dz

    return Exact(outputs, *_gradients(case, inputs, gradient))


def _divergence(case: Case, inputs: Inputs) -> Exact:
    """The divergences of every token; by the policy's logits KL(ref || pi) has the gradient p - q."""
    if inputs.logits is None:
        z, u = _scores(inputs.hidden, inputs.weight), _scores(inputs.ref_hidden, inputs.ref_weight)
    else:
        z, u = _logits(inputs.logits), _logits(inputs.ref_logits)
    log_sum_p, log_sum_q = (_softmax(scores, case.vocabulary, inputs.ids).log_sum[:, None] for scores in (z, u))
    found = {name: torch.zeros_like(log_sum_p[:, 0]) for name in ("forward_kl", "reverse_kl")}
    for tile in columns(case.vocabulary):
        log_p, log_q = z(tile) - log_sum_p, u(tile) - log_sum_q
        found["forward_kl"] += (log_q.exp() * (log_q - log_p)).sum(-1)
        found["reverse_kl"] += (log_p.exp() * (log_p - log_q)).sum(-1)
    outputs = tuple(found[name] for name in case.outputs)
    if not case.backward:
        return Exact(outputs, {}, {})
    upstream = {name: g.double()[:, None] for name, g in zip(case.outputs, inputs.upstream, strict=True)}

    def gradient(tile: slice) -> Tensor:
        log_p, log_q = z(tile) - log_sum_p, u(tile) - log_sum_q
        dz = torch.zeros_like(log_p)
        if "forward_kl" in upstream:
            dz += upstream["forward_kl"] * (log_p.exp() - log_q.exp())
        if "reverse_kl" in upstream:
            dz += upstream["reverse_kl"] * log_p.exp() * (log_p - log_q - found["reverse_kl"][:, None])
        return dz

    return Exact(outputs, *_gradients(case, inputs, gradient))


def _through_loss(case: Case, inputs: Inputs, logprobs: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """A loss's value, and its gradient at the log-probs: all that is below sees of it."""
    leaf = logprobs.clone().requires_grad_()
    rows = leaf.view(case.rows, -1)
    if case.kind == "grpo":
        loss = plain.grpo_loss(rows, inputs.old_logprobs.double().view_as(rows), inputs.advantages.double())
    else:
        loss = plain.dpo_loss(rows)
    return (loss.detach(),), list(torch.autograd.grad(loss, leaf))


def _logits(logits: Tensor) -> Scores:
    return lambda tile: logits.detach()[:, tile].double()


def _scores(hidden: Tensor, weight: Tensor) -> Scores:
    h = hidden.detach().double()
    return lambda tile: h @ weight.detach()[tile].double().t()


def _softmax(z: Scores, vocabulary: int, ids: Tensor) -> Softmax:
    top = torch.full(ids.shape, -torch.inf, dtype=torch.float64, device=ids.device)
    mass, moment, chosen = (torch.zeros_like(top) for _ in range(3))
    for tile in columns(vocabulary):
        scores = z(tile)
        new_top = torch.maximum(top, scores.amax(-1))
        exponentials = torch.exp(scores - new_top[:, None])
        mass = mass * torch.exp(top - new_top) + exponentials.sum(-1)
        moment = moment * torch.exp(top - new_top) + (exponentials * scores).sum(-1)
        here = (ids >= tile.start) & (ids < tile.stop)
        chosen[here] = scores[here, ids[here] - tile.start]
        top = new_top
    return Softmax(top + mass.log(), chosen, moment / mass)


def _gradients(case: Case, inputs: Inputs, gradient: Scores) -> tuple[dict[str, Tensor], dict[str, float]]:
    """From the gradient of the logits to those of the leaves, and the floor of each."""
    exact = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in inputs.leaves().items()}
    lost = dict.fromkeys(exact, 0.0)
    hidden_lost = torch.zeros_like(exact.get("hidden", torch.zeros(0)), dtype=torch.float32)
    for tile in columns(case.vocabulary):
        dz = gradient(tile)
        # float32 holds the products of what rounding took to six digits of it
        rounding = _rounding(dz, case).float()
        if "logits" in exact:
            exact["logits"][:, tile] = dz
            lost["logits"] += _squared(rounding)
        if "hidden" in exact:
            weight = inputs.weight.detach()[tile]
            exact["hidden"] += dz @ weight.double()
            hidden_lost += rounding @ weight.float()
        if "weight" in exact:
            hidden = inputs.hidden.detach()
            exact["weight"][tile] = dz.t() @ hidden.double()
            lost["weight"] += _squared(rounding.t() @ hidden.float())
    if "hidden" in exact:
        lost["hidden"] = _squared(hidden_lost)
    for name, x in exact.items():
        lost[name] = max(lost[name], sum(_squared(_rounding(part, case)) for part in x.split(4096)))
    return exact, {name: (lost[name] / _squared(x)) ** 0.5 for name, x in exact.items()}


def _rounding(x: Tensor, case: Case) -> Tensor:
    return x.to(getattr(torch, case.dtype)).double() - x


def _squared(x: Tensor) -> float:
    return sum(float(part.double().square().sum()) for part in x.split(4096))
