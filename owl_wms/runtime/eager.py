"""Runs the caller's decoder in PyTorch, with weight norm folded; it decodes wherever no program does.

Why it exists: the caller's module must never change (it may be in train mode, frozen, wrapped or still needed with its
parametrizations), and memory that runs out in the middle of a decode should cost time, not the run.

Usage:
    eager = EagerDecoder(decoder)
    x = eager(z)                                   # [B, c, h, w] -> [B, C, H, W]
    decode_in_memory(eager, z, write=..., step=8)   # halves the chunk when memory runs out
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from owl_wms.errors import ConfigError, DecodeMemoryError, FastPathError
from owl_wms.interrupts import raise_interrupt
from owl_wms.memory import is_out_of_memory
from owl_wms.runtime.latents import latent_channels
from owl_wms.runtime.stamp import WeightsStamp, hindrance, hooks_for_all
from owl_wms.vae import fold_weight_norm
from owl_wms.vae.fold import shared_hooks


class EagerDecoder:
    """A decoder ready to run, sharing the caller's weights where nothing had to be folded.

    Attributes:
        module: the decoder without weight norm, in eval mode; parts of an eval-mode decoder keep their own modes.
        device, dtype: of its parameters; input is converted to both.
        channels: latent channels, None when the decoder does not say.
        stamp: identity of the caller's weights at the time.
        hindrance: why PyTorch alone may decode, whatever can be compiled; None when nothing is in the way.

    Raises:
        ConfigError: the weights have no values yet, or a decoder in train mode cannot be copied.
    """

    def __init__(self, decoder: nn.Module) -> None:
        # Take the stamp before reading the weights. If a weight changes while we read, the next comparison finds a
        # difference. In the other order the change would go unnoticed.
        self.stamp = WeightsStamp(decoder)
        inner = unwrap(decoder)
        self.hindrance = hindrance(inner)
        # Hooks of all modules would not see the modules that folding leaves out.
        self.module = inner if hooks_for_all() and not inner.training else _runnable(inner)
        tensor = next((t for t in (*inner.parameters(), *inner.buffers()) if t.is_floating_point()), None)
        self.device: torch.device | None = None if tensor is None else tensor.device
        if self.device is not None and self.device.type == "meta":
            raise ConfigError("the decoder is on the meta device, where weights have no values: load them first")
        self.dtype: torch.dtype | None = None if tensor is None else tensor.dtype
        self.channels = latent_channels(inner)

    def raise_hindrance(self) -> None:
        """Raises FastPathError if PyTorch alone may decode."""
        if self.hindrance is not None:
            plain = "decode with a copy whose weights are plain tensors"
            remedy = plain if self.stamp.blind else "remove the hooks, or call decoder.eval()"
            raise FastPathError("export", self.hindrance, remedy)

    def __call__(self, z: Tensor) -> Tensor:
        """`[B, c, h, w]`, any real dtype and device, to `[B, C, H, W]` in the decoder's; no gradients, autocast off."""
        z = z.to(device=self.device, dtype=self.dtype or z.dtype)
        # A surrounding autocast would make the frames depend on the caller's context.
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            frames: Tensor = self.module(z)
            return frames


@torch.inference_mode(False)  # autograd could not save weights that were folded in a caller's inference mode
def _runnable(inner: nn.Module) -> nn.Module:
    """Returns `inner` in eval mode without weight norm: itself where it is that already, else a copy."""
    try:
        if any(parametrize.is_parametrized(module) for module in inner.modules()):
            plain = fold_weight_norm(inner)
            return plain.eval() if inner.training else plain
        if inner.training:
            shared = {id(tensor): tensor for tensor in (*inner.parameters(), *inner.buffers())}
            # The structure is copied, the tensors are not.
            return copy.deepcopy(inner, {**shared_hooks(inner), **shared}).eval()
    except Exception as error:  # what a module holds decides what copying it raises
        raise_interrupt(error)
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


def decode_with_gradients(eager: EagerDecoder, decoder: nn.Module, z: Tensor, step: int) -> Tensor:
    """Decode `z` `[k, c, h, w]` in chunks of `step` so that gradients reach it; returns `[k, C, H, W]`.

    An eval-mode decoder runs as the caller has it, so that its weights receive gradients too where they ask for them.

    Raises:
        DecodeMemoryError: the activations that a backward pass needs do not fit.
    """
    inner = unwrap(decoder)
    module = eager.module if inner.training else inner
    z = z.to(device=eager.device, dtype=eager.dtype or z.dtype)
    try:
        with torch.autocast(z.device.type, enabled=False):
            # Zero frames have a shape too, and one that was not asked for gives it.
            given = z if len(z) else torch.cat([z, z.new_zeros(1, *z.shape[1:])])
            return torch.cat([module(chunk) for chunk in given.split(step)])[: len(z)]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise DecodeMemoryError(
            f"decoding {len(z)} frames with gradients needs more memory than is free: {str(error).splitlines()[0]}. "
            "Decode fewer frames at a time, or latents that ask for no gradient",
            frames=len(z),
            latent_shape=tuple(z.shape[1:]),
        ) from None


def _attempt(eager: EagerDecoder, part: Tensor) -> tuple[Tensor | None, str]:
    # The traceback of a failed attempt keeps its activations alive; leaving the except block before trying again frees
    # them.
    try:
        return eager(part), ""
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, str(error).splitlines()[0]


def release_memory(device: torch.device) -> None:
    """Give cached blocks of a CUDA device back, so that a retry does not fail on fragmentation."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()
