"""`fastgpt bench kernels`: every op on every backend beside its peers, held to the truth and then timed.

Per case and part the file says how long each took, which share of the measured ceiling that is, and the ratio of each
peer's time to ours. Who is wrong is not timed, and named.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import warnings
from typing import Any

import torch

from fastgpt import dispatch
from fastgpt.benchmarks import cases, session
from fastgpt.benchmarks.cases import Case, WrongResult
from fastgpt.benchmarks.harness import (
    FEWEST_ROUNDS,
    SAMPLE_SECONDS,
    Ceilings,
    Timer,
    first_line,
    interleave,
    print_table,
    ratios,
    timer_for,
)
from fastgpt.benchmarks.machine import OtherWork
from fastgpt.benchmarks.result import Result, spread
from fastgpt.benchmarks.session import Outcome, Plan
from fastgpt.config import UserError
from fastgpt.placement import DTYPES

DEFAULT_DTYPES = {"cpu": ("fp32", "bf16"), "cuda": ("bf16", "fp32", "fp16")}
_SAMPLE_SECONDS = {"tiny": 0.0, "small": 0.005, "full": SAMPLE_SECONDS}
DEFAULT_SECONDS = {"tiny": 0.0, "small": 2.0, "full": 4.0}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        device: on which.
        size: "full", "small" or "tiny": see ``cases.SIZES``.
        dtypes: of the cases; None takes ``DEFAULT_DTYPES`` of the device.
        only: cases whose name contains one of these texts; none takes all.
        without: competitors that stay out.
        rounds: samples of each competitor at most.
        seconds: that the rounds of a part may take, but for the fewest; None takes ``DEFAULT_SECONDS`` of the size.
    Raises:
        UserError: a setting that cannot be followed.
    """

    device: torch.device
    size: str = "full"
    dtypes: tuple[str, ...] | None = None
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    rounds: int = 30
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.rounds < FEWEST_ROUNDS:
            raise UserError(f"--rounds must be at least {FEWEST_ROUNDS}, got {self.rounds}")
        for name in self.dtypes or ():
            if name not in DTYPES:
                raise UserError(f"--dtype: there is no {name!r}; they are {', '.join(DTYPES)}")
        for name in self.without:
            if name not in (*dispatch.BACKENDS, *cases.PEERS):
                known = ", ".join((*dispatch.BACKENDS, *cases.PEERS))
                raise UserError(f"--without: there is no competitor {name!r}; they are {known}")
        if self.seconds is not None and not self.seconds >= 0:
            raise UserError(f"--seconds must be at least 0, got {self.seconds:g}")

    def settings(self) -> dict[str, Any]:
        """What the file says under "settings"."""
        return {
            "size": self.size,
            "dtypes": list(self.dtypes or DEFAULT_DTYPES[self.device.type]),
            "only": list(self.only),
            "without": list(self.without),
            "rounds": self.rounds,
            "seconds": DEFAULT_SECONDS[self.size] if self.seconds is None else self.seconds,
        }

    def cases(self) -> list[Case]:
        """
        Raises:
            UserError: ``only`` names none.
        """
        every = cases.cases(self.size, self.device.type, self.settings()["dtypes"])
        chosen = [case for case in every if not self.only or any(text in case.name for text in self.only)]
        if not chosen:
            names = "; ".join(case.name for case in every)
            raise UserError(f"--only: {' or '.join(map(repr, self.only))} is in none of these names: {names}")
        return chosen


def measure(options: Options, plan: Plan) -> Result:
    """The command. See ``session.run`` for what is returned.

    Raises:
        UserError: ``options`` name no case, or the plan's ``resume`` is a file of something else.
    """
    todo, absent = options.cases(), absent_competitors(options)
    timer = timer_for(options.device, _SAMPLE_SECONDS[options.size])
    run = functools.partial(
        run_case,
        device=options.device,
        timer=timer,
        rounds=options.rounds,
        seconds=options.settings()["seconds"],
        absent=absent,
    )

    def excused(case: Case, name: str, reason: str) -> bool:
        return reason == reason_not_to_time(case.op, name, options.device, DTYPES[case.dtype])

    return session.run("kernels", options, plan, todo, run, timer, absent, show=show, excused=excused)


def absent_competitors(options: Options) -> dict[str, str]:
    """Who takes part in no case, and why: peers that are not here, and backends that run no op or would be emulated."""
    absent = cases.absent_peers(options.device)
    dtypes = [DTYPES[name] for name in options.settings()["dtypes"]]
    for backend in dispatch.BACKENDS:
        reasons = [reason_not_to_time(op, backend, options.device, dtype) for op in dispatch.OPS for dtype in dtypes]
        if all(reasons):
            absent[backend] = next(filter(None, reasons))
    return {**absent, **dict.fromkeys(options.without, "left out by --without")}


def reason_not_to_time(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a backend is not timed on an op, or None."""
    reason = dispatch.reason_against(op, backend, device.type, dtype)
    if reason is None and dispatch.stand_in(op, backend):
        reason = f"it runs {dispatch.stand_in(op, backend)}, whose time says nothing of the kernel's"
    return reason


def run_case(
    case: Case,
    ceilings: Ceilings,
    others: OtherWork,
    *,
    device: torch.device,
    timer: Timer,
    rounds: int,
    seconds: float,
    absent: dict[str, str],
) -> Outcome:
    """Hold the competitors to the truth, then time each part of the case.

    Args:
        case: to run.
        ceilings: measured before.
        others: counts what other programs do while times are taken.
        device: where.
        timer, rounds, seconds: as ``harness.interleave`` takes them.
        absent: who does not take part at all.
    Returns:
        A row of the file for each part.
    """
    torch.manual_seed(0)
    problem = case.build(device)
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name in problem.names():
        if name in absent:
            continue
        if name in dispatch.BACKENDS:
            reason = reason_not_to_time(case.op, name, device, DTYPES[case.dtype])
            if reason is not None:
                left_out[name] = reason
                continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, why it has no kernel: the error follows
                errors[name] = problem.check(name)
        except WrongResult as wrong:
            left_out[name] = f"wrong: {wrong}"
        except Exception as failure:  # whatever one of them fails with, the others are to be timed
            left_out[name] = first_line(failure)
    rows = []
    for part, work in case.work.items():
        contestants = {name: problem.contestant(name, part) for name in errors}
        with others:
            samples = interleave(contestants, timer, rounds, seconds) if contestants else {}
        floor = work.floor_ms(ceilings, case.dtype)
        times = {name: [sample.ms for sample in of_one] for name, of_one in samples.items()}
        competitors: dict[str, Any] = {}
        for name, of_one in samples.items():
            of_times = spread(times[name])
            median = of_times["median"]
            host = [sample.host_ms for sample in of_one if sample.host_ms is not None]
            competitors[name] = {
                "ours": name in dispatch.BACKENDS,
                "relative_error": errors[name],
                "median_ms": median,
                "min_ms": of_times["min"],
                "max_ms": of_times["max"],
                "host_ms": statistics.median(host) if host else None,
                "samples_ms": times[name],
                "of_ceiling": floor / median,
                "bytes_per_s": 1e3 * work.bytes / median,
                "flops_per_s": 1e3 * work.flops / median,
            }
        row = {
            "op": case.op,
            "case": case.name,
            "part": part,
            "dtype": case.dtype,
            "shape": case.shape,
            "bytes": work.bytes,
            "flops": work.flops,
            "floor_ms": floor,
            "competitors": competitors,
            "ratios": {
                ours: {peer: ratios(times[ours], times[peer]) for peer in times if peer not in dispatch.BACKENDS}
                for ours in times
                if ours in dispatch.BACKENDS
            },
        }
        rows.append(row)
    return Outcome(rows, left_out)


def show(case: Case, outcome: Outcome) -> None:
    """Print a case's tables."""
    for row in outcome.rows:
        print_row(row)
    session.show_left_out(case, outcome)


def print_row(row: dict[str, Any]) -> None:
    """Print a row as a table, the fastest first."""
    ours = [name for name in row["ratios"] if name not in ("reference", "torch")] or list(row["ratios"])
    lines = []
    for name, figures in sorted(row["competitors"].items(), key=lambda item: item[1]["median_ms"]):
        of_each = [row["ratios"][mine].get(name) for mine in ours]
        computes = row["flops"] and figures["flops_per_s"] >= figures["bytes_per_s"]
        rate = (figures["flops_per_s"] if computes else figures["bytes_per_s"]) / 1e9
        lines.append(
            (
                f"  {name}",
                f"{figures['median_ms']:.4f} ({figures['min_ms']:.4f}, {figures['max_ms']:.4f})",
                f"{figures['of_ceiling']:.0%}",
                f"{rate:,.1f} {'GFLOP/s' if computes else 'GB/s'}",
                "" if figures["host_ms"] is None else f"{figures['host_ms']:.3f}",
                *(f"{r['median']:.2f}x ({r['min']:.2f}, {r['max']:.2f})" if r else "" for r in of_each),
            )
        )
    headings = ("ms: median (min, max)", "of ceiling", "rate", "host ms", *(f"time / {mine}'s" for mine in ours))
    print_table((f"{row['case']}, {row['part']}", *headings), lines)
