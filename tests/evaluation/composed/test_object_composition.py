import importlib.util
import json

import numpy as np
import pytest
from composed_toys import COLORS, ColorModel, ColorProcessor, save, small_pic2word
from PIL import Image

from hf_mm.evaluation.composed import object_composition
from hf_mm.evaluation.composed.object_composition import CocoInstances, decode_mask, evaluate_object_composition
from hf_mm.evaluation.composed.published import PUBLISHED

CATEGORIES = ["cat", "dog", "bird", "car"]
SCENES = {1: ("cat", "dog"), 2: ("cat", "bird"), 7: ("dog", "car", "bird"), 9: ("car",)}


@pytest.fixture(autouse=True)
def without_pycocotools(monkeypatch):
    monkeypatch.setattr(object_composition, "has_pycocotools", lambda: False)


def copy(folder, scenes=SCENES):
    """A copy as published: pictures of 40x20, a band for each object, the last one's mask as run lengths."""
    annotations = []
    for image_id, names in scenes.items():
        save(folder / f"val2017/{image_id:012d}.jpg", *names, width=40, height=20)
        edges = np.linspace(0, 40, len(names) + 1).astype(int).tolist()
        for number, (name, left, right) in enumerate(zip(names, edges, edges[1:], strict=False)):
            segmentation = [[left, 2, right - 1, 2, right - 1, 17, left, 17]]
            bbox, crowd = [left, 2.0, right - left, 16.0], number == len(names) - 1
            if crowd:
                counts = [20 * left + 2, *[16, 4] * (right - left)]  # rows 2 to 17 of each column
                counts[-1] += 20 * (40 - right) - 2
                segmentation = {"size": [20, 40], "counts": counts}
            annotations.append(
                {
                    "id": 100 * image_id + number,
                    "image_id": image_id,
                    "category_id": CATEGORIES.index(name) + 1,
                    "bbox": bbox,
                    "segmentation": segmentation,
                    "iscrowd": int(crowd),
                }
            )
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": 40, "height": 20} for i in [*scenes, 50]],
        "categories": [{"id": number + 1, "name": name} for number, name in enumerate(CATEGORIES)],
        "annotations": annotations,
    }
    (folder / "annotations").mkdir()
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return folder


def change(folder, **fields):
    """Changes the first annotation of the copy."""
    path = folder / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][0] |= fields
    path.write_text(json.dumps(content))


def evaluate(folder, **options):
    processor = ColorProcessor()
    return evaluate_object_composition(ColorModel(), processor, folder, progress=False, **options), processor


def test_the_right_model_finds_every_picture_and_the_baselines_do_not(tmp_path):
    scenes = {1: ("cat", "dog"), 2: ("cat", "bird"), 3: ("dog", "bird")}
    result, processor = evaluate(copy(tmp_path, scenes))
    rows = result["results"]
    assert set(rows) == {"code", "paper"} and result["queries"] == 3 and result["masks"] == "PIL"
    assert rows["code"]["composed"]["r1"] == rows["paper"]["composed"]["r1"] == 100
    assert rows["code"]["composed"]["back_r1"] == 100
    assert rows["code"]["image_only"]["r1"] == rows["paper"]["text_only"]["r1"] == 0  # two pictures show that
    assert rows["code"]["text_only"]["r1"] == 100 and rows["code"]["image_text"]["r1"] == 100
    assert rows["code"]["chance"]["r1"] == rows["code"]["chance"]["back_r1"] == pytest.approx(100 / 3)
    assert len(processor.pictures) == 1 + 6  # the first asked for the size
    assert result["published"] is PUBLISHED["object-composition"]


def test_both_directions(tmp_path):
    """A cat asks for cat and dog, a dog for cat, dog and bird: either is most like the first picture."""
    folder, file = copy(tmp_path, {1: ("cat", "dog"), 2: ("cat", "dog", "bird")}), tmp_path / "queries.json"
    rows = [
        {"image_id": 1, "annotation_id": 100, "name": "cat", "others": ["dog"]},
        {"image_id": 2, "annotation_id": 201, "name": "dog", "others": ["cat", "bird"]},
    ]
    file.write_text(json.dumps({"seed": 0, "published_area": False, "queries": rows}))
    alone = evaluate(folder, queries=file)[0]["results"]["code"]["image_only"]
    assert (alone["r1"], alone["back_r1"]) == (50, 0)  # to either picture, both objects are alike
    assert alone["r5"] == alone["back_r5"] == 100


def test_prompts_name_the_others_and_have_no_empty_tail(tmp_path):
    scenes = {1: ("cat", "dog"), 2: ("car", "car", "bird"), 7: ("car", "car")}
    coco = CocoInstances(copy(tmp_path, scenes))
    (query,) = (query for query in coco.draw() if query.image_id == 1)
    drawn, other = query.name, query.others[0]
    assert {drawn, other} == {"cat", "dog"}
    texts = evaluate(tmp_path)[1].texts
    assert f"a photo of * and {drawn} and {other}" in texts and f"a photo of {drawn} and {other}" in texts
    assert f"a photo of * , {other}" in texts and f"a photo of {other}" in texts
    assert "a photo of * and car" in texts and "a photo of *" in texts and "a photo of" in texts
    assert not any(text.strip().endswith((" and", ",")) for text in texts)
    assert not any("car and car" in text for text in texts)


def test_the_draw_depends_on_seed_and_picture_alone(tmp_path):
    scenes = dict.fromkeys(range(1, 31), ("cat", "dog", "bird"))
    coco = CocoInstances(copy(tmp_path, scenes))
    first = coco.draw(seed=0)
    assert first == coco.draw(seed=0) != coco.draw(seed=1)
    assert len({query.name for query in first}) == 3
    fewer = CocoInstances(copy(tmp_path / "fewer", {number: scenes[number] for number in range(20, 31)}))
    assert fewer.draw(seed=0) == first[19:]


@pytest.mark.parametrize(
    ("box", "fits", "as_published"),
    [
        ((0, 0, 10, 4), False, True),  # 0.05 of 40x20 is 40 pixels
        ((0, 0, 10, 4.1), True, True),
        ((0, 0, 20, 19.9), True, True),
        ((0, 0, 20, 20), False, False),  # 0.5 of it is 400
        ((0, 0, 0.2, 0.2), False, False),
        ((0, 0, 0.5, 0.5), False, True),
    ],
)
def test_the_area_of_what_is_drawn(tmp_path, box, fits, as_published):
    folder = copy(tmp_path, {1: ("cat",)})
    change(folder, bbox=list(box))
    coco = CocoInstances(folder)
    assert bool(coco.draw()) == fits and bool(coco.draw(published_area=True)) == as_published


def test_what_was_drawn_is_kept(tmp_path):
    folder, file = copy(tmp_path), tmp_path / "kept/queries.json"
    first, _ = evaluate(folder, queries=file, seed=3)
    stored = json.loads(file.read_text())
    assert (stored["seed"], stored["published_area"], len(stored["queries"])) == (3, False, 3)  # 9 is one large car
    stored["queries"] = stored["queries"][:2]
    file.write_text(json.dumps(stored))
    again, _ = evaluate(folder, queries=file, seed=3)
    assert (first["queries"], again["queries"]) == (3, 2)
    assert [path.name for path in file.parent.iterdir()] == ["queries.json"]
    with pytest.raises(ValueError, match="was drawn with .*3.*, not with .*4"):
        evaluate(folder, queries=file, seed=4)
    stored["queries"][0]["annotation_id"] = 5
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="object 5 of picture 1, which COCO lacks"):
        evaluate(folder, queries=file, seed=3)
    file.write_text("{}")
    with pytest.raises(ValueError, match="not of the published format"):
        evaluate(folder, queries=file)


def test_what_is_outside_the_mask_is_white_and_nothing_is_cropped(tmp_path):
    folder = copy(tmp_path, {1: ("cat", "dog")})
    triangle = [[2.0, 1.0, 18.0, 1.0, 2.0, 17.0]]
    change(folder, segmentation=triangle, bbox=[2.0, 1.0, 16.0, 16.0])
    coco = CocoInstances(folder)
    query = object_composition.ObjectQuery(1, 100, "cat", ("dog",))
    pixels = np.asarray(coco.cut_out(query, (16, 16)))
    assert (pixels[1:12, 0] == COLORS["cat"]).all() and (pixels[0, :14] == COLORS["cat"]).all()
    assert (pixels[8:, 9:] == 255).all()
    stretched = np.asarray(coco.cut_out(query, (32, 8)))
    assert stretched.shape == (32, 8, 3)
    assert (stretched[2:24, 0] == COLORS["cat"]).all() and (stretched[20:, 6:] == 255).all()


def test_the_model_sees_all_of_the_stretched_object(tmp_path):
    """Resizing and cropping of the processor leave a picture of the model's size as it is."""
    query = object_composition.ObjectQuery(1, 100, "cat", ("dog",))
    coco = CocoInstances(copy(tmp_path, {1: ("cat", "dog")}))
    processor = small_pic2word()[1]
    assert object_composition.input_size(processor) == (16, 16)
    cut = coco.cut_out(query, (16, 16))
    seen = processor(images=[cut], do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert (np.asarray(seen).transpose(1, 2, 0) == np.asarray(cut)).all()


def test_a_thin_object_keeps_a_pixel(tmp_path):
    folder = copy(tmp_path, {1: ("cat",)})
    change(folder, bbox=[3.2, 4.0, 0.6, 9.0])
    query = object_composition.ObjectQuery(1, 100, "cat", ())
    assert CocoInstances(folder).cut_out(query, (4, 4)).size == (4, 4)


def test_masks():
    square = decode_mask([[1, 1, 3, 1, 3, 2, 1, 2], [5, 0, 5, 3]], 4, 6)
    assert square.tolist() == [[0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 0, 1], [0, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1]]
    runs = {"size": [3, 2], "counts": [1, 3, 2]}  # down the columns
    assert decode_mask(runs, 3, 2).tolist() == [[0, 1], [1, 0], [1, 0]]
    with pytest.raises(ValueError, match="fill 6 pixels, but the picture is 4x3"):
        decode_mask(runs, 3, 4)
    with pytest.raises(ValueError, match="pip install pycocotools"):
        decode_mask({"size": [3, 2], "counts": "13"}, 3, 2)


@pytest.mark.skipif(importlib.util.find_spec("pycocotools") is None, reason="pycocotools is not installed")
def test_pycocotools_decodes_every_form(monkeypatch):
    from pycocotools import mask as coco_mask

    monkeypatch.undo()
    runs = {"size": [3, 2], "counts": [1, 3, 2]}
    expected = [[0, 1], [1, 0], [1, 0]]
    packed = coco_mask.encode(np.asfortranarray(np.array(expected, np.uint8)))
    assert decode_mask(runs, 3, 2).tolist() == expected
    assert decode_mask({**packed, "counts": packed["counts"].decode()}, 3, 2).tolist() == expected
    polygons = decode_mask([[1, 1, 3, 1, 3, 3, 1, 3], [5, 0, 6, 0, 6, 4, 5, 4]], 4, 6)
    assert polygons.shape == (4, 6) and polygons[1:3, 1:3].all() and polygons[:, 5].all() and not polygons[:, 4].any()


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="instances_val2017.json is missing: .*cocodataset.org"):
        evaluate(tmp_path)
    folder = copy(tmp_path)
    Image.new("RGB", (5, 5)).save(folder / "val2017/000000000001.jpg")
    with pytest.raises(ValueError, match="000000000001.jpg is 5x5, not 40x20"):
        evaluate(folder)
    (folder / "val2017/000000000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 3 pictures are missing, such as .*000000000001.jpg"):
        evaluate(folder)
    path = folder / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "annotations": content["annotations"][-1:]}))
    with pytest.raises(ValueError, match="no object .* has the right size"):
        evaluate(folder)
    path.write_text(json.dumps({**content, "images": content["images"][1:]}))
    with pytest.raises(ValueError, match="has objects of picture 1, but not the picture"):
        evaluate(folder)
    path.write_text(json.dumps({"images": []}))
    with pytest.raises(ValueError, match="not of the published format.*categories"):
        evaluate(folder)
