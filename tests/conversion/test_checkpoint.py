"""Opening checkpoints: what is read from files and folders, and what is refused before it is used."""

import hashlib
import io
import json
import os
import pickle
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hub import server
from hub.server import Fault, HubServer
from huggingface_hub import constants, file_download
from safetensors.torch import save_file
from torch import nn

from hf_mm.conversion import checkpoint as module
from hf_mm.conversion.checkpoint import Checkpoint, Origin, merge, open_checkpoint
from hf_mm.conversion.rules import ConversionError


@pytest.fixture
def tensors():
    return {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.randn(3).half(),
        "b.steps": torch.tensor(5),
        "b.scale": torch.tensor(1.5).bfloat16(),
    }


def assert_holds(checkpoint, tensors):
    assert set(checkpoint.tensors) == set(tensors) and len(checkpoint.tensors) == len(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.tensors[name], tensor), name
    assert "no such name" not in checkpoint.tensors
    with pytest.raises(KeyError):
        checkpoint.tensors["no such name"]


def legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


class Scripted(nn.Module):
    def __init__(self, tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self):
        return 0


def arrays(tensors, path):
    """As JAX saves them: bfloat16 is two bytes of no type to NumPy."""
    plain = {
        name: t.view(torch.int16).numpy().view("V2") if t.dtype == torch.bfloat16 else t.numpy()
        for name, t in tensors.items()
    }
    np.savez(path, **plain)


WRITERS = {
    "weights.safetensors": save_file,
    "safetensors without a suffix": save_file,
    "zip.pt": torch.save,
    "legacy.pth": legacy,
    "pytorch_model.bin": torch.save,
    "arrays.npz": arrays,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_lone_file_of_every_format(tmp_path, tensors, name):
    path = tmp_path / name
    WRITERS[name](tensors, path)
    (tmp_path / "config.json").write_text("{}")
    for source in (path, str(path)):
        checkpoint = open_checkpoint(source)
        assert_holds(checkpoint, tensors)
        assert checkpoint.configs == {} and checkpoint.folder is None
        assert checkpoint.origins == (Origin(name, None, hashlib.sha256(path.read_bytes()).hexdigest()),)


def test_a_torchscript_archive_is_known_by_what_it_holds(tmp_path, tensors):
    flat = {name.replace(".", "_"): tensor for name, tensor in tensors.items()}
    torch.jit.save(torch.jit.script(Scripted(flat)), str(tmp_path / "model.bin"))
    assert_holds(open_checkpoint(tmp_path / "model.bin"), flat)


def test_parameters_in_a_pickle_become_plain_tensors(tmp_path):
    weight = nn.Parameter(torch.randn(2, 2))
    torch.save({"weight": weight}, tmp_path / "model.pt")
    tensor = open_checkpoint(tmp_path / "model.pt").tensors["weight"]
    assert not tensor.requires_grad and torch.equal(tensor, weight)


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "module"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_a_training_checkpoint_stands_for_its_state_dict(tmp_path, tensors, wrapper, prefix):
    wrapped = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"epoch": 3, "name": "run", wrapper: wrapped, "optimizer": optimizer}, tmp_path / "epoch_3.pt")
    assert_holds(open_checkpoint(tmp_path / "epoch_3.pt"), tensors)


def test_a_prefix_that_not_all_names_have_is_kept(tmp_path):
    tensors = {"module.a": torch.ones(1), "b": torch.ones(1)}
    save_file(tensors, tmp_path / "m.safetensors")
    assert_holds(open_checkpoint(tmp_path / "m.safetensors"), tensors)


def test_a_layout_with_a_name_like_a_wrapper_is_not_unwrapped(tmp_path):
    tensors = {"model": torch.ones(2), "state_dict": torch.ones(1)}
    torch.save(tensors, tmp_path / "m.pt")
    assert_holds(open_checkpoint(tmp_path / "m.pt"), tensors)


class Executes:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def itself():
    content = {"a": torch.ones(1)}
    content["state_dict"] = content
    return content


FLAT = {
    "a number": ({"a": torch.ones(1), "epoch": 3}, "what is no tensor: epoch"),
    "inside a wrapper": ({"state_dict": {"a": torch.ones(1), "lr": 0.1}}, "what is no tensor: lr"),
    "a list": ([torch.ones(1)], "holds a list"),
    "a tensor": (torch.ones(1), "holds a Tensor"),
    "nothing": ({}, "holds no tensors"),
    "numbers for names": ({0: torch.ones(1), 1: torch.ones(1)}, "calls its tensors 0, 1, where names"),
    "one that wraps itself": (itself(), "what is no tensor: state_dict"),
    "nothing repeated": ({"a": torch.ones(1).expand(1 << 36, 4)}, "would become tensors of 1099511627776 bytes"),
    "a name as long as the file": ({"a" * (1 << 20): 1}, "what is no tensor: a{300}[.]$"),
    "code": ({"a": Executes()}, "asks for (posix|nt).mkdir, which is no tensor"),
    "a model": (nn.Linear(1, 1), "asks for torch.nn.modules.linear.Linear, which is no tensor"),
}


@pytest.mark.parametrize("write", [torch.save, legacy])
@pytest.mark.parametrize("name", FLAT)
def test_pickles_of_anything_else_are_refused(tmp_path, monkeypatch, name, write):
    monkeypatch.chdir(tmp_path)
    content, message = FLAT[name]
    write(content, tmp_path / "model.pt")
    with pytest.raises(ConversionError, match=message) as caught:
        open_checkpoint(tmp_path / "model.pt")
    assert str(caught.value).count("\n") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("name", ["zip.pt", "legacy.pth", "weights.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.95])
def test_truncated_files_are_refused(tmp_path, tensors, name, kept):
    path = tmp_path / name
    WRITERS[name](tensors | {"more": torch.randn(50, 50)}, path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(
        ConversionError, match=f"{name} (is cut short|is no whole file|holds something else|asks for)"
    ) as caught:
        open_checkpoint(path)
    assert str(caught.value).count("\n") == 0 and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html></html>", b"PK"])
def test_what_is_no_file_of_weights_is_refused(tmp_path, content):
    for name in ("model.pt", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConversionError, match=name) as caught:
            open_checkpoint(tmp_path / name)
        assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("name", WRITERS)
def test_the_hash_is_compared_before_anything_is_parsed(tmp_path, monkeypatch, tensors, name):
    path = tmp_path / name
    WRITERS[name](tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert_holds(open_checkpoint(path, sha256=digest), tensors)
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_, **__: pytest.fail("the file was parsed"))
    for reader in ("safe_open", "is_archive", "read_archive"):
        monkeypatch.setattr(module, reader, lambda *_, **__: pytest.fail("the file was parsed"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the file was parsed"))
    with pytest.raises(ConversionError, match=f"SHA-256 {digest}, not the published {'1' * 64}"):
        open_checkpoint(path, sha256="1" * 64)


def test_hashing_a_long_file_shows_progress(tmp_path, monkeypatch, capsys, tensors):
    save_file(tensors, tmp_path / "m.safetensors")
    open_checkpoint(tmp_path / "m.safetensors")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "BIG", 1)
    open_checkpoint(tmp_path / "m.safetensors")
    assert "Hashing m.safetensors" in capsys.readouterr().err


def test_a_pickle_that_was_compressed_is_refused(tmp_path, tensors):
    """Mapped, its numbers would be the compressed bytes."""
    torch.save(tensors, tmp_path / "stored.pt")
    packed = zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "stored.pt") as stored, packed:
        for member in stored.infolist():
            packed.writestr(member.filename, stored.read(member))
    with pytest.raises(ConversionError, match="model.pt was zipped again with compression"):
        open_checkpoint(tmp_path / "model.pt")


PICKLES = {
    "an empty stack": b"\x80\x02.",
    "a tuple of nothing": b"\x80\x02\x85.",
    "a list as a name": b"\x80\x02}]K\x01s.",
    "no such memo": b"\x80\x02h\x05.",
    "a length beyond the end": b"\x80\x02X\xff\xff\xff\x7fab.",
    "a state for a list": b"\x80\x02]K\x01K\x02b.",
    "half a number": b"\x80\x02J\x00.",
    "a call of nothing": b"\x80\x02R.",
    "no protocol": b"\x80",
}


@pytest.mark.parametrize("name", PICKLES)
def test_a_damaged_pickle_is_refused_in_one_sentence(tmp_path, name):
    path = tmp_path / "model.pt"
    path.write_bytes(PICKLES[name])
    with pytest.raises(ConversionError, match="^model.pt (is cut short|holds something else)") as caught:
        open_checkpoint(path)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_lacks_its_middle_is_refused_in_one_sentence(tmp_path, tensors, name):
    path = tmp_path / name
    WRITERS[name](tensors | {"more": torch.randn(50, 50)}, path)
    content, middle = path.read_bytes(), path.stat().st_size // 2
    path.write_bytes(content[: middle - 100] + content[middle + 100 :])
    with pytest.raises(ConversionError, match=f"^{name} ") as caught:
        dict(open_checkpoint(path).tensors)
    assert str(caught.value).count("\n") == 0 and str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize("name", ["zip.pt", "arrays.npz"])
def test_a_system_that_cannot_read_is_no_fault_of_the_file(tmp_path, monkeypatch, tensors, name):
    WRITERS[name](tensors, tmp_path / name)

    def broken(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(zipfile, "ZipFile", broken)
    with pytest.raises(OSError, match="Input/output error"):
        open_checkpoint(tmp_path / name)


def test_wrappers_in_wrappers_are_unwrapped_as_deep_as_they_are():
    content = {"a": torch.ones(1)}
    for _ in range(3_000):
        content = {"model": content}
    assert module._unwrapped(content, "model.pt") == {"a": torch.ones(1)}


def test_a_tensor_may_repeat_its_numbers(tmp_path):
    """Within reason, as a buffer of positions that was expanded over the batch."""
    tensor = torch.arange(1000.0).expand(30, 1000)
    torch.save({"a": tensor}, tmp_path / "model.pt")
    assert_holds(open_checkpoint(tmp_path / "model.pt"), {"a": tensor})


# Files of NumPy


ARRAYS = {
    "Transformer/encoder_norm/bias": np.arange(6, dtype=np.float32).reshape(2, 3),
    "turned": np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
    "params/img/b.c": np.arange(3),
    "step": np.int32(5),
    "mask": np.array([True, False]),
    "none": np.zeros((0, 4), np.float64),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_of_numpy(tmp_path, save):
    path = tmp_path / "ViT-B_16.npz"
    save(path, **ARRAYS)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    checkpoint = open_checkpoint(path, sha256=digest)
    assert_holds(checkpoint, {name: torch.from_numpy(np.array(array)) for name, array in ARRAYS.items()})
    assert checkpoint.origins == (Origin(path.name, None, digest),) and checkpoint.folder is None
    assert set(checkpoint.select("params/img/").tensors) == {"b.c"}


def test_arrays_are_read_one_at_a_time(tmp_path, monkeypatch):
    np.savez(tmp_path / "m.npz", **ARRAYS)
    opened = []
    original = zipfile.ZipFile.open
    monkeypatch.setattr(
        zipfile.ZipFile,
        "open",
        lambda self, name, *rest, **more: opened.append(name) or original(self, name, *rest, **more),
    )
    checkpoint = open_checkpoint(tmp_path / "m.npz")
    assert list(checkpoint.tensors) == list(ARRAYS) and opened == []
    checkpoint.tensors["step"]
    assert opened == ["step.npy"]


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def header(shape, dtype="<f4") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


STRANGE = {
    "objects": npy(np.array([Executes()], dtype=object)),
    "words": npy(np.array(["a"])),
    "records": npy(np.zeros(2, [("a", "f4"), ("b", "f4")])),
    "numbers of another machine": npy(np.zeros(2, ">f4")),
    "more numbers than any memory": header((1 << 45,)),
    "more numbers than the file": header((100,)) + bytes(40),
    "more of no type": header((100,), "|V2") + bytes(40),
    "a negative shape": header((-4,)) + bytes(40),
    "no array": b"neither",
    "no header": b"",
    "a header that does not end": b"\x93NUMPY\x01\x00\x10\x00{'descr':((((((((",
    "a header that nests": b"\x93NUMPY\x01\x00\x10\x27" + b"(" * 10_000,
    "a header that calls": b"\x93NUMPY\x01\x00\x17\x00__import__('antigravity')",
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_array_of_plain_numbers_is_refused_in_one_sentence(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("m.npz", "w") as file:
        file.writestr("a/b.npy", STRANGE[name])
    with pytest.raises(
        ConversionError, match=r"^m.npz is no whole .npz file with plain numbers in a/b \(.*\): copy"
    ) as caught:
        open_checkpoint(tmp_path / "m.npz").tensors["a/b"]
    assert str(caught.value).count("\n") == 0 and str(tmp_path) not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_file_of_numpy_is_refused_in_one_sentence(tmp_path, save):
    path = tmp_path / "m.npz"
    save(path, a=np.random.default_rng(0).random(4000).astype(np.float32))
    content = path.read_bytes()
    middle = len(content) // 2
    for damaged in (
        content[:middle],
        content[:middle] + b"\xff" * 20 + content[middle + 20 :],
        content[:middle] + content[middle + 20 :],
        content[:-10],
        b"",
        b"PK",
        pickle.dumps(os.mkdir),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ConversionError, match="^m.npz is no whole .npz file") as caught:
            open_checkpoint(path).tensors["a"]
        assert str(caught.value).count("\n") == 0 and str(tmp_path) not in str(caught.value)


def test_a_zip_bomb_of_arrays_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "m.npz", a=np.zeros(1 << 22, np.float32))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_, **__: pytest.fail("the bomb was unpacked"))
    with pytest.raises(ConversionError, match=r"^m.npz is refused: its \d+ bytes would unpack to 16777344"):
        open_checkpoint(tmp_path / "m.npz")


def test_a_file_of_numpy_with_anything_else_is_refused(tmp_path):
    np.savez(tmp_path / "m.npz", a=np.ones(1))
    with zipfile.ZipFile(tmp_path / "m.npz", "a") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(ConversionError, match="m.npz holds what is no array: readme.txt"):
        open_checkpoint(tmp_path / "m.npz")


# Folders


def write_shards(folder, tensors, suffix=".safetensors"):
    stem, write = ("model", save_file) if suffix == ".safetensors" else ("pytorch_model", torch.save)
    names = sorted(tensors)
    files = {f"{stem}-00001-of-00002{suffix}": names[:2], f"{stem}-00002-of-00002{suffix}": names[2:]}
    for file, held in files.items():
        write({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in files.items() for name in held}
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_one_checkpoint(tmp_path, tensors, suffix):
    write_shards(tmp_path, tensors, suffix)
    (tmp_path / "config.json").write_text('{"model_type": "toy"}')
    checkpoint = open_checkpoint(tmp_path)
    assert_holds(checkpoint, tensors)
    assert checkpoint.origins == (Origin(tmp_path.name),)
    assert checkpoint.configs == {"config.json": {"model_type": "toy"}} and checkpoint.folder == tmp_path
    with pytest.raises(ValueError, match="2 files of weights"):
        open_checkpoint(tmp_path, sha256="0" * 64)


def test_the_best_published_file_of_a_folder_is_read(tmp_path):
    """In a folder with everything, files are taken away one by one."""
    order = [
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ]
    write_shards(tmp_path, {"shard.a": torch.ones(1), "shard.b": torch.ones(1), "x.c": torch.ones(1)})
    write_shards(tmp_path, {"bin.a": torch.ones(1), "bin.b": torch.ones(1), "x.c": torch.ones(1)}, ".bin")
    for file in order:
        if not file.endswith(".json"):
            write = save_file if file.endswith(".safetensors") else torch.save
            write({file: torch.ones(1)}, tmp_path / file)
    torch.save({"step": 1}, tmp_path / "training_args.bin")
    expected = dict.fromkeys(order) | {order[3]: "shard.a", order[5]: "bin.a"}
    for file in order:
        assert (expected[file] or file) in open_checkpoint(tmp_path).tensors
        (tmp_path / file).unlink()


def test_one_file_of_another_name_is_read(tmp_path, tensors):
    torch.save({"other": torch.ones(1)}, tmp_path / "best.ckpt")
    assert_holds(open_checkpoint(tmp_path), {"other": torch.ones(1)})
    save_file(tensors, tmp_path / "weights.safetensors")
    assert_holds(open_checkpoint(tmp_path), tensors)


def test_arrays_are_read_where_nothing_else_is(tmp_path):
    np.savez(tmp_path / "ViT-B_16.npz", a=np.ones(2, np.float32))
    assert_holds(open_checkpoint(tmp_path), {"a": torch.ones(2)})
    torch.save({"b": torch.ones(1)}, tmp_path / "b.bin")
    assert_holds(open_checkpoint(tmp_path), {"b": torch.ones(1)})


def test_several_files_of_other_names_are_refused(tmp_path, tensors):
    for name in ("b.safetensors", "a.safetensors"):
        save_file(tensors, tmp_path / name)
    with pytest.raises(ConversionError, match="several files of weights, a.safetensors, b.safetensors"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConversionError, match=f"{tmp_path.name} holds no weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "a\\x", "C:x"])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, tensors, name, suffix):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file(tensors, place / "x.safetensors")
    index = write_shards(folder, tensors, suffix)
    content = json.loads(index.read_text())
    content["weight_map"]["a.bias"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ConversionError, match="outside its folder"):
        open_checkpoint(folder)


def test_missing_and_doubled_shards_are_refused(tmp_path, tensors):
    index = write_shards(tmp_path, tensors)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(ConversionError, match=f"{second.name}, which are missing"):
        open_checkpoint(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ConversionError, match="hold a.bias, a.weight"):
        open_checkpoint(tmp_path)
    second.write_bytes(content)
    for broken in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 200_000):
        index.write_text(broken)
        with pytest.raises(ConversionError, match=f"{index.name} is no index of shards"):
            open_checkpoint(tmp_path)


def test_json_files_beside_the_weights(tmp_path, tensors, monkeypatch):
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 4}}')
    (tmp_path / "merges.json").write_text("[1, 2]")
    (tmp_path / "vocab.json").write_text(json.dumps({"word": 1}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.configs == {
        "open_clip_config.json": {"model_cfg": {"embed_dim": 4}},
        "vocab.json": {"word": 1},
    }
    (tmp_path / "vocab.json").write_text(json.dumps({"word" * (1 << 18): 1}))
    assert set(open_checkpoint(tmp_path).configs) == {"open_clip_config.json"}
    (tmp_path / "config.json").write_text('{"half": ')
    with pytest.raises(ConversionError, match="config.json is not JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ConversionError, match="config.json is not JSON .maximum recursion depth"):
        open_checkpoint(tmp_path)


def test_only_the_last_part_of_a_path_is_recorded(tmp_path, monkeypatch, tensors):
    folder = tmp_path / "private" / "clip"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    monkeypatch.chdir(folder)
    names = {open_checkpoint(source).origins[0].name for source in (folder, ".", "../clip", str(folder) + "/")}
    assert names == {"clip"}


# Several sources


def a_checkpoint(name, **tensors):
    return Checkpoint(tensors, {"config.json": {"of": name}}, (Origin(name),), None)


def test_select_prefix_and_merge():
    a, b = torch.ones(1), torch.ones(2)
    vision = a_checkpoint("vision", **{"visual.a": a, "text.b": b}).select("visual.")
    assert_holds(vision, {"a": a})
    text = a_checkpoint("text", b=b).with_prefix("text_model.")
    assert_holds(text, {"text_model.b": b})
    assert_holds(text.select("text_model."), {"b": b})
    merged = merge(vision, text, a_checkpoint("third", c=a))
    assert_holds(merged, {"a": a, "text_model.b": b, "c": a})
    assert merged.origins == (Origin("vision"), Origin("text"), Origin("third"))
    assert merged.configs == {"config.json": {"of": "vision"}}


def test_merging_the_same_name_twice_is_refused():
    with pytest.raises(ConversionError, match="Two of the checkpoints hold a, b:"):
        merge(*(a_checkpoint(name, a=torch.ones(1), b=torch.ones(1)) for name in ("x", "y")))


class Counting(dict):
    def __init__(self, tensors):
        super().__init__(tensors)
        self.reads = []

    def __getitem__(self, name):
        self.reads.append(name)
        return super().__getitem__(name)


def test_renaming_and_merging_read_nothing():
    counting = Counting({"module.a": torch.ones(1), "module.b": torch.ones(1)})
    checkpoint = Checkpoint(counting, {}, (), None).select("module.").with_prefix("x.")
    merged = merge(checkpoint, a_checkpoint("y", c=torch.ones(1)))
    assert sorted(merged.tensors) == ["c", "x.a", "x.b"] and counting.reads == []
    merged.tensors["x.b"]
    assert counting.reads == ["module.b"]


# The Hub


@pytest.mark.parametrize("source", ["someone/nothing", "nothing.pt", "/no/such/file.pt", "a b c"])
def test_offline_and_not_here_is_one_sentence(source):
    with pytest.raises(OSError, match="is no file or folder here, and could not be had from the Hub") as caught:
        open_checkpoint(source)
    assert str(caught.value).startswith(source) and str(caught.value).count("\n") == 0


def test_a_local_path_has_no_revision(tmp_path):
    with pytest.raises(ValueError, match="leave revision out"):
        open_checkpoint(tmp_path, revision="main")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with HubServer() as hub:
        hub.attach(monkeypatch)
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        yield hub


@pytest.fixture
def repository(tmp_path, tensors):
    """The files of a repository with shards in two formats and much else."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "toy"}')
    for name in ("vocab.txt", "spiece.model", "README.md", "modeling.py"):
        (folder / name).write_text(name)
    write_shards(folder, tensors)
    write_shards(folder, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, ".bin")
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"onnx/config.json": b"{}"}


def fetched(hub):
    return {path.rpartition("/")[2] for method, path in hub.requests if method == "GET" and "/resolve/" in path}


SMALL = {"config.json", "vocab.txt", "spiece.model"}


@pytest.mark.parametrize("revision", [None, "main", "v1", "commit"])
def test_one_format_and_the_small_files_come_from_the_hub(hub, tmp_path, tensors, repository, revision):
    save_file(tensors, tmp_path / "one")
    content = (tmp_path / "one").read_bytes()
    commit = hub.make("someone/toy").commit("main", "weights", repository | {"model.safetensors": content})
    hub.repositories["someone/toy"].refs["v1"] = commit.oid
    if revision != "commit":
        hub.repositories["someone/toy"].commit("other", "later", {})
    digest = hashlib.sha256(content).hexdigest()
    wanted = commit.oid if revision == "commit" else revision
    checkpoint = open_checkpoint("someone/toy", revision=wanted, sha256=digest)
    assert_holds(checkpoint, tensors)
    assert checkpoint.origins == (Origin("someone/toy", commit.oid, digest),)
    assert checkpoint.configs == {"config.json": {"model_type": "toy"}}
    assert (checkpoint.folder / "vocab.txt").read_text() == "vocab.txt"
    assert fetched(hub) == {"model.safetensors", *SMALL}


def test_shards_come_from_the_hub(hub, tensors, repository):
    commit = hub.make("someone/toy").commit("main", "weights", repository)
    checkpoint = open_checkpoint("someone/toy")
    assert_holds(checkpoint, tensors)
    assert checkpoint.origins == (Origin("someone/toy", commit.oid),)
    shards = {name for name in repository if name.startswith("model") and name.endswith((".safetensors", ".json"))}
    assert fetched(hub) == {*shards, *SMALL} and len(shards) == 3


def test_what_was_downloaded_opens_when_the_hub_is_gone(hub, tensors, repository, monkeypatch):
    commit = hub.make("someone/toy").commit("main", "weights", repository)
    open_checkpoint("someone/toy")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit.oid):
        checkpoint = open_checkpoint("someone/toy", revision=revision)
        assert_holds(checkpoint, tensors)
        assert checkpoint.origins[0].revision == commit.oid
    with pytest.raises(OSError, match="could not be had from the Hub"):
        open_checkpoint("someone/toy", revision="v2")


def test_an_index_on_the_hub_that_leaves_its_folder_is_refused(hub, repository):
    index = {"weight_map": {"a": "../../someone/plain/model.safetensors"}}
    hub.make("someone/toy").commit(
        "main", "weights", repository | {"model.safetensors.index.json": json.dumps(index).encode()}
    )
    with pytest.raises(ConversionError, match="outside its folder"):
        open_checkpoint("someone/toy")
    assert fetched(hub) == {"model.safetensors.index.json"}


def test_what_the_hub_does_not_give_is_one_sentence(hub, repository, monkeypatch):
    hub.make("someone/toy").commit("main", "weights", repository)
    hub.make("someone/empty")
    hub.make("someone/secret", private=True).commit("main", "weights", repository)
    hub.make("someone/gated")

    def refused(source, message, kind=OSError, **options):
        with pytest.raises(kind, match=message) as caught:
            open_checkpoint(source, **options)
        assert str(caught.value).count("\n") == 0

    refused("someone/nothing", "the Hub has no such repository, or it is private")
    refused("someone/toy", "someone/toy has no revision v7", revision="v7")
    refused("someone/empty", "someone/empty holds no weights", ConversionError)
    assert open_checkpoint("someone/secret", token=hub.token).tensors
    monkeypatch.delenv("HF_TOKEN")
    refused("someone/secret", "or it is private")

    def gated(*_):
        raise server.Refused(403, "Access is restricted", "GatedRepo")

    monkeypatch.setattr(server.RequestHandler, "commit_at", gated)
    refused("someone/gated", "someone/gated is gated: accept its terms")


def test_a_download_that_breaks_off_is_one_sentence(hub, repository, monkeypatch):
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    hub.make("someone/toy").commit("main", "weights", repository)
    hub.fault = Fault(at=4, kind="middle", lasting=True)
    with pytest.raises(OSError, match="of someone/toy could not be downloaded") as caught:
        open_checkpoint("someone/toy")
    assert str(caught.value).count("\n") == 0


def test_a_pickle_is_never_read_by_pickle(tmp_path, monkeypatch, tensors):
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("pickle.load was called"))
    monkeypatch.setattr(pickle, "Unpickler", lambda *_, **__: pytest.fail("pickle.Unpickler was used"))
    for write in (torch.save, legacy):
        write(tensors, tmp_path / "model.pt")
        assert_holds(open_checkpoint(tmp_path / "model.pt"), tensors)
