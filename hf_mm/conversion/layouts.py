"""What converters of several models share: refusing in one sentence, reading sizes, writing folders of other layouts."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from transformers.utils import logging

from .engine import whole_folder, write_json
from .rules import ConversionError, first_line

logger = logging.get_logger(__name__)

WIDE_MODELS = (1280, 1408, 1664, 1792)  # H, g, G and e have 16 heads, all others heads of 64
OWN_FIELDS = {"model_type", "transformers_version", "architectures", "dtype"}  # of a config: nothing about the model

BROKEN = (  # what a missing, mistyped or impossible field of a config ends in
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,  # also RecursionError, of nested JSON
    StrictDataclassError,
    TypeError,
    UnicodeDecodeError,
    json.JSONDecodeError,
)


@contextmanager
def declared_by(source: str) -> Iterator[None]:
    """Turns what a damaged config ends in into one sentence that names its source, such as ``"config.json"``.

    Raises:
        ValueError: a field is missing, of another type, or describes nothing that can be built.
    """
    try:
        yield
    except BROKEN as error:
        cause = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error.__cause__ or error)
        raise ValueError(f"{source} describes nothing that can be built: {cause}.") from error


def refuse_contradiction(source: str, field: str, declared: Any, given: Any, option: str) -> None:
    """Raises ValueError where an option is given that says something else than the source declares; None says nothing."""
    if declared is not None and given is not None and declared != given:
        raise ValueError(f"{source} declares {field} = {declared!r}: leave {option} out.")


def refuse_variants(names: Collection[str], variants: Mapping[str, str], model_type: str) -> None:
    """Raises ValueError where a name holds a part that only another architecture has.

    Args:
        names: of the tensors.
        variants: parts of names, and what a checkpoint with each is.
        model_type: ours.
    """
    for part, variant in variants.items():
        if found := [name for name in names if part in name]:
            raise ValueError(f"{model_type} cannot be this model, which is {variant}: it has {min(found)}.")


def require(tensors: Mapping[str, Any], names: Iterable[str], what: str) -> None:
    """Raises ConversionError where one of the names, which the sizes of `what` are told by, is missing."""
    if missing := [name for name in names if name not in tensors]:
        raise ConversionError(f"This is no whole {what}: it lacks {', '.join(missing)}.")


def refuse_lacking(library: str, lacking: Collection[str]) -> None:
    """Raises ValueError where another library's model lacks something of ours, all of which is named."""
    if lacking:
        raise ValueError(f"{library} cannot be this model: it has no {', no '.join(lacking)}.")


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


def mlp_ratio(config: PreTrainedConfig) -> float:
    """The factor from which timm and open_clip, which truncate, get the width of the MLPs."""
    ratio = config.intermediate_size / config.hidden_size
    while int(config.hidden_size * ratio) < config.intermediate_size:  # the quotient may have been rounded down
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def warn_of_interpolation(config: PreTrainedConfig, where: str, interpolation: str) -> None:
    """Warns where a position table follows another grid by another rule than it does elsewhere."""
    if config.pos_embed_interpolation != interpolation:
        logger.warning(
            f"{where} resizes position tables by {interpolation!r}, not by {config.pos_embed_interpolation!r}: with "
            f"pictures of another size than {config.image_size} its outputs will differ."
        )


def save_published(
    folder: str | Path,
    state: dict[str, torch.Tensor],
    weights: str,
    jsons: Mapping[str, Any],
    parts: Iterable[Any] = (),
) -> Path:
    """Writes a folder in a published layout, whole or not at all.

    Args:
        folder: where to.
        state: the tensors by their published names.
        weights: name of their file.
        jsons: content of the JSON files by name.
        parts: what writes itself there first by its ``save_pretrained``: a config, a tokenizer.
    """
    folder = Path(folder)
    with whole_folder(folder) as aside:
        for part in parts:
            part.save_pretrained(aside)
        save_file(state, aside / weights, metadata={"format": "pt"})
        for name, content in jsons.items():
            write_json(aside / name, content)
    return folder


def picture_side(
    patches: int, patch: Sequence[int], given: Sequence[int] | None = None, otherwise: str = ""
) -> int | list[int]:
    """The picture's side, or ``[height, width]``, that a position table is for.

    Args:
        patches: rows of the table, without a class token's.
        patch: height and width of a patch.
        given: height and width of the picture, where it is not square.
        otherwise: what to do where the table is of no square picture and nothing is given, for the message.

    Raises:
        ValueError: the table is of no square picture, or of another than is given.
    """
    if given is not None:
        height, width = given
        rows, columns = height // patch[0], width // patch[1]
        if rows * columns != patches:
            raise ValueError(
                f"A picture of {height}x{width} has {rows}x{columns} patches, but the position table has {patches}."
            )
        return one_side(given)
    side = math.isqrt(patches)
    if side**2 != patches:
        raise ValueError(f"A position table of {patches} patches is not of a square picture: {otherwise}.")
    return one_side((side * patch[0], side * patch[1]))


def one_side(size: Sequence[int]) -> int | list[int]:
    """One number for a square."""
    return size[0] if size[0] == size[1] else list(size)


def shared_fields(config: PreTrainedConfig, other_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of a config that another class has too, where they have a value."""
    names = other_class().to_dict().keys() - OWN_FIELDS
    return {name: value for name, value in config.to_dict().items() if name in names and value is not None}
