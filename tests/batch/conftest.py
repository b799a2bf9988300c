"""Workers that are forked instead of spawned, which saves each of them the import of torch."""

from __future__ import annotations

import multiprocessing

import pytest

from owl_wms.batch import local


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets local workers be forks of this process, with what is patched in it."""
    monkeypatch.setattr(local, "_CONTEXT", multiprocessing.get_context("fork"))
