"""Files and folders that are never seen half written."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgpt.config import UserError

LARGEST_JSON = 1 << 26  # bytes; the largest is a tokenizer's


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: no such file, or not one JSON object of at most ``LARGEST_JSON`` bytes.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise ValueError(f"it has more than {LARGEST_JSON:,} bytes")
        data = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: damaged: it must hold one JSON object")
    return data


def json_bytes(data: dict[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is at every moment either the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = _passing_name(path)
    try:
        with made.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)
        sync(path.parent)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The sum of a file, in hexadecimal; of any size, in little memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes ``path`` once it is whole; another process may be the first to get there."""
    made = _passing_name(path)
    made.mkdir(parents=True)
    try:
        yield made
        try:
            made.rename(path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


def lock(folder: Path) -> int | None:
    """Hold a folder against other processes until the handle that is returned is closed; None: another one holds it.

    Some network file systems cannot lock a folder: there it is for the user to keep processes apart.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(handle)
            return None
    return handle


def _passing_name(path: Path) -> Path:
    """A name beside ``path`` that nobody has: a process id comes back, in a container soon."""
    return path.with_name(f".new-{path.name}-{secrets.token_hex(8)}")
