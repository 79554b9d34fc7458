from __future__ import annotations

import math

import pytest
import torch
from error_rule import BACKENDS, DEVICE, check_in_place, sample
from torch import Tensor

from fastgpt import ops

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

SIZES = [(1,), (3, 5), (65,), (64, 33), (), (2, 3, 4), (0, 4)]


def peer(grads: list[Tensor], max_norm: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ in fp32 (or float64), rounded to the gradients' own dtype."""
    params = [torch.nn.Parameter(torch.zeros_like(g, dtype=torch.promote_types(g.dtype, F32))) for g in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.to(param.dtype, copy=True)
    total = torch.nn.utils.clip_grad_norm_(params, max_norm)
    for param, grad in zip(params, grads, strict=True):
        grad.copy_(param.grad)
    return total


def gradients(dtype: torch.dtype = F32, sizes: list[tuple[int, ...]] = SIZES) -> list[Tensor]:
    return [sample(*size, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 17, 1e4])
def test_obeys_the_error_rule(backend: str, dtype: torch.dtype, max_norm: float) -> None:
    check_in_place(ops.clip_grad_norm_, backend, peer, {"grads": gradients(dtype)}, max_norm=max_norm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_gradients_of_several_dtypes(backend: str) -> None:
    grads = [sample(9, 7), sample(65, dtype=BF16), sample(33, dtype=F16)]
    check_in_place(ops.clip_grad_norm_, backend, peer, {"grads": grads}, max_norm=2.0)
    ops.clip_grad_norm_(grads, 2.0, backend=backend)
    assert [grad.dtype for grad in grads] == [F32, BF16, F16]


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_one_gradient_and_many(backend: str) -> None:
    for sizes in ([(7,)], [(3,)] * 300):
        check_in_place(ops.clip_grad_norm_, backend, peer, {"grads": gradients(sizes=sizes)}, max_norm=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("max_norm", [60.0, 1e6, math.inf])
def test_gradients_below_the_limit_stay_as_they_are(backend: str, dtype: torch.dtype, max_norm: float) -> None:
    grads = gradients(dtype)
    before = [grad.clone() for grad in grads]
    total = ops.clip_grad_norm_(grads, max_norm, backend=backend)
    assert total < 60
    for grad, old in zip(grads, before, strict=True):
        assert torch.equal(grad, old)


@pytest.mark.parametrize("backend", BACKENDS)
def test_returns_the_norm_before_clipping_and_leaves_the_limit(backend: str) -> None:
    grads = [torch.tensor([3.0], device=DEVICE), torch.tensor([[0.0, 4.0]], device=DEVICE)]
    total = ops.clip_grad_norm_(grads, 2.5, backend=backend)
    assert total.shape == ()
    assert total.dtype == F32
    assert total.item() == 5.0
    assert grads[0].tolist() == pytest.approx([1.5], rel=1e-6)
    assert grads[1].tolist() == [[0.0, pytest.approx(2.0, rel=1e-6)]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_squares_of_fp16_do_not_overflow(backend: str) -> None:
    grads = [torch.full((1000,), 1000.0, device=DEVICE, dtype=F16)]
    assert ops.clip_grad_norm_(grads, 1.0, backend=backend).item() == pytest.approx(1000 * math.sqrt(1000), rel=1e-6)
    assert grads[0].float().norm().item() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_gradients_stay_zero(backend: str) -> None:
    grads = [torch.zeros(4, device=DEVICE)]
    assert ops.clip_grad_norm_(grads, 1.0, backend=backend) == 0
    assert (grads[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_afterwards(backend: str, bad: float) -> None:
    grads = [torch.tensor([1.0, bad], device=DEVICE), torch.ones(3, device=DEVICE)]
    total = ops.clip_grad_norm_(grads, 1.0, backend=backend)
    assert not total.isfinite()
    assert not all(grad.isfinite().all() for grad in grads)
    assert all(((grad == 0) | grad.isnan()).all() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scales_strided_gradients_in_place(backend: str) -> None:
    wide = sample(6, 10)
    before = wide.clone()
    ops.clip_grad_norm_([wide[:, ::2], sample(5, 3).t()], 1e-3, backend=backend)
    assert torch.equal(wide[:, 1::2], before[:, 1::2])
    assert (wide[:, ::2].abs() < before[:, ::2].abs()).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tells_autograd_what_it_changed(backend: str) -> None:
    grad = sample(5)
    before = grad._version
    ops.clip_grad_norm_([grad], 0.1, backend=backend)
    assert grad._version > before


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("max_norm", [1.0, 1e4])
def test_cuda_cuts_large_tensors_into_blocks(dtype: torch.dtype, max_norm: float) -> None:
    sizes = [(3, 8192), (0,), (8191,), (8193,), (5,), (), (0, 2), (50_001,), (0,)]
    check_in_place(ops.clip_grad_norm_, "cuda", peer, {"grads": gradients(dtype, sizes)}, max_norm=max_norm)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_gradients_have_no_norm(backend: str) -> None:
    assert (
        ops.clip_grad_norm_([torch.ones(0, device=DEVICE), torch.ones(3, 0, device=DEVICE)], 1.0, backend=backend) == 0
    )


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_cpp_gives_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    sizes = [(3, 8192), (0,), (8191,), (8193,), (5,), (), (0, 2), (50_001,), (0,)]
    grads = gradients(dtype, sizes)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        copies = [grad.clone() for grad in grads]
        results.append([ops.clip_grad_norm_(copies, 1.0, backend="cpp"), *copies])
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))
    check_in_place(ops.clip_grad_norm_, "cpp", peer, {"grads": grads}, max_norm=1.0)


@pytest.mark.parametrize("backend", ["cpp", "cuda"])
def test_refuses_to_change_memory_twice(backend: str) -> None:
    memory = sample(30)
    for grads in ([memory, memory], [memory[:16], memory[15:]], [memory[:1].expand(4)]):
        before = memory.clone()
        with pytest.raises(RuntimeError, match=r"clip_grad_norm_: .* must not overlap"):
            ops.clip_grad_norm_(grads, 1e-3, backend=backend)
        assert torch.equal(memory, before)


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_reference_is_pytorch_in_float64(max_norm: float) -> None:
    grads = gradients(F64)
    wanted = [grad.clone() for grad in grads]
    total, wanted_total = ops.clip_grad_norm_(grads, max_norm, backend="reference"), peer(wanted, max_norm)
    torch.testing.assert_close(total, wanted_total, rtol=1e-12, atol=0)
    for grad, clipped in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, clipped, rtol=1e-12, atol=0)
