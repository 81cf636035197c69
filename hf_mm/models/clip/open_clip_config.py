"""Configs of open_clip and ours: declared, implied by shapes, and written back, with how pictures are prepared.

Source:
    mlfoundations/open_clip (MIT).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...conversion.layouts import count_numbers, mlp_ratio, picture_side, published_heads, refuse_lacking, require
from ...conversion.pictures import INTERPOLATIONS, declared_processor, how_resized
from ...conversion.rules import ConversionError
from ...nn.patches import to_pair
from .configuration_clip import MMClipConfig, MMClipResNetConfig, MMClipTextConfig, MMClipVisionConfig
from .image_processing_clip import MMClipImageProcessorPil
from .tokenization_clip import PUBLISHED_MERGES

ACTIVATIONS = ("quick_gelu", "gelu")
CONVERT_DECLARED = "convert a folder with open_clip_config.json"
PUBLISHED_VOCABULARY = 512 + PUBLISHED_MERGES + 2

# What has one value here. Another value of the field describes a model that ours is not.
ONE_BLOCK = {
    "ls_init_value": None,
    "block_type": None,
    "final_ln_after_pool": False,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
ONE_VALUE = {
    "model_cfg": {"init_logit_bias": None, "multimodal_cfg": None},
    "vision_cfg": {
        **ONE_BLOCK,
        "attentional_pool": False,
        "no_ln_pre": False,
        "pos_embed_type": "learnable",
        "pool_type": "tok",
        "timm_model_name": None,
    },
    "text_cfg": {
        **ONE_BLOCK,
        "embed_cls": False,
        "no_causal_mask": False,
        "pool_type": "argmax",
        "proj_bias": False,
        "proj_type": "linear",
        "hf_model_name": None,
    },
}
# What is read, and what says nothing about a model with the values above.
READ = {
    "model_cfg": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"},
    "vision_cfg": {
        "layers",
        "width",
        "head_width",
        "mlp_ratio",
        "patch_size",
        "image_size",
        "act_kwargs",
        "norm_kwargs",
    },
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "act_kwargs", "norm_kwargs"},
}
SAYS_NOTHING = {
    "model_cfg": {"custom_text", "nonscalar_logit_scale", "output_dict", "cast_dtype"},
    "vision_cfg": {"patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads"}
    | {f"timm_{name}" for name in ("model_pretrained", "pool", "proj", "proj_bias", "drop", "drop_path")},
    "text_cfg": {"pad_id", "eos_id", "output_tokens", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"}
    | {f"hf_{name}" for name in ("model_pretrained", "proj_type", "pooler_type")},
}


def config_from_open_clip(model_cfg: Mapping[str, Any]) -> MMClipConfig:
    """The config that an ``open_clip_config.json`` declares.

    Args:
        model_cfg: its ``model_cfg``. Patch dropout, which acts in training alone, is not carried over.

    Raises:
        ValueError: a field has a value that ours has no equivalent of, or is unknown; all of them are named.
    """
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    found = [
        f"{group}.{name} = {value!r}"
        for group, fields in (("model_cfg", model_cfg), ("vision_cfg", vision), ("text_cfg", text))
        for name, value in fields.items()
        if name not in READ[group] | SAYS_NOTHING[group]
        and (name not in ONE_VALUE[group] or value != ONE_VALUE[group][name])
    ]
    if found:
        raise ValueError(f"open_clip_config.json describes a model that mm_clip is not: {', '.join(found)}.")
    quick_gelu, projection_dim = model_cfg.get("quick_gelu", False), model_cfg["embed_dim"]
    if not isinstance(quick_gelu, bool):
        raise ValueError(f"open_clip_config.json declares quick_gelu = {quick_gelu!r}, where true or false belongs.")
    width = text.get("width", 512)
    return _clip_config(
        _resnet_fields(vision) if isinstance(vision.get("layers"), list) else _vit_fields(vision, quick_gelu),
        {
            "hidden_size": width,
            "intermediate_size": int(width * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "max_position_embeddings": text.get("context_length", 77),
            "vocab_size": text.get("vocab_size", PUBLISHED_VOCABULARY),
            **_numerics(text, quick_gelu),
        },
        projection_dim,
        logit_scale_init_value=model_cfg.get("init_logit_scale", MMClipConfig.logit_scale_init_value),
    )


def _vit_fields(vision: Mapping[str, Any], quick_gelu: bool) -> dict[str, Any]:
    width = vision.get("width", 768)
    return {
        "hidden_size": width,
        "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
        "num_hidden_layers": vision.get("layers", 12),
        "num_attention_heads": width // vision.get("head_width", 64),
        "image_size": vision.get("image_size", 224),
        "patch_size": vision.get("patch_size", 16),
        **_numerics(vision, quick_gelu),
    }


def _resnet_fields(vision: Mapping[str, Any]) -> dict[str, Any]:
    width = vision["width"]
    return {
        "model_type": "mm_clip_resnet",
        "depths": vision["layers"],
        "width": width,
        "num_attention_heads": 32 * width // vision.get("head_width", 64),
        "image_size": vision.get("image_size", 224),
    }


def _numerics(tower: Mapping[str, Any], quick_gelu: bool) -> dict[str, Any]:
    """Activation and norm eps, which open_clip declares as arguments of their classes."""
    activation, norm = {**(tower.get("act_kwargs") or {})}, {**(tower.get("norm_kwargs") or {})}
    approximate, eps = activation.pop("approximate", "none"), norm.pop("eps", 1e-5)
    tanh = approximate == "tanh"
    if activation or norm or approximate not in ("none", "tanh") or (tanh and quick_gelu):
        raise ValueError(
            f"open_clip_config.json declares act_kwargs {tower.get('act_kwargs')} and norm_kwargs "
            f"{tower.get('norm_kwargs')} with quick_gelu = {quick_gelu}, which mm_clip has no equivalent of."
        )
    return {
        "hidden_act": "quick_gelu" if quick_gelu else "gelu_pytorch_tanh" if tanh else "gelu",
        "layer_norm_eps": eps,
    }


def config_from_open_clip_shapes(tensors: Mapping[str, torch.Tensor], activation: str) -> MMClipConfig:
    """The config that the shapes of a checkpoint in OpenAI's names imply.

    Numbers of heads leave no trace in shapes: they are those of the published models, see `published_heads`; all text
    towers have heads of 64.

    Raises:
        ConversionError: a key is missing, or the towers have no published number of heads.
        ValueError: the pictures are not square.
    """
    shapes = {name.removeprefix("text."): tuple(tensor.shape) for name, tensor in tensors.items()}
    needed = ["visual.conv1.weight", "text_projection", "positional_embedding", "token_embedding.weight"]
    needed += ["ln_final.weight", "transformer.resblocks.0.mlp.c_fc.weight"]
    is_vit = "visual.proj" in shapes
    needed += (
        ["visual.positional_embedding", "visual.transformer.resblocks.0.mlp.c_fc.weight"]
        if is_vit
        else ["visual.layer1.0.conv1.weight", "visual.attnpool.positional_embedding"]
    )
    require(shapes, needed, "CLIP checkpoint of OpenAI's or open_clip's")
    width, projection_dim = shapes["text_projection"]
    context, vocabulary = shapes["positional_embedding"][0], shapes["token_embedding.weight"][0]
    return _clip_config(
        _vit_fields_of(shapes, activation) if is_vit else _resnet_fields_of(shapes),
        {
            "hidden_size": width,
            "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
            "num_hidden_layers": count_numbers(shapes, "transformer.resblocks."),
            "num_attention_heads": _heads(width),
            "max_position_embeddings": context,
            "vocab_size": vocabulary,
            "hidden_act": activation,
        },
        projection_dim,
    )


def _vit_fields_of(shapes: Mapping[str, tuple[int, ...]], activation: str) -> dict[str, Any]:
    width, channels, *patch = shapes["visual.conv1.weight"]
    return {
        "hidden_size": width,
        "intermediate_size": shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": count_numbers(shapes, "visual.transformer.resblocks."),
        "num_attention_heads": published_heads(width),
        "num_channels": channels,
        "image_size": picture_side(shapes["visual.positional_embedding"][0] - 1, patch, otherwise=CONVERT_DECLARED),
        "patch_size": patch[0],
        "hidden_act": activation,
    }


def _resnet_fields_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    width = shapes["visual.layer1.0.conv1.weight"][0]
    return {
        "model_type": "mm_clip_resnet",
        "depths": [count_numbers(shapes, f"visual.layer{stage}.") for stage in range(1, 5)],
        "width": width,
        "num_attention_heads": _heads(32 * width),
        "num_channels": shapes["visual.conv1.weight"][1],
        "image_size": picture_side(
            shapes["visual.attnpool.positional_embedding"][0] - 1, (32, 32), otherwise=CONVERT_DECLARED
        ),
    }


def _clip_config(vision: dict[str, Any], text: dict[str, Any], projection_dim: int, **fields: Any) -> MMClipConfig:
    """The text is pooled at the largest id, which is the end token of every vocabulary in CLIP's order."""
    end = text["vocab_size"] - 1
    ids = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    return MMClipConfig(
        vision_config={**vision, "projection_dim": projection_dim, "pos_embed_interpolation": "bicubic_antialias"},
        text_config={**text, **ids, "projection_dim": projection_dim},
        projection_dim=projection_dim,
        **fields,
    )


def _heads(width: int) -> int:
    if width % 64:
        raise ConversionError(
            f"A tower of width {width} does not have heads of 64, and shapes do not tell how many it has: convert a "
            "folder with open_clip_config.json, or name the published model with --preset."
        )
    return width // 64


def open_clip_config(config: MMClipConfig) -> dict[str, Any]:
    """The ``model_cfg`` that open_clip builds the same model from.

    Raises:
        ValueError: there is none; what stands in the way is named.
    """
    vision, text = config.vision_config, config.text_config
    refuse_lacking("open_clip's CLIP", _what_open_clip_lacks(config))
    model_cfg = {
        "embed_dim": config.projection_dim,
        "quick_gelu": text.hidden_act == "quick_gelu",
        "init_logit_scale": config.logit_scale_init_value,
    }
    if isinstance(vision, MMClipResNetConfig):
        vision_cfg = {
            "image_size": vision.image_size,
            "layers": list(vision.depths),
            "width": vision.width,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "patch_size": None,
        }
    else:
        vision_cfg = {
            "image_size": vision.image_size,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            "patch_size": vision.patch_size,
            **_open_clip_numerics(vision),
        }
    text_cfg = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        **_open_clip_numerics(text),
    }
    return {**model_cfg, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def _what_open_clip_lacks(config: MMClipConfig) -> list[str]:
    vision, text = config.vision_config, config.text_config
    poolings = {"vision_pooling": config.vision_pooling, "text_pooling": config.text_pooling}
    lacking = [f"{name} = {value!r}" for name, value in poolings.items() if value != "pooler"]
    if not isinstance(vision, (MMClipVisionConfig, MMClipResNetConfig)):
        lacking.append(f"tower of type {vision.model_type}")
    elif vision.num_channels != 3:
        lacking.append(f"num_channels = {vision.num_channels}")
    if isinstance(vision, MMClipResNetConfig) and vision.batch_norm_eps != 1e-5:
        lacking.append(f"batch_norm_eps = {vision.batch_norm_eps}")
    if not isinstance(text, MMClipTextConfig):
        return [*lacking, f"tower of type {text.model_type}"]
    if text.eos_token_id != text.vocab_size - 1:
        lacking.append(f"eos_token_id = {text.eos_token_id} (it pools at the largest id)")
    activations = {tower.hidden_act for tower in (vision, text) if hasattr(tower, "hidden_act")}
    lacking += [f"hidden_act = {name!r}" for name in activations - {*ACTIVATIONS, "gelu_pytorch_tanh"}]
    if "quick_gelu" in activations and len(activations) > 1:
        lacking.append("QuickGELU in one tower alone")
    return lacking


def _open_clip_numerics(tower: PreTrainedConfig) -> dict[str, Any]:
    """Fields of a tower that differ from open_clip's defaults."""
    fields = {}
    if tower.intermediate_size != 4 * tower.hidden_size:
        fields["mlp_ratio"] = mlp_ratio(tower)
    if tower.hidden_act == "gelu_pytorch_tanh":
        fields["act_kwargs"] = {"approximate": "tanh"}
    if tower.layer_norm_eps != 1e-5:
        fields["norm_kwargs"] = {"eps": tower.layer_norm_eps}
    return fields


def image_processor_from_open_clip(
    preprocess_cfg: Mapping[str, Any], image_size: int | Iterable[int]
) -> MMClipImageProcessorPil:
    """The evaluation transform of open_clip, which converts to RGB after resizing.

    Args:
        preprocess_cfg: of ``open_clip_config.json``; empty for OpenAI's own.
        image_size: of the tower, which open_clip puts above the size declared there.

    Raises:
        ValueError: a resize mode or interpolation that the image processor does not have, or settings of a wrong type.
    """
    height, width = to_pair(image_size)
    mode = preprocess_cfg.get("resize_mode") or "shortest"
    interpolation = preprocess_cfg.get("interpolation") or "bicubic"
    if (
        mode not in ("shortest", "squash")
        or (mode == "shortest" and height != width)
        or interpolation not in ("bilinear", "bicubic", "random")  # random in training alone
    ):
        raise ValueError(
            f"Resizing by {mode!r} and {interpolation!r} to {height}x{width}, as preprocess_cfg of "
            "open_clip_config.json declares, is not supported."
        )
    given = {f"image_{name}": preprocess_cfg[name] for name in ("mean", "std") if preprocess_cfg.get(name) is not None}
    channels = {name: [value] * 3 if isinstance(value, (int, float)) else value for name, value in given.items()}
    settings = {
        "size": {"shortest_edge": height} if mode == "shortest" else {"height": height, "width": width},
        "crop_size": {"height": height, "width": width},
        "do_center_crop": mode == "shortest",
        "resample": INTERPOLATIONS.get(interpolation, INTERPOLATIONS["bicubic"]),
        "convert_rgb_first": False,
        **channels,
    }
    return declared_processor(MMClipImageProcessorPil, settings, "preprocess_cfg of open_clip_config.json")


def open_clip_preprocessing(
    image_processor: MMClipImageProcessorPil, image_size: int | Iterable[int]
) -> dict[str, Any]:
    """The ``preprocess_cfg`` of an image processor.

    Raises:
        ValueError: open_clip has no such transform.
    """
    height, width = to_pair(image_size)
    resizing = how_resized(image_processor, (height, width))
    if resizing is None or resizing[1] != height:
        raise ValueError(
            "open_clip cannot express how this model's pictures are prepared: it resizes (bilinear or bicubic) to the "
            f"model's {height}x{width}, crops, divides by 255 and normalises."
        )
    mode, _, interpolation = resizing
    return {
        "mean": list(image_processor.image_mean),
        "std": list(image_processor.image_std),
        "interpolation": interpolation,
        "resize_mode": mode,
    }
