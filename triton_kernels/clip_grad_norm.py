"""Scale all gradients down so that their joint 2-norm is at most max_norm (Pascanu et al., 2013), in two launches.

What moves: every gradient is read once for the norm, and read and written once more only if there is something to clip.
The norm is a sum in a fixed order: a fixed number of programs leaves one partial sum each, and every program of the
second launch adds those up itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton_kernels.launch import INTERPRETER, Blocks, blocks_for, next_power_of_2, num_sms
from fastgpt.triton_kernels.tensor_list import TL_DTYPES, addresses_of, aligned, cut, place_of, pointer_at


@triton.jit(do_not_specialize=["blocks"])
def _sum_of_squares_kernel(
    partial_ptr,  # (programs,), fp32
    addresses_ptr,  # (tensors,), int64
    sizes_ptr,  # as in tensor_list.Cut
    first_blocks_ptr,
    tensors_ptr,
    blocks,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    sums = tl.zeros((BLOCK,), tl.float32)
    for block in tl.range(pid, blocks, tl.num_programs(0)):
        tensor, start, size = place_of(tl.cast(block, tl.int32), sizes_ptr, first_blocks_ptr, tensors_ptr, BLOCK)
        grad_ptrs = pointer_at(addresses_ptr, tensor, GRAD) + (start + tl.arange(0, BLOCK))
        if start + BLOCK <= size:
            grad = tl.load(grad_ptrs).to(tl.float32)
        else:
            grad = tl.load(grad_ptrs, mask=start + tl.arange(0, BLOCK) < size, other=0.0).to(tl.float32)
        sums += grad * grad
    tl.store(partial_ptr + pid, tl.sum(sums, axis=0))


@triton.jit(do_not_specialize=["partials"])
def _clip_kernel(
    norm_ptr,  # one fp32
    partial_ptr,  # (partials,), fp32
    addresses_ptr,  # (tensors,), int64
    sizes_ptr,  # as in tensor_list.Cut
    first_blocks_ptr,
    tensors_ptr,
    partials,
    max_norm,
    GRAD: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.arange(0, PARTIALS)
    norm = tl.sqrt_rn(tl.sum(tl.load(partial_ptr + offs, mask=offs < partials, other=0.0), axis=0))
    if tl.program_id(0) == 0:
        tl.store(norm_ptr, norm)
    coefficient = max_norm / (norm + 1e-6)
    coefficient = tl.where(coefficient >= 1.0, 1.0, coefficient)  # a NaN stays one
    if coefficient != 1.0:
        tensor, start, size = place_of(tl.program_id(0), sizes_ptr, first_blocks_ptr, tensors_ptr, BLOCK)
        offsets = start + tl.arange(0, BLOCK)
        grad_ptrs = pointer_at(addresses_ptr, tensor, GRAD) + offsets
        if start + BLOCK <= size:
            tl.store(grad_ptrs, (tl.load(grad_ptrs).to(tl.float32) * coefficient).to(GRAD))
        else:
            grad = tl.load(grad_ptrs, mask=offsets < size, other=0.0).to(tl.float32)
            tl.store(grad_ptrs, (grad * coefficient).to(GRAD), mask=offsets < size)


def clip_grad_norm_(grads: list[Tensor], max_norm: float) -> Tensor:
    """Scale ``grads`` in place; returns their joint norm before that, a scalar in fp32."""
    device = grads[0].device
    blocks = blocks_for("clip_grad_norm", grads[0], "any", _default)
    groups: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        if grad.numel():
            groups.setdefault(grad.dtype, []).append(grad)
    if not groups:
        return torch.zeros((), dtype=torch.float32, device=device)
    used = {dtype: [aligned(grad) for grad in group] for dtype, group in groups.items()}
    pieces = {dtype: cut(tuple(x.numel() for x in group), blocks["BLOCK"], device) for dtype, group in used.items()}
    tables = {dtype: addresses_of([group]) for dtype, group in used.items()}
    programs = {dtype: min(piece.blocks, 4 * num_sms(device)) for dtype, piece in pieces.items()}
    partial = torch.empty(sum(programs.values()), dtype=torch.float32, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    done = 0
    for dtype, (count, sizes, first_blocks, tensors) in pieces.items():
        _sum_of_squares_kernel[(programs[dtype],)](
            partial[done:], tables[dtype], sizes, first_blocks, tensors, count, GRAD=TL_DTYPES[dtype], **blocks
        )
        done += programs[dtype]
    for dtype, (count, sizes, first_blocks, tensors) in pieces.items():
        _clip_kernel[(count,)](
            norm,
            partial,
            tables[dtype],
            sizes,
            first_blocks,
            tensors,
            done,
            max_norm,
            GRAD=TL_DTYPES[dtype],
            PARTIALS=next_power_of_2(done),
            **blocks,
        )
    torch.autograd.graph.increment_version(grads)
    for dtype, group in groups.items():
        for grad, copy in zip(group, used[dtype], strict=True):
            if copy is not grad:
                grad.copy_(copy)
    return norm


def _default(generation: int) -> Blocks:
    return {"BLOCK": 4096 if generation == INTERPRETER else 2048, "num_warps": 4}


if __name__ == "__main__":
    from fastgpt import reference
    from fastgpt.triton_kernels.selfcheck import check, sample, start

    (count,) = start(small=(1,), large=(12,))
    shapes = [(60, 20), (60,), (7,)] if count == 1 else [(3072, 768), (768, 3072), (768, 2304), (768,)] * count
    grads = [sample(*shape).float() for shape in shapes]
    before = [grad.clone() for grad in grads]

    def truth() -> list[Tensor]:
        wide = [grad.double() for grad in before]
        norm = reference.clip_grad_norm_(wide, 1.0)
        return [norm, *wide]

    # What is timed on a GPU is the second call and the later ones, which have nothing left to clip and only read.
    check(
        "clip_grad_norm_", lambda: [clip_grad_norm_(grads, 1.0), *grads], truth, moved=4 * sum(map(Tensor.numel, grads))
    )
