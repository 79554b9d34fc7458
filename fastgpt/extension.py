"""The compiled libraries of the C++/CUDA extension: finds them, loads them, and keeps the reason when it cannot.

``setup.py`` builds ``fastgpt/_cpu.abi3.so`` and leaves ``fastgpt/_build.json`` beside it, which says why a library was
not built. Loading one registers the kernels of its namespace with torch's dispatcher, and nothing else: there is no
Python module in it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgpt import emulator, kernel_ops

NAMESPACE = "fastgpt_cpp"
CUDA_NAMESPACE = emulator.NAMESPACE
_FOLDER = Path(__file__).parent
_library = kernel_ops.define(NAMESPACE)
_cuda_library = kernel_ops.define(CUDA_NAMESPACE)


@functools.cache
def missing() -> str | None:
    """Load the CPU library; why it is not there, or None."""
    path = _FOLDER / "_cpu.abi3.so"
    if not path.exists():
        report = _FOLDER / "_build.json"
        if not report.exists():
            return "the C++ extension was not built (a checkout on PYTHONPATH is not installed: pip install -e .)"
        return f"the C++ extension was not built: {json.loads(report.read_text())['cpu']}"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"the C++ extension does not load: {str(error).splitlines()[0]}"
    return isa_error()


def isa_error() -> str | None:
    """What is wrong with FASTGPT_CPU_ISA, where the library is there, or None."""
    if not (_FOLDER / "_cpu.abi3.so").exists():
        return None
    wrong = _cpu().fastgpt_isa_error()
    return f"{wrong.decode()}, got {os.environ.get('FASTGPT_CPU_ISA')!r}" if wrong else None


def op(name: str, namespace: str = NAMESPACE) -> Callable[..., Any]:
    """The dispatcher op of that name: "layer_norm_fwd"."""
    return kernel_ops.op(namespace, name)


def op_in_place(name: str, changed: tuple[int, ...], namespace: str = NAMESPACE) -> Callable[..., Any]:
    """The dispatcher op, and then a word to autograd, which the library cannot say, that the lists ``changed`` have."""
    run = op(name, namespace)

    def run_and_tell(*args: Any) -> Any:
        result = run(*args)
        if not torch.compiler.is_compiling():
            for at in changed:
                torch.autograd.graph.increment_version(args[at])
        return result

    return run_and_tell


def isa() -> str:
    """The instruction set whose kernels run here: "baseline", "avx2", "avx512" or "avx512_bf16"."""
    return _cpu().fastgpt_isa().decode()


@functools.cache
def _cpu() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_FOLDER / "_cpu.abi3.so"))
    library.fastgpt_isa.restype = library.fastgpt_isa_error.restype = ctypes.c_char_p
    return library
