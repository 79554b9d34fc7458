"""What Triton kernels ask of memory and of the tensor cores, counted in Triton's interpreter, without a GPU.

    with counting() as counts:
        softmax(x)
    print(counts["load bytes"])

The interpreter runs one program after the other, and each operation of it on a whole tile. So what is counted is what
the programs ask for. How much of it the caches serve is not in it, nor is what the compiler makes of a tile: for that
see ``triton_rung.compiled``. An access beyond the tensors that a kernel was given is an error here; a GPU would let it
pass as long as the memory belongs to someone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import interpreter_builder

COUNTERS = {
    "launches": "kernels launched",
    "programs": "programs, of all grids together",
    "loads": "tiles, or single numbers, that programs loaded",
    "stores": "tiles, or single numbers, that programs stored",
    "load bytes": "bytes of the elements loaded, those aside whose mask is false",
    "store bytes": "bytes of the elements stored, those aside whose mask is false",
    "load sectors": "pieces of 32 bytes that these elements lie in, counted once for each load",
    "store sectors": "pieces of 32 bytes that these elements lie in, counted once for each store",
    "masked elements": "elements of loads and stores whose mask is false: lanes without work",
    "atomics": "elements changed by an atomic operation, not counted as loaded or stored",
    "dots": "matrix products of tiles (tl.dot)",
    "dot FLOPs": "multiplications and additions of these products",
}
SECTOR_BYTES = 32

Operation = Callable[..., Any]


@contextlib.contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Until the ``with`` block ends, count what kernels do in the interpreter; it is then as it was before.

    Yields:
        By the names of ``COUNTERS``, the sums of all launches so far.

    Raises:
        IndexError: within, by way of Triton's InterpreterError: an access beyond the tensors of its kernel.
    """
    counts = dict.fromkeys(COUNTERS, 0)
    given: list[tuple[int, int]] = []  # where the tensors lie that are handed to the next launch, and to this one
    within: list[tuple[int, int]] = []

    def argument(value: Any) -> None:
        value = getattr(value, "base", value)  # of a tensor descriptor, or a tensor read as another dtype
        if isinstance(value, Tensor) and value.numel():
            span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            given.append((value.data_ptr(), value.data_ptr() + span * value.element_size()))

    def launch(*_: int) -> None:
        counts["launches"] += 1
        within[:] = given
        given.clear()

    def active(pointers: Any, mask: Any = None) -> np.ndarray:
        """The addresses of the elements whose mask is true, or of all, which have to be a tensor's."""
        addresses = pointers.data.astype(np.int64)
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        if addresses.size and not any(low <= addresses.min() and addresses.max() < high for low, high in within):
            inside = np.zeros(addresses.shape, dtype=bool)
            for low, high in within:
                inside |= (low <= addresses) & (addresses < high)
            if not inside.all():
                beyond = addresses.size - inside.sum()
                raise IndexError(f"{beyond} elements lie beyond the tensors that the kernel was given")
        return addresses

    def access(kind: str, pointers: Any, mask: Any) -> None:
        addresses, size = active(pointers, mask), max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        counts[f"{kind}s"] += 1
        counts[f"{kind} bytes"] += addresses.size * size
        counts[f"{kind} sectors"] += np.unique(addresses // SECTOR_BYTES).size
        counts["masked elements"] += pointers.data.size - addresses.size

    def dot(a: Any, b: Any, *_: Any) -> None:
        *batch, m, k = a.data.shape
        counts["dots"] += 1
        counts["dot FLOPs"] += 2 * int(np.prod(batch, dtype=int)) * m * k * b.data.shape[-1]

    def add(counter: str, n: int) -> None:
        counts[counter] += n

    # Loads and stores of any kind, of blocks and by tensor descriptors, too, end in the masked ones.
    watchers: dict[str, Operation] = {
        "set_grid_dim": launch,
        "set_grid_idx": lambda *place: add("programs", 1),
        "create_masked_load": lambda pointers, mask, *_, **__: access("load", pointers, mask),
        "create_masked_store": lambda pointers, value, mask, *_, **__: access("store", pointers, mask),
        "create_atomic_rmw": lambda op, pointers, value, mask, *_: add("atomics", active(pointers, mask).size),
        "create_atomic_cas": lambda pointers, *_: add("atomics", active(pointers).size),
        "create_dot": dot,
    }
    with contextlib.ExitStack() as stack:
        convert = _watched(interpreter._implicit_cvt, argument)
        stack.enter_context(mock.patch.object(interpreter, "_implicit_cvt", convert))
        for name, watch in watchers.items():
            watched = _watched(getattr(interpreter_builder, name), watch)
            stack.enter_context(mock.patch.object(interpreter_builder, name, watched))
        yield counts


def _watched(operation: Operation, watch: Operation) -> Operation:
    def run(*args: Any, **options: Any) -> Any:
        watch(*args, **options)
        return operation(*args, **options)

    return run
