"""The switches that make training faster or smaller change nothing else, one by one and together."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastgpt
from fastgpt import GPT, GPTConfig, use_backend
from fastgpt.config import BigramConfig, ModelConfig, TrainConfig, UserError
from fastgpt.cuda_graph import WARM_UP, Graphed
from fastgpt.model import Block
from fastgpt.train import Trainer

MODEL = GPTConfig(block_size=16, vocab_size=28, n_layer=2, n_head=2, n_embd=32, dropout=0.2)
CONFIG = TrainConfig(device="cpu", batch_size=4, max_iters=20, lr=1e-2, min_lr=1e-3, warmup_iters=2, grad_accum=2)
STEPS = WARM_UP + 3

PACKAGE = Path(fastgpt.__file__).parent
CHECKS_OF_CPU_TENSORS = {"adamw_", "_check_tokens", "check_targets"}  # a GPU's are not looked at

backends = pytest.mark.parametrize("backend", ["reference", "torch", "cpp"])


class Recorded(TorchDispatchMode):
    """What was called, with the very tensors: as a CUDA graph keeps kernels and addresses, and no Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.askers: set[str] = set()  # our functions in which the host waited for a number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            stack = traceback.extract_stack()
            ours = [frame.name for frame in stack if str(PACKAGE) in frame.filename and frame.name != "<genexpr>"]
            self.askers.add(ours[-1])
        self.calls.append((func, args, kwargs or {}, found))
        return found

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, found in self.calls:
            for old, new in zip(tree_leaves(found), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class GraphedOnCPU(Graphed):
    """A CUDA graph's stand-in: the call that is captured runs, too, so that its own replay is left out."""

    def __init__(self, fn: Callable[..., Tensor], device: torch.device) -> None:
        self._fn, self._calls, self._replay = fn, 0, None
        self.replays = 0
        self.recorded = Recorded()

    def _warm_up(self, *inputs: Tensor) -> Tensor:
        return self._fn(*inputs)

    def _capture(self) -> tuple[Callable[[], None], Tensor]:
        with self.recorded:
            output = self._fn(*self._inputs)

        def replay() -> None:
            self.replays += 1
            if self.replays > 1:
                self.recorded.replay()

        return replay, output


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fastgpt.train.Graphed", GraphedOnCPU)
    monkeypatch.setattr("fastgpt.train.plot_losses", lambda *_: None)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)

    def make(name: str, model: ModelConfig = MODEL, **changes: Any) -> Trainer:
        config = dataclasses.replace(CONFIG, data=str(tmp_path / "text.txt"), **changes)
        console = Console(file=(tmp_path / "console.txt").open("a", buffering=1), width=200)
        made = Trainer(model, config, tmp_path / name, console=console)
        if config.cuda_graph:
            made.device = torch.device("cuda")
            made._train_on, made._gradients_on = made._as_graphs()
            made.device = torch.device("cpu")
        return made

    return make


def said(tmp_path: Path) -> str:
    return (tmp_path / "console.txt").read_text()


def after_steps(t: Trainer) -> list[Tensor]:
    """The losses of some steps, the weights and AdamW's means after them, and the generator's state."""
    with t.backend:
        for _ in range(STEPS):
            t._step()
    moments = [x for state in t.optimizer.state.values() for x in state.values()]
    return [*t._losses, *(p.detach() for p in t.model.parameters()), *moments, torch.get_rng_state()]


@backends
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_captured_step_is_the_plain_step(trainer: Callable[..., Trainer], backend: str, dtype: str) -> None:
    plain = after_steps(trainer("plain", backend=backend, dtype=dtype))
    t = trainer("graph", backend=backend, dtype=dtype, cuda_graph=True, recompute=True)
    captured = after_steps(t)
    graph = t._gradients_on if dtype == "fp16" else t._train_on
    assert isinstance(graph, GraphedOnCPU)
    assert graph.replays == STEPS - WARM_UP
    assert graph.recorded.askers <= CHECKS_OF_CPU_TENSORS
    assert all(map(torch.equal, captured, plain))
    assert len({loss.item() for loss in captured[:STEPS]}) == STEPS


def test_without_a_gpu_a_cuda_graph_is_declined_in_a_sentence(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    t = trainer("run", cuda_graph=True)
    t._train_on, t._gradients_on = t._as_graphs()
    assert t._train_on == t._whole_step
    assert "cuda_graph: there is no CUDA graph on cpu, so each step runs op by op" in said(tmp_path)


SWITCHES: dict[str, dict[str, Any]] = {
    "cuda_graph": {"cuda_graph": True},
    "recompute": {"recompute": True},
    "tf32": {"tf32": True},
    "vocab_multiple": {"model": dataclasses.replace(MODEL, vocab_multiple=64)},
    "bf16": {"dtype": "bf16"},
    "fp16": {"dtype": "fp16"},
    "compile": {"compile": True},
}
# What is recorded here would be the compiler at work, and not what it made: that pair is for a GPU (test_cuda.py).
PAIRS = [pair for pair in itertools.combinations(SWITCHES, 2) if pair != ("bf16", "fp16")]
PAIRS.remove(("cuda_graph", "compile"))


def is_slow(pair: tuple[str, str]) -> Any:
    return pytest.param(*pair, marks=pytest.mark.full if "compile" in pair else ())


@pytest.mark.parametrize(("one", "other"), [is_slow(pair) for pair in PAIRS])
def test_any_two_switches_go_together(
    trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, one: str, other: str
) -> None:
    # Not by inductor, which takes long.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    both = {**SWITCHES[one], **SWITCHES[other]}
    plain = after_steps(trainer("plain", model=both.get("model", MODEL)))  # other rows, other weights
    found = after_steps(trainer("both", **both))
    losses, wanted = (torch.stack(x[:STEPS]) for x in (found, plain))
    if {"bf16", "fp16"} & {one, other}:
        torch.testing.assert_close(losses, wanted, atol=0.02, rtol=0)
    elif "compile" in (one, other):
        torch.testing.assert_close(losses, wanted, atol=1e-4, rtol=0)
    else:
        assert all(map(torch.equal, found, plain))


def gradients(model: GPT, backend: str, backward: Callable[[Tensor], None], run: Any = None) -> list[Tensor]:
    """The loss and every gradient, and the state of the generator afterwards."""
    torch.manual_seed(3)
    model.zero_grad()
    idx = torch.arange(48).view(3, 16) * 7 % 28
    with use_backend(backend):
        loss = (model if run is None else run)(idx, idx)[1]
        backward(loss)
    return [loss.detach(), *(p.grad for p in model.parameters()), torch.get_rng_state()]


def recomputing(model: GPT) -> GPT:
    twin = copy.deepcopy(model)
    twin.recompute_blocks()
    return twin


@backends
@pytest.mark.parametrize("attention", ["fused", "unfused"])
def test_recomputed_blocks_have_the_same_gradients(
    backend: str, attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPT(dataclasses.replace(MODEL, attention=attention))
    wanted = gradients(model, backend, Tensor.backward)
    runs = []
    real = Block._sublayers
    monkeypatch.setattr(Block, "_sublayers", lambda self, *args: runs.append(self) or real(self, *args))
    assert all(map(torch.equal, gradients(recomputing(model), backend, Tensor.backward), wanted))
    assert len(runs) == 2 * MODEL.n_layer


def test_blocks_are_recomputed_on_the_backend_of_the_forward() -> None:
    """Also where the backward has a thread of its own, as on a GPU, which use_backend does not reach."""

    def elsewhere(loss: Tensor) -> None:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    model = GPT(MODEL)
    wanted = gradients(model, "reference", Tensor.backward)
    assert all(map(torch.equal, gradients(recomputing(model), "reference", elsewhere), wanted))


@pytest.mark.full
@pytest.mark.parametrize(("compiler", "backend"), [("aot_eager", "torch"), ("aot_eager", "cpp"), ("inductor", "cpp")])
def test_recomputed_blocks_compile(compiler: str, backend: str) -> None:
    torch._dynamo.reset()
    model = GPT(MODEL)
    wanted = gradients(model, backend, Tensor.backward)
    twin = recomputing(model)
    found = gradients(twin, backend, Tensor.backward, torch.compile(twin, fullgraph=True, backend=compiler))
    for got, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, true, atol=1e-6, rtol=1e-4)
    torch._dynamo.reset()


def test_evaluation_recomputes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt.model.checkpoint", None)
    with torch.no_grad():
        recomputing(GPT(MODEL)).eval()(torch.zeros(1, 3, dtype=torch.int64))


def test_a_bigram_has_no_blocks_to_recompute(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="recompute is for the blocks of a GPT, and this model has none"):
        trainer("run", model=BigramConfig(), recompute=True)
    assert not (tmp_path / "run").exists()


def test_tf32_is_on_for_the_run_alone_and_said_to_do_nothing_on_a_cpu(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    seen = []
    real = Trainer._step
    monkeypatch.setattr(
        Trainer, "_step", lambda self: seen.append(torch.backends.cuda.matmul.fp32_precision) or real(self)
    )
    for tf32 in (True, False):
        t = trainer(f"{tf32}", tf32=tf32, max_iters=1, eval_iters=1, final_eval_iters=1)
        t.run_until_done()
        assert torch.backends.cuda.matmul.fp32_precision == before
    assert seen == ["tf32", before]
    assert said(tmp_path).count("tf32: cpu makes no such products, so those of fp32 stay as they are") == 1
