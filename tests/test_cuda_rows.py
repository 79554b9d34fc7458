"""The CUDA kernels over rows and elements: what of them depends on a row's length, its address or the schedule."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETING
from error_rule import DEVICE, check, sample
from torch import Tensor

from fastgpt import emulator, ops

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

needs_emulator = pytest.mark.skipif(not INTERPRETING, reason="asks the emulator, and here a GPU runs the kernels")


def at_offset(x: Tensor, offset: int) -> Tensor:
    """A contiguous copy of ``x`` that begins ``offset`` elements after an address of 16 bytes."""
    y = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)[offset:].view(x.shape)
    return y.copy_(x)


def loss_of(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, ignore_index=ignore_index)


def linear_loss_of(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return loss_of(F.linear(x, weight), targets)


def every_op(x: Tensor) -> dict[str, list[Tensor]]:
    """What each op makes of ``x``, (M, N), forward and backward."""
    seed, targets = torch.tensor([3], device=DEVICE), torch.arange(x.shape[0], device=DEVICE) % x.shape[1]
    bias, weight = x[0].detach().clone(), torch.linspace(-1, 1, 40 * x.shape[1], device=DEVICE).view(40, -1)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda x: ops.softmax(x, scale=0.5, backend="cuda"),
        "causal softmax": lambda x: ops.softmax(x, is_causal=True, backend="cuda"),
        "gelu": lambda x: ops.gelu(x, bias, backend="cuda"),
        "tanh": lambda x: ops.gelu(x, approximate="tanh", backend="cuda"),
        "dropout": lambda x: ops.dropout(x, 0.3, seed=seed, backend="cuda"),
        "cross_entropy": lambda x: ops.cross_entropy(x, targets, backend="cuda"),
        "linear_cross_entropy": lambda x: ops.linear_cross_entropy(x, weight.to(x.dtype), targets % 40, backend="cuda"),
    }
    results = {}
    for name, call in calls.items():
        leaf = x.detach().requires_grad_()
        y = call(leaf)
        y.backward(
            at_offset(
                torch.linspace(-1, 2, y.numel(), device=DEVICE, dtype=y.dtype).view(y.shape),
                x.data_ptr() % 16 // x.element_size(),
            )
        )
        results[name] = [y.detach(), leaf.grad]
    return results


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_addresses_of_any_alignment_give_the_same_bits(dtype: torch.dtype) -> None:
    x = sample(5, 64, dtype=dtype)
    aligned = every_op(x)
    for offset in (1, 2, 4 if dtype == F32 else 7):
        for name, results in every_op(at_offset(x, offset % 8)).items():
            if "cross_entropy" not in name:  # it adds up in the order in which 16 bytes of memory hold its elements
                assert all(map(torch.equal, results, aligned[name])), (name, offset)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("classes", [3, 64, 257])
def test_logits_may_begin_anywhere(dtype: torch.dtype, classes: int) -> None:
    logits = sample(6, classes + 5, dtype=dtype, std=3.0)
    targets = torch.tensor([0, classes - 1, 1, -100, 2, 0], device=DEVICE)
    for offset in range(6):
        check(ops.cross_entropy, "cuda", loss_of, {"logits": logits[:, offset : offset + classes]}, targets=targets)
        packed = at_offset(logits[:, :classes], offset)
        check(ops.cross_entropy, "cuda", loss_of, {"logits": packed}, targets=targets)


# Up to 1024 elements in half precision a warp has a row, up to 8192 a block holds one in its registers.
@pytest.mark.parametrize(
    ("dtype", "N"),
    [(F32, n + d) for n in (512, 4096) for d in (0, 1)] + [(BF16, n + d) for n in (1024, 8192) for d in (0, 1)],
)
def test_softmax_of_rows_at_each_border(dtype: torch.dtype, N: int) -> None:
    for is_causal in (False, True):

        def peer(x: Tensor, is_causal: bool = is_causal) -> Tensor:
            seen = torch.ones(x.shape, dtype=torch.bool, device=x.device).tril(x.shape[1] - x.shape[0])
            return torch.softmax(x.masked_fill(~seen, -torch.inf) if is_causal else x, -1)

        check(ops.softmax, "cuda", lambda x, is_causal: peer(x), {"x": sample(3, N, dtype=dtype)}, is_causal=is_causal)


@pytest.mark.parametrize(
    ("dtype", "N"), [(F32, 2047), (F32, 2048), (F32, 2049), (BF16, 4096), (BF16, 4097), (F16, 9000)]
)
@pytest.mark.parametrize("rows", [1, 70])
def test_gelu_of_rows_at_each_border(dtype: torch.dtype, N: int, rows: int) -> None:
    inputs = {"x": sample(rows, N, dtype=dtype), "bias": sample(N, dtype=dtype)}
    check(ops.gelu, "cuda", lambda x, bias: F.gelu(x + bias).to(x.dtype), inputs)


# The last row that registers hold and the first that shared memory does; the last of those and the first beyond.
BORDERS = [(F32, 4093), (F32, 4094), (F32, 25277), (F32, 25278), (BF16, 8185), (BF16, 8186), (F16, 50553), (F16, 50554)]


@pytest.mark.parametrize(("dtype", "classes"), BORDERS)
def test_cross_entropy_of_rows_at_each_border(dtype: torch.dtype, classes: int) -> None:
    targets = torch.tensor([0, -100, classes - 1], device=DEVICE)
    check(ops.cross_entropy, "cuda", loss_of, {"logits": sample(3, classes, dtype=dtype, std=3.0)}, targets=targets)


@needs_emulator
def test_each_border_is_one() -> None:
    homes = []
    for dtype, classes in BORDERS:
        module = emulator.load()
        module.reset_counters()
        ops.cross_entropy(sample(1, classes, dtype=dtype), torch.tensor([1]), backend="cuda")
        (kernel,) = (name for name in module.counters() if name.startswith("cross_entropy_fwd"))
        homes.append(kernel.rsplit(":", 1)[-1].rstrip(">"))
    assert homes == ["registers", "shared", "shared", "memory"] * 2


@pytest.mark.parametrize(("dtype", "classes"), [(F32, 65), (F16, 3001), (BF16, 9001), (BF16, 50600)])
def test_logits_turn_into_their_gradient_in_place(dtype: torch.dtype, classes: int) -> None:
    """Wherever a row is held meanwhile."""
    inputs = {"x": sample(3, 8, dtype=dtype), "weight": sample(classes, 8, dtype=dtype)}
    targets = torch.tensor([classes - 1, -100, 7], device=DEVICE)
    check(ops.linear_cross_entropy, "cuda", linear_loss_of, inputs, targets=targets)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["cpp", "cuda"])
@pytest.mark.parametrize(("dtype", "classes"), [(F32, (1 << 22) + 3), (F16, (1 << 23) + 3)])
def test_linear_cross_entropy_in_several_chunks(backend: str, dtype: torch.dtype, classes: int) -> None:
    """So many classes that 20 rows are two chunks; with weights of zero every probability is 1 / classes."""
    x = sample(20, 1, dtype=dtype).requires_grad_()
    weight = torch.zeros(classes, 1, dtype=dtype, device=DEVICE, requires_grad=True)
    targets = torch.arange(20, device=DEVICE) // 2 * 7
    loss = ops.linear_cross_entropy(x, weight, targets, backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(classes), rel=1e-6)
    assert (x.grad == 0).all()
    wanted = x.detach().double().sum() / classes / 20 - torch.zeros(classes, device=DEVICE, dtype=torch.float64)
    wanted.index_add_(0, targets, -x.detach().double().squeeze(1) / 20)
    error = (weight.grad.squeeze(1).double() - wanted).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize("columns", [7, 64, 5000])
def test_what_the_mask_hides_is_nothing(columns: int) -> None:
    hidden = torch.ones(5, columns, dtype=torch.bool, device=DEVICE).triu(columns - 4)
    x, dy = (sample(5, columns).masked_fill(hidden, torch.nan) for _ in "xd")
    x.requires_grad_()
    y = ops.softmax(x, is_causal=True, backend="cuda")
    y.backward(dy)
    for got in (y, x.grad):
        assert got.isfinite().all()
        assert (got[hidden] == 0).all()


@pytest.mark.parametrize("classes", [65, 5000, 30000])
def test_rows_that_do_not_count_are_not_looked_at(classes: int) -> None:
    logits = sample(4, classes)
    logits[1::2] = torch.nan
    logits.requires_grad_()
    loss = ops.cross_entropy(logits, torch.tensor([0, -1, 2, -1], device=DEVICE), ignore_index=-1, backend="cuda")
    loss.backward(retain_graph=True)
    first, logits.grad = logits.grad, None
    loss.backward()  # from the statistics
    for dlogits in (first, logits.grad):
        assert loss.isfinite()
        assert (dlogits[1::2] == 0).all()
        assert dlogits[::2].isfinite().all()
    torch.testing.assert_close(first, logits.grad)


def test_a_target_out_of_range_is_nan_and_has_no_place_in_the_gradient() -> None:
    """Nobody looks at targets on a GPU; on a CPU the op's own checks come first, so the dispatcher's op is asked."""
    logits = sample(3, 9)
    targets = torch.tensor([4, 9, -1], device=DEVICE)
    loss, stats, inverse_count, dlogits = torch.ops.fastgpt_cuda.cross_entropy_fwd(logits, targets, -100, True)
    again = torch.ops.fastgpt_cuda.cross_entropy_bwd(torch.ones_like(loss), logits, targets, -100, stats, inverse_count)
    assert loss.isnan()
    wanted = (torch.softmax(logits, -1) - F.one_hot(targets.clamp(0, 8), 9) * (targets == 4)[:, None]) / 3
    torch.testing.assert_close(dlogits, wanted)
    torch.testing.assert_close(again, wanted)


@needs_emulator
def test_how_many_kernels_a_call_launches() -> None:
    module = emulator.load()
    x = sample(6, 64).requires_grad_()
    bias = sample(64).requires_grad_()
    targets = torch.tensor([1, 2, 3, 4, 5, 6])

    def launches(call: Callable[[], Tensor]) -> tuple[Counter[str], Counter[str]]:
        def launched() -> Counter[str]:
            return Counter({name.partition("_kernel")[0]: c.launches for name, c in module.counters().items()})

        module.reset_counters()
        y = call()
        forward = launched()
        module.reset_counters()
        y.backward(torch.ones_like(y))
        return forward, launched()

    assert launches(lambda: ops.softmax(x, backend="cuda")) == ({"softmax_fwd": 1}, {"softmax_bwd": 1})
    assert launches(lambda: ops.gelu(x, backend="cuda")) == ({"gelu_fwd": 1}, {"gelu_bwd": 1})
    assert launches(lambda: ops.gelu(x, bias, backend="cuda")) == ({"gelu_fwd": 1}, {"gelu_bwd": 1, "column_sum": 1})
    assert launches(lambda: ops.dropout(x, 0.5, backend="cuda")) == ({"dropout": 1}, {"dropout": 1})
    forward = {"inverse_count": 1, "cross_entropy_fwd": 1, "mean_loss": 1}
    assert launches(lambda: ops.cross_entropy(x, targets, backend="cuda")) == (forward, {"scale_gradient": 1})
    weight = sample(20, 64).requires_grad_()
    assert launches(lambda: ops.linear_cross_entropy(x, weight, targets, backend="cuda")) == (forward, {})


@needs_emulator
@pytest.mark.parametrize(("dtype", "N"), [(F32, 65), (BF16, 2056), (F32, 4500)])
def test_every_schedule_gives_the_same_bits(dtype: torch.dtype, N: int) -> None:
    x = sample(3, N, dtype=dtype)
    first = every_op(x)
    schedules = [("reversed", "eager", 0), ("random", "lazy", 1), *(("skewed", "lazy", seed) for seed in (1, 2, 3))]
    for order, copies, seed in schedules:
        with emulator.schedule(order, copies, seed):
            again = every_op(x)
        for name, results in again.items():
            assert all(map(torch.equal, results, first[name])), (name, order, copies, seed)
