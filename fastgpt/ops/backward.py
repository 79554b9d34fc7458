from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The ``backward`` of an ``autograd.Function`` over kernels, which have no second derivative.

    torch's own ``once_differentiable`` lets a graph of derivatives be built, and some of them vanish from it without a
    word; here asking for one is an error. It is also quicker: an ordinary backward runs with gradients off already.

    Raises:
        RuntimeError: in the backward, where it is called with ``create_graph=True``.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "kernels have no second derivative, so create_graph=True cannot go through them: "
                "use_backend('torch') and use_backend('reference') run ops that have one"
            )
        return backward(ctx, *grads)

    return wrapper
