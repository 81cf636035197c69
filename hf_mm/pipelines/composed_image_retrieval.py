"""The pipeline `composed-image-retrieval`: this picture, changed as a sentence says, among the pictures of an index."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import Pipeline

from ..evaluation.embeddings import inference
from ..image_utils import flatten_images, is_nest, to_rgb
from .image_index import ImageIndex
from .picture_source import content_key

QUERY_KEYS = {"image", "images", "text", "id"}


class ComposedImageRetrievalPipeline(Pipeline):
    """Finds the pictures of an index that a picture and a sentence describe together.

        import hf_mm
        from transformers import pipeline

        search = pipeline("composed-image-retrieval", model=folder, index="my_index")
        search("cat.png", "a photo of *, asleep", top_k=5)

    Args:
        index: an `ImageIndex` or the folder of one; see also `index_pictures`.
        top_k: answers per query, 5 by default.
        exclude_query: leave out the pictures of the query, wherever the index has the same pixels, and the picture
            whose id the query names. Off by default.
        **kwargs: as every pipeline takes them: `model` (one with `get_composed_features`, such as `Pic2WordModel`),
            `processor`, `device`, `batch_size`.

    Raises:
        TypeError: the model composes no pictures with texts.
        ValueError: the index is that of another model; see `ImageIndex.check`.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_image_processor = False
    _load_feature_extractor = False
    _load_video_processor = False

    def __init__(self, *args, index: ImageIndex | str | PathLike | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if not hasattr(self.model, "get_composed_features"):
            raise TypeError(
                f"{type(self.model).__name__} does not compose pictures with texts (it has no get_composed_features): "
                "take a model such as Pic2WordModel."
            )
        if self.processor is None:
            raise ValueError("give a processor beside the model, or the folder of both as model.")
        self._index: ImageIndex | None = None
        if index is not None:
            self.index = index

    @property
    def index(self) -> ImageIndex | None:
        """The pictures that are searched. A folder is opened; another model's index is refused."""
        return self._index

    @index.setter
    def index(self, index: ImageIndex | str | PathLike) -> None:
        index = index if isinstance(index, ImageIndex) else ImageIndex.open(index)
        index.check(self.model, self.processor)
        self._index = index

    def index_pictures(self, images: Any, **options) -> ImageIndex:
        """Builds an index with the model of this pipeline, and searches it from now on; see `ImageIndex.build`."""
        self._index = ImageIndex.build(self.model, self.processor, images, **options)
        return self._index

    def add_pictures(self, images: Any, **options) -> ImageIndex:
        """Adds pictures to the index that is searched; see `ImageIndex.append`, and `ImageIndex.save` to keep them."""
        if self._index is None:
            return self.index_pictures(images, **options)
        self._index.append(self.model, self.processor, images, **options)
        return self._index

    def __call__(self, image: Any = None, text: str | Sequence[str] | None = None, images: Any = None, **kwargs):
        """Searches.

        Args:
            image: a picture (see `hf_mm.image_utils.to_rgb`; a path, say), or a list, column, `KeyDataset` or generator of
                pictures: one query each. Or
                queries whole: ``{"image": ..., "text": ...}``, or ``{"images": [...], "text": ...}`` for a text with
                several placeholders, and optionally ``"id"``, the picture's id in the index; or a list of them.
            text: the sentence, with the placeholder of the processor (``*``) for the picture; or one for each picture.
            images: the pictures of *one* query whose sentence has several placeholders.
            **kwargs: `top_k`, `exclude_query`, `batch_size`, `num_workers`.

        Returns:
            For one query a list of answers, best first; for a list a list of these. An answer has `score` (the cosine),
            `id`, `image` (the path of its file, the picture itself where the index keeps it, or None), `row`, and the
            other columns of the index.

        Raises:
            ValueError: there is no index, a query lacks its picture or its text, or placeholders and pictures are not
                equally many.
        """
        if self._index is None:
            raise ValueError(
                "there is no index to search: pass index= to pipeline(), or call index_pictures with your pictures."
            )
        return super().__call__(_queries(image, text, images), **kwargs)

    def save_pretrained(self, save_directory: str | PathLike, **kwargs) -> None:
        """Saves the model and the processor; the index has its own `save`."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(
        self, top_k: int | None = None, exclude_query: bool | None = None
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}: ask for at least one picture.")
        given = {"top_k": top_k, "exclude_query": exclude_query}
        return {}, {name: value for name, value in given.items() if value is not None}, {}

    def preprocess(self, query: Mapping[str, Any]) -> dict[str, Any]:
        """One query, ready for the model, and what tells its pictures in the index."""
        _check(query)
        images = [image for _, image in flatten_images(query["images"] if "images" in query else query["image"])]
        keys = [content_key(to_rgb(image)) for image in images]
        inputs = self.processor(images=[images], text=[query["text"]], return_tensors="pt")
        return {"inputs": dict(inputs), "reference": {"content": keys, "id": query.get("id")}}

    def _forward(self, batch: dict[str, Any], top_k: int = 5, exclude_query: bool = False) -> dict[str, torch.Tensor]:
        is_batch = isinstance(batch["inputs"], list)
        queries = batch["inputs"] if is_batch else [batch["inputs"]]
        references = batch["reference"] if is_batch else [batch["reference"]]
        with inference(self.model):
            composed = self.model.get_composed_features(**self._join(queries)).pooler_output
        exclude = [self._same_pictures(reference) for reference in references] if exclude_query else None
        scores, rows = self._index.search(composed, top_k, exclude)
        return {"scores": scores, "rows": rows}

    def postprocess(self, found: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """The answers of one query."""
        pairs = zip(found["scores"][0].tolist(), found["rows"][0].tolist(), strict=True)
        return [{"score": score, **self._index.describe_row(row)} for score, row in pairs if row >= 0]

    def _join(self, queries: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Queries of any number of pictures and any length of text as one batch."""
        batch = {"pixel_values": torch.cat([query["pixel_values"] for query in queries]).to(self.model.dtype)}
        for name in queries[0].keys() - batch.keys():
            filling = self.tokenizer.pad_token_id if name == "input_ids" else 0
            batch[name] = pad_sequence([query[name][0] for query in queries], True, filling)
        return batch

    def _same_pictures(self, reference: dict[str, Any]) -> list[str]:
        same = [name for key in reference["content"] for name in self._index.ids_of(key)]
        return same if reference["id"] is None else [*same, reference["id"]]


def _queries(image: Any, text: Any, images: Any) -> Any:
    """What `Pipeline.__call__` takes: one query, a list of queries, or what yields queries."""
    if images is not None:
        if image is not None:
            raise ValueError("give image (one picture a query) or images (all pictures of one query), not both.")
        return {"images": images, "text": text}
    if image is None:
        raise ValueError("there is no picture: give image, or images for a sentence with several placeholders.")
    if text is None:
        return image
    if isinstance(image, Dataset):
        image = [image[number] for number in range(len(image))]
    if not is_nest(image):
        return {"image": image, "text": text}
    image = list(image)
    if not image:
        raise ValueError("the list of pictures is empty.")
    texts = [text] * len(image) if isinstance(text, str) else text
    if len(texts) != len(image):
        raise ValueError(f"there are {len(texts)} texts for {len(image)} pictures: give one for each, or one for all.")
    return [{"image": one, "text": own} for one, own in zip(image, texts, strict=True)]


def _check(query: Any) -> None:
    if not isinstance(query, Mapping) or not query.get("text"):
        raise ValueError('a query has no text: give pictures with a sentence, or {"image": ..., "text": ...}.')
    if unknown := query.keys() - QUERY_KEYS:
        raise ValueError(f"a query has the key {min(unknown)!r}; it may have {', '.join(sorted(QUERY_KEYS))}.")
    if (query.get("image") is None) == (query.get("images") is None):
        raise ValueError("a query needs image, or images for a sentence with several placeholders, and not both.")
