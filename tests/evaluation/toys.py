"""Small models for the tests of evaluation: a real CLIP, and one whose embeddings are a table."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn

from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.clip.processing_clip import MMClipProcessor
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer


def small_clip() -> tuple[MMClipModel, MMClipProcessor]:
    """A CLIP for 16x16 pictures with random weights large enough to tell inputs apart."""
    torch.manual_seed(0)
    tokenizer = MMClipTokenizer.train_from_iterator(["a red cat", "a photo of a dog"], 530, model_max_length=12)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = MMClipConfig(
        projection_dim=8,
        vision_config={**tower, "image_size": 16, "patch_size": 8, "attention_dropout": 0.5},
        text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 12, **ends},
    )
    model = MMClipModel(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model, MMClipProcessor(MMClipImageProcessorPil(size=16), tokenizer)


def noise(count: int, size: int = 16) -> list[Image.Image]:
    """Pictures of coloured noise, the same at every call."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


class TableModel(nn.Module):
    """Embeds picture or text number i as row i of a table."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, image_table: torch.Tensor, text_table: torch.Tensor):
        super().__init__()
        self.image_table, self.text_table = image_table.float(), text_table.float()
        self.logit_scale = torch.zeros(1)

    def get_image_features(self, pixel_values):
        return SimpleNamespace(pooler_output=self.image_table[pixel_values.long()])

    def get_text_features(self, input_ids):
        return SimpleNamespace(pooler_output=self.text_table[input_ids])


class TableProcessor:
    """Turns pictures and texts into their numbers; by default they are numbers already."""

    def __init__(self, image_number=int, text_number=int):
        self.image_number, self.text_number = image_number, text_number

    def __call__(self, images=None, text=None, **kwargs):
        if images is not None:
            return {"pixel_values": torch.tensor([float(self.image_number(image)) for image in images])}
        return {"input_ids": torch.tensor([self.text_number(one) for one in text])}
