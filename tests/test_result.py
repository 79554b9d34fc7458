"""The files of the benchmarks: their schema, what they say of the machine, how a run is resumed and refused."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.benchmarks import result
from fastgpt.benchmarks.result import Result
from fastgpt.config import UserError

CPU = torch.device("cpu")
KEPT = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("**/*.json"))

SPREAD = {"median": 2.0, "min": 1.0, "max": 3.0}
MODEL = {"name": "tiny", "parameters": 9, "n_layer": 1, "n_embd": 2, "n_head": 1, "vocab_size": 3}
CEILINGS = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": {"fp32": 1e11, "bf16": 2e11}}
COMPETITOR = {
    "ours": True,
    "relative_error": 0.0,
    "median_ms": 2.0,
    "min_ms": 1.0,
    "max_ms": 3.0,
    "host_ms": None,
    "samples_ms": [1.0, 2.0, 3.0],
    "of_ceiling": 0.5,
    "bytes_per_s": 1e9,
    "flops_per_s": 0,
}
# A row of each kind.
ROWS: dict[str, dict[str, Any]] = {
    "kernels": {
        "op": "softmax",
        "case": "softmax, 8 x 16, fp32",
        "part": "forward",
        "dtype": "fp32",
        "shape": {"M": 8, "N": 16},
        "bytes": 1024,
        "flops": 0,
        "floor_ms": 0.1,
        "competitors": {"cpp": COMPETITOR, "torch eager": {**COMPETITOR, "ours": False}},
        "ratios": {"cpp": {"torch eager": SPREAD}},
        "left_out": {"torch.compile": "wrong: its relative error is 1, allowed is 0.1"},
    },
    "scaling": {
        "model": MODEL,
        "block_size": 8,
        "batch_size": 2,
        "dtype": "bf16",
        "competitor": "cpp",
        "mode": "eager",
        "step_ms": SPREAD,
        "split_ms": {"forward": 1.0, "backward": 1.0, "optimizer": 0.5, "data": 0.0},
        "tokens_per_s": SPREAD,
        "peak_memory_bytes": 1000,
        "flops_per_token": 54,
        "mfu": {"of_peak": None, "of_measured": 0.3},
        "samples_ms": [1.0, 2.0, 3.0],
        "ratios": {"nanoGPT": SPREAD},
    },
    "generate": {
        "model": MODEL,
        "batch_size": 1,
        "context": 8,
        "new_tokens": 4,
        "dtype": "fp32",
        "competitor": "torch",
        "tokens_per_s": SPREAD,
        "first_token_ms": 1.0,
        "samples_ms": [1.0],
    },
    "test": {"file": "test_x.py", "passed": 1, "failed": 0, "skipped": 0, "seconds": 0.5, "failures": []},
    "sanitize": {
        "tool": "memcheck",
        "program": "every op",
        "errors": 0,
        "ended": True,
        "report": [],
        "seconds": 2.0,
    },
}


def made(kind: str, path: Path, **settings: Any) -> Result:
    """A file of this kind with one row."""
    written = Result(path, result.describe(kind, CPU, settings))
    written.update(rows=[copy.deepcopy(ROWS[kind])], ceilings={"before": CEILINGS, "after": None}, complete=True)
    return written


@pytest.mark.parametrize("kind", result.KINDS)
def test_a_file_of_each_kind_follows_the_schema(kind: str, tmp_path: Path) -> None:
    path = made(kind, tmp_path / "new" / "file.json").path
    assert result.violations(result.load(path)) == []
    assert [file.name for file in path.parent.iterdir()] == ["file.json"], "nothing half written is left"


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_every_file_that_is_kept_follows_the_schema(path: Path) -> None:
    assert result.violations(json.loads(path.read_text())) == []


@pytest.mark.parametrize("kind", result.KINDS)
def test_the_schema_sees_what_is_missing_and_what_is_wrong(kind: str, tmp_path: Path) -> None:
    data = made(kind, tmp_path / "file.json").data
    for field in list(data):
        assert result.violations({name: value for name, value in data.items() if name != field}) != [], field
    for field in ROWS[kind]:
        row = {name: value for name, value in ROWS[kind].items() if name != field}
        assert result.violations({**data, "results": [row]}) != [], field
        assert result.violations({**data, "results": [{**ROWS[kind], field: {"no": [None]}}]}) != [], field
    assert result.violations({**data, "extra": 1}) == [
        "$: Additional properties are not allowed ('extra' was unexpected)"
    ]
    assert result.violations({**data, "date": "yesterday"}) != []


def test_what_a_file_says_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTGPT_CPU_ISA", "FASTGPT_HOPPER_ATTENTION"):
        monkeypatch.delenv(name, raising=False)
    about = result.describe("kernels", CPU, {"only": ""}, commit="abc")
    assert about["machine"]["threads"] == torch.get_num_threads()
    assert about["machine"]["memory_bytes"] > 1 << 20
    assert about["machine"]["gpu"] is None
    assert about["versions"]["torch"] == torch.__version__
    assert about["versions"]["nanogpt"] is None
    assert (about["commit"], about["settings"]) == ("abc", {"only": ""})
    monkeypatch.setenv("FASTGPT_CPU_ISA", "avx2")  # other kernels
    assert result.describe("kernels", CPU, {"only": ""})["settings"] == {"only": "", "FASTGPT_CPU_ISA": "avx2"}
    path = result.result_path(about, tmp_path)
    assert path.parent == tmp_path
    assert path.name.startswith("kernels_")
    assert "/" not in path.name
    assert " " not in path.name


def test_what_a_package_is_not_installed_has_no_version() -> None:
    assert result.version_of("no-such-package-of-anyone") is None
    assert result.version_of("numpy") is not None


def test_a_run_is_resumed_where_it_ended(tmp_path: Path) -> None:
    first = made("kernels", tmp_path / "file.json", rounds=7)
    first.update(problems=["the time did not do for gelu"])
    second = Result(first.path, {**result.describe("kernels", CPU, {"rounds": 7}), "date": "later"}, resume=True)
    assert second.rows == first.rows
    assert second.data["date"] == first.data["date"]
    assert second.data["ceilings"] == {"before": CEILINGS, "after": None}
    assert (second.data["problems"], second.data["complete"]) == ([], False)
    assert second.has(case="softmax, 8 x 16, fp32", part="forward")
    assert not second.has(case="softmax, 8 x 16, fp32", part="backward")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"commit": "other"}, "its commit was first, and this one is other"),
        ({"settings": {"rounds": 9}}, "it is of another choice of settings (rounds was 7, and is 9)"),
        ({"machine": {"cpu": "another"}}, "it is of another machine (cpu was "),
        ({"kind": "scaling"}, "its kind of run was kernels, and this one is scaling"),
    ],
)
def test_what_cannot_be_resumed(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    about = result.describe("kernels", CPU, {"rounds": 7}, commit="first")
    path = tmp_path / "file.json"
    Result(path, about).update()
    before = path.read_bytes()
    machine = {**about["machine"], **changes.pop("machine", {})}
    with pytest.raises(UserError) as refusal:
        Result(path, {**about, "machine": machine, **changes}, resume=True)
    assert str(refusal.value).startswith(f"{path} cannot be resumed: {reason}")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "not a JSON file"),
        ("[]", "not a result of fastgpt's benchmarks"),
        ('{"machine": {}}', "not a result of fastgpt's benchmarks"),
        ('{"schema": 1}', "its schema is 1, and this fastgpt reads 2"),
        ('{"schema": 2, "kind": "kernels"}', "not a whole result: it lacks machine, "),
    ],
)
def test_what_is_no_result(tmp_path: Path, content: str | None, reason: str) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as refusal:
        result.load(path)
    assert str(refusal.value).startswith(f"{path}: {reason}")


def test_a_field_that_no_file_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a file has no speed"):
        made("kernels", tmp_path / "file.json").update(speed=1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        made("kernels", tmp_path / "file.json").update(summary={"exponent": float("nan")})


def test_spread() -> None:
    assert result.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert result.spread([4.0, 1.0]) == {"median": 2.5, "min": 1.0, "max": 4.0}


def test_the_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        name = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", *name, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    assert result.commit_of(tmp_path) is None
    git("init", "--quiet")
    assert result.commit_of(tmp_path) is None, "there is none yet"
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "--message", "one")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    assert result.commit_of(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert result.commit_of(tmp_path) == f"{commit}-dirty"
    (tmp_path / "sub").mkdir()
    assert result.commit_of(tmp_path / "sub") is None, "not the checkout itself"
