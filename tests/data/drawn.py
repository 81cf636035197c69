"""Small pictures whose colour tells which row they belong to, and a processor and a model for them."""

import io
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.clip.processing_clip import MMClipProcessor
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer

COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 160, 20),
    "blue": (20, 20, 220),
    "yellow": (230, 230, 20),
    "black": (5, 5, 5),
    "white": (250, 250, 250),
    "purple": (130, 20, 130),
    "orange": (240, 140, 20),
}
NAMES = list(COLOURS)
SIDE = 16


def picture(colour: str, size: tuple[int, int] = (24, 20)) -> Image.Image:
    return Image.new("RGB", size, COLOURS[colour])


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def caption(colour: str) -> str:
    return f"a {colour} square"


def colour_of(image) -> str:
    """The colour nearest to the middle of a PIL image or a uint8 tensor (3, H, W)."""
    if isinstance(image, torch.Tensor):
        image = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    found = image.getpixel((image.width // 2, image.height // 2))
    return min(COLOURS, key=lambda name: sum(abs(a - b) for a, b in zip(COLOURS[name], found, strict=True)))


def save_pictures(folder: Path, names: list[str] = NAMES, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        picture(name).save(folder / f"{name}{suffix}")


def noise(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture with detail: its JPEG is long enough to be cut."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def cut_jpeg() -> bytes:
    """A JPEG cut at 60 % of its bytes."""
    whole = encoded(noise(0), "JPEG")
    return whole[: len(whole) * 6 // 10]


@cache
def tiny_processor() -> MMClipProcessor:
    tokenizer = MMClipTokenizer.train_from_iterator(map(caption, NAMES), vocab_size=560, model_max_length=12)
    return MMClipProcessor(MMClipImageProcessorPil(size=SIDE), tokenizer)


def tiny_clip() -> MMClipModel:
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = tiny_processor().tokenizer
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 12,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**tower, "image_size": SIDE, "patch_size": 8}
    return MMClipModel(MMClipConfig(projection_dim=8, vision_config=vision, text_config={**tower, **text}))
