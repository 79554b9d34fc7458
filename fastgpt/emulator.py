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
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastgpt import extension, kernel_ops

ORDERS = ("in_order", "reversed", "random", "skewed")
COPIES = ("eager", "lazy")
_USUAL_HOME = "/usr/local/cuda"

# -fno-strict-aliasing: a kernel reads memory as whatever it has the vector of, as CUDA lets it.
# -ffp-contract=off: the same bits on processors that could fuse a product with an addition, as nvcc would.
_FLAGS = ["-O2", "-DFASTGPT_EMULATE", "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unknown-pragmas"]


def requested() -> bool:
    """Whether FASTGPT_EMULATE asks for it; ``missing`` says so where it is neither "0" nor "1"."""
    return os.environ.get("FASTGPT_EMULATE", "") not in ("", "0")


def missing() -> str | None:
    """Why it cannot be built here, in one sentence, or None. Builds nothing."""
    try:
        _require("FASTGPT_EMULATE", os.environ.get("FASTGPT_EMULATE") or "0", ("0", "1"))
        _schedule_from_environment()
        _words("FASTGPT_EMULATE_CFLAGS")
        compiler = (_words("CXX") or ["c++"])[0]
    except ValueError as error:
        return str(error)
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
    """The folder of CUDA's headers: a toolkit's, else that of NVIDIA's wheels, else none."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), _home_of_nvcc(), _USUAL_HOME]
    spec = importlib.util.find_spec("nvidia")
    wheels = (spec.submodule_search_locations or []) if spec else []
    needed = ("cuda_runtime_api.h", "cuda_bf16.h", "crt/host_defines.h", "nv/target")
    for folder in (*(Path(home, "include") for home in homes if home), *(Path(p, "cu13/include") for p in wheels)):
        if all((folder / name).exists() for name in needed):
            return [folder]
    return []


def runtime() -> ModuleType:
    """The emulator's module, without any kernel, built if it has to be.

    Raises:
        RuntimeError: it cannot be built, with the compiler's words.
    """
    with _loading:  # other threads wait, and find it loaded
        return _runtime()


def load() -> ModuleType:
    """The same module, when fastgpt's kernels have been built and registered with torch's dispatcher, too."""
    with _loading:
        _load_kernels()
        return _runtime()


_loading = threading.RLock()


@functools.cache
def _runtime() -> ModuleType:
    module = build("fastgpt_emulator", list((extension.source_folder() / "emulator").glob("*.cpp")))
    _configure(module, **_schedule_from_environment())
    return module


@functools.cache
def _load_kernels() -> None:
    csrc = extension.source_folder()
    sources = [*(csrc / "cuda").glob("*.cu"), *(csrc / "bindings/cuda").glob("*.cpp")]
    _build("fastgpt_emulated_kernels", sources, [str(_runtime().__file__)], is_module=False)


def build(name: str, sources: Sequence[Path], libraries: Sequence[str] = ()) -> ModuleType:
    """Compile CUDA kernels for the emulator, with their binding to Python, and import them.

    Built is what changed since the last time, in a folder under TORCH_EXTENSIONS_DIR or the user's cache.

    Args:
        name: of the module; the binding's PYBIND11_MODULE is called TORCH_EXTENSION_NAME.
        sources: .cu and .cpp files.
        libraries: what to link; kernels need ``runtime().__file__``.

    Raises:
        RuntimeError: it cannot be built, with the compiler's words.
    """
    return _build(name, sources, libraries, is_module=True)


def _build(name: str, sources: Sequence[Path], libraries: Sequence[str], is_module: bool) -> Any:
    """``build``; what is no module of Python's registers its ops with torch as it is loaded."""
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    sources = sorted(path.resolve() for path in sources)
    compiler, flags = _compiler(), _flags()
    # By all that goes into it, so that two checkouts, or two versions of torch, do not take turns in building.
    folders = sorted({str(path.parent) for path in sources})
    inputs = (sys.prefix, torch.__version__, compiler, flags, headers(), folders, libraries)
    key = hashlib.sha256(repr(inputs).encode()).hexdigest()[:12]
    folder = cache_folder() / f"py{sys.version_info.major}{sys.version_info.minor}_{name}_{key}"
    # A sanitizer that is preloaded for the kernels is not for their compiler.
    environment = {"PATH": _path(), "CXX": compiler, "TORCH_DONT_CHECK_COMPILER_ABI": "1", "LD_PRELOAD": ""}
    with _locked(folder), _environment(environment):
        from torch.utils import cpp_extension  # takes 0.3 s, which only those who emulate pay

        (folder / "lock").unlink(missing_ok=True)  # torch's own, which outlives a build that was killed
        if not list(folder.glob("*.so")):
            print(f"fastgpt: building {name} for the emulator of CUDA kernels, once", file=sys.stderr, flush=True)
        try:
            return cpp_extension.load(
                name=name,
                sources=[str(_as_cpp(path, folder)) for path in sources],
                extra_cflags=flags,
                extra_ldflags=[*libraries, *(flag for flag in flags if flag.startswith("-fsanitize"))],
                extra_include_paths=[str(path) for path in headers()],
                build_directory=str(folder),
                with_cuda=False,
                is_python_module=is_module,
            )
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(name, None)  # else torch would take it for built
            raise RuntimeError(
                f"{name}, for the emulator of FASTGPT_EMULATE=1, could not be built with {compiler}, in {folder}:\n"
                f"{error}"
            ) from None


def compile_command() -> list[str]:
    """The C++ compiler and what it needs to be told of a CUDA kernel for the emulator, but for files."""
    includes = [word for folder in headers() for word in ("-isystem", str(folder))]
    return [*shlex.split(_compiler()), "-x", "c++", "-std=c++17", *_flags(), *includes]


NAMESPACE = "fastgpt_emulated"  # of the ops that the module registers


@functools.cache
def register_ops() -> list[torch.library.Library]:
    """Have CPU tensors take the cuda backend's ops to the emulator's, which the first of them loads.

    Returns:
        What is to live as long as the ops.
    """
    definitions = kernel_ops.define(NAMESPACE)
    implementations = torch.library.Library(extension.cuda.namespace, "IMPL")

    def implement(name: str) -> None:
        def run(*args: Any) -> Any:
            load()
            return kernel_ops.op(NAMESPACE, name)(*args)

        implementations.impl(name, run, "CPU")

    for name in kernel_ops.SCHEMAS:
        implement(name)
    return [definitions, implementations]


@contextlib.contextmanager
def schedule(
    order: str = "in_order",
    copies: str = "eager",
    seed: int = 0,
    count_banks: bool = False,
    count_memory: bool = False,
) -> Iterator[Any]:
    """Run the kernels within the ``with`` block in another schedule; gives the emulator's module.

    Args:
        order: which of a block's threads runs next: "in_order", "reversed", "random", or "skewed", where one warp runs
            as far ahead of the others as barriers let it.
        copies: "eager", or "lazy": what ``cp_async_16`` or ``tma_load`` copies, and what ``wgmma`` computes, arrives
            when it is waited for and not before.
        seed: of all that is random; the same seed gives the same run.
        count_banks: count the bank conflicts of every access to shared memory, not only those of ldmatrix. Slow.
        count_memory: count the requests for global memory, and the sectors of 32 bytes that they touch. Slow.

    Raises:
        ValueError: an unknown order or way of copying.
        RuntimeError: the emulator cannot be built.
    """
    module = runtime()
    before = module.settings()
    _configure(module, order, copies, seed, count_banks, count_memory)
    try:
        yield module
    finally:
        module.configure(before)


@contextlib.contextmanager
def bounds(tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Have kernels within the ``with`` block access no other global memory than that of these tensors.

    What lies outside is an error that names the tensor before it. A plain ``p[i]`` is not checked.
    """
    module = runtime()
    for name, tensor in tensors.items():
        module.add_memory(tensor.data_ptr(), tensor.nbytes, name)
    try:
        yield
    finally:
        for tensor in tensors.values():
            module.remove_memory(tensor.data_ptr())


def _configure(
    module: ModuleType,
    order: str = "in_order",
    copies: str = "eager",
    seed: int = 0,
    count_banks: bool = False,
    count_memory: bool = False,
) -> None:
    _require("the emulator's order", order, ORDERS)
    _require("the emulator's copies", copies, COPIES)
    if not 0 <= seed < 2**64:
        raise ValueError(f"the emulator's seed must be in [0, 2^64), got {seed}")
    settings = module.settings()
    settings.order = getattr(module.Order, order)
    settings.lazy_copies = copies == "lazy"
    settings.seed = seed
    settings.count_banks = count_banks
    settings.count_memory = count_memory
    module.configure(settings)


def _words(variable: str) -> list[str]:
    """The words of an environment variable, as a shell would have them."""
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"{variable} must be words for a shell, got {text!r} ({error})") from error


def _schedule_from_environment() -> dict[str, Any]:
    """What the variables say, checked before anything is built."""
    order = _require("FASTGPT_EMULATE_ORDER", os.environ.get("FASTGPT_EMULATE_ORDER") or "in_order", ORDERS)
    copies = _require("FASTGPT_EMULATE_COPIES", os.environ.get("FASTGPT_EMULATE_COPIES") or "eager", COPIES)
    seed = os.environ.get("FASTGPT_EMULATE_SEED") or "0"
    if not (seed.isascii() and seed.isdecimal() and int(seed) < 2**64):
        raise ValueError(f"FASTGPT_EMULATE_SEED must be a number in [0, 2^64), got {seed!r}")
    return {"order": order, "copies": copies, "seed": int(seed)}


def _require(what: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{what} must be one of {', '.join(choices)}, got {value!r}")
    return value


def _as_cpp(source: Path, folder: Path) -> Path:
    """For a .cu a C++ file that includes it: torch would give a .cu to nvcc."""
    if source.suffix != ".cu":
        return source
    wrapper = folder / f"kernel_{source.stem}.cpp"
    text = f'#include "{source}"\n'
    if not wrapper.exists() or wrapper.read_text() != text:
        wrapper.write_text(text)
    return wrapper


def cache_folder() -> Path:
    """Where what is built just in time lies: TORCH_EXTENSIONS_DIR, else a folder of the user's."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, made where there is none, belongs to this process. The lock ends with it, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        owner = (folder / "owner").open("w")
    except OSError as error:
        raise RuntimeError(
            f"the emulator of FASTGPT_EMULATE=1 cannot be built in {folder} ({error.strerror}); TORCH_EXTENSIONS_DIR "
            "names another folder"
        ) from error
    with owner:
        try:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"fastgpt: another process builds in {folder}; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(owner, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _flags() -> list[str]:
    return [*_FLAGS, *_words("FASTGPT_EMULATE_CFLAGS")]


def _compiler() -> str:
    return os.environ.get("CXX") or "c++"


def _path() -> str:
    # pip puts ninja beside Python, where it is not found unless the environment is activated.
    return sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)


def _home_of_nvcc() -> str | None:
    nvcc = shutil.which("nvcc")
    return None if nvcc is None else str(Path(nvcc).resolve().parent.parent)
