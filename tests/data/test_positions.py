"""A loader's position: the rest of an epoch is read once each, on any number of ranks and in any batch size.

Run: python -m pytest tests/data/test_positions.py
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from owl_wms.data.loading import ResumableLoader
from owl_wms.errors import DataError

COUNT = 48


class Numbers(Dataset[Any]):
    """Sample i is the number i."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def loader(
    batch_size: int, rank: int = 0, world_size: int = 1, *, count: int = COUNT, seed: int = 3
) -> ResumableLoader:
    settings: dict[str, Any] = {"seed": seed, "rank": rank, "world_size": world_size, "num_workers": 0}
    return ResumableLoader(Numbers(count), batch_size, collate_fn=lambda x: (torch.tensor(x),), **settings)


def read(source: ResumableLoader, batches: int | None = None) -> list[int]:
    found: list[int] = []
    for (batch,) in source:
        found += batch.tolist()
        batches = None if batches is None else batches - 1
        if batches == 0:
            break
    return found


@pytest.mark.parametrize("before", [(1, 1), (2, 2), (3, 1), (1, 4)])
@pytest.mark.parametrize("after", [(1, 1), (2, 1), (4, 1), (1, 3), (2, 4), (1, 2)])
def test_the_rest_of_an_epoch_is_read_once_each(before: tuple[int, int], after: tuple[int, int]) -> None:
    firsts = [loader(before[0], rank, before[1]) for rank in range(before[1])]
    done = [sample for first in firsts for sample in read(first, 2)]
    (state,) = {tuple(first.state_dict().items()) for first in firsts}
    rest = []
    for rank in range(after[1]):
        second = loader(after[0], rank, after[1])
        second.load_state_dict(dict(state))
        rest += read(second)
        assert second.epoch == 1
    assert len(set(done + rest)) == len(done) + len(rest), "nothing twice"
    left = COUNT - len(done)
    assert len(rest) == left - left % (after[0] * after[1]), "only what fills no batch is left out"


def test_one_shape_continues_exactly() -> None:
    whole, first = loader(4), loader(4)
    order = read(whole)
    assert read(first, 5) == order[:20]
    second = loader(4)
    second.load_state_dict(first.state_dict())
    assert read(second) == order[20:]
    assert read(second) == read(whole), "the next epochs agree as well"


def test_positions_of_earlier_versions_count_batches() -> None:
    order = read(loader(4))
    source = loader(4)
    source.load_state_dict({"epoch": 0, "seen": 5})
    assert read(source) == order[20:]


@pytest.mark.parametrize(("changes", "said"), [({"count": 60}, "count 48, now 60"), ({"seed": 4}, "seed 3, now 4")])
def test_another_order_is_told_and_read_from_its_beginning(
    changes: dict[str, int], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = loader(4)
    read(first, 3)
    second = loader(4, **changes)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        second.load_state_dict(first.state_dict())
    assert f"({said}): epoch 0 is read from its beginning" in caplog.text
    assert sorted(read(second)) == list(range(changes.get("count", COUNT)))


def test_a_change_of_shape_can_leave_nothing_of_an_epoch() -> None:
    first = loader(1)
    read(first, COUNT - 1)
    second = loader(4)
    second.load_state_dict(first.state_dict())
    assert second.epoch == 1
    assert read(second) == []
    assert sorted(read(second)) == list(range(COUNT)), "the next epoch is whole"


def test_too_little_data_names_the_key_to_lower() -> None:
    with pytest.raises(DataError, match=r"^3 windows do not fill one batch of 4: lower train.batch_size, or add data$"):
        loader(4, count=3)
    with pytest.raises(DataError, match=r"one batch of 2 on each of 2 ranks: lower train.batch_size"):
        loader(2, world_size=2, count=3)
    with pytest.raises(DataError, match=r"lower train.n_samples, or add data$"):
        ResumableLoader(Numbers(1), 2, collate_fn=tuple, num_workers=0, batch_key="train.n_samples")
