from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.dispatch import Kernels
from fastgpt.ops.autocast import as_autocast
from fastgpt.ops.backward import apply, first_derivative
from fastgpt.ops.checks import check_dropout, check_flag, check_like, check_number, check_seqlens, check_tensor
from fastgpt.ops.seed import seed_for


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_causal: bool = True,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seqlens_k: Tensor | None = None,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v, head by head (Vaswani et al., 2017, eq. 1).

    Only the reference, and torch where it drops, build the (Tq, Tk) matrix. Under autocast, q, k and v are cast as
    ``F.scaled_dot_product_attention`` casts them.

    Args:
        q: (B, H, Tq, D), fp32, fp16 or bf16 (float64 on the reference), any strides.
        k, v: (B, H, Tk, D), in ``q``'s dtype, on its device.
        is_causal: query i sees keys up to i + Tk - Tq (aligned at the bottom right, as decoding with a cache needs),
            Tk being the sequence's entry of ``seqlens_k`` where that is given.
        dropout_p: probability that an attention weight is dropped, in [0, 1).
        scale: factor of q k^T; None is 1 / sqrt(D).
        seqlens_k: (B,), int32: how many of a sequence's keys are valid; None is all.
        seed: int64 tensor of one element that determines the mask (``fastgpt.reference.attention_dropout_mask``);
            None draws one from the device's default generator.
        backend: "reference", "torch", "triton", "cpp" or "cuda"; None asks ``fastgpt.dispatch``.
    Returns:
        (B, H, Tq, D) in ``q.dtype``; a query that sees no key gives 0; sums are fp32; gradients flow to q, k and v.
    Raises:
        TypeError: an argument that is not a tensor or number.
        ValueError: a wrong shape, dtype or device, ``dropout_p`` outside [0, 1), ``seqlens_k`` outside [0, Tk] (looked
            at on a CPU, outside of torch.compile), or a backend that cannot run it, with the reason.
    """
    check_tensor("attention", "q", q, rank=4)
    check_tensor("attention", "k", k, rank=4)
    check_tensor("attention", "v", v, rank=4)
    q, k, v = as_autocast(q), as_autocast(k), as_autocast(v)
    B, H, _, D = q.shape
    check_like("attention", "k", k, q, "q", (B, H, k.shape[2], D))
    check_like("attention", "v", v, k, "k", k.shape)
    scale = _check_options("attention", q, k.shape[2], is_causal, dropout_p, scale, seqlens_k, seed)
    seed = seed_for(dropout_p, seed, q.device)
    args = (q, k, v, is_causal, dropout_p, scale, seqlens_k, seed)
    return dispatch.run("attention", backend, *args, on_kernels=partial(apply, _Attention))


def attention_qkvpacked(
    qkv: Tensor,
    *,
    is_causal: bool = True,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seqlens_k: Tensor | None = None,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``attention`` on one packed projection, which saves the copies that taking q, k and v apart would make.

    Args:
        qkv: (B, T, 3, H, D), fp32, fp16 or bf16, any strides.
        is_causal, dropout_p, scale, seqlens_k, seed, backend: as in ``attention``.
    Returns:
        (B, T, H, D) in ``qkv.dtype``; gradients flow to ``qkv``, packed likewise.
    Raises:
        As ``attention``.
    """
    op = "attention_qkvpacked"
    check_tensor(op, "qkv", qkv, rank=5)
    if qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv must have shape (B, T, 3, H, D), got {tuple(qkv.shape)}")
    qkv = as_autocast(qkv)
    scale = _check_options(op, qkv, qkv.shape[1], is_causal, dropout_p, scale, seqlens_k, seed)
    seed = seed_for(dropout_p, seed, qkv.device)
    args = (qkv, is_causal, dropout_p, scale, seqlens_k, seed)
    return dispatch.run(op, backend, *args, on_kernels=partial(apply, _AttentionQKVPacked))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool,
        dropout_p: float,
        scale: float,
        seqlens_k: Tensor | None,
        seed: Tensor | None,
    ) -> Tensor:
        o, lse = kernels.fwd(q, k, v, is_causal, dropout_p, scale, seqlens_k, seed)
        ctx.save_for_backward(q, k, v, o, lse, seqlens_k, seed)
        ctx.kernels, ctx.options = kernels, (is_causal, dropout_p, scale)
        return o

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        *saved, seqlens_k, seed = ctx.saved_tensors
        return None, *ctx.kernels.bwd(grads[0], *saved, *ctx.options, seqlens_k, seed), *[None] * 5


class _AttentionQKVPacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        qkv: Tensor,
        is_causal: bool,
        dropout_p: float,
        scale: float,
        seqlens_k: Tensor | None,
        seed: Tensor | None,
    ) -> Tensor:
        o, lse = kernels.fwd(qkv, is_causal, dropout_p, scale, seqlens_k, seed)
        ctx.save_for_backward(qkv, o, lse, seqlens_k, seed)
        ctx.kernels, ctx.options = kernels, (is_causal, dropout_p, scale)
        return o

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        *saved, seqlens_k, seed = ctx.saved_tensors
        return None, ctx.kernels.bwd(grads[0], *saved, *ctx.options, seqlens_k, seed), *[None] * 5


def _check_options(
    op: str,
    x: Tensor,
    seqlen_k: int,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
    seqlens_k: Tensor | None,
    seed: Tensor | None,
) -> float:
    """Check what both forms share, and return the scale."""
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: the head size D must be at least 1, got shape {tuple(x.shape)}")
    check_flag(op, "is_causal", is_causal)
    check_dropout(op, dropout_p, seed, x)
    if seqlens_k is not None:
        check_seqlens(op, seqlens_k, x, x.shape[0], seqlen_k)
    if scale is None:
        return x.shape[-1] ** -0.5
    check_number(op, "scale", scale)
    return scale
