"""Object composition: one object cut out of a picture and the names of the others ask for the whole picture."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from ..embeddings import embed_images
from .protocol import (
    LazyPictures,
    answer_ranks,
    chance_recalls,
    embed_queries,
    escape,
    published_format,
    read_json,
    recalls,
    require_composing,
    require_pictures,
    write_json,
)
from .published import PUBLISHED

DATA = "2017 val images and 2017 train/val annotations are on https://cocodataset.org/#download"
ANNOTATIONS, PICTURES = "annotations/instances_val2017.json", "val2017"
RECALLS = (1, 5, 10)
SMALLEST, LARGEST = 0.05, 0.5  # of the picture's area, bounds of the box of an object that may be asked with
PUBLISHED_SMALLEST = 0.05  # of one pixel: the published code left a factor out
PROMPTS = ("code", "paper")


@dataclass(frozen=True)
class ObjectQuery:
    """The object that is cut out of a picture, and the names of the other classes in it."""

    image_id: int
    annotation_id: int
    name: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class CocoPicture:
    """A file of ``val2017`` and its size in pixels."""

    path: Path
    width: int
    height: int


@dataclass(frozen=True)
class CocoObject:
    """An annotation: class, box in pixels, and mask (see `decode_mask`)."""

    id: int
    image_id: int
    name: str
    segmentation: Any
    left: float
    top: float
    width: float
    height: float


class CocoInstances:
    """``instances_val2017.json``: `pictures` and `objects` by their ids.

    Args:
        folder: with ``annotations/instances_val2017.json`` and ``val2017``.

    Raises:
        FileNotFoundError: the annotations are missing.
        ValueError: they are of another format.
    """

    def __init__(self, folder: str | PathLike):
        folder = Path(folder)
        self.annotations = folder / ANNOTATIONS
        content = read_json(self.annotations, DATA)
        with published_format(self.annotations):
            self.pictures = {
                row["id"]: CocoPicture(folder / PICTURES / row["file_name"], row["width"], row["height"])
                for row in content["images"]
            }
            names = {row["id"]: row["name"] for row in content["categories"]}
            self.objects = {
                row["id"]: CocoObject(
                    row["id"], row["image_id"], names[row["category_id"]], row["segmentation"], *row["bbox"]
                )
                for row in content["annotations"]
            }
        if lacking := {one.image_id for one in self.objects.values()} - self.pictures.keys():
            raise ValueError(f"{self.annotations} has objects of picture {min(lacking)}, but not the picture.")

    def draw(self, seed: int = 0, published_area: bool = False) -> list[ObjectQuery]:
        """Draws one object of each picture that has one of the right size; the same seed draws the same.

        The area of the object's box must be more than 0.05 and less than 0.5 of the picture's.

        Args:
            seed: of the draw; what a picture gets depends on it and the picture alone.
            published_area: the lower bound of the published code, 0.05 of one pixel.

        Returns:
            Queries by the picture's id.
        """
        by_picture = defaultdict(list)
        for _, one in sorted(self.objects.items()):
            by_picture[one.image_id].append(one)
        queries = []
        for image_id, own in sorted(by_picture.items()):
            area = self.pictures[image_id].width * self.pictures[image_id].height
            smallest = PUBLISHED_SMALLEST if published_area else SMALLEST * area
            fitting = [one for one in own if smallest < one.width * one.height < LARGEST * area]
            if fitting:
                drawn = Random(f"{seed} {image_id}").choice(fitting)
                others = dict.fromkeys(one.name for one in own if one.name != drawn.name)
                queries.append(ObjectQuery(image_id, drawn.id, drawn.name, tuple(others)))
        return queries

    def cut_out(self, query: ObjectQuery, size: tuple[int, int]) -> Image.Image:
        """The object on white, its box stretched to a size.

        Args:
            query: the object.
            size: (height, width) in pixels.

        Returns:
            An RGB picture of that size, bicubic. The box is cut at whole pixels, rounded down.

        Raises:
            ValueError: the file is not as large as the annotations say, or the mask is in a form that needs
                pycocotools.
        """
        one, picture = self.objects[query.annotation_id], self.pictures[query.image_id]
        with Image.open(picture.path) as opened:
            pixels = opened.convert("RGB")
        if pixels.size != (picture.width, picture.height):
            raise ValueError(
                f"{picture.path} is {pixels.width}x{pixels.height}, not {picture.width}x{picture.height} as annotated."
            )
        mask = Image.fromarray(decode_mask(one.segmentation, picture.height, picture.width) * np.uint8(255))
        left, top, right, bottom = int(one.left), int(one.top), int(one.left + one.width), int(one.top + one.height)
        box = (left, top, max(right, left + 1), max(bottom, top + 1))
        on_white = Image.composite(pixels, Image.new("RGB", pixels.size, "white"), mask)
        return on_white.crop(box).resize((size[1], size[0]), Image.Resampling.BICUBIC)


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A COCO segmentation as mask.

    Args:
        segmentation: polygons ``[[x, y, x, y, …], …]``, or run lengths ``{"size", "counts"}``, counts being a list or
            a compressed string.
        height, width: of the picture.

    Returns:
        ``(height, width)`` uint8, 1 inside. With pycocotools installed it decodes; otherwise PIL fills the polygons,
        which may differ in pixels along the edge.

    Raises:
        ValueError: run lengths do not fill the picture; or they are compressed and pycocotools is not installed.
    """
    if has_pycocotools():
        from pycocotools import mask as coco_mask

        runs = segmentation
        if isinstance(segmentation, list):
            runs = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            runs = coco_mask.frPyObjects(segmentation, height, width)
        return coco_mask.decode(runs)
    if isinstance(segmentation, list):
        filled = Image.new("L", (width, height))
        for polygon in segmentation:
            ImageDraw.Draw(filled).polygon(list(polygon), fill=1)
        return np.asarray(filled)
    counts = segmentation["counts"]
    if not isinstance(counts, list):
        raise ValueError("the mask is compressed run lengths: pip install pycocotools to decode it.")
    if sum(counts) != height * width:
        raise ValueError(f"the mask's run lengths fill {sum(counts)} pixels, but the picture is {width}x{height}.")
    values = np.arange(len(counts), dtype=np.uint8) % 2  # runs go down the columns, outside first
    return np.repeat(values, counts).reshape(width, height).T


def has_pycocotools() -> bool:
    return importlib.util.find_spec("pycocotools") is not None


def evaluate_object_composition(
    model: nn.Module,
    processor: Any,
    folder: str | PathLike,
    queries: str | PathLike | None = None,
    seed: int = 0,
    published_area: bool = False,
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, Any]:
    """Asks with an object on white and the names of what else is in its picture for the whole picture.

    The gallery is the pictures that a query is drawn from. The object is stretched to the model's size with nothing
    cropped. Two prompts are reported, since paper and code differ: ``"code"``, "a photo of * and {class of the object}
    and {other} and …", and ``"paper"``, "a photo of * , {other} and …", which does not name the object. The words
    alone are "a photo of {class of the object} and {other} and …" and "a photo of {other} and …".

    Args:
        model, processor, batch_size, progress: see `embed_composed`.
        folder: see `CocoInstances`.
        queries: JSON file with the objects drawn: read if it is there, else written, so that the next model is asked
            the same.
        seed, published_area: see `CocoInstances.draw`.

    Returns:
        See `hf_mm.evaluation.composed.protocol`. ``"results"`` has the groups of `PROMPTS` with ``r1``, ``r5``,
        ``r10`` from query to picture, and ``back_r1``, … from picture to query. ``"queries"`` is the count, as large as
        the gallery; ``"masks"`` says what decoded the masks.

    Raises:
        FileNotFoundError: annotations or pictures are missing.
        ValueError: see `CocoInstances`, `decode_mask`; no object has the right size; or the file of queries was drawn
            otherwise or does not fit the annotations.

    Source:
        Saito et al. 2023, arXiv 2302.03084, and ``prepare_data.py`` of its code, which draws without a seed, so that its
        own queries cannot be had.
    """
    require_composing(model, processor)
    coco = CocoInstances(folder)
    drawn = stored_queries(coco, queries, seed, published_area)
    if not drawn:
        raise ValueError(f"no object in {coco.annotations} has the right size to be asked with.")
    paths = [coco.pictures[query.image_id].path for query in drawn]
    require_pictures(paths, DATA)
    size = input_size(processor)
    objects = LazyPictures(drawn, lambda query: coco.cut_out(query, size))
    features = embed_images(model, processor, objects, batch_size, progress, normalize=False)
    gallery = embed_images(model, processor, LazyPictures(paths), batch_size, progress)
    answers = torch.arange(len(drawn))
    results = {}
    for form in PROMPTS:
        prompts, texts = zip(*(_sentences(processor, query, form) for query in drawn), strict=True)
        asked = embed_queries(model, processor, features, prompts, texts, batch_size, progress)
        results[form] = {
            method: recalls(answer_ranks(embeddings, gallery, answers), RECALLS)
            | recalls(answer_ranks(gallery, embeddings, answers), RECALLS, "back_r")
            for method, embeddings in asked.items()
        }
        results[form]["chance"] = chance_recalls(len(drawn), RECALLS) | chance_recalls(len(drawn), RECALLS, "back_r")
    return {
        "protocol": "object-composition",
        "queries": len(drawn),
        "seed": seed,
        "published_area": published_area,
        "masks": "pycocotools" if has_pycocotools() else "PIL",
        "results": results,
        "published": PUBLISHED["object-composition"],
    }


def stored_queries(
    coco: CocoInstances, file: str | PathLike | None, seed: int = 0, published_area: bool = False
) -> list[ObjectQuery]:
    """Reads the queries from a file or, where there is none yet, draws and writes them; see `CocoInstances.draw`."""
    drawn_with = {"seed": seed, "published_area": published_area}
    if file is None or not Path(file).exists():
        drawn = coco.draw(**drawn_with)
        if file is not None:
            write_json(Path(file), {**drawn_with, "queries": [asdict(query) for query in drawn]})
        return drawn
    content = read_json(Path(file), "leave the file out to draw anew")
    with published_format(Path(file)):
        theirs = {name: content[name] for name in drawn_with}
        queries = [ObjectQuery(**{**row, "others": tuple(row["others"])}) for row in content["queries"]]
    if theirs != drawn_with:
        raise ValueError(f"{file} was drawn with {theirs}, not with {drawn_with}: pass these or another file.")
    for query in queries:
        one = coco.objects.get(query.annotation_id)
        if one is None or one.image_id != query.image_id:
            raise ValueError(f"{file} has object {query.annotation_id} of picture {query.image_id}, which COCO lacks.")
    return queries


def input_size(processor: Any) -> tuple[int, int]:
    """(height, width) of what the model sees: what the processor makes of any picture."""
    pixel_values = processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
    return tuple(pixel_values.shape[-2:])


def _sentences(processor: Any, query: ObjectQuery, form: str) -> tuple[str, str]:
    """Prompt and words alone; without other classes the tail is left away."""
    star, others = processor.placeholder, [escape(processor, name) for name in query.others]
    named = [escape(processor, query.name), *others]
    if form == "code":
        return f"a photo of {' and '.join([star, *named])}", f"a photo of {' and '.join(named)}"
    tail = " and ".join(others)
    return (f"a photo of {star} , {tail}", f"a photo of {tail}") if others else (f"a photo of {star}", "a photo of")
