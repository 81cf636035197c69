"""A small Pic2Word with its processor, for 16x16 pictures."""

import torch
from torch import nn

from hf_mm.models.pic2word.modeling_pic2word import Pic2WordModel
from hf_mm.models.pic2word.processing_pic2word import Pic2WordProcessor
from tests.evaluation.toys import small_clip


def small_pic2word(seed: int = 0) -> tuple[Pic2WordModel, Pic2WordProcessor]:
    """Random weights, large enough to tell inputs apart; the seed is that of the mapping network."""
    clip, processor = small_clip()
    tokenizer = processor.tokenizer
    (placeholder,) = tokenizer("*", add_special_tokens=False)["input_ids"]
    torch.manual_seed(seed)
    model = Pic2WordModel.from_clip_pretrained(clip, placeholder_token_id=placeholder, hidden_dim=16)
    for parameter in model.mapper.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model, Pic2WordProcessor(processor.image_processor, tokenizer)
