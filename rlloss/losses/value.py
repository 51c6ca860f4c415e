"""The critic's loss: squared error to the returns, clipped as PPO's policy is."""

import torch
from torch import Tensor

from rlloss._checks import check_flag, check_like, check_range, check_tokens_layout
from rlloss._typing import Bool, Float
from rlloss.output import ExplainedVariance, LossOutput, Mean
from rlloss.protocol import Loss
from rlloss.reduce import Normalizer, check_normalizer, reduce_tokens, weighted, within_sequences, zero_masked

__all__ = ["ValueLoss"]


class ValueLoss(Loss):
    """Squared error of a critic, equation 9 of https://arxiv.org/abs/1707.06347, clipped as in section 3 of https://arxiv.org/abs/2005.12729.

    The clip holds the value within `value_clip` of what it was when the returns were made, and takes the larger of
    both errors: a value that has already moved so far has no more gradient in that direction. (The paper prints the
    smaller; its code takes the larger, as all others do: https://github.com/implementation-matters/code-for-paper/issues/1.)

        v' = old + clip(v - old, -value_clip, value_clip)
        loss = (1/N) sum_t c max((v - R)^2, (v' - R)^2),   c = 1/2, or 1 with halve=False    (N trained tokens)
        dloss/dv_t = (2c/N) (v - R)    where the first is not the smaller or |v - old| <= value_clip, else 0

    forward(values, old_values, returns, loss_mask): per token `[B, T]`, or packed `[N]` with `cu_seqlens`; values[t] is
    the value of the state in which token t is chosen. `old_values=None` means the values themselves, which no clip
    can bind. Optional: `token_weights` (scale a token; 0 rejects it and keeps the denominator), `normalizer`.

    Metrics: value, value_error (mean squared error, without the clip), value_clip_frac (share of tokens where the clip
    takes the gradient), explained_variance (1 - Var(R - v) / Var(R)).

    Args:
        value_clip: How far a value may move from old_values; None for no clip.
        halve: Keeps the factor 1/2, as most frameworks do; their `vf_coef` differs by 2 from those that do not.

    >>> v, returns, mask = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
    >>> ValueLoss()(v, v, returns, mask).loss
    tensor(0.2500)
    """

    family = "value"

    def __init__(self, *, value_clip: float | None = 0.2, halve: bool = True) -> None:
        super().__init__()
        if value_clip is not None:
            check_range(self._who, "value_clip", value_clip, 0, open_low=True)
        check_flag(self._who, "halve", halve)
        self.value_clip, self.halve = value_clip, halve

    @property
    def needs_critic(self) -> bool:
        """Always."""
        return True

    def forward(
        self,
        values: Float[Tensor, "*tokens"],
        old_values: Float[Tensor, "*tokens"] | None,
        returns: Float[Tensor, "*tokens"],
        loss_mask: Bool[Tensor, "*tokens"],
        *,
        token_weights: Float[Tensor, "*tokens"] | None = None,
        normalizer: Normalizer | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> LossOutput:
        """The loss and its metrics; the class docstring says what each argument means."""
        check_normalizer(self._who, normalizer)
        check_tokens_layout(self._who, loss_mask, cu_seqlens)
        check_like(self._who, "values", values, "loss_mask", loss_mask)
        old_values = values if old_values is None else old_values
        given = {"old_values": old_values, "returns": returns}
        for name, x in (given if token_weights is None else given | {"token_weights": token_weights}).items():
            check_like(self._who, name, x, "values", values)
        mask = within_sequences(loss_mask, cu_seqlens)
        values, old_values, returns = zero_masked(mask, values, old_values.detach(), returns.detach())
        accepted = values, old_values, returns
        if token_weights is not None:
            (token_weights,) = zero_masked(mask, token_weights.detach())
            accepted = zero_masked(token_weights != 0, *accepted)
        error, is_clipped = self._errors(*accepted)
        loss = reduce_tokens(
            (0.5 if self.halve else 1.0) * weighted(error, token_weights),
            mask,
            "token_mean",
            normalizer=normalizer,
            cu_seqlens=cu_seqlens,
        )
        return LossOutput(
            loss,
            {
                "value": Mean.of(values, mask),
                "value_error": Mean.of((values - returns).square(), mask),
                "value_clip_frac": Mean.of(is_clipped.to(values.dtype), mask),
                "explained_variance": ExplainedVariance.of(values, returns, mask),
            },
        )

    def _errors(self, values: Tensor, old_values: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
        """The squared error of each token, and where the clip has taken its gradient."""
        error = (values - returns).square()
        if self.value_clip is None:
            return error, torch.zeros_like(error, dtype=torch.bool)
        moved = values - old_values
        clipped = old_values + moved.clamp(-self.value_clip, self.value_clip)
        clipped_error = (clipped - returns).square()
        is_clipped = (clipped_error > error) & (moved.abs() > self.value_clip)
        return torch.where(is_clipped, clipped_error, error), is_clipped
