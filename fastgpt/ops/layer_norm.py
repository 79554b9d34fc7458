from __future__ import annotations

from torch import Tensor

from fastgpt import dispatch
from fastgpt.ops.checks import check_norm


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, backend: str | None = None
) -> Tensor:
    """Normalise ``x`` over its last dimension, then scale and shift (Ba et al., 2016, eq. 4).

    Args:
        x: (..., N), fp32, fp16 or bf16 (float64 on the reference).
        weight, bias: (N,), on ``x``'s device, in its dtype, or fp32 beside half precision; ``bias`` may be None.
        eps: added to the variance before the square root.
        backend: "reference", "torch", "triton", "cpp" or "cuda"; None asks ``fastgpt.dispatch``.
    Returns:
        (..., N) in ``x.dtype``; sums are fp32; gradients flow to x, weight and bias.
    Raises:
        TypeError: an argument that is not a tensor or number.
        ValueError: a wrong shape, dtype or device, or a backend that cannot run it, with the reason.
    """
    check_norm("layer_norm", x, weight, bias, eps)
    return dispatch.run("layer_norm", backend, x, weight, bias, eps)
