"""The tensors of a case, the same for every implementation and every process.

Logits have the standard deviation `--scale`: drawn as such, or as hidden ~ randn against weight ~ randn / sqrt(H) *
scale. Ids are uniform over the vocabulary and upstream gradients are randn. Nothing here is kind to any implementation:
random logits make all probabilities small, where tiles could be skipped for no other reason than the draw.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from cases import Case
from torch import Tensor

_ABSENT: Any = None
TILE = 4096


class Inputs(NamedTuple):
    """Tensors by role, absent where the kind has none. `upstream` has one gradient for each output."""

    upstream: tuple[Tensor, ...] = ()
    dense_upstream: tuple[Tensor, ...] = ()  # the same where every token is active
    ids: Tensor = _ABSENT
    loss_mask: Tensor = _ABSENT
    logits: Tensor = _ABSENT
    ref_logits: Tensor = _ABSENT
    hidden: Tensor = _ABSENT
    weight: Tensor = _ABSENT
    ref_hidden: Tensor = _ABSENT
    ref_weight: Tensor = _ABSENT
    old_logprobs: Tensor = _ABSENT
    advantages: Tensor = _ABSENT
    rewards: Tensor = _ABSENT
    values: Tensor = _ABSENT

    def leaves(self) -> dict[str, Tensor]:
        """The inputs that need a gradient, by name."""
        return {
            name: x for name, x in zip(self._fields, self, strict=True) if isinstance(x, Tensor) and x.requires_grad
        }


def make(case: Case, device: str = "cpu") -> Inputs:
    """The same on every call; each kind of device draws its own numbers."""
    generator = torch.Generator(device).manual_seed(case.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    if case.kind == "gae":
        shape = (case.rows, case.tokens // case.rows)
        return Inputs(rewards=randn(*shape), values=randn(*shape))
    dtype = getattr(torch, case.dtype)
    ids = torch.randint(case.vocabulary, (case.tokens,), generator=generator, device=device)
    inputs = _with_upstream(Inputs(ids=ids), case, randn, generator)
    if case.kind in ("logits", "logits_kl"):
        logits, *ref = (
            randn(case.tokens, case.vocabulary).mul_(case.scale).to(dtype) for _ in range(2 if case.is_pair else 1)
        )
        inputs = inputs._replace(logits=logits.requires_grad_(case.backward))
        return inputs._replace(ref_logits=ref[0]) if ref else inputs

    def head() -> tuple[Tensor, Tensor]:
        hidden = randn(case.tokens, case.hidden).to(dtype)
        return hidden, randn(case.vocabulary, case.hidden).mul_(case.scale / case.hidden**0.5).to(dtype)

    hidden, weight = head()
    inputs = inputs._replace(hidden=hidden, weight=weight)
    if case.kind == "kl":
        ref_hidden, ref_weight = head()
        inputs = inputs._replace(ref_hidden=ref_hidden, ref_weight=ref_weight)
    if case.kind == "grpo":
        # no ratio stands near a clip bound, where an error of the last digit would switch a gradient off
        which = torch.randint(5, (case.tokens,), generator=generator, device=device)
        away = torch.tensor([-0.3, -0.1, 0.0, 0.1, 0.3], device=device)[which]
        inputs = inputs._replace(old_logprobs=_logprobs(inputs) + away, advantages=randn(case.rows))
    hidden.requires_grad_(case.backward)
    weight.requires_grad_(case.backward and not case.frozen)
    return inputs


def _with_upstream(inputs: Inputs, case: Case, randn: Any, generator: torch.Generator) -> Inputs:
    device = inputs.ids.device
    if case.kind in ("grpo", "dpo"):
        one = (torch.ones((), device=device),)
        return inputs._replace(upstream=one, dense_upstream=one)
    if case.is_pair or case.mean:  # the mean over tokens, which is all that some peers can give
        mean = tuple(torch.full((case.tokens,), 1 / case.tokens, device=device) for _ in case.outputs)
        return inputs._replace(upstream=mean, dense_upstream=mean)
    dense = tuple(randn(case.tokens) for _ in case.outputs)
    active = torch.zeros(case.tokens, device=device)
    chosen = torch.randperm(case.tokens, generator=generator, device=device)[: round(case.active * case.tokens)]
    active[chosen] = 1
    if case.masked:  # outside of the mask an upstream gradient must not come through
        return inputs._replace(upstream=dense, dense_upstream=dense, loss_mask=active > 0)
    return inputs._replace(upstream=tuple(gradient * active for gradient in dense), dense_upstream=dense)


def columns(vocabulary: int) -> Iterator[slice]:
    for start in range(0, vocabulary, TILE):
        yield slice(start, start + TILE)


def _logprobs(inputs: Inputs) -> Tensor:
    """Log-probs of the ids in float32, by tiles."""
    hidden, log_sum = inputs.hidden.float(), torch.full(inputs.ids.shape, -torch.inf, device=inputs.ids.device)
    for tile in columns(len(inputs.weight)):
        log_sum = torch.logaddexp(log_sum, (hidden @ inputs.weight[tile].float().t()).logsumexp(-1))
    return (hidden * inputs.weight[inputs.ids].float()).sum(-1) - log_sum
