"""The cases of `fastgpt bench kernels`: each op at some sizes, what it must move and compute, and who competes.

A case runs on any device. Its competitors are fastgpt's backends, by their names, and their peers: PyTorch's own op
("torch eager"), torch.compile of that, and what other packages offer. Before one is timed its results are held to the
truth, the reference backend in float64: ours by the error rule of the tests (``errors.allowed_error``), with the eager
op as the peer whose error counts; a peer by ``LOOSE``, which shows whether it computes the same thing at all.

Sizes are named as in the ops' docstrings; s is the bytes of an element.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import GPT, GPTConfig, ops
from fastgpt.benchmarks.errors import absolute_error, allowed_error, largest, largest_error
from fastgpt.benchmarks.harness import Ceilings, Contestant, matmul_rate
from fastgpt.benchmarks.result import version_of
from fastgpt.config import PRESETS
from fastgpt.dispatch import BACKENDS
from fastgpt.optim import AdamW
from fastgpt.placement import DTYPES

FORWARD, BACKWARD, BOTH, STEP = "forward", "backward", "forward and backward", "step"

EAGER, COMPILED, FUSED = "torch eager", "torch.compile", "torch fused"
FLEX, FLASH_ATTN, LIGER = "FlexAttention", "flash-attn", "Liger"
SDPA_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}

PEERS = (EAGER, COMPILED, FUSED, FLEX, FLASH_ATTN, LIGER, *SDPA_BACKENDS)

# ||result - truth|| / ||truth|| of a peer: PyTorch's layer norm on a CPU, which sums its parameters' gradients in bf16,
# is off by 0.07.
LOOSE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}

DROPOUT = 0.2
IN_A_ROW = 200

Function = Callable[..., Any]


class WrongResult(Exception):
    """A competitor's result is not near enough to the truth; the message says by how much."""


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that has to be done: each input read from memory once and each output written once; FLOPs of matrix
    products, 2 for a multiplication and an addition."""

    bytes: int
    flops: int = 0

    def floor_ms(self, ceilings: Ceilings, dtype: str) -> float:
        """The time that the slower of the two takes at the measured ceiling."""
        return 1e3 * max(self.bytes / ceilings["copy_bytes_per_s"], self.flops / matmul_rate(ceilings, dtype))


class Problem(Protocol):
    """A case with its inputs on a device."""

    def names(self) -> list[str]:
        """Who competes, ours first; whether they can run here shows when they are called."""

    def check(self, name: str) -> float:
        """Run a competitor once, and return its relative error.

        Raises:
            WrongResult: it is not near enough to the truth.
        """

    def contestant(self, name: str, part: str) -> Contestant:
        """What is timed of a competitor that was checked."""


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at one size, its ``shape``; ``build`` makes the inputs, and ``label`` says what else there is to it."""

    op: str
    label: str
    shape: dict[str, int]
    dtype: str
    work: dict[str, Work]
    build: Callable[[torch.device], Problem]

    @property
    def name(self) -> str:
        return ", ".join((self.label, " ".join(f"{size}={n}" for size, n in self.shape.items()), self.dtype))

    def key(self) -> dict[str, Any]:
        return {"case": self.name}


# ---------------------------------------------------------------------------------------------------------------------
# Which cases
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a round, op by op."""

    attention: tuple[tuple[int, int, int, int], ...]  # B, H, T, D
    softmax: tuple[tuple[int, int], ...]  # M, N
    causal_softmax: tuple[tuple[int, int, int], ...]  # B, H, T
    norm: tuple[tuple[int, int], ...]  # M, N
    gelu: tuple[tuple[int, int], ...]  # M, N
    cross_entropy: tuple[tuple[int, int], ...]  # M, V
    linear_cross_entropy: tuple[tuple[int, int, int], ...]  # M, C, V
    dropout: tuple[tuple[int, int], ...]  # M, N
    model: GPTConfig  # whose parameters are updated, and gradients clipped
    variants: bool = True  # of GELU by the exact formula, and without a bias


def _gpt(**changes: Any) -> GPTConfig:
    return dataclasses.replace(GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384), **changes)


def _gpt2() -> GPTConfig:
    config = PRESETS["gpt2"].model
    assert isinstance(config, GPTConfig)
    return config


# By name and type of device: "full" are the sizes of training, GPT-2's on a GPU; "small" is a round of minutes on two
# cores; "tiny" only shows that everything runs.
_TINY = Sizes(
    attention=((1, 2, 16, 16),),
    softmax=((16, 16),),
    causal_softmax=((1, 2, 16),),
    norm=((16, 16),),
    gelu=((16, 16),),
    cross_entropy=((16, 33),),
    linear_cross_entropy=((16, 16, 33),),
    dropout=((64, 16),),
    model=_gpt(block_size=16, n_layer=1, n_head=2, n_embd=32),
)
_SMALL = Sizes(
    attention=((2, 6, 256, 64),),
    softmax=((2048, 256),),
    causal_softmax=((2, 6, 256),),
    norm=((1536, 384),),
    gelu=((1536, 1536),),
    cross_entropy=((128, 50304),),
    linear_cross_entropy=((256, 384, 2048),),
    dropout=((1536, 384),),
    model=_gpt(n_layer=2),
    variants=False,
)
_FULL_ON_CPU = Sizes(
    attention=((12, 6, 256, 64), (4, 12, 1024, 64)),
    softmax=((18432, 256), (49152, 1024)),
    causal_softmax=((12, 6, 256), (4, 12, 1024)),
    norm=((3072, 384), (4096, 768)),
    gelu=((3072, 1536), (4096, 3072)),
    cross_entropy=((3072, 65), (1024, 50304)),
    linear_cross_entropy=((3072, 384, 65), (1024, 768, 50304)),
    dropout=((3072, 384), (4096, 768)),
    model=_gpt(),
)
_TOKENS = 16 * 1024  # of a step of GPT-2
_FULL_ON_GPU = Sizes(
    attention=(
        (16, 12, 1024, 64),
        (16, 6, 1024, 128),
        *((_TOKENS // T, 768 // D, T, D) for T in (256, 4096) for D in (64, 128)),
    ),
    softmax=tuple(((1 << 26) // N, N) for N in (1024, 4096)),
    causal_softmax=((4, 12, 1024),),
    norm=((4 * _TOKENS, 768), (4 * _TOKENS, 1600)),
    gelu=((4 * _TOKENS, 3072),),
    cross_entropy=((_TOKENS, 50304),),
    linear_cross_entropy=((_TOKENS, 768, 50304),),
    dropout=((4 * _TOKENS, 768),),
    model=_gpt2(),
)
SIZES = {
    "tiny": {"cpu": _TINY, "cuda": _TINY},
    "small": {"cpu": _SMALL, "cuda": _SMALL},
    "full": {"cpu": _FULL_ON_CPU, "cuda": _FULL_ON_GPU},
}


def cases(size: str, device_type: str, dtypes: Sequence[str]) -> list[Case]:
    """The cases of a round, one dtype after the other, the most important first."""
    sizes = SIZES[size][device_type]
    todo = [case for dtype in dtypes for case in _cases_in(sizes, dtype)]
    shapes = _parameter_shapes(sizes.model)
    small = [case for dtype in dtypes for case in _small_calls_in(dtype)]
    return [*todo, *small, clip_grad_norm_case(shapes), adamw_case(shapes)]


def _cases_in(sizes: Sizes, dtype: str) -> list[Case]:
    half = dtype != "fp32"
    first, *others = sizes.attention
    return [
        attention_case(*first, dtype),
        attention_case(*first, dtype, dropout_p=DROPOUT),
        packed_attention_case(*first, dtype),
        *(linear_cross_entropy_case(*shape, dtype) for shape in sizes.linear_cross_entropy),
        *(cross_entropy_case(*shape, dtype) for shape in sizes.cross_entropy),
        *(add_layer_norm_case(*shape, dtype) for shape in sizes.norm),
        *(add_layer_norm_case(*shape, dtype, dropout_p=DROPOUT) for shape in sizes.norm[:1]),
        *(add_layer_norm_case(*shape, dtype, stream="fp32") for shape in sizes.norm[:1] if half),
        *(layer_norm_case(*shape, dtype) for shape in sizes.norm),
        *(softmax_case(*shape, dtype) for shape in sizes.softmax),
        *(causal_softmax_case(*shape, dtype) for shape in sizes.causal_softmax),
        *(gelu_case(*shape, dtype, "tanh") for shape in sizes.gelu),
        *(gelu_case(*shape, dtype, "none") for shape in sizes.gelu[:1] if sizes.variants),
        *(gelu_case(*shape, dtype, "none", bias=False) for shape in sizes.gelu[:1] if sizes.variants),
        *(dropout_case(*shape, dtype) for shape in sizes.dropout),
        *(attention_case(*shape, dtype) for shape in others),
    ]


def _small_calls_in(dtype: str) -> list[Case]:
    """Calls so small that their time is what surrounds the kernels."""
    M, N = 8, 64
    of_ops = layer_norm_case(M, N, dtype), softmax_case(M, N, dtype), gelu_case(M, N, dtype, "none", bias=False)
    return [_in_a_row(case) for case in of_ops]


def _in_a_row(case: Case) -> Case:
    """The case with forward and backward in one, ``IN_A_ROW`` times as they come."""
    work = {BOTH: Work(sum(part.bytes for part in case.work.values()), sum(part.flops for part in case.work.values()))}

    def build(device: torch.device) -> Problem:
        problem = case.build(device)
        assert isinstance(problem, Differentiable)
        return dataclasses.replace(problem, in_a_row=IN_A_ROW)

    return dataclasses.replace(case, label=f"{case.label}, {IN_A_ROW} calls in a row", work=work, build=build)


def absent_peers(device: torch.device) -> dict[str, str]:
    """The peers that are not here at all, and why."""
    on_gpu = device.type == "cuda"
    absent: dict[str, str] = {}
    if not on_gpu:
        absent |= dict.fromkeys(("SDPA cuDNN", "SDPA memory-efficient"), "PyTorch has it for GPUs only")
        absent[FLEX] = "on a CPU it has no backward"
    for name, package in ((FLASH_ATTN, "flash-attn"), (LIGER, "liger-kernel")):
        if not on_gpu:
            absent[name] = "its kernels are for GPUs"
        elif version_of(package) is None:
            absent[name] = f"the package {package} is not installed"
    return absent


# ---------------------------------------------------------------------------------------------------------------------
# The ops
# ---------------------------------------------------------------------------------------------------------------------


def attention_case(B: int, H: int, T: int, D: int, dtype: str, dropout_p: float = 0.0) -> Case:
    """Causal attention. Forward 4 B H T D s bytes (q, k, v; o) and 2 B H T^2 D FLOPs, half of the two full products';
    backward 8 B H T D s bytes (q, k, v, o, do; dq, dk, dv) and 2.5 times the FLOPs."""

    def build(device: torch.device, dropout_p: float = dropout_p) -> Differentiable:
        def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)

        def flash_attn(*qkv: Tensor) -> Tensor:
            attention = importlib.import_module("flash_attn").flash_attn_func
            return attention(*(x.transpose(1, 2) for x in qkv), dropout_p=dropout_p, causal=True).transpose(1, 2)

        peers: dict[str, Function] = {**_with_compiled(sdpa), FLASH_ATTN: flash_attn}
        peers |= {name: functools.partial(_on_sdpa, backend, sdpa) for name, backend in SDPA_BACKENDS.items()}
        if not dropout_p:
            peers[FLEX] = _flex_attention(T, device)
        return Differentiable(
            functools.partial(ops.attention, dropout_p=dropout_p),
            peers,
            _leaves(device, dtype, q=(B, H, T, D), k=(B, H, T, D), v=(B, H, T, D)),
            [_normal(device, dtype, B, H, T, D)],
            wide=_by_sequence if not dropout_p else None,
            undropped=functools.partial(build, device, 0.0) if dropout_p else None,
        )

    label = "attention" + _dropping(dropout_p)
    return Case("attention", label, {"B": B, "H": H, "T": T, "D": D}, dtype, _attention_work(B, H, T, D, dtype), build)


def packed_attention_case(B: int, H: int, T: int, D: int, dtype: str) -> Case:
    """Causal attention on the projection's output, which the peers take apart; what is moved and computed is the
    same."""

    def build(device: torch.device) -> Differentiable:
        def split(qkv: Tensor) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, H, T, D)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()

        def flash_attn(qkv: Tensor) -> Tensor:
            return importlib.import_module("flash_attn").flash_attn_qkvpacked_func(qkv, causal=True)

        return Differentiable(
            ops.attention_qkvpacked,
            {**_with_compiled(split), FLASH_ATTN: flash_attn},
            _leaves(device, dtype, qkv=(B, T, 3, H, D)),
            [_normal(device, dtype, B, T, H, D)],
            wide=_by_sequence,
        )

    work = _attention_work(B, H, T, D, dtype)
    return Case("attention_qkvpacked", "attention_qkvpacked", {"B": B, "H": H, "T": T, "D": D}, dtype, work, build)


def _attention_work(B: int, H: int, T: int, D: int, dtype: str) -> dict[str, Work]:
    size, flops = B * H * T * D * DTYPES[dtype].itemsize, 2 * B * H * T * T * D
    return {FORWARD: Work(4 * size, flops), BACKWARD: Work(8 * size, 5 * flops // 2)}


def _on_sdpa(backend: SDPBackend, sdpa: Function, *qkv: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return sdpa(*qkv)


def _flex_attention(T: int, device: torch.device) -> Function:
    """torch.compile's attention, causal."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    @functools.cache
    def mask() -> Any:
        return create_block_mask(lambda b, h, q, k: q >= k, None, None, T, T, device=device)

    attention = _compiled(lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask))
    return lambda q, k, v: attention(q, k, v, mask())


def softmax_case(M: int, N: int, dtype: str) -> Case:
    """Forward 2 M N s bytes (x; y), backward 3 M N s (y, dy; dx)."""
    size = M * N * DTYPES[dtype].itemsize

    def build(device: torch.device) -> Differentiable:
        def liger(x: Tensor) -> Tensor:
            return _liger().liger_softmax(x)

        peers = {**_with_compiled(lambda x: torch.softmax(x, -1)), LIGER: liger}
        return Differentiable(ops.softmax, peers, _leaves(device, dtype, x=(M, N)), [_normal(device, dtype, M, N)])

    work = {FORWARD: Work(2 * size), BACKWARD: Work(3 * size)}
    return Case("softmax", "softmax", {"M": M, "N": N}, dtype, work, build)


def causal_softmax_case(B: int, H: int, T: int, dtype: str) -> Case:
    """Scale, causal mask and softmax of B H matrices of T x T. What is seen is read, all is written: with n the half
    that is seen, forward (n + B H T^2) s bytes (x; y) and backward (2 n + B H T^2) s (y, dy; dx)."""
    seen, full, s = B * H * T * (T + 1) // 2, B * H * T * T, DTYPES[dtype].itemsize

    def build(device: torch.device) -> Differentiable:
        hidden = torch.ones(T, T, dtype=torch.bool, device=device).triu(1)

        def masked(x: Tensor) -> Tensor:
            return torch.softmax((x * 0.125).masked_fill(hidden, -torch.inf), dim=-1)

        return Differentiable(
            functools.partial(ops.softmax, scale=0.125, is_causal=True),
            _with_compiled(masked),
            _leaves(device, dtype, x=(B, H, T, T)),
            [_normal(device, dtype, B, H, T, T)],
        )

    work = {FORWARD: Work((seen + full) * s), BACKWARD: Work((2 * seen + full) * s)}
    return Case("softmax", "softmax, scaled and causal", {"B": B, "H": H, "T": T}, dtype, work, build)


def layer_norm_case(M: int, N: int, dtype: str) -> Case:
    """Forward (2 M + 2) N s bytes (x, weight, bias; y), backward (3 M + 3) N s (dy, x, weight; dx, dweight, dbias)."""
    row = N * DTYPES[dtype].itemsize

    def build(device: torch.device) -> Differentiable:
        def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return _liger().liger_layer_norm(x, weight, bias, 1e-5)

        peers = {**_with_compiled(lambda x, weight, bias: F.layer_norm(x, (N,), weight, bias)), LIGER: liger}
        leaves = _leaves(device, dtype, x=(M, N), weight=(N,), bias=(N,))
        return Differentiable(ops.layer_norm, peers, leaves, [_normal(device, dtype, M, N)])

    work = {FORWARD: Work((2 * M + 2) * row), BACKWARD: Work((3 * M + 3) * row)}
    return Case("layer_norm", "layer_norm", {"M": M, "N": N}, dtype, work, build)


def add_layer_norm_case(M: int, N: int, dtype: str, stream: str | None = None, dropout_p: float = 0.0) -> Case:
    """With t bytes an element of the residual stream and of the parameters (``stream``, fp32 as under autocast; None
    is x's dtype): forward 2 M N (s + t) + 2 N t bytes (x, residual, weight, bias; y, residual_out), backward
    M N (s + 3 t) + 3 N t (dy, dresidual_out, residual_out, weight; dresidual, dweight, dbias), and M N s for dx where
    it is not dresidual: where it has a dtype of its own, or a mask."""
    of_stream = stream or dtype
    s, t = DTYPES[dtype].itemsize, DTYPES[of_stream].itemsize
    dx = M * N * s if of_stream != dtype or dropout_p else 0

    def build(device: torch.device, dropout_p: float = dropout_p) -> Differentiable:
        def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            total = (F.dropout(x, dropout_p) if dropout_p else x) + residual
            return F.layer_norm(total, (N,), weight, bias).to(x.dtype), total

        return Differentiable(
            functools.partial(ops.add_layer_norm, dropout_p=dropout_p),
            _with_compiled(plain),
            {
                **_leaves(device, dtype, x=(M, N)),
                **_leaves(device, of_stream, residual=(M, N), weight=(N,), bias=(N,)),
            },
            [_normal(device, dtype, M, N), _normal(device, of_stream, M, N)],
            undropped=functools.partial(build, device, 0.0) if dropout_p else None,
        )

    work = {
        FORWARD: Work(2 * M * N * (s + t) + 2 * N * t),
        BACKWARD: Work(M * N * (s + 3 * t) + 3 * N * t + dx),
    }
    label = "add_layer_norm" + (f", stream in {stream}" if stream else "") + _dropping(dropout_p)
    return Case("add_layer_norm", label, {"M": M, "N": N}, dtype, work, build)


def gelu_case(M: int, N: int, dtype: str, approximate: str, bias: bool = True) -> Case:
    """With b = 1 where there is a bias: forward (2 M + b) N s bytes (x, bias; y), backward (3 M + 2 b) N s (dy, x,
    bias; dx, dbias)."""
    row = N * DTYPES[dtype].itemsize

    def build(device: torch.device) -> Differentiable:
        def plain(x: Tensor, bias: Tensor | None = None) -> Tensor:
            return F.gelu(x if bias is None else x + bias, approximate=approximate)

        leaves = _leaves(device, dtype, x=(M, N), **({"bias": (N,)} if bias else {}))
        op = functools.partial(ops.gelu, approximate=approximate)
        return Differentiable(op, _with_compiled(plain), leaves, [_normal(device, dtype, M, N)])

    work = {FORWARD: Work((2 * M + bias) * row), BACKWARD: Work((3 * M + 2 * bias) * row)}
    label = "gelu" + (", tanh" if approximate == "tanh" else "") + (", with bias" if bias else "")
    return Case("gelu", label, {"M": M, "N": N}, dtype, work, build)


def cross_entropy_case(M: int, V: int, dtype: str) -> Case:
    """With its gradient, since a kernel that reads the logits once makes it in the forward: 2 M V s + 8 M bytes
    (logits, targets; dlogits)."""

    def build(device: torch.device) -> Differentiable:
        targets = torch.randint(V, (M,), device=device)

        def liger(logits: Tensor) -> Tensor:
            return _liger().liger_cross_entropy(logits, targets)

        op = functools.partial(ops.cross_entropy, targets=targets)
        return Differentiable(
            op,
            {**_with_compiled(lambda logits: F.cross_entropy(logits.float(), targets)), LIGER: liger},
            _leaves(device, dtype, logits=(M, V)),
            [torch.ones((), device=device)],
            wide=functools.partial(_by_rows, ops.cross_entropy, targets),
            spoiling=frozenset({LIGER}),
        )

    work = {BOTH: Work(2 * M * V * DTYPES[dtype].itemsize + 8 * M)}
    return Case("cross_entropy", "cross_entropy", {"M": M, "V": V}, dtype, work, build)


def linear_cross_entropy_case(M: int, C: int, V: int, dtype: str) -> Case:
    """With its gradients: 2 (M + V) C s + 8 M bytes (x, weight, targets; dx, dweight; logits need never be in memory)
    and 6 M V C FLOPs (logits, dx and dweight are a product each)."""

    def build(device: torch.device) -> Differentiable:
        leaves, targets = _leaves(device, dtype, x=(M, C), weight=(V, C)), torch.randint(V, (M,), device=device)
        with torch.no_grad():
            leaves["weight"].mul_(C**-0.5)  # logits of unit variance

        def liger(x: Tensor, weight: Tensor) -> Tensor:
            return _liger().liger_fused_linear_cross_entropy(x, weight, targets)

        def plain(x: Tensor, weight: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, weight).float(), targets)

        return Differentiable(
            functools.partial(ops.linear_cross_entropy, targets=targets),
            {**_with_compiled(plain), LIGER: liger},
            leaves,
            [torch.ones((), device=device)],
            wide=functools.partial(_by_rows, ops.linear_cross_entropy, targets),
        )

    work = {BOTH: Work(2 * (M + V) * C * DTYPES[dtype].itemsize + 8 * M, 6 * M * V * C)}
    return Case("linear_cross_entropy", "linear_cross_entropy", {"M": M, "C": C, "V": V}, dtype, work, build)


def dropout_case(M: int, N: int, dtype: str, p: float = DROPOUT) -> Case:
    """Forward 2 M N s bytes (x; y), backward 2 M N s (dy; dx). The drawing of the seed is in the time."""
    size = 2 * M * N * DTYPES[dtype].itemsize

    def build(device: torch.device, p: float = p) -> Differentiable:
        return Differentiable(
            functools.partial(ops.dropout, p=p),
            _with_compiled(lambda x: F.dropout(x, p)),
            _leaves(device, dtype, x=(M, N)),
            [_normal(device, dtype, M, N)],
            undropped=functools.partial(build, device, 0.0) if p else None,
        )

    return Case(
        "dropout", "dropout" + _dropping(p), {"M": M, "N": N}, dtype, {FORWARD: Work(size), BACKWARD: Work(size)}, build
    )


def _dropping(p: float) -> str:
    return f", p={p:g}" if p else ""


def adamw_case(shapes: Sequence[tuple[int, ...]]) -> Case:
    """The optimizer's step, 28 bytes a parameter, all fp32 (parameter, gradient and two means read; parameter and
    means written)."""
    count = sum(map(math.prod, shapes))
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

    def build(device: torch.device) -> InPlace:
        before = [0.02 * torch.randn(shape, device=device) for shape in shapes]
        grads = [torch.randn(shape, device=device) for shape in shapes]

        def optimizer(make: Callable[..., torch.optim.Optimizer], compiled: bool = False, **settings: Any) -> Change:
            params = [p.clone().requires_grad_() for p in before]
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            step = make(params, **options, **settings).step
            return Change(_compiled(step) if compiled else step, [p.detach() for p in params])

        def truth() -> list[Tensor]:
            params, wide = [p.double() for p in before], [g.double() for g in grads]
            means, squares = ([torch.zeros_like(p) for p in params] for _ in range(2))
            step, lr = torch.ones((), device=device), torch.full((), options["lr"], device=device)
            ops.adamw_(params, wide, means, squares, step, **{**options, "lr": lr, "backend": "reference"})
            return params

        plain = torch.optim.AdamW
        changes: dict[str, Callable[[], Change]] = {
            **{name: functools.partial(optimizer, AdamW, backend=name) for name in BACKENDS},
            EAGER: functools.partial(optimizer, plain, foreach=True),
            FUSED: functools.partial(optimizer, plain, fused=True),
            COMPILED: functools.partial(
                optimizer, plain, compiled=True, foreach=True, capturable=device.type == "cuda"
            ),
        }
        return InPlace(changes, truth)

    return Case("adamw_", "adamw_", {"parameters": count}, "fp32", {STEP: Work(28 * count)}, build)


def clip_grad_norm_case(shapes: Sequence[tuple[int, ...]]) -> Case:
    """12 bytes a gradient, fp32 (read for the norm; read and written to be scaled). Each call finds them unclipped."""
    count = sum(map(math.prod, shapes))

    def build(device: torch.device) -> InPlace:
        before = [torch.randn(shape, device=device) for shape in shapes]

        def clipped(clip: Callable[[list[Tensor], list[Tensor]], Any]) -> Change:
            params = [torch.empty_like(g) for g in before]
            grads = [g.clone() for g in before]
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            return Change(lambda: clip(params, grads), grads, lambda: torch._foreach_copy_(grads, before))

        def truth() -> list[Tensor]:
            norm = torch.stack([g.double().square().sum() for g in before]).sum().sqrt()
            return [g / (norm + 1e-6) for g in before]

        def ours(backend: str) -> Callable[[list[Tensor], list[Tensor]], Any]:
            return lambda _, grads: ops.clip_grad_norm_(grads, 1.0, backend=backend)

        def plain(params: list[Tensor]) -> Tensor:
            return nn.utils.clip_grad_norm_(params, 1.0, foreach=True)

        compiled = _compiled(plain)
        changes: dict[str, Callable[[], Change]] = {
            **{name: functools.partial(clipped, ours(name)) for name in BACKENDS},
            EAGER: functools.partial(clipped, lambda params, _: plain(params)),
            COMPILED: functools.partial(clipped, lambda params, _: compiled(params)),
        }
        return InPlace(changes, truth)

    return Case("clip_grad_norm_", "clip_grad_norm_", {"gradients": count}, "fp32", {STEP: Work(12 * count)}, build)


def _parameter_shapes(config: GPTConfig) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        return [tuple(p.shape) for p in GPT(config).parameters()]


# ---------------------------------------------------------------------------------------------------------------------
# The two kinds of problems
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Differentiable:
    """Functions of the same leaves, forward and backward.

    Args:
        op: the public op, on the leaves in their order and ``backend``.
        peers: by name; one of them is ``EAGER``.
        leaves: by the names of the op's arguments.
        upstream: the gradients of the outputs.
        wide: the truth; None runs the op on the reference backend in float64. Called with this, it gives outputs and
            gradients.
        undropped: where something is dropped, the same problem where nothing is. Ours draw the reference's mask from
            the same seed; peers draw others, and are held to the truth without.
        spoiling: peers that write into their inputs: they get copies, made outside of the time.
        in_a_row: calls that make one sample, where forward and backward are timed as one.
    """

    op: Function
    peers: dict[str, Function]
    leaves: dict[str, Tensor]
    upstream: list[Tensor]
    wide: Callable[[Differentiable], list[Tensor]] | None = None
    undropped: Callable[[], Differentiable] | None = None
    spoiling: frozenset[str] = frozenset()
    in_a_row: int = 1
    _known: dict[str, Any] = dataclasses.field(default_factory=dict)  # the truth and what else is computed once

    def names(self) -> list[str]:
        return [*BACKENDS, *self.peers]

    def function(self, name: str) -> Function:
        return functools.partial(self.op, backend=name) if name in BACKENDS else self.peers[name]

    def check(self, name: str) -> float:
        got = self._results(self.function(name))
        if name not in BACKENDS and self.undropped is not None:
            return self._once("undropped", self.undropped).check(name)
        truth = self._once("truth", lambda: self.wide(self) if self.wide else _reference(self))
        if name not in BACKENDS:
            return held_loosely(got, truth)
        eager = functools.partial(self.op, backend="torch") if self.undropped else self.peers[EAGER]
        bar = self._once("bar", lambda: _errors(self._results(eager), truth))
        named = [*(f"output {i}" for i in range(len(self.upstream))), *(f"the gradient of {x}" for x in self.leaves)]
        upstream = max(map(largest, self.upstream))
        return held_to_the_rule(got, truth, bar, named, [0.0] * len(self.upstream) + [upstream] * len(self.leaves))

    def contestant(self, name: str, part: str) -> Contestant:
        fn, own = self.function(name), list(self.leaves.values())

        def inputs() -> list[Tensor]:
            return [x.detach().clone().requires_grad_() for x in own] if name in self.spoiling else own

        def forward(leaves: list[Tensor]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
            return leaves, as_tuple(fn(*leaves))

        def backward(state: tuple[list[Tensor], tuple[Tensor, ...]]) -> Any:
            leaves, outputs = state
            return torch.autograd.grad(outputs, leaves, self.upstream)

        if part == FORWARD:
            return Contestant(forward, inputs)
        if part == BACKWARD:
            return Contestant(backward, lambda: forward(inputs()))
        return Contestant(lambda leaves: backward(forward(leaves)), inputs, self.in_a_row)

    def _results(self, fn: Function) -> list[Tensor]:
        """Outputs, then gradients, in memory that held NaN before: what is not written shows."""
        torch.manual_seed(0)
        leaves = [x.detach().clone().requires_grad_() for x in self.leaves.values()]
        size = sum(x.nbytes for x in (*leaves, *self.upstream))
        torch.full((size,), math.nan, dtype=torch.bfloat16, device=leaves[0].device)  # freed at once, and used next
        outputs = as_tuple(fn(*leaves))
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, self.upstream)]

    def _once(self, what: str, compute: Callable[[], Any]) -> Any:
        if what not in self._known:
            self._known[what] = compute()
        return self._known[what]


@dataclasses.dataclass(frozen=True)
class Change:
    """A call that changes ``tensors``; ``restore``, outside of the time, undoes that where the next call needs it."""

    call: Callable[[], Any]
    tensors: list[Tensor]
    restore: Callable[[], Any] = lambda: None


@dataclasses.dataclass(frozen=True)
class InPlace:
    """Calls that each change a state of their own, made where it is first asked for; all of them begin alike."""

    changes: dict[str, Callable[[], Change]]
    wide: Callable[[], list[Tensor]]
    _known: dict[str, Any] = dataclasses.field(default_factory=dict)

    def names(self) -> list[str]:
        return list(self.changes)

    def check(self, name: str) -> float:
        if "truth" not in self._known:
            eager = self.changes[EAGER]()
            eager.call()
            truth = self.wide()
            self._known.update(truth=truth, bar=_errors(eager.tensors, truth))
        truth, change = self._known["truth"], self._change(name)
        change.call()
        if name not in BACKENDS:
            return held_loosely(change.tensors, truth)
        named = [f"tensor {i}" for i in range(len(truth))]
        return held_to_the_rule(change.tensors, truth, self._known["bar"], named, [0.0] * len(truth))

    def contestant(self, name: str, part: str) -> Contestant:
        change = self._change(name)
        return Contestant(lambda _: change.call(), change.restore)

    def _change(self, name: str) -> Change:
        if name not in self._known:
            self._known[name] = self.changes[name]()
        return self._known[name]


def held_to_the_rule(
    got: Sequence[Tensor],
    truth: Sequence[Tensor],
    bar: Sequence[float],
    names: Sequence[str],
    upstream: Sequence[float],
) -> float:
    """The relative error of results that keep the error rule.

    Args:
        got, truth: the results, and what they should be.
        bar: the eager op's error in each.
        names: of the results.
        upstream: for a gradient the largest upstream gradient, else 0.
    Raises:
        WrongResult: one of them does not.
    """
    relative = largest_error(got, truth)
    for mine, true, of_eager, name, above in zip(got, truth, bar, names, upstream, strict=True):
        if not math.isfinite(of_eager):
            raise WrongResult(f"it cannot be judged: {name} of {EAGER} is not finite")
        error, allowed = absolute_error(mine, true), allowed_error(of_eager, largest(true), mine.dtype, above)
        if not error <= allowed:
            raise WrongResult(
                f"its relative error is {relative:.3g}: {name} is off by {error:.3g}, allowed is {allowed:.3g}"
            )
    return relative


def held_loosely(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The relative error of a peer's results.

    Raises:
        WrongResult: it is above ``LOOSE`` of the coarsest of their dtypes.
    """
    relative, allowed = largest_error(got, truth), max(LOOSE[x.dtype] for x in got)
    if not relative <= allowed:
        raise WrongResult(f"its relative error is {relative:.3g}, allowed is {allowed:g}")
    return relative


def _errors(got: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    return [absolute_error(mine, true) for mine, true in zip(got, truth, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# The truth
# ---------------------------------------------------------------------------------------------------------------------


def _reference(problem: Differentiable) -> list[Tensor]:
    """Outputs and gradients of the op on the reference backend, in float64, with the mask of seed 0."""
    torch.manual_seed(0)
    wide = [x.detach().double().requires_grad_() for x in problem.leaves.values()]
    outputs = as_tuple(problem.op(*wide, backend="reference"))
    grads = torch.autograd.grad(outputs, wide, [dy.double() for dy in problem.upstream])
    return [*(y.detach() for y in outputs), *grads]


def _by_sequence(problem: Differentiable) -> list[Tensor]:
    """The same, a sequence at a time: in float64 attention's matrix of scores is large."""
    parts = []
    for b in range(len(problem.upstream[0])):
        leaves = {name: x[b : b + 1] for name, x in problem.leaves.items()}
        parts.append(_reference(dataclasses.replace(problem, leaves=leaves, upstream=[problem.upstream[0][b : b + 1]])))
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _by_rows(op: Function, targets: Tensor, problem: Differentiable) -> list[Tensor]:
    """The mean loss and the gradients of (M, ...) rows and of what else there is, 1024 rows at a time."""
    rows, *others = (x.detach() for x in problem.leaves.values())
    wide = [x.double().requires_grad_() for x in others]
    loss = torch.zeros((), dtype=torch.float64, device=rows.device)
    drows = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
    sums = [torch.zeros_like(x) for x in wide]
    for start in range(0, len(rows), 1024):
        block = slice(start, start + 1024)
        leaf = rows[block].double().requires_grad_()
        part = op(leaf, *wide, targets=targets[block], backend="reference") * (len(leaf) / len(rows))
        drows[block], *grads = torch.autograd.grad(part, [leaf, *wide])
        loss += part.detach()
        for total, grad in zip(sums, grads, strict=True):
            total += grad
    return [loss, drows, *sums]


# ---------------------------------------------------------------------------------------------------------------------
# What the cases are made of
# ---------------------------------------------------------------------------------------------------------------------


def _with_compiled(plain: Function) -> dict[str, Function]:
    return {EAGER: plain, COMPILED: _compiled(plain)}


def _compiled(fn: Function) -> Function:
    """``fn`` by torch.compile, which is loaded at the first call: that takes seconds."""
    compiled = functools.cache(lambda: torch.compile(fn, dynamic=False))
    return lambda *args: compiled()(*args)


def _liger() -> Any:
    return importlib.import_module("liger_kernel.transformers.functional")


def _leaves(device: torch.device, dtype: str, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: _normal(device, dtype, *shape).requires_grad_() for name, shape in shapes.items()}


def _normal(device: torch.device, dtype: str, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=DTYPES[dtype], device=device)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
