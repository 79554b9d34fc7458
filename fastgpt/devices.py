"""What GPUs can do at most, by the names that they give themselves: the peak that a model's FLOPs are held to."""

from __future__ import annotations

import torch

TERA = 10**12

# Dense products with fp32 sums at the boost clock, in TFLOP/s, from NVIDIA's data sheets and architecture whitepapers:
# plain fp32, TF32, and 16 bits (fp16 alone on what is older than Ampere). Where a sheet states rates "with sparsity",
# half of that. GPUs of one chip differ by their form (SXM, PCIe, NVL), so a name counts only whole.
_AMPERE_DATA_CENTER = {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0}
_HOPPER_SXM = {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4, "fp16": 989.4}
_HOPPER_NVL = {"fp32": 60.0, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5}
_VOLTA_SXM = {"fp32": 15.7, "fp16": 125.0}
PEAK_TFLOPS = {
    "Tesla V100-SXM2-16GB": _VOLTA_SXM,
    "Tesla V100-SXM2-32GB": _VOLTA_SXM,
    "Tesla T4": {"fp32": 8.1, "fp16": 65.0},
    "NVIDIA A100-SXM4-40GB": _AMPERE_DATA_CENTER,
    "NVIDIA A100-SXM4-80GB": _AMPERE_DATA_CENTER,
    "NVIDIA A100-PCIE-40GB": _AMPERE_DATA_CENTER,
    "NVIDIA A100 80GB PCIe": _AMPERE_DATA_CENTER,
    "NVIDIA A40": {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7, "fp16": 149.7},
    "NVIDIA A10": {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0, "fp16": 125.0},
    "NVIDIA GeForce RTX 3090": {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0, "fp16": 71.0},
    "NVIDIA L4": {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0, "fp16": 121.0},
    "NVIDIA L40S": {"fp32": 91.6, "tf32": 183.0, "bf16": 362.0, "fp16": 362.0},
    "NVIDIA GeForce RTX 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2},
    "NVIDIA H100 80GB HBM3": _HOPPER_SXM,
    "NVIDIA H100 PCIe": {"fp32": 51.2, "tf32": 378.0, "bf16": 756.0, "fp16": 756.0},
    "NVIDIA H100 NVL": _HOPPER_NVL,
    "NVIDIA H200": _HOPPER_SXM,
    "NVIDIA H200 NVL": _HOPPER_NVL,
    "NVIDIA GH200 480GB": _HOPPER_SXM,
    "NVIDIA B200": {"tf32": 1125.0, "bf16": 2250.0, "fp16": 2250.0},
}


def peak_flops(gpu: str | None, dtype: str) -> float | None:
    """FLOPs per second of matrix products at best.

    Args:
        gpu: as ``torch.cuda.get_device_name`` has it; None for a CPU, whose peak goes by a clock that nobody states.
        dtype: "fp32" (TF32 where PyTorch is set to compute so), "bf16" or "fp16".
    Returns:
        None where the table has no such GPU, or none for that dtype: never another GPU's.
    """
    if dtype == "fp32" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        dtype = "tf32"
    tflops = PEAK_TFLOPS.get(gpu or "", {}).get(dtype)
    return None if tflops is None else tflops * TERA


def model_flops_utilization(
    flops_per_s: float, gpu: str | None, dtype: str, matmul_flops_per_s: float
) -> dict[str, float | None]:
    """A row's "mfu": model FLOPs per second over the stated peak of ``gpu``, and over the matrix product's measured."""
    peak = peak_flops(gpu, dtype)
    return {
        "of_peak": None if peak is None else flops_per_s / peak,
        "of_measured": flops_per_s / matmul_flops_per_s,
    }
