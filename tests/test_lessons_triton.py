"""The Triton ladders of lessons/kernels: each rung right and as it promises, and the counters that say so."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from conftest import INTERPRETING
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, interpreter_builder

from lessons.kernels import triton_rung
from lessons.kernels.rung import PARTS, Counts, Rung, RungError, ladder, read_rung
from lessons.kernels.tasks import LADDERS, TASKS, Problem
from lessons.kernels.triton_counters import COUNTERS as INTERPRETED
from lessons.kernels.triton_counters import counting

CPU = torch.device("cpu")
README = triton_rung.ROOT / "lessons" / "kernels" / "README.md"
RUNGS = {name: [rung for rung in ladder(name) if rung.language == "triton"] for name in LADDERS}

in_the_interpreter = pytest.mark.skipif(not INTERPRETING, reason="counts what Triton's interpreter does")


# Counters


@triton.jit
def _copy_kernel(y_ptr, x_ptr, N, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets * STRIDE, mask=offsets < N, other=0.0)
    tl.store(y_ptr + offsets, x, mask=offsets < N)


@triton.jit
def _loop_kernel(y_ptr, x_ptr, N, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, N, BLOCK):
        total += tl.load(x_ptr + start + tl.arange(0, BLOCK))
    tl.store(y_ptr, tl.sum(total, axis=0))


@triton.jit
def _atomic_kernel(y_ptr, x_ptr, N, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < N), mask=offsets < N)
    tl.atomic_cas(y_ptr, 0.0, 1.0)


@triton.jit
def _dot_kernel(y_ptr, x_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(y_ptr + m[:, None] * M + m[None, :], tl.dot(x, tl.trans(x)))


@triton.jit
def _descriptor_kernel(y_ptr, x_ptr, M, N: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK, N])
    y = tl.make_tensor_descriptor(y_ptr, shape=[M, N], strides=[N, 1], block_shape=[BLOCK, N])
    row = tl.program_id(0) * BLOCK
    y.store([row, 0], x.load([row, 0]))


@triton.jit
def _block_pointer_kernel(y_ptr, x_ptr, M, N: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.make_block_ptr(x_ptr, (M, N), (N, 1), (tl.program_id(0) * BLOCK, 0), (BLOCK, N), (1, 0))
    y = tl.make_block_ptr(y_ptr, (M, N), (N, 1), (tl.program_id(0) * BLOCK, 0), (BLOCK, N), (1, 0))
    tl.store(y, tl.load(x, boundary_check=(0,)), boundary_check=(0,))


def counts_of(launch: Callable[[], object]) -> dict[str, int]:
    """The counters that are not 0."""
    with counting() as counts:
        launch()
    return {name: n for name, n in counts.items() if n}


def aligned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor at the beginning of a sector."""
    x = torch.zeros(shape, dtype=dtype)
    assert x.data_ptr() % 32 == 0
    return x


@in_the_interpreter
@pytest.mark.parametrize(
    ("dtype", "stride", "skip", "bytes_each", "sectors"),
    [
        (torch.float32, 1, 0, 4, 13),  # 100 numbers side by side: 400 bytes
        (torch.float16, 1, 0, 2, 4 + 3),  # 128 bytes of the first program, 72 of the second
        (torch.float32, 2, 0, 4, 25),  # every other number
        (torch.float32, 8, 0, 4, 100),  # a sector for each
        (torch.float32, 1, 1, 4, 9 + 5),  # off by one: each program's numbers begin within a sector
    ],
)
def test_loads_and_stores_are_counted_without_what_their_masks_turn_off(
    dtype: torch.dtype, stride: int, skip: int, bytes_each: int, sectors: int
) -> None:
    x, y = aligned(801, dtype=dtype)[skip:], aligned(100, dtype=dtype)
    counts = counts_of(lambda: _copy_kernel[(2,)](y, x, 100, STRIDE=stride, BLOCK=64))
    assert counts == {
        "launches": 1,
        "programs": 2,
        "loads": 2,
        "stores": 2,
        "load bytes": 100 * bytes_each,
        "store bytes": 100 * bytes_each,
        "load sectors": sectors,
        "store sectors": 13 if bytes_each == 4 else 7,
        "masked elements": 2 * 28,
    }


@in_the_interpreter
def test_each_turn_of_a_loop_is_counted() -> None:
    x, y = aligned(96), aligned(1)
    counts = counts_of(lambda: _loop_kernel[(1,)](y, x, 96, BLOCK=32))
    assert counts == {
        "launches": 1,
        "programs": 1,
        "loads": 3,
        "stores": 1,
        "load bytes": 384,
        "store bytes": 4,
        "load sectors": 12,
        "store sectors": 1,
    }


@in_the_interpreter
def test_atomics_are_counted_apart_from_stores() -> None:
    counts = counts_of(lambda: _atomic_kernel[(3,)](aligned(10), aligned(10), 10, BLOCK=16))
    assert counts["atomics"] == 3 * (10 + 1)
    assert "stores" not in counts


@in_the_interpreter
def test_dots_are_counted_with_their_flops() -> None:
    x, y = aligned(16, 32, dtype=torch.float16), aligned(16, 16)
    counts = counts_of(lambda: _dot_kernel[(2,)](y, x, M=16, N=32))
    assert (counts["dots"], counts["dot FLOPs"]) == (2, 2 * 2 * 16 * 16 * 32)


@in_the_interpreter
@pytest.mark.parametrize(
    "kernel",
    [
        _descriptor_kernel,
        pytest.param(
            _block_pointer_kernel,
            marks=pytest.mark.skipif(
                not hasattr(InterpreterBuilder, "create_make_block_ptr"), reason="Triton 3.9 took block pointers out"
            ),
        ),
    ],
    ids=["descriptor", "block pointer"],
)
def test_blocks_are_counted_as_far_as_they_lie_within_the_tensor(kernel: triton.JITFunction) -> None:
    x, y = aligned(5, 16), aligned(5, 16)
    counts = counts_of(lambda: kernel[(2,)](y, x, 5, N=16, BLOCK=4))
    assert counts == {
        "launches": 1,
        "programs": 2,
        "loads": 2,
        "stores": 2,
        "load bytes": 5 * 64,
        "store bytes": 5 * 64,
        "load sectors": 10,
        "store sectors": 10,
        "masked elements": 2 * 48,
    }


@in_the_interpreter
def test_the_interpreter_is_left_as_it_was() -> None:
    class Stop(Exception):
        pass

    def stopped() -> None:
        with counting():
            assert "create_dot" in vars(interpreter_builder)
            raise Stop

    counts_of(lambda: _copy_kernel[(1,)](aligned(8), aligned(8), 8, STRIDE=1, BLOCK=8))
    before = set(vars(interpreter_builder))
    with pytest.raises(Stop):
        stopped()
    assert set(vars(interpreter_builder)) == before
    with counting() as counts:
        pass
    _copy_kernel[(1,)](aligned(8), aligned(8), 8, STRIDE=1, BLOCK=8)
    assert not any(counts.values())


# Ladders


@pytest.fixture(scope="module")
def problems() -> Callable[[Rung], Problem]:
    """The problem at which a rung is counted; the truth and the peer of a task are found once."""
    made: dict[str, Problem] = {}

    def problem(rung: Rung) -> Problem:
        name = rung.task.name
        if name not in made:
            made[name] = Problem(rung.task, triton_rung.counted_sizes(rung.task), triton_rung.counting_device())
        return made[name]

    return problem


def broken(rungs: list[Rung], counts: dict[str, Counts], counters: tuple[str, ...]) -> list[str]:
    """The promises over some counters that are not kept."""
    promises = [(rung, promise) for rung in rungs for promise in rung.header.promises if promise.counter in counters]
    assert promises
    return [f"{rung.stem}: {promise}" for rung, promise in promises if not promise.kept(counts, rung.stem)]


def documented(name: str, counts: dict[str, Counts], counters: tuple[str, ...]) -> list[str]:
    """The cells of the ladder's table in the README that say something else than ``counts``."""
    title = f"## {name.replace('_', ' ').capitalize()}, in Triton\n"
    section = README.read_text().split(title)[1].split("\n## ")[0]
    header, _, *rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    assert [row[0] for row in rows] == list(counts)
    shown = [
        (row[0], counter, cell)
        for row in rows
        for counter, cell in zip(header, row, strict=True)
        if counter in counters
    ]
    assert shown
    return [f"{stem}: {counter} is {cell}" for stem, counter, cell in shown if cell != f"{counts[stem][counter]:,}"]


@pytest.mark.parametrize("name", LADDERS)
def test_every_rung_is_right_and_moves_what_it_promises(name: str, problems: Callable[[Rung], Problem]) -> None:
    counts = {}
    for rung in RUNGS[name]:
        problem = problems(rung)
        done = triton_rung.run(rung, problem, count=True)
        assert [str(wrong) for wrong in problem.judge(done.outputs)] == [], rung.stem
        counts[rung.stem] = done.counts
    assert broken(RUNGS[name], counts, tuple(INTERPRETED)) == []
    assert documented(name, counts, tuple(INTERPRETED)) == []


@pytest.mark.parametrize("name", LADDERS)
def test_every_rung_says_what_it_moves_and_promises(name: str) -> None:
    for rung in RUNGS[name]:
        assert set(rung.header.parts) == set(PARTS), rung.stem
        assert rung.header.promises, rung.stem
        assert {promise.counter for promise in rung.header.promises} <= set(triton_rung.COUNTERS), rung.stem
    assert {rung.task.name for rung in RUNGS[name]} == {task.name for task in TASKS.values() if task.ladder == name}


@pytest.mark.full
@pytest.mark.parametrize("name", LADDERS)
def test_every_rung_is_right_at_odd_sizes(name: str) -> None:
    for rung in RUNGS[name]:
        for sizes in rung.task.others:
            problem = Problem(rung.task, sizes, triton_rung.counting_device())
            wrong = problem.judge(triton_rung.run(rung, problem).outputs)
            assert [str(one) for one in wrong] == [], f"{rung.stem} at {problem}"


@pytest.mark.full
@pytest.mark.parametrize("name", LADDERS)
def test_every_rung_compiles_to_what_it_promises(name: str) -> None:
    triton_rung.build(RUNGS[name])
    counts = {rung.stem: triton_rung.resources(rung) for rung in RUNGS[name]}
    assert broken(RUNGS[name], counts, tuple(triton_rung.COMPILED)) == []
    if triton.__version__.startswith("3.9.") and not torch.cuda.is_available():  # by which the README's was written
        assert documented(name, counts, tuple(triton_rung.COMPILED)) == []


# A reader's own file

OWN = """
import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(y_ptr, x_ptr, N, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * N + cols, mask=cols < N, other=float("-inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + row * N + cols, e / tl.sum(e, axis=0), mask=cols < N)


def softmax(x):
    y = torch.empty_like(x)
    _kernel[(x.shape[0],)](y, x, x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return y
"""


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Rung]:
    """A reader's softmax, with a piece of it replaced."""

    def write(old: str = "", new: str = "") -> Rung:
        assert old in OWN
        path = tmp_path / "mine.py"
        path.write_text(OWN.replace(old, new) if old else OWN)
        return read_rung(path)

    return write


@pytest.fixture
def small() -> Problem:
    return Problem(TASKS["softmax"], {"M": 3, "N": 20}, triton_rung.counting_device())


def test_a_file_of_the_readers_own_is_a_rung(own: Callable[..., Rung], small: Problem) -> None:
    assert small.judge(triton_rung.run(own(), small).outputs) == []


def test_what_is_never_written_is_wrong_even_where_memory_holds_the_right_result(
    own: Callable[..., Rung], small: Problem
) -> None:
    triton_rung.run(own(), small)
    (wrong,) = small.judge(triton_rung.run(own("mask=cols < N)", "mask=cols < N - 1)"), small).outputs)
    assert (wrong.output, wrong.element, wrong.count) == ("y", (0, 19), 3)
    assert math.isnan(wrong.got)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("import torch\n", "import torch\nimport no_such_thing\n", r"^mine.py, line 3: ModuleNotFoundError: No module"),
        ("    return y", "    return y, y", r"^mine.py: ValueError: softmax has to return y, not 2 tensors$"),
        ("    return y", "    raise SystemExit(0)", r"^mine.py, line \d+: SystemExit: 0$"),
        ("    return y", "    return None", r"^mine.py: TypeError: softmax has to return y, and returned NoneType$"),
        ("BLOCK=triton.next", "BLOCKS=triton.next", r"^mine.py, line 17: TypeError: .*BLOCK"),
    ],
)
def test_what_a_file_raises_is_told_with_its_line(
    own: Callable[..., Rung], small: Problem, old: str, new: str, message: str
) -> None:
    with pytest.raises(RungError, match=message):
        triton_rung.run(own(old, new), small)


@in_the_interpreter
def test_what_goes_wrong_within_a_kernel_is_told_with_its_line(own: Callable[..., Rung], small: Problem) -> None:
    with pytest.raises(RungError, match=r"^mine.py, line 10: "):
        triton_rung.run(own("cols < N, other", "cols < missing, other"), small)


@in_the_interpreter
@pytest.mark.parametrize(
    ("old", "new", "line", "count"),
    [
        ("cols < N, other", "cols <= N, other", 10, 1),  # beyond the last row
        ("mask=cols < N)", "mask=cols < 2 * N)", 12, 12),  # a block of 32 for a row of 20
        ("y = torch.empty_like(x)", "y = torch.empty_like(x)[:2]", 12, 20),
    ],
)
def test_what_lies_beyond_the_tensors_is_not_touched(
    own: Callable[..., Rung], small: Problem, old: str, new: str, line: int, count: int
) -> None:
    with pytest.raises(RungError, match=rf"^mine.py, line {line}: IndexError: {count} elements lie beyond the tensors"):
        triton_rung.run(own(old, new), small)


def test_compiling_tells_what_it_came_to_or_why_not(own: Callable[..., Rung], tmp_path: Path) -> None:
    """In one process for both, since starting it takes seconds."""
    good = own()
    bad = tmp_path / "bad.py"
    bad.write_text(OWN.replace("tl.exp(", "tl.no_such_function("))
    triton_rung.build([good, read_rung(bad)])
    counts = triton_rung.resources(good)
    assert (counts["load width"], counts["store width"], counts["spilled bytes"]) == (16, 16, 0)
    assert counts["loads compiled"] == 2
    assert counts["tensor-core instructions"] == counts["async copies"] == 0
    with pytest.raises(RungError, match=re.compile(r"bad\.py, line \d+: .*no_such_function", re.DOTALL)):
        triton_rung.resources(read_rung(bad))


@pytest.mark.full
@in_the_interpreter
def test_another_process_counts_the_same(own: Callable[..., Rung], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU, where this one does not interpret; of a file that changed it is asked anew."""
    seen = []
    for new in ("tl.max(x, axis=0)", "tl.max(x, axis=0) * tl.load(x_ptr)"):
        rung = own("tl.max(x, axis=0)", new)
        seen.append(triton_rung.counted(rung))
        with monkeypatch.context() as on_a_gpu:
            on_a_gpu.setattr(triton_rung, "interpreting", lambda: False)
            assert triton_rung._told("counted", rung) == seen[-1]
    assert seen[0] != seen[1]
