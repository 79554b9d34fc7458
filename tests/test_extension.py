"""What fastgpt/extension.py says of a CUDA library that cannot run; the C++ one is in test_build.py and test_cpp.py."""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastgpt import dispatch, extension, ops
from fastgpt.extension import Library

ROOT = Path(__file__).parent.parent


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """The CUDA library as it is where torch has CUDA and sees a GPU; its file lies in a folder of its own."""
    monkeypatch.setattr(extension, "_FOLDER", tmp_path)
    monkeypatch.setattr(extension.cuda, "path", tmp_path / "_cuda.abi3.so")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    build(
        extension.cuda.path,
        'extern "C" { int gpu; const char* fastgpt_cuda_error() { return gpu ? "no kernel" : nullptr; } }',
    )
    return extension.cuda


def build(path: Path, source: str) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)


def missing() -> str:
    return extension.cuda_missing.__wrapped__() or ""


def test_it_is_there(library: Library) -> None:
    assert missing() == ""


def test_it_was_not_built(library: Library) -> None:
    library.path.unlink()
    assert "pip install -e ." in missing()
    report = library.path.with_name("_build.json")
    report.write_text(json.dumps({"cuda": "FASTGPT_CUDA=0 was set when fastgpt was installed"}))
    assert missing() == "the CUDA extension was not built: FASTGPT_CUDA=0 was set when fastgpt was installed"
    report.write_text(json.dumps({"cpu": "of the other one"}))  # as after a wheel of somebody else's lost this file
    assert "of the other one" not in missing()


def test_torch_has_no_cuda(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert missing() == f"torch {torch.__version__} was built without CUDA"


def test_it_does_not_load(library: Library) -> None:
    library.path.write_text("not a library")
    assert missing().startswith("the CUDA extension does not load: ")
    assert missing().endswith(("invalid ELF header", "file too short"))


def test_no_gpu_is_there(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert missing() == "torch sees no GPU"


def test_the_gpu_cannot_run_it(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "functions", ctypes.CDLL(str(library.path)))

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        ctypes.c_int.in_dll(library.functions, "gpu").value = index
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4" if index < 0 else "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5) if index < 0 else (9, 0))
    error = extension._gpu_error.__wrapped__
    assert error(-1) == "it needs compute capability 8.0 or later, and this is a Tesla T4 (7.5)"
    assert error(0) is None
    assert error(1) == "CUDA cannot run its kernels (no kernel), and this is a NVIDIA H100 (9.0)"


def test_explain_and_errors_say_that_the_gpu_cannot_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = dispatch.Entry(torch.neg, ("cpu",), gpu_limit=lambda index: f"number {index} is too old")
    monkeypatch.setitem(dispatch._table["gelu"], "cuda", entry)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    (reason,) = (row["others"]["cuda"] for row in dispatch.explain() if row["op"] == "gelu")
    assert reason == "number 2 is too old"
    with pytest.raises(ValueError, match=r"backend 'cuda' cannot run here: number None is too old"):
        ops.gelu(torch.ones(1), backend="cuda")


@pytest.mark.filterwarnings("error:Dynamo detected")
def test_gpu_error_is_a_constant_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        ctypes.c_int.in_dll(library.functions, "gpu").value = index
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    extension._gpu_error.cache_clear()
    try:
        compiled = torch.compile(lambda x: x if extension.gpu_error(0) is None else -x, fullgraph=True, backend="eager")
        assert compiled(torch.ones(1)).item() == -1
    finally:
        extension._gpu_error.cache_clear()


def test_the_sources_are_found() -> None:
    assert (extension.source_folder() / "bindings" / "cuda" / "probe.cu").exists()
