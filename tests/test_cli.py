"""The command, run as a process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import preferred_on_cpu

from fastgpt import cli, dispatch
from fastgpt.checkpoint import load_model
from fastgpt.config import BigramConfig, GPTConfig, TrainConfig, field_types
from fastgpt.metrics import read_metrics

TINY = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=16", "--batch-size=4", "--eval-iters=2"]
SHORT = [*TINY, "--max-iters=12", "--eval-interval=5", "--final-eval-iters=4", "--log-interval=2", "--sample-tokens=40"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder to run in, with a text and a cache of its own and no Tiny Shakespeare."""
    (tmp_path / "text.txt").write_text("to be, or not to be: that is the question.\n" * 60)
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTGPT_DATA", raising=False)
    monkeypatch.delenv("FASTGPT_BACKEND", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fastgpt(*args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "fastgpt", *args], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )


def succeed(*args: str, **env: str) -> str:
    result = fastgpt(*args, **env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fail(*args: str, **env: str) -> str:
    """The one line of a user's error."""
    result = fastgpt(*args, **env)
    return the_one_line(result.returncode, result.stdout, result.stderr)


def the_one_line(code: int, out: str, err: str) -> str:
    assert code == 2, (out, err)
    assert err.count("\n") == 1, err
    assert err.startswith("fastgpt: ")
    assert "Traceback" not in out + err
    return err


@pytest.fixture
def here(monkeypatch, capfd):
    """Runs the command in this process, for starting one takes seconds: (exit code, stdout, stderr)."""

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastgpt", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return (ended.value.code, *capfd.readouterr())

    return run


@pytest.fixture
def succeed_here(here):
    def run(*args: str) -> str:
        code, out, err = here(*args)
        assert code == 0, err
        return out

    return run


@pytest.fixture
def fail_here(here):
    return lambda *args: the_one_line(*here(*args))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, and what training printed."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text("to be, or not to be: that is the question.\n" * 60)
    run = folder / "run"
    out = succeed(
        "train", "--data", str(folder / "text.txt"), "--out", str(run), "--device=cpu", *SHORT,
        FASTGPT_CACHE=str(folder / "cache"),
    )  # fmt: skip
    return run, out, str(folder / "cache")


def test_train_prints_what_a_reader_wants_to_know(trained):
    run, out, _ = trained
    assert re.search(r"train loss\W+\d\.\d{4}\W+over 4 batches", out)
    assert re.search(r"validation loss\W+\d\.\d{4}\W+over 4 batches", out)
    assert re.search(r"[\d,]+ tokens/s", out)
    assert f"on cpu, fp32, ops on {preferred_on_cpu()}" in out
    assert f"checkpoint: {run}/checkpoints/step-00000012" in out
    sample = out.split("a sample:")[1].split("run, 12 steps")[0].strip()
    assert len(sample) >= 30
    assert [line["step"] for line in read_metrics(run) if line["split"] == "val"] == [0, 5, 10, 12]


def test_sample_streams_the_prompt_and_what_follows(trained, succeed_here):
    run, _, _ = trained
    args = ["sample", str(run), "--prompt", "to be", "--num-tokens=30", "--device=cpu"]
    first = succeed_here(*args, "--seed=1")
    assert first.startswith("to be")
    assert len(first) == len("to be") + 30 + 1
    assert succeed_here(*args, "--seed=1") == first
    two = succeed_here(*args, "--seed=2", "--num-samples=2", "--top-p=0.9").split("-" * 40 + "\n")
    assert len(two) == 2
    assert len({first, *two}) == 3


def test_attention_draws_the_head_that_was_asked_for(trained, succeed_here, fail_here, tmp_path):
    run, _, _ = trained
    args = ["attention", str(run), "--prompt", "to\\nbe", "--out", str(tmp_path / "maps"), "--device=cpu"]
    assert succeed_here(*args, "--layer=0", "--head=1") == f"{tmp_path}/maps/layer-00-head-01.png\n"
    assert (tmp_path / "maps" / "layer-00-head-01.png").read_bytes().startswith(b"\x89PNG")
    assert "head must be from 0 to 1, the last of this model, got 2" in fail_here(*args, "--head=2")


def test_samples_of_several_prompts_come_whole_and_stop(trained, succeed_here):
    run, _, _ = trained
    args = ["sample", str(run), "--num-tokens=30", "--device=cpu", "--dtype=fp32", "--top-k=1"]
    alone = [succeed_here(*args, "--prompt", prompt) for prompt in ("to be", "question")]
    both = succeed_here(*args, "--prompt=to be", "--prompt=question")
    assert both.split("-" * 40 + "\n") == alone
    assert succeed_here(*args, "--prompt=to be", "--prompt=question", "--no-cache") == both
    stop = alone[0][10:13]
    until = alone[0][5:].index(stop) + 5
    assert succeed_here(*args, "--prompt=to be", "--stop", stop.replace("\n", "\\n")) == alone[0][:until] + "\n"
    other = succeed_here(*args, "--prompt=to be", "--repetition-penalty=5")
    assert other != alone[0]
    assert len(succeed_here(*args, "--prompt=to be", "--dtype=bf16")) == len(alone[0])


def test_sample_comes_character_by_character(trained):
    run, _, _ = trained
    command = [sys.executable, "-m", "fastgpt", "sample", str(run), "--num-tokens=100000", "--device=cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert len(process.stdout.read(20)) == 20  # long before all 100,000 are drawn
    process.stdout.close()
    assert process.wait(timeout=30) == 1  # its reader has gone
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()


def test_eval_repeats_the_runs_last_losses(trained, succeed_here, monkeypatch):
    run, out, cache = trained
    monkeypatch.setenv("FASTGPT_CACHE", cache)
    result = json.loads(succeed_here("eval", str(run), "--json", "--checkpoint=last", "--device=cpu"))
    assert result["step"] == 12
    assert result["batches"] == 4
    assert f"{result['val']:.4f}" in out
    assert f"{result['train']:.4f}" in out
    table = succeed_here("eval", str(run), "--eval-iters=2", "--device=cpu")
    assert "perplexity" in table


def test_explain_names_every_backend_and_why():
    rows = json.loads(succeed("explain", "--json", "--device=cpu"))["ops"]
    assert len(rows) == 11
    for row in rows:
        assert row["backend"] == preferred_on_cpu()
        assert set(row["others"]) == set(dispatch.BACKENDS) - {row["backend"]}
        for reason in row["others"].values():
            assert len(reason.split()) > 3
    table = succeed("explain", "--device=cpu", FASTGPT_BACKEND="reference,softmax=torch", COLUMNS="150")
    assert "chosen by FASTGPT_BACKEND" in table
    assert "in the emulator, built with CUDA's headers in" in " ".join(table.split())
    for row in rows:
        assert row["op"] in table


def test_resume_continues_to_more_steps(home, succeed_here):
    succeed_here("train", "--data=text.txt", "--out=run", "--device=cpu", *SHORT)
    out = succeed_here("train", "--resume", "--out=run", "--max-iters=20", "--device=cpu")
    assert "run, 20 steps" in out
    steps = [line["step"] for line in read_metrics(Path("run")) if line["split"] == "val"]
    assert steps == [0, 5, 10, 12, 15, 20]


def test_settings_from_toml_and_flags_over_them(home, succeed_here):
    Path("small.toml").write_text(
        'preset = "shakespeare-cpu"\ndata = "text.txt"\n[model]\nn_layer = 1\nn_head = 2\nn_embd = 16\n'
        "block_size = 16\nbias = true\n[train]\nmax_iters = 3\nbatch_size = 2\neval_iters = 1\nfinal_eval_iters = 1\n"
        "lr = 1\n"
    )
    succeed_here(
        "train", "--config=small.toml", "--out=run", "--lr=0.01", "--no-bias", "--sample-tokens=0", "--device=cpu"
    )
    settings = json.loads(Path("run/config.json").read_text())
    assert settings["model"]["n_embd"] == 16
    assert settings["model"]["bias"] is False
    assert settings["train"]["max_iters"] == 3
    assert settings["train"]["lr"] == 0.01
    assert settings["train"]["beta2"] == 0.99  # the preset's
    assert settings["train"]["data"] == str(home / "text.txt")  # found from any folder


def test_help_lists_every_field_with_its_type(succeed_here, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = succeed_here("train", "--help")
    for config in (TrainConfig, GPTConfig, BigramConfig):
        for name, kind in field_types(config).items():
            flag = "--" + name.replace("_", "-")
            line = next(line for line in text.splitlines() if re.match(rf"[^\w-]*{flag}\s", line))
            if kind in (int, float, str, bool):
                assert kind.__name__ in line.lower(), line


def test_without_shakespeare_one_line_says_so_and_the_run_goes_on(home):
    out = succeed(
        "train", "--out=run", "--device=cpu", "--block-size=8", "--preset=bigram", "--max-iters=2", "--eval-iters=1",
        "--final-eval-iters=1", "--sample-tokens=0", https_proxy="http://127.0.0.1:9",
    )  # fmt: skip
    assert len(re.findall("Tiny Shakespeare cannot be had .* standard library instead", out)) == 1
    assert "data stdlib" in out
    assert json.loads(Path("run/config.json").read_text())["train"]["data"] == "stdlib"


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_endless_run() -> subprocess.Popen:
    command = [sys.executable, "-m", "fastgpt", "train", "--data=text.txt", "--out=run", "--device=cpu", *TINY]
    return subprocess.Popen(
        [*command, "--max-iters=1000000", "--eval-interval=20"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_ends_cleanly(home, signum):
    process = start_endless_run()
    wait_for(home / "run" / "checkpoints.json", process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    step = int(re.search(r"stopped at step (\d+), saved in run/checkpoints/step-0*\1\n", out)[1])
    assert load_model(home / "run", "last")[3].step == step
    assert "fastgpt train --resume --out run" in out


def test_a_killed_run_leaves_its_checkpoint_and_goes_on(home):
    process = start_endless_run()
    wait_for(home / "run" / "checkpoints.json", process)
    time.sleep(0.5)
    process.kill()
    process.communicate()
    step = load_model(home / "run", "last")[3].step
    assert step % 20 == 0
    goal = str(step + 3)
    assert f"run, {goal} steps" in succeed("train", "--resume", "--out=run", f"--max-iters={goal}", "--device=cpu")


def test_a_diverging_run_is_one_line_and_exit_code_1(home):
    result = fastgpt("train", "--data=text.txt", "--out=run", "--device=cpu", "--lr=1e30", "--grad-clip=0", *SHORT)
    assert result.returncode == 1
    assert re.fullmatch(r"fastgpt: the loss became (nan|inf) at step \d+, so .*\n", result.stderr)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["train", "--preset=gpt5"], "'gpt5' is not one of 'bigram', 'shakespeare-cpu'"),
        (["train", "--n-layers=3"], "No such option: --n-layers"),
        (["train", "--n-layer=three"], "Invalid value for '--n-layer'"),
        (["train", "--dropout=1.5"], "dropout must be in [0, 1), got 1.5"),
        (["train", "--preset=bigram", "--n-layer=3"], "this preset's model has no n_layer"),
        (["train", "--backend=fast"], "--backend: unknown backend 'fast'; the backends are reference, torch"),
        (["train", "--device=cuda:7"], "device cuda:7 is not there"),
        (["train", "--resume"], "--resume needs --out DIR"),
        (["train", "--resume", "--out=nowhere"], "nowhere: there is no run in this folder"),
        (["train", "--checkpoint=last"], "--checkpoint goes with --resume"),
        (["train", "--keep=0"], "keep must be at least 1, got 0"),
        (["train", "--checkpoint-interval=-1"], "checkpoint_interval must be at least 0, got -1"),
        (["train", f"--max-iters={10**20}"], "max_iters must be less than 2^31"),
        (["train", "--data=missing.txt"], "missing.txt: cannot be read: No such file or directory"),
        (["train", "--data=binary"], "binary: not a UTF-8 text (byte 0"),
        (["train", "--data=empty"], "empty: there is no text in it"),
        (["train", "--data=text.txt", "--block-size=100000"], "too short: its training split has"),
        (["train", "--config=missing.toml"], "missing.toml: cannot be read"),
        (["train", "--config=bad.toml"], "bad.toml: unknown setting 'n_leyer': did you mean 'n_layer'?"),
        (["train", "--config=typed.toml"], "n_layer must be a whole number, got 'three'"),
        (["train", "--config=text.txt"], "text.txt: not a TOML file"),
        (["train", "--config=preset.toml"], "there is no preset ['a']"),
        (["train", "--config=device.toml"], "device must be auto, cpu, cuda or cuda:N, got 3"),
        (["train", "--config=tables.toml"], "tables.toml: unknown setting 'n_layer' in [train]"),
        (["train", "--config=twice.toml"], "twice.toml: 'n_layer' is set twice"),
        (["train", "--out=empty"], "empty"),
        (["train", "--out=empty/x"], "empty"),
        (["train", "--data="], "data must be shakespeare, stdlib, or a text file or folder, got ''"),
        (["train", f"--seed={10**20}"], "seed must be less than 2^63"),
        (["sample", "nowhere", f"--seed={10**20}"], "Invalid value for '--seed'"),
        (["sample", "nowhere"], "nowhere: there is no such file or folder"),
        (["sample"], "Missing argument 'DIR'"),
        (["eval", "nowhere"], "nowhere: there is no such file or folder"),
        (["explain", "--device=tpu"], "device must be auto, cpu, cuda or cuda:N"),
        (["teach"], "No such command 'teach'"),
    ],
)
def test_a_users_error_is_one_line(home, args, sentence, fail_here):
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("empty").touch()
    Path("bad.toml").write_text("n_leyer = 3\n")
    Path("typed.toml").write_text('n_layer = "three"\n')
    Path("preset.toml").write_text('preset = ["a"]\n')
    Path("device.toml").write_text("device = 3\n")
    Path("tables.toml").write_text("[train]\nn_layer = 1\n")
    Path("twice.toml").write_text("n_layer = 2\n[model]\nn_layer = 3\n")
    data = [] if any(arg.startswith("--data") for arg in args) or args[0] != "train" else ["--data=text.txt"]
    assert sentence in fail_here(*args, *data)
    assert not Path("runs").exists()


def test_a_backend_that_is_not_there_is_one_line(home, fail_here, own_table):
    dispatch.mark_absent("cuda", "because of this test")
    error = fail_here("train", "--data=text.txt", "--backend=cuda", "--device=cpu")
    assert "backend 'cuda' cannot run attention here: because of this test" in error


def test_a_users_error_about_a_run_is_one_line(trained, fail_here):
    run, _, _ = trained
    assert "does not have 'Z'" in fail_here("sample", str(run), "--prompt=Z", "--device=cpu")
    assert "temperature must be at least 0" in fail_here("sample", str(run), "--temperature=-1", "--device=cpu")
    assert "a prompt must have at least one" in fail_here("sample", str(run), "--prompt=", "--device=cpu")
    assert "a stop string must have at least one" in fail_here("sample", str(run), "--stop=", "--device=cpu")
    assert "repetition-penalty must be greater than 0" in fail_here("sample", str(run), "--repetition-penalty=0")
    assert "Invalid value for '--dtype'" in fail_here("sample", str(run), "--dtype=fp8")
    assert "a run lies here already" in fail_here("train", "--data", str(run.parent / "text.txt"), "--out", str(run))
    assert "cannot change when a run is resumed: it is 1" in fail_here(
        "train", "--resume", "--out", str(run), "--n-layer=2"
    )


def test_a_users_error_in_a_process_is_one_line(home):
    assert "No such option: --n-layers" in fail("train", "--n-layers=3")
    assert "dropout must be in [0, 1), got 1.5" in fail("train", "--dropout=1.5")


def test_a_wrong_fastgpt_backend_is_one_line(home):
    assert "FASTGPT_BACKEND: unknown backend 'fast'" in fail("explain", FASTGPT_BACKEND="fast")
    assert "FASTGPT_BACKEND: unknown backend 'fast'" in fail("train", "--data=text.txt", *SHORT, FASTGPT_BACKEND="fast")


def test_a_cache_that_cannot_be_written_is_one_line(home, fail_here, monkeypatch):
    monkeypatch.setenv("FASTGPT_CACHE", str(home / "text.txt"))
    assert "text.txt" in fail_here("train", "--data=text.txt", *SHORT)


def test_too_large_a_model_is_one_line(home, here):
    code, _, err = here("train", "--data=text.txt", "--out=run", "--n-embd=16000000", "--n-head=1", "--device=cpu")
    assert (code, err) == (1, "fastgpt: out of memory: the model or the batch is too large for this machine\n")


def test_a_vocabulary_larger_than_the_datas_trains_and_samples(home, succeed_here):
    options = ["--data=text.txt", "--out=run", "--device=cpu", "--vocab-size=500", *SHORT]
    assert "a sample:" in succeed_here("train", *options, "--max-iters=1")


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", succeed("--version"))


def test_a_text_without_new_lines_trains_and_samples(home, succeed_here):
    Path("line.txt").write_text("abc" * 500)
    assert "a sample:" in succeed_here("train", "--data=line.txt", "--out=run", "--device=cpu", *SHORT)
    assert succeed_here("sample", "run", "--num-tokens=5", "--device=cpu").startswith("a")
