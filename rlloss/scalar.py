"""One number per token from a causal LM's backbone: a critic's values, a reward model's scores."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlloss._checks import check_device
from rlloss._typing import Float, Int
from rlloss.heads import backbone_of, causal_lm, text_config
from rlloss.models import backbone_hidden

__all__ = ["ScalarModel"]

_WAY_OUT = "pass a decoder-only Hugging Face causal LM (...ForCausalLM)"


class ScalarModel(nn.Module):
    """A causal LM's backbone under a linear head of one output: row t is the number after reading token t.

    The backbone is shared with `model`, not copied: give the policy for a value head on its trunk, and
    `copy.deepcopy(policy)` for a trunk of its own. The language-model head is no part of it.

    The head starts at zero, so that a critic's first values are 0 and advantages start as returns, and a reward model
    starts without a preference. One output has no symmetry to break, and the head's gradient is the hidden state:
    only the trunk's gradient through the head waits for the head's first step.

    The head is computed in float32 (float64 where it is float64) under autocast and on a half-precision backbone
    alike: advantages are small differences of values, each of which bfloat16 would round by up to 0.2%.

    Args:
        model: A Hugging Face causal LM, also one wrapped by PEFT or `torch.compile`.
        bias: False for a reward model that is trained on pairs, whose loss no constant changes.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> critic = ScalarModel(LlamaForCausalLM(LlamaConfig(vocab_size=11, **size)))
    >>> critic(torch.tensor([[1, 5, 2, 9]])).tolist()
    [[0.0, 0.0, 0.0, 0.0]]
    """

    backbone: nn.Module
    head: nn.Linear

    def __init__(self, model: nn.Module, *, bias: bool = True) -> None:
        super().__init__()
        who = type(self).__name__
        inner = causal_lm(model, who=who, way_out=_WAY_OUT)
        self.backbone = backbone_of(inner, who=who, way_out=_WAY_OUT)
        like = _output_weight(inner)
        like = next(self.backbone.parameters()) if like is None else like
        dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
        self.head = nn.Linear(_width(who, inner), 1, bias=bias, device=like.device, dtype=dtype)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Float[Tensor, "B T"]:
        """The scalar after each token; the arguments are those of `rlloss.model_logprobs`."""
        return self.scalars(self._hidden(input_ids, attention_mask, position_ids=position_ids, **model_kwargs))

    def scalars(self, hidden: Float[Tensor, "*tokens H"]) -> Float[Tensor, "*tokens"]:
        """The head on hidden states, such as `rlloss.models.model_hidden` gives for a policy that shares them."""
        who, width = type(self).__name__, self.head.in_features
        if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or hidden.shape[-1] != width:
            got = f"{hidden.dtype} {list(hidden.shape)}" if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(f"{who}: hidden must be a float tensor of width {width}, the head's, got {got}")
        dtype = torch.promote_types(self.head.weight.dtype, torch.float32)
        bias = None if self.head.bias is None else self.head.bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(dtype), self.head.weight.to(dtype), bias).squeeze(-1)

    def score(
        self,
        input_ids: Int[Tensor, "B T"],
        last_index: Int[Tensor, " B"],
        *,
        attention_mask: Tensor | None = None,
        **model_kwargs: Any,
    ) -> Float[Tensor, " B"]:
        """The scalar at one given token per row: a reward model's score of a whole sequence.

        The index is never inferred from pad tokens, which a chat template may use as its end of turn.

        Args:
            input_ids: What the backbone reads.
            last_index: Of each row's last real token, from 0 to T - 1, padding on the left included. A row whose index
                is padding under `attention_mask` scores NaN, since to raise would wait for the device.
            attention_mask: As in `forward`.
            model_kwargs: As in `forward`.
        """
        who = type(self).__name__
        _check_last_index(who, last_index, input_ids)
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"{who}: attention_mask {list(attention_mask.shape)} must have the shape of input_ids, "
                f"{list(input_ids.shape)}"
            )
        column = last_index.long()[:, None]
        hidden = self._hidden(input_ids, attention_mask, **model_kwargs)
        # gather, unlike take_along_dim, raises at a negative index; the head then reads one token per row
        last = hidden.gather(1, column[..., None].expand(-1, -1, hidden.shape[-1]))
        scores = self.scalars(last.squeeze(1))
        if attention_mask is None:
            return scores
        return torch.where(attention_mask.gather(1, column).squeeze(1) != 0, scores, torch.nan)

    def shares_backbone_with(self, model: nn.Module) -> bool:
        """Whether one forward of this backbone serves `model` too: its hidden states, its gradient, its weights."""
        return backbone_of(model, who=type(self).__name__, way_out=_WAY_OUT) is self.backbone

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor | None, **model_kwargs: Any) -> Tensor:
        who = type(self).__name__
        return backbone_hidden(who, self.backbone, input_ids, attention_mask=attention_mask, **model_kwargs)


def _output_weight(model: Any) -> Tensor | None:
    """The weight `[V, H]` of the language-model head; None where there is none or it is quantised or gathered away."""
    find = getattr(model, "get_output_embeddings", None)
    weight = getattr(find() if callable(find) else None, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point() else None


def _width(who: str, model: Any) -> int:
    weight = _output_weight(model)
    if weight is not None:
        return weight.shape[1]
    width = getattr(text_config(model), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(
            f"{who}: {type(model).__name__} has neither an output embedding nor config.hidden_size, so that the width "
            f"of its hidden states is unknown; {_WAY_OUT}"
        )
    return width


def _check_last_index(who: str, last_index: Tensor, input_ids: Tensor) -> None:
    if not isinstance(last_index, Tensor) or last_index.dtype not in (torch.int32, torch.int64):
        got = last_index.dtype if isinstance(last_index, Tensor) else type(last_index).__name__
        raise ValueError(f"{who}: last_index must be an int32 or int64 tensor [B], got {got}")
    if last_index.shape != input_ids.shape[:1]:
        raise ValueError(
            f"{who}: last_index must be [B] = {list(input_ids.shape[:1])}, one index per row of input_ids, got "
            f"{list(last_index.shape)}"
        )
    check_device(who, "last_index", last_index, "input_ids", input_ids)
