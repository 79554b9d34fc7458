from __future__ import annotations

import philox
import pytest
import torch
import torch.nn.functional as F
from error_rule import BACKENDS, DEVICE, check, check_reference, sample
from torch import Tensor

from fastgpt import ops

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def peer(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dropped = x
    if dropout_p > 0:
        dropped = torch.where(philox.elementwise_mask(tuple(x.shape), dropout_p, seed), x, 0.0) / (1 - dropout_p)
    total = dropped + residual
    if weight.dtype == total.dtype:
        y = F.layer_norm(total, x.shape[-1:], weight, bias, eps)
    else:
        bias = bias if bias is None else bias.float()
        y = F.layer_norm(total.float(), x.shape[-1:], weight.float(), bias, eps)
    return y.to(x.dtype), total


def stream_inputs(
    *shape: int,
    dtype: torch.dtype = F32,
    residual_dtype: torch.dtype | None = None,
    param_dtype: torch.dtype | None = None,
    bias: bool = True,
    mean: float = 0.5,
) -> dict[str, Tensor]:
    inputs = {
        "x": sample(*shape, dtype=dtype, mean=mean),
        "residual": sample(*shape, dtype=residual_dtype or dtype, mean=mean),
        "weight": sample(shape[-1], dtype=param_dtype or dtype, mean=1.0),
    }
    return {**inputs, "bias": sample(shape[-1], dtype=param_dtype or dtype)} if bias else inputs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("shape", "dtype", "residual_dtype", "param_dtype", "bias", "mean"),
    [
        ((1,), F32, None, None, True, 0.5),
        ((4, 1), BF16, F32, F32, True, 0.5),
        ((8, 8), F16, F32, F32, False, 0.5),
        ((3, 5, 63), F32, None, None, False, 8.0),
        ((2, 3, 64), BF16, None, None, True, 0.5),
        ((7, 65), F16, None, F32, True, 0.5),
        ((6, 257), BF16, F32, None, True, 0.5),
        ((5, 96), F32, BF16, None, True, 0.5),
        ((5, 134), BF16, F16, None, True, 0.5),
        ((3, 1031), BF16, None, F32, True, 0.5),
        ((33, 96), F32, None, None, True, 0.5),
        ((9, 128), BF16, F32, F32, True, 4.0),
        ((0, 32), BF16, F32, F32, True, 0.5),
    ],
)
def test_obeys_the_error_rule(
    backend: str,
    dropout_p: float,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    param_dtype: torch.dtype | None,
    bias: bool,
    mean: float,
) -> None:
    inputs = stream_inputs(
        *shape, dtype=dtype, residual_dtype=residual_dtype, param_dtype=param_dtype, bias=bias, mean=mean
    )
    seed = torch.tensor([1234567890123], device=DEVICE) if dropout_p else None
    check(ops.add_layer_norm, backend, peer, inputs, dropout_p=dropout_p, seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, F16])
def test_reads_strided_inputs(backend: str, dtype: torch.dtype) -> None:
    inputs = stream_inputs(6, 2, 65, dtype=dtype)
    inputs["x"] = sample(2, 6, 130, dtype=dtype)[..., ::2].transpose(0, 1)
    inputs["residual"] = sample(65, 2, 6, dtype=dtype).permute(2, 1, 0)
    check(ops.add_layer_norm, backend, peer, inputs, dropout_p=0.4, seed=torch.tensor([-5], device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [0, 1], ids=["y", "residual_out"])
def test_either_output_may_be_left_unused(backend: str, used: int) -> None:
    """The last norm of the model drops its residual_out, and autograd then hands no gradient for it."""

    def one_of(backend: str, **inputs: Tensor) -> Tensor:
        return ops.add_layer_norm(**inputs, backend=backend)[used]

    inputs = {name: x.requires_grad_() for name, x in stream_inputs(4, 24).items()}
    one_of(backend, **inputs).square().sum().backward()
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    peer(**wide)[used].square().sum().backward()
    for name in ("x", "residual") if used else inputs:
        torch.testing.assert_close(inputs[name].grad.double(), wide[name].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_dropout_then_addition_then_layer_norm(backend: str) -> None:
    inputs, seed = stream_inputs(7, 33), torch.tensor([99], device=DEVICE)
    y, residual_out = ops.add_layer_norm(**inputs, dropout_p=0.25, seed=seed, backend=backend)
    total = ops.dropout(inputs["x"], 0.25, seed=seed, backend=backend) + inputs["residual"]
    torch.testing.assert_close(residual_out, total, rtol=1e-6, atol=1e-6)
    wanted = ops.layer_norm(total, inputs["weight"], inputs["bias"], backend=backend)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton", "cpp", "cuda"])
def test_normalises_the_sum_before_it_is_rounded(backend: str) -> None:
    """What x adds to such a stream is lost in fp16, but not before it has been normalised.

    The torch backend puts PyTorch's addition, which rounds, before PyTorch's norm.
    """
    x = sample(3, 70, dtype=F16, mean=0.0, std=0.2).clamp(-0.9, 0.9)
    ones = torch.ones(70, dtype=F16, device=DEVICE)
    y, residual_out = ops.add_layer_norm(x, torch.full_like(x, 2048 + 2), ones, backend=backend)
    assert (residual_out == 2050).all()
    torch.testing.assert_close(y.float(), F.layer_norm(x.float(), (70,)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp", "cuda"])
def test_rows_that_are_constant_once_rounded_say_nothing_of_the_weight(backend: str) -> None:
    """The backward has the rounded rows, whose mean is not that of the sum: 2048, not 2048.3."""
    weight = sample(70, dtype=F16, mean=1.0).requires_grad_()
    x, residual = (torch.full((3, 70), value, dtype=F16, device=DEVICE) for value in (0.3, 2048))
    y, _ = ops.add_layer_norm(x, residual, weight, backend=backend)
    y.backward(sample(3, 70, dtype=F16))
    torch.testing.assert_close(weight.grad, torch.zeros_like(weight), rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_cpp_gives_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    inputs = stream_inputs(2048, 258, dtype=dtype)
    upstream = sample(2048, 258, dtype=dtype), sample(2048, 258, dtype=dtype)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        seed = torch.tensor([7], device=DEVICE)
        outputs = ops.add_layer_norm(**leaves, dropout_p=0.2, seed=seed, backend="cpp")
        torch.autograd.backward(outputs, upstream)
        results.append([*outputs, *(x.grad for x in leaves.values())])
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@pytest.mark.parametrize("shape", [(1,), (3, 5, 63), (7, 64), (0, 32)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_reference_is_pytorch_in_float64(shape: tuple[int, ...], dropout_p: float) -> None:
    seed = torch.tensor([42], device=DEVICE) if dropout_p else None
    check_reference(ops.add_layer_norm, peer, stream_inputs(*shape), dropout_p=dropout_p, seed=seed)
