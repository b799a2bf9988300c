"""`owl_wms.accelerate`: a faster decoder in the place of one that stands in somebody else's model.

Usage:
    pipe = owl_wms.accelerate(pipe)                             # a diffusers pipeline; its decoders are replaced
    vae.decoder = owl_wms.accelerate(vae.decoder)               # the same for one decoder
    taehv = owl_wms.accelerate(taehv)                           # the author's TAEHV: its decode_video
    pipe.vae.decoder = pipe.vae.decoder.original                # and back
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from owl_wms.errors import ConfigError
from owl_wms.runtime.accelerated import AcceleratedDecoder, Options
from owl_wms.runtime.accelerated_video import AcceleratedStream, AcceleratedVideo
from owl_wms.runtime.eager import unwrap
from owl_wms.runtime.programs import Toolchain
from owl_wms.settings import TensorRTConfig
from owl_wms.vae.autoencoder_dc import is_sana_decoder
from owl_wms.vae.dcae import DCAEDecoder
from owl_wms.vae.distill import DistillDecoder
from owl_wms.vae.taehv import TAEHVDecoder
from owl_wms.vae.taehv_modules import METHOD, decoder_within, gives_same_frames, has_layout

KNOWN = (
    "diffusers' AutoencoderDC (Sana), this package's decoders of pictures and streams, and the author's TAEHV with its "
    "own decode_video"
)
_LOG = logging.getLogger("owl_wms.runtime")
_T = TypeVar("_T")


def accelerate(
    module: _T,
    *,
    precision: str = "auto",
    batch_sizes: Sequence[int] = (),
    cache_dir: Path | str | None = None,
    strict: bool = False,
    background: bool = False,
    toolchain: Toolchain | None = None,
) -> _T:
    """Makes a decoder, or the decoders of a model or pipeline, decode by compiled programs.

    A program is found in the cache or built (half a minute to minutes) when latents of its shape are first decoded.
    It is compared with the fp32 decoder before it is used. PyTorch decodes whatever no program is right for:
    gradients, train mode, weights that changed, hooks inside the decoder, other dtypes.

    Args:
        module: a decoder `[B, C, H, W] -> [B, C, H, W]`, which is returned wrapped; or an autoencoder with `.decoder`
            or a pipeline whose components have one, which are changed in place and returned. A name in the log
            (`owl_wms.runtime`, level INFO) says what was replaced. Of a TAEHV, whole clips `[b, n, c, h, w]` are
            decoded; the author's module, and whatever holds one, keeps its class and gets another `decode_video`.
        precision: arithmetic of the programs as in TensorRTConfig: `auto` takes fp16 if every output is finite and the
            parity check passes, else bf16, also for a decoder in fp32. The result has the decoder's dtype.
        batch_sizes: programs are built for these batch sizes only, >= 1 each. Empty: the first batch of a latent shape
            decides. Other batches are split, padded or left to PyTorch, whichever is measured to be fastest.
        cache_dir: directory of the programs; None as in TensorRTConfig.
        strict: raise FastPathError if a program cannot be built or fails, instead of decoding by PyTorch.
        background: build in the background and decode by PyTorch meanwhile, as `build` of TensorRTConfig says. Programs
            that a GPU is busy with are timed less exactly.
        toolchain: what builds programs; None means TensorRT.

    Returns:
        The wrapped decoder, or `module` itself. Something unknown is returned as it is, with one warning. What was
        accelerated before gets the arguments if some are given and are other ones: in a new wrapper, or in the same one
        if something hangs on it, a library's forward for example.

    Raises:
        ConfigError: a batch size below 1, or a setting out of range.
    """
    if any(size < 1 for size in batch_sizes):
        raise ConfigError(f"batch_sizes must be >= 1; got {list(batch_sizes)}", key="batch_sizes")
    settings = TensorRTConfig.resolve(
        precision=precision, cache_dir=cache_dir, build="background" if background else None
    )
    options = Options(
        settings=settings,
        batch_sizes=tuple(sorted({min(size, settings.max_batch_size) for size in batch_sizes})),
        strict=strict or not settings.fallback_on_error,
        toolchain=toolchain,
    )
    given = (precision, tuple(batch_sizes), cache_dir, strict, background, toolchain)
    changed = None if given == ("auto", (), None, False, False, None) else options
    if isinstance(module, nn.Module):
        if isinstance(module, AcceleratedDecoder):
            return _with_options(module, changed)  # type: ignore[return-value]
        inner = unwrap(module)
        if is_known(inner):
            return _wrapped(inner, options)  # type: ignore[return-value]
    replaced = [*_replace_decoders(module, options, changed), *_replace_methods(module, options, changed)]
    if replaced:
        _LOG.info("accelerated: %s", ", ".join(replaced))
    else:
        _LOG.warning("%s is left as it is: no decoder in it is known; known are %s", type(module).__name__, KNOWN)
    return module


def is_known(module: Any) -> bool:
    """Returns whether `module` is a decoder that programs can be made of."""
    return isinstance(module, (DCAEDecoder, DistillDecoder, TAEHVDecoder)) or (
        isinstance(module, nn.Module) and is_sana_decoder(module)
    )


def _replace_decoders(module: Any, options: Options, changed: Options | None) -> Iterator[str]:
    """Wraps the `.decoder` of every part that has a known one; yields the name of each."""
    for name, part in _parts(module):
        held = getattr(part, "decoder", None)
        decoder = unwrap(held) if isinstance(held, nn.Module) else None
        if decoder is not None and is_known(decoder):
            part.decoder = _wrapped(decoder, options)
            yield f"{_joined(name, 'decoder')}: {type(decoder).__name__}"
        elif isinstance(decoder, AcceleratedDecoder):
            part.decoder = _with_options(decoder, changed)
            yield f"{_joined(name, 'decoder')}: {type(decoder.original).__name__} (before)"


def _replace_methods(module: Any, options: Options, changed: Options | None) -> Iterator[str]:
    """Replaces `decode_video` of the author's TAEHV wherever one is; yields the name of each."""
    for name, part in _parts(module):
        for inside, video in part.named_modules():
            before = vars(video).get(METHOD)
            if isinstance(before, AcceleratedVideo):
                if changed is not None and before.options != changed:
                    vars(video)[METHOD] = AcceleratedVideo(video, changed)
                yield f"{_joined(name, inside, METHOD)} (before)"
            elif before is None and has_layout(video):
                within = decoder_within(video)
                if within is not None and gives_same_frames(video):
                    vars(video)[METHOD] = AcceleratedVideo(video, options, within)
                    yield _joined(name, inside, METHOD)


def _wrapped(decoder: nn.Module, options: Options) -> AcceleratedDecoder:
    return (AcceleratedStream if isinstance(decoder, TAEHVDecoder) else AcceleratedDecoder)(decoder, options)


def _with_options(decoder: AcceleratedDecoder, changed: Options | None) -> AcceleratedDecoder:
    """Returns a decoder that was accelerated before, with the new options; as it is for None or equal ones.

    The options go into a new wrapper, which has the parameters and hooks of the old one. Other attributes that somebody
    set on the old wrapper (a library's forward around this very object) cannot move; then it gets the options itself.
    """
    if changed is None or decoder._options == changed:
        return decoder
    if not decoder.is_hung_on():
        return _wrapped(decoder.original, changed)
    decoder.take(changed)
    return decoder


def _parts(module: Any) -> Iterator[tuple[str, nn.Module]]:
    """Lists the modules of what was handed over, with their names: itself, a pipeline's components, or attributes."""
    components = getattr(module, "components", None)
    if isinstance(components, dict):
        named = components
    else:
        named = {"": module} if isinstance(module, nn.Module) else getattr(module, "__dict__", {})
    for name, part in named.items():
        if isinstance(part, nn.Module):
            yield name, part


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)
