"""TorchScript archives as plain tensors. Nothing in the file is executed.

An archive is a zip: ``<root>/data.pkl`` is a pickle of the tree of modules with their attributes, ``<root>/data/<key>``
holds the bytes of its tensors, ``<root>/code/`` the TorchScript, which is not read.
"""

from __future__ import annotations

import errno
import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .rules import ConversionError, first_line

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
NEEDLESS = (  # instructions that allocate what the file says, or find a class in another way
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST),
)
LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
LOCAL_HEADER = struct.Struct("<26xHH")  # of a member of a zip: the lengths of its name and of its extra field
MAX_PICKLE = 1 << 24  # bytes
MAX_RATIO = 32  # of the members' bytes to the file's: weights do not compress, the code does by three or four
SLACK = 1 << 20  # bytes that the tensors of a small file may have beyond that
MAX_MODULES = 100_000
MAX_NAME_LENGTH = 1_000


def is_archive(path: str | Path) -> bool:
    """Whether a file is a zip with a pickle and TorchScript code, and not what `torch.save` writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            return bool(_roots(archive.namelist()))
    except Exception as error:  # zipfile raises much else than BadZipFile
        if not is_damage(error):
            raise
        return False


def read_archive(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a TorchScript archive by the dotted names of their modules, as ``state_dict`` has them.

    Parameters, buffers (also non-persistent ones) and other attributes that are tensors are told apart in the code alone,
    so all are returned; tensors in attributes that are lists or dicts are not, as in ``state_dict``. Attributes that share
    memory share it here. The tensors are views of the mapped file, writable without changing it.

    Raises:
        ConversionError: the file is no whole archive, or holds anything but modules, containers and strided tensors.
    """
    path = Path(path)
    with refusing(path, "TorchScript archive"), zipfile.ZipFile(path) as archive:
        return _read(archive, path)


@contextmanager
def refusing(path: Path, kind: str) -> Iterator[None]:
    """Makes one sentence with the file's name of all that reading a file of this kind raises, an OSError excepted."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"{path.name} is refused: {error}") from None
    except Exception as error:  # a pickle can make Python raise anything, and zipfile, zlib and NumPy share no class
        if not is_damage(error):
            raise
        raise ConversionError(
            f"{path.name} is no whole {kind} ({type(error).__name__}: {first_line(error)}): copy or download it again."
        ) from error


def is_damage(error: Exception) -> bool:
    """Whether a file is at fault rather than the system; a zip that lacks its beginning is sought before its beginning."""
    return not isinstance(error, OSError) or error.errno == errno.EINVAL


def check_expansion(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Tensors may share their numbers, or repeat one with a stride of 0, but not without end.

    Raises:
        ConversionError: written out they would have far more bytes than the file.
    """
    size = path.stat().st_size
    whole = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
    if whole > MAX_RATIO * size + SLACK:
        raise ConversionError(f"its {size} bytes would become tensors of {whole} bytes.")


class _Module:
    """What stands for any object of the archive: it keeps the attributes it was saved with."""

    attributes: Any = None

    def __init__(self, *arguments):
        pass

    def __setstate__(self, attributes: Any):
        self.attributes = attributes


class _Strided:
    """What a tensor is made of, unchecked."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, *flags: Any):
        self.storage, self.offset, self.size, self.stride, self.flags = storage, offset, size, stride, flags

    def __setstate__(self, state: Any):
        raise ConversionError("a tensor has a state besides its numbers.")


class _Unpickler(pickle._Unpickler):  # the one in C allocates memory by the memo index that the file names
    """Makes modules that do nothing, descriptions of tensors, and containers; it copies none."""

    dispatch = {code: read for code, read in pickle._Unpickler.dispatch.items() if bytes([code]) not in NEEDLESS}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _Strided
        if module == "collections" and name == "OrderedDict":
            return lambda: OrderedDict()
        if module == "torch.jit._pickle" and name in LISTS:
            return lambda values: values
        if module == "torch.jit._pickle" and name == "restore_type_tag":
            return lambda value, type_name: value  # a new one each time: a pickle may write to what it names
        raise ConversionError(f"its pickle asks for {f'{module}.{name}':.80}, which a file of weights has no need of.")

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _Storages:
    """The storages of an archive, mapped where they are stored and decompressed where they are not."""

    def __init__(self, archive: zipfile.ZipFile, path: Path, members: dict[str, zipfile.ZipInfo], root: str):
        self._archive, self._members, self._root = archive, members, root
        self._file = torch.from_numpy(np.memmap(path, np.uint8, mode="c"))
        self._read: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def tensor(self, strided: _Strided) -> torch.Tensor:
        if any(strided.flags):
            raise ConversionError("one of its tensors is conjugate or negative, which is not supported.")
        storage = self._storage(strided.storage)
        offset, size, stride = strided.offset, strided.size, strided.stride
        numbers = (offset, *size, *stride)
        if any(type(number) is not int for number in numbers):
            raise ConversionError("the offset, size and stride of a tensor are not whole numbers.")
        if len(size) != len(stride) or min(numbers) < 0:
            raise ConversionError(f"a tensor has offset {offset!r:.80}, size {size!r:.80} and stride {stride!r:.80}.")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and last >= len(storage):
            raise ConversionError(f"a tensor reaches to number {last} of a storage that holds {len(storage)}.")
        return storage.as_strided(size, stride, storage.storage_offset() + offset)

    def _storage(self, identity: Any) -> torch.Tensor:
        """All numbers of a storage, from ``("storage", dtype, key, device, count)``."""
        match identity:
            case ("storage", torch.dtype() as dtype, str() as key, str(), int() as count):
                pass
            case _:
                raise ConversionError("the numbers of a tensor are in no storage of a known kind.")
        if (key, dtype) not in self._read:
            member = self._members.get(f"{self._root}/data/{key}")
            if member is None:
                raise ConversionError(f"storage {key:.80} is missing.")
            if member.file_size != count * dtype.itemsize:
                raise ConversionError(f"storage {key} has {member.file_size} bytes, where it says {count} of {dtype}.")
            numbers = self._bytes(member)
            aligned = numbers.storage_offset() % dtype.itemsize == 0
            self._read[key, dtype] = (numbers if aligned else numbers.clone()).view(dtype)
        return self._read[key, dtype]

    def _bytes(self, member: zipfile.ZipInfo) -> torch.Tensor:
        if member.compress_type != zipfile.ZIP_STORED:
            numbers = torch.empty(member.file_size, dtype=torch.uint8)
            numbers.numpy()[:] = np.frombuffer(self._archive.read(member), np.uint8)
            return numbers
        with self._archive.open(member):  # checks the member's own header
            pass
        header = bytes(self._file[member.header_offset : member.header_offset + LOCAL_HEADER.size].numpy())
        start = member.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header))
        if start + member.file_size > len(self._file):
            raise ConversionError(f"{member.filename} is cut short.")
        return self._file[start : start + member.file_size]


def _read(archive: zipfile.ZipFile, path: Path) -> dict[str, torch.Tensor]:
    members = checked_members(archive, path)
    roots = _roots(members)
    if len(roots) != 1:
        raise ConversionError(f"it has {len(roots)} pickles beside TorchScript code, where an archive has one.")
    pickled = members[f"{roots[0]}/data.pkl"]
    if pickled.file_size > MAX_PICKLE:
        raise ConversionError(f"its pickle has {pickled.file_size} bytes, which no tree of modules needs.")
    model = _Unpickler(io.BytesIO(archive.read(pickled))).load()
    if not isinstance(model, _Module):
        raise ConversionError(f"it holds a {type(model).__name__}, where an archive holds a module.")
    storages = _Storages(archive, path, members, roots[0])
    tensors: dict[str, torch.Tensor] = {}
    for name, strided in _named_tensors(model):
        if name in tensors:
            raise ConversionError(f"two of its tensors are called {name:.200}.")
        tensors[name] = storages.tensor(strided)
    check_expansion(tensors, path)
    return tensors


def checked_members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip by name.

    Raises:
        ConversionError: two have one name, one would lie outside the archive, or all would unpack to far more than the
            file holds.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.orig_filename
        if name.startswith("/") or ".." in name.split("/") or any(character in name for character in "\\:\0"):
            raise ConversionError(f"its member {name!r:.200} would lie outside the archive.")
        if name in members:
            raise ConversionError(f"it has two members called {name!r:.200}.")
        members[name] = member
    size, unpacked = path.stat().st_size, sum(member.file_size for member in members.values())
    if unpacked > MAX_RATIO * size:
        raise ConversionError(f"its {size} bytes would unpack to {unpacked}, as a zip bomb's.")
    return members


def _roots(names: Any) -> list[str]:
    """The folders of a zip that hold both a pickle and code."""
    pickles = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
    return [root for root in pickles if any(name.startswith(f"{root}/code/") for name in names)]


def _named_tensors(model: _Module) -> Iterator[tuple[str, _Strided]]:
    waiting, visited = [("", model)], 0
    while waiting:
        prefix, module = waiting.pop()
        visited += 1
        if visited > MAX_MODULES or len(prefix) > MAX_NAME_LENGTH:
            raise ConversionError("its modules hold one another without end.")
        if module.attributes is None:
            continue
        if not isinstance(module.attributes, dict):
            raise ConversionError(f"the module {prefix[:-1] or 'at its root'} is saved in a form of its own.")
        for name, value in module.attributes.items():
            if not isinstance(name, str):
                raise ConversionError(f"an attribute of {prefix[:-1] or 'its root'} has no name.")
            if isinstance(value, _Strided):
                yield prefix + name, value
            elif isinstance(value, _Module):
                waiting.append((f"{prefix}{name}.", value))
