"""Every form in which a user may bring pictures and texts, and what is wrong with some of them."""

import csv
import io
import json
import pickle
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from random import Random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from drawn import COLOURS, NAMES, caption, colour_of, cut_jpeg, encoded, noise, picture, save_pictures, tiny_processor
from PIL import Image

from hf_mm.data.image_text import (
    BrokenRow,
    Columns,
    DataArguments,
    ImageText,
    ImageTextRows,
    any_caption,
    emoji_corpus,
    emoji_styled_text,
    emoji_text,
    in_style,
    open_rows,
    open_stream,
    stable_id,
)


def write_csv(path: Path, rows: list[dict], delimiter: str = ",") -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows))


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_shard(path: Path, names: list[str]) -> None:
    """A shard as img2dataset writes it."""
    with tarfile.open(path, "w") as tar:
        for name in names:
            number = NAMES.index(name)
            about = {
                "caption": caption(name),
                "url": f"https://pictures.example/{name}.jpg",
                "key": f"{number:09d}",
                "status": "success",
                "error_message": None,
                "width": 24,
                "height": 20,
                "exif": "{}",
            }
            files = {
                "jpg": encoded(picture(name), "JPEG", quality=95),
                "json": json.dumps(about).encode(),
                "txt": caption(name).encode(),
            }
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def paths_and_captions(folder: Path = Path(), names=NAMES, image="file_name", text="caption") -> list[dict]:
    return [{image: str(folder / f"{name}.png"), text: caption(name)} for name in names]


def with_metadata_csv(folder):
    save_pictures(folder)
    write_csv(folder / "metadata.csv", paths_and_captions())
    return folder


def with_metadata_jsonl(folder):
    save_pictures(folder / "pictures")
    write_jsonl(folder / "metadata.jsonl", paths_and_captions(Path("pictures"), text="text"))
    return folder


def with_text_files(folder):
    save_pictures(folder / "a", NAMES[:5])
    save_pictures(folder / "b", NAMES[5:], ".JPG")
    for name in NAMES:
        (folder / ("a" if name in NAMES[:5] else "b") / f"{name}.txt").write_text(caption(name) + "\n")
    return folder


def as_img2dataset_files(folder):
    """img2dataset's output_format="files": the table beside the folder has no pictures."""
    with_text_files(folder)
    write_parquet(folder / "00000.parquet", [{"url": "https://pictures.example/0.jpg", "caption": "x", "key": "0"}])
    (folder / "00000_stats.json").write_text("{}")
    return folder


def csv_file(folder):
    save_pictures(folder / "pictures")
    write_csv(folder / "rows [1].csv", paths_and_captions(Path("pictures"), image="Image", text="TEXT"))
    return folder / "rows [1].csv"


def tsv_file(folder):
    save_pictures(folder)
    write_csv(folder / "rows.tsv", paths_and_captions(image="filepath", text="title"), delimiter="\t")
    return folder / "rows.tsv"


def csv_with_absolute_paths(folder):
    save_pictures(folder / "pictures")
    write_csv(folder / "rows.csv", paths_and_captions(folder / "pictures", image="image_path"))
    return folder / "rows.csv"


def jsonl_file(folder):
    save_pictures(folder)
    write_jsonl(folder / "rows.jsonl", [{"image": f"{name}.png", "captions": [caption(name)]} for name in NAMES])
    return folder / "rows.jsonl"


def parquet_of_structs(folder):
    rows = [{"image": {"bytes": encoded(picture(n)), "path": "a.png"}, "caption": caption(n)} for n in NAMES]
    write_parquet(folder / "rows.parquet", rows)
    return folder / "rows.parquet"


def parquet_of_bytes(folder):
    write_parquet(folder / "rows.parquet", [{"jpg": encoded(picture(n)), "caption": caption(n)} for n in NAMES])
    return folder / "rows.parquet"


def parquet_of_paths(folder):
    save_pictures(folder / "pictures")
    write_parquet(folder / "rows.parquet", paths_and_captions(Path("pictures"), image="path"))
    return folder / "rows.parquet"


def parquet_of_datasets(folder):
    rows = {"image": [picture(name) for name in NAMES], "text": [caption(name) for name in NAMES]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def folder_of_parquets(folder):
    for number, names in enumerate((NAMES[:3], NAMES[3:])):
        rows = [{"image": encoded(picture(name)), "caption": caption(name)} for name in names]
        write_parquet(folder / f"part-{number}.parquet", rows)
    return folder


def laid_out_as_on_the_hub(folder):
    for split, names in (("train", NAMES), ("test", NAMES[:1])):
        rows = [{"image": encoded(picture(name)), "caption": caption(name)} for name in names]
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)
    return folder


def folder_of_shards(folder):
    folder.mkdir(exist_ok=True)
    for number, names in enumerate((NAMES[:4], NAMES[4:])):
        write_shard(folder / f"{number:05d}.tar", names)
        write_parquet(folder / f"{number:05d}.parquet", [{"url": "https://pictures.example/0.jpg", "caption": "x"}])
        (folder / f"{number:05d}_stats.json").write_text("{}")
    return folder


def one_shard(folder):
    write_shard(folder / "00000.tar", NAMES)
    return folder / "00000.tar"


def pattern_of_shards(folder):
    return folder_of_shards(folder) / "*.tar"


def numbered_shards(folder):
    return folder_of_shards(folder) / "{00000..00001}.tar"


def saved_dataset(folder):
    rows = {"image": [picture(name) for name in NAMES], "caption": [caption(name) for name in NAMES]}
    dataset = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    dataset.save_to_disk(folder / "saved")
    return folder / "saved"


def saved_dataset_dict(folder):
    dataset = datasets.load_from_disk(saved_dataset(folder))
    parts = {"train": dataset, "val": dataset.select(range(2))}
    datasets.DatasetDict(parts).save_to_disk(folder / "saved_splits")
    return folder / "saved_splits"


STREAMABLE = [
    with_metadata_csv,
    with_text_files,
    csv_file,
    jsonl_file,
    parquet_of_structs,
    parquet_of_bytes,
    parquet_of_paths,
    parquet_of_datasets,
    folder_of_shards,
    saved_dataset_dict,
]
SOURCES = [
    *STREAMABLE,
    with_metadata_jsonl,
    as_img2dataset_files,
    tsv_file,
    csv_with_absolute_paths,
    folder_of_parquets,
    laid_out_as_on_the_hub,
    one_shard,
    pattern_of_shards,
    numbered_shards,
    saved_dataset,
]


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_every_source_gives_each_picture_with_its_caption(make, tmp_path):
    rows = open_rows(DataArguments(source=str(make(tmp_path / "data" if make is not one_shard else tmp_path))))
    read = list(rows)
    assert sorted(colour_of(row.image) for row in read) == sorted(NAMES)
    assert all(row.captions == [caption(colour_of(row.image))] for row in read)
    assert all(row.image.mode == "RGB" and row.image.size == (24, 20) for row in read)
    assert len({row.image_id for row in read}) == len(NAMES)
    assert sorted(rows.texts()) == sorted(map(caption, NAMES))
    groups = rows.groups()
    assert groups == [row.group for row in read]
    assert len(set(groups)) == len(NAMES)


@pytest.mark.parametrize("make", STREAMABLE, ids=lambda make: make.__name__)
def test_a_stream_gives_the_same_rows(make, tmp_path):
    args = DataArguments(source=str(make(tmp_path / "data")))
    stream, columns = open_stream(args)
    streamed = [columns.read(row, number) for number, row in enumerate(stream)]
    rows = list(open_rows(args))
    assert [colour_of(row.image) for row in streamed] == [colour_of(row.image) for row in rows]
    assert [(row.captions, row.image_id, row.group) for row in streamed] == [
        (row.captions, row.image_id, row.group) for row in rows
    ]


def split_folders(folder):
    for split, names in (("train", NAMES[:5]), ("val", NAMES[5:])):
        save_pictures(folder / split, names)
        write_csv(folder / split / "metadata.csv", paths_and_captions(names=names))
    return folder


def split_files(folder):
    save_pictures(folder)
    for split, names in (("train", NAMES[:5]), ("val", NAMES[5:])):
        write_csv(folder / f"{split}.csv", paths_and_captions(names=names))
    return folder


def split_dataset_dict(folder):
    dataset = datasets.load_from_disk(saved_dataset(folder))
    parts = {"train": dataset.select(range(5)), "val": dataset.select(range(5, 8))}
    datasets.DatasetDict(parts).save_to_disk(folder / "splits")
    return folder / "splits"


@pytest.mark.parametrize("make", [split_folders, split_files, split_dataset_dict], ids=lambda make: make.__name__)
def test_splits_are_kept_apart(make, tmp_path):
    args = DataArguments(source=str(make(tmp_path / "data")))
    assert [colour_of(row.image) for row in open_rows(args)] == NAMES[:5]
    assert [colour_of(row.image) for row in open_rows(args, "val")] == NAMES[5:]
    with pytest.raises(ValueError, match="no split 'nowhere'"):
        open_rows(args, "nowhere")


@pytest.mark.parametrize(
    "make", [with_metadata_csv, csv_file, folder_of_parquets, saved_dataset], ids=lambda make: make.__name__
)
def test_a_source_without_splits_never_serves_its_training_rows_for_validation(make, tmp_path):
    with pytest.raises(ValueError, match="no split 'val'"):
        open_rows(DataArguments(source=str(make(tmp_path / "data"))), "val")


def test_columns_are_chosen_by_the_user(tmp_path):
    save_pictures(tmp_path)
    rows = [
        {"caption": "wrong", "image": "wrong", "what": caption(n), "where": f"{n}.png", "kind": i // 2}
        for i, n in enumerate(NAMES)
    ]
    write_csv(tmp_path / "rows.csv", rows)
    args = DataArguments(str(tmp_path / "rows.csv"), image_column="where", caption_column="what", group_column="kind")
    opened = open_rows(args)
    assert [row.captions for row in opened] == [[caption(colour_of(row.image))] for row in opened]
    assert opened.groups() == [row.group for row in opened] == [str(i // 2) for i in range(8)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image_column": "photo"}, "no column 'photo', only where, what: set image_column to one of them"),
        ({}, "only where, what: set image_column to one of them"),
        ({"image_column": "where"}, "only where, what: set caption_column to one of them"),
        (
            {"image_column": "where", "caption_column": "what", "group_column": "kind"},
            "no column 'kind', only where, what: set group_column",
        ),
    ],
)
@pytest.mark.parametrize("open_source", [open_rows, open_stream])
def test_missing_columns_are_named_with_those_there_are(tmp_path, changes, sentence, open_source):
    write_csv(tmp_path / "rows.csv", [{"where": "a.png", "what": "a"}])
    with pytest.raises(ValueError, match=sentence):
        open_source(DataArguments(str(tmp_path / "rows.csv"), **changes))


@pytest.mark.parametrize(
    "source",
    [
        "/nowhere/at/all",
        "./nowhere",
        "~/nowhere-at-all",
        "nowhere/rows.csv",
        "rows.parquet",
        "a/b/c",
        "nowhere/{000..003}.tar",
        "/nowhere/*.tar",
    ],
)
def test_a_source_that_is_not_there(source):
    with pytest.raises(ValueError, match="does not exist|cannot be read as webdataset: .*No such file"):
        open_rows(DataArguments(source))


@pytest.mark.parametrize("source", ["someone/pictures", "pictures"])
@pytest.mark.parametrize("open_source", [open_rows, open_stream])
def test_a_hub_id_without_network_is_one_sentence(source, open_source):
    with pytest.raises(ValueError, match=f"^{source} is not a file, a folder, or a dataset of the Hub: .+$") as caught:
        open_source(DataArguments(source))
    assert "\n" not in str(caught.value)


def test_unreadable_sources_are_one_sentence(tmp_path):
    (tmp_path / "rows.txt").write_text("a")
    (tmp_path / "nothing.csv").write_text("")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "bad.jsonl").write_text("{not json")
    (tmp_path / "bad.tar").write_bytes(b"no tar")
    for name, sentence in {
        "rows.txt": "rows.txt is none of .csv",
        "nothing.csv": "nothing.csv cannot be read as csv: .+",
        "bad.parquet": "bad.parquet cannot be read as parquet: .+",
        "bad.jsonl": "bad.jsonl cannot be read as json: .+",
        "bad.tar": "bad.tar cannot be read as webdataset: .+",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            open_rows(DataArguments(str(tmp_path / name)))


def test_an_empty_table_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("image,caption\n")
    with pytest.raises(ValueError, match="rows.csv has no rows"):
        open_stream(DataArguments(str(tmp_path / "rows.csv")))
    with pytest.raises(ValueError, match="rows.csv cannot be read as csv: .* no data"):
        open_rows(DataArguments(str(tmp_path / "rows.csv")))


def test_a_damaged_saved_dataset_is_one_sentence(tmp_path):
    saved = saved_dataset(tmp_path)
    (saved / "state.json").write_text("{")
    with pytest.raises(ValueError, match="saved cannot be loaded as a saved dataset: .+"):
        open_rows(DataArguments(str(saved)))


def test_a_folder_without_captions_or_pictures(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is not a dataset that can be loaded"):
        open_rows(DataArguments(str(tmp_path / "empty")))
    save_pictures(tmp_path / "bare")
    with pytest.raises(
        ValueError, match=r"have no captions: add a metadata.csv with the columns file_name and caption"
    ):
        open_rows(DataArguments(str(tmp_path / "bare")))


def test_an_edited_table_is_read_anew(tmp_path):
    source = csv_file(tmp_path)
    args = DataArguments(str(source))
    assert open_rows(args)[0].captions == [caption("red")]
    source.write_text(source.read_text().replace("a red square", "a red tile"))
    assert open_rows(args)[0].captions == ["a red tile"]
    assert len(open_rows(args)) == len(NAMES)


CAPTIONS = {
    "one": ("a dog", ["a dog"]),
    "list": (["a dog", None, " ", "a hound"], ["a dog", "a hound"]),
    "JSON": ('["a dog", "a hound"]', ["a dog", "a hound"]),
    "Python": ("['a dog', 'a hound']", ["a dog", "a hound"]),
    "bracket": ("[laughs] a dog", ["[laughs] a dog"]),
    "unfinished bracket": ("[a dog", ["[a dog"]),
    "number": (7, ["7"]),
    "None": (None, []),
    "NaN": (float("nan"), []),
    "empty": ("", []),
    "blank": (" \n", []),
    "empty list": ([], []),
    "list of nothing": ([None, ""], []),
}


@pytest.mark.parametrize(("value", "expected"), CAPTIONS.values(), ids=CAPTIONS)
def test_captions_of_a_cell(value, expected):
    """F16: an empty cell is a broken row with a name."""
    row = {"image": picture("red"), "caption": value}
    columns = Columns("image", "caption")
    assert columns.captions(row) == expected
    if expected:
        assert columns.read(row, 3).captions == expected
    else:
        with pytest.raises(BrokenRow, match="row 3: it has no caption"):
            columns.read(row, 3)


def test_a_csv_with_empty_cells_and_many_captions(tmp_path):
    """F16: rows with empty cells are skipped and named."""
    save_pictures(tmp_path)
    (tmp_path / "rows.csv").write_text(
        'image,caption\nred.png,\ngreen.png,"[""a green square"", ""a leaf""]"\n,a blue square\nyellow.png,"  "\n'
    )
    rows = open_rows(DataArguments(str(tmp_path / "rows.csv")))
    skipped = {}
    assert [row.captions for row in rows.readable(skipped)] == [["a green square", "a leaf"]]
    assert list(skipped) == ["red.png", "row 2", "yellow.png"]
    assert "missing" in skipped["row 2"]


def test_several_text_lines_beside_a_picture_are_several_captions(tmp_path):
    save_pictures(tmp_path, ["red", "blue"])
    (tmp_path / "red.txt").write_text("a red square\n\n  \nsomething red\n")
    rows = open_rows(DataArguments(str(tmp_path)))
    skipped = {}
    assert [row.captions for row in rows.readable(skipped)] == [["a red square", "something red"]]
    assert skipped == {"blue.png": "it has no caption"}


def eight_pairs() -> list[dict]:
    """Row 3 has no picture, row 5 a JPEG cut short."""
    rows = [{"image": {"bytes": encoded(picture(n)), "path": None}, "caption": caption(n)} for n in NAMES]
    rows[3]["image"] = None
    rows[5]["image"]["bytes"] = cut_jpeg()
    return rows


@pytest.fixture
def damaged(tmp_path):
    write_parquet(tmp_path / "rows.parquet", eight_pairs())
    return DataArguments(str(tmp_path / "rows.parquet"))


def test_broken_rows_are_skipped_and_named(damaged):
    """F04: no picture and a truncated JPEG cost their rows, and no caption moves."""
    skipped = {}
    rows = list(open_rows(damaged).readable(skipped))
    assert [colour_of(row.image) for row in rows] == [name for i, name in enumerate(NAMES) if i not in (3, 5)]
    assert all(row.captions == [caption(colour_of(row.image))] for row in rows)
    assert list(skipped) == ["row 3", "row 5"]
    assert "missing" in skipped["row 3"]
    assert "truncated" in skipped["row 5"]


def test_broken_rows_stop_a_strict_reader(damaged):
    """F04: the error tells which row."""
    rows = open_rows(damaged)
    with pytest.raises(ValueError, match="row 3: The picture is missing"):
        list(rows.readable({}, strict=True))
    with pytest.raises(ValueError, match="row 5: a picture in memory cannot be read as a picture"):
        rows[5]


def test_held_out_rows_keep_their_numbers(damaged):
    """F04: a row keeps its name when rows are held out."""
    named = {}
    for part in open_rows(damaged).split_off(0.5):
        list(part.readable(named))
    assert sorted(named) == ["row 3", "row 5"]


def test_rows_are_named_by_their_own_id_or_file(tmp_path):
    """F04: a row is named by what the user knows it by."""
    rows = [
        {"image_id": 17, "image": "gone.png", "caption": "a"},
        {"image_id": None, "image": "gone.png", "caption": "a"},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    skipped = {}
    assert not list(open_rows(DataArguments(str(tmp_path / "rows.jsonl"))).readable(skipped))
    assert list(skipped) == ["17", "gone.png"]
    assert all(str(tmp_path / "gone.png") in reason for reason in skipped.values())


def test_a_broken_row_crosses_processes():
    """F04: the name of the row survives a worker."""
    error = pickle.loads(pickle.dumps(BrokenRow("row 3", "no picture")))
    assert (error.row, error.reason, str(error)) == ("row 3", "no picture", "row 3: no picture")
    assert str(BrokenRow("said elsewhere")) == "said elsewhere"


def test_an_address_is_not_a_file(tmp_path):
    write_csv(tmp_path / "rows.csv", [{"image": "https://pictures.example/a.jpg", "caption": "a"}])
    with pytest.raises(BrokenRow, match="https://pictures.example/a.jpg is an address, not a file"):
        open_rows(DataArguments(str(tmp_path / "rows.csv")))[0]


def sideways(path: Path) -> None:
    """Half red, half blue, lying on its side in a JPEG that says so."""
    upright = Image.new("RGB", (20, 40), COLOURS["red"])
    upright.paste(COLOURS["blue"], (0, 20, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(path / "sideways.jpg", exif=exif, quality=100, subsampling=0)
    plain = Image.open(path / "sideways.jpg")
    Image.frombytes("RGB", plain.size, plain.tobytes()).transpose(Image.Transpose.ROTATE_270).save(
        path / "upright.png"
    )


@pytest.mark.parametrize("embedded", [False, True])
def test_a_phone_photo_stands_upright(tmp_path, embedded):
    """F01: the tensor and the size are those of the upright copy, from files and from bytes."""
    sideways(tmp_path)
    names = ["sideways.jpg", "upright.png"]
    images = [(tmp_path / name).read_bytes() if embedded else name for name in names]
    write_parquet(tmp_path / "rows.parquet", [{"image": image, "caption": "half red"} for image in images])
    photo, copy = open_rows(DataArguments(str(tmp_path / "rows.parquet")))
    assert photo.image.size == (20, 40)
    assert colour_of(photo.image.crop((0, 0, 20, 20))) == "red"
    pixels = [tiny_processor()(images=row.image)["pixel_values"] for row in (photo, copy)]
    assert torch.equal(*pixels)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_metadata_that_is_no_text_does_not_matter(tmp_path):
    """F01: a PNG whose XMP is not UTF-8 is read."""
    whole = encoded(noise(1))
    xmp = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta>\xff\xfe\x80</x:xmpmeta>")
    end_of_header = 8 + 12 + 13
    damaged = whole[:end_of_header] + xmp + whole[end_of_header:]
    write_parquet(tmp_path / "rows.parquet", [{"image": damaged, "caption": "noise"}])
    assert open_rows(DataArguments(str(tmp_path / "rows.parquet")))[0].image.tobytes() == noise(1).tobytes()


def test_the_same_picture_is_one_group_whatever_its_captions(tmp_path):
    images = [encoded(picture(name)) for name in ("red", "blue", "red", "red")]
    rows = [
        {"id": i, "image": {"bytes": image, "path": "image.png"}, "caption": "a"} for i, image in enumerate(images)
    ]
    write_parquet(tmp_path / "rows.parquet", rows)
    opened = open_rows(DataArguments(str(tmp_path / "rows.parquet")))
    a, b, c, d = opened.groups()
    assert a == c == d != b
    for fraction in (0.3, 0.5, 0.7):
        train, held_out = opened.split_off(fraction)
        assert not set(train.groups()) & set(held_out.groups())


def test_rows_without_a_group_are_groups_of_their_own(tmp_path):
    save_pictures(tmp_path)
    rows = [{"image": f"{n}.png", "caption": n, "kind": "a" if i < 2 else None} for i, n in enumerate(NAMES[:5])]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    opened = open_rows(DataArguments(str(tmp_path / "rows.jsonl"), group_column="kind"))
    groups = opened.groups()
    assert groups[0] == groups[1] == "a"
    assert len(set(groups)) == 4
    assert groups == [row.group for row in opened]


def test_held_out_rows_do_not_depend_on_where_the_folder_lies(tmp_path):
    parts = []
    for place in ("here", "there/deep"):
        args = DataArguments(str(with_text_files(tmp_path / place)))
        parts.append([[row.image_id for row in part] for part in open_rows(args).split_off(0.5)])
    assert parts[0] == parts[1]
    train, held_out = parts[0]
    assert train and held_out
    assert len(train) + len(held_out) == len(NAMES)


def test_split_off_takes_about_the_fraction():
    groups = [str(i) for i in range(4000)]
    dataset = datasets.Dataset.from_dict({"image": groups, "caption": groups})
    train, held_out = ImageTextRows(dataset, Columns("image", "caption")).split_off(0.05)
    assert 140 < len(held_out) < 260  # 200 +- 4.4 standard deviations
    assert sorted(train.groups() + held_out.groups()) == sorted(groups)


def test_only_the_picture_of_a_row_is_opened(tmp_path):
    rows = {"image": [picture("red")], "mask": [{"bytes": b"broken", "path": None}], "caption": ["a"]}
    features = datasets.Features(
        {"image": datasets.Image(), "mask": datasets.Image(), "caption": datasets.Value("string")}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    row = open_rows(DataArguments(str(tmp_path / "saved")))[0]
    assert colour_of(row.image) == "red"
    assert row.row == {"mask": {"bytes": b"broken", "path": None}, "caption": "a"}


def test_stable_id_is_the_same_everywhere():
    assert stable_id("a red square") == 333465871475817096
    ids = [stable_id(str(i)) for i in range(1000)]
    assert len(set(ids)) == 1000
    assert torch.tensor(ids).dtype == torch.int64
    assert min(ids) >= 0


def test_any_caption_is_uniform():
    sample = ImageText(picture("red"), ["a", "b", "c"], "0", "0", {})
    counts = Counter(any_caption(sample, Random(i)) for i in range(3000))
    assert set(counts) == {"a", "b", "c"}
    assert all(abs(count - 1000) < 4.5 * (3000 * 2 / 9) ** 0.5 for count in counts.values())


def kind_of(text: str) -> str:
    """Which of the four forms a text has, for a row whose name, tags and subgroup share no word."""
    parts = text.split(", ")
    if parts[-1] == "face smiling":
        assert len(parts) == 2 and parts[0] in {"NAME", *"ABCDE"}
        return "subgroup"
    if parts[0] == "NAME":
        assert len(parts) <= 3 and len(set(parts)) == len(parts)
        return "name" if len(parts) == 1 else "name and tags"
    assert 2 <= len(parts) <= 4 and len(set(parts)) == len(parts) and set(parts) <= set("ABCDE")
    return "tags"


def test_texts_of_an_emoji_have_their_shares():
    sample = ImageText(
        picture("red"), ["NAME"], "0", "0", {"caption": "NAME", "tags": list("ABCDE"), "subgroup": "face-smiling"}
    )
    draws = 10_000
    counts = Counter(kind_of(emoji_text(sample, Random(i))) for i in range(draws))
    for kind, share in {"name": 0.6, "name and tags": 0.2, "tags": 0.15, "subgroup": 0.05}.items():
        assert abs(counts[kind] - share * draws) < 4.5 * (draws * share * (1 - share)) ** 0.5, kind


def test_an_emoji_without_tags_is_called_by_its_name():
    sample = ImageText(picture("red"), ["NAME"], "0", "0", {"caption": "NAME", "tags": [], "subgroup": "face-smiling"})
    assert {emoji_text(sample, Random(i)) for i in range(100)} == {"NAME"}


def test_styled_texts_of_an_emoji_name_the_artist_in_nine_of_ten():
    row = {"caption": "NAME", "tags": list("ABCDE"), "subgroup": "face-smiling", "style": "noto", "skin_tone": 0}
    sample, draws = ImageText(picture("red"), ["NAME"], "0", "0", row), 10_000
    texts = [emoji_styled_text(sample, Random(i)) for i in range(draws)]
    named = [text for text in texts if text.endswith(" in the style of noto")]
    assert abs(len(named) - 0.9 * draws) < 4.5 * (draws * 0.9 * 0.1) ** 0.5
    kinds = {kind_of(text.removesuffix(" in the style of noto")) for text in named}
    assert (
        kinds == {kind_of(text) for text in set(texts) - set(named)} == {"name", "name and tags", "tags", "subgroup"}
    )
    toned = ImageText(
        None, ["NAME: dark skin tone"], "0", "0", {**row, "caption": "NAME: dark skin tone", "skin_tone": 5}
    )
    texts = {emoji_styled_text(toned, Random(i)) for i in range(100)}
    assert texts == {"NAME: dark skin tone", in_style("NAME: dark skin tone", "noto")}


def test_styled_emoji_come_with_skin_tones_and_are_alike_only_where_their_pictures_are():
    rows = open_rows(DataArguments(config_name="styled", split="both"))
    captions, groups = rows.dataset["caption"][:], rows.groups()
    assert any(caption.endswith("dark skin tone") for caption in captions)
    looks = [row["image"]["bytes"] for row in rows.dataset]
    assert [groups.index(group) for group in groups] == [looks.index(look) for look in looks]
    corpus = list(emoji_corpus(rows, styled=True))
    assert corpus == [in_style(text, "openmoji") for text in emoji_corpus(rows)]
    with pytest.raises(ValueError, match="no subset 'style': leave it out or take 'styled'"):
        open_rows(DataArguments(config_name="style"))


def test_the_bundled_emoji_are_a_source_like_any_other():
    rows = open_rows(DataArguments(), "both")
    sample = rows[0]
    assert sample.captions == [sample.row["caption"]]
    assert rows.groups()[0] == sample.group == sample.row["hexcode"]
    assert sample.image.size == (64, 64)
    corpus = list(emoji_corpus(rows))
    assert len(corpus) == len(rows)
    assert all(word in corpus[0] for word in [sample.row["caption"], *sample.row["tags"]])
    stream, columns = open_stream(DataArguments(split="both"))
    assert columns.read(next(iter(stream)), 0).image.tobytes() == sample.image.tobytes()
