import json

import pytest
from composed_toys import ColorModel, ColorProcessor, save

from hf_mm.evaluation.composed.fashioniq import CATEGORIES, evaluate_fashioniq, read_fashioniq
from hf_mm.evaluation.composed.published import PUBLISHED

PICTURES = {
    "B001": ("cat", "real"),
    "B002": ("cat", "red"),
    "B003": ("dog", "real"),
    "B004": ("dog", "long"),
    "B005": ("bird", "red"),
    "B006": ("bird", "long"),
}
ROWS = [
    {"candidate": "B001", "target": "B002", "captions": ["is nicer", "is red, and better"]},
    {"candidate": "B003", "target": "B004", "captions": ["is long*", "has more"]},
]


def copy(folder, captions="captions", suffix=".png"):
    """A copy of the data as published; each category has pictures of its own."""
    for name in (captions, "image_splits"):
        (folder / name).mkdir(parents=True)
    for category in CATEGORIES:
        rows = [{**row, **{key: category + row[key] for key in ("candidate", "target")}} for row in ROWS]
        (folder / captions / f"cap.{category}.val.json").write_text(json.dumps(rows))
        ids = [category + identity for identity in PICTURES]
        (folder / f"image_splits/split.{category}.val.json").write_text(json.dumps(ids))
        for identity, words in PICTURES.items():
            save(folder / "images" / f"{category}{identity}{suffix}", *words)
    return folder


def evaluate(folder):
    processor = ColorProcessor()
    return evaluate_fashioniq(ColorModel(), processor, folder, progress=False), processor


@pytest.mark.parametrize(("captions", "suffix"), [("captions", ".png"), ("json", ".jpg")])
def test_the_reader_finds_both_layouts(tmp_path, captions, suffix):
    queries, gallery = read_fashioniq(copy(tmp_path, captions, suffix), "shirt")
    assert [(query.candidate, query.target, list(query.captions)) for query in queries] == [
        ("shirt" + row["candidate"], "shirt" + row["target"], row["captions"]) for row in ROWS
    ]
    assert list(gallery) == ["shirt" + identity for identity in PICTURES]
    assert all(path.suffix == suffix and path.is_file() for path in gallery.values())


def test_each_category_is_its_own_gallery_and_the_mean_is_over_them(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mm.evaluation.composed.fashioniq.RECALLS", (1, 2, 3))
    result, processor = evaluate(copy(tmp_path))
    rows = result["results"]["dress"]
    assert rows["composed"] == {"r1": 100, "r2": 100, "r3": 100}
    # the reference stays: it is most like itself, and the target ties with the picture that shares its other half
    assert rows["image_only"] == {"r1": 0, "r2": 0, "r3": 100}
    assert rows["text_only"] == rows["text_only_bare"] == {"r1": 0, "r2": 100, "r3": 100}  # the bird ties
    assert rows["image_text"]["r1"] == rows["image_text_bare"]["r1"] == 100
    assert rows["chance"] == {"r1": pytest.approx(100 / 6), "r2": pytest.approx(200 / 6), "r3": 50}
    assert result["gallery"] == dict.fromkeys(CATEGORIES, 6) and result["queries"] == dict.fromkeys(CATEGORIES, 2)
    assert len(processor.pictures) == 18
    assert set(result["results"]) == {*CATEGORIES, "mean"}
    assert result["published"] is PUBLISHED["fashioniq"]


def test_the_mean_is_over_categories(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mm.evaluation.composed.fashioniq.RECALLS", (1,))
    folder = copy(tmp_path)
    save(folder / "images/dressB002.png", "bird", "toy")  # not what is asked for any more
    results = evaluate(folder)[0]["results"]
    assert [results[name]["composed"]["r1"] for name in CATEGORIES] == [50, 100, 100]
    assert results["mean"]["composed"]["r1"] == pytest.approx(250 / 3)


def test_the_second_caption_comes_first_and_the_published_words_keep_their_star(tmp_path):
    texts = evaluate(copy(tmp_path))[1].texts
    assert "a photo of * , is red, and better and is nicer" in texts
    assert r"a photo of \* , is red, and better and is nicer" in texts
    assert "is red, and better and is nicer" in texts
    assert r"a photo of * , has more and is long\*" in texts


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"captions/cap.dress.val.json is missing: .*XiaoxiaoGuo/fashion-iq"):
        evaluate(tmp_path / "nowhere")
    folder = copy(tmp_path / "data")
    (folder / "images/topteeB003.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 6 pictures are missing, such as .*topteeB003.png"):
        evaluate(folder)
    file = folder / "captions/cap.shirt.val.json"
    file.write_text(json.dumps([{**ROWS[0], "candidate": "shirtB001", "target": "dressB001"}]))
    with pytest.raises(ValueError, match="names dressB001, which .*split.shirt.val.json lacks"):
        evaluate(folder)
    file.write_text(json.dumps([{**ROWS[0], "captions": ["only one"]}]))
    with pytest.raises(ValueError, match="not of the published format"):
        evaluate(folder)
