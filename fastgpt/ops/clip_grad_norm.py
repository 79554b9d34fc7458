from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops.checks import check_tensor_list


@torch.no_grad()
def clip_grad_norm_(grads: Sequence[Tensor], max_norm: float, *, backend: str | None = None) -> Tensor:
    """Scale all gradients down, in place, so that their joint 2-norm is at most ``max_norm`` (Pascanu et al., 2013).

    Args:
        grads: a list of tensors of any sizes on one device, fp32, fp16 or bf16 (float64 on the reference); changed.
        max_norm: the largest norm that is left alone, greater than 0 (infinity only measures).
        backend: "reference", "torch", "triton", "cpp" or "cuda"; None asks ``fastgpt.dispatch``.
    Returns:
        The norm before clipping, a scalar in fp32 on the gradients' device. Where it is not finite, the gradients are
        0 or NaN afterwards.
    Raises:
        TypeError: an argument that is not a list of tensors or a number.
        ValueError: an empty list, more than one device, ``max_norm`` not above 0, or a backend that cannot run it.
    """
    op = "clip_grad_norm_"
    check_tensor_list(op, "grads", grads)
    if not isinstance(max_norm, (int, float)) or isinstance(max_norm, bool):
        raise TypeError(f"{op}: max_norm must be a number, got {type(max_norm).__name__}")
    if not max_norm > 0:
        raise ValueError(f"{op}: max_norm must be greater than 0, got {max_norm}")
    return dispatch.run(op, backend, list(grads), max_norm)
