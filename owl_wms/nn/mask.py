"""Decides which frames see which: causal order, a window, and documents, stated once and used by both attention
implementations.

Usage:
    mask = FrameMask(queries=6, keys=6, tokens=64, window=16, causal=True)
    mask.dense(device)          # bool [1, 1, 384, 384] for scaled_dot_product_attention
    mask.block_mask(device)     # the same for flex_attention
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameMask:
    """Visibility between query frames and key frames; all tokens of a frame share it.

    Attributes:
        queries: number of query frames.
        keys: number of key frames, at least `queries`; the queries are the last of them.
        tokens: tokens in a frame.
        window: a query sees keys less than this many frames away; None is no limit.
        causal: a query sees no later frame.
        doc_id: [b, keys] integers; a query sees its own document only. Needs queries == keys.
    """

    queries: int
    keys: int
    tokens: int
    window: int | None = None
    causal: bool = False
    doc_id: Tensor | None = None

    def visible(self, batch: Any, query: Any, key: Any) -> Any:
        """The rule, on frame indices counted from the first key frame (ints or integer tensors)."""
        seen = (query >= 0) & (key >= 0)
        if self.window is not None:
            seen = seen & (query - key < self.window) & (key - query < self.window)
        if self.causal:
            seen = seen & (key <= query)
        if self.doc_id is not None:
            seen = seen & (self.doc_id[batch, query] == self.doc_id[batch, key])
        return seen

    @property
    def hides_nothing(self) -> bool:
        """True when every query sees every key, so that no mask is needed."""
        reach = self.keys - 1
        return (
            self.doc_id is None
            and (not self.causal or self.queries == 1)
            and (self.window is None or reach < self.window)
        )

    def frames(self, device: torch.device) -> Tensor:
        """Bool [b or 1, queries, keys]."""
        batches = 1 if self.doc_id is None else self.doc_id.shape[0]
        key = torch.arange(self.keys, device=device)
        query = key[self.keys - self.queries :]
        batch = torch.arange(batches, device=device)
        out: Tensor = self.visible(batch[:, None, None], query[None, :, None], key[None, None, :]).expand(
            batches, -1, -1
        )
        return out

    def dense(self, device: torch.device) -> Tensor:
        """Bool [b or 1, 1, queries * tokens, keys * tokens]."""
        by_token = self.frames(device).repeat_interleave(self.tokens, 1).repeat_interleave(self.tokens, 2)
        return by_token.unsqueeze(1)

    def token_rule(self) -> Callable[[Any, Any, Any, Any], Any]:
        """The rule as flex_attention wants it: (batch, head, query token, key token) -> bool."""
        tokens, offset = self.tokens, self.keys - self.queries

        def rule(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return self.visible(batch, query // tokens + offset, key // tokens)

        return rule

    def block_mask(self, device: torch.device) -> BlockMask:
        """Returns the mask for flex_attention; the next call gets the same unless it depends on documents."""
        if self.doc_id is None:
            return _kept_block_mask(self.queries, self.keys, self.tokens, self.window, self.causal, str(device))
        return _make_block_mask(self, self.doc_id.shape[0], device)


def _make_block_mask(mask: FrameMask, batches: int | None, device: torch.device) -> BlockMask:
    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(
        mask.token_rule(),
        B=batches,
        H=None,
        Q_LEN=mask.queries * mask.tokens,
        KV_LEN=mask.keys * mask.tokens,
        device=str(device),
    )


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # training uses it too, and autograd cannot save tensors made in inference mode
def _kept_block_mask(queries: int, keys: int, tokens: int, window: int | None, causal: bool, device: str) -> BlockMask:
    mask = FrameMask(queries=queries, keys=keys, tokens=tokens, window=window, causal=causal)
    return _make_block_mask(mask, None, torch.device(device))
