"""What tests of operators share."""

import pytest
import torch


@pytest.fixture
def _hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    torch.seed()
    torch.cuda.manual_seed(torch.initial_seed() % 2**31)
