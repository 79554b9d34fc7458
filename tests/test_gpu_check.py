"""What benchmarks/gpu_check.py does beside the GPU: what it counts, judges, writes and refuses."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import dispatch
from fastgpt.benchmarks import gpu_cases, gpu_check
from fastgpt.benchmarks.gpu_cases import BACKWARD, BF16, BOTH, FORWARD, STEP, Case, Contestant, Setup, Work
from fastgpt.benchmarks.gpu_check import Record, Sample
from fastgpt.config import GPTConfig

pytest_plugins = ["pytester"]

CPU, F32 = torch.device("cpu"), torch.float32
CEILINGS = {"copy_bytes_per_s": 4e12, "matmul_flops_per_s": 8e14}
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "new" / "bench.json", {"stage": "bench", "gpu": "none"})


def written(record: Record) -> dict[str, Any]:
    return json.loads(record.path.read_text())


# What is counted


def test_bytes_and_flops_of_each_case() -> None:
    B, H, T, D = 2, 3, 64, 16
    attention = gpu_cases.attention_case(B, H, T, D).work
    size = B * H * T * D * 2
    assert attention == {
        FORWARD: Work(4 * size, 4 * B * H * T * T * D // 2),  # q, k, v and o; q k^T and p v, the causal half
        BACKWARD: Work(8 * size, 10 * B * H * T * T * D // 2),  # q, k, v, o, do, dq, dk, dv; five products
    }
    assert gpu_cases.softmax_case(10, 7).work == {FORWARD: Work(2 * 140), BACKWARD: Work(3 * 140)}
    assert gpu_cases.layer_norm_case(10, 7).work == {
        FORWARD: Work((70 + 7 + 7 + 70) * 2),
        BACKWARD: Work((70 + 70 + 7 + 70 + 7 + 7) * 2),
    }
    assert gpu_cases.add_layer_norm_case(10, 7, BF16).work == {
        FORWARD: Work((70 + 70 + 7 + 7 + 70 + 70) * 2),
        BACKWARD: Work((70 + 70 + 70 + 7 + 70 + 7 + 7) * 2),  # the gradients of x and residual are one
    }
    assert gpu_cases.add_layer_norm_case(10, 7, F32).work == {
        FORWARD: Work((70 + 70) * 2 + (70 + 70 + 7 + 7) * 4),
        BACKWARD: Work((70 + 70) * 2 + (70 + 70 + 70 + 7 + 7 + 7) * 4),
    }
    assert gpu_cases.gelu_case(10, 7).work == {
        FORWARD: Work((70 + 7 + 70) * 2),
        BACKWARD: Work((70 + 70 + 7 + 70 + 7) * 2),
    }
    assert gpu_cases.cross_entropy_case(10, 7).work == {BOTH: Work(70 * 2 + 10 * 8 + 70 * 2)}
    assert gpu_cases.linear_cross_entropy_case(10, 5, 7).work == {
        BOTH: Work((50 + 35 + 50 + 35) * 2 + 10 * 8, 3 * 2 * 10 * 5 * 7)
    }
    assert gpu_cases.dropout_case(10, 7).work == {FORWARD: Work(280), BACKWARD: Work(280)}
    assert gpu_cases.adamw_case([(3, 5), (2,)]).work == {STEP: Work(17 * (4 + 3) * 4)}
    assert gpu_cases.clip_grad_norm_case([(3, 5), (2,)]).work == {STEP: Work(17 * 3 * 4)}


def test_a_training_step_counts_the_flops_of_its_tokens() -> None:
    config = GPTConfig(block_size=16, vocab_size=64, n_layer=3, n_head=2, n_embd=16)
    case = gpu_cases.training_case(config, 4)
    per_token = 6 * (3 * 12 * 16**2 + 64 * 16) + 12 * 3 * 16 * 16
    assert (case.tokens, case.work) == (64, {STEP: Work(0, 64 * per_token)})


def test_the_floor_is_the_time_of_the_slower_ceiling() -> None:
    assert Work(8 * 10**9).floor_ms(CEILINGS) == pytest.approx(2.0)
    assert Work(8 * 10**9, 4 * 10**12).floor_ms(CEILINGS) == pytest.approx(5.0)


def test_the_cases_are_those_wanted() -> None:
    cases = gpu_cases.cases()
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)
    packed = {"attention_qkvpacked"}  # the same kernels
    assert {case.op for case in cases} == set(dispatch.OPS) - packed | {"training step"}
    for T, D in itertools.product((256, 1024, 4096), (64, 128)):
        (case,) = [case for case in cases if case.op == "attention" and f" T={T} D={D}," in case.name]
        assert case.work.keys() == {FORWARD, BACKWARD}
        assert case.work[FORWARD].bytes == 4 * 16384 * 768 * 2, "16k tokens of 768 numbers"
    for op, widths in (("softmax", (1024, 4096)), ("layer_norm", (768, 1600)), ("add_layer_norm", (768, 1600))):
        for width in widths:
            assert any(case.op == op and f" x {width}, bf16" in case.name for case in cases), (op, width)
    adamw = next(case for case in cases if case.op == "adamw_")
    assert adamw.work[STEP].bytes == 28 * (124_439_808 + 47 * 768), "GPT-2, its vocabulary padded to 50304"


# What is held to the truth


def test_relative_error() -> None:
    true = torch.tensor([3.0, 4.0])
    assert gpu_cases.relative_error(torch.tensor([3.0, 4.5]), true) == pytest.approx(0.1)
    assert gpu_cases.relative_error(true, true) == 0
    assert gpu_cases.relative_error(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 4
    assert gpu_cases.relative_error(torch.zeros(3), true) == math.inf
    assert gpu_cases.largest_error([true, true * 2, true], [true] * 3) == pytest.approx(1)
    nan = torch.tensor([3.0, math.nan])
    for results in ([nan, true], [true, nan]):
        assert gpu_cases.largest_error(results, [true, true]) == math.inf


def tiny_cases() -> list[Case]:
    return [
        gpu_cases.attention_case(2, 1, 9, 16, F32),
        gpu_cases.softmax_case(7, 33, F32),
        gpu_cases.layer_norm_case(7, 33, F32),
        gpu_cases.add_layer_norm_case(7, 33, F32, F32),
        gpu_cases.gelu_case(7, 33, F32),
        gpu_cases.cross_entropy_case(7, 33, F32),
        gpu_cases.linear_cross_entropy_case(7, 16, 33, F32),
        gpu_cases.dropout_case(40, 33, F32),
        gpu_cases.adamw_case([(3, 5), (7,)]),
        gpu_cases.clip_grad_norm_case([(3, 5), (7,)]),
    ]


@pytest.mark.parametrize("case", tiny_cases(), ids=lambda case: case.op)
def test_torch_is_right_and_can_be_timed(case: Case) -> None:
    setup = case.build(CPU)
    assert setup.errors["torch"]() < 1e-5
    assert setup.parts.keys() == case.work.keys()
    for contestants in setup.parts.values():
        assert contestants.keys() == setup.errors.keys() >= {"triton", "cuda", "torch"}
        contestants["torch"].call(contestants["torch"].prepare())


@pytest.mark.full
@pytest.mark.parametrize("case", tiny_cases(), ids=lambda case: case.op)
def test_ours_and_compile_are_right_and_can_be_timed(case: Case) -> None:
    setup = case.build(CPU)
    for name in {"triton", "cuda", "torch.compile", "torch, fused"} & setup.errors.keys():
        assert setup.errors[name]() < 1e-5
        for contestants in setup.parts.values():
            contestants[name].call(contestants[name].prepare())


@pytest.mark.full
def test_the_training_steps_agree() -> None:
    config = GPTConfig(block_size=8, vocab_size=33, n_layer=1, n_head=1, n_embd=16)
    setup = gpu_cases.training_case(config, 2, F32).build(CPU)
    for error_of in setup.errors.values():
        assert error_of() < 1e-6


OUTPUT, GRADIENT = "output", "gradient"
WRONG = [
    (case, what) for case in tiny_cases() for what in (OUTPUT, GRADIENT) if STEP not in case.work or what == OUTPUT
]


@pytest.mark.parametrize(("case", "what"), WRONG, ids=lambda value: value.op if isinstance(value, Case) else value)
def test_a_wrong_result_shows(case: Case, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's place come PyTorch's functions, off by one part in a hundred."""

    def off(op: Callable[..., Any]) -> Callable[..., Any]:
        def spoiled(y: Tensor) -> Tensor:
            return y * 1.01 if what == OUTPUT else y + 0.01 * (y - y.detach())

        def call(*args: Any, backend: str, **options: Any) -> Any:
            if backend != "triton":
                return op(*args, **options, backend=backend)
            outputs = op(*args, **options, backend="torch")
            return tuple(map(spoiled, outputs)) if isinstance(outputs, tuple) else spoiled(outputs)

        return call

    def clip(grads: list[Tensor], max_norm: float, backend: str) -> None:
        torch._foreach_mul_(grads, 1.01 * max_norm / torch.nn.utils.get_total_norm(grads))

    def adamw(params: list[Tensor], lr: float, backend: str, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, 1.01 * lr, **options)

    for name in set(dispatch.OPS) - {"adamw_", "clip_grad_norm_"}:
        monkeypatch.setattr(gpu_cases.ops, name, off(getattr(gpu_cases.ops, name)))
    monkeypatch.setattr(gpu_cases.ops, "clip_grad_norm_", clip)
    monkeypatch.setattr(gpu_cases, "AdamW", adamw)
    assert case.build(CPU).errors["triton"]() == pytest.approx(0.01, rel=0.01)


def test_dropping_too_much_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(x: Tensor, p: float, backend: str) -> Tensor:
        return x * (torch.rand_like(x) >= 1.5 * p) / (1 - p)

    monkeypatch.setattr(gpu_cases.ops, "dropout", too_much)
    assert gpu_cases.dropout_case(40, 33, F32).build(CPU).errors["triton"]() == math.inf


def test_small_calls_cover_every_op_and_repeat_themselves() -> None:
    calls = gpu_cases.small_calls(CPU, F32)
    assert {name.partition(",")[0] for name in calls} == set(dispatch.OPS)
    for name in ("softmax", "adamw_", "dropout", "cross_entropy"):
        for first, second in zip(calls[name](), calls[name](), strict=True):
            assert torch.isfinite(first).all()
            assert torch.equal(first, second), name


@pytest.mark.full
@pytest.mark.parametrize("backend", gpu_cases.OURS)
def test_every_small_call_runs(backend: str) -> None:
    for name, call in gpu_cases.small_calls(CPU, F32, backend=backend).items():
        assert all(torch.isfinite(x).all() for x in call()), name


# How times are taken


class FakeTimer:
    """Gives each contestant's scripted milliseconds, and remembers who was timed with which stall."""

    def __init__(self, ms: dict[str, Iterator[float]], host_ms: float = 0.5) -> None:
        self.ms, self.host_ms = ms, host_ms
        self.log: list[tuple[str, float]] = []

    def __call__(self, contestant: Contestant, stall_ms: float) -> Sample:
        name = contestant.call(contestant.prepare())
        self.log.append((name, stall_ms))
        return Sample(next(self.ms[name]), self.host_ms)


def contestants(*names: str) -> dict[str, Contestant]:
    return {name: Contestant(lambda _, name=name: name) for name in names}


def test_contestants_take_turns() -> None:
    timer = FakeTimer({name: itertools.repeat(1.0) for name in "abc"})
    samples = gpu_check.interleave(contestants(*"abc"), timer, rounds=12, clock=lambda: 0.0)
    assert {name: len(of_one) for name, of_one in samples.items()} == {"a": 12, "b": 12, "c": 12}
    timed = [name for name, _ in timer.log[-36:]]
    rounds = ["".join(timed[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    for first, second in itertools.permutations("abc", 2):
        before = sum(order.index(first) < order.index(second) for order in rounds)
        assert before == 6, f"{first} stands before {second} in {before} of 12 rounds"
    assert {order[0] for order in rounds} == set("abc")


def test_the_first_calls_do_not_count_and_the_stall_covers_the_launching() -> None:
    slow_at_first = itertools.chain([900.0, 90.0, 9.0, 9.0], itertools.repeat(1.0))
    timer = FakeTimer({"a": slow_at_first}, host_ms=2.0)
    samples = gpu_check.interleave(contestants("a"), timer, rounds=8, clock=lambda: 0.0)
    assert [sample.ms for sample in samples["a"]] == [1.0] * 8
    assert timer.log[0] == ("a", 0.0)
    assert all(stall > 2.0 for _, stall in timer.log[-8:])


@pytest.mark.parametrize(("seconds_a_round", "wanted"), [(0.001, 30), (0.4, 10), (60.0, gpu_check.FEWEST_ROUNDS)])
def test_rounds_are_as_many_as_the_time_allows(seconds_a_round: float, wanted: int) -> None:
    now = itertools.count(step=seconds_a_round)
    timer = FakeTimer({"a": itertools.repeat(1.0)})
    samples = gpu_check.interleave(contestants("a"), timer, rounds=30, clock=lambda: next(now))
    assert len(samples["a"]) == wanted


def test_statistics() -> None:
    ours = [Sample(ms, 0.1) for ms in (2.0, 4.0, 3.0)]
    theirs = [Sample(ms, 0.2) for ms in (4.0, 4.0, 9.0)]
    assert gpu_check.summary(ours, 1.5) == {
        "median_ms": 3.0,
        "min_ms": 2.0,
        "max_ms": 4.0,
        "host_ms": 0.1,
        "of_floor": 0.5,
        "samples_ms": [2.0, 4.0, 3.0],
    }
    assert gpu_check.ratios({"triton": ours, "torch": theirs}) == {
        "triton": {"torch": {"median": 2.0, "min": 1.0, "max": 3.0}}
    }
    assert gpu_check.ratios({"torch": theirs}) == {}


def fake_case(errors: dict[str, Callable[[], float]]) -> Case:
    return Case(
        "softmax",
        "a case",
        {FORWARD: Work(4 * 10**9), BACKWARD: Work(8 * 10**9)},
        lambda device: Setup(errors, {part: contestants(*errors) for part in (FORWARD, BACKWARD)}),
        allowed=0.01,
        tokens=1000,
    )


def fails() -> float:
    raise RuntimeError("no such kernel\nand more")


def test_only_who_is_right_is_timed() -> None:
    errors = {
        "triton": lambda: 0.01,
        "torch": lambda: 0.011,
        "other": lambda: math.nan,
        "peer": fails,
        "b": lambda: 0.0,
    }
    timer = FakeTimer({name: itertools.repeat(ms) for name, ms in (("triton", 2.0), ("b", 3.0))})
    rows = list(gpu_check.run_case(fake_case(errors), device=CPU, timer=timer, rounds=7, ceilings=CEILINGS))
    assert {name for name, _ in timer.log} == {"triton", "b"}
    assert [row["part"] for row in rows] == [FORWARD, BACKWARD]
    for row, floor in zip(rows, (1.0, 2.0), strict=True):
        assert row["times"].keys() == {"triton", "b"}
        assert row["floor_ms"] == pytest.approx(floor)
        assert row["times"]["triton"]["of_floor"] == pytest.approx(floor / 2)
        assert row["times"]["triton"]["relative_error"] == 0.01
        assert row["ratios"] == {"triton": {"b": {"median": 1.5, "min": 1.5, "max": 1.5}}}
        assert row["left_out"] == {
            "torch": "wrong: its relative error is 0.011, allowed is 0.01",
            "other": "wrong: its relative error is nan, allowed is 0.01",
            "peer": "RuntimeError: no such kernel",
        }
        json.dumps(row, allow_nan=False)


def test_a_case_where_all_are_wrong_times_nothing() -> None:
    case = fake_case({"triton": lambda: 1.0})
    (row, _) = gpu_check.run_case(case, device=CPU, timer=FakeTimer({}), rounds=7, ceilings=CEILINGS)
    assert (row["times"], row["ratios"]) == ({}, {})


def test_the_table_of_a_case(capsys: pytest.CaptureFixture[str]) -> None:
    errors = {"triton": lambda: 0.0, "torch": lambda: 0.0, "peer": fails}
    timer = FakeTimer({"triton": itertools.repeat(2.0), "torch": itertools.repeat(3.0)})
    (row, _) = gpu_check.run_case(fake_case(errors), device=CPU, timer=timer, rounds=7, ceilings=CEILINGS)
    gpu_check.print_result(row)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a case, forward")
    assert len({len(line) for line in lines[:3]}) == 1, "columns line up"
    one_space = [" ".join(line.split()) for line in lines]
    assert one_space[1] == "triton 2.0000 (2.0000, 2.0000) 50% 0.500 500,000"
    assert one_space[2] == "torch 3.0000 (3.0000, 3.0000) 33% 0.500 1.50x (1.50, 1.50) 333,333"
    assert lines[3] == "  peer left out: RuntimeError: no such kernel"


# The bench stage


def result(case: Case, **left_out: str) -> dict[str, Any]:
    return {"case": case.name, "part": STEP, "times": {}, "ratios": {}, "tokens": 0, "left_out": left_out}


def run_bench(
    record: Record,
    run: Callable[..., Any],
    after: dict[str, float],
    clock: Callable[[], float],
    clean_up: Callable[[], None] = lambda: None,
) -> None:
    measured = iter([CEILINGS, after])
    cases = [fake_case({}), Case("gelu", "another", {}, lambda device: Setup({}, {}))]
    gpu_check.bench(record, cases, run, lambda: next(measured), clean_up, 100.0, clock)


@pytest.mark.parametrize(
    ("factor", "valid"), [(1.0, True), (1.029, True), (0.971, True), (1.031, False), (0.969, False)]
)
@pytest.mark.parametrize("which", list(CEILINGS))
def test_what_counts_as_drift(which: str, factor: float, valid: bool) -> None:
    problems = gpu_check.drifted(CEILINGS, {**CEILINGS, which: CEILINGS[which] * factor})
    assert [problem.partition(" ")[0] for problem in problems] == [which] * (not valid)


@pytest.mark.parametrize(("factor", "problems"), [(1.01, []), (0.9, ["copy_bytes_per_s changed by -10.0%"])])
def test_a_run_whose_ceilings_drift_is_not_valid(record: Record, factor: float, problems: list[str]) -> None:
    after = {**CEILINGS, "copy_bytes_per_s": CEILINGS["copy_bytes_per_s"] * factor}
    run_bench(record, lambda case, ceilings: iter([result(case)]), after, lambda: 0.0)
    data = written(record)
    assert data["valid"] is (not problems)
    assert [problem.partition(" during")[0] for problem in data["problems"]] == problems
    assert data["results"][0] == {"ceilings": "before", **CEILINGS}
    assert data["results"][-1] == {"ceilings": "after", **after}
    assert [row["case"] for row in data["results"][1:-1]] == ["a case", "another"]


def test_a_gpu_in_error_ends_the_run(record: Record) -> None:
    def clean_up() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    run_bench(record, lambda case, ceilings: iter([result(case)]), CEILINGS, lambda: 0.0, clean_up)
    data = written(record)
    assert [row.get("case") for row in data["results"]] == [None, "a case"]
    assert len(data["problems"]) == 1
    assert data["problems"][0].startswith("a case left the GPU in error, and the run ends: RuntimeError: an illegal")
    assert data["valid"] is False


def test_results_are_written_as_they_come(record: Record) -> None:
    seen = []

    def run(case: Case, ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
        seen.append((len(written(record)["results"]), written(record)["valid"]))
        yield result(case)
        seen.append((len(written(record)["results"]), written(record)["valid"]))

    run_bench(record, run, CEILINGS, lambda: 0.0)
    assert seen == [(1, False), (2, False), (2, False), (3, False)]


def test_what_triton_gets_wrong_and_what_fails_are_problems(record: Record) -> None:
    def run(case: Case, ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
        yield result(case, triton="wrong: so much", torch="not asked")
        if case.name == "a case":
            raise RuntimeError("out of memory\nin detail")

    run_bench(record, run, CEILINGS, lambda: 0.0)
    assert written(record)["problems"] == [
        "a case: triton: wrong: so much",
        "a case: RuntimeError: out of memory",
        "another: triton: wrong: so much",
    ]


def test_what_the_time_does_not_do_for_is_named(record: Record) -> None:
    now = itertools.chain([0.0, 50.0], itertools.repeat(99.0))
    run_bench(record, lambda case, ceilings: iter([result(case)]), CEILINGS, lambda: next(now))
    data = written(record)
    assert data["problems"] == ["the time did not do for another"]
    assert [row.get("case") for row in data["results"]] == [None, "a case", None]


def test_the_file_has_the_fields_that_were_agreed(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    about = gpu_check.describe("bench", {"limit_s": 5}, None)
    record = Record(record.path, about)
    record.update(problems=["a problem"])
    data = written(record)
    fields = "schema stage gpu torch triton cuda python commit date settings results problems valid"
    assert list(data) == fields.split()
    assert (data["schema"], data["stage"], data["gpu"], data["settings"]) == (1, "bench", "NVIDIA H100", {"limit_s": 5})
    assert (data["torch"], data["valid"], data["problems"]) == (torch.__version__, False, ["a problem"])
    assert [path.name for path in record.path.parent.iterdir()] == ["bench.json"], "nothing half written is left"


def test_the_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        name = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", *name, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    assert gpu_check.commit_of(tmp_path) is None
    git("init", "--quiet")
    assert gpu_check.commit_of(tmp_path) is None, "there is none yet"
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    assert gpu_check.commit_of(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert gpu_check.commit_of(tmp_path) == f"{commit}-dirty"
    (tmp_path / "sub").mkdir()
    assert gpu_check.commit_of(tmp_path / "sub") is None, "not the checkout itself"


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
    record: Record, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
def test_a_pytest_that_does_not_start_is_a_problem(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_RUN_PYTEST", "import sys; sys.exit('usage: not like this')")
    monkeypatch.setattr(gpu_check, "_PYTEST_ENDED", (0, 5))
    gpu_check.run_tests(record, [Path("x.py")], 5.0, 1)
    data = written(record)
    assert data["problems"] == ["pytest ended with exit code 1 outside of any test: usage: not like this"]
    assert data["valid"] is False


@pytest.mark.usefixtures("impatient")
def test_a_process_that_chose_no_tests_in_time_is_a_problem(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_RUN_PYTEST", "import time; time.sleep(60)")
    gpu_check.run_tests(record, [Path("x.py")], 0.1, 1)
    data = written(record)
    assert data["problems"] == ["a process had not even collected its tests when its time was over"]
    assert data["valid"] is False


@pytest.mark.full
def test_the_test_stage_runs_pytest(record: Record, tmp_path: Path) -> None:
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
        (1, 4, True, [f"memcheck of every {backend} op found 4 errors" for backend in gpu_cases.OURS]),
        (0, 0, False, ["memcheck did not find the planted fault, so its other results mean nothing"]),
        (1, "no", False, [f"memcheck of every {backend} op did not come to its end" for backend in gpu_cases.OURS]),
    ],
)
def test_the_sanitize_stage(
    record: Record,
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


def test_a_sanitizer_that_hangs_is_ended(record: Record, tmp_path: Path) -> None:
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text("#!/bin/sh\nsleep 60\n")
    sanitizer.chmod(0o755)
    result = gpu_check._run_sanitizer(str(sanitizer), "memcheck", ["code"], 0.1)
    assert (result["errors"], result["ended"]) == (None, False)
    assert result["seconds"] < 10


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
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "This needs a GPU" in done.stderr
    assert done.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["fastgpt"], "the links are gone"
