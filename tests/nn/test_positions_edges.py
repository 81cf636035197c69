"""Position tables: the very table where nothing changes, and sentences that name the right numbers."""

import pytest
import torch

from hf_mm.nn.positions import INTERPOLATIONS, resize_position_table


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_same_grid_copies_nothing(interpolation):
    table = torch.zeros(7, 2)
    assert resize_position_table(table, (2, 3), [2, 3], interpolation, num_prefix_tokens=1) is table


def test_a_refused_table_is_told_both_sides_of_the_grid():
    with pytest.raises(ValueError, match="has 25 rows, but a 4x6 grid with 0 prefix tokens has 24"):
        resize_position_table(torch.zeros(25, 2), (4, 6), (2, 2), "bicubic")


@pytest.mark.parametrize("target", [(1, 3), (3, 1), (2, 2)], ids=str)
def test_a_turned_grid_is_another_grid(target):
    """As many rows in the table do not make it the same grid."""
    table = torch.arange(8.0).reshape(4, 2)
    resized = resize_position_table(table, (1, 4) if target[0] > 1 else (4, 1), target, "bicubic")
    assert resized.shape == (target[0] * target[1], 2)
