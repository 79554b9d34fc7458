"""A rung: a file, what its header says and promises, and what came of running it."""

from __future__ import annotations

import ast
import contextlib
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastgpt.config import UserError
from lessons.kernels.tasks import LADDERS, TASKS, Task, Tensors

FOLDER = Path(__file__).parent
LANGUAGES = {".cu": "cuda", ".py": "triton"}
PARTS = ("Moves", "Last rung", "Gains")  # of a header
_PROMISING = ("Promise:", "Goal:")  # the second in an exercise, which does not keep it yet

Counts = Mapping[str, float]  # by a counter's name, as promises and tables have it

_COMPARE = {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}
_PROMISE = re.compile(r"(?P<counter>[a-z][\w -]*?) (?P<relation><=|>=|==|<|>) (?P<factor>[\d.]+)(?: x (?P<rung>\w+))?")


@dataclass(frozen=True)
class Promise:
    """``counter relation factor``, or that times what the counter says of another rung of the ladder, by its stem."""

    counter: str
    relation: str
    factor: float
    rung: str | None = None

    @classmethod
    def parse(cls, text: str) -> Promise:
        text = text.strip()
        found = _PROMISE.fullmatch(text)
        if found is None:
            raise UserError(f"cannot read the promise {text!r}; one is like 'load sectors <= 0.25 x 01_naive'")
        return cls(found["counter"], found["relation"], float(found["factor"]), found["rung"])

    def __str__(self) -> str:
        other = "" if self.rung is None else f" x {self.rung}"
        return f"{self.counter} {self.relation} {self.factor:g}{other}"

    def kept(self, counts: Mapping[str, Counts], rung: str) -> bool:
        """
        Args:
            counts: of all rungs by their stems, for the same task and language.
            rung: the stem of the one that promises.
        Raises:
            UserError: there is no such counter or rung.
        """
        mine = self._value(counts, rung)
        limit = self.factor * (1.0 if self.rung is None else self._value(counts, self.rung))
        return _COMPARE[self.relation](mine, limit)

    def _value(self, counts: Mapping[str, Counts], rung: str) -> float:
        if rung not in counts:
            raise UserError(f"the promise '{self}' names a rung that is not there; there are {', '.join(counts)}")
        if self.counter not in counts[rung]:
            raise UserError(f"the promise '{self}' names no counter; there are {', '.join(counts[rung])}")
        return counts[rung][self.counter]


@dataclass(frozen=True)
class Header:
    """The comment that a file starts with.

    Args:
        title: its first line.
        parts: the paragraphs that begin with one of ``PARTS``, or an exercise's with "Hint:", without that word.
        promises: the lines that begin with "Promise:", or an exercise's with "Goal:".
    """

    title: str
    parts: dict[str, str]
    promises: tuple[Promise, ...]

    @classmethod
    def parse(cls, text: str) -> Header:
        lines = text.strip().splitlines()
        promises = tuple(Promise.parse(line.partition(":")[2]) for line in lines if line.startswith(_PROMISING))
        prose = "\n".join("" if line.startswith(_PROMISING) else line for line in lines)
        paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", prose) if paragraph.strip()]
        parts = {
            name: paragraph[len(name) + 1 :].strip()
            for paragraph in paragraphs
            for name in (*PARTS, "Hint")
            if paragraph.startswith(f"{name}:")
        }
        return cls(lines[0].strip() if lines else "", parts, promises)


@dataclass(frozen=True)
class Rung:
    """A file of a ladder, or a reader's own."""

    path: Path
    task: Task
    header: Header

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def language(self) -> str:
        """ "cuda" or "triton"."""
        return LANGUAGES[self.path.suffix]

    def neighbours(self) -> dict[str, Rung]:
        """By their stems those that its promises may name: the rungs of its task and language that lie beside it, and
        those of the ladder. A copy of a rung, changed by a reader, is so held to what it was held to before. A
        reader's folder may hold numbered files that are no rungs."""
        near = (*rungs_in(FOLDER / self.task.ladder), *_rungs_among(_numbered(self.path.parent)), self)
        return {rung.stem: rung for rung in near if (rung.task, rung.language) == (self.task, self.language)}


class RungError(Exception):
    """A rung that cannot be built or run, in the words of the compiler or the emulator."""


@dataclass(frozen=True)
class Execution:
    """What running a rung gave: the outputs by name, and what was counted meanwhile."""

    outputs: Tensors
    counts: Counts = field(default_factory=dict)


def read_rung(path: Path) -> Rung:
    """
    Raises:
        UserError: no such file, one of another kind, a promise that cannot be read, or not one function of a task.
    """
    if path.suffix not in LANGUAGES:
        raise UserError(f"{path} is neither CUDA (.cu) nor Triton (.py)")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    comment, names = _parse_cuda(text) if path.suffix == ".cu" else _parse_python(path, text)
    tasks = [TASKS[name] for name in dict.fromkeys(names) if name in TASKS]
    if len(tasks) != 1:
        found = "none" if not tasks else " and ".join(task.name for task in tasks)
        how = 'extern "C" void' if path.suffix == ".cu" else "def"
        raise UserError(f"{path} has to define ({how} ...) one of {', '.join(TASKS)}, and defines {found}")
    return Rung(path.resolve(), tasks[0], Header.parse(comment))


def rungs_in(folder: Path) -> list[Rung]:
    """The numbered files of a folder (01_naive.cu), in order; another file may be beside them."""
    return [read_rung(path) for path in _numbered(folder)]


def _numbered(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("[0-9][0-9]_*")) if path.suffix in LANGUAGES]


def _rungs_among(paths: Iterable[Path]) -> Iterator[Rung]:
    for path in paths:
        with contextlib.suppress(UserError):
            yield read_rung(path)


def ladder(name: str) -> list[Rung]:
    """The rungs of "softmax", "layer_norm" or "attention"."""
    assert name in LADDERS
    return rungs_in(FOLDER / name)


def _parse_cuda(text: str) -> tuple[str, list[str]]:
    """The comment at the beginning, without its slashes; the functions with C linkage."""
    comment = re.match(r"(?://[^\n]*\n)*", text)
    assert comment is not None
    lines = [line[2:].removeprefix(" ") for line in comment[0].splitlines()]
    return "\n".join(lines), re.findall(r'^extern "C" void (\w+)\(', text, re.MULTILINE)


def _parse_python(path: Path, text: str) -> tuple[str, list[str]]:
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from error
    return ast.get_docstring(tree) or "", [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
