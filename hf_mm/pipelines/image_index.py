"""An index of pictures: their embeddings on disk, searched exactly."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..composite.fingerprint import fingerprint
from ..data.features import feature_spec
from ..evaluation.embeddings import embed_images
from ..image_utils import AnyPictureMixin, to_rgb
from .nearest import largest_products, precise_products
from .picture_source import OWN_COLUMNS, PictureSource, row_features

logger = logging.get_logger(__name__)

DESCRIPTION_FILE = "index.json"
ROWS_FILE = "rows.arrow"
DESCRIBED = ("model", "fingerprint", "config", "dtype", "image_processor")
FORMAT = 1
BATCH_BYTES = 2**25  # of a batch of rows in the file: a batch is multiplied in one piece
BACKEND_SETTINGS = ("image_processor_type", "processor_class", "auto_map")
SPARE = 16  # candidates beyond those asked for
DOUBT = 1e-5  # more than float32 products of unit vectors are off by


class ImageIndex:
    """Pictures with their embeddings, searched by inner product.

    The pictures are rows of a `datasets` dataset, memory-mapped from disk. The search is exact and gives the same rows
    with or without faiss: either finds candidates in float32, and their products, summed in float64, decide; equal ones
    keep the order of the rows.

    Args:
        dataset: columns `id` (unique), `image` (``{"bytes", "path"}``: the encoded picture, or where its file is, or
            neither), `content` (see `picture_source.content_key`), `embedding` (D float32 of unit length), and any others.
        description: which model the embeddings are of; see `describe`.

    Attributes:
        uses_faiss: search through faiss, which takes a copy of the embeddings; set where it is installed.
        skipped: id to reason of the pictures that could not be read when they were added.
    """

    def __init__(self, dataset: Dataset, description: dict[str, Any]):
        self.dataset, self.description = dataset, description
        self.uses_faiss = importlib.util.find_spec("faiss") is not None
        self.skipped: dict[str, str] = {}
        self._temporary: list[tempfile.TemporaryDirectory] = []
        self._forget()

    @classmethod
    def build(
        cls,
        model: nn.Module,
        processor: Any,
        images: Any,
        ids: Sequence[Any] | None = None,
        batch_size: int = 64,
        progress: bool = True,
        keep_pictures: bool = True,
    ) -> ImageIndex:
        """Embeds pictures. One batch of them is in memory at a time; what is kept goes to a temporary file.

        Args:
            model: has `get_image_features`.
            processor: turns ``images=`` into `pixel_values`.
            images: a list of pictures (see `hf_mm.image_utils.to_rgb`), a folder of picture files, or a `datasets`
                dataset with a column of pictures, whose other columns come along.
            ids: of the pictures. By default the id column of a dataset, the path of a file, relative to the folder
                where one is given, and otherwise the number of the picture.
            batch_size: pictures per forward pass.
            progress: show a bar.
            keep_pictures: keep pictures that are given in memory, as they are encoded or as PNG. Of a file only the
                path is kept in any case.

        Raises:
            ValueError: there are no pictures, none can be read, or two have the same id.
            FileNotFoundError: the folder does not exist.
        """
        source = PictureSource(images, ids)
        description = describe(model, processor)
        rows = _NewRows(source, model, processor, batch_size, progress, keep_pictures)
        index = cls(rows.dataset, description)
        index._take_note_of(rows)
        return index

    @classmethod
    def open(cls, folder: str | PathLike) -> ImageIndex:
        """Opens a saved index; embeddings and pictures stay on disk until they are needed.

        Raises:
            FileNotFoundError: there is no index in the folder.
            ValueError: it is damaged, or of a later format.
        """
        folder = Path(folder)
        if not (folder / DESCRIPTION_FILE).is_file():
            raise FileNotFoundError(
                f"{folder} is not an index of pictures: it has no {DESCRIPTION_FILE}; ImageIndex.build makes one."
            )
        try:
            description = json.loads((folder / DESCRIPTION_FILE).read_text(encoding="utf-8"))
            written = description["format"]
            if written == FORMAT and (lacking := [name for name in DESCRIBED if name not in description]):
                raise ValueError(f"{DESCRIPTION_FILE} has no {lacking[0]}")
            dataset = Dataset.from_file(str(folder / ROWS_FILE)) if written == FORMAT else None
        except Exception as error:  # datasets raises anything at a damaged file
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"the index {folder} cannot be read ({reason}): build it again.") from error
        if dataset is None:
            raise ValueError(
                f"the index {folder} is of format {written}, not {FORMAT}: update hf_mm or build it again."
            )
        if not set(OWN_COLUMNS) <= set(dataset.column_names):
            raise ValueError(f"the index {folder} lacks some of the columns {', '.join(OWN_COLUMNS)}: build it again.")
        return cls(dataset, description)

    def save(self, folder: str | PathLike) -> None:
        """Writes the index to a folder, in place of an index that was there, and goes on from the written files.

        Raises:
            FileExistsError: the folder holds something else, or something beside an index.
        """
        folder = Path(folder)
        if folder.exists() and (folder.is_file() or (any(folder.iterdir()) and not _is_index_alone(folder))):
            raise FileExistsError(f"{folder} exists and is not an index of pictures alone: choose another folder.")
        with _written_aside(folder) as aside:
            _write_rows(self.dataset, aside / ROWS_FILE)
            text = json.dumps(self.description, indent=1, ensure_ascii=False)
            (aside / DESCRIPTION_FILE).write_text(text + "\n", encoding="utf-8")
        self.dataset = Dataset.from_file(str(folder / ROWS_FILE))
        self._temporary.clear()
        self._forget()

    def append(
        self,
        model: nn.Module,
        processor: Any,
        images: Any,
        ids: Sequence[Any] | None = None,
        batch_size: int = 64,
        progress: bool = True,
        keep_pictures: bool = True,
    ) -> None:
        """Adds pictures at the end; see `build`. Nothing is added if anything fails. `save` writes it down.

        Raises:
            ValueError: also where an id is in the index already, the other columns of a dataset are not those of the
                index, or the model is another one (see `check`).
        """
        self.check(model, processor)
        source = PictureSource(images, ids, known=self.rows_by_id)
        own = {name: kind for name, kind in self.dataset.features.items() if name not in OWN_COLUMNS}
        if source.features != own:
            raise ValueError(
                f"the pictures come with the columns {list(source.features)}, those of the index with {list(own)}: "
                "give the same columns, of the same types."
            )
        rows = _NewRows(source, model, processor, batch_size, progress, keep_pictures)
        self.dataset = concatenate_datasets([self.dataset, rows.dataset])
        self._take_note_of(rows)
        self._forget()

    def check(self, model: nn.Module, processor: Any) -> None:
        """Refuses a model or a processor that would embed pictures otherwise than those of the index.

        Raises:
            ValueError: other weights (a model of another width has such), another dtype, or other settings of the model
                or of the image processor.
        """
        of_index, of_model = self.description, describe(model, processor)
        built = f"the index was built with {of_index['model'] or 'a model without a name'}"
        if of_index["dtype"] != of_model["dtype"]:
            raise ValueError(
                f"{built} in {of_index['dtype']}, and this model is in {of_model['dtype']}: open it with the index's "
                "dtype or build the index again."
            )
        if of_index["fingerprint"] != of_model["fingerprint"]:
            raise ValueError(
                f"{built}, whose weights are not those of {of_model['model'] or 'this model'}: open the index with the "
                "model that built it, or build it again."
            )
        for name, what in (("config", "model"), ("image_processor", "image processor")):
            if told := list(_differences(of_index[name], of_model[name])):
                raise ValueError(
                    f"{built} and other settings of the {what} ({', '.join(told)}): use the same, or build it again."
                )

    def search(
        self, queries: torch.Tensor, k: int, exclude: Sequence[Sequence[str]] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The pictures whose embeddings are most alike.

        Args:
            queries: ``(Q, D)``, of any length and dtype: they are scaled to unit length in float32.
            k: pictures per query.
            exclude: ids that each query leaves out.

        Returns:
            Cosines ``(Q, k')`` float32, descending, and rows ``(Q, k')`` int64 on the CPU, k' = min(k, pictures). Where
            a query leaves out so many that too few remain, the last rows are -1 and their scores -inf.

        Raises:
            ValueError: k is not positive, the queries are of another width, not finite or zero, or an excluded id is
                not in the index.
        """
        if k < 1:
            raise ValueError(f"k is {k}: ask for at least one picture.")
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise ValueError(
                f"queries are of shape {tuple(queries.shape)}: the embeddings of the index are (n, {self.width})."
            )
        queries = queries.detach().to("cpu", torch.float32)
        norms = queries.norm(dim=-1, keepdim=True)
        if not (norms.isfinite() & (norms > 0)).all():
            raise ValueError("a query is zero, NaN or infinite: it has no direction to search in.")
        queries = queries / norms
        excluded = self._rows_to_exclude(exclude, queries.shape[0])
        k = min(k, len(self))
        scores = torch.full((queries.shape[0], k), -torch.inf)
        rows = torch.full((queries.shape[0], k), -1)
        pending, spare = torch.arange(queries.shape[0]), SPARE
        while pending.shape[0]:
            wanted = k + excluded.shape[1]
            count = min(len(self), wanted + spare)
            near, candidates = self._candidates(queries[pending], count)
            unsure = near[:, min(wanted, count) - 1] - near[:, -1] <= DOUBT
            sure = ~unsure if count < len(self) else torch.ones_like(unsure)
            done = pending[sure]
            scores[done], rows[done] = self._decide(queries[done], candidates[sure], excluded[done], k)
            pending, spare = pending[~sure], 8 * spare
        return scores, rows

    def describe_row(self, row: int) -> dict[str, Any]:
        """What the index holds of a picture: `row`, `id`, `image` and the other columns.

        `image` is the picture where it is kept, in RGB, else the path of its file, else None.
        """
        found = self.dataset[row]
        image = found["image"]
        others = {name: value for name, value in found.items() if name not in OWN_COLUMNS}
        return {"row": row, "id": found["id"], "image": to_rgb(image) if image["bytes"] else image["path"], **others}

    def ids_of(self, content: str) -> list[str]:
        """The ids of the pictures with this content; see `picture_source.content_key`."""
        if self._ids_by_content is None:
            self._ids_by_content = {}
            for name, key in zip(self.ids, self.dataset["content"][:], strict=True):
                self._ids_by_content.setdefault(key, []).append(name)
        return self._ids_by_content.get(content, [])

    @property
    def ids(self) -> list[str]:
        """Of all pictures, in the order of the rows."""
        return list(self.rows_by_id)

    @property
    def rows_by_id(self) -> dict[str, int]:
        if self._rows_by_id is None:
            self._rows_by_id = {name: row for row, name in enumerate(self.dataset["id"][:])}
        return self._rows_by_id

    @property
    def width(self) -> int:
        """Of the embeddings."""
        return self.dataset.features["embedding"].length

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return f"ImageIndex({len(self)} pictures, width {self.width}, {self.description['model']})"

    def _take_note_of(self, rows: _NewRows) -> None:
        self.skipped |= rows.skipped
        self._temporary.append(rows.folder)

    def _forget(self) -> None:
        """Drops what was derived from the dataset."""
        self._rows_by_id: dict[str, int] | None = None
        self._ids_by_content: dict[str, list[str]] | None = None
        self._pieces: list[np.ndarray] | None = None
        self._faiss: Dataset | None = None

    def _rows_to_exclude(self, exclude: Sequence[Sequence[str]] | None, num_queries: int) -> torch.Tensor:
        """``(Q, most)`` rows, filled with -1."""
        exclude = [[]] * num_queries if exclude is None else exclude
        if len(exclude) != num_queries or any(isinstance(names, str) for names in exclude):
            raise ValueError(f"exclude must hold one list of ids for each of the {num_queries} queries.")
        unknown = [name for names in exclude for name in names if name not in self.rows_by_id]
        if unknown:
            raise ValueError(f"the index has no picture {unknown[0]!r} to exclude.")
        rows = [sorted({self.rows_by_id[name] for name in names}) for names in exclude]
        most = max(map(len, rows), default=0)
        padded = [own + [-1] * (most - len(own)) for own in rows]
        return torch.tensor(padded, dtype=torch.int64).view(num_queries, most)

    def _candidates(self, queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `count` rows with the largest products, as far as float32 tells; with these, descending."""
        if not self.uses_faiss:
            return largest_products(queries, self._matrix(), count)
        if self._faiss is None:
            import faiss

            self._faiss = self.dataset.select_columns(["embedding"])
            self._faiss.add_faiss_index("embedding", metric_type=faiss.METRIC_INNER_PRODUCT)
        found = self._faiss.search_batch("embedding", queries.numpy(), k=count)
        return torch.from_numpy(np.asarray(found.total_scores)), torch.from_numpy(np.asarray(found.total_indices))

    def _decide(
        self, queries: torch.Tensor, candidates: torch.Tensor, excluded: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best k candidates by their precise products, equal ones by row."""
        candidates = candidates.sort(dim=1).values
        scores = precise_products(queries, self._matrix(), candidates)
        out = (candidates[:, :, None] == excluded[:, None, :]).any(-1)
        scores, candidates = scores.masked_fill(out, -torch.inf), candidates.masked_fill(out, -1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return scores[:, :k], candidates.gather(1, order)[:, :k]

    def _matrix(self) -> list[np.ndarray]:
        """The embeddings where Arrow holds them, piece by piece, without a copy."""
        if self._pieces is None:
            chunks = (chunk.flatten() for chunk in self.dataset.data.column("embedding").chunks if len(chunk))
            self._pieces = [chunk.to_numpy(zero_copy_only=True).reshape(-1, self.width) for chunk in chunks]
        return self._pieces


def describe(model: nn.Module, processor: Any) -> dict[str, Any]:
    """What decides how a model embeds pictures, as JSON: its frozen weights and config, its dtype, and the image processor.

    Of a composite with a `clip`, that alone counts: what was trained on top embeds no pictures.
    """
    encoder = getattr(model, "clip", model)
    spec = feature_spec(encoder, processor, fingerprint(encoder), "image_embeds")
    return {
        "format": FORMAT,
        "model": str(getattr(getattr(model, "config", None), "_name_or_path", "") or ""),
        "fingerprint": spec.fingerprint,
        "config": spec.config,
        "dtype": str(model.dtype).removeprefix("torch."),
        "image_processor": {
            name: value
            for name, value in spec.preprocessing.items()
            if name not in BACKEND_SETTINGS and value is not None
        },
    }


def _differences(ours: dict[str, Any], others: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted({*ours, *others}):
        there, here = ours.get(name), others.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{prefix}{name}.")
        elif there != here:
            yield f"{prefix}{name} {there!r} there, {here!r} here"


def _is_index_alone(folder: Path) -> bool:
    """Whether a folder holds an index, whole or damaged, and nothing else, so that another may take its place."""
    return {path.name for path in folder.iterdir()} == {DESCRIPTION_FILE, ROWS_FILE}


def _write_rows(dataset: Dataset, file: Path) -> None:
    """Writes the rows in batches of `BATCH_BYTES`; `save_to_disk` writes a hundred rows at a time."""
    rows = max(BATCH_BYTES * len(dataset) // max(dataset.data.nbytes, 1), 1)
    with ArrowWriter(path=str(file), features=dataset.features) as writer:
        for batch in dataset.with_format("arrow").iter(rows):
            writer.write_table(batch, writer_batch_size=rows)
        writer.finalize()


class _NewRows:
    """Embeds pictures, a batch in memory at a time, into a temporary file of rows.

    Attributes:
        dataset: the rows, memory-mapped.
        skipped: id to reason of pictures that could not be read.
        folder: of the file; it is removed with this object.
    """

    def __init__(
        self,
        source: PictureSource,
        model: nn.Module,
        processor: Any,
        batch_size: int,
        progress: bool,
        keep_pictures: bool,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: it must be at least 1.")
        self.skipped: dict[str, str] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="hf_mm_index_")
        path, writer, total = str(Path(self.folder.name, "rows.arrow")), None, len(source.ids)
        as_rgb = not isinstance(getattr(processor, "image_processor", processor), AnyPictureMixin)
        try:
            with tqdm(total=total, unit=" pictures", disable=not progress) as bar:
                for start in range(0, total, batch_size):
                    numbers = range(start, min(start + batch_size, total))
                    read = list(source.readable(numbers, as_rgb, keep_pictures, self.skipped))
                    if read:
                        pictures = [picture.image for picture in read]
                        embeddings = embed_images(model, processor, pictures, batch_size, progress=False)
                        if not embeddings.isfinite().all():
                            raise ValueError("an embedding holds NaN or infinity: the model's outputs are broken.")
                        features = row_features(embeddings.shape[1], source.features)
                        writer = writer or ArrowWriter(path=path, features=features)
                        writer.write_table(source.table(read, embeddings, features))
                    bar.update(len(numbers))
        finally:
            if writer is not None:
                writer.finalize()
        self._report(total)
        self.dataset = Dataset.from_file(path)

    def _report(self, total: int) -> None:
        if not self.skipped:
            return
        name, reason = next(iter(self.skipped.items()))
        if len(self.skipped) == total:
            raise ValueError(f"none of the {total} pictures can be read; {name}: {reason}")
        logger.warning(f"{len(self.skipped)} of {total} pictures cannot be read and are left out; {name}: {reason}")


@contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of the one named at the end, or is removed if anything fails."""
    target = folder.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside, earlier = (target.parent / f".{target.name}-{uuid.uuid4().hex[:8]}" for _ in range(2))
    try:
        aside.mkdir()
        yield aside
        if target.exists():
            os.replace(target, earlier)
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if earlier.exists() and not target.exists():
            os.replace(earlier, target)
        shutil.rmtree(earlier, ignore_errors=True)
