"""Settings of a model and of a training run, and the presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """Something the user can put right: the command line prints it as one line and exits with 2."""


class TrainingError(RuntimeError):
    """The run cannot go on: the command line prints why as one line and exits with 1."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def field_types(config: type) -> dict[str, Any]:
    """{name: type} of a config's fields, the types resolved."""
    hints = get_type_hints(config)
    return {f.name: hints[f.name] for f in dataclasses.fields(config)}


def _check_at_least(config: Any, name: str, least: int, bits: int = 31) -> None:
    """``name`` is at least ``least`` and less than 2^``bits``: what comes from a file may ask for anything."""
    value = getattr(config, name)
    if not least <= value < float("inf"):
        raise UserError(f"{name} must be at least {least}, got {told(value)}")
    if value >= 2**bits:
        raise UserError(f"{name} must be less than 2^{bits}, got {told(value)}")


def _check_types(config: Any) -> None:
    """Every field holds its declared type (an int where a float is wanted becomes one)."""
    for name, wanted in field_types(type(config)).items():
        value = getattr(config, name)
        if get_origin(wanted) is Literal:
            if value not in get_args(wanted):
                raise UserError(f"{name} must be {_either(get_args(wanted))}, got {told(value)}")
        elif wanted is float and type(value) is int:
            object.__setattr__(config, name, _as_float(name, value))
        elif not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            raise UserError(f"{name} must be {_A_TYPE[wanted]}, got {told(value)}")


def _as_float(name: str, value: int) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise UserError(f"{name} must be a number that a float can hold, got {told(value)}") from error


def told(value: Any) -> str:
    """``value`` as a sentence repeats it: what comes from a file may be of any length."""
    text = hex(value) if isinstance(value, int) and value.bit_length() > 128 else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


_SIZE_BITS = 24  # of a model's sizes: no product of two, in bytes, exceeds an int64

_A_TYPE = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def _either(words: Sequence[str]) -> str:
    return " or ".join(repr(word) for word in words)


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a ``fastgpt.GPT``. The defaults are GPT-2's 124M.

    Raises:
        ValueError: sizes that are not positive or do not fit together, ``dropout`` outside [0, 1).
    """

    block_size: int = _option(1024, "longest context, in tokens")
    vocab_size: int = _option(50257, "number of different tokens (training takes it from the data unless it is given)")
    n_layer: int = _option(12, "number of blocks")
    n_head: int = _option(12, "attention heads per block")
    n_embd: int = _option(768, "width of the residual stream; n_head divides it")
    dropout: float = _option(0.0, "probability of dropping, in [0, 1): embeddings, attention weights, sublayer outputs")
    bias: bool = _option(True, "biases in linear layers and layer norms, as GPT-2 has them")
    gelu: Literal["none", "tanh"] = _option("tanh", 'GELU approximation: "none" is exact, "tanh" is GPT-2\'s')
    attention: Literal["fused", "unfused"] = _option(
        "fused", "fused: ops.attention_qkvpacked; unfused: matmul, ops.softmax, matmul"
    )
    tie_weights: bool = _option(True, "the output layer shares its weight with the token embedding")
    vocab_multiple: int = _option(1, "pad the embedding's rows to a multiple of this (64 suits tensor cores)")

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "vocab_multiple"):
            _check_at_least(self, name, 1, _SIZE_BITS)
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd must be a multiple of n_head, got n_embd {self.n_embd} and n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding: ``vocab_size`` rounded up to a multiple of ``vocab_multiple``."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class BigramConfig:
    """Shape of a ``fastgpt.Bigram``.

    Raises:
        ValueError: a size that is not positive.
    """

    block_size: int = _option(8, "tokens per training example (the model looks at one)")
    vocab_size: int = _option(50257, "number of different tokens (training takes it from the data unless it is given)")

    def __post_init__(self) -> None:
        _check_types(self)
        _check_at_least(self, "block_size", 1, _SIZE_BITS)
        _check_at_least(self, "vocab_size", 1, _SIZE_BITS)


ModelConfig = GPTConfig | BigramConfig
MODEL_CONFIGS: dict[str, type[GPTConfig] | type[BigramConfig]] = {"gpt": GPTConfig, "bigram": BigramConfig}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Raises:
        ValueError: a number out of its range.
    """

    data: str = _option(
        "shakespeare",
        '"shakespeare", "stdlib" (Python\'s own sources), a text file or folder, or one of fastgpt prepare',
    )
    tokenizer: str = _option(
        "auto",
        "char, byte, gpt2, bpe[:SIZE], sentencepiece[:SIZE] (trained on the text), or a tokenizer.json; auto: that of "
        "prepared data, else char",
    )
    init: str = _option(
        "",
        "weights to start from: gpt2, gpt2-medium, gpt2-large, gpt2-xl or OWNER/NAME of the Hugging Face Hub, a folder "
        "in its layout, a run, or nanoGPT's ckpt.pt",
    )
    backend: str = _option("", 'of all ops, or "op=backend,..."; default: FASTGPT_BACKEND, else "auto"')
    device: str = _option("auto", '"cpu", "cuda" or "cuda:N"; auto: cuda where there is one')
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = _option(
        "auto", "of matrix products and activations; auto: bf16 (or fp16) on a GPU, fp32 on a CPU"
    )
    seed: int = _option(1337, "of weights, batches and dropout")
    compile: bool = _option(False, "compile the model with torch.compile")
    cuda_graph: bool = _option(False, "replay each step as one CUDA graph: small models then wait for no launch")
    recompute: bool = _option(
        False, "activation checkpointing: compute blocks again in the backward instead of keeping what they made"
    )
    tf32: bool = _option(False, "make fp32 products on a GPU's tensor cores, of factors rounded to 10 bits")
    parallel: Literal["ddp", "fsdp"] = _option(
        "ddp", "of several processes (torchrun), each has the whole model (ddp) or a share of it (fsdp)"
    )
    batch_size: int = _option(12, "sequences per forward pass")
    grad_accum: int = _option(1, "forward passes per step of the optimizer; several processes share them")
    max_iters: int = _option(2000, "steps of the optimizer")
    lr: float = _option(1e-3, "learning rate after the warmup")
    min_lr: float = _option(1e-4, "learning rate at the end of the cosine")
    warmup_iters: int = _option(100, "steps in which the learning rate rises from 0")
    lr_decay_iters: int = _option(0, "step at which the cosine ends; 0: max_iters")
    beta1: float = _option(0.9, "AdamW's decay of the gradient's mean")
    beta2: float = _option(0.99, "AdamW's decay of the squared gradient's mean")
    weight_decay: float = _option(0.1, "AdamW's weight decay, on matrices only")
    grad_clip: float = _option(1.0, "largest joint norm of the gradients; 0: no clipping")
    eval_interval: int = _option(250, "steps between evaluations")
    eval_iters: int = _option(20, "batches averaged per evaluation and split")
    final_eval_iters: int = _option(200, "batches averaged in the last evaluation")
    log_interval: int = _option(10, "steps between lines of metrics.jsonl")
    checkpoint_interval: int = _option(
        0, "steps between checkpoints, beside those of the best evaluation and the end; 0: one with each evaluation"
    )
    keep: int = _option(2, "checkpoints that stay, counted from the last, beside the best")
    sample_tokens: int = _option(300, "tokens of generated text printed at the end; 0: none")
    tensorboard: bool = _option(False, "also write the metrics for TensorBoard, into RUN/tensorboard")
    profile: bool = _option(False, "trace steps 7 to 9 of what is run now into RUN/trace.json, for chrome://tracing")

    def __post_init__(self) -> None:
        _check_types(self)
        for name in (
            "grad_accum",
            "max_iters",
            "eval_interval",
            "eval_iters",
            "final_eval_iters",
            "log_interval",
            "keep",
        ):
            _check_at_least(self, name, 1)
        _check_at_least(self, "batch_size", 1, 20)
        for name in ("warmup_iters", "lr_decay_iters", "checkpoint_interval", "sample_tokens"):
            _check_at_least(self, name, 0)
        for name in ("weight_decay", "grad_clip", "min_lr"):
            _check_at_least(self, name, 0)
        _check_at_least(self, "seed", 0, 63)
        if not 0 < self.lr < float("inf"):
            raise UserError(f"lr must be greater than 0 and finite, got {self.lr}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class Preset:
    """A model and the settings it is trained with; ``source`` says where they come from."""

    model: ModelConfig
    train: TrainConfig
    source: str


def _gpt2(n_layer: int, n_head: int, n_embd: int) -> Preset:
    return Preset(
        GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_multiple=64),
        TrainConfig(
            batch_size=12,
            grad_accum=40,
            max_iters=600_000,
            lr=6e-4,
            min_lr=6e-5,
            warmup_iters=2000,
            beta2=0.95,
            eval_interval=1000,
            eval_iters=200,
        ),
        "GPT-2's shape; 491,520 tokens a step and nanoGPT's schedule (nanoGPT config/train_gpt2.py)",
    )


PRESETS = {
    "bigram": Preset(
        BigramConfig(block_size=8),
        TrainConfig(
            batch_size=32,
            max_iters=3000,
            lr=1e-2,
            min_lr=1e-2,
            warmup_iters=0,
            beta2=0.999,
            weight_decay=0.01,
            grad_clip=0.0,
            eval_interval=300,
            eval_iters=200,
        ),
        "the bigram of the lecture; validation loss 2.49 on Tiny Shakespeare",
    ),
    "shakespeare-cpu": Preset(
        GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=128, bias=False, gelu="none"),
        TrainConfig(),
        "0.80M parameters, nanoGPT's settings for a CPU; validation loss 1.89 on Tiny Shakespeare",
    ),
    "shakespeare": Preset(
        GPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2, bias=False, gelu="none"),
        TrainConfig(batch_size=64, max_iters=5000, eval_iters=200),
        "10.65M parameters (nanoGPT config/train_shakespeare_char.py); validation loss 1.47 on Tiny Shakespeare",
    ),
    "finetune-shakespeare": Preset(
        GPTConfig(),
        TrainConfig(
            init="gpt2-xl",
            batch_size=1,
            grad_accum=32,
            max_iters=20,
            lr=3e-5,
            min_lr=3e-5,
            warmup_iters=0,
            beta2=0.95,
            eval_interval=5,
            eval_iters=40,
            final_eval_iters=40,
        ),
        "GPT-2 XL, or what --init names, fine-tuned at a constant rate (nanoGPT config/finetune_shakespeare.py)",
    ),
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
}
