"""Runs the CUDA kernels of csrc/cuda on a CPU: builds csrc/emulator when it is first wanted, and controls it.

With ``FASTGPT_EMULATE=1`` in the environment ``backend="cuda"`` takes CPU tensors, as ``TRITON_INTERPRET=1`` makes
``backend="triton"`` do. That is for tests, debugging and learning: it is thousands of times slower than a GPU.
``FASTGPT_EMULATE_ORDER``, ``FASTGPT_EMULATE_COPIES`` and ``FASTGPT_EMULATE_SEED`` are what ``schedule`` starts with.
docs/emulator.md says what it finds.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastgpt import extension, kernel_ops

ORDERS = ("in_order", "reversed", "random", "skewed")
COPIES = ("eager", "lazy")

# -fno-strict-aliasing: a kernel reads memory as whatever it has the vector of, as CUDA lets it.
# -ffp-contract=off: __fmul_rn is a product that is rounded, also on processors that could fuse it with an addition.
_FLAGS = ["-O2", "-DFASTGPT_EMULATE", "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unknown-pragmas"]


def requested() -> bool:
    """Whether FASTGPT_EMULATE asks for it.

    Raises:
        ValueError: FASTGPT_EMULATE is neither "0" nor "1".
    """
    choice = os.environ.get("FASTGPT_EMULATE", "0")
    if choice not in ("", "0", "1"):
        raise ValueError(f"FASTGPT_EMULATE must be 0 or 1, got {choice!r}")
    return choice == "1"


def missing() -> str | None:
    """Why it cannot be built here, in one sentence, or None. Builds nothing."""
    compiler = shlex.split(_compiler())[0]
    if shutil.which(compiler) is None:
        return f"the emulator of FASTGPT_EMULATE=1 needs a C++ compiler, and there is no {compiler}"
    if shutil.which("ninja", path=_path()) is None:
        return "the emulator of FASTGPT_EMULATE=1 needs ninja (pip install 'fastgpt[emulate]')"
    if not headers():
        return (
            "the emulator of FASTGPT_EMULATE=1 needs the headers of CUDA: a CUDA toolkit (CUDA_HOME says where), or "
            "pip install 'fastgpt[emulate]'"
        )
    return None


def headers() -> list[Path]:
    """The folders of CUDA's headers: a toolkit's, else those of NVIDIA's wheels, else none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _home_of_nvcc(), "/usr/local/cuda"]
    for home in filter(None, homes):
        folder = Path(home, "include")
        if (folder / "cuda_runtime_api.h").exists() and (folder / "crt" / "host_defines.h").exists():
            return [folder]
    spec = importlib.util.find_spec("nvidia")
    for nvidia in map(Path, (spec.submodule_search_locations or []) if spec else []):
        together = nvidia / "cu13" / "include"
        if (together / "cuda_runtime_api.h").exists() and (together / "crt" / "host_defines.h").exists():
            return [together]
        apart = [nvidia / part / "include" for part in ("cuda_runtime", "cuda_nvcc", "cuda_cccl")]
        if (apart[0] / "cuda_runtime_api.h").exists() and (apart[1] / "crt" / "host_defines.h").exists():
            return [folder for folder in apart if folder.exists()]
    return []


@functools.cache
def load() -> ModuleType:
    """The emulator's module, built if it has to be; its kernels are registered with torch's dispatcher.

    Raises:
        RuntimeError: it cannot be built, with the compiler's words.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    from torch.utils import cpp_extension  # takes 0.3 s, which only those who emulate pay

    os.environ["PATH"] = _path()
    os.environ["CXX"] = _compiler()
    flags = [*_FLAGS, *shlex.split(os.environ.get("FASTGPT_EMULATE_CFLAGS", ""))]
    csrc = extension.source_folder()
    # By sources and flags, so that two checkouts do not take turns in building over each other.
    key = hashlib.sha256(f"{csrc} {flags} {os.environ['CXX']}".encode()).hexdigest()[:12]
    folder = Path(cpp_extension.get_default_build_root(), f"{_python_tag()}_fastgpt_emulator_{key}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "owner").open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)  # torch's own lock, which outlives a build that was killed
        if not list(folder.glob("*.so")):
            print("fastgpt: building the emulator of CUDA kernels (a minute or two, once)", file=sys.stderr, flush=True)
        module = cpp_extension.load(
            name="fastgpt_emulator",
            sources=[str(path) for path in (*_kernels(csrc, folder), *sorted((csrc / "bindings/cuda").glob("*.cpp")))]
            + [str(csrc / "emulator" / name) for name in ("emulator.cpp", "module.cpp")],
            extra_cflags=flags,
            extra_ldflags=[flag for flag in flags if flag.startswith("-fsanitize")],
            extra_include_paths=[str(path) for path in headers()],
            build_directory=str(folder),
            with_cuda=False,
        )
    _configure(module, **_schedule_from_environment())
    return module


def load_with_first_op() -> None:
    """Put stand-ins for the emulator's ops on CPU tensors: the first one that runs loads the emulator."""
    stand_ins = torch.library.Library(extension.cuda.namespace, "IMPL")

    def stand_in(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            stand_ins._destroy()  # the library that comes registers its own
            load()
            return extension.cuda.op(name)(*args)

        return run

    for name in kernel_ops.SCHEMAS:
        stand_ins.impl(name, stand_in(name), "CPU")


@contextlib.contextmanager
def schedule(order: str = "in_order", copies: str = "eager", seed: int = 0, count_banks: bool = False) -> Iterator[Any]:
    """Run the kernels within the ``with`` block in another schedule; gives the emulator's module.

    Args:
        order: which of a block's threads runs next: "in_order", "reversed", "random", or "skewed", where one warp runs
            as far ahead of the others as barriers let it.
        copies: "eager", or "lazy": what ``cp_async_16`` copies arrives when it is waited for and not before.
        seed: of all that is random; the same seed gives the same run.
        count_banks: count the bank conflicts of every access to shared memory, not only those of ldmatrix. Slow.

    Raises:
        ValueError: an unknown order or way of copying.
        RuntimeError: the emulator cannot be built.
    """
    module = load()
    before = module.settings()
    _configure(module, order, copies, seed, count_banks)
    try:
        yield module
    finally:
        module.configure(before)


def _configure(
    module: ModuleType, order: str = "in_order", copies: str = "eager", seed: int = 0, count_banks: bool = False
) -> None:
    if order not in ORDERS:
        raise ValueError(f"the emulator's order must be one of {', '.join(ORDERS)}, got {order!r}")
    if copies not in COPIES:
        raise ValueError(f"the emulator's copies must be eager or lazy, got {copies!r}")
    settings = module.settings()
    settings.order = getattr(module.Order, order)
    settings.lazy_copies = copies == "lazy"
    settings.seed = seed
    settings.count_banks = count_banks
    module.configure(settings)


def _schedule_from_environment() -> dict[str, Any]:
    seed = os.environ.get("FASTGPT_EMULATE_SEED", "0")
    if not seed.isdecimal():
        raise ValueError(f"FASTGPT_EMULATE_SEED must be a number, got {seed!r}")
    order, copies = (os.environ.get(f"FASTGPT_EMULATE_{name}", "") for name in ("ORDER", "COPIES"))
    return {"order": order or "in_order", "copies": copies or "eager", "seed": int(seed)}


def _kernels(csrc: Path, folder: Path) -> list[Path]:
    """One C++ file for each .cu, which includes it: torch would give a .cu to nvcc."""
    wrappers = []
    for source in sorted((csrc / "cuda").glob("*.cu")):
        wrapper = folder / f"kernel_{source.stem}.cpp"
        text = f'#include "{source}"\n'
        if not wrapper.exists() or wrapper.read_text() != text:
            wrapper.write_text(text)
        wrappers.append(wrapper)
    return wrappers


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"


def _path() -> str:
    # pip puts ninja beside Python, where it is not found unless the environment is activated.
    return sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)


def _python_tag() -> str:
    return f"py{sys.version_info.major}{sys.version_info.minor}"


def _home_of_nvcc() -> str | None:
    nvcc = shutil.which("nvcc")
    return None if nvcc is None else str(Path(nvcc).resolve().parent.parent)
