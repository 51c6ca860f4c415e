"""Any Hugging Face causal LM to per-token log-probs: its backbone, then the fused head; no `[B, T, V]` tensor."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rlloss._typing import Bool, Float, Int
from rlloss.heads import accepts, backbone_of, lm_head
from rlloss.logprobs import TokenStats, linear_logprobs

__all__ = ["backbone_hidden", "hidden_logprobs", "model_hidden", "model_logprobs"]


def model_logprobs(
    model: nn.Module,
    input_ids: Int[Tensor, "B T"],
    ids: Int[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | None = None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    kept_ids: Int[Tensor, "B T K"] | None = None,
    outputs: Sequence[str] = ("logprobs",),
    impl: str = "auto",
    scratch_bytes: int | None = None,
    cache_bytes: int = 0,
    verify_head: bool = True,
    **model_kwargs: Any,
) -> TokenStats:
    """Log-probs of `ids` under a causal LM: row i of what it makes of `input_ids` is scored against `ids[:, i]`.

    Equal to `log_softmax(model(input_ids).logits / temperature)` gathered at `ids`, for a tied, biased, scaled,
    softcapped or LoRA-adapted head, without the logits. Where hidden states and head differ in dtype, the head's
    dtype is taken, or the autocast dtype inside a `torch.autocast` region, as the model's own head does.

    It is `hidden_logprobs` of `model_hidden`; call these where one forward serves values too.
    Under DDP or FSDP, call it inside the forward of the module that you wrap; only there do gradients get reduced.

    Args:
        model: A Hugging Face causal LM, also one wrapped by PEFT or `torch.compile`.
        input_ids: What the model reads.
        ids: What its rows are scored against, from `rlloss.shift(input_ids, loss_mask)`.
        loss_mask: True = counts, aligned with `ids`; other positions give 0 and cost nothing in the head.
        attention_mask: `[B, T]`, True or 1 = real. Positions are then counted from each row's first real token, so
            left and right padding agree.
        position_ids: Overrides those positions.
        kept_ids, scratch_bytes, cache_bytes: See `linear_logprobs`.
        verify_head: See `lm_head`.
        model_kwargs: What else the backbone reads.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import torch
    >>> from rlloss.reduce import shift
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=11, **size))
    >>> input_ids = torch.tensor([[1, 5, 2, 9]])
    >>> ids, loss_mask = shift(input_ids, input_ids > 1)
    >>> (model_logprobs(model, input_ids, ids, loss_mask).logprobs < 0).tolist()
    [[True, True, True, False]]
    """
    who = "model_logprobs"
    if ids is input_ids:
        raise ValueError(
            f"{who}: ids is input_ids, which scores every token against itself; "
            "write `ids, loss_mask = rlloss.shift(input_ids, loss_mask)` first"
        )
    head = lm_head(model, verify=verify_head)  # first, so that a head that cannot be scored costs no forward
    hidden = backbone_hidden(
        who, head.backbone, input_ids, attention_mask=attention_mask, position_ids=position_ids, **model_kwargs
    )
    return hidden_logprobs(
        model,
        hidden,
        ids,
        loss_mask,
        temperature=temperature,
        kept_ids=kept_ids,
        outputs=outputs,
        impl=impl,
        scratch_bytes=scratch_bytes,
        cache_bytes=cache_bytes,
        verify_head=False,
    )


def model_hidden(
    model: nn.Module,
    input_ids: Int[Tensor, "B T"],
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **model_kwargs: Any,
) -> Float[Tensor, "B T H"]:
    """The hidden states that a causal LM's head reads: the first half of `model_logprobs`, with its arguments.

    One forward then serves `hidden_logprobs` and the `scalars` of a `ScalarModel` on the same backbone. The dtype is
    the backbone's own.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import torch
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model_hidden(LlamaForCausalLM(LlamaConfig(vocab_size=11, **size)), torch.tensor([[1, 5, 2, 9]])).shape
    torch.Size([1, 4, 8])
    """
    who = "model_hidden"
    backbone = backbone_of(model, who=who)
    return backbone_hidden(
        who, backbone, input_ids, attention_mask=attention_mask, position_ids=position_ids, **model_kwargs
    )


def hidden_logprobs(
    model: nn.Module,
    hidden: Float[Tensor, "*tokens H"],
    ids: Int[Tensor, "*tokens"],
    loss_mask: Bool[Tensor, "*tokens"] | None = None,
    *,
    temperature: float | Tensor = 1.0,
    kept_ids: Int[Tensor, "*tokens K"] | None = None,
    outputs: Sequence[str] = ("logprobs",),
    impl: str = "auto",
    scratch_bytes: int | None = None,
    cache_bytes: int = 0,
    verify_head: bool = True,
) -> TokenStats:
    """Log-probs of `ids` under a causal LM's head on `hidden`: the second half of `model_logprobs`.

    Under `torch.autocast`, call both halves inside the region.

    Args:
        model: The causal LM whose head is used; its backbone does not run, but for the proof.
        hidden: `[B, T, H]` from `model_hidden`, or rows of it, `[N, H]`.
        ids: As for `model_logprobs`, and so are the other arguments.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> import torch
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=11, **size))
    >>> hidden_logprobs(model, torch.zeros(1, 2, 8), torch.tensor([[5, 2]])).logprobs.tolist()[0][0]  # -log 11
    -2.397895336151123
    """
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"hidden_logprobs: hidden must be a tensor, as model_hidden returns it, got {type(hidden).__name__}"
        )
    head = lm_head(model, verify=verify_head)
    hidden, weight, bias = head.operands(hidden)
    return linear_logprobs(
        hidden,
        weight,
        ids,
        bias=bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        loss_mask=loss_mask,
        kept_ids=kept_ids,
        outputs=outputs,
        impl=impl,
        scratch_bytes=scratch_bytes,
        cache_bytes=cache_bytes,
    )


def backbone_hidden(
    who: str,
    backbone: nn.Module,
    input_ids: Int[Tensor, "B T"],
    /,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    **model_kwargs: Any,
) -> Float[Tensor, "B T H"]:
    """Hidden states of a backbone, without a cache and with positions counted from each row's first real token."""
    for name in ("labels", "logits_to_keep"):
        if name in model_kwargs:
            raise ValueError(f"{who}: {name} has no effect without logits; choose tokens by a loss_mask")
    if attention_mask is not None:
        if not accepts(backbone, "attention_mask"):
            raise ValueError(
                f"{who}: {type(backbone).__name__} reads no attention_mask; pad on the right (a causal model "
                "never looks there) and pass none"
            )
        model_kwargs["attention_mask"] = attention_mask
        if position_ids is None:
            position_ids = _positions(who, backbone, input_ids, attention_mask)
    if position_ids is not None:
        model_kwargs["position_ids"] = position_ids
    if accepts(backbone, "use_cache"):
        model_kwargs["use_cache"] = False
    return backbone(input_ids=input_ids, **model_kwargs)[0]


def _positions(who: str, backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
    """Positions that start at 0 at each row's first real token; None where the backbone makes its own."""
    if attention_mask.ndim != 2:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"{who}: attention_mask {list(attention_mask.shape)} must have the shape of input_ids, "
            f"{list(input_ids.shape)}"
        )
    own = hasattr(backbone, "get_rope_index")  # vision-language models place image patches on a grid
    if own or not accepts(backbone, "position_ids"):
        return None
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
