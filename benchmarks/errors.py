"""How far a result is from the truth, and how far it may be: the arithmetic of the error rule (tests/error_rule.py).

And memory that does not pass for a result: ``poisoned_memory``.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 26  # elements that are widened to float64 at a time


def allowed_error(peer_error: float, largest_true: float, dtype: torch.dtype, largest_upstream: float = 0.0) -> float:
    """The largest error that the error rule allows in a tensor.

    Args:
        peer_error: of PyTorch's own op, in the same dtype on the same inputs.
        largest_true: the largest true magnitude.
        dtype: of the tensor.
        largest_upstream: for a gradient, the largest upstream gradient, since some true gradients are exactly zero.
    """
    rounding = torch.finfo(dtype).eps / 2
    return 2 * peer_error + (rounding + 2**-22) * largest_true + 2**-20 * largest_upstream


def largest(x: Tensor) -> float:
    """The largest magnitude; infinity where there is a NaN, so that no comparison with it can pass."""
    parts = x.flatten().split(_CHUNK)
    return max(
        (float(part.double().abs().nan_to_num(nan=math.inf).max()) for part in parts if part.numel()), default=0.0
    )


def absolute_error(got: Tensor, true: Tensor) -> float:
    """The largest |got - true|, in float64; infinite where the shapes differ or a result is not a number."""
    if got.shape != true.shape:
        return math.inf
    return max((largest(mine.double() - theirs.double()) for mine, theirs in _chunks(got, true)), default=0.0)


def relative_error(got: Tensor, true: Tensor) -> float:
    """||got - true|| / ||true||, in float64; infinite where the shapes differ or a result is not a number."""
    if got.shape != true.shape:
        return math.inf
    squares = [0.0, 0.0]
    for mine, theirs in _chunks(got, true):
        squares[0] += (mine.double() - theirs.double()).square().sum().item()
        squares[1] += theirs.double().square().sum().item()
    error = math.sqrt(squares[0] / squares[1]) if squares[1] else math.sqrt(squares[0])
    return math.inf if math.isnan(error) else error


def largest_error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest ``relative_error`` of several tensors."""
    return max(relative_error(mine, true) for mine, true in zip(got, truth, strict=True))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every tensor made by torch.empty and its kin comes out as NaN (the largest number, for integers).

    A kernel that leaves an element of its output unwritten, or adds to memory that it never cleared, then fails
    instead of passing on the zeros, or the right results, that memory often holds.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _chunks(got: Tensor, true: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(got.flatten().split(_CHUNK), true.flatten().split(_CHUNK), strict=True)
