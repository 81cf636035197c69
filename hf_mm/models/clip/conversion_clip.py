"""Published CLIP checkpoints and ours: OpenAI's and open_clip's layout, which is one, and that of transformers.

Source:
    openai/CLIP and mlfoundations/open_clip (MIT), transformers' ``models/clip`` (Apache-2.0).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from ...conversion.checkpoint import Checkpoint
from ...conversion.engine import Conversion, convert, export
from ...conversion.layouts import (
    declared_by,
    first_line,
    refuse_contradiction,
    refuse_lacking,
    refuse_variants,
    save_published,
    shared_fields,
    warn_of_interpolation,
)
from ...conversion.pictures import processor_from_transformers, processor_to_transformers
from ...conversion.rules import Rule, drop, rename, reshape, split, transpose
from ...nn.patches import to_pair
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
from .open_clip_config import (
    ACTIVATIONS,
    PUBLISHED_VOCABULARY,
    config_from_open_clip,
    config_from_open_clip_shapes,
    image_processor_from_open_clip,
    open_clip_config,
    open_clip_preprocessing,
)
from .openai_files import open_clip_source, published_name
from .processing_clip import MMClipProcessor
from .tokenization_clip import MMClipTokenizer

logger = logging.get_logger(__name__)

TOWER_PREFIXES = ("text_model.", "vision_model.")
VOCABULARY = Path(__file__).parent / "bpe_simple_vocab_16e6.txt.gz"

VARIANTS = {  # a part of a name: what a checkpoint of open_clip's with it is
    "logit_bias": "SigLIP, whose loss is not CLIP's",
    "text_decoder.": "CoCa, which writes captions",
    "visual.trunk.": "built on a picture tower of timm's",
    "text.transformer.embeddings.": "built on a text tower of transformers'",
    "visual.attn_pool.": "pooled by attention",
    ".ls_1.": "scaled layer by layer (LayerScale)",
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
        ValueError: the checkpoint is of a model that ours is not, is damaged, does not say enough, or says something else
            than an option.
        OSError: the source cannot be read, or is not the file that OpenAI published.
    """
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}.")
    checkpoint = source if isinstance(source, Checkpoint) else open_clip_source(source, revision=revision, token=token)
    if is_transformers_layout(checkpoint):
        if activation or preset:
            raise ValueError("config.json declares the model: leave activation and preset out.")
        with declared_by("config.json"):
            return _read_transformers(checkpoint, tokenizer, dtype)
    with declared_by("open_clip_config.json" if "open_clip_config.json" in checkpoint.configs else "The checkpoint"):
        return _read_open_clip(checkpoint, activation, preset, tokenizer, dtype)


def is_transformers_layout(checkpoint: Checkpoint) -> bool:
    """Whether the tensors have the names of transformers' CLIP; else they must have those of OpenAI's and open_clip's."""
    return any(name.startswith((*TOWER_PREFIXES, "embeddings.")) for name in checkpoint.tensors)


def _read_open_clip(
    checkpoint: Checkpoint, activation: str | None, preset: str | None, tokenizer: Any, dtype: torch.dtype
) -> tuple[Conversion, MMClipProcessor]:
    names = checkpoint.tensors.keys()
    refuse_variants(names, VARIANTS, "mm_clip")
    declared = checkpoint.configs.get("open_clip_config.json")
    if declared is None:
        config = _undeclared_config(checkpoint, activation, preset)
        preprocessing = tokenizing = {}
    elif activation or preset:
        raise ValueError("open_clip_config.json declares the model: leave activation and preset out.")
    else:
        config = config_from_open_clip(declared.get("model_cfg", declared))
        preprocessing = declared.get("preprocess_cfg") or {}
        tokenizing = declared.get("model_cfg", declared)["text_cfg"]
    image_processor = image_processor_from_open_clip(preprocessing, config.vision_config.image_size)
    another = _another_tokenizer(checkpoint, tokenizing)
    text_tokenizer = _find_tokenizer(checkpoint, config.text_config, tokenizer, another)
    rules = open_clip_rules(
        resnet=isinstance(config.vision_config, MMClipResNetConfig),
        text_prefix="text." if "text.text_projection" in names else "",
    )
    conversion = convert(checkpoint, model_class=MMClipModel, config=config, rules=rules, dtype=dtype)
    return conversion, MMClipProcessor(image_processor, text_tokenizer)


def _undeclared_config(checkpoint: Checkpoint, activation: str | None, preset: str | None) -> MMClipConfig:
    """The config of a file alone. The activation leaves no trace in a file but in OpenAI's, which all have QuickGELU."""
    if "input_resolution" in checkpoint.tensors or published_name(checkpoint):
        refuse_contradiction("A file of OpenAI's", "hidden_act", "quick_gelu", activation, "--activation")
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
        if tokenizer is not None:
            raise ValueError("A picture tower alone reads no texts: leave --tokenizer out.")
        return conversion, image_processor
    return conversion, MMClipProcessor(image_processor, _find_tokenizer(checkpoint, config.text_config, tokenizer))


# Processors


def image_processor_from_transformers(
    configs: Mapping[str, dict[str, Any]], image_size: int | Iterable[int]
) -> MMClipImageProcessorPil:
    """The image processor that a ``preprocessor_config.json`` or ``processor_config.json`` declares; CLIP's without."""
    return processor_from_transformers(MMClipImageProcessorPil, configs, to_pair(image_size)[0])


def published_tokenizer(context: int = 77) -> MMClipTokenizer:
    """The tokenizer of OpenAI's models and most of open_clip's, 49,408 ids.

    Args:
        context: length of the longest text in tokens.
    """
    return MMClipTokenizer.from_bpe_file(VOCABULARY, model_max_length=context)


def _another_tokenizer(checkpoint: Checkpoint, text_cfg: Mapping[str, Any]) -> str | None:
    """What of a ``text_cfg`` names a tokenizer that is neither the published one nor beside the weights."""
    own = {checkpoint.origins[0].name, checkpoint.folder.resolve().name if checkpoint.folder else None}
    name, options = text_cfg.get("hf_tokenizer_name"), text_cfg.get("tokenizer_kwargs")
    if name and name not in own:
        return f"text_cfg.hf_tokenizer_name = {name!r}"
    return f"text_cfg.tokenizer_kwargs = {options!r}" if options else None


def _find_tokenizer(
    checkpoint: Checkpoint, config: MMClipTextConfig, given: str | Path | None, another: str | None = None
) -> MMClipTokenizer:
    """The tokenizer that was given, or that lies beside the weights, or the published one.

    Args:
        checkpoint: the published weights.
        config: of the text tower.
        given: a folder of it.
        another: what of the source declares a tokenizer that is none of these.

    Raises:
        ValueError: there is none, or it does not fit the tower.
    """
    context = config.max_position_embeddings
    if another and not given:
        raise ValueError(
            f"open_clip_config.json declares {another}: pass the folder of that tokenizer with --tokenizer."
        )
    folder = Path(given) if given else checkpoint.folder
    tokenizer = _tokenizer_in(folder, context) if folder else None
    if given and tokenizer is None:
        raise ValueError(f"{given} holds no CLIP vocabulary: neither tokenizer.json, nor vocab.json and merges.txt.")
    if tokenizer is None and config.vocab_size == PUBLISHED_VOCABULARY:
        tokenizer = published_tokenizer(context)
    if tokenizer is None:
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


def _tokenizer_in(folder: Path, context: int) -> MMClipTokenizer | None:
    """The CLIP tokenizer of a folder, None where it has no files of one."""
    with declared_by(f"The tokenizer in {folder.name}"):
        vocabulary = _vocabulary(folder)
    if vocabulary is None:
        return None
    try:
        return MMClipTokenizer(*vocabulary, model_max_length=context)
    except Exception as error:  # the library of tokenizers raises nothing more special
        raise ValueError(f"The tokenizer in {folder.name} is no CLIP tokenizer: {first_line(error)}.") from error


def _vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]] | None:
    """Tokens to ids and merges of a folder, as transformers writes them."""
    if (folder / "tokenizer.json").is_file():
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        if model.get("type") != "BPE":
            return None
        return model["vocab"], _pairs(model["merges"])
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        return vocab, [tuple(line.split()) for line in lines[1:] if line.strip()]
    return None


def _pairs(merges: Iterable[Any]) -> list[tuple[str, str]]:
    """The merges of a ``tokenizer.json``, which older files write as one string each."""
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]


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
    refuse_lacking("transformers' CLIP", [problem for part in parts for problem in _what_transformers_lacks(part)])
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
    fields = shared_fields(config, their_class)
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
    warn_of_interpolation(model.config.vision_config, "transformers", "bicubic")
    if not settings.get("convert_rgb_first", True):
        logger.warning("transformers converts pictures to RGB before resizing: palette pictures will differ.")
    preprocessing = processor_to_transformers(processor.image_processor, "CLIPImageProcessor")
    jsons = {
        "preprocessor_config.json": {**preprocessing, "do_convert_rgb": True},
        "processor_config.json": {"processor_class": "CLIPProcessor"},
    }
    parts = [config, _their_tokenizer(processor.tokenizer)]
    return save_published(folder, state, "model.safetensors", jsons, parts)


def save_as_open_clip(model: MMClipModel, processor: MMClipProcessor, folder: str | Path) -> Path:
    """Writes a folder that open_clip opens as ``local-dir:FOLDER``, weights, config and preprocessing.

    A tokenizer other than the published one is put beside them, in transformers' format, and named in the config by
    the folder's name: on the Hub, ``hf_tokenizer_name`` must become the repository's id.

    Raises:
        ValueError: open_clip cannot be this model; what it lacks is named. Nothing is written.
    """
    model_cfg = open_clip_config(model.config)
    preprocess_cfg = open_clip_preprocessing(processor.image_processor, model.config.vision_config.image_size)
    warn_of_interpolation(model.config.vision_config, "open_clip", "bicubic_antialias")
    resnet = isinstance(model.config.vision_config, MMClipResNetConfig)
    state = export(model, open_clip_rules(resnet=resnet))
    tokenizer = processor.tokenizer
    published = len(tokenizer) == PUBLISHED_VOCABULARY and tokenizer.get_vocab() == published_tokenizer().get_vocab()
    if not published:
        model_cfg["text_cfg"]["hf_tokenizer_name"] = Path(folder).name
    parts = [] if published else [_their_tokenizer(tokenizer)]
    jsons = {"open_clip_config.json": {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}}
    return save_published(folder, state, "open_clip_model.safetensors", jsons, parts)


def _their_tokenizer(tokenizer: MMClipTokenizer) -> CLIPTokenizer:
    """The same vocabulary in transformers' own class, which does not mend broken text."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = _pairs(model["merges"])
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=tokenizer.model_max_length)
