"""`fastgpt bench kernels` and its marks: what it times, refuses, writes, goes on with and says."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import cli, dispatch
from fastgpt.benchmarks import cases, kernels, marks, result, scaling, session
from fastgpt.benchmarks.cases import BACKWARD, EAGER, FORWARD, STEP, Case, Work, WrongResult
from fastgpt.benchmarks.harness import Contestant, Sample
from fastgpt.benchmarks.kernels import Options
from fastgpt.benchmarks.machine import OtherWork
from fastgpt.benchmarks.marks import Mark
from fastgpt.benchmarks.session import Outcome
from fastgpt.config import UserError

CPU = torch.device("cpu")
CEILINGS = {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": {"fp32": 5e13, "bf16": 8e14}}


class FakeProblem:
    """Competitors whose checks are given, and whose calls return their names."""

    def __init__(self, checks: dict[str, Callable[[], float]]) -> None:
        self.checks = checks

    def names(self) -> list[str]:
        return list(self.checks)

    def check(self, name: str) -> float:
        return self.checks[name]()

    def contestant(self, name: str, part: str) -> Contestant:
        return Contestant(lambda _: name)


def fake_case(checks: dict[str, Callable[[], float]], label: str = "softmax") -> Case:
    work = {FORWARD: Work(4 * 10**9), BACKWARD: Work(8 * 10**9, 10**9)}
    return Case("softmax", label, {"M": 3}, "fp32", work, lambda device: FakeProblem(checks))


class FakeTimer:
    def __init__(self, ms: dict[str, float]) -> None:
        self.ms = ms
        self.timed: list[str] = []

    def __call__(self, contestant: Contestant, stall_ms: float) -> Sample:
        name = contestant.call(contestant.prepare())
        self.timed.append(name)
        return Sample(self.ms[name], None)


def run(case: Case, timer: FakeTimer, absent: dict[str, str] | None = None) -> Outcome:
    return kernels.run_case(
        case, CEILINGS, OtherWork(), device=CPU, timer=timer, rounds=7, seconds=1.0, absent=absent or {}
    )


def fails() -> float:
    raise RuntimeError("no such kernel\nand more")


def is_wrong() -> float:
    raise WrongResult("its relative error is 0.5, allowed is 0.1")


def test_only_who_is_right_is_timed() -> None:
    checks = {
        "reference": fails,
        "torch": lambda: 0.01,
        "triton": is_wrong,
        EAGER: lambda: 0.0,
        cases.COMPILED: is_wrong,
        cases.LIGER: lambda: pytest.fail("it takes no part"),
    }
    timer = FakeTimer({"torch": 2.0, EAGER: 3.0})
    dispatch_reason = dispatch.reason_against("softmax", "triton", "cpu", torch.float32)
    rows, left_out = run(fake_case(checks), timer, {cases.LIGER: "not here"})
    assert set(timer.timed) == {"torch", EAGER}
    assert [row["part"] for row in rows] == [FORWARD, BACKWARD]
    for row, floor in zip(rows, (1.0, 2.0), strict=True):
        assert list(row["competitors"]) == ["torch", EAGER]
        torchs = row["competitors"]["torch"]
        assert row["floor_ms"] == pytest.approx(floor)
        assert torchs["of_ceiling"] == pytest.approx(floor / 2)
        assert torchs["bytes_per_s"] == pytest.approx(row["bytes"] / 2e-3)
        assert torchs["flops_per_s"] == pytest.approx(row["flops"] / 2e-3)
        assert (torchs["relative_error"], torchs["ours"], torchs["samples_ms"]) == (0.01, True, [2.0] * 7)
        assert row["ratios"] == {"torch": {EAGER: {"median": 1.5, "min": 1.5, "max": 1.5}}}
    stand_in = "it runs in Triton's interpreter, whose time says nothing of the kernel's"
    assert left_out == {
        "reference": "RuntimeError: no such kernel",
        "triton": dispatch_reason or stand_in,
        cases.COMPILED: "wrong: its relative error is 0.5, allowed is 0.1",
    }


def test_a_case_where_all_are_wrong_times_nothing() -> None:
    (row, _), left_out = run(fake_case({"torch": is_wrong}), FakeTimer({}))
    assert (row["competitors"], row["ratios"], list(left_out)) == ({}, {}, ["torch"])


def test_what_runs_in_an_emulator_is_not_timed(own_table: Any) -> None:
    entry = dispatch.Entry(lambda x: x, ("cpu",), how="in slow motion")
    dispatch.register("cuda", "softmax", entry)
    reason = kernels.reason_not_to_time("softmax", "cuda", CPU, torch.float32)
    assert reason == "it runs in slow motion, whose time says nothing of the kernel's"
    assert kernels.reason_not_to_time("softmax", "torch", CPU, torch.float32) is None
    dispatch.mark_absent("triton", "because of this test")
    absent = kernels.absent_competitors(Options(CPU, without=(cases.COMPILED,)))
    assert absent["triton"] == "because of this test"
    assert absent[cases.COMPILED] == "left out by --without"
    assert "torch" not in absent


# The marks


def measured(label: str, part: str, ms: dict[str, list[float]], floor_ms: float = 1.0) -> dict[str, Any]:
    return {
        "case": f"{label}, M=3 N=5, fp32",
        "part": part,
        "floor_ms": floor_ms,
        "competitors": {name: {"samples_ms": times} for name, times in ms.items()},
    }


def test_marks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    forward = measured("softmax", FORWARD, {"cpp": [1.0, 1.0, 2.0], EAGER: [2.0, 3.0, 4.0], "slow": [9.0] * 3})
    backward = measured("softmax", BACKWARD, {"cpp": [1.0, 3.0, 2.0], EAGER: [4.0, 5.0, 4.0], "slow": [9.0] * 3})
    found = {
        "softmax": Mark("softmax", 2.0),
        "of the ceiling": Mark("softmax", 0.9, (), (FORWARD,)),
        "the best peer": Mark("softmax", 1.0, ("slow", EAGER), (BACKWARD,)),
        "another dtype": Mark("softmax", 1.0, dtypes=("bf16",)),
        "another size": Mark("softmax", 1.0, sizes=("N=6",)),
        "another op": Mark("softmax, causal", 1.0),
        "no such peer": Mark("softmax", 1.0, (cases.FUSED,)),
    }
    monkeypatch.setattr(marks, "MARKS", {"cpu": tuple(found.values())})
    data = {"kind": "kernels", "machine": {"gpu": None}, "results": [forward, backward]}
    whole, ceiling, best = marks.verdicts(data)
    assert (whole.ratio, whole.met) == ({"median": 2.0, "min": 2.0, "max": 3.0}, True)
    assert (ceiling.ratio, ceiling.met, ceiling.peer) == ({"median": 1.0, "min": 0.5, "max": 1.0}, True, "")
    assert (best.ratio["median"], best.peer) == (2.0, EAGER)
    forward["floor_ms"] = 0.5
    marks.print_verdicts(data)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[1:] == [
        "softmax, M=3 N=5, fp32, forward + backward cpp torch eager 2.00x (2.00x, 3.00x) 2.00x met",
        "softmax, M=3 N=5, fp32, forward cpp the ceiling 50% (25%, 50%) 90% not met",
        "softmax, M=3 N=5, fp32, backward cpp torch eager 2.00x (1.67x, 4.00x) 1.00x met",
        "2 of 3 met; without a case in this run: 4",
    ]


def steps(competitor: str, mode: str, dtype: str, ms: list[float], **case: Any) -> dict[str, Any]:
    where = {"model": {"name": "shakespeare"}, "block_size": 256, "batch_size": 12, **case}
    return {**where, "competitor": competitor, "mode": mode, "dtype": dtype, "samples_ms": ms}


def test_marks_of_training_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """The fastest of our kernels, in whatever mode and dtype, beside the eager default and beside the best."""
    modes = [(mode, dtype) for mode in ("eager", "compile") for dtype in ("fp32", "bf16")]
    rows = [
        steps("torch", "eager", "fp32", [1.0] * 3),
        steps("cpp", "eager", "fp32", [9.0] * 3),
        steps("cpp", "compile", "bf16", [5.0, 4.0, 6.0]),
        steps("cpp", "compile", "bf16", [1.0] * 3, batch_size=4),
        *(steps("nanoGPT", *how, [ms] * 3) for how, ms in zip(modes, (12.0, 8.0, 11.0, 5.5), strict=True)),
        steps("plain", "eager", "fp32", [20.0] * 3),
    ]
    data = {"kind": "scaling", "machine": {"gpu": None}, "settings": {"dropout": 0.0}, "results": rows}
    marks.print_verdicts(data)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    case = "shakespeare, 12 x 256 tokens, dropout 0 cpp, compile, bf16"
    assert lines[1:] == [
        f"{case} nanoGPT, eager, fp32 2.40x (2.00x, 3.00x) 2.20x met",
        f"{case} nanoGPT, compile, bf16 1.10x (0.92x, 1.38x) 1.20x not met",
        "1 of 2 met; without a case in this run: 1",
    ]

    def peers(**changes: Any) -> list[str]:
        return [verdict.peer for verdict in marks.verdicts({**data, **changes})]

    assert peers(settings={"dropout": 0.2}) == ["nanoGPT, eager, fp32"]
    assert peers(results=rows[:-2]) == ["nanoGPT, eager, fp32"], "the best of some is not the best"
    assert peers(results=[*rows[:4], rows[-1]]) == ["plain, eager, fp32"], "there was no checkout"
    assert peers(results=rows[:1] + rows[4:]) == [], "no kernel of ours"


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_mark_has_a_case(device_type: str) -> None:
    dtypes = ["fp32", "bf16", "fp16"]
    rows = [
        {"case": case.name, "part": part} for case in cases.cases("full", device_type, dtypes) for part in case.work
    ]
    for mark in marks.MARKS[device_type]:
        assert {row["part"] for row in rows if mark.matches(row)} == set(mark.parts), mark
        assert set(mark.peers) <= set(cases.PEERS)
    ladder = scaling.sweeps(scaling.Options(torch.device(device_type)), ["cpp"])[scaling.PARAMETERS]
    for mark in marks.STEP_MARKS[device_type]:
        assert (mark.model, mark.block_size, mark.batch_size) in [
            (case.model, case.config.block_size, case.batch_size) for case in ladder
        ]


# The command line


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fastgpt", "bench", "kernels", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


SHORT = ("--size", "tiny", "--dtype", "fp32", "--without", "torch.compile", "--without", "SDPA math", "--marks")


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "measure_ceilings", lambda *_: CEILINGS)


@pytest.mark.usefixtures("steady")
def test_a_run_and_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.json"
    few = ("--only", "gelu, M", "--only", "_norm_")
    assert command(monkeypatch, *SHORT, *few, "--out", str(path)) == 0
    printed = capsys.readouterr().out
    data = json.loads(path.read_text())
    assert result.violations(data) == []
    assert [(row["op"], row["part"]) for row in data["results"]] == [
        ("gelu", FORWARD),
        ("gelu", BACKWARD),
        ("clip_grad_norm_", STEP),
    ]
    assert data["settings"] == {
        "size": "tiny",
        "dtypes": ["fp32"],
        "only": ["gelu, M", "_norm_"],
        "without": ["torch.compile", "SDPA math"],
        "rounds": 30,
        "seconds": 0.0,
    }
    for row in data["results"]:
        assert {"reference", "torch", EAGER} <= row["competitors"].keys()
        assert all(0 < figures["median_ms"] < math.inf for figures in row["competitors"].values())
    for backend in ("triton", "cuda"):
        assert backend in data["absent"], "it is here in an interpreter or an emulator only"
        assert f"{backend} takes no part: {data['absent'][backend]}" in printed
    assert "gelu, M=16 N=16, fp32, forward" in printed
    assert "met; without a case in this run: 1" in printed, "all but gelu's"
    assert f"valid: {path}" in printed

    assert command(monkeypatch, *SHORT, "--resume", str(path)) == 2
    assert "cannot be resumed: it is of another choice of settings (only was" in capsys.readouterr().err


@pytest.mark.usefixtures("steady")
def test_a_run_that_is_interrupted_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, few = tmp_path / "file.json", ("--only", "gelu, M", "--only", "softmax, M")
    right, ran = kernels.run_case, []

    def interrupted(case: Case, *args: Any, **arguments: Any) -> Outcome:
        ran.append(case.op)
        if ran == ["softmax", "gelu"]:
            raise KeyboardInterrupt
        return right(case, *args, **arguments)

    monkeypatch.setattr(kernels, "run_case", interrupted)
    assert command(monkeypatch, *SHORT, *few, "--out", str(path)) == 130
    assert f"Each case goes into {path}" in capsys.readouterr().out
    before = result.load(path)
    assert ([row["op"] for row in before["results"]], before["complete"]) == (["softmax"] * 2, False)
    assert command(monkeypatch, *SHORT, *few, "--resume", str(path)) == 0
    assert ran == ["softmax", "gelu", "gelu"]
    after = result.load(path)
    assert result.violations(after) == []
    assert after["results"][:2] == before["results"]
    assert ([row["op"] for row in after["results"]], after["complete"]) == (["softmax"] * 2 + ["gelu"] * 2, True)


@pytest.mark.usefixtures("steady")
def test_a_planted_fault_is_refused_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = cases.ops.gelu

    def wrong(*args: Any, backend: str, **options: Any) -> Any:
        return right(*args, backend=backend, **options) * (1.001 if backend == "torch" else 1)

    monkeypatch.setattr(cases.ops, "gelu", wrong)
    path = tmp_path / "file.json"
    assert command(monkeypatch, *SHORT, "--only", "gelu, M", "--out", str(path)) == 1
    data = json.loads(path.read_text())
    for row in data["results"]:
        assert "torch" not in row["competitors"]
        assert row["left_out"]["torch"].startswith("wrong: its relative error is 0.001: output 0 is off by")
    (problem,) = data["problems"]
    assert problem == f"gelu, M=16 N=16, fp32: torch: {data['results'][0]['left_out']['torch']}"
    assert problem in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rounds", "3"], "--rounds must be at least 7, got 3"),
        (["--seconds", "-1"], "--seconds must be at least 0, got -1"),
        (["--dtype", "fp8"], "--dtype: there is no 'fp8'; they are fp32, bf16, fp16"),
        (["--without", "banana"], "--without: there is no competitor 'banana'; they are reference, torch,"),
        (["--only", "banana"], "--only: 'banana' is in none of these names: attention, B=12"),
        (["--size", "huge"], "'huge' is not one of"),
        (["--limit", "-1"], "'--limit': Input should be greater than or equal to 0"),
        (["--resume", "a.json", "--out", "b.json"], "--resume goes on in its own file: leave out --out"),
        (["--resume", "nowhere.json"], "nowhere.json: cannot be read: No such file or directory"),
    ],
)
def test_what_cannot_be_followed(
    arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    assert reason in capsys.readouterr().err


def test_the_defaults_of_a_device() -> None:
    assert Options(CPU).settings()["dtypes"] == ["fp32", "bf16"]
    assert Options(torch.device("cuda")).settings()["dtypes"] == ["bf16", "fp32", "fp16"]
    assert Options(CPU, size="small", seconds=2.0).settings()["seconds"] == 2.0
    with pytest.raises(UserError, match="--rounds"):
        Options(CPU, rounds=6)
