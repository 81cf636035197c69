"""Any user's pictures with texts, in one form: `ImageTextRows`.

A row is a picture (undecoded), its captions, an id that a message can name, and the group of pictures that show the
same thing. Rows come from the bundled emoji, a folder of pictures with ``metadata.csv`` / ``metadata.jsonl`` or with a
text file beside each picture, a CSV, TSV, JSONL or Parquet file (or a folder of them), WebDataset shards, a folder that
`datasets` saved, or a Hub id.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import escape, glob
from pathlib import Path
from random import Random
from string import Formatter
from typing import Any, ClassVar

import fsspec
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from PIL import Image as PILImage
from tqdm.auto import tqdm

from ..image_utils import to_rgb
from .shards import ERROR_COLUMN, KEY_COLUMN, load_shards

IMAGE_COLUMNS = (
    *("image", "jpg", "jpeg", "png", "webp", "img", "picture"),
    *("file_name", "filename", "image_path", "filepath", "file_path", "path", "file"),
)
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "sentences", "title", "alt_text", "description")
ID_COLUMNS = ("image_id", KEY_COLUMN, "id", "key")
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLE_PATTERNS = ("*.parquet", "*.jsonl", "*.csv", "*.tsv")
STYLED = "styled"
TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


@dataclass
class DataArguments:
    """Where pictures and texts come from."""

    needs_captions: ClassVar[bool] = True

    source: str = field(
        default="emoji",
        metadata={
            "help": "The bundled pictures (emoji), or yours: a folder of pictures, a CSV, JSONL or Parquet file, "
            "WebDataset shards (folder or pattern of .tar files), a folder that datasets saved, or a Hub id."
        },
    )
    split: str = field(default="train", metadata={"help": "Split to train on, where the source has several."})
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Subset of a Hub id that has several. Of the bundled pictures: 'styled', with skin tones, whose texts "
            "name the artist."
        },
    )
    validation_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on. Without it a fraction of the training pictures is held out."},
    )
    validation_fraction: float = field(
        default=0.05,
        metadata={"help": "Fraction of the pictures held out, chosen by their ids (a stream needs validation_split)."},
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
    shuffle_buffer: int = field(
        default=1_000,
        metadata={"help": "Rows among which a stream is shuffled; their undecoded pictures are in memory."},
    )
    strict: bool = field(
        default=False, metadata={"help": "Stop at a broken picture or an empty caption instead of skipping the row."}
    )
    cache_images: bool = field(
        default=False,
        metadata={"help": "Keep every picture at the model's size in memory (n x n x 3 bytes each, per worker)."},
    )


@dataclass
class PictureArguments(DataArguments):
    """Where pictures come from. Texts beside them are not looked for."""

    needs_captions: ClassVar[bool] = False


class BrokenRow(ValueError):
    """A row that cannot be trained on: `row` names it, `reason` says why."""

    def __init__(self, row: str, reason: str = ""):
        if "\n" in row:  # the traceback of a DataLoader's worker; its last line is "<class>: <row>: <reason>"
            row, _, reason = row.rstrip().rpartition("\n")[2].partition(": ")[2].partition(": ")
        super().__init__(row, reason)
        self.row, self.reason = row, reason

    def __str__(self) -> str:
        return f"{self.row}: {self.reason}" if self.reason else self.row


@dataclass
class ImageText:
    """One row, read: an upright RGB picture, its texts, and the other columns."""

    image: PILImage.Image
    captions: list[str]
    image_id: str
    group: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Which columns hold what, and what else a row needs: `text_fault` says of captions and their row why they cannot be
    learnt, or None."""

    image: str
    caption: str | None
    group: str | None = None
    row_id: str | None = None
    folder: Path | None = None
    text_fault: Callable[[list[str], dict[str, Any]], str | None] | None = None

    @classmethod
    def find(cls, names: Sequence[str], args: DataArguments, folder: Path | None = None) -> Columns:
        """Takes the columns that `args` names, or those with a usual name.

        Raises:
            ValueError: there is no such column; the sentence lists those that there are.
        """
        return cls(
            image=_find_column(names, args.image_column, IMAGE_COLUMNS, "image_column"),
            caption=_find_column(names, args.caption_column, CAPTION_COLUMNS, "caption_column")
            if args.needs_captions
            else None,
            group=_find_column(names, args.group_column, (), "group_column") if args.group_column else None,
            row_id=find_id_column(names),
            folder=folder,
        )

    def read(self, row: dict[str, Any], number: int | str, allow_blank: bool = False) -> ImageText:
        """Opens the picture of a row.

        Args:
            row: the columns.
            number: what names the row after the word "row", if it has no id and no file.
            allow_blank: take a blank caption for the empty text.

        Raises:
            BrokenRow: the picture is missing or unreadable, all captions are missing or blank, or there is a `text_fault`.
        """
        name = self.image_id(row, number)
        captions = self.captions(row)
        if allow_blank and not captions and isinstance(row.get(self.caption), str):
            captions = [""]
        if reason := self.fault(captions, row):
            raise BrokenRow(name, reason)
        try:
            image = to_rgb(self.picture(row))
        except (OSError, TypeError, ValueError) as error:
            raise BrokenRow(name, str(error)) from error
        others = {column: value for column, value in row.items() if column != self.image}
        return ImageText(image, captions, name, self.group_of(row, number), others)

    def captions(self, row: dict[str, Any]) -> list[str]:
        """The captions that are not blank, of a text, a list, or a list written as text (as a CSV holds one)."""
        value = row.get(self.caption)
        value = _list_in(value) if isinstance(value, str) else value
        values = value if isinstance(value, (list, tuple)) else [value]
        return [str(text) for text in values if not is_missing(text) and str(text).strip()]

    def fault(self, captions: list[str], row: dict[str, Any]) -> str | None:
        """Why a row cannot be trained on, whatever its picture is; or None."""
        if row.get(ERROR_COLUMN):
            return row[ERROR_COLUMN]
        if not captions and self.caption is not None:
            return "it has no caption"
        return self.text_fault(captions, row) if self.text_fault else None

    def image_id(self, row: dict[str, Any], number: int | str) -> str:
        """The row's own id, else the picture's file, else its number from 0: what a message calls it."""
        if self.row_id and not is_missing(row.get(self.row_id)):
            return str(row[self.row_id])
        picture = row.get(self.image)
        inner = picture.get("path") if isinstance(picture, dict) else None
        return _file_of(picture) or (f"row {number} ({inner})" if inner else f"row {number}")

    def group_of(self, row: dict[str, Any], number: int | str) -> str:
        """What the picture shows; without a group column, the picture itself: its file, or a hash of its bytes."""
        if self.group and not is_missing(row.get(self.group)):
            return str(row[self.group])
        picture = row.get(self.image)
        content = picture.get("bytes") if isinstance(picture, dict) else picture
        if isinstance(content, bytes):
            return hashlib.blake2b(content, digest_size=16).hexdigest()
        return _file_of(picture) or f"row {number}"

    def picture(self, row: dict[str, Any]) -> Any:
        """The picture of a row, unopened: a path, bytes, or what the row holds.

        Raises:
            ValueError: it is an address.
        """
        picture = row.get(self.image)
        file = _file_of(picture)
        if file is None or file.startswith("data:"):
            return file or picture
        if file.startswith(("http://", "https://")):
            raise ValueError(f"{file} is an address, not a file: download the pictures first, with img2dataset say.")
        if "://" in file:  # inside an archive, or in a streamed repository
            with fsspec.open(file, "rb") as opened:
                return opened.read()
        return self.folder / file if self.folder else file


class ImageTextRows(Sequence):
    """Rows of a map-style source. Reading one opens its picture.

    Args:
        dataset: rows with undecoded pictures.
        columns: what its columns hold.
        numbers: what messages number the rows by, their places in `dataset` by default.
    """

    def __init__(self, dataset: Dataset, columns: Columns, numbers: Sequence[int] | None = None):
        self.dataset, self.columns = dataset, columns
        self.numbers = range(len(dataset)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> ImageText:
        return self.columns.read(self.dataset[index], self.numbers[index])

    def groups(self) -> list[str]:
        """The group of every row, without decoding a picture."""
        if self.columns.group:
            groups = self.dataset[self.columns.group][:]
            if not any(map(is_missing, groups)):
                return list(map(str, groups))
        needed = [name for name in (self.columns.group, self.columns.image) if name]
        light = self.dataset.select_columns(needed)
        return [self.columns.group_of(row, number) for number, row in zip(self.numbers, light, strict=True)]

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
        return tuple(ImageTextRows(self.dataset.select(part), self.columns, part) for part in parts)


def open_rows(args: DataArguments, split: str | None = None) -> ImageTextRows:
    """Opens a source that is read at random.

    Args:
        args: the source and its columns.
        split: the split to open, `args.split` by default.

    Raises:
        ValueError: the source does not exist or has no rows, no such split, or no such columns.
    """
    return ImageTextRows(*_open(args, split or args.split, streaming=False))


def open_stream(args: DataArguments) -> tuple[IterableDataset, Columns]:
    """Opens a source as a stream of rows with undecoded pictures; see `open_rows`."""
    return _open(args, args.split, streaming=True)


def stable_id(text: str) -> int:
    """A 62-bit number for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2


def no_text(sample: ImageText, rng: Random) -> str:
    """For what is trained on pictures alone."""
    return ""


def prompt_columns(prompt: str) -> list[str]:
    """The columns that a sentence names in braces: ``style`` in ``"* in the style of {style}"``."""
    return [name for _, name, _, _ in Formatter().parse(prompt) if name]


def fill_prompt(prompt: str, row: dict[str, Any]) -> str:
    """A sentence with the row's values in the place of the columns that it names.

    Raises:
        ValueError: there is no such column.
    """
    if lacking := [name for name in prompt_columns(prompt) if name not in row]:
        raise ValueError(
            f"the prompt {prompt!r} names the column {lacking[0]!r}, but the data has only {', '.join(row)}."
        )
    return prompt.format_map(row)


def prompted(prompt: str, sample: ImageText, rng: Random) -> str:
    """The prompt as the text of every sample, see `fill_prompt`."""
    return fill_prompt(prompt, sample.row)


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


def emoji_styled_text(sample: ImageText, rng: Random) -> str:
    """What `emoji_text` draws, and in nine of ten cases the artist: "cat face in the style of noto".

    A variant in a skin tone is always called by its name, which alone says the tone.
    """
    text = sample.row["caption"] if sample.row["skin_tone"] else emoji_text(sample, rng)
    return in_style(text, sample.row["style"]) if rng.random() < 0.9 else text


def emoji_artist(sample: ImageText) -> str:
    """What the artist alone is called: "in the style of noto"."""
    return in_style("", sample.row["style"])


def in_style(text: str, style: str) -> str:
    """A text that asks for an artist, as `emoji_styled_text` does."""
    return f"{text} in the style of {style}".strip()


def emoji_corpus(rows: ImageTextRows, styled: bool = False) -> Iterator[str]:
    """Every text that `emoji_text` (or, `styled`, `emoji_styled_text`) can draw from."""
    for row in rows.dataset.select_columns(["caption", "tags", "subgroup", "style"]):
        text = ", ".join([row["caption"], *row["tags"], row["subgroup"].replace("-", " ")])
        yield in_style(text, row["style"]) if styled else text


def find_id_column(names: Iterable[str]) -> str | None:
    """The column that identifies a row, if one has a usual name."""
    return next((name for name in ID_COLUMNS if name in names), None)


def _find_column(names: Sequence[str], wanted: str | None, usual: Iterable[str], argument: str) -> str:
    if wanted in names:
        return wanted
    lower = {name.lower(): name for name in names}
    found = [lower[name] for name in usual if name in lower] if wanted is None else []
    if not found:
        missing = f"no column {wanted!r}" if wanted else f"no column with a usual name for {argument}"
        raise ValueError(f"The data has {missing}, only {', '.join(names)}: set {argument} to one of them.")
    return found[0]


def is_missing(value: Any) -> bool:
    """Whether it is what tables have in the place of nothing: None or NaN."""
    return value is None or value != value


def _list_in(text: str) -> Any:
    """The list that a text spells, or the text."""
    if not text.lstrip().startswith("["):
        return text
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text


def _file_of(picture: Any) -> str | None:
    """The path of a picture that is given by its path alone."""
    if isinstance(picture, dict) and not picture.get("bytes"):
        picture = picture.get("path")
    return picture if isinstance(picture, str) and picture else None


def _open(args: DataArguments, split: str, streaming: bool) -> tuple[Any, Columns]:
    if args.source == "emoji":
        from .emoji import load_emoji

        if args.config_name not in (None, STYLED):
            raise ValueError(
                f"The bundled pictures have no subset {args.config_name!r}: leave it out or take {STYLED!r}."
            )
        styled = args.config_name == STYLED
        dataset = load_emoji(split, skin_tones=styled, normalize_size=True)
        # Another artist's drawing of the same thing is a wrong answer to a text that names the artist.
        columns = Columns("image", "caption", group=None if styled else "hexcode")
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    else:
        dataset, folder = _load(args, split, streaming)
        columns = Columns.find(_column_names(dataset, args.source), args, folder)
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
    return dataset, columns


def _column_names(dataset: Any, source: str) -> list[str]:
    names = dataset.column_names or list(next(iter(dataset), ()))
    if not names:
        raise ValueError(f"{source} has no rows.")
    return names


def _load(args: DataArguments, split: str, streaming: bool) -> tuple[Any, Path | None]:
    """The rows of a source, and the folder that its file names are relative to."""
    path = Path(args.source).expanduser()
    if path.is_dir():
        return _load_folder(args, path, split, streaming)
    if files := _matching_files(args.source if "://" in args.source else str(path)):
        if split != "train":
            raise ValueError(f"{args.source} has no split {split!r}: files have splits only in a folder.")
        return _load_files(args, files, streaming)
    if args.source.startswith((".", "/", "~")) or path.suffix in (*TABLES, ".tar") or len(path.parts) > 2:
        raise ValueError(f"{args.source} does not exist.")
    return _load_repository(args.source, split, streaming, args.config_name)


def _matching_files(pattern: str) -> list[str]:
    """The file of this name or address, or those that a pattern of ``*``, ``?``, ``[]`` or ``{000..123}`` names."""
    if numbers := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = numbers.groups()
        counted = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
        return [pattern.replace(numbers[0], number) for number in counted]
    return [pattern] if "://" in pattern or Path(pattern).is_file() else sorted(glob(pattern))


def _load_folder(args: DataArguments, path: Path, split: str, streaming: bool) -> tuple[Any, Path | None]:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        with _in_one_sentence(f"{path} cannot be loaded as a saved dataset"):
            saved = load_from_disk(str(path))
        dataset = _one_split(saved, split, str(path))
        return (dataset.to_iterable_dataset() if streaming else dataset), None
    if (path / split).is_dir():
        return _load_flat_folder(args, path / split, streaming)
    if files := _first_match(path, [f"{split}{pattern}" for pattern in ("*.tar", *TABLE_PATTERNS)]):
        return _load_files(args, files, streaming)
    if split != "train":
        return _load_repository(str(path), split, streaming)
    return _load_flat_folder(args, path, streaming)


def _load_flat_folder(args: DataArguments, root: Path, streaming: bool) -> tuple[Any, Path | None]:
    """A folder without splits: a table of the pictures, shards, pictures with texts beside them, or other tables."""
    if files := _first_match(root, [*METADATA_FILES, "*.tar"]):
        return _load_files(args, files, streaming)
    pictures = sorted(file for file in root.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
    captions = [_captions_beside(picture) for picture in pictures]
    if any(captions) or (pictures and not args.needs_captions):
        names = [picture.relative_to(root).as_posix() for picture in pictures]
        dataset = Dataset.from_dict({"image": names, "captions": captions})
        return (dataset.to_iterable_dataset() if streaming else dataset), root
    if files := _first_match(root, TABLE_PATTERNS):
        return _load_files(args, files, streaming)
    if pictures:
        raise ValueError(
            f"The pictures of {root} have no captions: add a metadata.csv with the columns file_name and caption, "
            "or a .txt file beside each picture."
        )
    return _load_repository(str(root), "train", streaming)


def _first_match(root: Path, patterns: Iterable[str]) -> list[str]:
    """The files of the first pattern that has some."""
    matches = (sorted(map(str, root.glob(pattern))) for pattern in patterns)
    return next(filter(None, matches), [])


def _captions_beside(picture: Path) -> list[str]:
    """The lines of the .txt file with the picture's name."""
    text = picture.with_suffix(".txt")
    return [line for line in text.read_text("utf-8", "replace").splitlines() if line.strip()] if text.exists() else []


def _load_files(args: DataArguments, files: list[str], streaming: bool) -> tuple[Any, Path | None]:
    suffix = Path(files[0]).suffix.lower()
    if suffix == ".tar":
        with _in_one_sentence(f"{args.source} cannot be read as webdataset"):
            return load_shards(files, args.image_column, args.caption_column, args.group_column, streaming), None
    builder = TABLES.get(suffix)
    if builder is None:
        raise ValueError(
            f"{args.source} is none of {', '.join(TABLES)} or .tar, nor a folder: it cannot be read as pictures with "
            "texts."
        )
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    data_files = {"train": [file if "://" in file else escape(file) for file in files]}
    with _in_one_sentence(f"{args.source} cannot be read as {builder}"):
        dataset = load_dataset(builder, data_files=data_files, split="train", streaming=streaming, **options)
    return dataset, Path(files[0]).parent


def _load_repository(source: str, split: str, streaming: bool, config_name: str | None = None) -> tuple[Any, None]:
    """A dataset of the Hub, or a folder laid out like one."""
    what = "a dataset that can be loaded" if Path(source).is_dir() else "a file, a folder, or a dataset of the Hub"
    with _in_one_sentence(f"{source} is not {what}"):
        datasets = load_dataset(source, config_name, streaming=streaming)
    return _one_split(datasets, split, source), None


def _one_split(dataset: Any, split: str, source: str) -> Any:
    splits = dataset if isinstance(dataset, (DatasetDict, IterableDatasetDict)) else {"train": dataset}
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}: it has {', '.join(splits)}.")
    return splits[split]


@contextmanager
def _in_one_sentence(what: str) -> Iterator[None]:
    """Turns whatever `datasets` raises into `what` and the first line of the cause."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise ValueError(f"{what}: {reason}") from error
