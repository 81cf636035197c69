"""Published checkpoints as named tensors: files, folders and Hub ids, read safely, with where they came from."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from .archive import check_expansion, checked_members, is_archive, is_damage, read_archive, refusing
from .rules import ConversionError, first_line, listed

INDEX = ".index.json"
PUBLISHED_FILES = (  # the first one that is there; beside open_clip's, model.safetensors may be the image tower alone
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
ARRAYS = ".npz"
BESIDE_WEIGHTS = (".json", ".txt", ".model")
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
MAX_CONFIG = 1 << 20  # bytes: longer JSON files are vocabularies
BIG = 1 << 28  # bytes from which progress is shown
CHUNK = 1 << 22


@dataclass(frozen=True)
class Origin:
    """Where weights came from.

    Args:
        name: id on the Hub, or the last part of a local path.
        revision: commit on the Hub, None for what is local.
        sha256: of the file, None for weights in several.
    """

    name: str
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors, and what lies beside them.

    Args:
        tensors: by name, mapped from the file or read when they are used.
        configs: the JSON files beside the weights by file name, such as ``"config.json"``.
        origins: where the tensors came from.
        folder: where the files beside the weights lie, None for a lone file.
    """

    tensors: Mapping[str, torch.Tensor]
    configs: dict[str, dict[str, Any]]
    origins: tuple[Origin, ...]
    folder: Path | None = None

    def select(self, prefix: str) -> Checkpoint:
        """The tensors whose names begin with `prefix`, by the rest of their names."""
        names = {name.removeprefix(prefix): name for name in self.tensors if name.startswith(prefix)}
        return replace(self, tensors=_renamed(self.tensors, names))

    def with_prefix(self, prefix: str) -> Checkpoint:
        """All tensors, by names with `prefix` before them."""
        return replace(self, tensors=_renamed(self.tensors, {f"{prefix}{name}": name for name in self.tensors}))


def merge(*checkpoints: Checkpoint) -> Checkpoint:
    """Several checkpoints as one, with all origins. Its configs and folder are those of the first.

    Raises:
        ConversionError: two checkpoints hold the same name.
    """
    seen: set[str] = set()
    for checkpoint in checkpoints:
        if doubled := seen & set(checkpoint.tensors):
            raise ConversionError(f"Two of the checkpoints hold {listed(doubled)}: select or rename one of them.")
        seen |= set(checkpoint.tensors)
    origins = tuple(origin for checkpoint in checkpoints for origin in checkpoint.origins)
    return replace(checkpoints[0], tensors=ChainMap(*(c.tensors for c in checkpoints)), origins=origins)


def open_checkpoint(
    source: str | Path,
    *,
    entries: Sequence[str] = (),
    revision: str | None = None,
    sha256: str | None = None,
    token: str | bool | None = None,
) -> Checkpoint:
    """Opens published weights without executing anything in them.

    Reads safetensors, pickles of tensors (``weights_only``), TorchScript archives and ``.npz`` files of NumPy, one file or
    shards with an index. An ``.npz`` file keeps its own names, such as ``"Transformer/encoder_norm/bias"``.
    A training checkpoint stands for the state dict in it; the prefixes of DDP and ``torch.compile`` are taken off.

    Args:
        source: a file, a folder, or an id on the Hub, of which the weights in one format and the small files beside them
            are downloaded.
        entries: the state dicts of a training checkpoint that are wanted, where it holds several. Tensors then have the
            entry's name before their own, as in ``"state_dict.visual.proj"``, and `Checkpoint.select` parts them.
        revision: branch, tag or commit on the Hub.
        sha256: published hash of the file of weights, which is compared before anything in the file is parsed.
        token: for repositories on the Hub that are not public.

    Raises:
        ConversionError: the file has another hash, is cut short, holds what is no tensor, or asks for code; or the folder
            holds no weights, or several files of which none is known; or the file lacks one of the entries.
        OSError: there is no such file or folder, and the Hub does not answer or has no such repository.
    """
    path = Path(source)
    if revision is not None and path.exists():
        raise ValueError(f"{path.name} is a local path, which has no revisions: leave revision out.")
    if path.is_file():
        return _open([path], None, Origin(path.name), sha256, entries)
    if path.is_dir():
        return _open(_weight_files(path), path, Origin(path.resolve().name), sha256, entries)
    folder = _download(str(source), revision, token)
    return _open(_weight_files(folder), folder, Origin(str(source), folder.name), sha256, entries)


def _open(
    files: list[Path], folder: Path | None, origin: Origin, sha256: str | None, entries: Sequence[str]
) -> Checkpoint:
    if len(files) == 1:
        origin = replace(origin, sha256=_sha256(files[0]))
        if sha256 is not None and origin.sha256 != sha256.lower():
            raise ConversionError(
                f"{files[0].name} has the SHA-256 {origin.sha256}, not the published {sha256}: download it again."
            )
    elif sha256 is not None:
        raise ValueError(
            f"{origin.name} has {len(files)} files of weights, which one SHA-256 cannot be compared with."
        )
    tensors = _joined([_read(file, entries) for file in files], origin.name)
    if not entries:
        tensors = _without_prefixes(tensors)
    if not tensors:
        raise ConversionError(f"{origin.name} holds no tensors.")
    return Checkpoint(tensors, _configs(folder) if folder else {}, (origin,), folder)


def _read(file: Path, entries: Sequence[str]) -> Mapping[str, torch.Tensor]:
    """The tensors of one file, by what it holds where its name does not tell."""
    with file.open("rb") as opened:
        head = opened.read(9)
    safetensors = file.suffix == ".safetensors" or head[8:] == b"{"
    if entries and (safetensors or file.suffix == ARRAYS or is_archive(file)):
        raise ConversionError(f"{file.name} has no entry {listed(entries)}: it is no training checkpoint.")
    if safetensors:
        return _safetensors(file)
    if file.suffix == ARRAYS:
        return _arrays(file)
    if is_archive(file):
        return read_archive(file)
    content = _unpickled(file, is_zip=head.startswith(b"PK"))
    tensors = _entries(content, entries, file.name) if entries else _unwrapped(content, file.name)
    with refusing(file, "file of weights"):
        check_expansion(tensors, file)
    return tensors


class _Lazy(Mapping):
    """Tensors by name, each read when it is asked for."""

    def __init__(self, readers: dict[str, Callable[[], torch.Tensor]]):
        self._readers = readers

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._readers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._readers

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def _renamed(tensors: Mapping[str, torch.Tensor], names: dict[str, str]) -> _Lazy:
    return _Lazy({new: partial(tensors.__getitem__, old) for new, old in names.items()})


def _safetensors(file: Path) -> _Lazy:
    try:
        opened = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ConversionError(
            f"{file.name} is cut short or no safetensors file ({first_line(error)}): copy or download it again."
        ) from error
    return _Lazy({name: partial(opened.get_tensor, name) for name in opened.keys()})  # noqa: SIM118 - not a mapping


def _arrays(file: Path) -> _Lazy:
    """The arrays of an ``.npz`` file, each unpacked when it is asked for."""
    with refusing(file, ".npz file"), zipfile.ZipFile(file) as archive:
        members = checked_members(archive, file)
    if others := [name for name in members if not name.endswith(".npy")]:
        raise ConversionError(f"{file.name} holds what is no array: {listed(others)}.")
    return _Lazy({name.removesuffix(".npy"): partial(_array, file, name) for name in members})


def _array(file: Path, member: str) -> torch.Tensor:
    """One array of an ``.npz`` file; two bytes of no type are bfloat16, which NumPy does not have."""
    name = member.removesuffix(".npy")
    with refusing(file, f".npz file with plain numbers in {name:.200}"), np.load(file, allow_pickle=False) as arrays:
        array = arrays[member]
        if array.dtype == "V2":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def _unpickled(file: Path, is_zip: bool) -> Any:
    if is_zip:
        _check_stored(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        reason = f"asks for {asked[1]}, which is no tensor" if asked else "holds something else than tensors"
        raise ConversionError(f"{file.name} {reason}: only plain tensors are read from a pickle.") from error
    except Exception as error:  # a pickle can make Python raise anything
        if not is_damage(error):
            raise
        raise ConversionError(
            f"{file.name} is cut short or no file of weights ({first_line(error)}): copy or download it again."
        ) from error


def _check_stored(file: Path) -> None:
    """Mapped numbers have to be stored as they are, which `torch.load` takes for granted."""
    with refusing(file, "file of weights"), zipfile.ZipFile(file) as archive:
        packed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ConversionError(
            f"{file.name} was zipped again with compression, of {listed(packed)}: take the original."
        )


def _unwrapped(content: Any, file_name: str) -> dict[str, torch.Tensor]:
    """The state dict in a training checkpoint, or what is one already."""
    seen: set[int] = set()
    while isinstance(content, dict) and id(content) not in seen:
        seen.add(id(content))
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    return _named(content, file_name)


def _entries(content: Any, entries: Sequence[str], file_name: str) -> dict[str, torch.Tensor]:
    """The state dicts that a training checkpoint has under these names, which come before those of the tensors."""
    found = content if isinstance(content, dict) else {}
    if missing := [entry for entry in entries if entry not in found]:
        there = f"it has {listed(map(str, found))}" if found else "it is no training checkpoint"
        raise ConversionError(f"{file_name} has no entry {listed(missing)}: {there}.")
    parts = {entry: _without_prefixes(_named(found[entry], f"{entry} of {file_name}")) for entry in entries}
    return {f"{entry}.{name}": tensor for entry, part in parts.items() for name, tensor in part.items()}


def _named(content: Any, file_name: str) -> dict[str, torch.Tensor]:
    """What is read from a file, if that is tensors by their names."""
    if not isinstance(content, dict):
        raise ConversionError(f"{file_name} holds a {type(content).__name__}, where named tensors were expected.")
    if unnamed := [f"{name!r:.80}" for name in content if not isinstance(name, str)]:
        raise ConversionError(f"{file_name} calls its tensors {listed(unnamed)}, where names were expected.")
    others = [name for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ConversionError(f"{file_name} holds what is no tensor: {listed(others)}.")
    return {name: tensor.detach() for name, tensor in content.items()}


def _without_prefixes(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _without_prefixes(_renamed(tensors, {name.removeprefix(prefix): name for name in tensors}))
    return tensors


def _joined(parts: list[Mapping[str, torch.Tensor]], name: str) -> Mapping[str, torch.Tensor]:
    seen: set[str] = set()
    for part in parts:
        if doubled := seen & set(part):
            raise ConversionError(f"two shards of {name} hold {listed(doubled)}.")
        seen |= set(part)
    return ChainMap(*parts)


def _sha256(file: Path) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    progress = tqdm(total=size, unit="B", unit_scale=True, desc=f"Hashing {file.name}", disable=size < BIG)
    with file.open("rb") as opened, progress:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
            progress.update(len(chunk))
    return digest.hexdigest()


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    configs = {}
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith(INDEX) or file.stat().st_size > MAX_CONFIG:
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ConversionError(f"{file.name} is not JSON ({error}): copy or download it again.") from error
        if isinstance(content, dict):
            configs[file.name] = content
    return configs


def _weight_files(folder: Path) -> list[Path]:
    name = folder.resolve().name
    chosen = _choose([path.name for path in folder.iterdir() if path.is_file()], name)
    return _parts(folder / chosen, fetch=lambda part: folder / part)


def _choose(names: Iterable[str], where: str) -> str:
    """The file of weights, or the index of its shards, among the files of a folder."""
    names = set(names)
    for name in PUBLISHED_FILES:
        if name in names:
            return name
    for suffixes in ((".safetensors",), PICKLES, (ARRAYS,)):
        found = [name for name in names if Path(name).suffix in suffixes]
        if len(found) > 1:
            raise ConversionError(f"{where} holds several files of weights, {listed(found)}: give the path of one.")
        if found:
            return found[0]
    raise ConversionError(f"{where} holds no weights: none of {', '.join(PUBLISHED_FILES)}, nor one other file.")


def _parts(file: Path, fetch: Callable[[str], Path]) -> list[Path]:
    """The file itself, or the shards that it is the index of."""
    if not file.name.endswith(INDEX):
        return [file]
    try:
        names = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        outside = [name for name in names if name in ("", ".", "..") or re.search(r"[/\\:]", name)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{file.name} is no index of shards ({error}): copy or download it again.") from error
    if outside:
        raise ConversionError(f"{file.name} names {listed(outside)}, which would lie outside its folder.")
    shards = [fetch(name) for name in sorted(names)]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise ConversionError(f"{file.name} names {listed(missing)}, which are missing: copy or download them again.")
    return shards


def _download(repo: str, revision: str | None, token: str | bool | None) -> Path:
    """The cached snapshot of a Hub repository, its folder named by the commit."""
    hub, commit = HfApi(token=token), revision
    try:
        commit = hub.resolve_revision(repo, revision=revision)  # offline, the one last seen
        info = hub.model_info(repo, revision=commit)
    except GatedRepoError as error:
        raise OSError(f"{repo} is gated: accept its terms on the Hub, and log in or pass a token.") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{repo} is no file or folder here, and the Hub has no such repository, or it is private: pass a token."
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"{repo} has no revision {revision}.") from error
    except Exception as error:  # what else the client raises has no class in common
        return _cached(repo, commit, error)
    names = [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]

    def fetch(name: str) -> Path:
        try:
            return Path(hub.hf_hub_download(repo, name, revision=commit))
        except Exception as error:
            raise OSError(f"{name} of {repo} could not be downloaded ({first_line(error)}).") from error

    weights = _choose(names, repo)
    wanted = [name for name in names if name.endswith(BESIDE_WEIGHTS) and not name.endswith(INDEX)]
    file = fetch(weights)
    _parts(file, fetch)
    for name in wanted:
        fetch(name)
    return file.parent


def _cached(repo: str, revision: str | None, error: Exception) -> Path:
    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception:
        raise OSError(
            f"{repo} is no file or folder here, and could not be had from the Hub ({first_line(error)})."
        ) from error
