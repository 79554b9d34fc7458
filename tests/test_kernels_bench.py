"""benchmarks/cpu.py: what it times, judges, writes and refuses."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from fastgpt import dispatch, ops, torch_native
from fastgpt.benchmarks import cpu, machine
from fastgpt.benchmarks.cpu import OURS, Case
from fastgpt.benchmarks.machine import OtherWork

QUICK = ["--quick", "--backend", "torch"]


def test_every_mark_is_in_the_table_and_the_file(tmp_path, capsys):
    cpu.main([*QUICK, "--json", str(tmp_path)])
    printed = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    written = json.loads(path.read_text())
    assert {result["group"] for result in written["results"]} == set(cpu.GROUPS)
    assert {"cpu", "cores", "isa", "torch", "load_before", "load_after", "others_cores"} <= written["machine"].keys()
    for result in written["results"]:
        assert f"{result['case']} " in printed
        assert result["ratio"]["median"] == pytest.approx(result["peer_ms"] / result["ours_ms"])  # of one round
        assert result["reached"] == (None if result["mark"] is None else result["ratio"]["median"] >= result["mark"])
    marked = [result["mark"] for result in written["results"] if result["mark"] is not None]
    assert f" of {len(marked)} marks reached" in printed
    both_attentions = [result["mark"] for result in written["results"] if result["case"].startswith("attention ")]
    assert both_attentions == [2.0, 1.3, 1.5, 1.1, 3.0]
    training = [(result["mark"], len(result["peers"])) for result in written["results"][-3:]]
    assert training == [(2.2, 1), (1.2, 2), (2.5, 1)]


def test_only_the_groups_that_are_named(capsys):
    cpu.main([*QUICK, "--only", "overhead", "adamw_"])
    printed = capsys.readouterr().out
    assert "8 x 64" in printed
    assert "adamw_" in printed
    assert "attention" not in printed


def half_as_much_again(op):
    return lambda *args, **settings: op(*args, **settings) * 1.5


# Where not all results are too large, what else is wrong: the torch backend's dropout scales by another p, say.
FAULTS = {
    "add_layer_norm": (torch_native, "drop", lambda drop: lambda x, keep, p: drop(x, keep, p + 0.3)),
    "dropout": (torch_native, "drop", lambda drop: lambda x, keep, p: drop(x, keep, p + 0.3)),
    "adamw_": (ops, "adamw_", lambda op: lambda *args, lr, **settings: op(*args, lr=lr * 1.1, **settings)),
    "clip_grad_norm_": (ops, "clip_grad_norm_", lambda op: lambda grads, max_norm: op(grads, max_norm * 1.1)),
    "overhead": (ops, "layer_norm", half_as_much_again),
    "training": (ops, "linear_cross_entropy", half_as_much_again),
}


@pytest.mark.parametrize("group", cpu.GROUPS)
def test_a_wrong_kernel_is_not_timed(group, monkeypatch):
    module, name, fault = FAULTS.get(group, (ops, group, half_as_much_again))
    monkeypatch.setattr(module, name, fault(getattr(module, name)))
    monkeypatch.setattr(cpu, "sample_ms", lambda *_: pytest.fail("a wrong kernel was timed"))
    with pytest.raises(SystemExit) as refusal:
        cpu.main([*QUICK, "--only", group])
    assert isinstance(refusal.value.code, str)  # which Python prints before it exits with 1
    assert refusal.value.code.endswith(".")


def test_a_wrong_gradient_is_not_timed_either():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    inputs = cpu.leaves(torch.float32, (4, 8))
    case = cpu.differentiable("case", 1.0, lambda x: torch.exp(Doubled.apply(x)), torch.exp, inputs)
    with pytest.raises(SystemExit, match="case, fp32: our results differ"):
        case.check()
    cpu.differentiable("case", 1.0, torch.exp, torch.exp, inputs).check()


def test_ratios_are_of_rounds_and_the_fastest_peer_counts(monkeypatch):
    times = {
        OURS: [9.0, 2.0, 2.0, 4.0],
        "slow": [9.0, 6.0, 9.0, 8.0],
        "fast": [9.0, 3.0, 4.0, 9.0],
    }  # the first: warm-up
    taken = []

    def next_time(call, seconds):
        taken.append(call())
        return times[call()].pop(0)

    monkeypatch.setattr(cpu, "sample_ms", next_time)
    contestants = {name: partial(str, name) for name in times}
    case = Case("case", contestants, {("slow",): 3.0, ("slow", "fast"): 2.5, ("fast",): None}, lambda: None)
    slow, fastest, unmarked = cpu.run_case(case, 3, 0.0, OtherWork())
    assert (slow["peer"], slow["ratio"], slow["reached"]) == ("slow", {"median": 3.0, "min": 2.0, "max": 4.5}, True)
    assert (fastest["peer"], fastest["ratio"]["median"], fastest["reached"]) == ("fast", 2.0, False)
    assert (fastest["ours_ms"], fastest["peer_ms"]) == (2.0, 4.0)
    assert unmarked["reached"] is None
    assert len({tuple(taken[start : start + 3]) for start in (3, 6, 9)}) == 3  # another order in each round


def test_a_short_call_is_repeated_until_the_sample_is_long_enough():
    calls = []
    start = time.perf_counter()
    mean_ms = cpu.sample_ms(lambda: calls.append(1), 0.02)
    elapsed_ms = 1e3 * (time.perf_counter() - start)
    assert elapsed_ms >= 20
    assert 20 <= mean_ms * len(calls) * (1 + 1e-9) <= elapsed_ms * (1 + 2e-9)
    calls.clear()
    cpu.sample_ms(lambda: calls.append(1), 0.0)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rounds", "6"], "--rounds must be at least 7"),
        (["--backend", "cuda"], "--backend cuda: because of this test"),
        (["--nanogpt", "nowhere"], "there is no model.py in nowhere"),
        (["--only", "attenshun"], "invalid choice: 'attenshun'"),
    ],
)
def test_arguments_that_cannot_be_followed(arguments, reason, capsys, own_table):
    dispatch.mark_absent("cuda", "because of this test")
    with pytest.raises(SystemExit) as refusal:
        cpu.main(arguments)
    assert refusal.value.code == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("others_cores", "said"), [(0.0, "was quiet"), (0.5, "was busy")])
def test_our_own_work_is_not_that_of_others(others_cores, said, monkeypatch):
    clock = iter((10.0, 14.0))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    own = iter((3.0, 10.0))
    monkeypatch.setattr(machine.time, "process_time", lambda: next(own))
    busy = iter((100.0, 107.0 + 4 * others_cores))
    monkeypatch.setattr(machine, "_busy_seconds", lambda: next(busy))
    with OtherWork() as others:
        pass
    assert others.cores == pytest.approx(others_cores)
    assert said in str(others)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the kernel does not tell")
def test_the_kernel_counts_what_we_do():
    """Half a second of work on a core is half a second in /proc/stat, but for a few ticks."""
    before, start = machine._busy_seconds(), time.process_time()
    while time.process_time() - start < 0.5:
        pass
    assert machine._busy_seconds() - before >= 0.45
