"""CIRR (rc2): a real picture and a sentence that says what is different ask for one other picture."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..metrics import label_ranks
from .protocol import (
    METHODS,
    answer_ranks,
    chance_recalls,
    chunks,
    embed_queries,
    encode_once,
    escape,
    published_format,
    read_json,
    recalls,
    require_composing,
    require_pictures,
    similarities,
    write_json,
)
from .published import PUBLISHED

DATA = (
    "annotations are the branch cirr_dataset of https://github.com/Cuberick-Orion/CIRR, "
    "pictures come with NLVR2, https://lil.nlp.cornell.edu/nlvr"
)
SPLITS = ("val", "test1")
RECALLS = (1, 5, 10, 50)
SUBSET_RECALLS = (1, 2, 3)
VERSION = "rc2"


@dataclass(frozen=True)
class CirrQuery:
    """A row of ``captions/cap.rc2.{split}.json``; `target` is None in the test split."""

    pair_id: str
    reference: str
    caption: str
    target: str | None
    members: tuple[str, ...]


def read_cirr(folder: str | PathLike, split: str = "val") -> tuple[list[CirrQuery], dict[str, Path]]:
    """Reads the published annotations.

    Args:
        folder: with ``captions/cap.rc2.{split}.json``, ``image_splits/split.rc2.{split}.json``, and the pictures below
            it or below ``img_raw``.
        split: ``"val"`` or ``"test1"``.

    Returns:
        The queries, and the gallery from name to file, both in the order of the files.

    Raises:
        FileNotFoundError: a file or picture is missing.
        ValueError: the split is unknown, a file is of another format, or a query names a picture that is not in the
            split.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: it must be one of {', '.join(SPLITS)}.")
    folder = Path(folder)
    captions = folder / f"captions/cap.{VERSION}.{split}.json"
    splits = folder / f"image_splits/split.{VERSION}.{split}.json"
    with published_format(splits):
        files = dict(read_json(splits, DATA).items())
        if not files:
            raise ValueError(f"{splits} names no picture.")
        roots = (folder / "img_raw", folder)
        root = next((root for root in roots if (root / next(iter(files.values()))).is_file()), roots[0])
        gallery = {name: root / file for name, file in files.items()}
    with published_format(captions):
        queries = [
            CirrQuery(
                pair_id=str(row["pairid"]),
                reference=row["reference"],
                caption=row["caption"],
                target=row["target_hard"] if split == "val" else None,
                members=tuple(row["img_set"]["members"]),
            )
            for row in read_json(captions, DATA)
        ]
    if not queries:
        raise ValueError(f"{captions} holds no query.")
    for query in queries:
        named = {query.reference, *query.members, *([query.target] if query.target else [])}
        if lacking := named - gallery.keys():
            raise ValueError(f"pair {query.pair_id} of {captions} names {min(lacking)}, which {splits} lacks.")
        if query.target is not None and query.target not in set(query.members) - {query.reference}:
            raise ValueError(f"the target of pair {query.pair_id} in {captions} is no other member of its img_set.")
    require_pictures(gallery.values(), DATA)
    return queries, gallery


def evaluate_cirr(
    model: nn.Module,
    processor: Any,
    folder: str | PathLike,
    split: str = "val",
    submission: str | PathLike | None = None,
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, Any]:
    """Asks with "a photo of * , {caption}" for the target among all pictures of the split but the reference.

    The words alone are the caption. The reference leaves the ranking by its name. In the subset metrics the gallery is
    the other members of the query's set of six.

    Args:
        model, processor, batch_size, progress: see `embed_composed`.
        folder: see `read_cirr`.
        split: ``"val"``, or ``"test1"``, whose answers only the evaluation server knows.
        submission: JSON file to write for the server: the best 50 names of each query. Beside ``name.json`` go
            ``name.subset.json`` with the best 3 of the set, and ``name.{method}.json``, ``name.{method}.subset.json``
            of each baseline. Needed for ``"test1"``.

    Returns:
        See `hf_mm.evaluation.composed.protocol`. ``"results"`` has the group ``"val"`` with ``r1``, ``r5``, ``r10``,
        ``r50``, ``subset_r1``, ``subset_r2``, ``subset_r3``, and nothing for ``"test1"``; ``"submissions"`` are the
        files written; ``"queries"`` and ``"gallery"`` are counts.

    Raises:
        FileNotFoundError, ValueError: see `read_cirr`; or ``"test1"`` without a submission.

    Source:
        Liu et al. 2021, arXiv 2108.04024, and the repository's ``Test-split_server.md``; prompts of Saito et al. 2023,
        arXiv 2302.03084. Their code compares whole paths with names in validation and so removes no reference; here it
        is removed in both splits.
    """
    require_composing(model, processor)
    if split == "test1" and submission is None:
        raise ValueError("the answers of test1 are not published: pass submission, a file for the evaluation server.")
    queries, pictures = read_cirr(folder, split)
    names = list(pictures)
    column = {name: index for index, name in enumerate(names)}
    features = encode_once(model, processor, pictures.values(), batch_size, progress)(pictures.values())
    references = torch.tensor([column[query.reference] for query in queries])
    captions = [escape(processor, query.caption) for query in queries]
    prompts = [f"a photo of {processor.placeholder} , {caption}" for caption in captions]
    asked = embed_queries(model, processor, features[references], prompts, captions, batch_size, progress)
    gallery = nn.functional.normalize(features, dim=-1)
    others = [torch.tensor([column[name] for name in query.members if name != query.reference]) for query in queries]

    results, files = {}, []
    if split == "val":
        answers = torch.tensor([column[query.target] for query in queries])
        results["val"] = {
            method: {
                **recalls(answer_ranks(embeddings, gallery, answers, removed=references), RECALLS),
                **recalls(subset_ranks(embeddings, gallery, answers, others), SUBSET_RECALLS, "subset_r"),
            }
            for method, embeddings in asked.items()
        }
        results["val"]["chance"] = chance_recalls(len(names) - 1, RECALLS) | {
            f"subset_r{k}": 100 * sum(min(k, len(own)) / len(own) for own in others) / len(others)
            for k in SUBSET_RECALLS
        }
    if submission is not None:
        ids = [query.pair_id for query in queries]
        for method, embeddings in asked.items():
            for metric, lists in (
                ("recall", best_names(embeddings, gallery, names, references)),
                ("recall_subset", best_members(embeddings, gallery, names, others)),
            ):
                file = submission_file(Path(submission), method, metric)
                write_json(
                    file, {"version": VERSION, "metric": metric, **dict(zip(ids, lists, strict=True))}, indent=None
                )
                files.append(str(file))
    return {
        "protocol": "cirr",
        "split": split,
        "queries": len(queries),
        "gallery": len(names),
        "results": results,
        "submissions": files,
        "published": PUBLISHED["cirr"],
    }


def subset_ranks(
    queries: torch.Tensor, gallery: torch.Tensor, answers: torch.Tensor, others: list[torch.Tensor]
) -> torch.Tensor:
    """``(q,)``: rank of the right row of the gallery among `others`, the rows of each query's own set."""
    ranks = [
        label_ranks((gallery[own] @ query)[None], (own == answer).int().argmax()[None])
        for query, answer, own in zip(queries, answers, others, strict=True)
    ]
    return torch.cat(ranks)


def best_names(
    queries: torch.Tensor, gallery: torch.Tensor, names: list[str], references: torch.Tensor, k: int = 50
) -> list[list[str]]:
    """The names of each query's k most similar pictures, best first, without its reference."""
    k = min(k, len(names) - 1)
    return [
        [names[column] for column in best]
        for rows in chunks(len(queries))
        for best in similarities(queries[rows], gallery, references[rows]).topk(k).indices.tolist()
    ]


def best_members(
    queries: torch.Tensor, gallery: torch.Tensor, names: list[str], others: list[torch.Tensor], k: int = 3
) -> list[list[str]]:
    """The names of the k most similar pictures of each query's own set, best first."""
    return [
        [names[column] for column in own[similarities(query[None], gallery[own])[0].topk(min(k, len(own))).indices]]
        for query, own in zip(queries, others, strict=True)
    ]


def submission_file(submission: Path, method: str, metric: str) -> Path:
    """``name.json``, ``name.subset.json``, ``name.image_only.json``, …"""
    parts = [submission.stem] + ([method] if method != next(iter(METHODS)) else [])
    return submission.with_name(".".join(parts + (["subset"] if metric == "recall_subset" else [])) + ".json")
