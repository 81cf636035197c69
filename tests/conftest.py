"""Every test runs offline, on one thread, from a fixed seed."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import benchmarks  # noqa: F401 - before anything imports transformers

# isort: split
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
