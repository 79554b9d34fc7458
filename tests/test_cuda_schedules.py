"""The CUDA kernels give the same bits whichever of their threads runs first: nothing in them relies on luck."""

from __future__ import annotations

import functools

import pytest
import torch
from cuda_cases import Case, cases
from torch import Tensor

from fastgpt import dispatch, emulator

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, and it has its own schedule")

CASES = cases()
OTHERS = [("reversed", "eager", 0), ("random", "eager", 1), *(("skewed", "lazy", seed) for seed in (1, 2, 3))]


@functools.cache
def in_order(name: str) -> list[Tensor]:
    with emulator.schedule("in_order", "eager"):
        return CASES[name]()


def check(name: str, case: Case, order: str, copies: str, seed: int) -> None:
    with emulator.schedule(order, copies, seed):
        got = case()
    for i, (x, wanted) in enumerate(zip(got, in_order(name), strict=True)):
        assert x.isfinite().all(), f"result {i} is not finite"
        assert torch.equal(x, wanted), f"result {i} is another than in order"


def test_every_op_has_its_cases() -> None:
    assert {name.split()[0].rstrip(",") for name in CASES} == set(dispatch.OPS)


@pytest.mark.parametrize("op", dispatch.OPS)
def test_another_schedule_gives_the_same_bits(op: str) -> None:
    check(op_case := next(name for name in CASES if name.startswith(op)), CASES[op_case], "skewed", "lazy", 3)


@pytest.mark.full
@pytest.mark.parametrize(("order", "copies", "seed"), OTHERS)
@pytest.mark.parametrize("name", CASES)
def test_any_schedule_gives_the_same_bits(name: str, order: str, copies: str, seed: int) -> None:
    check(name, CASES[name], order, copies, seed)
