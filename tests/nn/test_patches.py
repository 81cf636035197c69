import pytest
import torch
from torch.nn import functional as F

from hf_mm.nn.patches import ChannelLayerNorm, ConvStem, patch_grid, to_pair

CHANNELS = [8, 16, 24]
STEMS = [("group", 4), ("layer", 0)]


def stem(norm: str, groups: int) -> ConvStem:
    torch.manual_seed(0)
    built = ConvStem(3, 12, CHANNELS, norm, groups, eps=1e-6).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


@pytest.mark.parametrize(("norm", "groups"), STEMS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 40), (8, 8)])
def test_each_convolution_halves_the_picture(norm, groups, height, width):
    features = stem(norm, groups)(torch.randn(2, 3, height, width, dtype=torch.float64))
    assert features.shape == (2, 12, height // 8, width // 8)


@pytest.mark.parametrize(("norm", "groups"), STEMS)
def test_a_picture_does_not_see_its_batch(norm, groups):
    """In training too, where BatchNorm would tie them."""
    built = stem(norm, groups).train()
    pixels = torch.randn(5, 3, 16, 24, dtype=torch.float64)
    together = built(pixels)
    alone = torch.cat([built(picture[None]) for picture in pixels])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)
    assert not dict(built.named_buffers())


def test_channel_layer_norm_treats_every_position_alone():
    norm = ChannelLayerNorm(6, eps=1e-5).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    features = 3 * torch.randn(2, 6, 4, 5, dtype=torch.float64) + 1
    normed = norm(features)
    for row in range(4):
        for column in range(5):
            reference = F.layer_norm(features[:, :, row, column], (6,), norm.weight, norm.bias, 1e-5)
            torch.testing.assert_close(normed[:, :, row, column], reference)


@pytest.mark.parametrize(("size", "pair"), [(7, (7, 7)), ((3, 4), (3, 4)), ([5, 6], (5, 6))])
def test_to_pair(size, pair):
    assert to_pair(size) == pair


@pytest.mark.parametrize(
    ("shape", "interpolate", "grid"),
    [((2, 3, 32, 48), False, (4, 3)), ((1, 3, 64, 16), True, (8, 1)), ((1, 3, 8, 16), True, (1, 1))],
)
def test_grid_of_patches(shape, interpolate, grid):
    assert patch_grid(torch.zeros(shape), 3, (32, 48), (8, 16), interpolate) == grid
