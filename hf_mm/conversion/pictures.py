"""Image processors that a published config declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from PIL import Image
from transformers.utils import logging

from .layouts import declared_by, first_line

logger = logging.get_logger(__name__)

IMAGE_PROCESSOR_FIELDS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

Processor = TypeVar("Processor")


def declared_processor(processor_class: type[Processor], settings: Mapping[str, Any], source: str) -> Processor:
    """The image processor of these settings, once it has prepared a picture: wrong ones often show only there.

    Args:
        processor_class: of the image processor.
        settings: its arguments, as a config declares them.
        source: that config, such as ``"preprocessor_config.json"``.

    Raises:
        ValueError: it cannot be made, or prepares no picture.
    """
    try:
        image_processor = processor_class(**settings)
        image_processor(Image.new("RGB", (8, 8)))
    except Exception as error:  # transformers' functions on pictures raise anything
        raise ValueError(
            f"{source} declares how pictures are prepared in a way that fails: {first_line(error)}."
        ) from error
    return image_processor


def processor_from_transformers(
    processor_class: type[Processor], configs: Mapping[str, dict[str, Any]], size: int | dict[str, int]
) -> Processor:
    """What a ``preprocessor_config.json`` or ``processor_config.json`` of transformers declares.

    Args:
        processor_class: ours.
        configs: the JSON files beside the weights.
        size: what is resized to where nothing else is declared.

    Raises:
        ValueError: the file is damaged.
    """
    file = "preprocessor_config.json" if configs.get("preprocessor_config.json") else "processor_config.json"
    with declared_by(file):
        declared = configs.get(file, {})
        declared = declared.get("image_processor", declared)
        given = {name: declared[name] for name in IMAGE_PROCESSOR_FIELDS if declared.get(name) is not None}
    return declared_processor(processor_class, {"size": size} | given, file)


def processor_to_transformers(image_processor: Any, their_class: str) -> dict[str, Any]:
    """The ``preprocessor_config.json`` of an image processor of ours; warns of a crop rule that transformers has not.

    Args:
        image_processor: ours.
        their_class: name of transformers' image processor.
    """
    settings = image_processor.to_dict()
    if settings.get("do_center_crop"):
        logger.warning(
            "transformers rounds the corner of a centre crop down, where this model's rule rounds to the nearest: pictures "
            "with an odd number of rows or columns to spare will be cut one pixel beside."
        )
    declared = {name: settings[name] for name in IMAGE_PROCESSOR_FIELDS if settings.get(name) is not None}
    return {**declared, "image_processor_type": their_class}


def how_resized(image_processor: Any, image_size: tuple[int, int]) -> tuple[str, int, str] | None:
    """How an image processor brings pictures to a model's size, where it does as the published recipes do.

    They resize with antialiasing, cut the centre or nothing, divide by 255 and normalise.

    Args:
        image_processor: ours.
        image_size: height and width of the model.

    Returns:
        ``"squash"``, or ``"shortest"`` for the shorter side; the rows that this leaves before the cut; ``"bilinear"`` or
        ``"bicubic"``. None for any other way.
    """
    settings = image_processor.to_dict()
    height, width = image_size
    whole = {"height": height, "width": width}
    size = {name: value for name, value in settings["size"].items() if value is not None}
    crop = {name: settings["crop_size"].get(name) for name in whole} if settings.get("do_center_crop") else None
    names = {resample: name for name, resample in INTERPOLATIONS.items()}
    steps = settings["do_resize"] and settings["do_rescale"] and settings["do_normalize"]
    if not steps or not settings.get("antialias", True) or settings["rescale_factor"] != 1 / 255:
        return None
    if settings["resample"] not in names:
        return None
    if size == whole and crop in (None, whole):
        return "squash", height, names[settings["resample"]]
    rows = size.get("shortest_edge", 0)
    if crop == whole and height == width and rows >= height:
        return "shortest", rows, names[settings["resample"]]
    return None
