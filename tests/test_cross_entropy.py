from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from error_rule import BACKENDS, DEVICE, check, check_reference, sample
from torch import Tensor

from fastgpt import ops

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def peer(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, ignore_index=ignore_index)


def some_targets(rows: int, classes: int, ignore_index: int = -100, ignored: int = 0) -> Tensor:
    targets = torch.randint(classes, (rows,), device=DEVICE)
    targets[torch.randperm(rows)[:ignored]] = ignore_index
    return targets


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "classes", "dtype", "ignored", "ignore_index"),
    [
        (1, 1, F32, 0, -100),
        (4, 1, BF16, 2, -100),
        (5, 2, F16, 0, -100),
        (8, 63, F32, 3, -100),
        (8, 64, BF16, 3, -1),
        (9, 65, F16, 8, -100),
        (64, 257, F32, 20, 7),
        (65, 100, BF16, 0, -100),
        (33, 97, F16, 5, 0),
        (3, 50257, F32, 1, -100),
        (3, 50304, BF16, 1, -100),
        (700, 11, F32, 100, 2**40),
    ],
)
def test_obeys_the_error_rule(
    backend: str, rows: int, classes: int, dtype: torch.dtype, ignored: int, ignore_index: int
) -> None:
    logits, targets = sample(rows, classes, dtype=dtype, std=3.0), some_targets(rows, classes, ignore_index, ignored)
    check(ops.cross_entropy, backend, peer, {"logits": logits}, targets=targets, ignore_index=ignore_index)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_reads_strided_inputs(backend: str, dtype: torch.dtype) -> None:
    targets = some_targets(18, 65, ignored=4)[::2]
    for logits in (
        sample(9, 80, dtype=dtype)[:, :65],
        sample(65, 9, dtype=dtype).t(),
        sample(9, 130, dtype=dtype)[:, ::2],
    ):
        check(ops.cross_entropy, backend, peer, {"logits": logits}, targets=targets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_is_over_the_targets_that_count(backend: str) -> None:
    logits = torch.zeros(4, 8, device=DEVICE, requires_grad=True)
    loss = ops.cross_entropy(logits, torch.tensor([3, -100, -100, 5], device=DEVICE), backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(8))
    assert (logits.grad[1:3] == 0).all()
    assert logits.grad[0, 3].item() == pytest.approx((1 / 8 - 1) / 2)
    assert logits.grad[3, 0].item() == pytest.approx(1 / 8 / 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 3])
def test_no_target_that_counts_gives_nan(backend: str, rows: int) -> None:
    logits = sample(rows, 5).requires_grad_()
    loss = ops.cross_entropy(logits, torch.full((rows,), -100, device=DEVICE), backend=backend)
    loss.backward()
    assert loss.dtype == F32
    assert loss.isnan()
    assert (logits.grad == 0).all(), "one such batch among those of a step would spoil the sum of their gradients"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_large_logits_do_not_overflow(backend: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[6e4, 0.0, -6e4], [-6e4, -6e4, -6e4]], device=DEVICE, dtype=dtype).requires_grad_()
    loss = ops.cross_entropy(logits, torch.tensor([0, 1], device=DEVICE), backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3) / 2)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mean", [-300.0, 3000.0])
def test_an_offset_of_all_logits_costs_no_precision(backend: str, mean: float) -> None:
    logits = sample(33, 65, mean=mean)
    check(ops.cross_entropy, backend, peer, {"logits": logits}, targets=some_targets(33, 65, ignored=3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaves_the_logits_alone(backend: str) -> None:
    logits = sample(6, 33).requires_grad_()
    before = logits.detach().clone()
    ops.cross_entropy(logits, some_targets(6, 33), backend=backend).backward()
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("rows", "classes", "ignored"), [(1, 1, 0), (9, 65, 0), (9, 65, 4), (5, 1000, 4)])
def test_reference_is_pytorch_in_float64(rows: int, classes: int, ignored: int) -> None:
    targets = some_targets(rows, classes, ignored=ignored)
    check_reference(ops.cross_entropy, peer, {"logits": sample(rows, classes, std=5.0)}, targets=targets)
