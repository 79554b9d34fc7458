"""softmax(scale * x) over the last dimension, with an optional causal mask, in one pass.

What moves: forward reads x and writes y, backward reads y and dy and writes dx, each once: 2 and 3 tensors. That holds
while a row fits into one program's registers. A longer row is gone over twice, in the forward with a running maximum
and a sum that is rescaled whenever the maximum grows (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018). What the causal mask hides is not read, but for the rest of the 8 columns that the diagonal cuts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton_kernels.launch import as_rows, cdiv, row_blocks

# Beyond this a row in fp32 no longer fits into the registers of one program.
LONGEST_TILE = 32768


@triton.jit
def _inside(offs_m, offs_n, M, N):
    return (offs_m < M)[:, None] & (offs_n < N)[None, :]


@triton.jit
def _visible(offs_m, offs_n, M, N, Tq, IS_CAUSAL: tl.constexpr):
    """What a row may see: all of it, or, as row i of its matrix, the columns up to i + N - Tq."""
    visible = _inside(offs_m, offs_n, M, N)
    if IS_CAUSAL:
        visible = visible & (offs_n[None, :] <= (offs_m % Tq + N - Tq)[:, None])
    return visible


@triton.jit
def _load_visible(rows, offs_m, offs_n, M, N, Tq, scale, hidden, IS_CAUSAL: tl.constexpr):
    """``scale`` times what ``rows``, pointers, may see, in fp32, and ``hidden`` elsewhere."""
    mask = _inside(offs_m, offs_n, M, N)
    if IS_CAUSAL:
        # A load is as wide as its mask is constant: with that of single columns, each would be a load of its own.
        mask = mask & _visible(offs_m, offs_n // 8 * 8, M, N, Tq, IS_CAUSAL)
    x = tl.load(rows + offs_n[None, :], mask=mask, other=0.0).to(tl.float32) * scale
    return tl.where(_visible(offs_m, offs_n, M, N, Tq, IS_CAUSAL), x, hidden)


@triton.jit(do_not_specialize=["M", "Tq"])
def _softmax_fwd_kernel(
    y_ptr,  # (M, N), rows side by side
    x_ptr,  # (M, N), rows stride_xm apart
    stride_xm,
    M,
    N,
    Tq,  # rows of one causal matrix
    scale,
    IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least N
):
    # A program holds BLOCK_M whole rows: short rows share one, so that it has enough loads in flight.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    x_row = x_ptr + offs_m[:, None] * stride_xm
    x = _load_visible(x_row, offs_m, offs_n, M, N, Tq, scale, float("-inf"), IS_CAUSAL)
    # A row that sees nothing has no maximum (-inf - -inf is NaN) and no sum: it gives 0. One that is all -inf gives
    # NaN.
    m = tl.max(x, axis=1)
    e = tl.exp(x - tl.where(m == float("-inf"), 0.0, m)[:, None])
    total = tl.sum(e, axis=1)
    if IS_CAUSAL:
        total = tl.where(total == 0.0, 1.0, total)
    y = e * (1.0 / total)[:, None]
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=_inside(offs_m, offs_n, M, N))


@triton.jit(do_not_specialize=["M", "Tq"])
def _softmax_fwd_long_kernel(
    y_ptr,  # (M, N), rows side by side
    x_ptr,  # (M, N), rows stride_xm apart
    stride_xm,
    M,
    N,
    Tq,  # rows of one causal matrix
    scale,
    IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The first pass finds maximum and sum; the second reads x again, which L2 may still hold, and writes y.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_row = x_ptr + offs_m[:, None] * stride_xm
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        x = _load_visible(x_row, offs_m, offs_n, M, N, Tq, scale, float("-inf"), IS_CAUSAL)
        m_new = tl.maximum(m, tl.max(x, axis=1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        total = total * tl.exp(m - shift) + tl.sum(tl.exp(x - shift[:, None]), axis=1)
        m = m_new
    shift = tl.where(m == float("-inf"), 0.0, m)
    if IS_CAUSAL:
        total = tl.where(total == 0.0, 1.0, total)
    inverse = 1.0 / total
    for start in tl.range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        x = _load_visible(x_row, offs_m, offs_n, M, N, Tq, scale, float("-inf"), IS_CAUSAL)
        y = tl.exp(x - shift[:, None]) * inverse[:, None]
        y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=_inside(offs_m, offs_n, M, N))


@triton.jit(do_not_specialize=["M", "Tq"])
def _softmax_bwd_kernel(
    dx_ptr,  # (M, N), rows side by side
    dy_ptr,  # (M, N), rows stride_dym apart
    y_ptr,  # (M, N), rows side by side
    stride_dym,
    M,
    N,
    Tq,  # rows of one causal matrix
    scale,
    IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least N
):
    # dx = scale * y * (dy - sum(y * dy))
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    y = _load_visible(y_ptr + offs_m[:, None] * N, offs_m, offs_n, M, N, Tq, 1.0, 0.0, IS_CAUSAL)
    dy = _load_visible(dy_ptr + offs_m[:, None] * stride_dym, offs_m, offs_n, M, N, Tq, 1.0, 0.0, IS_CAUSAL)
    dx = scale * y * (dy - tl.sum(y * dy, axis=1)[:, None])
    dx_ptrs = dx_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=_inside(offs_m, offs_n, M, N))


@triton.jit(do_not_specialize=["M", "Tq"])
def _softmax_bwd_long_kernel(
    dx_ptr,  # (M, N), rows side by side
    dy_ptr,  # (M, N), rows stride_dym apart
    y_ptr,  # (M, N), rows side by side
    stride_dym,
    M,
    N,
    Tq,  # rows of one causal matrix
    scale,
    IS_CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    y_row, dy_row = y_ptr + offs_m[:, None] * N, dy_ptr + offs_m[:, None] * stride_dym
    dot = tl.zeros((BLOCK_M,), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        y = _load_visible(y_row, offs_m, offs_n, M, N, Tq, 1.0, 0.0, IS_CAUSAL)
        dy = _load_visible(dy_row, offs_m, offs_n, M, N, Tq, 1.0, 0.0, IS_CAUSAL)
        dot += tl.sum(y * dy, axis=1)
    for start in tl.range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        y = _load_visible(y_row, offs_m, offs_n, M, N, Tq, 1.0, 0.0, IS_CAUSAL)
        dy = _load_visible(dy_row, offs_m, offs_n, M, N, Tq, 1.0, 0.0, IS_CAUSAL)
        dx = scale * y * (dy - dot[:, None])
        dx_ptrs = dx_ptr + offs_m[:, None] * N + offs_n[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=_inside(offs_m, offs_n, M, N))


def softmax_fwd(x: Tensor, scale: float, is_causal: bool) -> Tensor:
    """softmax(scale * x): (..., N) to (..., N) in x's dtype; causal over the last two dimensions."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    rows = as_rows(x)
    M, N = rows.shape
    blocks = row_blocks("softmax_fwd", rows, LONGEST_TILE)
    kernel = _softmax_fwd_kernel if blocks["BLOCK_N"] >= N else _softmax_fwd_long_kernel
    queries = x.shape[-2] if is_causal else 1
    grid = (cdiv(M, blocks["BLOCK_M"]),)
    kernel[grid](y, rows, rows.stride(0), M, N, queries, scale, IS_CAUSAL=is_causal, **blocks)
    return y


def softmax_bwd(dy: Tensor, y: Tensor, scale: float, is_causal: bool) -> Tensor:
    """The gradient of ``softmax_fwd``'s x: (..., N) in y's dtype, from its result ``y``."""
    dx = torch.empty_like(y)
    if y.numel() == 0:
        return dx
    rows = as_rows(dy)
    M, N = rows.shape
    blocks = row_blocks("softmax_bwd", rows, LONGEST_TILE // 2)
    kernel = _softmax_bwd_kernel if blocks["BLOCK_N"] >= N else _softmax_bwd_long_kernel
    queries = y.shape[-2] if is_causal else 1
    grid = (cdiv(M, blocks["BLOCK_M"]),)
    kernel[grid](dx, rows, y, rows.stride(0), M, N, queries, scale, IS_CAUSAL=is_causal, **blocks)
    return dx


if __name__ == "__main__":
    from fastgpt import reference
    from fastgpt.triton_kernels.selfcheck import check, gradients, sample, start

    M, N = start(small=(6, 60), large=(16384, 1024))
    x, dy = sample(M, N), sample(M, N)
    y = softmax_fwd(x, 0.5, False)

    def truth(x: Tensor) -> Tensor:
        return reference.softmax(x, 0.5, False)

    size = x.numel() * x.element_size()
    check("softmax_fwd", lambda: softmax_fwd(x, 0.5, False), lambda: truth(x.double()), moved=2 * size)
    check("softmax_bwd", lambda: softmax_bwd(dy, y, 0.5, False), gradients(truth, [x], [dy]), moved=3 * size)

    square = sample(M, N, N) if M * N < 10000 else sample(64, N, N)

    def causal(x: Tensor) -> Tensor:
        return reference.softmax(x, 0.5, True)

    # The half above the diagonal is written, as zeros, but not read.
    moved = square.numel() * square.element_size() * 3 // 2
    check("softmax_fwd, causal", lambda: softmax_fwd(square, 0.5, True), lambda: causal(square.double()), moved=moved)
