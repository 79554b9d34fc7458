"""The file of a benchmark run: what it says about the machine, how it is written, resumed, read and held to its schema.

`result.schema.json` beside this file is the format (JSON Schema, draft 2020-12), `docs/benchmarks.md` explains it. A
file is replaced with each row, so that a run that is cut short leaves what it had found, and can be resumed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastgpt
from fastgpt.config import UserError
from fastgpt.files import write_atomically

SCHEMA_VERSION = 2
KINDS = ("kernels", "scaling", "generate", "test", "sanitize")
REPOSITORY = Path(__file__).resolve().parents[1]
SCHEMA = Path(__file__).with_name("result.schema.json")

# Of the environment what has other kernels run; a file's settings have what is set of it.
_ENVIRONMENT = ("FASTGPT_CPU_ISA", "FASTGPT_HOPPER_ATTENTION")

# What a run that is resumed must have in common with its beginning, and how a refusal names it.
_SAME = {
    "kind": "kind of run",
    "machine": "machine",
    "versions": "version of a package",
    "commit": "commit",
    "settings": "choice of settings",
}


class Result:
    """A run's file; ``data`` is what it holds.

    Args:
        path: of the file; its folder is made where there is none.
        about: what ``describe`` gives.
        resume: go on with the file that is there: its rows, its date and its first ceilings are kept. Its problems are
            not: who resumes says which of them its rows still have.
    Raises:
        UserError: with ``resume``, ``path`` is no result file, or one of another machine, commit or settings.
    """

    def __init__(self, path: Path, about: dict[str, Any], *, resume: bool = False) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            **about,
            "ceilings": {"before": None, "after": None},
            "absent": {},
            "results": [],
            "problems": [],
            "complete": False,
            "valid": False,
        }
        if resume:
            before = load(path)
            for field, name in _SAME.items():
                if before[field] != about[field]:
                    raise UserError(f"{path} cannot be resumed: {_difference(name, before[field], about[field])}")
            self.data |= {"date": before["date"], "results": before["results"]}
            self.data["ceilings"]["before"] = before["ceilings"]["before"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.data["results"]

    def has(self, **key: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def update(self, *, rows: Iterable[dict[str, Any]] = (), problems: Iterable[str] = (), **fields: Any) -> None:
        """Add rows and problems, set other fields of the file ("ceilings", "complete", ...), and write it."""
        unknown = fields.keys() - self.data.keys() - {"summary", "others_cores"}
        if unknown:
            raise ValueError(f"Result.update: a file has no {', '.join(sorted(unknown))}")
        self.data["results"] += rows
        self.data["problems"] += problems
        self.data |= fields
        write_atomically(self.path, (json.dumps(self.data, indent=1, allow_nan=False) + "\n").encode())


def _difference(name: str, before: Any, now: Any) -> str:
    if not isinstance(before, dict):
        return f"its {name} was {before}, and this one is {now}"
    field = next(field for field in {**before, **now} if before.get(field) != now.get(field))
    return f"it is of another {name} ({field} was {before.get(field)}, and is {now.get(field)})"


def load(path: Path) -> dict[str, Any]:
    """The content of a result file, whose fields and whose rows' are all there; ``violations`` looks deeper.

    Raises:
        UserError: the file cannot be read, or is not such a file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(data, dict) or "schema" not in data:
        raise UserError(f"{path}: not a result of fastgpt's benchmarks")
    if data["schema"] != SCHEMA_VERSION:
        raise UserError(f"{path}: its schema is {data['schema']}, and this fastgpt reads {SCHEMA_VERSION}")
    schema = json.loads(SCHEMA.read_text())
    missing = [field for field in schema["required"] if field not in data]
    if missing:
        raise UserError(f"{path}: not a whole result: it lacks {', '.join(missing)}")
    if data["kind"] not in KINDS:
        raise UserError(f"{path}: there is no kind of result {data['kind']!r}; there are {', '.join(KINDS)}")
    for number, row in enumerate(data["results"], 1):
        missing = [field for field in schema["$defs"][data["kind"]]["required"] if field not in row]
        if missing:
            raise UserError(f"{path}: not a whole result: row {number} lacks {', '.join(missing)}")
    return data


def violations(data: Any) -> list[str]:
    """Where ``data`` departs from the schema, a sentence each; takes the jsonschema package."""
    import jsonschema  # only who checks files needs it

    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(data)]


def result_path(about: dict[str, Any], folder: Path | None = None) -> Path:
    """KIND_DEVICE_DATE.json in ``folder``: by itself benchmarks/results of the checkout, where there is none, here."""
    device = about["machine"]["gpu"] or about["machine"]["cpu"]
    name = "_".join((about["kind"], _slug(device), _slug(about["date"].partition("+")[0])))
    in_checkout = (REPOSITORY / "pyproject.toml").is_file()
    return (folder or (REPOSITORY / "benchmarks" / "results" if in_checkout else Path())) / f"{name}.json"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def spread(values: Iterable[float]) -> dict[str, float]:
    """{"median", "min", "max"}, as files have them."""
    ordered = sorted(values)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return {"median": middle, "min": ordered[0], "max": ordered[-1]}


# ---------------------------------------------------------------------------------------------------------------------
# What the figures depend on
# ---------------------------------------------------------------------------------------------------------------------


def describe(
    kind: str,
    device: torch.device,
    settings: dict[str, Any],
    *,
    commit: str | None = None,
    nanogpt: Path | None = None,
) -> dict[str, Any]:
    """The beginning of a file: kind, machine, versions, commit, date and settings.

    Args:
        kind: one of ``KINDS``.
        device: that is measured; the GPU is named only where it is one.
        settings: the command line's, of JSON's types.
        commit: where git cannot tell.
        nanogpt: a checkout of nanoGPT, where one takes part.
    """
    return {
        "kind": kind,
        "machine": describe_machine(device),
        "versions": describe_versions(nanogpt),
        "commit": commit or commit_of(REPOSITORY),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {**settings, **{name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}},
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The machine that ``device`` is a part of."""
    on_gpu = device.type == "cuda"
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "os": _os_name(),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _driver() -> str | None:
    """The version of NVIDIA's driver; None where there is no nvidia-smi to tell."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):  # not a Linux that says
        return platform.system()


def describe_versions(nanogpt: Path | None = None) -> dict[str, str | None]:
    """Of what runs, and of the peers; None where one is not installed."""
    return {
        "fastgpt": fastgpt.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda,
        "flash_attn": version_of("flash-attn"),
        "liger_kernel": version_of("liger-kernel"),
        "nanogpt": None if nanogpt is None else commit_of(nanogpt) or "unknown",
    }


def version_of(package: str) -> str | None:
    """The version that is installed of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit_of(checkout: Path) -> str | None:
    """The commit's hash, with "-dirty" where tracked files differ from it; None where git cannot tell."""
    if not (checkout / ".git").exists():  # git would go on looking, and find the repository of someone else
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
