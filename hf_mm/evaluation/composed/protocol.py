"""What the protocols share: reading a local copy, each picture encoded once, four ways to ask, honest ranks.

A protocol returns a dict ready for JSON. Under ``"results"`` it has for each group (domain, prompt, category or split)
a row for each of `METHODS` and ``"chance"``, in percent; ``"published"`` has the lines of `PUBLISHED` as they stand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from ... import files
from ...image_utils import to_rgb
from ..embeddings import embed_composed, embed_images, embed_texts
from ..metrics import BROKEN, TIE, chance_recall_at_k, label_ranks, recall_at_k

METHODS = {
    "composed": "the sentence with the picture as a word",
    "image_only": "the picture alone",
    "text_only": "the words alone",
    "image_text": "mean of picture and words",
}
CHUNK = 256  # queries whose similarities to the whole gallery are in memory at a time
LAST = -2.0  # below every cosine


class LazyPictures(Sequence):
    """Opens a picture when its turn comes, so that one batch is in memory at a time."""

    def __init__(self, items: Sequence[Any], open_picture: Callable[[Any], Any] = to_rgb):
        self.items, self.open_picture = items, open_picture

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.open_picture(self.items[index])


def require_composing(model: nn.Module, processor: Any) -> None:
    """Raises a sentence where the model or the processor cannot put a picture into a sentence."""
    for part, needed in ((model, "get_composed_features"), (processor, "placeholder")):
        if not hasattr(part, needed):
            raise ValueError(
                f"{type(part).__name__} cannot put a picture into a sentence: pass a Pic2Word model and its processor."
            )


def embed_queries(
    model: nn.Module,
    processor: Any,
    features: torch.Tensor,
    prompts: Sequence[str],
    texts: Sequence[str],
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """The queries of all `METHODS` from one encoding of the pictures.

    Args:
        model, processor, batch_size, progress: see `embed_composed`.
        features: ``(q, D)``, not of unit length, of the pictures that are asked with.
        prompts: q sentences with the placeholder.
        texts: q sentences without.

    Returns:
        For each method ``(q, D)`` of unit length. ``"image_text"`` is the sum of the two unit vectors, normalised.
    """
    image = nn.functional.normalize(features, dim=-1)
    text = embed_texts(model, processor, texts, batch_size, progress)
    return {
        "composed": embed_composed(model, processor, None, prompts, batch_size, progress, vision_features=features),
        "image_only": image,
        "text_only": text,
        "image_text": mix(image, text),
    }


def mix(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """``(q, D)``: the direction between two unit vectors."""
    return nn.functional.normalize(image + text, dim=-1)


def encode_once(
    model: nn.Module, processor: Any, paths: Iterable[Path], batch_size: int = 256, progress: bool = True
) -> Callable[[Iterable[Path]], torch.Tensor]:
    """Encodes each of the pictures once.

    Returns:
        A function from paths to their features ``(n, D)``, not of unit length.
    """
    unique = list(dict.fromkeys(paths))
    row = {path: index for index, path in enumerate(unique)}
    features = embed_images(model, processor, LazyPictures(unique), batch_size, progress, normalize=False)
    return lambda wanted: features[[row[path] for path in wanted]]


def chunks(count: int) -> Iterator[torch.Tensor]:
    """The numbers from 0 to count - 1, `CHUNK` of them at a time."""
    return iter(torch.arange(count).split(CHUNK))


def answer_ranks(
    queries: torch.Tensor, gallery: torch.Tensor, answers: torch.Tensor, removed: torch.Tensor | None = None
) -> torch.Tensor:
    """Rank of each query's one right picture, 1 for the first place; ties count against the model.

    Args:
        queries: ``(q, D)`` of unit length.
        gallery: ``(g, D)`` of unit length.
        answers: ``(q,)``, rows of the gallery.
        removed: ``(q,)``, the row that is taken out of each query's ranking, if any.

    Returns:
        ``(q,)`` integers.
    """
    ranks = []
    for rows in chunks(len(queries)):
        cosines = similarities(queries[rows], gallery, None if removed is None else removed[rows])
        ranks.append(label_ranks(cosines, answers[rows]))
    return torch.cat(ranks)


def similarities(queries: torch.Tensor, gallery: torch.Tensor, removed: torch.Tensor | None = None) -> torch.Tensor:
    """``(q, g)`` cosines; the `removed` row ``(q,)`` of the gallery is below all others."""
    cosines = queries @ gallery.T
    if not cosines.sum().isfinite():
        raise ValueError(BROKEN)
    if removed is not None:
        cosines[torch.arange(len(cosines)), removed] = LAST
    return cosines


def cumulative_hits(similarity: torch.Tensor, positives: torch.Tensor, k: int) -> torch.Tensor:
    """Right pictures among the first 1, 2, … k; ties count against the model, as in `retrieval_ranks`.

    Args:
        similarity: ``(q, g)`` cosines.
        positives: ``(q, g)`` bool, right pictures, any number to a query.
        k: length of the list; a smaller gallery fills it with wrong answers.

    Returns:
        ``(q, k)`` integers.
    """
    behind_ties = (similarity - TIE).nextafter(torch.tensor(-torch.inf))
    order = torch.where(positives, behind_ties, similarity).topk(min(k, similarity.shape[1])).indices
    hits = positives.gather(1, order).long().cumsum(dim=1)
    return nn.functional.pad(hits, (0, k - hits.shape[1]), mode="replicate") if hits.shape[1] < k else hits


def recalls(ranks: torch.Tensor, ks: Iterable[int], prefix: str = "r") -> dict[str, float]:
    """``{prefix}{k}``: the percentage of ranks up to k."""
    return {f"{prefix}{k}": recall_at_k(ranks, k) for k in ks}


def chance_recalls(gallery: int, ks: Iterable[int], prefix: str = "r") -> dict[str, float]:
    """What a random order of the gallery scores where each query has one right answer."""
    return {f"{prefix}{k}": chance_recall_at_k(torch.ones(1, dtype=torch.long), gallery, k) for k in ks}


def mean_rows(groups: Iterable[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """The mean over groups of each row's metrics."""
    groups = list(groups)
    return {
        row: {name: sum(group[row][name] for group in groups) / len(groups) for name in metrics}
        for row, metrics in groups[0].items()
    }


def escape(processor: Any, text: str) -> str:
    """The text with literal placeholders marked as such, so that no picture is asked for."""
    return text.replace(processor.placeholder, f"\\{processor.placeholder}")


def read_json(path: Path, published: str) -> Any:
    """Reads a file of the user's copy.

    Raises:
        FileNotFoundError: it is not there; the sentence says where the data is `published`.
        ValueError: it is no JSON.
    """
    require_file(path, published)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file ({error}): get it again, {published}.") from error


def require_file(path: Path, published: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {published}.")


def require_pictures(paths: Iterable[Path], published: str) -> None:
    """Raises `FileNotFoundError` that counts the missing pictures, names one and says where they are published."""
    paths = list(dict.fromkeys(paths))
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} pictures are missing, such as {missing[0]}: {published}."
        )


@contextmanager
def published_format(path: Path) -> Iterator[None]:
    """Turns what goes wrong when a file has other fields than the published one into a sentence."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not of the published format ({type(error).__name__}: {error}).") from error


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """See `hf_mm.files.write_json`: once for all processes, in a folder that is made if need be."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, content, indent)
