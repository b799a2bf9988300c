"""The transformer of the world model: blocks of gated attention and gated MLP, some local in time, some global."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from owl_wms.errors import ConfigError
from owl_wms.nn.attention import Attention, Backend, Masks
from owl_wms.nn.mlp import MLP
from owl_wms.nn.modulation import AdaLN, Gate
from owl_wms.nn.ring_cache import Cache
from owl_wms.nn.rope import RotaryTable
from owl_wms.nn.setting import setting


class DiTBlock(nn.Module):
    """x + gate(attention(norm(x))), then x + gate(mlp(norm(x)))."""

    def __init__(self, *, d_model: int, n_heads: int, window: int | None, causal: bool, layer: int) -> None:
        super().__init__()
        self.attn = Attention(d_model=d_model, n_heads=n_heads, window=window, causal=causal, layer=layer)
        self.mlp = MLP(d_model, 4 * d_model, d_model)
        self.adaln1 = AdaLN(d_model)
        self.gate1 = Gate(d_model)
        self.adaln2 = AdaLN(d_model)
        self.gate2 = Gate(d_model)

    def forward(
        self, x: Tensor, cond: Tensor, rope: RotaryTable, masks: Masks, doc_id: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Args: x [b, n, t, d], cond [b, n, d]. Returns: [b, n, t, d]."""
        x = x + self.gate1(self.attn(self.adaln1(x, cond), rope, masks, doc_id, cache), cond)
        out: Tensor = x + self.gate2(self.mlp(self.adaln2(x, cond)), cond)
        return out


class DiT(nn.Module):
    """All blocks, their one rotary table, and the bookkeeping of a cache.

    Args:
        config: n_layers, n_heads, d_model, causal, and what `RotaryTable` reads; optional local_window and
            global_window (frames; default all), local_idx (layer i is global when i % local_idx == 0; default 4),
            sink_frames (default 0), gradient_checkpointing.

    Attributes:
        sink_mark: [d], added to the condition of the first `sink_frames` frames, so that frames of long ago are told
            from those that the window begins with otherwise; zero at first. None without sinks.

    Raises:
        ConfigError: the heads do not divide the width.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.d_model % config.n_heads or (config.d_model // config.n_heads) % 2:
            raise ConfigError(
                f"d_model / n_heads must be a whole even number, got {config.d_model} / {config.n_heads}",
                key="model.n_heads",
            )
        every = setting(config, "local_idx", 4)
        local, far = setting(config, "local_window", None), setting(config, "global_window", None)
        self.causal = bool(config.causal)
        self.gradient_checkpointing = bool(setting(config, "gradient_checkpointing", False))
        self.attention_backend: Backend = "auto"
        self.blocks = nn.ModuleList(
            DiTBlock(
                d_model=config.d_model,
                n_heads=config.n_heads,
                window=local if index % every else far,
                causal=self.causal,
                layer=index,
            )
            for index in range(config.n_layers)
        )
        self.rope = RotaryTable(config)
        self.sink_frames: int = setting(config, "sink_frames", 0)
        self.sink_mark = nn.Parameter(torch.zeros(config.d_model)) if self.sink_frames else None

    def marked(self, cond: Tensor, cache: Cache | None = None) -> Tensor:
        """Returns the conditions [b, n, d] with those of the first frames of a video marked as such."""
        if self.sink_mark is None:
            return cond
        n = cond.shape[1]
        position = torch.arange(n, device=cond.device) if cache is None else cache.positions(n).to(cond.device)
        return cond + ((position < self.sink_frames)[:, None] * self.sink_mark).to(cond.dtype)

    def forward(self, x: Tensor, cond: Tensor, doc_id: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Run all blocks.

        Args:
            x: [b, n, t, d] tokens, frame-major.
            cond: [b, n, d], one condition per frame.
            doc_id: [b, n] integers, the document of each frame; without a cache only.
            cache: frames before these; kept up to date when its updates are enabled. Causal models only.

        Returns:
            [b, n, t, d].

        Raises:
            ConfigError: a cache with a model that is not causal, more frames than there are positions, or doc_id with
                a model that has sinks.
            ValueError: doc_id with a cache, or of a shape other than [b, n].
        """
        frames, tokens = x.shape[1], x.shape[2]
        if doc_id is not None:
            if cache is not None:
                raise ValueError("doc_id cannot be used with a cache: a cache holds one document")
            if tuple(doc_id.shape) != (x.shape[0], frames):
                raise ValueError(f"doc_id must be [b, n] = [{x.shape[0]}, {frames}], got {list(doc_id.shape)}")
        if doc_id is not None and self.sink_frames:
            raise ConfigError(
                "a model with sink_frames takes one clip a row, without doc_id: every clip begins with its own sinks",
                key="model.sink_frames",
            )
        if cache is not None:
            if not self.causal:
                raise ConfigError(
                    "a cache needs a causal model: later frames change what a cached frame holds", key="model.causal"
                )
            cache.begin(frames, tokens, self.rope)
        elif frames > self.rope.n_frames:
            raise ConfigError(
                f"{frames} frames exceed the {self.rope.n_frames} positions of this model (n_frames)",
                key="model.n_frames",
            )
        cond = self.marked(cond, cache)
        masks = Masks(x.device, self.attention_backend)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, cond, self.rope, masks, doc_id, None, use_reentrant=False)
            else:
                x = block(x, cond, self.rope, masks, doc_id, cache)
        if cache is not None:
            cache.commit(frames)
        return x
