import json
from collections import Counter

import numpy as np
import pytest
import torch
from toys import TableModel, TableProcessor, small_clip

from hf_mm.data.emoji import load_emoji, normalize_size
from hf_mm.evaluation import hard_negatives
from hf_mm.evaluation.hard_negatives import PARTS, SETS, SUBGROUPS, evaluate_hard_negatives, hard_negative_sets
from hf_mm.evaluation.pixels import embed_pixels
from hf_mm.evaluation.zero_shot import evaluate_zero_shot


@pytest.fixture(scope="module")
def sets():
    return hard_negative_sets()


@pytest.fixture(scope="module")
def asked(sets):
    """The pictures under a caption of a set."""
    captions = [caption for galleries in sets.values() for gallery in galleries for caption in gallery]
    emoji = load_emoji("all", skin_tones=True)
    return emoji.select(np.flatnonzero(np.isin(emoji["caption"][:], captions)))


@pytest.fixture(scope="module")
def looks(asked):
    return [image.tobytes() for image in asked["image"]]


@pytest.fixture(scope="module")
def known(asked, looks):
    """All sets, with a model that knows the captions of every picture."""
    captions = list(dict.fromkeys(asked["caption"]))
    column = {caption: index for index, caption in enumerate(captions)}
    number = {look: index for index, look in enumerate(dict.fromkeys(looks))}
    table = torch.zeros(len(number), len(captions))
    for look, caption in zip(looks, asked["caption"], strict=True):
        table[number[look], column[caption]] = 1
    model = TableModel(table, torch.eye(len(captions)))
    processor = TableProcessor(lambda image: number[image.tobytes()], column.get)
    return evaluate_hard_negatives(model, processor, normalize_size=False, progress=False)


@pytest.fixture
def few_emoji(monkeypatch, asked):
    """Signs of the zodiac, and gestures of people in all tones."""
    few = asked.select(np.flatnonzero(np.isin(asked["subgroup"][:], ["zodiac", "person-gesture"])))
    monkeypatch.setattr(hard_negatives, "load_emoji", lambda *args, **kwargs: few)
    monkeypatch.setattr(hard_negatives, "SUBGROUPS", {"zodiac": SUBGROUPS["zodiac"]})
    return few


def parts_of(row):
    return {part: row[part] for part in PARTS}


# ------------------------------------------------------------------------------------------------------------ the sets


def test_sizes_of_the_sets(sets):
    assert tuple(sets) == SETS
    sizes = {name: Counter(map(len, galleries)) for name, galleries in sets.items()}
    assert sizes == {
        "gender": {3: 75, 2: 1},
        "clock_faces": {24: 1},
        "moon_phases": {13: 1},
        "keycaps": {13: 1},
        "zodiac": {13: 1},
        "hearts": {25: 1},
        "geometric": {34: 1},
        "arrows": {21: 1},
        "skin_tones": {4: 330},
    }


def test_what_the_sets_hold(sets):
    assert ["cook", "man cook", "woman cook"] in sets["gender"]
    assert sorted(next(gallery for gallery in sets["gender"] if len(gallery) == 2)) == ["man dancing", "woman dancing"]
    assert not any("arrow" in caption or "sign" in caption for gallery in sets["gender"] for caption in gallery)
    assert {"twelve o’clock", "eleven-thirty"} < set(sets["clock_faces"][0])
    assert "alarm clock" not in sets["clock_faces"][0]
    assert {"full moon", "new moon face", "crescent moon"} < set(sets["moon_phases"][0])
    tones = ["light", "medium", "dark"]
    assert ["waving hand"] + [f"waving hand: {tone} skin tone" for tone in tones] in sets["skin_tones"]


def test_clock_faces_are_those_of_unicode(sets, asked):
    code = dict(zip(asked["caption"], asked["hexcode"], strict=True))
    assert {code[caption] for caption in sets["clock_faces"][0]} == {f"{point:X}" for point in range(0x1F550, 0x1F568)}


def test_a_caption_is_once_in_a_set(sets):
    for galleries in sets.values():
        assert max(Counter(caption for gallery in galleries for caption in gallery).values()) == 1


# ---------------------------------------------------------------------------------------------------------- the results


def test_a_model_that_knows_all_scores_100(known):
    for name in SETS:
        for part in parts_of(known[name]).values():
            assert part["accuracy"] == (100 if part["images"] else None)


def test_pictures_of_each_part(known):
    counts = {name: tuple(part["images"] for part in parts_of(known[name]).values()) for name in SETS}
    assert counts == {
        "gender": (554, 124, 171, 28),
        "clock_faces": (57, 15, 20, 4),
        "moon_phases": (38, 1, 13, 0),
        "keycaps": (32, 7, 11, 2),
        "zodiac": (29, 10, 11, 2),
        "hearts": (54, 21, 20, 5),
        "geometric": (81, 19, 29, 5),
        "arrows": (49, 14, 18, 3),
        "skin_tones": (3179, 700, 1140, 180),
    }


def test_pictures_alike_in_a_gallery_are_not_asked_for(known, sets, asked, looks):
    rows = list(zip(asked["style"], looks, asked["caption"], strict=True))
    for name, dropped in (("gender", 31), ("geometric", 2), ("skin_tones", 4)):
        captions = {caption for gallery in sets[name] for caption in gallery}
        of_set, alike = [row for row in rows if row[2] in captions], 0
        for gallery in sets[name]:
            times = Counter(row[:2] for row in of_set if row[2] in gallery)
            alike += sum(count for count in times.values() if count > 1)
        assert alike == dropped
        assert sum(part["images"] for part in parts_of(known[name]).values()) == len(of_set) - alike


def test_chance(known):
    assert known["clock_faces"]["style"]["chance"] == pytest.approx(100 / 24)
    assert known["skin_tones"]["both"]["chance"] == 25
    assert known["gender"]["train"]["chance"] == pytest.approx(100 / 3)  # both dancers are held out
    assert 100 / 3 < known["gender"]["both"]["chance"] < 35


def test_pixels_answer_where_they_can(known):
    for name in SETS[:-1]:
        assert known[name]["train"]["pixels_accuracy"] == 100
        assert known[name]["both"]["pixels_accuracy"] is None
        assert 0 < known[name]["style"]["pixels_accuracy"] < 100
        assert (known[name]["unseen"]["pixels_accuracy"] is None) == (name != "moon_phases")
    assert {part["pixels_accuracy"] for part in parts_of(known["skin_tones"]).values()} == {None}


def test_pixels_agree_with_a_plain_search(known, sets, asked):
    (hearts,) = sets["hearts"]
    train, style = (
        asked.select(
            [
                row
                for row, (split, caption) in enumerate(zip(asked["split"], asked["caption"], strict=True))
                if split == wanted and caption in hearts
            ]
        )
        for wanted in ("train", "style")
    )
    nearest = (embed_pixels(style["image"]).numpy() @ embed_pixels(train["image"]).numpy().T).argmax(axis=1)
    right = [train["caption"][int(row)] == caption for row, caption in zip(nearest, style["caption"], strict=True)]
    assert known["hearts"]["style"]["pixels_accuracy"] == pytest.approx(100 * np.mean(right))


def test_the_result_is_json(known):
    assert json.loads(json.dumps(known, allow_nan=False)) == known
    assert known["normalize_size"] is False and known["zodiac"]["galleries"] == 1


def test_a_constant_model_names_nothing(few_emoji):
    model = TableModel(torch.ones(1, 4), torch.ones(1, 4))
    processor = TableProcessor(lambda image: 0, lambda text: 0)
    results = evaluate_hard_negatives(model, processor, progress=False)
    for name in ("gender", "zodiac", "skin_tones"):
        assert {part["accuracy"] for part in parts_of(results[name]).values()} == {0}


def test_a_model_blind_to_tones_reaches_chance(few_emoji):
    """It knows the emoji, and of its four captions prefers the one without a tone."""
    bases = list(dict.fromkeys(few_emoji["base"]))
    looks = [image.tobytes() for image in few_emoji["image"]]
    base_of = dict(zip(looks, few_emoji["base"], strict=True))
    about = {row["caption"]: row for row in few_emoji.remove_columns("image")}

    table = torch.eye(len(bases))
    toned = torch.nn.functional.normalize(table + 0.1 / len(bases), dim=-1)
    model = TableModel(table, torch.cat([table, toned]))

    def text_number(text):
        return bases.index(about[text]["base"]) + len(bases) * (about[text]["skin_tone"] > 0)

    processor = TableProcessor(lambda image: bases.index(base_of[image.tobytes()]), text_number)
    results = evaluate_hard_negatives(model, processor, normalize_size=False, progress=False)
    assert {part["accuracy"] for part in parts_of(results["skin_tones"]).values()} == {25}
    assert {part["accuracy"] for part in parts_of(results["zodiac"]).values()} == {100}


def test_a_real_clip_agrees_with_zero_shot(few_emoji):
    model, processor = small_clip()
    results = evaluate_hard_negatives(model, processor, batch_size=64, progress=False)
    style = load_emoji("style")
    signs = style.select(np.flatnonzero(np.array(style["subgroup"][:]) == "zodiac"))
    names = hard_negative_sets()["zodiac"][0]
    labels = [names.index(caption) for caption in signs["caption"]]
    pictures = [normalize_size(image) for image in signs["image"]]
    expected = evaluate_zero_shot(model, processor, pictures, labels, names, ["{}"], progress=False)
    assert results["zodiac"]["style"]["accuracy"] == pytest.approx(expected["top1"])
    assert results["zodiac"]["style"]["chance"] == pytest.approx(expected["chance_top1"])
    assert results["normalize_size"] is True
