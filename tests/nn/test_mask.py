"""The mask rule against a loop in plain Python, and its two forms against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owl_wms.nn.mask import FrameMask

CPU = torch.device("cpu")


def by_hand(mask: FrameMask, batch: int) -> torch.Tensor:
    """[batch, query tokens, key tokens], one frame pair at a time."""
    out = torch.zeros(batch, mask.queries * mask.tokens, mask.keys * mask.tokens, dtype=torch.bool)
    for b in range(batch):
        for i in range(mask.queries * mask.tokens):
            for j in range(mask.keys * mask.tokens):
                q, k = i // mask.tokens + mask.keys - mask.queries, j // mask.tokens
                near = mask.window is None or abs(q - k) < mask.window
                document = mask.doc_id is None or mask.doc_id[b, q] == mask.doc_id[b, k]
                out[b, i, j] = near and document and (k <= q or not mask.causal)
    return out


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 5),
    cached=st.integers(0, 4),
    tokens=st.integers(1, 3),
    window=st.none() | st.integers(1, 6),
    causal=st.booleans(),
    docs=st.booleans(),
)
def test_dense_mask_is_the_rule(
    queries: int, cached: int, tokens: int, window: int | None, causal: bool, docs: bool
) -> None:
    cached = 0 if docs else cached
    doc_id = torch.randint(0, 2, (2, queries)) if docs else None
    mask = FrameMask(queries=queries, keys=queries + cached, tokens=tokens, window=window, causal=causal, doc_id=doc_id)
    batch = 2 if docs else 1
    wanted = by_hand(mask, batch)
    assert torch.equal(mask.dense(CPU)[:, 0], wanted)
    if mask.hides_nothing:
        assert wanted.all()
    rule = mask.token_rule()
    b, q, k = torch.arange(batch), torch.arange(wanted.shape[1]), torch.arange(wanted.shape[2])
    assert torch.equal(rule(b[:, None, None], 0, q[None, :, None], k[None, None]).expand_as(wanted), wanted)


def test_a_block_mask_is_kept_unless_documents_decide() -> None:
    plain = FrameMask(queries=4, keys=4, tokens=64, causal=True)
    assert plain.block_mask(CPU) is FrameMask(queries=4, keys=4, tokens=64, causal=True).block_mask(CPU)
    first = FrameMask(queries=4, keys=4, tokens=64, causal=True, doc_id=torch.tensor([[0, 0, 1, 1]]))
    second = FrameMask(queries=4, keys=4, tokens=64, causal=True, doc_id=torch.tensor([[0, 1, 1, 1]]))
    assert first.block_mask(CPU) is not second.block_mask(CPU)


@pytest.mark.parametrize(("window", "hides"), [(None, False), (4, False), (3, True)])
def test_one_new_frame_needs_a_mask_only_beyond_its_window(window: int | None, hides: bool) -> None:
    assert FrameMask(queries=1, keys=4, tokens=2, window=window, causal=True).hides_nothing is not hides
