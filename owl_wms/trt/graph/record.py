"""One forward on the meta device, written down: every call into torch and every operator, with all arguments.

Why not `torch.export` for the cache key: it takes seconds in a fresh process and patches nn.Module for all threads
while it runs. This is at least as strict. Export's graph says which operators run on which values with which
arguments; here the same is recorded twice, as the decoder's code called it (so a `.to(dtype)` that changes nothing
today is in it) and as the operators that torch made of it. Beyond export's text it holds the values of constants made
on the way, and autocast and gradient mode where they change. Both run the forward once, so both see the branch that is
taken for this shape and no other. Values are named by where they come from, never by address, so every process writes
the same text.

Usage:
    text = record(meta_module, z_meta)
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from owl_wms.trt.graph.meta import QuickShapes, result_of
from owl_wms.trt.graph.shapes import named_tensors

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout)


@torch.no_grad()
def record(module: nn.Module, z: Tensor, *state: Tensor, inspect: Callable[[Any], None] | None = None) -> str:
    """Records what `module(z, *state)` does, as text; equal for equal decoders in every process.

    Args:
        module: all its tensors on the meta device; eval mode.
        z: latents on the meta device.
        state: of a streaming decoder, on the meta device; named `s.0`, `s.1` and so on.
        inspect: called with what the module returned.

    Raises:
        Exception: whatever the forward raises, and what an operator raises that has no meta form.
    """
    book = _Book()
    for name, tensor in named_tensors(module):
        book.value(tensor, f"self.{name}")
    book.value(z, "z")
    book.results(state, "s")
    with (
        contextlib.ExitStack() as drawing,
        torch.autocast("cuda", enabled=False),  # a surrounding autocast is the caller's context, not the decoder's
        torch.autocast("cpu", enabled=False),
        _Calls(book),
        _Operators(book, drawing),
    ):
        returned = module(z, *state)
    if inspect is not None:
        inspect(returned)
    book.line(f"return {book.text(returned)}")
    return "\n".join(book.lines)


class _Book:
    """The lines so far and the name of every tensor that was seen."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names: dict[int, str] = {}
        self._kept: list[Tensor] = []  # an id may be used again once its tensor is gone
        self._state = ""

    def line(self, text: str) -> None:
        self.lines.append(text)

    def value(self, tensor: Tensor, name: str) -> None:
        """Name a tensor and say what it is like; a later name of the same tensor (written in place) replaces it."""
        self._names[id(tensor)] = name
        self._kept.append(tensor)
        self.line(f"{name}: {_like(tensor)}")

    def results(self, values: Any, prefix: str) -> None:
        """Name every tensor in what an operator or call returned."""
        if isinstance(values, Tensor):
            self.value(values, prefix)
        elif isinstance(values, (list, tuple)):
            for index, item in enumerate(values):
                self.results(item, f"{prefix}.{index}")
        elif isinstance(values, dict):
            for key in values:
                self.results(values[key], f"{prefix}.{key}")
        else:
            self.line(f"{prefix}: {self.text(values)}")

    def known(self, values: Any) -> bool:
        """Returns whether every tensor in `values` has a name."""
        if isinstance(values, Tensor):
            return id(values) in self._names
        if isinstance(values, dict):
            values = list(values.values())
        return all(self.known(item) for item in values) if isinstance(values, (list, tuple)) else True

    def text(self, value: Any) -> str:
        """An argument as text that holds its whole value and no address."""
        if isinstance(value, Tensor):
            return self._names.get(id(value)) or self._stranger(value)
        if isinstance(value, (list, tuple)):
            return f"{type(value).__name__}({', '.join(self.text(item) for item in value)})"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{key!r}: {self.text(value[key])}' for key in sorted(value, key=repr))}}}"
        if isinstance(value, slice):
            return f"slice({self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)})"
        if isinstance(value, _PLAIN) or value is Ellipsis or isinstance(value, torch.memory_format):
            return repr(value)
        if isinstance(value, np.ndarray):
            return f"array({value.shape}, {value.dtype}, {hashlib.sha256(value.tobytes()).hexdigest()})"
        if isinstance(value, np.generic):
            return repr(value)
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}"
        # What such an object makes the operators do is recorded with the operators.
        return f"<{type(value).__module__}.{type(value).__qualname__}>"

    def state(self) -> None:
        """Note autocast and gradient mode where they are not what they were."""
        modes = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cuda", "cpu")]
        state = f"modes: autocast {modes}, gradients {torch.is_grad_enabled()}"
        if state != self._state:
            self._state = state
            self.line(state)

    def _stranger(self, tensor: Tensor) -> str:
        """A tensor that no recorded call made: a constant of the decoder's own, told apart by its bytes."""
        if tensor.is_meta:
            name = f"unnamed{len(self._kept)}"
            self.value(tensor, name)
            return name
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return f"constant({_like(tensor)}, {hashlib.sha256(data.data).hexdigest()})"


class _Operators(QuickShapes):
    """Records what reaches torch's dispatcher, below autograd and below functions made of other functions."""

    def __init__(self, book: _Book, drawing: contextlib.ExitStack) -> None:
        super().__init__()
        self._book = book
        self._drawing, self._draws = drawing, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What a forward draws on the CPU is drawn for real, and the state before it comes back at the end. Not so for
        # others: the state belongs to every thread, and one that trains meanwhile would draw the same numbers twice.
        if not self._draws and torch.Tag.nondeterministic_seeded in func.tags:
            self._draws = True
            self._drawing.enter_context(torch.random.fork_rng(devices=[]))
        self._book.line(f"{func} {self._book.text(args)} {self._book.text(kwargs or {})}")
        results = result_of(func, args, kwargs or {})
        self._book.results(results, f"v{len(self._book.lines)}")
        return results


class _Calls(TorchFunctionMode):
    """Records every call of the decoder into torch, with the arguments as they were given."""

    def __init__(self, book: _Book) -> None:
        super().__init__()
        self._book = book

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        book, name = self._book, _name(func)
        # Reading a property is no computation, unless a tensor is what it gives (x.T, x.data).
        reading = name.endswith(".__get__")
        if not reading:
            book.state()
            book.line(f"call {name} {book.text(args)} {book.text(kwargs)}")
        results = func(*args, **kwargs)
        if reading and not isinstance(results, Tensor):
            return results
        if reading:
            book.line(f"call {name} {book.text(args)}")
        if not book.known(results):
            book.results(results, f"v{len(book.lines)}")
        else:
            book.line(f"gives {book.text(results)}")
        return results


def _name(func: Any) -> str:
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(func)
    owner = getattr(func, "__self__", None)
    if type(func).__name__ == "method-wrapper":  # a property such as `Tensor.shape`, read
        return f"{getattr(owner, '__name__', type(owner).__name__)}.{func.__name__}"
    return f"{getattr(func, '__module__', None) or ''}.{getattr(func, '__qualname__', type(func).__qualname__)}"


def _like(tensor: Tensor) -> str:
    strides = tuple(tensor.stride()) if tensor.layout == torch.strided else tensor.layout
    return f"{type(tensor).__name__} {tuple(tensor.shape)} {tensor.dtype} {strides}"
