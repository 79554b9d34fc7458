"""Builds the two libraries of the extension, and nothing else: pyproject.toml says the rest.

``FASTGPT_CPP`` (kernels for CPU tensors) and ``FASTGPT_CUDA`` (for GPU tensors) are "auto" (the default: where a
library cannot be built, fastgpt installs without it, and `fastgpt explain` tells the reason), "0" (leave it) or "1"
(fail where it cannot be built). ``CXX`` names the C++ compiler.

nvcc decides on the CUDA library, not a visible GPU. It is ``CUDA_HOME``'s or ``CUDA_PATH``'s where one is set, else
that on PATH, else that of /usr/local/cuda. ``TORCH_CUDA_ARCH_LIST`` names the GPUs as it does for torch
("8.0;9.0+PTX"), ``MAX_JOBS`` says how many files are compiled at once.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

VARIABLES = {"cpu": "FASTGPT_CPP", "cuda": "FASTGPT_CUDA"}
CHOICES = {name: os.environ.get(variable, "auto") for name, variable in VARIABLES.items()}
for name, choice in CHOICES.items():
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"{VARIABLES[name]} must be auto, 0 or 1, got {choice!r}")

REPORT = "_build.json"  # beside the libraries, read by fastgpt/extension.py: why one was not built
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

# One GPU of each family: machine code for 8.0 also runs on 8.6 to 8.9, that for 10.0 on 10.3, that for 12.0 on 12.1,
# and no kernel knows the difference; each more is that much more to compile. Newer GPUs compile the PTX of the last.
ARCHS = ("8.0", "9.0", "10.0", "12.0")
OLDEST_ARCH = 80  # bf16 on tensor cores and asynchronous copies to shared memory begin there
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# CUDA's runtime travels inside, and stays there: torch brings one of another version along for everyone to see.
CUDART_FLAGS = ["-lcudart_static", "-lrt", "-ldl", "-pthread", "-Wl,--exclude-libs,ALL"]
BYTES_PER_JOB = 2 << 30  # nvcc's compilers on the largest kernels, with room to spare


class Missing(Exception):
    """What a library cannot be built without, in one sentence."""


def compile_nothing(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [*COMPILER, "-x", "c++", *flags, "-c", "-", "-o", os.devnull]
    return subprocess.run(command, input="", capture_output=True, text=True)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return lines[-1]


def why_no_cpp() -> str | None:
    """Why no C++ can be compiled for torch here, in one sentence, or None."""
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
        return (
            f"the C++ compiler {COMPILER[0]} failed on an empty program when fastgpt was installed ({last_line(done)})"
        )
    return None


REASON = "nothing is to be built" if set(CHOICES.values()) == {"0"} else why_no_cpp()
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


@dataclass(frozen=True)
class Toolkit:
    """The CUDA toolkit that nvcc belongs to, as the host compiler and the linker get to know it."""

    nvcc: str
    ninja: str
    arch_flags: list[str]
    hopper_flags: list[str]  # for what is written for compute capability 9.0 alone
    include_flags: list[str]
    library_flags: list[str]


def find_toolkit() -> Toolkit:
    nvcc, ninja = find_nvcc(), shutil.which("ninja")
    if ninja is None:
        raise Missing("there was no ninja when fastgpt was installed (pip install ninja)")
    arch_flags = find_archs(nvcc)
    with tempfile.TemporaryDirectory() as folder:
        nothing = ("-x", "cu", "-c", os.devnull, "-o", os.path.join(folder, "nothing.o"))
        done = ask(nvcc, "-v", arch_flags[0], *nothing)
    if done.returncode:
        raise Missing(f"nvcc ({nvcc}) failed on an empty program when fastgpt was installed ({last_line(done)})")
    # nvcc may be a wrapper or a link: where its headers and libraries are it says itself.
    said = dict(re.findall(r"^#\$ (\w+)=(.*)$", done.stderr, re.MULTILINE))
    include_flags, library_flags = (shlex.split(said.get(key, "")) for key in ("INCLUDES", "LIBRARIES"))
    return Toolkit(nvcc, ninja, arch_flags, find_hopper(nvcc, arch_flags), include_flags, library_flags)


def ask(nvcc: str, *args: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([nvcc, *args], capture_output=True, text=True)
    except OSError as error:
        raise Missing(f"nvcc ({nvcc}) could not be run when fastgpt was installed ({error.strerror})") from error


def find_nvcc() -> str:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            where, folders = f"{variable} is {home}", os.path.join(home, "bin")
            break
    else:
        where = "neither on PATH nor in /usr/local/cuda; CUDA_HOME says where else it is"
        folders = os.environ["PATH"] + os.pathsep + "/usr/local/cuda/bin"
    nvcc = shutil.which("nvcc", path=folders)
    if nvcc is None:
        raise Missing(f"there was no nvcc when fastgpt was installed ({where})")
    return nvcc


def find_archs(nvcc: str) -> list[str]:
    """nvcc's flags for the GPUs of TORCH_CUDA_ARCH_LIST, or of ``ARCHS`` as far as this nvcc knows them."""
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        codes = ask(nvcc, "--list-gpu-code").stdout.split()
        known = [arch for arch in ARCHS if f"sm_{arch.replace('.', '')}" in codes]
        if not known:
            raise Missing(f"nvcc ({nvcc}) knew no GPU of compute capability 8.0 or later when fastgpt was installed")
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(known) + "+PTX"
    chosen = f"TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']!r}"
    try:
        flags = _get_cuda_arch_flags()
    except (ValueError, IndexError) as error:  # an unknown one; "native" without a GPU
        raise Missing(f"{chosen} was not understood when fastgpt was installed ({error})") from error
    # Images for many projects name older GPUs too.
    flags = [flag for flag in flags if int(re.search(r"arch=compute_(\d+)", flag)[1]) >= OLDEST_ARCH]
    if not flags:
        raise Missing(f"it needs compute capability 8.0 or later, and fastgpt was installed with {chosen}")
    return flags


def find_hopper(nvcc: str, arch_flags: list[str]) -> list[str]:
    """nvcc's flags for csrc/cuda/*_sm90.cu, whose instructions no other GPU has; without 9.0 they are left empty."""
    hopper = "-gencode=arch=compute_90a,code=sm_90a"
    if not any("compute_90" in flag for flag in arch_flags):
        return arch_flags
    # nvcc has known it since 12.0, and does not list it.
    known = ask(nvcc, "--dryrun", hopper, "-x", "cu", "-c", os.devnull, "-o", os.devnull).returncode == 0
    return [hopper, "-DFASTGPT_SM90A"] if known else arch_flags


def jobs() -> str:
    if given := os.environ.get("MAX_JOBS"):
        return given
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return str(max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_JOB)))


class BuildKernels(BuildExtension):
    """Builds each library, or reports why it cannot; what keeps one from being built leaves the other alone."""

    def run(self) -> None:
        folders = [Path(self.build_lib, "fastgpt")]
        if self.inplace:  # an editable installation also comes this way
            folders.append(Path("fastgpt"))
        self.reasons: dict[str, str] = {}
        for ext in self.extensions:
            name = library_of(ext)
            if CHOICES[name] == "0":
                self.leave_out(ext, f"{VARIABLES[name]}=0 was set when fastgpt was installed")
            elif REASON is not None:
                self.leave_out(ext, REASON)
            elif name == "cuda":
                try:
                    self.toolkit = find_toolkit()
                except Missing as missing:
                    self.leave_out(ext, str(missing))
        try:
            super().run()
        except Exception as error:  # not of one library
            print(error)
            for ext in self.extensions:
                self.leave_out(ext, "the build failed when fastgpt was installed (pip install -v shows how)")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / REPORT).unlink(missing_ok=True)
            if self.reasons:
                (folder / REPORT).write_text(json.dumps(self.reasons))
            for name in self.reasons:  # a library from an earlier build must not pass for this one
                (folder / f"_{name}.abi3.so").unlink(missing_ok=True)

    def leave_out(self, ext: Extension, reason: str) -> None:
        name = library_of(ext)
        if CHOICES[name] == "1":
            raise SystemExit(f"{VARIABLES[name]}=1, but {reason}")
        print(f"fastgpt is installed without its {'C++' if name == 'cpu' else 'CUDA'} extension: {reason}")
        self.reasons[name] = reason
        self.extensions = [other for other in self.extensions if other is not ext]

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".abi3.so"  # no Python module, so not Python's to name

    def build_extension(self, ext: Extension) -> None:
        name = library_of(ext)
        try:
            ext.extra_objects = self.compile_cpu() if name == "cpu" else self.compile_cuda()
            if name == "cuda":
                ext.extra_compile_args += self.toolkit.include_flags
                ext.extra_link_args += [*self.stand_in_for_torch(), *self.toolkit.library_flags, *CUDART_FLAGS]
            ext.extra_compile_args += ["-g" if self.debug else "-g0"]
            ext.extra_link_args += [] if self.debug else ["-s"]
            self.force = True  # link, whatever the ages of files say: without ninja all was compiled anew
            super().build_extension(ext)
        except Exception as error:  # the compiler has said what is wrong
            print(error)
            folder = "csrc" if name == "cpu" else "csrc/cuda"
            self.leave_out(ext, f"compiling {folder} failed when fastgpt was installed (pip install -v shows how)")

    def compile_cpu(self) -> list[str]:
        """The kernels for CPU tensors, once per instruction set."""
        sets = instruction_sets()
        debug = ["-g" if self.debug else "-g0"]
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
        return objects

    def compile_cuda(self) -> list[str]:
        """The kernels for GPU tensors. Not by torch: one that is built without CUDA knows no nvcc."""
        folder = Path(self.build_temp, "cuda").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        debug = ["-lineinfo"] if self.debug else []
        command = shlex.join([self.toolkit.nvcc, *CUDA_FLAGS, *debug]).replace("$", "$$")
        lines = [
            "rule nvcc",
            f"  command = {command} $arch -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        objects = []
        for source in sorted([*Path("csrc/cuda").glob("*.cu"), *Path("csrc/bindings/cuda").glob("*.cu")]):
            objects.append(str(folder / f"{source.stem}.o"))
            inside, outside = (re.sub(r"([$ :])", r"$\1", str(path)) for path in (source.absolute(), objects[-1]))
            arch_flags = self.toolkit.hopper_flags if source.stem.endswith("_sm90") else self.toolkit.arch_flags
            lines += [f"build {outside}: nvcc {inside}", f"  arch = {shlex.join(arch_flags)}"]
        (folder / "build.ninja").write_text("\n".join([*lines, ""]))
        subprocess.run([self.toolkit.ninja, "-C", folder, "-j", jobs()], check=True)
        return objects

    def stand_in_for_torch(self) -> list[str]:
        """Link flags that have the library ask for libtorch_cuda, which a torch built without CUDA does not have.

        Nothing of it is looked at here: by the time the library is loaded, torch has loaded the real one.
        """
        path = os.path.join(self.build_temp, "cuda", "libtorch_cuda.so")
        command = [*COMPILER, "-shared", "-nostdlib", f"-Wl,-soname,{os.path.basename(path)}", "-o", path]
        subprocess.run([*command, "-x", "c++", os.devnull], check=True)
        return ["-Wl,--no-as-needed", path]


def library_of(ext: Extension) -> str:
    """ "cpu" or "cuda"."""
    return ext.name.rpartition("._")[2]


setup(
    ext_modules=[
        CppExtension(
            f"fastgpt._{name}",
            sorted(str(path) for path in Path("csrc/bindings", name).glob("*.cpp")),
            extra_compile_args=["-O2", *COMMON_FLAGS, f"-DTORCH_TARGET_VERSION={TARGET}"],
            extra_link_args=["-fno-fast-math"],  # GCC would link code that has the whole process round denormals to 0
            py_limited_api=True,
        )
        for name in CHOICES
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
