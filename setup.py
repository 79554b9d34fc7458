"""Builds the C++ extension, and nothing else: pyproject.toml says the rest.

``FASTGPT_CPP`` is "auto" (the default: where it cannot be built, fastgpt installs without it, and `fastgpt explain`
tells the reason), "0" (leave it) or "1" (fail where it cannot be built).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, setup

REPORT = "_build.json"  # read by fastgpt/extension.py: why a library was not built
TARGET = "0x020A000000000000"  # torch 2.10, the first whose stable ABI has all that the bindings use

# Beyond the baseline; each one that the compiler knows is compiled, and the processor chooses when fastgpt is loaded.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
X86 = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}

# -ffp-contract lets a * b + c be one operation; the other two let square roots and comparisons be vector instructions.
# Neither reorders a sum or drops a NaN.
KERNEL_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


def wanted() -> str:
    choice = os.environ.get("FASTGPT_CPP", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"FASTGPT_CPP must be auto, 0 or 1, got {choice!r}")
    return choice


def why_not() -> str | None:
    """Why the extension cannot be built here, in one sentence, or None."""
    if wanted() == "0":
        return "FASTGPT_CPP=0 was set when fastgpt was installed"
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch could not be imported when fastgpt was installed ({error})"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <cstdint>\nint main() { return 0; }\n")
        try:
            probe = [*compiler, "-std=c++17", "-c", str(source), "-o", f"{source}.o"]
            done = subprocess.run(probe, capture_output=True, text=True)
        except OSError as error:
            return f"there was no C++ compiler when fastgpt was installed ({error})"
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        return f"the C++ compiler {compiler[0]} failed on an empty program when fastgpt was installed ({lines[-1]})"
    return None


def instruction_sets() -> dict[str, list[str]]:
    """{name: compiler flags} beyond the baseline."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    probe = [*compiler, "-x", "c++", "-fsyntax-only", "-"]
    knows = {
        name: subprocess.run([*probe, *flags], input="", capture_output=True, text=True).returncode == 0
        for name, flags in X86.items()
    }
    return {name: flags for name, flags in X86.items() if knows[name]}


def report_to(folder: Path, reason: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if reason is None:
        (folder / REPORT).unlink(missing_ok=True)
    else:
        (folder / REPORT).write_text(json.dumps({"cpu": reason}))


try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:  # why_not() will say so; setuptools still wants a command and an extension to leave out
    from setuptools.command.build_ext import build_ext as BuildExtension

    CppExtension = Extension


class BuildKernels(BuildExtension):
    """Compiles csrc/cpu once per instruction set, links the copies into one library, and leaves a report of failure."""

    def run(self) -> None:
        reason = why_not()
        if reason is None:
            try:
                super().run()
            except Exception as error:  # the report, FASTGPT_CPP=1 and pip's output all tell it
                print(error)
                reason = "compiling csrc failed when fastgpt was installed (FASTGPT_CPP=1 pip install -v . shows how)"
                if wanted() == "1":
                    raise
        if reason is not None and wanted() == "1":
            raise SystemExit(f"FASTGPT_CPP=1, but {reason}")
        report_to(Path(self.build_lib, "fastgpt"), reason)
        if self.inplace or self.editable_mode:
            report_to(Path("fastgpt"), reason)

    def build_extension(self, ext: Extension) -> None:
        sets = instruction_sets()
        kernels = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp") if path.name != "select.cpp")
        has = [f"-DFASTGPT_HAS_{name.upper()}" for name in sets]
        objects = self.compiler.compile(
            ["csrc/cpu/select.cpp"], f"{self.build_temp}/select", extra_postargs=["-std=c++17", "-O2", *has]
        )
        for name, flags in {"baseline": [], **sets}.items():
            # An output folder each: the sources are the same.
            objects += self.compiler.compile(
                kernels, f"{self.build_temp}/{name}", extra_postargs=[*KERNEL_FLAGS, *flags, f"-DFASTGPT_ISA={name}"]
            )
        ext.extra_objects = objects
        super().build_extension(ext)


setup(
    ext_modules=[
        CppExtension(
            "fastgpt._cpu",
            sorted(str(path) for path in Path("csrc/bindings/cpu").glob("*.cpp")),
            extra_compile_args=["-O2", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TARGET}"],
            extra_link_args=["-s"],
            py_limited_api=True,
            optional=wanted() != "1",
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
