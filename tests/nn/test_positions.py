"""Position tables on another grid, in the three conventions of published checkpoints."""

import pytest
import torch
from torch.nn import functional as F

from hf_mm.nn.positions import INTERPOLATIONS, resize_position_table

GRIDS = [((7, 7), (12, 12)), ((14, 14), (24, 24)), ((24, 24), (14, 14)), ((4, 6), (7, 5)), ((3, 3), (3, 8))]
WIDTH = 5


def table_for(grid, prefix: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(prefix + grid[0] * grid[1], WIDTH, dtype=dtype)


def as_image(table: torch.Tensor, grid) -> torch.Tensor:
    """(1, D, rows, columns), patch by patch."""
    image = torch.empty(1, table.shape[1], *grid, dtype=table.dtype)
    for row in range(grid[0]):
        for column in range(grid[1]):
            image[0, :, row, column] = table[row * grid[1] + column]
    return image


def corner_to_corner(image: torch.Tensor, size) -> torch.Tensor:
    """Linear between neighbours, first and last samples staying where they are, one axis after the other."""
    for dim, length in ((2, size[0]), (3, size[1])):
        source = image.shape[dim]
        slices = []
        for target in range(length):
            place = target * (source - 1) / (length - 1)
            below = min(int(place), source - 2)
            fraction = place - below
            slices.append((1 - fraction) * image.select(dim, below) + fraction * image.select(dim, below + 1))
        image = torch.stack(slices, dim)
    return image


REFERENCES = {
    "bilinear_corners": corner_to_corner,
    "bicubic": lambda image, size: F.interpolate(image, size, mode="bicubic", align_corners=False),
    "bicubic_antialias": lambda image, size: F.interpolate(
        image, size, mode="bicubic", align_corners=False, antialias=True
    ),
}


def test_every_convention_has_a_reference():
    assert set(REFERENCES) == set(INTERPOLATIONS)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(("source", "target"), GRIDS)
@pytest.mark.parametrize("interpolation", REFERENCES)
def test_each_convention(interpolation, source, target, prefix):
    table = table_for(source, prefix)
    resized = resize_position_table(table, source, target, interpolation, num_prefix_tokens=prefix)
    reference = REFERENCES[interpolation](as_image(table[prefix:], source), target)
    assert resized.shape == (prefix + target[0] * target[1], WIDTH)
    assert torch.equal(resized[:prefix], table[:prefix])
    torch.testing.assert_close(as_image(resized[prefix:], target), reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("source", "target"), [((16, 16), (24, 24)), ((16, 16), (7, 7))])
def test_the_conventions_are_not_equivalent(source, target):
    table = table_for(source)
    resized = [resize_position_table(table, source, target, name) for name in REFERENCES]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (resized[one] - resized[other]).abs().max() > 0.1


def test_corners_stay():
    table = table_for((4, 6))
    resized = resize_position_table(table, (4, 6), (9, 11), "bilinear_corners")
    corners, new_corners = [0, 5, 18, 23], [0, 10, 88, 98]
    torch.testing.assert_close(resized[new_corners], table[corners])


@pytest.mark.parametrize("interpolation", REFERENCES)
def test_the_same_grid_gives_the_table_itself(interpolation):
    table = table_for((4, 6), prefix=1)
    assert torch.equal(resize_position_table(table, (4, 6), [4, 6], interpolation, num_prefix_tokens=1), table)


@pytest.mark.parametrize("interpolation", REFERENCES)
def test_equal_positions_stay_equal(interpolation):
    """No convention shades towards the border."""
    table = torch.full((24, WIDTH), 0.7, dtype=torch.float64)
    resized = resize_position_table(table, (4, 6), (9, 5), interpolation)
    torch.testing.assert_close(resized, torch.full((45, WIDTH), 0.7, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_stays_and_the_gradient_comes_back(dtype):
    table = table_for((4, 4), prefix=1, dtype=dtype).requires_grad_()
    resized = resize_position_table(table, (4, 4), (6, 6), "bicubic_antialias", num_prefix_tokens=1)
    assert resized.dtype == dtype
    resized.sum().backward()
    assert table.grad[0].tolist() == [1.0] * WIDTH
    torch.testing.assert_close(table.grad[1:].sum(), torch.tensor(36.0 * WIDTH, dtype=dtype), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (16, {"num_prefix_tokens": 1}, "16 rows.*4x4 grid.*1 prefix tokens.*17"),
        (17, {}, "17 rows.*4x4 grid.*0 prefix tokens.*16"),
        (16, {"interpolation": "nearest"}, "'nearest'.*bilinear_corners, bicubic, bicubic_antialias"),
    ],
    ids=["no row for the class token", "a row too many", "unknown interpolation"],
)
def test_what_cannot_be_resized_is_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        resize_position_table(torch.zeros(rows, 2), (4, 4), (6, 6), **{"interpolation": "bicubic", **options})
