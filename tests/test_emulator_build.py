"""The emulator is built on first use, again where something changed, and where it cannot be, says why."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cuda_kernels
import pytest
import tsan
from conftest import INTERPRETING

from fastgpt import emulator

pytestmark = [
    pytest.mark.skipif(not INTERPRETING, reason="with a GPU, kernels run there"),
    pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing())),
]
full = pytest.mark.full

TINY = """
#include <Python.h>
#include "value.h"
static PyModuleDef tiny = {PyModuleDef_HEAD_INIT, "tiny", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit_tiny() {
  PyObject* module = PyModule_Create(&tiny);
  PyModule_AddIntConstant(module, "value", VALUE);
  return module;
}
"""
BUILD = (
    "import sys, pathlib; from fastgpt import emulator; print(emulator.build('tiny', [pathlib.Path('tiny.cu')]).value)"
)


class Tiny:
    """A module of one constant, in a folder with a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder / "cache"), "PYTHONWARNINGS": "ignore"}
        self.say(1)
        (folder / "tiny.cu").write_text(TINY)

    def say(self, value: object) -> None:
        (self.folder / "value.h").write_text(f"#define VALUE {value}\n")

    def use_compiler(self, script: str) -> None:
        compiler = self.folder / "compiler"
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
        self.environment["CXX"] = str(compiler)

    def start(self, code: str = BUILD) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def value(self) -> int:
        process = self.start()
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        return int(out)

    def error(self, code: str = BUILD) -> str:
        process = self.start(code)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 1
        return err


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    return Tiny(tmp_path)


@full
def test_what_a_kernel_includes_is_built_again(tiny: Tiny) -> None:
    assert tiny.value() == 1
    tiny.say(2)
    assert tiny.value() == 2
    (tiny.folder / "tiny.cu").write_text(TINY.replace("VALUE)", "VALUE + 1)"))
    assert tiny.value() == 3


@full
def test_a_mistake_in_a_kernel_is_shown_with_its_line(tiny: Tiny) -> None:
    tiny.say("nonsense")
    said = tiny.error()
    assert "RuntimeError: tiny, for the emulator of FASTGPT_EMULATE=1, could not be built with c++, in" in said
    assert re.search(r"value\.h:1:\d+: error: .*nonsense", said), said
    tiny.say(4)
    assert tiny.value() == 4


@full
def test_a_broken_compiler_is_named(tiny: Tiny) -> None:
    tiny.use_compiler("echo 'compiler: the license has expired' >&2; exit 1")
    said = tiny.error()
    assert f"could not be built with {tiny.folder}/compiler, in {tiny.folder}/cache/" in said
    assert "compiler: the license has expired" in said
    tiny.use_compiler('exec c++ "$@"')
    assert tiny.value() == 1


@full
def test_an_op_that_cannot_be_built_says_so_each_time(tiny: Tiny) -> None:
    tiny.use_compiler("echo 'compiler: the license has expired' >&2; exit 1")
    code = """
import torch
from fastgpt import ops
for _ in range(2):
    try:
        ops.dropout(torch.ones(4), 0.5, backend="cuda")
    except RuntimeError as error:
        assert "the license has expired" in str(error), error
        print(str(error).splitlines()[0])
"""
    process = tiny.start(code)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    first, second = out.splitlines()
    assert first == second
    assert first.startswith("fastgpt_emulator, for the emulator of FASTGPT_EMULATE=1, could not be built with")


def test_without_a_compiler_the_reason_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert emulator.missing() == (
        "the emulator of FASTGPT_EMULATE=1 needs a C++ compiler, and there is no /nowhere/c++"
    )
    with pytest.raises(RuntimeError, match="needs a C"):
        emulator.build("tiny", [])


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError) as caught:
        emulator.build("tiny", [])
    said = str(caught.value)
    assert said.startswith(f"the emulator of FASTGPT_EMULATE=1 cannot be built in {tmp_path}/file/cache/py")
    assert said.endswith("(Not a directory); TORCH_EXTENSIONS_DIR names another folder")


@full
def test_two_processes_build_at_once(tiny: Tiny) -> None:
    tiny.use_compiler('sleep 2; exec c++ "$@"')
    both = [tiny.start(), tiny.start()]
    results = [process.communicate(timeout=200) for process in both]
    assert [out for out, _ in results] == ["1\n", "1\n"], results
    assert sum("another process builds in" in err for _, err in results) == 1


@full
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_stopped_does_not_stop_the_next(tiny: Tiny, kill: signal.Signals) -> None:
    slow, seen = tiny.folder / "slow", tiny.folder / "started"
    slow.touch()
    tiny.use_compiler(f'if [ -e {slow} ]; then touch {seen}; sleep 100; fi; exec c++ "$@"')
    process = tiny.start()
    started = time.monotonic()
    while not seen.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < 200
        time.sleep(0.1)
    os.killpg(process.pid, kill)  # as a terminal does
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in err or kill == signal.SIGKILL
    slow.unlink()
    assert tiny.value() == 1


@full
def test_the_headers_of_the_wheels_suffice(tiny: Tiny) -> None:
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place, "cu13/include") for place in (spec.submodule_search_locations or [])] if spec else []
    if not any((folder / "crt" / "host_defines.h").exists() for folder in folders):
        pytest.skip("the wheels of fastgpt[emulate] are not installed")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        tiny.environment.pop(name, None)
    code = """
import torch
from fastgpt import emulator
emulator._USUAL_HOME, emulator._home_of_nvcc = "/nowhere", lambda: None
(folder,) = emulator.headers()
assert str(folder).endswith("nvidia/cu13/include"), folder
from fastgpt import ops
x = torch.randn(3, 40, 16)
torch.testing.assert_close(
    ops.layer_norm(x, torch.ones(16), torch.zeros(16), backend="cuda"), torch.nn.functional.layer_norm(x, (16,))
)
"""
    process = tiny.start(code)
    _, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err


@full
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize(("source", "arch"), [("prims.cu", "80"), ("prims_sm90.cu", "90a")])
def test_nvcc_compiles_the_kernels_of_the_primitives(source: str, arch: str, tmp_path: Path) -> None:
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = ["nvcc", "-std=c++17", target, "-Werror", "all-warnings", "-c", "-o", str(tmp_path / "prims.o")]
    done = subprocess.run([*command, str(cuda_kernels.FOLDER / source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@full
def test_the_kernels_run_clean_under_asan_and_ubsan() -> None:
    script = Path(__file__).parent / "sanitize_cuda.sh"
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).exists():
        pytest.skip("there is no libasan.so")
    environment = {**os.environ, "BIN": str(Path(sys.executable).parent)}
    tests = ["test_layer_norm.py", "test_emulator.py", "test_prims.py"]
    done = subprocess.run([script, *tests], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "test_what_asan_says" not in done.stdout, "it was skipped"


def place(marker: str, name: str) -> str:
    lines = (cuda_kernels.FOLDER / "faults.cu").read_text().splitlines()
    return next(f"faults.cu:{n}" for n, line in enumerate(lines, 1) if line.endswith(f"// {marker} {name}"))


def test_thread_sanitizer_is_to_see_every_launcher() -> None:
    declared = re.findall(r"^void (\w+)\(", (tsan.ROOT / "csrc/cuda/kernels.h").read_text(), re.MULTILINE)
    driver = (cuda_kernels.FOLDER / "tsan.cpp").read_text()
    assert len(declared) > 5
    assert [name for name in declared if f"cuda::{name}(" not in driver] == []


@full
def test_the_kernels_run_clean_under_thread_sanitizer() -> None:
    done = tsan.run()
    assert done.returncode == 0, done.stderr[:5000]
    ran = {tsan.name_of(line) for line in done.stdout.splitlines()}
    ours = {name for name in tsan.compiled_kernels() if "_kernel" in name}
    assert len(ours) > 20
    assert ours - ran == set(), "compiled, and not driven"


@full
@pytest.mark.parametrize(
    "name", ["race_between_blocks", "race_between_threads", "race_past_an_mbarrier", "race_with_a_box"]
)
def test_thread_sanitizer_finds_a_race_on_global_memory(name: str) -> None:
    done = tsan.run(name)
    assert done.returncode == 66
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    assert place("FAULT", name) in done.stderr
