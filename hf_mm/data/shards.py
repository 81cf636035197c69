"""WebDataset shards, as img2dataset writes them: tar files in which a picture, its text and its JSON share a name.

`datasets` reads them too, but stops at the first sample without text, text that is not UTF-8, JSON value of another type
and shard that was cut short; here each costs the rows that it spoils.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from PIL import Image as PILImage

KEY_COLUMN, ERROR_COLUMN = "__key__", "__error__"
CAPTION_FIELDS = ("txt", "text", "caption", "captions")
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # WebDataset's rule: a sample's name ends at the first dot


def load_shards(
    shards: Sequence[str],
    image_column: str | None = None,
    caption_column: str | None = None,
    group_column: str | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Opens shards as a dataset.

    Args:
        shards: files or addresses that fsspec can open.
        image_column: the picture's file extension (``jpg``), by default any that is one of a picture.
        caption_column: the text's file extension or its key in the JSON, by default one of `CAPTION_FIELDS`.
        group_column: a file extension or a key in the JSON.
        streaming: read along instead of copying all into the cache of `datasets`.

    Returns:
        Rows with the columns ``__key__`` (shard and name), ``__error__``, and those named by the arguments, by default
        ``image`` (undecoded) and ``captions`` (a list).

    Raises:
        ValueError: no sample can be read (unless streaming).
    """
    options = {"image_column": image_column, "caption_column": caption_column, "group_column": group_column}
    features = Features(
        {
            KEY_COLUMN: Value("string"),
            image_column or "image": Image(decode=False),
            caption_column or "captions": List(Value("string")),
            **({group_column: Value("string")} if group_column else {}),
            ERROR_COLUMN: Value("string"),
        }
    )
    settings = {"features": features, "gen_kwargs": {"shards": list(shards), **options}}
    if streaming:
        return IterableDataset.from_generator(read_shards, **settings)
    versions = [(path.stat().st_size, path.stat().st_mtime_ns) for path in map(Path, shards) if path.is_file()]
    dataset = Dataset.from_generator(read_shards, fingerprint=Hasher.hash((shards, versions, options)), **settings)
    errors = dataset[ERROR_COLUMN][:]
    if None not in errors:
        raise ValueError(errors[0] if errors else "there is no sample in it")
    return dataset


def read_shards(
    shards: Sequence[str],
    image_column: str | None = None,
    caption_column: str | None = None,
    group_column: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the samples of shards one by one; where a shard breaks off, a row that says so. See `load_shards`."""
    caption_fields = (caption_column,) if caption_column else CAPTION_FIELDS
    for shard in shards:
        name = shard.rsplit("/", 1)[-1]
        try:
            for key, fields in _samples(shard):
                captions = _look_up(fields, caption_fields)
                row = {
                    KEY_COLUMN: f"{name}/{key}",
                    image_column or "image": _picture(fields, image_column),
                    caption_column or "captions": captions if isinstance(captions, list) else [captions],
                    ERROR_COLUMN: None,
                }
                if group_column:
                    group = _look_up(fields, [group_column])
                    row[group_column] = None if group is None else str(group)
                yield row
        except Exception as error:  # whatever a file system or a damaged archive raises
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            yield {KEY_COLUMN: f"the rest of {name}", ERROR_COLUMN: f"the shard cannot be read: {reason}"}


def _samples(shard: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The name and the files, by extension, of each sample."""
    with fsspec.open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        members = ((*name.groups(), tar.extractfile(member)) for member in tar if (name := _sample_name(member)))
        for key, files in groupby(members, key=itemgetter(0)):
            yield key, {extension.lower(): content.read() for _, extension, content in files}


def _sample_name(member: tarfile.TarInfo) -> re.Match | None:
    return NAME.fullmatch(member.name) if member.isfile() else None


def _picture(fields: dict[str, bytes], extension: str | None) -> dict[str, Any] | None:
    found = [extension.lower()] if extension else filter(_is_picture, fields)
    return next(({"bytes": fields[field], "path": None} for field in found if field in fields), None)


def _is_picture(extension: str) -> bool:
    return "." + extension.rsplit(".", 1)[-1] in PILImage.registered_extensions()


def _look_up(fields: dict[str, bytes], names: Sequence[str]) -> Any:
    """The text of the first file with one of these extensions, else the first value in the JSON under these keys."""
    for name in names:
        if name.lower() in fields:
            return fields[name.lower()].decode("utf-8", "replace")
    try:
        about = json.loads(fields.get("json", b"{}"))
    except ValueError:
        return None
    return (
        next((about[name] for name in names if about.get(name) is not None), None) if isinstance(about, dict) else None
    )
