"""Loads decoders and decodes latents by compiled programs: the public functions, as upstream's file of this path.

Why here: 21 call sites of upstream (Wayfarer Labs' owl-wms) import these names from this path. Names, positional
arguments and results are upstream's; new arguments are keyword-only and have defaults. Importing this module touches
neither CUDA nor TensorRT; `TENSORRT_AVAILABLE` and `TENSORRT_CACHE_DIR` are computed when they are read.

Usage:
    decoder = get_decoder_only(None, "configs/vae/dec_dist.yml", "decoder.pt")
    decode = make_batched_decode_fn(decoder, 8)
    frames = decode(latents)                # [b, n, c, h, w] -> [b, n, C, H, W] bf16
    decode.stats().reason                   # why a program, or PyTorch, decoded
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from owl_wms import env
from owl_wms.cache.key import entry_name, label
from owl_wms.cache.manifest import PROGRAM
from owl_wms.errors import CacheError, ConfigError
from owl_wms.runtime import AudioDecode, Jit, Toolchain, VideoDecode
from owl_wms.runtime.programs import store_of
from owl_wms.runtime.steps import streams
from owl_wms.settings import PRECISIONS, TensorRTConfig
from owl_wms.timing import measure_inference_time
from owl_wms.vae import fold_weight_norm, load_decoder
from owl_wms.vae.checkpoint import check_values

__all__ = [
    "TENSORRT_AVAILABLE",
    "TENSORRT_CACHE_DIR",
    "TensorRTConfig",
    "get_decoder_only",
    "get_engine_cache_path",
    "make_batched_audio_decode_fn",
    "make_batched_decode_fn",
    "measure_inference_time",
]

TENSORRT_AVAILABLE: bool
TENSORRT_CACHE_DIR: Path


def __getattr__(name: str) -> Any:
    if name == "TENSORRT_AVAILABLE":
        # Without a CUDA device it is False; importing TensorRT to find that out would cost seconds.
        if not torch.cuda.is_available():
            return False
        from owl_wms import trt

        return trt.run_status().available
    if name == "TENSORRT_CACHE_DIR":
        return TensorRTConfig.resolve().cache_directory()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get_decoder_only(
    vae_id: str | None,
    cfg_path: str | Path | None,
    ckpt_path: str | Path | None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """Returns a frozen decoder in eval mode, weight norm folded in float32 before the cast.

    Args:
        vae_id: "dcae" means diffusers' AutoencoderDC (`ckpt_path`: folder or hub id, None for the hub); "taehv" without
            `cfg_path` the TAEHV of `ckpt_path`, a streaming decoder; anything else, None included, the autoencoder that
            `cfg_path` describes.
        cfg_path: YAML file with a `model` section.
        ckpt_path: `.pt` or `.safetensors`.
        device: None means this process's GPU (the current device; under a launcher that set none, the one of
            LOCAL_RANK), or the CPU when there is no GPU.
        dtype: of the weights, a floating one.

    Returns:
        nn.Module `[B, c, h, w] -> [B, C, H, W]`.

    Raises:
        ConfigError: the configuration is missing or wrong, or LOCAL_RANK is no number and no device is given.
        CheckpointError: the file cannot be read or belongs to another architecture; or a weight is not finite, in the
            file or in `dtype`.
    """
    decoder = fold_weight_norm(load_decoder(vae_id, cfg_path, ckpt_path))
    decoder = decoder.requires_grad_(False).eval().to(dtype=dtype)
    check_values(decoder, str(ckpt_path))
    return decoder.to(device=_own_device() if device is None else device)


def make_batched_decode_fn(
    decoder: nn.Module,
    batch_size: int = 8,
    use_tensorrt: bool = True,
    *,
    config: Any = None,
    strict: bool | None = None,
    timing: bool = False,
    output: str = "bf16",
    check: str = "auto",
    jit: bool = False,
    toolchain: Toolchain | None = None,
) -> VideoDecode:
    """Returns a function from video latents `[b, n, c, h, w]` to bf16 frames `[b, n, C, H, W]` on the latents' device.

    With `output="uint8"` it returns bytes `[b, n, H, W, C]` instead; `owl_wms.runtime.decode_stream` brings them to the
    host while the next ones are decoded.

    The first decode of a latent shape finds its program in the cache or builds it (`decode.prepare((c, h, w))` does so
    ahead of time). If anything fails on the way, PyTorch decodes, and one warning gives the reason.

    Args:
        decoder: `[B, c, h, w] -> [B, C, H, W]`; not changed.
        batch_size: frames at a time, >= 1.
        use_tensorrt: False decodes with plain PyTorch.
        config: a TensorRTConfig, a mapping, or a training configuration; the environment overrides it.
        strict: True raises FastPathError instead of falling back; None follows the configuration and
            `TENSORRT_FALLBACK`.
        timing: record milliseconds, shown by `decode.stats().latency_ms`.
        output: `bf16` or `uint8`, see `VideoDecode`.
        check: search of the output for non-finite values, see `VideoDecode`.
        jit: compile in this process with `torch.compile(backend="tensorrt")` and store nothing, for trainers.
        toolchain: what compiles; None means TensorRT.

    Raises:
        ConfigError: an unknown setting, check or output, one out of range, a batch_size that is no integer >= 1, or a
            streaming decoder, whose frames depend on those before.
    """
    if streams(decoder):
        raise ConfigError(
            f"{type(decoder).__name__} decodes a stream, where frames depend on those before, and batches do not carry "
            "that on; use owl_wms.runtime.StreamDecode",
            key="vae_id",
        )
    settings = TensorRTConfig.resolve(config, enabled=None if use_tensorrt else False)
    return VideoDecode(
        decoder,
        batch_size=_integer(batch_size),
        settings=settings,
        strict=strict,
        timing=timing,
        output=output,
        check=check,
        toolchain=Jit() if jit and toolchain is None else toolchain,
    )


def make_batched_audio_decode_fn(decoder: nn.Module, batch_size: int = 8, *, check: str = "auto") -> AudioDecode:
    """Returns a function from audio latents `[b, n, c]` to bf16 samples `[b, samples, C]`, `batch_size` clips at once.

    Raises:
        ConfigError: batch_size below 1 or not an integer, or a check that `AudioDecode` does not know.
    """
    return AudioDecode(decoder, batch_size=_integer(batch_size), check=check)


def get_engine_cache_path(model_key: str, input_shape: Sequence[int], precision: str = "fp16") -> Path:
    """Returns the path of the program of a model, shape and precision in the cache.

    A program's real key also covers weights, graph, versions and GPU, which these three do not tell. So the newest
    entry that was built with them is returned, and where there is none yet, a path that is stable for the three and
    stands for no file.

    Args:
        model_key: model name as in `owl-wms trt list`, for example "dcae"; characters that cannot stand in an entry's
            name are replaced, so the path never leaves the cache directory.
        input_shape: static `(B, c, h, w)`, integers.
        precision: one of `settings.PRECISIONS`.

    Raises:
        ConfigError: an unknown precision, or a shape of anything else.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}", key="precision")
    settings = TensorRTConfig.resolve()
    try:
        shape = [operator.index(size) for size in input_shape]
    except TypeError:
        raise ConfigError(
            f"input_shape must be integers (B, c, h, w); got {input_shape!r}", key="input_shape"
        ) from None
    try:
        entries = store_of(settings).entries(env.describe_machine())
    except CacheError:
        entries = []  # a refused directory holds nothing that would be used
    for info in entries:
        manifest = info.manifest
        if info.status != "ok" or manifest is None or manifest.name != label(model_key):
            continue
        precisions = (manifest.material.get("precision"), manifest.report.get("precision"))
        if precision in precisions and manifest.material.get("input_shape") == shape:
            return info.path / PROGRAM
    digest = hashlib.sha256(json.dumps([model_key, shape, precision]).encode()).hexdigest()
    return settings.cache_directory() / entry_name(model_key, digest) / PROGRAM


def _integer(batch_size: Any) -> int:
    """An int from anything that is one (numpy's too), so that 4.0 and None fail here and not in the first decode."""
    try:
        return operator.index(batch_size)
    except TypeError:
        raise ConfigError(f"batch_size must be an integer >= 1; got {batch_size!r}", key="batch_size") from None


def _own_device() -> torch.device:
    rank = env.local_rank()  # first: a bad value is an error without a GPU too
    if not torch.cuda.is_available():
        return torch.device("cpu")
    current = torch.cuda.current_device()
    # Upstream loads decoders before `set_device`, which would put every rank's decoder on GPU 0.
    if current == 0 and rank is not None and rank < torch.cuda.device_count():
        return torch.device("cuda", rank)
    return torch.device("cuda", current)
