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

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel, ViTConfig
from transformers.utils import logging

from ...conversion.checkpoint import Checkpoint, Origin, open_checkpoint
from ...conversion.engine import Conversion, convert, export, whole_folder, write_json
from ...conversion.rules import ConversionError, Rule, listed, rename, split, transpose
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
WIDE_MODELS = (1280, 1408, 1664, 1792)  # H, g, G and e have 16 heads, all others heads of 64
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
    prefix: str = "",
    linen: bool = False,
    positions: str = "Transformer/posembed_input/pos_embedding",
) -> list[Rule]:
    """The authors' layout to ours.

    Args:
        config: gives the number of heads, over which their kernels are spread.
        model_class: ours, with or without classifier.
        prefix: of all names, such as ``opt/target/`` or ``params/``.
        linen: modules are counted by kind (``LayerNorm_1``, ``MlpBlock_0``), not one through (``LayerNorm_2``,
            ``MlpBlock_3``).
        positions: name of the position table.
    """
    trunk = "vit." if model_class is MMViTForImageClassification else ""
    names = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
    if not linen:
        names = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
    norm1, attention, norm2, mlp = (f"{prefix}Transformer/encoderblock_{{i}}/{name}" for name in names)
    layer = f"{trunk}encoder.layers.{{i}}"
    parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    return [
        rename(f"{prefix}cls", f"{trunk}embeddings.cls_token"),
        rename(f"{prefix}{positions}", f"{trunk}embeddings.position_embeddings"),
        _hwio(f"{prefix}embedding/kernel", f"{trunk}embeddings.patch_embeddings.weight"),
        rename(f"{prefix}embedding/bias", f"{trunk}embeddings.patch_embeddings.bias"),
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
        *_flax_norm(f"{prefix}Transformer/encoder_norm", f"{trunk}layernorm"),
        *_flax_dense(f"{prefix}pre_logits", f"{trunk}pre_logits"),
        *_flax_dense(f"{prefix}head", "classifier"),
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
    return [
        rename(f"{trunk}embeddings.cls_token", f"{trunk}embeddings.cls_token"),
        rename(f"{trunk}embeddings.position_embeddings", f"{trunk}embeddings.position_embeddings"),
        rename(f"{trunk}embeddings.patch_embeddings.projection.{{p}}", f"{trunk}embeddings.patch_embeddings.{{p}}"),
        *(
            rename(f"{block}.{theirs}.{{p}}", f"{trunk}encoder.layers.{{i}}.{ours}.{{p}}")
            for theirs, ours in modules.items()
        ),
        rename(f"{trunk}layernorm.{{p}}", f"{trunk}layernorm.{{p}}"),
        rename(f"{trunk}pooler.dense.{{p}}", f"{trunk}pre_logits.{{p}}"),
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
        source: a file (``.npz`` or torch's), a folder, an id of the Hub, or what `open_vit_source` made of one; in the
            authors', transformers' or timm's layout, which the names tell.
        revision: of a Hub id.
        token: of the Hub.
        activation: of timm's weights, where it is not the erf-GELU: ``"gelu_pytorch_tanh"``, ``"quick_gelu"``.
        image_size: ``(height, width)`` that the position table is for, where it is not square.
        num_attention_heads: of timm's weights, where heads are not those of the published sizes.
        dtype: of the weights.

    Returns:
        The conversion, checked, to a classifier where the source has one and to a trunk otherwise, and the image
        processor.

    Raises:
        ConversionError: keys are missing or left over, or shapes differ; they are named.
        ValueError: the checkpoint is of a variant that `MMViTModel` is not, which is named, or does not say enough.
        OSError: the source cannot be read.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_vit_source(source, revision=revision, token=token)
    names = checkpoint.tensors.keys()
    layout = vit_layout(names)
    for part, variant in VARIANTS.items():
        if found := [name for name in names if part in name]:
            raise ValueError(f"mm_vit cannot be this model, which is {variant}: it has {min(found)}.")
    given = {"activation": activation, "num_attention_heads": num_attention_heads, "image_size": image_size}
    taken = {"timm": given.keys(), "authors": {"image_size"}, "transformers": set()}[layout]
    if told := [name for name, value in given.items() if value is not None and name not in taken]:
        raise ValueError(f"Checkpoints of the {layout} layout tell {', '.join(told)} themselves: leave that out.")
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


def open_vit_source(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """Opens a source of `read_vit`."""
    if Path(source).suffix != ".npz":
        return open_checkpoint(source, revision=revision, token=token)
    path = Path(source)
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {path}.") from None
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise OSError(f"{path} is cut short or no .npz of plain arrays: {error}") from error
    return Checkpoint(tensors=tensors, configs={}, origins=(Origin(path.name, None, sha256),), folder=None)


def _read_flax(
    checkpoint: Checkpoint, image_size: int | Sequence[int] | None, dtype: torch.dtype
) -> tuple[Conversion, MMViTImageProcessorPil]:
    names = checkpoint.tensors.keys()
    prefix = next(name for name in names if "Transformer/" in name).partition("Transformer/")[0]
    blocks = f"{prefix}Transformer/encoderblock_"
    linen = not any("MlpBlock_3" in name for name in names)
    attention, mlp = (
        ("MultiHeadDotProductAttention_0", "MlpBlock_0") if linen else ("MultiHeadDotProductAttention_1", "MlpBlock_3")
    )
    positions = "Transformer/posembed_input/pos_embedding"
    if f"{prefix}pos_embedding" in names:
        positions = "pos_embedding"
    shapes = _shapes(
        checkpoint,
        kernel=f"{prefix}embedding/kernel",
        table=f"{prefix}{positions}",
        query=f"{blocks}0/{attention}/query/kernel",
        mlp=f"{blocks}0/{mlp}/Dense_0/kernel",
    )
    *patch, channels, width = shapes["kernel"]
    has_cls, classes = f"{prefix}cls" in names, _labels(checkpoint, f"{prefix}head/bias")
    config = MMViTConfig(
        hidden_size=width,
        num_hidden_layers=count_numbers(names, blocks, "/"),
        num_attention_heads=shapes["query"][1],
        intermediate_size=shapes["mlp"][1],
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        image_size=_image_size(shapes["table"][-2] - has_cls, patch, image_size),
        patch_size=_side(patch),
        num_channels=channels,
        pooling="cls" if has_cls else "mean",
        pre_logits=f"{prefix}pre_logits/kernel" in names,
        pos_embed_interpolation="bilinear_corners",
        **({"num_labels": classes} if classes else {}),
    )
    model_class = MMViTForImageClassification if classes else MMViTModel
    rules = flax_rules(config, model_class, prefix, linen, positions)
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
    trunk = "vit." if classifier else ""
    config = config_from_transformers(declared, pre_logits=f"{trunk}pooler.dense.weight" in names)
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
    shared = MMViTConfig().to_dict().keys() & theirs.to_dict().keys()
    fields = {name: value for name, value in theirs.to_dict().items() if name in shared}
    own = ("model_type", "transformers_version", "architectures", "dtype")
    return MMViTConfig(
        **{name: value for name, value in fields.items() if name not in own},
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
    has_cls, classes = "cls_token" in names, _labels(checkpoint, "head.bias")
    pooling = declared.get("global_pool") or arguments.get("global_pool") or ("token" if has_cls else "avg")
    if pooling != ("token" if has_cls else "avg"):
        raise ValueError(
            f"mm_vit cannot be this model, which timm pools by {pooling!r} {'with' if has_cls else 'without'} a class token."
        )
    config = MMViTConfig(
        hidden_size=width,
        num_hidden_layers=count_numbers(names, "blocks."),
        num_attention_heads=heads or arguments.get("num_heads") or published_heads(width),
        intermediate_size=shapes["mlp"][0],
        hidden_act=_timm_activation(declared, activation),
        layer_norm_eps=1e-6,
        image_size=_image_size(shapes["table"][1] - has_cls, patch, image_size or arguments.get("img_size")),
        patch_size=_side(patch),
        num_channels=channels,
        qkv_bias="blocks.0.attn.qkv.bias" in names,
        pooling="cls" if has_cls else "mean",
        pos_embed_interpolation="bicubic_antialias",
        **({"num_labels": classes} if classes else {}),
    )
    model_class = MMViTForImageClassification if classes else MMViTModel
    rules = timm_rules(model_class)
    conversion = convert(checkpoint, model_class=model_class, config=config, rules=rules, dtype=dtype)
    return conversion, image_processor_from_timm(declared.get("pretrained_cfg") or {}, config.image_size)


def _timm_activation(declared: Mapping[str, Any], given: str | None) -> str:
    name = (declared.get("model_args") or {}).get("act_layer")
    if given:
        return given
    if name is not None and name not in TIMM_ACTIVATIONS:
        raise ValueError(f"mm_vit does not know timm's activation {name!r}.")
    if name is None and not re.fullmatch(PLAIN_TIMM_VIT, declared.get("architecture", "vit_base_patch16_224")):
        raise ValueError(
            f"Nothing tells which activation timm's {declared['architecture']} has: pass --activation gelu, "
            "gelu_pytorch_tanh or quick_gelu."
        )
    return TIMM_ACTIVATIONS[name or "gelu"]


def _shapes(checkpoint: Checkpoint, **names: str) -> dict[str, tuple[int, ...]]:
    """Shapes of named tensors. Raises ConversionError where one is missing."""
    if missing := [name for name in names.values() if name not in checkpoint.tensors]:
        raise ConversionError(f"This is no whole Vision Transformer: it lacks {', '.join(missing)}.")
    return {key: tuple(checkpoint.tensors[name].shape) for key, name in names.items()}


def _labels(checkpoint: Checkpoint, bias: str) -> int:
    return checkpoint.tensors[bias].shape[0] if bias in checkpoint.tensors else 0


def count_numbers(names: Iterable[str], prefix: str, end: str = ".") -> int:
    """How many numbers follow the prefix, and are followed by `end`."""
    return len({name.removeprefix(prefix).split(end)[0] for name in names if name.startswith(prefix)})


def published_heads(width: int) -> int:
    """How many heads the published models of a width have, which leaves no trace in fused or square weights.

    Raises:
        ConversionError: there is none of this width, or of heads of 64.
    """
    if width in WIDE_MODELS:
        return 16
    if width % 64:
        raise ConversionError(
            f"No published Vision Transformer has the width {width}, and the weights do not tell how many heads this one "
            "has."
        )
    return width // 64


def _image_size(patches: int, patch: Sequence[int], given: int | Sequence[int] | None) -> int | list[int]:
    """The picture's side, or ``[height, width]``, that has so many patches."""
    if given is not None:
        height, width = to_pair(given)
        if (height // patch[0]) * (width // patch[1]) != patches:
            raise ValueError(
                f"A picture of {height}x{width} has {height // patch[0]}x{width // patch[1]} patches, but the position "
                f"table has {patches}."
            )
        return _side((height, width))
    side = math.isqrt(patches)
    if side**2 != patches:
        raise ValueError(
            f"A position table of {patches} patches is not of a square picture: pass image_size as height and width "
            "(--image-size). Where a class token has no position (no_embed_class), mm_vit cannot be the model."
        )
    return _side((side * patch[0], side * patch[1]))


def _side(size: Sequence[int]) -> int | list[int]:
    """One number for a square."""
    return size[0] if size[0] == size[1] else list(size)


# Image processors


IMAGE_PROCESSOR_FIELDS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def image_processor_from_transformers(
    configs: Mapping[str, dict[str, Any]], image_size: int | Sequence[int]
) -> MMViTImageProcessorPil:
    """What a ``preprocessor_config.json`` declares; without one, a resize to the model's size."""
    height, width = to_pair(image_size)
    declared = configs.get("preprocessor_config.json", {})
    given = {name: declared[name] for name in IMAGE_PROCESSOR_FIELDS if declared.get(name) is not None}
    return MMViTImageProcessorPil(**({"size": {"height": height, "width": width}} | given))


def image_processor_from_timm(
    pretrained_cfg: Mapping[str, Any], image_size: int | Sequence[int]
) -> MMViTImageProcessorPil:
    """timm's evaluation transform: the shorter side to n / crop_pct, then the n x n centre.

    Args:
        pretrained_cfg: of its ``config.json``; what is missing there has the value of timm's ViTs.
        image_size: n, or ``(height, width)``.

    Raises:
        ValueError: a crop mode or interpolation that the image processor does not have.
    """
    height, width = to_pair(image_size)
    mode = pretrained_cfg.get("crop_mode") or "center"
    interpolations = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
    interpolation = pretrained_cfg.get("interpolation") or "bicubic"
    if (
        mode not in ("center", "squash")
        or (mode == "center" and height != width)
        or interpolation not in interpolations
    ):
        raise ValueError(
            f"Pictures prepared by crop_mode {mode!r} and {interpolation!r} for {height}x{width}, as timm's "
            "pretrained_cfg declares, are not supported."
        )
    part = pretrained_cfg.get("crop_pct") or 0.9
    rows, columns = math.floor(height / part), math.floor(width / part)
    return MMViTImageProcessorPil(
        size={"shortest_edge": rows} if mode == "center" else {"height": rows, "width": columns},
        do_center_crop=True,
        crop_size={"height": height, "width": width},
        resample=interpolations[interpolation],
        image_mean=list(pretrained_cfg.get("mean") or (0.5, 0.5, 0.5)),
        image_std=list(pretrained_cfg.get("std") or (0.5, 0.5, 0.5)),
    )


# Back to the published layouts


def transformers_config(config: MMViTConfig, model_class: type[PreTrainedModel]) -> ViTConfig:
    """The config of transformers' ViT that means the same at the model's own picture size.

    Raises:
        ValueError: there is none; what stands in the way is named.
    """
    lacking = [f"pooling = {config.pooling!r}"] if config.pooling != "cls" else []
    lacking += [f"stem = {config.stem!r}"] if config.stem != "patch" else []
    lacking += [f"patch_size = {config.patch_size}"] if not isinstance(_side(to_pair(config.patch_size)), int) else []
    if config.pre_logits and model_class is MMViTForImageClassification:
        lacking.append("pre_logits under a classifier")
    if lacking:
        raise ValueError(f"transformers' ViT cannot be this model: it has no {', no '.join(lacking)}.")
    own = ("model_type", "transformers_version", "architectures", "dtype")
    shared = ViTConfig().to_dict().keys() & config.to_dict().keys()
    fields = {name: value for name, value in config.to_dict().items() if name in shared and name not in own}
    fields |= {name: _side(to_pair(fields[name])) for name in ("image_size", "patch_size")}
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
    _warn_of_interpolation(model.config, "transformers", "bicubic")
    if not settings["antialias"]:
        logger.warning(
            "transformers resizes pictures with antialiasing alone, which these weights were not trained on."
        )
    state = export(model, transformers_rules(type(model)))
    with whole_folder(Path(folder)) as aside:
        config.save_pretrained(aside)
        save_file(state, aside / "model.safetensors", metadata={"format": "pt"})
        preprocessing = {name: settings[name] for name in IMAGE_PROCESSOR_FIELDS if settings.get(name) is not None}
        write_json(aside / "preprocessor_config.json", {**preprocessing, "image_processor_type": "ViTImageProcessor"})
    return Path(folder)


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
    _warn_of_interpolation(model.config, "timm", "bicubic_antialias")
    state = export(model, timm_rules(type(model)))
    with whole_folder(Path(folder)) as aside:
        save_file(state, aside / "model.safetensors", metadata={"format": "pt"})
        write_json(aside / "config.json", declared)
    return Path(folder)


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
    if lacking:
        raise ValueError(f"timm's VisionTransformer cannot be this model: it has no {', no '.join(lacking)}.")
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


def mlp_ratio(config: PreTrainedConfig) -> float:
    """The factor from which timm and open_clip, which truncate, get the width of the MLPs."""
    ratio = config.intermediate_size / config.hidden_size
    while int(config.hidden_size * ratio) < config.intermediate_size:  # the quotient may have been rounded down
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def timm_preprocessing(image_processor: MMViTImageProcessorPil, image_size: int | Sequence[int]) -> dict[str, Any]:
    """The ``pretrained_cfg`` of an image processor.

    Raises:
        ValueError: timm has no such transform.
    """
    settings = image_processor.to_dict()
    height, width = to_pair(image_size)
    model_size = {"height": height, "width": width}
    size = {name: value for name, value in settings["size"].items() if value is not None}
    crop = {name: settings["crop_size"].get(name) for name in model_size} if settings.get("do_center_crop") else None
    interpolations = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}
    mode, part = None, 1.0
    if size == model_size and crop in (None, model_size):
        mode = "squash"
    elif crop == model_size and height == width and (rows := size.get("shortest_edge", 0)) >= height:
        mode, part = "center", _crop_part(height, rows)
    steps = settings["do_resize"] and settings["do_rescale"] and settings["do_normalize"] and settings["antialias"]
    if (
        mode is None
        or not steps
        or settings["resample"] not in interpolations
        or settings["rescale_factor"] != 1 / 255
    ):
        raise ValueError(
            "timm cannot express how this model's pictures are prepared: it resizes with antialiasing (bilinear or "
            f"bicubic), crops to the model's {height}x{width}, divides by 255 and normalises."
        )
    return {
        "input_size": [3, height, width],
        "interpolation": interpolations[settings["resample"]],
        "crop_pct": part,
        "crop_mode": mode,
        "mean": list(settings["image_mean"]),
        "std": list(settings["image_std"]),
    }


def _crop_part(side: int, resized: int) -> float:
    """The crop_pct from which timm, which truncates, gets `resized`: the shortest decimal one."""
    for digits in range(1, 17):
        part = round(side / resized, digits)
        if part and math.floor(side / part) == resized:
            return part
    return math.nextafter(side / resized, 0)


def _warn_of_interpolation(config: MMViTConfig, where: str, interpolation: str) -> None:
    if config.pos_embed_interpolation != interpolation:
        logger.warning(
            f"{where} resizes position tables by {interpolation!r}, not by {config.pos_embed_interpolation!r}: with "
            f"pictures of another size than {config.image_size} its outputs will differ."
        )
