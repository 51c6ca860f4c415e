"""The models of a run, loaded as users name them: policy, reference, critic; adapters, 4 and 8 bits, checkpointing."""

import copy
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlloss.loop.frozen import frozen_copy
from rlloss.loop.peft import WithoutAdapters, with_adapters
from rlloss.loop.pretrained import (
    check_quantization,
    default_device,
    load_causal_lm,
    own_tokenizer,
    quantization_config,
)
from rlloss.scalar import ScalarModel
from rlloss.trainer.algorithms import WHO, Algorithm

__all__ = ["Models", "bits_and_bytes", "check_models", "load_models", "loaded_tokenizer", "needs_package"]


@dataclass
class Models:
    """What a session is made of."""

    model: Any
    tokenizer: Any
    reference: nn.Module | None
    critic: ScalarModel | None


def check_models(source: str | Path | nn.Module, values: Mapping[str, Any]) -> None:
    """Raises where the models cannot be had as they are asked for; nothing is loaded."""
    quantization = values["quantization"]
    if quantization and not _is_adapted(values):
        raise ValueError(
            f"{WHO}: quantization={dict(quantization)} freezes the weights, and nothing would train; add "
            "use_peft=True, whose adapters do"
        )
    if isinstance(source, nn.Module) and (quantization or values["torch_dtype"]):
        raise ValueError(f"{WHO}: torch_dtype and quantization are for a model that is loaded here; load yours so")
    reference = source if values.get("reference") is None else values["reference"]
    if isinstance(reference, nn.Module) and values.get("reference_quantization"):
        raise ValueError(f"{WHO}: reference_quantization is for a model that is loaded here; pass its name, no module")
    _dtype(values["torch_dtype"])
    for options in (quantization, values.get("reference_quantization")):
        if options:
            bits_and_bytes(options)
    if _is_adapted(values):
        needs_package("peft", "use_peft=True", "peft")


def loaded_tokenizer(source: str | Path | nn.Module, tokenizer: Any) -> Any:
    """The tokenizer that was given, or that of the model's folder."""
    return own_tokenizer(WHO, source) if tokenizer is None else tokenizer


def load_models(
    algorithm: Algorithm, source: str | Path | nn.Module, tokenizer: Any, values: Mapping[str, Any], reference: bool
) -> Models:
    """The policy (or reward model) of `source`, and what the algorithm needs beside it."""
    model = _language_model(source, values["torch_dtype"], values["quantization"])
    if _is_adapted(values):
        model = _adapted(model, values)
    half = next((p.dtype for p in model.parameters() if p.requires_grad and p.dtype.itemsize == 2), None)
    if half is not None:
        print(
            f"{WHO}: the weights are {half}, in which small updates are rounded away; load them in float32 (bf16=True "
            "still runs the forward passes in bfloat16), or train adapters"
        )
    if values["use_gradient_checkpointing"]:
        _checkpoint(model)
    given = values.get("reference")
    of_reference = _reference(source, model, values) if reference or given is not None else None
    critic = None
    if algorithm.kind == "critic":
        critic = _critic(model, values)
    if algorithm.kind == "reward" and not isinstance(model, ScalarModel):
        model = ScalarModel(model, bias=False)
    return Models(model, tokenizer, of_reference, critic)


def _is_adapted(values: Mapping[str, Any]) -> bool:
    return values["use_peft"] or values["peft_config"] is not None


def _critic(model: Any, values: Mapping[str, Any]) -> ScalarModel:
    if values["critic"] is None:
        return ScalarModel(model if values["shared_trunk"] else copy.deepcopy(model))
    if values["shared_trunk"] or not isinstance(values["critic"], ScalarModel):
        raise ValueError(
            f"{WHO}: critic must be a rlloss.ScalarModel and says itself whether it shares the policy's trunk, got "
            f"{type(values['critic']).__name__} with shared_trunk={values['shared_trunk']}"
        )
    return values["critic"]


def bits_and_bytes(options: Mapping[str, Any]) -> Any:
    """`{"load_in_4bit": True}` and other options of transformers' BitsAndBytesConfig, whose words are checked."""
    check_quantization(WHO, options)
    needs_package("bitsandbytes", f"quantization={dict(options)}", "quantization")
    return quantization_config(options)


def needs_package(package: str, parameter: str, extra: str) -> None:
    """Raises ImportError, with the command that installs it, where an optional package is not there."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f'{WHO}: {parameter} needs {package}, which is not installed: pip install "rlloss[{extra}]"')


def _language_model(
    source: str | Path | nn.Module, dtype: str | torch.dtype | None, quantization: Mapping[str, Any] | None
) -> Any:
    if isinstance(source, nn.Module):
        return source
    options: dict[str, Any] = {"dtype": _dtype(dtype)}
    if quantization:
        options |= {"quantization_config": bits_and_bytes(quantization), "device_map": {"": default_device()}}
        return load_causal_lm(source, **options)
    return load_causal_lm(source, **options).to(default_device())


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{WHO}: torch_dtype must be a torch.dtype or its name, such as 'bfloat16', got {dtype!r}")
    return found


def _adapted(model: Any, values: Mapping[str, Any]) -> Any:
    modules = values["lora_target_modules"]
    lora = {
        "r": values["lora_r"],
        "lora_alpha": values["lora_alpha"],
        "lora_dropout": values["lora_dropout"],
        "target_modules": "all-linear" if modules is None else modules,
    }
    return with_adapters(model, values["peft_config"], lora=lora, quantized=bool(values["quantization"]))


def _checkpoint(model: Any) -> None:
    model = model.backbone if isinstance(model, ScalarModel) else model
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _reference(source: str | Path | nn.Module, model: Any, values: Mapping[str, Any]) -> nn.Module:
    quantization, given = values["reference_quantization"], values["reference"]
    if given is not None:
        if isinstance(given, nn.Module) and {id(p) for p in given.parameters()} & {
            id(p) for p in model.parameters() if p.requires_grad
        }:
            raise ValueError(f"{WHO}: the reference shares trainable parameters with the policy; pass a frozen copy")
        loaded = isinstance(given, nn.Module)
        return _language_model(given, None if loaded else values["torch_dtype"], quantization).requires_grad_(False)
    if quantization is None:
        return WithoutAdapters(model) if hasattr(model, "disable_adapter") else frozen_copy(model)
    return _language_model(source, values["torch_dtype"], quantization).requires_grad_(False)
