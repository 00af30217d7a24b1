"""Shared by all tests: one thread, so that results repeat and two test runs do not fight."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
