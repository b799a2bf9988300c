"""The PyTorch path: the caller's decoder with weight norm folded, run eagerly; the answer that every other path must
match.

Why it exists: the caller's module must never change (it may be in train mode, frozen, wrapped or still needed with its
parametrizations), and memory that runs out in the middle of a decode should cost time, not the run.

Usage:
    eager = EagerDecoder(decoder)
    x = eager(z)                                   # [B, c, h, w] -> [B, C, H, W]
    decode_in_memory(eager, z, write=..., step=8)   # halves the chunk when memory runs out
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize

from owl_wms.errors import ConfigError, DecodeMemoryError
from owl_wms.runtime.latents import latent_channels
from owl_wms.vae import fold_weight_norm
from owl_wms.vae.fold import shared_hooks


class EagerDecoder:
    """A decoder ready to run, sharing the caller's weights where nothing had to be folded.

    Attributes:
        module: eval-mode module without weight norm.
        device, dtype: of its parameters; input is converted to both.
        channels: latent channels, None when the decoder does not say.
        stamp: identity of the caller's weights at the time.

    Raises:
        ConfigError: the weights have no values yet, or a decoder in train mode cannot be copied.
    """

    def __init__(self, decoder: nn.Module) -> None:
        # Before the weights are read: one that changes meanwhile shows as a difference later, never as none.
        self.stamp = WeightsStamp(decoder)
        inner = unwrap(decoder)
        self.module = _runnable(inner)
        tensor = next((t for t in (*inner.parameters(), *inner.buffers()) if t.is_floating_point()), None)
        self.device: torch.device | None = None if tensor is None else tensor.device
        if self.device is not None and self.device.type == "meta":
            raise ConfigError("the decoder is on the meta device, where weights have no values: load them first")
        self.dtype: torch.dtype | None = None if tensor is None else tensor.dtype
        self.channels = latent_channels(inner)

    def __call__(self, z: Tensor) -> Tensor:
        """`[B, c, h, w]`, any real dtype and device, to `[B, C, H, W]` in the decoder's; no gradients, autocast off."""
        z = z.to(device=self.device, dtype=self.dtype or z.dtype)
        # A surrounding autocast would make the answer depend on the caller's context.
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            return self.module(z)


def _runnable(inner: nn.Module) -> nn.Module:
    """`inner` in eval mode without weight norm: itself where it is that already, else a copy."""
    try:
        if any(parametrize.is_parametrized(module) for module in inner.modules()):
            return fold_weight_norm(inner).eval()
        if inner.training:
            shared = {id(tensor): tensor for tensor in (*inner.parameters(), *inner.buffers())}
            # The structure is copied, the tensors are not.
            return copy.deepcopy(inner, {**shared_hooks(inner), **shared}).eval()
    except Exception as error:  # what a module holds decides what copying it raises
        if inner.training:
            reason = f"the decoder is in train mode, and no copy of it can be made to run in eval mode: {error}"
            raise ConfigError(f"{reason}; call decoder.eval()") from error
    return inner


def unwrap(decoder: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and DistributedDataParallel wrappers."""
    while True:
        inner = getattr(decoder, "_orig_mod", None)
        if inner is None and isinstance(decoder, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = decoder.module
        if not isinstance(inner, nn.Module):
            return decoder
        decoder = inner


class WeightsStamp:
    """What a decoder's weights were at one moment: matches until one is updated in place, replaced or moved, a module
    is exchanged or its forward replaced, a hook comes or goes, or the mode switches. Reads no data, keeps no weight
    alive that the decoder has let go of.

    Every decode asks, so it must cost little beside half a millisecond of decoding: the tree of modules is walked once,
    and then only looked at where it could differ.

    Writes through `tensor.data` or a raw pointer do not show, nor updates of tensors made in inference mode, nor plain
    attributes that a forward reads (some count their calls in one); after such, make a new decode function.
    """

    def __init__(self, decoder: nn.Module) -> None:
        modules = list(decoder.modules())
        self._training = decoder.training
        self._children = [(module._modules, list(module._modules.values())) for module in modules]
        self._hooks = [held for module in modules for held in (module._forward_hooks, module._forward_pre_hooks)]
        self._own = [module.__dict__ for module in modules]
        self._added = self._count()
        self._holders: list[Mapping[str, Tensor | None]] = [
            held for module in modules for held in (module._parameters, module._buffers)
        ]
        self._storages = [
            StorageWeakRef(tensor.untyped_storage())
            for held in self._holders
            for tensor in held.values()
            if tensor is not None
        ]
        self._facts = _facts(self._holders)

    def matches(self, decoder: nn.Module) -> bool:
        """Whether the weights of `decoder`, the one it was made of, are still those."""
        if self._training != decoder.training or any([*now.values()] != then for now, then in self._children):
            return False
        if self._facts != _facts(self._holders) or self._added != self._count():
            return False
        # An allocator gives the address of a freed weight to the next one of its size, so equal addresses mean the
        # same weights only where none of the old ones was freed by the time the addresses were read.
        return not any(storage.expired() for storage in self._storages)

    def _count(self) -> tuple[int, list[Any]]:
        """Hooks, and forwards that stand in a module itself and not in its class."""
        return sum(map(len, self._hooks)), [own["forward"] for own in self._own if "forward" in own]


def _facts(holders: list[Mapping[str, Tensor | None]]) -> list[tuple[Any, ...] | None]:
    return [
        None if t is None else (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype)
        for held in holders
        for t in held.values()
    ]


def decode_in_memory(eager: EagerDecoder, z: Tensor, write: Callable[[int, Tensor], None], step: int) -> int:
    """Decode `z` in chunks of at most `step`, halving the chunk each time memory runs out.

    Args:
        eager: the decoder.
        z: `[k, c, h, w]`.
        write: receives the offset of a decoded chunk and the chunk, in order.
        step: first chunk size tried, >= 1.

    Returns:
        The chunk size that worked, so that the next call can begin with it.

    Raises:
        DecodeMemoryError: not even one frame fits.
    """
    start = 0
    while start < len(z):
        part = z[start : start + step]
        decoded, trouble = _attempt(eager, part)
        if decoded is None:
            release_memory(z.device if eager.device is None else eager.device)
            if len(part) == 1:
                raise DecodeMemoryError(
                    f"decoding one frame of latents {list(z.shape[1:])} needs more memory than is free: {trouble}. "
                    "Free memory on the device, use a smaller latent, or decode in a narrower dtype",
                    frames=1,
                    latent_shape=tuple(z.shape[1:]),
                )
            step = len(part) // 2
            continue
        write(start, decoded)
        start += len(part)
    return step


def _attempt(eager: EagerDecoder, part: Tensor) -> tuple[Tensor | None, str]:
    # The traceback of a failed attempt keeps its activations alive; leaving the except block before trying again frees
    # them.
    try:
        return eager(part), ""
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, str(error).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on either kind of device and from TensorRT too."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def release_memory(device: torch.device) -> None:
    """Give cached blocks of a CUDA device back, so that a retry does not fail on fragmentation."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
