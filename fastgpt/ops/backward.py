"""What the ``autograd.Function`` of every op shares: whether there need be one, and that it has one derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def only_result_wanted() -> bool:
    """Whether a call is for its result alone: no gradient, no derivative of torch.func, no compiler that traces it."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0  # which torch.no_grad() leaves on
    )


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, or its forward alone where that will do: ``apply`` outlasts a small kernel."""
    return function.forward(_NoGraph(), *args) if only_result_wanted() else function.apply(*args)


class _NoGraph:
    """The ``ctx`` of a forward that no backward will follow: nothing is kept."""

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


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
