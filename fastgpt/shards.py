"""Tokens on disk: memory-mapped shards, and the header that vouches for them.

    DIR/header.json       what was asked for, dtype, the tokenizer's size and sha256, complete, and of each shard its
                          file, sha256, tokens and documents, and its text's bytes and sha256
    DIR/tokenizer.json    see fastgpt.tokenizer
    DIR/train-00000.bin   token ids, little-endian uint16 or uint32; val-00000.bin likewise

The text is cut into shards by its order alone, so the bytes are the same from any number of processes. A shard is
renamed when it is whole and then entered in the header, itself replaced in one step: killed at any moment, the same
call goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fastgpt.config import UserError
from fastgpt.files import json_bytes, lock, read_json, write_atomically
from fastgpt.tokenizer import Tokenizer, read_tokenizer

HEADER = "header.json"
SHARD_CHARS = 1 << 27  # about 60 MB of GPT-2's tokens; each mapped shard holds a file open, and 1024 are often all
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
_SHARD_NAME = re.compile(r"(train|val)-\d{5}\.bin")


class Piece(NamedTuple):
    """Text of a split, not empty, and whether a document ends after it."""

    split: Split
    text: str
    ends: bool


@dataclass(frozen=True)
class Shard:
    """What the header says of a shard."""

    file: str
    tokens: int
    documents: int
    text_bytes: int
    text_sha256: str
    sha256: str


@dataclass(frozen=True)
class Header:
    """``data``, ``tokenizer_name`` and ``shard_chars`` are what was asked for: only the same goes on in the folder."""

    data: str
    tokenizer_name: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    shard_chars: int
    complete: bool = False
    shards: tuple[Shard, ...] = ()
    version: int = 2


class Shards:
    """Arrays one after another, read as one: ``[index]`` takes an array of places, of any shape."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def dtype(self) -> np.dtype:
        return self._parts[0].dtype

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        number = np.searchsorted(self._ends, index, side="right")
        found = np.empty(index.shape, self.dtype)
        for n in np.unique(number):
            here = number == n
            found[here] = self._parts[n][index[here] - (self._ends[n] - len(self._parts[n]))]
        return found


def is_prepared(folder: Path) -> bool:
    return (folder / HEADER).is_file()


def read_shards(folder: Path, verify: bool = True) -> tuple[Header, Tokenizer, dict[Split, np.ndarray | Shards]]:
    """A folder that ``write_shards`` has written, its shards mapped.

    Args:
        verify: read each shard once and hold it to its sha256; False where another process has just done so.
    Raises:
        UserError: no such folder, one that is not complete, or a damaged file, by name.
    """
    header = read_header(folder)
    if not header.complete:
        raise UserError(f"{folder}: not prepared to its end: give the same fastgpt prepare once more, and it goes on")
    tokenizer = _tokenizer_of(folder, header)
    if verify:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda shard: _verify(folder, shard, header.dtype, tokenizer.vocab_size), header.shards))
    splits: dict[Split, np.ndarray | Shards] = {}
    for split in SPLITS:
        parts = [_map(folder / shard.file, header.dtype) for shard in header.shards if shard.file.startswith(split)]
        splits[split] = Shards(parts) if len(parts) > 1 else parts[0] if parts else np.empty(0, header.dtype)
    return header, tokenizer, splits


def read_header(folder: Path) -> Header:
    """
    Raises:
        UserError: no header, or not what ``write_shards`` writes.
    """
    path = folder / HEADER
    data = read_json(path)
    if data.get("version") != Header.version:
        raise UserError(f"{path}: its version must be {Header.version}, got {str(data.get('version'))[:20]}")
    shards = data.get("shards")
    if not isinstance(shards, list):
        raise UserError(f"{path}: damaged: shards must be a list")
    data["shards"] = tuple(_of_types(Shard, shard, path) for shard in shards)
    header = _of_types(Header, data, path)
    if header.dtype not in ("uint16", "uint32"):
        raise UserError(f"{path}: damaged: dtype must be uint16 or uint32, got {header.dtype[:20]!r}")
    for shard in header.shards:
        if not _SHARD_NAME.fullmatch(shard.file):
            raise UserError(
                f"{path}: damaged: a shard's file must be train-N.bin or val-N.bin, got {shard.file[:40]!r}"
            )
        if min(shard.tokens, shard.documents, shard.text_bytes) < 0:
            raise UserError(f"{path}: damaged: {shard.file} counts less than nothing")
    return header


def _of_types(cls: Any, data: Any, path: Path) -> Any:
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    wanted = {"int": int, "str": str, "bool": bool}
    if (
        not isinstance(data, dict)
        or data.keys() != fields.keys()
        or not all(type(data[name]) is wanted.get(str(kind), tuple) for name, kind in fields.items())
    ):
        raise UserError(f"{path}: damaged: a {cls.__name__.lower()} must hold {', '.join(fields)}")
    return cls(**data)


def _tokenizer_of(folder: Path, header: Header) -> Tokenizer:
    path = folder / "tokenizer.json"
    tokenizer = read_tokenizer(path)
    if hashlib.sha256(_tokenizer_bytes(tokenizer)).hexdigest() != header.tokenizer_sha256:
        raise UserError(f"{path}: not the tokenizer that the folder was prepared with (its sha256 is not the header's)")
    if header.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{folder / HEADER}: damaged: vocab_size must be the tokenizer's {tokenizer.vocab_size}, got "
            f"{header.vocab_size}"
        )
    if header.dtype != _dtype_for(tokenizer.vocab_size):
        raise UserError(f"{folder / HEADER}: damaged: {tokenizer.vocab_size} tokens do not go by {header.dtype}")
    return tokenizer


def _tokenizer_bytes(tokenizer: Tokenizer) -> bytes:
    return json_bytes(tokenizer.to_json())


def _dtype_for(vocab_size: int) -> str:
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def _verify(folder: Path, shard: Shard, dtype: str, vocab_size: int) -> None:
    path = folder / shard.file
    wrong = _difference(path, shard, dtype)
    if wrong is not None:
        raise UserError(f"{path}: damaged: {wrong}; delete the folder, or have the same fastgpt prepare mend it")
    largest = int(_map(path, dtype).max())
    if largest >= vocab_size:
        raise UserError(f"{path}: damaged: it holds token {largest}, and the tokenizer has {vocab_size}")


def _difference(path: Path, shard: Shard, dtype: str) -> str | None:
    """What ``path`` has that the header has not said, or None."""
    if not path.is_file():
        return "there is no such file"
    if shard.tokens == 0 or path.stat().st_size != shard.tokens * np.dtype(dtype).itemsize:
        return f"it has {path.stat().st_size:,} bytes, not {shard.tokens:,} tokens of {dtype}"
    digest = hashlib.sha256(_map(path, dtype).data).hexdigest()
    return None if digest == shard.sha256 else "its sha256 is not the header's"


def _map(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    path: Path
    pieces: list[Piece]  # of one split
    dtype: str


def write_shards(
    folder: Path,
    pieces: Iterable[Piece],
    *,
    data: str,
    tokenizer_name: str,
    tokenizer: Callable[[], Tokenizer],
    processes: int = 1,
    shard_chars: int = SHARD_CHARS,
    report: Callable[[Shard], None] = lambda shard: None,
) -> Header:
    """Tokenize ``pieces`` into ``folder``, or go on where an earlier call was cut short.

    Args:
        folder: new or empty, or one that an earlier call has begun.
        pieces: the same, in the same order, as in the earlier call.
        data, tokenizer_name: what the header calls them.
        tokenizer: makes it; called once in the folder's life, or, a file of that name, each time: it may change.
        processes: that tokenize; 1 is this one.
        shard_chars: characters of text in a shard, about.
        report: is told of each shard once it is there.
    Raises:
        UserError: ``folder`` holds something else or was begun with other arguments, the text is not the one it was, or
            another call is at work in the folder.
    """
    with _locked(folder):
        return _write(folder, pieces, data, tokenizer_name, tokenizer, processes, shard_chars, report)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold ``folder``, made if need be, against other calls; one that was made and is still empty does not stay."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = lock(folder)
    if handle is None:
        raise UserError(
            f"{folder}: another fastgpt prepare is at work here: wait for its end, or choose another folder"
        )
    try:
        yield
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        os.close(handle)


def _write(
    folder: Path,
    pieces: Iterable[Piece],
    data: str,
    tokenizer_name: str,
    tokenizer: Callable[[], Tokenizer],
    processes: int,
    shard_chars: int,
    report: Callable[[Shard], None],
) -> Header:
    header, tokenize_by = _begin(folder, data, tokenizer_name, shard_chars, tokenizer)
    known = {shard.file: shard for shard in header.shards}
    there: set[str] = set()

    def missing() -> Iterator[_Job]:
        for job in _jobs(folder, pieces, shard_chars, header.dtype):
            shard = known.get(job.path.name)
            if shard is not None and _text_sha256(job.pieces) != shard.text_sha256:
                raise UserError(
                    f"{folder}: the text of {data} is not the one that it was begun with: choose another folder"
                )
            there.add(job.path.name)
            if shard is not None and _difference(job.path, shard, header.dtype) is None:
                report(shard)
            else:
                yield job

    for shard in _tokenize_all(missing(), tokenize_by, processes):
        known[shard.file] = shard
        header = dataclasses.replace(header, complete=False, shards=tuple(known[name] for name in sorted(known)))
        _write_header(folder, header)
        report(shard)
    if there != known.keys():
        raise UserError(
            f"{folder}: the text of {data} is shorter than it was when this was begun: choose another folder"
        )
    header = dataclasses.replace(header, complete=True)
    _write_header(folder, header)
    return header


def _begin(
    folder: Path, data: str, tokenizer_name: str, shard_chars: int, make_tokenizer: Callable[[], Tokenizer]
) -> tuple[Header, Tokenizer]:
    """The header and the tokenizer to go on with: those in ``folder``, or new ones."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    passing = [name for name in names if name.startswith(".new-")]  # a kill came between
    others = set(names) - {"tokenizer.json", *passing}
    if others and HEADER not in names:
        raise UserError(f"{folder}: holds {min(others)} and no prepared data: choose another folder")
    for name in passing:
        (folder / name).unlink()
    if HEADER in names:
        header = read_header(folder)
        before = (header.data, header.tokenizer_name, header.shard_chars)
        if before != (data, tokenizer_name, shard_chars):
            raise UserError(
                f"{folder}: holds {before[0]} by tokenizer {before[1]} in shards of {before[2]:,} characters, not "
                f"{data} by {tokenizer_name} in shards of {shard_chars:,}: choose another folder"
            )
        tokenizer = _tokenizer_of(folder, header)
        if tokenizer_name.endswith(".json") and make_tokenizer().to_json() != tokenizer.to_json():
            raise UserError(f"{folder}: {tokenizer_name} is not the tokenizer that it was: choose another folder")
        return header, tokenizer
    tokenizer = make_tokenizer()
    content = _tokenizer_bytes(tokenizer)
    write_atomically(folder / "tokenizer.json", content)
    digest = hashlib.sha256(content).hexdigest()
    size = tokenizer.vocab_size
    header = Header(data, tokenizer_name, digest, size, _dtype_for(size), shard_chars)
    _write_header(folder, header)
    return header, tokenizer


def _write_header(folder: Path, header: Header) -> None:
    write_atomically(folder / HEADER, json_bytes(dataclasses.asdict(header)))


def _jobs(folder: Path, pieces: Iterable[Piece], shard_chars: int, dtype: str) -> Iterator[_Job]:
    """Pieces gathered until they are a shard, each split by itself."""
    gathered: dict[Split, list[Piece]] = {split: [] for split in SPLITS}
    chars, counts = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)

    def job(split: Split) -> _Job:
        made = _Job(folder / f"{split}-{counts[split]:05d}.bin", gathered[split], dtype)
        counts[split] += 1
        gathered[split], chars[split] = [], 0
        return made

    for piece in pieces:
        gathered[piece.split].append(piece)
        chars[piece.split] += len(piece.text)
        if chars[piece.split] >= shard_chars:
            yield job(piece.split)
    yield from (job(split) for split in SPLITS if gathered[split])


def _text_sha256(pieces: Iterable[Piece]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.text.encode() + (b"\xff" if piece.ends else b""))  # a byte that UTF-8 does not have
    return digest.hexdigest()


def _tokenize_all(jobs: Iterator[_Job], tokenizer: Tokenizer, processes: int) -> Iterator[Shard]:
    """Does the jobs and says what came of each, in order; no more of them lie in memory than can be worked at."""
    if processes == 1:
        yield from (_tokenize(job, tokenizer) for job in jobs)
        return
    context = multiprocessing.get_context(
        "forkserver"
    )  # a fork of this process might inherit a lock that a thread holds
    context.set_forkserver_preload([__name__])
    waiting: deque[Future[Shard]] = deque()
    with ProcessPoolExecutor(processes, context, _start_worker, (tokenizer.to_json(),)) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(_work, job))
                if len(waiting) > processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process that tokenizes has died, perhaps for lack of memory (--processes): the same command goes on"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_tokenizer: Tokenizer  # of a worker


def _start_worker(tokenizer: dict[str, Any]) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _tokenizer = Tokenizer.from_json(tokenizer)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # nobody is left to tell


def _work(job: _Job) -> Shard:
    return _tokenize(job, _tokenizer)


def _tokenize(job: _Job, tokenizer: Tokenizer) -> Shard:
    dtype = np.dtype(job.dtype).newbyteorder("<")
    end = [] if tokenizer.end_of_text is None else [np.array([tokenizer.end_of_text], dtype)]
    parts: list[np.ndarray] = []
    for piece in job.pieces:
        parts += [tokenizer.encode(piece.text).astype(dtype), *(end if piece.ends else [])]
    tokens = np.concatenate(parts)
    write_atomically(job.path, tokens.tobytes())
    return Shard(
        file=job.path.name,
        tokens=len(tokens),
        documents=sum(piece.ends for piece in job.pieces),
        text_bytes=sum(len(piece.text.encode()) for piece in job.pieces),
        text_sha256=_text_sha256(job.pieces),
        sha256=hashlib.sha256(tokens.data).hexdigest(),
    )
