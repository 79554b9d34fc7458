"""One AdamW step over all parameters (Loshchilov and Hutter, 2019, algorithm 2), in one launch for each set of dtypes.

What moves: parameter, gradient and the two means are read, parameter and means written: 7 tensors, 28 bytes an element
in fp32. Step and learning rate are read from the device, so that a captured CUDA graph goes on with new ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.triton_kernels.launch import INTERPRETER, Blocks, blocks_for
from fastgpt.triton_kernels.tensor_list import TL_DTYPES, addresses_of, aligned, cut, place_of, pointer_at


@triton.jit
def _correction(step, log_beta_high, log_beta_low):
    """1 - beta^step in float64: near beta = 1 all digits of fp32 would cancel."""
    step = step.to(tl.float64)
    return 1.0 - tl.exp(step * log_beta_high + step * log_beta_low)


@triton.jit
def _adamw_block(
    param_ptrs,
    grad_ptrs,
    exp_avg_ptrs,
    exp_avg_sq_ptrs,
    mask,  # None for a whole block, whose accesses then are 16 bytes wide
    lr,
    kept,  # 1 - lr * weight_decay
    correction1,
    correction2,
    beta1,
    beta2,
    rest1,  # 1 - beta1
    rest2,  # 1 - beta2
    eps,
):
    param = tl.load(param_ptrs, mask=mask).to(tl.float32)
    grad = tl.load(grad_ptrs, mask=mask).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptrs, mask=mask).to(tl.float32) * beta1 + grad * rest1
    exp_avg_sq = tl.load(exp_avg_sq_ptrs, mask=mask).to(tl.float32) * beta2 + grad * grad * rest2
    update = (exp_avg / correction1) / (tl.sqrt_rn(exp_avg_sq / correction2) + eps)
    param = param * kept - update * lr
    tl.store(param_ptrs, param.to(param_ptrs.dtype.element_ty), mask=mask)
    tl.store(exp_avg_ptrs, exp_avg.to(exp_avg_ptrs.dtype.element_ty), mask=mask)
    tl.store(exp_avg_sq_ptrs, exp_avg_sq.to(exp_avg_sq_ptrs.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride"])
def _adamw_kernel(
    addresses_ptr,  # (4, stride), int64: params, grads, exp_avgs, exp_avg_sqs
    sizes_ptr,  # as in tensor_list.Cut
    first_blocks_ptr,
    tensors_ptr,
    step_ptr,  # one fp32
    lr_ptr,  # one fp32
    stride,
    beta1,
    beta2,
    rest1,  # 1 - beta1
    rest2,  # 1 - beta2
    log_beta1_high,  # log(beta1) as the sum of two fp32
    log_beta1_low,
    log_beta2_high,
    log_beta2_low,
    eps,
    weight_decay,
    PARAM: tl.constexpr,  # the lists' dtypes
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tensor, start, size = place_of(tl.program_id(0), sizes_ptr, first_blocks_ptr, tensors_ptr, BLOCK)
    param_ptr = pointer_at(addresses_ptr, tensor, PARAM)
    grad_ptr = pointer_at(addresses_ptr + stride, tensor, GRAD)
    exp_avg_ptr = pointer_at(addresses_ptr + 2 * stride, tensor, EXP_AVG)
    exp_avg_sq_ptr = pointer_at(addresses_ptr + 3 * stride, tensor, EXP_AVG_SQ)
    step, lr = tl.load(step_ptr), tl.load(lr_ptr)
    correction1 = _correction(step, log_beta1_high, log_beta1_low).to(tl.float32)
    correction2 = _correction(step, log_beta2_high, log_beta2_low).to(tl.float32)
    kept = 1.0 - lr * weight_decay
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= size:
        _adamw_block(
            param_ptr + offsets,
            grad_ptr + offsets,
            exp_avg_ptr + offsets,
            exp_avg_sq_ptr + offsets,
            None,
            lr,
            kept,
            correction1,
            correction2,
            beta1,
            beta2,
            rest1,
            rest2,
            eps,
        )
    else:
        _adamw_block(
            param_ptr + offsets,
            grad_ptr + offsets,
            exp_avg_ptr + offsets,
            exp_avg_sq_ptr + offsets,
            offsets < size,
            lr,
            kept,
            correction1,
            correction2,
            beta1,
            beta2,
            rest1,
            rest2,
            eps,
        )


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: Tensor,
    lr: Tensor,
    betas: list[float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update ``params``, ``exp_avgs`` and ``exp_avg_sqs`` in place; the lists' tensors match in shape, not in dtype."""
    groups: dict[tuple[torch.dtype, ...], list[tuple[Tensor, ...]]] = {}
    for four in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        if four[0].numel():
            groups.setdefault(tuple(x.dtype for x in four), []).append(four)
    for dtypes, fours in groups.items():
        given = [list(tensors) for tensors in zip(*fours, strict=True)]
        lists = [[aligned(x) for x in tensors] for tensors in given]
        _launch(lists, dtypes, step, lr, betas, eps, weight_decay)
        for at in (0, 2, 3):
            torch.autograd.graph.increment_version(given[at])
            for x, used in zip(given[at], lists[at], strict=True):
                if used is not x:
                    x.copy_(used)


def _launch(
    lists: list[list[Tensor]],
    dtypes: tuple[torch.dtype, ...],
    step: Tensor,
    lr: Tensor,
    betas: list[float],
    eps: float,
    weight_decay: float,
) -> None:
    params = lists[0]
    blocks = blocks_for("adamw", params[0], "any", _default)
    pieces = cut(tuple(x.numel() for x in params), blocks["BLOCK"], params[0].device)
    addresses = addresses_of(lists)
    types: dict[str, Any] = dict(
        zip(("PARAM", "GRAD", "EXP_AVG", "EXP_AVG_SQ"), (TL_DTYPES[dtype] for dtype in dtypes), strict=True)
    )
    _adamw_kernel[(pieces.blocks,)](
        addresses,
        pieces.sizes,
        pieces.first_blocks,
        pieces.tensors,
        step,
        lr,
        addresses.stride(0),
        *betas,
        1 - betas[0],
        1 - betas[1],
        *_split_log(betas[0]),
        *_split_log(betas[1]),
        eps,
        weight_decay,
        **types,
        **blocks,
    )


def _split_log(beta: float) -> tuple[float, float]:
    """log(beta) as the sum of two numbers that fp32, a kernel's only type of float argument, holds exactly."""
    if beta == 0:
        return -math.inf, 0.0
    log = math.log(beta)
    high = torch.tensor(log, dtype=torch.float32).item()
    return high, log - high


def _default(generation: int) -> Blocks:
    return {"BLOCK": 4096 if generation == INTERPRETER else 2048, "num_warps": 4}


if __name__ == "__main__":
    from fastgpt import reference
    from fastgpt.triton_kernels.selfcheck import check, sample, start

    (count,) = start(small=(1,), large=(12,))
    shapes = [(60, 20), (60,), (7,)] if count == 1 else [(3072, 768), (768, 3072), (768, 2304), (768,)] * count
    params, grads = ([sample(*shape).float() for shape in shapes] for _ in range(2))
    means = [[torch.zeros_like(x) for x in params] for _ in range(2)]
    step, lr = (torch.tensor(x, device=params[0].device) for x in (1.0, 0.1))
    options = (step, lr, [0.9, 0.95], 1e-8, 0.1)

    def run() -> list[Tensor]:
        adamw_(params, grads, *means, *options)
        return [x for tensors in (params, *means) for x in tensors]

    def truth() -> list[Tensor]:
        wide = [[x.double() for x in tensors] for tensors in before]
        reference.adamw_(*wide, *options)
        return [x for tensors in (wide[0], *wide[2:]) for x in tensors]

    before = [[x.clone() for x in tensors] for tensors in (params, grads, *means)]
    check("adamw_", run, truth, moved=28 * sum(x.numel() for x in params))
