"""A run of whole models: one case after another, between two measurements of the ceilings, each written as it comes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from fastgpt import dispatch
from fastgpt.benchmarks.harness import (
    RESERVE_S,
    Ceilings,
    clean_up,
    drifted,
    first_line,
    measure_ceilings,
    progress_bar,
    timer_for,
)
from fastgpt.benchmarks.machine import OtherWork
from fastgpt.benchmarks.models import NANOGPT
from fastgpt.benchmarks.result import Result, describe, result_path
from fastgpt.config import UserError

MEMORY_ENDS = "memory ends here"  # how such a reason begins; it is no fault
_NO_CHECKOUT = "no checkout of it was named (--vs nanogpt=PATH)"


def fill_in(options: Any, **defaults: Any) -> None:
    """Give the fields of a frozen dataclass that are empty or zero their defaults."""
    for name, default in defaults.items():
        object.__setattr__(options, name, getattr(options, name) or default)


def settings_of(options: Any) -> dict[str, Any]:
    """The "settings" of a file: the options, without what the file says elsewhere or nobody else's disk has."""
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {**fields, "device": options.device.type, "nanogpt": options.nanogpt is not None}


def require_known(what: str, values: Sequence[str], known: Iterable[str]) -> None:
    """
    Raises:
        UserError: one of the values is not known.
    """
    for value in values:
        if value not in known:
            raise UserError(f"there is no {what} {value!r} to measure; there are {', '.join(known)}")


def require_at_least(what: str, value: int, least: int) -> None:
    """
    Raises:
        UserError: the value is less.
    """
    if value < least:
        raise UserError(f"--{what} must be at least {least}, got {value}")


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


def start(kind: str, options: Any, *, out: Path | None, resume: Path | None, commit: str | None) -> Result:
    """The file of a run.

    Args:
        kind: of the file.
        options: what was asked for; has ``device``, ``nanogpt`` and ``settings()``.
        out: a new file; None gives it a name in benchmarks/results.
        resume: the file to go on with instead.
        commit: where git cannot tell.
    Raises:
        UserError: ``resume`` cannot be gone on with, or both files are named.
    """
    if out and resume:
        raise UserError("--resume goes on in its own file: leave out --out")
    about = describe(kind, options.device, options.settings(), commit=commit, nanogpt=options.nanogpt)
    return Result(resume or out or result_path(about), about, resume=resume is not None)


def run(
    result: Result,
    cases: Sequence[Case],
    measure: Callable[[Any, Ceilings, OtherWork], Outcome],
    device: torch.device,
    absent: dict[str, str],
    *,
    limit_s: float | None = None,
    summarize: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
    show: Callable[[Any, Outcome], None],
    clock: Callable[[], float] = time.monotonic,
) -> Result:
    """Measure the cases that the file has no rows of, and write each one's rows into it.

    Args:
        result: the file, new or resumed.
        cases: in this order.
        measure: called with a case, the ceilings, and what counts other programs' work, to enter while times are taken.
        absent: competitors that are not here at all, and why.
        limit_s: seconds after which no further case begins.
        summarize: makes the file's "summary" from its rows; who was left out, and why, is added to it.
        show: prints a case's outcome.
    Returns:
        ``result``.
    """
    deadline = None if limit_s is None else clock() + limit_s - RESERVE_S
    if result.data["versions"]["nanogpt"] is None:
        absent = {**absent, NANOGPT: _NO_CHECKOUT}
    timer = timer_for(device)
    before = result.data["ceilings"]["before"] or measure_ceilings(device, timer)
    result.update(ceilings={"before": before, "after": None}, absent=absent)
    others, left_out, missed = OtherWork(), {}, []
    with progress_bar() as bar, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        task = bar.add_task(result.data["kind"], total=len(cases))
        for case in cases:
            bar.update(task, description=case.name)
            found = [row for row in result.rows if all(row[name] == value for name, value in case.key().items())]
            if found:
                left_out[case.name] = found[0]["left_out"]
            elif deadline is not None and clock() > deadline:
                missed.append(case.name)
                continue
            else:
                outcome = measure(case, before, others)
                left_out[case.name] = outcome.left_out
                show(case, outcome)
                result.update(rows=[{**row, "left_out": outcome.left_out} for row in outcome.rows])
                clean_up(device)
            result.update(problems=problems_of(case.name, left_out[case.name]))
            bar.advance(task)
    summary = {"left_out": {name: reasons for name, reasons in left_out.items() if reasons}}
    if summarize is not None:
        summary |= summarize(result.rows)
    after = measure_ceilings(device, timer)
    problems = drifted(before, after, device)
    result.update(
        problems=[*problems, *(f"the time did not do for {name}" for name in missed)],
        ceilings={"before": before, "after": after},
        complete=not missed,
        valid=not missed and not problems,
        summary=summary,
        others_cores=others.cores,
    )
    print(others)
    return result


def problems_of(case: str, left_out: dict[str, str]) -> list[str]:
    """A sentence for each of our backends that was to be timed, and could not be, memory aside."""
    return [
        f"{case}: {name}: {reason}"
        for name, reason in left_out.items()
        if name.partition(",")[0] in dispatch.BACKENDS and not reason.startswith(MEMORY_ENDS)
    ]


def show_left_out(case: Case, outcome: Outcome) -> None:
    for name, reason in outcome.left_out.items():
        print(f"  {case.name}: {name} left out: {reason}", flush=True)


def reason_of(error: Exception) -> str:
    """Why a competitor that raised ``error`` is left out; begins with ``MEMORY_ENDS`` where that is why."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):  # of a GPU, of a CPU
        return f"{MEMORY_ENDS}: {first_line(error)}"
    return first_line(error)
