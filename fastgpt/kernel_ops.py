"""The dispatcher ops that a kernel backend registers, under a namespace of its own: their schemas and fakes.

Every kernel backend (triton, cpp, cuda) implements these signatures; ``docs/architecture.md`` tabulates them. Being
dispatcher ops, its functions are opaque to ``torch.compile``: it traces the fakes below, which make outputs of the
right shape and dtype. This module needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SCHEMAS = {
    "attention_fwd": (
        "(Tensor q, Tensor k, Tensor v, bool is_causal, float dropout_p, float scale, Tensor? seqlens_k, Tensor? seed)"
        " -> (Tensor o, Tensor lse)"
    ),
    "attention_bwd": (
        "(Tensor do_, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, bool is_causal, float dropout_p, float scale,"
        " Tensor? seqlens_k, Tensor? seed) -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
    "attention_qkvpacked_fwd": (
        "(Tensor qkv, bool is_causal, float dropout_p, float scale, Tensor? seqlens_k, Tensor? seed)"
        " -> (Tensor o, Tensor lse)"
    ),
    "attention_qkvpacked_bwd": (
        "(Tensor do_, Tensor qkv, Tensor o, Tensor lse, bool is_causal, float dropout_p, float scale,"
        " Tensor? seqlens_k, Tensor? seed) -> Tensor dqkv"
    ),
    "softmax_fwd": "(Tensor x, float scale, bool is_causal) -> Tensor y",
    "softmax_bwd": "(Tensor dy, Tensor y, float scale, bool is_causal) -> Tensor dx",
    "layer_norm_fwd": ("(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)"),
    "layer_norm_bwd": (
        "(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor dx, Tensor dweight, Tensor dbias)"
    ),
    "add_layer_norm_fwd": (
        "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float dropout_p, float eps, Tensor? seed)"
        " -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)"
    ),
    "add_layer_norm_bwd": (
        "(Tensor dy, Tensor? dresidual_out, Tensor residual_out, Tensor weight, Tensor mean, Tensor rstd,"
        " float dropout_p, Tensor? seed, ScalarType x_dtype, ScalarType residual_dtype)"
        " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
    ),
    "gelu_fwd": "(Tensor x, Tensor? bias, str approximate) -> Tensor y",
    "gelu_bwd": "(Tensor dy, Tensor x, Tensor? bias, str approximate) -> (Tensor dx, Tensor dbias)",
    "cross_entropy_fwd": (
        "(Tensor logits, Tensor targets, int ignore_index, bool with_gradient)"
        " -> (Tensor loss, Tensor stats, Tensor inverse_count, Tensor dlogits)"
    ),
    "cross_entropy_bwd": (
        "(Tensor dloss, Tensor logits, Tensor targets, int ignore_index, Tensor stats, Tensor inverse_count)"
        " -> Tensor dlogits"
    ),
    "scale_gradient_": "(Tensor(a!) gradient, Tensor dloss) -> ()",
    "linear_cross_entropy_fwd": (
        "(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool with_gradient)"
        " -> (Tensor loss, Tensor inverse_count, Tensor dx, Tensor dweight)"
    ),
    "dropout_fwd": "(Tensor x, float p, Tensor seed) -> Tensor y",
    "dropout_bwd": "(Tensor dy, float p, Tensor seed) -> Tensor dx",
    "adamw_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor step, Tensor lr,"
        " float[] betas, float eps, float weight_decay) -> ()"
    ),
    "clip_grad_norm_": "(Tensor(a!)[] grads, float max_norm) -> Tensor norm",
}

_fakes: dict[str, Callable[..., Any]] = {}


def define(namespace: str, tags: dict[str, list[torch.Tag]] | None = None) -> torch.library.Library:
    """The library ``namespace`` with every op defined and faked; its implementations are still to come.

    ``tags`` are those of ops by name.
    """
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(tags or {}).get(name, []))
        torch.library.register_fake(f"{namespace}::{name}", _fakes[name], lib=library)
        # The op's own autograd.Function has gradients; the dispatcher's stand-in for a missing one costs microseconds.
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return library


def op(namespace: str, name: str) -> Callable[..., Any]:
    """The dispatcher op of that name: "layer_norm_fwd"."""
    return getattr(getattr(torch.ops, namespace), name).default


def has_rows_in_reach(x: Tensor) -> bool:
    """Whether a row's elements lie side by side, and the rows of a tile within 2^31 elements of each other."""
    return x.stride(-1) == 1 and x.stride(-2) < 1 << 23


def dense_like(x: Tensor) -> Tensor:
    """A fresh tensor in ``x``'s memory order, where that has its rows in reach."""
    y = torch.empty_like(x)
    return y if has_rows_in_reach(y) else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake(fake: Callable[..., Any]) -> Callable[..., Any]:
    _fakes[fake.__name__] = fake
    return fake


def _fresh(x: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


def _rows(x: Tensor) -> Any:
    """How many rows of its last dimension ``x`` has."""
    rows: Any = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return rows


def _fp32(x: Tensor, *shape: Any) -> Tensor:
    return _fresh(x, *shape, dtype=torch.float32)


@_fake
def attention_fwd(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return dense_like(q), _fp32(q, *q.shape[:3])


@_fake
def attention_bwd(do_: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return dense_like(q), dense_like(k), dense_like(v)


@_fake
def attention_qkvpacked_fwd(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, _three, H, D = qkv.shape
    return _fresh(qkv, B, T, H, D), _fp32(qkv, B, H, T)


@_fake
def attention_qkvpacked_bwd(do_: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return _fresh(qkv, *qkv.shape)


@_fake
def softmax_fwd(x: Tensor, *_: Any) -> Tensor:
    return _fresh(x, *x.shape)


@_fake
def softmax_bwd(dy: Tensor, y: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(y)


@_fake
def layer_norm_fwd(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fresh(x, *x.shape), _fp32(x, _rows(x)), _fp32(x, _rows(x))


@_fake
def layer_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fresh(x, *x.shape), _fresh(weight, *weight.shape), _fresh(weight, *weight.shape)


@_fake
def add_layer_norm_fwd(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stream = _fresh(x, *x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return _fresh(x, *x.shape), stream, _fp32(x, _rows(x)), _fp32(x, _rows(x))


@_fake
def add_layer_norm_bwd(
    dy: Tensor,
    dresidual_out: Tensor | None,
    residual_out: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    same = seed is None and x_dtype == residual_dtype
    dx = _fresh(dy, *((0,) if same else residual_out.shape), dtype=x_dtype)
    dresidual = _fresh(dy, *residual_out.shape, dtype=residual_dtype)
    return dx, dresidual, _fresh(weight, *weight.shape), _fresh(weight, *weight.shape)


@_fake
def gelu_fwd(x: Tensor, *_: Any) -> Tensor:
    return _fresh(x, *x.shape)


@_fake
def gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    return _fresh(x, *x.shape), _fresh(x, 0) if bias is None else _fresh(bias, *bias.shape)


@_fake
def cross_entropy_fwd(logits: Tensor, targets: Tensor, ignore_index: int, with_gradient: bool) -> tuple[Tensor, ...]:
    M, V = logits.shape
    return _fp32(logits), _fp32(logits, 2, M), _fp32(logits), _fresh(logits, M if with_gradient else 0, V)


@_fake
def cross_entropy_bwd(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return _fresh(logits, *logits.shape)


@_fake
def scale_gradient_(*_: Any) -> None:
    return None


@_fake
def linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, ...]:
    M, C = x.shape
    V = weight.shape[0]
    dx = _fresh(x, M if with_gradient else 0, C)
    return _fp32(x), _fp32(x), dx, _fp32(weight, V if with_gradient else 0, C)


@_fake
def dropout_fwd(x: Tensor, *_: Any) -> Tensor:
    return _fresh(x, *x.shape)


@_fake
def dropout_bwd(dy: Tensor, *_: Any) -> Tensor:
    return _fresh(dy, *dy.shape)


@_fake
def adamw_(*_: Any) -> None:
    return None


@_fake
def clip_grad_norm_(grads: list[Tensor], max_norm: float) -> Tensor:
    return _fp32(grads[0])
