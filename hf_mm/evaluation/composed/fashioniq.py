"""FashionIQ: a picture of a garment and two sentences that say how another one differs."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..embeddings import embed_texts
from .protocol import (
    answer_ranks,
    chance_recalls,
    embed_queries,
    encode_once,
    escape,
    mean_rows,
    mix,
    published_format,
    read_json,
    recalls,
    require_composing,
    require_pictures,
)
from .published import PUBLISHED

DATA = (
    "captions and splits are in https://github.com/XiaoxiaoGuo/fashion-iq, "
    "the pictures are linked in https://github.com/hongwang600/fashion-iq-metadata"
)
CATEGORIES = ("dress", "shirt", "toptee")
RECALLS = (10, 50)
SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class FashionQuery:
    """A row of ``captions/cap.{category}.{split}.json``."""

    candidate: str
    target: str
    captions: tuple[str, str]


def read_fashioniq(
    folder: str | PathLike, category: str, split: str = "val"
) -> tuple[list[FashionQuery], dict[str, Path]]:
    """Reads the published captions and gallery of one category.

    Args:
        folder: with ``captions/cap.{category}.{split}.json`` (or in ``json``, as Pic2Word's repository has it),
            ``image_splits/split.{category}.{split}.json`` and ``images/{id}.png`` or ``.jpg``.
        category: ``"dress"``, ``"shirt"`` or ``"toptee"``.
        split: with published targets: ``"val"`` or ``"train"``.

    Returns:
        The queries, and the gallery from id to file, both in the order of the files.

    Raises:
        FileNotFoundError: a file or picture is missing.
        ValueError: a file is of another format, or a query names a picture that is not in the split.
    """
    folder = Path(folder)
    name = f"cap.{category}.{split}.json"
    captions = next((path for path in (folder / "captions" / name, folder / "json" / name) if path.is_file()), None)
    captions = captions or folder / "captions" / name
    splits = folder / f"image_splits/split.{category}.{split}.json"
    with published_format(captions):
        queries = []
        for row in read_json(captions, DATA):
            first, second = row["captions"][0], row["captions"][1]
            queries.append(FashionQuery(row["candidate"], row["target"], (first, second)))
    with published_format(splits):
        gallery = {str(identity): _picture(folder / "images", str(identity)) for identity in read_json(splits, DATA)}
    if not queries:
        raise ValueError(f"{captions} holds no query.")
    for query in queries:
        if lacking := {query.candidate, query.target} - gallery.keys():
            raise ValueError(f"{captions} names {min(lacking)}, which {splits} lacks.")
    require_pictures(gallery.values(), DATA)
    return queries, gallery


def evaluate_fashioniq(
    model: nn.Module, processor: Any, folder: str | PathLike, batch_size: int = 256, progress: bool = True
) -> dict[str, Any]:
    """Asks with "a photo of * , {second caption} and {first caption}" for the target among the split of its category.

    The reference stays in the gallery, as published.

    Args:
        model, processor, batch_size, progress: see `embed_composed`.
        folder: see `read_fashioniq`; the validation split of all three categories is needed.

    Returns:
        See `hf_mm.evaluation.composed.protocol`. ``"results"`` has the groups ``"dress"``, ``"shirt"``, ``"toptee"``
        and their ``"mean"`` with ``r10`` and ``r50``. As published, ``"text_only"`` encodes the whole prompt with its
        star left as a letter, and ``"image_text"`` holds that; ``"text_only_bare"`` and ``"image_text_bare"`` are the
        same with the two captions alone. ``"queries"`` and ``"gallery"`` are counts for each category.

    Raises:
        FileNotFoundError, ValueError: see `read_fashioniq`.

    Source:
        Wu et al. 2021, arXiv 1905.12794; prompts of Saito et al. 2023, arXiv 2302.03084, and its code. That passes over
        queries whose picture does not open; here every picture must be there.
    """
    require_composing(model, processor)
    read = {category: read_fashioniq(folder, category) for category in CATEGORIES}
    paths = [path for _, pictures in read.values() for path in pictures.values()]
    features_of = encode_once(model, processor, paths, batch_size, progress)
    results, star = {}, processor.placeholder
    for category, (queries, pictures) in read.items():
        features = features_of(pictures.values())
        column = {identity: index for index, identity in enumerate(pictures)}
        references = torch.tensor([column[query.candidate] for query in queries])
        answers = torch.tensor([column[query.target] for query in queries])
        tails = [escape(processor, f"{query.captions[1]} and {query.captions[0]}") for query in queries]
        prompts = [f"a photo of {star} , {tail}" for tail in tails]
        texts = [f"a photo of {escape(processor, star)} , {tail}" for tail in tails]
        asked = embed_queries(model, processor, features[references], prompts, texts, batch_size, progress)
        asked["text_only_bare"] = embed_texts(model, processor, tails, batch_size, progress)
        asked["image_text_bare"] = mix(asked["image_only"], asked["text_only_bare"])
        gallery = nn.functional.normalize(features, dim=-1)
        results[category] = {
            method: recalls(answer_ranks(embeddings, gallery, answers), RECALLS)
            for method, embeddings in asked.items()
        }
        results[category]["chance"] = chance_recalls(len(pictures), RECALLS)
    return {
        "protocol": "fashioniq",
        "queries": {category: len(queries) for category, (queries, _) in read.items()},
        "gallery": {category: len(pictures) for category, (_, pictures) in read.items()},
        "results": {**results, "mean": mean_rows(results.values())},
        "published": PUBLISHED["fashioniq"],
    }


def _picture(folder: Path, identity: str) -> Path:
    files = [folder / f"{identity}{suffix}" for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])
