"""Imports run one way, and importing fastgpt loads nothing heavy beyond torch."""

import ast
import subprocess
import sys
from pathlib import Path

import fastgpt
import fastgpt.benchmarks
import fastgpt.triton_kernels

PACKAGE = Path(fastgpt.__file__).parent

# A module may import those of its own layer and of the layers to its right.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("train", "generate", "attention_maps", "perplexity", "integrations", "benchmarks"),
    (
        "model",
        "decode",
        "data",
        "optim",
        "checkpoint",
        "joint_checkpoint",
        "pretrained",
        "metrics",
        "placement",
        "distributed",
    ),
    ("ops",),
    ("dispatch",),
    ("reference", "torch_native"),
    ("emulator",),
    ("triton_kernels", "extension"),
    # Below everything: they know nothing of models or ops.
    (
        "config",
        "extras",
        "tokenizer",
        "files",
        "shards",
        "tensor_files",
        "kernel_ops",
        "devices",
        "cuda_graph",
        "profiling",
    ),
)
FACADE = "fastgpt"  # fastgpt/__init__.py: the public names


def layer_of(module: str) -> int:
    first = module.split(".")[1]
    return next(i for i, names in enumerate(LAYERS) if first in names)


def imported_modules(path: Path) -> set[str]:
    found = set()
    tree = ast.parse(path.read_text())
    # What a file does when it is run by itself is nobody's import.
    tree.body = [node for node in tree.body if not isinstance(node, ast.If) or "__main__" not in ast.unparse(node.test)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from fastgpt import ops` names a module, `from fastgpt.ops import softmax` a thing in one
            names = {alias.name for alias in node.names}
            modules = {f"fastgpt.{n}" for n in names if is_module(n)} if node.module == "fastgpt" else {node.module}
            found |= modules or {node.module}
    return {name for name in found if name and name.split(".")[0] == "fastgpt"}


def is_module(name: str) -> bool:
    return (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()


def violations(files: dict[str, Path]) -> list[str]:
    wrong = []
    for module, path in files.items():
        for other in imported_modules(path):
            if other == FACADE:
                if layer_of(module) > layer_of("fastgpt.train"):
                    wrong.append(f"{module} imports the facade {other}")
            elif layer_of(other) < layer_of(module):
                wrong.append(f"{module} imports {other}")
    return wrong


def modules() -> dict[str, Path]:
    files = {}
    for root, package in (
        (PACKAGE, FACADE),
        (Path(fastgpt.benchmarks.__file__).parent, "fastgpt.benchmarks"),
        (Path(fastgpt.triton_kernels.__file__).parent, "fastgpt.triton_kernels"),
    ):
        for path in root.rglob("*.py"):
            name = ".".join((package, *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")
            if name != FACADE:
                files[name] = path
    return files


def test_imports_run_one_way():
    assert {"fastgpt.ops.attention", "fastgpt.cli", "fastgpt.benchmarks.plain"} <= set(modules())
    assert violations(modules()) == []


def test_the_rule_sees_a_violation(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from fastgpt import train\nfrom fastgpt.ops.softmax import softmax\nimport fastgpt\n")
    assert violations({"fastgpt.dispatch": wrong}) != []
    found = violations({"fastgpt.dispatch": wrong})
    assert sorted(found) == [
        "fastgpt.dispatch imports fastgpt.ops.softmax",
        "fastgpt.dispatch imports fastgpt.train",
        "fastgpt.dispatch imports the facade fastgpt",
    ]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_public_names_import_without_the_heavy_ones():
    loaded = run_python(
        "import torch, sys; before = set(sys.modules)\n"
        "from fastgpt import GPT, GPTConfig, ops, use_backend\n"
        "print(*(name for name in set(sys.modules) - before))"
    ).split()
    assert "fastgpt.ops.attention" in loaded
    heavy = ("triton", "rich", "typer", "matplotlib", "safetensors", "torch._dynamo", "torch._inductor")
    assert [name for name in loaded if name.startswith(heavy)] == []


def test_import_takes_at_most_300_ms_beyond_torch():
    # Of the processor's time, which other work on the machine does not lengthen.
    code = "import time, torch; start = time.process_time(); import fastgpt; print(time.process_time() - start)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.3
