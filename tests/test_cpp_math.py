"""The elementary functions of csrc/cpu/math.h, held to float64 in units of the last place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastgpt import extension

pytestmark = pytest.mark.skipif(extension.cpp_missing() is not None, reason=str(extension.cpp_missing()))

# The bounds that math.h states.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "exp": (torch.exp, 1.2),
    "log": (torch.log, 1.3),
    "tanh": (torch.tanh, 2.8),
    "erf": (torch.erf, 1.7),
}

_library = torch.library.Library(extension.cpu.namespace, "FRAGMENT")
_library.define("math(Tensor x, str name) -> Tensor")


def worst_error(name: str, x: Tensor) -> float:
    """The largest error over ``x``, in units of the last place; infinity where a special value is wrong."""
    true = FUNCTIONS[name][0](x.double())
    got = extension.cpu.op("math")(x, name)
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
def test_is_as_close_as_it_says_for_many_more(name: str) -> None:
    # 70 million. All 2^32 are too much for glibc: it keeps 8 bytes of each element of so many temporaries.
    chunk = 61 * 2**16
    worst = max(worst_error(name, every(61, start, min(start + chunk, 2**32))) for start in range(0, 2**32, chunk))
    assert worst <= FUNCTIONS[name][1], f"off by {worst:.3f} units of the last place"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(name: str) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, 1.0, inf, -inf, nan, 1e-42, 3e38, -3e38])
    wanted = FUNCTIONS[name][0](x.double()).float()
    got = extension.cpu.op("math")(x, name)
    torch.testing.assert_close(got, wanted, rtol=3e-7, atol=0, equal_nan=True)
    exact = [0, 1, 3, 4, 7, 8] if name != "log" else [0, 1, 2, 3]
    assert [repr(v) for v in got[exact].tolist()] == [repr(v) for v in wanted[exact].tolist()], (
        "signs of zeros count too"
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_bits_do_not_depend_on_the_place(name: str) -> None:
    """Threads cut a tensor anywhere: an element may be in a whole vector or in the rest beyond the last one."""
    x = torch.cat([torch.randn(500).abs(), torch.randn(500) * 20])
    whole = extension.cpu.op("math")(x, name)
    alone = torch.cat([extension.cpu.op("math")(one, name) for one in x.split(1)])
    assert torch.equal(whole.view(torch.int32), alone.view(torch.int32))
