"""What `gpu_check.py` runs on a GPU: each op once on small shapes, and the cases of its bench stage, with their peers.

Sizes are named as in the ops' docstrings; s is the bytes of an element.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import GPT, GPTConfig, ops, use_backend
from fastgpt.benchmarks.plain import PlainGPT, plain_optimizer
from fastgpt.config import PRESETS, TrainConfig
from fastgpt.optim import AdamW, build_optimizer, gradients

OURS = ("triton", "cuda")
BF16 = torch.bfloat16
FORWARD, BACKWARD, BOTH, STEP = "forward", "backward", "forward and backward", "step"

# ||result - truth|| / ||truth||: in bf16 one rounding is 0.001 or so, several of them in a row stay below this.
BF16_ERROR, FP32_ERROR = 2e-2, 1e-4


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that has to be done: each input read from memory once and each output written once; FLOPs of matrix
    products, 2 for a multiplication and an addition."""

    bytes: int
    flops: int = 0

    def floor_ms(self, ceilings: dict[str, float]) -> float:
        """The time that the slower of the two takes at the measured ceiling."""
        seconds = self.bytes / ceilings["copy_bytes_per_s"], self.flops / ceilings["matmul_flops_per_s"]
        return 1e3 * max(seconds)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What is timed: ``call``, on what ``prepare`` has made outside of the time.

    Of several calls ``in_a_row`` the mean is taken, as they come, the launching by the host included.
    """

    call: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    in_a_row: int = 1


@dataclasses.dataclass(frozen=True)
class Setup:
    """A case on a device: by contestant, a call that runs it and returns its relative error; then who is timed."""

    errors: dict[str, Callable[[], float]]
    parts: dict[str, dict[str, Contestant]]


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at one size. ``build`` makes its inputs; ``tokens``, where there are any, are those of a step."""

    op: str
    name: str
    work: dict[str, Work]
    build: Callable[[torch.device], Setup]
    allowed: float = BF16_ERROR
    tokens: int = 0


def cases() -> list[Case]:
    """What the bench stage times, the most important first."""
    tokens = 16 * 1024
    gpt2 = PRESETS["gpt2"].model
    assert isinstance(gpt2, GPTConfig)
    return [
        attention_case(16, 12, 1024, 64),
        attention_case(16, 6, 1024, 128),
        training_case(gpt2, 16),
        linear_cross_entropy_case(tokens, 768, 50304),
        cross_entropy_case(tokens, 50304),
        *(add_layer_norm_case(4 * tokens, N, BF16) for N in (768, 1600)),
        add_layer_norm_case(4 * tokens, 768, torch.float32),
        *(layer_norm_case(4 * tokens, N) for N in (768, 1600)),
        *(softmax_case((1 << 26) // N, N) for N in (1024, 4096)),
        gelu_case(4 * tokens, 3072),
        dropout_case(4 * tokens, 768),
        *(attention_case(tokens // T, 768 // D, T, D) for T in (256, 4096) for D in (64, 128)),
        clip_grad_norm_case(_parameter_shapes(gpt2)),
        adamw_case(_parameter_shapes(gpt2)),
    ]


def attention_case(B: int, H: int, T: int, D: int, dtype: torch.dtype = BF16) -> Case:
    """Causal attention. With s bytes an element: forward 4 B H T D s bytes (q, k, v; o) and 2 B H T^2 D FLOPs, half of
    the two full products'; backward 8 B H T D s bytes (q, k, v, o, do; dq, dk, dv) and 2.5 times the FLOPs."""
    numel, flops = B * H * T * D, 2 * B * H * T * T * D
    work = {
        FORWARD: Work(4 * numel * dtype.itemsize, flops),
        BACKWARD: Work(8 * numel * dtype.itemsize, 5 * flops // 2),
    }

    def build(device: torch.device) -> Setup:
        leaves = _leaves(device, dtype, *[(B, H, T, D)] * 3)
        do = _normal(device, dtype, B, H, T, D)

        def truth() -> list[Tensor]:
            # A sequence at a time: in float64 the matrix of scores is large.
            parts = [
                _reference(ops.attention, [x[b : b + 1] for x in leaves], [do[b : b + 1]], is_causal=True)
                for b in range(B)
            ]
            return [torch.cat(column) for column in zip(*parts, strict=True)]

        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def sdpa_on(backend: SDPBackend) -> Callable[..., Tensor]:
            def call(*qkv: Tensor) -> Tensor:
                with sdpa_kernel(backend):
                    return sdpa(*qkv)

            return call

        functions: dict[str, Callable[..., Any]] = {
            **_ours(ops.attention),
            "torch": sdpa,
            "SDPA flash": sdpa_on(SDPBackend.FLASH_ATTENTION),
            "SDPA cuDNN": sdpa_on(SDPBackend.CUDNN_ATTENTION),
            "FlexAttention": _flex_attention(T, device),
        }
        return _differentiable(functions, leaves, [do], truth, work)

    return Case("attention", f"attention, B={B} H={H} T={T} D={D}, {_short(dtype)}", work, build)


def _flex_attention(T: int, device: torch.device) -> Callable[..., Tensor]:
    """torch.compile's attention, causal."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    @functools.cache
    def mask() -> Any:
        return create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device=device)

    attention = _compiled(lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask))
    return lambda q, k, v: attention(q, k, v, mask())


def softmax_case(M: int, N: int, dtype: torch.dtype = BF16) -> Case:
    """Forward 2 M N s bytes (x; y), backward 3 M N s (y, dy; dx)."""
    size = M * N * dtype.itemsize
    work = {FORWARD: Work(2 * size), BACKWARD: Work(3 * size)}

    def build(device: torch.device) -> Setup:
        leaves, upstream = _leaves(device, dtype, (M, N)), [_normal(device, dtype, M, N)]
        functions = _with_compiled(ops.softmax, lambda x: torch.softmax(x, -1))
        return _differentiable(functions, leaves, upstream, _truth(ops.softmax, leaves, upstream), work)

    return Case("softmax", f"softmax, {M} x {N}, {_short(dtype)}", work, build)


def layer_norm_case(M: int, N: int, dtype: torch.dtype = BF16) -> Case:
    """Forward (2 M + 2) N s bytes (x, weight, bias; y), backward (3 M + 3) N s (dy, x, weight; dx, dweight, dbias)."""
    row = N * dtype.itemsize
    work = {FORWARD: Work((2 * M + 2) * row), BACKWARD: Work((3 * M + 3) * row)}

    def build(device: torch.device) -> Setup:
        leaves = _leaves(device, dtype, (M, N), (N,), (N,))
        upstream = [_normal(device, dtype, M, N)]
        functions = _with_compiled(ops.layer_norm, lambda x, weight, bias: F.layer_norm(x, (N,), weight, bias))
        return _differentiable(functions, leaves, upstream, _truth(ops.layer_norm, leaves, upstream), work)

    return Case("layer_norm", f"layer_norm, {M} x {N}, {_short(dtype)}", work, build)


def add_layer_norm_case(M: int, N: int, stream: torch.dtype, dtype: torch.dtype = BF16) -> Case:
    """With t bytes an element of the residual stream and of the parameters (fp32 as under autocast, or x's):
    forward 2 M N (s + t) + 2 N t bytes (x, residual, weight, bias; y, residual_out), backward M N (s + 3 t) + 3 N t
    (dy, dresidual_out, residual_out, weight; dresidual, dweight, dbias), and M N s for dx where it has a dtype of its
    own."""
    s, t = dtype.itemsize, stream.itemsize
    dx = M * N * s if stream != dtype else 0
    work = {
        FORWARD: Work(2 * M * N * (s + t) + 2 * N * t),
        BACKWARD: Work(M * N * (s + 3 * t) + 3 * N * t + dx),
    }

    def build(device: torch.device) -> Setup:
        leaves = [*_leaves(device, dtype, (M, N)), *_leaves(device, stream, (M, N), (N,), (N,))]
        upstream = [_normal(device, dtype, M, N), _normal(device, stream, M, N)]

        def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            total = x + residual
            return F.layer_norm(total, (N,), weight, bias).to(x.dtype), total

        functions = _with_compiled(ops.add_layer_norm, plain)
        return _differentiable(functions, leaves, upstream, _truth(ops.add_layer_norm, leaves, upstream), work)

    name = f"add_layer_norm, {M} x {N}, {_short(dtype)}, stream {_short(stream)}"
    return Case("add_layer_norm", name, work, build)


def gelu_case(M: int, N: int, dtype: torch.dtype = BF16) -> Case:
    """With a bias, by the tanh formula. Forward (2 M + 1) N s bytes (x, bias; y), backward (3 M + 2) N s (dy, x, bias;
    dx, dbias)."""
    row = N * dtype.itemsize
    work = {FORWARD: Work((2 * M + 1) * row), BACKWARD: Work((3 * M + 2) * row)}

    def build(device: torch.device) -> Setup:
        leaves, upstream = _leaves(device, dtype, (M, N), (N,)), [_normal(device, dtype, M, N)]
        op = functools.partial(ops.gelu, approximate="tanh")
        functions = _with_compiled(op, lambda x, bias: F.gelu(x + bias, approximate="tanh"))
        return _differentiable(functions, leaves, upstream, _truth(op, leaves, upstream), work)

    return Case("gelu", f"gelu with bias, {M} x {N}, {_short(dtype)}", work, build)


def cross_entropy_case(M: int, V: int, dtype: torch.dtype = BF16) -> Case:
    """With its gradient: 2 M V s + 8 M bytes (logits, targets; dlogits)."""
    work = {BOTH: Work(2 * M * V * dtype.itemsize + 8 * M)}

    def build(device: torch.device) -> Setup:
        leaves, targets = _leaves(device, dtype, (M, V)), torch.randint(V, (M,), device=device)
        functions = _with_compiled(
            functools.partial(ops.cross_entropy, targets=targets),
            lambda logits: F.cross_entropy(logits.float(), targets),
        )
        upstream = [torch.ones((), device=device)]
        return _differentiable(functions, leaves, upstream, _loss_truth(ops.cross_entropy, leaves, targets), work)

    return Case("cross_entropy", f"cross_entropy, {M} x {V}, {_short(dtype)}", work, build)


def linear_cross_entropy_case(M: int, C: int, V: int, dtype: torch.dtype = BF16) -> Case:
    """With its gradients: 2 (M + V) C s + 8 M bytes (x, weight, targets; dx, dweight; logits need never be in memory)
    and 6 M V C FLOPs (logits, dx and dweight are a product each)."""
    work = {BOTH: Work(2 * (M + V) * C * dtype.itemsize + 8 * M, 6 * M * V * C)}

    def build(device: torch.device) -> Setup:
        leaves, targets = _leaves(device, dtype, (M, C), (V, C)), torch.randint(V, (M,), device=device)
        with torch.no_grad():
            leaves[1].mul_(C**-0.5)  # logits of unit variance
        functions = _with_compiled(
            functools.partial(ops.linear_cross_entropy, targets=targets),
            lambda x, weight: F.cross_entropy(F.linear(x, weight).float(), targets),
        )
        truth = _loss_truth(ops.linear_cross_entropy, leaves, targets)
        return _differentiable(functions, leaves, [torch.ones((), device=device)], truth, work)

    name = f"linear_cross_entropy, {M} x {C}, V={V}, {_short(dtype)}"
    return Case("linear_cross_entropy", name, work, build)


def dropout_case(M: int, N: int, dtype: torch.dtype = BF16, p: float = 0.2) -> Case:
    """Forward 2 M N s bytes (x; y), backward 2 M N s (dy; dx). The drawing of the seed is in the time."""
    size = 2 * M * N * dtype.itemsize
    work = {FORWARD: Work(size), BACKWARD: Work(size)}

    def build(device: torch.device) -> Setup:
        leaves, upstream = _leaves(device, dtype, (M, N)), [_normal(device, dtype, M, N)]
        functions = _with_compiled(functools.partial(ops.dropout, p=p), lambda x: F.dropout(x, p))

        def error_of(fn: Callable[..., Any]) -> float:
            """Masks differ from one to the other; what they keep must be right, and as many as they should."""
            y, dx = _results(fn, leaves, upstream)
            kept = y != 0
            five_deviations = 5 * math.sqrt(p * (1 - p) / kept.numel())
            if not abs(1 - kept.double().mean().item() - p) <= five_deviations:
                return math.inf
            truth = [torch.where(kept, x.detach().double() / (1 - p), 0.0) for x in (*leaves, *upstream)]
            return largest_error([y, dx], truth)

        setup = _differentiable(functions, leaves, upstream, list, work)
        return Setup({name: functools.partial(error_of, fn) for name, fn in functions.items()}, setup.parts)

    return Case("dropout", f"dropout {p:g}, {M} x {N}, {_short(dtype)}", work, build)


def adamw_case(shapes: Sequence[tuple[int, ...]]) -> Case:
    """28 bytes a parameter, all fp32 (parameter, gradient and two means read; parameter and means written)."""
    count = sum(map(math.prod, shapes))
    work = {STEP: Work(28 * count)}
    lr, betas, eps, weight_decay = 1e-3, (0.9, 0.95), 1e-8, 0.1

    def build(device: torch.device) -> Setup:
        before = [0.02 * torch.randn(shape, device=device) for shape in shapes]
        grads = [torch.randn(shape, device=device) for shape in shapes]
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}

        @functools.cache
        def truth() -> list[Tensor]:
            params = [p.double() for p in before]
            means, squares = ([torch.zeros_like(p) for p in params] for _ in range(2))
            step, rate = torch.ones((), device=device), torch.full((), lr, device=device)
            wide = [g.double() for g in grads]
            rest = {**options, "lr": rate, "backend": "reference"}
            ops.adamw_(params, wide, means, squares, step, **rest)
            return [after - p for after, p in zip(params, before, strict=True)]

        owned: dict[str, list[Tensor]] = {}
        calls: dict[str, Callable[[], Any]] = {}

        def enter(name: str, make: Callable[..., torch.optim.Optimizer], **settings: Any) -> None:
            owned[name] = [p.clone().requires_grad_() for p in before]
            for p, grad in zip(owned[name], grads, strict=True):
                p.grad = grad
            calls[name] = make(owned[name], **options, **settings).step

        for backend in OURS:
            enter(backend, AdamW, backend=backend)
        enter("torch, fused", torch.optim.AdamW, fused=True)
        enter("torch", torch.optim.AdamW, foreach=True)
        enter("torch.compile", torch.optim.AdamW, foreach=True, capturable=device.type == "cuda")
        calls["torch.compile"] = _compiled(calls["torch.compile"])

        def error_of(name: str) -> float:
            calls[name]()
            changes = [after.detach().double() - p for after, p in zip(owned[name], before, strict=True)]
            return largest_error(changes, truth())

        return _in_place(calls, error_of)

    return Case("adamw_", f"adamw_, {count / 1e6:.0f}M parameters, fp32", work, build, FP32_ERROR)


def clip_grad_norm_case(shapes: Sequence[tuple[int, ...]]) -> Case:
    """12 bytes a gradient, fp32 (read for the norm; read and written to be scaled)."""
    count = sum(map(math.prod, shapes))
    work = {STEP: Work(12 * count)}

    def build(device: torch.device) -> Setup:
        before = [torch.randn(shape, device=device) for shape in shapes]

        def truth() -> list[Tensor]:
            norm = torch.stack([g.double().square().sum() for g in before]).sum().sqrt()
            return [g / (norm + 1e-6) for g in before]

        owned = {name: [torch.empty_like(g) for g in before] for name in (*OURS, "torch", "torch.compile")}
        for tensors in owned.values():
            for tensor, g in zip(tensors, before, strict=True):
                tensor.grad = g.clone()

        def grads(name: str) -> list[Tensor]:
            return [tensor.grad for tensor in owned[name] if tensor.grad is not None]

        def clip(backend: str) -> Tensor:
            return ops.clip_grad_norm_(grads(backend), 1.0, backend=backend)

        compiled = _compiled(lambda tensors: nn.utils.clip_grad_norm_(tensors, 1.0, foreach=True))
        calls: dict[str, Callable[[], Any]] = {
            **{name: functools.partial(clip, name) for name in OURS},
            "torch": lambda: nn.utils.clip_grad_norm_(owned["torch"], 1.0, foreach=True),
            "torch.compile": lambda: compiled(owned["torch.compile"]),
        }

        def error_of(name: str) -> float:
            calls[name]()
            return largest_error(grads(name), truth())

        return _in_place(calls, error_of)

    return Case("clip_grad_norm_", f"clip_grad_norm_, {count / 1e6:.0f}M gradients, fp32", work, build, FP32_ERROR)


def training_case(config: GPTConfig, batch_size: int, dtype: torch.dtype = BF16) -> Case:
    """A training step under autocast: forward, backward, clipping, AdamW. ``GPT.flops_per_token`` FLOPs a token (the
    causal half of attention counted, as is usual), so that the share of the ceiling is the MFU; no bytes.

    What competes with the model on our kernels is the model on torch, and the plain model of ``plain.py`` compiled,
    with PyTorch's fused AdamW. The losses of the first steps are held to those in fp32.
    """
    train = TrainConfig(lr=6e-4, beta2=0.95)
    with torch.device("meta"):
        flops = GPT(config).flops_per_token()
    tokens = batch_size * config.block_size
    work = {STEP: Work(0, flops * tokens)}

    def build(device: torch.device) -> Setup:
        sequences = torch.randint(config.vocab_size, (batch_size, config.block_size + 1), device=device)
        idx, targets = sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
        with device:
            weights = GPT(config).state_dict()

        def step(
            model: nn.Module,
            forward: Callable[..., Any],
            optimizer: torch.optim.Optimizer,
            backend: str,
            dtype: torch.dtype,
        ) -> Tensor:
            with use_backend(backend):
                with torch.autocast(device.type, dtype=BF16, enabled=dtype != torch.float32):
                    _, loss = forward(idx, targets)
                loss.backward()
                ops.clip_grad_norm_(gradients(model), train.grad_clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        def of(model: nn.Module, backend: str, dtype: torch.dtype) -> Callable[[], Tensor]:
            model.load_state_dict(weights)
            if isinstance(model, GPT):
                optimizer: torch.optim.Optimizer = build_optimizer(model, train)
                forward: Callable[..., Any] = model
            else:
                optimizer, forward = plain_optimizer(model, train), _compiled(model)
                for group in optimizer.param_groups:
                    group["fused"] = True
            return functools.partial(step, model, forward, optimizer, backend, dtype)

        @functools.cache
        def truth() -> Tensor:
            with device:
                return losses(of(GPT(config), "torch", torch.float32))

        def losses(step: Callable[[], Tensor]) -> Tensor:
            return torch.stack([step() for _ in range(3)])

        with device:
            calls = {
                **{backend: of(GPT(config), backend, dtype) for backend in OURS},
                "torch": of(GPT(config), "torch", dtype),
                "torch.compile": of(PlainGPT(config, "fused"), "torch", dtype),
            }
        return _in_place(calls, lambda name: largest_error([losses(calls[name])], [truth()]), in_a_row=5)

    name = f"training step, {config.n_layer} layers of {config.n_embd}, {batch_size} x {config.block_size} tokens"
    return Case("training step", f"{name}, {_short(dtype)}", work, build, tokens=tokens)


def _parameter_shapes(config: GPTConfig) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        return [tuple(p.shape) for p in GPT(config).parameters()]


def _with_compiled(op: Callable[..., Any], plain: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {**_ours(op), "torch": plain, "torch.compile": _compiled(plain)}


def _ours(op: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """A public op on each of our backends."""
    return {backend: functools.partial(op, backend=backend) for backend in OURS}


def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` by torch.compile, which is loaded at the first call: that takes seconds."""
    compiled = functools.cache(lambda: torch.compile(fn, dynamic=False))
    return lambda *args: compiled()(*args)


def _differentiable(
    functions: dict[str, Callable[..., Any]],
    leaves: list[Tensor],
    upstream: list[Tensor],
    truth: Callable[[], list[Tensor]],
    parts: Iterable[str],
) -> Setup:
    """A setup of functions of ``leaves``; ``truth`` gives their outputs, then the gradients."""
    truth = functools.cache(truth)

    def error_of(fn: Callable[..., Any]) -> float:
        return largest_error(_results(fn, leaves, upstream), truth())

    def part_of(fn: Callable[..., Any], part: str) -> Contestant:
        def forward(_: Any = None) -> tuple[Tensor, ...]:
            return _as_tuple(fn(*leaves))

        def backward(outputs: tuple[Tensor, ...]) -> Any:
            return torch.autograd.grad(outputs, leaves, upstream)

        if part == FORWARD:
            return Contestant(forward)
        return Contestant(backward, forward) if part == BACKWARD else Contestant(lambda _: backward(forward()))

    return Setup(
        {name: functools.partial(error_of, fn) for name, fn in functions.items()},
        {part: {name: part_of(fn, part) for name, fn in functions.items()} for part in parts},
    )


def _in_place(calls: dict[str, Callable[[], Any]], error_of: Callable[[str], float], in_a_row: int = 1) -> Setup:
    """A setup of calls that each change a state of their own."""
    contestants = {
        name: Contestant(lambda _, call=call: call(), in_a_row=in_a_row)  # type: ignore[misc]
        for name, call in calls.items()
    }
    return Setup({name: functools.partial(error_of, name) for name in calls}, {STEP: contestants})


def _results(fn: Callable[..., Any], leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs, then gradients, in memory that held NaN before: what is not written shows."""
    size = sum(x.numel() * x.element_size() for x in (*leaves, *upstream))
    torch.full((size,), math.nan, dtype=BF16, device=leaves[0].device)  # freed at once, and its memory used next
    outputs = _as_tuple(fn(*leaves))
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def _truth(op: Callable[..., Any], leaves: list[Tensor], upstream: list[Tensor]) -> Callable[[], list[Tensor]]:
    return lambda: _reference(op, leaves, upstream)


def _reference(op: Callable[..., Any], leaves: list[Tensor], upstream: list[Tensor], **options: Any) -> list[Tensor]:
    """Outputs and gradients of the op on the reference backend, in float64."""
    wide = [x.detach().double().requires_grad_() for x in leaves]
    outputs = _as_tuple(op(*wide, **options, backend="reference"))
    grads = torch.autograd.grad(outputs, wide, [dy.double() for dy in upstream])
    return [*(y.detach() for y in outputs), *grads]


def _loss_truth(op: Callable[..., Any], leaves: list[Tensor], targets: Tensor) -> Callable[[], list[Tensor]]:
    """The mean loss and the gradients of (M, ...) rows and of what else there is, 1024 rows at a time."""

    def truth() -> list[Tensor]:
        rows, *others = (x.detach() for x in leaves)
        wide = [x.double().requires_grad_() for x in others]
        loss = torch.zeros((), dtype=torch.float64, device=rows.device)
        drows = torch.empty(rows.shape, device=rows.device)
        sums = [torch.zeros_like(x) for x in wide]
        for start in range(0, len(rows), 1024):
            block = slice(start, start + 1024)
            leaf = rows[block].double().requires_grad_()
            part = op(leaf, *wide, targets[block], backend="reference") * (len(leaf) / len(rows))
            drows[block], *grads = torch.autograd.grad(part, [leaf, *wide])
            loss += part.detach()
            for total, grad in zip(sums, grads, strict=True):
                total += grad
        return [loss, drows, *sums]

    return truth


def largest_error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest ``relative_error``; infinite where one is not a number."""
    errors = [relative_error(mine, true) for mine, true in zip(got, truth, strict=True)]
    return math.inf if any(map(math.isnan, errors)) else max(errors)


def relative_error(got: Tensor, true: Tensor) -> float:
    """||got - true|| / ||true||, in float64."""
    if got.shape != true.shape:
        return math.inf
    squares = [0.0, 0.0]
    for mine, theirs in zip(got.flatten().split(1 << 26), true.flatten().split(1 << 26), strict=True):
        squares[0] += (mine.double() - theirs.double()).square().sum().item()
        squares[1] += theirs.double().square().sum().item()
    return math.sqrt(squares[0] / squares[1]) if squares[1] else squares[0]


def _leaves(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [_normal(device, dtype, *shape).requires_grad_() for shape in shapes]


def _normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device)


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")


def small_calls(
    device: torch.device | str, dtype: torch.dtype = torch.bfloat16, batch: int = 2, backend: str = "triton"
) -> dict[str, Callable[[], list[Tensor]]]:
    """Every op on a kernel backend, forward and backward, on small odd shapes: {name: a call}.

    A call returns all that the op has computed, from inputs, upstream gradients and dropout seeds that stay the same.
    ``batch`` changes only how many rows or sequences there are.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # the same inputs on every device
    seed = torch.tensor([-0x123456789ABCDEF], device=device)

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, device="cpu") + 0.5).to(device, dtype).requires_grad_()

    def classes(count: int, rows: int) -> Tensor:
        return torch.randint(count, (rows,), generator=generator, device="cpu").to(device)

    def of(op: Callable[..., Any], *leaves: Tensor, **options: Any) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            outputs = _as_tuple(op(*leaves, **options, backend=backend))
            upstream = [y.detach().cos() for y in outputs]
            return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]

        return run

    def lists(count: int) -> list[list[Tensor]]:
        shapes = [(5,), (7, 9), (515, 3), (2049,), (97, 301)]
        return [[leaf(*shape, dtype=torch.float32).detach() for shape in shapes] for _ in range(count)]

    def adamw() -> list[Tensor]:
        params, grads, exp_avgs, exp_avg_sqs = ([x.clone() for x in tensors] for tensors in moments)
        scalars = torch.ones((), device=device), torch.full((), 1e-2, device=device)
        options: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        ops.adamw_(params, grads, exp_avgs, exp_avg_sqs, scalars[0], lr=scalars[1], **options, backend=backend)
        return [*params, *exp_avgs, *exp_avg_sqs]

    def clip() -> list[Tensor]:
        grads = [x.clone() for x in moments[1]]
        return [ops.clip_grad_norm_(grads, 0.5, backend=backend), *grads]

    moments = lists(4)
    moments[3] = [x.square() for x in moments[3]]
    seqlens = torch.arange(batch, dtype=torch.int32, device=device) % 3 * 20 + 7
    rows, N = 33 * batch, 515
    return {
        "attention": of(
            ops.attention, *(leaf(batch, 2, 67, 40) for _ in "qkv"), dropout_p=0.2, seqlens_k=seqlens, seed=seed
        ),
        "attention, not causal": of(ops.attention, *(leaf(batch, 2, 67, 64) for _ in "qkv"), is_causal=False),
        "attention_qkvpacked": of(ops.attention_qkvpacked, leaf(batch, 67, 3, 2, 64)),
        "softmax": of(ops.softmax, leaf(batch, 33, 65), scale=0.3, is_causal=True),
        "softmax, long rows": of(ops.softmax, leaf(batch, 40001)),
        "layer_norm": of(ops.layer_norm, leaf(rows, N), leaf(N), leaf(N)),
        "layer_norm, long rows": of(ops.layer_norm, leaf(batch, 20001), leaf(20001), leaf(20001)),
        "add_layer_norm": of(
            ops.add_layer_norm, leaf(rows, N), leaf(rows, N), leaf(N), leaf(N), dropout_p=0.2, seed=seed
        ),
        "gelu": of(ops.gelu, leaf(rows, N), leaf(N), approximate="tanh"),
        "cross_entropy": of(functools.partial(ops.cross_entropy, targets=classes(N, rows)), leaf(rows, N)),
        "cross_entropy, long rows": of(
            functools.partial(ops.cross_entropy, targets=classes(20001, batch)), leaf(batch, 20001)
        ),
        # In fp16 the gradient is made in the backward, from a second reading.
        "cross_entropy, fp16": of(
            functools.partial(ops.cross_entropy, targets=classes(N, rows)), leaf(rows, N, dtype=torch.float16)
        ),
        "linear_cross_entropy": of(
            functools.partial(ops.linear_cross_entropy, targets=classes(N, rows)), leaf(rows, 64), leaf(N, 64)
        ),
        "dropout": of(ops.dropout, leaf(rows, N), p=0.2, seed=seed),
        "adamw_": adamw,
        "clip_grad_norm_": clip,
    }
