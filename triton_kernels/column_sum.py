"""The second stage of a sum over rows: the lines that the programs of a first stage left are added up.

The order of every sum is fixed by the shape and the GPU, and so the result is the same bits each time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton_kernels.launch import INTERPRETER, Blocks, blocks_for, cdiv, num_sms


@triton.jit(do_not_specialize=["programs"])
def _column_sum_kernel(
    first_ptr,  # (N,)
    second_ptr,  # (N,), or None where there is one sum
    partial_ptr,  # (1 or 2, programs, N), fp32
    programs,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1).to(tl.int64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, programs, BLOCK_M):
        line = start + tl.arange(0, BLOCK_M)
        inside = (line < programs)[:, None] & (offs_n < N)[None, :]
        offsets = (which * programs + line)[:, None] * N + offs_n[None, :]
        sums += tl.load(partial_ptr + offsets, mask=inside, other=0.0)
    total = tl.sum(sums, axis=0).to(first_ptr.dtype.element_ty)
    if which == 0:
        tl.store(first_ptr + offs_n, total, mask=offs_n < N)
    elif second_ptr is not None:
        tl.store(second_ptr + offs_n, total, mask=offs_n < N)


def partial_sums(count: int, tiles: int, N: int, device: torch.device) -> Tensor:
    """(count, programs, N) lines: for as many programs as keep a GPU busy, but no more than there are tiles."""
    return torch.empty(count, min(tiles, 2 * num_sms(device)), N, dtype=torch.float32, device=device)


def column_sum(partial: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """(1 or 2, programs, N) in fp32 to one or two tensors of (N,) in ``dtype``."""
    count, programs, N = partial.shape
    sums = [torch.empty(N, dtype=dtype, device=partial.device) for _ in range(count)]
    blocks = blocks_for("column_sum", partial, "any", _default)
    second = sums[1] if count == 2 else None
    _column_sum_kernel[(cdiv(N, blocks["BLOCK_N"]), count)](sums[0], second, partial, programs, N, **blocks)
    return sums


def _default(generation: int) -> Blocks:
    # Narrow blocks of columns: there are few columns, and every program is one more multiprocessor at work.
    return {"BLOCK_M": 32, "BLOCK_N": 1024 if generation == INTERPRETER else 32, "num_warps": 4}


if __name__ == "__main__":
    from fastgpt.triton_kernels.selfcheck import check, sample, start

    programs, N = start(small=(5, 60), large=(264, 768))
    partial = sample(2, programs, N).float()
    check(
        "column_sum",
        lambda: column_sum(partial, torch.float32),
        lambda: list(partial.double().sum(1)),
        moved=partial.numel() * 4,
    )
