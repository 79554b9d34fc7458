"""The dispatcher ops ``fastgpt_triton::...``: schemas, fakes, and the kernels' functions behind them.

This module needs torch alone. Triton, and the file of a kernel, are loaded when the first of its ops runs, so that
importing fastgpt costs nothing, and a file that is run by ``python -m`` registers nothing twice. Being dispatcher ops,
the functions are opaque to ``torch.compile``: it traces the fakes below, which make outputs of the right shape and
dtype.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "fastgpt_triton"

# Op: the file that has its function, of the same name, and the signature.
_SCHEMAS = {
    "attention_fwd": (
        "attention",
        "(Tensor q, Tensor k, Tensor v, bool is_causal, float dropout_p, float scale, Tensor? seqlens_k, Tensor? seed)"
        " -> (Tensor o, Tensor lse)",
    ),
    "attention_bwd": (
        "attention",
        "(Tensor do_, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, bool is_causal, float dropout_p, float scale,"
        " Tensor? seqlens_k, Tensor? seed) -> (Tensor dq, Tensor dk, Tensor dv)",
    ),
    "attention_qkvpacked_fwd": (
        "attention",
        "(Tensor qkv, bool is_causal, float dropout_p, float scale, Tensor? seqlens_k, Tensor? seed)"
        " -> (Tensor o, Tensor lse)",
    ),
    "attention_qkvpacked_bwd": (
        "attention",
        "(Tensor do_, Tensor qkv, Tensor o, Tensor lse, bool is_causal, float dropout_p, float scale,"
        " Tensor? seqlens_k, Tensor? seed) -> Tensor dqkv",
    ),
    "softmax_fwd": ("softmax", "(Tensor x, float scale, bool is_causal) -> Tensor y"),
    "softmax_bwd": ("softmax", "(Tensor dy, Tensor y, float scale, bool is_causal) -> Tensor dx"),
    "layer_norm_fwd": (
        "layer_norm",
        "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    ),
    "layer_norm_bwd": (
        "layer_norm",
        "(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    ),
    "add_layer_norm_fwd": (
        "add_layer_norm",
        "(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float dropout_p, float eps, Tensor? seed)"
        " -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)",
    ),
    "add_layer_norm_bwd": (
        "add_layer_norm",
        "(Tensor dy, Tensor? dresidual_out, Tensor residual_out, Tensor weight, Tensor mean, Tensor rstd,"
        " float dropout_p, Tensor? seed, ScalarType x_dtype, ScalarType residual_dtype)"
        " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    ),
    "gelu_fwd": ("gelu", "(Tensor x, Tensor? bias, str approximate) -> Tensor y"),
    "gelu_bwd": ("gelu", "(Tensor dy, Tensor x, Tensor? bias, str approximate) -> (Tensor dx, Tensor dbias)"),
    "cross_entropy_fwd": (
        "cross_entropy",
        "(Tensor logits, Tensor targets, int ignore_index, bool with_gradient)"
        " -> (Tensor loss, Tensor stats, Tensor inverse_count, Tensor dlogits)",
    ),
    "cross_entropy_bwd": (
        "cross_entropy",
        "(Tensor dloss, Tensor logits, Tensor targets, int ignore_index, Tensor stats, Tensor inverse_count)"
        " -> Tensor dlogits",
    ),
    "scale_gradient_": ("cross_entropy", "(Tensor(a!) gradient, Tensor dloss) -> ()"),
    "linear_cross_entropy_fwd": (
        "linear_cross_entropy",
        "(Tensor x, Tensor weight, Tensor targets, int ignore_index, bool with_gradient)"
        " -> (Tensor loss, Tensor inverse_count, Tensor dx, Tensor dweight)",
    ),
    "dropout_fwd": ("dropout", "(Tensor x, float p, Tensor seed) -> Tensor y"),
    "dropout_bwd": ("dropout", "(Tensor dy, float p, Tensor seed) -> Tensor dx"),
    "adamw_": (
        "adamw",
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor step, Tensor lr,"
        " float[] betas, float eps, float weight_decay) -> ()",
    ),
    "clip_grad_norm_": ("clip_grad_norm", "(Tensor(a!)[] grads, float max_norm) -> Tensor norm"),
}


def interpreting() -> bool:
    """Whether Triton's interpreter is to run the kernels, on CPU tensors: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "on", "yes", "true")


def missing() -> str | None:
    """Why no Triton kernel can run on this machine, whatever the tensors, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def op(name: str) -> Callable[..., Any]:
    """The dispatcher op of that name: "layer_norm_fwd"."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def has_rows_in_reach(x: Tensor) -> bool:
    """Whether a row's elements lie side by side, and the rows of a tile within 2^31 elements of each other."""
    return x.stride(-1) == 1 and x.stride(-2) < 1 << 23


def dense_like(x: Tensor) -> Tensor:
    """A fresh tensor in ``x``'s memory order, where that has its rows in reach."""
    y = torch.empty_like(x)
    return y if has_rows_in_reach(y) else torch.empty(x.shape, dtype=x.dtype, device=x.device)


_library = torch.library.Library(NAMESPACE, "DEF")


# These keep tables on the device from call to call, which a pool of captured graphs might take back.
_UNSAFE_IN_POOLS = ("adamw_", "clip_grad_norm_")


def _register(name: str, file: str, schema: str) -> None:
    _library.define(name + schema, tags=[torch.Tag.cudagraph_unsafe] if name in _UNSAFE_IN_POOLS else [])

    @functools.cache
    def function() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"fastgpt.triton_kernels.{file}"), name)

    def run(*args: Any) -> Any:
        x = args[0][0] if isinstance(args[0], list) else args[0]
        if not x.is_cuda:
            return function()(*args)
        # A launch goes to the current device, which need not be that of the tensors.
        with torch.cuda.device(x.device):
            _require_supported(x.device)
            return function()(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")


@functools.cache
def _require_supported(device: torch.device) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(
            f"backend 'triton' needs a GPU of compute capability 8.0 or later, {torch.cuda.get_device_name(device)} "
            f"has {major}.{minor}"
        )


for _name, (_file, _schema) in _SCHEMAS.items():
    _register(_name, _file, _schema)


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=_library)


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


@_fake("attention_fwd")
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return dense_like(q), _fp32(q, *q.shape[:3])


@_fake("attention_bwd")
def _(do_: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return dense_like(q), dense_like(k), dense_like(v)


@_fake("attention_qkvpacked_fwd")
def _(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, _three, H, D = qkv.shape
    return _fresh(qkv, B, T, H, D), _fp32(qkv, B, H, T)


@_fake("attention_qkvpacked_bwd")
def _(do_: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return _fresh(qkv, *qkv.shape)


@_fake("softmax_fwd")
def _(x: Tensor, *_: Any) -> Tensor:
    return _fresh(x, *x.shape)


@_fake("softmax_bwd")
def _(dy: Tensor, y: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(y)


@_fake("layer_norm_fwd")
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fresh(x, *x.shape), _fp32(x, _rows(x)), _fp32(x, _rows(x))


@_fake("layer_norm_bwd")
def _(dy: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fresh(x, *x.shape), _fresh(weight, *weight.shape), _fresh(weight, *weight.shape)


@_fake("add_layer_norm_fwd")
def _(x: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stream = _fresh(x, *x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return _fresh(x, *x.shape), stream, _fp32(x, _rows(x)), _fp32(x, _rows(x))


@_fake("add_layer_norm_bwd")
def _(
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


@_fake("gelu_fwd")
def _(x: Tensor, *_: Any) -> Tensor:
    return _fresh(x, *x.shape)


@_fake("gelu_bwd")
def _(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    return _fresh(x, *x.shape), _fresh(x, 0) if bias is None else _fresh(bias, *bias.shape)


@_fake("cross_entropy_fwd")
def _(logits: Tensor, targets: Tensor, ignore_index: int, with_gradient: bool) -> tuple[Tensor, ...]:
    M, V = logits.shape
    return _fp32(logits), _fp32(logits, 2, M), _fp32(logits), _fresh(logits, M if with_gradient else 0, V)


@_fake("cross_entropy_bwd")
def _(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return _fresh(logits, *logits.shape)


@_fake("scale_gradient_")
def _(gradient: Tensor, dloss: Tensor) -> None:
    return None


@_fake("linear_cross_entropy_fwd")
def _(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_gradient: bool) -> tuple[Tensor, ...]:
    M, C = x.shape
    V = weight.shape[0]
    dx = _fresh(x, M if with_gradient else 0, C)
    return _fp32(x), _fp32(x), dx, _fp32(weight, V if with_gradient else 0, C)


@_fake("dropout_fwd")
def _(x: Tensor, *_: Any) -> Tensor:
    return _fresh(x, *x.shape)


@_fake("dropout_bwd")
def _(dy: Tensor, *_: Any) -> Tensor:
    return _fresh(dy, *dy.shape)


@_fake("adamw_")
def _(*_: Any) -> None:
    return None


@_fake("clip_grad_norm_")
def _(grads: list[Tensor], max_norm: float) -> Tensor:
    return _fp32(grads[0])
