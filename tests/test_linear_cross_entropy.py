from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from error_rule import BACKENDS, DEVICE, check, check_reference, sample
from torch import Tensor

from fastgpt import ops, torch_native

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(params=[*BACKENDS, "torch in blocks"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend, and torch once more with few logits at a time: four rows of 64 classes, one row of 257."""
    if request.param == "torch in blocks":
        monkeypatch.setattr(torch_native, "LOGITS_AT_ONCE", 4 * 64)
        return "torch"
    return request.param


def peer(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    logits = F.linear(x, weight)
    return F.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), targets, ignore_index=ignore_index
    )


def some_targets(rows: int, classes: int, ignore_index: int = -100, ignored: int = 0) -> Tensor:
    targets = torch.randint(classes, (rows,), device=DEVICE)
    targets[torch.randperm(rows)[:ignored]] = ignore_index
    return targets


def head_inputs(rows: int, width: int, classes: int, dtype: torch.dtype = F32) -> dict[str, Tensor]:
    return {
        "x": sample(rows, width, dtype=dtype),
        "weight": sample(classes, width, dtype=dtype, mean=0.05, std=width**-0.5),
    }


@pytest.mark.parametrize(
    ("rows", "width", "classes", "dtype", "ignored", "ignore_index"),
    [
        (1, 1, 1, F32, 0, -100),
        (5, 8, 64, F32, 0, -100),
        (5, 8, 64, BF16, 2, -100),
        (12, 64, 64, F16, 3, -1),
        (13, 63, 65, F32, 6, 7),
        (13, 65, 63, BF16, 0, -100),
        (21, 32, 257, F16, 7, -100),
        (17, 96, 257, BF16, 6, 0),
        (9, 80, 3001, F32, 5, -100),
    ],
)
def test_obeys_the_error_rule(
    backend: str, rows: int, width: int, classes: int, dtype: torch.dtype, ignored: int, ignore_index: int
) -> None:
    inputs, targets = head_inputs(rows, width, classes, dtype), some_targets(rows, classes, ignore_index, ignored)
    check(ops.linear_cross_entropy, backend, peer, inputs, targets=targets, ignore_index=ignore_index)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_reads_strided_inputs(backend: str, dtype: torch.dtype) -> None:
    targets = some_targets(18, 65, ignored=4)[::2]
    inputs = {"x": sample(24, 9, dtype=dtype).t(), "weight": sample(65, 48, dtype=dtype)[:, ::2] / 8}
    check(ops.linear_cross_entropy, backend, peer, inputs, targets=targets)


@pytest.mark.parametrize("upstream", [1.0, -3.0, 65536.0])
def test_gradients_scale_with_the_upstream(backend: str, upstream: float) -> None:
    inputs = {name: x.requires_grad_() for name, x in head_inputs(9, 16, 65).items()}
    targets = some_targets(9, 65, ignored=2)
    (ops.linear_cross_entropy(**inputs, targets=targets, backend=backend) * upstream).backward()
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    peer(**wide, targets=targets).backward()
    for name, x in inputs.items():
        torch.testing.assert_close(x.grad.double() / upstream, wide[name].grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("needed", ["x", "weight"])
def test_makes_the_one_gradient_that_is_needed(backend: str, needed: str) -> None:
    inputs, targets = head_inputs(9, 16, 65), some_targets(9, 65, ignored=2)
    inputs[needed].requires_grad_()
    ops.linear_cross_entropy(**inputs, targets=targets, backend=backend).backward()
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    peer(**wide, targets=targets).backward()
    torch.testing.assert_close(inputs[needed].grad.double(), wide[needed].grad, rtol=1e-5, atol=1e-7)


def test_the_loss_is_the_same_without_gradients(backend: str) -> None:
    inputs, targets = head_inputs(13, 16, 65), some_targets(13, 65, ignored=5)
    plain = ops.linear_cross_entropy(**inputs, targets=targets, backend=backend)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    with torch.no_grad():
        unrecorded = ops.linear_cross_entropy(**inputs, targets=targets, backend=backend)
    recorded = ops.linear_cross_entropy(**inputs, targets=targets, backend=backend)
    assert not plain.requires_grad
    assert not unrecorded.requires_grad
    assert recorded.requires_grad
    assert plain == unrecorded == recorded
    assert plain.item() == pytest.approx(peer(**inputs, targets=targets).item(), rel=1e-6)


def test_a_loss_scaled_for_half_precision_keeps_its_gradients(backend: str) -> None:
    """A gradient scaler multiplies the loss so that small gradients do not drown in fp16's subnormals."""
    inputs, targets = head_inputs(40, 32, 65, F16), some_targets(40, 65)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    scaler = 2.0**10
    (ops.linear_cross_entropy(**inputs, targets=targets, backend=backend) * scaler).backward()
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    (peer(**wide, targets=targets) * scaler).backward()
    for name, x in inputs.items():
        error = (x.grad.double() - wide[name].grad).abs().max()
        assert error <= 4e-3 * wide[name].grad.abs().max(), name


def test_many_rows_of_one_target_do_not_overflow_half_precision(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of a block's gradients is 8000 times their mean, which alone fits into fp16."""
    monkeypatch.setattr(torch_native, "LOGITS_AT_ONCE", torch_native.LOGITS_AT_ONCE * 500)
    x = torch.full((9000, 4), 16.0, device=DEVICE, dtype=F16, requires_grad=True)
    weight = torch.zeros(16, 4, device=DEVICE, dtype=F16, requires_grad=True)
    targets = torch.zeros(9000, device=DEVICE, dtype=torch.int64)
    ops.linear_cross_entropy(x, weight, targets, backend=backend).backward()
    torch.testing.assert_close(weight.grad[0].float(), torch.full((4,), -15.0, device=DEVICE), rtol=1e-2, atol=0)
    torch.testing.assert_close(weight.grad[1].float(), torch.full((4,), 1.0, device=DEVICE), rtol=1e-2, atol=0)


@pytest.mark.parametrize("rows", [0, 9])
def test_no_target_that_counts_gives_nan(backend: str, rows: int) -> None:
    inputs = {name: x.requires_grad_() for name, x in head_inputs(rows, 8, 65).items()}
    loss = ops.linear_cross_entropy(**inputs, targets=torch.full((rows,), -100, device=DEVICE), backend=backend)
    loss.backward()
    assert loss.dtype == F32
    assert loss.isnan()
    assert all((x.grad == 0).all() for x in inputs.values())


def test_zero_weights_give_the_logarithm_of_the_classes(backend: str) -> None:
    x, weight = sample(9, 8), torch.zeros(65, 8, device=DEVICE)
    loss = ops.linear_cross_entropy(x, weight, some_targets(9, 65, ignored=3), backend=backend)
    assert loss.item() == pytest.approx(math.log(65), rel=1e-6)


def test_blocks_make_no_more_logits_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    linear = F.linear

    def watched(x: Tensor, weight: Tensor) -> Tensor:
        sizes.append(x.shape[0] * weight.shape[0])
        return linear(x, weight)

    monkeypatch.setattr(torch_native, "LOGITS_AT_ONCE", 200)
    monkeypatch.setattr(F, "linear", watched)
    inputs = {name: x.requires_grad_() for name, x in head_inputs(13, 8, 65).items()}
    ops.linear_cross_entropy(**inputs, targets=some_targets(13, 65), backend="torch").backward()
    assert sizes == [3 * 65] * 4 + [65]


@pytest.mark.parametrize(("rows", "classes", "ignored"), [(1, 1, 0), (9, 65, 4), (13, 300, 0)])
def test_reference_is_pytorch_in_float64(rows: int, classes: int, ignored: int) -> None:
    targets = some_targets(rows, classes, ignored=ignored)
    check_reference(ops.linear_cross_entropy, peer, head_inputs(rows, 17, classes), targets=targets)
