"""A step of generation with a cache as one call: a whole GPT on one token, by the kernels of the cpp backend.

Such a step reads every weight once, for a single row. On a CPU, BLAS does that on one thread, and Python takes as long
again around some forty ops; one call of the C++ library reads on all threads and comes back with the logits.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fastgpt import dispatch, extension
from fastgpt.ops.backward import only_result_wanted

if TYPE_CHECKING:  # which needs this file
    from fastgpt.config import GPTConfig
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
    autocast), all ops are left to the cpp backend (``dispatch.is_left_to``), and the model is what its config makes (as
    found at the cache's first step), in fp32 on a CPU and without hooks.

    Args:
        idx: (B, T), int64, tokens of the vocabulary.
        cache: ready for these tokens (``KVCache.begin``); takes up their keys and values.
    """
    if (
        idx.numel() != 1
        or idx.device.type != "cpu"
        or cache.lengths is not None
        or model.training
        or not only_result_wanted()
        or torch.is_autocast_enabled("cpu")
        or not dispatch.is_left_to("cpp", "cpu")
    ):
        return None
    if cache.layout is None:
        cache.layout = Layout(model)
    weights = cache.layout.weights()
    if weights is None:
        return None
    c = model.config
    caches = [cache.memory_of(a, weights[0], 1, c.n_head, c.n_embd // c.n_head) for a in cache.layout.attention]
    if any(memory.dtype != torch.float32 or memory.shape[0] != 1 for memory in caches):
        return None  # what was read before were other sequences, or in another dtype
    eps = 1e-5  # the default of the ops, which the modules leave it to
    return _decode_step(idx, weights, caches, cache.start, c.bias, c.gelu, eps)


class Layout:
    """The modules of a model, and the places of its weights in the order of the layers.

    There are no places where the model is not just what its config makes: where it has another module (LoRA,
    quantisation, sharding), other sizes, or a method that is not this package's, its modules have to be called.
    """

    def __init__(self, model: GPT) -> None:
        c, transformer = model.config, cast(Any, model.transformer)
        types, shapes = _made_by(c)
        self.modules = [module for module in model.modules() if module is not model]
        self.attention: list[nn.Module] = []
        self.places: list[tuple[dict[str, nn.Parameter | None], str]] = []
        if (
            _types(model) == types
            and _shapes(model) == shapes
            and all(map(_is_as_written, set(types.values())))
            and all((block.attn.n_head, block.mlp.approximate) == (c.n_head, c.gelu) for block in transformer.h)
        ):
            self.attention = [block.attn for block in transformer.h]
            parts = [path.rpartition(".") for path in shapes]
            self.places = [(model.get_submodule(module)._parameters, name) for module, _, name in parts]

    def weights(self) -> list[Tensor] | None:
        """The weights as they are now; None where modules have to be called, or one is not in fp32 on a CPU."""
        weights = [parameters[name] for parameters, name in self.places]
        plain = all(
            type(w) is nn.Parameter and w.dtype == torch.float32 and w.device.type == "cpu" and w.is_contiguous()
            for w in weights
        )
        of_all = nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks
        called = of_all or any(
            m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) or m.training for m in self.modules
        )
        return cast(list[Tensor], weights) if weights and plain and not called else None


@functools.lru_cache(maxsize=8)
def _made_by(config: GPTConfig) -> tuple[dict[str, type], dict[str, torch.Size]]:
    """What ``GPT`` makes of a config: the types of its modules, and the shapes of its weights in their order."""
    from fastgpt.model import GPT  # which needs this file

    with torch.device("meta"):
        model = GPT(config, drawn=False)
    return _types(model), _shapes(model)


def _types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in model.named_parameters(remove_duplicate=False)}


def _is_as_written(kind: type) -> bool:
    """Whether all methods of a class come from where it does."""
    return all(method.__module__ == kind.__module__ for method in vars(kind).values() if inspect.isfunction(method))
