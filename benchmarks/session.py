"""A run: one case after another, between two measurements of the ceilings, each written as it comes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from fastgpt import dispatch
from fastgpt.benchmarks.harness import (
    RESERVE_S,
    Ceilings,
    Timer,
    clean_up,
    drifted,
    first_line,
    measure_ceilings,
    progress_bar,
)
from fastgpt.benchmarks.machine import OtherWork
from fastgpt.benchmarks.result import Result, describe, result_path
from fastgpt.config import UserError

MEMORY_ENDS = "memory ends here"  # how such a reason begins; it is no fault


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where a run's file goes, and how long it may take.

    Args:
        out: a new file; None gives it a name in ``folder``, and None there means benchmarks/results.
        resume: the file to go on with instead.
        limit_s: seconds after which no further case begins; None sets no limit.
        commit: where git cannot tell.
    Raises:
        UserError: both files are named.
    """

    out: Path | None = None
    folder: Path | None = None
    resume: Path | None = None
    limit_s: float | None = None
    commit: str | None = None

    def __post_init__(self) -> None:
        if self.out and self.resume:
            raise UserError("--resume goes on in its own file: leave out --out")


class Options(Protocol):
    """What was asked for."""

    @property
    def device(self) -> torch.device: ...

    def settings(self) -> dict[str, Any]:
        """What a file says of it, its "dtypes" among it, and what must be the same where one is resumed."""


class Case(Protocol):
    """What is measured together: competitors who take turns."""

    @property
    def name(self) -> str: ...

    def key(self) -> dict[str, Any]:
        """The fields that all of its rows have in common, and no other case's."""


class Outcome(NamedTuple):
    """A case's rows, and by name why a competitor has none."""

    rows: list[dict[str, Any]]
    left_out: dict[str, str]


def run(
    kind: str,
    options: Options,
    plan: Plan,
    cases: Sequence[Case],
    measure: Callable[[Any, Ceilings, OtherWork], Outcome],
    timer: Timer,
    absent: dict[str, str],
    *,
    show: Callable[[Any, Outcome], None],
    excused: Callable[[Any, str, str], bool] = lambda case, name, reason: reason.startswith(MEMORY_ENDS),
    summarize: Callable[[list[dict[str, Any]]], dict[str, Any]] = lambda rows: {},
    nanogpt: Path | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Result:
    """Measure the cases that the file has no rows of, and write each one's rows into it.

    The file is valid where the ceilings stood still, and complete where each case came to its end: what is in a file
    that is valid may be relied on, whether or not there was time for all.

    Args:
        kind: of the file.
        cases: in this order.
        measure: called with a case, the ceilings, and what counts other programs' work, to enter while times are taken.
        timer: of the ceilings.
        absent: competitors that are not here at all, and why.
        show: prints a case's outcome.
        excused: called with a case and with why one of our backends has no row: False where that is a problem.
        summarize: makes the file's "summary" from its rows; who was left out, and why, is added to it.
        nanogpt: a checkout that takes part.
    Raises:
        UserError: the file to be resumed is one of something else.
    """
    deadline = None if plan.limit_s is None else clock() + plan.limit_s - RESERVE_S
    device = options.device
    about = describe(kind, device, options.settings(), commit=plan.commit, nanogpt=nanogpt)
    path = plan.resume or plan.out or result_path(about, plan.folder)
    result = Result(path, about, resume=plan.resume is not None)
    result.update(absent=absent)
    print(f"Each case goes into {path}; --resume goes on with it.")
    for name, reason in absent.items():
        print(f"{name} takes no part: {reason}")
    before = result.data["ceilings"]["before"] or measure_ceilings(device, timer, options.settings()["dtypes"])
    result.update(ceilings={"before": before, "after": None})
    others, left_out, failed, missed = OtherWork(), {}, False, []
    with progress_bar() as bar, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        task = bar.add_task(kind, total=len(cases))
        for case in cases:
            bar.update(task, description=case.name)
            found = [row for row in result.rows if all(row[name] == value for name, value in case.key().items())]
            if found:
                left_out[case.name] = found[0]["left_out"]
            elif deadline is not None and clock() > deadline:
                missed.append(case.name)
                continue
            else:
                try:
                    outcome = measure(case, before, others)
                except Exception as error:  # the other cases' figures are wanted all the same
                    outcome, failed = Outcome([], {}), True
                    result.update(problems=[f"{case.name}: {first_line(error)}"])
                left_out[case.name] = outcome.left_out
                result.update(rows=[{**row, "left_out": outcome.left_out} for row in outcome.rows])
                show(case, outcome)
            result.update(problems=problems_of(case, left_out[case.name], excused))
            bar.advance(task)
            try:
                clean_up(device)
            except RuntimeError as error:  # a process cannot recover from it
                result.update(problems=[f"{case.name} left the GPU in error, and the run ends: {first_line(error)}"])
                return result
    after = measure_ceilings(device, timer, options.settings()["dtypes"])
    drift = drifted(before, after, device)
    result.update(
        problems=[*drift, *([f"the time did not do for {'; '.join(missed)}"] if missed else [])],
        ceilings={"before": before, "after": after},
        complete=not missed and not failed,
        valid=not drift,
        summary={
            "left_out": {name: reasons for name, reasons in left_out.items() if reasons},
            **summarize(result.rows),
        },
        others_cores=others.cores,
    )
    print(others)
    return result


def problems_of(case: Case, left_out: dict[str, str], excused: Callable[[Any, str, str], bool]) -> list[str]:
    """A sentence for each of our backends that was to be timed in the case, and could not be."""
    return [
        f"{case.name}: {name}: {reason}"
        for name, reason in left_out.items()
        if name.partition(",")[0] in dispatch.BACKENDS and not excused(case, name, reason)
    ]


def show_left_out(case: Case, outcome: Outcome) -> None:
    for name, reason in outcome.left_out.items():
        print(f"  {case.name}: {name} left out: {reason}", flush=True)


def say_how_it_ended(file: Result) -> int:
    """Print the problems and where the file is; the exit code: 0 where the run is valid and has no problems."""
    for problem in file.data["problems"]:
        print(problem)
    print(f"{'valid' if file.data['valid'] else 'not valid'}: {file.path}")
    return 0 if file.data["valid"] and not file.data["problems"] else 1


def reason_of(error: Exception) -> str:
    """Why a competitor that raised ``error`` is left out; begins with ``MEMORY_ENDS`` where that is why."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # of a GPU, of a CPU
        return f"{MEMORY_ENDS}: {first_line(error)}"
    return first_line(error)
