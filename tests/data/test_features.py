"""Features computed once: the store holds exactly what the tower gave, whatever happened on the way."""

import hashlib
import json
import os
import pickle
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from drawn import NAMES, cut_jpeg, encoded, picture, tiny_clip, tiny_processor
from PIL import Image
from torch import distributed as dist
from torch import multiprocessing
from torch.utils.data import DataLoader

from hf_mm.data import features
from hf_mm.data.features import (
    DamagedStore,
    FeatureRows,
    FeatureSpec,
    FeatureStore,
    compute_features,
    feature_spec,
    picture_key,
    row_keys,
    view_key,
)
from hf_mm.data.image_text import BrokenRow, Columns, ImageTextRows
from hf_mm.data.sampling import Draw

SPEC = FeatureSpec(
    fingerprint="ab12",
    config={"model_type": "mm_clip", "vision_config": {"hidden_act": "quick_gelu"}},
    features="image_embeds",
    preprocessing={"size": {"height": 16, "width": 16}, "image_mean": (0.5, 0.5, 0.5), "resample": 3},
    tower="some/tower",
    revision="c0ffee",
)
COUNT = 11
KEYS = [f"key {number}" for number in range(COUNT)]


def spec(**fields) -> FeatureSpec:
    return FeatureSpec(**{**SPEC.__dict__, **fields})


class Encoder:
    """Features that tell which pictures came, and in which batch: each depends on all of its batch.

    Fails at call number `until`, as a process that is killed there.
    """

    def __init__(self, until: int | None = None):
        self.batches, self.until = [], until

    def __call__(self, batch: list[float]) -> torch.Tensor:
        if len(self.batches) == self.until:
            raise KeyboardInterrupt
        self.batches.append(list(batch))
        numbers = torch.tensor(batch, dtype=torch.float32)
        return torch.stack([numbers / 3, numbers.sin(), numbers.sum().expand(len(batch))], 1).reshape(-1, 3, 1)


def compute(folder, encode=None, pictures=None, keys=KEYS, **options) -> FeatureStore:
    pictures = list(range(len(keys))) if pictures is None else pictures
    options = {"spec": SPEC, "batch_size": 2, "shard_rows": 4, "progress": False, **options}
    return compute_features(encode or Encoder(), pictures, keys, folder=folder, **options)


def expected(pictures=range(COUNT), shard_rows: int = 4, batch_size: int = 2) -> torch.Tensor:
    parts = [pictures[start : start + shard_rows] for start in range(0, len(pictures), shard_rows)]
    batches = [part[start : start + batch_size] for part in parts for start in range(0, len(part), batch_size)]
    encode = Encoder()
    return torch.cat([encode(batch) for batch in batches])


def files(folder: Path) -> dict[str, str]:
    """Every file of a folder and a hash of its bytes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


# What is stored


def test_rows_are_exactly_what_the_tower_gave_in_any_order(tmp_path):
    store = compute(tmp_path / "store")
    truth = expected()
    assert (store.keys, len(store), store.shape, store.dtype) == (KEYS, COUNT, (3, 1), torch.float32)
    for numbers in ([0], [10, 0, 3, 3, 9, 0], list(range(COUNT)), [], [4, 5], torch.tensor([7, 2])):
        rows = store.rows(numbers)
        assert rows.dtype == torch.float32 and torch.equal(rows, truth[torch.as_tensor(numbers, dtype=torch.long)])
    assert store.index_of(["key 7", "key 2", "key 7"]) == [7, 2, 7]
    assert torch.equal(store["key 5"], truth[5])
    assert "key 5" in store and "key 50" not in store


def test_rows_are_copies(tmp_path):
    store = compute(tmp_path)
    store.rows([1, 5]).zero_()
    store.rows([1]).zero_()
    assert torch.equal(store.rows(range(COUNT)), expected())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_features_are_stored_in_the_dtype_of_the_spec(tmp_path, dtype):
    store = compute(tmp_path, spec=spec(dtype=dtype))
    assert torch.equal(store.rows(range(COUNT)), expected().to(getattr(torch, dtype)))


def test_a_store_opens_in_another_process(tmp_path):
    store = pickle.loads(pickle.dumps(compute(tmp_path)))
    assert torch.equal(store.rows([3, 9]), expected()[[3, 9]])
    assert FeatureStore.open(tmp_path, SPEC).keys == KEYS
    stored = FeatureStore.open(tmp_path).spec
    assert (stored, stored.tower, stored.revision) == (SPEC, "some/tower", "c0ffee")


def test_equal_keys_are_computed_once(tmp_path):
    encode = Encoder()
    store = compute(tmp_path, encode, pictures=[0, 1, 0, 2, 1], keys=["a", "b", "a", "c", "b"])
    assert store.keys == ["a", "b", "c"]
    assert sum(encode.batches[1:], []) == [0, 1, 2]  # the first call asks for the shape of a row


def test_only_what_is_read_is_in_memory(tmp_path):
    """Rows come from a map of the file: a write to the file shows in a store that is open."""
    store = compute(tmp_path)
    before = store.rows([0]).clone()
    (file,) = tmp_path.glob("000000-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-48:] = np.full(12, 9, np.float32).tobytes()
    with file.open("r+b") as opened:
        opened.write(content)
    assert not torch.equal(store.rows([0]), before) and store.rows([0]).unique() == 9


def test_the_largest_shard_that_memory_should_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD_BYTES", 5 * 12)  # five rows: two batches of two
    store = compute(tmp_path, shard_rows=None)
    assert [len(shard.keys) for shard in store.shards] == [4, 4, 3]
    monkeypatch.setattr(features, "SHARD_ROWS", 2)
    assert [len(shard.keys) for shard in compute(tmp_path / "other", shard_rows=None).shards] == [2] * 5 + [1]


# Resuming


def test_a_complete_store_computes_nothing(tmp_path):
    compute(tmp_path)
    before = files(tmp_path)
    assert compute(tmp_path, Encoder(until=0)).keys == KEYS
    assert files(tmp_path) == before


def test_a_second_call_waits_for_the_first_and_computes_the_rest(tmp_path, monkeypatch):
    began, waits = threading.Event(), threading.Event()

    class Slow(Encoder):
        def __call__(self, batch):
            began.set()
            assert waits.wait(60)
            return super().__call__(batch)

    monkeypatch.setattr(features.logger, "warning", lambda message: "another run" in message and waits.set())
    first, second = Slow(), Encoder()
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(compute, tmp_path / "store", first)
        assert began.wait(60)
        two = pool.submit(compute, tmp_path / "store", second, keys=[*KEYS, "one more"])
        assert one.result().keys == KEYS and set(two.result().keys) == {*KEYS, "one more"}
    assert second.batches == [[COUNT]]
    assert compute(tmp_path / "store").keys == two.result().keys


@pytest.mark.parametrize("until", range(7))
def test_killed_in_the_tower_the_same_call_ends_with_the_same_files(tmp_path, until):
    compute(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "killed", Encoder(until))
    before = FeatureStore.open(tmp_path / "killed").keys if until else []
    assert len(before) == 4 * (max(until - 1, 0) // 2)
    encode = Encoder()
    compute(tmp_path / "killed", encode)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert not set(map(KEYS.index, before)) & set(sum(encode.batches, []))


def test_killed_while_writing_the_same_call_ends_with_the_same_files(tmp_path, monkeypatch):
    compute(tmp_path / "whole")
    replace, count = os.replace, len(files(tmp_path / "whole"))
    for when in range(count):
        left = [when]

        def kill(source, target, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(source, target)

        folder = tmp_path / f"killed {when}"
        monkeypatch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            compute(folder)
        monkeypatch.setattr(os, "replace", replace)
        assert any(name.endswith(".incomplete") for name in files(folder))
        compute(folder)
        assert files(folder) == files(tmp_path / "whole")


def test_more_pictures_add_to_what_is_there(tmp_path):
    compute(tmp_path, keys=KEYS[:5])
    before = files(tmp_path)
    encode = Encoder()
    store = compute(tmp_path, encode)
    assert sum(encode.batches, []) == [5, 6, 7, 8, 9, 10]
    assert before.items() <= files(tmp_path).items()
    assert store.keys == KEYS and torch.equal(store["key 6"], expected(range(5, COUNT))[1])
    other = compute(tmp_path, pictures=[50.0, 3], keys=["another", "key 3"])
    assert other.keys == [*KEYS, "another"] and other["another"][0] == torch.tensor(50.0) / 3


# Another spec


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fingerprint": "cd34"}, "the weights' fingerprint is 'ab12', not 'cd34'"),
        (
            {"config": {"model_type": "mm_clip", "vision_config": {"hidden_act": "gelu"}}},
            "the config.vision_config.hidden_act is 'quick_gelu', not 'gelu'",
        ),
        ({"features": "layer -2"}, "the features is 'image_embeds', not 'layer -2'"),
        (
            {"preprocessing": {**SPEC.preprocessing, "size": {"height": 24, "width": 24}}},
            "the preprocessing.size.height is 16, not 24",
        ),
        ({"preprocessing": {**SPEC.preprocessing, "do_pad": True}}, "the preprocessing.do_pad is None, not True"),
        ({"dtype": "bfloat16"}, "the dtype is 'float32', not 'bfloat16'"),
        ({"view": "flipped"}, "the view is 'center', not 'flipped'"),
    ],
)
def test_a_stale_store_is_refused_and_says_why(tmp_path, fields, message):
    compute(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="holds other features of some/tower: " + message):
        FeatureStore.open(tmp_path, spec(**fields))
    with pytest.raises(ValueError, match=message):
        compute(tmp_path, Encoder(until=0), spec=spec(**fields))
    assert files(tmp_path) == before


def test_the_same_weights_from_another_place_are_the_same_tower(tmp_path):
    compute(tmp_path)
    moved = spec(tower="/a/folder", revision=None, preprocessing=json.loads(json.dumps(SPEC.preprocessing)))
    assert compute(tmp_path, Encoder(until=0), spec=moved).keys == KEYS


def test_the_digest_tells_specs_apart_as_comparing_them_does():
    elsewhere = spec(tower="other/place", revision=None)
    assert re.fullmatch("[0-9a-f]{12}", SPEC.digest) and SPEC.digest == elsewhere.digest
    backwards = spec(config=dict(reversed(SPEC.config.items())))
    assert backwards == SPEC and backwards.digest == SPEC.digest
    others = [
        spec(fingerprint="ab13"),
        spec(features="image"),
        spec(dtype="float16"),
        spec(view="2 views"),
        spec(config={}),
    ]
    others.append(spec(preprocessing={**SPEC.preprocessing, "resample": 2}))
    assert len({SPEC.digest, *(other.digest for other in others)}) == len(others) + 1


def test_an_index_without_features_binds_nobody(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path, Encoder(until=1))
    assert set(files(tmp_path)) == {"index.json"}
    assert compute(tmp_path, spec=spec(view="flipped")).spec.view == "flipped"


# Damage


def damage(folder: Path, how: str, number: int = 1) -> str:
    (file,) = folder.glob(f"{number:06d}-*.safetensors")
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(content[:-4] if how == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    return file.stem


@pytest.mark.parametrize("how", ["missing", "cut", "changed"])
def test_a_damaged_shard_is_named_and_computed_again(tmp_path, how):
    compute(tmp_path)
    before = files(tmp_path)
    name = damage(tmp_path, how)
    if how == "changed":
        FeatureStore.open(tmp_path, SPEC)  # only reading all of it can tell
    with pytest.raises(DamagedStore, match=name):
        FeatureStore.open(tmp_path, SPEC, verify=True)
    encode = Encoder()
    store = compute(tmp_path, encode, verify=how == "changed")
    assert encode.batches == [[4, 5], [6, 7]]
    assert files(tmp_path) == before
    assert torch.equal(store.rows(range(COUNT)), expected())


def test_a_damaged_shard_whose_pictures_are_gone(tmp_path):
    compute(tmp_path)
    damage(tmp_path, "cut")
    store = compute(tmp_path, Encoder(), pictures=[5, 0], keys=["key 5", "key 0"])
    assert sorted(store.keys) == sorted(set(KEYS) - {"key 4", "key 6", "key 7"})
    assert torch.equal(store["key 5"][:2], expected()[5][:2]) and torch.equal(store["key 8"], expected()[8])


def test_a_shard_that_breaks_while_it_is_read(tmp_path):
    store = compute(tmp_path)
    shutil.copy(tmp_path / "index.json", next(tmp_path.glob("000001-*.safetensors")))
    with pytest.raises(DamagedStore, match="000001-.* cannot be read"):
        store.rows([5])
    assert torch.equal(store.rows([0]), expected()[:1])


# Disk


def test_features_beyond_the_bound_are_refused_before_they_are_computed(tmp_path):
    encode = Encoder()
    with pytest.raises(ValueError, match="would take 132 bytes, more than max_bytes \\(131 bytes\\)"):
        compute(tmp_path / "store", encode, max_bytes=11 * 12 - 1)
    assert encode.batches == [[0]] and not (tmp_path / "store").exists()
    store = compute(tmp_path / "store", max_bytes=11 * 12)
    there = sum(shard.bytes for shard in store.shards)
    more = {"pictures": [20], "keys": ["one more"]}
    with pytest.raises(ValueError, match="max_bytes"):
        compute(tmp_path / "store", max_bytes=there + 11, **more)
    assert len(compute(tmp_path / "store", max_bytes=there + 12, **more)) == COUNT + 1


def test_features_beyond_the_free_disk_are_refused(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ValueError, match="11 pictures need 132 bytes more, but .* has 100 bytes free"):
        compute(tmp_path / "a" / "store")
    assert not (tmp_path / "a").exists()


def test_a_disk_that_fills_up_leaves_whole_shards(tmp_path, monkeypatch):
    written, save = [], features.save_file

    def full(tensors, file):
        save(tensors, file)
        written.append(file)
        if len(written) == 2:
            raise OSError("No space left on device")

    monkeypatch.setattr(features, "save_file", full)
    with pytest.raises(OSError, match="000001-.* could not be written \\(No space left on device\\)"):
        compute(tmp_path)
    assert FeatureStore.open(tmp_path).keys == KEYS[:4]
    assert not any(name.endswith(".incomplete") for name in files(tmp_path))


# Pictures that cannot be read, and features that are none


SKIPPED = {"key 3": "row 3: it is cut short", "key 9": "row 9: it is cut short"}


class Rows(list):
    """Pictures some of which are broken, as `ImageTextRows` says it."""

    broken = (3, 9)

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenRow(f"row {index}", "it is cut short")
        return super().__getitem__(index)


def test_a_broken_picture_is_left_out_told_and_tried_again(tmp_path):
    good = [number for number in range(COUNT) if number not in Rows.broken]
    encode = Encoder()
    store = compute(tmp_path, encode, pictures=Rows(range(COUNT)))
    assert store.skipped == SKIPPED
    assert store.keys == [KEYS[number] for number in good]
    assert encode.batches[1:] == [[0, 1], [2], [4, 5], [6, 7], [8, 10]]
    with pytest.raises(KeyError, match="'key 9': its picture could not be read \\(row 9: it is cut short\\)"):
        store.index_of(["key 0", "key 9"])

    before = files(tmp_path)
    assert compute(tmp_path, Encoder(until=0), pictures=Rows(range(COUNT))).skipped == store.skipped
    assert files(tmp_path) == before
    mended = compute(tmp_path)
    assert mended.skipped == {} and mended.keys == [*store.keys, "key 3", "key 9"]
    assert torch.equal(mended.rows(range(9)), store.rows(range(9)))


@pytest.mark.parametrize("until", range(6))
def test_broken_pictures_do_not_shift_the_shards_of_a_call_that_goes_on(tmp_path, until):
    compute(tmp_path / "whole", pictures=Rows(range(COUNT)))
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path / "killed", Encoder(until), pictures=Rows(range(COUNT)))
    compute(tmp_path / "killed", pictures=Rows(range(COUNT)))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_shard_of_broken_pictures_alone(tmp_path):
    class Half(Rows):
        broken = range(4, 8)

    store = compute(tmp_path, pictures=Half(range(COUNT)))
    assert store.keys == KEYS[:4] + KEYS[8:] and list(store.skipped) == KEYS[4:8]
    assert torch.equal(store.rows([4]), expected(range(8, COUNT))[:1])


def test_no_picture_can_be_read(tmp_path):
    class All(Rows):
        broken = range(COUNT)

    with pytest.raises(ValueError, match="None of the 11 pictures can be read; the first: row 0: it is cut short"):
        compute(tmp_path, pictures=All(range(COUNT)))


def test_strict_stops_at_a_broken_picture(tmp_path):
    with pytest.raises(BrokenRow, match="row 3: it is cut short"):
        compute(tmp_path, pictures=Rows(range(COUNT)), strict=True)


def test_files_and_bytes_are_opened_and_broken_ones_left_out(tmp_path):
    picture("red").save(tmp_path / "red.png")
    (tmp_path / "cut.jpg").write_bytes(cut_jpeg())
    pictures = [str(tmp_path / "red.png"), tmp_path / "none.png", tmp_path / "cut.jpg", encoded(picture("blue"))]
    pictures += [{"bytes": encoded(picture("green").convert("L")), "path": None}]
    seen = []

    def encode(batch):
        seen.extend(batch)
        return torch.tensor([[float(value) for value in image.getpixel((0, 0))] for image in batch])

    store = compute(tmp_path / "store", encode, pictures=pictures, keys=list("abcde"))
    assert store.keys == ["a", "d", "e"] and sorted(store.skipped) == ["b", "c"]
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in seen)
    assert store["a"].tolist() == [220, 20, 20] and store["d"].tolist() == [20, 20, 220]


def test_samples_that_are_dicts_arrive_as_they_are(tmp_path):
    samples = [{"pixels": float(number)} for number in range(3)]
    store = compute(
        tmp_path, lambda batch: torch.tensor([[sample["pixels"]] for sample in batch]), samples, list("abc")
    )
    assert store.rows(range(3)).flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5])
def test_features_that_are_not_finite_name_their_picture(tmp_path, value):
    def encode(batch):
        return torch.tensor([[value if number == 5 else 1.0] for number in batch])

    with pytest.raises(ValueError, match="the features of key 5 are not finite in float16"):
        compute(tmp_path, encode, spec=spec(dtype="float16"))


def test_wrong_outputs_of_the_tower(tmp_path):
    with pytest.raises(ValueError, match=r"must return a tensor \(1, ...\) for 1 pictures, not \(2, 3\)"):
        compute(tmp_path, lambda batch: torch.zeros(len(batch) + 1, 3))
    with pytest.raises(ValueError, match="not a list"):
        compute(tmp_path, lambda batch: [0.0] * len(batch))
    with pytest.raises(ValueError, match=r"key 4 has features \(5,\), others \(1,\)"):
        compute(tmp_path, lambda batch: torch.zeros(len(batch), 1 + max(batch[0], 0)), batch_size=4)
    with pytest.raises(ValueError, match=r"has features \(7,\), others \(3, 1\)"):
        compute(tmp_path / "appended", keys=KEYS[:4])
        compute(tmp_path / "appended", lambda batch: torch.zeros(len(batch), 7))


def test_wrong_calls(tmp_path):
    with pytest.raises(ValueError, match="3 pictures but 11 keys"):
        compute(tmp_path, pictures=[1, 2, 3])
    with pytest.raises(ValueError, match="must be at least 1"):
        compute(tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="dtype must be one of float32"):
        spec(dtype="int8")
    with pytest.raises(FileNotFoundError, match="is no store of features"):
        FeatureStore.open(tmp_path / "nowhere")
    store = compute(tmp_path)
    for numbers in ([11], [-1]):
        with pytest.raises(IndexError, match="rows are numbered 0 to 10"):
            store.rows(numbers)
    with pytest.raises(KeyError, match="has no features of 'key 50'"):
        store["key 50"]
    (tmp_path / "index.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="no index of features that this version reads"):
        FeatureStore.open(tmp_path)


# Keys


def test_the_key_of_a_file_changes_when_the_file_does(tmp_path):
    file = tmp_path / "a.png"
    picture("red").save(file)
    key = picture_key(file)
    assert key == picture_key(str(file)) == picture_key({"path": str(file), "bytes": None})
    assert key == picture_key(os.path.relpath(file)) and len(key) == 32
    os.utime(file, ns=(1, 1))
    assert picture_key(file) != key
    with pytest.raises(FileNotFoundError, match="no image file"):
        picture_key(tmp_path / "b.png")


def test_the_key_of_a_picture_in_memory_is_of_what_it_shows():
    red, blue = picture("red"), picture("blue")
    array = np.asarray(red)
    assert picture_key(red) == picture_key(red.copy()) == picture_key(Image.fromarray(array))
    content = encoded(red)
    assert picture_key(content) == picture_key({"bytes": content, "path": "a.png"})
    assert picture_key(array) == picture_key(np.asfortranarray(array))
    gray, turned = Image.new("L", (4, 2), 7), Image.new("L", (2, 4), 7)
    palettes = [Image.new("P", (2, 2)) for _ in range(2)]
    for palette, value in zip(palettes, (10, 20), strict=True):
        palette.putpalette([value] * 768)
    floats = [np.full((4, 4, 3), value) for value in (0.5, 0.5001)]
    different = [red, blue, content, encoded(blue), array, array[:-1], torch.tensor(array), *palettes, gray, turned]
    different += [*floats, torch.tensor(floats[0]), torch.tensor(floats[0]).bfloat16(), "https://a.b/c.png"]
    assert len({picture_key(item) for item in different}) == len(different)


def test_the_keys_of_rows_are_those_of_their_pictures(tmp_path):
    picture("red").save(tmp_path / "red.png")
    images = [{"path": "red.png", "bytes": None}, {"bytes": encoded(picture("blue")), "path": "b"}, None]
    kinds = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict({"image": images, "caption": ["a", "b", "c"]}, features=kinds)
    rows = ImageTextRows(dataset, Columns("image", "caption", folder=tmp_path))
    assert row_keys(rows) == [picture_key(tmp_path / "red.png"), picture_key(images[1]["bytes"]), "row 2"]


def test_what_is_no_picture_has_no_key():
    with pytest.raises(ValueError, match="missing"):
        picture_key(None)
    with pytest.raises(TypeError, match="not a picture"):
        picture_key(np.array([object()]))


# Specs of models


def test_the_spec_of_a_model_tells_what_changes_its_features():
    model, processor = tiny_clip(), tiny_processor()
    first = feature_spec(model, processor, "ab12", "image_embeds")
    assert first == feature_spec(model, processor.image_processor, "ab12", "image_embeds")
    assert first.difference(feature_spec(model, processor, "ab12", "image_embeds", view="flipped"))
    assert json.loads(json.dumps(first.__dict__)) == first.__dict__

    model.config.vision_config.hidden_act = "gelu"
    assert "vision_config.hidden_act" in first.difference(feature_spec(model, processor, "ab12", "image_embeds"))


def test_a_saved_model_has_the_spec_of_the_one_in_memory(tmp_path):
    model, processor = tiny_clip(), tiny_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    opened = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    found = feature_spec(opened, type(processor).from_pretrained(tmp_path), "ab12", "image_embeds")
    assert found == feature_spec(model, processor, "ab12", "image_embeds")
    assert found.tower == str(tmp_path) and found.revision is None


def test_features_of_a_model_are_bit_equal(tmp_path):
    model, processor = tiny_clip().eval(), tiny_processor()
    images = [picture(name) for name in NAMES]

    def encode(batch):
        assert not torch.is_grad_enabled()
        return model.get_image_features(**processor(images=batch, return_tensors="pt")).pooler_output

    options = {"spec": feature_spec(model, processor, "ab12", "image_embeds"), "batch_size": len(NAMES)}
    store = compute(tmp_path, encode, images, list(map(picture_key, images)), shard_rows=None, **options)
    with torch.no_grad():
        assert torch.equal(store.rows(range(len(NAMES))), encode(images))


# Training on them


def test_a_data_loader_reads_whole_batches(tmp_path, monkeypatch):
    store, read = compute(tmp_path), []
    rows = store.rows
    monkeypatch.setattr(store, "rows", lambda numbers: read.append(len(numbers)) or rows(numbers))
    keys = KEYS[::-1]
    batches = list(DataLoader(FeatureRows(store, keys), batch_size=4))
    assert read == [4, 4, 3] and [key for batch in batches for key in batch["group"]] == keys
    assert torch.equal(torch.cat([batch["vision_features"] for batch in batches]), expected().flip(0))
    assert torch.equal(FeatureRows(store)[3]["vision_features"], expected()[3])


def test_worker_processes_read_too(tmp_path):
    loader = DataLoader(FeatureRows(compute(tmp_path)), batch_size=3, num_workers=2)
    assert torch.equal(torch.cat([batch["vision_features"] for batch in loader]), expected())


def test_each_epoch_sees_the_next_view(tmp_path):
    keys = [view_key(key, view) for key in "ab" for view in range(3)]
    store = compute(tmp_path, keys=keys, spec=spec(view="three flips"))
    rows = FeatureRows(store, ["b", "a"], views=3)
    seen = [[rows[Draw(epoch, index)]["vision_features"][0].item() for epoch in range(4)] for index in range(2)]
    thirds = (torch.arange(6.0) / 3).tolist()
    assert len(rows) == 2 and seen == [[*thirds[3:], thirds[3]], [*thirds[:3], thirds[0]]]
    assert torch.equal(rows[1]["vision_features"], store["a#0"])
    with pytest.raises(KeyError, match="'c#0'"):
        FeatureRows(store, ["c"], views=3)
    with pytest.raises(ValueError, match="keys of the pictures are needed"):
        FeatureRows(store, views=3)


# Several processes


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    encode = Encoder()
    store = compute(folder / "store", encode, pictures=Rows(range(COUNT)))
    report = {"batches": encode.batches, "keys": store.keys, "skipped": store.skipped, "errors": []}

    def broken_on_rank_1(batch):
        raise RuntimeError("out of memory") if rank else KeyError("never on rank 0: it has nothing left")

    for wrong in ({"spec": spec(view="flipped")}, {"keys": [*KEYS, *"abcde"], "encode": broken_on_rank_1}):
        try:
            compute(folder / "store", **{"pictures": list(range(COUNT + 5 * ("keys" in wrong))), **wrong})
        except Exception as error:
            report["errors"].append(f"{type(error).__name__}: {error}")
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def test_two_processes_share_the_work_and_end_with_the_same_files(tmp_path):
    compute(tmp_path / "alone", pictures=Rows(range(COUNT)))
    multiprocessing.start_processes(rank_main, (tmp_path,), nprocs=2, start_method="fork")
    assert files(tmp_path / "store").items() >= files(tmp_path / "alone").items()
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["batches"] == [[0], [0, 1], [2], [8, 10]] and second["batches"] == [[4, 5], [6, 7]]
    assert first["keys"] == second["keys"] == FeatureStore.open(tmp_path / "alone").keys
    assert first["skipped"] == second["skipped"] == SKIPPED
    assert first["errors"] == second["errors"] and len(first["errors"]) == 2
    assert "the view is 'center', not 'flipped'" in first["errors"][0]
