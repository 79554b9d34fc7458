"""What a kernel's file does when it is run by itself: hold its kernels to the reference, and say what they move.

On a GPU in bf16, with times; without one in fp32, on small tensors, in Triton's interpreter, where an edit to a kernel
is one rerun away and ``print`` and a debugger work inside it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor

from fastgpt.triton_kernels import library

Run = Callable[[], "Tensor | Sequence[Tensor]"]


def start(small: tuple[int, ...], large: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes to try: ``large`` on a GPU, else ``small``, in the interpreter (started anew if that is not on)."""
    if torch.cuda.is_available() and not library.interpreting():
        print(f"on {torch.cuda.get_device_name()}, bf16")
        return large
    if not library.interpreting():
        # Triton asks when it decorates a kernel, which is past: the same command line again, with the interpreter on.
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    print("in Triton's interpreter, fp32 (no times: there is no GPU)")
    return small


def sample(*shape: int) -> Tensor:
    """Random numbers whose mean is not zero, where and in the dtype that this run uses."""
    device, dtype = ("cpu", torch.float32) if library.interpreting() else ("cuda", torch.bfloat16)
    return (torch.randn(shape, dtype=torch.float64) + 0.5).to(device, dtype)


def gradients(fn: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor], upstream: list[Tensor]) -> Run:
    """The gradients of ``fn(*inputs)``, found in float64."""
    leaves = [x.double().requires_grad_() for x in inputs]

    def run() -> Sequence[Tensor]:
        outputs = fn(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, leaves, [dy.double() for dy in upstream])

    return run


def check(name: str, run: Run, truth: Run, moved: int, operations: int = 0) -> None:
    """Print one line for a kernel; exit if it is wrong.

    Args:
        name: what is run.
        run: launches it and returns its results.
        truth: the same results, of the reference in float64.
        moved: bytes that have to go through memory.
        operations: floating-point operations of its matrix products; 0 where memory is what counts.
    """
    error = max(
        float((got.double() - true).abs().nan_to_num(nan=torch.inf).max() / true.abs().max())
        for got, true in zip(_listed(run()), _listed(truth()), strict=True)
    )
    allowed = 1e-5 if library.interpreting() else 2**-6
    line = f"{name:24} error {error:.1e} of the largest, moves {moved / 1e6:.3g} MB"
    line += f", computes {operations / 1e9:.3g} GFLOP" if operations else ""
    if not library.interpreting():
        ms = triton.testing.do_bench(run, return_mode="median")
        line += f", takes {ms:.4g} ms: {moved / ms / 1e6:.0f} GB/s"
        line += f", {operations / ms / 1e9:.0f} TFLOP/s" if operations else ""
    print(line)
    if error > allowed:
        sys.exit(f"{name} is wrong: the error allowed is {allowed:.1e}")


def _listed(results: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [results] if isinstance(results, Tensor) else results
