import json

import pytest
import torch
from composed_toys import CIRR_NAMES, CIRR_PAIRS, ColorModel, ColorProcessor, draw, write_cirr

from hf_mm.evaluation.composed.cirr import evaluate_cirr, read_cirr
from hf_mm.evaluation.composed.published import PUBLISHED


def evaluate(folder, **options):
    processor = ColorProcessor()
    return evaluate_cirr(ColorModel(), processor, folder, progress=False, **options), processor


@pytest.mark.parametrize("below", ["", "img_raw"])
def test_the_reader_finds_queries_and_pictures(tmp_path, below):
    queries, gallery = read_cirr(write_cirr(tmp_path, below=below))
    assert [(query.reference, query.caption, query.target) for query in queries] == CIRR_PAIRS
    assert queries[0].pair_id == "100" and len(queries[0].members) == 6
    assert list(gallery) == CIRR_NAMES and all(path.is_file() for path in gallery.values())


def test_the_right_model_finds_every_target_and_the_baselines_do_not(tmp_path):
    result, processor = evaluate(write_cirr(tmp_path))
    rows = result["results"]["val"]
    assert set(rows["composed"].values()) == {100}
    # a picture alone ties with all that share one thing with it: two bands of two words and the constant
    assert rows["image_only"]["r1"] == rows["image_only"]["subset_r1"] == 0
    # the words alone tie with all pictures that show them: three red ones, four real ones, one long one
    assert rows["text_only"]["r1"] == 25
    assert rows["text_only"]["r5"] == rows["text_only"]["r10"] == 100
    assert rows["chance"]["r1"] == pytest.approx(100 / 7) and rows["chance"]["r10"] == 100
    assert rows["chance"]["subset_r1"] == pytest.approx(20) and rows["chance"]["subset_r3"] == pytest.approx(60)
    assert (result["queries"], result["gallery"]) == (4, 8)
    assert result["published"] is PUBLISHED["cirr"]
    assert len(processor.pictures) == 8  # each picture once, references included


def test_prompts_are_the_published_ones_and_a_literal_star_stays_one(tmp_path):
    _, processor = evaluate(write_cirr(tmp_path))
    assert "a photo of * , red, not as it was" in processor.texts and "red, not as it was" in processor.texts
    assert r"a photo of * , as a \* long one" in processor.texts and r"as a \* long one" in processor.texts


def test_the_reference_is_not_in_the_ranking(tmp_path):
    """The same picture as the reference is asked for, which only the reference itself could beat."""
    folder = write_cirr(tmp_path, pairs=[(CIRR_NAMES[0], "nothing changes", CIRR_NAMES[1])])
    draw("cat", "real").save(folder / f"dev/{CIRR_NAMES[1]}.png")
    rows = evaluate(folder)[0]["results"]["val"]
    assert rows["composed"]["r1"] == rows["image_only"]["r1"] == rows["composed"]["subset_r1"] == 100


def test_submissions_are_what_the_server_takes(tmp_path):
    folder = write_cirr(tmp_path / "data", split="test1")
    result, _ = evaluate(folder, split="test1", submission=tmp_path / "out/mine.json")
    assert result["results"] == {} and result["split"] == "test1"
    assert set(result["submissions"]) == {str(path) for path in (tmp_path / "out").iterdir()}
    assert len(result["submissions"]) == 8
    recall = json.loads((tmp_path / "out/mine.json").read_text())
    assert list(recall) == ["version", "metric", "100", "101", "102", "103"]
    assert (recall.pop("version"), recall.pop("metric")) == ("rc2", "recall")
    for (reference, _, target), names in zip(CIRR_PAIRS, recall.values(), strict=True):
        assert names[0] == target and len(names) == 7 and set(names) == set(CIRR_NAMES) - {reference}
    assert " " not in (tmp_path / "out/mine.json").read_text()  # the server takes 5 MB
    subset = json.loads((tmp_path / "out/mine.subset.json").read_text())
    assert (subset.pop("version"), subset.pop("metric")) == ("rc2", "recall_subset")
    members = {query.pair_id: set(query.members) - {query.reference} for query in read_cirr(folder, "test1")[0]}
    for (_, _, target), (pair, names) in zip(CIRR_PAIRS, subset.items(), strict=True):
        assert names[0] == target and len(names) == 3 and set(names) <= members[pair]
    image_only = json.loads((tmp_path / "out/mine.image_only.json").read_text())
    assert CIRR_PAIRS[0][0] not in image_only["100"] and image_only != {"version": "rc2", "metric": "recall", **recall}


def test_at_most_fifty_names_are_submitted():
    from hf_mm.evaluation.composed.cirr import best_names

    gallery = torch.nn.functional.normalize(torch.randn(60, 8), dim=-1)
    (names,) = best_names(gallery[:1], gallery, [str(number) for number in range(60)], torch.tensor([0]))
    order = (gallery @ gallery[0]).argsort(descending=True).tolist()[1:51]
    assert names == [str(number) for number in order]


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"split.rc2.val.json is missing: .*github.com/Cuberick-Orion"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match="pass submission"):
        evaluate(tmp_path, split="test1")
    with pytest.raises(ValueError, match="'train': it must be one of val, test1"):
        evaluate(tmp_path, split="train")
    folder = write_cirr(tmp_path)
    (folder / f"dev/{CIRR_NAMES[3]}.png").unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 8 pictures are missing, such as .*{CIRR_NAMES[3]}.png: .*nlvr"):
        evaluate(folder)
    captions = folder / "captions/cap.rc2.val.json"
    rows = json.loads(captions.read_text())
    captions.write_text(json.dumps([{**rows[0], "target_hard": "dev-9-0-img0"}]))
    with pytest.raises(ValueError, match="pair 100 of .* names dev-9-0-img0"):
        evaluate(folder)
    captions.write_text(json.dumps([{**rows[0], "target_hard": rows[0]["reference"]}]))
    with pytest.raises(ValueError, match="target of pair 100"):
        evaluate(folder)
    captions.write_text(json.dumps([{"pairid": 1}]))
    with pytest.raises(ValueError, match="not of the published format.*reference"):
        evaluate(folder)
    captions.write_text("[")
    with pytest.raises(ValueError, match="no JSON file"):
        evaluate(folder)
    captions.write_text("[]")
    with pytest.raises(ValueError, match="holds no query"):
        evaluate(folder)
    (folder / "image_splits/split.rc2.val.json").write_text("{}")
    with pytest.raises(ValueError, match="names no picture"):
        evaluate(folder)
