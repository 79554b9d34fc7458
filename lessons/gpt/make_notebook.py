"""lecture.ipynb, made from the rungs: `python -m lessons.gpt.make_notebook` writes it, and a test holds it to them.

A rung's docstring becomes text and its code a cell. All cells share one namespace, so a rung takes what it needs of
those below from there, and a change in one cell is seen by those after it.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from fastgpt.files import write_atomically
from lessons.gpt.shared import FOLDER, path_of

NOTEBOOK = FOLDER / "lecture.ipynb"

_TITLE = """# From a bigram to GPT

Ten rungs, each a short script of `lessons/gpt`; `python -m lessons.gpt.make_notebook` makes this notebook from them.
They follow Andrej Karpathy's lecture "Let's build GPT: from scratch, in code, spelled out". Run the cells from
the top."""

_SET_UP = """
# In a checkout of fastgpt this finds it. Elsewhere (Colab) it fetches one: name the address of the repository.
REPOSITORY = ""

import os, subprocess, sys
from pathlib import Path

root = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "lessons" / "gpt").is_dir()), None)
if root is None:
    root = Path("fastgpt-checkout").resolve()
    if not root.exists():
        assert REPOSITORY, "name the address of fastgpt's repository in the line REPOSITORY"
        subprocess.run(["git", "clone", "--depth=1", REPOSITORY, str(root)], check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation"]
    without_compiling = {"FASTGPT_CPP": "0", "FASTGPT_CUDA": "0"}
    subprocess.run([*install, "setuptools>=77", "ninja"], check=True)
    subprocess.run([*install, str(root)], check=True, env={**os.environ, **without_compiling})
sys.path += [str(root), str(root / "lessons" / "gpt")]  # behind what is installed

OUT = Path("runs", "lessons")
ARGUMENTS = ["--out", str(OUT)]  # for a quick look: ["--out", str(OUT), "--steps", "100"]
"""

_LAST = """
from IPython.display import Image, Markdown, display

from lessons.gpt.run_all import collect, figure, table

data = collect(OUT)
display(Markdown(table(data)), Image(figure(data)))
"""


def notebook() -> dict[str, Any]:
    """The notebook, as JSON has it (nbformat 4.5)."""
    cells = [_text("title", _TITLE), _code("set-up", _SET_UP)]
    for number in range(1, 11):
        source = path_of(number).read_text(encoding="utf-8")
        title, _, text = (ast.get_docstring(ast.parse(source)) or "").partition("\n")
        cells += [
            _text(f"rung-{number}-text", f"## {title.rstrip('.')}\n{text}"),
            _code(f"rung-{number}", cell_of(source)),
        ]
    cells += [_text("climbed-text", "## What was reached"), _code("climbed", _LAST)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def cell_of(source: str) -> str:
    """A rung's code without its docstring and its imports of other rungs, and run by the notebook's arguments."""
    docstring = ast.parse(source).body[0]
    code = "\n".join(source.splitlines()[docstring.end_lineno :])
    code = re.sub(r"^\w+ = rung\(\d+\)\.\w+\n", "", code, flags=re.MULTILINE)
    code, started = re.subn(r'if __name__ == "__main__":\n    climb\((.*)\)$', r"climb(\1, argv=ARGUMENTS)", code)
    assert started == 1, "a rung ends with a call of climb"
    return re.sub(r"\n{4,}", "\n\n\n", code)


def _text(name: str, source: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": name, "metadata": {}, "source": _lines(source)}


def _code(name: str, source: str) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": name,
        "metadata": {},
        "outputs": [],
        "source": _lines(source),
    }


def _lines(source: str) -> list[str]:
    return source.strip("\n").splitlines(keepends=True)


def main() -> None:
    """Write lecture.ipynb."""
    write_atomically(NOTEBOOK, (json.dumps(notebook(), indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    main()
