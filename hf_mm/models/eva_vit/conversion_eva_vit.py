"""Published EVA ViTs and ours: the flat layout of ``eva_vit_g.pth``, which LAVIS has too, and that of transformers' BLIP-2.

    layout        where                            prefix              after the blocks
    lavis         ``eva_vit_g.pth``                none                what LAVIS does not run: norm, head
                  BLIP-2's files of LAVIS          visual_encoder.     nothing
    transformers  `Blip2VisionModel`               none                post_layernorm, which is not the tower's: it is
                  BLIP-2's folders                 vision_model.       the ``ln_vision`` of LAVIS

Source:
    salesforce/LAVIS, ``lavis/models/eva_vit.py`` (BSD-3-Clause), transformers' ``models/blip_2`` (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Blip2VisionConfig
from transformers.utils import logging

from ...conversion.checkpoint import Checkpoint, open_checkpoint
from ...conversion.engine import Conversion, convert, export
from ...conversion.layouts import (
    count_numbers,
    declared_by,
    one_side,
    picture_side,
    published_heads,
    refuse_contradiction,
    refuse_lacking,
    refuse_variants,
    require,
    save_published,
    shared_fields,
)
from ...conversion.pictures import processor_from_transformers, processor_to_transformers
from ...conversion.rules import ConversionError, Rule, drop, listed, rename, split
from ...nn.patches import to_pair
from ..clip.image_processing_clip import MMClipImageProcessorPil
from .configuration_eva_vit import EvaViTConfig
from .modeling_eva_vit import EvaViTModel

logger = logging.get_logger(__name__)

LAYERS = EvaViTConfig.num_hidden_layers  # of the published g/14, whose file has one more
FIRST_BLOCK = {  # a name that every tower of a layout has, after its prefix
    "lavis": "blocks.0.attn.qkv.weight",
    "transformers": "encoder.layers.0.self_attn.qkv.weight",
}
NOT_RUN = ("norm.{p}", "fc_norm.{p}", "head.{p}")  # of eva_vit_g.pth
VARIANTS = {  # a part of a name: what a checkpoint with it is
    "blocks.0.attn.qkv.bias": "a ViT whose keys have a bias, as BLIP's first or timm's",
    "relative_position": "with relative positions, as BEiT's",
    "gamma_1": "scaled layer by layer (LayerScale)",
    "mask_token": "of masked image modelling (mask_token)",
    "attn.inner_attn_ln": "of EVA-02, with norms inside its blocks",
}


# Tables of names


def eva_rules(prefix: str = "", ours: str = "", num_hidden_layers: int = LAYERS) -> list[Rule]:
    """The layout of LAVIS to ours.

    Args:
        prefix: of all of its names, such as ``"visual_encoder."``.
        ours: prefix of all of our names, such as ``"vision_tower."``.
        num_hidden_layers: blocks that are kept. One more is dropped, and so are norm and head.
    """
    return [
        rename(f"{prefix}cls_token", f"{ours}embeddings.cls_token"),
        rename(f"{prefix}pos_embed", f"{ours}embeddings.position_embeddings"),
        rename(f"{prefix}patch_embed.proj.{{p}}", f"{ours}embeddings.patch_embeddings.{{p}}"),
        *(
            rule
            for number in range(num_hidden_layers)
            for rule in _eva_block(f"{prefix}blocks.{number}", f"{ours}encoder.layers.{number}")
        ),
        *drop(f"{prefix}blocks.{num_hidden_layers}.{{name*}}", *(f"{prefix}{name}" for name in NOT_RUN)),
    ]


def _eva_block(theirs: str, ours: str) -> list[Rule]:
    modules = {
        "norm1": "layer_norm1",
        "attn.proj": "self_attn.out_proj",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    return [
        split(f"{theirs}.attn.qkv.weight", [f"{ours}.self_attn.{part}_proj.weight" for part in "qkv"]),
        *(rename(f"{theirs}.attn.{part}_bias", f"{ours}.self_attn.{part}_proj.bias") for part in "qv"),
        *(rename(f"{theirs}.{name}.{{p}}", f"{ours}.{target}.{{p}}") for name, target in modules.items()),
    ]


def transformers_rules(prefix: str = "", ours: str = "") -> list[Rule]:
    """The layout of transformers' `Blip2VisionModel` to ours, without its ``post_layernorm``.

    Args:
        prefix: of all of its names, such as ``"vision_model."``.
        ours: prefix of all of our names, such as ``"vision_tower."``.
    """
    theirs, layer = f"{prefix}encoder.layers.{{i}}", f"{ours}encoder.layers.{{i}}"
    modules = {
        "layer_norm1": "layer_norm1",
        "self_attn.projection": "self_attn.out_proj",
        "layer_norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    return [
        rename(f"{prefix}embeddings.class_embedding", f"{ours}embeddings.cls_token"),
        rename(f"{prefix}embeddings.position_embedding", f"{ours}embeddings.position_embeddings"),
        rename(f"{prefix}embeddings.patch_embedding.{{p}}", f"{ours}embeddings.patch_embeddings.{{p}}"),
        split(f"{theirs}.self_attn.qkv.weight", [f"{layer}.self_attn.{part}_proj.weight" for part in "qkv"]),
        _without_k_bias(f"{theirs}.self_attn.qkv.bias", [f"{layer}.self_attn.{part}_proj.bias" for part in "qv"]),
        *(rename(f"{theirs}.{name}.{{p}}", f"{layer}.{target}.{{p}}") for name, target in modules.items()),
    ]


def _without_k_bias(source: str, targets: Iterable[str]) -> Rule:
    """A bias of queries, keys and values whose middle third is zero, see `refuse_k_bias`."""
    return Rule(
        (source,),
        tuple(targets),
        lambda bias: list(bias[0].chunk(3)[::2]),
        lambda parts: [torch.cat([parts[0], torch.zeros_like(parts[0]), parts[1]])],
    )


def refuse_k_bias(tensors: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    """Raises ConversionError where keys of a tower in transformers' layout have a bias, which ours have not."""
    biases = [name for name in tensors if name.startswith(prefix) and name.endswith("self_attn.qkv.bias")]
    if biased := [name for name in biases if tensors[name].chunk(3)[1].any()]:
        raise ConversionError(
            f"eva_vit cannot be this model, whose keys have a bias: the middle third of {listed(biased)} is not zero."
        )


# Reading


def read_eva_vit(
    source: str | Path | Checkpoint,
    *,
    revision: str | None = None,
    token: str | None = None,
    num_attention_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Conversion, MMClipImageProcessorPil]:
    """Reads a published EVA ViT; nothing is written before ``Conversion.save``.

    Args:
        source: ``eva_vit_g.pth``, a file of LAVIS's BLIP-2 that has its tower, a folder or Hub id of transformers' BLIP-2,
            or what `open_checkpoint` made of one. Of a whole BLIP-2 only the tower is read; a warning says so.
        revision: of a Hub id.
        token: of the Hub.
        num_attention_heads: of the layout of LAVIS, where it is not that of the published sizes.
        dtype: of the weights.

    Returns:
        The conversion, checked, and the image processor.

    Raises:
        ConversionError: keys are missing or left over, or shapes differ; they are named.
        ValueError: the checkpoint is of a variant that `EvaViTModel` is not, which is named, does not say enough, or says
            something else than an option.
        OSError: the source cannot be read.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, revision=revision, token=token)
    layout, prefix = eva_layout(checkpoint.tensors)
    tower = checkpoint.select(prefix)
    if left := checkpoint.tensors.keys() - {f"{prefix}{name}" for name in tower.tensors}:
        logger.warning(f"Only what lies under {prefix} is read; {listed(left)} are left aside.")
    if layout == "lavis":
        return _read_lavis(tower, num_attention_heads, dtype)
    with declared_by("config.json"):
        return _read_transformers(tower, num_attention_heads, dtype)


def eva_layout(names: Iterable[str]) -> tuple[str, str]:
    """``"lavis"`` or ``"transformers"``, and the prefix of the tower's names.

    Raises:
        ConversionError: there is no such tower, or more than one.
    """
    found = [
        (layout, name.removesuffix(first))
        for name in names
        for layout, first in FIRST_BLOCK.items()
        if name == first or name.endswith(f".{first}")
    ]
    if not found:
        raise ConversionError(
            f"This holds no EVA ViT, which would have {' or '.join(FIRST_BLOCK.values())}: it has {listed(names)}."
        )
    if len(found) > 1:
        raise ConversionError(f"There is more than one ViT here: under {listed(prefix for _, prefix in found)}.")
    return found[0]


def _read_lavis(
    checkpoint: Checkpoint, heads: int | None, dtype: torch.dtype
) -> tuple[Conversion, MMClipImageProcessorPil]:
    config = eva_config(checkpoint.tensors, num_attention_heads=heads)
    rules = eva_rules(num_hidden_layers=config.num_hidden_layers)
    conversion = convert(checkpoint, model_class=EvaViTModel, config=config, rules=rules, dtype=dtype)
    return conversion, published_image_processor(config)


def eva_config(
    tensors: Mapping[str, torch.Tensor], prefix: str = "", num_attention_heads: int | None = None
) -> EvaViTConfig:
    """The config that the shapes of the layout of LAVIS tell.

    Of 40 blocks of the published width, the last is left out as BLIP-2 does.

    Args:
        tensors: of the checkpoint.
        prefix: of the tower's names, such as ``"visual_encoder."``.
        num_attention_heads: where it is not that of the published sizes: shapes do not tell it.

    Raises:
        ConversionError: a tensor that tells a size is missing, or nothing tells the number of heads.
        ValueError: the checkpoint is of another architecture, or its position table of no square picture.
    """
    names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
    refuse_variants(names, VARIANTS, "eva_vit")
    kernel, table, mlp = (
        f"{prefix}{name}" for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    )
    require(tensors, (kernel, table, mlp), "EVA ViT")
    with declared_by("The checkpoint"):
        width, channels, *patch = tensors[kernel].shape
        layers = count_numbers(names, "blocks.")
        return EvaViTConfig(
            hidden_size=width,
            num_hidden_layers=LAYERS if (width, layers) == (EvaViTConfig.hidden_size, LAYERS + 1) else layers,
            num_attention_heads=num_attention_heads or published_heads(width),
            intermediate_size=tensors[mlp].shape[0],
            hidden_act="gelu",
            layer_norm_eps=1e-6,
            image_size=picture_side(
                tensors[table].shape[1] - 1, patch, otherwise="EVA's published ones are, so this is none of them"
            ),
            patch_size=one_side(patch),
            num_channels=channels,
        )


def _read_transformers(
    checkpoint: Checkpoint, heads: int | None, dtype: torch.dtype
) -> tuple[Conversion, MMClipImageProcessorPil]:
    declared = checkpoint.configs.get("config.json", {})
    config = config_from_transformers(declared)
    refuse_contradiction("config.json", "num_attention_heads", config.num_attention_heads, heads, "--heads")
    refuse_k_bias(checkpoint.tensors)
    logger.warning("post_layernorm is left out: it is BLIP-2's norm of the tower's features, not the tower's.")
    rules = [*transformers_rules(), *drop("post_layernorm.{p}")]
    conversion = convert(checkpoint, model_class=EvaViTModel, config=config, rules=rules, dtype=dtype)
    return conversion, image_processor_from_transformers(checkpoint.configs, config)


def config_from_transformers(declared: Mapping[str, Any]) -> EvaViTConfig:
    """The config of transformers' `Blip2VisionModel`, or of the tower of its BLIP-2, in the fields of ours.

    Its `initializer_range`, which is as good as zero, is not taken over.

    Args:
        declared: its ``config.json``.

    Raises:
        ValueError: it is of another model, or its queries and values have no bias.
    """
    vision = declared.get("vision_config") if declared.get("model_type") == "blip-2" else declared
    if not vision or vision.get("model_type") != Blip2VisionConfig.model_type:
        raise ValueError(
            "The names are those of transformers' BLIP-2, but no config.json of type blip-2 or blip_2_vision_model is beside "
            f"them (found: {declared.get('model_type')}): convert the folder that has it."
        )
    theirs = Blip2VisionConfig.from_dict(dict(vision))
    if not theirs.qkv_bias:
        raise ValueError("eva_vit cannot be this model, whose queries and values have no bias (qkv_bias = False).")
    fields = shared_fields(theirs, EvaViTConfig)
    return EvaViTConfig(**{name: value for name, value in fields.items() if name != "initializer_range"})


# Image processors


def published_image_processor(config: EvaViTConfig) -> MMClipImageProcessorPil:
    """CLIP's, but resizing to the model's size without regard to the sides' ratio, and without a crop."""
    height, width = to_pair(config.image_size)
    return MMClipImageProcessorPil(size={"height": height, "width": width}, do_center_crop=False)


def image_processor_from_transformers(
    configs: Mapping[str, dict[str, Any]], config: EvaViTConfig
) -> MMClipImageProcessorPil:
    """What a ``preprocessor_config.json`` or ``processor_config.json`` declares; the published one without."""
    height, width = to_pair(config.image_size)
    without_crop = partial(MMClipImageProcessorPil, do_center_crop=False)
    return processor_from_transformers(without_crop, configs, {"height": height, "width": width})


# Back to the published layouts


def export_lavis(model: EvaViTModel, prefix: str = "") -> dict[str, torch.Tensor]:
    """The weights as ``eva_vit_g.pth`` has them, without its last block, norm and head, which LAVIS does not run.

    Args:
        model: ours.
        prefix: of all names, such as ``"visual_encoder."``.
    """
    return export(model, eva_rules(prefix, num_hidden_layers=model.config.num_hidden_layers))


def save_as_transformers(model: EvaViTModel, image_processor: MMClipImageProcessorPil, folder: str | Path) -> Path:
    """Writes a folder that transformers opens without this package, as `Blip2VisionModel`.

    That has one more norm, which here has neither scale nor shift: its `hidden_states` are ours, its `last_hidden_state`
    is our last one normed. Stochastic depth, which acts in training alone, is not carried over.

    Raises:
        ValueError: transformers' `Blip2VisionModel` cannot be this model; what it lacks is named. Nothing is written.
    """
    config = transformers_config(model.config)
    state = export(model, transformers_rules())
    like = state["embeddings.patch_embedding.bias"]
    state |= {"post_layernorm.weight": torch.ones_like(like), "post_layernorm.bias": torch.zeros_like(like)}
    preprocessing = processor_to_transformers(image_processor, "BlipImageProcessor")
    jsons = {"preprocessor_config.json": {**preprocessing, "do_convert_rgb": True}}
    return save_published(folder, state, "model.safetensors", jsons, parts=[config])


def transformers_config(config: EvaViTConfig) -> Blip2VisionConfig:
    """The config of transformers' `Blip2VisionModel` that means the same.

    Raises:
        ValueError: there is none; what stands in the way is named.
    """
    sides = {"image_size": to_pair(config.image_size), "patch_size": to_pair(config.patch_size)}
    lacking = [f"{name} = {list(side)}" for name, side in sides.items() if len(set(side)) > 1]
    lacking += [f"num_channels = {config.num_channels}"] if config.num_channels != 3 else []
    refuse_lacking("transformers' Blip2VisionModel", lacking)
    fields = shared_fields(config, Blip2VisionConfig) | {name: side[0] for name, side in sides.items()}
    return Blip2VisionConfig(**fields, architectures=["Blip2VisionModel"])
