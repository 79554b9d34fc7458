from __future__ import annotations

import torch
from torch import Tensor


def as_autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast gives a matrix product's operands on its device, if autocast is on."""
    device_type = x.device.type
    # torch.amp.is_autocast_available would know, but torch 2.10 cannot trace it.
    if x.dtype == torch.float64 or device_type not in ("cpu", "cuda"):
        return x
    return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x
