"""Domain conversion: a photo and the name of a style ask for pictures of the same class in that style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .protocol import (
    chunks,
    cumulative_hits,
    embed_queries,
    encode_once,
    mean_rows,
    require_composing,
    require_pictures,
    similarities,
)
from .published import PUBLISHED

DATA = (
    "ImageNet-R is linked in https://github.com/hendrycks/imagenet-r, the validation pictures of ImageNet come from "
    "https://image-net.org, the lists are data/imgnet of https://github.com/google-research/composed_image_retrieval"
)
DOMAINS = ("cartoon", "origami", "toy", "sculpture")
REAL = 6  # the number of the domain of photos in the published lists
QUERY_LIST, TARGET_LIST = "imgnet_real_query.txt", "imgnet_targets.txt"
RENDITIONS, PHOTOS = "imagenet-r", "real"
PICTURES = (".jpg", ".jpeg", ".png")
RECALLS = (10, 50)


@dataclass(frozen=True)
class LabelledPicture:
    """A picture with its class and domain, a place in `DOMAINS` or `REAL`."""

    path: Path
    label: int
    domain: int


def read_domain_conversion(folder: str | PathLike) -> tuple[list[LabelledPicture], list[LabelledPicture], str]:
    """Reads the lists of the published repository where they are in the folder, else the folders themselves.

    Lists have a path and a label to a line, label = class + 1000 · domain. Paths begin at the folder or above it.
    Without lists, gallery and queries are read from ``imagenet-r/{class}/{domain}_{n}.jpg``, the layout of ImageNet-R,
    and ``real/{class}/*.JPEG``, the ImageNet validation pictures (a link to them will do): photos of the classes that
    ImageNet-R has are queries and distractors.

    Returns:
        Queries, gallery, and ``"lists"`` or ``"folders"``.

    Raises:
        FileNotFoundError: a list, folder or picture is missing.
        ValueError: a line is not of the published format, or there is no query or no rendition.
    """
    folder = Path(folder)
    if (folder / QUERY_LIST).is_file() and (folder / TARGET_LIST).is_file():
        queries, gallery, source = *(_read_list(folder / name) for name in (QUERY_LIST, TARGET_LIST)), "lists"
        require_pictures([picture.path for picture in queries + gallery], DATA)
    else:
        queries, gallery, source = *_read_folders(folder), "folders"
    if not queries or all(picture.domain == REAL for picture in gallery):
        raise ValueError(f"{folder} holds {len(queries)} queries and no pictures in other domains: {DATA}.")
    return queries, gallery, source


def _read_list(path: Path) -> list[LabelledPicture]:
    known = {*range(len(DOMAINS)), REAL}
    pictures = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        file, _, label = line.strip().rpartition(" ")
        if not file or not label.isdecimal() or int(label) // 1000 not in known:
            raise ValueError(f"line {number} of {path} is {line!r}: it must be a path and class + 1000 · domain.")
        domain, label = divmod(int(label), 1000)
        pictures.append(LabelledPicture(Path(file), label, domain))
    if path.name == QUERY_LIST:  # its labels are classes alone
        pictures = [LabelledPicture(picture.path, picture.label, REAL) for picture in pictures]
    roots = (path.parent, path.parent.parent)
    root = next((root for root in roots if pictures and (root / pictures[0].path).is_file()), roots[1])
    return [LabelledPicture(root / picture.path, picture.label, picture.domain) for picture in pictures]


def _read_folders(folder: Path) -> tuple[list[LabelledPicture], list[LabelledPicture]]:
    for name in (RENDITIONS, PHOTOS):
        if not (folder / name).is_dir():
            raise FileNotFoundError(
                f"{folder / name} is missing, and so is {QUERY_LIST} or {TARGET_LIST}: one or the other is needed; {DATA}."
            )
    classes = sorted(path.name for path in (folder / RENDITIONS).iterdir() if path.is_dir())
    renditions, photos = [], []
    for label, name in enumerate(classes):
        for path in _pictures(folder / RENDITIONS / name):
            domain = path.name.partition("_")[0]
            if domain in DOMAINS:
                renditions.append(LabelledPicture(path, label, DOMAINS.index(domain)))
        photos += [LabelledPicture(path, label, REAL) for path in _pictures(folder / PHOTOS / name)]
    return photos, renditions + photos


def _pictures(folder: Path) -> list[Path]:
    files = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in files if path.suffix.lower() in PICTURES)


def evaluate_domain_conversion(
    model: nn.Module, processor: Any, folder: str | PathLike, batch_size: int = 256, progress: bool = True
) -> dict[str, Any]:
    """Asks with "a {domain} of *" for the pictures of the query's class in the domain, among all domains and photos.

    The words alone are the prompt without the star. Photos that are queries are in the gallery too, as published.

    Args:
        model, processor, batch_size, progress: see `embed_composed`.
        folder: see `read_domain_conversion`.

    Returns:
        See `hf_mm.evaluation.composed.protocol`. ``"results"`` has a group for each of `DOMAINS` and their ``"mean"``:
        ``r10`` and ``r50``, the share of a query's right pictures that are found, and ``p10`` and ``p50``, the share
        of the list that is right. As published these are means over all queries, and one whose class has no picture in
        the domain scores 0: ``"answerable"`` is the percentage that has one, by domain. ``"source"`` says what was
        read, ``"queries"`` and ``"gallery"`` are counts.

    Raises:
        FileNotFoundError, ValueError: see `read_domain_conversion`.

    Source:
        Saito et al. 2023, arXiv 2302.03084, section 4.2.
    """
    require_composing(model, processor)
    queries, pictures, source = read_domain_conversion(folder)
    features_of = encode_once(model, processor, [picture.path for picture in pictures + queries], batch_size, progress)
    features = features_of(picture.path for picture in queries)
    gallery = nn.functional.normalize(features_of(picture.path for picture in pictures), dim=-1)
    asked_classes = torch.tensor([picture.label for picture in queries])
    classes = torch.tensor([picture.label for picture in pictures])
    domains = torch.tensor([picture.domain for picture in pictures])
    results, answerable = {}, {}
    for number, domain in enumerate(DOMAINS):
        prompts = [f"a {domain} of {processor.placeholder}"] * len(queries)
        texts = [f"a {domain} of"] * len(queries)
        asked = embed_queries(model, processor, features, prompts, texts, batch_size, progress)
        right = torch.where(domains == number, classes, -1)
        results[domain] = {
            method: domain_metrics(embeddings, gallery, asked_classes, right) for method, embeddings in asked.items()
        }
        counts = right_pictures(asked_classes, right)
        answerable[domain] = 100 * (counts > 0).double().mean().item()
        results[domain]["chance"] = {
            f"r{k}": answerable[domain] * min(k, len(pictures)) / len(pictures) for k in RECALLS
        } | {f"p{k}": 100 * counts.double().mean().item() * min(k, len(pictures)) / len(pictures) / k for k in RECALLS}
    return {
        "protocol": "domain-conversion",
        "source": source,
        "queries": len(queries),
        "gallery": len(pictures),
        "answerable": answerable,
        "results": {**results, "mean": mean_rows(results.values())},
        "published": PUBLISHED["domain-conversion"],
    }


def domain_metrics(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    asked_classes: torch.Tensor,
    classes: torch.Tensor,
    ks: Sequence[int] = RECALLS,
) -> dict[str, float]:
    """Recall and precision at k, means over queries in percent; ties count against the model.

    Args:
        queries: ``(q, D)`` of unit length.
        gallery: ``(g, D)`` of unit length.
        asked_classes: ``(q,)``.
        classes: ``(g,)``, -1 for what is never right.
        ks: lengths of the list.

    Returns:
        ``r{k}``: right pictures in the list / all right pictures, 0 for a query without any; ``p{k}``: right pictures
        in the list / k.
    """
    hits = []
    for rows in chunks(len(queries)):
        positives = asked_classes[rows, None] == classes
        hits.append(cumulative_hits(similarities(queries[rows], gallery), positives, max(ks)))
    hits, counts = torch.cat(hits).double(), right_pictures(asked_classes, classes).clamp(min=1)
    return {f"r{k}": 100 * (hits[:, k - 1] / counts).mean().item() for k in ks} | {
        f"p{k}": 100 * (hits[:, k - 1] / k).mean().item() for k in ks
    }


def right_pictures(asked_classes: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """``(q,)``: how many of the classes ``(g,)`` are the one asked for."""
    sizes = torch.bincount(classes[classes >= 0], minlength=int(asked_classes.max()) + 1)
    return sizes[asked_classes]
