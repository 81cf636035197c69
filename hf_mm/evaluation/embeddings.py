"""Pictures and texts to unit-length embeddings, on one process or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from tqdm.auto import tqdm


def embed_images(
    model: nn.Module,
    processor: Any,
    images: Sequence[Any],
    batch_size: int = 256,
    progress: bool = True,
    normalize: bool = True,
) -> torch.Tensor:
    """Embeds pictures into the space that they share with texts.

    Under `torch.distributed` every rank must call this with the same pictures. Each encodes its share and all get the
    whole result, in order and with nothing repeated.

    Args:
        model: has `get_image_features`, such as `MMClipModel`; its device, dtype and mode are kept.
        processor: turns ``images=`` into `pixel_values`.
        images: any sequence of pictures; a `datasets` column stays lazy, one batch is in memory at a time.
        batch_size: pictures per forward pass of a rank.
        progress: show a bar.
        normalize: False keeps the length that each row has, as `vision_features` of `embed_composed` wants it.

    Returns:
        ``(n, D)`` float32 on the CPU, rows of unit length.

    Raises:
        ValueError: there are no pictures, or the batch size is not positive.
    """

    def encode(batch: list[Any]) -> torch.Tensor:
        pixel_values = processor(images=batch, return_tensors="pt")["pixel_values"]
        return model.get_image_features(pixel_values=pixel_values.to(model.device, model.dtype)).pooler_output

    return _embed(model, encode, images, batch_size, "pictures" if progress else None, normalize)


def embed_texts(
    model: nn.Module, processor: Any, texts: Sequence[str], batch_size: int = 256, progress: bool = True
) -> torch.Tensor:
    """Embeds texts into the space that they share with pictures; equal texts are encoded once.

    See `embed_images` for several processes.

    Args:
        model: has `get_text_features`, such as `MMClipModel`; its device and mode are kept.
        processor: turns ``text=`` into the inputs of that.
        texts: any sequence of strings.
        batch_size: texts per forward pass of a rank; texts of similar length share one.
        progress: show a bar.

    Returns:
        ``(n, D)`` float32 on the CPU, rows of unit length.

    Raises:
        ValueError: there are no texts, or the batch size is not positive.
        TypeError: `texts` is one string.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string: pass a list of strings.")

    def encode(batch: list[str]) -> torch.Tensor:
        inputs = processor(text=batch, return_tensors="pt", padding=True, truncation=True)
        return model.get_text_features(
            **{name: value.to(model.device) for name, value in inputs.items()}
        ).pooler_output

    unique = sorted(set(texts), key=lambda text: (len(text), text))
    row = {text: index for index, text in enumerate(unique)}
    embeddings = _embed(model, encode, unique, batch_size, "texts" if progress else None)
    return embeddings[[row[text] for text in texts]]


def embed_composed(
    model: nn.Module,
    processor: Any,
    images: Sequence[Any] | None,
    texts: Sequence[str],
    batch_size: int = 256,
    progress: bool = True,
    vision_features: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embeds sentences in which pictures stand for words.

    See `embed_images` for several processes.

    Args:
        model: has `get_composed_features`, such as `Pic2WordModel`; its device, dtype and mode are kept.
        processor: turns ``images=`` and ``text=`` together into the inputs of that, such as `Pic2WordProcessor`.
        images: for each text its picture, or a list of its pictures in reading order; None with `vision_features`.
        texts: n sentences with a placeholder for each of their pictures.
        batch_size: texts per forward pass of a rank; texts of similar length share one.
        progress: show a bar.
        vision_features: in place of pictures, ``(n, D)`` with one to a text or ``(n, k, D)`` with k: what
            ``embed_images(..., normalize=False)`` gives. Pictures that many sentences share are so encoded once.

    Returns:
        ``(n, D)`` float32 on the CPU, rows of unit length.

    Raises:
        ValueError: there are no texts, their number is not that of the pictures, both pictures and features are given
            or neither, a text lacks a placeholder, or the batch size is not positive.
        TypeError: `texts` is one string.
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string: pass a list of strings.")
    if (images is None) == (vision_features is None):
        raise ValueError("pass either images or vision_features.")
    given = images if vision_features is None else vision_features
    if len(given) != len(texts):
        what = "images" if vision_features is None else "rows of vision_features"
        raise ValueError(f"there are {len(texts)} texts and {len(given)} {what}: give each text its own.")

    def encode(batch: list[int]) -> torch.Tensor:
        options = {"text": [texts[index] for index in batch], "padding": True, "truncation": True}
        if vision_features is None:
            inputs = processor(images=[images[index] for index in batch], return_tensors="pt", **options)
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        else:
            rows = vision_features[batch].to(model.dtype)
            inputs = processor(num_images=1 if rows.ndim == 2 else rows.shape[1], return_tensors="pt", **options)
            inputs["vision_features"] = rows.flatten(0, -2)
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        return model.get_composed_features(**inputs).pooler_output

    order = sorted(range(len(texts)), key=lambda index: (len(texts[index]), index))
    embeddings = _embed(model, encode, order, batch_size, "composed texts" if progress else None)
    return embeddings[torch.tensor(order).argsort()]


def _embed(
    model: nn.Module,
    encode: Callable[[list[Any]], torch.Tensor],
    items: Sequence[Any],
    batch_size: int,
    unit: str | None,
    normalize: bool = True,
) -> torch.Tensor:
    if len(items) == 0:
        raise ValueError("there is nothing to embed: pass at least one picture or text.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1.")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = range(rank, len(items), world_size)
    batches = []
    with inference(model), tqdm(total=len(share), unit=f" {unit}", disable=unit is None or rank > 0) as bar:
        for start in range(0, len(share), batch_size):
            batch = [items[index] for index in share[start : start + batch_size]]
            rows = encode(batch).float()
            batches.append((nn.functional.normalize(rows, dim=-1) if normalize else rows).cpu())
            bar.update(len(batch))
    return _gather(torch.cat(batches) if batches else None, len(items), world_size)


def _gather(part: torch.Tensor | None, length: int, world_size: int) -> torch.Tensor:
    """Puts the parts of all ranks, each every `world_size`-th row, into one tensor on every rank."""
    if world_size == 1:
        return part
    parts = [None] * world_size
    dist.all_gather_object(parts, part)
    whole = torch.empty(length, *parts[0].shape[1:])
    for rank, rows in enumerate(parts):
        if rows is not None:
            whole[rank::world_size] = rows
    return whole


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
