"""What only a GPU can show: CUDA graphs, the compiler, a second GPU, the same bits each time, what is compiled when."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from error_rule import DEVICE
from safetensors.torch import load_file
from torch import Tensor

from fastgpt import GPT, GPTConfig, ops, use_backend
from fastgpt.benchmarks.small_calls import small_calls
from fastgpt.checkpoint import CheckpointWriter, RunState, find_checkpoint
from fastgpt.config import TrainConfig
from fastgpt.optim import build_optimizer, gradients
from fastgpt.train import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG = GPTConfig(block_size=33, vocab_size=65, n_layer=2, n_head=2, n_embd=48, dropout=0.2)
NAMES = list(small_calls("cpu"))
every_call = pytest.mark.parametrize("name", NAMES)
every_backend = pytest.mark.parametrize("backend", ["triton", "cuda"])


class Step:
    """A training step on our kernels, always of the same batch; ``loss`` and ``mask`` are those of the last one."""

    def __init__(self, model: GPT, backend: str) -> None:
        self.model, self.backend = model, backend
        self.optimizer = build_optimizer(model, TrainConfig(lr=1e-2))
        for group in self.optimizer.param_groups:
            group["lr"] = torch.full((), 1e-2, device=DEVICE)  # on the device, where a graph reads it at each replay
        tokens = torch.arange(4 * (CONFIG.block_size + 1), device=DEVICE).view(4, -1) * 7 % CONFIG.vocab_size
        self.idx, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.ones = torch.ones(1000, device=DEVICE)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with use_backend(self.backend):
            _, self.loss = self.model(self.idx, self.targets)
            self.loss.backward()
            ops.clip_grad_norm_(gradients(self.model), 1.0)
            self.optimizer.step()
            self.mask = ops.dropout(self.ones, 0.5)

    def run(self, step: Callable[[], None], rates: list[float]) -> list[tuple[Tensor, Tensor]]:
        """Loss and mask of a step at each of the learning rates."""
        torch.manual_seed(2)
        found = []
        for rate in rates:
            for group in self.optimizer.param_groups:
                group["lr"].fill_(rate)
            step()
            found.append((self.loss.detach().clone(), self.mask.clone()))
        return found


def captured(step: Step) -> torch.cuda.CUDAGraph:
    """The step as a graph, after a few on the side that compile kernels and make the optimizer's state."""
    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def warm_up(step: Step) -> None:
    torch.manual_seed(1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)


@every_backend
def test_a_training_step_in_a_cuda_graph_is_that_of_eager_mode(backend: str) -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG).to(DEVICE)
    eager, graphed = Step(copy.deepcopy(model), backend), Step(model, backend)
    graph = captured(graphed)
    warm_up(eager)
    rates = [1e-2] * 30 + [1e-3] * 10
    got, wanted = graphed.run(graph.replay, rates), eager.run(eager, rates)
    for (loss, mask), (wanted_loss, wanted_mask) in zip(got, wanted, strict=True):
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-4, atol=1e-4)
        assert torch.equal(mask, wanted_mask)
    masks = {tuple(mask.tolist()) for _, mask in got}
    assert len(masks) == len(rates), "each replay drops other elements"
    losses = [loss.item() for loss, _ in got]
    assert losses[-1] < 0.6 * losses[0], losses


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("switch", ["cuda_graph", "recompute", "compile"])
@every_backend
@pytest.mark.usefixtures("fresh_compiler")
def test_a_run_in_a_cuda_graph_is_that_of_eager_mode(
    backend: str, switch: str, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 50)
    config = TrainConfig(str(text), backend, "cuda", dtype, batch_size=4, grad_accum=2, lr=1e-2, warmup_iters=2)
    losses = []
    for switches in ({}, {"cuda_graph": True, switch: True}):
        trainer = Trainer(CONFIG, dataclasses.replace(config, **switches), tmp_path / f"{len(switches)}")
        with trainer.backend:
            for _ in range(20):
                trainer._step()
        losses.append(torch.stack(trainer._losses))
    torch.testing.assert_close(*losses, rtol=0, atol=1e-3 if dtype == "fp32" else 3e-2)
    assert losses[1][-1] < losses[1][0] - 0.5


@every_backend
def test_a_graph_reads_the_learning_rate_at_each_replay(backend: str) -> None:
    torch.manual_seed(0)
    step = Step(GPT(CONFIG).to(DEVICE), backend)
    graph = captured(step)
    before = [p.detach().clone() for p in step.model.parameters()]
    step.run(graph.replay, [0.0])
    assert all(map(torch.equal, step.model.parameters(), before))
    step.run(graph.replay, [1e-2])
    assert not any(map(torch.equal, step.model.parameters(), before))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_backend
@pytest.mark.usefixtures("fresh_compiler")
def test_the_compiled_model_is_that_of_eager_mode(backend: str) -> None:
    model = GPT(CONFIG).to(DEVICE)
    twin = copy.deepcopy(model)
    tokens = torch.randint(CONFIG.vocab_size, (3, CONFIG.block_size + 1), device=DEVICE)
    results = []
    for gpt, run in ((model, model), (twin, torch.compile(twin, fullgraph=True))):
        torch.manual_seed(3)
        with use_backend(backend):
            _, loss = run(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in gpt.parameters())])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


@every_call
@every_backend
def test_two_runs_give_the_same_bits(name: str, backend: str) -> None:
    call = small_calls(DEVICE, batch=61, backend=backend)[name]
    first = call()
    for _ in range(3):
        assert all(map(torch.equal, call(), first))


@every_call
@every_backend
def test_a_second_gpu_runs_what_lies_on_it(name: str, backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert torch.cuda.current_device() == 0
    there, here = (small_calls(f"cuda:{index}", backend=backend)[name]() for index in (1, 0))
    assert {x.device.index for x in there} == {1}
    for got, wanted in zip(there, here, strict=True):
        torch.testing.assert_close(got.cpu(), wanted.cpu())


@pytest.fixture
def fp32_precision() -> Iterator[Callable[[str], None]]:
    """Sets how PyTorch makes products of fp32 matrices."""
    before = torch.backends.cuda.matmul.fp32_precision

    def choose(precision: str) -> None:
        torch.backends.cuda.matmul.fp32_precision = precision

    yield choose
    choose(before)


def attention_error(backend: str) -> float:
    """||error|| / ||truth|| over the output and the gradients, in fp32."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 130, 64, device=DEVICE) for _ in "qkvd"]

    def results(inputs: list[Tensor], backend: str) -> list[Tensor]:
        *qkv, do = (x.clone().requires_grad_() for x in inputs)
        o = ops.attention(*qkv, backend=backend)
        return [o.detach(), *torch.autograd.grad(o, qkv, do.detach())]

    truth = results([x.double() for x in inputs], "reference")
    pairs = zip(results(inputs, backend), truth, strict=True)
    return max(((got.double() - true).norm() / true.norm()).item() for got, true in pairs)


def test_products_of_fp32_are_exact_unless_pytorch_may_round_them(
    fp32_precision: Callable[[str], None],
) -> None:
    fp32_precision("ieee")
    assert attention_error("triton") < 1e-5
    fp32_precision("tf32")
    assert 5e-5 < attention_error("triton") < 5e-3
    fp32_precision("ieee")
    assert attention_error("triton") < 1e-5


FIRST_LAUNCHES = """
import warnings, torch
from fastgpt.benchmarks.small_calls import small_calls
from fastgpt.checkpoint import CheckpointWriter, RunState, find_checkpoint
calls = small_calls("cuda")
x = torch.ones(64, 64, device="cuda", requires_grad=True)
(x @ x).sum().backward()  # what PyTorch itself may warn of when it starts
with warnings.catch_warnings():
    warnings.simplefilter("error")
    for call in calls.values():
        call()
torch.cuda.synchronize()
"""


def test_no_kernel_warns_when_it_is_first_compiled(tmp_path: Path) -> None:
    """In a process of its own, with a cache of its own: what is compiled already has nothing more to say."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FIRST_LAUNCHES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert any(tmp_path.iterdir()), "nothing was compiled"


ANOTHER_BATCH_SIZE = """
import json, torch
from triton import knobs
from fastgpt.benchmarks.small_calls import small_calls
from fastgpt.checkpoint import CheckpointWriter, RunState, find_checkpoint
names = []
knobs.runtime.jit_post_compile_hook = lambda **about: names.append(about["fn"].name)
found = {}
for name in small_calls("cuda"):
    small_calls("cuda", batch=2)[name]()
    first = len(names)
    for batch in (3, 16, 1, 61):
        small_calls("cuda", batch=batch)[name]()
    found[name] = [first > 0, names[first:]]
    names.clear()
torch.cuda.synchronize()
print(json.dumps(found))
"""


def test_another_batch_size_compiles_nothing() -> None:
    """In a process of its own: what other tests have run needs no compiling."""
    done = subprocess.run([sys.executable, "-c", ANOTHER_BATCH_SIZE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {name: [True, []] for name in NAMES}


def test_a_checkpoint_is_of_its_moment_for_the_next_update_waits_for_its_copies(tmp_path):
    model = GPT(GPTConfig(block_size=33, vocab_size=65, n_layer=4, n_head=12, n_embd=768)).to(DEVICE)
    step = Step(model, "torch")
    step()
    wanted = {name: p.detach().cpu() for name, p in model.named_parameters()}
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(RunState(step=1), model, step.optimizer, best=True)
        writer.before_update()
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
    found = load_file(find_checkpoint(tmp_path) / "model.safetensors")
    assert all(torch.equal(found[name], p) for name, p in wanted.items())
