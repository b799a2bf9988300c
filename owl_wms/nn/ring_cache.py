"""Keys and values of the last frames in rings of fixed size, for models that make one frame per pass.

Every layer has a ring with one slot per frame that it can see. Frame p lies in slot p mod size, so a new frame
overwrites the one that leaves the window, and nothing is ever moved. The position p is a tensor on the device and
every address and shape is fixed: one captured CUDA graph serves all frames. Softmax does not depend on the order of
the keys, so the order of the slots does not matter.

Keys are rotated at the absolute position p. Its angles are linear in p and computed in fp64, so p may exceed the
positions of the model's table: attention sees only differences.

A model with `sink_frames` never forgets the first frames of a video. Layers that see the whole window keep them in
slots of their own, and the other slots are the ring. Once the window has moved on, their keys are turned to the
positions just before it whenever it moves by a frame, each time from the keys as they were stored, so that roundings do
not add up. So attention sees the sinks and the last max_window - sink_frames frames, as one window without a gap.

Source: Efficient Streaming Language Models with Attention Sinks (Xiao et al. 2023, arXiv 2309.17453), section 3.2.

A pass writes its frame into slot p at once. Passes without `advance` overwrite each other there, so the denoising
passes of a frame leave no trace once the last pass of that frame has run.

Usage:
    ring = RingCache(config, max_window=24)
    model(noisy_frame, ..., kv_cache=ring)      # as often as wanted: sees the frames before, and itself
    model(kept_frame, ..., kv_cache=ring); ring.advance()
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from owl_wms.errors import ConfigError
from owl_wms.nn.kv_cache import KVCache
from owl_wms.nn.rope import RotaryTable
from owl_wms.nn.setting import setting


class RingCache:
    """Rotated keys, and values, of the frames that each layer can see; one frame per pass, without gradients.

    Args:
        config: of the model; n_layers, n_frames and sink_frames are read.
        max_window: frames that attention may span, the new one and the sinks included; 1 to n_frames, and more than
            sink_frames.
        round_to: lengths of attention are rounded up to multiples of this many frames while the ring fills, and what
            is not stored yet is masked. 1 attends to exactly the frames stored and needs no mask; a larger number
            gives fewer different shapes, for captured graphs.

    Attributes:
        shape: on which the shapes of the next pass depend: frames attended to, and whether some are masked.
        angles: cosines and sines of the pass that runs.
        sinks: how many of the first frames stay.

    Storage takes device, dtype and batch of the first frame.

    Raises:
        ConfigError: max_window outside 1 to n_frames, or no room in it beside the sinks.
    """

    def __init__(self, config: Any, *, max_window: int, round_to: int = 1) -> None:
        if not 1 <= max_window <= config.n_frames:
            raise ConfigError(
                f"max_window must be 1 to n_frames = {config.n_frames}, got {max_window}", key="max_window"
            )
        self.sinks = int(setting(config, "sink_frames", 0))
        if max_window <= self.sinks:
            raise ConfigError(
                f"max_window must be above the model's sink_frames = {self.sinks}, got {max_window}", key="max_window"
            )
        self.max_window = max_window
        self.should_update = True
        self.angles: tuple[Tensor, Tensor] | None = None
        self._round_to = round_to
        self._stored = 0
        # Read by passes instead of the count, which changes with every frame: a compiled pass is made anew for each
        # value that it reads.
        self.shape = self._shape()
        self._position: Tensor | None = None
        self._slot: Tensor | None = None  # in layers that see the whole window
        self._rope: RotaryTable | None = None
        self._keys: list[Tensor | None] = [None] * int(config.n_layers)
        self._values: list[Tensor | None] = [None] * int(config.n_layers)
        self._first: list[tuple[Tensor, Tensor]] = []  # storage of keys, and the keys of the sinks as they were stored

    def __len__(self) -> int:
        """Returns how many frames before the new one are visible."""
        return min(self._stored, self.max_window - 1)

    def _shape(self) -> tuple[int, bool]:
        seen = len(self) + 1
        rounded = min(self.max_window, -(-seen // self._round_to) * self._round_to)
        return rounded, rounded > seen

    @property
    def nbytes(self) -> int:
        """Returns the bytes of storage allocated so far."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values) if t is not None)

    def enable_cache_updates(self) -> None:
        """Sets `should_update`, which guidance reads; a ring stores the last pass before `advance` in any case."""
        self.should_update = True

    def disable_cache_updates(self) -> None:
        """See `enable_cache_updates`."""
        self.should_update = False

    def reset(self) -> None:
        """Forgets all frames; storage and its addresses stay."""
        self._stored, self._first = 0, []
        self.shape = self._shape()
        if self._position is not None:
            self._position.zero_()

    def advance(self) -> None:
        """Keeps the frame of the last pass; the next one takes the following position."""
        if self._position is None:
            raise ValueError("no frame has been passed yet")
        self._stored += 1
        self.shape = self._shape()
        self._position.add_(1)
        if self.sinks:
            self._turn_sinks()

    def _turn_sinks(self) -> None:
        """Moves the sinks to just before the window of the frame that comes next."""
        assert self._rope is not None
        if self._stored == self.sinks:
            whole = [keys for keys in self._keys if keys is not None and keys.shape[2] == self.max_window]
            self._first = [(keys, keys[:, :, : self.sinks].clone()) for keys in whole]
        later = self._stored - (self.max_window - 1)
        if later > 0:
            for keys, first in self._first:
                keys[:, :, : self.sinks] = self._rope.shift(first, later)

    def begin(self, frames: int, tokens: int, rope: RotaryTable) -> None:
        """Called by the transformer before its first layer.

        Raises:
            ValueError: more than one frame.
        """
        if frames != 1:
            raise ValueError(f"a ring takes one frame per pass, got {frames}")
        if self._position is None:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
                self._position = torch.full((1,), self._stored, dtype=torch.int64, device=rope.step.device)
        self.angles = rope.angles(self._position)
        self._rope = rope
        self._slot = self._position % self.max_window
        if self.sinks:
            turned = self.sinks + (self._position - self.sinks) % (self.max_window - self.sinks)
            self._slot = torch.where(self._position < self.sinks, self._position, turned)

    def positions(self, frames: int) -> Tensor:
        """Returns the position of the new frame in the video, int64 [1]; `begin` comes first."""
        assert self._position is not None
        return self._position

    def commit(self, frames: int) -> None:
        """Called by the transformer after its last layer; `advance` keeps the frame."""

    def extend(self, layer: int, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Stores a frame and returns what it attends to in one layer.

        Args:
            layer: 0 to n_layers - 1.
            k: [b, heads, t, e], rotated by `angles`.
            v: the shape of k.
            window: frames that the layer sees, the new one included; None is `max_window`.

        Returns:
            Keys and values [b, heads, m * t, e] of the visible slots, and which of them are stored, bool
            [1, 1, 1, m * t], or None for all.
        """
        size = self.max_window if window is None else min(window, self.max_window)
        keys, values = self._storage(layer, k, size)
        assert self._position is not None
        slot = self._slot if size == self.max_window else self._position % size
        assert slot is not None
        keys.index_copy_(2, slot, k.detach().unsqueeze(2))
        values.index_copy_(2, slot, v.detach().unsqueeze(2))
        visible, filling = self.shape
        visible = min(visible, size)
        mask = None
        if filling:
            stored = torch.arange(visible, device=k.device) <= self._position
            mask = stored[:, None].expand(visible, k.shape[2]).reshape(1, 1, 1, -1)
        return keys[:, :, :visible].flatten(2, 3), values[:, :, :visible].flatten(2, 3), mask

    def _storage(self, layer: int, k: Tensor, size: int) -> tuple[Tensor, Tensor]:
        keys, values = self._keys[layer], self._values[layer]
        shape = (k.shape[0], k.shape[1], size, *k.shape[2:])
        if keys is None or values is None:
            with torch.inference_mode(False):
                keys, values = (torch.zeros(shape, dtype=k.dtype, device=k.device) for _ in range(2))
            self._keys[layer], self._values[layer] = keys, values
        if tuple(keys.shape) != shape:
            raise ValueError(f"the ring holds [b, heads, frames, t, e] = {list(keys.shape)}, got {list(shape)}")
        return keys, values


Cache: TypeAlias = "KVCache | RingCache"
