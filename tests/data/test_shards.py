"""WebDataset shards as they are found: what is damaged costs its own rows, and says so."""

import io
import json
import tarfile
import zipfile

import pytest
from drawn import NAMES, caption, colour_of, encoded, picture, tiny_processor

from hf_mm.data.collators import ImageTextStream
from hf_mm.data.image_text import DataArguments, open_rows, open_stream


def sample(name: str, **files) -> dict[str, bytes]:
    """The files of a sample by extension; those given replace or, as None, remove the usual ones."""
    usual = {"jpg": encoded(picture(name), "JPEG", quality=95), "json": b"{}", "txt": caption(name).encode()}
    return {extension: content for extension, content in {**usual, **files}.items() if content is not None}


def write_shard(path, samples: list[dict[str, bytes]], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for number, files in enumerate(samples):
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{number:04d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def about(**values) -> bytes:
    return json.dumps(values).encode()


def read(args: DataArguments) -> tuple[list, dict[str, str]]:
    """Readable rows and skipped ones, the same of rows and of a stream."""
    skipped: dict[str, str] = {}
    rows = list(open_rows(args).readable(skipped))
    stream, columns = open_stream(args)
    stream = ImageTextStream(stream, columns, tiny_processor().image_processor, shuffle_buffer=1)
    streamed, told = [], {}
    for drawn in stream:
        told.update(drawn["skipped"])
        if drawn["image_id"] in streamed:
            break
        streamed.append(drawn["image_id"])
    assert sorted(streamed) == sorted(row.image_id for row in rows)
    assert told == skipped
    return rows, skipped


def test_a_missing_text_or_picture_costs_its_row(tmp_path):
    """F04: a shard's sample without picture or caption is skipped and named."""
    samples = [sample(name) for name in NAMES]
    samples[1], samples[2], samples[6] = (
        sample("green", txt=None),
        sample("blue", jpg=None),
        sample("purple", txt=b" "),
    )
    write_shard(tmp_path / "00000.tar", samples)
    rows, skipped = read(DataArguments(str(tmp_path)))
    assert [colour_of(row.image) for row in rows] == [name for i, name in enumerate(NAMES) if i not in (1, 2, 6)]
    assert all(row.captions == [caption(colour_of(row.image))] for row in rows)
    assert list(skipped) == ["00000.tar/0001", "00000.tar/0002", "00000.tar/0006"]
    assert skipped["00000.tar/0001"] == skipped["00000.tar/0006"] == "it has no caption"
    assert "missing" in skipped["00000.tar/0002"]


def test_a_shard_cut_short_costs_its_rest(tmp_path):
    for number in range(2):
        write_shard(tmp_path / f"0000{number}.tar", [sample(name) for name in NAMES])
    whole = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[: 5 * 7 * 512 + 700])  # five samples of seven blocks, and a piece
    rows, skipped = read(DataArguments(str(tmp_path)))
    assert [colour_of(row.image) for row in rows] == NAMES[:5] + NAMES
    assert list(skipped) == ["the rest of 00000.tar"]
    assert "the shard cannot be read: unexpected end of data" in skipped["the rest of 00000.tar"]


def test_json_of_changing_types_and_text_that_is_not_utf_8(tmp_path):
    abouts = [about(punsafe=None)] * 6 + [about(punsafe=0.5, new={"a": 1}), b"[not json"]
    samples = [sample(name, json=content) for name, content in zip(NAMES, abouts, strict=True)]
    samples[3]["txt"] = "a caf\xe9".encode("latin-1")
    write_shard(tmp_path / "00000.tar", samples)
    rows, skipped = read(DataArguments(str(tmp_path)))
    assert [colour_of(row.image) for row in rows] == NAMES
    assert rows[3].captions == ["a caf\N{REPLACEMENT CHARACTER}"]
    assert not skipped


def test_pictures_of_several_formats_in_one_shard(tmp_path):
    samples = [sample(name) for name in NAMES]
    for number, (extension, file_format) in enumerate([("png", "PNG"), ("webp", "WEBP"), ("JPEG", "JPEG")]):
        samples[number] = sample(NAMES[number], jpg=None, **{extension: encoded(picture(NAMES[number]), file_format)})
    write_shard(tmp_path / "00000.tar", samples)
    rows, skipped = read(DataArguments(str(tmp_path)))
    assert [colour_of(row.image) for row in rows] == NAMES
    assert not skipped


def test_captions_and_groups_from_the_json(tmp_path):
    samples = [
        sample(name, txt=None, json=about(caption=caption(name), alts=["one", "two"], kind=number // 4))
        for number, name in enumerate(NAMES)
    ]
    write_shard(tmp_path / "00000.tar", samples)
    rows, _ = read(DataArguments(str(tmp_path)))
    assert [row.captions for row in rows] == [[caption(name)] for name in NAMES]
    rows, _ = read(DataArguments(str(tmp_path), caption_column="alts", group_column="kind"))
    assert [row.captions for row in rows] == [["one", "two"]] * 8
    assert [row.group for row in rows] == ["0"] * 4 + ["1"] * 4


def test_one_of_several_pictures_and_texts_of_a_sample(tmp_path):
    other = encoded(picture("black"), "JPEG")
    samples = [
        {"before.jpg": other, "after.jpg": sample(name)["jpg"], "txt": b"before", "after.txt": caption(name).encode()}
        for name in NAMES
    ]
    write_shard(tmp_path / "00000.tar", samples)
    rows, _ = read(DataArguments(str(tmp_path), image_column="after.jpg", caption_column="after.txt"))
    assert [(colour_of(row.image), row.captions) for row in rows] == [(name, [caption(name)]) for name in NAMES]


@pytest.mark.parametrize("suffix", ["gz", "bz2"])
def test_a_compressed_shard(tmp_path, suffix):
    write_shard(tmp_path / "00000.tar", [sample(name) for name in NAMES], f"w:{suffix}")
    rows, _ = read(DataArguments(str(tmp_path / "00000.tar")))
    assert [colour_of(row.image) for row in rows] == NAMES


def test_names_with_folders_dots_and_what_a_mac_adds(tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for folder in ("./a", "b.c"):
            tar.addfile(tarfile.TarInfo(f"{folder}/._0.jpg"))
            for extension, content in sample("red").items():
                member = tarfile.TarInfo(f"{folder}/0.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    rows, skipped = read(DataArguments(str(tmp_path)))
    assert [row.image_id for row in rows] == ["00000.tar/./a/0", "00000.tar/b.c/0"]
    assert not skipped


def test_a_rewritten_shard_is_read_anew(tmp_path):
    args = DataArguments(str(tmp_path / "00000.tar"))
    write_shard(tmp_path / "00000.tar", [sample("red")])
    assert [colour_of(row.image) for row in open_rows(args)] == ["red"]
    write_shard(tmp_path / "00000.tar", [sample("blue")])
    assert [colour_of(row.image) for row in open_rows(args)] == ["blue"]


def test_shards_without_samples(tmp_path):
    with tarfile.open(tmp_path / "00000.tar", "w"):
        pass
    with pytest.raises(ValueError, match="00000.tar cannot be read as webdataset: "):
        open_rows(DataArguments(str(tmp_path / "00000.tar")))


def test_pictures_inside_an_archive_are_opened(tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for name in NAMES:
            archive.writestr(f"{name}.png", encoded(picture(name)))
    lines = [f"zip://{name}.png::{tmp_path / 'pictures.zip'},{caption(name)}" for name in NAMES]
    lines.append(f"zip://grey.png::{tmp_path / 'pictures.zip'},a grey square")
    (tmp_path / "rows.csv").write_text("\n".join(["image,caption", *lines]))
    skipped = {}
    rows = list(open_rows(DataArguments(str(tmp_path / "rows.csv"))).readable(skipped))
    assert [colour_of(row.image) for row in rows] == NAMES
    assert [name.split("::")[0] for name in skipped] == ["zip://grey.png"]
