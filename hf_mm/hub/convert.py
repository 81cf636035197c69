"""What ``hf-mm convert`` does: a published checkpoint becomes a folder for the Hub, checked, with its card; and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedModel

from ..conversion.checkpoint import Checkpoint, open_checkpoint
from ..conversion.engine import Conversion, check_target
from ..conversion.peers import require_agreement
from ..models.blip2 import conversion_blip2, conversion_blip2_export, peer_check_blip2
from ..models.blip2.configuration_blip2 import MMBlip2Config
from ..models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration
from ..models.blip2.modeling_blip2_stage1 import MMBlip2ForImageTextRetrieval, MMBlip2ForPreTraining
from ..models.clip import conversion_clip, peer_check_clip
from ..models.clip.modeling_clip import MMClipModel
from ..models.pic2word import conversion_pic2word, peer_check_pic2word
from ..models.pic2word.modeling_pic2word import Pic2WordModel
from ..models.vit import conversion_vit, peer_check_vit
from ..models.vit.configuration_vit import MMViTConfig
from ..models.vit.image_processing_vit import MMViTImageProcessorPil
from ..models.vit.modeling_vit import MMViTForImageClassification, MMViTModel
from .converted_card import converted_card
from .push import check_repo_id, push_folder

DTYPES = ("float32", "float16", "bfloat16")
BLIP2_CLASSES = (MMBlip2ForPreTraining, MMBlip2ForImageTextRetrieval, MMBlip2ForConditionalGeneration)
BLIP2_LICENSE = (
    "The authors of BLIP-2 publish their code under BSD-3-Clause and, on the Hub, their weights as MIT. The picture tower and "
    "the language model are under the licences of their own publishers: OPT's forbids commercial use, Flan-T5's is Apache-2.0."
)
PIC2WORD_LICENSE = (
    "The authors of Pic2Word publish their code under Apache-2.0 and state no licence for the weights of the mapping "
    "network. The frozen CLIP is under the licence of its own publisher."
)


def convert_clip(
    source: str,
    out: str | Path,
    *,
    revision: str | None = None,
    activation: str | None = None,
    preset: str | None = None,
    tokenizer: str | None = None,
    check: bool = False,
    license: str | None = None,
    push_to_hub: str | None = None,
) -> Path:
    """Converts a published CLIP to a folder that the AutoClasses open.

    Args:
        source, revision, activation, preset, tokenizer: see `conversion_clip.read_clip`.
        out: the folder.
        check: compare with open_clip or transformers before anything is written.
        license: of the weights, an id of the Hub; OpenAI's are MIT, others ``"other"`` unless it is said.
        push_to_hub: repository to push the folder to.

    Returns:
        The folder.

    Raises:
        ValueError, OSError: see `read_clip`; or the peer is missing or disagrees. Nothing is written then.
    """
    if push_to_hub:
        check_repo_id(push_to_hub)
    check_target(out)
    checkpoint = conversion_clip.open_clip_source(source, revision=revision)
    if published := conversion_clip.published_name(checkpoint):
        print(f"{source} is OpenAI's {published}.")
    peer = peer_check_clip.peer_of(checkpoint) if check else None
    conversion, processor = conversion_clip.read_clip(
        checkpoint, activation=activation, preset=preset, tokenizer=tokenizer
    )
    license = license or ("mit" if published else "other")
    return _finish(conversion, processor, out, peer, peer_check_clip.compare_with_peer, license, push_to_hub)


def convert_vit(
    source: str,
    out: str | Path,
    *,
    revision: str | None = None,
    activation: str | None = None,
    image_size: Sequence[int] | None = None,
    num_attention_heads: int | None = None,
    check: bool = False,
    license: str | None = None,
    push_to_hub: str | None = None,
) -> Path:
    """Converts a published ViT to a folder that the AutoClasses open.

    Args:
        source, revision, activation, image_size, num_attention_heads: see `conversion_vit.read_vit`.
        out, check, license, push_to_hub: see `convert_clip`; the check is against timm or transformers.

    Returns:
        The folder.

    Raises:
        ValueError, OSError: see `read_vit`; or the peer is missing or disagrees. Nothing is written then.
    """
    if push_to_hub:
        check_repo_id(push_to_hub)
    check_target(out)
    checkpoint = open_checkpoint(source, revision=revision)
    peer = peer_check_vit.peer_of(checkpoint) if check else None
    conversion, image_processor = conversion_vit.read_vit(
        checkpoint, activation=activation, image_size=image_size, num_attention_heads=num_attention_heads
    )
    compare = peer_check_vit.compare_with_peer
    return _finish(conversion, image_processor, out, peer, compare, license or "other", push_to_hub)


def convert_pic2word(
    source: str,
    out: str | Path,
    *,
    clip: str | None = None,
    revision: str | None = None,
    clip_revision: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "float32",
    check: bool = False,
    license: str | None = None,
    push_to_hub: str | None = None,
) -> Path:
    """Converts the authors' Pic2Word to a folder that the AutoClasses open: mapping network, frozen CLIP and processor.

    Args:
        source, clip, revision, clip_revision, tokenizer: see `conversion_pic2word.read_pic2word`.
        dtype: of the weights that are written, one of `DTYPES`.
        out, check, license, push_to_hub: see `convert_clip`; the check is against open_clip with the mapping network worked
            out beside it.

    Returns:
        The folder.

    Raises:
        ValueError, OSError: see `read_pic2word`; or the peer is missing or disagrees. Nothing is written then.
    """
    if push_to_hub:
        check_repo_id(push_to_hub)
    check_target(out)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    if check and dtype != "float32":
        raise ValueError(f"The check compares in float32, which --dtype {dtype} rounds: leave one of them out.")
    peer = peer_check_pic2word.peer() if check else None
    published = conversion_pic2word.open_pic2word(source, revision=revision)
    conversion, processor = conversion_pic2word.read_pic2word(
        published, clip, clip_revision=clip_revision, tokenizer=tokenizer, dtype=getattr(torch, dtype)
    )
    stored = (
        "The CLIP is the one that the authors' file stores beside the mapping network."
        if clip is None
        else "The CLIP that the authors' file stores beside the mapping network is the one in this table, tensor by tensor, "
        "and was left out."
    )
    return _finish(
        conversion,
        processor,
        out,
        peer,
        lambda _, model: peer_check_pic2word.compare_with_peer(published, model),
        license or "other",
        push_to_hub,
        changes=[stored],
        license_note=PIC2WORD_LICENSE,
    )


def convert_blip2(
    source: str,
    out: str | Path,
    *,
    vision: str | None = None,
    language_model: str | None = None,
    tokenizer: str | None = None,
    revision: str | None = None,
    vision_revision: str | None = None,
    language_model_revision: str | None = None,
    dtype: str | None = None,
    check: bool = False,
    license: str | None = None,
    push_to_hub: str | None = None,
) -> Path:
    """Converts a published BLIP-2 to a folder that the AutoClasses open: tower, Q-Former, language model and processor.

    Args:
        source, vision, language_model, tokenizer, revision, vision_revision, language_model_revision: see
            `conversion_blip2.read_blip2`.
        dtype: of the weights that are written, one of `DTYPES`; by default the widest among the sources.
        out, check, license, push_to_hub: see `convert_clip`; the check is against transformers' BLIP-2 and of its folders
            alone.

    Returns:
        The folder.

    Raises:
        ValueError, OSError: see `read_blip2`; or the peer disagrees. Nothing is written then.
    """
    if push_to_hub:
        check_repo_id(push_to_hub)
    check_target(out)
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    published = open_checkpoint(source, revision=revision)
    peer = peer_check_blip2.peer_of(published, dtype) if check else None
    conversion, processor, changes = conversion_blip2.read_blip2(
        published,
        vision=vision,
        language_model=language_model,
        tokenizer=tokenizer,
        vision_revision=vision_revision,
        language_model_revision=language_model_revision,
        dtype=getattr(torch, dtype) if dtype else None,
    )
    return _finish(
        conversion,
        processor,
        out,
        peer,
        lambda _, model: peer_check_blip2.compare_with_peer(published, model),
        license or "other",
        push_to_hub,
        changes=changes,
        license_note=BLIP2_LICENSE,
    )


def export_clip(source: str, out: str | Path, layout: str) -> Path:
    """Writes a CLIP of ours, a folder or Hub id, as ``"transformers"`` or ``"open_clip"`` opens it."""
    check_target(out)
    model, processor = MMClipModel.from_pretrained(source), AutoProcessor.from_pretrained(source)
    write = {"transformers": conversion_clip.save_as_transformers, "open_clip": conversion_clip.save_as_open_clip}
    return write[layout](model, processor, out)


def export_vit(source: str, out: str | Path, layout: str) -> Path:
    """Writes a ViT of ours, a folder or Hub id, as ``"transformers"`` or ``"timm"`` opens it."""
    check_target(out)
    architectures = MMViTConfig.from_pretrained(source).architectures or []
    classifies = MMViTForImageClassification.__name__ in architectures
    model = (MMViTForImageClassification if classifies else MMViTModel).from_pretrained(source)
    write = {"transformers": conversion_vit.save_as_transformers, "timm": conversion_vit.save_as_timm}
    return write[layout](model, MMViTImageProcessorPil.from_pretrained(source), out)


def export_pic2word(source: str, out: str | Path, layout: str) -> Path:
    """Writes a Pic2Word of ours, a folder or Hub id, as the authors' code opens it, the only ``layout``: ``"pic2word"``."""
    check_target(out)
    model, processor = Pic2WordModel.from_pretrained(source), AutoProcessor.from_pretrained(source)
    write = {"pic2word": conversion_pic2word.save_as_pic2word}
    return write[layout](model, processor, out)


def export_blip2(source: str, out: str | Path, layout: str) -> Path:
    """Writes a BLIP-2 of ours, a folder or Hub id, as ``"transformers"`` or ``"lavis"`` opens it."""
    check_target(out)
    architectures = MMBlip2Config.from_pretrained(source).architectures or []
    model_class = next((cls for cls in BLIP2_CLASSES if cls.__name__ in architectures), None)
    if model_class is None:
        names = ", ".join(cls.__name__ for cls in BLIP2_CLASSES)
        raise ValueError(
            f"{source} is of {', '.join(architectures) or 'no class'}, but only {names} have other layouts."
        )
    model, processor = model_class.from_pretrained(source), AutoProcessor.from_pretrained(source)
    write = {
        "transformers": conversion_blip2_export.save_as_transformers,
        "lavis": conversion_blip2_export.save_as_lavis,
    }
    return write[layout](model, processor, out)


def _finish(
    conversion: Conversion,
    processor: Any,
    out: str | Path,
    peer: str | None,
    compare: Callable[[Checkpoint, PreTrainedModel], dict[str, float]],
    license: str,
    push_to_hub: str | None,
    **remarks: Any,
) -> Path:
    """Compares where a peer is given, writes model, processor and card, and pushes."""
    if peer is not None:
        print(require_agreement(compare(conversion.checkpoint, conversion.build()), peer))
    origins = [asdict(origin) for origin in conversion.checkpoint.origins]
    name = push_to_hub or Path(out).name
    card = converted_card(type(conversion.empty), conversion.empty.config, origins, license, name, **remarks)
    folder = conversion.save(out, processor=processor, card=card, remarks=remarks)
    if push_to_hub:
        print(f"{folder} is pushed: {push_folder(folder, push_to_hub)}")
    return folder
