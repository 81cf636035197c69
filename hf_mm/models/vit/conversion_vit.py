"""Published Vision Transformers and ours: the authors' ``.npz`` files, transformers' ViT and timm's.

The three worlds compute the same weights differently; the config says whose way is meant:

    layout        activation   norm eps   another grid         pictures
    authors       tanh-GELU    1e-6       bilinear, corners    resized without antialiasing
    transformers  as declared  declared   bicubic              as declared
    timm          erf-GELU     1e-6       bicubic, antialias   as declared

Source:
    google-research/vision_transformer, transformers' ``models/vit``, timm (all Apache-2.0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ViTConfig
from transformers.utils import logging

from ...conversion.checkpoint import Checkpoint, open_checkpoint
from ...conversion.engine import Conversion, convert, export
from ...conversion.layouts import (
    count_numbers,
    declared_by,
    mlp_ratio,
    one_side,
    picture_side,
    published_heads,
    refuse_contradiction,
    refuse_lacking,
    refuse_variants,
    require,
    save_published,
    shared_fields,
    warn_of_interpolation,
)
from ...conversion.pictures import (
    INTERPOLATIONS,
    declared_processor,
    how_resized,
    processor_from_transformers,
    processor_to_transformers,
)
from ...conversion.rules import ConversionError, Rule, drop, listed, rename, split, transpose
from ...nn.patches import to_pair
from .configuration_vit import MMViTConfig
from .image_processing_vit import MMViTImageProcessorPil
from .modeling_vit import MMViTForImageClassification, MMViTModel

logger = logging.get_logger(__name__)

TIMM_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
PLAIN_TIMM_VIT = r"vit_[a-z]+_patch\d+(_gap)?_\d+"  # timm's names of models without a variant in them
TIMM_ARGUMENTS = {
    "img_size",
    "act_layer",
    "num_heads",
    "patch_size",
    "embed_dim",
    "depth",
    "mlp_ratio",
    "qkv_bias",
} | {
    *("in_chans", "num_classes", "class_token", "dynamic_img_size", "weight_init", "drop_rate", "pos_drop_rate"),
    *("patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "global_pool", "fc_norm"),
}
UNUSED_POOLER = ("vit.pooler.dense.weight", "vit.pooler.dense.bias")  # a classifier of transformers' does not run it
TIMM_PICTURES = {  # of timm's ViTs that declare nothing else
    "crop_mode": "center",
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
}
VARIANTS = {  # a part of a name: what a checkpoint with it is
    "conv_root": "a hybrid with a ResNet root",
    "patch_embed.backbone": "a hybrid with a ResNet root",
    "MAPHead_0": "pooled by attention (MAP head)",
    "attn_pool.": "pooled by attention",
    "Transformer/encoderblock/": "stored with all layers in one array (scan)",
    "fc_norm.": "pooled by a mean before its norm (fc_norm), as MAE's",
    "norm_pre.": "normed before its blocks (norm_pre), as CLIP's",
    ".ls1.": "scaled layer by layer (LayerScale)",
    "reg_token": "with register tokens",
    "dist_token": "distilled (dist_token), as DeiT",
    ".q_norm.": "with normed queries and keys",
    "mask_token": "of masked image modelling (mask_token)",
}


# Tables of names


def flax_rules(
    config: MMViTConfig,
    model_class: type[PreTrainedModel],
    linen: bool = False,
    positions: str = "Transformer/posembed_input/pos_embedding",
) -> list[Rule]:
    """The authors' layout to ours, without what stands before all of a file's names, such as ``opt/target/``.

    Args:
        config: gives the number of heads, over which their kernels are spread.
        model_class: ours, with or without classifier.
        linen: modules are counted by kind (``LayerNorm_1``, ``MlpBlock_0``), not one through (``LayerNorm_2``,
            ``MlpBlock_3``).
        positions: name of the position table.
    """
    trunk = "vit." if model_class is MMViTForImageClassification else ""
    names = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
    if not linen:
        names = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
    norm1, attention, norm2, mlp = (f"Transformer/encoderblock_{{i}}/{name}" for name in names)
    layer = f"{trunk}encoder.layers.{{i}}"
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    return [
        rename("cls", f"{trunk}embeddings.cls_token"),
        rename(positions, f"{trunk}embeddings.position_embeddings"),
        _hwio("embedding/kernel", f"{trunk}embeddings.patch_embeddings.weight"),
        rename("embedding/bias", f"{trunk}embeddings.patch_embeddings.bias"),
        *_flax_norm(norm1, f"{layer}.layer_norm1"),
        *(
            rule
            for theirs, ours in parts.items()
            for rule in _to_heads(f"{attention}/{theirs}", f"{layer}.self_attn.{ours}", config.num_attention_heads)
        ),
        *_from_heads(f"{attention}/out", f"{layer}.self_attn.out_proj", config.num_attention_heads),
        *_flax_norm(norm2, f"{layer}.layer_norm2"),
        *_flax_dense(f"{mlp}/Dense_0", f"{layer}.mlp.fc1"),
        *_flax_dense(f"{mlp}/Dense_1", f"{layer}.mlp.fc2"),
        *_flax_norm("Transformer/encoder_norm", f"{trunk}layernorm"),
        *_flax_dense("pre_logits", f"{trunk}pre_logits"),
        *_flax_dense("head", "classifier"),
    ]


def _flax_norm(theirs: str, ours: str) -> list[Rule]:
    return [rename(f"{theirs}/scale", f"{ours}.weight"), rename(f"{theirs}/bias", f"{ours}.bias")]


def _flax_dense(theirs: str, ours: str) -> list[Rule]:
    return [transpose(f"{theirs}/kernel", f"{ours}.weight"), rename(f"{theirs}/bias", f"{ours}.bias")]


def _hwio(theirs: str, ours: str) -> Rule:
    """A convolution kernel (height, width, in, out)."""
    return Rule(
        (theirs,),
        (ours,),
        lambda kernel: [kernel[0].permute(3, 2, 0, 1)],
        lambda weight: [weight[0].permute(2, 3, 1, 0)],
    )


def _to_heads(theirs: str, ours: str, heads: int) -> list[Rule]:
    """A kernel (D, heads, d) and a bias (heads, d)."""
    return [
        Rule(
            (f"{theirs}/kernel",),
            (f"{ours}.weight",),
            lambda kernel: [kernel[0].flatten(1).T],
            lambda weight: [weight[0].T.unflatten(1, (heads, -1))],
        ),
        Rule(
            (f"{theirs}/bias",),
            (f"{ours}.bias",),
            lambda bias: [bias[0].flatten()],
            lambda bias: [bias[0].unflatten(0, (heads, -1))],
        ),
    ]


def _from_heads(theirs: str, ours: str, heads: int) -> list[Rule]:
    """A kernel (heads, d, D) and a bias (D)."""
    return [
        Rule(
            (f"{theirs}/kernel",),
            (f"{ours}.weight",),
            lambda kernel: [kernel[0].flatten(0, 1).T],
            lambda weight: [weight[0].T.unflatten(0, (heads, -1))],
        ),
        rename(f"{theirs}/bias", f"{ours}.bias"),
    ]


def transformers_rules(model_class: type[PreTrainedModel], in_memory: bool = False) -> list[Rule]:
    """The layout of transformers' ViT to ours.

    Args:
        model_class: ours, with or without classifier.
        in_memory: the names that transformers 5 gives the modules, instead of those on disk, which are older.
    """
    trunk = "vit." if model_class is MMViTForImageClassification else ""
    modules = {
        "attention.attention.query": "self_attn.q_proj",
        "attention.attention.key": "self_attn.k_proj",
        "attention.attention.value": "self_attn.v_proj",
        "attention.output.dense": "self_attn.out_proj",
        "layernorm_before": "layer_norm1",
        "layernorm_after": "layer_norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    if in_memory:
        projections = {f"attention.{part}_proj": f"self_attn.{part}_proj" for part in "qkv"}
        modules = {
            **projections,
            "attention.o_proj": "self_attn.out_proj",
            "layernorm_before": "layer_norm1",
            "layernorm_after": "layer_norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }
    block = f"{trunk}layers.{{i}}" if in_memory else f"{trunk}encoder.layer.{{i}}"
    pooler = drop(*UNUSED_POOLER) if trunk else [rename("pooler.dense.{p}", "pre_logits.{p}")]
    return [
        rename(f"{trunk}embeddings.cls_token", f"{trunk}embeddings.cls_token"),
        rename(f"{trunk}embeddings.position_embeddings", f"{trunk}embeddings.position_embeddings"),
        rename(f"{trunk}embeddings.patch_embeddings.projection.{{p}}", f"{trunk}embeddings.patch_embeddings.{{p}}"),
        *(
            rename(f"{block}.{theirs}.{{p}}", f"{trunk}encoder.layers.{{i}}.{ours}.{{p}}")
            for theirs, ours in modules.items()
        ),
        rename(f"{trunk}layernorm.{{p}}", f"{trunk}layernorm.{{p}}"),
        *pooler,
        rename("classifier.{p}", "classifier.{p}"),
    ]


def timm_rules(model_class: type[PreTrainedModel]) -> list[Rule]:
    """The layout of timm's `VisionTransformer` to ours, with or without classifier."""
    trunk = "vit." if model_class is MMViTForImageClassification else ""
    layer = f"{trunk}encoder.layers.{{i}}"
    modules = {
        "norm1": "layer_norm1",
        "attn.proj": "self_attn.out_proj",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    return [
        rename("cls_token", f"{trunk}embeddings.cls_token"),
        rename("pos_embed", f"{trunk}embeddings.position_embeddings"),
        rename("patch_embed.proj.{p}", f"{trunk}embeddings.patch_embeddings.{{p}}"),
        split("blocks.{i}.attn.qkv.{p}", [f"{layer}.self_attn.{part}_proj.{{p}}" for part in "qkv"]),
        *(rename(f"blocks.{{i}}.{theirs}.{{p}}", f"{layer}.{ours}.{{p}}") for theirs, ours in modules.items()),
        rename("norm.{p}", f"{trunk}layernorm.{{p}}"),
        rename("head.{p}", "classifier.{p}"),
    ]


# Reading


def read_vit(
    source: str | Path | Checkpoint,
    *,
    revision: str | None = None,
    token: str | None = None,
    activation: str | None = None,
    image_size: int | Sequence[int] | None = None,
    num_attention_heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Conversion, MMViTImageProcessorPil]:
    """Reads a published ViT; nothing is written before ``Conversion.save``.

    Args:
        source: a file (``.npz`` or torch's), a folder, an id of the Hub, or what `open_checkpoint` made of one; in the
            authors', transformers' or timm's layout, which the names tell.
        revision: of a Hub id.
        token: of the Hub.
        activation: ``"gelu"``, ``"gelu_pytorch_tanh"`` or ``"quick_gelu"``, of timm's weights whose config does not tell.
        image_size: ``(height, width)`` that the position table is for, where it is not square.
        num_attention_heads: of timm's weights whose config does not tell, where heads are not those of the published
            sizes.
        dtype: of the weights.

    Returns:
        The conversion, checked, to a classifier where the source has one and to a trunk otherwise, and the image
        processor.

    Raises:
        ConversionError: keys are missing or left over, or shapes differ; they are named.
        ValueError: the checkpoint is of a variant that `MMViTModel` is not, which is named, does not say enough, or says
            something else than an option.
        OSError: the source cannot be read.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, revision=revision, token=token)
    layout = vit_layout(checkpoint.tensors)
    checkpoint = _select_flax(checkpoint) if layout == "authors" else checkpoint
    names = checkpoint.tensors.keys()
    refuse_variants(names, VARIANTS, "mm_vit")
    given = {"activation": activation, "num_attention_heads": num_attention_heads, "image_size": image_size}
    taken = {"timm": given.keys(), "authors": {"image_size"}, "transformers": set()}[layout]
    if told := [name for name, value in given.items() if value is not None and name not in taken]:
        raise ValueError(f"Checkpoints of the {layout} layout tell {', '.join(told)} themselves: leave that out.")
    if activation not in (None, *TIMM_ACTIVATIONS.values()):
        raise ValueError(f"activation must be one of {', '.join(TIMM_ACTIVATIONS.values())}, not {activation!r}.")
    with declared_by("config.json" if "config.json" in checkpoint.configs else "The checkpoint"):
        if layout == "authors":
            return _read_flax(checkpoint, image_size, dtype)
        if layout == "transformers":
            return _read_transformers(checkpoint, dtype)
        return _read_timm(checkpoint, activation, image_size, num_attention_heads, dtype)


def vit_layout(names: Iterable[str]) -> str:
    """``"authors"``, ``"transformers"`` or ``"timm"``, told by names that only one of them has.

    Raises:
        ConversionError: there is no such name.
    """
    layouts = {"Transformer/": "authors", "embeddings.": "transformers", "blocks.": "timm", "patch_embed.": "timm"}
    for name in names:
        for part, layout in layouts.items():
            if part in name:
                return layout
    raise ConversionError(
        f"This is no Vision Transformer of the authors', transformers' or timm's, whose names hold {', '.join(layouts)}: "
        f"it has {listed(names)}."
    )


def _select_flax(checkpoint: Checkpoint) -> Checkpoint:
    """The one Vision Transformer in a file of the authors', by the names after its prefix.

    A text tower, an optimiser's state or a temperature beside it are left aside; a warning names them.

    Raises:
        ConversionError: there are several.
    """
    tensors = checkpoint.tensors
    prefixes = {name.partition("Transformer/")[0] for name in tensors if "Transformer/" in name}
    whole = sorted(prefix for prefix in prefixes if f"{prefix}embedding/kernel" in tensors)
    if len(whole) > 1:
        raise ConversionError(f"There is more than one Vision Transformer here: under {listed(whole)}.")
    prefix = whole[0] if whole else min(prefixes, key=len)
    if left := [name for name in tensors if not name.startswith(prefix)]:
        logger.warning(f"Only what lies under {prefix} is read; {listed(left)} are left aside.")
    return checkpoint.select(prefix) if prefix else checkpoint


def _read_flax(
    checkpoint: Checkpoint, image_size: int | Sequence[int] | None, dtype: torch.dtype
) -> tuple[Conversion, MMViTImageProcessorPil]:
    names = checkpoint.tensors.keys()
    blocks = "Transformer/encoderblock_"
    linen = not any("MlpBlock_3" in name for name in names)
    attention, mlp = (
        ("MultiHeadDotProductAttention_0", "MlpBlock_0") if linen else ("MultiHeadDotProductAttention_1", "MlpBlock_3")
    )
    positions = "Transformer/posembed_input/pos_embedding"
    if "pos_embedding" in names:
        positions = "pos_embedding"
    shapes = _shapes(
        checkpoint,
        kernel="embedding/kernel",
        table=positions,
        query=f"{blocks}0/{attention}/query/kernel",
        mlp=f"{blocks}0/{mlp}/Dense_0/kernel",
    )
    *patch, channels, width = shapes["kernel"]
    has_cls, classes = "cls" in names, _labels(checkpoint, "head/bias")
    config = MMViTConfig(
        hidden_size=width,
        num_hidden_layers=count_numbers(names, blocks, "/"),
        num_attention_heads=shapes["query"][1],
        intermediate_size=shapes["mlp"][1],
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        image_size=_picture_side(shapes["table"][-2] - has_cls, patch, image_size),
        patch_size=one_side(patch),
        num_channels=channels,
        pooling="cls" if has_cls else "mean",
        pre_logits="pre_logits/kernel" in names,
        pos_embed_interpolation="bilinear_corners",
        **({"num_labels": classes} if classes else {}),
    )
    model_class = MMViTForImageClassification if classes else MMViTModel
    rules = flax_rules(config, model_class, linen, positions)
    height, width = to_pair(config.image_size)
    conversion = convert(checkpoint, model_class=model_class, config=config, rules=rules, dtype=dtype)
    return conversion, MMViTImageProcessorPil(size={"height": height, "width": width}, antialias=False)


def _read_transformers(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[Conversion, MMViTImageProcessorPil]:
    names = checkpoint.tensors.keys()
    declared = checkpoint.configs.get("config.json", {})
    if declared.get("model_type") != "vit":
        raise ValueError(
            f"The names are those of transformers' ViT, but no config.json of type vit is beside them (found: "
            f"{declared.get('model_type')}): convert the folder that has it."
        )
    classifier = "classifier.weight" in names
    if unused := [name for name in UNUSED_POOLER if classifier and name in names]:
        logger.warning(f"{listed(unused)} are left out: transformers' classifier does not run its pooler.")
    config = config_from_transformers(declared, pre_logits=not classifier and "pooler.dense.weight" in names)
    model_class = MMViTForImageClassification if classifier else MMViTModel
    rules = transformers_rules(model_class, in_memory=not any("encoder.layer." in name for name in names))
    conversion = convert(checkpoint, model_class=model_class, config=config, rules=rules, dtype=dtype)
    return conversion, image_processor_from_transformers(checkpoint.configs, config.image_size)


def config_from_transformers(declared: dict[str, Any], pre_logits: bool = False) -> MMViTConfig:
    """The config of transformers' ViT in the fields of ours.

    Args:
        declared: its ``config.json``.
        pre_logits: whether the weights have its pooler.

    Raises:
        ValueError: a pooler that is not a square tanh layer.
    """
    theirs = ViTConfig.from_dict(dict(declared))
    if pre_logits and (theirs.pooler_act != "tanh" or theirs.pooler_output_size != theirs.hidden_size):
        raise ValueError(
            f"mm_vit has no pooler of width {theirs.pooler_output_size} with {theirs.pooler_act}, only a tanh layer of "
            "the model's width."
        )
    return MMViTConfig(
        **shared_fields(theirs, MMViTConfig),
        hidden_dropout=theirs.hidden_dropout_prob,
        attention_dropout=theirs.attention_probs_dropout_prob,
        pre_logits=pre_logits,
        pos_embed_interpolation="bicubic",
    )


def _read_timm(
    checkpoint: Checkpoint,
    activation: str | None,
    image_size: int | Sequence[int] | None,
    heads: int | None,
    dtype: torch.dtype,
) -> tuple[Conversion, MMViTImageProcessorPil]:
    names = checkpoint.tensors.keys()
    declared = checkpoint.configs.get("config.json", {})
    arguments = declared.get("model_args") or {}
    if unknown := sorted(arguments.keys() - TIMM_ARGUMENTS):
        found = ", ".join(f"{name} = {arguments[name]!r}" for name in unknown)
        raise ValueError(f"mm_vit cannot be this model, which timm builds with {found}.")
    shapes = _shapes(checkpoint, kernel="patch_embed.proj.weight", table="pos_embed", mlp="blocks.0.mlp.fc1.weight")
    width, channels, *patch = shapes["kernel"]
    if (side := arguments.get("img_size")) is not None and image_size is not None:
        refuse_contradiction("config.json", "img_size", to_pair(side), to_pair(image_size), "--image-size")
    has_cls, classes = "cls_token" in names, _labels(checkpoint, "head.bias")
    pooling = declared.get("global_pool") or arguments.get("global_pool") or ("token" if has_cls else "avg")
    if pooling != ("token" if has_cls else "avg"):
        raise ValueError(
            f"mm_vit cannot be this model, which timm pools by {pooling!r} {'with' if has_cls else 'without'} a class token."
        )
    config = MMViTConfig(
        hidden_size=width,
        num_hidden_layers=count_numbers(names, "blocks."),
        num_attention_heads=_timm_heads(declared, width, heads),
        intermediate_size=shapes["mlp"][0],
        hidden_act=_timm_activation(declared, activation),
        layer_norm_eps=1e-6,
        image_size=_picture_side(shapes["table"][1] - has_cls, patch, image_size or arguments.get("img_size")),
        patch_size=one_side(patch),
        num_channels=channels,
        qkv_bias="blocks.0.attn.qkv.bias" in names,
        pooling="cls" if has_cls else "mean",
        pos_embed_interpolation="bicubic_antialias",
        **({"num_labels": classes} if classes else {}),
    )
    model_class = MMViTForImageClassification if classes else MMViTModel
    rules = timm_rules(model_class)
    conversion = convert(checkpoint, model_class=model_class, config=config, rules=rules, dtype=dtype)
    return conversion, image_processor_from_timm(declared.get("pretrained_cfg") or declared, config.image_size)


def _timm_heads(declared: Mapping[str, Any], width: int, given: int | None) -> int:
    """The number of heads: what ``num_heads`` or a plain name declares, else what is given, else the published one."""
    number = (declared.get("model_args") or {}).get("num_heads")
    refuse_contradiction("config.json", "num_heads", number, given, "--heads")
    if number is None and given is not None and is_plain_vit(declared):
        refuse_contradiction(
            f"{declared['architecture']} in config.json", "num_heads", published_heads(width), given, "--heads"
        )
    return number or given or published_heads(width)


def _timm_activation(declared: Mapping[str, Any], given: str | None) -> str:
    """The activation: what ``act_layer`` or a plain name declares, else what is given.

    Raises:
        ValueError: neither is there, or they contradict each other, or timm's activation is unknown.
    """
    name = (declared.get("model_args") or {}).get("act_layer")
    if name is not None and name not in TIMM_ACTIVATIONS:
        raise ValueError(f"mm_vit does not know timm's activation {name!r}.")
    if name is None and is_plain_vit(declared):
        name = "gelu"
    found = TIMM_ACTIVATIONS.get(name)
    refuse_contradiction("config.json", "activation", found, given, "--activation")
    if found is None and given is None:
        raise ValueError(
            f"Nothing tells which activation timm's {declared.get('architecture', 'model')} has: convert the folder with its "
            "config.json, or pass --activation gelu, gelu_pytorch_tanh or quick_gelu."
        )
    return found or given


def is_plain_vit(declared: Mapping[str, Any]) -> bool:
    """Whether the ``config.json`` of timm's names a model without a variant: erf-GELU, and the published heads."""
    return re.fullmatch(PLAIN_TIMM_VIT, declared.get("architecture") or "") is not None


def _shapes(checkpoint: Checkpoint, **names: str) -> dict[str, tuple[int, ...]]:
    """Shapes of named tensors. Raises ConversionError where one is missing."""
    require(checkpoint.tensors, names.values(), "Vision Transformer")
    return {key: tuple(checkpoint.tensors[name].shape) for key, name in names.items()}


def _picture_side(patches: int, patch: Sequence[int], given: int | Sequence[int] | None) -> int | list[int]:
    return picture_side(
        patches,
        patch,
        None if given is None else to_pair(given),
        "pass image_size as height and width (--image-size). Where a class token has no position (no_embed_class), mm_vit "
        "cannot be the model",
    )


def _labels(checkpoint: Checkpoint, bias: str) -> int:
    return checkpoint.tensors[bias].shape[0] if bias in checkpoint.tensors else 0


# Image processors


def image_processor_from_transformers(
    configs: Mapping[str, dict[str, Any]], image_size: int | Sequence[int]
) -> MMViTImageProcessorPil:
    """What a ``preprocessor_config.json`` declares; without one, a resize to the model's size."""
    height, width = to_pair(image_size)
    return processor_from_transformers(MMViTImageProcessorPil, configs, {"height": height, "width": width})


def image_processor_from_timm(
    pretrained_cfg: Mapping[str, Any], image_size: int | Sequence[int]
) -> MMViTImageProcessorPil:
    """timm's evaluation transform: the shorter side to n / crop_pct, then the n x n centre.

    Args:
        pretrained_cfg: of its ``config.json``; what is missing there has the value of timm's ViTs, and a warning says so.
        image_size: n, or ``(height, width)``.

    Raises:
        ValueError: a crop mode or interpolation that the image processor does not have.
    """
    height, width = to_pair(image_size)
    assumed = {name: value for name, value in TIMM_PICTURES.items() if pretrained_cfg.get(name) is None}
    if assumed:
        values = ", ".join(f"{name} = {value}" for name, value in assumed.items())
        logger.warning(
            f"Nothing declares how pictures are prepared, so it is assumed: {values}. Other weights of timm's have others."
        )
    declared = TIMM_PICTURES | {name: pretrained_cfg[name] for name in TIMM_PICTURES.keys() - assumed.keys()}
    mode, interpolation, part = declared["crop_mode"], declared["interpolation"], declared["crop_pct"]
    if (
        mode not in ("center", "squash")
        or (mode == "center" and height != width)
        or interpolation not in INTERPOLATIONS
    ):
        raise ValueError(
            f"Pictures prepared by crop_mode {mode!r} and {interpolation!r} for {height}x{width}, as timm's "
            "pretrained_cfg declares, are not supported."
        )
    rows, columns = math.floor(height / part), math.floor(width / part)
    size = {"shortest_edge": rows} if mode == "center" else {"height": rows, "width": columns}
    settings = {
        "size": size,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "resample": INTERPOLATIONS[interpolation],
        "image_mean": declared["mean"],
        "image_std": declared["std"],
    }
    return declared_processor(MMViTImageProcessorPil, settings, "pretrained_cfg of config.json")


# Back to the published layouts


def transformers_config(config: MMViTConfig, model_class: type[PreTrainedModel]) -> ViTConfig:
    """The config of transformers' ViT that means the same at the model's own picture size.

    Raises:
        ValueError: there is none; what stands in the way is named.
    """
    lacking = [f"pooling = {config.pooling!r}"] if config.pooling != "cls" else []
    lacking += [f"stem = {config.stem!r}"] if config.stem != "patch" else []
    lacking += (
        [f"patch_size = {config.patch_size}"] if not isinstance(one_side(to_pair(config.patch_size)), int) else []
    )
    if config.pre_logits and model_class is MMViTForImageClassification:
        lacking.append("pre_logits under a classifier")
    refuse_lacking("transformers' ViT", lacking)
    fields = shared_fields(config, ViTConfig)
    fields |= {name: one_side(to_pair(fields[name])) for name in ("image_size", "patch_size")}
    architecture = "ViTForImageClassification" if model_class is MMViTForImageClassification else "ViTModel"
    return ViTConfig(
        **fields,
        hidden_dropout_prob=config.hidden_dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        architectures=[architecture],
    )


def save_as_transformers(model: PreTrainedModel, image_processor: MMViTImageProcessorPil, folder: str | Path) -> Path:
    """Writes a folder that transformers opens without this package, as `ViTModel` or `ViTForImageClassification`.

    A trunk without `pre_logits` has no pooler there either: give `ViTModel` ``add_pooling_layer=False``. Stochastic
    depth, which acts in training alone, is not carried over. Warns of conventions that transformers does not have.

    Raises:
        ValueError: transformers' ViT cannot be this model; what it lacks is named. Nothing is written.
    """
    config = transformers_config(model.config, type(model))
    settings = image_processor.to_dict()
    warn_of_interpolation(model.config, "transformers", "bicubic")
    if not settings["antialias"]:
        logger.warning(
            "transformers resizes pictures with antialiasing alone, which these weights were not trained on."
        )
    jsons = {"preprocessor_config.json": processor_to_transformers(image_processor, "ViTImageProcessor")}
    state = export(model, transformers_rules(type(model)))
    return save_published(folder, state, "model.safetensors", jsons, parts=[config])


def save_as_timm(model: PreTrainedModel, image_processor: MMViTImageProcessorPil, folder: str | Path) -> Path:
    """Writes a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens.

    Raises:
        ValueError: timm's `VisionTransformer` cannot be this model; what it lacks is named. Nothing is written.
    """
    arguments = timm_arguments(model.config)
    classes = model.config.num_labels if isinstance(model, MMViTForImageClassification) else 0
    declared = {
        "architecture": "vit_base_patch16_224",
        "num_classes": classes,
        "num_features": model.config.hidden_size,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {**timm_preprocessing(image_processor, model.config.image_size), "num_classes": classes},
    }
    warn_of_interpolation(model.config, "timm", "bicubic_antialias")
    state = export(model, timm_rules(type(model)))
    return save_published(folder, state, "model.safetensors", {"config.json": declared})


def timm_arguments(config: MMViTConfig) -> dict[str, Any]:
    """What timm's `VisionTransformer` builds the same model from.

    Raises:
        ValueError: it cannot; what stands in the way is named.
    """
    activations = {ours: theirs for theirs, ours in TIMM_ACTIVATIONS.items()}
    lacking = [f"stem = {config.stem!r}"] if config.stem != "patch" else []
    lacking += ["pre_logits"] if config.pre_logits else []
    lacking += [f"layer_norm_eps = {config.layer_norm_eps}"] if config.layer_norm_eps != 1e-6 else []
    lacking += [f"hidden_act = {config.hidden_act!r}"] if config.hidden_act not in activations else []
    refuse_lacking("timm's VisionTransformer", lacking)
    return {
        "img_size": list(to_pair(config.image_size)),
        "patch_size": list(to_pair(config.patch_size)),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": mlp_ratio(config),
        "qkv_bias": config.qkv_bias,
        "act_layer": activations[config.hidden_act],
        "class_token": config.pooling == "cls",
        "global_pool": "token" if config.pooling == "cls" else "avg",
        "fc_norm": False,
    }


def timm_preprocessing(image_processor: MMViTImageProcessorPil, image_size: int | Sequence[int]) -> dict[str, Any]:
    """The ``pretrained_cfg`` of an image processor.

    Raises:
        ValueError: timm has no such transform.
    """
    height, width = to_pair(image_size)
    resizing = how_resized(image_processor, (height, width))
    if resizing is None:
        raise ValueError(
            "timm cannot express how this model's pictures are prepared: it resizes with antialiasing (bilinear or "
            f"bicubic), crops to the model's {height}x{width}, divides by 255 and normalises."
        )
    mode, rows, interpolation = resizing
    return {
        "input_size": [3, height, width],
        "interpolation": interpolation,
        "crop_pct": _crop_part(height, rows) if mode == "shortest" else 1.0,
        "crop_mode": "center" if mode == "shortest" else "squash",
        "mean": list(image_processor.image_mean),
        "std": list(image_processor.image_std),
    }


def _crop_part(side: int, resized: int) -> float:
    """The crop_pct from which timm, which truncates, gets `resized`: the shortest decimal one."""
    for digits in range(1, 17):
        part = round(side / resized, digits)
        if part and math.floor(side / part) == resized:
            return part
    return math.nextafter(side / resized, 0)
