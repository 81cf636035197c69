"""Tables of names between published BLIP-2 checkpoints and ours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ...conversion.rules import Rule, drop, rename, reshape
from ..clip.conversion_clip import open_clip_rules
from ..eva_vit import conversion_eva_vit as eva

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


def lavis_rules(projection: str | None = None) -> list[Rule]:
    """LAVIS's layout to ours, without tower and language model.

    Args:
        projection: ``"opt_proj"`` or ``"t5_proj"`` in stage 2.
    """
    bert, head = "Qformer.bert.embeddings", "Qformer.cls.predictions"
    return [
        rename("ln_vision.{p}", "vision_norm.{p}"),
        rename("query_tokens", "qformer.embeddings.query_tokens"),
        tied(
            [f"{bert}.word_embeddings.weight", f"{head}.decoder.weight"], "qformer.embeddings.word_embeddings.weight"
        ),
        rename(f"{bert}.position_embeddings.weight", "qformer.embeddings.position_embeddings.weight"),
        rename(f"{bert}.LayerNorm.{{p}}", "qformer.embeddings.layer_norm.{p}"),
        *_block_rules("Qformer.bert.encoder.layer", "self"),
        rename(f"{head}.transform.dense.{{p}}", "lm_head.transform.{p}"),
        rename(f"{head}.transform.LayerNorm.{{p}}", "lm_head.layer_norm.{p}"),
        tied([f"{head}.bias", f"{head}.decoder.bias"], "lm_head.decoder.bias"),
        rename("vision_proj.{p}", "vision_projection.{p}"),
        rename("text_proj.{p}", "text_projection.{p}"),
        rename("itm_head.{p}", "itm_head.{p}"),
        reshape("temp", "temperature", (1,), ()),
        *([rename(f"{projection}.{{p}}", "language_projection.{p}")] if projection else []),
        *drop(PLACES, *(f"{prefix}{{name*}}" for prefix in LAVIS_MODELS.values())),
    ]


def tied(sources: list[str], target: str) -> Rule:
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


def clip_rules() -> list[Rule]:
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


def prefixed(rules: Iterable[Rule], theirs: str, ours: str) -> list[Rule]:
    """The table with a prefix before the names of both sides."""
    return [
        replace(
            rule,
            sources=tuple(f"{theirs}{name}" for name in rule.sources),
            targets=tuple(f"{ours}{name}" for name in rule.targets),
        )
        for rule in rules
    ]


def their_tower() -> list[Rule]:
    return eva.transformers_rules("vision_model.", "vision_tower.")
