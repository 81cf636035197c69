import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import hf_mm.data.emoji
from hf_mm.data.emoji import FEATURES, SPLITS, STYLES, build, load_emoji, normalize_size

FOLDER = Path(hf_mm.data.emoji.__file__).parent

# SHA-256 over the hexcode and the decoded pixels of every row in order.
PIXELS = {
    "core": "ff048a06f55f61874000db089b30726c4cfc6325021239300a00d0cfad2df3c7",
    "core_openmoji": "7b36e17c2ff37884733548938f7176b43499b8d41cdb7d89bff39102dd5ed5de",
    "tones": "93ac5588050a1b66d687844390e65844f65ae25fe9bc0986056dcab250c1d36a",
    "tones_openmoji": "1ec4c17ff341cddfff06f4ae684c074ca89ad43928cbab8e56015eeadc6cc90f",
}
COUNTS = {
    "train": {"noto": 1330, "twemoji": 1332, "fluent": 1286},
    "cell": {"noto": 75, "twemoji": 73, "fluent": 63},
    "style": {"openmoji": 1405},
    "val": {"noto": 82, "twemoji": 82, "fluent": 80},
    "val_style": {"openmoji": 82},
    "concept": {"noto": 165, "twemoji": 165, "fluent": 165},
    "both": {"openmoji": 165},
}
HELD_OUT = {
    "train": "train",
    "cell": "train",
    "style": "train",
    "val": "val",
    "val_style": "val",
    "concept": "test",
    "both": "test",
}


@pytest.fixture(scope="module")
def everything():
    return load_emoji("all", skin_tones=True)


@pytest.fixture(scope="module")
def rows(everything):
    return everything.remove_columns("image").to_list()


@pytest.fixture(scope="module")
def core(rows):
    return [row for row in rows if row["skin_tone"] == 0]


@pytest.fixture(scope="module")
def pixels(everything):
    return np.stack([np.asarray(image) for image in everything["image"]])


@pytest.fixture(scope="module")
def concepts(core):
    """The catalogue as the build script sees it; Noto has drawn all of it."""
    names = ("full_hexcode", "base", "emoji", "caption", "tags", "group", "subgroup", "skin_tone", "family")
    return [
        build.Concept(key=row["hexcode"], **{name: row[name] for name in names})
        for row in core
        if row["style"] == "noto"
    ]


def drawing_box(image, background=250):
    return Image.fromarray((np.asarray(image) < background).any(axis=-1)).getbbox()


def rectangle(box, size=(64, 64), colour=(200, 30, 30)):
    image = Image.new("RGB", size, "white")
    image.paste(colour, box)
    return image


# ---------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", PIXELS)
def test_pictures_are_those_that_were_rendered(name):
    table = pq.read_table(FOLDER / f"{name}.parquet", columns=["hexcode", "image"])
    digest = hashlib.sha256()
    for hexcode, image in zip(table["hexcode"].to_pylist(), table["image"].to_pylist(), strict=True):
        assert image["bytes"][12:16] == b"VP8L", "lossless WebP"
        picture = Image.open(io.BytesIO(image["bytes"]))
        assert (picture.format, picture.mode, picture.size) == ("WEBP", "RGB", (64, 64))
        digest.update(hexcode.encode())
        digest.update(picture.tobytes())
    assert digest.hexdigest() == PIXELS[name]


def test_files_fit_the_wheel():
    files = list(FOLDER.glob("*.parquet"))
    assert {file.stem for file in files} == set(PIXELS)
    assert sum(file.stat().st_size for file in files) <= 12_000_000


def test_share_alike_pictures_have_files_of_their_own():
    for name in PIXELS:
        table = pq.read_table(FOLDER / f"{name}.parquet", columns=["style", "license"])
        licences = set(zip(table["style"].to_pylist(), table["license"].to_pylist(), strict=True))
        if name.endswith("openmoji"):
            assert licences == {("openmoji", "CC-BY-SA-4.0")}
        else:
            assert licences == {("noto", "Apache-2.0"), ("twemoji", "CC-BY-4.0"), ("fluent", "MIT")}


# --------------------------------------------------------------------------------------------------------- the splits


def test_counts(core):
    counts = defaultdict(dict)
    for (split, style), number in Counter((row["split"], row["style"]) for row in core).items():
        counts[split][style] = number
    assert counts == COUNTS
    concepts = {row["hexcode"]: HELD_OUT[row["split"]] for row in core}
    assert Counter(concepts.values()) == {"train": 1405, "val": 82, "test": 165}


def test_skin_tones_of_people_and_hands_alone(rows):
    tones = [row for row in rows if row["skin_tone"]]
    of_each = Counter((row["skin_tone"], row["style"]) for row in tones)
    assert of_each == {(tone, style): 309 if style == "fluent" else 330 for tone in (1, 3, 5) for style in STYLES}
    assert {row["group"] for row in tones} == {"people-body"}


def test_no_family_is_in_two_splits(rows):
    splits = defaultdict(set)
    for row in rows:
        splits[row["family"]].add(HELD_OUT[row["split"]])
    assert {len(held) for held in splits.values()} == {1}
    assert len(splits) == 1431


def test_names_that_differ_in_gender_alone_are_in_one_split(rows):
    splits = defaultdict(set)
    for row in rows:
        neutral = re.sub(r"\b(wo)?m[ae]n\b|\bpeople\b", "person", row["caption"])
        splits[re.sub(r"^person (?=\w)", "", neutral)].add(HELD_OUT[row["split"]])
    assert not [name for name, held in splits.items() if len(held) > 1]


def test_a_skin_tone_follows_its_base(rows, core):
    base = {(row["hexcode"], row["style"]): row for row in core}
    for row in rows:
        for name in ("split", "family", "flip_ok", "group", "subgroup", "tags"):
            assert row[name] == base[row["base"], row["style"]][name]


def test_training_sees_every_subgroup_and_never_openmoji(core):
    trained = [row for row in core if row["split"] == "train"]
    assert {row["subgroup"] for row in trained} == {row["subgroup"] for row in core}
    assert "openmoji" not in {row["style"] for row in trained}


def test_a_cell_is_known_from_the_two_other_artists(core):
    trained = defaultdict(set)
    for row in core:
        if row["split"] == "train":
            trained[row["hexcode"]].add(row["style"])
    for row in core:
        if row["split"] == "cell":
            assert trained[row["hexcode"]] == {"noto", "twemoji", "fluent"} - {row["style"]}


def test_held_out_pictures_were_never_trained_on(rows, pixels):
    splits = defaultdict(set)
    for row, picture in zip(rows, pixels, strict=True):
        splits[picture.tobytes()].add(row["split"])
    for split in set(SPLITS) - {"train"}:
        assert not [held for held in splits.values() if {split, "train"} <= held], split
    for held in splits.values():
        assert len({HELD_OUT[split] for split in held}) == 1


def test_a_cell_is_not_drawn_alike_under_a_trained_name(rows, pixels):
    trained = {picture.tobytes() for row, picture in zip(rows, pixels, strict=True) if row["split"] == "train"}
    cells = [(row, picture) for row, picture in zip(rows, pixels, strict=True) if row["split"] == "cell"]
    assert not [row["caption"] for row, picture in cells if picture.tobytes() in trained]


def test_drawings_published_twice_are_not_asked_for(rows, pixels):
    fluent = {row["caption"]: picture for row, picture in zip(rows, pixels, strict=True) if row["style"] == "fluent"}
    for one, other in (("grinning cat", "cat face"), ("black medium square", "white square button")):
        assert np.array_equal(fluent[one], fluent[other])
    twice = [row for row in rows if row["caption"] in build.PUBLISHED_TWICE]
    assert {(row["style"] == "openmoji", row["split"]) for row in twice} == {(False, "train"), (True, "style")}


# ---------------------------------------------------------------------------------------------------------- the texts


def test_captions_name_one_picture_of_a_style(rows):
    assert max(Counter((row["style"], row["caption"]) for row in rows).values()) == 1


def test_hexcodes_spell_the_emoji(rows):
    for row in rows:
        points = [f"{ord(character):04X}" for character in row["emoji"]]
        assert row["hexcode"] == "-".join(point for point in points if point not in ("FE0F", "200D"))


def test_genders(core):
    gender = {row["hexcode"]: row["gender"] for row in core}
    assert Counter(gender.values()) == {"": 1432, "male": 98, "female": 102, "both": 20}
    assert (gender["1F468-1F373"], gender["1F469-1F373"], gender["1F9D1-1F373"]) == ("male", "female", "")


def test_a_mirrored_picture_is_not_another_concept(rows, pixels):
    small = pixels.reshape(-1, 32, 2, 32, 2, 3).mean(axis=(2, 4), dtype=np.float32)
    for style in STYLES:
        chosen = [number for number, row in enumerate(rows) if row["style"] == style and not row["skin_tone"]]
        pictures = small[chosen].reshape(len(chosen), -1)
        mirrored = small[chosen][:, :, ::-1].reshape(len(chosen), -1)
        own, after = distances(pictures, pictures), distances(mirrored, pictures)
        np.fill_diagonal(after, np.inf)
        for one, other in np.argwhere((after < 12) & (own > after + 12)):
            assert not rows[chosen[one]]["flip_ok"], (style, rows[chosen[one]], rows[chosen[other]])


def distances(one, other):
    """Root mean square differences of all pairs, in grey levels."""
    squares = (one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T
    return np.sqrt(np.maximum(squares, 0) / one.shape[1])


# -------------------------------------------------------------------------------------------------------- load_emoji


def test_features(everything):
    assert everything.features == FEATURES
    assert everything[0]["image"].size == (64, 64)
    assert (everything[0]["caption"], everything[0]["emoji"]) == ("grinning face", "😀")


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_holds_its_rows(split):
    dataset = load_emoji(split)
    assert set(dataset["split"]) == {split} and set(dataset["skin_tone"]) == {0}
    assert Counter(dataset["style"]) == COUNTS[split]


def test_styles_are_filtered():
    assert set(load_emoji("concept", styles="noto")["style"]) == {"noto"}
    assert Counter(load_emoji("all", styles=["fluent", "openmoji"])["style"]) == {"fluent": 1594, "openmoji": 1652}


def test_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in FOLDER.iterdir() if path.is_file()}
    dataset = load_emoji("val", skin_tones=True, normalize_size=True)
    assert dataset.cache_files == [] and list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in FOLDER.iterdir() if path.is_file()} == before


def test_normalized_rows_hold_the_normalized_pictures():
    plain, fitted = load_emoji("both"), load_emoji("both", normalize_size=True)
    assert fitted.remove_columns("image").to_dict() == plain.remove_columns("image").to_dict()
    encoded = fitted.cast_column("image", datasets.Image(decode=False))
    for one, other, raw in zip(plain["image"], fitted["image"], encoded["image"], strict=True):
        assert normalize_size(one).tobytes() == other.tobytes()
        assert Image.open(io.BytesIO(raw["bytes"])).tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"split": "test"},
            "unknown split 'test': choose one of all, train, cell, style, val, val_style, concept, both.",
        ),
        ({"split": None}, "unknown split None: choose one of all"),
        ({"split": ["train", "val"]}, r"unknown split \['train', 'val'\]: choose one of all"),
        ({"styles": "apple"}, "unknown style 'apple': choose from noto, twemoji, fluent, openmoji."),
        ({"styles": ["noto", "Twemoji"]}, "unknown style 'Twemoji': choose from noto"),
        ({"styles": 3}, "unknown style 3: choose from noto"),
        ({"styles": "openmoji"}, r"split 'train' has no picture in styles \['openmoji'\]: choose from noto, twemoji"),
        ({"split": "both", "styles": []}, r"split 'both' has no picture in styles \[\]: choose from openmoji."),
    ],
)
def test_wrong_calls(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_emoji(**arguments)


# ---------------------------------------------------------------------------------------------------- normalize_size


@pytest.mark.parametrize("box", [(3, 5, 23, 45), (0, 0, 64, 20), (40, 40, 43, 43), (10, 10, 11, 50), (0, 0, 64, 64)])
def test_the_longer_side_becomes_60_in_the_middle(box):
    left, top, right, bottom = drawing_box(normalize_size(rectangle(box)))
    width, height = box[2] - box[0], box[3] - box[1]
    scale = 60 / max(width, height)
    assert right - left == max(1, round(width * scale)) and bottom - top == max(1, round(height * scale))
    assert abs(left - (64 - right)) <= 1 and abs(top - (64 - bottom)) <= 1


def test_place_margin_and_faint_background_do_not_matter():
    reference = normalize_size(rectangle((5, 5, 25, 35)))
    assert normalize_size(rectangle((30, 20, 50, 50))).tobytes() == reference.tobytes()
    assert normalize_size(rectangle((5, 5, 25, 35), size=(200, 90))).tobytes() == reference.tobytes()
    faint = rectangle((0, 0, 64, 64), colour=(252, 251, 250))
    faint.paste((200, 30, 30), (5, 5, 25, 35))
    assert normalize_size(faint).tobytes() == reference.tobytes()


def test_one_channel_is_enough_to_be_drawn():
    assert drawing_box(normalize_size(rectangle((10, 10, 20, 20), colour=(255, 255, 200)))) == (2, 2, 62, 62)


def test_other_frames():
    image = normalize_size(rectangle((10, 10, 30, 20)), size=32, long_side=20)
    assert image.size == (32, 32) and drawing_box(image) == (6, 11, 26, 21)


def test_a_blank_picture_stays_blank():
    blank = normalize_size(Image.new("L", (17, 40), 255))
    assert blank.mode == "RGB" and blank.size == (64, 64) and drawing_box(blank) is None


def test_artists_come_to_one_size():
    """OpenMoji draws far smaller than Twemoji; bicubic edges may fade by one pixel."""

    def long_sides(dataset):
        boxes = defaultdict(list)
        for style, image in zip(dataset["style"], dataset["image"], strict=True):
            left, top, right, bottom = drawing_box(image)
            boxes[style].append(max(right - left, bottom - top))
        return boxes

    before, after = (
        long_sides(load_emoji("concept", normalize_size=fit)) | long_sides(load_emoji("both", normalize_size=fit))
        for fit in (False, True)
    )
    assert np.mean(before["twemoji"]) - np.mean(before["openmoji"]) > 10
    assert {side for sides in after.values() for side in sides} <= {59, 60}


# ------------------------------------------------------------------------------------------------- the build script


def test_the_script_gives_the_splits_that_ship(concepts, core):
    split = build.split_families(concepts)
    cells = {row["hexcode"]: row["style"] for row in core if row["split"] == "cell"}
    assert len(cells) == build.NUM_CELLS
    by_key = {concept.key: concept for concept in concepts}
    for row in core:
        concept = by_key[row["hexcode"]]
        assert row["split"] == build.cell_of(concept, row["style"], split, cells)
        assert row["family"] == build.family_of(concept.key, concept.caption)
        assert row["gender"] == build.gender_of(concept)
        assert row["flip_ok"] == build.mirrors_harmlessly(concept, by_key)


def test_families_join_what_differs_in_gender_age_or_side(concepts):
    family = {concept.caption: concept.family for concept in concepts}
    for members in (
        ("cook", "man cook", "woman cook"),
        ("person running", "woman running", "man running: facing right"),
        ("boy", "girl", "child"),
        ("Santa Claus", "Mrs. Claus", "Mx Claus"),
        ("kiss", "kiss: woman, man"),
    ):
        assert len({family[caption] for caption in members}) == 1, members
    assert family["kiss mark"] != family["kiss"] and family["cook"] != family["farmer"]


@pytest.mark.parametrize("hexcode", ["1f3f3-fe0f-200d-1f308", "1F3F3-200D-1F308", "1F3F3-1F308"])
def test_keys_agree_between_sources(hexcode):
    assert build.normalize_key(hexcode) == "1F3F3-1F308"


def test_icons_keep_their_own_frame(tmp_path):
    icons = {
        "width": 36,
        "height": 36,
        "icons": {"plain": {"body": "<path/>"}, "low": {"body": "<g/>", "height": 25.22, "left": -1}},
    }
    (tmp_path / "icons.json").write_text(json.dumps(icons))
    (tmp_path / "chars.json").write_text(json.dumps({"1f600": "plain", "1f349-fe0f": "low"}))
    drawings = dict(build.read_iconify(tmp_path))
    assert 'viewBox="0 0 36 36"><path/></svg>' in drawings["1F600"]
    assert 'viewBox="-1 0 36 25.22"><g/></svg>' in drawings["1F349"]


def test_the_catalogue_leaves_out_flags_components_and_double_tones(tmp_path):
    skins = [
        {"label": f"hand: tone {tone}", "hexcode": f"1F44B-1F3F{tone}", "emoji": "x", "tone": tone}
        for tone in (1, 2, [1, 2])
    ]
    entry = {"label": "hand", "hexcode": "1F44B", "emoji": "x", "tags": ["wave"], "group": 1, "subgroup": 16}
    catalogue = [
        entry | {"skins": skins},
        entry | {"label": "France", "hexcode": "1F1EB-1F1F7", "group": 9, "subgroup": 98},
        entry | {"label": "red hair", "hexcode": "1F9B0", "group": 2, "subgroup": 33},
        {"label": "regional indicator A", "hexcode": "1F1E6", "emoji": "x"},
    ]
    groups = {
        "groups": {"1": "people-body", "2": "component", "9": "flags"},
        "subgroups": {"16": "hand-fingers-open", "33": "hair-style", "98": "country-flag"},
    }
    for name, content in (("en/data.json", catalogue), ("meta/groups.json", groups)):
        path = tmp_path / "emojibase-data" / name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    found = build.read_concepts(tmp_path)
    assert [(concept.caption, concept.base, concept.skin_tone) for concept in found] == [
        ("hand", "1F44B", 0),
        ("hand: tone 1", "1F44B", 1),
    ]
