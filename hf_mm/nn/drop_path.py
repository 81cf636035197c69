"""Stochastic depth (Huang et al. 2016): a residual branch is dropped for whole samples."""

from __future__ import annotations

import torch
from torch import nn


class DropPath(nn.Module):
    """In training, zeroes the branch of each sample with probability `rate` and divides the others by 1 - rate."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return branch
        keep = branch.new_empty((branch.shape[0],) + (1,) * (branch.ndim - 1)).bernoulli_(1.0 - self.rate)
        return branch * keep / (1.0 - self.rate)


def linear_drop_path_rates(last_rate: float, num_layers: int) -> list[float]:
    """Rates that grow linearly from 0 at the first layer to `last_rate` at the last (Huang et al. 2016, section 3)."""
    return [last_rate * layer / max(num_layers - 1, 1) for layer in range(num_layers)]
