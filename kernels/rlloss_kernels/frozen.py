"""Under a frozen head the gradient of a log-prob points along one vector per token, known once its statistics are.

d log p_y / d hidden = c (1 - p_y) (w_y - sum of p_v / (1 - p_y) w_v over the others), with the slopes of a softcap as
factors of each w and c = logit_scale / temperature. The sum over the others loses no digits as p_y -> 1.
"""

import torch
from torch import Tensor

from rlloss_kernels.blocks import Scratch, Tokens, tokens_that_count
from rlloss_kernels.head import Head, Products, target_rows
from rlloss_kernels.implementation import implementation
from rlloss_kernels.statistics import State
from rlloss_kernels.sums import add_product
from rlloss_kernels.tile import undisturbed


class WeightedMean:
    """The running sum of exp(z_v - shift) slope_v w_v over the others, for a block of rows."""

    def __init__(self, head: Head, products: Products, scratch: Scratch):
        self.head, self.scratch = head, scratch
        self.total = products.h.new_zeros(products.h.shape, dtype=head.dtype)

    def slope(self, z: Tensor) -> Tensor | None:
        """The softcap's slopes at logits `z`, to be taken before `z` is overwritten."""
        return None if self.head.softcap is None else self.head.slope(z, self.scratch.tile("slope", *z.shape))

    def absorb(self, weight: Tensor, slope: Tensor | None, w: Tensor, growth: Tensor) -> None:
        """Adds a tile of weights exp(z - shift), after what came before has been scaled to the same shift."""
        weight = weight if slope is None else weight.mul_(slope)
        if w.dtype is not weight.dtype:
            weight = self.scratch.tile("low", *weight.shape, dtype=w.dtype).copy_(weight)
        add_product(self.total.mul_(growth[:, None]), weight, w, self.scratch)

    def direction(self, mass: Tensor, state: State, block: Tokens) -> Tensor:
        """The derivative [n, H] of log p_y by hidden."""
        others = torch.where((mass == 0)[:, None], 0, self.total / mass[:, None])
        factor = torch.sigmoid(state.x) * self.head.logit_scale * block.factor
        factor = torch.where(state.x == torch.inf, 0, factor)  # a forbidden target learns nothing
        return factor[:, None] * (_target_rows(self.head, state, block) - others)


@torch.library.custom_op("rlloss_kernels::linear_frozen_backward", mutates_args=())
@undisturbed
def frozen_backward(
    grad: Tensor,
    state: Tensor,
    direction: Tensor,
    weight: Tensor,
    ids: Tensor,
    loss_mask: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    vocabulary: int,
    impl: str,
) -> Tensor:
    """The gradient [N, H] of hidden: logsumexp is z_y - log p_y, so its gradient is what z_y's has more."""
    head = Head(weight, None, softcap, logit_scale, vocabulary)
    if implementation(impl, direction) == "triton":
        from rlloss_kernels.gpu import frozen as gpu

        return gpu.backward(grad, state, direction, head, ids, loss_mask, temperature)
    result = torch.zeros_like(direction)
    for _, block in tokens_that_count(ids, loss_mask, temperature, vocabulary, grad).blocks(1024):
        logp, logsumexp = grad[0, block.positions, None], grad[2, block.positions, None]
        along = direction[block.positions].to(grad.dtype)
        rows = logp * along
        if bool((logsumexp != 0).any()):
            rise = _target_rows(head, State(*state[:5, block.positions]), block)
            rise = rise * torch.as_tensor(logit_scale * block.factor, device=grad.device).view(-1, 1)
            rows += torch.where(logsumexp == 0, 0, logsumexp * (rise - along))
        result[block.positions] = rows.to(result.dtype)
    return result


@frozen_backward.register_fake
def _(grad: Tensor, state: Tensor, direction: Tensor, *args: object) -> Tensor:
    return torch.empty_like(direction)


def _target_rows(head: Head, state: State, block: Tokens) -> Tensor:
    """slope_y w_y, [n, H]."""
    rows = target_rows(head.weight, block.ids).to(head.dtype)
    if head.softcap is None:
        return rows
    z = block.uncool(state.shift + state.log_mass - state.x)
    return rows * head.slope(z, torch.empty_like(z))[:, None]
