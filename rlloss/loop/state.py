"""What a resumed run must put back to the bit: optimiser, model and the global random generators, as named tensors."""

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlloss._checks import nearest

__all__ = ["memory_of", "optimizer_tensors", "restore_model", "restore_optimizer", "restore_rng", "rng_tensors"]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of any optimiser as named tensors (its own, not copies) and the rest, which names them.

    >>> optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
    >>> optimizer_tensors(optimizer)[1]["parameters"]
    [[[2], 'torch.float32']]
    """
    tensors: dict[str, Tensor] = {}

    def taken(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach()
            return {"tensor": name}
        if isinstance(value, Mapping):
            return {key: taken(entry, f"{name}.{key}") for key, entry in value.items()}
        if type(value) in (list, tuple):
            return type(value)(taken(entry, f"{name}.{i}") for i, entry in enumerate(value))
        return value

    saved = optimizer.state_dict()
    info = {
        "optimizer": type(optimizer).__name__,
        "parameters": _described(optimizer),
        "state": taken(saved["state"], "state"),
        "param_groups": taken(saved["param_groups"], "param_groups"),
    }
    return tensors, info


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Puts back what `optimizer_tensors` gave; a ValueError names the first thing that differs from `optimizer`.

    >>> optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
    >>> restore_optimizer(optimizer, *optimizer_tensors(optimizer))
    """
    _check_optimizer(optimizer, info)
    used: dict[str, None] = {}

    def put(value: Any) -> Any:
        if isinstance(value, Mapping):
            if list(value) == ["tensor"] and isinstance(value["tensor"], str):
                used[value["tensor"]] = None
                return tensors.get(value["tensor"])
            return {key: put(entry) for key, entry in value.items()}
        return type(value)(map(put, value)) if type(value) in (list, tuple) else value

    saved = {"state": put(info["state"]), "param_groups": put(info["param_groups"])}
    _check_names("restore_optimizer", used, tensors)
    optimizer.load_state_dict(saved)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in saved["state"].items():
        loaded = optimizer.state[parameters[index]]
        for key, value in state.items():
            # load_state_dict rounds state to the parameter's dtype, shares memory with `tensors` and forgets strides.
            if isinstance(value, Tensor) and isinstance(loaded.get(key), Tensor):
                like = parameters[index] if value.shape == parameters[index].shape else value
                loaded[key] = torch.empty_like(like, dtype=value.dtype, device=loaded[key].device).copy_(value)


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`model.load_state_dict`, but a ValueError names the first name, shape or dtype that differs: nothing is cast.

    >>> model = nn.Linear(2, 1)
    >>> restore_model(model, {"weight": torch.ones(1, 2), "bias": torch.zeros(1)})
    """
    own = model.state_dict()
    _check_names("restore_model", own, tensors)
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in own.items():
        was, now = tensors[name], tensor
        if was.shape != now.shape or was.dtype != now.dtype:
            raise ValueError(
                f"restore_model: {name!r} was saved as {_form(was)} and is {_form(now)} in this model; "
                "build the model that was saved"
            )
        twin = seen.setdefault(memory_of(tensor), name)
        if twin != name and not torch.equal(_bytes(tensors[twin]), _bytes(was)):
            raise ValueError(
                f"restore_model: this model ties {name!r} to {twin!r}, but they were saved with different values; "
                "build the model untied"
            )
    model.load_state_dict(dict(tensors))


def rng_tensors() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of the global random generators: torch (CPU, and CUDA where it is in use), `random` and NumPy.

    >>> tensors, info = rng_tensors()
    >>> drawn = torch.rand(2), random.random(), np.random.rand()
    >>> restore_rng(tensors, info)
    >>> torch.equal(torch.rand(2), drawn[0]), random.random() == drawn[1], np.random.rand() == drawn[2]
    (True, True, True)
    """
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002 (the global state is what others may draw from)
    if numpy["bit_generator"] != "MT19937":
        raise ValueError(
            f"rng_tensors: NumPy's global generator must be its default, MT19937, got {numpy['bit_generator']}"
        )
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
    }
    if torch.cuda.is_initialized():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    gaussian = {"has_gauss": numpy["has_gauss"], "gauss": numpy["gauss"]}
    return tensors, {"python": (version, gauss), "numpy": gaussian | {"pos": numpy["state"]["pos"]}}


def restore_rng(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Puts back what `rng_tensors` gave, so that the next draws are those that followed it."""
    cuda = [tensors[name] for name in tensors if name.startswith("cuda.")]
    if len(cuda) > torch.cuda.device_count():
        raise ValueError(
            f"restore_rng: {len(cuda)} CUDA generators were saved and this machine has {torch.cuda.device_count()} "
            "devices; without restore_rng the run goes on with other random numbers"
        )
    torch.set_rng_state(tensors["torch"])
    for device, state in enumerate(cuda):
        torch.cuda.set_rng_state(state, device)
    version, gauss = info["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    state = {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": info["numpy"]["pos"]}
    np.random.set_state({**info["numpy"], "bit_generator": "MT19937", "state": state})  # noqa: NPY002


def memory_of(tensor: Tensor) -> tuple[Any, ...]:
    """What is equal for two tensors that are one: place, layout and type."""
    place = (tensor.device, tensor.data_ptr(), tensor.is_conj(), tensor.is_neg())
    return (*place, tensor.dtype, tuple(tensor.shape), tensor.stride())


def _form(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _bytes(tensor: Tensor) -> Tensor:
    # A copy, since one element counts as contiguous with any stride, and `view` then refuses it.
    return tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _described(optimizer: torch.optim.Optimizer) -> list[list[Any]]:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [[list(p.shape), str(p.dtype)] for p in parameters]


def _check_optimizer(optimizer: torch.optim.Optimizer, info: Mapping[str, Any]) -> None:
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in info["param_groups"]]
    for what, was, now in [
        ("optimizer", info["optimizer"], type(optimizer).__name__),
        ("numbers of parameters per group", saved_sizes, sizes),
    ]:
        if was != now:
            raise ValueError(
                f"restore_optimizer: the saved {what} is {was}, got {now}; build the optimiser that was saved"
            )
    for index, (was, now) in enumerate(zip(info["parameters"], _described(optimizer), strict=True)):
        if was != now:
            raise ValueError(
                f"restore_optimizer: parameter {index} was saved as {was[0]} {was[1]} and is {now[0]} {now[1]} in this "
                "optimiser; build model and parameter groups as they were saved"
            )


def _check_names(who: str, own: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    own = dict.fromkeys(own)
    for name in own:
        if name not in tensors:
            raise ValueError(f"{who}: the checkpoint has no {name!r}{nearest(name, tensors)}")
    for name in tensors:
        if name not in own:
            raise ValueError(f"{who}: the checkpoint's {name!r} has no place here{nearest(name, own)}")
