"""`owl_wms.accelerate` for decoders of streams: whole clips, latent by latent through a compiled step.

Why it exists: pipelines hand over whole clips. The program is that of one step, so a clip is streamed here, from its
own beginning. What a program may not decode, the caller's own code does.

`AcceleratedStream` stands in the place of a `TAEHVDecoder`. `AcceleratedVideo` stands in the place of the method
`decode_video` of the author's module, whose decoder is not called as a module there.

Usage:
    vae.taehv = owl_wms.accelerate(vae.taehv)
    vae.taehv.decode_video.stats()
    del vae.taehv.decode_video                  # and back
"""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.dynamo import uncompiled
from owl_wms.runtime.accelerated import (
    MAX_PROGRAMS,
    AcceleratedDecoder,
    AcceleratedStats,
    Options,
    altered,
    why_pytorch,
    without_hooks,
)
from owl_wms.runtime.images import ImageDecode
from owl_wms.runtime.steps import Steps, frames_of
from owl_wms.state import State
from owl_wms.vae.taehv_modules import METHOD, decoder_within, gives_same_frames

_PLAIN = (bool, int, float, str, tuple)
_ARGUMENTS = ("parallel", "show_progress_bar")
"""Arguments of `decode_video` that do not change the frames."""


class VideoCalls:
    """Decodes whole clips, by a program or by the caller's own function, and counts the calls.

    Args:
        decoder: a decoder of streams in eval mode.
        options: of `owl_wms.accelerate`.
    """

    def __init__(self, decoder: nn.Module, options: Options) -> None:
        self.decoder, self.options = decoder, options
        self.pytorch: Counter[str] = Counter()
        self.program_calls = 0
        self.decodes: dict[int, ImageDecode] = {}  # programs of single pictures: none here
        self._steps: Steps | None = None
        self._guard = threading.Lock()

    def stats(self) -> AcceleratedStats:
        """Returns counts of what happened so far."""
        return AcceleratedStats(
            calls=self.program_calls + sum(self.pytorch.values()),
            program_calls=self.program_calls,
            pytorch=dict(self.pytorch),
            ways={},
            programs={} if self._steps is None else {0: self._steps.stats()},
        )

    def decode(self, latents: Any, reason: str, original: Callable[[], Any]) -> Any:
        """Returns the frames of whole clips.

        Args:
            latents: `[b, n, c, h, w]`.
            reason: why a program may not decode; empty if it may.
            original: decodes by the caller's own code.
        """
        if not reason:
            with self._guard, torch.no_grad():  # a change of weights in another thread must not fall within a clip
                frames = self._by_steps(latents)
            if frames is not None:
                self.program_calls += 1
                return frames
            reason = "no program"
        self.pytorch[reason] += 1
        return original()

    def _by_steps(self, latents: Tensor) -> Tensor | None:
        shape = (len(latents), *latents.shape[2:])
        if self._steps is None:
            options = self.options
            self._steps = Steps(
                self.decoder, settings=options.settings, strict=options.strict, toolchain=options.toolchain
            )
        steps = self._steps
        steps.follow_weights()
        if not self._has_program(steps, shape):
            return None
        made: Tensor | None = None
        done = 0
        state: State = ()
        for latent in latents.unbind(1):
            frames, state = steps.run(latent, state)
            if made is None:  # not concatenated at the end: that would need the memory of the clip twice
                frames = frames[:, -1:]
                made = frames.new_empty((len(frames), frames_of(self.decoder, latents.shape[1]), *frames.shape[2:]))
            made[:, done : done + frames.shape[1]] = frames
            done += frames.shape[1]
        return made

    def _has_program(self, steps: Steps, shape: tuple[int, ...]) -> bool:
        sizes = self.options.batch_sizes
        if sizes and shape[0] not in sizes:
            return False
        ready = sum(program["state"] == "ready" for program in steps.stats().programs)
        return (steps.state(shape) != "new" or ready < MAX_PROGRAMS) and steps.has_program(shape)


def why_not_streamed(module: nn.Module, layers: nn.Module, channels: Any, latents: Any) -> str:
    """Returns why a clip is the caller's own to decode; empty where a program may.

    Args:
        module: whose mode and parameters count.
        layers: the layers of the decoder, of which a program leaves hooks out.
        channels: of the latents that it takes.
        latents: whatever was handed over.
    """
    reason = why_pytorch(module, latents, dims=5)
    if reason:
        return reason
    if torch.is_autocast_enabled(latents.device.type):
        return "autocast"
    weight = next(layers.parameters())
    if latents.dtype is not weight.dtype or latents.device != weight.device or latents.shape[2] != channels:
        return "latents of another dtype, device or number of channels"
    return "hooks" if any(altered(layer) for layer in layers.children()) else ""


class AcceleratedStream(AcceleratedDecoder):
    """Decodes whole clips like the decoder of streams that it stands for; see `AcceleratedDecoder`.

    `step` and `advance` are the wrapped decoder's own: for a stream there is `owl_wms.runtime.StreamDecode`.
    """

    _state: Any

    @staticmethod
    def _begin(original: nn.Module, options: Options) -> Any:
        return VideoCalls(without_hooks(original), options)

    def stats(self) -> AcceleratedStats:
        """Returns counts of what happened so far."""
        result: AcceleratedStats = self._state.stats()
        return result

    @uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Decode latents `[b, n, c, h, w]`, the only argument; the wrapped decoder is handed whatever else it takes."""
        if not args and len(kwargs) == 1:
            args, kwargs = self._positional(kwargs)
        z: Any = args[0] if len(args) == 1 and not kwargs else None
        channels = self._original.latent_channels
        reason = "further arguments" if z is None else why_not_streamed(self._original, self._original, channels, z)
        return self._state.decode(z, reason, lambda: self._original.forward(*args, **kwargs))

    def __getitem__(self, index: Any) -> Any:
        return self._original[index]  # type: ignore[index]

    def __len__(self) -> int:
        return len(self._original)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._original)  # type: ignore[call-overload,no-any-return]


class AcceleratedVideo:
    """Stands for the method `decode_video` of one module; set on the module itself, so that `del` takes it off.

    Args:
        module: that `taehv_modules.decoder_within` and `gives_same_frames` recognise.
        options: of `owl_wms.accelerate`.
        decoder: of `decoder_within`, if both were asked already.
    """

    def __init__(self, module: nn.Module, options: Options, decoder: nn.Module | None = None) -> None:
        self.module, self.options = module, options
        self._calls = None if decoder is None else VideoCalls(decoder, options)
        self._made_of = () if decoder is None else _parts(module)

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Decodes `[b, n, c, h, w]` to frames in [0, 1], as the method of the class does with the same arguments."""
        method = getattr(type(self.module), METHOD)

        def original() -> Any:
            return method(self.module, *args, **kwargs)

        calls = self._current()
        if calls is None:
            return original()
        try:
            given = inspect.signature(method).bind(self.module, *args, **kwargs).arguments
        except TypeError:
            return original()  # which says what is wrong with the arguments
        _, (_, latents), *further = given.items()
        if not {name for name, _ in further} <= set(_ARGUMENTS):
            return calls.decode(latents, "further arguments", original)
        layers: Any = self.module.decoder
        channels = getattr(calls.decoder, "latent_channels", None)
        return calls.decode(latents, why_not_streamed(self.module, layers, channels, latents), original)

    def stats(self) -> AcceleratedStats:
        """Returns counts of what happened since layers were last exchanged."""
        calls = self._current()
        return VideoCalls(self.module, self.options).stats() if calls is None else calls.stats()

    def _current(self) -> VideoCalls | None:
        """Returns the calls for the layers as they are now; None if they are no TAEHV's any more."""
        made_of = _parts(self.module)
        if made_of != self._made_of:
            decoder = decoder_within(self.module) if gives_same_frames(self.module) else None
            self._calls = None if decoder is None else VideoCalls(decoder, self.options)
            self._made_of = made_of
        return self._calls

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "options": self.options}  # programs belong to this process and this module

    def __setstate__(self, state: dict[str, Any]) -> None:
        AcceleratedVideo.__init__(self, **state)


def _parts(module: nn.Module) -> tuple[Any, ...]:
    """Returns what a program was made of besides the values of weights: layers, and plain attributes such as counts."""
    layers: Any = module.decoder
    plain = tuple((name, value) for name, value in vars(module).items() if isinstance(value, _PLAIN))
    return (*layers.modules(), *(item for item in plain if item[0] != "training"))
