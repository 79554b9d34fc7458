"""Text to token shards to batches."""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
import time
import tokenize
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgpt.config import UserError
from fastgpt.extras import require
from fastgpt.files import json_bytes, new_folder, write_atomically
from fastgpt.shards import SHARD_CHARS, Header, Piece, Shard, Shards, Split, is_prepared, read_shards, write_shards
from fastgpt.tokenizer import Tokenizer, make_tokenizer, read_tokenizer

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = "tinyshakespeare.txt"
DOWNLOAD_SECONDS = 30.0
TRAIN_SHARE = 0.9  # of a text's bytes; the rest is for validation
NAMED_TEXTS = ("shakespeare", "stdlib")
# Corpora of the Hugging Face hub: repository and configuration, whose split "train" has a column "text".
CORPORA = {
    "openwebtext": ("Skylion007/openwebtext", None),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}
VAL_EVERY = 2000  # one document in so many of a corpus is for validation, the share that nanoGPT takes
PIECE_CHARS = 1 << 20  # a longer document is tokenized in parts that end with a line


@dataclass(frozen=True)
class Dataset:
    """A tokenized text: ``train`` and ``val`` are memory-mapped uint16 or uint32, one array or several shards."""

    name: str
    tokenizer: Tokenizer
    train: np.ndarray | Shards
    val: np.ndarray | Shards


class TokenizedText(NamedTuple):
    """A text in one piece."""

    name: str
    tokens: np.ndarray | Shards
    num_bytes: int  # of its UTF-8


def cache_dir() -> Path:
    """``$FASTGPT_CACHE``, or fastgpt's folder in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if os.environ.get("FASTGPT_CACHE"):
        return Path(os.environ["FASTGPT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgpt"


def load_dataset(
    data: str,
    block_size: int,
    tokenizer: Tokenizer | str = "auto",
    notify: Callable[[str], None] = print,
    *,
    verify: bool = True,
) -> Dataset:
    """Map a folder of `fastgpt prepare`; or find the text, tokenize it into the cache folder, and map that.

    Args:
        data: "shakespeare", "stdlib", a text file or folder of text files, or a prepared folder.
        block_size: context length, in tokens, that both splits must have room for.
        tokenizer: of an earlier run, or as in ``make_tokenizer``; "auto" is the prepared folder's own, else "char".
        notify: gets one line if Tiny Shakespeare cannot be had and the standard library stands in.
        verify: as in ``read_shards``.
    Raises:
        UserError: no text there, not UTF-8, too short, damaged, or not for ``tokenizer``.
    """
    if isinstance(tokenizer, str) and tokenizer.endswith(".json"):
        tokenizer = make_tokenizer(tokenizer, tuple)
    folder = Path(data).expanduser()
    if data and is_prepared(folder):
        name = data
    else:
        name, texts = _local_texts(data, notify)
        tokenizer = "char" if tokenizer == "auto" else tokenizer
        folder, tokenizer = _tokenized(texts, name, tokenizer)
    header, own, splits = read_shards(folder, verify)
    _require_tokenizer(tokenizer, name, header, own)
    for part, tokens in (("training", splits["train"]), ("validation", splits["val"])):
        if len(tokens) <= block_size:
            raise UserError(
                f"{name}: too short: its {part} split has {len(tokens)} tokens, and block_size {block_size} needs at "
                f"least {block_size + 1}"
            )
    return Dataset(name, own, splits["train"], splits["val"])


def prepare(
    data: str,
    tokenizer: str,
    out: Path,
    processes: int = 1,
    report: Callable[[Shard], None] = lambda shard: None,
    notify: Callable[[str], None] = print,
) -> Header:
    """Tokenize a text or a corpus into the folder ``out``, which ``load_dataset`` takes; called again, it goes on.

    Args:
        data: "shakespeare", "stdlib", a text file or folder of text files, "openwebtext" or "fineweb-edu".
        tokenizer: as in ``make_tokenizer``.
        processes, report: as in ``write_shards``.
        notify: as in ``load_dataset``.
    Raises:
        UserError: text, corpus or tokenizer that cannot be had, or a folder that something else lies in.
    """
    pieces: Callable[[], Iterator[Piece]]
    if data in CORPORA:
        pieces, shard_chars = partial(_corpus_pieces, data), SHARD_CHARS
    else:
        data, texts = _local_texts(data, notify)
        data = data if data in NAMED_TEXTS else str(Path(data).expanduser().resolve())
        pieces = partial(_local_pieces, texts)
        share = sum(text.num_bytes for text in texts) // 32  # enough for all processes to have some
        shard_chars = min(max(share, PIECE_CHARS), SHARD_CHARS)
    return write_shards(
        out,
        pieces(),
        data=data,
        tokenizer_name=tokenizer,
        tokenizer=lambda: make_tokenizer(tokenizer, lambda: (piece.text for piece in pieces())),
        processes=processes,
        shard_chars=shard_chars,
        report=report,
    )


def load_tokens(data: str, tokenizer: Tokenizer, notify: Callable[[str], None] = print) -> TokenizedText:
    """A whole text by ``tokenizer``; of a prepared folder, the validation split.

    Raises:
        UserError: as ``load_dataset``.
    """
    folder = Path(data).expanduser()
    if data and is_prepared(folder):
        header, own, splits = read_shards(folder)
        _require_tokenizer(tokenizer, data, header, own)
        num_bytes = sum(shard.text_bytes for shard in header.shards if shard.file.startswith("val"))
        return TokenizedText(data, splits["val"], num_bytes)
    name, text = load_text(data, notify)
    return TokenizedText(name, np.concatenate([tokenizer.encode(part) for part in _cut(text)]), len(text.encode()))


def _require_tokenizer(wanted: Tokenizer | str, name: str, header: Header, own: Tokenizer) -> None:
    if isinstance(wanted, Tokenizer):
        if own.to_json() != wanted.to_json():
            raise UserError(f"{name}: prepared with tokenizer {header.tokenizer_name}, which is not the run's")
    elif wanted not in ("auto", header.tokenizer_name):
        raise UserError(f"{name}: prepared with tokenizer {header.tokenizer_name}, not {wanted}")


class Batches:
    """Random batches of one split, each a function of (seed, stream, index) alone: resuming needs no state.

    Args:
        tokens: the split.
        batch_size: sequences a batch (B).
        block_size: tokens a sequence (T).
        seed, stream: two runs of one seed and stream draw the same batches.
        device: where batches go; to a GPU from pinned memory, without waiting for the copy.
    """

    def __init__(
        self,
        tokens: np.ndarray | Shards,
        batch_size: int,
        block_size: int,
        seed: int,
        stream: str,
        device: torch.device,
    ) -> None:
        self._tokens = tokens
        self._offsets = np.arange(block_size + 1)
        self._batch_size = batch_size
        self._key = (seed, int.from_bytes(stream.encode(), "little"))
        self.device = device

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Batch ``index``: tokens and the tokens that follow them, two (B, T) of int64."""
        rng = np.random.default_rng((*self._key, index))
        starts = rng.integers(0, len(self._tokens) - len(self._offsets) + 1, size=(self._batch_size, 1))
        rows = torch.from_numpy(self._tokens[starts + self._offsets].astype(np.int64))  # (B, T + 1)
        if self.device.type != "cpu":
            rows = rows.pin_memory().to(self.device, non_blocking=True)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class _Text(NamedTuple):
    """A text that is read when it is wanted."""

    num_bytes: int  # about, where the file is not UTF-8
    read: Callable[[], str]


def load_text(data: str, notify: Callable[[str], None] = print) -> tuple[str, str]:
    """The name of what was read ("stdlib" where that stands in for "shakespeare") and its text.

    Raises:
        UserError: no such file, no text in it, or bytes that are not UTF-8.
    """
    name, texts = _local_texts(data, notify)
    return name, "".join(text.read() for text in texts)


def _local_texts(data: str, notify: Callable[[str], None]) -> tuple[str, list[_Text]]:
    """As ``load_text``, one text for each document."""
    if not data:
        raise UserError("data must be shakespeare, stdlib, or a text file or folder, got ''")
    if data in CORPORA:
        raise UserError(f"{data} is prepared first: fastgpt prepare --data {data} --out DIR, then --data DIR")
    if data == "shakespeare":
        try:
            text = _shakespeare()
            return data, [_Text(len(text.encode()), lambda: text)]
        except OSError as error:
            notify(f"Tiny Shakespeare cannot be had ({error}); training on Python's standard library instead")
            data = "stdlib"
    if data == "stdlib":
        paths, read = _stdlib(), _read_source
    else:
        paths, read = _files(Path(data).expanduser()), _read_file
    try:
        texts = [_Text(path.stat().st_size, partial(read, path)) for path in paths]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    if not sum(text.num_bytes for text in texts):
        raise UserError(f"{data}: there is no text in it")
    return data, texts


def _local_pieces(texts: list[_Text]) -> Iterator[Piece]:
    """The first 90% of the bytes to train on, the rest to validate."""
    left = int(TRAIN_SHARE * sum(text.num_bytes for text in texts))  # bytes still to train on
    for source in texts:
        text = source.read()
        if source.num_bytes <= left:
            yield from _pieces("train", text)
        elif left <= 0:
            yield from _pieces("val", text)
        else:
            chars = len(text.encode()[:left].decode("utf-8", "ignore"))
            yield from _pieces("train", text[:chars])
            yield from _pieces("val", text[chars:])
        left -= source.num_bytes


def _corpus_pieces(corpus: str) -> Iterator[Piece]:
    """A corpus of the hub as it streams in, one document in VAL_EVERY for validation."""
    for index, document in enumerate(_corpus_documents(corpus)):
        yield from _pieces("train" if index % VAL_EVERY else "val", document)


def _corpus_documents(corpus: str) -> Iterator[str]:
    datasets = require("datasets", "data", f"the corpus {corpus}")
    repository, configuration = CORPORA[corpus]
    count = 0
    try:
        for row in datasets.load_dataset(repository, configuration, split="train", streaming=True):
            yield row["text"]
            count += 1
    except Exception as error:  # of the network, its client or the file's format: they have no common type
        reason = f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if count == 0:
            raise UserError(f"{corpus} cannot be streamed from the Hugging Face hub {reason}") from error
        raise UserError(
            f"{corpus}: the stream from the Hugging Face hub broke off after {count:,} documents {reason}: the same "
            "command goes on"
        ) from error


def _pieces(split: Split, document: str) -> Iterator[Piece]:
    *parts, last = _cut(document)
    yield from (Piece(split, part, False) for part in parts)
    if last:
        yield Piece(split, last, True)


def _cut(text: str) -> Iterator[str]:
    """``text`` in parts of at most PIECE_CHARS, each ending with a line where there is one."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = text.rfind("\n", start, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _shakespeare() -> str:
    """Tiny Shakespeare from ``$FASTGPT_DATA``, the cache folder or its home; OSError where none of them has it."""
    cached = cache_dir() / SHAKESPEARE_FILE
    places = [cached]
    if os.environ.get("FASTGPT_DATA"):
        places.insert(0, Path(os.environ["FASTGPT_DATA"]) / SHAKESPEARE_FILE)
    for path in places:
        if path.is_file():
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
                raise UserError(f"{path}: this is not Tiny Shakespeare (its sha256 differs): remove it")
            return content.decode()
    content = _download(SHAKESPEARE_URL, DOWNLOAD_SECONDS)
    if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
        raise OSError(f"what {SHAKESPEARE_URL} sent has another sha256")
    write_atomically(cached, content)
    return content.decode()


def _download(url: str, seconds: float) -> bytes:
    """The bytes at ``url``; OSError if they cannot be had within ``seconds`` in all."""
    deadline = time.monotonic() + seconds
    received = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=seconds / 3) as response:
            while chunk := response.read1(1 << 16):
                received += chunk
                if time.monotonic() > deadline:
                    raise OSError(f"{url} did not arrive within {seconds:.0f} s")
    except urllib.error.URLError as error:
        raise OSError(f"{url}: {error.reason}") from error
    return bytes(received)


def _stdlib() -> list[Path]:
    """The sources of the running Python's standard library, its tests and site-packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(p for p in root.rglob("*.py") if skipped.isdisjoint(p.relative_to(root).parts))


def _read_source(path: Path) -> str:
    with tokenize.open(path) as file:  # honours the encoding that a source declares
        return file.read()


def _files(path: Path) -> list[Path]:
    """``path``, or the files in it but for hidden ones."""
    if not path.is_dir():
        return [path]
    files = [p for p in path.rglob("*") if p.is_file()]
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts))


def _read_file(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text (byte {error.start}: {error.reason})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _tokenized(texts: list[_Text], name: str, tokenizer: Tokenizer | str) -> tuple[Path, Tokenizer]:
    """Where the tokens of ``texts`` lie: named by what they are made from, so that a change in it is another folder."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.read().encode() + b"\xff")  # a byte that UTF-8 does not have
    if isinstance(tokenizer, str):  # trained once
        path = cache_dir() / "tokenizers" / f"{_key(digest, tokenizer)}.json"
        if not path.is_file():
            made = make_tokenizer(tokenizer, lambda: (text.read() for text in texts))
            write_atomically(path, json_bytes(made.to_json()))
        tokenizer = read_tokenizer(path)
    folder = cache_dir() / "tokens" / _key(digest, f"{Header.version} {json.dumps(tokenizer.to_json())}")
    if not folder.is_dir():
        with new_folder(folder) as new:
            write_shards(
                new, _local_pieces(texts), data=name, tokenizer_name=tokenizer.kind, tokenizer=lambda: tokenizer
            )
    return folder, tokenizer


def _key(text: Any, tokenizer: str) -> str:
    digest = text.copy()
    digest.update(tokenizer.encode())
    return digest.hexdigest()[:32]
