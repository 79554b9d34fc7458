"""The one product that is not PyTorch's: a row on the cpp backend's kernel, and when it is taken."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from error_rule import sample
from torch import Tensor
from torch.nn import Parameter

from fastgpt import extension, ops, use_backend
from fastgpt.benchmarks.errors import absolute_error, allowed_error, largest

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(extension.cpp_missing() is not None, reason=str(extension.cpp_missing())),
]

Scope = AbstractContextManager[Any]

linear_row = extension.cpu.op("linear_row")


def parameter(*shape: int) -> Parameter:
    return Parameter(sample(*shape, dtype=torch.float32))


def hold_to_the_error_rule(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    true = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    peer_error = absolute_error(F.linear(x, weight, bias), true)
    got = linear_row(x, weight, bias)
    assert got.shape == true.shape
    assert got.is_contiguous()
    assert absolute_error(got, true) <= allowed_error(peer_error, largest(true), x.dtype)


@pytest.mark.parametrize("shape", [(384,), (1, 384), (1, 1, 384)], ids=str)
@pytest.mark.parametrize("N", [0, 1, 3, 4, 65, 1536])
def test_cpp_obeys_the_error_rule(shape: tuple[int, ...], N: int) -> None:
    with torch.no_grad():
        hold_to_the_error_rule(sample(*shape), parameter(N, 384), parameter(N))


@pytest.mark.parametrize("K", [1, 7, 8, 15, 31, 33, 47, 63, 1000])
def test_cpp_reads_rows_of_any_length_and_nothing_beyond(K: int) -> None:
    memory = torch.full((9, K + 1), torch.nan)
    with torch.no_grad():
        x = torch.full((K + 1,), torch.nan)[1:].copy_(sample(K))  # not aligned
        hold_to_the_error_rule(x, memory[:, :K].copy_(sample(9, K)), None)


def test_cpp_takes_any_strides() -> None:
    with torch.no_grad():
        x, weight, bias = sample(2 * 40)[::2], sample(40, 30).t(), sample(2 * 30)[::2]
        assert torch.equal(linear_row(x, weight, bias), linear_row(*(t.contiguous() for t in (x, weight, bias))))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_cpp_gives_the_same_bits_on_any_number_of_threads(threads: Callable[[int], None]) -> None:
    x, weight, bias = sample(384), sample(1001, 384), sample(1001)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(linear_row(x, weight, bias))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_opcheck_of_cpp() -> None:
    for bias in (sample(5), None):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(linear_row, (sample(1, 1, 12), sample(5, 12), bias), test_utils=checks)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: linear_row(sample(2, 8), sample(5, 8), None),
        lambda: linear_row(sample(7), sample(5, 8), None),
        lambda: linear_row(sample(8), sample(5, 8), sample(4)),
        lambda: linear_row(sample(8), sample(5, 8).bfloat16(), None),
        lambda: linear_row(sample(8).bfloat16(), sample(5, 8), None),
    ],
)
def test_the_kernel_of_cpp_keeps_inside_its_memory(wrong: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"must (be|have)"):
        wrong()


# When it is taken


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The rows that reach the kernel."""
    taken: list[Tensor] = []

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        taken.append(x)
        return linear_row(x, weight, bias)

    monkeypatch.setattr(sys.modules[ops.linear.__module__], "_linear_row", noted)
    return taken


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("bias", [True, False])
def test_cpp_multiplies_one_row(rows: list[Tensor], mode: Callable[[], Scope], bias: bool) -> None:
    x, weight, b = sample(1, 1, 24), parameter(10, 24), parameter(10) if bias else None
    with mode(), use_backend("cpp"):
        torch.testing.assert_close(ops.linear(x, weight, b), F.linear(x, weight, b))
    assert len(rows) == 1


X, WEIGHT = torch.ones(1, 24), Parameter(torch.ones(10, 24))


@pytest.mark.parametrize(
    ("x", "weight", "scope"),
    [
        (X.expand(2, 24), WEIGHT, nullcontext),
        (X[:0], WEIGHT, nullcontext),
        (X.double(), Parameter(WEIGHT.double()), nullcontext),
        (X.bfloat16(), Parameter(WEIGHT.bfloat16()), nullcontext),
        (X, WEIGHT.detach(), nullcontext),
        (X, WEIGHT, torch.enable_grad),
        (X, WEIGHT, lambda: torch.autocast("cpu", torch.bfloat16)),
        (X, WEIGHT, torch.autograd.forward_ad.dual_level),
        (X, WEIGHT, lambda: use_backend("torch")),
        (X, WEIGHT, lambda: use_backend(attention="torch")),
        (X.to("meta"), Parameter(WEIGHT.to("meta")), nullcontext),
    ],
)
def test_everything_else_is_pytorchs(rows: list[Tensor], x: Tensor, weight: Tensor, scope: Callable[[], Scope]) -> None:
    with torch.no_grad(), use_backend("cpp"), scope():
        got, wanted = ops.linear(x, weight), F.linear(x, weight)
    assert not rows
    assert (got.dtype, got.shape, got.requires_grad) == (wanted.dtype, wanted.shape, wanted.requires_grad)


def test_transforms_of_torch_func_go_through(rows: list[Tensor]) -> None:
    with torch.no_grad(), use_backend("cpp"):
        got = torch.func.vmap(lambda x: ops.linear(x, WEIGHT))(torch.ones(3, 24))
        _, tangent = torch.func.jvp(lambda x: ops.linear(x, WEIGHT), (X,), (X,))
    assert not rows
    assert got.tolist() == [[24.0] * 10] * 3
    assert tangent.tolist() == [[24.0] * 10]


def test_a_compiler_sees_pytorchs_product(rows: list[Tensor]) -> None:
    torch._dynamo.reset()
    with torch.no_grad(), use_backend("cpp"):
        got = torch.compile(lambda x: ops.linear(x, WEIGHT), fullgraph=True, backend="aot_eager")(X)
    torch._dynamo.reset()
    assert not rows
    assert got.tolist() == [[24.0] * 10]
