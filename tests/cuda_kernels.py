"""The kernels of tests/emulator, compiled: for the emulator, or, where there is a GPU, by nvcc."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastgpt import emulator

FOLDER = Path(__file__).parent / "emulator"


@functools.cache
def load() -> ModuleType:
    """``prim(name, in, out, n)`` and, in the emulator, ``fault(name, planted, data)``; the numbers are addresses."""
    if not torch.cuda.is_available():
        sources = [FOLDER / name for name in ("faults.cu", "prims.cu", "prims_sm90.cu", "module.cpp")]
        return emulator.build("fastgpt_emulator_tests", sources, [str(emulator.load().__file__)])
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None or shutil.which("ninja") is None:
        pytest.skip("nvcc and ninja build the kernels of tests/emulator")
    return cpp_extension.load(
        name="fastgpt_prims",
        sources=[str(FOLDER / name) for name in ("prims.cu", "module.cpp")],
        with_cuda=True,
    )
