"""The elementary functions of csrc/cpu/math.h, held to float64 in units of the last place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgpt import extension

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

# The bounds that math.h states.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "exp": (torch.exp, 1.2),
    "log": (torch.log, 1.3),
    "tanh": (torch.tanh, 2.8),
    "erf": (torch.erf, 1.7),
}
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
ABSENT = 77  # exit status of a process whose instruction set is not there

_library = torch.library.Library(extension.NAMESPACE, "FRAGMENT")
_library.define("math(Tensor x, str name) -> Tensor")


def worst_error(name: str, x: Tensor) -> float:
    """The largest error over ``x``, in units of the last place; infinity where a special value is wrong."""
    true = FUNCTIONS[name][0](x.double())
    got = extension.op("math")(x, name)
    # Beyond fp32, what the true result rounds to is the only right one, and so are NaN, infinities and zeros.
    nearest = true.float()
    exact = ~nearest.isfinite() | (true == 0)
    if not torch.equal(got[exact].nan_to_num(nan=1.5), nearest[exact].nan_to_num(nan=1.5)):
        return float("inf")
    # The power of two below a float64 is its exponent's bits alone. fp32's last place is 23 below, and at least 2^-149.
    exponent = (true.view(torch.int64) & (0x7FF << 52)).sub_(23 << 52).clamp_(min=(1023 - 149) << 52)
    error = got.double().sub_(true).div_(exponent.view(torch.float64)).masked_fill_(exact, 0.0)
    return float(error.abs_().nan_to_num_(nan=torch.inf).max())


def every(step: int, start: int, stop: int) -> Tensor:
    """The floats of every ``step``-th bit pattern."""
    return torch.arange(start, stop, step, dtype=torch.int64).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_as_close_as_it_says(name: str) -> None:
    worst = max(worst_error(name, every(2039, start, start + 2**30)) for start in range(0, 2**32, 2**30))
    assert worst <= FUNCTIONS[name][1], f"off by {worst:.3f} units of the last place"


@pytest.mark.full
@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_as_close_as_it_says_for_every_third_float(name: str) -> None:
    chunk = 3 * 2**16  # whose float64 temporaries stay in the L2 cache
    worst = max(worst_error(name, every(3, start, min(start + chunk, 2**32))) for start in range(0, 2**32, chunk))
    assert worst <= FUNCTIONS[name][1], f"off by {worst:.3f} units of the last place"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(name: str) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, 1.0, inf, -inf, nan, 1e-42, 3e38, -3e38])
    wanted = FUNCTIONS[name][0](x.double()).float()
    got = extension.op("math")(x, name)
    torch.testing.assert_close(got, wanted, rtol=3e-7, atol=0, equal_nan=True)
    exact = [0, 1, 3, 4, 7, 8] if name != "log" else [0, 1, 2, 3]
    assert [repr(v) for v in got[exact].tolist()] == [repr(v) for v in wanted[exact].tolist()], (
        "signs of zeros count too"
    )


@pytest.mark.parametrize("isa", ISAS)
def test_on_every_instruction_set(isa: str) -> None:
    """What the processor has is chosen once a process, so each gets one."""
    done = subprocess.run(
        [sys.executable, "-c", "import test_cpp_math; test_cpp_math.run_alone()"],
        env={**os.environ, "FASTGPT_CPU_ISA": isa},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    if done.returncode == ABSENT:
        pytest.skip(f"this processor or this build has no {isa}")
    assert done.returncode == 0, done.stderr


def run_alone() -> None:
    """The quick tests, without pytest."""
    if extension.missing() is not None:
        raise SystemExit(ABSENT)
    torch.set_num_threads(1)
    for name in FUNCTIONS:
        test_special_values(name)
        test_is_as_close_as_it_says(name)
