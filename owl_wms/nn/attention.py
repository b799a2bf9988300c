"""Attention over frames: flex_attention where a sparse mask on a GPU pays, scaled_dot_product_attention everywhere
else.

Both are given the same `FrameMask`; `tests/nn/test_attention.py` holds them against each other.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from owl_wms.nn.mask import FrameMask
from owl_wms.nn.ring_cache import Cache, RingCache
from owl_wms.nn.rope import RotaryTable, rotate_by

Backend = Literal["auto", "flex", "sdpa"]

# flex_attention skips blocks of 128 x 128 tokens. Below 2048 x 2048 there are at most 256 of them, a dense mask is 4
# MiB, and the minute of compilation is not earned back; above, a dense mask grows with the square (9 GB at 1536 frames
# of 64 tokens).
FLEX_FROM_PAIRS = 2048 * 2048


class Masks:
    """The masks of one forward pass, each built at most once and shared by all layers that use it."""

    def __init__(self, device: torch.device, backend: Backend = "auto") -> None:
        self._device = device
        self._backend = backend
        self._built: dict[tuple[Any, ...], Any] = {}

    def uses_flex(self, mask: FrameMask) -> bool:
        """Returns whether this mask goes to flex_attention."""
        if self._backend != "auto":
            return self._backend == "flex"
        pairs = mask.queries * mask.keys * mask.tokens**2
        return self._device.type == "cuda" and pairs >= FLEX_FROM_PAIRS

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: FrameMask) -> Tensor:
        """Masked attention at scale 1/sqrt(e).

        Args:
            q: [b, heads, mask.queries * tokens, e].
            k: [b, heads, mask.keys * tokens, e].
            v: the shape of k.
            mask: who sees whom.

        Returns:
            The shape and dtype of q.
        """
        if mask.hides_nothing:
            return F.scaled_dot_product_attention(q, k, v)
        flex = self.uses_flex(mask)
        documents = None if mask.doc_id is None else id(mask.doc_id)
        key = (flex, mask.queries, mask.keys, mask.tokens, mask.window, mask.causal, documents)
        if key not in self._built:
            self._built[key] = mask.block_mask(self._device) if flex else mask.dense(self._device)
        if flex:
            run: Any = _compiled_flex() if self._device.type == "cuda" else flex_attention
            out: Tensor = run(q, k, v, block_mask=self._built[key])
            return out
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._built[key])


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


class Attention(nn.Module):
    """Self-attention with per-head RMS norm on queries and keys and rotary positions; keys `qkv`, `out`.

    Args:
        d_model: width.
        n_heads: must divide the width.
        window: frames that a query may look back (and forward, when not causal); None is all.
        causal: frame-causal.
        layer: index of this layer's store in the cache.
    """

    def __init__(self, *, d_model: int, n_heads: int, window: int | None, causal: bool, layer: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.n_heads, self.window, self.causal, self.layer = n_heads, window, causal, layer

    def forward(
        self,
        x: Tensor,
        rope: RotaryTable,
        masks: Masks,
        doc_id: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attend within x and, with a cache, to the frames before it.

        Args:
            x: [b, n, t, d].
            rope: the shared table.
            masks: the shared masks of this pass.
            doc_id: [b, n] integers, without a cache only.
            cache: earlier frames; its `begin` must have been called for this pass.

        Returns:
            [b, n, t, d].
        """
        b, n, t, d = x.shape
        q, k, v = self.qkv(x).view(b, n * t, 3, self.n_heads, d // self.n_heads).permute(2, 0, 3, 1, 4)
        if isinstance(cache, RingCache):
            assert cache.angles is not None
            cos, sin = cache.angles
        else:
            cos, sin = rope.at(0 if cache is None else cache.end, n)
        q = rotate_by(F.rms_norm(q, (q.shape[-1],)), cos, sin)
        k = rotate_by(F.rms_norm(k, (k.shape[-1],)), cos, sin)
        if isinstance(cache, RingCache):
            k, v, stored = cache.extend(self.layer, k, v, self.window)
            attended = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask=stored)
        else:
            window = self.window
            if cache is not None:
                if cache.max_window is not None:
                    window = cache.max_window if window is None else min(window, cache.max_window)
                k, v = cache.extend(self.layer, k, v, window)
            keys = k.shape[2] // t
            mask = FrameMask(queries=n, keys=keys, tokens=t, window=window, causal=self.causal, doc_id=doc_id)
            attended = masks.attend(q, k.to(q.dtype), v.to(q.dtype), mask)
        out: Tensor = self.out(attended.transpose(1, 2).reshape(b, n, t, d))
        return out
