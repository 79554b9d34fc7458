"""benchmarks/session.py: what a run writes, goes on with, calls a problem, and says of its file."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.benchmarks import result, session
from fastgpt.benchmarks.result import Result
from fastgpt.benchmarks.session import Outcome, Plan
from fastgpt.config import UserError

CPU = torch.device("cpu")
CEILINGS = {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": {"fp32": 5e13, "bf16": 8e14}}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str

    def key(self) -> dict[str, Any]:
        return {"case": self.name}


class Options:
    device = CPU

    def settings(self) -> dict[str, Any]:
        return {"dtypes": ["fp32"]}


def outcome(case: Case, **left_out: str) -> Outcome:
    """A row of kernels in which nobody was timed."""
    row: dict[str, Any] = {"op": "softmax", "case": case.name, "part": "forward", "dtype": "fp32", "shape": {}}
    return Outcome([{**row, "bytes": 1, "flops": 0, "floor_ms": 1.0, "competitors": {}, "ratios": {}}], left_out)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "file.json"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, path: Path) -> Callable[..., Result]:
    """Runs two cases, with ceilings that are not measured."""
    monkeypatch.setattr(session, "clean_up", lambda device: None)

    def run(measure: Callable[..., Outcome], plan: Plan | None = None, **arguments: Any) -> Result:
        measured = [CEILINGS] if plan is None or plan.resume is None else []
        measured.append(arguments.pop("after", CEILINGS))
        monkeypatch.setattr(session, "measure_ceilings", lambda *_: measured.pop(0))
        plan = plan or Plan()
        plan = plan if plan.resume else dataclasses.replace(plan, out=path)
        cases, absent = [Case("a case"), Case("another")], {"Liger": "it is not here"}
        timer: Any = None
        return session.run("kernels", Options(), plan, cases, measure, timer, absent, show=lambda *_: None, **arguments)

    return run


def written(path: Path) -> dict[str, Any]:
    data = result.load(path)
    assert result.violations(data) == []
    return data


def names(data: dict[str, Any]) -> list[str]:
    return [row["case"] for row in data["results"]]


@pytest.mark.parametrize(("factor", "problems"), [(1.1, []), (0.8, ["the ceiling of a copy changed by -20.0%"])])
def test_a_run_whose_ceilings_drift_is_not_valid(run, path, capsys, factor, problems):
    after = {**CEILINGS, "copy_bytes_per_s": CEILINGS["copy_bytes_per_s"] * factor}
    run(lambda case, ceilings, others: outcome(case), after=after)
    data = written(path)
    assert (data["valid"], data["complete"]) == (not problems, True)
    assert [problem.partition(" during")[0] for problem in data["problems"]] == problems
    assert data["ceilings"] == {"before": CEILINGS, "after": after}
    assert names(data) == ["a case", "another"]
    said = capsys.readouterr().out
    assert f"Each case goes into {path}" in said
    assert "Liger takes no part: it is not here" in said


def test_a_gpu_in_error_ends_the_run(run, path, monkeypatch):
    def fail(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(session, "clean_up", fail)
    run(lambda case, ceilings, others: outcome(case))
    data = written(path)
    assert names(data) == ["a case"]
    (problem,) = data["problems"]
    assert problem.startswith("a case left the GPU in error, and the run ends: RuntimeError: an illegal")
    assert (data["valid"], data["complete"]) == (False, False)


def test_rows_are_written_as_they_come(run, path):
    seen = []

    def measure(case: Case, ceilings: Any, others: Any) -> Outcome:
        data = written(path)
        seen.append((len(data["results"]), data["valid"], data["complete"], data["ceilings"]["before"] == ceilings))
        return outcome(case)

    run(measure)
    assert seen == [(0, False, False, True), (1, False, False, True)]


def test_what_ours_get_wrong_and_what_fails_are_problems(run, path):
    def measure(case: Case, ceilings: Any, others: Any) -> Outcome:
        if case.name == "a case":
            raise RuntimeError("out of luck\nin detail")
        reasons = {"torch, eager": "wrong: so much", "Liger": "wrong: not ours", "cpp": f"{session.MEMORY_ENDS}: so"}
        return outcome(case, **reasons)

    file = run(measure)
    data = written(path)
    assert data["problems"] == ["a case: RuntimeError: out of luck", "another: torch, eager: wrong: so much"]
    assert data["summary"]["left_out"].keys() == {"another"}
    assert (data["valid"], data["complete"]) == (True, False)
    assert session.say_how_it_ended(file) == 1


def test_what_is_excused_is_no_problem(run, path):
    file = run(
        lambda case, ceilings, others: outcome(case, cuda="it is not here"),
        excused=lambda case, name, reason: (name, reason) == ("cuda", "it is not here"),
    )
    assert written(path)["problems"] == []
    assert session.say_how_it_ended(file) == 0


def test_what_the_time_does_not_do_for_is_named_and_done_when_the_run_is_resumed(run, path):
    """The figures that are there may be relied on: the run is valid, and not complete."""
    now = itertools.chain([0.0, 50.0], itertools.repeat(99.0))
    run(
        lambda case, ceilings, others: outcome(case, torch="wrong: so much"),
        Plan(limit_s=100.0),
        clock=lambda: next(now),
    )
    data = written(path)
    assert data["problems"] == ["a case: torch: wrong: so much", "the time did not do for another"]
    assert (names(data), data["complete"], data["valid"]) == (["a case"], False, True)

    ran = []
    run(lambda case, ceilings, others: ran.append(case.name) or outcome(case), Plan(resume=path))
    data = written(path)
    assert ran == ["another"]
    assert names(data) == ["a case", "another"]
    assert (data["problems"], data["complete"]) == (["a case: torch: wrong: so much"], True)


def test_what_is_there_counts_when_the_time_is_over(run, path):
    run(lambda case, ceilings, others: outcome(case))
    file = run(lambda *_: pytest.fail("there is no time"), Plan(resume=path, limit_s=0.0))
    assert (file.data["problems"], file.data["complete"]) == ([], True)


def test_a_run_has_one_file():
    with pytest.raises(UserError, match="--resume goes on in its own file: leave out --out"):
        Plan(out=Path("a.json"), resume=Path("b.json"))
