"""Published BLIP-2 checkpoints and ours: LAVIS's, which hold what was trained, and transformers', which hold the whole.

    LAVIS, trained in     parts in the file
    stage 1               query_tokens, ln_vision, Qformer.{bert,cls}, vision_proj, text_proj, itm_head, temp
    retrieval (COCO)      those and visual_encoder
    stage 2               query_tokens, ln_vision, Qformer.bert without its text, opt_proj or t5_proj
    captioning (COCO)     those and visual_encoder

    transformers' Blip2   parts in the folder
    ForImageTextRetrieval         all of stage 1 but Qformer.cls and temp
    ForConditionalGeneration      all of stage 2, the language model included

Source:
    salesforce/LAVIS, ``lavis/models/blip2_models`` (BSD-3-Clause), transformers' ``models/blip_2`` (Apache-2.0).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Blip2Config,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ...composite.language_model import language_model_from_config
from ...conversion.checkpoint import Checkpoint, Origin, merge, open_checkpoint
from ...conversion.engine import Conversion, convert, export, stored_tensors, whole_folder
from ...conversion.layouts import (
    count_numbers,
    declared_by,
    first_line,
    picture_side,
    published_heads,
    refuse_lacking,
    refuse_variants,
    require,
    save_published,
)
from ...conversion.pictures import processor_to_transformers
from ...conversion.rules import ConversionError, Rule, drop, inverse, listed, plan, rename, reshape
from ..clip.configuration_clip import MMClipConfig, MMClipVisionConfig, from_transformers_config
from ..clip.conversion_clip import open_clip_rules
from ..clip.conversion_clip import transformers_rules as clip_transformers_rules
from ..clip.image_processing_clip import MMClipImageProcessorPil
from ..clip.modeling_clip import MMClipVisionModel
from ..clip.openai_files import open_clip_source
from ..eva_vit import conversion_eva_vit as eva
from ..eva_vit.configuration_eva_vit import EvaViTConfig
from .configuration_blip2 import MMBlip2Config, MMBlip2QFormerConfig
from .modeling_blip2 import MMBlip2ForConditionalGeneration
from .modeling_blip2_stage1 import MMBlip2ForImageTextRetrieval, MMBlip2ForPreTraining
from .processing_blip2 import MMBlip2Processor

logger = logging.get_logger(__name__)

TOWER, LANGUAGE_MODEL = "visual_encoder.", "language_model."  # before the names of frozen parts that are merged in
PROJECTIONS = {"opt_proj": "opt", "t5_proj": "t5"}  # LAVIS's name: type of the language model behind it
LAVIS_MODELS = {"opt": "opt_model.", "t5": "t5_model."}
TEXT_TOKENIZER = "bert-base-uncased"
FIRST_WORD = "[DEC]"  # in place of [CLS], of a text that is to be generated
LAVIS_FILE = "blip2.pth"
IMAGE_WORD = "<image>"  # of transformers' processor
NO_CLIP = "BLIP-2 was trained on ViT-L/14, which is another."
CLIP_BLOCKS = 24  # of ViT-L/14, of which BLIP-2 reads what the last but one gives
VISION_NORM_EPS = 1e-5  # of ln_vision in LAVIS
QFORMER_FIELDS = {  # transformers' name: ours
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
    "layer_norm_eps": "layer_norm_eps",
    "cross_attention_frequency": "cross_attention_frequency",
    "encoder_hidden_size": "encoder_hidden_size",
}
PLACES = "Qformer.bert.embeddings.position_ids"  # counts, as BERT stores it
TIED = (  # of LAVIS's names
    ("Qformer.bert.embeddings.word_embeddings.weight", "Qformer.cls.predictions.decoder.weight"),
    ("Qformer.cls.predictions.bias", "Qformer.cls.predictions.decoder.bias"),
)
VARIANTS = {  # a part of a name: what a checkpoint with it is
    "llm_proj.": "InstructBLIP, whose Q-Former reads the instruction too",
    "text_encoder.": "BLIP, the first",
    "text_decoder.": "BLIP, the first",
    "visual_encoder_m.": "BLIP, the first, or ALBEF",
}


# Tables of names


def lavis_rules(projection: str | None = None) -> list[Rule]:
    """LAVIS's layout to ours, without tower and language model.

    Args:
        projection: ``"opt_proj"`` or ``"t5_proj"`` in stage 2.
    """
    bert, head = "Qformer.bert.embeddings", "Qformer.cls.predictions"
    return [
        rename("ln_vision.{p}", "vision_norm.{p}"),
        rename("query_tokens", "qformer.embeddings.query_tokens"),
        _tied(
            [f"{bert}.word_embeddings.weight", f"{head}.decoder.weight"], "qformer.embeddings.word_embeddings.weight"
        ),
        rename(f"{bert}.position_embeddings.weight", "qformer.embeddings.position_embeddings.weight"),
        rename(f"{bert}.LayerNorm.{{p}}", "qformer.embeddings.layer_norm.{p}"),
        *_block_rules("Qformer.bert.encoder.layer", "self"),
        rename(f"{head}.transform.dense.{{p}}", "lm_head.transform.{p}"),
        rename(f"{head}.transform.LayerNorm.{{p}}", "lm_head.layer_norm.{p}"),
        _tied([f"{head}.bias", f"{head}.decoder.bias"], "lm_head.decoder.bias"),
        rename("vision_proj.{p}", "vision_projection.{p}"),
        rename("text_proj.{p}", "text_projection.{p}"),
        rename("itm_head.{p}", "itm_head.{p}"),
        reshape("temp", "temperature", (1,), ()),
        *([rename(f"{projection}.{{p}}", "language_projection.{p}")] if projection else []),
        *drop(PLACES, *(f"{prefix}{{name*}}" for prefix in LAVIS_MODELS.values())),
    ]


def _tied(sources: list[str], target: str) -> Rule:
    """Names of one tensor, which `require_tied` has found equal."""
    return Rule(tuple(sources), (target,), lambda tensors: tensors[:1], lambda tensors: tensors * len(sources))


def transformers_rules() -> list[Rule]:
    """The layout of transformers' BLIP-2 to ours, without tower and language model; it has no `lm_head` and no
    `temperature`."""
    same = (
        "vision_projection.{p}",
        "text_projection.{p}",
        "itm_head.{p}",
        "language_projection.{p}",
    )
    return [
        rename("vision_model.post_layernorm.{p}", "vision_norm.{p}"),
        rename("query_tokens", "qformer.embeddings.query_tokens"),
        rename("embeddings.word_embeddings.weight", "qformer.embeddings.word_embeddings.weight"),
        rename("embeddings.position_embeddings.weight", "qformer.embeddings.position_embeddings.weight"),
        rename("qformer.layernorm.{p}", "qformer.embeddings.layer_norm.{p}"),
        *_block_rules("qformer.encoder.layer", "attention"),
        *(rename(name, name) for name in same),
        *drop("embeddings.position_ids"),
    ]


def _block_rules(theirs: str, inner: str) -> list[Rule]:
    """The blocks of both layouts, which call the module of queries, keys and values differently."""
    modules = {
        f"attention.{inner}.query": "self_attn.q_proj",
        f"attention.{inner}.key": "self_attn.k_proj",
        f"attention.{inner}.value": "self_attn.v_proj",
        "attention.output.dense": "self_attn.out_proj",
        "attention.output.LayerNorm": "self_attn_layer_norm",
        f"crossattention.{inner}.query": "cross_attn.q_proj",
        f"crossattention.{inner}.key": "cross_attn.k_proj",
        f"crossattention.{inner}.value": "cross_attn.v_proj",
        "crossattention.output.dense": "cross_attn.out_proj",
        "crossattention.output.LayerNorm": "cross_attn_layer_norm",
        "intermediate_query.dense": "query_mlp.fc1",
        "output_query.dense": "query_mlp.fc2",
        "output_query.LayerNorm": "query_layer_norm",
        "intermediate.dense": "text_mlp.fc1",
        "output.dense": "text_mlp.fc2",
        "output.LayerNorm": "text_layer_norm",
    }
    return [
        rename(f"{theirs}.{{i}}.{name}.{{p}}", f"qformer.layers.{{i}}.{target}.{{p}}")
        for name, target in modules.items()
    ]


def _clip_rules() -> list[Rule]:
    """The picture tower of OpenAI's CLIP, its projection left out."""
    parted = [
        replace(
            rule,
            sources=tuple(name.removeprefix("visual.") for name in rule.sources),
            targets=tuple(name.removeprefix("vision_model.") for name in rule.targets),
        )
        for rule in open_clip_rules()
        if rule.targets and all(name.startswith("vision_model.") for name in rule.targets)
    ]
    return [*parted, *drop("proj")]


def _prefixed(rules: Iterable[Rule], theirs: str, ours: str) -> list[Rule]:
    """The table with a prefix before the names of both sides."""
    return [
        replace(
            rule,
            sources=tuple(f"{theirs}{name}" for name in rule.sources),
            targets=tuple(f"{ours}{name}" for name in rule.targets),
        )
        for rule in rules
    ]


# Reading


def read_blip2(
    source: str | Path | Checkpoint,
    *,
    vision: str | Path | None = None,
    language_model: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    vision_revision: str | None = None,
    language_model_revision: str | None = None,
    token: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Conversion, MMBlip2Processor, list[str]]:
    """Reads a published BLIP-2; nothing is written before ``Conversion.save``.

    Args:
        source: a file of LAVIS, a folder or Hub id of transformers' BLIP-2, or what `open_checkpoint` made of one.
        vision: the frozen picture tower of a file of LAVIS that lacks it: ``eva_vit_g.pth``, or for ViT-L
            ``clip_vit_L.pth`` or any CLIP ViT-L/14 (OpenAI's name, a file, folder or Hub id, published or ours).
        language_model: the frozen language model of a file of LAVIS of stage 2: folder or Hub id.
        tokenizer: folder or Hub id; by default that of the language model, of transformers' folder, or of BERT.
        revision, vision_revision, language_model_revision: of Hub ids.
        token: of the Hub.
        dtype: of the weights; by default the widest among the sources, so that no number is rounded.

    Returns:
        The conversion, checked: of stage 1 to a `MMBlip2ForPreTraining`, which has all heads, of transformers'
        `Blip2ForImageTextRetrieval` to ours, of stage 2 to a `MMBlip2ForConditionalGeneration`; the processor; and
        sentences about what was done besides renaming tensors.

    Raises:
        ConversionError: keys are missing or left over, or shapes differ; they are named.
        ValueError: a part is missing, or named where the source has it; or the checkpoint is of another model.
        OSError: a source cannot be read.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, revision=revision, token=token)
    refuse_variants(checkpoint.tensors, VARIANTS, "mm_blip2")
    if is_transformers_layout(checkpoint):
        for option, given in (("--vision", vision), ("--language-model", language_model)):
            if given is not None:
                raise ValueError(f"transformers' BLIP-2 holds all of its parts: leave {option} out.")
        with declared_by("config.json"):
            return _read_transformers(checkpoint, tokenizer, token, dtype)
    tower = _find_tower(checkpoint, vision, vision_revision, token)
    projection = _projection(checkpoint)
    if projection is None:
        if language_model is not None:
            raise ValueError("This is a file of stage 1, which has no language model: leave --language-model out.")
        return _read_stage1(checkpoint, tower, tokenizer, token, dtype)
    if language_model is None:
        raise ValueError(
            f"LAVIS's file does not hold the language model behind {projection}, which was frozen: name it with "
            f"--language-model, a folder or Hub id of type {PROJECTIONS[projection]}."
        )
    model = open_frozen_language_model(language_model, language_model_revision, token)
    own = tokenizer is None
    words = open_tokenizer(language_model if own else tokenizer, token, language_model_revision if own else None)
    return _read_stage2(checkpoint, tower, model, words, dtype)


def is_transformers_layout(checkpoint: Checkpoint) -> bool:
    """Whether the tensors have the names of transformers' BLIP-2; else they must have LAVIS's."""
    return any(name.startswith(("qformer.", "vision_model.")) for name in checkpoint.tensors)


def _projection(checkpoint: Checkpoint) -> str | None:
    """LAVIS's name of the layer before the language model; None in stage 1."""
    return next((name for name in PROJECTIONS if f"{name}.weight" in checkpoint.tensors), None)


# LAVIS


def _read_stage1(
    checkpoint: Checkpoint, tower: Tower, tokenizer: str | Path | None, token: str | None, dtype: torch.dtype | None
) -> tuple[Conversion, MMBlip2Processor, list[str]]:
    words, projection = TIED[0][0], "vision_proj.weight"
    require(checkpoint.tensors, [words, projection, "temp"], "BLIP-2 of LAVIS")
    require_tied(checkpoint)
    require_fit(checkpoint, tower)
    text = text_tokenizer(tokenizer or TEXT_TOKENIZER, checkpoint.tensors[words].shape[0], token)
    config = MMBlip2Config(
        vision_config=tower.config,
        qformer_config=qformer_config(checkpoint.tensors, **word_ids(text)),
        vision_feature_layer=tower.layer,
        vision_norm_eps=VISION_NORM_EPS,
        joint_dim=checkpoint.tensors[projection].shape[0],
        base_models={"vision_tower": tower.base_model},
    )
    merged = tower.merged_into(checkpoint)
    conversion = convert(
        merged,
        model_class=MMBlip2ForPreTraining,
        config=config,
        rules=[*lavis_rules(), *tower.rules],
        dtype=dtype or widest(merged),
    )
    return conversion, MMBlip2Processor(eva.published_image_processor(tower.config), text), tower.notes


def _read_stage2(
    checkpoint: Checkpoint,
    tower: Tower,
    language_model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype | None,
) -> tuple[Conversion, MMBlip2Processor, list[str]]:
    projection, text = _projection(checkpoint), copy.deepcopy(language_model.config)
    if TIED[0][0] in checkpoint.tensors:
        raise ValueError(f"mm_blip2 cannot be this model, which is {VARIANTS['llm_proj.']}: it has {TIED[0][0]}.")
    if text.model_type != PROJECTIONS[projection]:
        raise ValueError(
            f"{projection} was trained for a language model of type {PROJECTIONS[projection]}, but "
            f"{language_model.origin.name} is of type {text.model_type}: name the right one with --language-model."
        )
    require_fit(checkpoint, tower)
    require_same_language_model(checkpoint.select(LAVIS_MODELS[text.model_type]), language_model)
    if text.model_type == "opt":
        text.eos_token_id = new_line(tokenizer)
        note = f"Generation ends with a new line, token {text.eos_token_id}, as it was trained to."
    else:
        text.dense_act_fn = "gelu"
        note = "The language model's MLPs have the exact GELU that BLIP-2 was trained with, not its own approximation."
    config = MMBlip2Config(
        vision_config=tower.config,
        qformer_config=qformer_config(checkpoint.tensors),
        text_config=text,
        vision_feature_layer=tower.layer,
        vision_norm_eps=VISION_NORM_EPS,
        base_models={"vision_tower": tower.base_model, "language_model": _base_model(language_model.origin)},
    )
    merged = merge(tower.merged_into(checkpoint), language_model.checkpoint.with_prefix(LANGUAGE_MODEL))
    language_rules, apart = _language_model_rules(merged, text)
    conversion = convert(
        merged,
        model_class=MMBlip2ForConditionalGeneration,
        config=config,
        rules=[*lavis_rules(projection), *tower.rules, *language_rules],
        dtype=dtype or widest(merged),
    )
    conversion = keep_apart(conversion, apart)
    processor = MMBlip2Processor(
        eva.published_image_processor(tower.config),
        tokenizer,
        num_query_tokens=config.num_query_tokens,
        image_token_id=config.image_token_id,
        is_encoder_decoder=config.is_encoder_decoder,
        eos="\n" if text.model_type == "opt" else None,
    )
    return conversion, processor, [*tower.notes, note]


def require_tied(checkpoint: Checkpoint) -> None:
    """Raises ConversionError where two of LAVIS's names of one tensor hold different numbers; both are named."""
    tensors = checkpoint.tensors
    for first, second in TIED:
        if first in tensors and second in tensors and not torch.equal(tensors[first], tensors[second]):
            raise ConversionError(f"{first} and {second} are one tensor in BLIP-2, but here they differ.")


def require_fit(checkpoint: Checkpoint, tower: Tower) -> None:
    """Raises ConversionError where the norm of the tower's features is made for others than the tower gives."""
    require(checkpoint.tensors, ["ln_vision.weight"], "BLIP-2 of LAVIS")
    (width,) = checkpoint.tensors["ln_vision.weight"].shape
    if width != tower.config.hidden_size:
        raise ConversionError(
            f"{tower.origin.name} is not the tower that this was trained on: ln_vision.weight is for features of "
            f"{width}, but the tower's have {tower.config.hidden_size}."
        )


def qformer_config(tensors: Mapping[str, torch.Tensor], **words: int) -> MMBlip2QFormerConfig:
    """The config that the shapes of LAVIS's Q-Former imply.

    Args:
        tensors: by LAVIS's names.
        **words: ids of special tokens, where it has text.

    Raises:
        ConversionError: a key that tells a size is missing, or heads are not of 64.
    """
    block = "Qformer.bert.encoder.layer."
    mlp, key = f"{block}0.intermediate_query.dense.weight", f"{block}0.crossattention.self.key.weight"
    require(tensors, ["query_tokens", mlp, key], "Q-Former of LAVIS")
    _, queries, width = tensors["query_tokens"].shape
    if width % 64:
        raise ConversionError(f"query_tokens have a width of {width}: published Q-Formers have heads of 64.")
    layers = count_numbers(tensors, block)
    crossing = [number for number in range(1, layers) if f"{block}{number}.crossattention.self.key.weight" in tensors]
    tables = {
        "vocab_size": TIED[0][0],
        "max_position_embeddings": "Qformer.bert.embeddings.position_embeddings.weight",
    }
    text = {name: tensors[table].shape[0] for name, table in tables.items() if table in tensors}
    return MMBlip2QFormerConfig(
        num_query_tokens=queries,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=tensors[mlp].shape[0],
        cross_attention_frequency=crossing[0] if crossing else layers,
        encoder_hidden_size=tensors[key].shape[1],
        use_text=bool(text),
        **text,
        **words,
    )


# transformers


def _read_transformers(
    checkpoint: Checkpoint, tokenizer: str | Path | None, token: str | None, dtype: torch.dtype | None
) -> tuple[Conversion, MMBlip2Processor, list[str]]:
    declared = checkpoint.configs.get("config.json", {})
    if declared.get("model_type") != Blip2Config.model_type:
        raise ValueError(
            f"The names are those of transformers' BLIP-2, but no config.json of type {Blip2Config.model_type} is "
            f"beside them (found: {declared.get('model_type')}): convert the folder that has it."
        )
    source = tokenizer or checkpoint.folder
    if source is None:
        raise ValueError("No tokenizer is beside the weights: name its folder with --tokenizer.")
    eva.refuse_k_bias(checkpoint.tensors, "vision_model.")
    read = _read_their_retrieval if "itm_head.weight" in checkpoint.tensors else _read_their_generation
    return read(checkpoint, Blip2Config.from_dict(copy.deepcopy(declared)), source, token, dtype or widest(checkpoint))


def _read_their_retrieval(
    checkpoint: Checkpoint, theirs: Blip2Config, tokenizer: str | Path, token: str | None, dtype: torch.dtype
) -> tuple[Conversion, MMBlip2Processor, list[str]]:
    words = text_tokenizer(tokenizer, theirs.qformer_config.vocab_size, token)
    config = config_from_transformers(theirs, use_text=True, **word_ids(words))
    temperature = Checkpoint({"temperature": torch.tensor([config.itc_temperature], dtype=dtype)}, {}, ())
    conversion = convert(
        merge(checkpoint, temperature),
        model_class=MMBlip2ForImageTextRetrieval,
        config=config,
        rules=[*transformers_rules(), *_their_tower(), rename("temperature", "temperature")],
        dtype=dtype,
    )
    note = f"transformers keeps no temperature, which divides cosines: it begins anew at {config.itc_temperature}."
    return conversion, MMBlip2Processor(_their_image_processor(checkpoint, config), words), [note]


def _read_their_generation(
    checkpoint: Checkpoint, theirs: Blip2Config, tokenizer: str | Path, token: str | None, dtype: torch.dtype
) -> tuple[Conversion, MMBlip2Processor, list[str]]:
    words = open_tokenizer(tokenizer, token)
    config = config_from_transformers(theirs, use_text=False, text_config=theirs.text_config)
    language_rules, apart = _language_model_rules(checkpoint, config.text_config)
    rules = [*transformers_rules(), *_their_tower(), *language_rules]
    conversion = convert(
        checkpoint, model_class=MMBlip2ForConditionalGeneration, config=config, rules=rules, dtype=dtype
    )
    conversion = keep_apart(conversion, apart)
    if declared := checkpoint.configs.get("generation_config.json"):
        conversion.empty.generation_config = GenerationConfig.from_dict(dict(declared))
    end = theirs.text_config.eos_token_id
    processor = MMBlip2Processor(
        _their_image_processor(checkpoint, config),
        words,
        num_query_tokens=config.num_query_tokens,
        image_token_id=config.image_token_id,
        is_encoder_decoder=config.is_encoder_decoder,
        eos=end if isinstance(end, int) and end != words.eos_token_id else None,
    )
    return conversion, processor, []


def config_from_transformers(theirs: Blip2Config, use_text: bool, **fields: Any) -> MMBlip2Config:
    """The config of transformers' BLIP-2 in the fields of ours.

    Its tower ends with the norm of the features, which has the tower's eps, not that of LAVIS's `ln_vision`.

    Args:
        theirs: theirs.
        use_text: whether the Q-Former has text.
        **fields: of `MMBlip2Config`, or ids of special tokens of the Q-Former.

    Raises:
        ValueError: the queries and values of the tower have no bias.
    """
    qformer, names = theirs.qformer_config, MMBlip2QFormerConfig().to_dict()
    return MMBlip2Config(
        vision_config=eva.config_from_transformers(theirs.vision_config.to_dict()),
        qformer_config=MMBlip2QFormerConfig(
            num_query_tokens=theirs.num_query_tokens,
            use_text=use_text,
            **{ours: getattr(qformer, name) for name, ours in QFORMER_FIELDS.items()},
            **{name: fields.pop(name) for name in names.keys() & fields.keys()},
        ),
        vision_norm_eps=theirs.vision_config.layer_norm_eps,
        joint_dim=theirs.image_text_hidden_size,
        **({} if use_text or theirs.image_token_index is None else {"image_token_id": theirs.image_token_index}),
        **fields,
    )


def _their_tower() -> list[Rule]:
    return eva.transformers_rules("vision_model.", "vision_tower.")


def _language_model_rules(checkpoint: Checkpoint, config: PreTrainedConfig) -> tuple[list[Rule], set[str]]:
    """All names of the language model, and those that its config ties but the file has with numbers of their own.

    What the file only repeats is dropped; the others wait for `keep_apart`.

    Raises:
        ConversionError: numbers of their own have another shape.
    """
    with torch.device("meta"):
        empty = language_model_from_config(copy.deepcopy(config))
    names = [f"{LANGUAGE_MODEL}{name}" for name in stored_tensors(empty)]
    tied = {f"{LANGUAGE_MODEL}{name}": f"{LANGUAGE_MODEL}{of}" for name, of in empty.all_tied_weights_keys.items()}
    tensors = checkpoint.tensors
    repeated = {name for name, of in tied.items() if name in tensors and of in tensors}
    apart = {name for name in repeated if not torch.equal(tensors[name], tensors[tied[name]])}
    if misfits := {name for name in apart if tensors[name].shape != tensors[tied[name]].shape}:
        raise ConversionError(f"{listed(misfits)} and {listed(tied[name] for name in misfits)} differ in shape.")
    return [*(rename(name, name) for name in names), *drop(*repeated)], apart


def keep_apart(conversion: Conversion, names: Iterable[str]) -> Conversion:
    """The conversion with tensors of their own under names that the config ties, as Flan-T5's head.

    transformers ties T5's head to its words whatever a config says, but not where it loads both with different numbers.
    """
    empty = conversion.empty
    for name in names:
        module, _, leaf = name.rpartition(".")
        tied = empty.get_parameter(name)
        setattr(empty.get_submodule(module), leaf, torch.nn.Parameter(torch.empty_like(tied), tied.requires_grad))
        del empty.all_tied_weights_keys[name]
    steps = [step for step in conversion.steps if step.targets]
    return replace(conversion, steps=(*steps, *plan([rename(name, name) for name in names], names)))


def _their_image_processor(checkpoint: Checkpoint, config: MMBlip2Config) -> MMClipImageProcessorPil:
    return eva.image_processor_from_transformers(checkpoint.configs, config.vision_config)


# Frozen parts


@dataclass(frozen=True)
class Tower:
    """A picture tower and how it is read.

    Args:
        config: of ours.
        rules: from names behind `TOWER` to ours behind ``vision_tower.``.
        layer: the features that BLIP-2 reads, see `MMBlip2Config.vision_feature_layer`.
        origin: where it came from.
        checkpoint: of its own; None where the tower is in the file of the trained part.
        filled: what no source holds and no output of BLIP-2 depends on.
        notes: sentences about it.
    """

    config: PreTrainedConfig
    rules: list[Rule]
    layer: int
    origin: Origin
    checkpoint: Checkpoint | None = None
    filled: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def base_model(self) -> dict[str, str | None]:
        """See `MMBlip2Config.base_models`."""
        return _base_model(self.origin)

    def merged_into(self, trained: Checkpoint) -> Checkpoint:
        """The trained part with the tower beside it."""
        parts = [trained] if self.checkpoint is None else [trained, self.checkpoint]
        return merge(*parts, Checkpoint(self.filled, {}, ()).with_prefix(TOWER))


def _base_model(origin: Origin) -> dict[str, str | None]:
    return {"name": origin.name, "revision": origin.revision}


def _find_tower(checkpoint: Checkpoint, vision: str | Path | None, revision: str | None, token: str | None) -> Tower:
    """The tower in LAVIS's file, where it was trained, or the one that is named."""
    if any(name.startswith(TOWER) for name in checkpoint.tensors):
        if vision is not None:
            raise ValueError("The file holds the picture tower, which was trained too: leave --vision out.")
        return replace(read_tower(checkpoint.select(TOWER)), checkpoint=None)
    if vision is None:
        raise ValueError(
            "LAVIS's file does not hold the picture tower, which was frozen: name it with --vision, eva_vit_g.pth for "
            "ViT-g, clip_vit_L.pth or a CLIP ViT-L/14 for ViT-L."
        )
    return read_tower(open_clip_source(vision, revision=revision, token=token))


def read_tower(checkpoint: Checkpoint) -> Tower:
    """An EVA ViT or the picture tower of a CLIP, in any layout of theirs or in ours, which the names tell.

    Raises:
        ConversionError: it is neither, or lacks a tensor that tells a size.
        ValueError: it is of a variant, or not the CLIP that BLIP-2 was trained on.
    """
    names, declared = checkpoint.tensors.keys(), checkpoint.configs.get("config.json", {})
    if declared.get("model_type") in ("clip", "clip_vision_model", "mm_clip", "mm_clip_vision"):
        with declared_by("config.json"):
            return _declared_clip(checkpoint, declared)
    if "visual.conv1.weight" in names:
        return _published_clip(checkpoint.select("visual."))
    if "conv1.weight" in names:
        return _published_clip(checkpoint)
    if declared.get("model_type") == EvaViTConfig.model_type:
        with declared_by("config.json"):
            config = EvaViTConfig.from_dict(declared)
        return _tower(checkpoint, config, [rename("{name*}", "{name*}")], -1)
    layout, prefix = eva.eva_layout(names)
    if layout == "transformers":
        checkpoint = checkpoint.select(prefix)
        eva.refuse_k_bias(checkpoint.tensors)
        with declared_by("config.json"):
            config = eva.config_from_transformers(declared)
        return _tower(checkpoint, config, [*eva.transformers_rules(), *drop("post_layernorm.{p}")], -1)
    checkpoint = checkpoint.select(prefix)
    config = eva.eva_config(checkpoint.tensors)
    return _tower(checkpoint, config, eva.eva_rules(num_hidden_layers=config.num_hidden_layers), -1)


def _tower(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    rules: list[Rule],
    layer: int,
    filled: dict[str, torch.Tensor] | None = None,
    notes: Iterable[str] = (),
) -> Tower:
    return Tower(
        config=config,
        rules=_prefixed(rules, TOWER, "vision_tower."),
        layer=layer,
        origin=checkpoint.origins[-1],
        checkpoint=checkpoint.with_prefix(TOWER),
        filled=filled or {},
        notes=list(notes),
    )


def _published_clip(checkpoint: Checkpoint) -> Tower:
    """The picture tower in OpenAI's names. LAVIS's own file may lack the last block, and with it the norm after it."""
    tensors = checkpoint.tensors
    config = clip_config(tensors)
    filled, notes = {}, []
    if "ln_post.weight" not in tensors:
        width = tensors["ln_pre.weight"]
        filled = {"ln_post.weight": torch.ones_like(width), "ln_post.bias": torch.zeros_like(width)}
        notes = ["The norm of the tower's pooled token, which BLIP-2 does not use and the source lacks, does nothing."]
    return _tower(checkpoint, config, _clip_rules(), clip_layer(config), filled, notes)


def _declared_clip(checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Tower:
    """The picture tower of transformers' CLIP or of ours."""
    fields = declared if declared["model_type"].startswith("mm_") else from_transformers_config(dict(declared))
    if fields["model_type"] == MMClipConfig.model_type:
        fields = MMClipConfig.from_dict(fields).vision_config.to_dict()
    if fields["model_type"] != MMClipVisionConfig.model_type:
        raise ValueError(f"{checkpoint.origins[0].name} has a picture tower of type {fields['model_type']}: {NO_CLIP}")
    config = MMClipVisionConfig.from_dict(fields)
    prefix = "vision_model."
    prefix = prefix if any(name.startswith(prefix) for name in checkpoint.tensors) else ""
    return _tower(
        checkpoint.select(prefix), config, clip_transformers_rules(MMClipVisionModel, False), clip_layer(config)
    )


def clip_config(tensors: Mapping[str, torch.Tensor]) -> MMClipVisionConfig:
    """The config that the shapes of CLIP's picture tower in OpenAI's names imply.

    Raises:
        ConversionError: a key that tells a size is missing.
        ValueError: pictures are not square.
    """
    kernel, table, mlp = "conv1.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight"
    require(tensors, [kernel, table, mlp, "ln_pre.weight"], "ViT of CLIP")
    width, channels, *patch = tensors[kernel].shape
    return MMClipVisionConfig(
        hidden_size=width,
        intermediate_size=tensors[mlp].shape[0],
        num_hidden_layers=count_numbers(tensors, "transformer.resblocks."),
        num_attention_heads=published_heads(width),
        num_channels=channels,
        image_size=picture_side(tensors[table].shape[0] - 1, patch, otherwise=NO_CLIP),
        patch_size=patch[0],
        hidden_act="quick_gelu",
        pos_embed_interpolation="bicubic",
    )


def clip_layer(config: MMClipVisionConfig) -> int:
    """The layer whose features BLIP-2 reads: of all blocks of CLIP the last but one, of LAVIS's own tower, which has no
    more, the last.

    Raises:
        ValueError: it has another number of blocks.
    """
    if config.num_hidden_layers not in (CLIP_BLOCKS - 1, CLIP_BLOCKS):
        raise ValueError(f"This CLIP has {config.num_hidden_layers} blocks: {NO_CLIP}")
    return -1 if config.num_hidden_layers < CLIP_BLOCKS else -2


@dataclass(frozen=True)
class LanguageModel:
    """A language model as transformers opens it.

    Args:
        model: with its weights in the dtype in which they are stored.
        origin: where it came from.
    """

    model: PreTrainedModel
    origin: Origin

    @property
    def config(self) -> PreTrainedConfig:
        """Of the language model."""
        return self.model.config

    @property
    def checkpoint(self) -> Checkpoint:
        """Its tensors, tied ones once."""
        tensors = {name: tensor.detach() for name, tensor in stored_tensors(self.model).items()}
        return Checkpoint(tensors, {}, (self.origin,))


def open_frozen_language_model(
    source: str | Path, revision: str | None = None, token: str | None = None
) -> LanguageModel:
    """Opens a language model by transformers, which knows each one's old names and ties.

    Raises:
        ConversionError: weights are missing or left over; they are named.
        OSError, ValueError: there is none, or it cannot be read.
    """
    whence = {"revision": revision or "main", "token": token}
    try:
        config = AutoConfig.from_pretrained(str(source), **whence)
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, loading = auto_class.from_pretrained(
            str(source), config=config, dtype="auto", output_loading_info=True, **whence
        )
    except (OSError, ValueError):
        raise
    except Exception as error:  # transformers raises anything of a damaged folder
        raise ValueError(f"{source} cannot be opened as a language model: {first_line(error)}.") from error
    wrong = {name: keys for name, keys in loading.items() if keys and name != "error_msgs"}
    if wrong:
        found = "; ".join(f"{name.replace('_', ' ')} {listed(map(str, keys))}" for name, keys in wrong.items())
        raise ConversionError(f"{source} is no whole {type(model).__name__}: {found}.")
    name = Path(source).resolve().name if Path(source).exists() else str(source)
    return LanguageModel(model, Origin(name, getattr(model.config, "_commit_hash", None)))


def require_same_language_model(stored: Checkpoint, language_model: LanguageModel) -> None:
    """Compares what LAVIS's file holds of the frozen language model, its tied tensors if any, with the one named.

    Raises:
        ConversionError: they differ, in what the dtypes of both can hold; the keys are named.
    """
    state = language_model.model.state_dict()
    unknown = stored.tensors.keys() - state.keys()
    if different := unknown or {name for name, tensor in stored.tensors.items() if not _same(tensor, state[name])}:
        raise ConversionError(
            f"The language model in {stored.origins[0].name} is not {language_model.origin.name}: it differs in "
            f"{listed(different)}; name the one that it was trained with."
        )


def _same(stored: torch.Tensor, base: torch.Tensor) -> bool:
    return torch.equal(*(tensor.to(base.dtype).to(stored.dtype) for tensor in (stored, base)))


def widest(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that holds all numbers of a checkpoint unrounded."""
    dtypes = {tensor.dtype for tensor in checkpoint.tensors.values() if tensor.is_floating_point()}
    return reduce(torch.promote_types, dtypes)


# Processors


def open_tokenizer(
    source: str | Path, token: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(str(source), revision=revision or "main", token=token)
    except Exception as error:  # transformers raises anything
        raise ValueError(
            f"{source} has no tokenizer that opens ({first_line(error)}): name a folder or Hub id with --tokenizer."
        ) from error


def text_tokenizer(source: str | Path, vocab_size: int, token: str | None = None) -> PreTrainedTokenizerBase:
    """The Q-Former's: BERT's with `FIRST_WORD` as its last word.

    Raises:
        ValueError: there is none, or its vocabulary is not the Q-Former's.
    """
    tokenizer = open_tokenizer(source, token)
    tokenizer.add_special_tokens({"bos_token": FIRST_WORD})
    if tokenizer.bos_token_id >= vocab_size or len(tokenizer) < vocab_size:
        raise ValueError(
            f"{source} has {len(tokenizer)} words with {FIRST_WORD}, which is {tokenizer.bos_token_id}, but the "
            f"Q-Former {vocab_size}: name the tokenizer that it was trained with by --tokenizer."
        )
    return tokenizer


def word_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The fields of `MMBlip2QFormerConfig` that say which ids special tokens have."""
    names = ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def new_line(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token of a new line, with which the published OPT models end a text: 50118."""
    return tokenizer("\n", add_special_tokens=False)["input_ids"][-1]


# Back


def export_lavis(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights as LAVIS has them under ``"model"``: the trained part and the tower, without the language model.

    Args:
        model: a `MMBlip2ForPreTraining` or a `MMBlip2ForConditionalGeneration`.

    Raises:
        ValueError: LAVIS has no such model; what it lacks is named.
    """
    config = model.config
    if not isinstance(model, (MMBlip2ForPreTraining, MMBlip2ForConditionalGeneration)):
        raise ValueError(f"LAVIS's BLIP-2 has heads that a {type(model).__name__} lacks: it cannot be written so.")
    refuse_lacking("LAVIS's BLIP-2", _what_lavis_lacks(config))
    kind = config.text_config and config.text_config.model_type
    projection = next((name for name, of in PROJECTIONS.items() if of == kind), None)
    left_out = inverse(drop(f"{LANGUAGE_MODEL}{{name*}}"))
    state = export(model, [*lavis_rules(projection), *_tower_rules(config.vision_config), *left_out])
    if config.qformer_config.use_text:
        state[PLACES] = torch.arange(config.qformer_config.max_position_embeddings)[None]
    return state


def _what_lavis_lacks(config: MMBlip2Config) -> list[str]:
    tower, qformer, text = config.vision_config, config.qformer_config, config.text_config
    lacking = [] if isinstance(tower, (EvaViTConfig, MMClipVisionConfig)) else [f"tower of type {tower.model_type}"]
    if isinstance(tower, MMClipVisionConfig) and config.vision_feature_layer != clip_layer(tower):
        lacking.append(f"vision_feature_layer = {config.vision_feature_layer}")
    if isinstance(tower, EvaViTConfig) and config.vision_feature_layer != -1:
        lacking.append(f"vision_feature_layer = {config.vision_feature_layer}")
    if text is not None and text.model_type not in LAVIS_MODELS:
        lacking.append(f"language model of type {text.model_type}")
    if text is not None and qformer.use_text:
        lacking.append("text in the Q-Former of stage 2")
    if config.vision_norm_eps != VISION_NORM_EPS:
        lacking.append(f"vision_norm_eps = {config.vision_norm_eps}")
    if not config.vision_class_token:
        lacking.append("features without the class token")
    if qformer.hidden_size != 64 * qformer.num_attention_heads:
        lacking.append(f"{qformer.num_attention_heads} heads in a width of {qformer.hidden_size}")
    return lacking


def _tower_rules(config: EvaViTConfig | MMClipVisionConfig) -> list[Rule]:
    eva_vit = isinstance(config, EvaViTConfig)
    rules = eva.eva_rules(num_hidden_layers=config.num_hidden_layers) if eva_vit else _clip_rules()
    return _prefixed(rules, TOWER, "vision_tower.")


def save_as_lavis(model: PreTrainedModel, processor: MMBlip2Processor, folder: str | Path) -> Path:
    """Writes a folder with a ``blip2.pth`` that LAVIS opens as ``pretrained`` or ``finetuned``; it has no optimizer.

    Raises:
        ValueError: see `export_lavis`; nothing is written.
    """
    content = {"model": export_lavis(model), "epoch": 0}
    with whole_folder(Path(folder)) as aside:
        torch.save(content, aside / LAVIS_FILE)
    return Path(folder)


def export_transformers(
    model: PreTrainedModel, image_token_id: int | None = None
) -> tuple[Blip2Config, dict[str, torch.Tensor]]:
    """Our model as transformers has it: config and tensors on disk.

    Args:
        model: of stage 1, of which the head that generates text and the temperature are left out, or of stage 2.
        image_token_id: what stands for a soft token, by default as in the model's config; transformers looks it up.

    Raises:
        ValueError: transformers has no such model; what it lacks is named.
    """
    config = transformers_config(model.config, image_token_id)
    left_out = inverse(drop("lm_head.{name*}", "temperature"))
    rules = [
        *transformers_rules(),
        *_their_tower(),
        rename(f"{LANGUAGE_MODEL}{{name*}}", f"{LANGUAGE_MODEL}{{name*}}"),
    ]
    return config, export(model, [*rules, *left_out])


def transformers_config(config: MMBlip2Config, image_token_id: int | None = None) -> Blip2Config:
    """The config of transformers' BLIP-2 that means the same.

    Warns where its norm of the tower's features has another eps.

    Raises:
        ValueError: there is none; what stands in the way is named.
    """
    tower, qformer, text = config.vision_config, config.qformer_config, config.text_config
    token = config.image_token_id if image_token_id is None else image_token_id
    refuse_lacking("transformers' BLIP-2", _what_transformers_lacks(config, token))
    if config.vision_norm_eps != tower.layer_norm_eps:
        logger.warning(
            f"transformers norms the tower's features with the tower's eps, {tower.layer_norm_eps}, not "
            f"{config.vision_norm_eps}: outputs will differ by about as much."
        )
    fields = {name: getattr(qformer, ours) for name, ours in QFORMER_FIELDS.items()}
    return Blip2Config(
        vision_config=eva.transformers_config(tower).to_dict(),
        qformer_config={**fields, "pad_token_id": qformer.pad_token_id, "use_qformer_text_input": qformer.use_text},
        text_config=None if text is None else text.to_dict(),
        num_query_tokens=qformer.num_query_tokens,
        image_text_hidden_size=config.joint_dim,
        image_token_index=None if text is None else token,
        architectures=["Blip2ForImageTextRetrieval" if text is None else "Blip2ForConditionalGeneration"],
    )


def _what_transformers_lacks(config: MMBlip2Config, image_token_id: int) -> list[str]:
    tower, text = config.vision_config, config.text_config
    lacking = [] if isinstance(tower, EvaViTConfig) else [f"tower of type {tower.model_type}"]
    if config.vision_feature_layer != -1:
        lacking.append(f"vision_feature_layer = {config.vision_feature_layer}")
    if not config.vision_class_token:
        lacking.append("features without the class token")
    if text is not None and config.qformer_config.use_text:
        lacking.append("text in the Q-Former of stage 2")
    if text is not None and not 0 <= image_token_id < text.vocab_size:
        lacking.append(f"word {image_token_id} for a picture in a vocabulary of {text.vocab_size}")
    return lacking


def save_as_transformers(model: PreTrainedModel, processor: MMBlip2Processor, folder: str | Path) -> Path:
    """Writes a folder that transformers opens without this package, with `Blip2Processor`: of stage 1 as
    `Blip2ForImageTextRetrieval`, of stage 2 as `Blip2ForConditionalGeneration`.

    Its processor writes ``<image>`` for each soft token, a word after the tokenizer's last unless that has it. Warns of
    what is left out, and of a norm that has another eps there.

    Raises:
        ValueError: transformers' BLIP-2 cannot be this model; what it lacks is named. Nothing is written.
    """
    tokenizer, retrieval = copy.deepcopy(processor.tokenizer), model.config.text_config is None
    if not retrieval:
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_WORD]})
    token = None if retrieval else tokenizer.convert_tokens_to_ids(IMAGE_WORD)
    config, state = export_transformers(model, token)
    if left_out := {name.split(".")[0] for name in stored_tensors(model)} & {"lm_head", "temperature"}:
        logger.warning(f"transformers' BLIP-2 has no {listed(left_out)}: left out.")
    preprocessing = processor_to_transformers(processor.image_processor, "BlipImageProcessor")
    queries = {} if retrieval else {"num_query_tokens": config.num_query_tokens}
    jsons = {
        "preprocessor_config.json": {**preprocessing, "do_convert_rgb": True},
        "processor_config.json": {"processor_class": "Blip2Processor", **queries},
    }
    parts = [config, tokenizer] if retrieval else [config, tokenizer, model.generation_config]
    return save_published(folder, state, "model.safetensors", jsons, parts)
