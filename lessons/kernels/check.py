"""Check an exercise: ``python -m lessons.kernels check FILE``.

An exercise is a rung whose header states goals in place of promises, ``Goal: sectors per load request <= 4``, and
gives a hint. It is done when it is right at every size, also on numbers that are harder than a rung's, and reaches
every goal.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastgpt import emulator
from fastgpt.config import UserError
from lessons.kernels.climb import language, uncounted
from lessons.kernels.rung import Counts, Promise, Rung, RungError, read_rung
from lessons.kernels.tasks import Problem, Sizes, Task, Tensors

# By a task, numbers on which formulas fail that are right on paper, and what they are.
HARDER: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "softmax": ("x made 200 times as large", lambda inputs: {**inputs, "x": 200 * inputs["x"]}),
    "layer_norm": ("1000 added to x", lambda inputs: {**inputs, "x": inputs["x"] + 1000}),
}

# What to look for, by the counter of a goal that was missed.
_ADVICE = {
    "sectors per load request": "32 neighbouring floats lie in 4 sectors of 32 bytes; look at which addresses the "
    "lanes of a warp have in one and the same load",
    "sectors per store request": "32 neighbouring floats lie in 4 sectors of 32 bytes; look at which addresses the "
    "lanes of a warp have in one and the same store",
    "bank conflicts": "lanes of a warp that address different words of one bank wait for each other; the bank of a "
    "word is its address, counted in words of 4 bytes, modulo 32",
    "load requests": "more loads than the work takes: something is read again, or by too few lanes at once",
    "load bytes": "more is read than the work takes: something is read again, or is not wanted",
    "dots": "more products of tiles than the work takes: some are of keys that no query of the tile may see",
}
_RACE = re.compile(
    r"(?P<file>[^\s:]+):(?P<line>\d+): race: \w+ (?P<does>reads|writes) .* that thread \d+ (?P<did>read|wrote) at "
    r"(?P<other_file>[^\s:]+):(?P<other_line>\d+),"
)


def main(paths: Sequence[Path]) -> int:
    """Check exercises and print what is found.

    Returns:
        0; 1 where one is not done.
    Raises:
        UserError: as ``check``, or there is none.
    """
    if not paths:
        raise UserError("check takes the files of exercises")
    done = True
    for path in paths:
        faults = check(path)
        done &= not faults
        print(f"{path}: {'not yet' if faults else 'pass'}")
        for fault in faults:
            print(textwrap.indent(fault, "  "))
        hint = read_rung(path).header.parts.get("Hint")
        if faults and hint:
            print(f"  Hint: {hint}")
    return 0 if done else 1


def check(path: Path) -> list[str]:
    """What an exercise still lacks, in words; nothing where it is done. Of wrong numbers, those of the first size.

    Raises:
        UserError: the file is none of a task's, states no goal, or cannot be counted here.
    """
    rung = read_rung(path)
    goals = rung.header.promises
    if not goals:
        raise UserError(f"{path} states no goal ('Goal: bank conflicts == 0' in its header): it is no exercise")
    reason = emulator.missing() if rung.language == "cuda" else None
    if reason is not None:  # a GPU does not count
        raise UserError(reason)
    module = language(rung.language)
    counts: Counts = {}
    faults: list[str] = []
    try:
        for inputs, problem in _problems(rung.task, module.counted_sizes(rung.task), module.counting_device()):
            done = module.run(rung, problem, count=not counts)
            counts = counts or done.counts
            faults = [f"wrong at {problem}{inputs}: {wrong}{_of(wrong.got)}" for wrong in problem.judge(done.outputs)]
            if faults:
                break
    except (RungError, ValueError) as error:
        return [_explained(str(error), rung)]
    unseen = uncounted(counts, rung.task.work(module.counted_sizes(rung.task)).bytes)
    faults += [] if unseen is None else [unseen]
    return faults + [_missed(goal, counts) for goal in goals if not goal.kept({rung.stem: counts}, rung.stem)]


def _problems(task: Task, counted: Sizes, device: torch.device) -> Iterator[tuple[str, Problem]]:
    """The problems that an exercise has to solve, and what is particular about their numbers."""
    for sizes in (counted, *task.others):
        yield "", Problem(task, sizes, device)
    if task.name in HARDER:
        words, make = HARDER[task.name]
        harder = replace(task, inputs=lambda sizes, device: make(task.inputs(sizes, device)))
        yield f", {words}", Problem(harder, task.others[0], device)


def _of(got: float) -> str:
    """What a number that is none may come from."""
    if math.isfinite(got):
        return ""
    return "; what is never written stays NaN, and a computation gives NaN or inf where a number in it has overflowed"


def _missed(goal: Promise, counts: Counts) -> str:
    advice = _ADVICE.get(goal.counter)
    return f"missed: {goal}; it is {counts[goal.counter]:g}" + (f" ({advice})" if advice else "")


def _explained(error: str, rung: Rung) -> str:
    """A race with the two lines that it is between, and any other error in its own words."""
    race = _RACE.search(error)
    if race is None:
        return error
    return "\n".join(
        (
            "two threads access the same element of shared memory, and no barrier says who comes first:",
            f"  one {race['does']}, {_quoted(race['file'], race['line'], rung)}",
            f"  another {'reads' if race['did'] == 'read' else 'writes'}, "
            f"{_quoted(race['other_file'], race['other_line'], rung)}",
            "A barrier (__syncthreads, or __syncwarp within a warp) on the way from the one to the other would order "
            "them. In a loop, or at a second call, that way may lead from the lower line to the upper one.",
            f"The emulator: {error}",
        )
    )


def _quoted(file: str, line: str, rung: Rung) -> str:
    place = f"{file}:{line}"
    if file != rung.path.name:
        return place
    return f"{place}:  {rung.path.read_text().splitlines()[int(line) - 1].strip()}"
