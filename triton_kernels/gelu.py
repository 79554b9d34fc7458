"""GELU of x + bias in one pass (Hendrycks and Gimpel, 2016), exact or by the tanh formula GPT-2 was trained with.

What moves: forward reads x and writes y, backward reads dy and x and writes dx: 2 and 3 tensors. The bias's gradient is
a sum over rows, in two stages (``column_sum.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton_kernels.column_sum import column_sum
from fastgpt.triton_kernels.launch import as_matrix, cdiv, num_sms, tile_blocks


@triton.jit
def _sigmoid_2u(z):
    """sigmoid(2u) with u = sqrt(2 / pi) * (z + 0.044715 z^3), since (1 + tanh(u)) / 2 is that, without cancellation."""
    u = 0.7978845608028654 * z * (1.0 + 0.044715 * z * z)
    return 1.0 / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def _gelu(z, TANH: tl.constexpr):
    return z * _sigmoid_2u(z) if TANH else 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_derivative(z, TANH: tl.constexpr):
    if TANH:
        # Beyond, it is 0 or 1, and z * z might overflow.
        z = tl.clamp(z, -30.0, 30.0, propagate_nan=tl.PropagateNan.ALL)
        s = _sigmoid_2u(z)
        d = s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    else:
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        d = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    return d


@triton.jit(do_not_specialize=["M"])
def _gelu_fwd_kernel(
    y_ptr,  # (M, N), rows side by side
    x_ptr,  # (M, N), rows stride_xm apart
    bias_ptr,  # (N,) or None
    stride_xm,
    M,
    N,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    across = tl.cdiv(N, BLOCK_N)
    offs_m = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    z = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y = _gelu(z, TANH)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _gelu_bwd_kernel(
    dx_ptr,  # (M, N), rows side by side
    partial_ptr,  # (1, programs, N): each program's sums for dbias; None without a bias
    dy_ptr,  # (M, N), rows stride_dym apart
    x_ptr,  # (M, N), rows stride_xm apart
    bias_ptr,  # (N,) or None
    stride_dym,
    stride_xm,
    M,
    N,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # A program goes down one block of columns, so that the sum for dbias stays in its registers.
    pid, programs = tl.program_id(1), tl.num_programs(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in tl.range(pid, tl.cdiv(M, BLOCK_M), programs):
        offs_m = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (offs_m < M)[:, None] & mask_n[None, :]
        z = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            z += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        dx = dy * _gelu_derivative(z, TANH)
        tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dbias += dx
    if partial_ptr is not None:
        tl.store(partial_ptr + pid.to(tl.int64) * N + offs_n, tl.sum(dbias, axis=0), mask=mask_n)


def gelu_fwd(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """GELU of x + bias: (..., N) in x's dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    rows = as_matrix(x)
    M, N = rows.shape
    bias = None if bias is None else bias.contiguous()
    blocks = tile_blocks("gelu_fwd", rows)
    grid = (cdiv(M, blocks["BLOCK_M"]) * cdiv(N, blocks["BLOCK_N"]),)
    _gelu_fwd_kernel[grid](y, rows, bias, rows.stride(0), M, N, TANH=approximate == "tanh", **blocks)
    return y


def gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    """dx, (..., N) in x's dtype, and dbias, (N,) in bias's; of no elements where there is no bias."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, x.new_empty(0) if bias is None else torch.zeros_like(bias)
    rows, dy_rows = as_matrix(x), as_matrix(dy)
    M, N = rows.shape
    blocks = tile_blocks("gelu_bwd", rows)
    across = cdiv(N, blocks["BLOCK_N"])
    programs = min(cdiv(M, blocks["BLOCK_M"]), max(1, cdiv(4 * num_sms(x.device), across)))
    partial = None
    if bias is not None:
        bias = bias.contiguous()
        partial = torch.empty(1, programs, N, dtype=torch.float32, device=x.device)
    _gelu_bwd_kernel[(across, programs)](
        dx, partial, dy_rows, rows, bias, dy_rows.stride(0), rows.stride(0), M, N, TANH=approximate == "tanh", **blocks
    )
    if bias is None or partial is None:
        return dx, x.new_empty(0)
    return dx, column_sum(partial, bias.dtype)[0]


if __name__ == "__main__":
    from fastgpt import reference
    from fastgpt.triton_kernels.selfcheck import check, gradients, sample, start

    M, N = start(small=(20, 60), large=(16384, 3072))
    x, dy, bias = sample(M, N), sample(M, N), sample(N)
    size = x.numel() * x.element_size()
    for approximate in ("none", "tanh"):

        def truth(x: Tensor, bias: Tensor, approximate: str = approximate) -> Tensor:
            return reference.gelu(x, bias, approximate)

        check(
            f"gelu_fwd, {approximate}",
            lambda approximate=approximate: gelu_fwd(x, bias, approximate),
            lambda truth=truth: truth(x.double(), bias.double()),
            moved=2 * size,
        )
        check(
            f"gelu_bwd, {approximate}",
            lambda approximate=approximate: gelu_bwd(dy, x, bias, approximate),
            gradients(truth, [x, bias], [dy]),
            moved=3 * size,
        )
