"""`fastgpt bench generate`: tokens per second of generation, by batch and by the length of the context.

A case is a model, a context of random tokens, a batch and a dtype. Its competitors, each backend of fastgpt with a
cache of keys and values and without, and, where there is a checkout, nanoGPT's own ``generate``, have the same weights.
Each first continues the context by its most probable tokens: wherever plain PyTorch, in fp32, finds another token far
more probable, the competitor is named as wrong and never timed. Then they take turns at drawing the same number of
tokens. The first token alone, for which the whole context is read, is timed likewise.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import GPT, use_backend
from fastgpt.benchmarks import models, session
from fastgpt.benchmarks.compare import competitor_of
from fastgpt.benchmarks.harness import (
    FEWEST_ROUNDS,
    Ceilings,
    Contestant,
    interleave,
    print_table,
    ratios,
    timer_for,
)
from fastgpt.benchmarks.machine import OtherWork
from fastgpt.benchmarks.models import LADDER, NANOGPT
from fastgpt.benchmarks.plain import PlainGPT
from fastgpt.benchmarks.result import Result, spread
from fastgpt.benchmarks.session import Outcome
from fastgpt.config import GPTConfig, UserError
from fastgpt.generate import generate
from fastgpt.placement import DTYPES

CASE_SECONDS = 60.0  # beyond the fewest rounds
CHECKED_TOKENS = 4
# By how much the logit of a token that was taken may be below the largest, of their spread (the standard deviation).
ALLOWED_LOSS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
UNCACHED = ", no cache"  # after a backend's name: it reads all tokens for each new one

DEFAULT_MODELS = {"cpu": ["shakespeare"], "cuda": ["gpt2"]}
DEFAULT_DTYPES = {"cpu": ["fp32"], "cuda": ["bf16"]}
DEFAULT_CONTEXTS = {"cpu": [16, 64, 192], "cuda": [16, 256, 896]}
DEFAULT_BATCH_SIZES = {"cpu": [1, 8], "cuda": [1, 8, 64]}
DEFAULT_NEW_TOKENS = {"cpu": 32, "cuda": 128}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says; an empty list and a zero take the defaults of the device.

    Args:
        models: rungs of ``models.LADDER``.
        contexts: tokens that are there before the first is drawn; by default those that fit into every model.
        new_tokens: that are drawn; with the context they fit into every model's block_size.
        nanogpt: a checkout.
    Raises:
        UserError: a name that is not there, or a number out of its range.
    """

    device: torch.device
    models: list[str] = dataclasses.field(default_factory=list)
    backends: list[str] = dataclasses.field(default_factory=list)
    dtypes: list[str] = dataclasses.field(default_factory=list)
    batch_sizes: list[int] = dataclasses.field(default_factory=list)
    contexts: list[int] = dataclasses.field(default_factory=list)
    new_tokens: int = 0
    rounds: int = 15
    nanogpt: Path | None = None

    def __post_init__(self) -> None:
        kind = self.device.type
        session.fill_in(self, models=DEFAULT_MODELS[kind], new_tokens=DEFAULT_NEW_TOKENS[kind])
        session.require_known("model", self.models, LADDER)
        room = min(LADDER[model][0].block_size for model in self.models) - self.new_tokens
        session.fill_in(
            self,
            dtypes=DEFAULT_DTYPES[kind],
            batch_sizes=DEFAULT_BATCH_SIZES[kind],
            contexts=[context for context in DEFAULT_CONTEXTS[kind] if context <= room] or DEFAULT_CONTEXTS[kind][:1],
        )
        session.require_known("dtype", self.dtypes, DTYPES)
        session.require_at_least("batch-size", min(self.batch_sizes), 1)
        session.require_at_least("context", min(self.contexts), 1)
        session.require_at_least("new-tokens", self.new_tokens, CHECKED_TOKENS)
        session.require_at_least("rounds", self.rounds, FEWEST_ROUNDS)
        if max(self.contexts) > room:
            raise UserError(
                f"--context {max(self.contexts)} and {self.new_tokens} new tokens do not fit into the "
                f"{room + self.new_tokens} tokens of the smallest model"
            )

    def settings(self) -> dict[str, Any]:
        """What a file says of them, and what must be the same where one is resumed."""
        return session.settings_of(self)


@dataclasses.dataclass(frozen=True)
class Case:
    """Who takes turns: ``who`` with this model, batch, context and dtype."""

    model: str
    config: GPTConfig
    batch_size: int
    context: int
    new_tokens: int
    dtype: str
    who: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.model}, {self.batch_size} x {self.context} + {self.new_tokens} tokens, {self.dtype}"

    def key(self) -> dict[str, Any]:
        return {
            "model": models.describe_model(self.model, self.config),
            **{name: getattr(self, name) for name in ("batch_size", "context", "new_tokens", "dtype")},
        }


@dataclasses.dataclass(frozen=True)
class Generator:
    """Who generates: ``draw(idx, count, greedy)`` gives (B, T + count) of (B, T); ``scope`` is entered around it."""

    draw: Callable[[Tensor, int, bool], Tensor]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __call__(self, idx: Tensor, count: int, dtype: torch.dtype, greedy: bool = False) -> Tensor:
        # Entered once, so that autocast casts each weight once, as nanoGPT's sample.py has it.
        with ExitStack() as stack:
            stack.enter_context(self.scope())
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(idx.device.type, dtype, enabled=dtype != torch.float32))
            return self.draw(idx, count, greedy)


def cases(options: Options, who: list[str]) -> list[Case]:
    """Every model, dtype, context and batch."""
    sizes = itertools.product(options.models, options.dtypes, options.contexts, options.batch_sizes)
    return [
        Case(model, LADDER[model][0], batch_size, context, options.new_tokens, dtype, tuple(who))
        for model, dtype, context, batch_size in sizes
    ]


def run(
    options: Options,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    limit_s: float | None = None,
    commit: str | None = None,
) -> Result:
    """The command. See ``session.start`` and ``session.run`` for the arguments and for what is returned."""
    backends, absent = models.choose_backends(options.backends, options.device)
    who = [backend + how for backend in backends for how in ("", UNCACHED)] + [NANOGPT] * bool(options.nanogpt)
    result = session.start("generate", options, out=out, resume=resume, commit=commit)
    measure = Generation(options).measure
    return session.run(result, cases(options, who), measure, options.device, absent, limit_s=limit_s, show=show)


class Generation:
    """Measures cases."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.device = options.device
        self.timer = timer_for(options.device)

    def measure(self, case: Case, ceilings: Ceilings, others: OtherWork) -> Outcome:
        """The rows of a case, and who has none."""
        torch.manual_seed(0)
        weights = GPT(case.config).state_dict()
        idx = torch.randint(case.config.vocab_size, (case.batch_size, case.context)).to(self.device)
        truth = PlainGPT(case.config, "fused").to(self.device).eval()
        truth.load_state_dict(weights)
        dtype = DTYPES[case.dtype]
        ready, left_out = {}, {}
        for name in case.who:
            try:
                generator = self._build(name, case.config, weights)
                wrong = wrong_tokens(generator(idx, CHECKED_TOKENS, dtype, greedy=True), idx, truth, dtype)
            except Exception as error:  # whatever one of them fails with, the others are to be timed
                wrong = session.reason_of(error)
            if wrong is None:
                ready[name] = generator
            else:
                left_out[name] = wrong
        del truth
        return Outcome(self._time(case, idx, ready, others) if ready else [], left_out)

    def _build(self, name: str, config: GPTConfig, weights: dict[str, Tensor]) -> Generator:
        model: Any
        if name == NANOGPT:
            assert self.options.nanogpt is not None
            model = models.nanogpt_model(self.options.nanogpt, config)
        else:
            model = GPT(config)
        model.load_state_dict(weights)
        model.to(self.device).eval()
        if name == NANOGPT:
            return Generator(lambda idx, count, greedy: model.generate(idx, count, top_k=1 if greedy else None))
        cached = not name.endswith(UNCACHED)

        def draw(idx: Tensor, count: int, greedy: bool) -> Tensor:
            temperature = 0.0 if greedy else 1.0
            return torch.cat([idx, *generate(model, idx, count, temperature=temperature, use_cache=cached)], dim=1)

        return Generator(draw, lambda: use_backend(name.removesuffix(UNCACHED)))

    def _time(self, case: Case, idx: Tensor, ready: dict[str, Generator], others: OtherWork) -> list[dict[str, Any]]:
        dtype = DTYPES[case.dtype]

        def contestants(count: int) -> dict[str, Contestant]:
            return {
                name: Contestant(lambda _, generator=generator: generator(idx, count, dtype))
                for name, generator in ready.items()
            }

        with others:
            first = interleave(contestants(1), self.timer, self.options.rounds, CASE_SECONDS)
            every = interleave(contestants(case.new_tokens), self.timer, self.options.rounds, CASE_SECONDS)
        tokens = case.batch_size * case.new_tokens
        times = {name: [sample.ms for sample in of_one] for name, of_one in every.items()}
        rows = []
        for name, ms in times.items():
            peers = [] if name == NANOGPT else [peer for peer in (NANOGPT, name + UNCACHED) if peer in times]
            rows.append(
                {
                    **case.key(),
                    **_who(name),
                    "tokens_per_s": spread(1e3 * tokens / sample for sample in ms),
                    "first_token_ms": spread(sample.ms for sample in first[name])["median"],
                    "samples_ms": ms,
                    "ratios": {peer: ratios(ms, times[peer]) for peer in peers},
                }
            )
        return rows


def _who(name: str) -> dict[str, str]:
    """What a row says of its competitor."""
    backend, _, mode = name.partition(", ")
    return {"competitor": backend, "mode": mode} if mode else {"competitor": backend}


def wrong_tokens(found: Tensor, idx: Tensor, truth: nn.Module, dtype: torch.dtype) -> str | None:
    """Why ``found`` is not what follows ``idx`` by the largest logit, as the end of a sentence, or None.

    Args:
        found: (B, T + n), int64.
        idx: (B, T), int64, the context.
        truth: gives the logits, in fp32.
        dtype: that ``found`` was computed in: logits that are nearer to each other than it can tell may be swapped.
    """
    B, T = idx.shape
    if found.shape[0] != B or found.shape[1] <= T or not torch.equal(found[:, :T], idx):
        return f"wrong: what it gave, of shape {tuple(found.shape)}, does not begin with the context"
    with torch.no_grad():
        logits = truth(found[:, :-1])[0][:, T - 1 :].float()  # (B, n, V)
    taken = logits.gather(-1, found[:, T:, None]).squeeze(-1)  # (B, n)
    below = ((logits.amax(-1) - taken) / logits.std(-1)).max().item()
    if not below <= ALLOWED_LOSS[dtype]:
        return (
            f"wrong: it took a token whose logit is {below:.3g} standard deviations below the largest, and "
            f"{ALLOWED_LOSS[dtype]:g} is allowed"
        )
    return None


def show(case: Case, outcome: Outcome) -> None:
    """Print a case's table."""
    rows = [
        (
            f"  {competitor_of(row)}",
            "{median:,.1f} ({min:,.1f}, {max:,.1f})".format_map(row["tokens_per_s"]),
            f"{row['first_token_ms']:.2f}",
        )
        for row in outcome.rows
    ]
    if rows:
        print_table((case.name, "tokens/s (min, max)", "first token, ms"), rows)
    session.show_left_out(case, outcome)
