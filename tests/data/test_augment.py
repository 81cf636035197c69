"""Augmentation against closed forms."""

import pytest
import torch

from hf_mm.data.augment import LUMA, NUM_DRAWS, AugmentArguments, ImageAugmentation

MIDDLE = 0.5  # the draw that changes nothing
ZOOM, RIGHT, DOWN, BRIGHTNESS, CONTRAST, SATURATION, MIRROR, SHARPNESS = range(NUM_DRAWS)
STRONG = AugmentArguments(
    zoom=0.3, shift=0.2, brightness=0.5, contrast=0.5, saturation=0.5, sharpness=0.8, flip=True, fill=0.3
)


def pictures(batch: int = 3, height: int = 12, width: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def draws(batch: int = 3, **values: float) -> torch.Tensor:
    """Draws that change nothing but what `values` name."""
    numbers = torch.full((batch, NUM_DRAWS), MIDDLE)
    for name, value in values.items():
        numbers[:, globals()[name.upper()]] = value
    return numbers


def random_draws(batch: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, NUM_DRAWS, generator=torch.Generator().manual_seed(seed))


def augment(pixels, numbers, may_flip=True, **strengths):
    flips = torch.full((len(pixels),), may_flip) if isinstance(may_flip, bool) else torch.tensor(may_flip)
    return ImageAugmentation(AugmentArguments(**strengths))(pixels, numbers, flips)


def test_zeros_change_nothing():
    assert torch.equal(augment(pictures(), random_draws(3)), pictures() / 255)


def test_middle_draws_change_nothing():
    changed = ImageAugmentation(STRONG)(pictures(), draws(mirror=0.7), torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(changed, pictures() / 255, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("right", "down"), [(0, 0), (3, 0), (-2, 1), (5, -4)])
def test_a_shift_by_whole_pixels_moves_them_and_fills(right, down):
    """The frame moves right and down over the picture: the picture itself goes left and up."""
    height, width, fill = 12, 20, 0.25
    expected = torch.full((3, 3, height, width), fill)
    kept = [slice(max(0, -n), side - max(0, n)) for n, side in ((down, height), (right, width))]
    taken = [slice(max(0, n), side - max(0, -n)) for n, side in ((down, height), (right, width))]
    expected[:, :, kept[0], kept[1]] = (pictures() / 255)[:, :, taken[0], taken[1]]
    numbers = draws(right=(1 + right / (0.5 * width)) / 2, down=(1 + down / (0.5 * height)) / 2)
    changed = augment(pictures(), numbers, shift=0.5, fill=fill)
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fill", [0.0, 0.5, 1.0])
def test_ground_of_the_fill_colour_stays(fill):
    pixels = torch.full((16, 3, 10, 10), round(fill * 255), dtype=torch.uint8)
    level = round(fill * 255) / 255
    changed = augment(pixels, random_draws(16), zoom=0.5, shift=0.5, flip=True, fill=level)
    torch.testing.assert_close(changed, torch.full_like(changed, level), rtol=0, atol=1e-6)


def test_zooming_in_shows_the_middle():
    """On a ramp, bilinear enlargement by 1.6 is a ramp 1.6 times as slow with the same middle."""
    ramp = torch.arange(16, dtype=torch.uint8).mul(10).expand(1, 3, 16, 16).contiguous()
    changed = augment(ramp, draws(1, zoom=1.0), zoom=0.6)
    expected = (7.5 + (torch.arange(16) - 7.5) / 1.6) * 10 / 255
    torch.testing.assert_close(changed[0, 0, 5], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(augment(ramp.mT, draws(1, zoom=1.0), zoom=0.6), changed.mT, rtol=0, atol=1e-5)


def test_zooming_out_by_two_leaves_the_fill_around():
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    changed = augment(pixels, draws(1, zoom=0.0), zoom=0.5, fill=1.0)
    assert torch.equal(changed[..., 5:11, 5:11], torch.zeros(1, 3, 6, 6))
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[3:13, 3:13] = False
    assert (changed[0, :, outside] == 1).all()


def test_mirrors_are_exact_and_only_where_allowed():
    numbers = draws(4)
    numbers[:, MIRROR] = torch.tensor([0.1, 0.1, 0.9, 0.9])
    changed = augment(pictures(4), numbers, may_flip=[True, False, True, False], flip=True)
    expected = pictures(4) / 255
    expected[0] = expected[0].flip(-1)
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-5)
    plain = augment(pictures(4), numbers, flip=False, shift=1e-9)
    torch.testing.assert_close(plain, pictures(4) / 255, rtol=0, atol=1e-5)


@pytest.mark.parametrize("draw", [0.0, 0.3, 1.0])
def test_brightness_multiplies(draw):
    changed = augment(pictures(), draws(brightness=draw), brightness=0.6)
    torch.testing.assert_close(changed, (pictures() / 255 * (1 + 0.6 * (2 * draw - 1))).clamp(0, 1))


@pytest.mark.parametrize("draw", [0.0, 0.3, 1.0])
def test_contrast_scales_the_distance_to_mid_grey(draw):
    changed = augment(pictures(), draws(contrast=draw), contrast=0.6)
    factor = 1 + 0.6 * (2 * draw - 1)
    torch.testing.assert_close(changed, (pictures() / 255 * factor + 0.5 * (1 - factor)).clamp(0, 1))


@pytest.mark.parametrize("draw", [0.0, 0.3, 1.0])
def test_saturation_scales_the_distance_to_grey(draw):
    changed = augment(pictures(), draws(saturation=draw), saturation=1.0)
    images = pictures() / 255
    grey = sum(weight * images[:, i] for i, weight in enumerate(LUMA))[:, None]
    factor = 2 * draw
    torch.testing.assert_close(changed, (factor * images + (1 - factor) * grey).clamp(0, 1))


def test_no_saturation_leaves_the_luma_of_television():
    changed = augment(pictures(), draws(saturation=0.0), saturation=1.0)
    red, green, blue = (pictures() / 255).unbind(1)
    torch.testing.assert_close(changed[:, 1], 0.299 * red + 0.587 * green + 0.114 * blue)


def test_sharpness_scales_the_distance_to_a_blurred_copy():
    pixels = pictures(2, 32, 32)
    images = pixels / 255
    blurred = augment(pixels, draws(2, sharpness=0.0), sharpness=1.0)
    # Interpolating between the blocks weighs those at the border a little more than their share.
    torch.testing.assert_close(blurred.mean((2, 3)), images.mean((2, 3)), rtol=0, atol=0.01)
    detail = (images - images.roll(1, -1)).abs().mean()
    assert (blurred - blurred.roll(1, -1)).abs().mean() < 0.4 * detail
    sharper = augment(pixels, draws(2, sharpness=0.75), sharpness=1.0)
    torch.testing.assert_close(sharper, (1.5 * images - 0.5 * blurred).clamp(0, 1), rtol=0, atol=1e-5)


def test_sharpness_leaves_flat_ground():
    pixels = torch.full((1, 3, 40, 24), 90, dtype=torch.uint8)
    torch.testing.assert_close(augment(pixels, draws(1, sharpness=1.0), sharpness=0.9), pixels / 255)


def test_a_batch_is_its_samples_one_by_one():
    pixels, numbers = pictures(8), random_draws(8)
    may_flip = torch.arange(8) % 2 == 0
    change = ImageAugmentation(STRONG)
    together = change(pixels, numbers, may_flip)
    alone = [change(pixels[i : i + 1], numbers[i : i + 1], may_flip[i : i + 1]) for i in range(8)]
    assert torch.equal(together, torch.cat(alone))
    twice = change(pixels[:1].repeat(2, 1, 1, 1), numbers[:1].repeat(2, 1), may_flip[:1].repeat(2))
    assert torch.equal(twice[0], twice[1])


def test_values_stay_within_0_and_1_and_the_input_unchanged():
    pixels = pictures(64)
    changed = ImageAugmentation(STRONG)(pixels, random_draws(64), torch.ones(64, dtype=torch.bool))
    assert changed.dtype == torch.float32
    assert changed.shape == pixels.shape
    assert changed.min() >= 0 and changed.max() <= 1
    assert (changed == 0).any() and (changed == 1).any()
    assert torch.equal(pixels, pictures(64))


@pytest.mark.parametrize("zoom", [1.0, -0.1])
def test_a_zoom_that_would_vanish_is_refused(zoom):
    with pytest.raises(ValueError, match=r"zoom must lie in \[0, 1\), not"):
        AugmentArguments(zoom=zoom)
