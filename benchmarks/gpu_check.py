"""Check fastgpt on a GPU, in three stages of less than ten minutes; JSON files are written anew with every result.

    python -m fastgpt.benchmarks.gpu_check --stage test|sanitize|bench [--out benchmarks/results]

`make gpu-check STAGE=... PYTHON=...` runs it on an interpreter where fastgpt need not be installed.

- test: pytest over the tests that take the GPU where there is one, in several processes. One that dies, or whose GPU is
  left in error, is started again behind the test that did it.
- sanitize: compute-sanitizer's memcheck and racecheck over every op of the triton and the cuda backend, forward and
  backward, on small odd shapes; and memcheck over a planted fault, which it has to find.
- bench: `fastgpt bench kernels` in full size, then some of `fastgpt bench generate` and of `fastgpt bench scaling`, all
  of it in bf16; each of the three writes a file.

Files are those of all benchmarks (``result.py``). ``valid`` says that the stage came to its end as it should (every
test ran, the sanitizer works, the ceilings stood still), and is false until then.

Exit code: 0 where the run is valid and has no problems, 1 where not, 2 where the stage cannot run here: then nothing is
written.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import fastgpt
from fastgpt.benchmarks import generation, kernels, models, result, scaling
from fastgpt.benchmarks.harness import FEWEST_ROUNDS, first_line, print_table
from fastgpt.benchmarks.result import REPOSITORY, Result
from fastgpt.benchmarks.session import Plan, say_how_it_ended
from fastgpt.benchmarks.small_calls import small_calls
from fastgpt.config import UserError
from fastgpt.triton_kernels import library

# What each stage imports beside torch, at the latest where it calls a test.
NEEDED = {
    "test": ("triton", "numpy", "pytest", "rich", "typer", "safetensors", "matplotlib"),
    "sanitize": ("triton",),
    "bench": ("triton", "numpy", "rich"),
}
LIMIT_S = {"test": 540.0, "sanitize": 540.0, "bench": 440.0}  # a case that has begun comes to its end
KERNEL_BACKENDS = ("triton", "cuda")
BENCH_DTYPE = "bf16"  # what training runs in; the others are for `fastgpt bench`
BENCH_SECONDS = 2.0  # for the rounds of a part
BENCH_BACKENDS = ("triton", "cuda", "torch")  # of whole models: the reference would take all of the time
# What each may take of the time that is left. Training comes last, since it is one case, and compiling takes minutes.
BENCH_SHARES = {"kernels": 0.55, "generate": 0.25, "scaling": 1.0}

# The folder that has the package fastgpt: where `python -c` finds it, whatever lies in the folder of the caller.
HOME = Path(fastgpt.__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Command line: see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.benchmarks.gpu_check",
        description="Check fastgpt on a GPU: run its tests, look for wrong memory accesses, time its kernels.",
    )
    parser.add_argument("--stage", choices=NEEDED, required=True)
    parser.add_argument("--out", type=Path, help="folder for the files; default: benchmarks/results")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="test files, ops or kernels whose name has TEXT in it"
    )
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="default: by the stage, so that it ends in time")
    parser.add_argument("--rounds", type=int, default=30, help="samples of a kernel at most; default: 30")
    parser.add_argument("--commit", help="the commit under test, where git cannot tell")
    args = parser.parse_args(argv)
    if args.limit is None:
        args.limit = LIMIT_S[args.stage]
    if not args.limit > 0:
        parser.error(f"--limit must be greater than 0, got {args.limit:g}")
    names = {"test": list(TEST_FILES), "sanitize": list(small_calls("cpu")), "bench": []}[args.stage]
    chosen = [name for name in names if args.only in name]
    try:
        only = (args.only,) if args.only else ()
        options = kernels.Options(
            torch.device("cuda"), dtypes=(BENCH_DTYPE,), only=only, rounds=args.rounds, seconds=BENCH_SECONDS
        )
        if args.stage == "bench" and only:
            options.cases()
        elif only and not chosen:
            raise UserError(f"--only: {args.only!r} is in none of these names: {'; '.join(names)}")
    except UserError as error:
        parser.error(str(error))

    if not torch.cuda.is_available():
        _refuse(f"This needs a GPU, and torch {torch.__version__} sees none.")
    absent = [name for name in NEEDED[args.stage] if importlib.util.find_spec(name) is None]
    if absent:
        _refuse(
            f"The {args.stage} stage imports {' and '.join(absent)}, which {sys.executable} does not have: install it "
            "first, or unpack the wheels into a folder and put it into PYTHONPATH."
        )
    sanitizer = find_sanitizer()
    if args.stage == "sanitize" and sanitizer is None:
        _refuse("The sanitize stage needs compute-sanitizer, which is neither on the PATH nor in /usr/local/cuda/bin.")
    if args.stage == "test" and not (REPOSITORY / "tests").is_dir():
        _refuse(f"The test stage needs a checkout of fastgpt: there is no folder {REPOSITORY / 'tests'}.")

    plan = Plan(folder=args.out, limit_s=args.limit, commit=args.commit)
    if args.stage == "bench":
        sys.exit(bench(options, plan))
    settings = {"only": args.only, "limit_s": args.limit}
    about = result.describe(args.stage, options.device, settings, commit=args.commit)
    file = Result(result.result_path(about, args.out), about)
    if args.stage == "test":
        run_tests(file, [REPOSITORY / "tests" / name for name in chosen], args.limit, workers())
    else:
        assert sanitizer is not None
        sanitize(file, sanitizer, chosen, args.limit)
    sys.exit(say_how_it_ended(file))


def _refuse(reason: str) -> NoReturn:
    print(reason, file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# Stage "bench"
# ---------------------------------------------------------------------------------------------------------------------


def bench(options: kernels.Options, plan: Plan) -> int:
    """Measure the kernels and, unless some cases of them alone were asked for, GPT-2 as it generates and trains.

    Returns:
        The exit code.
    """
    assert plan.limit_s is not None
    runs: dict[str, Callable[[Plan], Result]] = {"kernels": functools.partial(kernels.measure, options)}
    if not options.only:
        usable = models.usable_backends(options.device)[0]
        shared: dict[str, Any] = {
            "models": ["gpt2"],
            "backends": [backend for backend in BENCH_BACKENDS if backend in usable],
            "dtypes": [BENCH_DTYPE],
            "rounds": FEWEST_ROUNDS,
        }
        generate = generation.Options(options.device, **shared, contexts=[256], new_tokens=64)
        train = scaling.Options(options.device, **{**shared, "batch_sizes": [0]}, sweep="gpt2", block_sizes=[0])
        runs["generate"] = functools.partial(generation.run, generate)
        runs["scaling"] = functools.partial(scaling.scale, train)
    deadline, codes = time.monotonic() + plan.limit_s, []
    for kind, run in runs.items():
        share = BENCH_SHARES[kind] if len(runs) > 1 else 1.0
        file = run(dataclasses.replace(plan, limit_s=share * (deadline - time.monotonic())))
        codes.append(say_how_it_ended(file))
    return max(codes)


# ---------------------------------------------------------------------------------------------------------------------
# Stage "test"
# ---------------------------------------------------------------------------------------------------------------------

# The most important first: the time may not do for all.
TEST_FILES = (
    "test_attention.py",
    "test_linear_cross_entropy.py",
    "test_cross_entropy.py",
    "test_add_layer_norm.py",
    "test_layer_norm.py",
    "test_softmax.py",
    "test_gelu.py",
    "test_dropout.py",
    "test_adamw.py",
    "test_clip_grad_norm.py",
    "test_cuda_hopper.py",
    "test_prims.py",
    "test_cuda.py",
    "test_cuda_bench.py",
    "test_triton.py",
    "test_compile.py",
    "test_model.py",
)

# pytest ended by itself: all passed, some failed, there was nothing to run.
_PYTEST_ENDED = (0, 1, 5)
_GPU_IN_ERROR = 70

_RUN_PYTEST = (
    "import sys; from fastgpt.benchmarks.gpu_check import run_pytest; "
    "sys.exit(run_pytest(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))"
)


def workers() -> int:
    """Processes that share the tests: compiling kernels keeps the cores busy far longer than running them the GPU."""
    return min(8, max(1, (os.cpu_count() or 1) // 2))


def run_tests(file: Result, files: list[Path], limit_s: float, shards: int) -> None:
    """Run the files' tests on ``shards`` processes until ``limit_s`` seconds are over.

    Results are one dict a file: {"file", "passed", "failed", "skipped", "seconds", "failures": [{"test", "message"}]}.
    """
    deadline = time.monotonic() + limit_s
    with tempfile.TemporaryDirectory() as folder:
        running = [Shard(index, shards, files, Path(folder)) for index in range(shards)]
        while time.monotonic() < deadline:
            alive = [shard.alive() for shard in running]  # asked of all: one that has died starts anew when it is asked
            if not any(alive):
                break
            time.sleep(1)
            file.data["results"] = by_file(shard.lines() for shard in running)
            file.update()
        for shard in running:
            shard.stop()
        file.data["results"] = by_file(shard.lines() for shard in running)
        problems = [shard.problem for shard in running if shard.problem]
        unfinished = sum(len(tests_left(shard.lines())) for shard in running)
        unfinished_tests = [test for shard in running for test in tests_running(shard.lines())]
    failed = sum(row["failed"] for row in file.data["results"])
    if unfinished:
        during = f", among them those that were running: {'; '.join(unfinished_tests)}" if unfinished_tests else ""
        problems.append(f"{unfinished} tests did not finish within {limit_s:g} s{during}")
    if failed:
        problems.append(f"{failed} tests failed")
    complete = not unfinished and not any(shard.problem for shard in running)
    file.update(problems=problems, complete=complete, valid=complete)
    columns = ("passed", "failed", "skipped")
    print_table(
        ("file", *columns, "seconds"),
        [
            (row["file"], *(str(row[column]) for column in columns), f"{row['seconds']:.0f}")
            for row in file.data["results"]
        ],
    )
    for row in file.data["results"]:
        for failure in row["failures"]:
            print(f"FAILED {failure['test']}: {failure['message']}")


class Shard:
    """A process that runs every n-th test, and its successors where it dies.

    It writes a line of JSON to ``report`` for the tests it chose, and for each when it begins and when it ends.
    """

    def __init__(self, index: int, shards: int, files: list[Path], folder: Path) -> None:
        self.report = folder / f"{index}.jsonl"
        self.log = folder / f"{index}.log"
        self.problem = ""
        arguments = [str(self.report), str(index), str(shards), *map(str, files)]
        self.command = [sys.executable, "-c", _RUN_PYTEST, *arguments]
        self._start()

    def _start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=HOME, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def alive(self) -> bool:
        """False once there is nothing more to come; starts another process where one has died in a test."""
        code = self.process.poll()
        if code is None:
            return True
        if code in _PYTEST_ENDED or self.problem:
            return False
        killed = tests_running(self.lines())
        if not killed and code != _GPU_IN_ERROR:
            last = self.log.read_text(errors="replace").strip()[-2000:]
            self.problem = f"pytest ended with exit code {code} outside of any test: {last}"
            return False
        with self.report.open("a") as report:
            for test in killed:
                died = {"test": test, "outcome": "failed", "message": f"the process died in it, with exit code {code}"}
                report.write(json.dumps(died) + "\n")
        self._start()
        return True

    def stop(self) -> None:
        """End the process, and those it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if not self.problem and not any("chosen" in line for line in self.lines()):
            self.problem = "a process had not even collected its tests when its time was over"

    def lines(self) -> list[dict[str, Any]]:
        return read_report(self.report)


def read_report(report: Path) -> list[dict[str, Any]]:
    """The whole lines of a report; the last one may still be on its way."""
    text = report.read_text() if report.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def outcomes(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{test: its last line}; what has failed stays so."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        if "test" in line and found.get(line["test"], {}).get("outcome") != "failed":
            found[line["test"]] = line
    return found


def tests_running(lines: list[dict[str, Any]]) -> list[str]:
    return [test for test, line in outcomes(lines).items() if line["outcome"] == "running"]


def tests_left(lines: list[dict[str, Any]]) -> set[str]:
    """What was chosen and has no end: the tests that never began, and the one that is running."""
    ended = {test for test, line in outcomes(lines).items() if line["outcome"] != "running"}
    return {test for line in lines for test in line.get("chosen", ())} - ended


def by_file(reports: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The results of several reports, as ``run_tests`` records them."""
    ended: dict[str, dict[str, Any]] = {}
    for lines in reports:
        ended.update({test: line for test, line in outcomes(lines).items() if line["outcome"] != "running"})
    files: dict[str, list[dict[str, Any]]] = {}
    for test, line in ended.items():
        files.setdefault(test.partition("::")[0], []).append(line)
    rows = []
    for file, of_file in files.items():
        counts = Counter(line["outcome"] for line in of_file)
        failures = [
            {"test": line["test"], "message": line["message"]} for line in of_file if line["outcome"] == "failed"
        ]
        seconds = sum(line.get("seconds", 0.0) for line in of_file)
        rows.append(
            {
                "file": file,
                **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
                "seconds": round(seconds, 1),
                "failures": failures,
            }
        )
    return rows


def run_pytest(report: str, index: int, shards: int, files: list[str]) -> int:
    """A shard's process: every ``shards``-th test of ``files``, less those that ``report`` has an end of."""
    import pytest

    settings = ["-c", str(REPOSITORY / "pyproject.toml"), "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return int(pytest.main([*settings, *files], plugins=[Reporter(Path(report), index, shards)]))


class Reporter:
    """The pytest plugin of a shard."""

    def __init__(self, report: Path, index: int, shards: int) -> None:
        self.report, self.index, self.shards = report, index, shards
        self.ended = {test for test, line in outcomes(read_report(report)).items() if line["outcome"] != "running"}

    def write(self, **line: Any) -> None:
        with self.report.open("a") as report:
            report.write(json.dumps(line) + "\n")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            message = report.longreprtext.strip().splitlines()[-1]
            self.write(test=report.nodeid, outcome="failed", message=f"it cannot be collected: {message}")

    def pytest_collection_finish(self, session: Any) -> None:
        mine = session.items[self.index :: self.shards]
        self.write(chosen=[item.nodeid for item in mine])
        session.items[:] = [item for item in mine if item.nodeid not in self.ended]

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self.write(test=nodeid, outcome="running")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = first_line(crash.message if crash else report.longreprtext) if report.failed else ""
            self.write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, message=message)

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError as error:  # a process cannot recover from it, and all later tests would fail
            self.write(test=nodeid, outcome="failed", message=f"left the GPU in error: {first_line(error)}")
            os._exit(_GPU_IN_ERROR)


# ---------------------------------------------------------------------------------------------------------------------
# Stage "sanitize"
# ---------------------------------------------------------------------------------------------------------------------

_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")

_RUN_OPS = "import sys; from fastgpt.benchmarks import gpu_check; gpu_check.run_ops(*sys.argv[1:])"
_PLANT_FAULT = "from fastgpt.benchmarks import gpu_check; gpu_check.plant_fault()"


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def sanitize(file: Result, sanitizer: str, names: Sequence[str], limit_s: float) -> None:
    """Results are one dict a tool: {"tool", "program", "errors", "ended", "seconds", "report"}.

    ``errors`` is None where the tool gave no summary; ``report`` holds the tool's first lines.
    """
    deadline = time.monotonic() + limit_s
    plan = [
        ("memcheck", "a planted fault", [_PLANT_FAULT], 0.25),
        *(("memcheck", f"every {backend} op", [_RUN_OPS, backend, *names], 0.3) for backend in KERNEL_BACKENDS),
        ("racecheck", f"every {KERNEL_BACKENDS[0]} op", [_RUN_OPS, KERNEL_BACKENDS[0], *names], 0.5),
        ("racecheck", f"every {KERNEL_BACKENDS[1]} op", [_RUN_OPS, KERNEL_BACKENDS[1], *names], 1.0),
    ]
    found, complete = False, True
    for tool, program, arguments, share in plan:
        seconds = share * (deadline - time.monotonic())
        row = {"tool": tool, "program": program, **_run_sanitizer(sanitizer, tool, arguments, seconds)}
        file.update(rows=[row])
        print_table(
            ("tool", "errors", "ended", "seconds"),
            [(f"{tool}, {program}", str(row["errors"]), str(row["ended"]), f"{row['seconds']:.0f}")],
        )
        if program == "a planted fault":
            found = bool(row["errors"])
            if not found:
                file.update(problems=[f"{tool} did not find the planted fault, so its other results mean nothing"])
            continue
        complete = complete and row["errors"] is not None and row["ended"]
        if row["errors"] is None or not row["ended"]:
            file.update(problems=[f"{tool} of {program} did not come to its end"])
        if row["errors"]:
            file.update(problems=[f"{tool} of {program} found {row['errors']} errors"])
            print("\n".join(row["report"]))
    file.update(complete=complete, valid=found and complete)


def sanitizer_command(sanitizer: str, tool: str, arguments: Sequence[str]) -> list[str]:
    """The command line. Of all kernels only those with "_kernel" in their name are looked at, as all of ours have.

    memcheck: some bytes are kept free behind each allocation, so that what is written there meets nothing valid. Errors
    of CUDA calls are left to PyTorch, which makes some on purpose when it starts.
    """
    options = ["--tool", tool, "--kernel-name", "kns=_kernel", "--target-processes", "application-only"]
    if tool == "memcheck":
        options += ["--padding", "1024", "--report-api-errors", "no"]
    return [sanitizer, *options, sys.executable, "-c", *arguments]


def _run_sanitizer(sanitizer: str, tool: str, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    command = sanitizer_command(sanitizer, tool, arguments)
    # Out of PyTorch's cache, tensors lie in one large allocation, where no access is out of bounds.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=HOME, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    return {**read_sanitizer(text), "seconds": round(time.monotonic() - began, 1)}


def read_sanitizer(output: str) -> dict[str, Any]:
    """{"errors", "ended", "report"} of what compute-sanitizer and the program under it have printed."""
    summaries = [int(errors or hazards) for errors, hazards in _SUMMARY.findall(output)]
    lines = output.splitlines()
    report = [line for line in lines if line.startswith("=========")]
    if _ENDED not in lines:  # what the program itself had to say, then, is the reason
        report += lines[-20:]
    return {"errors": sum(summaries) if summaries else None, "ended": _ENDED in lines, "report": report[:80]}


_ENDED = "all ops ran"


def run_ops(backend: str, *names: str) -> None:
    """The program under the sanitizer."""
    calls = small_calls("cuda", backend=backend)
    for name in names:
        calls[name]()
        torch.cuda.synchronize()
        print(f"{name} ran", flush=True)
    print(_ENDED, flush=True)


def plant_fault() -> None:
    """Have a kernel read and write beyond its tensors: past the public op's checks, with shapes that do not match."""
    y, dy = (torch.ones(rows, 1000, dtype=torch.bfloat16, device="cuda") for rows in (1, 64))
    library.op("softmax_bwd")(dy, y, 1.0, False)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
