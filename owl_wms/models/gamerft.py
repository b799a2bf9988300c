"""GameRFT: a video world model. Latent frames, noise levels and controls in; velocities out.

State-dict keys are upstream's: everything sits under `core.`. Samplers and pipelines use `model.core`; training calls
the wrapper.

Usage:
    model = GameRFT(load_world_config("configs/dit_v4.yml").model)
    loss = model(latents, mouse, buttons)
    v = model.core(noisy, t, mouse, buttons, kv_cache=KVCache(model.config))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from owl_wms.configs.levels import LevelsConfig
from owl_wms.errors import ConfigError
from owl_wms.models.flow import counted_mse, draw_levels, drop_controls, noised, require_dit
from owl_wms.models.size import require_room
from owl_wms.nn.dit import DiT
from owl_wms.nn.embeddings import ControlEmbedding, TimestepEmbedding
from owl_wms.nn.limits import FrameLimits
from owl_wms.nn.modulation import FinalProjection
from owl_wms.nn.ring_cache import Cache
from owl_wms.nn.setting import latent_grid, setting


class ConditionedCore(nn.Module):
    """The part that video and audio models share: transformer, condition, the video's projections, and its limits.

    Args:
        config: the `model` section, as any object with its attributes.

    Raises:
        ConfigError: a backbone other than dit, tokens_per_frame at odds with sample_size, or more weights than memory.
    """

    extra_tokens = 0

    def __init__(self, config: Any) -> None:
        super().__init__()
        require_dit(config)
        height, width = latent_grid(config)
        wanted = height * width + self.extra_tokens
        if config.tokens_per_frame != wanted:
            raise ConfigError(
                f"tokens_per_frame must be {height} * {width} + {self.extra_tokens} = {wanted}, "
                f"got {config.tokens_per_frame}",
                key="model.tokens_per_frame",
            )
        if bool(setting(config, "has_audio", self.extra_tokens > 0)) != (self.extra_tokens > 0):
            raise ConfigError(
                f"has_audio must be {self.extra_tokens > 0} for {type(self).__name__}, got {config.has_audio}",
                key="model.has_audio",
            )
        require_room(config)
        self.config = config
        self.uncond = bool(config.uncond)
        self.transformer = DiT(config)
        if not self.uncond:
            hidden = setting(config, "control_hidden", 2048)
            directed = bool(setting(config, "rest_has_direction", True))
            self.control_embed = ControlEmbedding(config.n_buttons, config.d_model, hidden, rest_has_direction=directed)
        self.t_embed = TimestepEmbedding(config.d_model)
        self.proj_in = nn.Linear(config.channels, config.d_model, bias=False)
        self.proj_out = FinalProjection(config.d_model, config.channels)
        limited = bool(setting(config, "frame_limits", False))
        self.limits = FrameLimits(config.channels, height, width) if limited else None

    def condition(self, t: Tensor, mouse: Tensor | None, btn: Tensor | None, has_controls: Tensor | None) -> Tensor:
        """Returns one vector per frame.

        Args:
            t: [b, n].
            mouse: [b, n, 2], or None for no controls at all.
            btn: [b, n, n_buttons], or None together with mouse.
            has_controls: [b] bool; where False the control part is left out. None is all True.

        Returns:
            [b, n, d].
        """
        if (mouse is None) != (btn is None):
            raise ValueError("mouse and btn must both be given or both be None")
        cond: Tensor = self.t_embed(t)
        if self.uncond or mouse is None or btn is None:
            return cond
        controls: Tensor = self.control_embed(mouse, btn)
        if has_controls is not None:
            controls = controls * has_controls[:, None, None].to(controls.dtype)
        return cond + controls

    def video_tokens(self, x: Tensor) -> Tensor:
        """Args: x [b, n, c, h, w]. Returns: [b, n, h * w, d]."""
        wanted = (self.config.channels, *latent_grid(self.config))
        if x.ndim != 5 or x.shape[2:] != wanted:
            raise ValueError(f"x must be [b, n, {', '.join(map(str, wanted))}], got {list(x.shape)}")
        out: Tensor = self.proj_in(x.flatten(3).transpose(2, 3))
        return out


class GameRFTCore(ConditionedCore):
    """The network itself.

    With `predicts: remainder` its last layer gives r and the velocity is x - r: r = (2 - t) data - (1 - t) noise, in
    which there is no noise at t = 1, where sampling begins, and little for the next steps.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._predicts_remainder = setting(config, "predicts", "velocity") == "remainder"

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        mouse: Tensor | None = None,
        btn: Tensor | None = None,
        doc_id: Tensor | None = None,
        has_controls: Tensor | None = None,
        kv_cache: Cache | None = None,
    ) -> Tensor:
        """Velocity of every frame.

        Args:
            x: [b, n, c, h, w] noisy latents.
            t: [b, n] noise level of each frame, 0 (data) to 1 (noise).
            mouse, btn, has_controls: see `condition`.
            doc_id: [b, n] integers; frames see their own document only. Without a cache only.
            kv_cache: frames before these.

        Returns:
            v [b, n, c, h, w].
        """
        cond = self.condition(t, mouse, btn, has_controls)
        tokens = self.transformer(self.video_tokens(x), cond, doc_id, kv_cache)
        out: Tensor = self.proj_out(tokens, cond).transpose(2, 3).unflatten(3, x.shape[3:])
        if self._predicts_remainder:
            out = x - out
        return out


class GameRFT(nn.Module):
    """The training wrapper: a loss around the core."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.core = GameRFTCore(config)

    def forward(
        self,
        x: Tensor,
        mouse: Tensor | None = None,
        btn: Tensor | None = None,
        doc_id: Tensor | None = None,
        return_dict: bool = False,
        cfg_prob: float | None = None,
        has_controls: Tensor | None = None,
        levels: LevelsConfig | None = None,
        history: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Mean squared error of the predicted velocity, over the frames that count (see `draw_levels`).

        Args:
            x: [b, n, c, h, w] clean latents, scaled for the model.
            mouse, btn: [b, n, 2] and [b, n, n_buttons], or both None.
            doc_id: [b, n] integers.
            return_dict: return what the loss was made of.
            cfg_prob: share of items that see no controls; None is the configuration's.
            has_controls: [b] bool, items that have controls at all; None is all.
            history: [b] frames at the beginning that are history for certain; see `draw_levels`.
            levels: noise levels to draw; None is a level of its own for every frame, sigmoid of a normal.

        Returns:
            The scalar loss; or a dict with `diffusion_loss` and `video_loss` (the same), `lerpd_video`, `pred_video`,
            `z_video` [b, n, c, h, w], `ts` [b, n] fp32, `counted` [b, n] bool and `cfg_mask` [b] bool.
        """
        mask = controls_mask(x, mouse, has_controls, self.config.cfg_prob if cfg_prob is None else cfg_prob)
        sinks = setting(self.config, "sink_frames", 0), setting(self.config, "sink_noise", None)
        ts, counted = draw_levels(x, levels, doc_id, history, *sinks)
        lerpd, z = noised(x, ts)
        pred = self.core(lerpd, ts, mouse, btn, doc_id, mask)
        loss = counted_mse(pred, z - x, counted)
        if not return_dict:
            return loss
        return {
            "diffusion_loss": loss,
            "video_loss": loss,
            "lerpd_video": lerpd,
            "pred_video": pred,
            "z_video": z,
            "ts": ts,
            "counted": counted,
            "cfg_mask": mask,
        }


def controls_mask(x: Tensor, mouse: Tensor | None, has_controls: Tensor | None, cfg_prob: float) -> Tensor:
    """[b] bool: which items show their controls in this step of training."""
    if has_controls is None:
        has_controls = torch.full((x.shape[0],), mouse is not None, dtype=torch.bool, device=x.device)
    return drop_controls(has_controls, cfg_prob)
