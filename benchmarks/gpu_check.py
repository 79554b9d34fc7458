"""Check fastgpt on a GPU, in three stages of less than ten minutes; each writes one JSON file, anew with every result.

    python -m fastgpt.benchmarks.gpu_check --stage test|sanitize|bench [--out benchmarks/results]

`make gpu-check STAGE=... PYTHON=...` runs it on an interpreter where fastgpt need not be installed.

- test: pytest over the tests that take the GPU where there is one, in several processes. One that dies, or whose GPU is
  left in error, is started again behind the test that did it.
- sanitize: compute-sanitizer's memcheck and racecheck over every op of the triton and the cuda backend, forward and
  backward, on small odd shapes; and memcheck over a planted fault, which it has to find.
- bench: the triton and the cuda backend beside torch's eager op, torch.compile of that and, for attention, SDPA's flash
  and cuDNN backends and FlexAttention. Each must first be near the truth, by ||result - truth|| / ||truth|| of every
  output and gradient; one that is not is named as wrong and never timed. ``interleave`` and ``CudaTimer`` say how times
  are taken, the cases in ``gpu_cases.py`` what is counted as bytes and FLOPs. The ceilings, a copy within the GPU's
  memory and a bf16 matrix product, are measured before and after; a run in which they drift is not valid.

The file: {"schema": 1, "stage", "gpu", "torch", "triton", "cuda", "python", "commit", "date", "settings", "results",
"problems", "valid"}. ``problems`` are sentences. ``valid`` says that the stage came to its end as it should (every test
ran, the sanitizer works, the ceilings stood still), and is false until then.

Exit code: 0 where the run is valid and has no problems, 1 where not, 2 where the stage cannot run here: then nothing is
written.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

import fastgpt
from fastgpt.benchmarks.gpu_cases import OURS, Case, Contestant, cases, small_calls
from fastgpt.files import write_atomically
from fastgpt.triton_kernels import library

# What each stage imports beside torch, at the latest where it calls a test.
NEEDED = {
    "test": ("triton", "numpy", "pytest", "rich", "typer", "safetensors", "matplotlib"),
    "sanitize": ("triton",),
    "bench": ("triton",),
}
LIMIT_S = 540.0

REPOSITORY = Path(__file__).resolve().parents[1]

# The folder that has the package fastgpt: where `python -c` finds it, whatever lies in the folder of the caller.
HOME = Path(fastgpt.__file__).parents[1]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Command line: see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt.benchmarks.gpu_check",
        description="Check fastgpt on a GPU: run its tests, look for wrong memory accesses, time its kernels.",
    )
    parser.add_argument("--stage", choices=NEEDED, required=True)
    parser.add_argument("--out", type=Path, help="folder for the JSON file; default: benchmarks/results")
    parser.add_argument("--only", default="", metavar="TEXT", help="test files, ops or cases whose name contains TEXT")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="default: %(default)g")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each competitor at most; default: 30")
    parser.add_argument("--commit", help="the commit under test, where git cannot tell")
    args = parser.parse_args(argv)
    if not args.limit > 0:
        parser.error(f"--limit must be greater than 0, got {args.limit:g}")
    if args.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds must be at least {FEWEST_ROUNDS}, got {args.rounds}")
    names = {"test": TEST_FILES, "sanitize": small_calls("cpu"), "bench": [case.name for case in cases()]}[args.stage]
    chosen = [name for name in names if args.only in name]
    if not chosen:
        parser.error(f"--only: {args.only!r} is in none of these names: {'; '.join(names)}")

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

    settings = {"only": args.only, "limit_s": args.limit}
    about = describe(args.stage, settings, args.commit)
    name = f"{args.stage}_{_slug(about['gpu'])}_{_slug(about['date'])}.json"
    record = Record((args.out or REPOSITORY / "benchmarks" / "results") / name, about)
    if args.stage == "test":
        run_tests(record, [REPOSITORY / "tests" / name for name in chosen], args.limit, workers())
    elif args.stage == "sanitize":
        assert sanitizer is not None
        sanitize(record, sanitizer, chosen, args.limit)
    else:
        settings["rounds"] = args.rounds
        device = torch.device("cuda")
        timer = CudaTimer(device)
        bench(
            record,
            [case for case in cases() if case.name in chosen],
            functools.partial(run_case, device=device, timer=timer, rounds=args.rounds),
            functools.partial(measure_ceilings, device, timer),
            clean_up,
            args.limit,
        )
    for problem in record.data["problems"]:
        print(problem)
    print(f"{'valid' if record.data['valid'] else 'not valid'}: {record.path}")
    sys.exit(0 if record.data["valid"] and not record.data["problems"] else 1)


def _refuse(reason: str) -> NoReturn:
    print(reason, file=sys.stderr)
    sys.exit(2)


def describe(stage: str, settings: dict[str, Any], commit: str | None) -> dict[str, Any]:
    """What the figures depend on."""
    import triton  # loading it takes a while, and a machine without a GPU may not have it

    return {
        "stage": stage,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or commit_of(REPOSITORY),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": settings,
    }


def commit_of(checkout: Path) -> str | None:
    """The commit's hash, with "-dirty" where tracked files differ from it; None where git cannot tell."""
    if not (checkout / ".git").exists():  # git would go on looking, and find the repository of someone else
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text.partition("+")[0]).strip("-")


class Record:
    """A run's JSON file, replaced with each change: a run that is cut short leaves what it had found."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema": 1, **about, "results": [], "problems": [], "valid": False}

    def update(
        self, *, results: Iterable[dict[str, Any]] = (), problems: Iterable[str] = (), valid: bool = False
    ) -> None:
        """Add results and problems, and write the file."""
        self.data["results"] += results
        self.data["problems"] += problems
        self.data["valid"] = valid
        write_atomically(self.path, (json.dumps(self.data, indent=1, allow_nan=False) + "\n").encode())


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, the first one flush left."""
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    for row in (headings, *rows):
        cells = (text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join((row[0].ljust(widths[0]), *cells)), flush=True)


def _first_line(error: BaseException | str) -> str:
    lines = str(error).strip().splitlines()
    line = lines[0][:300] if lines else "no message"
    return line if isinstance(error, str) else f"{type(error).__name__}: {line}"


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


def run_tests(record: Record, files: list[Path], limit_s: float, shards: int) -> None:
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
            record.data["results"] = by_file(shard.lines() for shard in running)
            record.update()
        for shard in running:
            shard.stop()
        record.data["results"] = by_file(shard.lines() for shard in running)
        problems = [shard.problem for shard in running if shard.problem]
        unfinished = sum(len(tests_left(shard.lines())) for shard in running)
        unfinished_tests = [test for shard in running for test in tests_running(shard.lines())]
    failed = sum(row["failed"] for row in record.data["results"])
    if unfinished:
        during = f", among them those that were running: {'; '.join(unfinished_tests)}" if unfinished_tests else ""
        problems.append(f"{unfinished} tests did not finish within {limit_s:g} s{during}")
    if failed:
        problems.append(f"{failed} tests failed")
    record.update(problems=problems, valid=not unfinished and not any(shard.problem for shard in running))
    columns = ("passed", "failed", "skipped")
    print_table(
        ("file", *columns, "seconds"),
        [
            (row["file"], *(str(row[column]) for column in columns), f"{row['seconds']:.0f}")
            for row in record.data["results"]
        ],
    )
    for row in record.data["results"]:
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
            message = _first_line(crash.message if crash else report.longreprtext) if report.failed else ""
            self.write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, message=message)

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError as error:  # a process cannot recover from it, and all later tests would fail
            self.write(test=nodeid, outcome="failed", message=f"left the GPU in error: {_first_line(error)}")
            os._exit(_GPU_IN_ERROR)


# ---------------------------------------------------------------------------------------------------------------------
# Stage "sanitize"
# ---------------------------------------------------------------------------------------------------------------------

_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")

_RUN_OPS = "import sys; from fastgpt.benchmarks import gpu_check; gpu_check.run_ops(*sys.argv[1:])"
_PLANT_FAULT = "from fastgpt.benchmarks import gpu_check; gpu_check.plant_fault()"


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def sanitize(record: Record, sanitizer: str, names: Sequence[str], limit_s: float) -> None:
    """Results are one dict a tool: {"tool", "program", "errors", "ended", "seconds", "report"}.

    ``errors`` is None where the tool gave no summary; ``report`` holds the tool's first lines.
    """
    deadline = time.monotonic() + limit_s
    plan = [
        ("memcheck", "a planted fault", [_PLANT_FAULT], 0.25),
        *(("memcheck", f"every {backend} op", [_RUN_OPS, backend, *names], 0.3) for backend in OURS),
        ("racecheck", f"every {OURS[0]} op", [_RUN_OPS, OURS[0], *names], 0.5),
        ("racecheck", f"every {OURS[1]} op", [_RUN_OPS, OURS[1], *names], 1.0),
    ]
    found, complete = False, True
    for tool, program, arguments, share in plan:
        seconds = share * (deadline - time.monotonic())
        result = {"tool": tool, "program": program, **_run_sanitizer(sanitizer, tool, arguments, seconds)}
        record.update(results=[result])
        print_table(
            ("tool", "errors", "ended", "seconds"),
            [(f"{tool}, {program}", str(result["errors"]), str(result["ended"]), f"{result['seconds']:.0f}")],
        )
        if program == "a planted fault":
            found = bool(result["errors"])
            if not found:
                record.update(problems=[f"{tool} did not find the planted fault, so its other results mean nothing"])
            continue
        complete = complete and result["errors"] is not None and result["ended"]
        if result["errors"] is None or not result["ended"]:
            record.update(problems=[f"{tool} of {program} did not come to its end"])
        if result["errors"]:
            record.update(problems=[f"{tool} of {program} found {result['errors']} errors"])
            print("\n".join(result["report"]))
    record.update(valid=found and complete)


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


# ---------------------------------------------------------------------------------------------------------------------
# Stage "bench"
# ---------------------------------------------------------------------------------------------------------------------

MOST_DRIFT = 0.03
FEWEST_ROUNDS = 7  # below that a median is no figure to quote
WARMUP_ROUNDS = 2
SECONDS_A_PART = 4.0
RESERVE_S = 15.0  # for the ceilings at the end


class Sample(NamedTuple):
    """Milliseconds of one call: on the GPU, and of the host to launch it."""

    ms: float
    host_ms: float


Timer = Callable[[Contestant, float], Sample]


class CudaTimer:
    """Times a contestant by CUDA events.

    Before a single call the L2 cache is filled by reading something else (reading, since a cache full of unwritten
    lines would have to be written back in the call's time), and the GPU is kept busy for ``stall_ms``, so that the host
    has launched all of the call before the first of its kernels starts.
    """

    def __init__(self, device: torch.device) -> None:
        flushed = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 1 << 28)
        self.buffer = torch.zeros(flushed // 4, device=device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cycles = 20_000_000
        for _ in range(2):  # the first time also loads the kernel
            self.start.record()
            torch.cuda._sleep(cycles)
            self.end.record()
            self.end.synchronize()
        self.cycles_per_ms = cycles / self.start.elapsed_time(self.end)

    def __call__(self, contestant: Contestant, stall_ms: float) -> Sample:
        state = contestant.prepare()
        if contestant.in_a_row == 1:
            self.buffer.sum()
            torch.cuda._sleep(int(stall_ms * self.cycles_per_ms))
        else:
            torch.cuda.synchronize()
        self.start.record()
        began = time.perf_counter()
        for _ in range(contestant.in_a_row):
            contestant.call(state)
        host_ms = 1e3 * (time.perf_counter() - began)
        self.end.record()
        self.end.synchronize()
        return Sample(self.start.elapsed_time(self.end) / contestant.in_a_row, host_ms / contestant.in_a_row)


def interleave(
    contestants: dict[str, Contestant], timer: Timer, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[Sample]]:
    """Samples of each contestant, who take turns, in an order that changes from round to round.

    After the warm-up come ``rounds`` rounds, or as many as take ``SECONDS_A_PART``, but at least ``FEWEST_ROUNDS``.
    """
    stalls: dict[str, float] = {}
    for name, contestant in contestants.items():
        timer(contestant, 0.0)  # compiles what is compiled at the first call
        stalls[name] = 0.1 + 1.5 * max(timer(contestant, 1.0).host_ms for _ in range(WARMUP_ROUNDS))
    began = clock()
    for name, contestant in contestants.items():
        timer(contestant, stalls[name])
    fitting = int(SECONDS_A_PART / max(clock() - began, 1e-9))
    samples: dict[str, list[Sample]] = {name: [] for name in contestants}
    for number in range(max(FEWEST_ROUNDS, min(rounds, fitting))):
        for name in turn(list(contestants), number):
            samples[name].append(timer(contestants[name], stalls[name]))
    return samples


def turn(names: list[str], number: int) -> list[str]:
    """The order of a round: everyone is first in turn, and before the others as often as behind them."""
    start = number // 2 % len(names)
    order = names[start:] + names[:start]
    return order[::-1] if number % 2 else order


def measure_ceilings(device: torch.device, timer: Timer) -> dict[str, float]:
    """Bytes a second, read and written, of a copy of 1 GiB; FLOPs a second of a bf16 product of 8192 x 8192 numbers."""
    n = 8192
    source, a, b = (torch.randn(size, dtype=torch.bfloat16, device=device) for size in (1 << 29, (n, n), (n, n)))
    target, c = torch.empty_like(source), torch.empty_like(a)
    contestants = {
        "copy": Contestant(lambda _: target.copy_(source)),
        "matmul": Contestant(lambda _: torch.mm(a, b, out=c)),
    }
    for _ in range(200):  # about a third of a second, for the clocks to settle where this load lets them
        contestants["matmul"].call(None)
    medians = {
        name: statistics.median(sample.ms for sample in samples)
        for name, samples in interleave(contestants, timer, 20).items()
    }
    moved = 2 * source.numel() * source.element_size()
    return {
        "copy_bytes_per_s": 1e3 * moved / medians["copy"],
        "matmul_flops_per_s": 1e3 * 2 * n**3 / medians["matmul"],
    }


def drifted(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """A sentence for each ceiling that changed by more than ``MOST_DRIFT``."""
    changes = {name: after[name] / before[name] - 1 for name in before}
    return [
        f"{name} changed by {change:+.1%} during the run; at most {MOST_DRIFT:.0%} is allowed"
        for name, change in changes.items()
        if not abs(change) <= MOST_DRIFT
    ]


def bench(
    record: Record,
    todo: Sequence[Case],
    run: Callable[..., Iterator[dict[str, Any]]],
    ceilings: Callable[[], dict[str, float]],
    clean_up: Callable[[], None],
    limit_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the cases until ``limit_s`` seconds are over, between two measurements of the ceilings.

    Args:
        run: called with a case and ``ceilings``, gives its results (see ``run_case``).
        ceilings: measures them.
        clean_up: called after each case; raises RuntimeError where the GPU is in error.
    """
    deadline = clock() + limit_s
    before = ceilings()
    record.update(results=[{"ceilings": "before", **before}])
    for number, case in enumerate(todo):
        if clock() > deadline - RESERVE_S:
            missed = "; ".join(case.name for case in todo[number:])
            record.update(problems=[f"the time did not do for {missed}"])
            break
        try:
            for result in run(case, ceilings=before):
                wrong = {name: result["left_out"][name] for name in OURS if name in result["left_out"]}
                problems = [f"{case.name}: {name}: {reason}" for name, reason in wrong.items()]
                record.update(results=[result], problems=problems)
                print_result(result)
        except Exception as error:  # the other cases' figures are wanted all the same
            record.update(problems=[f"{case.name}: {_first_line(error)}"])
        try:
            clean_up()
        except RuntimeError as error:  # a process cannot recover from it
            record.update(problems=[f"{case.name} left the GPU in error, and the run ends: {_first_line(error)}"])
            return
    after = ceilings()
    problems = drifted(before, after)
    record.update(results=[{"ceilings": "after", **after}], problems=problems, valid=not problems)


def clean_up() -> None:
    """Let go of what a case held, and wait for the GPU."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def run_case(
    case: Case, *, device: torch.device, timer: Timer, rounds: int, ceilings: dict[str, float]
) -> Iterator[dict[str, Any]]:
    """Hold the contestants to the truth, then time each part of the case.

    Yields:
        One dict a part: the case's and the part's name, bytes, FLOPs and floor; ``times`` by contestant, ``ratios``, by
        backend of ours, of each other contestant's time to its within a round (above 1: ours is faster), and
        ``left_out``: who is not timed, and why.
    """
    torch.manual_seed(0)
    setup = case.build(device)
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name, error_of in setup.errors.items():
        try:
            error = error_of()
        except Exception as failure:  # whatever one of them fails with, the others are to be timed
            left_out[name] = _first_line(failure)
            continue
        if error <= case.allowed:  # a NaN is not
            errors[name] = error
        else:
            left_out[name] = f"wrong: its relative error is {error:.3g}, allowed is {case.allowed:g}"
    for part, contestants in setup.parts.items():
        samples = interleave({name: contestants[name] for name in errors}, timer, rounds) if errors else {}
        floor = case.work[part].floor_ms(ceilings)
        yield {
            "case": case.name,
            "op": case.op,
            "part": part,
            "bytes": case.work[part].bytes,
            "flops": case.work[part].flops,
            "tokens": case.tokens,
            "floor_ms": floor,
            "times": {
                name: {"relative_error": errors[name], **summary(of_one, floor)} for name, of_one in samples.items()
            },
            "ratios": ratios(samples),
            "left_out": left_out,
        }


def summary(samples: Sequence[Sample], floor_ms: float) -> dict[str, Any]:
    """Median, least and greatest of the samples' milliseconds, and the floor as a part of the median."""
    times = [sample.ms for sample in samples]
    median = statistics.median(times)
    return {
        "median_ms": median,
        "min_ms": min(times),
        "max_ms": max(times),
        "host_ms": statistics.median(sample.host_ms for sample in samples),
        "of_floor": floor_ms / median,
        "samples_ms": times,
    }


def ratios(samples: dict[str, list[Sample]]) -> dict[str, dict[str, dict[str, float]]]:
    """By ours and by other contestant: median, least and greatest of its time over ours, taken round by round."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for ours in OURS:
        for name, theirs in samples.items():
            if name != ours and ours in samples:
                values = [their.ms / our.ms for their, our in zip(theirs, samples[ours], strict=True)]
                ratio = {"median": statistics.median(values), "min": min(values), "max": max(values)}
                found.setdefault(ours, {})[name] = ratio
    return found


def print_result(result: dict[str, Any]) -> None:
    rows = []
    for name, times in result["times"].items():
        of_each = [result["ratios"].get(ours, {}).get(name) for ours in OURS]
        rows.append(
            (
                f"  {name}",
                f"{times['median_ms']:.4f} ({times['min_ms']:.4f}, {times['max_ms']:.4f})",
                f"{times['of_floor']:.0%}",
                f"{times['host_ms']:.3f}",
                *(f"{r['median']:.2f}x ({r['min']:.2f}, {r['max']:.2f})" if r else "" for r in of_each),
                f"{1e3 * result['tokens'] / times['median_ms']:,.0f}" if result["tokens"] else "",
            )
        )
    headings = ("ms: median (min, max)", "of ceiling", "host ms", *(f"time / {ours}'s" for ours in OURS), "tokens/s")
    print_table((f"{result['case']}, {result['part']}", *headings), rows)
    for name, reason in result["left_out"].items():
        print(f"  {name} left out: {reason}", flush=True)


if __name__ == "__main__":
    main()
