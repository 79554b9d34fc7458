import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import preferred_on_cpu
from rich.console import Console

from fastgpt import GPTConfig, dispatch, ops
from fastgpt.checkpoint import checkpoint_names, find_checkpoint, load_model, read_config
from fastgpt.config import BigramConfig, TrainConfig, TrainingError, UserError
from fastgpt.metrics import Metrics, metrics_until, read_metrics
from fastgpt.model import GPT
from fastgpt.optim import AdamW, build_optimizer, learning_rate
from fastgpt.placement import pick_device, pick_dtype
from fastgpt.train import Trainer

MODEL = GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=32, dropout=0.2)
CONFIG = TrainConfig(
    device="cpu",
    batch_size=4,
    max_iters=20,
    lr=1e-2,
    min_lr=1e-3,
    warmup_iters=2,
    eval_interval=10,
    eval_iters=3,
    final_eval_iters=5,
    log_interval=5,
)

METRICS = [
    "step",
    "split",
    "evaluation",
    "loss",
    "lr",
    "tokens",
    "tokens_per_s",
    "mfu",
    "peak_memory_bytes",
    "elapsed_s",
]
METRICS += ["batches"]


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 100)
    return path


def trainer(run: Path, model=MODEL, resume=False, keep_vocab_size=False, **changes) -> Trainer:
    config = dataclasses.replace(CONFIG, data=str(run.parent / "text.txt"), **changes)
    console = Console(file=(run.parent / "console.txt").open("a"), width=200)
    return Trainer(model, config, run, resume=resume, keep_vocab_size=keep_vocab_size, console=console)


def weights(t: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in t.model.named_parameters()}


def test_a_run_learns_and_leaves_what_it_promises(tmp_path):
    run = tmp_path / "run"
    t = trainer(run)
    assert t.run_until_done() is True
    files = {path.name for path in run.iterdir()}
    assert files == {"config.json", "tokenizer.json", "metrics.jsonl", "loss.png", "checkpoints.json", "checkpoints"}
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in find_checkpoint(run).iterdir()} == {
        "model.safetensors",
        "training.safetensors",
        "state.json",
        "SHA256SUMS",
    }
    lines = read_metrics(run)
    for line in lines:
        assert list(line) == METRICS
        assert line["split"] in ("train", "val")
    vals = [(line["step"], line["batches"]) for line in lines if line["split"] == "val"]
    assert vals == [(0, 3), (10, 3), (20, 5)]
    logged = [line["step"] for line in lines if line["split"] == "train" and line["batches"] == 5 and line["step"] < 20]
    assert logged == [5, 10, 15]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert t.tokens_per_s > 0
    assert "GPT of" in t.describe()
    assert f"on cpu, fp32, ops on {preferred_on_cpu()}" in t.describe()


def test_the_checkpoint_is_the_model(tmp_path):
    run = tmp_path / "run"
    t = trainer(run)
    t.run_until_done()
    model, tokenizer, config, state = load_model(run, "last")
    assert not model.training
    assert state.step == 20
    assert config.max_iters == 20
    assert tokenizer.characters == t.dataset.tokenizer.characters
    for name, p in model.named_parameters():
        assert torch.equal(p, weights(t)[name])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_dtype_learns(tmp_path, dtype):
    t = trainer(tmp_path / "run", dtype=dtype)
    t.run_until_done()
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert all(p.dtype == torch.float32 for p in t.model.parameters())
    assert t.scaler.is_enabled() == (dtype == "fp16")


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_resumed_run_ends_where_an_undisturbed_one_does(tmp_path, dtype):
    whole = trainer(tmp_path / "whole", dtype=dtype)
    whole.run_until_done()
    first = trainer(tmp_path / "halves", dtype=dtype)

    def stop_at_13(step=first._step):
        step()
        first._stop = first.state.step == 13

    first._step = stop_at_13
    assert first.run_until_done() is False
    config = read_config(tmp_path / "halves")[0]
    second = trainer(tmp_path / "halves", model=config, resume=True, dtype=dtype)
    assert second.state.step == 13
    assert second.run_until_done() is True
    for name, p in weights(whole).items():
        assert torch.equal(p, weights(second)[name]), name
    of_whole, of_halves = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "halves")
    vals = [[(m["step"], m["loss"]) for m in lines if m["split"] == "val"] for lines in (of_whole, of_halves)]
    assert vals[0] == vals[1]


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "bf16")])
def test_a_resumed_run_may_change_its_dtype(tmp_path, before, after):
    trainer(tmp_path / "run", dtype=before, max_iters=5).run_until_done()
    config = read_config(tmp_path / "run")[0]
    t = trainer(tmp_path / "run", model=config, resume=True, dtype=after)
    assert t.run_until_done() is True


def test_a_resumed_run_that_is_done_says_so(tmp_path):
    trainer(tmp_path / "run").run_until_done()
    config = read_config(tmp_path / "run")[0]
    with pytest.raises(UserError, match="this run is at step 20 already"):
        trainer(tmp_path / "run", model=config, resume=True)
    longer = trainer(tmp_path / "run", model=config, resume=True, max_iters=25)
    longer.run_until_done()
    assert longer.state.step == 25


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    trainer(tmp_path / "run").run_until_done()
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UserError, match="a run lies here already: continue it with --resume"):
        trainer(tmp_path / "run", lr=1.0)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_by_its_step(tmp_path, monkeypatch, value):
    t = trainer(tmp_path / "run")
    real = t._forward

    def forward(x, y):
        logits, loss = real(x, y)
        if t.model.training and t.state.step + 1 >= 13:
            loss = loss * value
        return logits, loss

    forward.eval, forward.train = t.model.eval, t.model.train
    t._forward = forward
    with pytest.raises(TrainingError, match=f"the loss became {value} at step 13, .* step-00000010 stands in"):
        t.run_until_done()
    assert load_model(tmp_path / "run", "last")[3].step == 10
    assert all(math.isfinite(line["loss"]) for line in read_metrics(tmp_path / "run"))


def test_a_diverging_run_stops_without_a_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"at step .*no checkpoint was written yet"):
        trainer(tmp_path / "run", lr=1e30, grad_clip=0.0).run_until_done()
    assert not (tmp_path / "run" / "checkpoints.json").exists()


def test_gradient_accumulation_is_a_larger_batch(tmp_path):
    t = trainer(tmp_path / "a", model=dataclasses.replace(MODEL, dropout=0.0), grad_accum=3, grad_clip=0.0)
    batches = [t._batches[i] for i in range(3)]
    reference = GPT(t.model.config)
    reference.load_state_dict(t.model.state_dict())
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss = reference(x, y)[1]
    loss.backward()
    seen = {}
    t.optimizer.step = lambda: seen.update({n: p.grad.clone() for n, p in t.model.named_parameters()})
    t._step()
    assert t._losses[0].item() == pytest.approx(loss.item(), abs=1e-6)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(seen[name], p.grad, atol=1e-7, rtol=1e-4)


def test_gradients_are_clipped(tmp_path):
    t = trainer(tmp_path / "run", grad_clip=1e-3)
    norms = []
    t.optimizer.step = lambda: norms.append(torch.cat([p.grad.flatten() for p in t.model.parameters()]).norm().item())
    t._step()
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)


def test_fp16_gradients_are_clipped_at_their_true_size(tmp_path):
    t = trainer(tmp_path / "run", dtype="fp16", grad_clip=1e-3)
    norms = []
    # GradScaler calls step only where the unscaled gradients are finite
    t.optimizer.step = lambda: norms.append(torch.cat([p.grad.flatten() for p in t.model.parameters()]).norm().item())
    t.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    t._step()
    assert norms[0] == pytest.approx(1e-3, rel=1e-2)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    trainer(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "split": "val", "loss": 9.0}\n')
    t = trainer(tmp_path / "run")
    t.run_until_done()
    assert [line["step"] for line in read_metrics(tmp_path / "run") if line["split"] == "val"] == [0, 10, 20]


def test_weight_decay_is_on_matrices_only():
    model = GPT(dataclasses.replace(MODEL, vocab_size=13))
    optimizer = build_optimizer(model, CONFIG)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] > 0 for p in group["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.dim() == 2), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_optimizer_is_torchs_adamw(backend):
    def params():
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (7,), ())]

    ours, theirs = params(), params()
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3}
    optimizers = AdamW(ours, **settings, backend=backend), torch.optim.AdamW(theirs, **settings)
    for step in range(5):
        for own, other in zip(ours, theirs, strict=True):
            own.grad = torch.randn(own.shape)
            other.grad = own.grad.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.step()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-6, rtol=1e-5)


def test_the_optimizers_state_survives_its_dict():
    def stepped(steps, state=None):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = AdamW([p], lr=0.1)
        if state:
            p.data.copy_(state[0])
            optimizer.load_state_dict(state[1])
        for _ in range(steps):
            p.grad = torch.arange(3.0)
            optimizer.step()
        return p.detach().clone(), optimizer.state_dict()

    assert torch.equal(stepped(5)[0], stepped(3, stepped(2))[0])


def test_learning_rate_warms_up_and_follows_a_cosine():
    config = TrainConfig(lr=1.0, min_lr=0.1, warmup_iters=9, max_iters=109)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(8, config) == pytest.approx(0.9)
    assert learning_rate(9, config) == 1.0
    assert learning_rate(59, config) == pytest.approx(0.55)
    assert learning_rate(109, config) == learning_rate(500, config) == 0.1
    rates = [learning_rate(step, config) for step in range(9, 110)]
    assert rates == sorted(rates, reverse=True)
    constant = TrainConfig(lr=0.01, min_lr=0.01, warmup_iters=0)
    assert {learning_rate(step, constant) for step in range(0, 3000, 7)} == {0.01}
    early = TrainConfig(lr=1.0, min_lr=0.1, warmup_iters=0, max_iters=100, lr_decay_iters=50)
    assert learning_rate(50, early) == 0.1


def test_evaluation_draws_no_gradient_and_disturbs_no_training(tmp_path):
    often = trainer(tmp_path / "a", eval_interval=1)
    often.run_until_done()
    seldom = trainer(tmp_path / "b", eval_interval=100)
    seldom.run_until_done()
    for name, p in weights(often).items():
        assert torch.equal(p, weights(seldom)[name]), name


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
    t = trainer(tmp_path / "run", lr=3.0, min_lr=3.0, grad_clip=0.0, warmup_iters=10, eval_interval=2)
    t.run_until_done()
    vals = {m["step"]: m["loss"] for m in read_metrics(tmp_path / "run") if m["split"] == "val" and m["step"] > 0}
    best = load_model(tmp_path / "run", "best")[3]
    assert best.step == min(vals, key=vals.get) < 20
    assert best.val_loss == min(vals.values())
    assert load_model(tmp_path / "run", "last")[3].step == 20
    assert checkpoint_names(tmp_path / "run") == [f"step-{step:08d}" for step in sorted({best.step, 18, 20})]


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    lines = [{"step": step, "split": "val", "loss": 1.0} for step in (5, 10, 15)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "lo')
    Metrics(tmp_path, metrics_until(tmp_path, 10))
    assert [line["step"] for line in read_metrics(tmp_path)] == [5, 10]


def test_the_vocabulary_is_the_datas_unless_a_larger_one_is_asked_for(tmp_path):
    assert trainer(tmp_path / "a").model.config.vocab_size == 28
    larger = dataclasses.replace(MODEL, vocab_size=100)
    assert trainer(tmp_path / "b", model=larger, keep_vocab_size=True).model.config.vocab_size == 100
    with pytest.raises(UserError, match="vocab_size must be at least 28"):
        trainer(tmp_path / "c", model=dataclasses.replace(MODEL, vocab_size=10), keep_vocab_size=True)
    assert not (tmp_path / "c").exists()


def test_a_bigram_trains_too(tmp_path):
    t = trainer(tmp_path / "run", model=BigramConfig(block_size=8), lr=0.1)
    t.run_until_done()
    lines = read_metrics(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3


@pytest.mark.parametrize("backend", ["torch", "reference", "reference,attention_qkvpacked=torch"])
def test_the_backend_is_the_one_that_runs(tmp_path, backend, monkeypatch):
    seen = set()
    real = ops.layer_norm.__globals__["dispatch"].resolve

    def spy(op, name, *args):
        entry = real(op, name, *args)
        seen.add((op, entry.fn.__module__))
        return entry

    monkeypatch.setattr("fastgpt.dispatch.resolve", spy)
    trainer(tmp_path / "run", backend=backend, max_iters=2).run_until_done()
    first = "fastgpt.torch_native" if backend == "torch" else "fastgpt.reference"
    special = "fastgpt.reference" if backend == "reference" else "fastgpt.torch_native"
    ran = ("layer_norm", "add_layer_norm", "gelu", "linear_cross_entropy", "dropout", "adamw_", "clip_grad_norm_")
    assert seen == {(op, first) for op in ran} | {("attention_qkvpacked", special)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"backend": "fast"}, "--backend: unknown backend 'fast'"),
        ({"backend": "cuda"}, "backend 'cuda' cannot run attention here: because of this test"),
        ({"backend": "attn=torch"}, "--backend: unknown op 'attn'"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"device": "cuda:99"}, "device cuda:99 is not there: PyTorch sees"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_written(tmp_path, changes, sentence, own_table):
    dispatch.mark_absent("cuda", "because of this test")
    with pytest.raises(UserError, match=sentence):
        trainer(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_auto_dtype_is_fp32_on_a_cpu():
    assert pick_dtype("auto", pick_device("cpu")) is torch.float32
    assert pick_dtype("bf16", pick_device("cpu")) is torch.bfloat16
