import numpy as np
import torch
from PIL import Image
from toys import noise

from hf_mm.evaluation.pixels import embed_pixels, nearest_pictures


def test_block_means_without_their_mean():
    picture = noise(1, size=64)[0]
    blocks = np.asarray(picture, dtype=np.float64).reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)).ravel()
    centred = blocks - blocks.mean()
    norm = np.linalg.norm(centred)
    level = 1 / norm  # Pillow rounds to whole grey levels along rows and again along columns
    np.testing.assert_allclose(embed_pixels([picture])[0], centred / norm, atol=1.1 * level)


def test_brightness_and_contrast_do_not_matter_and_flat_pictures_are_zero():
    pixels = np.asarray(noise(1)[0]) // 4 * 2
    pictures = [Image.fromarray(pixels), Image.fromarray(pixels // 2 + 100), Image.new("L", (5, 9), 200)]
    plain, faded, flat = embed_pixels(pictures)
    torch.testing.assert_close(plain, faded)
    assert torch.equal(flat, torch.zeros(768))


def test_the_nearest_picture_of_a_noisy_copy_is_its_original():
    originals = noise(6)
    copies = [Image.fromarray(np.asarray(picture) // 16 * 16) for picture in originals[::-1]]
    assert nearest_pictures(embed_pixels(copies), embed_pixels(originals)).tolist() == [5, 4, 3, 2, 1, 0]
