import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from fastgpt import GPT, GPTConfig, distributed, use_backend
from fastgpt import train as training
from fastgpt.checkpoint import find_checkpoint, load_model
from fastgpt.config import TrainConfig, UserError
from fastgpt.distributed import World
from fastgpt.metrics import read_metrics
from fastgpt.optim import build_optimizer, gradients
from fastgpt.train import Trainer

MODEL = GPTConfig(block_size=6, vocab_size=27, n_layer=2, n_head=2, n_embd=32)  # four shares of 6 rows: one is empty


class TestShares:
    @pytest.mark.parametrize(
        ("size", "batch_size", "grad_accum"),
        [(1, 3, 2), (2, 3, 2), (2, 4, 1), (2, 4, 3), (4, 2, 2), (8, 4, 6), (6, 4, 3), (8, 12, 40), (8, 1, 8)],
    )
    def test_each_sequence_of_a_step_goes_to_one_process(self, size, batch_size, grad_accum):
        seen = []
        for rank in range(size):
            share = World(rank, size).share(batch_size, grad_accum)
            mine = [(micro, row) for micro in share.micro_batches for row in range(batch_size)[share.rows]]
            assert len(mine) == batch_size * grad_accum // size
            seen += mine
        assert sorted(seen) == [(micro, row) for micro in range(grad_accum) for row in range(batch_size)]

    def test_whole_micro_batches_come_first(self):
        assert World(1, 4).share(12, 8).rows == slice(0, 12)
        assert list(World(1, 4).share(12, 8).micro_batches) == [1, 5]

    @pytest.mark.parametrize(("size", "batch_size", "grad_accum"), [(2, 3, 1), (4, 2, 3), (8, 4, 2 * 3 - 1)])
    def test_what_cannot_be_shared_evenly_is_refused(self, size, batch_size, grad_accum):
        sentence = f"makes {batch_size * grad_accum} sequences a step, which {size} processes cannot share evenly"
        with pytest.raises(UserError, match=sentence):
            World(0, size).share(batch_size, grad_accum)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert World(5, 8, 1).device("auto") == World(5, 8, 1).device("cuda") == "cuda:1"
    assert World(5, 8, 1).device("cpu") == "cpu"
    assert World().device("cuda:3") == "cuda:3"
    with pytest.raises(UserError, match="device cuda:3 is one GPU, and 8 processes need one each"):
        World(5, 8, 1).device("cuda:3")


def test_seeds_differ_by_process_and_step_and_come_back():
    def drawn(rank, step):
        World(rank, 2).seed(7, step)
        return torch.rand(1).item()

    assert len({drawn(rank, step) for rank in range(2) for step in range(3)}) == 6
    assert drawn(1, 2) == drawn(1, 2)
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    World().seed(7, 0)  # a process alone keeps its own
    assert torch.equal(torch.rand(1), wanted)


@pytest.mark.parametrize(("rank", "local_rank"), [(0, 0), (1, 1), (8, 0), (9, 1)])
def test_one_process_of_a_machine_verifies_the_data(tmp_path, monkeypatch, rank, local_rank):
    def load(*args, verify):
        raise UserError(f"verify is {verify}")

    monkeypatch.setattr(World, "any", lambda self, flag: flag)
    monkeypatch.setattr(distributed, "_world", World(rank, 16, local_rank))
    monkeypatch.setattr(training, "load_dataset", load)
    with pytest.raises(UserError, match=f"verify is {local_rank == 0}"):
        Trainer(MODEL, TrainConfig(device="cpu", batch_size=16), tmp_path)


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_of_what_torchrun_sets_is_refused(monkeypatch, missing):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=f"WORLD_SIZE is set and {missing} is not: start several processes"):
        distributed.join()


def test_a_wrong_command_is_told_by_one_process(monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        code, _, err = command("train", "--n-layer", "many")
        assert code == 2
        said.append(err)
    assert "fastgpt: " in said[0]
    assert said[1] == ""


@pytest.fixture
def alone_in_a_group():
    """A process group of this process alone: shards are whole, and all of the machinery runs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def a_step(model, optimizer):
    x, y = torch.randint(27, (2, 4, 6), generator=torch.Generator().manual_seed(0))
    for index in range(2):
        with distributed.gradient_sync(model, wanted=index == 1):
            _, loss = model(x, y)
            loss.backward()
    before = [grad.clone() for grad in gradients(model)]
    distributed.clip_grad_norm_(gradients(model), 0.1)
    after = [grad.clone() for grad in gradients(model)]
    optimizer.step()
    return loss.detach(), before, after


@pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])
def test_a_sharded_model_takes_the_same_step(alone_in_a_group, backend):
    plain = GPT(MODEL)
    sharded = GPT(MODEL)
    sharded.load_state_dict(plain.state_dict())
    World().shard(sharded, torch.device("cpu"))
    assert sharded.num_params() == plain.num_params()
    with use_backend(backend):
        steps = [a_step(model, build_optimizer(model, TrainConfig(lr=0.1))) for model in (plain, sharded)]
    assert torch.equal(steps[0][0], steps[1][0])
    for plain_grads, sharded_grads in zip(steps[0][1:], steps[1][1:], strict=True):
        for p, q in zip(plain_grads, sharded_grads, strict=True):
            torch.testing.assert_close(q.full_tensor(), p, rtol=1e-6, atol=0)
    for (name, p), (_, q) in zip(plain.named_parameters(), sharded.named_parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(("rows", "size"), [(6, 4), (6, 2), (7, 3), (1, 4), (27, 8)])
def test_the_rows_of_a_shard_are_those_that_torch_chunk_cuts(rows, size):
    class Spread:
        def __init__(self, rank):
            chunks = torch.arange(rows).chunk(size)
            self.device_mesh = SimpleNamespace(size=lambda: size, get_local_rank=lambda: rank)
            self.shard = chunks[rank] if rank < len(chunks) else torch.arange(0)

        def __len__(self):
            return rows

        def to_local(self):
            return self.shard

    for rank in range(size):
        own, first_row = distributed.own_rows(Spread(rank))
        assert own.tolist() == list(range(first_row, first_row + len(own)))
        assert first_row <= rows


@pytest.mark.parametrize(("backend", "rows"), [("cpp", 36), ("torch", 44)])
def test_a_block_keeps_what_the_page_says(backend, rows):
    B, T, C, H = 5, 16, 48, 3

    def kept(n_layer):
        model = GPT(GPTConfig(block_size=T, vocab_size=27, n_layer=n_layer, n_head=H, n_embd=C))
        own = {p.shape for p in model.parameters()} | {p.mT.shape for p in model.parameters() if p.dim() == 2}
        storages = {}

        def pack(x):
            if x.shape not in own:  # weights, and autocast's copies of them
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        idx = torch.randint(27, (B, T))
        with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                _, loss = model(idx, idx)
        del loss
        return sum(storages.values())

    assert kept(4) - kept(3) == B * T * (rows * C + 4 * H + 16)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, as torchrun starts them
# ---------------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "device": "cpu",
    "block-size": 6,
    "n-layer": 2,
    "n-head": 2,
    "n-embd": 32,
    "batch-size": 4,
    "grad-accum": 2,
    "max-iters": 12,
    "lr": 1e-2,
    "warmup-iters": 2,
    "eval-interval": 6,
    "eval-iters": 3,
    "final-eval-iters": 5,
    "log-interval": 3,
    "sample-tokens": 5,
}


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def write_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    return path


def arguments(run: Path, *more: str, **changes: object) -> list[str]:
    settings = {name.replace("_", "-"): value for name, value in changes.items()}
    if "--resume" not in more:
        settings = {**SETTINGS, "data": run.parent / "text.txt", **settings}
    options = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return ["train", "--out", str(run), *options, *more]


def launch_line(size: int, *program: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"] if size > 1 else []
    return [sys.executable, *launcher, *program]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "FASTGPT_CACHE": str(folder / "cache")}


def train(
    size: int, run: Path, program: tuple[str, ...] = ("-m", "fastgpt"), **changes: Any
) -> subprocess.CompletedProcess[str]:
    line = launch_line(size, *program, *arguments(run, **changes))
    return subprocess.run(line, capture_output=True, text=True, env=environment(run.parent), timeout=280)


def train_all(size: int, *commands: list[str]) -> None:
    """Several commands, one after another, in processes that meet once: starting them takes seconds."""
    folder = Path(commands[0][2]).parent
    (folder / "commands.json").write_text(json.dumps(commands))
    (folder / "commands.py").write_text(COMMANDS)
    line = launch_line(size, str(folder / "commands.py"), str(folder / "commands.json"))
    done = subprocess.run(line, capture_output=True, text=True, env=environment(folder), timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint: ") == len(commands), "one process prints"


COMMANDS = """
import json
import sys
from fastgpt import cli, distributed

world = distributed.join()
distributed.join, leave, distributed.leave = lambda: world, distributed.leave, lambda: None
for sys.argv[1:] in json.load(open(sys.argv[1])):
    try:
        cli.main()
    except SystemExit as end:
        if end.code:
            raise
leave()
"""


def losses(run: Path) -> dict[tuple[int, str, int], float]:
    """The losses of a run, by step, split and batches averaged."""
    lines = read_metrics(run)
    found = {(line["step"], line["split"], line["batches"]): line["loss"] for line in lines}
    assert len(found) == len(lines), "one process writes"
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs that went to their end; those named by their ways went on on other numbers of processes."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder)

    def new(name, parallel="ddp", **changes):
        return arguments(folder / name, parallel=parallel, **changes)

    def first(ways):
        return new(ways, ways.split()[0][1:], max_iters=4, lr_decay_iters=12, eval_interval=4)

    def then(ways, part, max_iters):
        way = ways.split()[part]
        return arguments(folder / ways, "--resume", parallel=way[1:], max_iters=max_iters, eval_interval=6)

    up, down, shards = WAYS
    half = {"max_iters": 6, "lr_decay_iters": 12}
    halves = []
    for parallel in ("ddp", "fsdp"):
        halves.append(new(f"whole-{parallel}", parallel, dropout=0.3))
        halves.append(new(f"halves-{parallel}", parallel, dropout=0.3, **half))
        halves.append(arguments(folder / f"halves-{parallel}", "--resume", max_iters=12))
        halves += [new(f"{dtype}-{parallel}", parallel, dtype=dtype) for dtype in ("bf16", "fp16")]
    train_all(1, new("1ddp"), new("bf16"), new("fp16"), first(up))
    train_all(4, new("4ddp"), new("4fsdp", "fsdp"), first(down))
    train_all(2, new("2ddp"), new("2fsdp", "fsdp"), then(up, 1, 6), then(down, 1, 6), first(shards), *halves)
    train_all(4, then(up, 2, 12), then(shards, 1, 12))
    train_all(2, new("2fsdp-init", "fsdp", init=folder / "4fsdp", max_iters=1))
    train_all(1, then(down, 2, 12), new("1ddp-init", init=folder / "4fsdp", max_iters=1))
    return folder


WAYS = ("1ddp 2ddp 4fsdp", "4fsdp 2ddp 1ddp", "2fsdp 4fsdp")


@pytest.mark.full
class TestSeveralProcesses:
    @pytest.mark.parametrize("run", ["2ddp", "4ddp", "2fsdp", "4fsdp"])
    def test_the_curve_is_the_same_on_1_2_and_4_processes(self, runs, run):
        wanted, found = losses(runs / "1ddp"), losses(runs / run)
        assert wanted[12, "val", 5] < wanted[0, "val", 3] - 0.3
        assert found.keys() == wanted.keys()
        for key, loss in wanted.items():
            assert found[key] == pytest.approx(loss, rel=2e-5), key
            if key[0] == 0:
                assert found[key] == loss, "an evaluation of the same weights has the same bits"
        mine, ones = (load_model(runs / name, "last")[0] for name in (run, "1ddp"))
        for (name, p), (_, q) in zip(mine.named_parameters(), ones.named_parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)

    @pytest.mark.parametrize("ways", WAYS)
    def test_a_run_goes_on_on_another_number_of_processes(self, runs, ways):
        wanted, found = losses(runs / "1ddp"), losses(runs / ways)
        for key in ((9, "train", 6), (12, "val", 5), (12, "train", 5)):
            assert found[key] == pytest.approx(wanted[key], rel=2e-5)

    @pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
    def test_dropout_and_resuming_repeat(self, runs, parallel):
        whole, halves = (losses(runs / f"{name}-{parallel}")[12, "val", 5] for name in ("whole", "halves"))
        assert halves == whole
        assert whole != losses(runs / f"2{parallel}")[12, "val", 5], "it dropped nothing"

    @pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
    def test_a_resumed_run_ends_with_the_bytes_of_one_that_was_not(self, runs, parallel):
        whole, halves = (find_checkpoint(runs / f"{name}-{parallel}") for name in ("whole", "halves"))
        files = sorted(path.name for path in whole.glob("*.safetensors"))
        assert len(files) == {"ddp": 2, "fsdp": 4}[parallel]
        for name in files:
            assert (whole / name).read_bytes() == (halves / name).read_bytes(), name

    def test_each_process_writes_its_shards(self, runs):
        folder = find_checkpoint(runs / "4fsdp")
        kinds = ("model", "training")
        parts = [f"{kind}-0000{part}-of-00004.safetensors" for kind in kinds for part in range(1, 5)]
        assert sorted(path.name for path in folder.iterdir()) == sorted([*parts, "state.json", "SHA256SUMS"])
        for name, wanted in (("transformer.wte.weight", [7, 7, 7, 7]), ("transformer.wpe.weight", [2, 2, 2, 0])):
            assert [len(load_file(folder / part)[name]) for part in parts[:4]] == wanted
        whole = find_checkpoint(runs / "1ddp")
        assert sorted(path.name for path in whole.glob("*.safetensors")) == [f"{kind}.safetensors" for kind in kinds]

    def test_a_sharded_run_begins_from_a_sharded_runs_weights(self, runs):
        assert losses(runs / "2fsdp-init")[0, "val", 3] == losses(runs / "1ddp-init")[0, "val", 3]
        assert losses(runs / "2fsdp-init")[0, "val", 3] < losses(runs / "1ddp")[0, "val", 3] - 0.3

    def test_other_commands_know_no_difference(self, runs, command, tmp_path, monkeypatch):
        monkeypatch.setenv("FASTGPT_CACHE", str(runs / "cache"))
        run = runs / "4fsdp"
        code, out, _ = command("eval", run, "--device=cpu", "--checkpoint=last")
        assert code == 0
        assert f"{losses(run)[12, 'val', 5]:.4f}" in out
        assert command("sample", run, "--device=cpu", "--num-tokens=5")[0] == 0
        assert command("export", run, "--to=hf", f"--out={tmp_path / 'hf'}")[0] == 0
        assert command("plot", run, f"--out={tmp_path / 'loss.png'}")[0] == 0

    def test_a_damaged_part_is_refused_by_name_and_an_earlier_checkpoint_offered(self, runs, tmp_path, text):
        run = tmp_path / "run"
        shutil.copytree(runs / "2fsdp", run)
        shutil.copytree(runs / "cache", tmp_path / "cache")
        last = find_checkpoint(run)
        path = last / "training-00002-of-00002.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        line = launch_line(2, "-m", "fastgpt", *arguments(run, "--resume", max_iters=14, data=text))
        done = subprocess.run(line, capture_output=True, text=True, env=environment(tmp_path), timeout=280)
        assert done.returncode != 0
        assert done.stderr.count("fastgpt: ") == 1
        sentence = f"{path}: damaged: its sha256 is not the one in SHA256SUMS; --checkpoint step-00000006 is whole"
        assert sentence in done.stderr
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before

    def test_no_process_has_the_whole(self, tmp_path, text):
        """Peak memory, from the start of the command on, of a model of 30 million parameters."""
        shape = {"n_layer": 24, "n_head": 5, "n_embd": 320, "batch_size": 4, "grad_accum": 1}
        settings = {**shape, "eval_iters": 1, "final_eval_iters": 1, "eval_interval": 1, "sample_tokens": 0}
        (tmp_path / "measured.py").write_text(MEASURED)

        def grown(size, *more, **changes):
            line = launch_line(size, str(tmp_path / "measured.py"), *arguments(tmp_path / "run", *more, **changes))
            whole_blocks = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back, and is not counted on
            env = {**environment(tmp_path), **whole_blocks}
            done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=280)
            assert done.returncode == 0, done.stderr
            sizes = [int(path.read_text()) for path in tmp_path.glob("grown-*")]
            for path in tmp_path.glob("grown-*"):
                path.unlink()
            return sizes

        shares = grown(4, parallel="fsdp", max_iters=1, **settings) + grown(4, "--resume", max_iters=2)
        whole = grown(1, "--resume", max_iters=3)
        parameters = sum(p.numel() for p in load_model(tmp_path / "run", "last")[0].parameters())
        print(f"{parameters:,} parameters; bytes of each: {[round(size / parameters, 1) for size in shares + whole]}")
        assert len(shares) == 8
        assert min(whole) > 28 * parameters, "weights, gradients, moments, and the copy of all but gradients"
        assert max(shares) < min(whole) / 2  # a quarter, and the modules that are loaded late

    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    def test_half_precision(self, runs, dtype):
        wanted = losses(runs / dtype)[12, "val", 5]
        for parallel in ("ddp", "fsdp"):
            assert losses(runs / f"{dtype}-{parallel}")[12, "val", 5] == pytest.approx(wanted, rel=1e-2)

    def test_an_error_of_all_is_told_once(self, tmp_path, text):
        done = train(2, tmp_path / "run", batch_size=3, grad_accum=1)
        assert done.returncode != 0
        assert done.stderr.count("fastgpt: batch_size 3 times grad_accum 1 makes 3 sequences a step") == 1
        assert done.stderr.count("fastgpt: ") == 1
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("parallel", "fault", "sentence"),
        [
            ("ddp", "raise MemoryError('planted')", "fastgpt: out of memory: planted"),
            (
                "ddp",
                "self._losses[-1] *= float('nan')",
                "fastgpt: the loss became nan at step 5, so the run was stopped",
            ),
            (
                "fsdp",
                "checkpoint.sync = lambda path: open('/dev/full', 'w').write('x' * 10**6)",
                "fastgpt: the checkpoint of step 6 could not be written ([Errno 28] No space left on device)",
            ),
        ],
    )
    def test_a_fault_of_one_process_is_the_reason_that_all_end(self, tmp_path, text, parallel, fault, sentence):
        script = tmp_path / "faulty.py"
        script.write_text(FAULTY.format(fault=fault))
        done = train(2, tmp_path / "run", program=(str(script),), parallel=parallel)
        assert done.returncode != 0
        assert done.stderr.count(sentence) == 1
        assert done.stderr.count("fastgpt: ") == 1
        assert "FutureWarning" not in done.stderr

    def test_a_signal_to_all_makes_one_checkpoint(self, tmp_path, text):
        run = tmp_path / "run"
        process = started(run, "fsdp")  # whose checkpoint takes all of them
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=100)
        assert out.count("stopping after this step and saving") == 1
        assert out.count("stopped at step ") == 1
        state = json.loads((find_checkpoint(run) / "state.json").read_text())
        assert state["step"] > 0
        assert f"stopped at step {state['step']}" in out

    @pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
    def test_the_death_of_a_process_ends_the_run_with_its_reason(self, tmp_path, text, parallel):
        run = tmp_path / "run"
        process = started(run, parallel)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        victim = next(pid for pid in children if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
        began = time.monotonic()
        os.kill(int(victim), signal.SIGKILL)
        _, err = process.communicate(timeout=100)
        assert time.monotonic() - began < 60
        assert process.returncode != 0
        assert err.count("fastgpt: another process of this run has ended") <= 1
        assert "Signal 9 (SIGKILL) received by PID" in err
        assert "fastgpt/train.py" not in err, "no traceback of a process that only noticed"


FAULTY = """
import os
from fastgpt import checkpoint, cli
from fastgpt.train import Trainer

def step(self, real=Trainer._step):
    real(self)
    if self.state.step == 5 and os.environ["RANK"] == "1":
        {fault}

Trainer._step = step
cli.main()
"""


MEASURED = """
import os
import re
from pathlib import Path
from fastgpt import cli, joint_checkpoint  # the last is loaded late otherwise

def memory(kind):
    return int(re.search(rf"Vm{kind}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # forgets the peak until now
before = memory("RSS")
try:
    cli.main()
finally:
    Path(__file__).with_name(f"grown-{os.getpid()}").write_text(str(memory("HWM") - before))
"""


def started(run: Path, parallel: str) -> subprocess.Popen[str]:
    """A long run of two processes that has trained for some steps."""
    line = launch_line(2, "-m", "fastgpt", *arguments(run, max_iters=10**6, eval_interval=10**6, parallel=parallel))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(line, **pipes, text=True, env=environment(run.parent))
    deadline = time.monotonic() + 100
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never began to train"
        time.sleep(0.2)
    return process
