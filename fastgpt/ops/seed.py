"""The seed of an op that drops."""

from __future__ import annotations

import torch
from torch import Tensor

# A dispatcher op and not torch.randint itself: the tag keeps the compiler from drawing another number than eager mode
# does, and from drawing it anew in the backward. It does not keep AOTAutograd from merging two draws into one, as it
# merges any two calls of the same arguments; aten.empty it never merges, so each draw is given an empty tensor.
_library = torch.library.Library("fastgpt", "DEF")
_library.define("draw_seed(Tensor empty) -> Tensor", tags=[torch.Tag.nondeterministic_seeded])


def _draw_seed(empty: Tensor) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, empty.shape, dtype=torch.int64, device=empty.device)


_library.impl("draw_seed", _draw_seed, "CompositeExplicitAutograd")


@torch.library.register_fake("fastgpt::draw_seed", lib=_library)
def _(empty: Tensor) -> Tensor:
    return torch.empty_like(empty)


def seed_for(p: float, seed: Tensor | None, device: torch.device) -> Tensor | None:
    """None where nothing is dropped, ``seed`` if it was given, and else one from the device's default generator."""
    if p == 0:
        return None
    if seed is not None:
        return seed
    return torch.ops.fastgpt.draw_seed(torch.empty(1, dtype=torch.int64, device=device))
