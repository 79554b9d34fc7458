from __future__ import annotations

import pytest
import torch
from error_rule import BACKENDS, DEVICE, check, check_reference, sample
from torch import Tensor

from fastgpt import ops

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def peer(x: Tensor, scale: float = 1.0, is_causal: bool = False) -> Tensor:
    if not is_causal:
        return torch.softmax(x * scale, -1)
    queries, keys = x.shape[-2:]
    blind = max(0, queries - keys)  # the rows at the top that see no column
    sighted = x[..., blind:, :] * scale
    visible = torch.ones(queries - blind, keys, dtype=torch.bool, device=x.device).tril(keys - (queries - blind))
    y = torch.softmax(sighted.masked_fill(~visible, -torch.inf), -1)
    return torch.cat([torch.zeros_like(x[..., :blind, :]), y], -2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "dtype", "scale", "is_causal"),
    [
        ((1,), F32, 1.0, False),
        ((5, 1), BF16, 3.0, False),
        ((3, 65), F32, 0.125, False),
        ((2, 3, 64), F16, 1.0, False),
        ((4, 257), BF16, 0.3, False),
        ((2, 5000), F32, 1.0, False),
        ((2, 70001), BF16, 0.5, False),
        ((1, 1), F32, 1.0, True),
        ((2, 3, 8, 8), BF16, 0.25, True),
        ((2, 2, 63, 63), F32, 0.125, True),
        ((3, 65, 65), F16, 0.2, True),
        ((2, 5, 64), F32, 0.125, True),
        ((64, 5), F32, 1.5, True),
        ((2, 9, 3), BF16, 1.0, True),
        ((0, 7), F32, 1.0, False),
        ((3, 0), F32, 1.0, False),
        ((2, 0, 4, 4), BF16, 1.0, True),
        ((2, 4, 0), F32, 1.0, True),
    ],
)
def test_obeys_the_error_rule(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float, is_causal: bool
) -> None:
    x = sample(*shape, dtype=dtype, mean=1.0, std=2.0)
    check(ops.softmax, backend, peer, {"x": x}, scale=scale, is_causal=is_causal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_reads_strided_inputs(backend: str, is_causal: bool) -> None:
    for x in (sample(3, 66, 33).mT, sample(3, 20, 20, 2)[..., 0], sample(9, 40)[:, ::3], sample(9).expand(9, 9)):
        check(ops.softmax, backend, peer, {"x": x}, scale=0.5, is_causal=is_causal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_rows_that_see_no_column_are_zero_with_zero_gradients(backend: str, dtype: torch.dtype) -> None:
    x = sample(2, 7, 3, dtype=dtype).requires_grad_()
    y = ops.softmax(x, is_causal=True, backend=backend)
    y.backward(sample(2, 7, 3, dtype=dtype))
    assert (y[:, :4] == 0).all()
    assert (x.grad[:, :4] == 0).all()
    assert (y[:, 4, 0] == 1).all()
    assert (y[:, 4, 1:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_inputs_do_not_overflow(backend: str) -> None:
    y = ops.softmax(torch.tensor([[3e38, 3e38, -3e38], [-1e30, -1e30, -1e30]], device=DEVICE), backend=backend)
    torch.testing.assert_close(y.cpu(), torch.tensor([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_is_a_probability_of_zero(backend: str) -> None:
    x = torch.tensor([[0.0, -torch.inf, 0.0]], device=DEVICE, requires_grad=True)
    y = ops.softmax(x, backend=backend)
    y.backward(torch.tensor([[1.0, 2.0, 3.0]], device=DEVICE))
    assert y.tolist() == [[0.5, 0.0, 0.5]]
    torch.testing.assert_close(x.grad.cpu(), torch.tensor([[-0.5, 0.0, 0.5]]))


@pytest.mark.parametrize(("shape", "is_causal"), [((1,), False), ((3, 65), False), ((2, 9, 9), True), ((7, 3), True)])
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_reference_is_pytorch_in_float64(shape: tuple[int, ...], is_causal: bool, scale: float) -> None:
    check_reference(ops.softmax, peer, {"x": sample(*shape, std=3.0)}, scale=scale, is_causal=is_causal)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_does_not_overflow_half_precision(backend: str) -> None:
    x = torch.tensor([[60000.0, 50000.0, 1.0]], dtype=torch.float16, device=DEVICE)
    assert ops.softmax(x, scale=4.0, backend=backend).tolist() == [[1.0, 0.0, 0.0]]
