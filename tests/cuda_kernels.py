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


def has_hopper() -> bool:
    """Whether the GPU knows the primitives of prims_sm90.cuh."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@functools.cache
def load() -> ModuleType:
    """``prim(name, in, out, n)``, on Hopper and in the emulator ``prim_sm90(name, in, out, n)``, and in the emulator
    ``fault(name, planted, data)``; the numbers are addresses."""
    if not torch.cuda.is_available():
        sources = [FOLDER / name for name in ("faults.cu", "prims.cu", "prims_sm90.cu", "module.cpp")]
        return emulator.build("fastgpt_emulator_tests", sources, [str(emulator.runtime().__file__)])
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None or shutil.which("ninja") is None:
        pytest.skip("nvcc and ninja build the kernels of tests/emulator")
    hopper = ("prims_sm90.cu",) if has_hopper() else ()
    return cpp_extension.load(
        name="fastgpt_prims",
        sources=[str(FOLDER / name) for name in ("prims.cu", "module.cpp", *hopper)],
        extra_cflags=["-DFASTGPT_SM90"] if hopper else [],
        extra_cuda_cflags=["-gencode=arch=compute_90a,code=sm_90a"] if hopper else [],
        with_cuda=True,
    )
