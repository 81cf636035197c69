"""Tiny models of stage 2: any tower, any language model, and what they are fed."""

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config
from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration

SLOT = -200
QUERIES = 3
VOCABULARY = 64

_VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_VIT |= {"image_size": 32, "patch_size": 8}
TOWERS = {
    "mm_clip_vision": _VIT,
    "mm_clip_resnet": {"width": 8, "depths": [1, 1, 1, 1], "image_size": 64, "projection_dim": 16},
    "clip_vision_model": _VIT,
    "vit": _VIT,
    "dinov2": _VIT,
    "siglip_vision_model": _VIT,
    "convnext": {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 1, 1], "image_size": 64},
    "swin": {
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
        "image_size": 32,
        "patch_size": 4,
    },
    "mm_vit": _VIT,
    "eva_vit": _VIT,
}

_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_DECODER = {
    **_IDS,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
_OPT = {**_IDS, "hidden_size": 24, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_OPT |= {"max_position_embeddings": 128, "word_embed_proj_dim": 24, "dropout": 0.0}
_T5 = {**_IDS, "d_model": 24, "d_kv": 12, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 1}
_T5 |= {"dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"}
# Name of the case, then the type of the language model and its fields.
LANGUAGE_MODELS = {
    "opt": ("opt", _OPT),
    "opt-narrow-words": ("opt", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": ("llama", {**_DECODER, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**_DECODER, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_DECODER, "head_dim": 12}),
    "gpt2": (
        "gpt2",
        {**_IDS, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 128}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "bloom": ("bloom", {**_IDS, "hidden_size": 24, "n_layer": 2, "n_head": 2}),
    "gemma2-soft-capping": (
        "gemma2",
        {**_DECODER, "head_dim": 12, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0},
    ),
    "granite-scaling": (
        "granite",
        {**_DECODER, "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.2},
    ),
    "t5": ("t5", {**_T5, "tie_word_embeddings": True}),
    "bart": (
        "bart",
        {**_IDS, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0}
        | {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 2}
        | {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 128, "scale_embedding": True}
        | {"forced_eos_token_id": None},
    ),
}


def text_config(name: str, **fields) -> PreTrainedConfig:
    family, own = LANGUAGE_MODELS[name]
    return AutoConfig.for_model(family, **{**own, **fields})


def vision_config(name: str) -> PreTrainedConfig:
    return AutoConfig.for_model(name, **TOWERS[name])


def lively(model: PreTrainedModel, scale: float = 0.15) -> PreTrainedModel:
    """Draws every parameter anew, so that none is 0 or 1 and each matters; norms stay near 1. Tied ones stay tied."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        is_gain = parameter.ndim == 1 and name.endswith("weight") and "gemma" not in model.config.model_type
        parameter.data.copy_(drawn + 1 if is_gain else drawn)
    return model


def qformer_fields(use_text: bool = False, **fields) -> dict:
    small = {"num_query_tokens": QUERIES, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 24, "dropout": 0.0, "attention_dropout": 0.0, "use_text": use_text}
    if use_text:
        small |= {"vocab_size": 40, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 3}
        small |= {"max_position_embeddings": 16}
    return {**small, **fields}


def config_of(tower: str = "mm_clip_vision", language_model: str = "llama", use_text: bool = False, **fields):
    text = text_config(language_model, **fields.pop("text_fields", {}))
    return MMBlip2Config(
        vision_config=vision_config(tower),
        qformer_config=qformer_fields(use_text, **fields.pop("qformer_fields", {})),
        text_config=text,
        **fields,
    )


def stage2(tower: str = "mm_clip_vision", language_model: str = "llama", **fields) -> MMBlip2ForConditionalGeneration:
    torch.manual_seed(3)
    return lively(MMBlip2ForConditionalGeneration(config_of(tower, language_model, **fields))).eval()


def pictures(count: int, tower: str = "mm_clip_vision", seed: int = 5) -> torch.Tensor:
    side = TOWERS[tower]["image_size"]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def places_read(lm: PreTrainedModel) -> list[int]:
    """Rows times places of each pass of the language model from now on."""
    places = []
    next(module for module in lm.modules() if isinstance(module, nn.ModuleList))[0].register_forward_pre_hook(
        lambda _, args, kwargs: places.append((args or tuple(kwargs.values()))[0].shape[:2].numel()), with_kwargs=True
    )
    return places


def slots(images: int = 1) -> list[int]:
    return [SLOT] * QUERIES * images


def batch_of(rows: list[list[int]], side: str = "right", pad: int = 1) -> dict[str, torch.Tensor]:
    """Ids and mask of rows of different length."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        pads = longest - len(row)
        padding, zeros, ones = [pad] * pads, [0] * pads, [1] * len(row)
        ids.append(row + padding if side == "right" else padding + row)
        mask.append(ones + zeros if side == "right" else zeros + ones)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def labels_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The ids themselves where there are words."""
    spoken = (batch["attention_mask"] == 1) & (batch["input_ids"] != SLOT)
    return batch["input_ids"].where(spoken, -100)


def feed(
    model: MMBlip2ForConditionalGeneration, rows: list[list[int]], side: str = "right"
) -> dict[str, torch.Tensor]:
    """A batch with labels: the words of a decoder-only language model, and an answer of an encoder-decoder."""
    batch = batch_of(rows, side)
    if model.language_model.config.is_encoder_decoder:
        answers = batch_of([[7 + row, 8, 9 + row, 2][: 4 - row % 2] for row in range(len(rows))])
        return {**batch, "labels": answers["input_ids"].where(answers["attention_mask"] == 1, -100)}
    return {**batch, "labels": labels_of(batch)}
