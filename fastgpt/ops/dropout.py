from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.dispatch import Kernels
from fastgpt.ops.backward import apply, first_derivative
from fastgpt.ops.checks import check_dropout, check_tensor
from fastgpt.ops.seed import seed_for


def dropout(x: Tensor, p: float, *, seed: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Set elements of ``x`` to 0 with probability ``p`` and divide the others by 1 - p (Srivastava et al., 2014).

    There is no training flag: in evaluation pass p = 0, which returns ``x`` itself.

    Args:
        x: any shape, fp32, fp16 or bf16 (float64 on the reference).
        p: probability that an element is dropped, in [0, 1).
        seed: int64 tensor of one element that determines the mask (``fastgpt.reference.dropout_mask``); None draws one
            from the device's default generator.
        backend: "reference", "torch", "triton", "cpp" or "cuda"; None asks ``fastgpt.dispatch``.
    Returns:
        The shape and dtype of ``x``; gradients flow to ``x``.
    Raises:
        TypeError: an argument that is not a tensor or number.
        ValueError: a wrong dtype or device, ``p`` outside [0, 1), or a backend that cannot run it, with the reason.
    """
    check_tensor("dropout", "x", x, scalar=True)
    check_dropout("dropout", p, seed, x, p_name="p")
    return dispatch.run("dropout", backend, x, p, seed_for(p, seed, x.device), on_kernels=_dropout_on_kernels)


def _dropout_on_kernels(kernels: Kernels, x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return x if p == 0 else apply(_Dropout, kernels, x, p, seed)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.kernels, ctx.p = kernels, p
        return kernels.fwd(x, p, seed)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (seed,) = ctx.saved_tensors
        return None, ctx.kernels.bwd(grads[0], ctx.p, seed), None, None
