"""GameRFTAudio: the world model that makes a picture and its sound together.

Each frame carries one more token for its audio latent, last in the frame; everything else is GameRFT's, but for the
head of the picture: since 2025-07-28 upstream normalises its tokens and the condition before it. Weights of either kind
have the same keys, so the configuration has to say which it is (`model.video_head_norm`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from owl_wms.configs.levels import LevelsConfig
from owl_wms.models.flow import counted_mse, draw_levels, noised
from owl_wms.models.gamerft import ConditionedCore, controls_mask
from owl_wms.nn.modulation import FinalProjection
from owl_wms.nn.ring_cache import Cache
from owl_wms.nn.setting import setting


class GameRFTAudioCore(ConditionedCore):
    """The network itself; keys as GameRFTCore's, and `audio_proj_in`, `audio_proj_out`.

    Attributes:
        video_head_norm: the picture's head follows a layer norm of tokens and condition (upstream's main); without it
            for weights of upstream before 2025-07-28.
    """

    extra_tokens = 1

    def __init__(self, config: Any) -> None:
        super().__init__(_WithAudio(config))
        self.config = config
        self.video_head_norm = bool(getattr(config, "video_head_norm", True))
        self.audio_proj_in = nn.Linear(config.audio_channels, config.d_model, bias=False)
        self.audio_proj_out = FinalProjection(config.d_model, config.audio_channels)

    def forward(
        self,
        x: Tensor,
        audio: Tensor,
        t: Tensor,
        mouse: Tensor | None = None,
        btn: Tensor | None = None,
        has_controls: Tensor | None = None,
        kv_cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Velocities of every frame's picture and sound.

        Args:
            x: [b, n, c, h, w] noisy latents.
            audio: [b, n, c_a] noisy audio latents, one per frame.
            t: [b, n] noise level of both, 0 (data) to 1 (noise).
            mouse, btn, has_controls: see `ConditionedCore.condition`.
            kv_cache: frames before these.

        Returns:
            (v of the video [b, n, c, h, w], v of the audio [b, n, c_a]).
        """
        if tuple(audio.shape) != (*x.shape[:2], self.config.audio_channels):
            raise ValueError(
                f"audio must be [b, n, {self.config.audio_channels}] beside x {list(x.shape)}, got {list(audio.shape)}"
            )
        cond = self.condition(t, mouse, btn, has_controls)
        tokens = torch.cat([self.video_tokens(x), self.audio_proj_in(audio).unsqueeze(2)], dim=2)
        tokens = self.transformer(tokens, cond, None, kv_cache)
        picture, steered = tokens[:, :, :-1], cond
        if self.video_head_norm:
            picture, steered = (F.layer_norm(value, value.shape[-1:]) for value in (picture, cond))
        video = self.proj_out(picture, steered).transpose(2, 3).unflatten(3, x.shape[3:])
        return video, self.audio_proj_out(tokens[:, :, -1:], cond).squeeze(2)


class _WithAudio:
    """A configuration in which `has_audio`, absent from upstream's audio files, is true."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        return setting(self._config, name, True) if name == "has_audio" else getattr(self._config, name)


class GameRFTAudio(nn.Module):
    """The training wrapper: a loss around the core."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.core = GameRFTAudioCore(config)

    def forward(
        self,
        x: Tensor,
        audio: Tensor,
        mouse: Tensor | None = None,
        btn: Tensor | None = None,
        return_dict: bool = False,
        cfg_prob: float | None = None,
        has_controls: Tensor | None = None,
        levels: LevelsConfig | None = None,
    ) -> tuple[Tensor, Tensor, Tensor] | dict[str, Tensor]:
        """Mean squared errors of the predicted velocities; picture and sound share their noise levels.

        Args:
            x: [b, n, c, h, w] clean latents.
            audio: [b, n, c_a] clean audio latents.
            mouse, btn, return_dict, cfg_prob, has_controls, levels: as `GameRFT.forward`.

        Returns:
            (total, video, audio) losses, total being their sum; or a dict with `diffusion_loss` (total), `video_loss`,
            `audio_loss`, `lerpd_video`, `lerpd_audio`, `pred_video`, `pred_audio`, `z_video`, `z_audio`, `ts`,
            `counted`, `cfg_mask`.
        """
        mask = controls_mask(x, mouse, has_controls, self.config.cfg_prob if cfg_prob is None else cfg_prob)
        ts, counted = draw_levels(x, levels)
        lerpd_video, z_video = noised(x, ts)
        lerpd_audio, z_audio = noised(audio, ts)
        pred_video, pred_audio = self.core(lerpd_video, lerpd_audio, ts, mouse, btn, mask)
        video_loss = counted_mse(pred_video, z_video - x, counted)
        audio_loss = counted_mse(pred_audio, z_audio - audio, counted)
        total = video_loss + audio_loss
        if not return_dict:
            return total, video_loss, audio_loss
        return {
            "diffusion_loss": total,
            "video_loss": video_loss,
            "audio_loss": audio_loss,
            "lerpd_video": lerpd_video,
            "lerpd_audio": lerpd_audio,
            "pred_video": pred_video,
            "pred_audio": pred_audio,
            "z_video": z_video,
            "z_audio": z_audio,
            "ts": ts,
            "counted": counted,
            "cfg_mask": mask,
        }
