"""A converted BLIP-2 against transformers' own, on the same random pictures and texts."""

from __future__ import annotations

import torch
from transformers import Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, PreTrainedModel

from ...conversion.checkpoint import Checkpoint
from ...conversion.peers import built_by, largest_difference
from ...nn.patches import to_pair
from .conversion_blip2 import is_transformers_layout
from .modeling_blip2 import MMBlip2ForConditionalGeneration

BATCH, LENGTH = 2, 6


def peer_of(published: Checkpoint, dtype: str | None = None) -> str:
    """What the check compares with.

    Raises:
        ValueError: there is nothing to compare with, or a dtype that rounds is asked for.
    """
    if not is_transformers_layout(published):
        raise ValueError(
            "The check compares with transformers' BLIP-2, which does not open LAVIS's files: leave --check out."
        )
    if dtype not in (None, "float32"):
        raise ValueError(f"The check compares in float32, which --dtype {dtype} rounds: leave one of them out.")
    return "transformers' BLIP-2"


@torch.no_grad()
def compare_with_peer(published: Checkpoint, model: PreTrainedModel) -> dict[str, float]:
    """max |difference| / max |theirs| in float32, the peer opened from the published folder.

    Args:
        published: what `open_checkpoint` opened.
        model: ours, converted from it.
    """
    generates = isinstance(model, MMBlip2ForConditionalGeneration)
    their_class = Blip2ForConditionalGeneration if generates else Blip2ForImageTextRetrieval
    with built_by("transformers"):
        theirs = their_class.from_pretrained(published.folder, dtype=torch.float32).eval()
    return (_generation if generates else _retrieval)(model.float(), theirs)


def _retrieval(ours: PreTrainedModel, theirs: PreTrainedModel) -> dict[str, float]:
    theirs.config.image_token_index = None  # or it would cut as many ids from every text as there are queries
    pictures, ids = _pictures(ours), _ids(ours.config.qformer_config.vocab_size)
    mask = torch.ones_like(ids)
    pairs = torch.arange(BATCH)[:, None].repeat(1, 2)
    cosines = ours(input_ids=ids, pixel_values=pictures, return_loss=False).logits_per_image * ours.temperature
    return {
        "cosines": largest_difference(cosines, theirs(pictures, ids, mask).logits_per_image),
        "matching": largest_difference(
            ours.get_matching_logits(ids, mask, pixel_values=pictures, pairs=pairs),
            theirs(pictures, ids, mask, use_image_text_matching_head=True).logits_per_image,
        ),
    }


def _generation(ours: PreTrainedModel, theirs: PreTrainedModel) -> dict[str, float]:
    config, index = ours.config, theirs.config.image_token_index
    pictures, words = _pictures(ours), _ids(config.text_config.vocab_size, index)
    slots = (BATCH, config.num_query_tokens)
    ids, their_ids = (torch.cat([torch.full(slots, slot), words], dim=1) for slot in (config.image_token_id, index))
    decoder = {"decoder_input_ids": words} if config.is_encoder_decoder else {}
    mask = torch.ones_like(ids)
    found = ours(input_ids=ids, pixel_values=pictures, attention_mask=mask, **decoder).logits
    expected = theirs(pictures, their_ids, attention_mask=mask, **decoder).logits
    return {"logits": largest_difference(found, expected)}


def _pictures(model: PreTrainedModel) -> torch.Tensor:
    """``(B, 3, H, W)``."""
    height, width = to_pair(model.config.vision_config.image_size)
    return torch.randn(BATCH, 3, height, width, generator=torch.Generator().manual_seed(0))


def _ids(vocab_size: int, unless: int | None = None) -> torch.Tensor:
    """``(B, T)`` of any words but one."""
    ids = torch.randint(vocab_size - 1, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids if unless is None else ids + (ids >= unless)
