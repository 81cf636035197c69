"""What a conversion of BLIP-2 takes from elsewhere: frozen towers, language models and tokenizers."""

from __future__ import annotations

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
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...conversion.checkpoint import Checkpoint, Origin, merge
from ...conversion.engine import stored_tensors
from ...conversion.layouts import count_numbers, declared_by, first_line, picture_side, published_heads, require
from ...conversion.rules import ConversionError, Rule, drop, listed, rename
from ..clip.configuration_clip import MMClipConfig, MMClipVisionConfig, from_transformers_config
from ..clip.conversion_clip import transformers_rules as clip_transformers_rules
from ..clip.modeling_clip import MMClipVisionModel
from ..clip.openai_files import open_clip_source
from ..eva_vit import conversion_eva_vit as eva
from ..eva_vit.configuration_eva_vit import EvaViTConfig
from .conversion_blip2_rules import CLIP_BLOCKS, FIRST_WORD, NO_CLIP, TOWER, clip_rules, prefixed


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
        return base_model(self.origin)

    def merged_into(self, trained: Checkpoint) -> Checkpoint:
        """The trained part with the tower beside it."""
        parts = [trained] if self.checkpoint is None else [trained, self.checkpoint]
        return merge(*parts, Checkpoint(self.filled, {}, ()).with_prefix(TOWER))


def base_model(origin: Origin) -> dict[str, str | None]:
    return {"name": origin.name, "revision": origin.revision}


def find_tower(checkpoint: Checkpoint, vision: str | Path | None, revision: str | None, token: str | None) -> Tower:
    """The tower in LAVIS's file, where it was trained, or the one that is named."""
    if any(name.startswith(TOWER) for name in checkpoint.tensors):
        if vision is not None:
            raise ValueError("The file holds the picture tower, which was trained too: leave --vision out.")
        return replace(read_tower(checkpoint.select(TOWER)), checkpoint=None)
    if not any(name.startswith("Qformer.") for name in checkpoint.tensors):
        raise ConversionError("The file holds no Q-Former, so that it is none of BLIP-2 (wrong file?).")
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
        rules=prefixed(rules, TOWER, "vision_tower."),
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
    return _tower(checkpoint, config, clip_rules(), clip_layer(config), filled, notes)


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
    if different := unknown or {
        name for name, tensor in stored.tensors.items() if not same_tensor(tensor, state[name])
    }:
        raise ConversionError(
            f"The language model in {stored.origins[0].name} is not {language_model.origin.name}: it differs in "
            f"{listed(different)}; name the one that it was trained with."
        )


def same_tensor(stored: torch.Tensor, base: torch.Tensor) -> bool:
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
