from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops.checks import check_number, check_tensor_list


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    *,
    lr: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    backend: str | None = None,
) -> None:
    """One AdamW step over all parameters, in place (Loshchilov and Hutter, 2019, algorithm 2).

    Args:
        params, grads: lists of tensors of any sizes on one device, fp32, fp16 or bf16 (float64 on the reference);
            ``params`` are changed.
        exp_avgs, exp_avg_sqs: the running means of the gradients and of their squares, shaped like ``params``; changed.
        step: fp32 tensor of one element, 1 for the first step; only read.
        lr: fp32 tensor of one element; on the device, so that a captured CUDA graph can be given another.
        betas: decay of the two means, each in [0, 1).
        eps: added to the denominator, which is the square root of the corrected second mean.
        weight_decay: share of a parameter, times lr, taken off before the update.
        backend: "reference", "torch", "triton", "cpp" or "cuda"; None asks ``fastgpt.dispatch``.
    Raises:
        TypeError: an argument that is not a list of tensors, a tensor or a number.
        ValueError: lists that do not match in length, shape or device, a number out of range, or a backend that cannot
            run it, with the reason.
    """
    op = "adamw_"
    check_tensor_list(op, "params", params)
    shapes = [x.shape for x in params]
    for name, tensors in (("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        check_tensor_list(op, name, tensors)
        if len(tensors) != len(params):
            raise ValueError(f"{op}: {name} must hold {len(params)} tensors, as params does, got {len(tensors)}")
        if tensors[0].device != params[0].device:
            raise ValueError(f"{op}: {name} must be on params' device {params[0].device}, got {tensors[0].device}")
        if [x.shape for x in tensors] != shapes:
            at = next(i for i, x in enumerate(tensors) if x.shape != shapes[i])
            raise ValueError(
                f"{op}: {name}[{at}] must have shape {tuple(shapes[at])} as params[{at}] has, "
                f"got {tuple(tensors[at].shape)}"
            )
    for name, scalar in (("step", step), ("lr", lr)):
        if not isinstance(scalar, Tensor):
            raise TypeError(f"{op}: {name} must be an fp32 tensor of one element, got {type(scalar).__name__}")
        if scalar.dtype != torch.float32 or scalar.numel() != 1 or scalar.device != params[0].device:
            raise ValueError(
                f"{op}: {name} must be an fp32 tensor of one element on {params[0].device}, "
                f"got {scalar.dtype} of shape {tuple(scalar.shape)} on {scalar.device}"
            )
    if step.device.type == "cpu" and not torch.compiler.is_compiling() and not step.item() >= 1:
        raise ValueError(f"{op}: step must be at least 1, got {step.item()}")
    numbers = isinstance(betas, tuple) and all(isinstance(beta, (int, float)) for beta in betas)
    if not (numbers and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(f"{op}: betas must be a tuple of two numbers in [0, 1), got {betas!r}")
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        check_number(op, name, value)
        if value < 0:
            raise ValueError(f"{op}: {name} must not be negative, got {value}")
    lists = (list(params), list(grads), list(exp_avgs), list(exp_avg_sqs))
    dispatch.run(op, backend, *lists, step, lr, betas, eps, weight_decay)
