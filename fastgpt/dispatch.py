"""What can run where, which one runs, and why.

One table holds, per op and backend, the function and the device types, dtypes and shapes it takes. ``resolve`` reads it
and never tries a backend to find out. The nearest choice wins: ``backend=`` on a call, then the innermost
``use_backend``, then ``FASTGPT_BACKEND``, then "auto", which takes the first backend of ``PREFERRED`` that can run.
Nothing falls back silently: a named backend that cannot run raises its reason, and ``explain`` prints every reason.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from fastgpt import emulator, extension, reference, torch_native
from fastgpt.triton_kernels import library as triton_library

OPS = (
    "attention",
    "attention_qkvpacked",
    "softmax",
    "layer_norm",
    "add_layer_norm",
    "gelu",
    "cross_entropy",
    "linear_cross_entropy",
    "dropout",
    "adamw_",
    "clip_grad_norm_",
)
BACKENDS = ("reference", "torch", "triton", "cpp", "cuda")
AUTO = "auto"

# The order in which "auto" tries the backends, by device type; cpp joins it below. On the CPU it is measured
# (docs/measured.md); no GPU has been measured yet, and there PyTorch's fused functions go before the plain algebra.
PREFERRED: dict[str, tuple[str, ...]] = {"cpu": ("torch", "reference"), "cuda": ("torch", "reference")}

_HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kernels:
    """The dispatcher ops with which a kernel backend runs one differentiable op; its ``autograd.Function`` calls them.

    ``bwd`` is None where the forward makes the gradients too (linear_cross_entropy); ``scale_`` is cross_entropy's, and
    multiplies by the upstream gradient one that the forward has made.
    """

    fwd: Callable[..., Any]
    bwd: Callable[..., Any] | None = None
    scale_: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Entry:
    """One cell of the table: how one backend runs an op, and what it takes.

    ``fn`` is a function of the op's arguments, or the ``Kernels`` that the op's own ``autograd.Function`` puts
    together. ``limit`` gets the op's arguments and returns why they are out of reach, or None; ``yields`` gets them and
    says whether "auto" leaves them to the next backend of its order, which was measured to be faster. ``gpu_limit``
    gets a GPU's number and returns why that one cannot run the kernels, or None. ``note`` is a sentence about the entry
    that ``explain`` prints, ``hint`` one that is added to the reason where it does not take a device, and ``how`` says
    what takes the place of hardware that is not there.
    """

    fn: Callable[..., Any] | Kernels
    device_types: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = _HALF_AND_SINGLE
    limit: Callable[..., str | None] | None = None
    yields: Callable[..., bool] | None = None
    gpu_limit: Callable[[int], str | None] | None = None
    note: str = ""
    hint: str = ""
    how: str = ""


_table: dict[str, dict[str, Entry]] = {op: {} for op in OPS}
_absent: dict[str, str] = {}


def register(backend: str, op: str, entry: Entry) -> None:
    """Put ``entry`` into the table: from now on ``backend`` runs ``op`` where the entry allows it.

    Raises:
        ValueError: ``op`` or ``backend`` is not a known name.
    """
    _check_op(op, "register")
    _check_backend(backend, "register", names=BACKENDS)
    _absent.pop(backend, None)
    _table[op][backend] = entry


def mark_absent(backend: str, reason: str) -> None:
    """Say in one sentence why ``backend`` has no op on this machine; ``explain`` and errors repeat it."""
    _check_backend(backend, "mark_absent", names=BACKENDS)
    _absent[backend] = reason
    for entries in _table.values():
        entries.pop(backend, None)


def parse_choice(text: str, source: str) -> dict[str, str]:
    """Read ``"torch"`` or ``"attention=torch,layer_norm=reference"`` into {op: backend}; "" is no choice.

    Raises:
        ValueError: an unknown op or backend; ``source`` says where the text came from.
    """
    choice: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        op, equals, backend = (word.strip() for word in part.rpartition("="))
        if equals:
            _check_op(op, source)
        _check_backend(backend, source)
        choice.update({op: backend} if equals else dict.fromkeys(OPS, backend))
    return choice


def _check_op(op: str, source: str) -> None:
    if op not in OPS:
        raise ValueError(f"{source}: unknown op {op!r}; the ops are {', '.join(OPS)}")


def _check_backend(name: object, source: str, names: Sequence[str] = (*BACKENDS, AUTO)) -> None:
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"{source}: unknown backend {name!r}; the backends are {', '.join(names)}")


def _choice_from_environment() -> dict[str, str] | ValueError:
    try:
        return parse_choice(os.environ.get("FASTGPT_BACKEND", ""), "FASTGPT_BACKEND")
    except ValueError as error:  # kept for the first op that asks: importing fastgpt must not fail
        return error


# Read once, at import: torch.compile guards on what it reads, and the environment is not to be read at every op.
_environment = _choice_from_environment()


class _State(threading.local):
    """The {op: backend} of the innermost use_backend of this thread; {} outside of any.

    Always a dict: torch 2.10 cannot guard on what is None at one time and a dict at another.
    """

    def __init__(self) -> None:
        self.choice: dict[str, str] = {}


_state = _State()


def current_choice() -> dict[str, str]:
    """{op: backend} as chosen by use_backend in this thread, else by FASTGPT_BACKEND; what is missing is "auto".

    Raises:
        ValueError: FASTGPT_BACKEND names an unknown op or backend.
    """
    if _state.choice:
        return _state.choice
    if isinstance(_environment, ValueError):
        raise _environment
    return _environment


def is_left_to(backend: str, device_type: str) -> bool:
    """Whether every op on such tensors is left to ``backend``: chosen by name, or by "auto", which prefers it there.

    Then what stands between the ops may use it too, and otherwise not: other backends are to be what they say.
    """
    choice = current_choice()
    names = {*choice.values(), *(() if len(choice) == len(OPS) else (AUTO,))}
    if AUTO in names and PREFERRED.get(device_type, ("",))[0] == backend:
        names.remove(AUTO)
    return names <= {backend} and backend not in _absent


class use_backend:
    """Choose the backend of all ops, or of some, until the ``with`` block ends (in the thread that entered it).

    ``use_backend("reference")`` chooses for every op, ``use_backend(attention="torch")`` for those named, and
    ``use_backend("torch", softmax="reference")`` for both. "auto" hands an op back to ``PREFERRED``. Blocks nest,
    and the innermost wins.

    Raises:
        ValueError: an unknown op or backend, or a backend that this machine does not have, with the reason.
    """

    def __init__(self, backend: str | None = None, **per_op: str) -> None:
        chosen: dict[str, str] = {}
        if backend is not None:
            if not isinstance(backend, str):
                _check_backend(backend, "use_backend")
            chosen = parse_choice(backend, "use_backend")
        for op, name in per_op.items():
            _check_op(op, "use_backend")
            _check_backend(name, "use_backend")
            chosen[op] = name
        for name in chosen.values():
            if name in _absent:
                raise ValueError(f"use_backend: backend {name!r} cannot run here: {_absent[name]}")
        self._chosen = chosen
        self._before: list[dict[str, str]] = []

    def __enter__(self) -> None:
        self._before.append(_state.choice)
        _state.choice = {**current_choice(), **self._chosen}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _state.choice = self._before.pop()


def resolve(op: str, backend: str | None, *args: Any) -> Entry:
    """The table's entry that runs ``op`` on these arguments.

    Raises:
        ValueError: an unknown backend, or one that cannot run this op here, with the reason.
    """
    x = _leading_tensor(args)
    name = current_choice().get(op, AUTO) if backend is None else backend
    if name != AUTO:
        _check_backend(name, op)
        reason = reason_against(op, name, x.device.type, x.dtype, args)
        if reason is not None:
            raise ValueError(f"{op}: backend {name!r} cannot run here: {reason}")
        return _table[op][name]
    chosen = None
    for candidate in PREFERRED.get(x.device.type, ()):
        if reason_against(op, candidate, x.device.type, x.dtype, args) is None:
            entry = _table[op][candidate]
            if not _leaves_to_next(entry, args):
                return entry
            chosen = chosen or entry
    if chosen is None:
        raise ValueError(f"{op}: no backend takes {_dtype_name(x.dtype)} tensors on device {x.device.type!r} here")
    return chosen


def _leaves_to_next(entry: Entry, args: tuple[Any, ...]) -> bool:
    """Whether "auto" passes over an entry that can run: another is faster here, or torch.func cannot go through it."""
    if torch.compiler.is_compiling():
        return False  # a test of sizes would compile anew for each side of its limit
    if isinstance(entry.fn, Kernels) and torch._C._are_functorch_transforms_active():
        return True
    return entry.yields is not None and entry.yields(*args)


def run(op: str, backend: str | None, *args: Any, on_kernels: Callable[..., Any] | None = None) -> Any:
    """Resolve ``op`` and call it, outside of any autocast: an op computes in the dtypes it was given.

    ``on_kernels`` takes the ``Kernels`` of a kernel backend, and then ``args``.
    """
    fn = resolve(op, backend, *args).fn
    device_type = _leading_tensor(args).device.type
    if isinstance(fn, Kernels):
        assert on_kernels is not None
        fn, args = on_kernels, (fn, *args)
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return fn(*args)
    return fn(*args)


def reason_against(
    op: str, backend: str, device_type: str, dtype: torch.dtype, args: tuple[Any, ...] | None = None
) -> str | None:
    """Why ``backend`` cannot run ``op``, in one sentence, or None; without ``args`` shapes are left out."""
    entry = _table[op].get(backend)
    if entry is None:
        return _absent.get(backend, f"the {backend} backend has no {op}")
    if device_type not in entry.device_types:
        return f"it takes {_listed(entry.device_types)} tensors, not {device_type}{entry.hint}"
    if dtype not in entry.dtypes:
        return f"it takes {_listed([_dtype_name(d) for d in entry.dtypes])}, not {_dtype_name(dtype)}"
    if entry.gpu_limit is not None:
        index = torch.cuda.current_device() if args is None else _leading_tensor(args).device.index
        reason = entry.gpu_limit(index)
        if reason is not None:
            return reason
    if entry.limit is not None and args is not None:
        return entry.limit(*args)
    return None


def stand_in(op: str, backend: str) -> str:
    """What takes the place of hardware that is not there where ``backend`` runs ``op``; "" where nothing does."""
    entry = _table[op].get(backend)
    return "" if entry is None else entry.how


def explain(device_type: str = "cpu", dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """One row per op: which backend runs it on such tensors, why that one, and why each of the others does not.

    Returns:
        Dicts with "op", "backend" (None where none can run), "why", "note" and "others" ({backend: reason}).
    """
    rows = []
    for op in OPS:
        name = current_choice().get(op, AUTO)
        reasons = {b: reason_against(op, b, device_type, dtype) for b in BACKENDS}
        if name == AUTO:
            able = [b for b in PREFERRED.get(device_type, ()) if reasons[b] is None]
            chosen = able[0] if able else None
            why = f"auto prefers it on {device_type}" if able else "no backend can run here"
            passed_over = f"auto prefers {chosen} on {device_type}"
        else:
            chosen = name if reasons[name] is None else None
            why = "chosen by " + ("use_backend" if _state.choice else "FASTGPT_BACKEND")
            passed_over = f"{name} was chosen"
        hows = {b: entry.how for b, entry in _table[op].items()}
        able_but = {b: f"it can run{', ' * bool(how)}{how}, but {passed_over}" for b, how in hows.items()}
        others = {b: reason or able_but[b] for b, reason in reasons.items() if b != chosen}
        note = "; ".join(filter(None, (hows[chosen], _table[op][chosen].note))) if chosen else ""
        rows.append({"op": op, "backend": chosen, "why": why, "note": note, "others": others})
    return rows


def _leading_tensor(args: tuple[Any, ...]) -> torch.Tensor:
    return args[0][0] if isinstance(args[0], list) else args[0]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


_SDPA_NOTE = "on CUDA its backward is not deterministic (PyTorch's SDPA)"
_TORCH_DETAILS: dict[str, dict[str, Any]] = {
    "attention": {"note": _SDPA_NOTE},
    "attention_qkvpacked": {"note": _SDPA_NOTE},
    "adamw_": {
        "limit": torch_native.adamw_limit,
        "note": "takes contiguous lists of one dtype; reference takes the others",
    },
}

for _op in OPS:
    register("reference", _op, Entry(getattr(reference, _op), dtypes=(*_HALF_AND_SINGLE, torch.float64)))
    register("torch", _op, Entry(getattr(torch_native, _op), **_TORCH_DETAILS.get(_op, {})))


def _on_kernels(op: str, dispatcher_op: Callable[[str], Callable[..., Any]]) -> Callable[..., Any] | Kernels:
    """What runs ``op`` on a kernel backend, whose dispatcher ops ``dispatcher_op`` finds by name."""
    if op in ("adamw_", "clip_grad_norm_"):
        return dispatcher_op(op)
    names = {
        "linear_cross_entropy": ("linear_cross_entropy_fwd",),
        "cross_entropy": ("cross_entropy_fwd", "cross_entropy_bwd", "scale_gradient_"),
    }
    return Kernels(*(dispatcher_op(name) for name in names.get(op, (f"{op}_fwd", f"{op}_bwd"))))


def _register_triton() -> None:
    """Triton's ops: on GPU tensors, or on CPU tensors in its interpreter."""
    missing = triton_library.missing()
    if missing is not None:
        mark_absent("triton", missing)
        return
    interpreting = triton_library.interpreting()
    device_types = ("cpu",) if interpreting else ("cuda",)
    hint = "" if interpreting else " (with TRITON_INTERPRET=1 its interpreter runs it on cpu tensors)"
    how = "in Triton's interpreter" if interpreting else ""
    limits = {"attention": _head_size_limit, "attention_qkvpacked": _head_size_limit}
    for op in OPS:
        fn = _on_kernels(op, triton_library.op)
        register("triton", op, Entry(fn, device_types, limit=limits.get(op), hint=hint, how=how))


def _head_size_limit(x: torch.Tensor, *_: Any) -> str | None:
    return f"it takes head sizes up to 256, not {x.shape[-1]}" if x.shape[-1] > 256 else None


# What "auto" leaves to torch although the C++ kernels can run it, by their arguments, and in words: there torch was
# measured to be faster (docs/measured.md). Calls so small cost what surrounds a kernel, and not the kernel.
_LEFT_TO_TORCH: dict[str, tuple[Callable[..., bool], str]] = {
    "attention": (
        lambda q, k, v, is_causal, dropout_p, *_: (
            dropout_p == 0 and q.dtype == torch.float32 and 1 < q.shape[2] < 8 and k.shape[2] >= 256
        ),
        "in fp32 2 to 7 queries on 256 keys or more",
    ),
    "softmax": (lambda x, scale, is_causal: not is_causal and x.numel() < 1 << 17, "fewer than 2^17 elements, no mask"),
    "layer_norm": (lambda x, *_: x.numel() < 1 << 16, "fewer than 2^16 elements"),
    "add_layer_norm": (
        lambda x, residual, weight, bias, dropout_p, *_: dropout_p == 0 and x.numel() < 1 << 15,
        "fewer than 2^15 elements, no dropout",
    ),
    "cross_entropy": (lambda logits, *_: logits.numel() < 1 << 14, "fewer than 2^14 logits"),
    "linear_cross_entropy": (
        lambda x, weight, *_: weight.shape[0] < 1024 or x.shape[0] * weight.shape[0] < 1 << 19,
        "fewer than 1024 classes or 2^19 logits",
    ),
}


def _on_extension(op: str, library: extension.Library) -> Callable[..., Any] | Kernels:
    """What runs ``op`` on the kernels of one of the extension's libraries."""
    in_place = {"adamw_": (0, 2, 3), "clip_grad_norm_": (0,)}
    return library.op_in_place(op, in_place[op]) if op in in_place else _on_kernels(op, library.op)


def _register_cpp() -> None:
    """The extension's kernels for CPU tensors."""
    missing = extension.cpp_missing()
    if missing is not None:
        mark_absent("cpp", missing)
        return
    # The baseline has been measured against nothing, and torch has kernels for more processors than this.
    preferred = extension.isa() != "baseline"
    PREFERRED["cpu"] = ("cpp", *PREFERRED["cpu"]) if preferred else (*PREFERRED["cpu"], "cpp")
    for op in OPS:
        fn = _on_extension(op, extension.cpu)
        yields, what = _LEFT_TO_TORCH.get(op, (None, ""))
        note = f"{extension.isa()} kernels" + (f"; auto leaves to torch: {what}" if what else "")
        register("cpp", op, Entry(fn, ("cpu",), yields=yields, note=note))


_EMULATOR_HINT = " (with FASTGPT_EMULATE=1 the emulator runs it on cpu tensors)"


def _register_cuda() -> None:
    """The extension's kernels for CUDA tensors; in the emulator, for CPU tensors."""
    emulating = emulator.requested()
    missing = emulator.missing() if emulating else extension.cuda_missing()
    if missing is not None:
        mark_absent("cuda", missing if emulating else missing + _EMULATOR_HINT)
        return
    if emulating:
        emulator.register_ops()
    limits = {"attention": _head_size_limit, "attention_qkvpacked": _head_size_limit}
    for op in OPS:
        fn, limit = _on_extension(op, extension.cuda), limits.get(op)
        if emulating:
            how = f"in the emulator, built with CUDA's headers in {' and '.join(map(str, emulator.headers()))}"
            entry = Entry(fn, ("cpu",), limit=limit, how=how)
        else:
            entry = Entry(fn, ("cuda",), limit=limit, gpu_limit=extension.gpu_error, hint=_EMULATOR_HINT)
        register("cuda", op, entry)


_register_triton()
_register_cpp()
_register_cuda()
if extension.isa_error() is not None and not isinstance(_environment, ValueError):
    _environment = ValueError(extension.isa_error())  # as a wrong FASTGPT_BACKEND: said by the first op
