"""`ImageDecode`: one batch of images by its program, in the caller's dtype, or None where PyTorch has to decode.

Why beside `VideoDecode`: a decoder that stands inside somebody else's model is called once per image, and expects back
what it would have computed. So nothing is stacked into clips, the caller keeps his own PyTorch path, and a call costs
little beside the program.

The weights are compared with those of the program after the launch, while the GPU works, and before anything waits for
it. This order is safe for three reasons. A program computes from its own copy of the weights, so it reads nothing that
could change meanwhile. Its frames reach the caller only if the comparison finds every weight as it was when the program
was made; otherwise they are thrown away and decoded again. And a launch changes nothing that outlives the call but the
program's own buffers, which every run overwrites. A change that another thread makes after the comparison comes after
this call.

Usage:
    decode = ImageDecode(decoder, batch_size=4, settings=settings)
    frames = decode.images(z, torch.bfloat16)       # z [k <= 4, c, h, w] -> [k, C, H, W], or None
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from owl_wms.errors import DecodeMemoryError
from owl_wms.runtime.decode import VideoDecode
from owl_wms.runtime.decoding import count_failure, count_run_failure, non_finite_failure, run_failure
from owl_wms.runtime.generation import Generation
from owl_wms.runtime.slot import Slot, all_finite
from owl_wms.runtime.stamp import unseen

_TRAINING = operator.itemgetter("training")
_Place: TypeAlias = tuple[torch.device, tuple[int, ...]]
"""Device and shape of the latents."""


class _Found(NamedTuple):
    """The program of one place: what it was made from, its state, and the attributes of the decoder's modules."""

    generation: Generation
    slot: Slot
    modules: list[dict[str, Any]]


class ImageDecode(VideoDecode):
    """Decodes image batches by programs; arguments as for `VideoDecode`."""

    def __init__(self, decoder: nn.Module, **options: Any) -> None:
        super().__init__(decoder, **options)
        self._found: dict[_Place, _Found] = {}

    def images(self, z: Tensor, dtype: torch.dtype, cast: bool = False) -> Tensor | None:
        """Decodes `[k, c, h, w]`, k <= batch_size, on the decoder's device; no gradients.

        All that need not come before the launch comes after it: after a wait for the GPU, the processor's caches hold
        little of this code, so that each step before the launch costs ten times what it costs in a loop.

        Args:
            z: latents in the dtype of every weight; in any float dtype with `cast`.
            dtype: of the result.
            cast: the caller's PyTorch path converts latents and weights, as autocast does.

        Returns:
            `[k, C, H, W]` in `dtype`; None where there is no program, where it failed, and where a module of the
            decoder is in train mode: the caller decodes then.

        Raises:
            FastPathError: in strict mode.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.images(z, dtype, cast)
        place = z.device, z.shape
        for _ in range(2):  # weights that changed since the last call cost one more look
            found = self._found.get(place) or self._find_program(place)
            if found is not None and not cast and found.generation.dtype is not z.dtype:
                found = self._find_program(place)  # the weights may have been cast since
                if found is not None and found.generation.dtype is not z.dtype:
                    return None
            if found is None:
                return None
            generation, slot, modules = found
            if slot.state != "ready":
                self._found.pop(place, None)
                return None
            frames = self._launch(slot, z, dtype)
            # Looked at in the caller's dtype, where a value that the program could hold may be infinity.
            look = slot.wants_check(self.check, generation.eager.dtype)
            finite = all_finite(frames) if look and frames is not None else None
            if any(map(_TRAINING, modules)):
                return None
            if generation.eager.stamp.matches(self.decoder):
                if frames is not None and finite is not None and not bool(finite):
                    frames = self._finite(generation, slot, z, frames)
                self._ledger.add("fallbacks", int(frames is None))
                self._ledger.add("frames", 0 if frames is None else len(z))
                return frames
            self._found.clear()
        return None

    def _launch(self, slot: Slot, z: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Runs the program without waiting for it; None if it failed, which is counted."""
        taken: list[Tensor] = []

        def take(frames: Tensor) -> None:
            # The next run, of another thread perhaps, uses the program's buffers again. A CUDA graph's frames are a
            # copy already; the part of a padded batch would keep the whole in memory.
            copied = len(z) == self.batch_size and getattr(slot.loaded.program, "graphed", False)  # type: ignore[union-attr]
            taken.append(frames.to(dtype, copy=not copied))

        try:
            slot.run(z.contiguous(), take, False)
        except DecodeMemoryError:
            raise
        except Exception as error:  # whatever TensorRT or CUDA raised, PyTorch decodes this batch
            failure = run_failure(error, lambda: self._rebuild(slot))
        else:
            self._ledger.add("chunks_program")
            return taken[0]
        count_run_failure(slot, self._ledger, failure, z, strict=self.strict)
        return None

    def _finite(self, generation: Generation, slot: Slot, z: Tensor, frames: Tensor) -> Tensor:
        """Returns PyTorch's frames instead of those of the program, if it has values that only there are not finite."""
        truth = generation.eager(z).to(frames.dtype)
        worse = int((truth.isfinite() & ~frames.isfinite()).sum())
        if not worse:
            return frames
        count_failure(slot, self._ledger, non_finite_failure(slot, worse), "non-finite", strict=self.strict)
        return truth

    def _find_program(self, place: _Place) -> _Found | None:
        """Finds or builds the program of one latent shape; None where there is none."""
        device, one = place[0], place[1][1:]
        tensors = (*self.decoder.parameters(), *self.decoder.buffers())
        if any(tensor.device != device for tensor in tensors):  # some offloading leaves weights elsewhere, or nowhere
            return None
        if any(module.training for module in self.decoder.modules()) or unseen(self.decoder) is not None:
            return None
        generation = self._current()
        slot = self._slot(generation, one, device)
        if not self._ready(generation.eager, slot):
            return None
        found = _Found(generation, slot, [vars(module) for module in self.decoder.modules()])
        if self._generation is generation:  # not one that serves a single call during a capture
            self._found[place] = found
        return found

    def has_program(self, one: tuple[int, ...]) -> bool:
        """Returns whether latents `(c, h, w)` have a program in memory."""
        generation = self._generation
        slots = [] if generation is None else generation.slots()
        return any(slot.state == "ready" and slot.request.input_shape[1:] == one for slot in slots)

    # ---- weights that move

    def weights(self) -> list[Tensor] | None:
        """The decoder's parameters and buffers as they are, if programs stand for them; else None."""
        generation = self._generation
        if generation is None or not generation.eager.stamp.matches(self.decoder):
            return None
        return [tensor.detach() for tensor in (*self.decoder.parameters(), *self.decoder.buffers())]

    def carry(self, before: Sequence[Tensor]) -> None:
        """Keep the programs although every weight was moved: they stand for values, and those are the same.

        Args:
            before: what `weights` returned before the move.
        """
        after = [*self.decoder.parameters(), *self.decoder.buffers()]
        if len(after) != len(before) or any(tensor.is_meta for tensor in after):
            return
        pairs = zip(after, before, strict=True)
        if all(a.dtype == b.dtype and torch.equal(a.detach(), b.to(a.device)) for a, b in pairs):
            with self._guard:
                if self._generation is not None:
                    self._generation = self._generation.carried_to(self.decoder)
        self._found.clear()

    def _reset_in_child(self) -> None:
        super()._reset_in_child()
        self._found = {}
