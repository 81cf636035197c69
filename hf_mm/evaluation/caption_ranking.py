"""Which of many captions does a captioner find likeliest under a picture? Its language model as a ranker.

The start of the text, pictures included, is read once for each picture; every caption goes on from what was kept of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..composite.language_model import (
    IGNORED,
    embed_with_slots,
    has_rows,
    read_embeds,
    read_once,
    shared_start,
)
from .embeddings import inference

PLACES = 512  # of captions in one pass of the language model


def score_captions(
    model: nn.Module,
    processor: Any,
    vision_features: torch.Tensor,
    captions: Sequence[str],
    wanted: torch.Tensor | None = None,
    places: int = PLACES,
    progress: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-likelihood of captions under pictures, in nats.

    Args:
        model: such as `MMBlip2ForConditionalGeneration` with a decoder-only language model; its device, dtype and mode
            are kept.
        processor: turns ``num_images=`` and ``suffix=`` into its inputs; every caption goes on from the processor's prompt.
        vision_features: ``(n, ...)``, what the vision tower gives for each picture.
        captions: C of them.
        wanted: ``(n, C)`` bool, the pairs to score; by default all.
        places: tokens of captions in one pass: memory is places x vocabulary.
        progress: show a bar.

    Returns:
        Sums over the tokens of a caption, its end included, ``(n, C)``, minus infinity where not wanted; and how many
        tokens each caption has, ``(C,)``. Float32 and int64 on the CPU.

    Raises:
        ValueError: the language model is an encoder-decoder or keeps no keys and values, there are no captions or pictures, `wanted` has another
            shape, or `places` is not positive.
    """
    if model.config.is_encoder_decoder:
        raise ValueError("captions are scored from the start of a text, which an encoder-decoder does not keep.")
    if len(captions) == 0 or len(vision_features) == 0:
        raise ValueError("there is nothing to score: pass at least one picture and one caption.")
    if places < 1:
        raise ValueError(f"places is {places}: it must be at least 1.")
    shape = (len(vision_features), len(captions))
    wanted = torch.ones(shape, dtype=torch.bool) if wanted is None else wanted
    if wanted.shape != shape:
        raise ValueError(f"wanted is {tuple(wanted.shape)}: it must be (pictures, captions), {shape}.")

    start, targets = _encode(processor, captions)
    lengths = torch.tensor([len(own) for own in targets])
    sums = torch.full(shape, -torch.inf)
    with inference(model):
        kept, first = _read_start(model, start.to(model.device), vision_features)
        first = first.cpu()
        with tqdm(total=int(wanted.sum()), unit=" captions", disable=not progress) as bar:
            for length in lengths.unique().tolist():
                columns = (lengths == length).nonzero().flatten()
                ids = torch.tensor([targets[column] for column in columns.tolist()])
                pairs = wanted[:, columns].nonzero()
                for rows, own in (part.unbind(dim=1) for part in pairs.split(max(1, places // length))):
                    told = ids[own]
                    scores = first[rows, told[:, 0]]
                    if length > 1:
                        scores = scores + _go_on(model, kept, rows, told).cpu()
                    sums[rows, columns[own]] = scores
                    bar.update(len(rows))
    return sums, lengths


def _encode(processor: Any, captions: Sequence[str]) -> tuple[torch.Tensor, list[list[int]]]:
    """The ids ``(1, P)`` that all captions go on from, and the ids of each caption."""
    inputs = processor(
        num_images=[1] * len(captions),
        suffix=list(captions),
        mode="caption",
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    told = inputs["labels"] != -100
    begin = int(told[0].long().argmax())
    return inputs["input_ids"][:1, :begin], [
        row[own].tolist() for row, own in zip(inputs["labels"], told, strict=True)
    ]


def _read_start(model: nn.Module, start: torch.Tensor, vision_features: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """What the language model keeps of the start under each of n pictures, and the log-probabilities ``(n, V)`` of what
    comes next."""
    features = vision_features.to(model.device, model.dtype)
    soft_tokens = model.get_image_features(vision_features=features, return_dict=True).pooler_output
    ids = start.expand(len(features), -1)
    slots = ids == model.config.image_token_id
    embeds, mask = embed_with_slots(model.language_model, ids, slots, soft_tokens), torch.ones_like(ids)
    words = shared_start(model.language_model, ids, slots, mask, torch.full_like(ids, IGNORED))
    rest, begun = read_once(model.language_model, embeds, words)
    outputs = read_embeds(model.language_model, rest, mask, **{"use_cache": True, "logits_to_keep": 1, **begun})
    if not has_rows(outputs.get("cache")):
        raise ValueError(
            f"captions go on from keys and values, which {model.language_model.config.model_type} does not keep."
        )
    return outputs.cache, outputs.logits[:, -1].float().log_softmax(dim=-1)


def _go_on(model: nn.Module, kept: Any, rows: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
    """``(p,)``: the log-likelihood of all but the first token of captions ``(p, length)`` after the starts `rows`."""
    cache = copy.deepcopy(kept)
    cache.batch_select_indices(rows.to(model.device))
    told = told.to(model.device)
    logits = model.language_model(input_ids=told[:, :-1], cache=cache, use_cache=True).logits
    nats = nn.functional.cross_entropy(logits.flatten(0, 1).float(), told[:, 1:].flatten(), reduction="none")
    return -nats.view(len(told), -1).sum(dim=1)
