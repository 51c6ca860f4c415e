"""Any Hugging Face causal LM to per-token log-probs: its backbone, then the fused head; no `[B, T, V]` tensor."""

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlloss._typing import Bool, Int
from rlloss.logprobs import TokenStats, linear_logprobs

__all__ = ["Head", "LowRank", "lm_head", "model_logprobs"]

# A number between head and logits has as many names as models; the probe in `lm_head` proves how each is used.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")

_WAY_OUT = "score the model's own logits instead: rlloss.token_logprobs(model(...).logits, ids)"


class LowRank(NamedTuple):
    """A LoRA adapter on the head: logits gain `scaling * (up @ down @ dropout(hidden) + bias)`."""

    down: Tensor
    up: Tensor
    bias: Tensor | None
    scaling: float
    dropout: nn.Module


class Head(NamedTuple):
    """How a model turns hidden states into logits: z = logit_scale * (weight @ hidden + bias), then the softcap."""

    backbone: nn.Module
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    adapters: tuple[LowRank, ...] = ()


def model_logprobs(
    model: nn.Module,
    input_ids: Int[Tensor, "B T"],
    ids: Int[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"] | None = None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    outputs: Sequence[str] = ("logprobs",),
    impl: str = "auto",
    verify_head: bool = True,
    **model_kwargs: Any,
) -> TokenStats:
    """Log-probs of `ids` under a causal LM: row i of what it makes of `input_ids` is scored against `ids[:, i]`.

    Equal to `log_softmax(model(input_ids).logits / temperature)` gathered at `ids`, for a tied, biased, scaled,
    softcapped or LoRA-adapted head, without the logits. Where hidden states and head differ in dtype, the head's
    dtype is taken, or the autocast dtype inside a `torch.autocast` region, as the model's own head does.

    Under DDP or FSDP, call it inside the forward of the module that you wrap; only there do gradients get reduced.

    Args:
        model: A Hugging Face causal LM, also one wrapped by PEFT or `torch.compile`.
        input_ids: What the model reads.
        ids: What its rows are scored against, from `rlloss.shift(input_ids, loss_mask)`.
        loss_mask: True = counts, aligned with `ids`; other positions give 0 and cost nothing in the head.
        attention_mask: `[B, T]`, True or 1 = real. Positions are then counted from each row's first real token, so
            left and right padding agree.
        position_ids: Overrides those positions.
        verify_head: See `lm_head`.
        model_kwargs: What else the backbone reads.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from rlloss.reduce import shift
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=11, **size))
    >>> input_ids = torch.tensor([[1, 5, 2, 9]])
    >>> ids, loss_mask = shift(input_ids, input_ids > 1)
    >>> (model_logprobs(model, input_ids, ids, loss_mask).logprobs < 0).tolist()
    [[True, True, True, False]]
    """
    if ids is input_ids:
        raise ValueError(
            "model_logprobs: ids is input_ids, which scores every token against itself; "
            "write `ids, loss_mask = rlloss.shift(input_ids, loss_mask)` first"
        )
    for name in ("labels", "logits_to_keep"):
        if name in model_kwargs:
            raise ValueError(f"model_logprobs: {name} has no effect without logits; choose tokens by ids and loss_mask")
    head = lm_head(model, verify=verify_head)
    if attention_mask is not None:
        model_kwargs["attention_mask"] = attention_mask
        if position_ids is None:
            position_ids = _positions(head.backbone, input_ids, attention_mask)
    if position_ids is not None:
        model_kwargs["position_ids"] = position_ids
    hidden, weight, bias = _operands(head, _hidden_states(head.backbone, input_ids, **model_kwargs))
    return linear_logprobs(
        hidden,
        weight,
        ids,
        bias=bias,
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        loss_mask=loss_mask,
        outputs=outputs,
        impl=impl,
    )


def lm_head(model: nn.Module, *, verify: bool = True) -> Head:
    """Finds a causal LM's backbone and head, and proves the recipe on three tokens before anything relies on it.

    The first call for a model runs its own forward and the recipe under one random state (so dropout agrees) and
    raises if the logits differ: a model that does something unknown to them is never scored wrongly. The last hidden
    state is made loud first, so that even a softcap that small logits would hide shows.

    Args:
        model: A Hugging Face causal LM, also one wrapped by PEFT or `torch.compile`.
        verify: False skips the proof, for a model that cannot run it where you are (sharded, or first called inside
            `torch.compile`) and whose head was proved elsewhere.

    >>> from transformers import GraniteConfig, GraniteForCausalLM
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> lm_head(GraniteForCausalLM(GraniteConfig(vocab_size=11, logits_scaling=8.0, **size))).logit_scale
    0.125
    """
    model = getattr(model, "_orig_mod", model)
    inner = _unwrapped(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model_logprobs: {type(inner).__name__} is an encoder-decoder, whose decoder reads another sequence than "
            f"input_ids; {_WAY_OUT}"
        )
    module = _output_embedding(inner)
    backbone = _backbone(inner)
    weight, bias, adapters = _head_tensors(module)
    head = Head(backbone, weight, bias, *_scale_and_softcap(inner), adapters)
    if verify:
        # what may change between calls and change the recipe: another head module, its adapters, the config's numbers
        recipe = (type(module), bias is None, len(adapters), head.logit_scale, head.softcap)
        if _verified.get(model) != recipe:
            _verify(model, head)
            _verified[model] = recipe
    return head


_verified: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


def _unwrapped(model: Any) -> nn.Module:
    """The Hugging Face model inside a PEFT wrapper; LoRA layers live in it, so its backbone is the adapted one."""
    if not hasattr(model, "get_base_model"):
        return model
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False) or getattr(adapter, "alora_invocation_tokens", None):
        raise ValueError(
            f"model_logprobs: {type(adapter).__name__} changes what the wrapper's forward feeds to the backbone; "
            f"{_WAY_OUT}, or pass model.get_base_model() to score without the adapter"
        )
    return model.get_base_model()


def _output_embedding(model: Any) -> nn.Module:
    find = getattr(model, "get_output_embeddings", None)
    module = find() if callable(find) else None
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"model_logprobs: {type(model).__name__} has no output embedding (get_output_embeddings()); pass a Hugging "
            "Face causal LM (...ForCausalLM). A DDP or FSDP wrapper reduces gradients only for its own forward: wrap "
            "a module whose forward calls model_logprobs"
        )
    return module


def _backbone(model: Any) -> nn.Module:
    # base_model knows the prefix; some text halves of vision models inherit a prefix that they do not have
    for module in (getattr(model, "base_model", None), getattr(model, "model", None)):
        if isinstance(module, nn.Module) and module is not model:
            return module
    raise ValueError(
        f"model_logprobs: {type(model).__name__} has no base_model apart from itself, so the hidden states before its "
        f"head cannot be had; {_WAY_OUT}"
    )


def _head_tensors(module: Any) -> tuple[Tensor, Tensor | None, tuple[LowRank, ...]]:
    """Weight, bias and LoRA adapters of a head; raises on a head with any other parameter.

    The probe cannot see an adapter that still is zero, as most are when training starts; hence the count by name.
    """
    if hasattr(module, "modules_to_save"):  # PEFT trains a copy of the head
        active = [] if module.disable_adapters else module.active_adapters
        module = module.modules_to_save[active[0]] if active else module.original_module
    if hasattr(module, "lora_A"):
        adapters = () if module.disable_adapters or module.merged else tuple(_low_rank(module))
        module = module.get_base_layer()
    else:
        adapters = ()
    names = {name for name, _ in module.named_parameters()}
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not names <= {"weight", "bias"} or not isinstance(weight, Tensor) or weight.dtype.itemsize == 1:
        raise ValueError(
            f"model_logprobs: the head is a {type(module).__name__} with parameters {sorted(names)}, not a linear "
            f"layer of float weight and bias, plain or with LoRA; {_WAY_OUT}"
        )
    if weight.ndim != 2 or weight.is_meta or hasattr(weight, "device_mesh"):
        raise ValueError(
            "model_logprobs: the head's weight is sharded or offloaded "
            f"({type(weight).__name__} {list(weight.shape)} on {weight.device}); call model_logprobs inside the "
            "forward of the FSDP-wrapped module, where weights are whole"
        )
    return weight, bias, adapters


def _low_rank(module: Any) -> list[LowRank]:
    adapters = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        if name in getattr(module, "lora_variant", ()) or name in getattr(module, "lora_magnitude_vector", ()):
            raise ValueError(
                f"model_logprobs: adapter {name!r} on the head is a LoRA variant (DoRA or the like), whose logits are "
                f"not base plus low rank; {_WAY_OUT}, or leave the head out of target_modules"
            )
        down, up = module.lora_A[name], module.lora_B[name]
        adapters.append(LowRank(down.weight, up.weight, up.bias, module.scaling[name], module.lora_dropout[name]))
    return adapters


def _scale_and_softcap(model: Any) -> tuple[float, float | None]:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = {name: getattr(config, name, None) for name in (*_MULTIPLIERS, *_DIVISORS, *_SOFTCAPS)}
    given = {name: float(x) for name, x in numbers.items() if isinstance(x, int | float) and x}
    if getattr(config, "model_type", None) == "hyperclovax":  # multiplies by what Granite divides by
        return given.get("logits_scaling", 1.0), None
    scale = math.prod([given.get(name, 1.0) for name in _MULTIPLIERS])
    scale /= math.prod([given.get(name, 1.0) for name in _DIVISORS])
    return scale, next((given[name] for name in _SOFTCAPS if name in given), None)


def _parameters_of(backbone: nn.Module) -> set[str]:
    return set(inspect.signature(getattr(backbone, "_orig_mod", backbone).forward).parameters)


def _positions(backbone: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
    """Positions that start at 0 at each row's first real token; None where the backbone makes its own."""
    if attention_mask.ndim != 2:
        return None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"model_logprobs: attention_mask {list(attention_mask.shape)} must have the shape of input_ids, "
            f"{list(input_ids.shape)}"
        )
    own = hasattr(backbone, "get_rope_index")  # vision-language models place image patches on a grid
    if own or "position_ids" not in _parameters_of(backbone):
        return None
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _hidden_states(backbone: nn.Module, input_ids: Tensor, **model_kwargs: Any) -> Tensor:
    accepted = _parameters_of(backbone)
    if "attention_mask" in model_kwargs and "attention_mask" not in accepted:
        raise ValueError(
            f"model_logprobs: {type(backbone).__name__} reads no attention_mask; pad on the right (a causal model "
            "never looks there) and pass none"
        )
    if "use_cache" in accepted:
        model_kwargs["use_cache"] = False
    return backbone(input_ids=input_ids, **model_kwargs)[0]


def _operands(head: Head, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the fused head multiplies, in one dtype; a low-rank adapter is more columns of both factors."""
    if hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"model_logprobs: {type(head.backbone).__name__} gives hidden states of width {hidden.shape[-1]} but the "
            f"head reads {head.weight.shape[1]}, so the model does something between them; {_WAY_OUT}"
        )
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and head.weight.dtype is not torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else head.weight.dtype
    columns, weights, bias = [hidden.to(dtype)], [head.weight.to(dtype)], head.bias
    for down, up, up_bias, scaling, dropout in head.adapters:
        columns.append((scaling * F.linear(dropout(hidden.to(down.dtype)), down)).to(dtype))
        weights.append(up.to(dtype))
        if up_bias is not None:
            bias = scaling * up_bias if bias is None else bias + scaling * up_bias
    if head.adapters:
        columns, weights = [torch.cat(columns, -1)], [torch.cat(weights, -1)]
    return columns[0], weights[0], None if bias is None else bias.to(dtype)


def _verify(model: nn.Module, head: Head) -> None:
    """Raises ValueError unless the recipe gives the logits that the model's own forward gives."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "model_logprobs: the head cannot be verified while compiling; call rlloss.models.lm_head(model) once "
            "before, or pass verify_head=False"
        )
    accelerators = {p.device for p in model.parameters() if p.device.type != "cpu"}
    kind = next((device.type for device in accelerators), "cpu")
    tokens = torch.arange(3, device=next(head.backbone.parameters()).device)[None]
    options = {"use_cache": False} if "use_cache" in _parameters_of(head.backbone) else {}
    hook = _innermost(_unwrapped(model), head.backbone).register_forward_hook(
        lambda module, args, output: _make_loud(head, output[0])
    )
    try:
        with torch.no_grad():
            with torch.random.fork_rng(accelerators, device_type=kind):
                output = model(input_ids=tokens, **options)
                logits = output.logits if hasattr(output, "logits") else output[0]
            with torch.random.fork_rng(accelerators, device_type=kind):
                operands = _operands(head, _hidden_states(head.backbone, tokens))
                expected = _logits(head, operands)
    finally:
        hook.remove()
    problem = _difference(logits, expected, max(torch.finfo(x.dtype).eps for x in (operands[0], logits)))
    if problem:
        raise ValueError(
            f"model_logprobs: {type(model).__name__} does something to its logits that is not in its head's recipe "
            f"(logit_scale={head.logit_scale:g}, softcap={head.softcap}, {len(head.adapters)} adapters): {problem}; "
            f"{_WAY_OUT}"
        )


def _innermost(model: Any, backbone: nn.Module) -> nn.Module:
    """The decoder inside the backbone, which a model may call past its backbone (OPT), or the backbone."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if decoder in set(backbone.modules()) else backbone


def _make_loud(head: Head, hidden: Tensor) -> None:
    hidden[:, -1] *= 100 / _logits(head, _operands(head, hidden[:, -1])).abs().amax().clamp(min=1e-6)


def _logits(head: Head, operands: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
    z = F.linear(*operands)
    z = head.logit_scale * (z if z.dtype is torch.float64 else z.float())
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def _difference(logits: Tensor, expected: Tensor, eps: float) -> str:
    """What is wrong with the recipe's logits, or nothing."""
    if logits.shape != expected.shape:
        return f"its logits have shape {list(logits.shape)}, the recipe's {list(expected.shape)}"
    # a half-precision model rounds once per step between head and logits; 1e-3 leaves room for TF32
    size = expected.abs() + expected.square().mean(-1, keepdim=True).sqrt()
    error = (logits - expected).abs()
    if (error <= max(4 * eps, 1e-3) * size).all():
        return ""
    return f"on three tokens they differ by up to {error.amax().item():.2g}"
