"""Trying rungs: built, held to the error rule, counted, and on a GPU timed."""

from __future__ import annotations

import functools
import importlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from fastgpt.benchmarks.harness import Contestant, interleave, measure_ceilings, timer_for
from lessons.kernels.rung import Counts, Execution, Promise, Rung, RungError
from lessons.kernels.tasks import TASKS, Problem, Sizes, Task, Wrong

_ACCESSED = ("bytes wanted", "load bytes", "store bytes")  # the first is CUDA's, the others Triton's


class Language(Protocol):
    """What ``cuda_rung`` and ``triton_rung`` have in common."""

    COUNTERS: tuple[str, ...]
    CLIMBED: tuple[str, ...]  # those that the figure shows

    def counting_device(self) -> torch.device:
        """Where rungs are counted and held to small problems."""

    def counted_sizes(self, task: Task) -> Sizes:
        """Of the problem at which counters are read."""

    def build(self, rungs: Sequence[Rung]) -> None:
        """Compile several rungs at once, where that is faster; what is wrong with one is told later."""

    def run(self, rung: Rung, problem: Problem, *, count: bool = False) -> Execution:
        """
        Raises:
            RungError: it cannot be built, or is found at fault.
        """

    def resources(self, rung: Rung) -> Counts:
        """What the compiler made of it, by the names of counters.

        Raises:
            RungError: there is no compiler, or it refuses.
        """

    def Call(self, rung: Rung, problem: Problem) -> Callable[[], Any]:
        """The rung's function with its arguments, to be timed."""


def language(name: str) -> Language:
    """Of "cuda" or "triton"; loaded when it is wanted, since Triton may not be there."""
    return cast(Language, importlib.import_module(f"lessons.kernels.{name}_rung"))


@dataclass
class Outcome:
    """What is known of a rung after it was tried.

    Args:
        error: why it could not be built or run, as the compiler or the emulator says it.
        wrong: outputs that are not near enough to the truth, and of which problem.
        counts: by counter, of ``Language.counted_sizes``; what the compiler made of it among them.
        uncounted: what there is to say where its kernels did work that nobody counted.
        missing: why there is nothing of the compiler's.
        promises: and whether each was kept, where both rungs were counted.
        times: on a GPU: "ms", "GB/s", "TFLOP/s" and "of roofline".
    """

    rung: Rung
    error: str | None = None
    wrong: list[tuple[Problem, Wrong]] = field(default_factory=list)
    counts: dict[str, float] = field(default_factory=dict)
    uncounted: str | None = None
    missing: str | None = None
    promises: dict[Promise, bool] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        return self.error is None and not self.wrong

    @property
    def good(self) -> bool:
        """Right, and as its header promises."""
        return self.right and all(self.promises.values())


def climb(rungs: Sequence[Rung], say: Callable[[Outcome], Any] = lambda outcome: None) -> list[Outcome]:
    """Try rungs in order; of a GPU all are timed in turns, at the end.

    Args:
        rungs: of one language.
        say: told of each as soon as it was run and counted.
    """
    module = language(rungs[0].language)
    others = _named_by(rungs)
    module.build([*rungs, *others])
    counts = {rung.path: _tried(module, rung).counts for rung in others}
    outcomes = []
    for rung in rungs:
        outcome = _tried(module, rung)
        counts[rung.path] = outcome.counts
        if outcome.error is None and outcome.counts:
            of_ladder = {stem: counts[other.path] for stem, other in rung.neighbours().items() if other.path in counts}
            failed = {stem for stem, of_one in of_ladder.items() if not of_one}
            promises = [promise for promise in rung.header.promises if promise.rung not in failed]
            outcome.promises = {promise: promise.kept(of_ladder, rung.stem) for promise in promises}
        outcomes.append(outcome)
        say(outcome)
    if torch.cuda.is_available():
        for task in {rung.task.name: rung.task for rung in rungs}.values():
            right = [outcome for outcome in outcomes if outcome.rung.task.name == task.name and outcome.right]
            if right:
                _time(module, right, problem(task.name, tuple(task.timed.items()), torch.device("cuda")))
    return outcomes


def _named_by(rungs: Sequence[Rung]) -> list[Rung]:
    """The rungs that promises name, beside those that are given."""
    named: dict[Path, Rung] = {}
    for rung in rungs:
        stems = {promise.rung for promise in rung.header.promises}
        named |= {other.path: other for stem, other in rung.neighbours().items() if stem in stems}
    given = {rung.path for rung in rungs}
    return [other for path, other in named.items() if path not in given]


@functools.cache
def problem(task: str, sizes: tuple[tuple[str, int], ...], device: torch.device) -> Problem:
    """The problem of a task, made once for all rungs."""
    return Problem(TASKS[task], dict(sizes), device)


def _tried(module: Language, rung: Rung) -> Outcome:
    outcome = Outcome(rung)
    task = rung.task
    try:
        device = module.counting_device()
        for sizes in (module.counted_sizes(task), *task.others):
            _hold(module, outcome, sizes, device, count=sizes == module.counted_sizes(task))
        if torch.cuda.is_available():
            _hold(module, outcome, task.timed, torch.device("cuda"))
    except RungError as error:
        outcome.error = str(error)
        return outcome
    outcome.uncounted = uncounted(outcome.counts, task.work(module.counted_sizes(task)).bytes)
    try:
        outcome.counts |= module.resources(rung)
    except RungError as error:
        outcome.missing = str(error)
    return outcome


def uncounted(counts: Counts, least: float) -> str | None:
    """What to say of kernels that accessed fewer bytes than the task takes: something was done where nobody counts."""
    accessed = sum(counts.get(name, 0) for name in _ACCESSED)
    if accessed >= least:
        return None
    return (
        f"the kernels were seen to load and store {accessed:.0f} bytes, and this takes at least {least:.0f}: the work "
        "is to be done by the file's own kernels, in CUDA with ldg and stg, since a plain p[i] is not counted"
    )


def _hold(module: Language, outcome: Outcome, sizes: Sizes, device: torch.device, count: bool = False) -> None:
    of_all = problem(outcome.rung.task.name, tuple(sizes.items()), device)
    done = module.run(outcome.rung, of_all, count=count)
    outcome.counts |= done.counts
    try:
        outcome.wrong += [(of_all, wrong) for wrong in of_all.judge(done.outputs)]
    except ValueError as error:
        raise RungError(str(error)) from error


def _time(module: Language, outcomes: Sequence[Outcome], of_all: Problem) -> None:
    """Fill in ``Outcome.times`` of rungs of one task, which take turns on the problem's device."""
    task, device = of_all.task, of_all.device
    timer, work = timer_for(device), task.work(of_all.sizes)
    ceilings = measure_ceilings(device, timer, [task.dtype])
    calls = {str(outcome.rung.path): module.Call(outcome.rung, of_all) for outcome in outcomes}
    contestants = {path: Contestant(lambda _, call=call: call()) for path, call in calls.items()}
    samples = interleave(contestants, timer, rounds=30, seconds=20.0)
    for outcome in outcomes:
        ms = statistics.median(sample.ms for sample in samples[str(outcome.rung.path)])
        outcome.times = {"ms": ms, "GB/s": work.bytes / ms / 1e6}
        if work.flops:
            outcome.times["TFLOP/s"] = work.flops / ms / 1e9
        outcome.times["of roofline"] = work.floor_ms(ceilings, task.dtype) / ms
