"""Notices before every decode whether a decoder is still the one that a program was made of.

Why polling: weights are changed by optimisers, by `load_state_dict`, by hand and by other libraries, and torch tells
nobody. Version counters show most in-place changes, addresses show `tensor.data = other`, and the steps of optimisers
are counted here, because fused ones write weights without raising a version. On a CPU three values of each weight are
read as well, which shows most of what nothing else shows; on a GPU that would wait for it.

Hooks and forwards of instances are looked at closely only if a cheap sign of them has changed since the last call, so
that a call costs about 0.35 us per tensor, and half as much again on a CPU (`benchmarks/stamp.py`).

Usage:
    stamp = WeightsStamp(decoder)
    stamp.matches(decoder)          # False once a weight, module, hook, mode or class that matters has changed
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from gc import get_referents
from itertools import chain
from operator import attrgetter, itemgetter, ne
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrizations, parametrize
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

MOST_GONE = 64
"""Optimisers that are remembered after they were deleted."""
_training = itemgetter("training")
_forward = attrgetter("forward")
_call = attrgetter("__call__")
_version = attrgetter("_version")
_value = attrgetter("value")
_CELLS: dict[int, type[Any]] = {1: ctypes.c_uint8, 2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
_GLOBAL_HOOKS: tuple[Mapping[Any, Any], ...] = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
)
# Modules that compute the same in train mode as in eval mode: with their parameters and nothing else, or with their
# parts.
_LEAVES = (nn.Conv1d, nn.Conv2d, nn.Linear, nn.LeakyReLU, nn.SiLU, nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Identity)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, parametrize.ParametrizationList)
_VISIBLE = (Tensor, nn.Parameter)
_PLAIN = frozenset((*_LEAVES, *_CONTAINERS, parametrizations._WeightNorm))


class _Stepped:
    """An optimiser, the number of its last step, and where its weights were at its first."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._first = _memory_of(optimizer)
        self.last = 0

    @property
    def gone(self) -> bool:
        return self._optimizer() is None

    def memory(self) -> set[int]:
        """Returns the addresses of the memory that its steps write."""
        optimizer = self._optimizer()
        return self._first if optimizer is None else _memory_of(optimizer)


class _Steps:
    """Counts the steps of every optimiser in this process: about a microsecond per step."""

    def __init__(self) -> None:
        self.count = 0
        self._known: weakref.WeakKeyDictionary[Optimizer, _Stepped] = weakref.WeakKeyDictionary()
        self._all: list[_Stepped] = []

    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        stepped = self._known.get(optimizer)
        if stepped is None:
            gone = [one for one in self._all if one.gone]
            self._all = [one for one in self._all if not one.gone] + gone[-MOST_GONE:]
            stepped = self._known[optimizer] = _Stepped(optimizer)
            self._all.append(stepped)
        self.count += 1
        stepped.last = self.count

    def wrote(self, memory: set[int], since: int) -> bool:
        """Returns whether a step after the one numbered `since` wrote some of `memory`."""
        return any(stepped.last > since and not memory.isdisjoint(stepped.memory()) for stepped in self._all)


def _memory_of(optimizer: Optimizer) -> set[int]:
    weights = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return {weight.untyped_storage().data_ptr() for weight in weights}


_STEPS = _Steps()
register_optimizer_step_post_hook(_STEPS)


class WeightsStamp:
    """A fingerprint of all that a decoder computes with at one moment; it keeps no weight alive.

    Matches until a weight is written in place, replaced or moved; an optimiser that has one of them steps; a module is
    exchanged or gets another class; a part's mode switches; a hook comes or goes, of a module or of all modules; a
    forward is replaced, in an instance or in a class.

    Not seen are writes through `tensor.data`, a raw pointer, a storage, an array that shares the memory (numpy, DLPack)
    or one of torch's fused kernels (`torch._fused_adamw_`) outside of an optimiser's step, a `tensor.data` that becomes
    another view of the same memory, writes of another process into shared memory, updates of tensors made in inference
    mode, a replaced `nn.Module.__call__` (tracing replaces it too, for a while), another method than forward that is
    replaced in a class, a table of parameters or buffers that is exchanged as a whole (`module._parameters = ...`), and
    plain attributes that a forward reads (some count their calls in one). After such, make a new decode function. Of
    weights on a CPU such writes show too if they change the first, the middle or the last value of a weight.

    Attributes:
        blind: the decoder has weights whose changes do not show (`unseen`), so that nothing ever matches.
    """

    def __init__(self, decoder: nn.Module) -> None:
        modules = list(decoder.modules())
        active = [module for module in modules if not _is_plain(module)]
        self._steps = _STEPS.count
        # `get_referents` gives the values of many dicts in one loop of C: half the time of chaining their views.
        self._holders = [held for module in modules for held in (module._parameters, module._buffers) if held]
        # A scripted module has its tables in C++ instead.
        self._foreign = [held for held in self._holders if not isinstance(held, dict)]
        self.blind = unseen(decoder) is not None
        if self.blind:
            return
        values = self._values()
        self._ids = list(map(id, values))
        # Takes the tensors out of the values, of which an absent bias is None.
        self._tensors_of = _picker([i for i, value in enumerate(values) if isinstance(value, Tensor)])
        tensors = self._tensors_of(values)
        self._storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        self._pointers = [storage.cdata for storage in self._storages]
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._cells = [cell for tensor in tensors for cell in _cells(tensor)]
        self._read = list(map(_value, self._cells))
        self._memory = {storage.data_ptr() for storage in map(Tensor.untyped_storage, tensors)}
        # A tensor made in inference mode has no version.
        self._counted = _picker([i for i, tensor in enumerate(tensors) if not tensor.is_inference()])
        # Not their sum: what exchanges the insides of tensors (`torch.utils.swap_tensors`) may lower a version.
        self._versions = list(map(_version, self._counted(tensors)))
        self._children = [module._modules for module in modules if module._modules]
        self._children_then = [dict(children) for children in self._children]
        # Of modules whose own forward may look at them; what is added to these is new to the computation.
        self._empty: list[Mapping[str, Any]] = [
            held for module in active for held in (module._parameters, module._buffers, module._modules) if not held
        ]
        self._empty += [m._modules for m in modules if isinstance(m, _CONTAINERS) and not m._modules]
        # Read from the attributes' dicts in a loop of C; a module of torch.compile has its mode elsewhere.
        self._mode_of = [module.__dict__ for module in active if "training" in module.__dict__]
        self._modes = list(map(_training, self._mode_of))
        self._wrapped = [(module, module.training) for module in active if "training" not in module.__dict__]
        self._own = [module.__dict__ for module in modules]
        self._hooks = [*_GLOBAL_HOOKS, *(held for m in modules for held in (m._forward_hooks, m._forward_pre_hooks))]
        self._hooked = [held for held in self._hooks if held]
        self._parts = modules
        self._types = list(map(type, modules))
        # The class of a scripted module has no forward; each of its instances brings its own from C++.
        scripted: Any = torch.jit.ScriptModule
        self._classes = [kind for kind in dict.fromkeys(self._types) if not issubclass(kind, scripted)]
        self._forwards = list(map(_forward, self._classes))
        self._calls = _calls(self._classes)
        self._forwarded = [own for own in self._own if "forward" in own]
        self._signs = self._cheap_signs()
        self._additions = self._close_look()

    def matches(self, decoder: nn.Module) -> bool:
        """Returns whether `decoder`, the one that the stamp was made of, still computes with the same.

        Always False if it has weights whose changes do not show (`unseen`).
        """
        if self.blind:
            return False
        if self._children != self._children_then or any(self._empty):
            return False
        if list(map(_training, self._mode_of)) != self._modes or list(map(type, self._parts)) != self._types:
            return False
        if any(module.training != mode for module, mode in self._wrapped):
            return False
        if list(map(_forward, self._classes)) != self._forwards or _calls(self._classes) != self._calls:
            return False
        values = self._values()
        if list(map(id, values)) != self._ids:
            return False
        tensors = self._tensors_of(values)
        if list(map(_version, self._counted(tensors))) != self._versions:
            return False
        moved = map(ne, map(Tensor.data_ptr, tensors), self._addresses)
        # An allocator gives the address of a freed weight to the next one of its size, so equal addresses mean the
        # same weights only where none of the old ones was freed by the time the addresses were read.
        gone = map(torch.UntypedStorage._expired, self._pointers)
        # Freed memory must not be read, nor what a storage has given back, and then has another address: this is one
        # call of C, in which no other thread of Python's runs.
        if any(chain(moved, gone, map(ne, map(_value, self._cells), self._read))):
            return False
        return self._unstepped() and self._unhooked()

    def _values(self) -> list[Any]:
        """Returns every parameter and buffer, or None for an absent one, and what else stands among them."""
        values = get_referents(*self._holders)
        for held in self._foreign:
            values.extend(held.values())
        return values

    def _unstepped(self) -> bool:
        """Returns whether no optimiser has stepped that has one of the weights."""
        if self._steps == _STEPS.count:
            return True
        count = _STEPS.count
        if _STEPS.wrote(self._memory, self._steps):
            return False
        self._steps = count
        return True

    def _unhooked(self) -> bool:
        """Returns whether hooks and the forwards of instances are what they were."""
        signs = self._cheap_signs()
        if signs == self._signs:
            return True
        if self._close_look() != self._additions:
            return False
        self._signs = signs
        return True

    def _cheap_signs(self) -> tuple[Any, ...]:
        """Returns what differs after each addition or removal, and at times without one."""
        # torch numbers the hooks of a process, so a new number means a new hook somewhere.
        lengths = sum(map(len, self._own)), sum(map(len, self._hooked))
        forwards = [own.get("forward") for own in self._forwarded]
        return RemovableHandle.next_id, lengths, forwards

    def _close_look(self) -> tuple[Any, ...]:
        hooks = [(place, *held.items()) for place, held in enumerate(self._hooks) if held]
        forwards = [(place, own["forward"]) for place, own in enumerate(self._own) if "forward" in own]
        return hooks, forwards


def _cells(tensor: Tensor) -> list[Any]:
    """Returns the first, a middle and the last value of a tensor on the CPU, as places in memory to be read again."""
    kind = _CELLS.get(tensor.itemsize)
    begin = tensor.data_ptr() if tensor.device.type == "cpu" else 0  # also 0 for one that only a trace has
    if not begin or tensor.is_nested or not tensor.numel() or kind is None:
        return []
    ends = [size - 1 for size in tensor.shape]
    places = {
        sum(index * step for index, step in zip(each, tensor.stride(), strict=True))
        for each in ([0] * len(ends), [end // 2 for end in ends], ends)
    }
    # Whoever shards or offloads weights may have given the memory of some back (`untyped_storage().resize_(0)`).
    if tensor.untyped_storage().nbytes() < (tensor.storage_offset() + max(places) + 1) * tensor.itemsize:
        return []
    return [kind.from_address(begin + place * tensor.itemsize) for place in sorted(places)]


def hooks_for_all() -> bool:
    """Returns whether forward hooks are registered that every module calls."""
    return any(_GLOBAL_HOOKS)


def _calls(kinds: list[type[nn.Module]]) -> list[Any]:
    """Returns the `__call__` of every class, None for that of `nn.Module`, which tracing replaces for a while."""
    usual = nn.Module.__call__
    return [None if call is usual else call for call in map(_call, kinds)]


def _picker(places: list[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Returns a function that takes what stands at these places out of a sequence, in a loop of C."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: [values[place] for place in places]


def _is_plain(module: nn.Module) -> bool:
    return parametrize.type_before_parametrizations(module) in _PLAIN


def unseen(decoder: nn.Module) -> str | None:
    """Returns why changes of the decoder's weights do not show, or None.

    Quantised and distributed weights are tensors around other tensors, which may be written by themselves. FSDP gathers
    weights before each forward, into memory that it uses again, and keeps their versions.
    """
    named = chain(decoder.named_parameters(), decoder.named_buffers())
    odd = next((f"{name} ({type(held).__name__})" for name, held in named if type(held) not in _VISIBLE), None)
    if odd is not None:
        return f"its weight {odd} is no plain tensor"
    return "its weights are sharded by FSDP" if _sharded().intersection(map(id, decoder.modules())) else None


def _sharded() -> set[int]:
    """Returns the identities of the modules whose weights `fully_shard` manages."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    states: Any = sys.modules.get("torch.distributed._composable_state")
    # Another thread may be importing it.
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None or states is None:
        return set()
    # A list of references at once: another thread may be adding modules.
    held = [reference() for reference in states._module_state_mapping.keyrefs()]
    return {id(part) for root in held if isinstance(root, kind) for part in root.modules()}


def hindrance(decoder: nn.Module) -> str | None:
    """Returns why no compiled program may stand for `decoder` as it is, or None.

    A program calls no hooks that belong to all modules, and it was compared with a decoder in one mode.
    """
    why = unseen(decoder)
    if why is not None:
        return f"{why}, so that changes would not show"
    if hooks_for_all():
        return "forward hooks for all modules are registered, which a compiled program does not call"
    for kind in dict.fromkeys(type(module) for module in decoder.modules()):
        if _calls([kind]) != [None] and not issubclass(kind, torch.fx.GraphModule):
            return f"{kind.__name__} has a __call__ of its own, which a compiled program does not call"
    if not decoder.training:
        name = next((name for name, part in decoder.named_modules() if part.training and not _is_plain(part)), None)
        if name is not None:
            return f"its part {name} is in train mode while the decoder is in eval mode"
    return None
