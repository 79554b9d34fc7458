"""adamw_, the op. Its optimizer class and schedule are tested with training."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from error_rule import BACKENDS, DEVICE, check_in_place, sample
from torch import Tensor

from fastgpt import dispatch, ops
from fastgpt.optim import AdamW

pytestmark = pytest.mark.usefixtures("poisoned")

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

SIZES = [(1,), (3, 5), (65,), (64, 33), (), (2, 3, 4), (0, 4)]
# Each step's gradient is the first one's times a power of two, which is exact in every dtype.
FACTORS = (1.0, -2.0, 0.5, 4.0, -0.25)
DEFAULTS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def state(sizes: list[tuple[int, ...]], dtype: torch.dtype = F32, state_dtype: torch.dtype | None = None) -> dict:
    """Lists to call adamw_ with; the means start at zero."""
    params = [sample(*size, dtype=dtype) for size in sizes]
    zeros = [torch.zeros(size, dtype=state_dtype or dtype, device=DEVICE) for size in sizes]
    return {
        "params": params,
        "grads": [sample(*size, dtype=dtype, mean=0.1) for size in sizes],
        "exp_avgs": zeros,
        "exp_avg_sqs": [zero.clone() for zero in zeros],
    }


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    backend: str | None,
    lr: float,
    **options: object,
) -> None:
    """The op for as many steps as there are factors, the learning rate halved after two."""
    for index, factor in enumerate(FACTORS):
        ops.adamw_(
            params,
            [grad * factor for grad in grads],
            exp_avgs,
            exp_avg_sqs,
            torch.tensor(index + 1.0, device=DEVICE),
            lr=torch.tensor(lr if index < 2 else lr / 2, device=DEVICE),
            backend=backend,
            **options,
        )


def peer(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: float,
    **options: object,
) -> None:
    """torch.optim.AdamW, in the state's dtype where the parameters have another, rounded to theirs after each step."""
    own = [param.to(exp_avg.dtype, copy=True) for param, exp_avg in zip(params, exp_avgs, strict=True)]
    lr = torch.tensor(lr).item()
    optimizer = torch.optim.AdamW(own, lr=lr, foreach=False, fused=False, **options)
    for index, factor in enumerate(FACTORS):
        optimizer.param_groups[0]["lr"] = lr if index < 2 else lr / 2
        for x, grad in zip(own, grads, strict=True):
            x.grad = (grad * factor).to(x.dtype)
        optimizer.step()
        for x, param in zip(own, params, strict=True):
            param.copy_(x)
            x.copy_(param)
    for x, exp_avg, exp_avg_sq in zip(own, exp_avgs, exp_avg_sqs, strict=True):
        exp_avg.copy_(optimizer.state[x]["exp_avg"])
        exp_avg_sq.copy_(optimizer.state[x]["exp_avg_sq"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.0}, {"betas": (0.8, 0.95), "lr": 0.3}, {"betas": (0.0, 0.0)}, {"eps": 0.1}],
    ids=lambda options: " ".join(options) or "defaults",
)
def test_obeys_the_error_rule_over_several_steps(backend: str, dtype: torch.dtype, options: dict[str, object]) -> None:
    check_in_place(adamw_, backend, peer, state(SIZES, dtype), **{**DEFAULTS, "eps": 1e-6, **options})


@pytest.mark.parametrize("backend", ["reference", "cpp", "cuda", "auto"])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_half_precision_parameters_keep_fp32_means(backend: str, dtype: torch.dtype) -> None:
    lists = state(SIZES, dtype, state_dtype=F32)
    check_in_place(adamw_, backend, peer, lists, **DEFAULTS)
    adamw_(**lists, backend=backend, **DEFAULTS)
    assert {x.dtype for x in lists["params"]} == {dtype}
    assert {x.dtype for x in lists["exp_avgs"] + lists["exp_avg_sqs"]} == {F32}


def test_torch_says_that_it_takes_one_dtype_only() -> None:
    with pytest.raises(ValueError, match=r"^adamw_: backend 'torch' cannot run here: .*fused AdamW needs .* one dtype"):
        adamw_(**state([(3,)], BF16, state_dtype=F32), backend="torch", **DEFAULTS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_step_is_lr_times_the_sign_of_the_gradient(backend: str) -> None:
    """Bias correction makes it so: without it the first step would be a tenth of that, or three times as much."""
    param, grad = torch.ones(4, device=DEVICE), torch.tensor([1e-3, -7.0, 2.0, 1e3], device=DEVICE)
    means = torch.zeros(4, device=DEVICE), torch.zeros(4, device=DEVICE)
    one, lr = torch.tensor(1.0, device=DEVICE), torch.tensor(0.25, device=DEVICE)
    options = {"betas": (0.9, 0.999), "eps": 1e-12, "weight_decay": 0.0, "backend": backend}
    ops.adamw_([param], [grad], [means[0]], [means[1]], one, lr=lr, **options)
    torch.testing.assert_close(param, torch.tensor([0.75, 1.25, 0.75, 0.75], device=DEVICE), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_changes_what_it_was_given_and_nothing_else(backend: str) -> None:
    lists = state([(5, 3)])
    before = {name: tensors[0].clone() for name, tensors in lists.items()}
    step, lr = torch.tensor([3.0], device=DEVICE), torch.tensor([0.1], device=DEVICE)
    result = ops.adamw_(*lists.values(), step, lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, backend=backend)
    assert result is None
    assert step.tolist() == [3.0]
    assert lr.tolist() == torch.tensor([0.1]).tolist()
    assert torch.equal(lists["grads"][0], before["grads"])
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        assert not torch.equal(lists[name][0], before[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_changes_parameters_that_require_gradients(backend: str) -> None:
    lists = state([(5, 3)])
    param = torch.nn.Parameter(lists["params"][0])
    before = param.detach().clone()
    adamw_(**{**lists, "params": [param]}, backend=backend, **DEFAULTS)
    assert param.requires_grad
    assert param.grad_fn is None
    assert not torch.equal(param, before)


def with_gaps(x: Tensor) -> Tensor:
    return torch.full((*x.shape, 2), 9.0, device=DEVICE)[..., 0].copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("restride", [with_gaps, transposed], ids=lambda restride: restride.__name__)
@pytest.mark.parametrize("names", ["params", "grads", "exp_avgs", "params grads exp_avgs exp_avg_sqs"])
def test_takes_lists_of_any_strides_or_refuses_them(
    backend: str, restride: Callable[[Tensor], Tensor], names: str
) -> None:
    plain = state([(6, 8), (5, 7)])
    strided = {name: [restride(x) if name in names.split() else x.clone() for x in plain[name]] for name in plain}
    step, lr = torch.ones((), device=DEVICE), torch.full((), 0.1, device=DEVICE)
    options = {"lr": lr, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    reason = None
    if backend != "auto":
        reason = dispatch.reason_against("adamw_", backend, DEVICE.type, F32, (*strided.values(),))
    if reason is not None:
        assert backend != "reference"
        with pytest.raises(ValueError, match=re.escape(reason)):
            ops.adamw_(**strided, step=step, **options, backend=backend)
        return
    ops.adamw_(**strided, step=step, **options, backend=backend)
    ops.adamw_(**plain, step=step, **options, backend="reference")
    for name in plain:
        for got, wanted in zip(strided[name], plain[name], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpp", "cuda", "auto"])
def test_leaves_what_lies_between_strided_elements_alone(backend: str) -> None:
    lists = state([(6, 8)])
    lists["params"] = [with_gaps(lists["params"][0])]
    adamw_(**lists, backend=backend, **DEFAULTS)
    assert (lists["params"][0]._base[..., 1] == 9).all()


@pytest.mark.parametrize(("backend", "threads"), [("cpp", 1), ("cpp", 2), ("cuda", 1)])
@pytest.mark.parametrize("state_dtype", [F32, BF16])
def test_cuts_large_tensors_into_blocks(backend: str, threads: int, state_dtype: torch.dtype) -> None:
    sizes = [(3, 8192), (0,), (8191,), (8193,), (5,), (), (0, 2), (50_001,), (0,)]
    lists = state(sizes, BF16, state_dtype)
    lists["params"][2:4] = [x.float() for x in lists["params"][2:4]]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_in_place(adamw_, backend, peer, lists, **{**DEFAULTS, "eps": 1e-6})
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_more_tensors_than_one_launch_does(backend: str) -> None:
    lists = state([(3,), (0,), (2, 5)] * 60)
    check_in_place(adamw_, backend, peer, lists, **{**DEFAULTS, "eps": 1e-6})


@pytest.mark.parametrize("backend", ["cpp", "cuda"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_takes_tensors_at_any_address(backend: str, dtype: torch.dtype) -> None:
    lists = state([(7,), (300,)], dtype)
    lists = {name: [torch.cat([x[:1], x])[1:] for x in tensors] for name, tensors in lists.items()}
    assert all(x.data_ptr() % 16 for tensors in lists.values() for x in tensors)
    options = {**DEFAULTS, "eps": 1e-6}
    wanted = {name: [x.clone() for x in tensors] for name, tensors in lists.items()}
    adamw_(**lists, backend=backend, **options)
    adamw_(**wanted, backend=backend, **options)
    for name in wanted:
        assert all(map(torch.equal, lists[name], wanted[name]))


def overlapping(kind: str) -> dict[str, list[Tensor]]:
    lists = state([(4, 6), (4, 6), (6,)])
    memory = sample(60)
    if kind == "twice":
        lists["params"][1] = lists["params"][0]
    elif kind == "a mean twice":
        lists["exp_avg_sqs"][1] = lists["exp_avgs"][0]
    elif kind == "a gradient that is a parameter":
        lists["grads"][0] = lists["params"][1]
    elif kind == "one element":
        lists["params"][:2] = [memory[:24].view(4, 6), memory[23:47].view(4, 6)]
    elif kind == "a transposed view":
        lists["params"][:2] = [memory[:24].view(4, 6), memory[:24].view(6, 4).t()]
    elif kind == "far behind":
        lists["params"] = [memory[:24].view(4, 6), memory[24:48].view(4, 6), memory[10:16]]
    elif kind == "expanded":
        lists["exp_avgs"][0] = sample(1, 6).expand(4, 6)
    else:
        lists["params"][0] = memory.as_strided((4, 6), (2, 1))
    return lists


@pytest.mark.parametrize(
    "kind",
    [
        "twice",
        "a mean twice",
        "a gradient that is a parameter",
        "one element",
        "a transposed view",
        "far behind",
        "expanded",
        "rows that overlap",
    ],
)
@pytest.mark.parametrize("backend", ["cpp", "cuda"])
def test_refuses_to_change_memory_twice(backend: str, kind: str) -> None:
    lists = overlapping(kind)
    before = [x.clone() for x in lists["params"]]
    step, lr = torch.ones((), device=DEVICE), torch.ones((), device=DEVICE)
    with pytest.raises(RuntimeError, match=r"adamw_: .* must not overlap"):
        ops.adamw_(**lists, step=step, **{**DEFAULTS, "lr": lr}, backend=backend)
    for x, old in zip(lists["params"], before, strict=True):
        assert torch.equal(x, old)


@pytest.mark.parametrize("backend", ["cpp", "cuda"])
def test_takes_neighbours_and_gradients_that_overlap(backend: str) -> None:
    lists, wanted = state([(4, 6), (4, 6), (4, 6)]), state([(4, 6), (4, 6), (4, 6)])
    columns = sample(4, 18)
    lists["params"] = [columns[:, :6], columns[:, 6:12], columns[:, 12:]]
    wanted["params"] = [x.clone() for x in lists["params"]]
    lists["grads"] = [sample(1, 6).expand(4, 6)] * 3
    wanted["grads"] = [x.clone() for x in lists["grads"]]
    rows = torch.zeros(12, 6, device=DEVICE)
    lists["exp_avgs"] = list(rows.split(4))
    adamw_(**lists, backend=backend, **DEFAULTS)
    adamw_(**wanted, backend="reference", **DEFAULTS)
    for got, expected in zip(lists["params"], wanted["params"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton", "cpp", "cuda"])
def test_tells_autograd_what_it_changed(backend: str) -> None:
    """PyTorch's own fused AdamW, the torch backend's, does not."""
    lists = state([(5, 3)])
    before = {name: tensors[0]._version for name, tensors in lists.items()}
    step, lr = torch.ones((), device=DEVICE), torch.ones((), device=DEVICE)
    ops.adamw_(*lists.values(), step, lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, backend=backend)
    changed = {name for name, tensors in lists.items() if tensors[0]._version > before[name]}
    assert changed == {"params", "exp_avgs", "exp_avg_sqs"}


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 1_000_000])
def test_reference_is_pytorch_in_float64_at_any_step(step: int) -> None:
    generator = state([(4, 5)], F64)
    param, grad = generator["params"][0], generator["grads"][0]
    exp_avg, exp_avg_sq = sample(4, 5, dtype=F64), sample(4, 5, dtype=F64).square()
    own = param.clone()
    own.grad = grad
    lr = torch.tensor(0.01).item()
    optimizer = torch.optim.AdamW([own], lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, foreach=False)
    optimizer.state[own] = {
        "step": torch.tensor(float(step - 1)),
        "exp_avg": exp_avg.clone(),
        "exp_avg_sq": exp_avg_sq.clone(),
    }
    optimizer.step()
    at = torch.tensor(float(step), device=DEVICE)
    options = {**DEFAULTS, "lr": torch.tensor(0.01, device=DEVICE)}
    ops.adamw_([param], [grad], [exp_avg], [exp_avg_sq], at, **options, backend="reference")
    torch.testing.assert_close(exp_avg, optimizer.state[own]["exp_avg"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exp_avg_sq, optimizer.state[own]["exp_avg_sq"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(param, own, rtol=1e-12, atol=1e-12)


def test_the_optimizers_means_stay_fp32_when_a_state_is_loaded() -> None:
    """PyTorch's own load_state_dict casts a state to its parameter's dtype."""
    param = torch.nn.Parameter(sample(9, dtype=BF16))
    param.grad = sample(9, dtype=BF16)
    optimizer = AdamW([param], lr=0.1)
    optimizer.step()
    other = AdamW([torch.nn.Parameter(param.detach().clone())], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    mine, theirs = (next(iter(o.state.values())) for o in (other, optimizer))
    for name in ("exp_avg", "exp_avg_sq"):
        assert mine[name].dtype == F32
        assert torch.equal(mine[name], theirs[name])
        assert mine[name].data_ptr() != theirs[name].data_ptr()
    assert other.param_groups[0]["step"].item() == 1
