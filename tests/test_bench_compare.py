"""`fastgpt bench compare`: a slowdown is found, and noise is not taken for one."""

import functools
import time

import bench_samples as samples
import pytest
import torch

from fastgpt.benchmarks.cases import Case, Work
from fastgpt.benchmarks.compare import ALIKE, REFUSED, UNKNOWN, compare
from fastgpt.benchmarks.harness import Contestant, timer_for
from fastgpt.benchmarks.kernels import run_case
from fastgpt.benchmarks.machine import OtherWork
from fastgpt.benchmarks.result import violations
from fastgpt.config import UserError


def slower(comparison):
    return {(change.task.partition(",")[0], change.competitor) for change in comparison.regressions}


def cut(data, rounds):
    """With fewer samples."""
    for row in data["results"]:
        for one in row["competitors"].values():
            one["samples_ms"] = one["samples_ms"][:rounds]
    return data


@pytest.mark.parametrize("data", [samples.kernels(), samples.scaling(), samples.generate()], ids=lambda d: d["kind"])
def test_samples_follow_the_schema(data):
    assert violations(data) == []


@pytest.mark.parametrize("drift", [0.85, 1.0, 1.15])
def test_a_slowdown_of_one_op_by_20_percent_is_found_whatever_the_machine_does(drift):
    slowed = samples.kernels(2, slowed={("softmax", "cpp"): 1.2}, drift=drift)
    comparison = compare(samples.kernels(1), slowed)
    assert slower(comparison) == {("softmax", "cpp")}
    assert len(comparison.regressions) == sum(row["op"] == "softmax" for row in slowed["results"])
    for change in comparison.regressions:
        assert change.beside_peers == pytest.approx(1.2, rel=0.06)
        assert change.slowdown == pytest.approx(1.2 * drift, rel=0.06)
    assert comparison.improvements == []


class Sleepers:
    """A case's competitors, ours and a peer, which do nothing for some seconds."""

    def __init__(self, ours, peer):
        self.seconds = {"torch": ours, "torch eager": peer}

    def names(self):
        return list(self.seconds)

    def check(self, name):
        return 0.0

    def contestant(self, name, part):
        return Contestant(lambda _: time.sleep(self.seconds[name]))


def measured(**ours):
    """A file of rows that the harness has really timed: seconds of ours, by op; the peer's are 0.02."""
    others, rows = OtherWork(), []
    for op, seconds in ours.items():
        build = functools.partial(lambda seconds, device: Sleepers(seconds, 0.02), seconds)
        case = Case(op, op, {"M": 1}, "fp32", {"forward": Work(1000)}, build)
        cpu = torch.device("cpu")
        times = {"timer": timer_for(cpu, 0.0), "rounds": 9, "seconds": 5.0}
        outcome = run_case(case, samples.CEILINGS, others, device=cpu, absent={}, **times)
        rows += [{**row, "left_out": outcome.left_out} for row in outcome.rows]
    return samples.about("kernels", results=rows)


def test_a_slowdown_is_found_between_two_runs_of_the_harness():
    old, new = measured(softmax=0.02, gelu=0.02), measured(softmax=0.024, gelu=0.02)
    assert violations(new) == []
    assert slower(compare(old, new)) == {("softmax", "torch")}


def test_a_speedup_is_told_from_a_slowdown():
    comparison = compare(samples.kernels(1, slowed={("gelu", "cpp"): 1.3}), samples.kernels(2))
    assert comparison.regressions == []
    assert {change.task.partition(",")[0] for change in comparison.improvements} == {"gelu"}


@pytest.mark.parametrize(("noise", "most"), [(0.03, 0), (0.06, 1), (0.2, 4)])
def test_noise_is_not_reported(noise, most):
    comparisons = [
        compare(samples.kernels(seed, noise=noise), samples.kernels(100 + seed, noise=noise)) for seed in range(6)
    ]
    assert sum(len(comparison.changes) for comparison in comparisons) > 1000
    assert sum(len(comparison.regressions) for comparison in comparisons) <= most


def test_a_rule_without_the_spread_would_report_noise(monkeypatch):
    """So that the test above can fail."""
    monkeypatch.setattr("fastgpt.benchmarks.compare._quartiles", lambda values: (1.0, 0.0, 0.0))
    assert compare(samples.kernels(1, noise=0.2), samples.kernels(2, noise=0.2)).regressions != []


def test_the_threshold_is_the_least_change_that_counts():
    runs = samples.kernels(1, noise=0.01), samples.kernels(2, noise=0.01, slowed={("gelu", "cpp"): 1.2})
    assert slower(compare(*runs, threshold=0.1)) == {("gelu", "cpp")}
    assert slower(compare(*runs, threshold=0.3)) == set()


def test_what_peers_do_is_drift_and_no_regression():
    peers = {(op, peer): 1.5 for op in ("attention", "softmax", "gelu") for peer in (*samples.PEERS, *samples.SDPA)}
    comparison = compare(samples.kernels(1), samples.kernels(2, slowed=peers))
    assert comparison.regressions == []
    assert any("The drift of the run" in note for note in comparison.notes)


def test_without_the_same_peers_times_alone_are_compared():
    new = samples.kernels(2, slowed={("gelu", "cpp"): 1.2})
    new["versions"]["torch"] = "2.14.0"
    comparison = compare(samples.kernels(1), new)
    assert slower(comparison) == {("gelu", "cpp")}
    assert {change.beside_peers for change in comparison.changes} == {None}
    assert comparison.notes[0].startswith("torch was 2.13.0 and is 2.14.0")


def test_a_kernel_that_became_wrong_is_reported_with_its_error():
    new = samples.leave_out(samples.kernels(2), "gelu", "cpp", "wrong: its relative error is 0.3, allowed is 0.02")
    comparison = compare(samples.kernels(1), new)
    assert slower(comparison) == {("gelu", "cpp")}
    assert {change.verdict for change in comparison.regressions} == {REFUSED}
    assert "its relative error is 0.3" in comparison.regressions[0].in_words()


def test_a_training_step_that_became_wrong_is_reported_with_its_error():
    """All dtypes of a case take turns together, so that who is left out has the dtype in the name."""
    new = samples.scaling(2)
    new["results"] = [row for row in new["results"] if (row["competitor"], row["mode"]) != ("cpp", "eager")]
    for row in new["results"]:
        row["left_out"] = {"cpp, eager, bf16": "wrong: at step 1", "torch, eager, fp32": "wrong: another dtype's"}
    comparison = compare(samples.scaling(1), new)
    assert {(change.competitor, change.verdict) for change in comparison.regressions} == {("cpp, eager", REFUSED)}


@pytest.mark.parametrize(("slowed", "agree"), [(1.0, 96), (1.2, 92)])
def test_it_is_said_how_many_ratios_to_peers_agree(slowed, agree):
    """In 4 of 96 times gelu's is another."""
    new = samples.kernels(2, noise=0.01, slowed={("gelu", "cpp"): slowed}, drift=1.3)
    sentences = compare(samples.kernels(1, noise=0.01), new).sentences()
    assert f"Beside their peers {agree} of 96 agree within 10%." in sentences


def test_too_few_samples_are_said_to_be_too_few():
    comparison = compare(cut(samples.kernels(1), 4), cut(samples.kernels(2, slowed={("gelu", "cpp"): 3.0}), 4))
    assert {change.verdict for change in comparison.changes} == {UNKNOWN}
    assert any("too few to tell" in sentence for sentence in comparison.sentences())


def test_scaling_and_generation_are_compared_too():
    comparison = compare(samples.scaling(1), samples.scaling(2, slowed=1.2))
    assert {change.competitor for change in comparison.regressions} == {"cpp, eager", "cpp, compile"}
    assert {change.verdict for change in compare(samples.generate(1), samples.generate(2)).changes} == {ALIKE}


def test_rows_of_one_file_alone_are_counted():
    new = samples.kernels(2)
    new["results"] = [row for row in new["results"] if row["op"] != "attention"]
    assert "8 rows are in the old file only." in compare(samples.kernels(1), new).sentences()


@pytest.mark.parametrize(
    ("new", "sentence"),
    [
        (samples.scaling(), "a kernels file and a scaling file have nothing to compare"),
        (samples.kernels(machine=samples.machine(cpu="Another CPU")), "these are two machines .cpu: Some CPU 7000"),
        (samples.about("kernels"), "the two files have no time of the same thing"),
    ],
)
def test_what_cannot_be_compared_is_refused(new, sentence):
    with pytest.raises(UserError, match=sentence):
        compare(samples.kernels(), new)


def test_files_without_times_are_refused():
    row = {"file": "test_x.py", "passed": 1, "failed": 0, "skipped": 0, "seconds": 1.0, "failures": []}
    tests = samples.about("test", results=[row])
    with pytest.raises(UserError, match="a file of kind 'test' has no times to compare"):
        compare(tests, tests)


def test_the_command_names_what_became_slower_and_exits_with_1(command, tmp_path):
    old = samples.save(tmp_path / "old.json", samples.kernels(1))
    new = samples.save(tmp_path / "new.json", samples.kernels(2, slowed={("softmax", "cpp"): 1.2}))
    code, out, _ = command("bench", "compare", old, new)
    assert code == 1
    assert out.count("slower: softmax, ") == 4
    assert out.count("slower: ") == 4
    assert "Of 96 times of ours, 4 became slower and 0 faster" in out
    assert command("bench", "compare", old, old)[0] == 0
    refused = command("bench", "compare", old, new, "--threshold", "0")
    assert refused == (2, "", "fastgpt: --threshold must be greater than 0, got 0\n")
