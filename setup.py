"""Builds the C++ extension, and nothing else: pyproject.toml says the rest.

``FASTGPT_CPP`` is "auto" (the default: where it cannot be built, fastgpt installs without it, and `fastgpt explain`
tells the reason), "0" (leave it) or "1" (fail where it cannot be built). ``CXX`` names the compiler.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CHOICE = os.environ.get("FASTGPT_CPP", "auto")
if CHOICE not in ("auto", "0", "1"):
    raise SystemExit(f"FASTGPT_CPP must be auto, 0 or 1, got {CHOICE!r}")

LIBRARY = "_cpu.abi3.so"
REPORT = "_build.json"  # beside the library, read by fastgpt/extension.py: why it was not built
TARGET = "0x020A000000000000"  # torch 2.10, the first whose stable ABI has all that the bindings use

# Compiling (by torch) and linking (by setuptools) have different defaults.
os.environ["CXX"] = os.environ.get("CXX") or "c++"
COMPILER = shlex.split(os.environ["CXX"])
os.environ["TORCH_DONT_CHECK_COMPILER_ABI"] = "1"  # that check is about the ABI that is not stable
# pip puts ninja beside Python, where it is not found unless the environment is activated.
os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)

# Beyond the baseline; each one that the compiler knows is compiled, and the processor chooses when fastgpt is loaded.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86 = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}

# These stand behind the user's CFLAGS. -ffp-contract lets a * b + c be one operation; the last two let square roots and
# comparisons be vector instructions. None reorders a sum or drops a NaN.
COMMON_FLAGS = ["-fvisibility=hidden", "-fno-fast-math"]
KERNEL_FLAGS = ["-std=c++17", "-O3", *COMMON_FLAGS, "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


def compile_nothing(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [*COMPILER, "-x", "c++", *flags, "-c", "-", "-o", os.devnull]
    return subprocess.run(command, input="", capture_output=True, text=True)


def why_not() -> str | None:
    """Why the extension cannot be built here, in one sentence, or None."""
    if CHOICE == "0":
        return "FASTGPT_CPP=0 was set when fastgpt was installed"
    try:
        import torch
    except (ImportError, OSError) as error:
        return f"torch could not be imported when fastgpt was installed ({error})"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        return f"it needs torch 2.10 or later, and fastgpt was installed beside torch {torch.__version__}"
    try:
        done = compile_nothing("-std=c++17")
    except OSError as error:
        return f"there was no C++ compiler when fastgpt was installed ({COMPILER[0]}: {error.strerror})"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return f"the C++ compiler {COMPILER[0]} failed on an empty program when fastgpt was installed ({lines[-1]})"
    return None


REASON = why_not()
if REASON is None:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    BuildExtension = BuildExtension.with_options(use_ninja=len(COMPILER) == 1)  # not "ccache g++": torch quotes it
else:  # setuptools still wants a command, and an extension to leave out
    BuildExtension, CppExtension = build_ext, Extension


def instruction_sets() -> dict[str, list[str]]:
    """{name: compiler flags} beyond the baseline."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    return {name: flags for name, flags in X86.items() if compile_nothing(*flags).returncode == 0}


class BuildKernels(BuildExtension):
    """Compiles csrc/cpu once per instruction set and links the copies into one library, or reports why it cannot."""

    def run(self) -> None:
        folders = [Path(self.build_lib, "fastgpt")]
        if self.inplace:  # an editable installation also comes this way
            folders.append(Path("fastgpt"))
        reason = REASON
        if reason is None:
            try:
                super().run()
            except Exception as error:  # the compiler has said what is wrong
                print(error)
                reason = "compiling csrc failed when fastgpt was installed (pip install -v shows how)"
        if reason is not None:
            if CHOICE == "1":
                raise SystemExit(f"FASTGPT_CPP=1, but {reason}")
            print(f"fastgpt is installed without its C++ extension: {reason}")
            self.extensions = []
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            if reason is None:
                (folder / REPORT).unlink(missing_ok=True)
            else:  # a library from an earlier build must not pass for this one
                (folder / REPORT).write_text(json.dumps({"cpu": reason}))
                (folder / LIBRARY).unlink(missing_ok=True)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)  # no Python module, so not Python's to name

    def build_extension(self, ext: Extension) -> None:
        sets = instruction_sets()
        debug = ["-g"] if self.debug else ["-g0"]
        has = [f"-DFASTGPT_HAS_{name.upper()}" for name in sets]
        objects = self.compiler.compile(
            ["csrc/cpu/select.cpp"], f"{self.build_temp}/select", extra_postargs=[*KERNEL_FLAGS, *debug, *has]
        )
        kernels = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp") if path.name != "select.cpp")
        for name, flags in {"baseline": [], **sets}.items():
            # An output folder each: the sources are the same.
            objects += self.compiler.compile(
                kernels,
                f"{self.build_temp}/{name}",
                extra_postargs=[*KERNEL_FLAGS, *debug, *flags, f"-DFASTGPT_ISA={name}"],
            )
        ext.extra_objects = objects
        ext.extra_compile_args += debug
        ext.extra_link_args += [] if self.debug else ["-s"]
        self.force = True  # link, whatever the ages of files say: without ninja all was compiled anew
        super().build_extension(ext)


setup(
    ext_modules=[
        CppExtension(
            "fastgpt._cpu",
            sorted(str(path) for path in Path("csrc/bindings/cpu").glob("*.cpp")),
            # What a source distribution takes along.
            depends=sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".cpp", ".h")),
            extra_compile_args=["-O2", *COMMON_FLAGS, f"-DTORCH_TARGET_VERSION={TARGET}"],
            extra_link_args=["-fno-fast-math"],  # GCC would link code that has the whole process round denormals to 0
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
