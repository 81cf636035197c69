"""Features of frozen towers, computed once: a store on disk that training reads in place of pictures.

A store is a folder:

- ``index.json`` says what the features are: a `FeatureSpec`.
- ``000000-<digest>.safetensors`` is a shard: one tensor ``features`` of ``(rows, ...)``.
- ``000000-<digest>.json`` lists its keys, its checksum, and the pictures that could not be read. A shard without it does
  not count: it is written last, and every file is written aside and renamed.

A key stands for one picture, or for one view of it (`view_key`). Keys are the user's own ids, or `picture_key`, which
changes when the picture does.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import WeakFileLock
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import distributed as dist
from tqdm.auto import tqdm
from transformers.utils import logging

from ..files import ASIDE, flush, write_json
from ..image_utils import load_picture, to_rgb
from .image_text import BrokenRow, ImageTextRows
from .sampling import Draw

logger = logging.get_logger(__name__)

FORMAT = 1
INDEX = "index.json"
SHARD_BYTES = 256 * 2**20
SHARD_ROWS = 8192
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Fields of a config that say nothing about what a tower computes.
BOOKKEEPING = (
    *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype", "return_dict"),
    *("id2label", "label2id", "problem_type", "output_hidden_states", "output_attentions"),
)


class DamagedStore(ValueError):
    """Shards of a store are cut short, missing or changed; the message names them."""


@dataclass(frozen=True)
class FeatureSpec:
    """What features are: equal specs mean equal features. See `feature_spec`.

    Attributes:
        fingerprint: of the tower's weights, see `hf_mm.composite.fingerprint`.
        config: the tower's fields that are no defaults: the same weights with another activation are another tower.
        features: what was taken, such as ``"image_embeds"`` or ``"layer -2 without class token"``.
        preprocessing: all settings of the image processor.
        dtype: of the stored numbers: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"float64"``.
        view: ``"center"``, or in words the augmentation whose views are stored.
        tower: name or folder. For people: the same weights may lie in several places, so it is not compared.
        revision: commit on the Hub. For people, like `tower`.
    """

    fingerprint: str
    config: dict[str, Any]
    features: str
    preprocessing: dict[str, Any]
    dtype: str = "float32"
    view: str = "center"
    tower: str = field(default="", compare=False)
    revision: str | None = field(default=None, compare=False)

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")
        for name in ("config", "preprocessing"):
            object.__setattr__(self, name, json.loads(json.dumps(getattr(self, name))))

    @property
    def digest(self) -> str:
        """12 hexadecimal digits of what is compared: a name of the folder, where one holds several stores."""
        return _digest(json.dumps(self._compared(), sort_keys=True))[:12]

    def difference(self, other: FeatureSpec) -> str | None:
        """The first thing that differs, in words, or None."""
        return _difference(self._compared(), other._compared())

    def _compared(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("tower", "revision")}


def feature_spec(
    model: Any, image_processor: Any, fingerprint: str, features: str, dtype: str = "float32", view: str = "center"
) -> FeatureSpec:
    """The spec of what a model computes from pictures.

    Args:
        model: whose `config` decides the features: the frozen tower, say. It has a `name_or_path` where it was loaded.
        image_processor: of the model, or a processor that has one.
        fingerprint: of the frozen weights that the features depend on, see `hf_mm.composite.fingerprint`.
        features, dtype, view: see `FeatureSpec`.
    """
    image_processor = getattr(image_processor, "image_processor", image_processor)
    settings = json.loads(image_processor.to_json_string())
    return FeatureSpec(
        fingerprint=fingerprint,
        config=_without(json.loads(model.config.to_json_string(use_diff=True)), BOOKKEEPING),
        features=features,
        preprocessing=_without(settings, ("processor_class", "_processor_class", "auto_map")),
        dtype=dtype,
        view=view,
        tower=getattr(model, "name_or_path", "") or type(model).__name__,
        revision=getattr(model.config, "_commit_hash", None),
    )


def picture_key(picture: Any) -> str:
    """A key that changes when the picture does; 32 hexadecimal digits.

    Args:
        picture: a path (its place, size and time of change count, not its bytes: cheap also for millions), a URL, the
            bytes of an image file, a ``{"bytes": ..., "path": ...}`` dict, a PIL image, or an array (whose pixels
            count).

    Raises:
        FileNotFoundError: the path names no file.
        ValueError, TypeError: this is not a picture.
    """
    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, str) and picture.startswith(("http://", "https://", "data:")):
        return _digest("address", picture)
    if isinstance(picture, (str, Path)):
        if not Path(picture).is_file():
            raise FileNotFoundError(f"There is no image file at '{picture}'.")
        stat = os.stat(picture)
        return _digest("file", os.path.realpath(picture), stat.st_size, stat.st_mtime_ns)
    if isinstance(picture, (bytes, bytearray)):
        return _digest("bytes", bytes(picture))
    if isinstance(picture, Image.Image):
        picture = load_picture(picture)
    if isinstance(picture, Image.Image):
        palette = bytes(picture.getpalette() or ()) + str(picture.info.get("transparency")).encode()
        return _digest("image", picture.mode, picture.size, palette, picture.tobytes())
    if isinstance(picture, torch.Tensor):
        tensor = picture.detach().cpu().contiguous()
        return _digest("tensor", tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy())
    if isinstance(picture, np.ndarray) and picture.dtype.kind in "buif":
        return _digest("array", picture.dtype, picture.shape, np.ascontiguousarray(picture).tobytes())
    to_rgb(picture)  # raises: this is not a picture
    raise TypeError(f"A {type(picture).__name__} has no key: give a PIL image, an array, a path, or bytes.")


def row_keys(rows: ImageTextRows) -> list[str]:
    """The `picture_key` of every row, without decoding a picture; a row without a picture has its name for one."""
    keys = []
    for number, row in zip(rows.numbers, rows.dataset.select_columns([rows.columns.image]), strict=True):
        try:
            keys.append(picture_key(rows.columns.picture(row)))
        except (OSError, TypeError, ValueError):
            keys.append(rows.columns.image_id(row, number))
    return keys


def view_key(key: str, view: int) -> str:
    """The key of one of several views of a picture, counted from 0; `FeatureRows` reads them in turn."""
    return f"{key}#{view}"


class FeatureStore:
    """Stored features, memory-mapped: what is read is in memory, not what is stored.

    Opened by `FeatureStore.open` or `compute_features`; ``store[key]`` is one row, `rows` are many by number.

    Attributes:
        folder: where it lies.
        spec: what the features are.
        keys: of the rows, in the order of their numbers.
        skipped: keys of pictures that could not be read; what each is called, and why.
        shape: of one row.
    """

    def __init__(self, folder: Path, spec: FeatureSpec, shards: Sequence[_Shard]):
        self.folder, self.spec = folder, spec
        self.shards = [shard for shard in shards if shard.keys]
        self.keys = [key for shard in self.shards for key in shard.keys]
        self.shape = self.shards[0].shape if self.shards else None
        self.starts = np.cumsum([0, *(len(shard.keys) for shard in self.shards)]).tolist()
        self._numbers = {key: number for number, key in reversed(list(enumerate(self.keys)))}
        tried = {key: reason for shard in shards for key, reason in shard.skipped.items()}
        self.skipped = {key: reason for key, reason in tried.items() if key not in self._numbers}
        self._maps: dict[int, torch.Tensor] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike, spec: FeatureSpec | None = None, verify: bool = False) -> FeatureStore:
        """Opens a store to read.

        Args:
            folder: of the store.
            spec: the features that are wanted; by default whatever is stored.
            verify: compare the checksum of every shard, which reads the whole store, beside its size.

        Raises:
            FileNotFoundError: the folder is no store.
            ValueError: it holds features of another spec; the message names the first field that differs.
            DamagedStore: a shard is damaged.
        """
        folder = Path(folder)
        stored, shards, damaged = _scan(folder, verify)
        if stored is None:
            raise FileNotFoundError(f"{folder} is no store of features: it has no {INDEX}.")
        _refuse_another(folder, stored, spec)
        if damaged:
            names = ", ".join(f"{shard.name} ({reason})" for shard, reason in damaged)
            raise DamagedStore(
                f"{folder} is damaged: {names}; compute_features with the same pictures and verify=True mends it."
            )
        return cls(folder, stored, shards)

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: str) -> bool:
        return key in self._numbers

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.rows(self.index_of([key]))[0]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.spec.dtype]

    def index_of(self, keys: Iterable[str]) -> list[int]:
        """The numbers of the rows with these keys.

        Raises:
            KeyError: a key is not stored; the message says why, where its picture could not be read.
        """
        numbers = []
        for key in keys:
            if key not in self._numbers:
                reason = f"its picture could not be read ({self.skipped[key]})" if key in self.skipped else ""
                raise KeyError(
                    f"{self.folder} has no features of {key!r}: {reason or 'compute_features adds those of more pictures'}."
                )
            numbers.append(self._numbers[key])
        return numbers

    def rows(self, numbers: Sequence[int]) -> torch.Tensor:
        """``(n, *shape)``: a copy of the rows with these numbers, in their order; one may be asked for twice.

        Raises:
            IndexError: there is no such row.
        """
        numbers = np.asarray(numbers, dtype=np.int64)
        if not self.shards:
            raise IndexError(f"{self.folder} has no rows.")
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"rows are numbered 0 to {len(self) - 1}, not {numbers.min()} to {numbers.max()}.")
        out = torch.empty(len(numbers), *self.shape, dtype=self.dtype)
        order = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[order], self.starts)
        for index in np.flatnonzero(np.diff(bounds)):
            places = order[bounds[index] : bounds[index + 1]]
            local = torch.from_numpy(numbers[places] - self.starts[index])
            if len(places) == len(numbers):
                out = self._map(index)[torch.from_numpy(numbers - self.starts[index])]
            else:
                out[torch.from_numpy(places)] = self._map(index)[local]
        return out

    def _map(self, index: int) -> torch.Tensor:
        """The tensor of a shard, whose pages are read from the disk as they are touched."""
        if index not in self._maps:
            file = self.folder / self.shards[index].file
            try:
                with safe_open(file, "pt") as opened:
                    self._maps[index] = opened.get_tensor("features")
            except (OSError, SafetensorError) as error:
                raise DamagedStore(f"{file} cannot be read ({error}): compute_features mends it.") from error
        return self._maps[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # another process maps the files itself


def compute_features(
    encode: Callable[[list[Any]], torch.Tensor],
    pictures: Sequence[Any],
    keys: Sequence[str],
    spec: FeatureSpec,
    folder: str | os.PathLike,
    batch_size: int = 64,
    shard_rows: int | None = None,
    max_bytes: int | None = None,
    strict: bool = False,
    verify: bool = False,
    progress: bool = True,
) -> FeatureStore:
    """Computes the features that a store does not have yet.

    Killed at any point, the same call goes on after the last whole shard and ends with the same files. A picture that
    cannot be read is left out, reported in `FeatureStore.skipped`, and tried again by the next call. In memory are one
    batch of pictures and one shard of features.

    Under `torch.distributed` every rank must call this with the same pictures and a folder that all see; each computes
    its share of the shards, and all return the whole store. Of two runs that share a folder, and the place for temporary
    files, the second waits and then computes what the first did not; others must not write to one folder at a time.

    Args:
        encode: from a list of pictures to ``(b, ...)``, run without gradients; the tower should be in eval mode.
        pictures: any sequence, read one batch at a time. Paths, bytes and the dicts of `datasets` arrive at `encode` as
            RGB PIL images, all else as it is. Reading one may raise `BrokenRow`, as `ImageTextRows` does.
        keys: of the pictures; equal keys are computed once.
        spec: what the features are, see `feature_spec`.
        folder: of the store, made if need be.
        batch_size: pictures that `encode` gets at a time.
        shard_rows: pictures of a shard; by default as many as 256 MiB of features, and no more than 8192.
        max_bytes: bound of the whole store.
        strict: raise at a picture that cannot be read.
        verify: compare the checksums of the shards that are there, beside their sizes.
        progress: show a bar.

    Raises:
        ValueError: the folder holds features of another spec; keys and pictures are not equally many; the features
            would not fit into `max_bytes` or on the disk (the message tells their size, nothing has been computed but
            one picture's); a feature is not finite; `encode` returns something else than one row a picture; no
            picture can be read.
        BrokenRow: a picture cannot be read (`strict`).
        OSError: a shard cannot be written; those before it are whole.
    """
    folder = Path(folder)
    if len(pictures) != len(keys):
        raise ValueError(f"there are {len(pictures)} pictures but {len(keys)} keys: give one key for each picture.")
    if batch_size < 1 or (shard_rows is not None and shard_rows < 1):
        raise ValueError("batch_size and shard_rows must be at least 1.")
    job = _Job(encode, pictures, {}, spec, folder, batch_size, strict)
    for index, key in enumerate(keys):
        job.index_of.setdefault(key, index)

    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with _alone(folder) if rank == 0 else nullcontext():
        plan = _on_first_rank(lambda: job.plan(shard_rows, max_bytes, verify), rank, world_size)
        share = plan[rank::world_size]

        def work() -> None:
            total = sum(len(part.keys) for part in share)
            hidden = not (progress and total) or rank > 0
            with tqdm(total=total, unit=" pictures", desc="Features", disable=hidden) as bar:
                for part in share:
                    job.compute(part, bar)

        _together(work, world_size)
    store = FeatureStore.open(folder, spec)
    if missing := [key for key in job.index_of if key not in store]:
        first = store.skipped[missing[0]]
        if len(missing) == len(job.index_of):
            raise ValueError(f"None of the {len(missing)} pictures can be read; the first: {first}")
        logger.warning(f"{len(missing)} of {len(job.index_of)} pictures cannot be read; the first: {first}")
    return store


class FeatureRows(torch.utils.data.Dataset):
    """Stored features as a training set: ``{"vision_features": tensor, "group": ...}`` for each picture, read
    batch by batch.

    Args:
        store: of the features.
        keys: of the pictures, in the order of the dataset; all of the store's by default.
        views: stored views of each picture (`view_key`). Asked for by `Draw`, an epoch sees one of them and the next
            epoch the next; asked for by a number, the first. 0 for keys without views.
        groups: what each picture shows, see `ImageTextRows.groups`; by default its key.
        texts: a sentence for each picture, given as ``"text"``.

    Raises:
        KeyError: a key is not stored.
        ValueError: views without keys, or not one group for each key.
    """

    def __init__(
        self,
        store: FeatureStore,
        keys: Sequence[str] | None = None,
        views: int = 0,
        groups: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
    ):
        if views and keys is None:
            raise ValueError("keys of the pictures are needed beside views: the store's own are of single views.")
        self.store, self.keys, self.views = store, list(store.keys if keys is None else keys), views
        self.texts = texts
        self.groups = self.keys if groups is None else list(groups)
        if len(self.groups) != len(self.keys):
            raise ValueError(f"there are {len(self.keys)} keys but {len(self.groups)} groups: give one for each key.")
        if views:
            keys_of_views = [view_key(key, view) for key in self.keys for view in range(views)]
            self.numbers = np.reshape(store.index_of(keys_of_views), (-1, views))
        else:
            self.numbers = np.reshape(store.index_of(self.keys), (-1, 1))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, draw: Draw | int) -> dict[str, torch.Tensor]:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw | int]) -> list[dict[str, torch.Tensor]]:
        draws = [draw if isinstance(draw, Draw) else Draw(0, draw) for draw in draws]
        features = self.store.rows([self._number(draw) for draw in draws])
        return [
            {"vision_features": row, "group": self.groups[draw.index]}
            | ({"text": self.texts[draw.index]} if self.texts is not None else {})
            for row, draw in zip(features, draws, strict=True)
        ]

    def _number(self, draw: Draw) -> int:
        views = self.numbers[draw.index]
        return views[(draw.epoch + draw.copy) % len(views)]


@dataclass
class _Shard:
    """What the JSON of a shard says."""

    name: str
    keys: list[str]
    skipped: dict[str, str]
    shape: tuple[int, ...] | None = None
    bytes: int = 0
    checksum: str = ""

    @property
    def number(self) -> int:
        return int(self.name.partition("-")[0])

    @property
    def file(self) -> str:
        return f"{self.name}.safetensors"

    @classmethod
    def read(cls, file: Path) -> _Shard:
        fields = json.loads(file.read_text("utf-8"))
        shape = fields["shape"]
        return cls(**{**fields, "name": file.stem, "shape": shape if shape is None else tuple(shape)})

    def damage(self, folder: Path, verify: bool) -> str | None:
        """What is wrong with its file, or None."""
        if not self.keys:
            return None
        file = folder / self.file
        if not file.is_file():
            return "missing"
        if (size := file.stat().st_size) != self.bytes:
            return f"{size} bytes where {self.bytes} were written"
        return "its checksum differs" if verify and _checksum(file) != self.checksum else None


@dataclass
class _Part:
    """Pictures that will make one shard.

    Attributes:
        shape: of one row; None where no picture can be read.
        again: all have been tried before.
    """

    name: str
    keys: list[str]
    shape: tuple[int, ...] | None = None
    again: bool = False


@dataclass
class _Job:
    """One call of `compute_features`."""

    encode: Callable[[list[Any]], torch.Tensor]
    pictures: Sequence[Any]
    index_of: dict[str, int]
    spec: FeatureSpec
    folder: Path
    batch_size: int
    strict: bool

    def plan(self, shard_rows: int | None, max_bytes: int | None, verify: bool) -> list[_Part]:
        """What is to be computed, after clearing away what is damaged or half-written.

        Pictures are cut into shards in their order, those that could not be read before at the end, so that a call
        that goes on cuts as the one that was killed.
        """
        stored, shards, damaged = _scan(self.folder, verify)
        if shards or damaged:
            _refuse_another(self.folder, stored, self.spec)
        parts = []
        for shard, reason in damaged:
            keys = [key for key in (*shard.keys, *shard.skipped) if key in self.index_of]
            logger.warning(
                f"{self.folder / shard.file} is damaged ({reason}): of its {len(shard.keys)} rows those whose pictures "
                "are given are computed again."
            )
            parts += [_Part(_shard_name(shard.number, keys), keys)] if keys else []
        known = {key for shard in shards for key in shard.keys}
        planned = {key for part in parts for key in part.keys}
        tried = {key for shard in shards for key in shard.skipped} - planned
        missing = [key for key in self.index_of if key not in known and key not in planned]
        fresh, again = ([key for key in missing if (key in tried) is was] for was in (False, True))
        row = self._row_like(shards, (*planned, *missing))
        if row is not None and (count := len(planned) + len(fresh)):
            self._refuse_too_many(row.nbytes, count, shards, max_bytes)

        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear({shard.name for shard in shards})
        if stored != self.spec:
            write_json(self.folder / INDEX, {"format": FORMAT, "spec": asdict(self.spec)})
        row_bytes = 1 if row is None else max(row.nbytes, 1)
        whole_batches = min(SHARD_ROWS, SHARD_BYTES // row_bytes) // self.batch_size * self.batch_size
        rows = shard_rows or max(whole_batches, self.batch_size)
        taken = {shard.number for shard in shards} | {int(part.name.partition("-")[0]) for part in parts}
        free = (number for number in itertools.count() if number not in taken)
        for group, is_again in ((fresh, False), (again, True)):
            for start in range(0, len(group), rows):
                part = group[start : start + rows]
                parts.append(_Part(_shard_name(next(free), part), part, again=is_again))
        for part in parts:
            part.shape = None if row is None else tuple(row.shape)
        return parts

    def compute(self, part: _Part, bar: tqdm) -> None:
        """Computes and writes one shard."""
        skipped: dict[str, str] = {}
        keys, shard = [], None
        for batch_keys, batch in self._batches(part.keys, skipped, bar):
            features = self._encode(batch_keys, batch)
            shape = tuple(features.shape[1:])
            if shape != (part.shape or shape):
                raise ValueError(
                    f"{batch_keys[0]} has features {shape}, others {part.shape}: give pictures of one size."
                )
            if shard is None:
                shard = features.new_empty(len(part.keys), *shape)
            shard[len(keys) : len(keys) + len(batch)] = features
            keys += batch_keys
        if keys or not part.again:
            self._write(part.name, keys, skipped, shard[: len(keys)] if keys else None)

    def _batches(
        self, keys: Sequence[str], skipped: dict[str, str], bar: Any
    ) -> Iterator[tuple[list[str], list[Any]]]:
        good: list[tuple[str, Any]] = []
        for key in keys:
            try:
                good.append((key, self._read(key)))
            except BrokenRow as error:
                if self.strict:
                    raise
                skipped[key] = str(error)
            bar.update()
            if len(good) == self.batch_size:
                yield tuple(map(list, zip(*good, strict=True)))
                good = []
        if good:
            yield tuple(map(list, zip(*good, strict=True)))

    def _read(self, key: str) -> Any:
        picture = self.pictures[self.index_of[key]]
        stored = isinstance(picture, Mapping) and picture.keys() <= {"bytes", "path"}
        if not (stored or isinstance(picture, (str, Path, bytes, bytearray))):
            return picture
        try:
            return to_rgb(picture)
        except (OSError, TypeError, ValueError) as error:
            raise BrokenRow(key, str(error)) from error

    @torch.no_grad()
    def _encode(self, keys: list[str], batch: list[Any]) -> torch.Tensor:
        features = self.encode(batch)
        if not isinstance(features, torch.Tensor) or features.shape[:1] != (len(batch),):
            found = tuple(features.shape) if isinstance(features, torch.Tensor) else f"a {type(features).__name__}"
            raise ValueError(
                f"encode must return a tensor ({len(batch)}, ...) for {len(batch)} pictures, not {found}."
            )
        features = features.detach().to("cpu", DTYPES[self.spec.dtype])
        finite = features.reshape(len(batch), -1).isfinite().all(dim=1)
        if not finite.all():
            raise ValueError(
                f"the features of {keys[int(finite.int().argmin())]} are not finite in {self.spec.dtype}: check the "
                "picture, or compute in float32 and store in a dtype of wider range."
            )
        return features

    def _row_like(self, shards: Sequence[_Shard], keys: Iterable[str]) -> torch.Tensor | None:
        """A tensor of the shape and dtype of one row; None where no picture can be read."""
        shape = next((shard.shape for shard in shards if shard.keys), None)
        if shape is not None:
            return torch.empty(shape, dtype=DTYPES[self.spec.dtype], device="meta")
        for key in keys:
            try:
                return self._encode([key], [self._read(key)])[0]
            except BrokenRow:
                if self.strict:
                    raise
        return None

    def _refuse_too_many(self, row_bytes: int, count: int, shards: Sequence[_Shard], max_bytes: int | None) -> None:
        more, there = count * row_bytes, sum(shard.bytes for shard in shards)
        there_is = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there_is).free
        if max_bytes is not None and there + more > max_bytes:
            raise ValueError(
                f"the features would take {_size(there + more)}, more than max_bytes ({_size(max_bytes)}): allow more, "
                "store fewer pictures or tokens, or in bfloat16."
            )
        if more > free:
            raise ValueError(
                f"{count} pictures need {_size(more)} more, but {self.folder} has {_size(free)} free: choose another "
                "folder, store fewer pictures or tokens, or in bfloat16."
            )

    def _write(self, name: str, keys: list[str], skipped: dict[str, str], features: torch.Tensor | None) -> None:
        shard = _Shard(name, keys, skipped)
        if features is not None:
            file = self.folder / shard.file
            aside = file.with_name(file.name + ASIDE)
            try:
                save_file({"features": features}, aside)
                flush(aside)
            except (OSError, SafetensorError) as error:
                aside.unlink(missing_ok=True)
                raise OSError(
                    f"{file} could not be written ({error}); the shards before it are whole: the same call goes on."
                ) from error
            shard.shape, shard.bytes, shard.checksum = (
                tuple(features.shape[1:]),
                aside.stat().st_size,
                _checksum(aside),
            )
            os.replace(aside, file)
        fields = {key: value for key, value in asdict(shard).items() if key != "name"}
        write_json(self.folder / f"{name}.json", fields, indent=None)

    def _clear(self, names: set[str]) -> None:
        """Takes away what a killed call left, files aside and shards without their JSON, and what is damaged."""
        left = [file for file in self.folder.iterdir() if _is_shard(file.stem) and file.stem not in names]
        # The JSON first: a shard with it counts.
        for file in sorted((*left, *self.folder.glob(f"*{ASIDE}")), key=lambda file: file.suffix != ".json"):
            file.unlink()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process of this machine writes to a store, and keeps others waiting."""
    lock = Path(tempfile.gettempdir()) / "hf_mm-locks" / f"{_digest(os.path.realpath(folder))}.lock"
    with ExitStack() as held:
        with suppress(OSError):  # it is another user's, say
            lock.parent.mkdir(exist_ok=True)
            try:
                held.enter_context(WeakFileLock(lock, timeout=1))
            except TimeoutError:
                logger.warning(f"Waiting for another run that computes the features of {folder}.")
                held.enter_context(WeakFileLock(lock))
        yield


def _scan(folder: Path, verify: bool) -> tuple[FeatureSpec | None, list[_Shard], list[tuple[_Shard, str]]]:
    """The spec of a store (None where there is none), its whole shards, and the damaged ones with what is wrong."""
    index = folder / INDEX
    if not index.is_file():
        return None, [], []
    content = json.loads(index.read_text("utf-8"))
    if content.get("format") != FORMAT or "spec" not in content:
        raise ValueError(f"{index} is no index of features that this version reads: choose another folder.")
    shards, damaged = [], []
    for file in sorted(folder.glob("*.json")):
        if _is_shard(file.stem):
            shard = _Shard.read(file)
            reason = shard.damage(folder, verify)
            damaged += [(shard, reason)] if reason else []
            shards += [] if reason else [shard]
    return FeatureSpec(**content["spec"]), shards, damaged


def _is_shard(stem: str) -> bool:
    return re.fullmatch(r"\d{6,}-[0-9a-f]{8}", stem) is not None


def _shard_name(number: int, keys: Sequence[str]) -> str:
    return f"{number:06d}-{_digest(*keys)[:8]}"


def _refuse_another(folder: Path, stored: FeatureSpec | None, wanted: FeatureSpec | None) -> None:
    if stored is not None and wanted is not None and (difference := stored.difference(wanted)):
        of = f" of {stored.tower}" if stored.tower else ""
        raise ValueError(
            f"{folder} holds other features{of}: {difference}; choose another folder, or delete this one."
        )


def _difference(stored: Any, wanted: Any, name: str = "") -> str | None:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in (*stored, *(key for key in wanted if key not in stored)):
            found = _difference(stored.get(key), wanted.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    if stored == wanted:
        return None
    name = "weights' fingerprint" if name == "fingerprint" else name
    return f"the {name} is {stored!r}, not {wanted!r}"


def _on_first_rank(function: Callable[[], Any], rank: int, world_size: int) -> Any:
    """What `function` returns or raises on rank 0, on every rank."""
    if world_size == 1:
        return function()
    result = [None, None]
    if rank == 0:
        try:
            result[0] = function()
        except Exception as error:
            result[1] = error
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]


def _together(function: Callable[[], None], world_size: int) -> None:
    """Runs `function` on every rank and waits for all; what one raises, all raise."""
    if world_size == 1:
        return function()
    error = None
    try:
        function()
    except Exception as caught:
        error = caught
    errors = [None] * world_size
    dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise error


def _without(fields: Any, names: Sequence[str]) -> Any:
    """A copy of nested dicts without some of their fields."""
    if not isinstance(fields, dict):
        return fields
    return {name: _without(value, names) for name, value in fields.items() if name not in names}


def _digest(*values: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        content = value if isinstance(value, (bytes, np.ndarray)) else str(value).encode()
        digest.update(f"{memoryview(content).nbytes}:".encode())
        digest.update(content)
    return digest.hexdigest()


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
