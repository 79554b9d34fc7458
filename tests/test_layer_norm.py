from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from error_rule import BACKENDS, DEVICE, check, check_reference, sample
from torch import Tensor

from fastgpt import ops

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def peer(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    if weight.dtype == x.dtype:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def norm_inputs(
    *shape: int, dtype: torch.dtype = F32, param_dtype: torch.dtype | None = None, bias: bool = True, mean: float = 0.5
) -> dict[str, Tensor]:
    parameters = {"dtype": param_dtype or dtype}
    inputs = {"x": sample(*shape, dtype=dtype, mean=mean), "weight": sample(shape[-1], mean=1.0, **parameters)}
    return {**inputs, "bias": sample(shape[-1], **parameters)} if bias else inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "dtype", "param_dtype", "bias", "mean"),
    [
        ((1,), F32, None, True, 0.5),
        ((4, 1), BF16, None, True, 0.5),
        ((8, 8), F16, F32, False, 0.5),
        ((3, 5, 63), F32, None, False, 0.5),
        ((3, 5, 63), BF16, F32, True, 0.5),
        ((2, 3, 64), F32, None, True, 16.0),
        ((7, 65), F16, None, True, 0.5),
        ((6, 257), BF16, None, False, 0.5),
        ((9, 768), F32, None, True, 100.0),
        ((5, 768), F16, F32, True, 4.0),
        ((300, 96), F32, None, True, 0.5),
        ((33, 400), BF16, F32, True, 0.5),
        ((1, 65537), F32, None, True, 0.5),
        ((0, 32), F32, None, True, 0.5),
        ((2, 0, 32), BF16, F32, True, 0.5),
    ],
)
def test_obeys_the_error_rule(
    backend: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    param_dtype: torch.dtype | None,
    bias: bool,
    mean: float,
) -> None:
    inputs = norm_inputs(*shape, dtype=dtype, param_dtype=param_dtype, bias=bias, mean=mean)
    check(ops.layer_norm, backend, peer, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_reads_strided_inputs(backend: str, dtype: torch.dtype) -> None:
    wide = sample(6, 2, 130, dtype=dtype)
    parameters = norm_inputs(65, dtype=dtype)
    for x in (wide[..., :65], wide[..., ::2], sample(65, 12, dtype=dtype).t(), sample(65, dtype=dtype).expand(4, 65)):
        check(ops.layer_norm, backend, peer, {**parameters, "x": x, "weight": sample(130, dtype=dtype)[::2]})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 0.1])
def test_uses_eps(backend: str, eps: float) -> None:
    check(ops.layer_norm, backend, peer, norm_inputs(5, 64), eps=eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("N", "value"), [(24, 7.0), (1000, 0.1)])
def test_a_constant_row_gives_the_bias(backend: str, N: int, value: float) -> None:
    bias = sample(N)
    y = ops.layer_norm(torch.full((3, N), value, device=DEVICE), sample(N), bias, backend=backend)
    torch.testing.assert_close(y, bias.expand(3, N), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1,), (4, 1), (3, 5, 63), (7, 64), (0, 32)])
@pytest.mark.parametrize("bias", [True, False])
def test_reference_is_pytorch_in_float64(shape: tuple[int, ...], bias: bool) -> None:
    check_reference(ops.layer_norm, peer, norm_inputs(*shape, bias=bias))
