"""What a ladder of CUDA rungs is held to: test_lessons_layer_norm.py and test_lessons_attention.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cuda_waits import waits_in

from fastgpt import emulator
from lessons.kernels import cuda_rung, show
from lessons.kernels.climb import climb, problem
from lessons.kernels.rung import FOLDER, Counts, Rung, RungError, ladder

SCHEDULES = (("skewed", "lazy"), ("in_order", "eager"), ("random", "lazy"))

needs_the_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))


def own_rungs(name: str) -> list[Rung]:
    """Those with kernels of their own, and not the package's, which take long to compile."""
    return [rung for rung in _rungs(name) if "package" not in rung.stem]


def package_rungs(name: str) -> list[Rung]:
    return [rung for rung in _rungs(name) if "package" in rung.stem]


def _rungs(name: str) -> list[Rung]:
    return [rung for rung in ladder(name) if rung.language == "cuda"]


def climbed(rungs: list[Rung]) -> dict[str, Counts]:
    """Hold rungs to the error rule, to their promises and to the README's table.

    Returns:
        What was counted, by the file's stem.
    """
    assert rungs
    outcomes = climb(rungs)
    assert {
        outcome.rung.stem: show.details(outcome) for outcome in outcomes if not outcome.good or outcome.uncounted
    } == {}
    counts = {outcome.rung.stem: outcome.counts for outcome in outcomes}
    title = f"## {rungs[0].path.parent.name.replace('_', ' ').capitalize()}, in CUDA\n"
    text = (FOLDER / "README.md").read_text().partition(title)[2]
    table = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in text.partition("\n## ")[0].splitlines()
        if line.startswith("|")
    ]
    (_, _, *counters), _, *rows = table
    shown = {stem: figures for stem, _, *figures in rows if stem in counts}
    assert shown == {stem: [f"{of_one[name]:,}" for name in counters] for stem, of_one in counts.items()}
    return counts


def fault(rung: Rung, order: str, copies: str) -> str | None:
    """What is wrong with a rung in that schedule, at any of its task's sizes: an error, or a wrong element."""
    for sizes in (rung.task.counted, *rung.task.others):
        of_one = problem(rung.task.name, tuple(sizes.items()), torch.device("cpu"))
        try:
            wrong = of_one.judge(cuda_rung.run(rung, of_one, order=order, copies=copies).outputs)
        except RungError as error:
            return str(error).splitlines()[0]
        if wrong:
            return f"{wrong[0]} at {of_one}"
    return None


def check_waits(name: str) -> None:
    """Every wait in the files of a ladder is reached, and missed where it is switched off."""
    folder = FOLDER / name
    wanted = set(waits_in(path for path in sorted(folder.iterdir()) if path.suffix in (".cu", ".cuh")))
    assert wanted
    module = emulator.runtime()
    reached = {}
    for rung in own_rungs(name):
        module.reset_counters()
        assert fault(rung, "in_order", "eager") is None
        read = {rung.path.name, *_included(rung.path)}
        reached |= {place: rung for place in wanted if place[0] in read and place not in reached}
    assert {(wait.file, wait.line) for wait in module.waits()} >= wanted
    unnoticed = []
    for (file, line), rung in reached.items():
        module.switch_off(file, line)
        try:
            found = [fault(rung, *schedule) for schedule in SCHEDULES]
        finally:
            module.switch_all_on()
        print(f"{file}:{line}: {found}")
        if not any(found):
            unnoticed.append((file, line))
    assert reached.keys() == wanted
    assert unnoticed == []


def _included(path: Path) -> list[str]:
    """The headers beside a rung that it includes by name."""
    return [header.name for header in path.parent.glob("*.cuh") if f'"{header.name}"' in path.read_text()]
