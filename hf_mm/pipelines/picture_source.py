"""Pictures on their way into an index: opened one by one, named, and written as rows."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict, List, Value
from PIL import Image as PILImage

from ..data.image_text import IMAGE_COLUMNS, PICTURE_SUFFIXES, find_id_column
from ..image_utils import is_nest, load_picture, quantize, to_rgb

OWN_COLUMNS = ("id", "image", "content", "embedding")
RESERVED_COLUMNS = (*OWN_COLUMNS, "row", "score")


@dataclass
class ReadPicture:
    """One picture, open.

    Args:
        number: its place in the source.
        image: upright, of its own mode or RGB.
        content: see `content_key`.
        reference: ``{"bytes", "path"}``, what the index keeps of it.
    """

    number: int
    image: PILImage.Image
    content: str
    reference: dict[str, Any]


class PictureSource:
    """Pictures to be added to an index: their ids, and the other columns that come with them.

    Args:
        images, ids: see `ImageIndex.build`.
        known: ids that are taken.

    Attributes:
        ids: of all pictures.
        features: the other columns of a dataset.

    Raises:
        ValueError: there are no pictures, an id is taken or given twice, or a dataset has no column of pictures or one
            whose name the index needs.
        FileNotFoundError: a path is not a folder.
        TypeError: this is one picture, or none.
    """

    def __init__(self, images: Any, ids: Sequence[Any] | None, known: Collection[str] = ()):
        self.others: Dataset | None = None
        self.features: dict[str, Any] = {}
        if isinstance(images, Dataset):
            self.images, default_ids = self._columns_of(images)
        elif isinstance(images, (str, PathLike)):
            self.images, default_ids = _files_of(Path(images))
        elif isinstance(images, (DatasetDict, IterableDatasetDict)):
            raise ValueError(f"the dataset has the splits {', '.join(images)}: give one of them.")
        elif isinstance(images, IterableDataset):
            raise ValueError("a streamed dataset has no rows to index: load it without streaming.")
        elif not is_nest(images) and not hasattr(images, "__getitem__"):
            raise TypeError(f"a {type(images).__name__} is not several pictures: give a list, a folder or a dataset.")
        else:
            self.images = images if hasattr(images, "__getitem__") else list(images)
            default_ids = _paths_of(self.images)
        if len(self.images) == 0:
            raise ValueError("there are no pictures to index.")
        if ids is not None and len(ids) != len(self.images):
            raise ValueError(f"there are {len(ids)} ids for {len(self.images)} pictures: give one id a picture.")
        self.ids = _unique_ids(default_ids if ids is None else list(map(str, ids)), known)

    def readable(
        self, numbers: range, as_rgb: bool, keep_pictures: bool, skipped: dict[str, str]
    ) -> Iterator[ReadPicture]:
        """Opens pictures one by one; those that cannot be opened are written into `skipped`, id to reason.

        Args:
            numbers: of the pictures.
            as_rgb: convert them; else an image processor of ours decides when.
            keep_pictures: see `ImageIndex.build`.
            skipped: gets what is left out.
        """
        for number in numbers:
            given = self.images[number]
            try:
                image = open_picture(given)
            except (OSError, TypeError, ValueError) as error:
                skipped[self.ids[number]] = str(error)
                continue
            rgb = to_rgb(image)
            reference = _reference(given, rgb, keep_pictures)
            yield ReadPicture(number, rgb if as_rgb else image, content_key(rgb), reference)

    def table(self, pictures: list[ReadPicture], embeddings: torch.Tensor, features: Features) -> pa.Table:
        """The rows of the index for a batch."""
        schema = features.arrow_schema
        numbers = [picture.number for picture in pictures]
        columns = {
            "id": pa.array([self.ids[number] for number in numbers]),
            "image": pa.array([picture.reference for picture in pictures], schema.field("image").type),
            "content": pa.array([picture.content for picture in pictures]),
            "embedding": pa.FixedSizeListArray.from_arrays(
                pa.array(embeddings.flatten().numpy()), embeddings.shape[1]
            ),
        }
        if self.others is not None:
            columns |= dict(zip(self.features, self.others[numbers].columns, strict=True))
        return pa.Table.from_pydict(columns, schema=schema)

    def _columns_of(self, dataset: Dataset) -> tuple[Any, list[str | None]]:
        names = dataset.column_names
        pictured = [name for name, kind in dataset.features.items() if isinstance(kind, Image)]
        image = next(iter(pictured or [name for name in IMAGE_COLUMNS if name in names]), None)
        if image is None:
            raise ValueError(
                f"the dataset has no column of pictures, only {', '.join(names)}: name one of them image."
            )
        row_id = find_id_column(names)
        self.features = {name: kind for name, kind in dataset.features.items() if name not in (image, row_id)}
        if taken := [name for name in self.features if name in RESERVED_COLUMNS]:
            raise ValueError(f"the column {taken[0]!r} of the dataset has a name that the index needs: rename it.")
        if self.features:
            self.others = dataset.select_columns(list(self.features)).with_format("arrow")
        ids = [None] * len(dataset) if row_id is None else list(map(str, dataset[row_id][:]))
        images = dataset.cast_column(image, Image(decode=False)) if image in pictured else dataset
        return images[image], ids


def open_picture(image: Any) -> PILImage.Image:
    """One picture as 8-bit image of its own mode, upright; see `hf_mm.image_utils.to_rgb` for what it may be."""
    picture = load_picture(image)
    return quantize(picture) if isinstance(picture, np.ndarray) else picture


def content_key(picture: PILImage.Image) -> str:
    """Tells pictures with the same pixels, whatever their files are called: BLAKE2b of size and RGB levels."""
    digest = hashlib.blake2b(str(picture.size).encode(), digest_size=16)
    digest.update(picture.tobytes())
    return digest.hexdigest()


def _files_of(folder: Path) -> tuple[list[Path], list[str]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give a folder of pictures, or a list of pictures.")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
    return files, [file.relative_to(folder).as_posix() for file in files]


def _paths_of(images: Sequence[Any]) -> list[str | None]:
    """The paths among pictures; a sequence that opens a picture when it is asked for is asked for the first alone."""
    count = len(images)
    if not isinstance(images, (list, tuple)) and not (count and isinstance(images[0], (str, PathLike))):
        return [None] * count
    return [str(image) if isinstance(image, (str, PathLike)) else None for image in images]


def _unique_ids(ids: list[str | None], known: Collection[str]) -> list[str]:
    """Numbers the pictures without an id, by numbers that are still free.

    Raises:
        ValueError: an id is there twice.
    """
    seen = set(known)
    for name in ids:
        if name in seen:
            where = "in the index already" if name in known else "given twice"
            raise ValueError(f"the id {name!r} is {where}: every picture needs its own.")
        if name is not None:
            seen.add(name)
    free = (str(number) for number in itertools.count(len(known)) if str(number) not in seen)
    return [next(free) if name is None else name for name in ids]


def _reference(image: Any, rgb: PILImage.Image, keep_pictures: bool) -> dict[str, Any]:
    """Where the file of a picture is; of one in memory, its encoding."""
    path = image.get("path") if isinstance(image, dict) else image
    encoded = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(encoded, (bytes, bytearray)):
        return {"bytes": bytes(encoded) if keep_pictures else None, "path": None}
    if isinstance(path, (str, PathLike)):
        is_address = "://" in str(path) or str(path).startswith("data:")
        return {"bytes": None, "path": str(path) if is_address else str(Path(path).absolute())}
    if not keep_pictures:
        return {"bytes": None, "path": None}
    file = BytesIO()
    rgb.save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def row_features(width: int, others: dict[str, Any]) -> Features:
    # image is a struct: `save_to_disk` would copy the files that an Image column refers to
    return Features(
        {
            "id": Value("string"),
            "image": {"bytes": Value("binary"), "path": Value("string")},
            "content": Value("string"),
            "embedding": List(Value("float32"), length=width),
            **others,
        }
    )
