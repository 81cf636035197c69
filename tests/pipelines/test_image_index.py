"""An index of pictures: built, saved, appended to, reopened, searched exactly."""

import json
import logging

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedConfig

from hf_mm.evaluation.embeddings import embed_images
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.pipelines import image_index
from hf_mm.pipelines.image_index import ImageIndex
from tests.evaluation.toys import TableModel, noise, small_clip

PICTURES = noise(12, size=20)
COLUMNS = ["id", "image", "content", "embedding"]


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.fixture(scope="module")
def built(clip):
    return ImageIndex.build(*clip, PICTURES, batch_size=5, progress=False)


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(image_index.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    paths = [folder / "b.png", folder / "a.png", folder / "inner" / "c.png"]
    for path, picture in zip(paths, PICTURES, strict=False):
        picture.save(path)
    (folder / "notes.txt").write_text("no picture")
    return folder, paths


class Table:
    """A processor for `TableModel`: a picture is the number that its first pixel holds."""

    def to_json_string(self):
        return "{}"

    def __call__(self, images, return_tensors):
        return {"pixel_values": torch.tensor([float(np.asarray(image)[0, 0, 0]) for image in images])}


def of_vectors(vectors: torch.Tensor, **options) -> ImageIndex:
    """An index of given embeddings, made unit length."""
    pictures = [Image.new("RGB", (1, 1), (number, 0, 0)) for number in range(len(vectors))]
    model = TableModel(vectors, vectors)
    model.config = PreTrainedConfig()
    return ImageIndex.build(model, Table(), pictures, progress=False, **options)


def embeddings(index: ImageIndex) -> torch.Tensor:
    return torch.tensor(np.array(index.dataset["embedding"][:], dtype=np.float32))


def test_embeddings_are_those_of_the_evaluation(clip, built):
    torch.testing.assert_close(embeddings(built), embed_images(*clip, PICTURES, progress=False), atol=1e-6, rtol=0)
    assert built.dataset.column_names == COLUMNS
    assert built.dataset.features["embedding"] == datasets.List(datasets.Value("float32"), length=8)
    assert len(built) == 12 and built.width == 8
    assert built.ids == [str(number) for number in range(12)]


@pytest.mark.parametrize("batch_size", [1, 12, 100])
def test_the_batch_size_changes_nothing(clip, built, batch_size):
    other = ImageIndex.build(*clip, PICTURES, batch_size=batch_size, progress=False)
    torch.testing.assert_close(embeddings(other), embeddings(built), atol=1e-6, rtol=0)


def test_a_picture_embeds_itself_as_nearest(built):
    scores, rows = built.search(embeddings(built), k=3)
    assert rows[:, 0].tolist() == list(range(12))
    torch.testing.assert_close(scores[:, 0], torch.ones(12))
    assert (scores.diff(dim=1) <= 0).all()


def test_search_is_the_whole_product_sorted(exact):
    vectors = torch.randn(200, 16)
    index, queries = of_vectors(vectors, batch_size=7), 3 * torch.randn(9, 16, dtype=torch.float64)
    unit = torch.nn.functional.normalize(vectors, dim=-1)
    whole = torch.nn.functional.normalize(queries, dim=-1) @ unit.double().T
    for k in (1, 20, 200, 1000):
        scores, rows = index.search(queries, k)
        expected = whole.topk(min(k, 200))
        assert torch.equal(rows, expected.indices)
        torch.testing.assert_close(scores.double(), expected.values, atol=1e-6, rtol=0)


def test_ties_keep_the_order_of_the_rows(exact):
    """Two directions, each a hundred times in turn: far more ties than spare candidates."""
    vectors = torch.randn(2, 33).repeat(100, 1)
    index = of_vectors(vectors, batch_size=9)
    scores, rows = index.search(vectors[:2], 70)
    assert rows.tolist() == [list(range(0, 140, 2)), list(range(1, 140, 2))]
    assert torch.equal(scores, scores[:, :1].expand_as(scores))
    one = index.search(vectors[1:2], 150)[1]
    assert one.tolist() == [[*range(1, 200, 2), *range(0, 100, 2)]]


def test_excluded_pictures_are_left_out(exact, built):
    queries = embeddings(built)[:3]
    everything = built.search(queries, 12)[1].tolist()
    scores, rows = built.search(queries, 4, exclude=[["0"], [], ["2", "7", "2"]])
    out = ({0}, set(), {2, 7})
    assert rows.tolist() == [[r for r in row if r not in gone][:4] for row, gone in zip(everything, out, strict=True)]
    assert scores.isfinite().all()


def test_where_too_few_remain_rows_are_minus_one(built):
    scores, rows = built.search(embeddings(built)[:1], 12, exclude=[["3", "4"]])
    assert sorted(rows[0, :10].tolist()) == [0, 1, 2, 5, 6, 7, 8, 9, 10, 11]
    assert rows[0, 10:].tolist() == [-1, -1] and scores[0, 10:].tolist() == [-torch.inf] * 2


@pytest.mark.parametrize(
    ("queries", "options", "sentence"),
    [
        (torch.ones(1, 8), {"k": 0}, "k is 0"),
        (torch.ones(1, 7), {"k": 1}, r"of shape \(1, 7\): the embeddings of the index are \(n, 8\)"),
        (torch.ones(8), {"k": 1}, r"of shape \(8,\)"),
        (torch.zeros(1, 8), {"k": 1}, "a query is zero"),
        (torch.full((1, 8), torch.nan), {"k": 1}, "NaN"),
        (torch.ones(1, 8), {"k": 1, "exclude": [["x"]]}, "no picture 'x'"),
        (torch.ones(1, 8), {"k": 1, "exclude": ["1"]}, "one list of ids for each of the 1 queries"),
        (torch.ones(2, 8), {"k": 1, "exclude": [["1"]]}, "each of the 2 queries"),
    ],
)
def test_wrong_searches_are_refused(built, queries, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        built.search(queries, **options)


def test_the_product_reads_where_arrow_holds_the_embeddings(clip, tmp_path):
    index = ImageIndex.build(*clip, PICTURES, progress=False)
    index.save(tmp_path / "index")
    index.append(*clip, [Image.new("RGB", (9, 9), "blue")], progress=False)
    chunks = index.dataset.data.column("embedding").chunks
    assert [len(piece) for piece in index._matrix()] == [12, 1]
    for chunk, piece in zip(chunks, index._matrix(), strict=True):
        assert piece.ctypes.data == chunk.flatten().buffers()[1].address


def test_save_open_append(clip, built, tmp_path):
    folder = tmp_path / "deep" / "index"
    index = ImageIndex.build(*clip, PICTURES[:8], progress=False)
    index.save(folder)
    opened = ImageIndex.open(folder)
    opened.check(*clip)
    assert opened.description == index.description
    assert len(opened.dataset.cache_files) == 1 and opened.ids == index.ids
    assert {path.name for path in folder.parent.iterdir()} == {"index"}

    opened.append(*clip, PICTURES[8:], progress=False)
    torch.testing.assert_close(embeddings(opened), embeddings(built), atol=1e-6, rtol=0)
    assert opened.ids == built.ids
    queries = torch.randn(4, 8)
    assert torch.equal(opened.search(queries, 5)[1], built.search(queries, 5)[1])
    opened.save(folder)
    again = ImageIndex.open(folder)
    assert again.ids == built.ids and torch.equal(embeddings(again), embeddings(opened))
    assert torch.equal(again.search(queries, 5)[0], opened.search(queries, 5)[0])
    assert [path.name for path in folder.parent.iterdir()] == ["index"]


def test_a_save_that_fails_leaves_the_earlier_index(clip, tmp_path, monkeypatch):
    index = ImageIndex.build(*clip, PICTURES[:3], progress=False)
    index.save(tmp_path / "index")
    index.append(*clip, PICTURES[3:5], progress=False)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(image_index.json, "dumps", full)
    with pytest.raises(OSError, match="No space"):
        index.save(tmp_path / "index")
    with pytest.raises(OSError, match="No space"):
        index.save(tmp_path / "other")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert len(ImageIndex.open(tmp_path / "index")) == 3
    assert len(index) == 5
    index.save(tmp_path / "index")
    assert len(ImageIndex.open(tmp_path / "index")) == 5


def test_files_are_referred_to_and_pictures_kept(clip, files, tmp_path):
    folder, paths = files
    index = ImageIndex.build(*clip, folder, progress=False)
    assert index.ids == ["a.png", "b.png", "inner/c.png"]
    index.append(*clip, [PICTURES[5], str(paths[0])], progress=False)
    assert index.ids[3:] == ["3", str(paths[0])]
    index.save(tmp_path / "index")
    opened = ImageIndex.open(tmp_path / "index")
    assert opened.describe_row(0) == {"row": 0, "id": "a.png", "image": str(folder / "a.png")}
    kept = opened.describe_row(3)["image"]
    assert np.array_equal(np.asarray(kept), np.asarray(PICTURES[5]))
    assert opened.dataset[0]["image"]["bytes"] is None


def test_pictures_need_not_be_kept(clip):
    index = ImageIndex.build(*clip, PICTURES[:2], keep_pictures=False, progress=False)
    assert [index.describe_row(row)["image"] for row in range(2)] == [None, None]


def test_a_dataset_brings_its_columns(clip, tmp_path):
    rows = {"image": PICTURES[:4], "image_id": [7, 8, 9, 10], "style": list("abcd"), "year": [1, 2, None, 4]}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    index = ImageIndex.build(*clip, data, batch_size=3, progress=False)
    assert index.dataset.column_names == [*COLUMNS, "style", "year"]
    assert index.ids == ["7", "8", "9", "10"]
    index.append(*clip, data.select([0]).map(lambda row: {"image_id": 11}), progress=False)
    index.save(tmp_path / "index")
    found = ImageIndex.open(tmp_path / "index").describe_row(2)
    assert (found["id"], found["style"], found["year"]) == ("9", "c", None)
    assert np.array_equal(np.asarray(found["image"]), np.asarray(PICTURES[2]))
    with pytest.raises(ValueError, match=r"the columns \[\], those of the index with \['style', 'year'\]"):
        index.append(*clip, [PICTURES[9]], progress=False)


def test_columns_in_another_order_are_appended_by_name(clip):
    def dataset(rows, names):
        columns = {"image": [PICTURES[row] for row in rows], "a": list(rows), "b": [str(row) for row in rows]}
        return datasets.Dataset.from_dict({name: columns[name] for name in names}).cast_column(
            "image", datasets.Image()
        )

    index = ImageIndex.build(*clip, dataset([0, 1], ["image", "a", "b"]), progress=False)
    index.append(*clip, dataset([2, 3], ["b", "image", "a"]), progress=False)
    assert index.dataset["a"][:] == [0, 1, 2, 3] and index.dataset["b"][:] == ["0", "1", "2", "3"]


def test_broken_pictures_are_left_out_with_a_report(clip, files, caplog):
    folder, paths = files
    paths[1].write_bytes(b"no picture")
    with caplog.at_level(logging.WARNING):
        index = ImageIndex.build(*clip, [*paths, PICTURES[4]], ids=["b", "a", "c", "p"], batch_size=2, progress=False)
    assert index.ids == ["b", "c", "p"]
    assert "1 of 4 pictures cannot be read and are left out; a: " in caplog.text
    assert list(index.skipped) == ["a"] and "cannot be read" in index.skipped["a"]
    whole = embed_images(*clip, [PICTURES[0], PICTURES[2], PICTURES[4]], progress=False)
    torch.testing.assert_close(embeddings(index), whole, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="none of the 1 pictures can be read; a.png"):
        ImageIndex.build(*clip, [str(paths[1])], ids=["a.png"], progress=False)


def test_numbers_stay_unique_where_pictures_were_left_out(clip, tmp_path):
    index = ImageIndex.build(*clip, [str(tmp_path / "none.png"), *PICTURES[:3]], progress=False)
    assert index.ids == ["0", "1", "2"]
    broken_first = ImageIndex.build(*clip, [b"broken", *PICTURES[:2]], progress=False)
    assert broken_first.ids == ["1", "2"]
    broken_first.append(*clip, PICTURES[3:5], progress=False)
    assert broken_first.ids == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("images", "options", "sentence"),
    [
        ([], {}, "no pictures"),
        (PICTURES[:2], {"ids": ["a"]}, "1 ids for 2 pictures"),
        (PICTURES[:2], {"ids": ["a", "a"]}, "the id 'a' is given twice"),
        (PICTURES[:2], {"ids": [1, "1"]}, "the id '1' is given twice"),
        (PICTURES[:2], {"batch_size": 0}, "batch_size is 0"),
        (datasets.Dataset.from_dict({"text": ["a"]}), {}, "no column of pictures, only text"),
        (datasets.Dataset.from_dict({"image": ["a"], "score": [1]}), {}, "the column 'score'"),
    ],
)
def test_wrong_pictures_are_refused(clip, images, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ImageIndex.build(*clip, images, progress=False, **options)


def test_a_path_that_is_no_folder_is_refused(clip, files):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        ImageIndex.build(*clip, files[1][0], progress=False)


def test_known_ids_are_refused_before_anything_is_embedded(clip, built, monkeypatch):
    monkeypatch.setattr(image_index, "embed_images", lambda *_, **__: pytest.fail("embedded"))
    with pytest.raises(ValueError, match="the id '3' is in the index already"):
        built.append(*clip, [PICTURES[0]], ids=["3"], progress=False)


def test_broken_outputs_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        of_vectors(torch.full((2, 4), torch.nan))


def test_another_model_is_refused(clip, built):
    model, processor = clip
    other, _ = small_clip()
    built.check(other, processor)
    with torch.no_grad():
        other.text_model.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(ValueError, match="whose weights are not those of this model"):
        built.check(other, processor)
    with pytest.raises(ValueError, match="whose weights"):
        built.append(other, processor, [PICTURES[0]], ids=["new"])
    with pytest.raises(
        ValueError, match="built with a model without a name in float32, and this model is in bfloat16"
    ):
        built.check(small_clip()[0].bfloat16(), processor)


def test_other_preprocessing_is_refused(clip, built, tmp_path):
    model, processor = clip
    processor.image_processor.save_pretrained(tmp_path)
    built.check(model, MMClipImageProcessorPil.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"image processor \(resample 3 there, 2 here\)"):
        built.check(model, MMClipImageProcessorPil(size=16, resample=2))


def test_folders_that_are_no_index(clip, built, tmp_path):
    with pytest.raises(FileNotFoundError, match="not an index of pictures: it has no index.json"):
        ImageIndex.open(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        built.save(tmp_path)
    ImageIndex.build(*clip, PICTURES[:2], progress=False).save(tmp_path / "index")
    description = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps({**description, "format": 2}))
    with pytest.raises(ValueError, match="of format 2, not 1"):
        ImageIndex.open(tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read .*: build it again"):
        ImageIndex.open(tmp_path / "index")


def test_equal_pixels_are_one_content(clip, files, tmp_path):
    index = ImageIndex.build(*clip, [PICTURES[0], files[1][0], np.asarray(PICTURES[0]), PICTURES[1]], progress=False)
    key = index.dataset[0]["content"]
    assert index.ids_of(key) == index.ids[:3]
    assert index.ids_of("none") == []
