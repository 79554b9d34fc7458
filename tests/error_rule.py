"""The error rule: how far a backend may be from the truth.

The truth is the reference backend in float64, on the same inputs; in every case it is itself held to the peer in
float64. The peer is PyTorch's own op, spelled out in the test, in the dtype under test. In each output and in each
gradient a backend may be off by at most

    2 * (the peer's error) + (one rounding of the result's dtype + 2^-22) * (the largest true value)

and in a gradient by 2^-20 of the largest upstream gradient more, since some true gradients are exactly zero.

A new backend is tested by adding its name to ``BACKENDS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt.benchmarks.errors import allowed_error, largest

BACKENDS = ("reference", "torch", "triton", "cpp", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Op = Callable[..., Any]


def sample(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.5, std: float = 1.0) -> Tensor:
    """Random numbers whose mean is not zero: sums of zero-mean inputs hide errors that grow with the sum."""
    return (torch.randn(shape, dtype=torch.float64) * std + mean).to(DEVICE, dtype)


def check(op: Op, backend: str, peer: Op, inputs: dict[str, Tensor], **options: Any) -> None:
    """Run ``op(**inputs, **options)`` forward and backward on ``backend`` and hold it to the rule.

    Args:
        op: a public op, or a function with an op's name that takes ``backend``.
        backend: the backend under test.
        peer: PyTorch's own op, with the same arguments, which returns the dtypes that ``op`` documents.
        inputs: the floating-point tensors, any strides; the gradient of each is checked.
        options: all other arguments; tensors among them are passed on as they are.
    """
    expected, upstream = _forward_and_backward(peer, inputs, options, None)
    wide_inputs = {name: x.double() for name, x in inputs.items()}
    wide_upstream = [dy.double() for dy in upstream]
    truth, _ = _forward_and_backward(_on(op, "reference"), wide_inputs, options, wide_upstream)
    _hold_truth(op, truth, _forward_and_backward(peer, wide_inputs, options, wide_upstream)[0])
    got, _ = _forward_and_backward(_on(op, backend), inputs, options, upstream)
    largest_upstream = max(largest(dy) for dy in wide_upstream)
    for name, true in truth.items():
        _hold(
            f"{op.__name__} on {backend} in {_dtype_of(inputs)}: {name}",
            got[name],
            expected[name],
            true,
            largest_upstream if name.startswith("gradient") else 0.0,
        )


def check_in_place(op: Op, backend: str, peer: Op, inputs: dict[str, list[Tensor]], **options: Any) -> None:
    """Hold an op that changes lists of tensors to the rule: each tensor afterwards, and what the op returns."""
    expected = _changed(peer, inputs, options, torch.clone)
    truth = _changed(_on(op, "reference"), inputs, options, Tensor.double)
    _hold_truth(op, truth, _changed(peer, inputs, options, Tensor.double))
    got = _changed(_on(op, backend), inputs, options, torch.clone)
    dtype = _dtype_of({name: tensors[0] for name, tensors in inputs.items()})
    for name, true in truth.items():
        _hold(f"{op.__name__} on {backend} in {dtype}: {name}", got[name], expected[name], true, 0.0)


def check_reference(op: Op, peer: Op, inputs: dict[str, Tensor], **options: Any) -> None:
    """Hold the truth alone to PyTorch's own op, both in float64."""
    inputs = {name: x.double() for name, x in inputs.items()}
    expected, upstream = _forward_and_backward(peer, inputs, options, None)
    _hold_truth(op, _forward_and_backward(_on(op, "reference"), inputs, options, upstream)[0], expected)


def _hold_truth(op: Op, truth: dict[str, Tensor], peer: dict[str, Tensor]) -> None:
    """Only the order of sums may tell the two apart."""
    for name, wanted in peer.items():
        what = f"{op.__name__} on reference in float64: {name}"
        assert truth[name].dtype == torch.float64, f"{what} has dtype {truth[name].dtype}"
        error, allowed = largest(truth[name] - wanted), 1e-12 * (largest(wanted) + 1)
        assert error <= allowed, (
            f"{what} is off by {error:.3g} from PyTorch's own, allowed is {allowed:.3g}; {_worst(truth[name], wanted)}"
        )


def _hold(what: str, got: Tensor, peer: Tensor, true: Tensor, largest_upstream: float) -> None:
    assert torch.isfinite(true).all(), f"{what}: the truth is not finite, so the case tests nothing"
    assert got.shape == true.shape, f"{what} has shape {tuple(got.shape)}, wanted is {tuple(true.shape)}"
    assert got.dtype == peer.dtype, f"{what} has dtype {got.dtype}, wanted is {peer.dtype}"
    error, peer_error, largest_true = (largest(x) for x in (got.double() - true, peer.double() - true, true))
    assert peer_error < float("inf"), f"{what}: PyTorch's own is not finite, so the case tests nothing"
    allowed = allowed_error(peer_error, largest_true, got.dtype, largest_upstream)
    assert error <= allowed, (
        f"{what} is off by {error:.3g}, allowed is {allowed:.3g} (PyTorch's own is off by {peer_error:.3g}, the "
        f"largest true value is {largest_true:.3g}); {_worst(got, true)}"
    )


def _worst(got: Tensor, true: Tensor) -> str:
    error = (got.double() - true.double()).abs().nan_to_num(nan=torch.inf)
    place = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    return f"the worst element is at {place}: got {got[place].item():.9g}, true is {true[place].item():.9g}"


def _on(op: Op, backend: str) -> Op:
    return lambda **arguments: op(**arguments, backend=backend)


def _forward_and_backward(
    op: Op, inputs: dict[str, Tensor], options: dict[str, Any], upstream: list[Tensor] | None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Outputs and gradients by name, and the upstream gradients, which are random where none are given."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = op(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstream is None:
        upstream = [sample(*y.shape, dtype=y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    results.update({f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)})
    return results, upstream


def _changed(
    op: Op, inputs: dict[str, list[Tensor]], options: dict[str, Any], copy: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    inputs = {name: [copy(x) for x in tensors] for name, tensors in inputs.items()}
    result = op(**inputs, **options)
    changed = {f"{name}[{i}]": x for name, tensors in inputs.items() for i, x in enumerate(tensors)}
    return changed if result is None else {**changed, "what it returns": result}


def _dtype_of(inputs: dict[str, Tensor]) -> str:
    return " and ".join(dict.fromkeys(str(x.dtype).removeprefix("torch.") for x in inputs.values()))
