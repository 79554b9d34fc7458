"""`fastgpt bench generate`: who generates, which tokens are right, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nanogpt_stub import write_checkout

from fastgpt import GPT, GPTConfig, cli, ops
from fastgpt.benchmarks import generation, result, session
from fastgpt.benchmarks.compare import competitor_of
from fastgpt.benchmarks.generation import Options
from fastgpt.benchmarks.harness import Sample
from fastgpt.benchmarks.models import LADDER
from fastgpt.benchmarks.plain import PlainGPT
from fastgpt.config import TrainConfig, UserError

CPU = torch.device("cpu")
CEILINGS = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": {"fp32": 1e11, "bf16": 2e11}}
CONFIG = GPTConfig(block_size=16, vocab_size=33, n_layer=1, n_head=2, n_embd=16, bias=False, gelu="none")


@pytest.fixture
def nanogpt(tmp_path: Path) -> Path:
    return write_checkout(tmp_path / "nanoGPT")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LADDER, "tiny", (CONFIG, TrainConfig()))
    monkeypatch.setattr(generation, "CASE_SECONDS", 0.0)
    monkeypatch.setattr(generation, "timer_for", lambda _: lambda contestant, stall_ms: timed(contestant))
    monkeypatch.setattr(session, "measure_ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(session, "timer_for", lambda _: None)


def timed(contestant: Any) -> Sample:
    """A clock that counts the tokens that come: 10 ms each."""
    return Sample(10.0 * (contestant.call(None).shape[1] - 3), None)


def options(**settings: Any) -> Options:
    given = {"models": ["tiny"], "batch_sizes": [2], "contexts": [3], "new_tokens": 5, "backends": ["torch"]}
    return Options(CPU, **{**given, **settings})


def test_a_run_has_every_competitor_and_follows_the_schema(tmp_path, nanogpt, monkeypatch, capsys):
    path = tmp_path / "run.json"
    command = (
        "fastgpt bench generate --model tiny --backend torch --backend reference --batch-size 1 --batch-size 2 "
        f"--context 3 --new-tokens 5 --dtype fp32 --dtype bf16 --device cpu --vs nanogpt={nanogpt} --out {path}"
    )
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    data = json.loads(path.read_text())
    assert result.violations(data) == []
    assert (data["kind"], data["complete"], data["valid"]) == ("generate", True, True)
    ours = ["torch", "torch, no cache", "reference", "reference, no cache"]
    assert [competitor_of(row) for row in data["results"]] == [*ours, "nanoGPT"] * 4
    for row in data["results"]:
        assert row["first_token_ms"] == 10.0
        assert set(row["samples_ms"]) == {50.0}
        assert row["tokens_per_s"]["median"] == pytest.approx(100 * row["batch_size"])
        who = competitor_of(row)
        peers = {"torch": {"torch, no cache"}, "reference": {"reference, no cache"}}.get(who, set())
        assert row["ratios"].keys() == (peers | {"nanoGPT"} if who != "nanoGPT" else set())
    printed = capsys.readouterr().out
    assert "torch, no cache" in printed
    assert "tiny, 2 x 3 + 5 tokens, bf16" in printed
    assert "number of parameters" not in printed


def test_a_wrong_kernel_is_refused_and_never_timed(tmp_path, nanogpt, monkeypatch):
    norm = ops.add_layer_norm

    def wrong(*args: Any, **settings: Any) -> Any:
        y, stream = norm(*args, **settings)
        return y.flip(-1), stream

    monkeypatch.setattr(ops, "add_layer_norm", wrong)
    file = generation.run(options(nanogpt=nanogpt), out=tmp_path / "run.json")
    for problem, name in zip(file.data["problems"], ("torch", "torch, no cache"), strict=True):
        assert problem.startswith(f"tiny, 2 x 3 + 5 tokens, fp32: {name}: wrong: it took a token whose logit is ")
    assert [row["competitor"] for row in file.rows] == ["nanoGPT"]


def test_only_the_most_probable_tokens_are_right():
    """Each by what came before it, as near as the dtype can tell."""
    truth = PlainGPT(CONFIG, "fused").eval()
    truth.load_state_dict(GPT(CONFIG).state_dict())
    found = idx = torch.randint(33, (2, 3))
    with torch.no_grad():
        for _ in range(4):
            found = torch.cat([found, truth(found)[0][:, -1].argmax(-1, keepdim=True)], dim=1)

    def judged(tokens: torch.Tensor) -> str | None:
        return generation.wrong_tokens(tokens, idx, truth, torch.float32)

    assert judged(found) is None
    for column in range(3, 7):
        wrong = found.clone()
        wrong[1, column] = (wrong[1, column] + 1) % 33
        assert (judged(wrong) or "").startswith("wrong: it took a token")
    for wrong in (found[:, 1:], found[:, :3], found[:1]):
        assert (judged(wrong) or "").startswith("wrong: what it gave")


def test_a_run_is_resumed(tmp_path):
    given = options(batch_sizes=[1, 2])
    path = tmp_path / "run.json"
    whole = generation.run(given, out=path)
    before = json.loads(path.read_text())
    del before["results"][2:]
    path.write_text(json.dumps(before))
    file = generation.run(given, resume=path)
    assert [row["batch_size"] for row in file.rows] == [1, 1, 2, 2]
    assert file.rows == whole.rows


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"models": ["gpt5"]}, "there is no model 'gpt5'"),
        ({"dtypes": ["fp8"]}, "there is no dtype 'fp8'"),
        ({"batch_sizes": [0]}, "--batch-size must be at least 1"),
        ({"contexts": [-1]}, "--context must be at least 1"),
        ({"new_tokens": 3}, "--new-tokens must be at least 4"),
        ({"rounds": 6}, "--rounds must be at least 7"),
        ({"contexts": [3, 12]}, "--context 12 and 5 new tokens do not fit into the 16 tokens of the smallest model"),
    ],
)
def test_settings_that_cannot_be_followed(settings, said):
    with pytest.raises(UserError, match=said):
        options(**settings)


def test_defaults_fit_their_models():
    assert [case.context for case in generation.cases(Options(CPU, batch_sizes=[1]), ["torch"])] == [16, 64, 192]
    assert Options(CPU, models=["shakespeare-cpu", "shakespeare"]).contexts == [16]
