"""The head of a Hugging Face causal LM: what it is, how it is found, and the proof that it is what it seems."""

import inspect
import math
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Head", "LowRank", "accepts", "backbone_of", "causal_lm", "lm_head", "text_config"]

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

    def operands(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the fused head multiplies, in one dtype; a low-rank adapter is more columns of both factors."""
        if hidden.shape[-1] != self.weight.shape[1]:
            raise ValueError(
                f"model_logprobs: {type(self.backbone).__name__} gives hidden states of width {hidden.shape[-1]} but "
                f"the head reads {self.weight.shape[1]}, so the model does something between them; {_WAY_OUT}"
            )
        device = hidden.device.type
        autocast = torch.is_autocast_enabled(device) and self.weight.dtype is not torch.float64
        dtype = torch.get_autocast_dtype(device) if autocast else self.weight.dtype
        columns, weights, bias = [hidden.to(dtype)], [self.weight.to(dtype)], self.bias
        for down, up, up_bias, scaling, dropout in self.adapters:
            columns.append((scaling * F.linear(dropout(hidden.to(down.dtype)), down)).to(dtype))
            weights.append(up.to(dtype))
            if up_bias is not None:
                bias = scaling * up_bias if bias is None else bias + scaling * up_bias
        if self.adapters:
            columns, weights = [torch.cat(columns, -1)], [torch.cat(weights, -1)]
        return columns[0], weights[0], None if bias is None else bias.to(dtype)


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
    inner = causal_lm(model)
    module = _output_embedding(inner)
    backbone = backbone_of(inner)
    weight, bias, adapters = _head_tensors(module)
    head = Head(backbone, weight, bias, *_scale_and_softcap(inner), adapters)
    if verify:
        # what may change between calls and change the recipe: another head module, its adapters, the config's numbers
        recipe = (type(module), bias is None, len(adapters), head.logit_scale, head.softcap)
        if _verified.get(model) != recipe:
            _verify(model, head)
            _verified[model] = recipe
    return head


def causal_lm(model: Any, *, who: str = "model_logprobs", way_out: str = _WAY_OUT) -> nn.Module:
    """The decoder-only model inside `torch.compile` and PEFT; LoRA layers live in it, so its backbone is adapted.

    >>> causal_lm(nn.Linear(2, 2))
    Linear(in_features=2, out_features=2, bias=True)
    """
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        adapter = getattr(model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False) or getattr(adapter, "alora_invocation_tokens", None):
            raise ValueError(
                f"{who}: {type(adapter).__name__} changes what the wrapper's forward feeds to the backbone; "
                f"{way_out}, or pass model.get_base_model() to score without the adapter"
            )
        model = model.get_base_model()
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{who}: {type(model).__name__} is an encoder-decoder, whose decoder reads another sequence than "
            f"input_ids; {way_out}"
        )
    return model


def backbone_of(model: Any, *, who: str = "model_logprobs", way_out: str = _WAY_OUT) -> nn.Module:
    """The part of a causal LM that gives the hidden states before its head: found as `lm_head` finds it, not proved.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> type(backbone_of(LlamaForCausalLM(LlamaConfig(vocab_size=11, **size)))).__name__
    'LlamaModel'
    """
    model = causal_lm(model, who=who, way_out=way_out)
    # base_model knows the prefix; some text halves of vision models inherit a prefix that they do not have
    for module in (getattr(model, "base_model", None), getattr(model, "model", None)):
        if isinstance(module, nn.Module) and module is not model:
            return module
    raise ValueError(
        f"{who}: {type(model).__name__} has no base_model apart from itself, so the hidden states before its "
        f"head cannot be had; {way_out}"
    )


def accepts(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward names an argument.

    >>> accepts(nn.Linear(2, 2), "use_cache")
    False
    """
    return argument in inspect.signature(getattr(module, "_orig_mod", module).forward).parameters


def text_config(model: Any) -> Any:
    """A model's config, of one that also sees or hears the part about text; None for a model without.

    >>> text_config(nn.Linear(2, 2)) is None
    True
    """
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


_verified: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()


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
    config = text_config(model)
    numbers = {name: getattr(config, name, None) for name in (*_MULTIPLIERS, *_DIVISORS, *_SOFTCAPS)}
    given = {name: float(x) for name, x in numbers.items() if isinstance(x, int | float) and x}
    if getattr(config, "model_type", None) == "hyperclovax":  # multiplies by what Granite divides by
        return given.get("logits_scaling", 1.0), None
    scale = math.prod([given.get(name, 1.0) for name in _MULTIPLIERS])
    scale /= math.prod([given.get(name, 1.0) for name in _DIVISORS])
    return scale, next((given[name] for name in _SOFTCAPS if name in given), None)


def _verify(model: nn.Module, head: Head) -> None:
    """Raises ValueError unless the recipe gives the logits that the model's own forward gives."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "model_logprobs: the head cannot be verified while compiling; call rlloss.heads.lm_head(model) once "
            "before, or pass verify_head=False"
        )
    accelerators = {p.device for p in model.parameters() if p.device.type != "cpu"}
    kind = next((device.type for device in accelerators), "cpu")
    tokens = torch.arange(3, device=next(head.backbone.parameters()).device)[None]
    options = {"use_cache": False} if accepts(head.backbone, "use_cache") else {}
    hook = _innermost(causal_lm(model), head.backbone).register_forward_hook(
        lambda module, args, output: _make_loud(head, output[0])
    )
    try:
        with torch.no_grad():
            with torch.random.fork_rng(accelerators, device_type=kind):
                output = model(input_ids=tokens, **options)
                logits = output.logits if hasattr(output, "logits") else output[0]
            with torch.random.fork_rng(accelerators, device_type=kind):
                operands = head.operands(head.backbone(input_ids=tokens, **options)[0])
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
    hidden[:, -1] *= 100 / _logits(head, head.operands(hidden[:, -1])).abs().amax().clamp(min=1e-6)


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
