"""Where CUDA sources wait: barriers, and waits for what is asynchronous. The emulator can switch each of them off."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

WAIT = re.compile(r"\b(__syncthreads|__syncwarp|bar_sync|mbar_wait|(?:cp_async|wgmma)_wait<.*?>)\(")


def code(line: str) -> str:
    return line.partition("//")[0]


def waits_in(sources: Iterable[Path]) -> list[tuple[str, int]]:
    """Name of the file, and line, of each wait."""
    return [
        (path.name, number)
        for path in sources
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if WAIT.search(code(line))
    ]
