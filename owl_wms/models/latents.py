"""The scale in which a world model sees latents: stored latents divided by one number, and optionally whitened.

An autoencoder's latents are far from white: a few directions across channels hold nearly all of the variance, and a
model that minimises a mean squared error leaves the others out. The transform turns the channels to their principal
directions and shrinks the strong ones.

Source: principal component analysis; the exponent `power` between none (0) and full whitening (1) is a compromise, as
full whitening weighs noise like structure.

Usage:
    whitener = Whitener.fit(latents, power=0.5, channels=96)
    whitener.save("whitener.safetensors")
    space = LatentSpace(0.7976, Whitener.load("whitener.safetensors"))
    x = space.to_model(latents)              # [b, n, 128, h, w] -> [b, n, 96, h, w]
    latents = space.to_stored(x)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor

from owl_wms.configs.world import TrainingConfig
from owl_wms.errors import CheckpointError, ConfigError
from owl_wms.files import read_regular
from owl_wms.models.flow import counted_mse
from owl_wms.whole import written_whole

FLOOR = 0.02
"""Added to variances, which are those of latents divided by `vae_scale`: keeps directions of noise from growing."""
_MAX_BYTES = 1 << 28  # of a file: 4,096 channels


@dataclass(frozen=True, kw_only=True, slots=True)
class Whitener:
    """An affine map of channels and its inverse.

    Attributes:
        mean: float32 [c].
        forward: float32 [k, c].
        inverse: float32 [c, k]; with k = c the exact inverse of `forward`, with less its pseudo-inverse.
    """

    mean: Tensor
    forward: Tensor
    inverse: Tensor

    @staticmethod
    def fit(latents: Tensor, *, power: float = 0.5, channels: int | None = None) -> Whitener:
        """Fit to latents.

        Args:
            latents: [..., c, h, w], already divided by `vae_scale`; some 10,000 frames suffice for 128 channels.
            power: 0 turns only, 1 gives all directions the same variance.
            channels: principal directions to keep, the strongest first; None keeps all.

        Raises:
            ConfigError: power outside 0 to 1, or more directions than channels.
        """
        c = latents.shape[-3]
        k = c if channels is None else channels
        if not 0 <= power <= 1 or not 1 <= k <= c:
            raise ConfigError(f"a whitener needs power in 0 to 1 and 1 to {c} channels, got {power} and {k}")
        rows = latents.movedim(-3, -1).reshape(-1, c)
        mean = rows.mean(dim=0, dtype=torch.float64)
        gram = torch.zeros(c, c, dtype=torch.float64, device=rows.device)
        for part in rows.split(1 << 16):
            centred = part.double() - mean
            gram += centred.mT @ centred
        variances, directions = torch.linalg.eigh(gram / len(rows))
        variances, directions = variances.flip(0)[:k].clamp(min=0), directions.flip(1)[:, :k]
        factors = (variances + FLOOR) ** (-power / 2)
        factors = factors / (variances * factors.square()).mean().sqrt().clamp(min=1e-12)
        forward, inverse = factors[:, None] * directions.mT, directions / factors
        return Whitener(mean=mean.float(), forward=forward.float(), inverse=inverse.float())

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, about 100 kB for 128 channels; an older one stays until it is whole.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {"mean": self.mean, "forward": self.forward, "inverse": self.inverse}
        # A copy each: an inverse may be the very matrix that it inverts, transposed or not.
        own = {name: value.cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        with written_whole(Path(path)) as draft:
            save_file(own, draft)

    @staticmethod
    def load(path: Path | str) -> Whitener:
        """Read such a file.

        Raises:
            CheckpointError: it cannot be read, or holds something else.
        """
        try:
            found = load_bytes(read_regular(path, _MAX_BYTES))
            c = len(found["mean"])
            k = len(found["forward"])
            shapes = {"mean": (c,), "forward": (k, c), "inverse": (c, k)}
            if {name: tuple(value.shape) for name, value in found.items()} != shapes:
                raise ValueError("its tensors do not fit each other")
            if not all(value.is_floating_point() and bool(value.isfinite().all()) for value in found.values()):
                raise ValueError("its tensors are not finite numbers")
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path}: no transform of latents: {error}", path=path) from error
        return Whitener(**{name: value.float() for name, value in found.items()})

    def to(self, device: torch.device | str) -> Whitener:
        """Return it on a device."""
        return Whitener(mean=self.mean.to(device), forward=self.forward.to(device), inverse=self.inverse.to(device))


@dataclass(frozen=True, slots=True)
class LatentSpace:
    """Stored latents to the model's and back.

    Attributes:
        scale: stored latents are divided by it; `train.vae_scale`.
        whitener: applied after that, or None.
    """

    scale: float
    whitener: Whitener | None = None

    @staticmethod
    def of(cfg: TrainingConfig) -> LatentSpace:
        """The space that a configuration names.

        Raises:
            CheckpointError: `train.latent_transform` cannot be read.
        """
        path = cfg.latent_transform
        return LatentSpace(cfg.vae_scale, None if path is None else Whitener.load(path))

    def to(self, device: torch.device | str) -> LatentSpace:
        """Return it on a device."""
        return self if self.whitener is None else replace(self, whitener=self.whitener.to(device))

    def stored_channels(self, model_channels: int) -> int:
        """Return the channels of stored latents for a model with `model_channels`.

        Raises:
            ConfigError: the transform gives another number of channels than the model takes.
        """
        if self.whitener is None:
            return model_channels
        given, taken = self.whitener.forward.shape
        if given != model_channels:
            raise ConfigError(
                f"model.channels is {model_channels}, and train.latent_transform gives {given} channels",
                key="model.channels",
            )
        return taken

    def to_model(self, latents: Tensor) -> Tensor:
        """[..., c, h, w] as stored -> [..., k, h, w] for the model, in the latents' dtype."""
        scaled = latents / self.scale
        if self.whitener is None:
            return scaled
        w = self.whitener
        return _turned(w.forward, scaled.float() - w.mean[:, None, None]).to(scaled.dtype)

    def to_stored(self, x: Tensor) -> Tensor:
        """[..., k, h, w] of the model -> [..., c, h, w] as a decoder takes them, in the dtype of x."""
        if self.whitener is None:
            return x * self.scale
        w = self.whitener
        return ((_turned(w.inverse, x) + w.mean[:, None, None]) * self.scale).to(x.dtype)

    def difference_to_stored(self, x: Tensor) -> Tensor:
        """Return a difference of two latents of the model [..., k, h, w] in the scale of stored latents."""
        return (x if self.whitener is None else _turned(self.whitener.inverse, x)) * self.scale

    @torch.no_grad()
    def error(self, x: Tensor, found: dict[str, Tensor]) -> Tensor:
        """Return the mean squared error of the clean frames that predicted velocities imply, in stored latents.

        Args:
            x: [b, n, c, h, w] clean latents in the model's scale.
            found: what `GameRFT.forward(return_dict=True)` returned.
        """
        level = found["ts"][..., None, None, None]
        difference = level * (found["pred_video"].float() - (found["z_video"] - x).float())
        stored = self.difference_to_stored(difference)
        return counted_mse(stored, torch.zeros_like(stored), found["counted"])


def _turned(matrix: Tensor, x: Tensor) -> Tensor:
    """[i, j] times [..., j, h, w] over the channels, in fp32 also where a trainer's autocast would compute in bf16."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum("ij,...jhw->...ihw", matrix, x.float())
