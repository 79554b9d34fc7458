"""What the rungs share and what is no lesson: their options, the text, earlier rungs, and the result each leaves."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch

from fastgpt.config import UserError
from fastgpt.data import load_text
from fastgpt.files import json_bytes, write_atomically

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Options:
    """What a rung is run with: steps of training, the seed of weights and batches, and the folder of its result."""

    steps: int
    seed: int = 1337
    out: Path | None = None


@dataclass(frozen=True)
class Result:
    """What a rung reached: a loss in nats per token, of what ``of`` says, and the one it should reach."""

    number: int
    title: str
    loss: float
    published: float | None
    sample: str
    of: str = "validation split"
    steps: int = 0
    seed: int = 0
    seconds: float = 0.0

    def line(self) -> str:
        """The rung's line: its loss beside the published one."""
        beside = "no published loss" if self.published is None else f"published {self.published:.2f}"
        return (
            f"rung {self.number}, {self.title}: loss {self.loss:.3f} on the {self.of} ({beside}), "
            f"{self.steps} steps, {self.seconds:.0f} s of a core"
        )


def rung(number: int) -> ModuleType:
    """A rung as a module: no import statement can name a file whose name begins with a digit."""
    path = path_of(number)
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[path.stem] = module
    return sys.modules[path.stem]


def path_of(number: int) -> Path:
    """The file of a rung."""
    return next(FOLDER.glob(f"{number:02}_*.py"))


def tiny_shakespeare() -> str:
    """The text that every published loss is of, from $FASTGPT_DATA, the cache folder or its home.

    Raises:
        UserError: it cannot be had.
    """
    complaints: list[str] = []
    name, text = load_text("shakespeare", complaints.append)
    if name != "shakespeare":
        raise UserError(f"the losses of this ladder are of Tiny Shakespeare: {complaints[0].partition(';')[0]}")
    return text


def climb(main: Callable[[Options], Result], steps: int, threads: int = 1, argv: Sequence[str] | None = None) -> None:
    """Run a rung from the command line.

    Args:
        steps: what the published loss was reached with.
        threads: of torch; tensors as small as most rungs' gain nothing from a second one.
        argv: the arguments; None takes those of the process.
    """
    about = sys.modules[main.__module__].__doc__ or ""  # a notebook has none
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--steps", type=_count, default=steps, help="steps of training (default: %(default)s)")
    parser.add_argument("--seed", type=_count, default=Options.seed, help="of weights and batches")
    parser.add_argument("--out", type=Path, help="folder for the result, as JSON (default: none is written)")
    args = parser.parse_args(argv)
    try:
        run(main, Options(args.steps, args.seed, args.out), threads)
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")


def run(main: Callable[[Options], Result], options: Options, threads: int = 1) -> Result:
    """Run a rung, print its sample and its line, and leave the result in ``options.out``."""
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(options.seed)
    begun = time.process_time()  # the processor's own, which other programs do not lengthen
    try:
        result = main(options)
    finally:
        torch.set_num_threads(threads_before)
    seconds = time.process_time() - begun
    result = Result(**{**asdict(result), "steps": options.steps, "seed": options.seed, "seconds": seconds})
    print(f"\n{result.sample}\n\n{result.line()}")
    if options.out is not None:
        write_atomically(options.out / f"rung-{result.number:02}.json", json_bytes(asdict(result)))
    return result


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0 and less than 2^31, got {text!r}")
    return int(text)
