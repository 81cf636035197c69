"""The way back: our BLIP-2 as LAVIS's file or transformers' folder."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import Blip2Config, PreTrainedModel
from transformers.utils import logging

from ...conversion.engine import export, stored_tensors, whole_folder
from ...conversion.layouts import refuse_lacking, save_published
from ...conversion.pictures import processor_to_transformers
from ...conversion.rules import Rule, drop, inverse, listed, rename
from ..clip.configuration_clip import MMClipVisionConfig
from ..eva_vit import conversion_eva_vit as eva
from ..eva_vit.configuration_eva_vit import EvaViTConfig
from .configuration_blip2 import MMBlip2Config
from .conversion_blip2_parts import clip_layer
from .conversion_blip2_rules import (
    IMAGE_WORD,
    LANGUAGE_MODEL,
    LAVIS_FILE,
    LAVIS_MODELS,
    PLACES,
    PROJECTIONS,
    QFORMER_FIELDS,
    TOWER,
    VISION_NORM_EPS,
    clip_rules,
    lavis_rules,
    prefixed,
    their_tower,
    transformers_rules,
)
from .modeling_blip2 import MMBlip2ForConditionalGeneration
from .modeling_blip2_stage1 import MMBlip2ForPreTraining
from .processing_blip2 import MMBlip2Processor

logger = logging.get_logger(__name__)


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
    rules = eva.eva_rules(num_hidden_layers=config.num_hidden_layers) if eva_vit else clip_rules()
    return prefixed(rules, TOWER, "vision_tower.")


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
        *their_tower(),
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
