import re

import numpy as np
import pytest
import torch
from evaluation.toys import noise, small_clip

from hf_mm.data.emoji import load_emoji
from hf_mm.evaluation import style_shift
from hf_mm.evaluation.embeddings import embed_images, embed_texts
from hf_mm.evaluation.hard_negatives import PARTS, SETS
from hf_mm.evaluation.pixels import embed_pixels
from hf_mm.evaluation.style_shift import evaluate_emoji
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.plots import clip_report as clip_report_module
from hf_mm.plots.clip_report import CELLS, VALIDATION, attention_maps, clip_report
from hf_mm.plots.figures import plot_mistakes, plot_neighbours, plot_retrieval

LOG = [{"step": 600, "loss": 3.0, "temperature": 0.07}, {"step": 620, "loss": 2.0, "temperature": 0.06}]


def curve(*accuracies: float) -> list[dict]:
    return [{"shots": 2**i, "accuracy": value, "accuracies": [value] * 3} for i, value in enumerate(accuracies)]


PROBE = {
    "images": 495,
    "classes": 96,
    "accuracy": 41.0,
    "pixels_accuracy": 21.0,
    "chance": 1.25,
    "majority": 5.5,
    "zero_shot": 23.0,
    "zero_shot_name": 9.0,
    "shots_to_match": 3.25,
    "shots_to_match_name": 1.0,
    "few_shot": curve(11.0, 17.0, 26.0, 33.0),
    "pixels_few_shot": curve(7.0, 9.5, 12.0, 14.0),
}
SHIFT = {
    "images": 100,
    "images_shift": 400,
    "slope": 1.0,
    "intercept": 0.0,
    "expected": 20.0,
    "scatter": 3.0,
    "reference": [{"name": str(value), "in": value, "shift": value} for value in (10.0, 20.0, 30.0)],
    "model": {"in": 20.0, "shift": 50.0},
    "effective_robustness": 30.0,
    "extrapolated": False,
}
STUDIES = {
    "probes": {
        "subgroup": {
            **dict.fromkeys(CELLS, PROBE),
            "both": PROBE | {"zero_shot": 50.0, "shots_to_match": None, "zero_shot_name": 12.0},
        }
    },
    "robustness": {
        "known_concepts": SHIFT,
        "new_concepts": SHIFT
        | {"model": {"in": 40.0, "shift": 35.0}, "expected": 40.0, "effective_robustness": -5.0, "extrapolated": True},
    },
    "hard_negatives": {
        name: {
            "captions": 20 + index,
            **{
                part: {"images": 7, "accuracy": 10.0 + index, "chance": 5.0, "pixels_accuracy": 30.0 + index}
                for part in PARTS
            },
            "both": {"images": 0, "accuracy": None, "chance": None, "pixels_accuracy": None},
        }
        for index, name in enumerate(SETS)
    },
}


@pytest.fixture(scope="module")
def few_emoji():
    """Subgroups with pictures in every split by every artist."""
    whole = load_emoji("all")
    subgroups = {"plant-other", "person-gesture", "event", "food-prepared", "animal-mammal"}
    return whole.select([row for row, subgroup in enumerate(whole["subgroup"]) if subgroup in subgroups])


@pytest.fixture(scope="module")
def reported(few_emoji, tmp_path_factory):
    """A small CLIP, what was measured of it, the page about it, and what its pictures of pictures were drawn from."""
    model, processor = small_clip()
    drawn = {plot.__name__: [] for plot in (plot_retrieval, plot_neighbours, plot_mistakes)}

    def record(plot):
        return lambda *given: drawn[plot.__name__].append(given) or plot(*given)

    with pytest.MonkeyPatch.context() as patch:
        for module in (style_shift, clip_report_module):
            patch.setattr(module, "load_emoji", lambda *args, **kwargs: few_emoji)
        for plot in (plot_retrieval, plot_neighbours, plot_mistakes):
            patch.setattr(clip_report_module, plot.__name__, record(plot))
        metrics = {form: evaluate_emoji(model, processor, progress=False) for form in ("size_normalized", "original")}
        path = tmp_path_factory.mktemp("report") / "report.html"
        assert clip_report(model, processor, metrics, LOG, STUDIES, path, progress=False) == path
    return (model, processor), metrics, path.read_text(encoding="utf-8"), drawn


@pytest.fixture(scope="module")
def unseen(few_emoji):
    return few_emoji.select([row for row, split in enumerate(few_emoji["split"]) if split in CELLS])


def table_row(page: str, name: str, table: int = 0) -> list[float | None]:
    """The large numbers (None for a dash) of the row with this name in the n-th table that has one."""
    row = re.findall(rf'<tr><th scope="row">{re.escape(name)}<.*?</tr>', page)[table]
    return [None if cell == "–" else float(cell) for cell in re.findall(r'<td class="number">([^<]*)', row)]


def test_the_page_prints_what_was_measured(reported):
    _, metrics, page, _ = reported
    normalized = metrics["size_normalized"]
    naming = ("i2t_r1", "i2t_r5", "i2t_r10", "chance_r1", "chance_r10", "pixels_r1", "pixels_r10")
    finding = ("t2i_r1", "t2i_r10", "chance_t2i_r1", "chance_t2i_r10")
    kinds = ("accuracy", "top5", "balanced_accuracy", "name_accuracy", "chance", "majority", "pixels_accuracy")
    for split, description in (CELLS | VALIDATION).items():
        by_table = [(normalized[split], naming), (normalized[split], finding)]
        if split in CELLS:
            by_table += [(normalized["subgroup"][split], kinds), (normalized["group"][split], kinds)]
        for table, (row, keys) in enumerate(by_table):
            printed = table_row(page, description.capitalize(), table)
            assert printed == pytest.approx([row[key] for key in keys], abs=0.051)
    assert table_row(page, "Training pictures") == pytest.approx([normalized["fit"][key] for key in naming], abs=0.051)
    assert page.index("Memory, not a result") < page.index("Training pictures")
    openmoji = normalized["styles"]["openmoji"]
    known = [openmoji["seen"][key] for key in ("i2t_r1", "i2t_r10", "chance_r10", "pixels_r10")]
    new = [openmoji["new"][key] for key in ("i2t_r1", "i2t_r10", "chance_r10")]
    assert table_row(page, "OpenMoji, new", table=1) == pytest.approx(known + new, abs=0.051)
    assert "for 620 steps" in page


def test_the_page_shows_all_it_should_and_names_the_artists(reported):
    page = reported[2]
    alts = re.findall(r'alt="([^"]*)"', page)
    assert len(alts) == 2 + 4 + 6 + 2 + 2 + 2 + 2 + 2 + 2 + 2 and all(alts)
    for owner in ("Google", "Twitter", "Microsoft", "OpenMoji (https://openmoji.org/)", "CC BY-SA 4.0", "CC BY 4.0"):
        assert owner in page


def test_the_page_prints_the_studies(reported):
    page = reported[2]
    few_shot = {
        cell: re.findall(rf'<th scope="row">{words.capitalize()}<small>.*?</tr>', page)[4]
        for cell, words in CELLS.items()
    }
    numbers = [re.findall(r'"number">([^<]*)<small>([^<]*)', few_shot[cell]) for cell in ("concept", "both")]
    ours = [("11.0", "7.0"), ("17.0", "9.5"), ("26.0", "12.0"), ("33.0", "14.0"), ("41.0", "21.0"), ("1.2", "5.5")]
    assert numbers[0] == [("23.0", "9.0"), *ours, ("3.2", "≤ 1")]
    assert numbers[1] == [("50.0", "12.0"), *ours, ("&gt; 8", "≤ 1")]
    assert "The names are worth about 3.2 emoji per class." in page and "Even 8 emoji per class do not equal" in page
    for index, name in enumerate(SETS):
        printed = table_row(page, clip_report_module.CONFUSABLE[name][0])
        assert printed == [10.0 + index] * 2 + [None]
        assert page.count(f"chance 5.0</small><small>pixels {30 + index}.0</small><small>7 pictures") == 2


def test_effective_robustness_is_told_with_its_noise(reported):
    """Standard errors by hand: after the shift 2.5 points; before it 4, times a steepness of 1 and of 1."""
    known, new = re.findall(r"<p>(On (?:known|new) emoji.*?)</p>", reported[2])
    assert "foretells 20.0 % and the model reaches 50.0 %: 30.0 points more" in known
    assert "scatter by 3.0 points" in known and "standard error of 4.7 points" in known  # sqrt(2.5^2 + 4^2)
    assert known.endswith("Twice both together is 11.2: the distance is larger.")  # 2 sqrt(3^2 + 2.5^2 + 4^2)
    assert "foretells 40.0 % and the model reaches 35.0 %: 5.0 points less" in new
    assert "smaller, so it may be chance" in new and "the line is a guess there" in new


def test_the_worst_mistakes_are_the_worst(reported, few_emoji, unseen):
    (model, processor), _, _, drawn = reported
    names = sorted(set(few_emoji["caption"]))
    images, texts = (
        embed_images(model, processor, unseen["image"], progress=False),
        embed_texts(model, processor, names, progress=False),
    )
    cosines = (images @ texts.T).numpy()
    scores = np.exp(cosines * np.exp(model.logit_scale.item()))
    scores /= scores.sum(axis=1, keepdims=True)
    looks = [image.tobytes() for image in unseen["image"]]
    right = {}
    for look, style, name in zip(looks, unseen["style"], unseen["caption"], strict=True):
        right.setdefault((style, look), set()).add(names.index(name))
    right = [sorted(right[style, look]) for style, look in zip(unseen["style"], looks, strict=True)]
    best = cosines.argmax(axis=1)
    ranks = np.array([(cosines[row] >= cosines[row, own].max()).sum() for row, own in enumerate(right)])
    wrong = np.array([name not in own for name, own in zip(best, right, strict=True)])
    split = np.array(unseen["split"][:])
    drawings = {}
    for image, name in zip(few_emoji["image"], few_emoji["caption"], strict=True):
        drawings.setdefault(name, set()).add(image.tobytes())

    groups = [((cell,), scores.max(axis=1)) for cell in CELLS]
    groups += [(("cell", "style"), ranks), (("concept", "both"), ranks)]
    for (splits, worth), (shown, answers, sureness, others, truths, places) in zip(
        groups, drawn["plot_mistakes"], strict=True
    ):
        candidates = np.flatnonzero(wrong & np.isin(split, splits))
        worst = np.sort(worth[candidates])[::-1][:4]
        rows = [
            next(row for row in candidates if looks[row] == image.tobytes() and unseen["caption"][int(row)] == truth)
            for image, truth in zip(shown, truths, strict=True)
        ]
        np.testing.assert_allclose(worth[rows], worst, rtol=1e-4)
        assert answers == [names[best[row]] for row in rows] and places == ranks[rows].tolist()
        np.testing.assert_allclose(sureness, scores.max(axis=1)[rows], rtol=1e-4)
        assert all(other.tobytes() in drawings[name] for other, name in zip(others, answers, strict=True))


def test_neighbours_are_the_nearest_of_the_new_emoji(reported, unseen):
    (model, processor), _, page, drawn = reported
    new = unseen.filter(lambda split: split in ("concept", "both"), input_columns="split")
    style, caption = np.array(new["style"][:]), np.array(new["caption"][:])
    looks = [image.tobytes() for image in new["image"]]
    ours, pixels = embed_images(model, processor, new["image"], progress=False), embed_pixels(new["image"])

    def nearest(embeddings, row, artist):
        rows = np.flatnonzero(style == artist)
        return rows[(embeddings[rows] @ embeddings[row]).argmax()]

    artists = {"Noto": "noto", "Twemoji": "twemoji", "Fluent": "fluent", "OpenMoji": "openmoji"}
    assert [figure[0][0] for figure in drawn["plot_neighbours"]][1] == "OpenMoji"
    for header, names, drawings, results, hits in drawn["plot_neighbours"]:
        assert sorted(header) == sorted(artists) and len(names) == 5
        for name, drawing, found, right in zip(names, drawings, results, hits, strict=True):
            (row,) = [
                row
                for row in np.flatnonzero((style == artists[header[0]]) & (caption == name))
                if looks[row] == drawing.tobytes()
            ]
            rows = [nearest(ours, row, artists[artist]) for artist in header[1:]]
            assert [looks[row] for row in rows] == [picture.tobytes() for picture in found]
            assert right == [caption[row] == name for row in rows]
    for name, artist in artists.items():
        row = re.findall(rf'<tr><th scope="row">{name}(?:, new)?</th>.*?</tr>', page)[0]
        printed = [tuple(map(float, cell)) for cell in re.findall(r'"number">([^<]*)<small>([^<]*)', row)]
        expected = [
            tuple(
                100
                * np.mean(
                    [caption[nearest(space, row, other)] == caption[row] for row in np.flatnonzero(style == artist)]
                )
                for space in (ours, pixels)
            )
            for other in artists.values()
            if other != artist
        ]
        np.testing.assert_allclose(printed, expected, atol=0.051)


def test_searches_find_pictures_that_training_never_saw(reported, few_emoji, unseen):
    searches = reported[3]["plot_retrieval"]
    trained = {
        image.tobytes()
        for image, split in zip(few_emoji["image"], few_emoji["split"], strict=True)
        if split == "train"
    }
    names_of = {}
    for image, name in zip(unseen["image"], unseen["caption"], strict=True):
        names_of.setdefault(image.tobytes(), set()).add(name)
    for queries, results, hits in searches:
        assert len(queries) == len(set(queries)) == 6
        for query, pictures, right in zip(queries, results, hits, strict=True):
            found = [picture.tobytes() for picture in pictures]
            assert len(found) == 6 and trained.isdisjoint(found)
            assert right == [query in names_of[look] for look in found]
    known = set(few_emoji.filter(lambda split: split == "train", input_columns="split")["caption"])
    assert set(searches[0][0]) <= known and known.isdisjoint(searches[1][0])


@pytest.mark.parametrize("tower", ["mm_clip_vision", "mm_vit"])
def test_attention_maps_follow_the_tower_and_leave_it_as_it_was(tower):
    model, processor = small_clip()
    pooling = {"pooling": "mean"} if tower == "mm_vit" else {}
    vision = {"model_type": tower, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, **pooling}
    config = MMClipConfig(
        projection_dim=8,
        vision_config={**vision, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8},
        text_config=model.config.text_config.to_dict(),
    )
    model = MMClipModel(config).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    kernel = model.vision_model.config._attn_implementation
    maps = attention_maps(model, processor, noise(3))
    assert model.training and model.vision_model.config._attn_implementation == kernel == "sdpa"

    model.eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        last = model.vision_model(processor(images=noise(3))["pixel_values"], output_attentions=True).attentions[-1]
    expected = last[:, :, 0, 1:].mean(1) if tower == "mm_clip_vision" else last.mean((1, 2))
    torch.testing.assert_close(maps.flatten(1), expected / expected.sum(-1, keepdim=True))
    assert maps.shape == (3, 2, 2)


def test_metrics_of_one_form_and_half_the_studies_are_refused(tmp_path):
    with pytest.raises(ValueError, match="metrics has no 'original'"):
        clip_report(*small_clip(), {"size_normalized": {"cell": {}}}, LOG, STUDIES, tmp_path / "report.html")
    metrics = {form: {"cell": {}} for form in ("size_normalized", "original")}
    with pytest.raises(ValueError, match="studies has no 'hard_negatives'"):
        clip_report(*small_clip(), metrics, LOG, {"probes": {"cell": {}}}, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
