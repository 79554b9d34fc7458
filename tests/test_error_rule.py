"""The rule and the poison that the op tests lean on can fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from error_rule import check, check_reference, sample
from torch import Tensor


def double(x: Tensor) -> Tensor:
    return x * 2


def made_wrong(wrong: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """An op that doubles, and on the backend "torch" does ``wrong``."""

    def doubling(x: Tensor, backend: str) -> Tensor:
        return wrong(x) if backend == "torch" else double(x)

    return doubling


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0] * 2.00001


def test_poison_fills_fresh_memory_with_nan(poisoned: None) -> None:
    assert torch.empty(1000).isnan().all()
    assert torch.empty_like(torch.ones(7, 5)).isnan().all()
    assert torch.ones(3).new_empty(9, dtype=torch.bfloat16).isnan().all()


def test_poison_ends_with_its_test() -> None:
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_right_result_passes(dtype: torch.dtype) -> None:
    check(made_wrong(double), "torch", double, {"x": sample(5, 7, dtype=dtype)})


def test_an_error_just_above_the_allowed_fails_with_a_sentence_that_says_where() -> None:
    def off_in_one_place(x: Tensor) -> Tensor:
        step = torch.zeros_like(x)
        step[2, 3] = 4e-7 * 2 * float(x.detach().abs().max())
        return double(x) + step

    wanted = (
        r"doubling on torch in float32: output 0 is off by .* allowed is .* \(PyTorch's own is off by 0, the largest "
        r"true value is .*\); the worst element is at \(2, 3\): got .*, true is "
    )
    with pytest.raises(AssertionError, match=wanted):
        check(made_wrong(off_in_one_place), "torch", double, {"x": sample(5, 7)})


def test_an_error_just_below_the_allowed_passes() -> None:
    check(made_wrong(lambda x: double(x) * (1 + 2**-23)), "torch", double, {"x": sample(5, 7)})


def test_twice_the_error_of_the_peer_passes_and_three_times_fails() -> None:
    def peer(x: Tensor) -> Tensor:
        return double(x) if x.dtype == torch.float64 else x * 2.001

    check(made_wrong(lambda x: x * 2.002), "torch", peer, {"x": sample(5, 7)})
    with pytest.raises(AssertionError, match="output 0 is off"):
        check(made_wrong(lambda x: x * 2.003), "torch", peer, {"x": sample(5, 7)})


def test_a_wrong_gradient_fails_and_is_named() -> None:
    with pytest.raises(AssertionError, match="gradient of x is off"):
        check(made_wrong(WrongGradient.apply), "torch", double, {"x": sample(5, 7)})


def test_one_nan_fails() -> None:
    def poke(x: Tensor) -> Tensor:
        return torch.where(torch.arange(7) == 4, torch.nan, double(x))

    with pytest.raises(AssertionError, match=r"output 0 is off by inf.*at \(0, 4\): got nan"):
        check(made_wrong(poke), "torch", double, {"x": sample(5, 7)})


def test_another_dtype_fails() -> None:
    with pytest.raises(AssertionError, match=r"has dtype torch.float32, wanted is torch.bfloat16"):
        check(made_wrong(lambda x: double(x).float()), "torch", double, {"x": sample(5, dtype=torch.bfloat16)})


def test_the_reference_is_held_to_pytorch_in_float64() -> None:
    def off_by_little(x: Tensor, backend: str) -> Tensor:
        return x * (2 + 1e-11)

    for wrong in (
        lambda x: check_reference(off_by_little, double, x),
        lambda x: check(off_by_little, "torch", double, x),
    ):
        with pytest.raises(AssertionError, match="off_by_little on reference in float64: output 0 is off"):
            wrong({"x": sample(5, 7)})
