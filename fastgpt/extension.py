"""The compiled libraries of the C++/CUDA extension: finds them, loads them, and keeps the reason when it cannot.

``setup.py`` builds ``fastgpt/_cpu.abi3.so`` and ``fastgpt/_cuda.abi3.so`` and leaves ``fastgpt/_build.json`` beside
them, which says why one was not built. Loading one registers the kernels of its namespace with torch's dispatcher, and
nothing else: there is no Python module in it. Each is loaded on its own and fails on its own.
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

from fastgpt import kernel_ops

_FOLDER = Path(__file__).parent


def source_folder() -> Path:
    """The C++ and CUDA sources: in the package where it was installed, beside it in a checkout."""
    installed = _FOLDER / "csrc"
    return installed if installed.is_dir() else _FOLDER.parent / "csrc"


class Library:
    """One compiled library and the dispatcher ops of its namespace, which are defined also where it is missing.

    Args:
        name: "cpu" or "cuda", the tensors that it takes.
        namespace: of its ops.
        title: what its reasons call it.
    """

    def __init__(self, name: str, namespace: str, title: str) -> None:
        self.name = name
        self.namespace = namespace
        self.title = title
        self.path = _FOLDER / f"_{name}.abi3.so"
        self._library = kernel_ops.define(namespace)

    def not_built(self) -> str | None:
        """Why the library was not built, or None."""
        if self.path.exists():
            return None
        report = _FOLDER / "_build.json"
        reasons = json.loads(report.read_text()) if report.exists() else {}
        if self.name in reasons:
            return f"the {self.title} extension was not built: {reasons[self.name]}"
        return f"the {self.title} extension was not built (a checkout on PYTHONPATH is not installed: pip install -e .)"

    def load(self) -> str | None:
        """Load the library, which was built; why that fails, or None."""
        try:
            torch.ops.load_library(self.path)
        except (OSError, RuntimeError) as error:
            # torch says that it failed, and what it caught says why.
            return f"the {self.title} extension does not load: {str(error.__cause__ or error).splitlines()[0]}"
        return None

    @functools.cached_property
    def functions(self) -> ctypes.CDLL:
        """What the library, which loads, exports beside its ops."""
        return ctypes.CDLL(str(self.path))

    def op(self, name: str) -> Callable[..., Any]:
        """The dispatcher op of that name: "layer_norm_fwd"."""
        return kernel_ops.op(self.namespace, name)

    def op_in_place(self, name: str, changed: tuple[int, ...]) -> Callable[..., Any]:
        """The dispatcher op, and then a word to autograd that the lists ``changed`` have; the library cannot say it."""
        run = self.op(name)

        def run_and_tell(*args: Any) -> Any:
            result = run(*args)
            if not torch.compiler.is_compiling():
                for at in changed:
                    torch.autograd.graph.increment_version(args[at])
            return result

        return run_and_tell


cpu = Library("cpu", "fastgpt_cpp", "C++")
cuda = Library("cuda", "fastgpt_cuda", "CUDA")


@functools.cache
def cpp_missing() -> str | None:
    """Load the library for CPU tensors; why it is not there, or None."""
    return cpu.not_built() or cpu.load() or isa_error()


def isa() -> str:
    """The instruction set whose kernels run here: "baseline", "avx2", "avx512" or "avx512_bf16"."""
    return _text(cpu.functions.fastgpt_isa) or ""


def isa_error() -> str | None:
    """What is wrong with FASTGPT_CPU_ISA, where the library is there, or None."""
    if not cpu.path.exists():
        return None
    wrong = _text(cpu.functions.fastgpt_isa_error)
    return f"{wrong}, got {os.environ.get('FASTGPT_CPU_ISA')!r}" if wrong else None


@functools.cache
def cuda_missing() -> str | None:
    """Load the library for GPU tensors; why it is not there, or None.

    Whether a GPU that is there can run it says ``gpu_error``, which has to ask it.
    """
    reason = cuda.not_built()
    if reason is not None:
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    # Counted by NVML, as torch.cuda.is_available() does not by default: a process that had initialised CUDA could not
    # fork others that use it, nor choose GPUs by CUDA_VISIBLE_DEVICES any more, and importing fastgpt gets here.
    return cuda.load() or ("torch sees no GPU" if torch.cuda.device_count() == 0 else None)


def gpu_error(index: int = 0) -> str | None:
    """Why that GPU cannot run the library, which is there, or None. Initialises CUDA."""
    return _gpu_error(index)


# torch.compile would trace through a cache alone. This is all that torch.compiler.assume_constant_result does, and that
# takes two seconds to import what compiles.
gpu_error._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _gpu_error(index: int) -> str | None:
    capability = torch.cuda.get_device_capability(index)
    this = f"this is a {torch.cuda.get_device_name(index)} ({'.'.join(map(str, capability))})"
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or later, and {this}"
    with torch.cuda.device(index):  # which makes no context on the GPU that was current before
        error = _text(cuda.functions.fastgpt_cuda_error)
    return f"CUDA cannot run its kernels ({error}), and {this}" if error else None


def _text(function: Any) -> str | None:
    function.restype = ctypes.c_char_p
    text = function()
    return None if text is None else text.decode()
