"""`Generation`: the PyTorch decoder, the programs and the frame sizes that were made from one state of the weights.

Why one object: weights change while other threads decode and while a program is being built, which takes minutes. A
decode takes the generation of its moment and puts whatever it makes there. So everything made from old weights goes
away with them, whenever it is finished, and no program can meet weights that it was not made from.

Usage:
    generation = Generation(decoder)
    slot = generation.slot((128, 8, 8), device, make)       # `make()` gives the request, once
    generation.eager(z)                     # PyTorch's frames from the same weights
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import nn

from owl_wms.request import Request
from owl_wms.runtime.eager import EagerDecoder
from owl_wms.runtime.slot import Slot


class Generation:
    """One state of a decoder's weights and everything made from it.

    Attributes:
        eager: the PyTorch decoder; `eager.stamp` says whether the caller's weights are still these.
        dtype: of every float parameter and buffer of the decoder; None where there are several, or none.
        frame_shapes: latent `(c, h, w)` -> frame `(C, H, W)`, as far as decodes have shown.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self.eager = EagerDecoder(decoder)
        dtypes = {t.dtype for t in (*decoder.parameters(), *decoder.buffers()) if t.is_floating_point()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        self.frame_shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._slots: dict[tuple[tuple[int, ...], torch.device], Slot] = {}
        self._guard = threading.Lock()

    def slot(self, latent: tuple[int, ...], device: torch.device, make: Callable[[], Request]) -> Slot:
        """The one slot for latents `(c, h, w)` on `device`; `make` is called when there is none yet."""
        with self._guard:
            slot = self._slots.get((latent, device))
            if slot is None:
                slot = self._slots[latent, device] = Slot(make())
            return slot

    def slots(self) -> list[Slot]:
        """Every slot so far, oldest first."""
        with self._guard:
            return list(self._slots.values())

    def has_programs(self) -> bool:
        """Returns whether any of its slots holds a program."""
        return any(slot.loaded is not None for slot in self.slots())

    def carried_to(self, decoder: nn.Module) -> Generation:
        """A generation of `decoder`, whose weights have the same values elsewhere, with the programs of this one."""
        moved = Generation(decoder)
        moved.frame_shapes = self.frame_shapes
        with self._guard:
            moved._slots = dict(self._slots)
        return moved

    def forget_programs(self) -> list[Slot]:
        """For a forked child, where programs do not run and locks that another thread held stay locked for ever.

        Returns:
            What was forgotten, to be held: TensorRT aborts the process that destroys an engine without its GPU.
        """
        self._guard = threading.Lock()
        forgotten, self._slots = list(self._slots.values()), {}
        return forgotten
