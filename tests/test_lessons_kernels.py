"""The ladders of kernels: what their driver tells, and that the CUDA rungs of softmax keep what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgpt import emulator
from fastgpt.benchmarks.harness import CpuTimer
from fastgpt.config import UserError
from lessons.kernels import command as driver
from lessons.kernels import cuda_rung, show
from lessons.kernels.climb import Outcome, _time, climb
from lessons.kernels.rung import FOLDER, LANGUAGES, Header, Promise, Rung, RungError, ladder, read_rung
from lessons.kernels.tasks import LADDERS, TASKS, Problem

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

README = (FOLDER / "README.md").read_text()
CPU = torch.device("cpu")
FILES = sorted(path for name in LADDERS for path in (FOLDER / name).glob("[0-9][0-9]_*") if path.suffix in LANGUAGES)
CUDA_SOFTMAX = [path for path in FILES if path.parent.name == "softmax" and path.suffix == ".cu"]


def cuda_rungs(name: str) -> list[Rung]:
    return [rung for rung in ladder(name) if rung.language == "cuda"]


@pytest.fixture(autouse=True)
def without_nvcc(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the fast tier, where it would take as long as all else together."""
    if request.node.get_closest_marker("full") is None:
        monkeypatch.setattr(cuda_rung, "find_nvcc", lambda: None)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test builds goes with it; but for the emulator, which takes half a minute."""
    emulator.runtime()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))


@pytest.fixture
def changed(tmp_path: Path, own_cache: None) -> Callable[..., Path]:
    """A softmax rung with something replaced, as a file elsewhere."""

    def change(stem: str, old: str, new: str) -> Path:
        text = (FOLDER / "softmax" / f"{stem}.cu").read_text()
        assert text.count(old) == 1, f"{stem} has {old!r} {text.count(old)} times"
        path = tmp_path / f"{stem}.cu"
        path.write_text(text.replace(old, new))
        return path

    return change


def one(path: Path) -> Outcome:
    (outcome,) = climb([read_rung(path)])
    return outcome


# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_task_takes_the_truth_and_nothing_else(name: str) -> None:
    task = TASKS[name]
    for sizes in (task.counted, *task.others):
        problem = Problem(task, sizes, CPU)
        got = {output: true.to(task.dtypes[output]) for output, true in problem.truth.items()}
        assert problem.judge(got) == []
        for output, y in got.items():
            last = tuple(n - 1 for n in y.shape)
            for value in (y[last] + 3 * problem.allowed[output] + 1e-2, torch.nan):
                damaged = y.clone()
                damaged[last] = value
                (wrong,) = problem.judge({**got, output: damaged})
                assert (wrong.output, wrong.element, wrong.count) == (output, last, 1)
                assert wrong.wanted == problem.truth[output][last].item()


def test_an_output_of_another_shape_or_dtype_is_told() -> None:
    problem = Problem(TASKS["softmax"], {"M": 2, "N": 3}, CPU)
    with pytest.raises(ValueError, match=r"^y is \(3, 2\) in torch.float32, and should be \(2, 3\) in torch.float32$"):
        problem.judge({"y": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"^y is \(2, 3\) in torch.float16"):
        problem.judge({"y": torch.zeros(2, 3, dtype=torch.float16)})


# ---------------------------------------------------------------------------------------------------------------------
# Headers and promises
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_rung_says_what_moves_what_was_wrong_and_what_it_gains(path: Path) -> None:
    header = read_rung(path).header
    assert header.title
    assert {name: bool(text) for name, text in header.parts.items()} == dict.fromkeys(
        ("Moves", "Last rung", "Gains"), True
    )
    assert re.search(r"\d", header.parts["Moves"]), "what moves is counted"
    assert header.promises


def test_a_header_is_read() -> None:
    header = Header.parse(
        "The title.\n\nMoves: 8 bytes\nper element.\n\nLast rung: slow.\n\nGains: all.\n\n"
        "Promise: load sectors <= 0.25 x 01_naive\nPromise: barriers == 0\n"
    )
    assert header.title == "The title."
    assert header.parts == {"Moves": "8 bytes per element.", "Last rung": "slow.", "Gains": "all."}
    assert header.promises == (Promise("load sectors", "<=", 0.25, "01_naive"), Promise("barriers", "==", 0.0))
    assert [str(promise) for promise in header.promises] == ["load sectors <= 0.25 x 01_naive", "barriers == 0"]


@pytest.mark.parametrize("text", ["barriers", "barriers <= many", "barriers = 3", "<= 3", "mma <= 0.5 * 01_naive"])
def test_a_promise_that_cannot_be_read_is_shown(text: str) -> None:
    with pytest.raises(UserError, match=f"^cannot read the promise {re.escape(repr(text))}; one is like"):
        Header.parse(f"The title.\n\nPromise: {text}\n")


@pytest.mark.parametrize(
    ("promise", "kept"),
    [
        ("mma == 4", True),
        ("mma == 5", False),
        ("mma <= 0.5 x 01_a", True),
        ("mma <= 0.4 x 01_a", False),
        ("mma < 0.5 x 01_a", False),
        ("mma >= 4", True),
        ("mma > 4", False),
    ],
)
def test_a_promise_is_held_to_the_counters(promise: str, kept: bool) -> None:
    assert Promise.parse(promise).kept({"01_a": {"mma": 8}, "02_b": {"mma": 4}}, "02_b") is kept


def test_a_promise_of_what_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match=r"^the promise 'mma <= 1 x 00_c' names a rung that is not there; .* 01_a$"):
        Promise.parse("mma <= 1 x 00_c").kept({"01_a": {"mma": 8}}, "01_a")
    with pytest.raises(UserError, match=r"^the promise 'warps == 1' names no counter; there are mma$"):
        Promise.parse("warps == 1").kept({"01_a": {"mma": 8}}, "01_a")


# ---------------------------------------------------------------------------------------------------------------------
# The CUDA ladder of softmax
# ---------------------------------------------------------------------------------------------------------------------


def test_the_ladder_of_softmax_is_right_and_keeps_its_promises() -> None:
    outcomes = {outcome.rung.stem: outcome for outcome in climb(cuda_rungs("softmax"))}
    assert list(outcomes) == [path.stem for path in CUDA_SOFTMAX]
    assert {
        stem: show.details(outcome) for stem, outcome in outcomes.items() if not outcome.good or outcome.uncounted
    } == {}
    for stem, outcome in outcomes.items():
        counts = outcome.counts
        figures = f"| {counts['bytes moved'] / 65536:g} | {counts['load requests']:,} | {counts['barriers']:,} |"
        assert re.search(rf"\| `{stem}` \|[^|]+{re.escape(figures)}\n", README), f"{stem} has {figures}"
    elements = 64 * 1024
    naive, last = outcomes["01_naive"].counts, outcomes["08_package"].counts
    assert (naive["load sectors"], naive["bytes moved"]) == (3 * elements, (3 + 1) * elements * 32)
    assert (last["load sectors"], last["bytes moved"]) == (elements / 8, 2 * elements * 4)


def test_the_first_wrong_element_is_told(changed: Callable[..., Path]) -> None:
    path = changed("04_shuffles", "stg(y + n, ", "stg(y + n, n == 5 ? -1.0f : ")
    outcome = one(path)
    assert not outcome.good
    assert not outcome.right
    assert re.fullmatch(
        r"wrong at M=64 N=1024: y\[0, 5\] is -1 and should be 0\.000\d+, off by at most \S+ \(64 of 65536 elements are "
        r"wrong\)",
        show.details(outcome)[0],
    )


def test_a_race_is_told_in_the_emulators_words(changed: Callable[..., Path]) -> None:
    outcome = one(changed("03_tree", "lds(partial);\n  __syncthreads();\n", "lds(partial);\n"))
    assert outcome.error is not None
    assert re.match(
        r"03_tree\.cu:\d+: race: sts writes shared memory that thread \d+ read at 03_tree\.cu:\d+, and no barrier lies "
        r"between \[kernel softmax_kernel, block",
        outcome.error,
    )


def test_a_rung_that_fails_leaves_the_others_to_be_judged(changed: Callable[..., Path]) -> None:
    """But for promises that name it."""
    path = changed("01_naive", "  float sum = 0.0f;\n", "  float sum = nonsense;\n")
    second = path.with_name("02_coalesced.cu")
    second.write_text(CUDA_SOFTMAX[1].read_text())
    first, other = climb([read_rung(path), read_rung(second)])
    assert first.error is not None
    assert [list(column.cells)[-1] for column in show.table([first, other]).columns] == ["promises kept", "", "2 of 2"]
    assert other.good
    assert [str(promise) for promise in other.promises] == [
        "sectors per load request == 4",
        "sectors per store request == 4",
    ]


def test_an_access_beyond_a_tensor_is_told(changed: Callable[..., Path]) -> None:
    outcome = one(changed("01_naive", "  if (m >= M) return;\n", ""))
    assert outcome.error is not None
    assert re.match(
        r"01_naive\.cu:\d+: ldg: 4 bytes out of the bounds of global memory \(at byte \d+ of x, which has 20020\)",
        outcome.error,
    )


@pytest.mark.full
def test_what_nobody_counts_is_told(changed: Callable[..., Path]) -> None:
    outcome = one(changed("02_coalesced", '#include "tasks.h"', '#include "tasks.h"\n#define ldg *'))
    assert outcome.right
    told = show.details(outcome)
    assert told[0] == "BROKEN: sectors per load request == 4 (it is 0)"
    assert re.fullmatch(
        r"not counted: the kernels were seen to load and store 262144 bytes, and this takes at least 524288: the work "
        r"is to be done by the file's own kernels, in CUDA with ldg and stg, since a plain p\[i\] is not counted",
        told[-1],
    )


def test_what_writes_nothing_is_wrong(changed: Callable[..., Path]) -> None:
    outcome = one(changed("07_registers", "    if (at < N / kCount) stg(results + at, item);\n", ""))
    assert [wrong.got != wrong.got for _, wrong in outcome.wrong] == [True] * 3


def test_a_mistake_is_told_with_its_line(changed: Callable[..., Path]) -> None:
    outcome = one(changed("01_naive", "  float sum = 0.0f;\n", "  float sum = nonsense;\n"))
    assert outcome.error is not None
    assert outcome.error.startswith("01_naive.cu does not compile:\n")
    assert re.search(r"01_naive\.cu:\d+:\d+: error: .*nonsense", outcome.error)


def test_a_rung_is_built_again_where_something_it_reads_has_changed(tmp_path: Path, own_cache: None) -> None:
    (tmp_path / "threads.h").write_text("constexpr int kThreads = 64;\n")
    text = (FOLDER / "softmax" / "01_naive.cu").read_text().replace("constexpr int kThreads = 64;", "")
    path = tmp_path / "own.cu"
    path.write_text(f'#include "{tmp_path}/threads.h"\n{text}')
    rung = read_rung(path)
    made = cuda_rung._compile_for_emulator(rung)
    built = made.stat().st_mtime_ns
    assert cuda_rung._compile_for_emulator(rung).stat().st_mtime_ns == built
    os.utime(tmp_path / "threads.h")
    assert cuda_rung._compile_for_emulator(rung).stat().st_mtime_ns > built


def test_without_nvcc_its_figures_are_missing_and_it_says_so() -> None:
    (outcome,) = climb(cuda_rungs("softmax")[:1])
    assert outcome.missing == "registers are nvcc's to count, which is neither on PATH nor in /usr/local/cuda"
    assert show.details(outcome)[-1] == outcome.missing
    assert outcome.good


@pytest.mark.full
@pytest.mark.skipif(cuda_rung.find_nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".cu"], ids=lambda path: path.stem)
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
def test_nvcc_compiles_it_without_a_spill(
    path: Path, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_rung, "HOPPER", capability)
    found = cuda_rung.resources(read_rung(path))
    assert 16 <= found["registers"] <= 255
    assert found["spilled bytes"] == 0


def test_rungs_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with ceilings of a round number, what would be done on a GPU."""
    ceilings = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": {"fp32": 1e12}}
    monkeypatch.setattr("lessons.kernels.climb.timer_for", lambda device: CpuTimer(0.0, 0))
    monkeypatch.setattr("lessons.kernels.climb.measure_ceilings", lambda *arguments: ceilings)
    outcomes = [Outcome(rung) for rung in cuda_rungs("softmax")[:2]]
    _time(cuda_rung, outcomes, Problem(TASKS["softmax"], {"M": 2, "N": 64}, CPU))
    for outcome in outcomes:
        times = outcome.times
        assert list(times) == ["ms", "GB/s", "of roofline"]
        assert times["ms"] > 0
        assert times["GB/s"] == pytest.approx(2 * 2 * 64 * 4 / times["ms"] / 1e6)
        assert times["of roofline"] == pytest.approx(times["GB/s"])  # of 1 GB/s


def test_of_a_file_only_kernels_that_run_are_counted() -> None:
    names = {
        "_ZN7fastgpt4cuda12_GLOBAL__N_118softmax_fwd_kernelIfLi4EEEvNS_10SoftmaxFwdEb": "softmax_fwd_kernel<float, 4>",
        "_ZN12_GLOBAL__N_114softmax_kernelEPKfPfii": "softmax_kernel",
    }
    assert {symbol: cuda_rung._kernel_name(symbol) for symbol in names} == names


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_shows_a_table_and_draws_the_climb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(path) for path in CUDA_SOFTMAX[:2]]
    assert driver.main([*files, "--out", str(tmp_path / "climb.png")]) == 0
    said = capsys.readouterr().out
    assert re.search(r"load sectors +│ +196,608 │ +24,576", said)
    assert "kept: bytes moved <= 0.125 x 01_naive (it is 1,048,576)" in said
    assert (tmp_path / "climb.png").read_bytes().startswith(b"\x89PNG")


def test_a_broken_promise_is_an_exit_code(changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """In a reader's own file, whose promise names a rung that lies beside it."""
    path = changed("01_naive", "sectors per load request == 32", "sectors per load request <= 4")
    assert driver.main([str(path)]) == 1
    said = capsys.readouterr().out
    assert "BROKEN: sectors per load request <= 4 (it is 32)" in said
    assert "kept: sectors per store request == 32 (it is 32)" in said
    assert re.search("promises kept.*1 of 2", said)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("relu", None, "'relu' is neither a ladder (softmax, layer_norm, attention, all) nor a file"),
        ("own.txt", "", "own.txt is neither CUDA (.cu) nor Triton (.py)"),
        ("own.cu", "// Nothing.\n", 'own.cu has to define (extern "C" void ...) one of softmax, layer_norm'),
        ("own.py", "def relu(x):\n    return x\n", "own.py has to define (def ...) one of softmax, layer_norm"),
        ("own.py", "def softmax(x:\n", "own.py:1: "),
        ("own.cu", "// Title.\n//\n// Promise: fast\n", "cannot read the promise 'fast'; one is like"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str | None,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        body = 'extern "C" void softmax(\n' if "Promise" in text else ""
        Path(name).write_text(text + body)
    with pytest.raises(SystemExit) as exit:
        driver.main([name])
    assert exit.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"python -m lessons.kernels: error: {sentence}")


def test_a_language_that_no_rung_has_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        driver.main([str(CUDA_SOFTMAX[0]), "--only", "triton"])
    assert exit.value.code == 2
    assert "there is no rung in triton among them" in capsys.readouterr().err


def test_a_picture_of_another_kind_is_refused_before_the_climb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        driver.main(["softmax", "--out", "climb.txt"])
    assert exit.value.code == 2
    assert "climb.txt: the picture must be a .png, .svg or .pdf file" in capsys.readouterr().err


@pytest.mark.full
def test_the_command_runs_from_a_checkout(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lessons.kernels", "softmax", "--only", "cuda", "--out", tmp_path / "climb.png"]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"the climb is drawn in {tmp_path}/climb.png" in done.stdout


def test_a_kernel_that_takes_the_process_down_is_told(changed: Callable[..., Path]) -> None:
    path = changed("01_naive", "  if (m >= M) return;\n", "  if (m >= M) return;\n  y[1LL << 40] = 0.0f;\n")
    command = [sys.executable, "-m", "lessons.kernels", path]
    done = subprocess.run(command, cwd=FOLDER.parents[1], capture_output=True, text=True)
    assert done.returncode == 1
    assert "a kernel took the process down (SIGSEGV)" in done.stderr


def test_a_numbered_file_beside_the_readers_may_be_no_rung(changed: Callable[..., Path]) -> None:
    path = changed("03_tree", "Softmax, rung 3", "Softmax")
    path.with_name("01_notes.py").write_text("notes = []\n")
    assert "02_coalesced" in read_rung(path).neighbours()


def test_an_error_of_a_rung_is_no_crash() -> None:
    rung = cuda_rungs("softmax")[6]
    with pytest.raises(RungError, match=r"^rows of more than 4096 elements do not fit into registers$"):
        cuda_rung.run(rung, Problem(rung.task, {"M": 1, "N": 5000}, CPU))
