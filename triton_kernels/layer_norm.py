"""Layer norm (Ba et al., 2016): each row is centred, scaled to unit variance, then scaled and shifted per column.

What moves: forward reads x and writes y, backward reads dy and x and writes dx: 2 and 3 tensors. mean and rstd, two
fp32 numbers a row, are kept for the backward; without them it would read x twice.

The gradients of weight and bias are sums over all rows. Adding them up with atomics would make their last bits depend
on who came first, so it is done in two stages: each of a fixed number of programs sums the rows it has, in registers,
into a line of its own; a second kernel adds the lines up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton_kernels.column_sum import column_sum, partial_sums
from fastgpt.triton_kernels.launch import as_rows, cdiv, row_blocks

# Beyond these a row, in fp32 and with what is computed from it, no longer fits into the registers of one program.
LONGEST_FWD_TILE = 16384
LONGEST_BWD_TILE = 8192


@triton.jit
def statistics(x, inside, N, eps):
    """mean and rstd of the rows of the tile ``x``, fp32; ``inside`` is False where a tile reaches beyond the row.

    The first mean is off by what its sum lost to rounding, which matters where the mean is large beside the spread. The
    mean of the centred row is that error, and its square is what the variance has too much.
    """
    rough = tl.sum(tl.where(inside, x, 0.0), axis=1) / N
    centred = tl.where(inside, x - rough[:, None], 0.0)
    rest = tl.sum(centred, axis=1) / N
    var = tl.sum(centred * centred, axis=1) / N - rest * rest
    return rough + rest, tl.rsqrt(tl.maximum(var, 0.0) + eps)


@triton.jit
def normalize(x, mean, rstd, weight_ptr, bias_ptr, offs_n, N):
    """(x - mean) * rstd * weight + bias; ``bias_ptr`` may be None."""
    weight = tl.load(weight_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
    y = (x - mean[:, None]) * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit
def normalize_bwd(dy, x_hat, weight, rstd, N):
    """dx of whole rows: the gradient of x_hat, less its mean and its part along x_hat, times rstd."""
    dx_hat = dy * weight[None, :]
    along = tl.sum(dx_hat * x_hat, axis=1) / N
    mean = tl.sum(dx_hat, axis=1) / N
    return (dx_hat - mean[:, None] - x_hat * along[:, None]) * rstd[:, None]


@triton.jit(do_not_specialize=["M"])
def _layer_norm_fwd_kernel(
    y_ptr,  # (M, N), rows side by side
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    x_ptr,  # (M, N), rows stride_xm apart
    weight_ptr,  # (N,)
    bias_ptr,  # (N,) or None
    stride_xm,
    M,
    N,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least N
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    inside = mask_m[:, None] & (offs_n < N)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
    mean, rstd = statistics(x, inside, N, eps)
    y = normalize(x, mean, rstd, weight_ptr, bias_ptr, offs_n, N)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit(do_not_specialize=["M"])
def _layer_norm_fwd_long_kernel(
    y_ptr,  # (M, N), rows side by side
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    x_ptr,  # (M, N), rows stride_xm apart
    weight_ptr,  # (N,)
    bias_ptr,  # (N,) or None
    stride_xm,
    M,
    N,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Three passes over the row, of which L2 may serve the later two: the mean, the variance, the result.
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_row = x_ptr + offs_m[:, None] * stride_xm
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        inside = mask_m[:, None] & (offs_n < N)[None, :]
        sums += tl.load(x_row + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
    rough = tl.sum(sums, axis=1) / N
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        inside = mask_m[:, None] & (offs_n < N)[None, :]
        x = tl.load(x_row + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - rough[:, None], 0.0)
        sums += centred
        squares += centred * centred
    rest = tl.sum(sums, axis=1) / N
    mean = rough + rest
    var = tl.sum(squares, axis=1) / N - rest * rest
    rstd = tl.rsqrt(tl.maximum(var, 0.0) + eps)
    for start in tl.range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        inside = mask_m[:, None] & (offs_n < N)[None, :]
        x = tl.load(x_row + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        y = normalize(x, mean, rstd, weight_ptr, bias_ptr, offs_n, N)
        tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit(do_not_specialize=["M"])
def _layer_norm_bwd_kernel(
    dx_ptr,  # (M, N), rows side by side
    partial_ptr,  # (2, programs, N): each program's sums for dweight and dbias
    dy_ptr,  # (M, N), rows stride_dym apart
    x_ptr,  # (M, N), rows stride_xm apart
    weight_ptr,  # (N,)
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    stride_dym,
    stride_xm,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least N
):
    # A few programs on each multiprocessor take all tiles in turn, so that few lines of sums go through memory.
    pid, programs = tl.program_id(0), tl.num_programs(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in tl.range(pid, tl.cdiv(M, BLOCK_M), programs):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        inside = mask_m[:, None] & mask_n[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        x_hat = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        dx = normalize_bwd(dy, x_hat, weight, rstd, N)
        tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * x_hat
        dbias += dy
    line = partial_ptr + pid.to(tl.int64) * N + offs_n
    tl.store(line, tl.sum(dweight, axis=0), mask=mask_n)
    tl.store(line + programs.to(tl.int64) * N, tl.sum(dbias, axis=0), mask=mask_n)


@triton.jit(do_not_specialize=["M"])
def _layer_norm_bwd_long_kernel(
    dx_ptr,  # (M, N), rows side by side
    dy_ptr,  # (M, N), rows stride_dym apart
    x_ptr,  # (M, N), rows stride_xm apart
    weight_ptr,  # (N,)
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    stride_dym,
    stride_xm,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
    sum_along = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sum_mean = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        inside = mask_m[:, None] & (offs_n < N)[None, :]
        weight = tl.load(weight_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        sum_along += dy * weight * (x - mean) * rstd
        sum_mean += dy * weight
    along = (tl.sum(sum_along, axis=1) / N)[:, None]
    mean_dx_hat = (tl.sum(sum_mean, axis=1) / N)[:, None]
    for start in tl.range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        inside = mask_m[:, None] & (offs_n < N)[None, :]
        weight = tl.load(weight_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        dx = (dy * weight - mean_dx_hat - (x - mean) * rstd * along) * rstd
        tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _layer_norm_dweight_long_kernel(
    partial_ptr,  # (2, programs, N): each program's sums for dweight and dbias
    dy_ptr,  # (M, N), rows stride_dym apart
    x_ptr,  # (M, N), rows stride_xm apart
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    stride_dym,
    stride_xm,
    M,
    N,
    BLOCK_N: tl.constexpr,
):
    # Where rows are too long to be kept, dy and x are read once more, a block of columns at a time.
    pid, programs = tl.program_id(1), tl.num_programs(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    dweight = tl.zeros((BLOCK_N,), tl.float32)
    dbias = tl.zeros((BLOCK_N,), tl.float32)
    for m in tl.range(pid, M, programs):
        row = tl.cast(m, tl.int64)
        x = tl.load(x_ptr + row * stride_xm + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * stride_dym + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        dweight += dy * (x - tl.load(mean_ptr + row)) * tl.load(rstd_ptr + row)
        dbias += dy
    line = partial_ptr + pid.to(tl.int64) * N + offs_n
    tl.store(line, dweight, mask=mask_n)
    tl.store(line + programs.to(tl.int64) * N, dbias, mask=mask_n)


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """y, (..., N) in x's dtype, and the rows' mean and rstd, (M,) in fp32."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = as_rows(x)
    M, N = rows.shape
    mean = torch.empty(M, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if M == 0:
        return y, mean, rstd
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    blocks = row_blocks("layer_norm_fwd", rows, LONGEST_FWD_TILE)
    kernel = _layer_norm_fwd_kernel if blocks["BLOCK_N"] >= N else _layer_norm_fwd_long_kernel
    kernel[(cdiv(M, blocks["BLOCK_M"]),)](y, mean, rstd, rows, weight, bias, rows.stride(0), M, N, eps, **blocks)
    return y, mean, rstd


def layer_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, (..., N) in x's dtype, dweight and dbias, (N,) in weight's."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, dy_rows = as_rows(x), as_rows(dy)
    M, N = rows.shape
    if M == 0:
        return dx, torch.zeros_like(weight), torch.zeros_like(weight)
    weight = weight.contiguous()
    blocks = row_blocks("layer_norm_bwd", rows, LONGEST_BWD_TILE, per_thread=8)
    tiles = cdiv(M, blocks["BLOCK_M"])
    partial = partial_sums(2, tiles, N, x.device)
    programs = partial.shape[1]
    strides = (dy_rows.stride(0), rows.stride(0))
    if blocks["BLOCK_N"] >= N:
        _layer_norm_bwd_kernel[(programs,)](dx, partial, dy_rows, rows, weight, mean, rstd, *strides, M, N, **blocks)
    else:
        _layer_norm_bwd_long_kernel[(tiles,)](dx, dy_rows, rows, weight, mean, rstd, *strides, M, N, **blocks)
        blocks = {name: value for name, value in blocks.items() if name != "BLOCK_M"}
        _layer_norm_dweight_long_kernel[(cdiv(N, blocks["BLOCK_N"]), programs)](
            partial, dy_rows, rows, mean, rstd, *strides, M, N, **blocks
        )
    dweight, dbias = column_sum(partial, weight.dtype)
    return dx, dweight, dbias


if __name__ == "__main__":
    from fastgpt import reference
    from fastgpt.triton_kernels.selfcheck import check, gradients, sample, start

    M, N = start(small=(20, 60), large=(16384, 768))
    x, dy, weight, bias = sample(M, N), sample(M, N), sample(N), sample(N)
    _, mean, rstd = layer_norm_fwd(x, weight, bias, 1e-5)

    def truth(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return reference.layer_norm(x, weight, bias, 1e-5)

    size = x.numel() * x.element_size()
    check(
        "layer_norm_fwd",
        lambda: layer_norm_fwd(x, weight, bias, 1e-5)[0],
        lambda: truth(x.double(), weight.double(), bias.double()),
        moved=2 * size,
    )
    check(
        "layer_norm_bwd",
        lambda: layer_norm_bwd(dy, x, weight, mean, rstd),
        gradients(truth, [x, weight, bias], [dy]),
        moved=3 * size,
    )
