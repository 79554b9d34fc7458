"""The ``fastgpt`` command."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import io
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NoReturn

import torch
import typer
from rich import filesize
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import fastgpt
from fastgpt import dispatch, distributed
from fastgpt.attention_maps import draw_attention
from fastgpt.benchmarks.compare import THRESHOLD, compare
from fastgpt.benchmarks.result import load
from fastgpt.checkpoint import find_checkpoint, load_model, read_config
from fastgpt.config import (
    MODEL_CONFIGS,
    PRESETS,
    GPTConfig,
    ModelConfig,
    TrainConfig,
    TrainingError,
    UserError,
    field_types,
)
from fastgpt.data import load_dataset, load_tokens, prepare
from fastgpt.generate import check_sampling, generate_texts
from fastgpt.metrics import Axis, plot_losses
from fastgpt.model import GPT
from fastgpt.perplexity import text_loss
from fastgpt.placement import DTYPES, device_name, pick_backend, pick_device, pick_dtype
from fastgpt.pretrained import export_hf, find_pretrained, open_model
from fastgpt.shards import SPLITS, Shard
from fastgpt.tokenizer import Tokenizer, make_tokenizer, wanted_size
from fastgpt.train import Trainer, evaluation_batches, mean_loss
from fastgpt.triton_kernels import library as triton_library

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What typer raises on a wrong command line: its own since it carries click inside, click's before.
_USAGE_ERROR: Any = getattr(typer, "TyperException", None) or importlib.import_module("click").ClickException

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train a GPT whose hot operations run on interchangeable kernels.",
)

_DeviceOption = Annotated[
    str, typer.Option("--device", help='"cpu", "cuda" or "cuda:N"; auto: cuda where there is one')
]
_BackendOption = Annotated[
    str, typer.Option("--backend", help='of all ops, or "op=backend,..."; default: FASTGPT_BACKEND, else "auto"')
]
_RunArgument = Annotated[Path, typer.Argument(metavar="DIR", help="a run's folder")]
_CHECKPOINT = typer.Option("--checkpoint", metavar="last|best|step-N", help="which one of a run; default: best")
_SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="a run's folder; or as for train --init: a folder in Hugging Face's layout, nanoGPT's ckpt.pt, or a name "
        "of the Hub",
    ),
]
_TokenizerOption = Annotated[
    str | None,
    typer.Option("--tokenizer", help="of weights that bring none: gpt2, byte or the path of a tokenizer.json"),
]


def main() -> NoReturn:
    """Run the command line: a user's error is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows another one
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
        if code == 128 + signal.SIGINT:  # what typer makes of an interrupt, without a word
            raise KeyboardInterrupt
        distributed.leave()
    except (UserError, TrainingError) as error:
        _fail(str(error), 2 if isinstance(error, UserError) else 1)
    except _USAGE_ERROR as error:
        _fail(error.format_message(), 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone: there is nobody to tell
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except (MemoryError, torch.OutOfMemoryError) as error:
        _fail(f"out of memory: {error}", 1)
    except RuntimeError as error:
        if distributed.lost_a_process(error):
            _fail("another process of this run has ended; it has said why, or torchrun's report does", 1)
        if "allocate" not in str(error):  # PyTorch's CPU allocator raises no type of its own
            raise
        _fail("out of memory: the model or the batch is too large for this machine", 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(code if isinstance(code, int) else 0)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """End as an interrupt does, through everything that cleans up, and with the code that a shell has for it."""
    signal.signal(number, signal.SIG_DFL)  # once more ends it at once
    _fail("terminated", 128 + number)


def _fail(message: str, code: int) -> NoReturn:
    if message and distributed.is_first_to_fail():  # typer has none where it has printed the help
        print("fastgpt: " + " ".join(message.replace("Value error, ", "").split()), file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(fastgpt.__version__)
        raise typer.Exit


# ---------------------------------------------------------------------------------------------------------------------
# fastgpt train
# ---------------------------------------------------------------------------------------------------------------------


def _train(
    preset: str | None, config: Path | None, out: Path | None, resume: bool, checkpoint: str | None, **overrides: Any
) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until the loop, which saves: who waits for others cannot clean up
    world = distributed.join()
    given = {name: value for name, value in overrides.items() if value is not None}
    if resume:
        if out is None:
            raise UserError("--resume needs --out DIR, the folder of the run to continue")
        if preset or config:
            raise UserError("--resume takes its settings from the run: leave out --preset and --config")
        if "init" in given:
            raise UserError("--resume goes on with the run's own weights: leave out --init")
        model_config, train_config, tokenizer = read_config(out)
        if "tokenizer" in given and _names(given["tokenizer"], tokenizer, train_config):
            del given["tokenizer"]  # which may be another name of what the run has
        called = tokenizer.kind if train_config.tokenizer == "auto" else train_config.tokenizer
        fixed: dict[str, Any] = {**dataclasses.asdict(model_config), "tokenizer": called}
        for name in fixed.keys() & given.keys():
            if given[name] != fixed[name]:
                raise UserError(f"--{name.replace('_', '-')} cannot change when a run is resumed: it is {fixed[name]}")
    else:
        if checkpoint:
            raise UserError("--checkpoint goes with --resume: it says which checkpoint to go on from")
        preset, given = _settings(preset, config, given)
        if preset is None and given.get("init"):
            preset = "finetune-shakespeare"
        elif preset is None:
            device = pick_device(given.get("device", "auto"))
            preset = "shakespeare-cpu" if device.type == "cpu" else "shakespeare"
        model_config, train_config = PRESETS[preset].model, PRESETS[preset].train
    model_config, train_config = _override(model_config, train_config, given)
    run = Path(world.same(str(out or Path("runs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}")))
    init = None
    if train_config.init and not resume:
        if not isinstance(model_config, GPTConfig):
            raise UserError(f"--init needs the preset of a GPT, which {preset} is not")
        own = {name: given[name] for name in field_types(GPTConfig).keys() & given.keys()}
        init = find_pretrained(train_config.init, **{"dropout": model_config.dropout, **own})
        model_config = init.config

    console = Console(soft_wrap=True, highlight=False, quiet=not world.is_main)
    trainer = Trainer(
        model_config,
        train_config,
        run,
        keep_vocab_size="vocab_size" in given,
        resume=resume,
        checkpoint=checkpoint or "last",
        init=init,
        console=console,
    )
    console.print(trainer.describe(), markup=False)
    finished = trainer.run_until_done()
    if not world.is_main:
        return
    state = trainer.state
    if not finished:
        saved = f"saved in {find_checkpoint(run)}" if state.step else "nothing to save yet"
        console.print(f"stopped at step {state.step}, {saved}", markup=False)
        if state.step:
            console.print(f"go on with: fastgpt train --resume --out {run}", markup=False)
        return
    if train_config.sample_tokens and not distributed.is_sharded(trainer.model):
        console.print("\na sample:\n", style="bold")
        tokenizer = trainer.dataset.tokenizer
        prompts = [tokenizer.beginning]
        with trainer.backend:
            _stream(trainer.model.eval(), tokenizer, prompts, train_config.sample_tokens, trainer.device)
    table = Table(title=f"{run.resolve().name}, {state.step} steps", title_justify="left", show_header=False)
    batches = f"over {train_config.final_eval_iters} batches"
    table.add_row("train loss", f"{state.train_loss:.4f}", batches)
    table.add_row("validation loss", f"{state.val_loss:.4f}", batches)
    table.add_row("speed", f"{trainer.tokens_per_s:,.0f} tokens/s", f"{device_name(trainer.device)}, training steps")
    console.print(table)
    console.print(f"checkpoint: {find_checkpoint(run)}", markup=False)
    console.print(f"sample from it: fastgpt sample {run}", markup=False)


def _names(tokenizer: str, own: Tokenizer, config: TrainConfig) -> bool:
    """Whether a ``--tokenizer`` names the one that a run has, by what it was called or what it is."""
    if tokenizer.endswith(".json"):
        return make_tokenizer(tokenizer, tuple).to_json() == own.to_json()
    return tokenizer == config.tokenizer or (tokenizer == own.kind and wanted_size(tokenizer) is None)


def _train_signature() -> inspect.Signature:
    """Options for every field of the configs: typed, and None where they are not given."""
    parameters = [
        _option("preset", Literal[tuple(PRESETS)], "default: shakespeare-cpu, or shakespeare where there is a GPU"),
        _option("config", Path, "TOML file of settings, named as these options with underscores"),
        _option("out", Path, "the run's folder; default: runs/PRESET-TIME"),
        inspect.Parameter(
            "resume",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--resume", help="continue the run in --out")],
        ),
        _option("checkpoint", str, "with --resume, the one to go on from: last (the default), best or step-N"),
    ]
    for config, panel in ((TrainConfig, "Training"), *((c, "Model") for c in MODEL_CONFIGS.values())):
        types = field_types(config)
        for field in dataclasses.fields(config):
            if field.name not in [p.name for p in parameters]:
                parameters.append(_option(field.name, types[field.name], field.metadata["help"], panel))
    return inspect.Signature(parameters)


def _option(name: str, kind: Any, help: str, panel: str = "Options") -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag, help=help, show_default=False, rich_help_panel=panel
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


_signature = _train_signature()
_train.__signature__ = _signature  # type: ignore[attr-defined]
_train.__annotations__ = {p.name: p.annotation for p in _signature.parameters.values()}
app.command(
    "train",
    help="Train a model. A setting given here wins over --config, and that over the preset's. Presets:\n\n"
    + "\n\n".join(f"{name}: {preset.source}" for name, preset in PRESETS.items()),
)(_train)


def _settings(preset: str | None, config: Path | None, given: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The preset's name, None where neither the command line nor the file has one, and the settings over it."""
    settings = {**(_read_toml(config) if config else {}), **given}
    of_file = settings.pop("preset", None)
    name = of_file if preset is None else preset
    if name is not None and (not isinstance(name, str) or name not in PRESETS):
        raise UserError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}")
    return name, settings


def _read_toml(path: Path) -> dict[str, Any]:
    """The settings of a TOML file: top-level keys, or tables [model] and [train]."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not a TOML file: {error}") from error
    of_train = set(field_types(TrainConfig))
    of_model = set().union(*(field_types(c) for c in MODEL_CONFIGS.values()))
    known = {"": {"preset", *of_train, *of_model}, "model": of_model, "train": of_train}
    tables = {name: data.pop(name) for name in ("model", "train") if isinstance(data.get(name), dict)}
    settings: dict[str, Any] = {}
    for table, values in {"": data, **tables}.items():
        for name, value in values.items():
            if name not in known[table]:
                near = difflib.get_close_matches(name, known[table], 1)
                where = f" in [{table}]" if table else ""
                hint = f": did you mean {near[0]!r}?" if near else ""
                raise UserError(f"{path}: unknown setting {name!r}{where}{hint}")
            if name in settings:
                raise UserError(f"{path}: {name!r} is set twice")
            settings[name] = value
    return settings


def _override(model: ModelConfig, train: TrainConfig, given: dict[str, Any]) -> tuple[ModelConfig, TrainConfig]:
    of_model, of_train = field_types(type(model)), field_types(TrainConfig)
    for name in given:
        if name not in of_model and name not in of_train:
            raise UserError(f"this preset's model has no {name} (it has {', '.join(of_model)})")
    return (
        dataclasses.replace(model, **{name: given[name] for name in given if name in of_model}),
        dataclasses.replace(train, **{name: given[name] for name in given if name in of_train}),
    )


# ---------------------------------------------------------------------------------------------------------------------
# fastgpt prepare
# ---------------------------------------------------------------------------------------------------------------------


@app.command("prepare")
def prepare_data(
    data: Annotated[str, typer.Option(help="shakespeare, stdlib, a text file or folder, openwebtext or fineweb-edu")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="the folder to write")],
    tokenizer: Annotated[str, typer.Option(help="as in train")] = "gpt2",
    processes: Annotated[int | None, typer.Option(min=1, help="that tokenize; default: one per core")] = None,
) -> None:
    """Tokenize a text or a corpus for `fastgpt train --data DIR`; cut short, the same command goes on."""
    console = Console(soft_wrap=True, highlight=False)
    columns = (
        TextColumn("{task.description}"),
        SpinnerColumn(),
        TextColumn("{task.fields[done]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("tokenizing", total=None, done="")
        shards: list[Shard] = []

        def report(shard: Shard) -> None:
            shards.append(shard)
            tokens, num_bytes = sum(s.tokens for s in shards), sum(s.text_bytes for s in shards)
            bar.update(task, done=f"{len(shards)} shards, {tokens:,} tokens of {filesize.decimal(num_bytes)}")

        header = prepare(data, tokenizer, out, processes or os.cpu_count() or 1, report, notify=console.print)
    wanted = wanted_size(tokenizer)
    fewer = "" if wanted in (None, header.vocab_size) else f" (the text has no more for {wanted:,})"
    console.print(f"vocabulary: {header.vocab_size:,} tokens{fewer}")
    for split in SPLITS:
        tokens = sum(shard.tokens for shard in header.shards if shard.file.startswith(split))
        console.print(f"{split}: {tokens:,} tokens")
    console.print(f"train on it: fastgpt train --data {out}", markup=False)


# ---------------------------------------------------------------------------------------------------------------------
# fastgpt sample, attention, eval, explain
# ---------------------------------------------------------------------------------------------------------------------


@app.command()
def sample(
    source: _SourceArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="text to continue; \\n is a new line; repeatable, then as one batch"),
    ] = None,
    num_tokens: Annotated[int, typer.Option(min=1, help="tokens to draw")] = 500,
    temperature: Annotated[float, typer.Option(help="divides the logits; 0: always the most probable token")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="draw from the K most probable tokens")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw from the fewest tokens that add up to P")] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="above 1: what the text has already becomes less probable")
    ] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; \\n is a new line; repeatable")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="texts to draw of each prompt")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="draw the same texts each time")] = None,
    cache: Annotated[bool, typer.Option(help="keep keys and values; without, all is read for each token")] = True,
    checkpoint: Annotated[str | None, _CHECKPOINT] = None,
    tokenizer: _TokenizerOption = None,
    device: _DeviceOption = "auto",
    dtype: Annotated[Literal["auto", "fp32", "bf16", "fp16"], typer.Option(help="as in training")] = "auto",
    backend: _BackendOption = "",
) -> None:
    """Generate text: of one prompt as it comes, of several each as a whole."""
    check_sampling(temperature, top_k, top_p, repetition_penalty)
    where = pick_device(device)
    of = pick_dtype(dtype, where)
    choice = pick_backend(backend, where, of)
    model, its_tokenizer, _, _ = open_model(source, checkpoint, tokenizer)
    model.to(where)
    prompts = [_unescape(text) for text in prompt or [its_tokenizer.beginning]]
    generator = torch.Generator(where)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    with choice, torch.autocast(where.type, dtype=of, enabled=of != torch.float32):
        for index in range(num_samples):
            if index:
                print("-" * 40)
            _stream(
                model,
                its_tokenizer,
                prompts,
                num_tokens,
                where,
                stop=[_unescape(text) for text in stop or []],
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                use_cache=cache,
                generator=generator,
            )


def _unescape(text: str) -> str:
    return text.replace("\\n", "\n")


def _stream(
    model: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_tokens: int,
    device: torch.device,
    **settings: Any,
) -> None:
    """Print each prompt and what follows it; of one alone, each character as soon as its last token is drawn."""
    pieces = generate_texts(model, tokenizer, prompts, num_tokens, device, **settings)
    if len(prompts) > 1:
        texts = [prompt + "".join(new) for prompt, new in zip(prompts, zip(*pieces, strict=True), strict=True)]
        print(f"\n{'-' * 40}\n".join(text.lstrip("\n") for text in texts))
        return
    sys.stdout.write(prompts[0].lstrip("\n"))
    for (piece,) in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def attention(
    source: _SourceArgument,
    prompt: Annotated[str, typer.Option(help="the text to be read; \\n is a new line")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="the folder to write")] = Path("attention"),
    layer: Annotated[int | None, typer.Option(help="this one alone, counted from 0")] = None,
    head: Annotated[int | None, typer.Option(help="this one alone, counted from 0")] = None,
    checkpoint: Annotated[str | None, _CHECKPOINT] = None,
    tokenizer: _TokenizerOption = None,
    device: _DeviceOption = "auto",
) -> None:
    """Draw what each token of a text looks at, a PNG per layer and head."""
    where = pick_device(device)
    choice = pick_backend("", where, torch.float32)
    model, its_tokenizer, _, _ = open_model(source, checkpoint, tokenizer)
    model.to(where)
    with choice:
        for path in draw_attention(model, its_tokenizer, _unescape(prompt), out, where, layer=layer, head=head):
            print(path)


@app.command("eval")
def evaluate(
    source: _SourceArgument,
    data: Annotated[
        str | None, typer.Option(help="any text, which is read whole; of a prepared folder, the validation split")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="tokens from a window to the next; default: block_size, no overlap")
    ] = None,
    eval_iters: Annotated[int | None, typer.Option(min=1, help="batches averaged; default: as the run ends")] = None,
    checkpoint: Annotated[str | None, _CHECKPOINT] = None,
    tokenizer: _TokenizerOption = None,
    device: _DeviceOption = "auto",
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"] | None, typer.Option(help="default: the run's, else auto")
    ] = None,
    backend: _BackendOption = "",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Average a model's loss over each token of a text (--data), or a run's over batches of its own data."""
    if data is None and stride is not None:
        raise UserError("--stride is for --data, a text that is evaluated whole")
    if data is not None and eval_iters is not None:
        raise UserError("--eval-iters is for the run's own data: --data is evaluated whole")
    where = pick_device(device)
    model, its_tokenizer, of_run, state = open_model(source, checkpoint, tokenizer)
    config = of_run or TrainConfig()
    step = state.step if state else None
    of = pick_dtype(dtype or config.dtype, where)
    choice = pick_backend(backend, where, of)
    console = Console(stderr=as_json, soft_wrap=True, highlight=False)
    autocast = torch.autocast(where.type, dtype=of, enabled=of != torch.float32)
    model.to(where)
    name = source if step is None else f"{Path(source).resolve().name}, step {step}"
    if data is not None:
        text = load_tokens(data, its_tokenizer, notify=console.print)
        with choice:
            found = text_loss(
                model, text, its_tokenizer, stride=stride, batch_size=config.batch_size, device=where, autocast=autocast
            )
        if as_json:
            print(json.dumps({"step": step, "data": text.name, **dataclasses.asdict(found)}))
            return
        title = f"{name}, {found.tokens:,} tokens of {text.name}"
        table = Table("loss", "perplexity", "bits per byte", title=title, title_justify="left")
        table.add_row(f"{found.loss:.4f}", f"{found.perplexity:.3f}", f"{found.bits_per_byte:.4f}")
        console.print(table)
        return
    if of_run is None:
        raise UserError(f"{source} is no run with data of its own: name a text with --data")
    dataset = load_dataset(config.data, model.config.block_size, its_tokenizer, notify=console.print)
    count = eval_iters or config.final_eval_iters
    batches = evaluation_batches(dataset, config, model.config.block_size, where)
    with choice:
        losses = {split: mean_loss(model, batches[split], count, autocast) for split in batches}
    if as_json:
        print(json.dumps({"step": step, "batches": count, **losses}))
        return
    table = Table(title=f"{name}, {count} batches", title_justify="left")
    for heading in ("split", "loss", "perplexity"):
        table.add_column(heading)
    for split, loss in losses.items():
        table.add_row(split, f"{loss:.4f}", f"{torch.tensor(loss).exp():.3f}")
    console.print(table)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR...", help="runs' folders")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="the picture: .png, .svg or .pdf")] = Path("loss.png"),
    x: Annotated[Axis, typer.Option(help="what the losses are drawn over")] = "step",
) -> None:
    """Draw the losses of one run, or of several in one picture."""
    plot_losses(runs, out, x)
    print(out)


@app.command()
def export(
    run: _RunArgument,
    to: Annotated[Literal["hf"], typer.Option(help="hf: a folder that Hugging Face's transformers opens")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="the folder to write")],
    checkpoint: Annotated[str, _CHECKPOINT] = "best",
) -> None:
    """Write a checkpoint for other programs."""
    model, tokenizer, _, state = load_model(run, checkpoint)
    if not isinstance(model, GPT):
        raise UserError(f"{run}: only a GPT can be exported, and this run trained a {type(model).__name__}")
    written = export_hf(model, tokenizer, out)
    print(f"step {state.step} of {run} is in {out}: transformers.GPT2LMHeadModel.from_pretrained({str(out)!r})")
    print(
        f"its tokenizer, too: transformers.AutoTokenizer.from_pretrained({str(out)!r})"
        if written
        else f"its tokenizer ({tokenizer.kind}) has no like there, and stays behind"
    )


@app.command()
def explain(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    device: _DeviceOption = "auto",
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option(help="of the tensors")] = "fp32",
) -> None:
    """Which backend runs each op on this machine, and why each of the others does not."""
    where = pick_device(device)
    try:
        rows = dispatch.explain(where.type, DTYPES[dtype])
    except ValueError as error:  # a FASTGPT_BACKEND that names nothing
        raise UserError(str(error)) from error
    if as_json:
        machine = {"fastgpt": fastgpt.__version__, "torch": torch.__version__, "device": device_name(where)}
        print(json.dumps({**machine, "dtype": dtype, "ops": rows}, indent=2))
        return
    console = Console(highlight=False)
    console.print(f"fastgpt {fastgpt.__version__}, torch {torch.__version__}, {device_name(where)}, {dtype}\n")
    table = Table("op", "runs on", "because", "note")
    for row in rows:
        table.add_row(row["op"], row["backend"] or "nothing", row["why"], row["note"])
    console.print(table)
    table = Table("backend", "does not run", "because")
    for backend in dispatch.BACKENDS:
        ops_of: dict[str, list[str]] = {}
        for row in rows:
            if backend in row["others"]:
                ops_of.setdefault(row["others"][backend], []).append(row["op"])
        for reason, names in ops_of.items():
            table.add_row(backend, "any op" if len(names) == len(rows) else ", ".join(names), reason)
    console.print(table)


# ---------------------------------------------------------------------------------------------------------------------
# fastgpt bench
# ---------------------------------------------------------------------------------------------------------------------

bench = typer.Typer(
    no_args_is_help=True,
    help="Measure the kernels and the model on this machine, and show or compare what was measured.",
)
app.add_typer(bench, name="bench")

_OutOption = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="default: benchmarks/results/KIND_DEVICE_DATE.json")
]
_ResumeOption = Annotated[
    Path | None, typer.Option("--resume", metavar="FILE", help="go on with a run that was cut short")
]
_MarksOption = Annotated[bool, typer.Option("--marks", help="say which marks are met, and which are not")]
_LimitOption = Annotated[
    float | None, typer.Option("--limit", min=0, metavar="SECONDS", help="begin nothing more after that time")
]


@bench.command("kernels")
def bench_kernels(
    size: Annotated[
        Literal["full", "small", "tiny"], typer.Option(help="of the tensors; tiny: to try it out")
    ] = "full",
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp32, bf16 or fp16; repeatable; default: fp32, bf16, on a GPU fp16")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="cases whose name has TEXT in it; repeatable")
    ] = None,
    without: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="leave this competitor out; repeatable")
    ] = None,
    rounds: Annotated[int, typer.Option(help="samples of each competitor at most")] = 30,
    seconds: Annotated[float | None, typer.Option(help="for the rounds of a case; default: by the size")] = None,
    limit: _LimitOption = None,
    marks: _MarksOption = False,
    out: _OutOption = None,
    resume: _ResumeOption = None,
    device: _DeviceOption = "auto",
) -> None:
    """Time every op on every backend beside PyTorch's own, torch.compile and what else is installed.

    Nothing is timed whose result is wrong. Exit code 1: one of ours was wrong, or the machine did not stand still.
    """
    from fastgpt.benchmarks import kernels, session  # as each command here: the others need not load it
    from fastgpt.benchmarks.marks import print_verdicts

    options = kernels.Options(
        pick_device(device), size, tuple(dtype or ()) or None, tuple(only or ()), tuple(without or ()), rounds, seconds
    )
    file = kernels.measure(options, session.Plan(out=out, resume=resume, limit_s=limit))
    if marks:
        print_verdicts(file.data)
    raise typer.Exit(session.say_how_it_ended(file))


_VsOption = Annotated[
    str | None, typer.Option("--vs", metavar="nanogpt=PATH", help="a checkout of nanoGPT, which then competes too")
]
_BackendsOption = Annotated[
    list[str] | None, typer.Option("--backend", help="repeatable; default: all that run every op on the device")
]
_ModelsOption = Annotated[list[str] | None, typer.Option("--model", help="a rung of the ladder; repeatable")]
_DtypesOption = Annotated[list[str] | None, typer.Option("--dtype", help="fp32, bf16 or fp16; repeatable")]


@bench.command("scaling")
def bench_scaling(
    model: _ModelsOption = None,
    backend: _BackendsOption = None,
    mode: Annotated[list[str] | None, typer.Option(help="eager or compile; repeatable; default: both")] = None,
    dtype: _DtypesOption = None,
    sweep: Annotated[str, typer.Option(metavar="MODEL", help="whose length and batch are varied")] = "",
    block_size: Annotated[
        list[int] | None, typer.Option(help="tokens of a sequence; repeatable; 0: do not vary it")
    ] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="sequences; repeatable; 0: do not vary it")] = None,
    tokens: Annotated[int, typer.Option(help="of a batch, about, where it is not what is varied")] = 0,
    dropout: Annotated[float, typer.Option(help="of every model, in [0, 1)")] = 0.0,
    rounds: Annotated[int, typer.Option(help="samples of each competitor at most")] = 15,
    vs: _VsOption = None,
    limit: _LimitOption = None,
    marks: _MarksOption = False,
    out: _OutOption = None,
    resume: _ResumeOption = None,
    device: _DeviceOption = "auto",
) -> None:
    """Time training steps, and measure their memory, as the model, the sequences and the batch grow.

    Every backend, eager and compiled, beside plain PyTorch and nanoGPT; who computes something else is not timed. The
    ladder is shakespeare-cpu (0.8M parameters), small, shakespeare (11M), medium, gpt2 (124M), gpt2-medium, gpt2-large
    and gpt2-xl (1558M), as far as memory reaches. Exit code 1: one of ours was wrong, or the machine did not stand
    still.
    """
    from fastgpt.benchmarks import models, scaling, session
    from fastgpt.benchmarks.marks import print_verdicts

    options = scaling.Options(
        pick_device(device),
        models=model or [],
        backends=backend or [],
        modes=mode or [],
        dtypes=dtype or [],
        sweep=sweep,
        block_sizes=block_size or [],
        batch_sizes=batch_size or [],
        tokens=tokens,
        dropout=dropout,
        rounds=rounds,
        nanogpt=models.parse_vs(vs),
    )
    file = scaling.scale(options, session.Plan(out=out, resume=resume, limit_s=limit))
    if marks:
        print_verdicts(file.data)
    raise typer.Exit(session.say_how_it_ended(file))


@bench.command("generate")
def bench_generate(
    model: _ModelsOption = None,
    backend: _BackendsOption = None,
    dtype: _DtypesOption = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="sequences; repeatable")] = None,
    context: Annotated[list[int] | None, typer.Option(help="tokens before the first that is drawn; repeatable")] = None,
    new_tokens: Annotated[int, typer.Option(help="tokens that are drawn; 0: 32 on a CPU, 128 on a GPU")] = 0,
    rounds: Annotated[int, typer.Option(help="samples of each competitor at most")] = 15,
    vs: _VsOption = None,
    limit: _LimitOption = None,
    out: _OutOption = None,
    resume: _ResumeOption = None,
    device: _DeviceOption = "auto",
) -> None:
    """Time how fast text is generated, by the batch and by the length of what is there already.

    The models are those of `fastgpt bench scaling`. Exit code 1: one of ours was wrong, or the machine did not stand
    still.
    """
    from fastgpt.benchmarks import generation, models, session

    options = generation.Options(
        pick_device(device),
        models=model or [],
        backends=backend or [],
        dtypes=dtype or [],
        batch_sizes=batch_size or [],
        contexts=context or [],
        new_tokens=new_tokens,
        rounds=rounds,
        nanogpt=models.parse_vs(vs),
    )
    file = generation.run(options, session.Plan(out=out, resume=resume, limit_s=limit))
    raise typer.Exit(session.say_how_it_ended(file))


# ---------------------------------------------------------------------------------------------------------------------
# fastgpt tune
# ---------------------------------------------------------------------------------------------------------------------

_DRY_RUN_GENERATION = 90  # whose defaults a dry run goes by where there is no GPU


@app.command("tune")
def tune_kernels(
    preset: Annotated[Literal[tuple(PRESETS)] | None, typer.Option(help="default: gpt2")] = None,  # type: ignore[valid-type]
    config: Annotated[Path | None, typer.Option(help="TOML file of settings, as for train")] = None,
    batch_size: Annotated[int | None, typer.Option(help="sequences per forward pass")] = None,
    block_size: Annotated[int | None, typer.Option(help="tokens of a sequence")] = None,
    n_head: Annotated[int | None, typer.Option(help="attention heads per block")] = None,
    n_embd: Annotated[int | None, typer.Option(help="width of the residual stream")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="number of different tokens, as the data has them")] = None,
    dropout: Annotated[float | None, typer.Option(help="probability of dropping, in [0, 1)")] = None,
    dtype: Annotated[Literal["auto", "fp32", "bf16", "fp16"] | None, typer.Option(help="of activations")] = None,
    device: _DeviceOption = "auto",
    only: Annotated[list[str] | None, typer.Option(metavar="KERNEL", help="tune only this kernel; repeatable")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would be measured; needs no GPU")] = False,
) -> None:
    """Measure other block shapes for the Triton kernels on this GPU, and store what is faster for later runs.

    The shapes are those of a training step of the preset, with the settings given here over it.
    """
    shape = {
        "batch_size": batch_size,
        "block_size": block_size,
        "n_head": n_head,
        "n_embd": n_embd,
        "vocab_size": vocab_size,
        "dropout": dropout,
        "dtype": dtype,
    }
    given = {name: value for name, value in shape.items() if value is not None}
    name, settings = _settings(preset, config, given)
    chosen = PRESETS[name or "gpt2"]
    model, training = _override(chosen.model, chosen.train, settings)
    if not isinstance(model, GPTConfig):
        raise UserError(f"tune takes the shape of a GPT, which the preset {name!r} is not")
    where = pick_device(training.device if device == "auto" else device)
    on_gpu = where.type == "cuda"
    if not on_gpu and not dry_run:
        raise UserError(f"there is no GPU to measure on (device {where}); --dry-run lists what would be measured")
    missing = triton_library.missing()
    if missing is not None or (triton_library.interpreting() and not dry_run):
        raise UserError(f"Triton's kernels cannot be measured: {missing or 'TRITON_INTERPRET is set'}")
    from fastgpt.triton_kernels import launch, tune  # Triton takes a second to load

    workload = tune.Workload(
        batch_size=training.batch_size,
        block_size=model.block_size,
        n_head=model.n_head,
        n_embd=model.n_embd,
        vocab_size=model.padded_vocab_size,
        dropout=model.dropout,
        bias=model.bias,
        gelu=model.gelu,
        dtype=pick_dtype(training.dtype, where) if on_gpu else DTYPES.get(training.dtype, torch.bfloat16),
    )
    todo = tune.jobs(workload, launch.generation(where) if on_gpu else _DRY_RUN_GENERATION)
    kernels = list(dict.fromkeys(job.kernel for job in todo))
    for kernel in only or ():
        if kernel not in kernels:
            raise UserError(f"--only: there is no kernel {kernel!r}; the kernels are {', '.join(kernels)}")
    todo = [job for job in todo if job.kernel in (only or kernels)]
    console = Console(soft_wrap=True, highlight=False)
    if dry_run:
        table = Table("kernel", "shape class", "candidates")
        for job in todo:
            table.add_row(job.kernel, job.shape_class, str(len(tune.candidates(job))))
        console.print(table)
        if not on_gpu:
            console.print(f"by the defaults for compute capability {_DRY_RUN_GENERATION / 10}, for lack of a GPU")
        return
    path = launch.cache_file(torch.cuda.get_device_name(where))
    with torch.cuda.device(where):
        tune.tune(todo, where, path, say=lambda line: console.print(line, markup=False))
    console.print(f"stored in {path}", markup=False)


# ---------------------------------------------------------------------------------------------------------------------
# fastgpt bench report, compare
# ---------------------------------------------------------------------------------------------------------------------


@bench.command("report")
def bench_report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json...", help="result files, of any kinds")],
    out: Annotated[Path, typer.Option(help="the page; its pictures go into a folder beside it")] = Path("bench.html"),
) -> None:
    """Write a page of figures and tables, and the figures as PNG files; runs of one kind also side by side."""
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out: the page is HTML, so name it so: {out.with_suffix('.html')}")
    from fastgpt.benchmarks.report import write_report

    page, *pictures = write_report(results, out)
    print(page)
    if pictures:
        print(f"{pictures[0].parent} ({len(pictures)} pictures)")


@bench.command("compare")
def bench_compare(
    old: Annotated[Path, typer.Argument(metavar="OLD.json", help="the result file to start from")],
    new: Annotated[Path, typer.Argument(metavar="NEW.json", help="the one to hold to it")],
    threshold: Annotated[
        float, typer.Option(help="the least change of a time that counts, as a part of it")
    ] = THRESHOLD,
) -> None:
    """What became slower or faster from OLD to NEW on one machine; exit code 1 where anything of ours became slower."""
    if not threshold > 0:
        raise UserError(f"--threshold must be greater than 0, got {threshold:g}")
    comparison = compare(load(old), load(new), threshold)
    console = Console(soft_wrap=True, highlight=False)
    for title, changes in (("slower", comparison.regressions), ("faster", comparison.improvements)):
        for change in changes:
            console.print(f"{title}: {change.task}, {change.competitor}: {change.in_words()}", markup=False)
    for sentence in comparison.sentences():
        console.print(sentence, markup=False)
    raise typer.Exit(1 if comparison.regressions else 0)
