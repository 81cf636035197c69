"""A converted Pic2Word against open_clip's CLIP and the published equations, on the same random pictures and texts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...conversion.checkpoint import Checkpoint
from ...conversion.peers import built_by, import_peer, largest_difference
from ...nn.patches import to_pair
from ..clip.open_clip_config import open_clip_config
from .conversion_pic2word import CLIP_ENTRY, MAPPER_ENTRY
from .modeling_pic2word import Pic2WordModel

BATCH = 4


def peer() -> str:
    """What the check compares with. Raises OSError where it is not installed."""
    import_peer("open_clip")
    return "open_clip's CLIP with the published equations"


@torch.no_grad()
def compare_with_peer(published: Checkpoint, model: Pic2WordModel) -> dict[str, float]:
    """max |difference| / max |theirs|, the peer built from the CLIP that the authors' file stores.

    Args:
        published: what `open_pic2word` opened.
        model: ours, converted from it.
    """
    clip = model.config.clip_config
    with built_by("open_clip"):
        theirs = _open_clip_model(published.select(f"{CLIP_ENTRY}.").tensors, open_clip_config(clip))
    pictures, texts, places = _inputs(clip, model.config.placeholder_token_id)
    embeds = theirs.encode_image(pictures)
    words = _words(published.select(f"{MAPPER_ENTRY}.").tensors, embeds)
    rows = torch.arange(BATCH)

    def put(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        return output.index_put((rows, places), words)

    theirs.token_embedding.register_forward_hook(put)
    features = model.get_image_features(pictures).pooler_output
    ours = {
        "picture embeddings": (features, embeds),
        "pseudo-words": (model.mapper(features).pseudo_words, words),
        "composed embeddings": (
            model.get_composed_features(texts, vision_features=features).pooler_output,
            theirs.encode_text(texts),
        ),
    }
    return {name: largest_difference(*pair) for name, pair in ours.items()}


def _open_clip_model(tensors: Mapping[str, torch.Tensor], model_cfg: dict) -> nn.Module:
    import open_clip

    theirs = open_clip.CLIP(**{**model_cfg, "quick_gelu": True})  # as the authors' code has it, whatever ours says
    theirs.load_state_dict({name: tensors[name] for name in theirs.state_dict()})  # copies into float32
    return theirs.eval()


def _words(tensors: Mapping[str, torch.Tensor], embeds: torch.Tensor) -> torch.Tensor:
    """The authors' network: ReLU after each layer but the last. Dropout is nothing here."""
    hidden, number = embeds, 0
    while (name := f"layers.{number}.0") + ".weight" in tensors:
        hidden = (hidden @ tensors[f"{name}.weight"].float().T + tensors[f"{name}.bias"].float()).clamp(min=0)
        number += 1
    return hidden @ tensors["fc_out.weight"].float().T + tensors["fc_out.bias"].float()


def _inputs(clip, placeholder: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures, texts ``(B, T)`` of any ids with one placeholder each, ended and padded by the end token, and its place."""
    generator = torch.Generator().manual_seed(0)
    height, width = to_pair(clip.vision_config.image_size)
    pictures = torch.randn(BATCH, clip.vision_config.num_channels, height, width, generator=generator)
    text = clip.text_config
    ids = torch.randint(0, text.vocab_size, (BATCH, text.max_position_embeddings), generator=generator)
    ids[(ids == placeholder) | (ids == text.eos_token_id)] = (placeholder + 1) % text.eos_token_id
    places = torch.arange(1, BATCH + 1)
    ids[torch.arange(BATCH), places] = placeholder
    for row, place in enumerate(places.tolist()):
        ids[row, place + 1 + row :] = text.eos_token_id
    return pictures, ids, places
