"""Any dual encoder (CLIP and its relatives, ours or transformers') by what they share, with words of one's own."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


def word_embeddings(dual: PreTrainedModel) -> nn.Module:
    """The table of the text tower's token embeddings."""
    return dual.text_model.get_input_embeddings()


def check_ids(dual: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """Raises ValueError for an id beyond the text tower's vocabulary."""
    size = word_embeddings(dual).num_embeddings
    if not torch.compiler.is_compiling() and (highest := int(input_ids.max())) >= size:
        raise ValueError(
            f"input_ids holds id {highest}, but the model's vocabulary has {size}: after adding tokens call "
            "model.resize_token_embeddings(len(tokenizer))."
        )


def vision_side(dual: PreTrainedModel) -> list[nn.Module]:
    """All modules that picture embeddings may come from: those that are not the text tower's."""
    return [module for name, module in dual.named_children() if not name.startswith("text_")]


def word_width(config: PreTrainedConfig) -> int:
    """Width of the text tower's token embeddings."""
    text = config.text_config
    return getattr(text, "embedding_size", None) or text.hidden_size


def joint_width(config: PreTrainedConfig) -> int:
    """Width of the space in which a dual encoder's pictures and texts meet."""
    width = getattr(config, "projection_dim", None) or getattr(config.text_config, "projection_size", None)
    return width or config.text_config.hidden_size


def texts_with_words(
    dual: PreTrainedModel,
    input_ids: torch.Tensor,
    words: torch.Tensor,
    places: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> BaseModelOutputWithPooling:
    """Encodes texts some of whose tokens are vectors instead of ids.

    Args:
        dual: the encoder.
        input_ids: ``(N, T)``; what stands at `places` matters to the pooling alone.
        words: ``(M, D)``, token embeddings, positions not yet added.
        places: ``(N, T)`` bool with M ones: in reading order, the k-th takes the k-th word.
        attention_mask: ``(N, T)``, 1 for tokens.
        **kwargs: of the text tower.

    Returns:
        As of `dual.get_text_features`: `pooler_output` ``(N, P)`` in the joint space, not of unit length.
    """
    takers = (dual.get_text_features, dual.text_model.forward)
    if not all("inputs_embeds" in inspect.signature(taker).parameters for taker in takers):
        return _with_hook(dual, input_ids, words, places, attention_mask, kwargs)
    if hasattr(dual.text_model, "end_positions"):
        ends = dual.text_model.end_positions(input_ids)
        kwargs["pooling_positions"] = ends
        if not torch.compiler.is_compiling():  # nothing after the last end token is looked at
            length = int(ends.max()) + 1
            input_ids, places = input_ids[:, :length], places[:, :length]
            attention_mask = attention_mask[:, :length] if attention_mask is not None else None
    embeds = _put(word_embeddings(dual)(input_ids), words, places)
    return dual.get_text_features(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)


def _put(embeds: torch.Tensor, words: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return embeds.masked_scatter(places[..., None], words.to(embeds.dtype))


def _with_hook(dual, input_ids, words, places, attention_mask, kwargs) -> BaseModelOutputWithPooling:
    """For text towers that take ids alone: the output of their embedding table is replaced on its way."""
    table = word_embeddings(dual)
    check_ids(dual, input_ids)
    hook = table.register_forward_hook(lambda module, args, embeds: _put(embeds, words, places))
    try:
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        return dual.get_text_features(input_ids=input_ids, **mask, **kwargs)
    finally:
        hook.remove()
