"""Audio latents to samples: upstream's batching, without its shape surprises.

Why it is plain PyTorch: the audio decoder is a hundredth of the video decoder's work.

Usage:
    decode = AudioDecode(decoder, batch_size=8)
    samples = decode(latents)       # [b, n, c] -> [b, samples, C] bf16
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.dynamo import uncompiled
from owl_wms.errors import ConfigError
from owl_wms.runtime import capture
from owl_wms.runtime.canary import CHECKS
from owl_wms.runtime.eager import EagerDecoder, decode_in_memory, decode_with_gradients
from owl_wms.runtime.latents import check_audio
from owl_wms.runtime.slot import all_finite, looks
from owl_wms.runtime.stats import Ledger


class AudioDecode:
    """Decode audio latents in batches of `batch_size` clips (not frames: upstream splits along the first axis).

    Args:
        decoder: `[B, c, n] -> [B, C, samples]`; not changed.
        batch_size: clips at a time, >= 1.
        check: when to look for samples that are not finite: `always`, `sampled` (first 8 calls, then every 64th), `off`
            or `auto`: always in fp16, sampled otherwise. One warning says so. `error` looks always and raises.

    Raises:
        ConfigError: batch_size below 1, or an unknown check.
    """

    def __init__(self, decoder: nn.Module, *, batch_size: int, check: str = "auto") -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be >= 1; got {batch_size}", key="batch_size")
        if check not in CHECKS:
            raise ConfigError(f"check must be one of {', '.join(CHECKS)}; got {check!r}", key="check")
        self.decoder = decoder
        self.batch_size = batch_size
        self.check = check
        self._calls = 0
        self._ledger = Ledger()
        self._eager: EagerDecoder | None = None

    @uncompiled
    def __call__(self, x: Tensor) -> Tensor:
        """Latents `x` `[b, n, c]`, any real dtype, strides or device, to `[b, samples, C]` bf16 on their device.

        No clips or no latents in them give no clips or no samples. If `x` asks for a gradient and gradients are on, the
        samples have one; otherwise no graph is recorded.

        Raises:
            LatentShapeError: wrong rank or channel count.
            DataError: no tensor, or not a dense one of real numbers.
            DecodeMemoryError: one clip does not fit into memory.
            NonFiniteError: the samples have NaN or infinity in them, and `check` is `error`.
        """
        eager = self._current()
        check_audio(x, eager.channels)
        if x.requires_grad and torch.is_grad_enabled() and x.numel():
            samples = decode_with_gradients(eager, self.decoder, x.transpose(1, 2), self.batch_size)
            return samples.to(x.device, torch.bfloat16).transpose(1, 2)
        with torch.no_grad():
            return self._samples(eager, x)

    def _samples(self, eager: EagerDecoder, latents: Tensor) -> Tensor:
        clips = latents.transpose(1, 2)
        count, channels, length = clips.shape
        if count == 0 or length == 0:  # the decoder's convolutions refuse nothing, so one latent says the shape
            probe = eager(latents.new_zeros((1, channels, max(length, 1))))
            size = (count, probe.shape[2] if length else 0, probe.shape[1])
            return torch.empty(size, dtype=torch.bfloat16, device=latents.device)
        out: list[Tensor] = []
        flags: list[tuple[int, int, Tensor]] = []  # first clip of a batch, the one behind its last, are all finite
        self._calls += 1
        # While a caller captures a CUDA graph nothing can be waited for, and looking at values waits.
        looked = looks(self.check, self._calls, fp16=eager.dtype == torch.float16) and not capture.underway()

        def write(start: int, decoded: Tensor) -> None:
            if looked:
                flags.append((start, start + len(decoded), all_finite(decoded)))
            if not out:
                size = (len(clips), *decoded.shape[1:])
                out.append(torch.empty(size, dtype=torch.bfloat16, device=latents.device))
            out[0][start : start + len(decoded)].copy_(decoded)

        decode_in_memory(eager, clips, write, self.batch_size)
        if flags:
            finite = torch.stack([flag for _, _, flag in flags]).tolist()  # one wait for the device
            for (start, stop, _), good in zip(flags, finite, strict=True):
                if not good:
                    subject, error = f"the sound of clips {start} to {stop - 1} has", self.check == "error"
                    self._ledger.non_finite(subject, "non-finite sound", eager.dtype, first=start, raised=error)
        return out[0].transpose(1, 2)

    def __deepcopy__(self, memo: dict[int, Any]) -> AudioDecode:
        return self._made_anew()(copy.deepcopy(self.decoder, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return self._made_anew(), (self.decoder,)

    def _made_anew(self) -> Callable[[nn.Module], AudioDecode]:
        return functools.partial(AudioDecode, batch_size=self.batch_size, check=self.check)

    def _current(self) -> EagerDecoder:
        if capture.underway():  # weights folded now get their values when the caller's graph is replayed
            return EagerDecoder(self.decoder)
        eager = self._eager
        if eager is None or not eager.stamp.matches(self.decoder):
            eager = self._eager = EagerDecoder(self.decoder)
        return eager
