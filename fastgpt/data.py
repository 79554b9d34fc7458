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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastgpt.config import UserError
from fastgpt.files import new_folder, write_atomically
from fastgpt.tokenizer import CharTokenizer

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = "tinyshakespeare.txt"
DOWNLOAD_SECONDS = 30.0
TRAIN_SHARE = 0.9
NAMED_TEXTS = ("shakespeare", "stdlib")


@dataclass(frozen=True)
class Dataset:
    """A tokenized text: ``train`` and ``val`` are memory-mapped uint16 or uint32, the first 90% and the rest."""

    name: str
    tokenizer: CharTokenizer
    train: np.ndarray
    val: np.ndarray


def cache_dir() -> Path:
    """``$FASTGPT_CACHE``, or fastgpt's folder in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if os.environ.get("FASTGPT_CACHE"):
        return Path(os.environ["FASTGPT_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgpt"


def load_dataset(
    data: str, block_size: int, tokenizer: CharTokenizer | None = None, notify: Callable[[str], None] = print
) -> Dataset:
    """Find the text, tokenize it into the cache folder, and map it.

    Args:
        data: "shakespeare", "stdlib", or a text file or folder of text files.
        block_size: context length, in tokens, that both splits must have room for.
        tokenizer: of an earlier run; None makes one from the text.
        notify: gets one line if Tiny Shakespeare cannot be had and the standard library stands in.
    Raises:
        UserError: no text there, not UTF-8, too short, or characters that ``tokenizer`` does not have.
    """
    name, text = load_text(data, notify)
    tokenizer = tokenizer or CharTokenizer.trained_on(text)
    folder = _token_folder(text, tokenizer)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    split = int(TRAIN_SHARE * len(text))
    for part, length in (("training", split), ("validation", len(text) - split)):
        if length <= block_size:
            raise UserError(
                f"{name}: too short: its {part} split has {length} tokens, and block_size {block_size} needs at least "
                f"{block_size + 1}"
            )
    if not folder.is_dir():
        tokens = tokenizer.encode(text).astype(dtype)
        with new_folder(folder) as made:
            tokens[:split].tofile(made / "train.bin")
            tokens[split:].tofile(made / "val.bin")
            header = {"dtype": np.dtype(dtype).name, "tokenizer": tokenizer.to_json(), "tokens": len(tokens)}
            (made / "header.json").write_text(json.dumps(header), encoding="utf-8")
    train, val = (np.memmap(folder / f"{part}.bin", dtype=dtype, mode="r") for part in ("train", "val"))
    if (len(train), len(val)) != (split, len(text) - split):
        raise UserError(f"{folder}: its token files are damaged: delete the folder, and they will be made again")
    return Dataset(name, tokenizer, train, val)


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
        self, tokens: np.ndarray, batch_size: int, block_size: int, seed: int, stream: str, device: torch.device
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


def load_text(data: str, notify: Callable[[str], None] = print) -> tuple[str, str]:
    """The name of what was read ("stdlib" where that stands in for "shakespeare") and its text.

    Raises:
        UserError: no such file, no text in it, or bytes that are not UTF-8.
    """
    if not data:
        raise UserError("data must be shakespeare, stdlib, or a text file or folder, got ''")
    if data == "shakespeare":
        try:
            return data, _shakespeare()
        except OSError as error:
            notify(f"Tiny Shakespeare cannot be had ({error}); training on Python's standard library instead")
            data = "stdlib"
    text = _stdlib() if data == "stdlib" else _read_path(Path(data).expanduser())
    if not text:
        raise UserError(f"{data}: there is no text in it")
    return data, text


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


def _stdlib() -> str:
    """The sources of the running Python's standard library, its tests and site-packages left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = sorted(p for p in root.rglob("*.py") if skipped.isdisjoint(p.relative_to(root).parts))
    texts = []
    for path in paths:
        with tokenize.open(path) as file:  # honours the encoding that a source declares
            texts.append(file.read())
    return "".join(texts)


def _read_path(path: Path) -> str:
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file()]
        visible = sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts))
        return "".join(_read_file(p) for p in visible)
    return _read_file(path)


def _read_file(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text (byte {error.start}: {error.reason})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _token_folder(text: str, tokenizer: CharTokenizer) -> Path:
    """Where the tokens of ``text`` lie: named by what they are made from, so that a change in it is another folder."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    digest.update(json.dumps(tokenizer.to_json()).encode())
    return cache_dir() / "tokens" / digest.hexdigest()[:32]
