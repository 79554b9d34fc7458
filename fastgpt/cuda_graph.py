"""A function of tensors as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # calls


class Graphed:
    """``fn`` on a GPU, replayed as one CUDA graph from the call after ``WARM_UP`` on: one launch for all its kernels.

    The calls before run as ever, on a stream of their own: they compile kernels, and make what outlives a call
    (optimizer moments, workspaces). A replay runs no Python: what changes from call to call must reach ``fn`` in its
    arguments, in tensors that are changed in place, or from the device's default generator, which goes on from one
    replay to the next. ``fn`` must not ask the device for a number.

    Args:
        fn: takes tensors, of the same shapes at each call, and returns one.
        device: the GPU.
    """

    def __init__(self, fn: Callable[..., Tensor], device: torch.device) -> None:
        self._fn = fn
        self._stream = torch.cuda.Stream(device)
        self._calls = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self._calls < WARM_UP:
            self._calls += 1
            return self._warm_up(*inputs)
        if self._replay is None:
            self._inputs = [x.clone() for x in inputs]
            self._replay, self._output = self._capture()
        for own, x in zip(self._inputs, inputs, strict=True):
            own.copy_(x)
        self._replay()
        return self._output.clone()  # the next replay writes to the same memory

    def _warm_up(self, *inputs: Tensor) -> Tensor:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self._fn(*inputs)
        current.wait_stream(self._stream)
        return output

    def _capture(self) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with work of their own meanwhile: one that writes a checkpoint, say.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            output = self._fn(*self._inputs)
        return graph.replay, output
