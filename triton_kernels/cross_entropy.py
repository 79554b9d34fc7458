"""Mean of -log softmax(logits)[target] over the targets that count, and the gradient in the same pass.

What moves: each row of logits is read once; with the gradient, as many bytes are written. What of a row does not fit
into registers, beyond 49152 columns (40960 in fp32 on sm_100), is read twice, the second time out of L2. The gradient
of the sum of losses is softmax(logits) - onehot(target), times ``grad_scale``, which folds in the mean.

Only ``linear_cross_entropy`` lets the gradient take the logits' place, in a buffer of its own that no caller ever sees.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton_kernels.launch import (
    INTERPRETER,
    Blocks,
    as_rows,
    blocks_for,
    cdiv,
    next_power_of_2,
    tile_blocks,
)

# Beyond this a row no longer fits into the registers of one program.
LONGEST_TILE = 32768


@triton.jit
def _targets_and_logits(targets_ptr, logits_ptr, stride_lm, offs_m, M, V, ignore_index):
    """The rows' targets, whether they count, and their logits: NaN where the target is no class."""
    target = tl.load(targets_ptr + offs_m, mask=offs_m < M, other=0)
    counted = (target != ignore_index) & (offs_m < M)
    valid = counted & (target >= 0) & (target < V)
    picked = tl.load(logits_ptr + offs_m * stride_lm + target, mask=valid, other=float("nan")).to(tl.float32)
    return target, counted, picked


@triton.jit(do_not_specialize=["M", "ignore_index"])
def _cross_entropy_fwd_kernel(
    losses_ptr,  # (M,), 0 where the target does not count
    stats_ptr,  # (2, M): the row's maximum, and the logarithm of the sum of exponentials below it
    dlogits_ptr,  # (M, V), rows stride_dm apart, which may be the logits; None without gradient
    logits_ptr,  # (M, V), rows stride_lm apart
    targets_ptr,  # (M,), int64
    grad_scale_ptr,  # one fp32, or None for 1
    stride_dm,
    stride_lm,
    M,
    V,
    ignore_index: tl.int64,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least V
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    inside = mask_m[:, None] & (offs_n < V)[None, :]
    target, counted, picked = _targets_and_logits(targets_ptr, logits_ptr, stride_lm, offs_m, M, V, ignore_index)
    x = tl.load(logits_ptr + offs_m[:, None] * stride_lm + offs_n[None, :], mask=inside, other=float("-inf"))
    x = x.to(tl.float32)
    m = tl.max(x, axis=1)
    shift = tl.where(mask_m, m, 0.0)
    e = tl.exp(x - shift[:, None])
    total = tl.where(mask_m, tl.sum(e, axis=1), 1.0)
    log_total = tl.log(total)
    # (m - picked) + log(total) and not (m + log(total)) - picked: an offset of all logits then costs no precision.
    loss = tl.where(counted, (m - picked) + log_total, 0.0)
    tl.store(losses_ptr + offs_m, loss, mask=mask_m)
    tl.store(stats_ptr + offs_m, m, mask=mask_m)
    tl.store(stats_ptr + M + offs_m, log_total, mask=mask_m)
    if dlogits_ptr is not None:
        tl.debug_barrier()  # no thread writes where another has still to read the target's logit
        scale = 1.0
        if grad_scale_ptr is not None:
            scale = tl.load(grad_scale_ptr)  # infinite where nothing counts
        scale = tl.where(counted, scale, 0.0)
        hit = offs_n[None, :] == target[:, None]
        dx = (e * (1.0 / total)[:, None] - tl.where(hit, 1.0, 0.0)) * scale[:, None]
        dx_ptrs = dlogits_ptr + offs_m[:, None] * stride_dm + offs_n[None, :]
        tl.store(dx_ptrs, dx.to(dlogits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_piece(x_row, start, V, WIDTH: tl.constexpr):
    offs_n = start + tl.arange(0, WIDTH)
    return tl.load(x_row + offs_n, mask=offs_n < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _store_gradient(dlogits_row, p, start, V, target, scale, WIDTH: tl.constexpr):
    offs_n = start + tl.arange(0, WIDTH)
    dx = (p - tl.where(offs_n == target, 1.0, 0.0)) * scale
    tl.store(dlogits_row + offs_n, dx.to(dlogits_row.dtype.element_ty), mask=offs_n < V)


@triton.jit(do_not_specialize=["M", "ignore_index"])
def _cross_entropy_fwd_long_kernel(
    losses_ptr,  # (M,), 0 where the target does not count
    stats_ptr,  # (2, M): the row's maximum, and the logarithm of the sum of exponentials below it
    dlogits_ptr,  # (M, V), rows stride_dm apart, which may be the logits; None without gradient
    logits_ptr,  # (M, V), rows stride_lm apart
    targets_ptr,  # (M,), int64
    grad_scale_ptr,  # one fp32, or None for 1
    stride_dm,
    stride_lm,
    M,
    V,
    ignore_index: tl.int64,
    HELD: tl.constexpr,
    HELD_TOO: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One program, one row. 96 of a thread's 128 registers hold the row's first HELD + HELD_TOO logits, then their
    # exponentials, until the gradient is written: 49152 of GPT-2's 50304 columns are read once and exponentiated once.
    # The rest is gone over twice, with a running maximum.
    row = tl.program_id(0).to(tl.int64)
    x_row = logits_ptr + row * stride_lm
    offs_m = row + tl.arange(0, 1)
    target, counted, picked = _targets_and_logits(targets_ptr, logits_ptr, stride_lm, offs_m, M, V, ignore_index)
    e = _load_piece(x_row, 0, V, HELD)
    e_too = _load_piece(x_row, HELD, V, HELD_TOO)
    m = tl.maximum(tl.max(e, axis=0), tl.max(e_too, axis=0))
    held_shift = tl.where(m == float("-inf"), 0.0, m)
    e = tl.exp(e - held_shift)
    e_too = tl.exp(e_too - held_shift)
    total = tl.sum(e, axis=0) + tl.sum(e_too, axis=0)
    for start in tl.range(HELD + HELD_TOO, V, BLOCK_N):
        x = _load_piece(x_row, start, V, BLOCK_N)
        m_new = tl.maximum(m, tl.max(x, axis=0))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        total = total * tl.exp(m - shift) + tl.sum(tl.exp(x - shift), axis=0)
        m = m_new
    shift = tl.where(m == float("-inf"), 0.0, m)
    log_total = tl.log(total)
    tl.store(losses_ptr + offs_m, tl.where(counted, (m - picked) + log_total, 0.0))
    tl.store(stats_ptr + row, m)
    tl.store(stats_ptr + M + row, log_total)
    if dlogits_ptr is not None:
        hit = tl.sum(target, axis=0)
        scale = 1.0
        if grad_scale_ptr is not None:
            scale = tl.load(grad_scale_ptr)  # infinite where nothing counts
        scale = tl.where(counted, scale, 0.0)
        scale = tl.sum(scale, axis=0)
        tl.debug_barrier()  # no thread writes where another has still to read the target's logit
        inverse = 1.0 / total
        held_factor = tl.exp(held_shift - shift) * inverse
        dlogits_row = dlogits_ptr + row * stride_dm
        _store_gradient(dlogits_row, e * held_factor, 0, V, hit, scale, HELD)
        _store_gradient(dlogits_row, e_too * held_factor, HELD, V, hit, scale, HELD_TOO)
        for start in tl.range(HELD + HELD_TOO, V, BLOCK_N):
            p = tl.exp(_load_piece(x_row, start, V, BLOCK_N) - shift) * inverse
            _store_gradient(dlogits_row, p, start, V, hit, scale, BLOCK_N)


@triton.jit(do_not_specialize=["M", "ignore_index"])
def _cross_entropy_bwd_kernel(
    dlogits_ptr,  # (M, V), rows side by side
    logits_ptr,  # (M, V), rows stride_lm apart
    targets_ptr,  # (M,), int64
    stats_ptr,  # (2, M), of the forward
    grad_scale_ptr,  # one fp32: the upstream gradient over the number of targets that count
    stride_lm,
    M,
    V,
    ignore_index: tl.int64,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    across = tl.cdiv(V, BLOCK_N)
    offs_m = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    inside = mask_m[:, None] & (offs_n < V)[None, :]
    target = tl.load(targets_ptr + offs_m, mask=mask_m, other=0)
    m = tl.load(stats_ptr + offs_m, mask=mask_m, other=0.0)
    log_total = tl.load(stats_ptr + M + offs_m, mask=mask_m, other=0.0)
    x_ptrs = logits_ptr + offs_m[:, None] * stride_lm + offs_n[None, :]
    x = tl.load(x_ptrs, mask=inside, other=float("-inf")).to(tl.float32)
    scale = tl.where(target == ignore_index, 0.0, tl.load(grad_scale_ptr))
    p = tl.exp((x - m[:, None]) - log_total[:, None])
    dx = (p - tl.where(offs_n[None, :] == target[:, None], 1.0, 0.0)) * scale[:, None]
    tl.store(dlogits_ptr + offs_m[:, None] * V + offs_n[None, :], dx.to(dlogits_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _scale_unless_one_kernel(
    x_ptr,  # (M, N), rows side by side; changed
    factor_ptr,  # one fp32
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The factor lies on the device. Where it is 1, as a loss's usually is, no byte of x moves.
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        across = tl.cdiv(N, BLOCK_N)
        offs_m = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        x_ptrs = x_ptr + offs_m[:, None] * N + offs_n[None, :]
        x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32) * factor
        tl.store(x_ptrs, x.to(x_ptr.dtype.element_ty), mask=inside)


def loss_and_gradient(
    logits: Tensor, targets: Tensor, ignore_index: int, dlogits: Tensor | None, grad_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The rows' losses, (M,), and statistics, (2, M), in fp32.

    Args:
        logits: (M, V), M at least 1; targets: (M,), int64.
        dlogits: (M, V), filled with the gradient of the sum of losses; may be ``logits`` itself. None makes none.
        grad_scale: one fp32 that the gradient is multiplied by; None is 1.
    """
    M, V = logits.shape
    losses = torch.empty(M, dtype=torch.float32, device=logits.device)
    stats = torch.empty(2, M, dtype=torch.float32, device=logits.device)
    targets = targets.contiguous()
    itemsize = logits.element_size()
    width = next_power_of_2(V) if V <= LONGEST_TILE else "long"
    fixed = ("BLOCK_N",) if V <= LONGEST_TILE else ()
    blocks = blocks_for("cross_entropy_fwd", logits, f"V={width} {itemsize} bytes", _row_default(V, itemsize), fixed)
    kernel = _cross_entropy_fwd_long_kernel if "HELD" in blocks else _cross_entropy_fwd_kernel
    stride_dm = 0 if dlogits is None else dlogits.stride(0)
    kernel[(cdiv(M, blocks.get("BLOCK_M", 1)),)](
        losses,
        stats,
        dlogits,
        logits,
        targets,
        grad_scale,
        stride_dm,
        logits.stride(0),
        M,
        V,
        ignore_index,
        **blocks,
    )
    return losses, stats


def cross_entropy_fwd(
    logits: Tensor, targets: Tensor, ignore_index: int, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean loss, the rows' statistics, 1 / count and the loss's gradient (of no elements unless wanted)."""
    rows = as_rows(logits)
    M, V = rows.shape
    inverse_count = 1.0 / (targets != ignore_index).sum(dtype=torch.float32)
    dlogits = torch.empty(M if with_gradient else 0, V, dtype=logits.dtype, device=logits.device)
    if M == 0:
        stats = torch.empty(2, 0, dtype=torch.float32, device=logits.device)
        return inverse_count * 0.0, stats, inverse_count, dlogits
    wanted = dlogits if with_gradient else None
    losses, stats = loss_and_gradient(rows, targets, ignore_index, wanted, inverse_count)
    return losses.sum() * inverse_count, stats, inverse_count, dlogits


def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, targets: Tensor, ignore_index: int, stats: Tensor, inverse_count: Tensor
) -> Tensor:
    """dlogits, (M, V) in the logits' dtype, from a second reading of the logits."""
    rows = as_rows(logits)
    M, V = rows.shape
    dlogits = torch.empty(M, V, dtype=logits.dtype, device=logits.device)
    if M == 0:
        return dlogits
    blocks = tile_blocks("cross_entropy_bwd", rows)
    grid = (cdiv(M, blocks["BLOCK_M"]) * cdiv(V, blocks["BLOCK_N"]),)
    _cross_entropy_bwd_kernel[grid](
        dlogits,
        rows,
        targets.contiguous(),
        stats,
        dloss.float() * inverse_count,
        rows.stride(0),
        M,
        V,
        ignore_index,
        **blocks,
    )
    return dlogits


def scale_gradient_(gradient: Tensor, dloss: Tensor) -> None:
    """Multiply the contiguous (M, N) ``gradient`` in place by the loss's own, a scalar on the device."""
    if gradient.numel() == 0:
        return
    M, N = gradient.shape
    blocks = tile_blocks("scale_gradient", gradient)
    grid = (cdiv(M, blocks["BLOCK_M"]) * cdiv(N, blocks["BLOCK_N"]),)
    _scale_unless_one_kernel[grid](gradient, dloss.float(), M, N, **blocks)


def _row_default(V: int, itemsize: int) -> Callable[[int], Blocks]:
    def default(generation: int) -> Blocks:
        if V > LONGEST_TILE:
            # On sm_100 the conversions leave fewer registers for a row in fp32.
            held_too = 8192 if generation == 100 and itemsize == 4 else 16384
            return {"HELD": 32768, "HELD_TOO": held_too, "BLOCK_N": 1024, "num_warps": 16}
        width = next_power_of_2(V)
        block_m = max(1, (1024 if generation == INTERPRETER else 4096) // width)
        return {"BLOCK_M": block_m, "BLOCK_N": width, "num_warps": min(max(block_m * width // 512, 1), 16)}

    return default


if __name__ == "__main__":
    from fastgpt import reference
    from fastgpt.triton_kernels.selfcheck import check, gradients, sample, start

    M, V = start(small=(20, 65), large=(4096, 50304))
    logits = sample(M, V)
    targets = torch.randint(V, (M,), device=logits.device)
    one = torch.ones((), device=logits.device)

    def truth(logits: Tensor) -> Tensor:
        return reference.cross_entropy(logits, targets, -100)

    size = logits.numel() * logits.element_size()
    loss, stats, inverse_count, _ = cross_entropy_fwd(logits, targets, -100, False)
    check(
        "cross_entropy_fwd",
        lambda: cross_entropy_fwd(logits, targets, -100, False)[0],
        lambda: truth(logits.double()),
        moved=size,
    )
    check(
        "the same with gradient",
        lambda: cross_entropy_fwd(logits, targets, -100, True)[3],
        gradients(truth, [logits], [one]),
        moved=2 * size,
    )
    check(
        "cross_entropy_bwd",
        lambda: cross_entropy_bwd(one, logits, targets, -100, stats, inverse_count),
        gradients(truth, [logits], [one]),
        moved=2 * size,
    )
