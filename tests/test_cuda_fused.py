"""nvcc makes one rounding of a product and an addition; the emulator's compiler does not unless it is asked to."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, whose compiler fuses them anyway"),
]


def has_fused_multiply_add() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return platform.machine() == "x86_64" and cpuinfo.exists() and " fma " in cpuinfo.read_text()


def test_kernels_obey_the_error_rule_where_products_are_fused() -> None:
    """What is nothing but for rounding must be nothing then too: the gradient of a row of one element, say."""
    if not has_fused_multiply_add():
        pytest.skip("needs a processor with FMA")
    environment = {**os.environ, "FASTGPT_EMULATE_CFLAGS": "-mfma -ffp-contract=fast", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(TESTS)]
    command += ["-k", "cuda and (obeys or constant or no_key or padding)"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
