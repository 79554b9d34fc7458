from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from error_rule import BACKENDS, DEVICE, check, check_reference, sample
from torch import Tensor

from fastgpt import ops

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def peer(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate=approximate).to(x.dtype)


def gelu_inputs(*shape: int, dtype: torch.dtype = F32, bias_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    inputs = {"x": sample(*shape, dtype=dtype, std=2.0)}
    return inputs if bias_dtype is None else {**inputs, "bias": sample(shape[-1], dtype=bias_dtype)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(
    ("shape", "dtype", "bias_dtype"),
    [
        ((1,), F32, F32),
        ((4, 1), BF16, F32),
        ((3, 5, 63), F32, None),
        ((2, 3, 64), BF16, BF16),
        ((7, 65), F16, F16),
        ((6, 257), F32, F32),
        ((6, 257), F16, F32),
        ((130, 72), BF16, F32),
        ((5, 8), F16, None),
        ((0, 32), F32, F32),
        ((3, 0), BF16, F32),
    ],
)
def test_obeys_the_error_rule(
    backend: str, approximate: str, shape: tuple[int, ...], dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> None:
    check(ops.gelu, backend, peer, gelu_inputs(*shape, dtype=dtype, bias_dtype=bias_dtype), approximate=approximate)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_reads_strided_inputs(backend: str, dtype: torch.dtype) -> None:
    bias = sample(66, dtype=dtype)[::2]
    for x in (
        sample(33, 10, dtype=dtype).t(),
        sample(10, 66, dtype=dtype)[:, ::2],
        sample(33, dtype=dtype).expand(4, 33),
    ):
        check(ops.gelu, backend, peer, {"x": x, "bias": bias})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_far_from_zero_it_is_the_identity_or_zero(backend: str, approximate: str) -> None:
    x = torch.tensor([1e4, -1e4, 1e30, -1e30, 0.0], device=DEVICE, requires_grad=True)
    y = ops.gelu(x, approximate=approximate, backend=backend)
    y.sum().backward()
    assert y.tolist() == [x[0].item(), 0, x[2].item(), 0, 0]
    torch.testing.assert_close(x.grad[[0, 1, 4]].cpu(), torch.tensor([1.0, 0.0, 0.5]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_nan_stays_nan(backend: str, dtype: torch.dtype, approximate: str) -> None:
    x = torch.tensor([1.0, float("nan"), -1.0], device=DEVICE, dtype=dtype, requires_grad=True)
    y = ops.gelu(x, approximate=approximate, backend=backend)
    y.sum().backward()
    assert y.isnan().tolist() == [False, True, False]
    assert x.grad.isnan().tolist() == [False, True, False]


def test_the_two_approximations_differ() -> None:
    x = torch.tensor([2.0], dtype=torch.float64)
    exact, tanh = (ops.gelu(x, approximate=name, backend="reference").item() for name in ("none", "tanh"))
    assert exact == pytest.approx(1.9544997361036416, abs=1e-15)
    assert tanh == pytest.approx(1.9545976940877752, abs=1e-12)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias_dtype", [None, F32], ids=["no bias", "bias"])
def test_reference_is_pytorch_in_float64(approximate: str, bias_dtype: torch.dtype | None) -> None:
    check_reference(ops.gelu, peer, gelu_inputs(7, 63, bias_dtype=bias_dtype), approximate=approximate)
