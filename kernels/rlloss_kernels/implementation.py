"""Which implementation computes: plain PyTorch, tile by tile, or Triton."""

import functools
import importlib.util
import os

import torch
from torch import Tensor

__all__ = ["IMPLEMENTATIONS", "implementation", "is_interpreted", "why_not_triton"]

IMPLEMENTATIONS = ("auto", "tiled", "triton")
_OLDEST = (8, 0)  # the first compute capability that multiplies bfloat16


def implementation(impl: str, x: Tensor, *, dtype: torch.dtype | None = None) -> str:
    """Which of "tiled" and "triton" works on tensors like `x`.

    "auto" is Triton on an NVIDIA GPU that it knows, in every dtype but float64, and tiles everywhere else. Raises
    ValueError for "triton" where there is none.
    """
    if impl == "tiled" or (impl == "auto" and not x.is_cuda):
        return "tiled"
    reason = why_not_triton(x.device, x.dtype if dtype is None else dtype)
    if impl == "auto":
        return "tiled" if reason else "triton"
    if impl != "triton":
        raise ValueError(f"impl must be one of {list(IMPLEMENTATIONS)}, got {impl!r}")
    if reason:
        raise ValueError(f"impl='triton' is impossible here: {reason}; impl='auto' takes plain PyTorch")
    return "triton"


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps Triton from tensors of this kind; None for nothing."""
    if dtype is torch.float64:
        return "its kernels sum in float32, and these tensors are float64"
    if not _is_installed():
        return "triton is not installed (pip install 'rlloss[triton]')"
    if is_interpreted():
        return None
    if device.type != "cuda":
        return (
            f"the tensors are on {device.type}; with TRITON_INTERPRET=1 in the environment before the first import, "
            "Triton interprets its kernels there, to look for errors rather than for speed"
        )
    if torch.version.hip is not None:
        return "its kernels were never tried on ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"{torch.cuda.get_device_name(device)} has compute capability {capability}, which is below {_OLDEST}"
    return None


def is_interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
