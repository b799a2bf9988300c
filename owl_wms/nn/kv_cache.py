"""Keys and values of earlier frames, in storage that is allocated once.

A frame's slot in the storage *is* its rotary position, so positions cannot drift from what is stored, whatever is
dropped. When the slots run out, the frames that can still be seen move to the front and their keys are rotated by that
distance (`RotaryTable.shift`), so with `max_window` generation may go on for ever inside a table of n_frames positions.

The frames stored are constants to autograd. Frames passed while updates are off are seen by that pass and forgotten.

Usage:
    cache = KVCache(config, max_window=32)
    cache.enable_cache_updates();  model(context, ..., kv_cache=cache)
    cache.disable_cache_updates(); model(noisy_frame, ..., kv_cache=cache)
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from owl_wms.errors import ConfigError
from owl_wms.nn.rope import RotaryTable
from owl_wms.nn.setting import setting


class KVCache:
    """Rotated keys, and values, of the frames seen so far, for all layers.

    Args:
        config: n_layers, n_frames.
        max_window: frames that attention may span, the new one included; None is all, for at most n_frames frames.
        capacity: slots to allocate, in frames; by default n_frames, or twice `max_window` when that is less (so that
            moving to the front happens once in `max_window` frames).

    Device, dtype and batch are those of the first frames stored.

    Raises:
        ConfigError: a window or capacity outside 1 to n_frames, a capacity below the window, or a window for a model
            whose first frames are never forgotten.
    """

    def __init__(self, config: Any, *, max_window: int | None = None, capacity: int | None = None) -> None:
        limit = int(config.n_frames)
        if max_window is not None and not 1 <= max_window <= limit:
            raise ConfigError(f"max_window must be 1 to n_frames = {limit}, got {max_window}", key="max_window")
        sinks = int(setting(config, "sink_frames", 0))
        if sinks and max_window is not None:
            raise ConfigError(
                f"KVCache forgets frames, and a model with sink_frames = {sinks} may not forget the first; use "
                "RingCache, as av_caching and play do, or no max_window",
                key="max_window",
            )
        if capacity is None:
            capacity = limit if max_window is None else min(limit, 2 * max_window)
        if not (max_window or 1) <= capacity <= limit:
            raise ConfigError(
                f"capacity must be {max_window or 1} to n_frames = {limit}, got {capacity}", key="capacity"
            )
        self.max_window = max_window
        self.capacity = capacity
        self.should_update = True
        self.start = 0
        self.end = 0
        self._layers = int(config.n_layers)
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._tokens = 0

    def __len__(self) -> int:
        """Frames stored."""
        return self.end - self.start

    @property
    def largest_pass(self) -> int:
        """Most frames that one pass may add to a cache that is as full as it stays."""
        return self.capacity if self.max_window is None else self.capacity - self.max_window + 1

    @property
    def nbytes(self) -> int:
        """Bytes of storage allocated so far."""
        return sum(t.numel() * t.element_size() for t in (self._keys, self._values) if t is not None)

    def enable_cache_updates(self) -> None:
        """Stores the frames that are passed from now on."""
        self.should_update = True

    def disable_cache_updates(self) -> None:
        """Frames passed from now on are seen by their own pass only."""
        self.should_update = False

    def reset(self) -> None:
        """Forget all frames; their memory stays allocated."""
        self.start = self.end = 0

    def drop_oldest(self, frames: int) -> None:
        """Forget the first `frames` frames (0 to len)."""
        self._check_drop(frames)
        self.start += frames

    def drop_newest(self, frames: int) -> None:
        """Forget the last `frames` frames (0 to len); the next frame takes the position of the first one forgotten."""
        self._check_drop(frames)
        self.end -= frames

    def _check_drop(self, frames: int) -> None:
        if not 0 <= frames <= len(self):
            raise ValueError(f"can drop 0 to {len(self)} frames, got {frames}")

    @torch.inference_mode(False)  # see _allocate
    def clone(self) -> KVCache:
        """An independent copy, storage included."""
        twin = copy.copy(self)
        twin._keys = None if self._keys is None else self._keys.clone()
        twin._values = None if self._values is None else self._values.clone()
        return twin

    def reserve(self, frames: int, rope: RotaryTable) -> None:
        """Make sure that `frames` more fit behind the last one, moving frames to the front if need be.

        Raises:
            ConfigError: they cannot fit, because nothing may be forgotten.
        """
        if self.max_window is not None:
            self.start = max(self.start, self.end - self.max_window + 1)
        if self.end + frames <= self.capacity:
            return
        if len(self) + frames > self.capacity:
            raise ConfigError(
                f"{len(self)} frames are cached and {frames} more exceed the {self.capacity} positions available; "
                "set max_window, or pass fewer frames at once",
                key="max_window",
            )
        if self._keys is not None and self._values is not None:
            tokens, kept, back = self._tokens, len(self), -self.start
            old = slice(self.start * tokens, self.end * tokens)
            new = slice(0, kept * tokens)
            # Layer by layer: the copy that makes overlapping moves safe is then one layer, not the whole cache.
            for keys, values in zip(self._keys, self._values, strict=True):
                keys[:, :, new] = rope.shift(keys[:, :, old], back)
                values[:, :, new] = values[:, :, old].clone()
        self.start, self.end = 0, len(self)

    def extend(self, layer: int, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """The keys and values that a pass of new frames attends to in one layer.

        Args:
            layer: 0 to n_layers - 1.
            k: [b, heads, n * t, e], rotated at positions end to end + n.
            v: the shape of k.
            window: frames visible to a query, itself included; None is all.

        Returns:
            Keys and values [b, heads, m * t, e] of the oldest frame visible to the first query and everything after it.
        """
        if self._keys is None or self._values is None:
            self._allocate(k)
        assert self._keys is not None
        assert self._values is not None
        if (k.shape[0], k.shape[1], k.shape[3]) != (self._keys.shape[1], self._keys.shape[2], self._keys.shape[4]):
            raise ValueError(
                f"the cache holds [layers, b, heads, tokens, e] = {tuple(self._keys.shape)}, got keys {tuple(k.shape)}"
            )
        first = self.start if window is None else max(self.start, self.end - window + 1)
        old = slice(first * self._tokens, self.end * self._tokens)
        keys, values = self._keys[layer], self._values[layer]
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            # Storage is overwritten by later passes, so what autograd must remember cannot be a view of it.
            if self.should_update:
                self._write(keys, values, k.detach(), v.detach())
            return torch.cat([keys[:, :, old].to(k.dtype), k], dim=2), torch.cat(
                [values[:, :, old].to(v.dtype), v], dim=2
            )
        self._write(keys, values, k, v)
        both = slice(old.start, old.stop + k.shape[2])
        return keys[:, :, both], values[:, :, both]

    def _write(self, keys: Tensor, values: Tensor, k: Tensor, v: Tensor) -> None:
        place = slice(self.end * self._tokens, self.end * self._tokens + k.shape[2])
        keys[:, :, place] = k
        values[:, :, place] = v

    @torch.inference_mode(False)  # a tensor made in inference mode could not be written outside of it
    def _allocate(self, k: Tensor) -> None:
        b, heads, _, width = k.shape
        shape = (self._layers, b, heads, self.capacity * self._tokens, width)
        self._keys = torch.zeros(shape, dtype=k.dtype, device=k.device)
        self._values = torch.zeros(shape, dtype=k.dtype, device=k.device)

    def begin(self, frames: int, tokens: int, rope: RotaryTable) -> None:
        """Called by the transformer before its first layer."""
        if self._tokens not in (0, tokens):
            raise ValueError(f"the cache holds frames of {self._tokens} tokens, got {tokens}")
        self._tokens = tokens
        self.reserve(frames, rope)

    def positions(self, frames: int) -> Tensor:
        """Positions of the new frames, int64 [n]."""
        return torch.arange(self.end, self.end + frames)

    def commit(self, frames: int) -> None:
        """Called by the transformer after its last layer: keep the new frames if updates are on."""
        if self.should_update:
            self.end += frames
