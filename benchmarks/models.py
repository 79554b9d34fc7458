"""Those who train and generate side by side: fastgpt on each backend, the same GPT in plain PyTorch, and nanoGPT.

All of a round have the same sizes, the same weights and the same batches of random tokens. ``true_steps`` says what a
training step must give, ``difference`` whether one does: who computes something else is not timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgpt import GPT, dispatch, ops, use_backend
from fastgpt.benchmarks.kernels import reason_not_to_time
from fastgpt.benchmarks.plain import PlainGPT, plain_optimizer
from fastgpt.config import PRESETS, GPTConfig, TrainConfig, UserError
from fastgpt.data import Batches
from fastgpt.optim import build_optimizer, gradients

VOCAB_SIZE = 65  # symbols of Tiny Shakespeare
PLAIN, PLAIN_NAIVE, NANOGPT, NANOGPT_CUDNN = "plain", "plain naive", "nanoGPT", "nanoGPT with cuDNN"
_NO_CHECKOUT = "no checkout of it was named (--vs nanogpt=PATH)"

Mode = Literal["eager", "compile"]
Batch = tuple[Tensor, Tensor]  # tokens and targets, both (B, T)

CHECKED_STEPS = 3
# How far a step may be from the truth: its loss in nats, the norm of each gradient relatively, but a small one by its
# part of the largest. The steps are on one batch, from which a model learns much at once: a wrong update shows in the
# next loss. In 16 bits the signs of a few tiny gradients, and with them whole updates, fall otherwise.
ALLOWED_LOSS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
ALLOWED_NORM = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
SMALL_NORM = 0.01
TRUTH_TOKENS = 2048  # in a forward pass of the truth, which must fit in memory where those it is for do


def _rung(preset: str, **sizes: int) -> tuple[GPTConfig, TrainConfig]:
    """A preset, or other sizes of it, with the exact GELU that nanoGPT has, and no dropout."""
    config = PRESETS[preset].model
    assert isinstance(config, GPTConfig)
    if preset.startswith("shakespeare"):
        sizes["vocab_size"] = VOCAB_SIZE
    return dataclasses.replace(config, gelu="none", dropout=0.0, **sizes), PRESETS[preset].train  # type: ignore[arg-type]


# The ladder of sizes, ascending: those of the presets, and two between that nobody trains.
LADDER = {
    "shakespeare-cpu": _rung("shakespeare-cpu"),  # 0.80M parameters
    "small": _rung("shakespeare", n_embd=192),  # 2.7M
    "shakespeare": _rung("shakespeare"),  # 10.7M
    "medium": _rung("shakespeare", n_layer=8, n_head=8, n_embd=640),  # 40M
    "gpt2": _rung("gpt2"),  # 124M
    "gpt2-medium": _rung("gpt2-medium"),  # 355M
    "gpt2-large": _rung("gpt2-large"),  # 774M
    "gpt2-xl": _rung("gpt2-xl"),  # 1558M
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says, whatever is measured of the models; an empty list takes the defaults of the device.

    Args:
        models: rungs of ``LADDER``.
        backends: none takes those that run every op on the device.
        rounds: samples of each competitor at most.
        nanogpt: a checkout.
    """

    device: torch.device
    models: list[str] = dataclasses.field(default_factory=list)
    backends: list[str] = dataclasses.field(default_factory=list)
    dtypes: list[str] = dataclasses.field(default_factory=list)
    batch_sizes: list[int] = dataclasses.field(default_factory=list)
    rounds: int = 15
    nanogpt: Path | None = None

    def fill_in(self, **defaults: Any) -> None:
        """Give the fields that are empty or zero their defaults."""
        for name, default in defaults.items():
            object.__setattr__(self, name, getattr(self, name) or default)

    def settings(self) -> dict[str, Any]:
        """Without what the file says elsewhere or nobody else's disk has."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "device": self.device.type, "nanogpt": self.nanogpt is not None}


def require_known(what: str, values: Sequence[str], known: Iterable[str]) -> None:
    """
    Raises:
        UserError: one of the values is not known.
    """
    for value in values:
        if value not in known:
            raise UserError(f"there is no {what} {value!r} to measure; there are {', '.join(known)}")


def require_at_least(what: str, value: int, least: int) -> None:
    """
    Raises:
        UserError: the value is less.
    """
    if value < least:
        raise UserError(f"--{what} must be at least {least}, got {value}")


@functools.cache  # a model is built for it, if without any memory
def describe_model(name: str, config: GPTConfig) -> dict[str, Any]:
    """A row's "model". Parameters are counted as nanoGPT does: without those of the positions."""
    with torch.device("meta"):
        parameters = GPT(config).num_params(positions=False)
    sizes = {field: getattr(config, field) for field in ("n_layer", "n_embd", "n_head")}
    return {"name": name, "parameters": parameters, **sizes, "vocab_size": config.padded_vocab_size}


class Checked(NamedTuple):
    """What a training step gave: its loss, and the norm of each parameter's gradient before they are clipped."""

    loss: float
    norms: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Competitor:
    """A model with what updates it; ``scope`` is entered around its steps, autocast to ``dtype`` around its forward."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    clip: Callable[[], Tensor]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    dtype: torch.dtype = torch.float32
    mode: Mode = "eager"
    scaler: torch.amp.GradScaler = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        # From its usual 65,536 it would first have to come down, by steps that update nothing.
        scaler = torch.amp.GradScaler(self.device.type, init_scale=1024.0, enabled=self.dtype == torch.float16)
        object.__setattr__(self, "scaler", scaler)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def label(self) -> str:
        return f"{self.name}, {self.mode}"

    def tensors(self) -> Iterator[tuple[Tensor, Callable[[Tensor], None]]]:
        """What it holds between two steps: each tensor, and what puts another one in its place."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            yield tensor.data, lambda new, tensor=tensor: setattr(tensor, "data", new)  # type: ignore[misc]
        for store in (*self.optimizer.state.values(), *self.optimizer.param_groups):
            for key, value in store.items():
                if isinstance(value, Tensor):
                    yield value, lambda new, store=store, key=key: store.__setitem__(key, new)  # type: ignore[misc]

    def held_bytes(self) -> int:
        """Weights, and what the optimizer keeps."""
        return sum(tensor.nbytes for tensor, _ in self.tensors())

    def move(self, device: torch.device) -> None:
        """Take what it holds to ``device``, but for the optimizers' counts of steps, which stay where they belong."""
        for tensor, put in list(self.tensors()):
            if tensor.dim():
                put(tensor.to(device))


def step(competitor: Competitor, batch: Batch, mark: Callable[[str], None] = lambda part: None) -> Tensor:
    """One training step; returns its loss, a scalar.

    ``mark`` is called after each part of the step with its name: "forward", "backward", and "optimizer" for clipping,
    the update and dropping the gradients.
    """
    with torch.autocast(batch[0].device.type, competitor.dtype, enabled=competitor.dtype != torch.float32):
        _, loss = competitor.model(*batch)
    mark("forward")
    competitor.scaler.scale(loss).backward()
    mark("backward")
    competitor.scaler.unscale_(competitor.optimizer)
    competitor.clip()
    competitor.scaler.step(competitor.optimizer)
    competitor.scaler.update()
    competitor.optimizer.zero_grad(set_to_none=True)
    mark("optimizer")
    return loss.detach()


def random_batches(config: GPTConfig, batch_size: int, device: torch.device | str = "cpu") -> Batches:
    """Batches of uniformly random tokens, drawn and brought to the device as those of a training run are."""
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=1 << 20, dtype=np.uint16)
    return Batches(tokens, batch_size, config.block_size, 0, "benchmark", torch.device(device))


# ---------------------------------------------------------------------------------------------------------------------
# What is right
# ---------------------------------------------------------------------------------------------------------------------


def true_steps(config: GPTConfig, train: TrainConfig, weights: dict[str, Tensor], batch: Batch) -> list[Checked]:
    """The first training steps on ``batch``, by plain PyTorch in fp32, a part of the batch at a time."""
    x, y = batch
    plain = plain_competitor(PLAIN, PlainGPT(config, "fused").to(x.device), train, weights)
    sequences = truth_batch(config)
    found = []
    for _ in range(CHECKED_STEPS):
        plain.model.eval()  # without dropout
        total = 0.0
        for part in zip(x.split(sequences), y.split(sequences), strict=True):
            loss = plain.model(*part)[1] * (len(part[0]) / len(x))
            loss.backward()
            total += loss.item()
        found.append(Checked(total, gradient_norms(plain)))
        plain.clip()
        plain.optimizer.step()
        plain.optimizer.zero_grad(set_to_none=True)
    return found


def truth_batch(config: GPTConfig) -> int:
    """Sequences in a forward pass of the truth."""
    return max(1, TRUTH_TOKENS // config.block_size)


def first_steps(competitor: Competitor, batch: Batch, dropout: float) -> list[Checked]:
    """The same of a competitor, without dropout, for which each draws masks of its own."""
    norms: list[dict[str, float]] = []

    def look(part: str) -> None:
        if part == "backward":
            norms.append(gradient_norms(competitor))

    competitor.model.train(dropout == 0)  # another mode is another thing to compile
    with competitor.scope():
        losses = [step(competitor, batch, look).item() for _ in range(CHECKED_STEPS)]
    competitor.model.train()
    return list(map(Checked, losses, norms))


def gradient_norms(competitor: Competitor) -> dict[str, float]:
    """By parameter; between the backward and the optimizer's step."""
    scale = competitor.scaler.get_scale()
    with torch.no_grad():
        grads = [p.grad for p in competitor.model.parameters()]
        norms = torch.stack([torch.zeros(()) if grad is None else grad.norm().cpu() / scale for grad in grads])
    return dict(zip((name for name, _ in competitor.model.named_parameters()), norms.tolist(), strict=True))


def difference(found: list[Checked], truth: list[Checked], dtype: torch.dtype) -> str | None:
    """Why ``found`` is wrong, as the end of a sentence, or None."""
    for number, (mine, true) in enumerate(zip(found, truth, strict=True), start=1):
        if not abs(mine.loss - true.loss) <= ALLOWED_LOSS[dtype]:  # a NaN differs, too
            return f"wrong: at step {number} its loss is {mine.loss:.6f}, where {true.loss:.6f} is right"
        largest = max(true.norms.values())
        for name, norm in true.norms.items():
            got = mine.norms[name]
            if not abs(got - norm) <= ALLOWED_NORM[dtype] * max(norm, SMALL_NORM * largest):
                return f"wrong: at step {number} the norm of {name}'s gradient is {got:.6g}, where {norm:.6g} is right"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Who competes
# ---------------------------------------------------------------------------------------------------------------------


def usable_backends(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """The backends that run every op on ``device`` as it is meant to run, and of the others why not."""
    usable, absent = [], {}
    for backend in dispatch.BACKENDS:
        reasons = (reason_not_to_time(op, backend, device, torch.float32) for op in dispatch.OPS)
        reason = next(filter(None, reasons), None)
        if reason is None:
            usable.append(backend)
        else:
            absent[backend] = reason
    return usable, absent


def choose_backends(options: Options) -> tuple[list[str], dict[str, str]]:
    """``usable_backends``, but those that are wanted alone where any are named; and nanoGPT, where it is not here.

    Raises:
        UserError: one of them is unknown, or cannot be timed here, with the reason.
    """
    usable, absent = usable_backends(options.device)
    for backend in options.backends:
        if backend not in dispatch.BACKENDS:
            raise UserError(f"there is no backend {backend!r}; the backends are {', '.join(dispatch.BACKENDS)}")
        if backend in absent:
            raise UserError(f"backend {backend!r} cannot be timed here: {absent[backend]}")
    if options.backends:
        usable, absent = list(dict.fromkeys(options.backends)), {}
    return usable, absent if options.nanogpt else {**absent, NANOGPT: _NO_CHECKOUT}


def peers(backends: Sequence[str], nanogpt: Path | None, device: torch.device) -> list[str]:
    """Names of those that are not fastgpt; beside the reference, what is likewise spelled out in tensor algebra."""
    return [
        PLAIN,
        *([PLAIN_NAIVE] if "reference" in backends else []),
        *([NANOGPT] if nanogpt else []),
        *([NANOGPT_CUDNN] if nanogpt and device.type == "cuda" else []),
    ]


def parse_vs(text: str | None) -> Path | None:
    """The checkout that "nanogpt=PATH" names.

    Raises:
        UserError: another text, or no checkout of nanoGPT there.
    """
    if text is None:
        return None
    name, _, path = text.partition("=")
    if name.lower() != "nanogpt" or not path:
        raise UserError(f"--vs must be nanogpt=PATH, a checkout of nanoGPT, got {text!r}")
    checkout = Path(path).expanduser()
    if not (checkout / "model.py").is_file():
        raise UserError(f"--vs: there is no model.py in {checkout}")
    return checkout


def build_competitor(
    name: str,
    config: GPTConfig,
    train: TrainConfig,
    weights: dict[str, Tensor],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    mode: Mode = "eager",
    nanogpt: Path | None = None,
) -> Competitor:
    """The competitor of that name, a backend's or one of ``peers``, on ``device`` and ready to train."""
    if name in (PLAIN, PLAIN_NAIVE):
        model = PlainGPT(config, "fused" if name == PLAIN else "naive").to(device)
        competitor = plain_competitor(name, model, train, weights)
    elif name in (NANOGPT, NANOGPT_CUDNN):
        assert nanogpt is not None
        competitor = nanogpt_competitor(name, nanogpt, config, train, weights, device)
    else:
        competitor = fastgpt_competitor(name, config, train, weights, device)
    if mode == "compile":
        competitor.model.compile()
    return dataclasses.replace(competitor, dtype=dtype, mode=mode)


def fastgpt_competitor(
    backend: str, config: GPTConfig, train: TrainConfig, weights: dict[str, Tensor], device: torch.device
) -> Competitor:
    model = GPT(config)
    model.load_state_dict(weights)
    model.to(device)
    return Competitor(
        backend,
        model,
        build_optimizer(model, train),
        lambda: ops.clip_grad_norm_(gradients(model), train.grad_clip),
        lambda: use_backend(backend),
    )


def plain_competitor(
    name: str,
    model: nn.Module,
    train: TrainConfig,
    weights: dict[str, Tensor],
    build: Callable[[Any, TrainConfig], torch.optim.Optimizer] = plain_optimizer,
) -> Competitor:
    model.load_state_dict(weights)
    parameters = list(model.parameters())
    return Competitor(name, model, build(model, train), lambda: nn.utils.clip_grad_norm_(parameters, train.grad_clip))


def import_nanogpt(checkout: Path) -> ModuleType:
    """nanoGPT's model.py, run anew at each call: ``torch.compile`` then shares nothing between two models of it."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def nanogpt_model(checkout: Path, config: GPTConfig) -> nn.Module:
    """nanoGPT's model; it knows the exact GELU and tied weights only, as those of ``LADDER`` have them."""
    module = import_nanogpt(checkout)
    sizes = {field: getattr(config, field) for field in ("block_size", "n_layer", "n_head", "n_embd")}
    settings = module.GPTConfig(vocab_size=config.padded_vocab_size, dropout=config.dropout, bias=config.bias, **sizes)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        return module.GPT(settings)


def nanogpt_competitor(
    name: str,
    checkout: Path,
    config: GPTConfig,
    train: TrainConfig,
    weights: dict[str, Tensor],
    device: torch.device,
) -> Competitor:
    """nanoGPT's model and optimizer. Its attention is what PyTorch prefers, or for ``NANOGPT_CUDNN`` cuDNN's."""

    def build(model: Any, train: TrainConfig) -> torch.optim.Optimizer:
        with contextlib.redirect_stdout(io.StringIO()):
            return model.configure_optimizers(train.weight_decay, train.lr, (train.beta1, train.beta2), device.type)

    competitor = plain_competitor(name, nanogpt_model(checkout, config).to(device), train, weights, build)
    if name == NANOGPT_CUDNN:
        return dataclasses.replace(competitor, scope=lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION))
    return competitor
