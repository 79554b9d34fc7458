"""What every kernel backend has: its dispatcher ops, whose schemas and fakes say what they do, and its determinism.

Results are held to the error rule in each op's own file, with those of all backends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from error_rule import DEVICE, sample
from torch import Tensor

from fastgpt import dispatch, extension, kernel_ops, ops, use_backend
from fastgpt.triton_kernels import library

F32 = torch.float32
KERNEL_BACKENDS = {"triton": library.op, "cpp": extension.cpu.op, "cuda": extension.cuda.op}

every_kernel_backend = pytest.mark.parametrize("backend", KERNEL_BACKENDS)
every_op = pytest.mark.parametrize("name", kernel_ops.SCHEMAS)


def seed(value: int = 7) -> Tensor:
    return torch.tensor([value], device=DEVICE)


def op_calls(op: Callable[[str], Callable[..., Any]]) -> dict[str, tuple[Any, ...]]:
    """Arguments for every dispatcher op of a backend, which finds them by name with ``op``."""
    x, dy, weight, bias = sample(6, 20), sample(6, 20), sample(20), sample(20)
    _, mean, rstd = op("layer_norm_fwd")(x, weight, None, 1e-5)
    q, k, v, do = (sample(2, 2, 9, 16) for _ in range(4))
    qkv, packed_do = sample(2, 9, 3, 2, 16), sample(2, 9, 2, 16)
    options = (True, 0.2, 0.25, torch.tensor([9, 4], dtype=torch.int32, device=DEVICE), seed())
    o, lse = op("attention_fwd")(q, k, v, *options)
    packed_o, packed_lse = op("attention_qkvpacked_fwd")(qkv, *options)
    y = op("softmax_fwd")(x, 0.5, True)
    targets = torch.tensor([0, 19, -100, 7, 7, 1], device=DEVICE)
    loss, stats, inverse_count, dlogits = op("cross_entropy_fwd")(x, targets, -100, True)
    lists = [[sample(5, 3), sample(7)] for _ in range(2)] + [[torch.rand(5, 3), torch.rand(7)] for _ in range(2)]
    lists = [[x.to(DEVICE) for x in tensors] for tensors in lists]
    step, lr = torch.tensor(2.0, device=DEVICE), torch.tensor(0.1, device=DEVICE)
    return {
        "attention_fwd": (q, k, v, *options),
        "attention_bwd": (do, q, k, v, o, lse, *options),
        "attention_qkvpacked_fwd": (qkv, *options),
        "attention_qkvpacked_bwd": (packed_do, qkv, packed_o, packed_lse, *options),
        "softmax_fwd": (x, 0.5, True),
        "softmax_bwd": (dy, y, 0.5, True),
        "layer_norm_fwd": (x, weight, bias, 1e-5),
        "layer_norm_bwd": (dy, x, weight, mean, rstd),
        "add_layer_norm_fwd": (x, dy, weight, bias, 0.2, 1e-5, seed()),
        "add_layer_norm_bwd": (dy, x, x, weight, mean, rstd, 0.2, seed(), F32, F32),
        "gelu_fwd": (x, bias, "tanh"),
        "gelu_bwd": (dy, x, bias, "none"),
        "cross_entropy_fwd": (x, targets, -100, True),
        "cross_entropy_bwd": (loss, x, targets, -100, stats, inverse_count),
        "scale_gradient_": (dlogits, loss),
        "linear_cross_entropy_fwd": (x, sample(33, 20), targets, -100, True),
        "dropout_fwd": (x, 0.2, seed()),
        "dropout_bwd": (dy, 0.2, seed()),
        "adamw_": (*lists, step, lr, [0.9, 0.99], 1e-8, 0.1),
        "clip_grad_norm_": (lists[1], 0.5),
    }


# The dispatcher ops


@every_kernel_backend
def test_every_op_has_its_case_here(backend: str) -> None:
    assert set(op_calls(KERNEL_BACKENDS[backend])) == set(kernel_ops.SCHEMAS)


@every_op
@every_kernel_backend
def test_opcheck(backend: str, name: str) -> None:
    """Schema, aliasing, fake and AOT dispatch agree with what the kernels do (their autograd is in ops/)."""
    checks = ("test_schema", "test_faketensor")
    op = KERNEL_BACKENDS[backend]
    torch.library.opcheck(op(name), op_calls(op)[name], test_utils=checks)


@every_op
@every_kernel_backend
@pytest.mark.parametrize("with_optional", [True, False])
def test_fakes_have_the_strides_of_the_results(backend: str, name: str, with_optional: bool) -> None:
    """Also where options are left out, rows are gone and inputs are strided."""
    op = KERNEL_BACKENDS[backend]
    args = list(op_calls(op)[name])
    if not with_optional:
        flags = {"cross_entropy_fwd": 3, "linear_cross_entropy_fwd": 4}
        if name in flags:
            args[flags[name]] = False
        if name == "add_layer_norm_bwd":
            args[1] = args[7] = None
            args[6] = 0.0
        if name.startswith("gelu"):
            args[-2] = None
        if name.startswith("attention"):
            args = [x.transpose(-1, -2) if type(x) is Tensor and x.dim() >= 4 and x.shape[-1] == 9 else x for x in args]
    got = op(name)(*args)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = op(name)(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, args))
    got, fake = ([] if r is None else [r] if isinstance(r, Tensor) else list(r) for r in (got, fake))
    assert [(x.shape, x.stride(), x.dtype) for x in got] == [(x.shape, x.stride(), x.dtype) for x in fake]


def both_ways() -> dict[str, Callable[[], list[Tensor]]]:
    """Every public op, forward and backward, on shapes of several tiles."""

    def with_gradients(fn: Callable[..., Any], *inputs: Tensor) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            leaves = [x.detach().clone().requires_grad_() for x in inputs]
            outputs = fn(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            upstream = [torch.linspace(-1, 2, y.numel(), device=DEVICE).view(y.shape) for y in outputs]
            return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

        return run

    def in_place(fn: Callable[..., Any], *lists: list[Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            own = [[x.clone() for x in tensors] for tensors in lists]
            result = fn(*own)
            return [x for tensors in own for x in tensors] + ([] if result is None else [result])

        return run

    targets = torch.randint(130, (40,), device=DEVICE)
    one = torch.tensor(1.0, device=DEVICE)
    lists = [[sample(70, 90), sample(33)] for _ in range(4)]
    lists[3] = [x.abs() for x in lists[3]]
    drop = {"dropout_p": 0.2, "seed": seed()}
    return {
        "attention": with_gradients(
            lambda *qkv: ops.attention(*qkv, **drop), *(sample(1, 2, 70, 24) for _ in range(3))
        ),
        "attention_qkvpacked": with_gradients(lambda x: ops.attention_qkvpacked(x, **drop), sample(1, 70, 3, 2, 16)),
        "softmax": with_gradients(lambda x: ops.softmax(x, is_causal=True), sample(2, 60, 50)),
        "layer_norm": with_gradients(ops.layer_norm, sample(100, 130), sample(130), sample(130)),
        "add_layer_norm": with_gradients(
            lambda *x: ops.add_layer_norm(*x, **drop), sample(100, 130), sample(100, 130), sample(130), sample(130)
        ),
        "gelu": with_gradients(ops.gelu, sample(100, 130), sample(130)),
        "cross_entropy": with_gradients(lambda x: ops.cross_entropy(x, targets), sample(40, 130)),
        "linear_cross_entropy": with_gradients(
            lambda *x: ops.linear_cross_entropy(*x, targets), sample(40, 16), sample(130, 16)
        ),
        "dropout": with_gradients(lambda x: ops.dropout(x, 0.3, seed=seed()), sample(50, 90)),
        "adamw_": in_place(
            lambda *x: ops.adamw_(*x, one, lr=one, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1), *lists
        ),
        "clip_grad_norm_": in_place(lambda x: ops.clip_grad_norm_(x, 1.0), lists[0]),
    }


@pytest.mark.parametrize("op", dispatch.OPS)
@every_kernel_backend
def test_two_runs_are_equal_to_the_last_bit(backend: str, op: str) -> None:
    run = both_ways()[op]
    with use_backend(backend):
        first, second = run(), run()
    assert len(first) > 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_without_a_gradient_no_function_of_autograd_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The results are those with one, and nothing is kept of what would be saved."""
    x, weight, bias = (sample(*shape) for shape in ((3, 20), (20,), (20,)))
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    targets, qkv = torch.tensor([0, 19, 7], device=DEVICE), sample(1, 5, 3, 2, 8)
    calls: dict[str, Callable[[list[Tensor]], Any]] = {
        "attention": lambda _: ops.attention(*qkv.clone().requires_grad_().permute(2, 0, 3, 1, 4)),
        "attention_qkvpacked": lambda _: ops.attention_qkvpacked(qkv.clone().requires_grad_()),
        "softmax": lambda t: ops.softmax(t[0]),
        "layer_norm": lambda t: ops.layer_norm(*t),
        "add_layer_norm": lambda t: ops.add_layer_norm(t[0], *t)[0],
        "gelu": lambda t: ops.gelu(t[0], t[2]),
        "cross_entropy": lambda t: ops.cross_entropy(t[0], targets),
        "linear_cross_entropy": lambda t: ops.linear_cross_entropy(t[0], t[0] * 2, targets % 3),
        "dropout": lambda t: ops.dropout(t[0], 0.3, seed=seed()),
    }
    assert set(calls) == set(dispatch.OPS) - {"adamw_", "clip_grad_norm_"}
    backend = "cuda" if DEVICE.type == "cuda" else "cpp"
    with use_backend(backend):
        wanted = {name: call(leaves) for name, call in calls.items()}

        def applied(*_: Any) -> None:
            raise AssertionError("apply was called")

        monkeypatch.setattr(torch.autograd.Function, "apply", applied)
        with torch.no_grad():
            got = {name: call(leaves) for name, call in calls.items()}
        for name, call in calls.items():
            assert torch.equal(got[name], wanted[name]), name
            assert wanted[name].requires_grad, name
            assert not got[name].requires_grad, name
            with pytest.raises(AssertionError, match="apply was called"):
                call(leaves)


def test_a_derivative_forward_is_refused_also_without_gradients() -> None:
    """``torch.no_grad()`` leaves forward mode on, whose tangents the forward alone would lose."""
    x = torch.ones(2, 8, device=DEVICE)
    backend = "cuda" if DEVICE.type == "cuda" else "cpp"
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match="jvp"):
            ops.gelu(dual, backend=backend)
