"""``python -m lessons.kernels``: ``command`` in a process of its own, which a kernel may take down.

A kernel is a program: a plain ``p[i]`` far beyond its tensor ends the process that runs it without a word, and one that
never ends does not hear Ctrl-C. Here somebody is left to say so.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``command``.

    Returns:
        its exit code; 1 where a signal ended it, 130 after Ctrl-C.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or a kernel that never ends would outlive this
    try:
        code = subprocess.run([sys.executable, "-m", "lessons.kernels.command", *argv]).returncode
    except KeyboardInterrupt:
        return 130
    if code >= 0:
        return code
    print(
        f"python -m lessons.kernels: a kernel took the process down ({signal.Signals(-code).name}). A plain p[i] may "
        "lie beyond its tensor, and nobody checks it; ldg and stg, lds and sts name the line.",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
