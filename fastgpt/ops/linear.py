from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import dispatch, extension
from fastgpt.ops.backward import only_result_wanted

# The cpp backend's alone, and so not among those that kernel_ops defines for every kernel backend.
_library = torch.library.Library("fastgpt_cpp", "FRAGMENT")
_library.define("linear_row(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("linear_row", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("fastgpt_cpp::linear_row", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_linear_row = extension.cpu.op("linear_row")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, and faster where generation with a cache needs it: on one row.

    Matrix products are PyTorch's, whatever the backend. A single row in fp32 on a CPU is the exception: reading the
    weights is then all there is to do, BLAS does it on one thread, and a kernel of the cpp backend on all. It runs
    where nothing but the result is wanted (no gradient, no compiler), outside of autocast, where all ops are left to
    the cpp backend (``dispatch.is_left_to``).

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,), or None.
    Returns:
        (..., N), as ``F.linear``, whose errors are its own.
    """
    if (
        only_result_wanted()
        and x.numel() == x.shape[-1] == weight.shape[-1]
        and x.dtype == torch.float32 == weight.dtype
        and x.device.type == "cpu" == weight.device.type
        and type(weight) is torch.nn.Parameter  # a quantised or distributed weight knows its own product
        and not torch.is_autocast_enabled("cpu")
        and dispatch.is_left_to("cpp", "cpu")
    ):
        return _linear_row(x, weight, bias)
    return F.linear(x, weight, bias)
