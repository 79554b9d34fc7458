"""Result files as the benchmarks write them, with times that are made up: what reads such files is tested on them."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

from fastgpt.benchmarks.result import spread

ROUNDS = 9
CEILINGS = {"copy_bytes_per_s": 3.2e10, "matmul_flops_per_s": {"fp32": 1.8e11, "bf16": 4.1e11}}
# Of the ceiling, by competitor: ours, then peers.
REACHED = {"cpp": 0.8, "torch": 0.42, "reference": 0.11}
PEERS = {"torch eager": 0.4, "torch.compile": 0.55}
SDPA = {"SDPA math": 0.12, "SDPA flash": 0.5}
ABSENT = {"cuda": "there is no GPU here", "triton": "there is no GPU here", "flash-attn": "it is not installed"}

Slowed = dict[tuple[str, str], float]


def machine(cpu: str = "Some CPU 7000", gpu: str | None = None) -> dict[str, Any]:
    return {
        "cpu": cpu,
        "cores": 2,
        "threads": 2,
        "memory_bytes": 24 << 30,
        "gpu": gpu,
        "driver": "580.1" if gpu else None,
        "gpu_memory_bytes": 80 << 30 if gpu else None,
        "os": "Some Linux 12",
    }


def about(kind: str, **fields: Any) -> dict[str, Any]:
    """A file without rows."""
    return {
        "schema": 2,
        "kind": kind,
        "machine": machine(),
        "versions": {
            "fastgpt": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0",
            "triton": "3.6.0",
            "cuda": None,
            "flash_attn": None,
            "liger_kernel": None,
            "nanogpt": None,
        },
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "date": "2026-01-02T03:04:05+00:00",
        "settings": {"size": "full", "rounds": ROUNDS},
        "ceilings": {"before": CEILINGS, "after": CEILINGS},
        "absent": dict(ABSENT),
        "results": [],
        "problems": [],
        "complete": True,
        "valid": True,
        **fields,
    }


def kernels(
    seed: int = 0, *, noise: float = 0.03, slowed: Slowed | None = None, drift: float = 1.0, **fields: Any
) -> dict[str, Any]:
    """A file of kind "kernels".

    Args:
        noise: standard deviation of a sample's logarithm.
        slowed: factors on the times of (op, competitor).
        drift: factor on all times, as of a machine whose clock has changed.
    """
    rng = random.Random(seed)
    rows = []
    for op, sizes, products in (
        ("attention", ({"B": 12, "H": 6, "T": 256, "D": 64}, {"B": 4, "H": 12, "T": 1024, "D": 64}), True),
        ("layer_norm", ({"M": 3072, "N": 384}, {"M": 4096, "N": 768}), False),
        ("softmax", ({"M": 18432, "N": 256},), False),
        ("gelu", ({"M": 4096, "N": 3072},), False),
        ("cross_entropy", ({"M": 1024, "V": 50304},), False),
        ("linear_cross_entropy", ({"M": 1024, "C": 768, "V": 50304},), True),
    ):
        for shape in sizes:
            for dtype in ("fp32", "bf16"):
                for part in ("forward", "backward"):
                    rows.append(_kernels_row(rng, op, shape, products, dtype, part, noise, slowed or {}, drift))
    return about("kernels", results=rows, **fields)


def _kernels_row(
    rng: random.Random,
    op: str,
    shape: dict[str, int],
    products: bool,
    dtype: str,
    part: str,
    noise: float,
    slowed: Slowed,
    drift: float,
) -> dict[str, Any]:
    size = math.prod(shape.values()) * (4 if dtype == "fp32" else 2)
    moved, flops = (2 if part == "forward" else 3) * size, 500 * size if products else 0
    floor = 1e3 * max(moved / CEILINGS["copy_bytes_per_s"], flops / CEILINGS["matmul_flops_per_s"][dtype])
    competitors = {}
    for name, reached in {**REACHED, **PEERS, **(SDPA if op == "attention" else {})}.items():
        # How much a competitor reaches differs from op to op, and not from run to run.
        own = math.exp(random.Random(f"{name} {op} {shape} {part}").gauss(0, 0.25))
        middle = drift * slowed.get((op, name), 1.0) * floor / (own * reached)
        samples = [middle * math.exp(rng.gauss(0, noise)) for _ in range(ROUNDS)]
        median = statistics.median(samples)
        competitors[name] = {
            "ours": name in REACHED,
            "relative_error": 2e-3 if dtype == "bf16" else 3e-7,
            "median_ms": median,
            "min_ms": min(samples),
            "max_ms": max(samples),
            "host_ms": None,
            "samples_ms": samples,
            "of_ceiling": floor / median,
            "bytes_per_s": 1e3 * moved / median,
            "flops_per_s": 1e3 * flops / median,
        }
    ratios = {
        ours: {
            peer: spread(
                theirs / mine
                for mine, theirs in zip(competitors[ours]["samples_ms"], competitors[peer]["samples_ms"], strict=True)
            )
            for peer in competitors
            if peer not in REACHED
        }
        for ours in REACHED
    }
    sizes = " ".join(f"{name}={value}" for name, value in shape.items())
    return {
        "op": op,
        "case": f"{op}, {sizes}, {dtype}",
        "part": part,
        "dtype": dtype,
        "shape": shape,
        "bytes": moved,
        "flops": flops,
        "floor_ms": floor,
        "competitors": competitors,
        "ratios": ratios,
        "left_out": {},
    }


MODELS = (("tiny", 800_000, 4, 128, 4), ("small", 10_650_000, 6, 384, 6), ("gpt2", 124_000_000, 12, 768, 12))


def _model(name: str, parameters: int, n_layer: int, n_embd: int, n_head: int) -> dict[str, Any]:
    return {
        "name": name,
        "parameters": parameters,
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_head": n_head,
        "vocab_size": 50304,
    }


def scaling(seed: int = 0, *, slowed: float = 1.0, **fields: Any) -> dict[str, Any]:
    """A file of kind "scaling"; ``slowed`` is a factor on the times of cpp."""
    rng = random.Random(seed)
    rows = []
    settings = [(model, 256, 8) for model in MODELS] + [(MODELS[1], block, 8) for block in (64, 128, 512)]
    settings += [(MODELS[1], 256, batch) for batch in (1, 2, 4)]
    for model, block, batch in settings:
        for competitor, speed in (("cpp", 0.5), ("torch", 0.4), ("nanogpt", 0.38)):
            for mode in ("eager", "compile"):
                speed *= 1.1 if mode == "compile" else 1.0
                middle = 1e3 * 6 * model[1] * block * batch / (speed * 4.1e11)
                middle *= slowed if competitor == "cpp" else 1.0
                samples = [middle * math.exp(rng.gauss(0, 0.02)) for _ in range(ROUNDS)]
                median = statistics.median(samples)
                rows.append(
                    {
                        "model": _model(*model),
                        "block_size": block,
                        "batch_size": batch,
                        "dtype": "bf16",
                        "competitor": competitor,
                        "mode": mode,
                        "step_ms": spread(samples),
                        "split_ms": {
                            part: share * median
                            for part, share in zip(
                                ("forward", "backward", "optimizer", "data"), (0.3, 0.6, 0.09, 0.01), strict=True
                            )
                        },
                        "tokens_per_s": spread(1e3 * block * batch / sample for sample in samples),
                        "peak_memory_bytes": 16 * model[1] + 2000 * block * batch,
                        "flops_per_token": 6 * model[1],
                        "mfu": {"of_peak": None, "of_measured": speed},
                        "samples_ms": samples,
                        "ratios": {"nanogpt, eager": spread([1.2, 1.3, 1.4])} if competitor != "nanogpt" else {},
                    }
                )
    return about("scaling", results=rows, **fields)


def generate(seed: int = 0, **fields: Any) -> dict[str, Any]:
    """A file of kind "generate"."""
    rng = random.Random(seed)
    rows = []
    for batch in (1, 4, 16):
        for context in (64, 192):
            for competitor, speed in (("cpp", 900.0), ("torch", 700.0)):
                samples = [1e3 * 64 / speed * math.exp(rng.gauss(0, 0.02)) for _ in range(ROUNDS)]
                rows.append(
                    {
                        "model": _model(*MODELS[1]),
                        "batch_size": batch,
                        "context": context,
                        "new_tokens": 64,
                        "dtype": "fp32",
                        "competitor": competitor,
                        "tokens_per_s": spread(1e3 * 64 * batch**0.8 / sample for sample in samples),
                        "first_token_ms": 0.02 * context,
                        "samples_ms": samples,
                    }
                )
    return about("generate", results=rows, **fields)


def leave_out(data: dict[str, Any], op: str, competitor: str, reason: str) -> dict[str, Any]:
    """Have a competitor of an op's rows not timed, for ``reason``."""
    for row in data["results"]:
        if row["op"] == op:
            row["competitors"].pop(competitor, None)
            row["ratios"].pop(competitor, None)
            row["left_out"][competitor] = reason
    return data


def save(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(json.dumps(data))
    return path
