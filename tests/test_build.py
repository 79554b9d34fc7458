"""The build: what setup.py makes of compilers and choices, and that its wheel works where nothing was compiled."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
LIBRARY, REPORT = "fastgpt/_cpu.abi3.so", "fastgpt/_build.json"
CUDA_LIBRARY = "fastgpt/_cuda.abi3.so"
BENCHMARK_DATA = ("page.html", "result.schema.json")  # what the benchmarks read beside their modules
SETS = ("baseline", "avx2", "avx512", "avx512_bf16")
KERNELS = sorted(path for path in ROOT.glob("csrc/cpu/*.cpp") if path.name != "select.cpp")

# Writes its outputs empty and its arguments to a log, and fails where they contain $FAILS.
STAND_IN = r"""#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in *"${FAILS:-nothing fails}"*) echo "out of luck" >&2; exit 1 ;; esac
while [ $# -gt 0 ]; do
  case "$1" in -o) out=$2 ;; -MF) depends=$2 ;; *.cpp) source=$1 ;; esac
  shift
done
: > "$out"
if [ -n "$depends" ]; then echo "$out: $source" > "$depends"; fi
"""

# nvcc: says what it was given to say, and like the C++ compiler writes nothing or fails.
NVCC = r"""#!/bin/sh
echo "nvcc $*" >> "$LOG"
case "$*" in *"${NVCC_FAILS:-nothing fails}"*) echo "nvcc fatal: out of luck" >&2; exit 1 ;; esac
if [ "$1" = --list-gpu-code ]; then printf 'sm_75\nsm_80\nsm_90\n'; exit; fi
if [ "$1" = -v ]; then printf '#$ INCLUDES="-I/the/headers"  \n#$ LIBRARIES=  "-L/the/libraries"\n' >&2; fi
while [ $# -gt 0 ]; do
  case "$1" in -o) out=$2 ;; -MF) depends=$2 ;; *.cu) source=$1 ;; esac
  shift
done
: > "$out"
if [ -n "$depends" ]; then echo "$out: $source" > "$depends"; fi
"""

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler here"
)


class Tree:
    """A copy of the checkout, as it is before any build, and stand-ins for the compilers; nvcc's is for who asks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "tree", folder / "log"
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build.json")
        for name in ("csrc", "fastgpt", "benchmarks", "triton_kernels"):
            shutil.copytree(ROOT / name, self.folder / name, ignore=ignored)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.folder)
        self.compiler, self.toolkit = folder / "c++", folder / "toolkit"
        self.nvcc = self.toolkit / "bin" / "nvcc"
        self.nvcc.parent.mkdir(parents=True)
        for path, text in ((self.compiler, STAND_IN), (self.nvcc, NVCC)):
            path.write_text(text)
            path.chmod(0o755)
        self.modules = folder / "modules"
        self.modules.mkdir()

    def build(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        settings = {"CXX": str(self.compiler), "LOG": str(self.log), "PYTHONPATH": str(self.modules), **environment}
        return run(
            sys.executable, "setup.py", *(command or ("build_ext", "--inplace")), cwd=self.folder, environment=settings
        )

    def build_cuda(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """By nvcc's stand-in, if the environment names no other, and without the C++ kernels."""
        settings = {"FASTGPT_CPP": "0", "FASTGPT_CUDA": "auto", "CUDA_HOME": str(self.toolkit), **environment}
        return self.build(**settings)

    def compiled(self) -> list[str]:
        """Commands of the last build that compile csrc/cpu."""
        return [line for line in self.log.read_text().splitlines() if "-c -c" in line and "csrc/cpu" in line]

    def linked(self) -> bool:
        return any("-shared" in line for line in self.log.read_text().splitlines())

    def compiled_by_nvcc(self) -> dict[str, list[str]]:
        """{file: command} of the last build's kernels."""
        commands = [line.split() for line in self.log.read_text().splitlines() if "nvcc " in line and " -MD " in line]
        return {Path(words[words.index("-c") + 1]).name: words for words in commands}

    def reason(self, name: str = "cpu") -> str | None:
        """What the report says, where there is no library; a library and a reason exclude each other."""
        report = self.folder / REPORT
        reasons = json.loads(report.read_text()) if report.exists() else {}
        assert (name in reasons) != (self.folder / f"fastgpt/_{name}.abi3.so").exists()
        return reasons.get(name)


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Without what is set here, and without the CUDA kernels, which take minutes, if it is not asked for them."""
    ours = ("FASTGPT_", "PYTHONPATH", "CC", "CXX", "CFLAGS", "LDFLAGS", "CUDA_", "NVCC_", "TORCH_CUDA_", "MAX_JOBS")
    settings = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    settings = {**settings, "FASTGPT_CUDA": "0", **(environment or {})}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=settings, capture_output=True, text=True)


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def environment_with(wheel: Path, folder: Path, *packages: str | Path) -> Path:
    """A fresh virtual environment with the wheel in it, and folders of packages behind it; returns its bin/."""
    succeeded(run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=ROOT))
    site = next(folder.glob("lib/python*/site-packages"))
    site.joinpath("packages.pth").write_text("".join(f"{path}\n" for path in packages))
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet")
    succeeded(run(*pip, "--no-deps", "--no-index", "--disable-pip-version-check", wheel, cwd=folder))
    return folder / "bin"


def packages_here() -> list[str]:
    return [path for path in sys.path if path.endswith("-packages")]


# ----------------------------------------------------------------------------------------------------------------------
# Choices and compilers
# ----------------------------------------------------------------------------------------------------------------------


def test_builds_what_changed_and_leaves_nothing_stale(tree: Tree) -> None:
    succeeded(tree.build(CFLAGS="-ffast-math -O0"))
    assert tree.reason() is None
    for isa in SETS if os.uname().machine == "x86_64" else SETS[:1]:
        (flags,) = [
            words
            for words in map(str.split, tree.compiled())
            if f"-DFASTGPT_ISA={isa}" in words and words[words.index("-o") + 1].endswith("/layer_norm.o")
        ]
        for ours in ("-O3", "-fno-fast-math", "-ffp-contract=fast"):  # the last one counts
            assert flags.index(ours) > max(flags.index("-ffast-math"), flags.index("-O0"))

    succeeded(tree.build(CFLAGS="-ffast-math -O0"))
    assert not tree.compiled()
    os.utime(tree.folder / "csrc/cpu/layer_norm.cpp")
    succeeded(tree.build(CFLAGS="-ffast-math -O0"))
    assert {Path(line.split(" -c -c ")[1].split()[0]).name for line in tree.compiled()} == {"layer_norm.cpp"}
    assert tree.linked()

    succeeded(tree.build(FASTGPT_CPP="0"))
    assert tree.reason() == "FASTGPT_CPP=0 was set when fastgpt was installed"
    succeeded(tree.build())
    assert tree.reason() is None


def test_a_compiler_that_fails_half_way(tree: Tree) -> None:
    (tree.folder / LIBRARY).write_text("of an earlier build")
    said = succeeded(
        tree.build(FAILS="avx2/csrc/cpu/layer_norm.o" if os.uname().machine == "x86_64" else "layer_norm.o")
    )
    assert "out of luck" in said
    assert "compiling csrc failed" in (tree.reason() or "")


def test_a_choice_of_1_fails_in_one_sentence(tree: Tree) -> None:
    done = tree.build(FASTGPT_CPP="1", FAILS="layer_norm.cpp")
    assert done.returncode != 0
    assert re.search(r"^FASTGPT_CPP=1, but compiling csrc failed.*\n\Z", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


def test_sets_that_the_compiler_does_not_know_are_left_out(tree: Tree) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("this processor has no further sets")
    succeeded(tree.build(FAILS="-mavx512bf16"))
    assert tree.reason() is None
    sets = {word for line in tree.compiled() for word in line.split() if "FASTGPT_ISA" in word or "FASTGPT_HAS" in word}
    assert sets == {f"-DFASTGPT_ISA={isa}" for isa in SETS[:3]} | {"-DFASTGPT_HAS_AVX2", "-DFASTGPT_HAS_AVX512"}


def test_another_processor_gets_the_baseline_and_a_wrapped_compiler_works(tree: Tree) -> None:
    tree.modules.joinpath("sitecustomize.py").write_text("import platform\nplatform.machine = lambda: 'riscv64'\n")
    succeeded(tree.build(CXX=f"env {tree.compiler}"))
    assert tree.reason() is None
    commands = tree.log.read_text()
    assert "-DFASTGPT_ISA=baseline" in commands
    assert "-mavx" not in commands
    assert "FASTGPT_HAS" not in commands


NEW_TORCH = "__version__ = '2.13.0'"


@pytest.mark.parametrize(
    ("torch_module", "compiler", "reason"),
    [
        ("raise ImportError('no such thing')", None, r"torch could not be imported .*\(no such thing\)"),
        ("raise OSError('half of it is missing')", None, r"torch could not be imported .*\(half of it is missing\)"),
        ("__version__ = '2.9.1+cpu'", None, r"it needs torch 2\.10 or later, .* torch 2\.9\.1\+cpu"),
        (NEW_TORCH, "/no/such/compiler", r"there was no C\+\+ compiler .*/no/such/compiler: No such file"),
        (NEW_TORCH, "false", r"the C\+\+ compiler false failed on an empty program .*\(exit status 1\)"),
    ],
)
def test_says_why_it_was_not_built(tree: Tree, torch_module: str, compiler: str | None, reason: str) -> None:
    tree.modules.joinpath("torch.py").write_text(torch_module)
    compiler = compiler or str(tree.compiler)
    succeeded(tree.build(CXX=compiler))
    assert re.match(reason, tree.reason() or "")
    done = tree.build(CXX=compiler, FASTGPT_CPP="1")
    assert done.returncode != 0
    assert re.match(f"FASTGPT_CPP=1, but {reason}.*\n\\Z", done.stderr)


def test_a_wrong_choice_is_named(tree: Tree) -> None:
    for variable in ("FASTGPT_CPP", "FASTGPT_CUDA"):
        assert tree.build(**{variable: "yes"}).stderr == f"{variable} must be auto, 0 or 1, got 'yes'\n"


def test_a_source_distribution_has_all_sources(tree: Tree) -> None:
    succeeded(tree.build("sdist", FASTGPT_CPP="0"))
    (archive,) = tree.folder.glob("dist/*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()}
    assert "csrc/bindings/cuda/probe.cu" in sources
    others = {"setup.py", "fastgpt/ops/gelu.py", *(f"benchmarks/{name}" for name in ("gpu_check.py", *BENCHMARK_DATA))}
    assert sources | others <= names


def test_without_a_compiler_the_package_works_and_explains(tree: Tree) -> None:
    succeeded(tree.build("build", "--build-lib", str(tree.modules), CXX="/no/such/compiler"))
    explained = run(
        *(sys.executable, "-m", "fastgpt", "explain"),
        cwd=tree.modules,
        environment={"COLUMNS": "1000", "PYTHONPATH": str(tree.modules)},
    )
    assert "the C++ extension was not built: there was no C++ compiler" in succeeded(explained)
    for name in BENCHMARK_DATA:
        assert (tree.modules / "fastgpt" / "benchmarks" / name).is_file()


# ----------------------------------------------------------------------------------------------------------------------
# The CUDA library
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_nvcc_builds_the_cuda_library_beside_the_other_or_alone(tree: Tree) -> None:
    succeeded(tree.build(FASTGPT_CUDA="auto", CUDA_HOME=str(tree.toolkit)))
    assert not (tree.folder / REPORT).exists()
    assert (tree.folder / LIBRARY).exists()
    assert (tree.folder / CUDA_LIBRARY).exists()
    sources = [path.name for path in [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/bindings/cuda/*.cu")]]
    commands = tree.compiled_by_nvcc()
    assert sorted(commands) == sorted(sources)
    assert all("-O3" in words and "-std=c++17" in words for words in commands.values())
    bindings = [line for line in tree.log.read_text().splitlines() if "csrc/bindings/cuda" in line and "c++20" in line]
    assert len(bindings) == len(list(ROOT.glob("csrc/bindings/cuda/*.cpp")))
    assert all("-I/the/headers" in line for line in bindings)
    (link,) = [line for line in tree.log.read_text().splitlines() if "-shared" in line and CUDA_LIBRARY in line]
    assert "-L/the/libraries -lcudart_static" in link
    assert "libtorch_cuda.so" in link

    succeeded(tree.build_cuda())
    assert tree.reason("cpu") == "FASTGPT_CPP=0 was set when fastgpt was installed"
    assert tree.reason("cuda") is None
    assert not tree.compiled()
    assert not tree.compiled_by_nvcc()

    os.utime(tree.folder / "csrc/bindings/cuda/probe.cu")
    succeeded(tree.build_cuda())
    assert set(tree.compiled_by_nvcc()) == {"probe.cu"}

    succeeded(tree.build())
    assert tree.reason("cpu") is None
    assert tree.reason("cuda") == "FASTGPT_CUDA=0 was set when fastgpt was installed"


ARCHS = {
    "": "80 90 90+PTX",  # those of the default list that nvcc's stand-in knows
    "9.0": "90",
    "8.6;9.0+PTX": "86 90 90+PTX",
    "7.5 8.0": "80",
    "Ada": "89 89+PTX",
}


HOPPER = {"-gencode=arch=compute_90a,code=sm_90a", "-DFASTGPT_SM90A"}


@pytest.mark.full
@pytest.mark.parametrize("given", ARCHS)
def test_compiles_for_the_gpus_that_are_named(tree: Tree, given: str) -> None:
    flags = set()
    for arch in ARCHS[given].split():
        number, _, ptx = arch.partition("+")
        flags.add(f"-gencode=arch=compute_{number},code={'compute' if ptx else 'sm'}_{number}")
    # Hopper's own instructions: by an nvcc that knows them, and by one from before 12.0.
    for fails, hopper in (("nothing fails", HOPPER if "90" in ARCHS[given].split() else flags), ("compute_90a", flags)):
        shutil.rmtree(tree.folder / "build", ignore_errors=True)
        succeeded(tree.build_cuda(FASTGPT_CUDA="1", TORCH_CUDA_ARCH_LIST=given, NVCC_FAILS=fails))
        for source, words in tree.compiled_by_nvcc().items():
            wanted = hopper if source == "attention_fwd_sm90.cu" else flags
            assert {word for word in words if "-gencode" in word or "SM90" in word} == wanted


UNREADABLE_LISTS = {
    "7.5": r"it needs compute capability 8\.0 or later, .* TORCH_CUDA_ARCH_LIST='7\.5'$",
    "8.0;nine": r"TORCH_CUDA_ARCH_LIST='8\.0;nine' was not understood .*nine",
}


@pytest.mark.full
@pytest.mark.parametrize("given", UNREADABLE_LISTS)
def test_gpus_that_are_too_old_or_unknown_are_a_reason(tree: Tree, given: str) -> None:
    succeeded(tree.build_cuda(TORCH_CUDA_ARCH_LIST=given))
    assert re.match(UNREADABLE_LISTS[given], tree.reason("cuda") or "")


@pytest.mark.full
def test_an_nvcc_that_fails_leaves_the_other_library_alone(tree: Tree) -> None:
    (tree.folder / CUDA_LIBRARY).write_text("of an earlier build")
    cuda = {"FASTGPT_CUDA": "auto", "CUDA_HOME": str(tree.toolkit)}
    assert "out of luck" in succeeded(tree.build(NVCC_FAILS="probe.o", **cuda))
    assert tree.reason("cpu") is None
    assert tree.reason("cuda") == "compiling csrc/cuda failed when fastgpt was installed (pip install -v shows how)"

    (tree.folder / CUDA_LIBRARY).write_text("of an earlier build")
    succeeded(tree.build_cuda(NVCC_FAILS="-v "))
    told = f"nvcc ({tree.nvcc}) failed on an empty program when fastgpt was installed (nvcc fatal: out of luck)"
    assert tree.reason("cuda") == told

    os.utime(tree.folder / "csrc/cpu/layer_norm.cpp")
    succeeded(tree.build(FAILS="csrc/cpu/layer_norm.cpp", **cuda))
    assert "compiling csrc failed" in (tree.reason("cpu") or "")
    assert tree.reason("cuda") is None


def test_a_choice_of_1_fails_without_nvcc(tree: Tree) -> None:
    done = tree.build_cuda(FASTGPT_CUDA="1", CUDA_HOME="/no/such/toolkit")
    assert done.returncode != 0
    reason = "there was no nvcc when fastgpt was installed (CUDA_HOME is /no/such/toolkit)"
    assert done.stderr == f"FASTGPT_CUDA=1, but {reason}\n"
    done = tree.build_cuda(FASTGPT_CUDA="1", NVCC_FAILS="probe.o")
    assert done.returncode != 0
    assert re.search(r"^FASTGPT_CUDA=1, but compiling csrc/cuda failed.*\n\Z", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


@pytest.mark.full
def test_nvcc_is_found_where_cuda_home_says_then_on_the_path(tree: Tree) -> None:
    """Also where /usr/local/cuda has one, which is hidden here."""
    tree.modules.joinpath("sitecustomize.py").write_text(
        "import shutil\n"
        "which = shutil.which\n"
        "def hide(name, *args, path=None, **more):\n"
        "    return which(name, *args, path=path and path.replace('/usr/local/cuda/bin', '/no/such'), **more)\n"
        "shutil.which = hide\n"
    )
    folders = [folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder, "nvcc").exists()]
    without, with_nvcc = (os.pathsep.join(paths) for paths in (folders, [str(tree.nvcc.parent), *folders]))
    other = tree.folder.parent / "other"
    shutil.copytree(tree.toolkit, other)

    succeeded(tree.build_cuda(CUDA_HOME="", PATH=without))
    assert "there was no nvcc when fastgpt was installed (neither on PATH" in (tree.reason("cuda") or "")
    for settings in (
        {"CUDA_HOME": "", "PATH": with_nvcc},
        {"CUDA_HOME": "", "CUDA_PATH": str(tree.toolkit), "PATH": without},
        {"CUDA_HOME": str(tree.toolkit), "CUDA_PATH": str(other), "PATH": str(other / "bin") + os.pathsep + without},
    ):
        succeeded(tree.build_cuda(**settings))
        assert tree.reason("cuda") is None
        assert str(tree.nvcc) in (tree.folder / next(tree.folder.glob("build/temp*/cuda/build.ninja"))).read_text()


# Says what ninja was asked for, and does it.
NINJA = r"""#!/bin/sh
echo "ninja $*" >> "$LOG"
exec "$NINJA" "$@"
"""


def test_max_jobs_limits_nvcc(tree: Tree) -> None:
    tree.modules.joinpath("sitecustomize.py").write_text(
        f"import sysconfig\npath = sysconfig.get_path\n"
        f"sysconfig.get_path = lambda name, *a: {str(tree.nvcc.parent)!r} if name == 'scripts' else path(name, *a)\n"
    )
    ninja = tree.nvcc.parent / "ninja"
    ninja.write_text(NINJA)
    ninja.chmod(0o755)
    real = shutil.which("ninja", path=str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    if real is None:
        import ninja as package

        real = str(Path(package.BIN_DIR, "ninja"))
    succeeded(tree.build_cuda(MAX_JOBS="3", NINJA=real))
    assert any(re.match(r"ninja .* -j 3$", line) for line in tree.log.read_text().splitlines())


# ----------------------------------------------------------------------------------------------------------------------
# The wheel
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of this checkout, by this machine's compiler. What `make test` compiled is taken as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "build", "--build-lib", folder / "lib", "egg_info", "--egg-base", folder]
    command += ["bdist_wheel", "--bdist-dir", folder / "bdist", "--dist-dir", folder]
    succeeded(run(*command, cwd=ROOT, environment={"FASTGPT_CPP": "1"}))
    return next(folder.glob("*.whl"))


USE = """
import sys
import torch
from fastgpt import extension, ops
assert extension.__file__.startswith(sys.prefix), extension.__file__
assert (extension.source_folder() / "cuda" / "prims.cuh").is_relative_to(sys.prefix)
assert (extension.source_folder() / "cuda" / "prims.cuh").exists()
x, weight = torch.randn(7, 65, requires_grad=True), torch.randn(65, requires_grad=True)
y = ops.layer_norm(x, weight, backend="cpp")
expected = torch.nn.functional.layer_norm(x, (65,), weight)
torch.testing.assert_close(y, expected)
dy = torch.randn(7, 65)
torch.testing.assert_close(torch.autograd.grad(y, [x, weight], dy), torch.autograd.grad(expected, [x, weight], dy))
print(extension.isa())
"""


@needs_compiler
@pytest.mark.full
def test_the_wheel_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    assert re.fullmatch(r"fastgpt-[\d.]+-cp310-abi3-linux_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < 3_000_000
    bin_folder = environment_with(wheel, tmp_path / "environment", *packages_here())
    isa = succeeded(run(bin_folder / "python", "-I", "-c", USE, cwd=tmp_path)).strip()
    settings = {"COLUMNS": "1000", "FASTGPT_BACKEND": "cpp"}
    said = succeeded(run(bin_folder / "fastgpt", "explain", cwd=tmp_path, environment=settings))
    assert f"{isa} kernels" in said


@pytest.mark.full
@needs_compiler
def test_the_wheel_works_beside_another_torch(wheel: Path, tmp_path: Path) -> None:
    other = os.environ.get("FASTGPT_OTHER_TORCH")
    if other is None:
        pytest.skip("FASTGPT_OTHER_TORCH names no folder of packages with another torch")
    bin_folder = environment_with(wheel, tmp_path / "environment", other, *packages_here())
    version = succeeded(run(bin_folder / "python", "-I", "-c", "import torch; print(torch.__version__)", cwd=tmp_path))
    assert version.strip() != torch.__version__
    succeeded(run(bin_folder / "python", "-I", "-c", USE, cwd=tmp_path))
    every_case = ("-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "-p", "no:cacheprovider", "-k", "cpp")
    succeeded(run(bin_folder / "python", "-I", *every_case, ROOT / "tests", cwd=tmp_path))


# ----------------------------------------------------------------------------------------------------------------------
# The sources
# ----------------------------------------------------------------------------------------------------------------------


def test_kernels_include_nothing_that_the_linker_could_share() -> None:
    allowed = {"<cstddef>", "<cstdint>"}
    for path in [*KERNELS, *ROOT.glob("csrc/cpu/*.h")]:
        more = {"<emmintrin.h>", "<immintrin.h>"} if path.name == "vec.h" else set()
        system = {name for name in re.findall(r"#\s*include\s+(\S+)", path.read_text()) if name[0] == "<"}
        assert system <= allowed | more, f"{path.name} includes {system}"


@pytest.mark.full
@needs_compiler
def test_every_symbol_of_a_kernel_belongs_to_its_instruction_set(wheel: Path) -> None:
    """A function that two copies shared would run, in either, the instructions of one."""
    seen = set()
    for path in KERNELS:
        for object_file in ROOT.glob(f"build/temp.*/*/csrc/cpu/{path.stem}.o"):
            isa = object_file.parts[-4]
            listed = succeeded(run("nm", "--defined-only", "--extern-only", "--demangle", object_file, cwd=ROOT))
            for line in listed.splitlines():
                if "personality" in line:  # a pointer, for the unwinder
                    continue
                assert f"fastgpt::{isa}::" in line, f"{path.name} for {isa} defines {line}"
                assert line.split()[1] not in "WVu", f"{path.name} for {isa} shares {line}"
            seen.add((path.stem, isa))
    assert {name for name, isa in seen if isa == "baseline"} == {path.stem for path in KERNELS}


@pytest.mark.full
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_compiles_without_warnings(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler} here")
    headers = Path(torch.__file__).parent / "include"
    settings = {"CXX": compiler, "CFLAGS": f"-Wall -Wextra -Werror -isystem {headers}", "FASTGPT_CPP": "1"}
    command = ("setup.py", "build_ext", "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    succeeded(run(sys.executable, *command, cwd=ROOT, environment=settings))


@pytest.mark.full
def test_compiles_for_arm(tmp_path: Path) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("there is no aarch64-linux-gnu-g++ here")
    flags = ("-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-DFASTGPT_ISA=baseline", "-c")
    for path in ROOT.glob("csrc/cpu/*.cpp"):
        succeeded(run(compiler, *flags, path, "-o", tmp_path / "object", cwd=ROOT))
