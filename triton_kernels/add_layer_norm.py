"""Dropout, residual addition and layer norm in one pass: what stands between two sublayers of a GPT.

What moves: forward reads x and residual and writes y and residual_out, backward reads dy, the stream's gradient and
residual_out and writes dresidual (and dx, where dropout or its dtype makes it another): 4 and 4 to 5 tensors. Apart,
the three ops would move 10 and 12. The mask is computed again in the backward and never stored.

The norm is of the sum before it is rounded to the dtype that the residual stream is kept in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton_kernels.column_sum import column_sum, partial_sums
from fastgpt.triton_kernels.dropout import dropout_fwd
from fastgpt.triton_kernels.launch import as_rows, cdiv, row_blocks
from fastgpt.triton_kernels.layer_norm import (
    LONGEST_BWD_TILE,
    layer_norm_bwd,
    layer_norm_fwd,
    normalize,
    normalize_bwd,
    statistics,
)
from fastgpt.triton_kernels.philox import keep_tile, threshold_argument


@triton.jit(do_not_specialize=["M", "threshold"])
def _add_layer_norm_fwd_kernel(
    y_ptr,  # (M, N), rows side by side
    residual_out_ptr,  # (M, N), rows side by side
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    x_ptr,  # (M, N), rows stride_xm apart
    residual_ptr,  # (M, N), rows stride_rm apart
    weight_ptr,  # (N,)
    bias_ptr,  # (N,) or None
    seed_ptr,  # one int64, or None where nothing is dropped
    stride_xm,
    stride_rm,
    M,
    N,
    eps,
    threshold,
    scale,  # 1 / (1 - dropout_p)
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least N
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    inside = mask_m[:, None] & (offs_n < N)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offs_m[:, None] * stride_rm + offs_n[None, :], mask=inside, other=0.0)
    if seed_ptr is not None:
        keep = keep_tile(offs_m, 0, N, tl.load(seed_ptr), threshold, QUADS, BLOCK_N)
        x = tl.where(keep, x * scale, 0.0)
    total = x + residual.to(tl.float32)
    offs_out = offs_m[:, None] * N + offs_n[None, :]
    tl.store(residual_out_ptr + offs_out, total.to(residual_out_ptr.dtype.element_ty), mask=inside)
    mean, rstd = statistics(total, inside, N, eps)
    y = normalize(total, mean, rstd, weight_ptr, bias_ptr, offs_n, N)
    tl.store(y_ptr + offs_out, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit(do_not_specialize=["M", "threshold"])
def _add_layer_norm_bwd_kernel(
    dx_ptr,  # (M, N), rows side by side; None where it would be dresidual
    dresidual_ptr,  # (M, N), rows side by side
    partial_ptr,  # (2, programs, N): each program's sums for dweight and dbias
    dy_ptr,  # (M, N), rows stride_dym apart
    dresidual_out_ptr,  # (M, N), rows stride_drm apart; None where the stream ends here
    residual_out_ptr,  # (M, N), rows side by side
    weight_ptr,  # (N,)
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    seed_ptr,  # one int64, or None where nothing is dropped
    stride_dym,
    stride_drm,
    M,
    N,
    threshold,
    scale,  # 1 / (1 - dropout_p)
    QUADS: tl.constexpr,
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
        offs_out = offs_m[:, None] * N + offs_n[None, :]
        total = tl.load(residual_out_ptr + offs_out, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        x_hat = tl.where(inside, (total - mean[:, None]) * rstd[:, None], 0.0)
        dtotal = normalize_bwd(dy, x_hat, weight, rstd, N)
        if dresidual_out_ptr is not None:
            offs_dr = offs_m[:, None] * stride_drm + offs_n[None, :]
            dtotal += tl.load(dresidual_out_ptr + offs_dr, mask=inside, other=0.0).to(tl.float32)
        tl.store(dresidual_ptr + offs_out, dtotal.to(dresidual_ptr.dtype.element_ty), mask=inside)
        if dx_ptr is not None:
            dx = dtotal
            if seed_ptr is not None:
                keep = keep_tile(offs_m, 0, N, tl.load(seed_ptr), threshold, QUADS, BLOCK_N)
                dx = tl.where(keep, dx * scale, 0.0)
            tl.store(dx_ptr + offs_out, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * x_hat
        dbias += dy
    line = partial_ptr + pid.to(tl.int64) * N + offs_n
    tl.store(line, tl.sum(dweight, axis=0), mask=mask_n)
    tl.store(line + programs.to(tl.int64) * N, tl.sum(dbias, axis=0), mask=mask_n)


def add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, (..., N) in x's dtype, residual_out in the promoted one, and the rows' mean and rstd, (M,) in fp32."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stream_dtype = torch.promote_types(x.dtype, residual.dtype)
    if x.shape[-1] > LONGEST_BWD_TILE:
        # Such rows do not fit on chip: the sum goes through memory, in fp32, to layer_norm's kernels for long rows.
        dropped = x.float() if seed is None else dropout_fwd(x.float(), dropout_p, seed)
        total = dropped + residual.float()
        y_wide, mean, rstd = layer_norm_fwd(total, weight, bias, eps)
        return y.copy_(y_wide), total.to(stream_dtype), mean, rstd
    residual_out = torch.empty(x.shape, dtype=stream_dtype, device=x.device)
    rows, residual_rows = as_rows(x), as_rows(residual)
    M, N = rows.shape
    mean = torch.empty(M, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if M == 0:
        return y, residual_out, mean, rstd
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    blocks = row_blocks("add_layer_norm_fwd", rows, LONGEST_BWD_TILE)
    _add_layer_norm_fwd_kernel[(cdiv(M, blocks["BLOCK_M"]),)](
        y,
        residual_out,
        mean,
        rstd,
        rows,
        residual_rows,
        weight,
        bias,
        seed,
        rows.stride(0),
        residual_rows.stride(0),
        M,
        N,
        eps,
        threshold_argument(dropout_p),
        1 / (1 - dropout_p),
        QUADS=N % 4 == 0,
        **blocks,
    )
    return y, residual_out, mean, rstd


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
    """dx, dresidual, dweight and dbias; dx has no elements where it would be dresidual: nothing dropped, one dtype."""
    shape, device = residual_out.shape, residual_out.device
    same = seed is None and x_dtype == residual_dtype
    dx = torch.empty(0 if same else shape, dtype=x_dtype, device=device)
    if shape[-1] > LONGEST_BWD_TILE:
        dtotal, dweight, dbias = layer_norm_bwd(dy.float(), residual_out.float(), weight, mean, rstd)
        if dresidual_out is not None:
            dtotal += dresidual_out
        if not same:
            dx.copy_(dtotal if seed is None else dropout_fwd(dtotal, dropout_p, seed))
        return dx, dtotal.to(residual_dtype), dweight, dbias
    dresidual = torch.empty(shape, dtype=residual_dtype, device=device)
    dy_rows, total_rows = as_rows(dy), as_rows(residual_out)
    dr_rows = None if dresidual_out is None else as_rows(dresidual_out)
    M, N = total_rows.shape
    if M == 0:
        return dx, dresidual, torch.zeros_like(weight), torch.zeros_like(weight)
    blocks = row_blocks("add_layer_norm_bwd", total_rows, LONGEST_BWD_TILE, per_thread=8)
    partial = partial_sums(2, cdiv(M, blocks["BLOCK_M"]), N, device)
    _add_layer_norm_bwd_kernel[(partial.shape[1],)](
        None if same else dx,
        dresidual,
        partial,
        dy_rows,
        dr_rows,
        total_rows,
        weight.contiguous(),
        mean,
        rstd,
        seed,
        dy_rows.stride(0),
        0 if dr_rows is None else dr_rows.stride(0),
        M,
        N,
        threshold_argument(dropout_p),
        1 / (1 - dropout_p),
        QUADS=N % 4 == 0,
        **blocks,
    )
    dweight, dbias = column_sum(partial, weight.dtype)
    return dx, dresidual, dweight, dbias


if __name__ == "__main__":
    from fastgpt import reference
    from fastgpt.triton_kernels.selfcheck import check, gradients, sample, start

    M, N = start(small=(20, 60), large=(16384, 768))
    x, residual, dy, dresidual_out = (sample(M, N) for _ in range(4))
    weight, bias = sample(N), sample(N)
    p, seed = 0.2, torch.tensor([1234], device=x.device)
    _, residual_out, mean, rstd = add_layer_norm_fwd(x, residual, weight, bias, p, 1e-5, seed)

    def truth(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return reference.add_layer_norm(x, residual, weight, bias, p, 1e-5, seed)

    inputs = [x, residual, weight, bias]
    size = x.numel() * x.element_size()
    check(
        "add_layer_norm_fwd",
        lambda: add_layer_norm_fwd(*inputs, p, 1e-5, seed)[:2],
        lambda: truth(*(x.double() for x in inputs)),
        moved=4 * size,
    )
    check(
        "add_layer_norm_bwd",
        lambda: add_layer_norm_bwd(
            dy, dresidual_out, residual_out, weight, mean, rstd, p, seed, x.dtype, residual.dtype
        ),
        gradients(truth, inputs, [dy, dresidual_out]),
        moved=5 * size,
    )
