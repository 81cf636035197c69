import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from toys import TableModel, TableProcessor, small_clip

from hf_mm.data.emoji import load_emoji
from hf_mm.evaluation import style_shift
from hf_mm.evaluation.embeddings import embed_images
from hf_mm.evaluation.pixels import embed_pixels
from hf_mm.evaluation.retrieval import evaluate_retrieval
from hf_mm.evaluation.style_shift import evaluate_emoji
from hf_mm.evaluation.zero_shot import build_classifier, classification_metrics, evaluate_zero_shot

RETRIEVAL = ("i2t_r1", "i2t_r5", "i2t_r10", "mrr", "t2i_r1", "t2i_r10")


def knowing_model(emoji):
    """A model that knows every picture: its embedding lights up the captions of all pictures that look like it."""
    captions = sorted(set(emoji["caption"]))
    number = {caption: index for index, caption in enumerate(captions)}
    tables = {}
    for image, caption in zip(emoji["image"], emoji["caption"], strict=True):
        tables.setdefault(image.tobytes(), torch.zeros(len(captions)))[number[caption]] = 1
    looks = {look: index for index, look in enumerate(tables)}
    other_texts = torch.zeros(1, len(captions))
    model = TableModel(torch.stack(list(tables.values())), torch.cat([torch.eye(len(captions)), other_texts]))
    return model, TableProcessor(lambda image: looks[image.tobytes()], lambda text: number.get(text, len(captions)))


@pytest.fixture(scope="module")
def known():
    """The whole benchmark with a model that knows all."""
    return evaluate_emoji(*knowing_model(load_emoji("all")), normalize_size=False, progress=False)


@pytest.fixture
def few_emoji(monkeypatch):
    """Three subgroups, which have pictures in every split by every artist."""
    whole = load_emoji("all")
    subgroups = {"plant-other", "person-gesture", "event"}
    rows = [row for row, subgroup in enumerate(whole["subgroup"]) if subgroup in subgroups]
    few = whole.select(rows)
    monkeypatch.setattr(style_shift, "load_emoji", lambda *args, **kwargs: few)
    return few


def test_galleries_and_pictures_of_each_cell(known):
    counts = {name: (known[name]["images"], known[name]["captions"]) for name in style_shift.CELLS}
    sizes = {split: len(load_emoji(split)) for split in ("cell", "style", "val", "concept", "both", "train")}
    assert counts == {
        "cell": (211, 1405),
        "style": (1405, 1405),
        "val": (sizes["val"], 82),
        "val_style": (82, 82),
        "concept": (sizes["concept"], 165),
        "both": (165, 165),
        "concept_all": (sizes["concept"], 1652),
        "fit": (sizes["train"], 1405),
    }
    seen = sum(known["styles"][style]["seen"]["images"] for style in ("noto", "twemoji", "fluent"))
    assert seen == sizes["cell"]
    assert known["styles"]["openmoji"]["new"] == known["both"]


def test_a_model_that_knows_all_scores_100(known):
    for name in style_shift.CELLS:
        assert {known[name][key] for key in RETRIEVAL} == {100}, name


def test_chance_grows_where_pictures_look_alike(known):
    assert known["concept"]["chance_r1"] == pytest.approx(100 / 165)
    assert 100 / 1405 < known["style"]["chance_r1"] < 110 / 1405
    assert known["subgroup"]["concept"]["chance"] == pytest.approx(100 / 96)


def test_subgroups_are_known_by_training_captions_alone(known):
    assert known["subgroup"]["cell"]["accuracy"] == known["subgroup"]["cell"]["balanced_accuracy"] == 100
    style = load_emoji("style")
    subgroups = defaultdict(set)
    for image, subgroup in zip(style["image"], style["subgroup"], strict=True):
        subgroups[image.tobytes()].add(subgroup)
    ambiguous = [image for image in style["image"] if len(subgroups[image.tobytes()]) > 1]
    assert len(ambiguous) == 2  # one drawing in two subgroups, of which one wins
    assert known["subgroup"]["style"]["accuracy"] == pytest.approx(100 - 100 / 1405)
    for split in ("concept", "both"):  # no training caption lights up: all classes tie
        assert known["subgroup"][split]["accuracy"] == 0


def test_pixels_beside_known_concepts_only_and_memory_is_marked(known):
    assert known["fit"]["is_result"] is False
    assert known["fit"]["pixels_r1"] == 100
    for name in ("val", "val_style", "concept", "both", "concept_all"):
        assert known[name]["pixels_r1"] is known[name]["pixels_r10"] is None
    assert 0 < known["style"]["pixels_r1"] < known["cell"]["pixels_r1"] < known["cell"]["pixels_r10"] < 100


def test_the_result_is_json(known):
    assert json.loads(json.dumps(known, allow_nan=False)) == known
    assert known["temperature"] == 1 and known["normalize_size"] is False


def test_a_constant_model_is_never_above_chance(few_emoji):
    _, processor = knowing_model(few_emoji)
    model = TableModel(torch.ones(len(few_emoji), 4), torch.ones(len(few_emoji), 4))
    results = evaluate_emoji(model, processor, progress=False)
    for name in style_shift.CELLS:
        assert results[name]["i2t_r1"] == 0 and results[name]["i2t_r10"] <= results[name]["chance_r10"]
    for table in (results["subgroup"], results["group"]):
        assert all(row["accuracy"] == row["name_accuracy"] == 0 for row in table.values())


def test_a_real_clip_agrees_with_retrieval_on_any_data(few_emoji):
    model, processor = small_clip()
    results = evaluate_emoji(model, processor, batch_size=64, progress=False)
    assert results["temperature"] == pytest.approx(math.exp(-model.logit_scale.item()))
    gallery = list(dict.fromkeys(few_emoji["caption"]))
    for name, split, texts in (
        ("concept", "concept", None),
        ("concept_all", "concept", gallery),
        ("both", "both", None),
    ):
        rows = few_emoji.filter(lambda row_split, split=split: row_split == split, input_columns="split")
        captions = [[caption] for caption in rows["caption"]]
        expected = evaluate_retrieval(
            model, processor, rows["image"], captions, gallery=texts, batch_size=64, progress=False
        )
        expected = {"mrr": expected["i2t_mrr"], **expected}
        assert {key: results[name][key] for key in RETRIEVAL} == {
            key: pytest.approx(expected[key]) for key in RETRIEVAL
        }


def test_classes_agree_with_zero_shot_on_any_data(few_emoji):
    model, processor = small_clip()
    results = evaluate_emoji(model, processor, batch_size=64, progress=False)
    train, both = (
        few_emoji.filter(lambda split, wanted=wanted: split == wanted, input_columns="split")
        for wanted in ("train", "both")
    )
    for column in ("subgroup", "group"):
        names = sorted(set(few_emoji[column]))
        labels = [names.index(name) for name in both[column]]
        texts = [sorted({row["caption"] for row in train if row[column] == name}) for name in names]
        spoken = [name.replace("-", " ") for name in names]
        by_name = evaluate_zero_shot(model, processor, both["image"], labels, spoken, ["{}"], progress=False)
        classifier = build_classifier(model, processor, texts, progress=False)
        images = embed_images(model, processor, both["image"], progress=False)
        by_prototype = classification_metrics(images @ classifier.T, torch.tensor(labels))
        row = results[column]["both"]
        assert row["name_accuracy"] == by_name["top1"]
        assert row["name_balanced_accuracy"] == by_name["balanced_accuracy"]
        assert [row["accuracy"], row["balanced_accuracy"]] == [by_prototype["top1"], by_prototype["balanced_accuracy"]]
        assert row["majority"] == by_name["majority"] and row["classes"] == len(names)


def test_the_pixel_baselines_agree_with_a_plain_search(few_emoji):
    results = evaluate_emoji(*small_clip(), batch_size=64, progress=False)
    train = few_emoji.select(np.flatnonzero(np.array(few_emoji["split"]) == "train"))
    style = few_emoji.select(np.flatnonzero(np.array(few_emoji["split"]) == "style"))
    train_pixels, style_pixels = (embed_pixels(rows["image"]).numpy() for rows in (train, style))
    first, subgroup = [], []
    for pixels, caption, own in zip(style_pixels, style["caption"], style["subgroup"], strict=True):
        best = int(np.argmax(train_pixels @ pixels))
        first.append(train["caption"][best] == caption)
        subgroup.append(train["subgroup"][best] == own)
    found = []
    for caption in style["caption"]:
        of_caption = train_pixels[np.array(train["caption"]) == caption]
        found.append(style["caption"][int(np.argmax((of_caption @ style_pixels.T).max(axis=0)))] == caption)
    assert results["style"]["pixels_r1"] == pytest.approx(100 * np.mean(first))
    assert results["style"]["pixels_t2i_r1"] == pytest.approx(100 * np.mean(found))
    assert results["subgroup"]["style"]["pixels_accuracy"] == pytest.approx(100 * np.mean(subgroup))
    assert results["subgroup"]["style"]["classes"] == 3
