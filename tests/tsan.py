"""Builds tests/emulator/tsan.cpp: all of csrc/cuda, instrumented by ThreadSanitizer, in the emulator, which is not.

`python tests/tsan.py [FAULT]` builds what changed in build/tsan and runs it; `make sanitize-cuda` does.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from fastgpt import emulator

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "tsan"
FLAGS = "-std=c++17 -O1 -g -DFASTGPT_EMULATE -DFASTGPT_TSAN -fno-strict-aliasing -ffp-contract=off -Wno-unknown-pragmas"


def build() -> Path:
    """The program, up to date.

    Raises:
        RuntimeError: it cannot be built, with the reason or the compiler's words.
    """
    if emulator.missing() is not None:
        raise RuntimeError(emulator.missing())
    includes = " ".join(f"-isystem {shlex.quote(str(folder))}" for folder in emulator.headers())
    compiler = os.environ.get("CXX") or "c++"
    rules = [
        f"rule compile\n command = {compiler} {FLAGS} $also {includes} -MMD -MF $out.d -x c++ -c $in -o $out",
        " depfile = $out.d\n deps = gcc",
        f"rule link\n command = {compiler} -fsanitize=thread $in -o $out",
    ]
    kernels = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "tests/emulator/faults.cu"]
    for source in (*kernels, ROOT / "tests/emulator/tsan.cpp", ROOT / "csrc/emulator/emulator.cpp"):
        also = "" if source.name == "emulator.cpp" else "-fsanitize=thread"
        rules.append(f"build {source.stem}.o: compile {source}\n also = {also}")
    objects = " ".join(re.findall(r"^build (\S+):", "\n".join(rules), re.MULTILINE))
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "build.ninja").write_text("\n".join([*rules, f"build program: link {objects}\n"]))
    ninja = shutil.which("ninja", path=emulator._path())
    assert ninja is not None
    jobs = [f"-j{os.environ['MAX_JOBS']}"] if "MAX_JOBS" in os.environ else []
    done = subprocess.run([ninja, *jobs], cwd=FOLDER, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"tsan.cpp could not be built in {FOLDER}:\n{done.stdout[-4000:]}")
    return FOLDER / "program"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What it says; a race makes it end with 66."""
    # Without a random layout of its memory: of the kernels' newer ways to lay it out ThreadSanitizer knows nothing.
    command = [*(["setarch", "-R"] if shutil.which("setarch") else []), str(build()), *arguments]
    environment = {**os.environ, "TSAN_OPTIONS": "exitcode=66 halt_on_error=0"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def compiled_kernels() -> set[str]:
    """The kernels of csrc/cuda in the program, by the names that the emulator gives them."""
    signatures = re.findall(rb"\[with auto kKernel = ([ -~]*?); Args = ", build().read_bytes())
    return {name_of(signature.decode()) for signature in signatures}


def name_of(kernel: str) -> str:
    """A kernel's name without its namespace."""
    return re.sub(r"^(?:\w+::|\{anonymous\}::)*", "", kernel)


if __name__ == "__main__":
    finished = run(*sys.argv[1:])
    print(finished.stdout + finished.stderr, end="")
    sys.exit(finished.returncode)
