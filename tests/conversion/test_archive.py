"""TorchScript archives against `torch.jit`'s own reader, and archives that nobody should open."""

import builtins
import collections
import io
import os
import pickle
import struct
import sys
import tracemalloc
import types
import zipfile

import pytest
import torch
from torch import nn

from hf_mm.conversion.archive import is_archive, read_archive
from hf_mm.conversion.checkpoint import open_checkpoint
from hf_mm.conversion.rules import ConversionError


class Kinds(nn.Module):
    """Every dtype, a scalar, an empty tensor, a transposed parameter, a slice and an expanded buffer."""

    def __init__(self):
        super().__init__()
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            self.register_parameter(f"{dtype}".replace(".", "_"), nn.Parameter(torch.randn(2, 3).to(dtype)))
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
            self.register_buffer(f"{dtype}".replace(".", "_"), torch.randint(0, 2, (5,)).to(dtype))
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.turned = nn.Parameter(torch.randn(4, 3).t())
        self.register_buffer("slice", torch.arange(20.0).view(4, 5)[1:3, ::2])
        self.register_buffer("expanded", torch.randn(3, 1).expand(3, 4))
        self.register_buffer("not_saved_by_state_dict", torch.ones(2), persistent=False)

    def forward(self, x):
        return x * self.scalar + self.turned.sum() + self.slice.sum() + self.expanded.sum()


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return self.linear(self.norm(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.kinds = Kinds()
        self.blocks = nn.Sequential(Block(6), nn.ReLU(), Block(6).half().float())
        self.token = nn.Parameter(torch.randn(6, 6))
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.token
        self.halved = nn.Linear(6, 2).half()
        self.blocks[0].eval()

    def forward(self, x):
        return self.head(self.blocks(self.kinds(x)) @ self.token) + self.halved.weight.sum().float()


class WithAttributes(nn.Module):
    """Attributes that are no tensors, of the types that a pickle of TorchScript tags."""

    sizes: list[int]
    scales: list[float]
    flags: list[bool]
    tensors: list[torch.Tensor]
    table: dict[str, int]
    maybe: torch.Tensor | None

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.sizes, self.scales, self.flags = [1, 2], [0.5], [True]
        self.tensors, self.table, self.maybe = [torch.ones(2)], {"a": 1}, None
        self.name, self.pair = "net", (1, "two")

    def forward(self, x):
        return self.inner(x) * self.scales[0] + float(self.sizes[0]) + self.tensors[0]


def save_archive(path, module, how="script"):
    compiled = torch.jit.script(module) if how == "script" else torch.jit.trace(module, torch.randn(4, 6))
    torch.jit.save(compiled, str(path))
    return path


def assert_as_torch_has_it(path, monkeypatch):
    theirs = torch.jit.load(str(path), map_location="cpu").state_dict()
    with monkeypatch.context() as patch:
        for module, name in ((torch.jit, "load"), (torch, "load"), (torch.jit, "script")):
            patch.setattr(module, name, lambda *_, **__: pytest.fail("the archive was executed"))
        ours = read_archive(path)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        assert torch.equal(ours[name], tensor.detach()), name
    return ours


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_state_dict_of_torch_jit(tmp_path, monkeypatch, how, training):
    path = save_archive(tmp_path / "net.pt", Net().train(training), how)
    assert is_archive(path)
    tensors = assert_as_torch_has_it(path, monkeypatch)
    assert tensors["token"].data_ptr() == tensors["head.weight"].data_ptr()
    assert "kinds.not_saved_by_state_dict" in tensors
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_attributes_that_are_no_tensors_are_passed_over(tmp_path, monkeypatch):
    tensors = assert_as_torch_has_it(save_archive(tmp_path / "net.pt", WithAttributes()), monkeypatch)
    assert set(tensors) == {"inner.weight", "inner.bias"}


def test_reading_maps_the_file_and_writing_to_a_tensor_leaves_it_alone(tmp_path):
    path = save_archive(tmp_path / "net.pt", nn.Linear(300, 300))
    content = path.read_bytes()
    tensor = read_archive(path)["weight"]
    assert tensor.untyped_storage().nbytes() == len(content)
    tensor.zero_()
    assert path.read_bytes() == content


def test_what_torch_save_writes_is_no_archive(tmp_path):
    state = nn.Linear(2, 2).state_dict()
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text.pt").write_text("PK is how a zip begins")
    for name in ("zip.pt", "legacy.pt", "text.pt"):
        assert not is_archive(tmp_path / name)


# Archives made by hand


class Storage:
    def __init__(self, key, count, kind="FloatStorage", device="cpu"):
        self.pid = ("storage", getattr(torch, kind), key, device, count)


class Call:
    """A call that the pickle asks for."""

    def __init__(self, function, *arguments, state=None):
        self.recipe = (function, arguments, state)

    def __reduce__(self):
        return self.recipe


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.pid if isinstance(value, Storage) else None


class Root:
    """A module of the archive; `attributes` may be of any type, as what a strange file restores may be."""

    def __init__(self, attributes):
        self.attributes = attributes

    def __reduce__(self):
        return (Root, (), self.attributes)


Root.__module__, Root.__qualname__ = "__torch__", "Root"


def strided(key="0", count=4, offset=0, size=(2, 2), stride=(2, 1), *flags, kind="FloatStorage"):
    hooks = collections.OrderedDict()
    return Call(torch._utils._rebuild_tensor_v2, Storage(key, count, kind), offset, size, stride, False, hooks, *flags)


def pickled(model, protocol=2):
    stream = io.BytesIO()
    sys.modules["__torch__"] = types.ModuleType("__torch__")
    sys.modules["__torch__"].Root = Root
    try:
        Pickler(stream, protocol).dump(model)
    finally:
        del sys.modules["__torch__"]
    return stream.getvalue()


NUMBERS = struct.pack("<4f", 1, 2, 3, 4)


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def archive_of(path, content, *more, storage=NUMBERS, compression=zipfile.ZIP_STORED):
    members = [("net/data.pkl", content), ("net/code/__torch__.py", b"code"), ("net/data/0", storage), *more]
    return write_zip(path, members, compression)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("protocol", [2, 4])
def test_an_archive_made_by_hand_is_read(tmp_path, compression, protocol):
    model = Root({"a": Root({"weight": strided(), "training": True}), "b": strided(offset=1, size=(3,), stride=(1,))})
    path = archive_of(tmp_path / "net.pt", pickled(model, protocol), compression=compression)
    tensors = read_archive(path)
    assert tensors["a.weight"].tolist() == [[1, 2], [3, 4]]
    assert tensors["b"].tolist() == [2, 3, 4]
    assert set(tensors) == {"a.weight", "b"}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_empty_storage_is_read(tmp_path, compression):
    model = Root({"none": strided(count=0, size=(0, 3), stride=(3, 1))})
    path = archive_of(tmp_path / "net.pt", pickled(model), storage=b"", compression=compression)
    assert read_archive(path)["none"].shape == (0, 3)


@pytest.mark.parametrize("padding", range(1, 9))
def test_numbers_at_any_position_of_the_file_are_read(tmp_path, padding):
    members = [("net/code/a", b"x" * padding), ("net/data.pkl", pickled(Root({"weight": strided()})))]
    path = write_zip(tmp_path / "net.pt", [*members, ("net/data/0", NUMBERS)])
    assert read_archive(path)["weight"].tolist() == [[1, 2], [3, 4]]


FOREIGN = {
    "os.system": Call(os.system, "touch executed"),
    "eval": Call(eval, "open('executed', 'w')"),
    "exec": Call(exec, "open('executed', 'w')"),
    "getattr": Call(getattr, 1, "__class__"),
    "open": Call(open, "executed", "w"),
    "import": Call(builtins.__import__, "antigravity"),
    "torch.load": Call(torch.load, "executed"),
    "torch.jit.load": Call(torch.jit.load, "executed"),
    "torch.nn.Linear": Call(nn.Linear, 2, 2),
    "torch._utils._rebuild_qtensor": Call(torch._utils._rebuild_qtensor),
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_global_is_refused_by_name_and_not_called(tmp_path, monkeypatch, name, protocol):
    monkeypatch.chdir(tmp_path)
    foreign = FOREIGN[name]
    path = archive_of(tmp_path / "net.pt", pickle.dumps(foreign, protocol))
    with pytest.raises(ConversionError, match=r"net\.pt is refused: its pickle asks for") as caught:
        read_archive(path)
    assert name.rpartition(".")[2].strip("_") in str(caught.value)
    with pytest.raises(ConversionError, match="asks for"):
        open_checkpoint(path)
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt"]


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\nS'touch executed'\n\x85R.",  # GLOBAL
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0etouch executed\x85R.",  # STACK_GLOBAL
        b"(cos\nsystem\nS'touch executed'\no.",  # OBJ
    ],
)
def test_every_instruction_that_names_a_global_is_covered(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConversionError, match=r"asks for os\.system"):
        read_archive(archive_of(tmp_path / "net.pt", content))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "named", [b"ctorch.jit._pickle\nrestore_type_tag\n", b"c__torch__\nRoot\n", b"ctorch._utils\n_rebuild_tensor_v2\n"]
)
def test_a_pickle_cannot_write_to_what_it_names(tmp_path, named):
    """BUILD with a pair of dicts sets attributes of the object before it, here of what other archives would be read by."""
    state = pickle.dumps((None, {"__setstate__": 1, "__defaults__": (1, 2)}), 2)[2:-1]
    healthy = archive_of(tmp_path / "healthy.pt", pickled(Root({"weight": strided()})))
    try:
        read_archive(archive_of(tmp_path / "net.pt", b"\x80\x02" + named + state + b"b."))
    except ConversionError as error:
        assert str(error).count("\n") == 0
    assert read_archive(healthy)["weight"].tolist() == [[1, 2], [3, 4]]


CYCLE = b"\x80\x02c__torch__\nRoot\n)\x81q\x00}X\x04\x00\x00\x00selfh\x00sb."
DOUBLING = (
    b"\x80\x02"
    + b"c__torch__\nRoot\n)\x81q\x00"
    + b"".join(
        b"c__torch__\nRoot\n)\x81}(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cubq%c" % (i, i, i + 1) for i in range(60)
    )
    + b"."
)
REFUSED = {
    "not a module": (pickled([1, 2]), "it holds a list"),
    "state of its own": (pickled(Root({"packed": Root((1, 2))})), "module packed is saved in a form of its own"),
    "missing storage": (pickled(Root({"w": strided("9")})), "storage 9 is missing"),
    "storage outside": (pickled(Root({"w": strided("../data.pkl")})), r"storage \.\./data\.pkl is missing"),
    "too few bytes": (pickled(Root({"w": strided(count=5)})), "storage 0 has 16 bytes, where it says 5 of"),
    "too many bytes": (pickled(Root({"w": strided(count=3)})), "storage 0 has 16 bytes, where it says 3 of"),
    "other dtype": (pickled(Root({"w": strided(kind="DoubleStorage")})), "has 16 bytes, where it says 4 of"),
    "unknown dtype": (pickled(Root({"w": strided(kind="ComplexFloatStorage")})), "asks for torch.ComplexFloatStorage"),
    "beyond the end": (pickled(Root({"w": strided(offset=1)})), "reaches to number 4 of a storage that holds 4"),
    "stride too long": (pickled(Root({"w": strided(stride=(3, 1))})), "reaches to number 4"),
    "negative offset": (pickled(Root({"w": strided(offset=-1)})), "offset -1"),
    "negative stride": (pickled(Root({"w": strided(offset=3, stride=(-2, 1))})), r"stride \(-2, 1\)"),
    "negative size": (pickled(Root({"w": strided(size=(-2, -2))})), r"size \(-2, -2\)"),
    "size and stride": (pickled(Root({"w": strided(size=(2,))})), r"size \(2,\) and stride \(2, 1\)"),
    "fraction": (pickled(Root({"w": strided(offset=0.5)})), "not whole numbers"),
    "conjugate": (pickled(Root({"w": strided("0", 4, 0, (2, 2), (2, 1), {"conj": True})})), "conjugate"),
    "no storage": (
        pickled(Root({"w": Call(torch._utils._rebuild_tensor_v2, (1, 2), 0, (1,), (1,), False, None)})),
        "in no storage of a known kind",
    ),
    "called twice": (
        pickled(Root({"a": Root({"w": strided()}), "a.w": strided()})),
        "two of its tensors are called a.w",
    ),
    "no name": (pickled(Root({"a": Root({3: strided()})})), "an attribute of a has no name"),
    "cycle": (CYCLE, "hold one another without end"),
    "doubling": (DOUBLING, "hold one another without end"),
    "no pickle": (b"not a pickle", "no whole TorchScript archive"),
    "half a pickle": (pickled(Root({"w": strided()}))[:-1], "no whole TorchScript archive"),
    "unbalanced": (b"\x80\x02(.", "no whole TorchScript archive"),
    "out of band": (b"\x80\x05\x97.", "no whole TorchScript archive"),
    "extension": (b"\x80\x02\x82\x01.", "no whole TorchScript archive"),
    "another way to a global": (b"(S'touch executed'\nios\nsystem\n.", "no whole TorchScript archive"),
    "nothing repeated": (
        pickled(Root({"w": strided(size=(1 << 36, 1 << 10), stride=(0, 0))})),
        "would become tensors of 281474976710656 bytes",
    ),
    "a message as long as the file": (
        pickled(Root({"w": strided(size=tuple(range(5000)), stride=(1,) * 4000)})),
        "a tensor has offset 0, size .{80} and stride .{80}\\.$",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_archives_that_make_no_sense_are_refused_in_one_sentence(tmp_path, name):
    content, message = REFUSED[name]
    with pytest.raises(ConversionError, match=message) as caught:
        read_archive(archive_of(tmp_path / "net.pt", content))
    assert str(caught.value).startswith("net.pt is ") and str(caught.value).count("\n") == 0
    assert str(tmp_path) not in str(caught.value)


COUNTS = b"](" + b"N" * 20_000 + b"eq\x00"
PAIRS = b"}(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(5_000)) + b"uq\x00"
GREEDY = {
    "a memo index of 2^26, for as many pointers": (b"\x80\x02}r\x00\x00\x00\x04.", "it holds a dict"),
    "bytes of a length of 2^28": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 28) + b".", "no whole TorchScript archive"),
    "a list copied a thousand times": (
        b"\x80\x02ctorch.jit._pickle\nbuild_intlist\nq\x01" + COUNTS + b"h\x01h\x00\x85R" * 1_000 + b".",
        "it holds a list",
    ),
    "a dict copied a thousand times": (
        b"\x80\x02ccollections\nOrderedDict\nq\x01" + PAIRS + b"h\x01h\x00\x85R" * 1_000 + b".",
        "no whole TorchScript archive",
    ),
}


@pytest.mark.parametrize("name", GREEDY)
def test_the_pickle_does_not_choose_how_much_memory_is_allocated(tmp_path, name):
    content, message = GREEDY[name]
    path = archive_of(tmp_path / "net.pt", content)
    tracemalloc.start()
    with pytest.raises(ConversionError, match=message):
        read_archive(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


def test_a_pickle_longer_than_any_tree_of_modules_is_not_unpacked(tmp_path, monkeypatch):
    path = archive_of(tmp_path / "net.pt", b"\x80\x02" + b"]" * (1 << 24) + b".")
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("the pickle was unpacked"))
    with pytest.raises(ConversionError, match="its pickle has 16777219 bytes, which no tree of modules needs"):
        read_archive(path)


@pytest.mark.parametrize("member", ["../outside", "net/../../outside", "/outside", "net\\outside", "C:outside"])
def test_a_member_that_leaves_the_folder_is_refused(tmp_path, member):
    path = archive_of(tmp_path / "net.pt", pickled(Root({"w": strided()})), (member, b"x"))
    with pytest.raises(ConversionError, match="would lie outside the archive"):
        read_archive(path)
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_is_refused(tmp_path):
    path = archive_of(tmp_path / "net.pt", pickled(Root({"w": strided()})), ("net/data/0", NUMBERS))
    with pytest.raises(ConversionError, match="two members called 'net/data/0'"):
        read_archive(path)


def test_two_archives_in_one_are_refused(tmp_path):
    more = [("other/data.pkl", b""), ("other/code/x", b"")]
    with pytest.raises(ConversionError, match="it has 2 pickles"):
        read_archive(archive_of(tmp_path / "net.pt", pickled(Root({})), *more))


@pytest.mark.parametrize("member", ["net/data/0", "net/code/more"])
def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch, member):
    zeros = bytes(1 << 24)
    content = pickled(Root({"w": strided(count=1 << 22, size=(1 << 22,), stride=(1,))}))
    members = {"net/data.pkl": content, "net/code/x": b"", "net/data/0": NUMBERS, member: zeros}
    path = write_zip(tmp_path / "net.pt", members.items(), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < len(zeros) / 500
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_, **__: pytest.fail("the bomb was unpacked"))
    with pytest.raises(ConversionError, match=f"would unpack to {len(zeros)}|would unpack to 1677"):
        read_archive(path)


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_archive_is_refused(tmp_path, kept):
    path = save_archive(tmp_path / "net.pt", Block(40))
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    for read in (read_archive, open_checkpoint):
        with pytest.raises(ConversionError, match=r"net\.pt .*(copy or download it again|cut short)") as caught:
            read(path)
        assert str(caught.value).count("\n") == 0


def test_a_hole_in_the_middle_is_refused(tmp_path):
    path = save_archive(tmp_path / "net.pt", Block(40))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3] + content[2 * len(content) // 3 :])
    with pytest.raises(ConversionError, match=r"net\.pt "):
        read_archive(path)


def test_a_flipped_byte_of_the_pickle_is_refused(tmp_path):
    path = save_archive(tmp_path / "net.pt", Block(4))
    content = bytearray(path.read_bytes())
    content[content.index(b"BatchNorm1d")] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ConversionError, match="CRC|no whole"):
        read_archive(path)


def test_a_wrong_hash_is_refused_before_anything_is_parsed(tmp_path, monkeypatch):
    path = save_archive(tmp_path / "net.pt", Block(4))
    actual = open_checkpoint(path).origins[0].sha256
    assert set(open_checkpoint(path, sha256=actual.upper()).tensors) == set(read_archive(path))
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("the file was parsed"))
    wrong = "0" * 64
    with pytest.raises(ConversionError, match=f"net.pt has the SHA-256 {actual}, not the published {wrong}"):
        open_checkpoint(path, sha256=wrong)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match="net.pt"):
        read_archive(tmp_path / "net.pt")
