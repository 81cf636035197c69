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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Blip2Config, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from ...composite.language_model import language_model_from_config
from ...conversion.checkpoint import Checkpoint, merge, open_checkpoint
from ...conversion.engine import Conversion, convert, stored_tensors
from ...conversion.layouts import count_numbers, declared_by, refuse_variants, require
from ...conversion.rules import ConversionError, Rule, drop, listed, plan, rename
from ..clip.image_processing_clip import MMClipImageProcessorPil
from ..eva_vit import conversion_eva_vit as eva
from .configuration_blip2 import MMBlip2Config, MMBlip2QFormerConfig
from .conversion_blip2_parts import (
    LanguageModel,
    Tower,
    base_model,
    find_tower,
    new_line,
    open_frozen_language_model,
    open_tokenizer,
    require_same_language_model,
    text_tokenizer,
    widest,
    word_ids,
)
from .conversion_blip2_rules import (
    LANGUAGE_MODEL,
    LAVIS_MODELS,
    PROJECTIONS,
    QFORMER_FIELDS,
    TEXT_TOKENIZER,
    TIED,
    VARIANTS,
    VISION_NORM_EPS,
    lavis_rules,
    their_tower,
    transformers_rules,
)
from .modeling_blip2 import MMBlip2ForConditionalGeneration
from .modeling_blip2_stage1 import MMBlip2ForImageTextRetrieval, MMBlip2ForPreTraining
from .processing_blip2 import MMBlip2Processor


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
    tower = find_tower(checkpoint, vision, vision_revision, token)
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
        base_models={"vision_tower": tower.base_model, "language_model": base_model(language_model.origin)},
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
        rules=[*transformers_rules(), *their_tower(), rename("temperature", "temperature")],
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
    rules = [*transformers_rules(), *their_tower(), *language_rules]
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
