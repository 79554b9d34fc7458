"""A step of generation with a cache as one call: a whole GPT on one token, by the kernels of the cpp backend.

Such a step reads every weight once, for a single row. On a CPU, BLAS does that on one thread, and Python takes as long
again around some forty ops; one call of the C++ library reads on all threads and comes back with the logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from fastgpt import dispatch, extension
from fastgpt.ops.backward import only_result_wanted

if TYPE_CHECKING:  # which needs this file
    from fastgpt.model import GPT, KVCache

# The cpp backend's alone, and so not among those that kernel_ops defines for every kernel backend. `weights` are all of
# a model, in the order of its layers; `caches` are each layer's keys and values, (1, capacity, 2, H, D), of which those
# at `position` are written.
_library = torch.library.Library("fastgpt_cpp", "FRAGMENT")
_library.define(
    "decode_step(Tensor idx, Tensor[] weights, Tensor(a!)[] caches, int position, bool with_biases, str approximate,"
    " float eps) -> Tensor"
)
_library.impl("decode_step", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("fastgpt_cpp::decode_step", lib=_library)
def _(
    idx: Tensor,
    weights: list[Tensor],
    caches: list[Tensor],
    position: int,
    with_biases: bool,
    approximate: str,
    eps: float,
) -> Tensor:
    return weights[0].new_empty(1, 1, weights[0].shape[0])


_decode_step = extension.cpu.op_in_place("decode_step", changed=(2,))


def decode_step(model: GPT, idx: Tensor, cache: KVCache) -> Tensor | None:
    """The logits that follow on one token, (1, 1, V), V the padded vocabulary; None where that is for the ops to do.

    One call makes them where there is one sequence and nothing but the result is wanted (no gradient, no compiler, no
    autocast), all ops are left to the cpp backend (``dispatch.is_left_to``), and the model is what its config makes, in
    fp32 on a CPU (as found at the first step).

    Args:
        model: in evaluation mode.
        idx: (B, T), int64, tokens of the vocabulary.
        cache: ready for these tokens (``KVCache.begin``); takes up their keys and values.
    """
    if (
        idx.numel() != 1
        or cache.lengths is not None
        or model.training
        or not only_result_wanted()
        or torch.is_autocast_enabled("cpu")
        or not dispatch.is_left_to("cpp", "cpu")
    ):
        return None
    if cache.weights is None:
        cache.weights = _weights_of(model)
    if not cache.weights:
        return None
    c, weights = model.config, cache.weights
    blocks: Any = model.transformer.h
    caches = [cache.memory_of(block.attn, weights[0], 1, c.n_head, c.n_embd // c.n_head) for block in blocks]
    return _decode_step(idx, weights, caches, cache.start, c.bias, c.gelu, 1e-5)


def _weights_of(model: GPT) -> list[Tensor]:
    """All weights in the order of the layers; none where modules have to be called.

    That is where one was replaced (LoRA, quantisation, sharding) or has a hook, or weights are elsewhere or in another
    dtype.
    """
    from fastgpt.model import GPT  # which needs this file

    with torch.device("meta"):
        twin = GPT(model.config, drawn=False)
    weights = dict(model.named_parameters(remove_duplicate=False))
    inner = [module for module in model.modules() if module is not model]
    as_made = (
        _types(model) == _types(twin)
        and _shapes(model) == _shapes(twin)
        and not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) or m.training for m in inner)
        and not (every_module._global_forward_hooks or every_module._global_forward_pre_hooks)
    )
    in_reach = all(
        type(w) is nn.Parameter and w.device.type == "cpu" and w.dtype == torch.float32 and w.is_contiguous()
        for w in weights.values()
    )
    return list(weights.values()) if as_made and in_reach else []


def _types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in model.named_parameters(remove_duplicate=False)}
