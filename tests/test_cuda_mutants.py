"""Every wait in the CUDA kernels is there for a reason: switched off in the emulator, it is missed.

Missed means that the emulator raises an error, or that some result has other bits. Where the emulator cannot see what a
wait is for, a comment above it or beside it must say what that is: "unseen by the emulator: ...", argued from CUDA's
memory model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_cases import cases
from cuda_waits import code, waits_in
from torch import Tensor

from fastgpt import emulator

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, and its barriers cannot be switched off"),
]

FOLDER = Path(__file__).parent.parent / "csrc" / "cuda"
CASES = cases()
SCHEDULES = (("in_order", "eager", 0), ("skewed", "lazy", 1))
MARK = "unseen by the emulator:"


def places() -> list[tuple[str, int]]:
    """File and line of each wait in the kernels' sources."""
    defining = ("prims.cuh", "prims_sm90.cuh")
    return waits_in(path for path in sorted(FOLDER.iterdir()) if path.name not in defining)


def comment_at(file: str, number: int) -> str:
    """The comment beside a line and the lines of comment right above it."""
    lines = (FOLDER / file).read_text().splitlines()[:number]
    above = itertools.takewhile(lambda line: line.strip().startswith("//"), reversed(lines[:-1]))
    return "\n".join([*reversed(list(above)), lines[-1].removeprefix(code(lines[-1]))])


@functools.cache
def baseline() -> tuple[dict[str, list[Tensor]], dict[tuple[str, int], str]]:
    """What the cases return, and by place the first case that reached the wait there."""
    results, reached = {}, {}
    with emulator.schedule() as module:
        module.switch_all_on()
        for name, run in CASES.items():
            results[name] = run()
            for wait in module.waits():
                reached.setdefault((wait.file, wait.line), name)
    return results, reached


def difference(name: str, wanted: list[Tensor]) -> str | None:
    """How a case betrays that something is wrong with a kernel."""
    try:
        got = CASES[name]()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    wrong = [i for i, (x, y) in enumerate(zip(got, wanted, strict=True)) if not torch.equal(x, y)]
    return f"other bits in the results {wrong} of {name!r}" if wrong else None


@pytest.fixture
def module() -> Iterator[Any]:
    module = emulator.load()
    yield module
    module.switch_all_on()


def test_every_wait_of_the_sources_is_reached() -> None:
    assert set(baseline()[1]) == set(places())


@pytest.mark.parametrize(("file", "line"), list(places()), ids=lambda part: str(part))
def test_a_wait_that_is_left_out_is_missed(module: Any, file: str, line: int) -> None:
    results, reached = baseline()
    first = reached[file, line]
    module.switch_off(file, line)
    found = None
    for schedule, name in itertools.product(SCHEDULES, [first, *(name for name in CASES if name != first)]):
        with emulator.schedule(*schedule):
            found = found or difference(name, results[name])
        if found:
            break
    print(f"{file}:{line}: {found}")
    expected = MARK not in comment_at(file, line)
    assert bool(found) == expected, (
        f"{file}:{line} can be left out, and no case misses it"
        if expected
        else f"{file}:{line} is said to be unseen by the emulator, which saw: {found}"
    )
