"""Any user's pictures with texts, in one form: `ImageTextRows`.

A row is a picture (undecoded), its captions, an id that a message can name, and the group of pictures that show the
same thing. Rows come from the bundled emoji, a folder of pictures with ``metadata.csv`` / ``metadata.jsonl`` or with a
text file beside each picture, a CSV, TSV, JSONL or Parquet file (or a folder of them), WebDataset shards, a folder that
`datasets` saved, or a Hub id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from PIL import Image as PILImage
from tqdm.auto import tqdm

from ..image_utils import to_rgb

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "file_name", "image_path", "path", "file")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "sentences", "title", "alt_text", "description")
ID_COLUMNS = ("image_id", "__key__", "id", "key")
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class DataArguments:
    """Where pictures and texts come from."""

    source: str = field(
        default="emoji",
        metadata={
            "help": "The bundled pictures (emoji), or yours: a folder of pictures, a CSV, JSONL or Parquet file, "
            "WebDataset shards (folder or pattern of .tar files), a folder that datasets saved, or a Hub id."
        },
    )
    split: str = field(default="train", metadata={"help": "Split to train on, where the source has several."})
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Without it a fraction of the training pictures is held out."},
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Fraction of the pictures held out for evaluation, chosen by their ids."}
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the pictures (found by usual names)."})
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the texts, one or a list of them (found by usual names)."}
    )
    group_column: str | None = field(
        default=None,
        metadata={
            "help": "Column that tells which pictures show the same thing: they are not each other's negatives."
        },
    )
    views_per_group: int = field(
        default=1, metadata={"help": "Different pictures of one group that a batch holds together."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the source as a stream (needs max_steps)."})
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Rows among which a stream is shuffled."})
    strict: bool = field(
        default=False, metadata={"help": "Stop at a broken picture or an empty caption instead of skipping the row."}
    )
    cache_images: bool = field(
        default=False, metadata={"help": "Keep every picture at the model's size in memory (n x n x 3 bytes each)."}
    )


class BrokenRow(ValueError):
    """A row that cannot be trained on: `row` names it, `reason` says why."""

    def __init__(self, row: str, reason: str):
        super().__init__(f"{row}: {reason}")
        self.row, self.reason = row, reason


@dataclass
class ImageText:
    """One row, read: an upright RGB picture and what is known of it."""

    image: PILImage.Image
    captions: list[str]
    image_id: str
    group: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Which columns hold what."""

    image: str
    caption: str
    group: str | None = None
    row_id: str | None = None
    folder: Path | None = None

    @classmethod
    def find(cls, names: Sequence[str], args: DataArguments, folder: Path | None = None) -> Columns:
        """Takes the columns that `args` names, or those with a usual name.

        Raises:
            ValueError: there is no such column; the sentence lists those that there are.
        """
        return cls(
            image=_find_column(names, args.image_column, IMAGE_COLUMNS, "image_column"),
            caption=_find_column(names, args.caption_column, CAPTION_COLUMNS, "caption_column"),
            group=_find_column(names, args.group_column, (), "group_column") if args.group_column else None,
            row_id=next((name for name in ID_COLUMNS if name in names), None),
            folder=folder,
        )

    def read(self, row: dict[str, Any], number: int) -> ImageText:
        """Opens the picture of a row.

        Raises:
            BrokenRow: the picture is missing or unreadable, or no caption has a letter.
        """
        image_id = self.image_id(row, number)
        captions = self.captions(row)
        if not captions:
            raise BrokenRow(image_id, "it has no caption")
        try:
            image = to_rgb(self._picture(row))
        except (ValueError, OSError, TypeError, SyntaxError) as error:
            raise BrokenRow(image_id, str(error)) from error
        return ImageText(image, captions, image_id, self.group_of(row, number), row)

    def captions(self, row: dict[str, Any]) -> list[str]:
        value = row[self.caption]
        values = value if isinstance(value, (list, tuple)) else [value]
        return [text for text in values if isinstance(text, str) and text.strip()]

    def image_id(self, row: dict[str, Any], number: int) -> str:
        """The row's own id, else the picture's file, else its number: what a message calls it."""
        if self.row_id and row[self.row_id] is not None:
            return str(row[self.row_id])
        value = row[self.image]
        path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
        return path or f"row {number}"

    def group_of(self, row: dict[str, Any], number: int) -> str:
        """What the picture shows; without a group column, the picture's file alone."""
        return str(row[self.group]) if self.group else self.image_id(row, number)

    def _picture(self, row: dict[str, Any]) -> Any:
        value = row[self.image]
        path = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
        if not isinstance(path, str):
            return value
        if path.startswith(("http://", "https://")):
            raise ValueError(f"{path} is an address, not a file: download the pictures first, with img2dataset say")
        return self.folder / path if self.folder else path


class ImageTextRows(Sequence):
    """Rows of a map-style source. Reading one opens its picture.

    Args:
        dataset: rows with undecoded pictures.
        columns: what its columns hold.
    """

    def __init__(self, dataset: Dataset, columns: Columns):
        self.dataset, self.columns = dataset, columns

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> ImageText:
        return self.columns.read(self.dataset[index], index)

    def groups(self) -> list[str]:
        """The group of every row, without opening a picture."""
        needed = {self.columns.group, self.columns.row_id, self.columns.image} - {None}
        light = self.dataset.select_columns([name for name in self.dataset.column_names if name in needed])
        if self.columns.group:
            return [str(group) for group in light[self.columns.group]]
        return [self.columns.group_of(row, number) for number, row in enumerate(light)]

    def texts(self) -> Iterator[str]:
        """Every caption, without opening a picture."""
        for row in self.dataset.select_columns([self.columns.caption]):
            yield from self.columns.captions(row)

    def readable(self, skipped: dict[str, str], strict: bool = False, desc: str | None = None) -> Iterator[ImageText]:
        """The rows that can be read, in order; the others are written into `skipped` (or, `strict`, raised)."""
        for index in tqdm(range(len(self)), desc=desc, disable=desc is None):
            try:
                yield self[index]
            except BrokenRow as error:
                if strict:
                    raise
                skipped[error.row] = error.reason

    def split_off(self, fraction: float) -> tuple[ImageTextRows, ImageTextRows]:
        """Divides the rows into training and held-out ones by a hash of their groups, the same on every machine."""
        held_out = [stable_id(group) % 10_000 < fraction * 10_000 for group in self.groups()]
        parts = ([i for i, held in enumerate(held_out) if held is wanted] for wanted in (False, True))
        return tuple(ImageTextRows(self.dataset.select(indices), self.columns) for indices in parts)


def open_rows(args: DataArguments, split: str | None = None) -> ImageTextRows:
    """Opens a source that is read at random.

    Args:
        args: the source and its columns.
        split: the split to open, `args.split` by default.

    Raises:
        ValueError: the source does not exist or has no rows, no such split, or no such columns.
    """
    dataset, columns = _open(args, split or args.split, streaming=False)
    if not len(dataset):
        raise ValueError(f"{args.source} has no rows.")
    return ImageTextRows(dataset, columns)


def open_stream(args: DataArguments) -> tuple[IterableDataset, Columns]:
    """Opens a source as a stream of rows with undecoded pictures; see `open_rows`."""
    return _open(args, args.split, streaming=True)


def stable_id(text: str) -> int:
    """A 62-bit number for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2


def any_caption(sample: ImageText, rng: Random) -> str:
    """One of the captions, each as likely."""
    return rng.choice(sample.captions)


def emoji_text(sample: ImageText, rng: Random) -> str:
    """The name of an emoji (60 %), its name and one or two tags (20 %), two to four tags (15 %), or its name or a tag
    with the subgroup (5 %)."""
    name, tags = sample.row["caption"], sample.row["tags"]
    kind = rng.random()
    if kind < 0.6 or not tags:
        return name
    if kind < 0.8:
        return ", ".join([name, *rng.sample(tags, min(len(tags), rng.randint(1, 2)))])
    if kind < 0.95:
        return ", ".join(rng.sample(tags, min(len(tags), rng.randint(2, 4))))
    return f"{rng.choice([name, rng.choice(tags)])}, {sample.row['subgroup'].replace('-', ' ')}"


def emoji_corpus(rows: ImageTextRows) -> Iterator[str]:
    """Every text that `emoji_text` can draw from."""
    for row in rows.dataset.select_columns(["caption", "tags", "subgroup"]):
        yield ", ".join([row["caption"], *row["tags"], row["subgroup"].replace("-", " ")])


def _find_column(names: Sequence[str], wanted: str | None, usual: Iterable[str], argument: str) -> str:
    if wanted in names:
        return wanted
    found = [name for name in usual if name in names] if wanted is None else []
    if not found:
        missing = f"no column {wanted!r}" if wanted else f"no column that {argument} could be"
        raise ValueError(f"the data has {missing}; it has {', '.join(names)}: set {argument} to one of them.")
    return found[0]


def _open(args: DataArguments, split: str, streaming: bool) -> tuple[Any, Columns]:
    if args.source == "emoji":
        from .emoji import load_emoji

        dataset = load_emoji(split, normalize_size=True)
        columns = Columns("image", "caption", group="hexcode")
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    else:
        dataset, folder = _load(args.source, split, streaming)
        columns = Columns.find(_column_names(dataset), args, folder)
    if isinstance((dataset.features or {}).get(columns.image), Image):
        dataset = dataset.cast_column(columns.image, Image(decode=False))
    return dataset, columns


def _column_names(dataset: Any) -> list[str]:
    return dataset.column_names or list(next(iter(dataset)))


def _load(source: str, split: str, streaming: bool) -> tuple[Any, Path | None]:
    """The rows of a source, and the folder that its file names are relative to."""
    path = Path(source)
    if path.is_file():
        return _load_files(source, [path], split, streaming)
    if path.is_dir():
        return _load_folder(path, split, streaming)
    if any(mark in source for mark in "*?[{") or ".tar" in source:
        return load_dataset("webdataset", data_files={"train": source}, split="train", streaming=streaming), None
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"{source} does not exist.")
    return _one_split(load_dataset(source, streaming=streaming), split, source), None


def _load_folder(path: Path, split: str, streaming: bool) -> tuple[Any, Path | None]:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        dataset = _one_split(load_from_disk(str(path)), split, str(path))
        return (dataset.to_iterable_dataset() if streaming else dataset), None
    root = path / split if (path / split).is_dir() else path
    for name in METADATA_FILES:
        if (root / name).is_file():
            return _load_files(str(path), [root / name], split, streaming)
    for pattern in ("*.tar", "*.parquet", "*.jsonl", "*.csv", "*.tsv"):
        if files := sorted(root.glob(pattern)):
            return _load_files(str(path), files, split, streaming)
    pictures = sorted(file for file in root.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
    if not pictures:
        raise ValueError(f"{root} holds no pictures, tables or shards.")
    captions = [_captions_beside(picture) for picture in pictures]
    if not any(captions):
        raise ValueError(
            f"the pictures of {root} have no captions: add a metadata.csv with the columns file_name and caption, "
            "or a .txt file beside each picture."
        )
    dataset = Dataset.from_dict({"image": [str(picture) for picture in pictures], "captions": captions})
    return (dataset.to_iterable_dataset() if streaming else dataset), None


def _captions_beside(picture: Path) -> list[str]:
    """The lines of the .txt file with the picture's name."""
    text = picture.with_suffix(".txt")
    return [line for line in text.read_text(errors="replace").splitlines() if line.strip()] if text.exists() else []


def _load_files(source: str, files: list[Path], split: str, streaming: bool) -> tuple[Any, Path]:
    suffix = files[0].suffix.lower()
    builder = "webdataset" if suffix == ".tar" else TABLES.get(suffix)
    if builder is None:
        raise ValueError(
            f"{source} is none of {', '.join(TABLES)} or .tar, nor a folder: it cannot be read as pictures with texts."
        )
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    data_files = {"train": [str(file) for file in files]}
    try:
        dataset = load_dataset(builder, data_files=data_files, split="train", streaming=streaming, **options)
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{source} cannot be read as {builder}: {reason}") from error
    return dataset, files[0].parent


def _one_split(dataset: Any, split: str, source: str) -> Any:
    if not isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        return dataset
    if split not in dataset:
        raise ValueError(f"{source} has no split {split!r}: it has {', '.join(dataset)}.")
    return dataset[split]
