"""Recognises the author's own TAEHV modules, and those of programs that took them over.

Why it exists: people have the author's class in their pipelines, or a copy of it. Its layout is that of the
checkpoints, but copies differ in what they do around it (clamping, dropping of the first frames, switched-off
enlargements). So a module is recognised by its layers, and then a copy of it with random weights must give the frames
that `TAEHVDecoder` gives.

Usage:
    decoder = decoder_within(module)            # None, or a TAEHVDecoder over the very same parameters
    if decoder is not None and gives_same_frames(module): ...
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.errors import CheckpointError
from owl_wms.vae.taehv import STAGES, TAEHVDecoder
from owl_wms.vae.taehv_weights import config_of

METHOD = "decode_video"
"""Takes latents `[b, n, c, h, w]` and returns frames `[b, n', 3, H, W]` in [0, 1]; the author's name."""
ALIKE = 1e-6
"""Of frames in [0, 1], in float64: random weights give large values before they are clamped."""
_CONVOLUTION = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def has_layout(module: Any) -> bool:
    """Returns whether `module` has `decode_video` of its class, and layers in a Sequential named `decoder`."""
    method = getattr(type(module), METHOD, None)
    return isinstance(module, nn.Module) and callable(method) and isinstance(_layers(module), nn.Sequential)


def decoder_within(module: nn.Module) -> TAEHVDecoder | None:
    """Returns a decoder in eval mode whose parameters are those of `module.decoder`, also after they are moved.

    None if the layers are not those of a TAEHV.
    """
    layers = _layers(module)
    try:
        config = config_of(layers.state_dict(), type(module).__name__)
        space = [_enlarges(layers[6 + i * (7 if config.form == "super" else 6)]) for i in range(STAGES)]
        config = config.model_copy(update={"space_upscale": tuple(space)})
    except (CheckpointError, IndexError):
        return None
    with torch.device("meta"):
        decoder = TAEHVDecoder(config)
    own, theirs = dict(decoder.named_modules()), dict(layers.named_modules())
    for name, layer in own.items():
        if layer._parameters:
            other = theirs.get(name)
            if type(other) is not nn.Conv2d or not _same_convolution(layer, other):
                return None
            layer.__dict__["_parameters"] = other._parameters  # the dict itself, so that a move is seen here too
    return decoder.eval() if decoder.state_dict().keys() == layers.state_dict().keys() else None


@torch.no_grad()
def gives_same_frames(module: nn.Module) -> bool:
    """Returns whether `decode_video` is what `TAEHVDecoder` computes, by a copy with random weights on the CPU."""
    generator = torch.Generator().manual_seed(0)
    try:
        twin = copy.deepcopy(module).double().cpu().eval()
        decoder = decoder_within(twin)
        if decoder is None:
            return False
        for parameter in decoder.parameters():
            fan_in = max(1, parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5)
        last: Any = list(decoder)[-1]
        last.weight.mul_(0.1)
        last.bias.add_(0.5)
        method = getattr(type(module), METHOD)  # not what may stand in its place on this one module
        said = inspect.signature(method).parameters
        quiet = {"show_progress_bar": False} if "show_progress_bar" in said else {}
        with torch.autocast("cpu", enabled=False):
            for n in (1, 2, 4):
                z = torch.randn(2, n, decoder.latent_channels, 2, 3, generator=generator).double()
                if not _alike(method(twin, z.clone(), **quiet), decoder(z)):
                    return False
    except Exception:  # what somebody's class raises is unknown, and then it is not one of these
        return False
    return True


def _layers(module: nn.Module) -> Any:
    return getattr(module, "decoder", None)


def _enlarges(layer: nn.Module) -> bool:
    factor = getattr(layer, "scale_factor", getattr(layer, "upscale_factor", 1))
    return factor != 1


def _same_convolution(own: nn.Module, other: nn.Module) -> bool:
    shapes = {name: None if p is None else p.shape for name, p in own._parameters.items()}
    given = {name: None if p is None else p.shape for name, p in other._parameters.items()}
    return shapes == given and all(getattr(own, name) == getattr(other, name) for name in _CONVOLUTION)


def _alike(got: Any, wanted: Tensor) -> bool:
    return isinstance(got, Tensor) and got.shape == wanted.shape and float((got - wanted).abs().max()) <= ALIKE
