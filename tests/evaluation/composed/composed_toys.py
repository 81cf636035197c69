"""A dual encoder whose rankings are known: a picture is the set of its colours, a sentence the set of its words."""

import json
import re
from types import SimpleNamespace

import numpy as np
import torch
from evaluation.toys import small_clip
from PIL import Image
from torch import nn

from hf_mm.image_utils import to_rgb
from hf_mm.models.pic2word.modeling_pic2word import Pic2WordModel
from hf_mm.models.pic2word.processing_pic2word import Pic2WordProcessor

COLORS = {  # word: colour that shows it; white shows nothing
    "cat": (255, 0, 0),
    "dog": (0, 255, 0),
    "bird": (0, 0, 255),
    "car": (255, 255, 0),
    "cartoon": (0, 255, 255),
    "origami": (255, 0, 255),
    "toy": (0, 0, 0),
    "sculpture": (128, 0, 0),
    "real": (0, 128, 0),
    "red": (0, 0, 128),
    "long": (128, 128, 0),
}
WORDS = list(COLORS)
STYLES = ("cartoon", "origami", "toy", "sculpture", "real", "red", "long")  # a word of these replaces the picture's
SIZE = 8


CIRR_PICTURES = {  # name: words that it shows
    "dev-0-0-img0": ("cat", "real"),
    "dev-0-0-img1": ("cat", "red"),
    "dev-1-0-img0": ("dog", "real"),
    "dev-1-0-img1": ("dog", "red"),
    "dev-2-0-img0": ("bird", "real"),
    "dev-2-0-img1": ("bird", "red"),
    "dev-3-0-img0": ("car", "real"),
    "dev-3-0-img1": ("car", "long"),
}
CIRR_NAMES = list(CIRR_PICTURES)
CIRR_PAIRS = [  # reference, caption, target
    (CIRR_NAMES[0], "make it red", CIRR_NAMES[1]),
    (CIRR_NAMES[2], "red, not as it was", CIRR_NAMES[3]),
    (CIRR_NAMES[5], "a real one", CIRR_NAMES[4]),
    (CIRR_NAMES[6], "as a * long one", CIRR_NAMES[7]),
]


def write_cirr(folder, split="val", below="", pairs=CIRR_PAIRS):
    """A copy of CIRR as published."""
    (folder / "captions").mkdir(parents=True, exist_ok=True)
    (folder / "image_splits").mkdir(exist_ok=True)
    rows = []
    for number, (reference, caption, target) in enumerate(pairs):
        row = {"pairid": 100 + number, "reference": reference, "caption": caption}
        members = [reference, target, *[name for name in CIRR_NAMES if name not in (reference, target)][:4]]
        row["img_set"] = {"id": number, "members": members, "reference_rank": 0, "target_rank": 1}
        if split == "val":
            row |= {"target_hard": target, "target_soft": {target: 1.0}}
        rows.append(row)
    directory = {"val": "dev", "test1": "test1"}[split]
    (folder / f"captions/cap.rc2.{split}.json").write_text(json.dumps(rows))
    files = {name: f"./{directory}/{name}.png" for name in CIRR_NAMES}
    (folder / f"image_splits/split.rc2.{split}.json").write_text(json.dumps(files))
    for name, words in CIRR_PICTURES.items():
        save(folder / below / directory / f"{name}.png", *words)
    return folder


def draw(*words, width=16, height=16):
    """A picture with a vertical band for each word."""
    bands = np.array_split(np.arange(width), len(words))
    pixels = np.zeros((height, width, 3), np.uint8)
    for word, columns in zip(words, bands, strict=True):
        pixels[:, columns] = COLORS[word]
    return Image.fromarray(pixels)


def save(path, *words, **options):
    """Draws into a file, without loss whatever its name ends in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(*words, **options).save(path, format="PNG")


class ColorProcessor:
    """Stretches pictures to 8x8 and counts words; keeps what it was given."""

    placeholder = "*"

    def __init__(self):
        self.pictures, self.texts = [], []

    def __call__(self, images=None, text=None, num_images=None, **kwargs):
        data = {}
        if images is not None:
            flat = [image for own in images for image in (own if isinstance(own, list) else [own])]
            self.pictures += flat
            small = [np.asarray(to_rgb(image).resize((SIZE, SIZE), Image.Resampling.NEAREST)) for image in flat]
            data["pixel_values"] = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).float()
        if text is not None:
            self.texts += text
            wanted = num_images or (1 if images is not None else 0)
            for one in text:
                assert len(re.findall(r"(?<!\\)\*", one)) == wanted, one
            data["input_ids"] = torch.tensor(
                [[float(word in re.findall(r"\w+", one)) for word in WORDS] for one in text]
            )
        return data


class ColorModel(nn.Module):
    """Pictures and sentences as sets of words, plus one number that every one has."""

    device, dtype = torch.device("cpu"), torch.float32

    def get_image_features(self, pixel_values):
        colors = torch.tensor(list(COLORS.values()))[:, None, :, None, None]
        pixels = ((pixel_values - colors).abs().amax(dim=2) <= 3).flatten(2).sum(dim=2)
        return output((pixels >= 4).float().T)

    def get_text_features(self, input_ids):
        return output(input_ids)

    def get_composed_features(self, input_ids, pixel_values=None, vision_features=None):
        if vision_features is None:
            vision_features = self.get_image_features(pixel_values).pooler_output
        pictures = (vision_features[:, :-1] > 0).float()
        styles = torch.tensor([word in STYLES for word in WORDS])
        replaced = (input_ids * styles).any(dim=1, keepdim=True) & styles
        return output(torch.maximum(pictures * ~replaced, input_ids))


def output(words):
    """Pooled embeddings of length other than 1."""
    return SimpleNamespace(pooler_output=3 * torch.cat([words, torch.full((len(words), 1), 0.1)], dim=1))


def small_pic2word():
    """A Pic2Word with random weights on `small_clip`, and its processor."""
    clip, processor = small_clip()
    model = Pic2WordModel.from_clip_pretrained(
        clip,
        placeholder_token_id=processor.tokenizer.convert_tokens_to_ids("*</w>"),
        image_dim=8,
        hidden_dim=12,
        word_dim=16,
        dropout=0.5,
    )
    return model, Pic2WordProcessor(processor.image_processor, processor.tokenizer)
