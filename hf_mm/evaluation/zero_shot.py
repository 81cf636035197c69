"""Classifying pictures by the names of the classes alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from .embeddings import embed_images, embed_texts
from .metrics import accuracies, label_ranks, majority_share, recall_at_k


def build_classifier(
    model: nn.Module,
    processor: Any,
    class_texts: Sequence[Sequence[str]],
    batch_size: int = 256,
    progress: bool = True,
) -> torch.Tensor:
    """One direction per class: the mean of its texts' unit embeddings, made unit length again.

    Args:
        model, processor, batch_size, progress: see `embed_texts`.
        class_texts: C lists of texts.

    Returns:
        ``(C, D)`` float32 on the CPU; the cosine with a picture's embedding is the score of the class.

    Raises:
        ValueError: a class has no text.
        TypeError: the texts of a class are one string.

    Source:
        Radford et al. 2021, section 3.1.4.
    """
    for index, texts in enumerate(class_texts):
        if isinstance(texts, str):
            raise TypeError(f"the texts of class {index} are one string: pass a list of strings.")
        if len(texts) == 0:
            raise ValueError(f"class {index} has no text: give it at least one.")
    labels = [index for index, texts in enumerate(class_texts) for _ in texts]
    embeddings = embed_texts(model, processor, [text for texts in class_texts for text in texts], batch_size, progress)
    return class_means(embeddings, torch.tensor(labels), len(class_texts))


def class_means(embeddings: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """``(C, D)``: the unit-length mean of the rows ``(n, D)`` of each class ``(n,)``."""
    sums = torch.zeros(num_classes, embeddings.shape[1]).index_add_(0, labels, embeddings)
    return nn.functional.normalize(sums, dim=-1)


def fill_templates(class_names: Sequence[str | Sequence[str]], templates: Sequence[str]) -> list[list[str]]:
    """The texts of each class: every name of it in every template, at the ``{}``.

    Raises:
        ValueError: a template has no ``{}``, or there are no templates.
        TypeError: `templates` is one string.
    """
    if isinstance(templates, str):
        raise TypeError("templates is one string: pass a list of strings.")
    if not templates:
        raise ValueError("there are no templates: pass ['{}'] for the bare names.")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}} where the class name goes.")
    names = [[own] if isinstance(own, str) else own for own in class_names]
    return [[template.replace("{}", name) for name in own for template in templates] for own in names]


def evaluate_zero_shot(
    model: nn.Module,
    processor: Any,
    images: Sequence[Any],
    labels: Sequence[int],
    class_names: Sequence[str | Sequence[str]],
    templates: Sequence[str] = ("a photo of a {}.",),
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, float]:
    """Zero-shot classification: each picture goes to the class whose texts are nearest.

    Args:
        model, processor, batch_size, progress: see `embed_images`.
        images: n pictures.
        labels: n class ids, 0 to C - 1.
        class_names: C names, or lists of names.
        templates: sentences with ``{}`` for a name; a class is the mean over all its sentences.

    Returns:
        See `classification_metrics`.

    Raises:
        ValueError: lengths differ, a label is out of range, or a template has no ``{}``.
    """
    labels = _check_labels(labels, len(images), len(class_names))
    classifier = build_classifier(model, processor, fill_templates(class_names, templates), batch_size, progress)
    return classification_metrics(embed_images(model, processor, images, batch_size, progress) @ classifier.T, labels)


def classification_metrics(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """What class scores are worth, beside chance and the most frequent class.

    Ties count against the model, see `label_ranks`.

    Args:
        scores: ``(n, C)`` cosines.
        labels: ``(n,)`` class ids.

    Returns:
        Percentages ``top1``, ``top5``, ``balanced_accuracy`` (recall of each class among the labels, averaged),
        ``chance_top1``, ``chance_top5``, ``majority`` (always the most frequent class among the labels), and the
        counts ``images`` and ``classes``.
    """
    num_classes = scores.shape[1]
    ranks = label_ranks(scores, labels)
    first, *second = scores.topk(min(2, num_classes)).indices.unbind(dim=1)
    best_wrong = torch.where(first == labels, second[0], first) if second else first
    hits = accuracies(torch.where(ranks == 1, labels, best_wrong).numpy(), labels.numpy())
    return {
        "images": len(labels),
        "classes": num_classes,
        "top1": hits["accuracy"],
        "top5": recall_at_k(ranks, 5),
        "balanced_accuracy": hits["balanced_accuracy"],
        "chance_top1": 100 / num_classes,
        "chance_top5": 100 * min(5, num_classes) / num_classes,
        "majority": 100 * majority_share(labels.numpy()),
    }


def save_classifier(
    classifier: torch.Tensor, class_names: Sequence[str | Sequence[str]], path: str | PathLike
) -> None:
    """Writes a classifier ``(C, D)`` and the names of its classes as one safetensors file."""
    if len(classifier) != len(class_names):
        raise ValueError(f"the classifier has {len(classifier)} classes and there are {len(class_names)} names.")
    save_file({"classifier": classifier.contiguous()}, path, metadata={"class_names": json.dumps(list(class_names))})


def load_classifier(path: str | PathLike) -> tuple[torch.Tensor, list[str | list[str]]]:
    """Reads the classifier ``(C, D)`` and the class names that `save_classifier` wrote."""
    with safe_open(path, "pt") as file:
        if "classifier" not in file.keys():  # noqa: SIM118  not a mapping
            raise ValueError(f"{path} holds no classifier: write it with save_classifier.")
        return file.get_tensor("classifier"), json.loads(file.metadata()["class_names"])


def _check_labels(labels: Sequence[int], num_images: int, num_classes: int) -> torch.Tensor:
    if len(labels) != num_images:
        raise ValueError(f"there are {num_images} images and {len(labels)} labels: give one label each.")
    labels = torch.as_tensor(np.asarray(labels))
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}: pass class ids, integers from 0 to {num_classes - 1}.")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, but there are {num_classes} classes.")
    return labels.long()
