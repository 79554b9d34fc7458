"""Dropout (Srivastava et al., 2014) by the Philox mask of ``philox.py``.

What moves: x is read and y written, 2 tensors, forward and backward: the backward is the forward on dy, since the mask
is computed again from the seed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton_kernels.launch import as_matrix, cdiv, tile_blocks
from fastgpt.triton_kernels.philox import keep_tile, threshold_argument


@triton.jit(do_not_specialize=["M", "threshold"])
def _dropout_kernel(
    y_ptr,  # (M, N), rows side by side
    x_ptr,  # (M, N), rows stride_xm apart
    seed_ptr,  # one int64
    stride_xm,
    M,
    N,
    threshold,
    scale,  # 1 / (1 - p)
    QUADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    across = tl.cdiv(N, BLOCK_N)
    offs_m = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_n = (tl.program_id(0) % across) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=inside, other=0.0).to(tl.float32)
    keep = keep_tile(offs_m, start_n, N, tl.load(seed_ptr), threshold, QUADS, BLOCK_N)
    y = tl.where(keep, x * scale, 0.0)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def dropout_fwd(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x with the elements that Philox picks set to 0 and the others divided by 1 - p, in x's shape and dtype."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    rows = as_matrix(x)
    M, N = rows.shape
    blocks = tile_blocks("dropout", rows)
    grid = (cdiv(M, blocks["BLOCK_M"]) * cdiv(N, blocks["BLOCK_N"]),)
    _dropout_kernel[grid](
        y, rows, seed, rows.stride(0), M, N, threshold_argument(p), 1 / (1 - p), QUADS=N % 4 == 0, **blocks
    )
    return y


def dropout_bwd(dy: Tensor, p: float, seed: Tensor) -> Tensor:
    """The gradient of ``dropout_fwd``'s x."""
    return dropout_fwd(dy, p, seed)


if __name__ == "__main__":
    from fastgpt import reference
    from fastgpt.triton_kernels.selfcheck import check, sample, start

    M, N = start(small=(20, 60), large=(16384, 3072))
    x, seed = sample(M, N), torch.tensor([1234], device="cpu" if M == 20 else "cuda")
    check(
        "dropout_fwd",
        lambda: dropout_fwd(x, 0.2, seed),
        lambda: reference.dropout(x.double(), 0.2, seed),
        moved=2 * x.numel() * x.element_size(),
    )
