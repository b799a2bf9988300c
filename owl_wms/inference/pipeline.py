"""The interactive pipeline: controls in, one decoded frame out, with the model's history in a ring.

A frame is denoised against the ring, decoded alone (batch 1), copied to the CPU, and then stored: the pass that stores
it is queued behind the copy, so on a GPU it runs while the caller compresses and sends the picture. On a GPU both
passes are CUDA graphs (`owl_wms.sampling.frames`).

Usage:
    pipeline = InteractivePipeline(model.core, decode, [context], image_scale=0.63, steps=4)
    frame = pipeline(mouse, buttons)         # Frame: uint8 [H, W, 3] and timings
    pipeline.restart()
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from owl_wms.errors import ConfigError
from owl_wms.inference.context import Context
from owl_wms.inference.controls import GAME_CONTROLS, Button
from owl_wms.inference.pixels import to_uint8
from owl_wms.inference.source import Frame, describe_decode
from owl_wms.models.latents import LatentSpace, Whitener
from owl_wms.runtime import StreamDecode, stream_bytes
from owl_wms.sampling import Guidance, custom_deltas, get_sd3_euler
from owl_wms.sampling.captured import CALLS_BEFORE, Captured
from owl_wms.sampling.frames import FrameLoop
from owl_wms.timing import Marks

MAX_STEPS = 20
# A minute of play at 60 frames/s would otherwise attend to 3600 frames; latency would grow until the positions ran out.
DEFAULT_WINDOW = 64


class InteractivePipeline:
    """A causal world model and its decoder, played frame by frame.

    Args:
        core: a GameRFTCore in eval mode, already on its device and in its dtype.
        decode: [1, 1, c, h, w] to [1, 1, C, H, W], or to bytes [1, 1, H, W, C];
            `make_batched_decode_fn(decoder, batch_size=1, output="uint8")` of the bridge. Or a StreamDecode, whose
            decoder may make several pictures of one latent. Every player has a stream of their own, which has seen the
            beginning too: the pictures are those of the whole clip.
        contexts: beginnings to choose from, in the model's scale; see `owl_wms.inference.context`.
        image_scale: factor by which latents were divided for the model.
        whitener: transform that was applied after that, or None.
        steps: per frame, 1 to 20; without effect if `schedule` is given.
        order: of the steps, 1 or 2; see `owl_wms.sampling.schedule.take_step`.
        schedule: noise levels of a distilled model, for example [1.0, 0.5].
        cfg_scale: guidance; anything but 1 doubles the model's work.
        max_level: highest noise level that the model is told; see `owl_wms.sampling.guidance`.
        noise_prev: noise level at which history is remembered, 0 to 1.
        max_window: frames that attention spans; by default 64, or the model's n_frames when that is less.
        seed: of the noise and of the choice of beginnings.
        bgr: pictures with blue first.
        controls: the model's buttons; None is the game's.
        new_context: makes the beginning of a seed's world; None takes one of `contexts`.

    Raises:
        ConfigError: not causal, no beginnings, a number out of range, or controls for another number of buttons.
    """

    def __init__(
        self,
        core: Any,
        decode: Callable[[Tensor], Tensor] | StreamDecode,
        contexts: Sequence[Context],
        *,
        image_scale: float = 1.0,
        whitener: Whitener | None = None,
        steps: int = 4,
        order: int = 1,
        schedule: Sequence[float] | None = None,
        cfg_scale: float = 1.0,
        max_level: float = 1.0,
        noise_prev: float = 0.2,
        max_window: int | None = None,
        seed: int = 0,
        bgr: bool = False,
        controls: tuple[Button, ...] | None = None,
        new_context: Callable[[int], Context] | None = None,
    ) -> None:
        if not core.config.causal:
            raise ConfigError(
                "playing needs a causal model, in which no frame looks at later ones (model.causal: true)",
                key="model.causal",
            )
        if not contexts:
            raise ConfigError("at least one context to begin from is needed, got none", key="context")
        if not 1 <= steps <= MAX_STEPS or not 0 <= noise_prev <= 1:
            raise ConfigError(f"steps must be 1 to {MAX_STEPS} and noise_prev 0 to 1, got {steps} and {noise_prev}")
        self.controls = GAME_CONTROLS if controls is None else controls
        if len(self.controls) != core.config.n_buttons:
            raise ConfigError(
                f"the model has {core.config.n_buttons} buttons, got controls for {len(self.controls)}", key="controls"
            )
        self._new_context = new_context
        parameter = next(core.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.image_scale, self.noise_prev, self.bgr = image_scale, noise_prev, bgr
        self._space = LatentSpace(image_scale, whitener).to(self.device)
        self._core, self._contexts = core, list(contexts)
        self._decode: Any = decode
        self._guidance = Guidance(model=core, scale=cfg_scale, max_level=max_level)
        self._window = min(core.config.n_frames, DEFAULT_WINDOW) if max_window is None else max_window
        self._schedule = None if schedule is None else custom_deltas(schedule)
        self._steps, self._order = steps, order
        self._begin_player(seed)

    def _begin_player(self, seed: int) -> None:
        """Makes everything that belongs to one player: history, noise, the picture on its way to the host."""
        self._seed = seed
        self._loop = FrameLoop(
            self._guidance,
            deltas=self._deltas(),
            noise_prev=self.noise_prev,
            max_window=self._window,
            order=self._order,
        )
        self._pixels = Captured(lambda frames: (self._to_bytes(frames),), allowed=self._loop.captures)
        self._stream = self._decode.fork() if isinstance(self._decode, StreamDecode) else None
        self._seen: StreamDecode | None = None  # a stream that has decoded the beginning and nothing else
        self._random = torch.Generator(self.device)
        self._begin = self._contexts[0]
        self._host: Tensor | None = None
        self._index = 0
        self.restart(0)
        if self._loop.captures:
            self._warm_up()

    def _warm_up(self) -> None:
        """Makes every graph that playing needs, so that the first frames do not falter; leaves no trace."""
        still = torch.zeros(2), torch.zeros(self._core.config.n_buttons)
        for _ in range(self._window + CALLS_BEFORE + 1):  # until the ring is full, and then until that is captured
            self(*still)
        self.restart()

    def _deltas(self) -> Tensor:
        return get_sd3_euler(self._steps) if self._schedule is None else self._schedule

    @property
    def steps(self) -> int:
        """Steps per frame."""
        return self._steps if self._schedule is None else len(self._schedule)

    @property
    def replayed(self) -> int:
        """Returns how many passes were replayed from CUDA graphs so far."""
        return self._loop.replayed

    @torch.no_grad()
    def restart(self, which: int | None = None) -> None:
        """Begins again, with the same noise.

        Args:
            which: index of the beginning; None is the one before.
        """
        if which is not None and self._contexts[which] is not self._begin:
            self._begin, self._seen = self._contexts[which], None
        context = self._begin.to(self.device, self.dtype)
        self._random.manual_seed(self._seed)
        self._loop.begin(context.latents, context.mouse, context.buttons, self._random)
        self._index = 0
        if self._stream is not None:
            if self._seen is None:
                self._stream.reset()
                for latent in self._space.to_stored(context.latents).unbind(1):
                    self._stream.step(latent)
                self._seen = self._stream
            self._stream = self._seen.fork()

    def new_world(self, seed: int) -> None:
        """See `owl_wms.inference.source.Source`: the seed gives beginning and noise."""
        made = self._contexts[seed % len(self._contexts)] if self._new_context is None else self._new_context(seed)
        self._seed, self._begin, self._seen = seed, made, None
        self.restart()

    @torch.no_grad()
    def __call__(self, mouse: Tensor, buttons: Tensor) -> Frame:
        """The next frame.

        Args:
            mouse: [2] movement during the frame.
            buttons: [n_buttons] bool or 0/1.

        Returns:
            The frame; its times are of the device's own work, so on a GPU they add up to less than the wall time.
        """
        moved, held = (a.to(self.device, self.dtype).view(1, 1, -1) for a in (mouse, buttons))
        clock = Marks(self.device)
        clock.mark()
        latent = self._loop.denoise(moved, held, self._random)
        clock.mark()
        stored = self._space.to_stored(latent)
        decoded = self._decode(stored) if self._stream is None else self._stream.step(stored)
        images = self._to_host(self._pixels(None, decoded[0])[0])
        clock.mark()
        self._loop.remember(latent, moved, held, self._random)
        clock.wait()
        image, *later = images.numpy().copy()
        index, self._index = self._index, self._index + len(images)
        return Frame(
            image=image,
            index=index,
            model_ms=clock.between(0, 1),
            decode_ms=clock.between(1, 2),
            later=tuple(later),
        )

    def _to_bytes(self, frames: Tensor) -> Tensor:
        """Colour [k, H, W, 3] of frames [k, C, H, W], or of bytes [k, H, W, C]."""
        if self._stream is not None:
            frames = stream_bytes(frames)
        if frames.dtype != torch.uint8:
            return torch.stack([to_uint8(frame, bgr=self.bgr) for frame in frames])
        colour = frames[..., :3].flip(-1) if self.bgr else frames[..., :3]
        return colour.contiguous()

    def _to_host(self, image: Tensor) -> Tensor:
        """A queued copy into pinned memory; ready after the clock's last mark, overwritten by the next frame."""
        if image.device.type != "cuda":
            return image
        if self._host is None or self._host.shape != image.shape:
            self._host = torch.empty(image.shape, dtype=image.dtype, pin_memory=True)
        return self._host.copy_(image, non_blocking=True)

    def twin(self, number: int) -> InteractivePipeline:
        """Another player's pipeline: model, decoder and beginnings are shared, history and noise are its own.

        Args:
            number: added to the seed. Frames of twins must not be made by two threads at once.
        """
        twin = copy.copy(self)
        twin._begin_player(self._seed + number)
        return twin

    def change_steps(self, by: int) -> int:
        """More or fewer steps per frame, kept in 1 to 20; a custom schedule stays as it is."""
        if self._schedule is None:
            self._steps = max(1, min(MAX_STEPS, self._steps + by))
            self._loop.deltas = self._deltas()
        return self.steps

    def describe(self) -> dict[str, Any]:
        """See `owl_wms.inference.source.Source`."""
        config = self._core.config
        parameters = sum(p.numel() for p in self._core.parameters())
        name = f"{config.model_id}, {parameters / 1e6:.1f} M parameters"
        about = {"source": name, "steps": self.steps, "seed": self._seed, "device": self.device.type}
        return {**about, **describe_decode(self._decode)}
