"""Published CLIP checkpoints and ours: OpenAI's and open_clip's layout, which is one, and that of transformers.

Source:
    openai/CLIP and mlfoundations/open_clip (MIT), transformers' ``models/clip`` (Apache-2.0).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ...conversion.checkpoint import Checkpoint, Origin, open_checkpoint
from ...conversion.engine import Conversion, convert, export, whole_folder, write_json
from ...conversion.rules import ConversionError, Rule, drop, rename, reshape, split, transpose
from ...nn.patches import to_pair
from ..vit.conversion_vit import IMAGE_PROCESSOR_FIELDS, count_numbers, mlp_ratio, published_heads
from .configuration_clip import (
    TRANSFORMERS_TYPES,
    MMClipConfig,
    MMClipResNetConfig,
    MMClipTextConfig,
    MMClipVisionConfig,
    from_transformers_config,
)
from .image_processing_clip import MMClipImageProcessorPil
from .modeling_clip import MMClipModel, MMClipTextModel, MMClipVisionModel
from .processing_clip import MMClipProcessor
from .tokenization_clip import PUBLISHED_MERGES, MMClipTokenizer

logger = logging.get_logger(__name__)

ACTIVATIONS = ("quick_gelu", "gelu")
TOWER_PREFIXES = ("text_model.", "vision_model.")
VOCABULARY = Path(__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
PUBLISHED_VOCABULARY = 512 + PUBLISHED_MERGES + 2

OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
OPENAI_MODELS = {  # name: (SHA-256, file)
    "RN50": ("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50.pt"),
    "RN101": ("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "RN101.pt"),
    "RN50x4": ("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "RN50x4.pt"),
    "RN50x16": ("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "RN50x16.pt"),
    "RN50x64": ("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", "RN50x64.pt"),
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}

VARIANTS = {  # a part of a name: what a checkpoint of open_clip's with it is
    "logit_bias": "SigLIP, whose loss is not CLIP's",
    "text_decoder.": "CoCa, which writes captions",
    "visual.trunk.": "built on a picture tower of timm's",
    "text.transformer.embeddings.": "built on a text tower of transformers'",
    "visual.attn_pool.": "pooled by attention",
    ".ls_1.": "scaled layer by layer (LayerScale)",
}

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


# Tables of names


def open_clip_rules(resnet: bool = False, text_prefix: str = "") -> list[Rule]:
    """OpenAI's and open_clip's layout to ours.

    Args:
        resnet: the picture tower is the ResNet, whose names are theirs.
        text_prefix: ``"text."`` for models that open_clip built as `CustomTextCLIP`.
    """
    return [
        *(_open_clip_resnet() if resnet else _open_clip_vit()),
        rename(f"{text_prefix}token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        rename(f"{text_prefix}positional_embedding", "text_model.embeddings.position_embedding.weight"),
        *_open_clip_blocks(f"{text_prefix}transformer.resblocks", "text_model.encoder.layers"),
        rename(f"{text_prefix}ln_final.{{p}}", "text_model.final_layer_norm.{p}"),
        transpose(f"{text_prefix}text_projection", "text_projection.weight"),
        reshape("logit_scale", "logit_scale", (1,), ()),
        *drop("input_resolution", "context_length", "vocab_size", f"{text_prefix}attn_mask"),
    ]


def _open_clip_resnet() -> list[Rule]:
    names = (
        "conv{n}.weight",
        "bn{n}.{p}",
        "layer{l}.{b}.conv{n}.weight",
        "layer{l}.{b}.bn{n}.{p}",
        "layer{l}.{b}.downsample.0.weight",
        "layer{l}.{b}.downsample.1.{p}",
        "attnpool.positional_embedding",
        "attnpool.{part}_proj.{p}",
    )
    return [rename(f"visual.{name}", f"vision_model.{name}") for name in names]


def _open_clip_vit() -> list[Rule]:
    return [
        rename("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        rename("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        rename("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        rename("visual.ln_pre.{p}", "vision_model.pre_layrnorm.{p}"),
        *_open_clip_blocks("visual.transformer.resblocks", "vision_model.encoder.layers"),
        rename("visual.ln_post.{p}", "vision_model.post_layernorm.{p}"),
        transpose("visual.proj", "visual_projection.weight"),
    ]


def _open_clip_blocks(theirs: str, ours: str) -> list[Rule]:
    modules = {
        "ln_1": "layer_norm1",
        "attn.out_proj": "self_attn.out_proj",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    thirds = [f"{ours}.{{i}}.self_attn.{part}_proj.{{p}}" for part in "qkv"]
    return [
        split(f"{theirs}.{{i}}.attn.in_proj_{{p}}", thirds),
        *(rename(f"{theirs}.{{i}}.{name}.{{p}}", f"{ours}.{{i}}.{target}.{{p}}") for name, target in modules.items()),
    ]


def transformers_rules(model_class: type[PreTrainedModel], tower_prefix: bool = True) -> list[Rule]:
    """The layout of transformers' CLIP on disk to ours, of the whole model or of one tower.

    Args:
        model_class: ours.
        tower_prefix: a tower alone has ``text_model.`` or ``vision_model.`` before its names, as in published files;
            transformers 5 leaves it out of towers that it did not read from such a file.
    """
    block = "encoder.layers.{i}.{name*}"
    text = ["embeddings.token_embedding.weight", "embeddings.position_embedding.weight", block, "final_layer_norm.{p}"]
    vision = [
        "embeddings.class_embedding",
        "embeddings.patch_embedding.weight",
        "embeddings.position_embedding.weight",
        "pre_layrnorm.{p}",
        block,
        "post_layernorm.{p}",
    ]
    if model_class is MMClipModel:
        names = [*(f"text_model.{name}" for name in text), *(f"vision_model.{name}" for name in vision)]
        names += ["visual_projection.weight", "text_projection.weight"]
        return [
            *(rename(name, name) for name in names),
            reshape("logit_scale", "logit_scale", (1,), ()),
            *drop("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
        ]
    prefix, names = ("text_model.", text) if model_class is MMClipTextModel else ("vision_model.", vision)
    prefix = prefix if tower_prefix else ""
    return [*(rename(prefix + name, name) for name in names), *drop(f"{prefix}embeddings.position_ids")]


# Configs


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
    activation, norm = dict(tower.get("act_kwargs") or {}), dict(tower.get("norm_kwargs") or {})
    tanh = activation.pop("approximate", "none") == "tanh"
    eps = norm.pop("eps", 1e-5)
    if activation or norm or (tanh and quick_gelu):
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
    if missing := [name for name in needed if name not in shapes]:
        raise ConversionError(f"This is no whole CLIP checkpoint of OpenAI's or open_clip's: it lacks {missing}.")
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
    side = _grid_side(shapes["visual.positional_embedding"][0])
    return {
        "hidden_size": width,
        "intermediate_size": shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": count_numbers(shapes, "visual.transformer.resblocks."),
        "num_attention_heads": published_heads(width),
        "num_channels": channels,
        "image_size": patch[0] * side,
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
        "image_size": 32 * _grid_side(shapes["visual.attnpool.positional_embedding"][0]),
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


def _grid_side(rows: int) -> int:
    side = math.isqrt(rows - 1)
    if side**2 != rows - 1:
        raise ConversionError(
            f"A position table of {rows} rows is not of a square picture, and shapes do not tell its sides: convert a "
            "folder with open_clip_config.json."
        )
    return side


# Reading


def read_clip(
    source: str | Path | Checkpoint,
    *,
    revision: str | None = None,
    token: str | None = None,
    activation: str | None = None,
    preset: str | None = None,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Conversion, Any]:
    """Reads a published CLIP checkpoint; nothing is written before ``Conversion.save``.

    Args:
        source: a name of OpenAI's (`OPENAI_MODELS`), a file, a folder, an id of the Hub, or what `open_clip_source` made of
            one; in OpenAI's, open_clip's or transformers' layout, which the names tell.
        revision: of a Hub id.
        token: of the Hub.
        activation: ``"quick_gelu"`` or ``"gelu"``, for a file of open_clip's without its ``open_clip_config.json``.
        preset: the published size that such a file has, see `PRESETS`; by default shapes tell.
        tokenizer: folder of a CLIP tokenizer, for a vocabulary that is neither the published one nor in the source.
        dtype: of the weights.

    Returns:
        The conversion, checked, and what prepares the model's inputs: a `MMClipProcessor`, or for a tower alone its
        image processor or tokenizer.

    Raises:
        ConversionError: keys are missing or left over, or shapes differ; they are named.
        ValueError: the checkpoint is of a model that ours is not, or does not say enough.
        OSError: the source cannot be read, or is not the file that OpenAI published.
    """
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}.")
    checkpoint = source if isinstance(source, Checkpoint) else open_clip_source(source, revision=revision, token=token)
    if is_transformers_layout(checkpoint):
        if activation or preset:
            raise ValueError("config.json declares the model: leave activation and preset out.")
        return _read_transformers(checkpoint, tokenizer, dtype)
    return _read_open_clip(checkpoint, activation, preset, tokenizer, dtype)


def open_clip_source(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """Opens a source of `read_clip`; what OpenAI published is downloaded, and is what its SHA-256 says or refused."""
    if str(source) not in OPENAI_MODELS or Path(source).exists():
        return _name_published(open_checkpoint(source, revision=revision, token=token))
    sha256, file = OPENAI_MODELS[str(source)]
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"clip-{file}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"{OPENAI_URL}/{sha256}/{file}"
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=True)
        except (OSError, RuntimeError) as error:
            raise OSError(f"{source} could not be downloaded from {url}: {error}") from error
    return _name_published(open_checkpoint(path, sha256=sha256))


def _name_published(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with where OpenAI publishes it as its origin if it is one of theirs."""
    if name := published_name(checkpoint):
        sha256, file = OPENAI_MODELS[name]
        return replace(checkpoint, origins=(Origin(f"{OPENAI_URL}/{sha256}/{file}", None, sha256),))
    return checkpoint


def published_name(checkpoint: Checkpoint) -> str | None:
    """OpenAI's name of the model whose file this is, judged by the file's SHA-256."""
    names = {sha256: name for name, (sha256, _) in OPENAI_MODELS.items()}
    return next((names[origin.sha256] for origin in checkpoint.origins if origin.sha256 in names), None)


def is_transformers_layout(checkpoint: Checkpoint) -> bool:
    """Whether the tensors have the names of transformers' CLIP; else they must have those of OpenAI's and open_clip's."""
    return any(name.startswith((*TOWER_PREFIXES, "embeddings.")) for name in checkpoint.tensors)


def _read_open_clip(
    checkpoint: Checkpoint, activation: str | None, preset: str | None, tokenizer: Any, dtype: torch.dtype
) -> tuple[Conversion, MMClipProcessor]:
    names = checkpoint.tensors.keys()
    for part, variant in VARIANTS.items():
        if found := [name for name in names if part in name]:
            raise ValueError(f"mm_clip cannot be this model, which is {variant}: it has {min(found)}.")
    declared = checkpoint.configs.get("open_clip_config.json")
    if declared is None:
        config = _undeclared_config(checkpoint, activation, preset)
        preprocessing = tokenizing = {}
    elif activation or preset:
        raise ValueError("open_clip_config.json declares the model: leave activation and preset out.")
    else:
        config = config_from_open_clip(declared.get("model_cfg", declared))
        preprocessing = declared.get("preprocess_cfg", {})
        tokenizing = declared.get("model_cfg", declared)["text_cfg"]
    image_processor = image_processor_from_open_clip(preprocessing, config.vision_config.image_size)
    other_tokenizer = tokenizing.get("hf_tokenizer_name") or tokenizing.get("tokenizer_kwargs")
    text_tokenizer = _find_tokenizer(checkpoint, config.text_config, tokenizer, declares_another=bool(other_tokenizer))
    rules = open_clip_rules(
        resnet=isinstance(config.vision_config, MMClipResNetConfig),
        text_prefix="text." if "text.text_projection" in names else "",
    )
    conversion = convert(checkpoint, model_class=MMClipModel, config=config, rules=rules, dtype=dtype)
    return conversion, MMClipProcessor(image_processor, text_tokenizer)


def _undeclared_config(checkpoint: Checkpoint, activation: str | None, preset: str | None) -> MMClipConfig:
    """The config of a file alone. The activation leaves no trace in a file but in OpenAI's, which all have QuickGELU."""
    if activation is None and ("input_resolution" in checkpoint.tensors or published_name(checkpoint)):
        activation = "quick_gelu"
    if activation is None:
        raise ValueError(
            "Nothing in the checkpoint tells its activation, and the wrong one costs accuracy silently: pass "
            "--activation quick_gelu for OpenAI's weights and models that open_clip calls '-quickgelu', --activation "
            "gelu for its others; or convert the folder that has the model's open_clip_config.json."
        )
    if preset is None:
        return config_from_open_clip_shapes(checkpoint.tensors, activation)
    config = MMClipConfig.from_preset(preset)
    for tower in (config.vision_config, config.text_config):
        if hasattr(tower, "hidden_act"):
            tower.hidden_act = activation
    return config


def _read_transformers(checkpoint: Checkpoint, tokenizer: Any, dtype: torch.dtype) -> tuple[Conversion, Any]:
    declared = checkpoint.configs.get("config.json", {})
    if declared.get("model_type") not in TRANSFORMERS_TYPES:
        raise ValueError(
            f"The names are those of transformers' CLIP, but no config.json of type {', '.join(TRANSFORMERS_TYPES)} is "
            f"beside them (found: {declared.get('model_type')}): convert the folder that has it."
        )
    classes = {cls.config_class: cls for cls in (MMClipModel, MMClipTextModel, MMClipVisionModel)}
    fields = from_transformers_config(declared)
    config_class = next(cls for cls in classes if cls.model_type == fields["model_type"])
    config, model_class = config_class.from_dict(fields), classes[config_class]
    tower_prefix = any(name.startswith(TOWER_PREFIXES) for name in checkpoint.tensors)
    rules = transformers_rules(model_class, tower_prefix)
    conversion = convert(checkpoint, model_class=model_class, config=config, rules=rules, dtype=dtype)
    if model_class is MMClipTextModel:
        return conversion, _find_tokenizer(checkpoint, config, tokenizer)
    vision_config = config if model_class is MMClipVisionModel else config.vision_config
    image_processor = image_processor_from_transformers(checkpoint.configs, vision_config.image_size)
    if model_class is MMClipVisionModel:
        return conversion, image_processor
    return conversion, MMClipProcessor(image_processor, _find_tokenizer(checkpoint, config.text_config, tokenizer))


# Processors


def image_processor_from_open_clip(
    preprocess_cfg: Mapping[str, Any], image_size: int | Iterable[int]
) -> MMClipImageProcessorPil:
    """The evaluation transform of open_clip, which converts to RGB after resizing.

    Args:
        preprocess_cfg: of ``open_clip_config.json``; empty for OpenAI's own.
        image_size: of the tower, which open_clip puts above the size declared there.

    Raises:
        ValueError: a resize mode that the image processor does not have.
    """
    height, width = to_pair(image_size)
    mode = preprocess_cfg.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash") or (mode == "shortest" and height != width):
        raise ValueError(f"Resizing by {mode!r} to {height}x{width}, as preprocess_cfg declares, is not supported.")
    bilinear = preprocess_cfg.get("interpolation") == "bilinear"
    given = {f"image_{name}": preprocess_cfg[name] for name in ("mean", "std") if preprocess_cfg.get(name)}
    return MMClipImageProcessorPil(
        size={"shortest_edge": height} if mode == "shortest" else {"height": height, "width": width},
        crop_size={"height": height, "width": width},
        do_center_crop=mode == "shortest",
        resample=Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC,
        convert_rgb_first=False,
        **{name: [value] * 3 if isinstance(value, float) else list(value) for name, value in given.items()},
    )


def image_processor_from_transformers(
    configs: Mapping[str, dict[str, Any]], image_size: int | Iterable[int]
) -> MMClipImageProcessorPil:
    """The image processor that a ``preprocessor_config.json`` or ``processor_config.json`` declares; CLIP's without."""
    declared = configs.get("preprocessor_config.json") or configs.get("processor_config.json", {})
    declared = declared.get("image_processor", declared)
    given = {name: declared[name] for name in IMAGE_PROCESSOR_FIELDS if declared.get(name) is not None}
    return MMClipImageProcessorPil(**({"size": to_pair(image_size)[0]} | given))


def published_tokenizer(context: int = 77) -> MMClipTokenizer:
    """The tokenizer of OpenAI's models and most of open_clip's, 49,408 ids.

    Args:
        context: length of the longest text in tokens.
    """
    return MMClipTokenizer.from_bpe_file(VOCABULARY, model_max_length=context)


def _find_tokenizer(
    checkpoint: Checkpoint, config: MMClipTextConfig, given: str | Path | None, declares_another: bool = False
) -> MMClipTokenizer:
    """The tokenizer that was given, or that lies beside the weights, or the published one."""
    context = config.max_position_embeddings
    folder = Path(given) if given else checkpoint.folder
    vocabulary = _vocabulary(folder) if folder else None
    if given and vocabulary is None:
        raise ValueError(f"{given} holds no CLIP vocabulary: neither tokenizer.json, nor vocab.json and merges.txt.")
    if vocabulary is not None:
        tokenizer = MMClipTokenizer(*vocabulary, model_max_length=context)
    elif config.vocab_size == PUBLISHED_VOCABULARY and not declares_another:
        tokenizer = published_tokenizer(context)
    else:
        raise ValueError(
            f"The text tower has a vocabulary of {config.vocab_size} and the source names no CLIP tokenizer with it "
            f"(the published one has {PUBLISHED_VOCABULARY}): pass its folder with --tokenizer."
        )
    if tokenizer.eos_token_id != config.eos_token_id or len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} ids and ends texts with {tokenizer.eos_token_id}, but the model has "
            f"{config.vocab_size} and pools at {config.eos_token_id}: pass the model's own with --tokenizer."
        )
    return tokenizer


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]] | None:
    """Tokens to ids and merges of a folder, as transformers writes them."""
    if (folder / "tokenizer.json").is_file():
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        if model.get("type") != "BPE":
            return None
        merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
        return model["vocab"], merges
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        return vocab, [tuple(line.split()) for line in lines[1:] if line.strip()]
    return None


# Back to the published layouts


def export_transformers(model: PreTrainedModel) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """Our CLIP, or one of its towers, as transformers has it: config and tensors on disk.

    Raises:
        ValueError: transformers has no such model; what it lacks is named.
    """
    config = transformers_config(model.config)
    return config, export(model, transformers_rules(type(model)))


def transformers_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of transformers' CLIP, or of one of its towers, that means the same at the model's own picture size.

    Raises:
        ValueError: there is none; the fields that stand in the way are named.
    """
    parts = [config, config.vision_config, config.text_config] if isinstance(config, MMClipConfig) else [config]
    lacking = [problem for part in parts for problem in _what_transformers_lacks(part)]
    if lacking:
        raise ValueError(f"transformers' CLIP cannot be this model: it has no {', no '.join(lacking)}.")
    if isinstance(config, MMClipTextConfig):
        return CLIPTextConfig(**_common_fields(config, CLIPTextConfig), architectures=["CLIPTextModel"])
    if isinstance(config, MMClipVisionConfig):
        return CLIPVisionConfig(**_common_fields(config, CLIPVisionConfig), architectures=["CLIPVisionModel"])
    return CLIPConfig(
        vision_config=_common_fields(config.vision_config, CLIPVisionConfig),
        text_config=_common_fields(config.text_config, CLIPTextConfig),
        projection_dim=config.projection_dim,
        logit_scale_init_value=config.logit_scale_init_value,
        architectures=["CLIPModel"],
    )


def _what_transformers_lacks(config: PreTrainedConfig) -> list[str]:
    if isinstance(config, MMClipConfig):
        poolings = {"vision_pooling": config.vision_pooling, "text_pooling": config.text_pooling}
        return [f"{name} = {value!r}" for name, value in poolings.items() if value != "pooler"]
    if isinstance(config, MMClipTextConfig):
        # To theirs, an end token 2 means the largest id of a row.
        return ["eos_token_id = 2"] if config.eos_token_id == 2 else []
    if isinstance(config, MMClipVisionConfig):
        sides = {"image_size": config.image_size, "patch_size": config.patch_size}
        return [f"{name} = {size}" for name, size in sides.items() if len(set(to_pair(size))) > 1]
    return [f"tower of type {config.model_type}"]


def _common_fields(config: PreTrainedConfig, their_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of our config that theirs has too."""
    own = {"model_type", "transformers_version", "architectures", "dtype"}
    known = their_class().to_dict().keys() - own
    fields = {name: value for name, value in config.to_dict().items() if name in known and value is not None}
    for side in {"image_size", "patch_size"} & fields.keys():
        fields[side] = to_pair(fields[side])[0]
    return fields


def save_as_transformers(model: MMClipModel, processor: MMClipProcessor, folder: str | Path) -> Path:
    """Writes a folder that transformers opens without this package, as `CLIPModel` and `CLIPProcessor`.

    Warns of conventions that transformers does not have, which show at other picture sizes or in palette pictures.

    Raises:
        ValueError: transformers' CLIP cannot be this model; what it lacks is named. Nothing is written.
    """
    config, state = export_transformers(model)
    settings = processor.image_processor.to_dict()
    interpolation = model.config.vision_config.pos_embed_interpolation
    if interpolation != "bicubic":
        logger.warning(
            f"transformers resizes position tables by 'bicubic' alone, not by {interpolation!r}: with pictures of "
            f"another size than {model.config.vision_config.image_size} its outputs will differ."
        )
    if not settings.get("convert_rgb_first", True):
        logger.warning("transformers converts pictures to RGB before resizing: palette pictures will differ.")
    with whole_folder(Path(folder)) as aside:
        config.save_pretrained(aside)
        save_file(state, aside / "model.safetensors", metadata={"format": "pt"})
        preprocessing = {name: settings[name] for name in IMAGE_PROCESSOR_FIELDS if name in settings}
        preprocessing |= {"do_convert_rgb": True, "image_processor_type": "CLIPImageProcessor"}
        write_json(aside / "preprocessor_config.json", preprocessing)
        _their_tokenizer(processor.tokenizer).save_pretrained(aside)
        write_json(aside / "processor_config.json", {"processor_class": "CLIPProcessor"})
    return Path(folder)


def save_as_open_clip(model: MMClipModel, processor: MMClipProcessor, folder: str | Path) -> Path:
    """Writes a folder that open_clip opens as ``local-dir:FOLDER``, weights, config and preprocessing.

    A tokenizer other than the published one is put beside them, in transformers' format, and named in the config by
    the folder's name: on the Hub, ``hf_tokenizer_name`` must become the repository's id.

    Raises:
        ValueError: open_clip cannot be this model; what it lacks is named. Nothing is written.
    """
    model_cfg = open_clip_config(model.config)
    preprocess_cfg = open_clip_preprocessing(processor.image_processor, model.config.vision_config.image_size)
    interpolation = model.config.vision_config.pos_embed_interpolation
    if interpolation != "bicubic_antialias":
        logger.warning(
            f"open_clip resizes position tables by 'bicubic_antialias' alone, not by {interpolation!r}: with pictures "
            f"of another size than {model.config.vision_config.image_size} its outputs will differ."
        )
    resnet = isinstance(model.config.vision_config, MMClipResNetConfig)
    state = export(model, open_clip_rules(resnet=resnet))
    tokenizer = processor.tokenizer
    published = len(tokenizer) == PUBLISHED_VOCABULARY and tokenizer.get_vocab() == published_tokenizer().get_vocab()
    with whole_folder(Path(folder)) as aside:
        if not published:
            _their_tokenizer(tokenizer).save_pretrained(aside)
            model_cfg["text_cfg"]["hf_tokenizer_name"] = Path(folder).name
        save_file(state, aside / "open_clip_model.safetensors", metadata={"format": "pt"})
        write_json(aside / "open_clip_config.json", {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    return Path(folder)


def open_clip_config(config: MMClipConfig) -> dict[str, Any]:
    """The ``model_cfg`` that open_clip builds the same model from.

    Raises:
        ValueError: there is none; what stands in the way is named.
    """
    vision, text = config.vision_config, config.text_config
    if lacking := _what_open_clip_lacks(config):
        raise ValueError(f"open_clip's CLIP cannot be this model: it has no {', no '.join(lacking)}.")
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


def open_clip_preprocessing(
    image_processor: MMClipImageProcessorPil, image_size: int | Iterable[int]
) -> dict[str, Any]:
    """The ``preprocess_cfg`` of an image processor.

    Raises:
        ValueError: open_clip has no such transform.
    """
    settings = image_processor.to_dict()
    height, width = to_pair(image_size)
    squash, shortest = {"height": height, "width": width}, {"shortest_edge": height}
    size = {name: value for name, value in settings["size"].items() if value is not None}
    crop = settings["do_center_crop"] and {name: settings["crop_size"].get(name) for name in ("height", "width")}
    steps = settings["do_resize"] and settings["do_rescale"] and settings["do_normalize"]
    interpolations = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
    if size == squash and crop in (False, squash):
        mode = "squash"
    elif size == shortest and height == width and crop == squash:
        mode = "shortest"
    else:
        mode = None
    if (
        mode is None
        or not steps
        or settings["resample"] not in interpolations
        or settings["rescale_factor"] != 1 / 255
    ):
        raise ValueError(
            "open_clip cannot express how this model's pictures are prepared: it resizes (bilinear or bicubic) to the "
            f"model's {height}x{width}, crops, divides by 255 and normalises."
        )
    return {
        "mean": list(settings["image_mean"]),
        "std": list(settings["image_std"]),
        "interpolation": interpolations[settings["resample"]],
        "resize_mode": mode,
    }


def _their_tokenizer(tokenizer: MMClipTokenizer) -> CLIPTokenizer:
    """The same vocabulary in transformers' own class, which does not mend broken text."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=tokenizer.model_max_length)
