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
