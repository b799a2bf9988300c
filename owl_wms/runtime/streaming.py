"""`StreamDecode`: a streaming decoder latent by latent, with the state held for the caller.

Why it exists: a decoder with memory gives the right frame only if every step receives the state of the step before, and
a step that fails must be able to run again. So the state belongs to this object and to nothing else: a step reads it,
and it is replaced once the frames are there. If a compiled program fails, PyTorch makes the step from the same state.

Usage:
    stream = StreamDecode(decoder)
    frames = stream.step(latent)        # [b, c, h, w] -> [b, k, C, H, W]; one row per stream
    other = stream.fork()               # goes on from here by itself
    stream.reset()                      # the next latent begins a video
    stream.stats().reason               # what ran it and why
"""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.dynamo import uncompiled
from owl_wms.errors import ConfigError, LatentShapeError
from owl_wms.runtime.latents import check_video, check_video_shape
from owl_wms.runtime.programs import Progress, Toolchain
from owl_wms.runtime.stats import DecodeStats
from owl_wms.runtime.steps import Steps
from owl_wms.settings import TensorRTConfig
from owl_wms.state import State

_LOG = logging.getLogger("owl_wms.runtime")


class StreamDecode:
    """Decodes one latent of each of b streams per step.

    Thread-safe. The number of streams and the latents' size are those of the first step after `reset`. Weights that
    change end the video: the next step begins a new one, which is logged, since a state that old weights made must not
    meet new ones. Forks share the programs of their original.

    Args:
        decoder: a streaming decoder, such as `owl_wms.vae.taehv.TAEHVDecoder`; never changed.
        settings: None reads the environment over the defaults.
        strict: True raises FastPathError instead of falling back; None follows `settings.fallback_on_error`.
        check: look for values that are not finite in frames and state, as in `VideoDecode`.
        toolchain: what builds programs; None means TensorRT.
        progress: receives build events.

    Raises:
        ConfigError: the decoder has no state, or an unknown check.
    """

    def __init__(
        self,
        decoder: nn.Module,
        *,
        settings: TensorRTConfig | None = None,
        strict: bool | None = None,
        check: str = "auto",
        toolchain: Toolchain | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._steps = Steps(
            decoder,
            settings=TensorRTConfig.resolve() if settings is None else settings,
            strict=strict,
            check=check,
            toolchain=toolchain,
            progress=progress,
        )
        self._guard = threading.Lock()
        self._state: State = ()
        self._weights = 0  # the generation that made the state
        self._began: list[bool] = []
        self._shape: tuple[int, ...] | None = None

    @uncompiled
    def prepare(self, latent_shape: tuple[int, int, int], streams: int = 1) -> DecodeStats:
        """Finds or builds the program for latents `(c, h, w)` of so many streams now; returns the state after it.

        Raises:
            LatentShapeError: a shape that the decoder cannot take.
            FastPathError: in strict mode.
        """
        check_video_shape((streams, 1, *latent_shape), self._steps.channels)
        self._steps.follow_weights()
        self._steps.prepare((streams, *latent_shape))
        return self.stats()

    def stats(self) -> DecodeStats:
        """Returns what this stream and its forks did so far; `decodes` counts steps."""
        return self._steps.stats()

    @property
    def decoder(self) -> nn.Module:
        """The decoder as it was given."""
        return self._steps.decoder

    @property
    def device(self) -> torch.device | None:
        """The device that it computes on; None for a decoder without weights."""
        return self._steps.device

    @uncompiled
    @torch.no_grad()
    def step(self, latents: Tensor) -> Tensor:
        """Decodes the next latents of every stream.

        Args:
            latents: `[b, c, h, w]`, or `[b, n, c, h, w]` for n steps; any real dtype, any device.

        Returns:
            Frames `[b, k, C, H, W]` in the decoder's dtype and range, on the latents' device. Every latent gives
            `decoder.frames_per_latent` frames, the first one of a video only the last of them: the others come before
            the video begins.

        Raises:
            LatentShapeError: another rank or channel count, or another shape than the stream's.
            DecodeMemoryError: not even PyTorch has the memory for a step.
            FastPathError: in strict mode, or in a process forked from one that used the GPU.
            ConfigError: some streams begin with this step and others do not, so that their frames differ in number;
                `step_each` returns those.
        """
        with self._guard:
            if len(set(self._began)) > 1:
                raise ConfigError(
                    "some streams begin a video with this step and others do not, so they give different numbers of "
                    "frames; call step_each"
                )
            frames, first = self._advance(latents)
        return frames[:, first[0] :]

    @uncompiled
    @torch.no_grad()
    def step_each(self, latents: Tensor) -> list[Tensor]:
        """Does what `step` does and returns the frames `[k, C, H, W]` of each stream by themselves."""
        with self._guard:
            frames, first = self._advance(latents)
        return [row[start:] for row, start in zip(frames, first, strict=True)]

    def reset(self, stream: int | None = None) -> None:
        """Ends the video of every stream, or of one: the next latent begins another.

        Args:
            stream: row of the batch; None means all, which may then change in number and size.

        Raises:
            ConfigError: there is no such row.
        """
        with self._guard:
            if stream is None:
                self._state, self._began, self._shape = (), [], None
                return
            if not 0 <= stream < len(self._began):
                raise ConfigError(f"no stream {stream}; there are {len(self._began)} (the first step says how many)")
            self._began[stream] = False
            # Not in place: a fork or a caller may hold these tensors.
            keep = torch.ones(len(self._began), dtype=torch.bool, device="cpu")
            keep[stream] = False
            self._state = tuple(
                torch.where(keep.to(tensor.device).view(-1, *(1,) * (tensor.dim() - 1)), tensor, 0)
                for tensor in self._state
            )

    def fork(self) -> StreamDecode:
        """Returns another stream that goes on from here: what one of the two decodes, the other never sees.

        Nothing is copied here, for no step writes into a state that somebody holds.
        """
        other = StreamDecode.__new__(StreamDecode)
        with self._guard:
            other.__dict__.update(self.__dict__)
            other._guard = threading.Lock()
            other._began = list(self._began)
        return other

    # ---- copies

    def __copy__(self) -> StreamDecode:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamDecode:
        """Returns a stream of the copied decoder that goes on from here and finds its program in the cache."""
        decoder, place = copy.deepcopy((self.decoder, self._place()), memo)
        return _made_anew(decoder, self._steps.arguments(), place)

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_anew, (self.decoder, self._steps.arguments(), self._place())

    def _place(self) -> tuple[State, list[bool], tuple[int, ...] | None]:
        """Returns state, beginnings and shape; those of a new video if the state was made by other weights."""
        with self._guard:
            if self._steps.follow_weights() != self._weights:
                return (), [], None
            return self._state, list(self._began), self._shape

    # ---- a step

    def _advance(self, latents: Tensor) -> tuple[Tensor, list[int]]:
        """Returns all frames `[b, n t, C, H, W]` of these latents, and the first one that counts in each stream."""
        video = latents[:, None] if isinstance(latents, Tensor) and latents.dim() == 4 else latents
        check_video(video, self._steps.channels)
        shape = (len(video), *video.shape[2:])
        if not video.shape[0] or not video.shape[1]:
            self._refuse(tuple(latents.shape), "[b, c, h, w] or [b, n, c, h, w] with b and n of at least 1")
        if self._shape is not None and shape != self._shape:
            self._refuse(tuple(latents.shape), f"of streams {list(self._shape)}; call reset() before another size")
        weights = self._steps.follow_weights()
        known = weights == self._weights
        if self._state and not known:
            _LOG.warning("the decoder's weights changed: its streams begin anew, for their state was the old weights'")
        state, began = (self._state, self._began) if known else ((), [])
        decoded = []
        for latent in video.unbind(1):
            frames, state = self._steps.run(latent, state)
            decoded.append(frames.to(latents.device))
        # A step that failed never comes here, so the stream stands where it was.
        first = [0 if old else frames.shape[1] - 1 for old in began or [False] * len(video)]
        self._state, self._weights, self._shape, self._began = state, weights, shape, [True] * len(video)
        return torch.cat(decoded, 1) if len(decoded) > 1 else decoded[0], first

    def _refuse(self, got: tuple[int, ...], expected: str) -> None:
        raise LatentShapeError(f"latents must be {expected}; got {list(got)}", got=got, expected=expected)


def _made_anew(
    decoder: nn.Module, arguments: dict[str, Any], place: tuple[State, list[bool], tuple[int, ...] | None]
) -> StreamDecode:
    stream = StreamDecode(decoder, **arguments)
    stream._state, stream._began, stream._shape = place
    stream._weights = stream._steps.follow_weights()
    return stream
