"""Compiles every Triton kernel for a GPU that is not there, as its launcher would have it on one.

    python tests/compile_for_gpu.py 90

prints a line of JSON for every variant of a kernel: its name, the flags that it was compiled with, what it takes of
registers, stack and shared memory. A process of its own, since Triton either compiles or interprets.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import rlloss_kernels
import torch
import triton
from rlloss_kernels import DIVERGENCES, STATISTICS, implementation
from rlloss_kernels.gpu import rows, tiling
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SHARED = {80: 166_912, 86: 101_376, 90: 232_448}  # bytes that a program may have
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

found: dict[tuple, dict] = {}


def pretend(capability: int) -> None:
    """Launches compile for this compute capability, and no more."""
    target = GPUTarget("cuda", capability, 32)
    stand_in: Any = SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    driver.set_active(stand_in)
    compiling = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        assert len(grid) == 1, f"{self.__name__}: the grid has {len(grid)} axes"
        kernel: Any = compiling(self, *args, grid=grid, warmup=True, **kwargs)
        name = f"{self.module}.{self.__name__}"
        key = (name, kernel.hash)
        if key not in found:
            values = {self.arg_names[path[0]]: v for path, v in kernel.src.constants.items()}
            flags = {name: v for name, v in values.items() if name.isupper()}
            ptx = kernel.asm["ptx"]
            used = {"wgmma": "wgmma.mma_async" in ptx, "bulk loads": "cp.async.bulk.tensor" in ptx}
            found[key] = {"kernel": name, "flags": flags, **used, **resources(kernel.asm["cubin"])}
        return kernel

    JITFunction.run = run  # type: ignore[method-assign]
    implementation.why_not_triton = lambda device, dtype: None
    tiling.device_limits = lambda device: (capability >= 90, SHARED[capability])
    rows.HostCount.read = lambda self: self.most
    setattr(torch, "_assert_async", lambda *args: None)  # noqa: B010  # what was never computed breaks no rule


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", run.stdout)
    assert numbers, run.stdout
    return dict(zip(("registers", "stack", "shared"), map(int, numbers.groups()), strict=True))


def launch_everything(tokens: int, vocabulary: int, temperature: float) -> None:
    """Every launcher, with every flag that makes another kernel of it."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (tokens,), generator=generator)
    mask, heat = ids > 3, torch.full((tokens,), temperature)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        of_dtype = {"dtype": dtype, "requires_grad": True}
        logits, bias = torch.zeros(tokens, vocabulary, **of_dtype), torch.zeros(vocabulary, **of_dtype)
        hidden, weight = torch.zeros(tokens, 256, **of_dtype), torch.zeros(vocabulary, 256, **of_dtype)
        is_usual = dtype is torch.bfloat16  # of the others one variant for each kernel
        usual: tuple[dict[str, Any], ...] = (
            {"outputs": ("logprobs", "entropy")},
            {"outputs": ("logprobs",), "loss_mask": mask},
            {"outputs": STATISTICS, "loss_mask": mask, "temperature": heat},
        )
        for extra in usual if is_usual else usual[:1]:
            rlloss_kernels.logits_statistics(logits, ids, impl="triton", **extra).sum().backward()
            rlloss_kernels.linear_statistics(hidden, weight, ids, impl="triton", **extra).sum().backward()
        odd = hidden[:, 1:], weight[:, 1:]  # of which bulk loads cannot be made
        asked: Any = {"bias": bias, "softcap": 30.0, "temperature": heat, "outputs": STATISTICS, "impl": "triton"}
        rlloss_kernels.linear_statistics(*odd, ids, **asked).sum().backward()
        for extra in ({}, {"loss_mask": mask, "temperature": heat, "softcap": 30.0})[not is_usual :]:
            asked = {"outputs": ("logprobs",), "impl": "triton", **extra}
            rlloss_kernels.linear_statistics(hidden, weight.detach(), ids, **asked).sum().backward()
        for outputs in (("reverse_kl",), ("forward_kl",), DIVERGENCES)[0 if is_usual else 2 :]:
            asked = {"outputs": outputs, "ids": ids, "impl": "triton"}
            rlloss_kernels.logits_divergences(logits, logits.detach(), **asked).sum().backward()
            pair = (hidden, weight, hidden.detach()[:, :128], weight.detach()[:, :128])
            rlloss_kernels.linear_divergences(*pair, **asked).sum().backward()
    for shape in ((4, tokens), (400 * tokens,)):
        a = torch.ones(shape, dtype=torch.float64)
        rlloss_kernels.reverse_recurrence_(a, a.clone(), cuts=True, impl="triton")


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is in the environment: Triton would interpret the kernels, not compile them")
    os.nice(19)  # the tests beside it come first
    pretend(int(sys.argv[1]))
    launch_everything(tokens=100, vocabulary=1600, temperature=0.7)
    variants = len(found)
    launch_everything(tokens=77, vocabulary=3200, temperature=1.3)
    functions = [x for module in modules() for x in vars(module).values() if isinstance(x, JITFunction)]
    kernels = {f"{x.module}.{x.__name__}" for x in functions if x.__name__.endswith("_kernel")}
    print(json.dumps({"triton": triton.__version__, "never launched": sorted(kernels - {name for name, _ in found})}))
    print(json.dumps({"variants that another length made": len(found) - variants}))
    for variant in found.values():
        print(json.dumps(variant))


def modules() -> list:
    return [module for name, module in sys.modules.items() if name.startswith("rlloss_kernels.gpu.")]


if __name__ == "__main__":
    main()
