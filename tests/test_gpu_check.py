"""What benchmarks/gpu_check.py does beside the GPU: what it counts, judges, writes and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import dispatch
from fastgpt.benchmarks import generation, gpu_check, kernels, models, result, scaling
from fastgpt.benchmarks.result import Result
from fastgpt.benchmarks.session import Plan

pytest_plugins = ["pytester"]

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def record(request: pytest.FixtureRequest, tmp_path: Path) -> Result:
    """The file of a stage, that of tests unless a test says otherwise."""
    kind = getattr(request, "param", "test")
    return Result(tmp_path / "new" / "file.json", result.describe(kind, torch.device("cpu"), {}))


def written(record: Result) -> dict[str, Any]:
    data = result.load(record.path)
    assert result.violations(data) == []
    return data


# The test stage


def test_the_files_of_the_test_stage_are_there() -> None:
    assert [name for name in gpu_check.TEST_FILES if not (REPOSITORY / "tests" / name).is_file()] == []
    of_ops = {f"test_{op.rstrip('_')}.py" for op in dispatch.OPS} - {"test_attention_qkvpacked.py"}
    assert of_ops <= set(gpu_check.TEST_FILES)


TOY_TESTS = """
import pytest

def test_a():
    pass

def test_b():
    assert 1 == 2, "one is not two\\nat all"

@pytest.mark.skip
def test_c():
    pass

@pytest.fixture
def broken():
    raise ValueError("no fixture")

def test_d(broken):
    pass

@pytest.fixture
def messy():
    yield
    raise ValueError("no end")

def test_e(messy):
    pass

def test_f():
    pass
"""


def test_what_the_plugin_reports(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_toy=TOY_TESTS)
    report = pytester.path / "report.jsonl"
    pytester.inline_run(plugins=[gpu_check.Reporter(report, 0, 1)])
    lines = gpu_check.read_report(report)
    (row,) = gpu_check.by_file([lines])
    assert row.pop("seconds") >= 0
    assert row == {
        "file": "test_toy.py",
        "passed": 2,
        "failed": 3,
        "skipped": 1,
        "failures": [
            {"test": "test_toy.py::test_b", "message": "AssertionError: one is not two"},
            {"test": "test_toy.py::test_d", "message": "ValueError: no fixture"},
            {"test": "test_toy.py::test_e", "message": "ValueError: no end"},
        ],
    }
    assert gpu_check.tests_left(lines) == set()


def test_each_process_runs_its_share_and_only_what_has_no_end(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_toy=TOY_TESTS)
    report = pytester.path / "report.jsonl"
    died = [
        {"chosen": ["test_toy.py::test_b", "test_toy.py::test_d", "test_toy.py::test_f"]},
        {"test": "test_toy.py::test_b", "outcome": "running"},
        {"test": "test_toy.py::test_b", "outcome": "failed", "message": "died"},
        {"test": "test_toy.py::test_d", "outcome": "running"},
    ]
    report.write_text("".join(json.dumps(line) + "\n" for line in died))
    pytester.inline_run(plugins=[gpu_check.Reporter(report, 1, 2)])
    lines = gpu_check.read_report(report)
    assert [line["test"][-1] for line in lines[len(died) :] if line.get("outcome") == "running"] == ["d", "f"]
    found = gpu_check.outcomes(lines)
    assert {test[-1]: line["outcome"] for test, line in found.items()} == {"b": "failed", "d": "failed", "f": "passed"}


def test_a_file_that_cannot_be_collected_is_a_failure(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_wrong="import no_such_module")
    report = pytester.path / "report.jsonl"
    pytester.inline_run(plugins=[gpu_check.Reporter(report, 0, 1)])
    (row,) = gpu_check.by_file([gpu_check.read_report(report)])
    assert (row["file"], row["failed"]) == ("test_wrong.py", 1)
    assert "No module named 'no_such_module'" in row["failures"][0]["message"]


def test_the_first_failure_of_a_test_is_the_one_that_counts() -> None:
    lines = [
        {"test": "a", "outcome": "running"},
        {"test": "a", "outcome": "failed", "message": "wrong"},
        {"test": "a", "outcome": "failed", "message": "left the GPU in error"},
    ]
    assert gpu_check.outcomes(lines)["a"]["message"] == "wrong"


def test_a_report_is_read_while_it_is_written(tmp_path: Path) -> None:
    report = tmp_path / "report"
    assert gpu_check.read_report(report) == []
    report.write_text('{"chosen": ["a", "b"]}\n{"test": "a", "outcome": "running"}\n{"test": "a", "outc')
    lines = gpu_check.read_report(report)
    assert gpu_check.tests_running(lines) == ["a"]
    assert gpu_check.tests_left(lines) == {"a", "b"}
    assert gpu_check.by_file([lines]) == []


# In place of pytest: shard 0 dies in its second test and later in its third, shard 1 runs on and on.
FAKE_PYTEST = """
import json, os, sys, time
report, index = sys.argv[1], int(sys.argv[2])
text = open(report).read() if os.path.exists(report) else ""
def write(**line):
    with open(report, "a") as file:
        file.write(json.dumps(line) + "\\n")
names = [f"tests/test_x.py::{index}{letter}" for letter in "abcd"]
write(chosen=names)
for name in names:
    if f'"{name}", "outcome": "passed"' in text or f'"{name}", "outcome": "failed"' in text:
        continue
    write(test=name, outcome="running")
    if index == 0 and name[-1] == "b":
        os.kill(os.getpid(), 11)
    if index == 0 and name[-1] == "c":
        write(test=name, outcome="failed", message="left the GPU in error")
        os._exit(GPU_IN_ERROR)
    if index == 1 and name[-1] == "b":
        time.sleep(60)
    write(test=name, outcome="passed", seconds=1.0, message="")
"""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check.time, "sleep", lambda seconds, sleep=gpu_check.time.sleep: sleep(0.05))


@pytest.mark.usefixtures("impatient")
def test_processes_that_die_are_started_again_and_those_that_hang_are_ended(
    record: Result, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = FAKE_PYTEST.replace("GPU_IN_ERROR", str(gpu_check._GPU_IN_ERROR))
    monkeypatch.setattr(gpu_check, "_RUN_PYTEST", program)
    gpu_check.run_tests(record, [Path("tests/test_x.py")], 1.0, 2)
    data = written(record)
    (row,) = data["results"]
    assert (row["passed"], row["failed"], row["seconds"]) == (3, 2, 3.0)
    assert row["failures"] == [
        {"test": "tests/test_x.py::0b", "message": "the process died in it, with exit code -11"},
        {"test": "tests/test_x.py::0c", "message": "left the GPU in error"},
    ]
    assert data["problems"] == [
        "3 tests did not finish within 1 s, among them those that were running: tests/test_x.py::1b",
        "2 tests failed",
    ]
    assert data["valid"] is False
    assert "FAILED tests/test_x.py::0b: the process died in it" in capsys.readouterr().out


@pytest.mark.usefixtures("impatient")
def test_a_pytest_that_does_not_start_is_a_problem(record: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_RUN_PYTEST", "import sys; sys.exit('usage: not like this')")
    monkeypatch.setattr(gpu_check, "_PYTEST_ENDED", (0, 5))
    gpu_check.run_tests(record, [Path("x.py")], 5.0, 1)
    data = written(record)
    assert data["problems"] == ["pytest ended with exit code 1 outside of any test: usage: not like this"]
    assert data["valid"] is False


@pytest.mark.usefixtures("impatient")
def test_a_process_that_chose_no_tests_in_time_is_a_problem(record: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_RUN_PYTEST", "import time; time.sleep(60)")
    gpu_check.run_tests(record, [Path("x.py")], 0.1, 1)
    data = written(record)
    assert data["problems"] == ["a process had not even collected its tests when its time was over"]
    assert data["valid"] is False


@pytest.mark.full
def test_the_test_stage_runs_pytest(record: Result, tmp_path: Path) -> None:
    toy = tmp_path / "test_toy.py"
    toy.write_text(TOY_TESTS + "\n\ndef test_g():\n    import os\n    os._exit(9)\n\n\ndef test_h():\n    pass\n")
    gpu_check.run_tests(record, [toy], 100.0, 2)
    (row,) = written(record)["results"]
    assert (row["passed"], row["failed"], row["skipped"]) == (3, 4, 1)
    assert written(record)["problems"] == ["4 tests failed"]
    assert written(record)["valid"] is True


# The sanitize stage


def test_what_the_sanitizer_says() -> None:
    clean = "========= COMPUTE-SANITIZER\nsoftmax ran\nall ops ran\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_check.read_sanitizer(clean) == {
        "errors": 0,
        "ended": True,
        "report": ["========= COMPUTE-SANITIZER", "========= ERROR SUMMARY: 0 errors"],
    }
    found = "========= Invalid __global__ read of size 2 bytes\nTraceback\n========= ERROR SUMMARY: 12 errors\n"
    read = gpu_check.read_sanitizer(found)
    assert (read["errors"], read["ended"]) == (12, False)
    assert "Traceback" in read["report"]
    races = "all ops ran\n========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)\n"
    assert gpu_check.read_sanitizer(races)["errors"] == 3
    assert gpu_check.read_sanitizer("killed")["errors"] is None


def test_the_command_line_of_the_sanitizer() -> None:
    memcheck = gpu_check.sanitizer_command("/bin/cs", "memcheck", ["code", "softmax"])
    assert memcheck[:3] == ["/bin/cs", "--tool", "memcheck"]
    assert memcheck[-4:] == [sys.executable, "-c", "code", "softmax"]
    assert "--padding" in memcheck
    assert "--padding" not in gpu_check.sanitizer_command("/bin/cs", "racecheck", ["code"])


FAKE_SANITIZER = """#!/bin/sh
tool=$2
case "$*" in
*plant_fault*) echo "========= ERROR SUMMARY: $PLANTED errors" ;;
*) echo all ops ran
   if [ $tool = memcheck ]; then echo "========= ERROR SUMMARY: $FOUND errors"
   else echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"; fi ;;
esac
"""


@pytest.mark.parametrize(
    ("planted", "found", "valid", "problems"),
    [
        (1, 0, True, []),
        (1, 4, True, [f"memcheck of every {backend} op found 4 errors" for backend in gpu_check.KERNEL_BACKENDS]),
        (0, 0, False, ["memcheck did not find the planted fault, so its other results mean nothing"]),
        (
            1,
            "no",
            False,
            [f"memcheck of every {backend} op did not come to its end" for backend in gpu_check.KERNEL_BACKENDS],
        ),
    ],
)
@pytest.mark.parametrize("record", ["sanitize"], indirect=True)
def test_the_sanitize_stage(
    record: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    planted: int,
    found: int | str,
    valid: bool,
    problems: list[str],
) -> None:
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text(FAKE_SANITIZER)
    sanitizer.chmod(0o755)
    monkeypatch.setenv("PLANTED", str(planted))
    monkeypatch.setenv("FOUND", str(found))
    gpu_check.sanitize(record, str(sanitizer), ["softmax"], 20.0)
    data = written(record)
    assert [(row["tool"], row["program"]) for row in data["results"]] == [
        ("memcheck", "a planted fault"),
        ("memcheck", "every triton op"),
        ("memcheck", "every cuda op"),
        ("racecheck", "every triton op"),
        ("racecheck", "every cuda op"),
    ]
    assert (data["problems"], data["valid"]) == (problems, valid)


def test_a_sanitizer_that_hangs_is_ended(record: Result, tmp_path: Path) -> None:
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text("#!/bin/sh\nsleep 60\n")
    sanitizer.chmod(0o755)
    result = gpu_check._run_sanitizer(str(sanitizer), "memcheck", ["code"], 0.1)
    assert (result["errors"], result["ended"]) == (None, False)
    assert result["seconds"] < 10


# The bench stage


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, Plan]]:
    """What the bench stage asks of each of the benchmarks, which take 100 seconds by its clock and find a problem."""
    found: dict[str, tuple[Any, Plan]] = {}
    now = [1000.0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(models, "usable_backends", lambda device: (["reference", "torch", "cuda"], {}))
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    for kind, module, name in (
        ("kernels", kernels, "measure"),
        ("generate", generation, "run"),
        ("scaling", scaling, "scale"),
    ):

        def measure(options: Any, plan: Plan, kind: str = kind) -> Result:
            found[kind] = options, plan
            now[0] += 100
            file = Result(tmp_path / f"{kind}.json", result.describe(kind, torch.device("cpu"), {}))
            file.update(problems=["one"] if kind == "generate" else [], valid=True)
            return file

        monkeypatch.setattr(module, name, measure)
    return found


def test_the_bench_stage_is_the_kernels_and_some_of_the_rest(
    asked: dict[str, tuple[Any, Plan]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--stage", "bench", "--out", "here", "--commit", "abc", "--limit", "400"])
    assert stop.value.code == 1, "there is a problem in one of them"
    assert capsys.readouterr().out.count("\nvalid: ") == 2
    gpu = torch.device("cuda")
    models_of: dict[str, Any] = {"models": ["gpt2"], "backends": ["cuda", "torch"], "dtypes": ["bf16"], "rounds": 7}
    assert {kind: options for kind, (options, _) in asked.items()} == {
        "kernels": kernels.Options(gpu, "full", ("bf16",), seconds=2.0),
        "generate": generation.Options(gpu, **models_of, contexts=[256], new_tokens=64),
        "scaling": scaling.Options(gpu, **models_of, sweep="gpt2", block_sizes=[0], batch_sizes=[0]),
    }
    (case,) = {case for sweep in scaling.sweeps(asked["scaling"][0], ["cuda"]).values() for case in sweep}
    assert (case.name, {who.mode for who in case.who}) == ("gpt2, 16 x 1024 tokens", {"eager", "compile"})
    plans = {kind: plan for kind, (_, plan) in asked.items()}
    left = {"kernels": 0.55 * 400, "generate": 0.25 * 300, "scaling": 200}
    assert plans == {kind: Plan(folder=Path("here"), limit_s=left[kind], commit="abc") for kind in plans}
    assert gpu_check.LIMIT_S["bench"] < 480


def test_the_bench_stage_of_some_kernels_is_that_alone(asked: dict[str, tuple[Any, Plan]]) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--stage", "bench", "--only", "softmax"])
    assert stop.value.code == 0
    ((options, plan),) = asked.values()
    assert (options.only, plan.limit_s) == (("softmax",), gpu_check.LIMIT_S["bench"])


# The command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--stage"),
        (["--stage", "all"], "invalid choice: 'all'"),
        (["--stage", "bench", "--limit", "0"], "--limit must be greater than 0, got 0"),
        (["--stage", "bench", "--rounds", "3"], "--rounds must be at least 7, got 3"),
        (["--stage", "bench", "--only", "banana"], "--only: 'banana' is in none of these names: attention, B=16"),
        (["--stage", "test", "--only", "banana"], "'banana' is in none of these names: test_attention.py;"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def refusal(arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which it refuses; and it has written nothing."""
    with pytest.raises(SystemExit) as stop:
        gpu_check.main([*arguments, "--out", str(out)])
    assert stop.value.code == 2
    assert not out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("stage", gpu_check.NEEDED)
def test_without_a_gpu_it_says_so(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refusal(["--stage", stage], tmp_path / "results", capsys)
    assert line == f"This needs a GPU, and torch {torch.__version__} sees none."


def test_what_else_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
    line = refusal(["--stage", "sanitize"], tmp_path / "results", capsys)
    assert line.startswith("The sanitize stage needs compute-sanitizer")
    monkeypatch.setattr(gpu_check, "NEEDED", {"test": ("torch", "no_such_package")})
    line = refusal(["--stage", "test"], tmp_path / "results", capsys)
    assert line.startswith(f"The test stage imports no_such_package, which {sys.executable} does not have")
    monkeypatch.setattr(gpu_check, "NEEDED", {"test": ()})
    monkeypatch.setattr(gpu_check, "REPOSITORY", tmp_path)
    assert refusal(["--stage", "test"], tmp_path / "results", capsys).endswith(f"{tmp_path / 'tests'}.")


def test_the_sanitizer_is_looked_for_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert gpu_check.find_sanitizer() == str(tool)


@pytest.mark.full
def test_make_needs_no_installed_fastgpt(tmp_path: Path) -> None:
    """The package is put together from links, though this interpreter may have another one of its name."""
    fake = tmp_path / "fastgpt"
    fake.mkdir()
    (fake / "__init__.py").write_text("raise ImportError('the wrong fastgpt')")
    command = ["make", "-C", str(REPOSITORY), "gpu-check", "STAGE=bench", f"PYTHON={sys.executable}"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(tmp_path)}
    for name in ("MAKEFLAGS", "ARGS"):  # of a make around the tests
        environment.pop(name, None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "This needs a GPU" in done.stderr
    assert done.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["fastgpt"], "the links are gone"
