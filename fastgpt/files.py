"""Files and folders that are never seen half written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    except BaseException:
        made.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that becomes ``path`` once it is whole; another process may be the first to get there."""
    made = _passing_name(path)
    made.mkdir(parents=True)
    try:
        yield made
        if not path.is_dir():
            made.rename(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _passing_name(path: Path) -> Path:
    """A name beside ``path``, of this process alone."""
    return path.with_name(f".new-{path.name}-{os.getpid()}")
