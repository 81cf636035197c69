import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import TableModel, TableProcessor, small_clip

from hf_mm.data.emoji import load_emoji
from hf_mm.evaluation import emoji_probes, style_shift
from hf_mm.evaluation.emoji_probes import DRAWS, MAX_ITER, SHOTS, TESTED, evaluate_emoji_probes
from hf_mm.evaluation.pixels import embed_pixels
from hf_mm.evaluation.probes import few_shot_probe, linear_probe, shots_to_match, tower_features
from hf_mm.evaluation.style_shift import evaluate_emoji


@pytest.fixture(scope="module")
def few_emoji():
    """Three subgroups, which have pictures in every split by every artist."""
    whole = load_emoji("all")
    subgroups = {"plant-other", "person-gesture", "event"}
    few = whole.select([row for row, subgroup in enumerate(whole["subgroup"]) if subgroup in subgroups])
    with pytest.MonkeyPatch.context() as patch:
        for module in (emoji_probes, style_shift):
            patch.setattr(module, "load_emoji", lambda *args, **kwargs: few)
        yield few


@pytest.fixture(scope="module")
def results(few_emoji):
    return evaluate_emoji_probes(*small_clip(), batch_size=64, progress=False)


def pairs(emoji, inputs, column, split):
    rows = np.flatnonzero(np.array(emoji["split"]) == split)
    return inputs[rows], np.array(emoji[column])[rows]


class TableTower(TableModel):
    """A tower whose features are a table; the joint space is the same."""

    def __init__(self, table, texts):
        super().__init__(table, texts)
        self.vision_model = lambda pixel_values: SimpleNamespace(pooler_output=self.image_table[pixel_values.long()])
        self.visual_projection = torch.nn.Identity()


def table_tower(emoji, table):
    """Row i of the table for picture i; every text is the first direction."""
    looks = {image.tobytes(): row for row, image in enumerate(emoji["image"])}
    texts = torch.eye(1, table.shape[1])
    return TableTower(table, texts), TableProcessor(lambda image: looks[image.tobytes()], lambda text: 0)


def test_probes_agree_with_those_on_any_data(few_emoji, results):
    features = tower_features(*small_clip(), few_emoji["image"], progress=False)
    small = embed_pixels(few_emoji["image"]).view(-1, 8, 2, 8, 2, 3).sum(dim=(2, 4)).flatten(1)
    small = small / small.norm(dim=1, keepdim=True) * 192**0.5
    captions = pairs(few_emoji, features, "caption", "train")[1]
    for inputs, prefix, name in ((features, "", "features"), (small, "pixels_", "pixels")):
        for column, split in (("subgroup", "concept"), ("group", "both")):
            train, val, test = (pairs(few_emoji, inputs, column, one) for one in ("train", "val", split))
            probe = linear_probe(*train, *test, *val, max_iter=MAX_ITER)
            few = few_shot_probe(*train, *test, SHOTS, DRAWS, 0, captions, *val, max_iter=MAX_ITER)
            row, fits = results[column][split], results[column]["fits"][name]
            assert [row[f"{prefix}accuracy"], row[f"{prefix}balanced_accuracy"]] == [
                pytest.approx(probe["accuracy"], abs=0.01),
                pytest.approx(probe["balanced_accuracy"], abs=0.01),
            ]
            assert [row["majority"], row["chance"]] == [probe["majority"], probe["chance"]]
            assert row[f"{prefix}few_shot"] == few["curve"]
            assert fits == {
                **{key: probe[key] for key in ("strength", "converged", "search_fits", "search_unconverged")},
                **{f"few_shot_{key}": few[key] for key in ("strength", "search_fits", "search_unconverged")},
            }


def test_zero_shot_agrees_with_the_emoji_benchmark(few_emoji, results):
    benchmark = evaluate_emoji(*small_clip(), batch_size=64, progress=False)
    for column in ("subgroup", "group"):
        for split in TESTED:
            row, other = results[column][split], benchmark[column][split]
            assert [row["zero_shot"], row["zero_shot_name"]] == [other["accuracy"], other["name_accuracy"]]
            assert {key: row[key] for key in ("images", "classes", "chance", "majority")} == {
                key: other[key] for key in ("images", "classes", "chance", "majority")
            }
            curve = {point["shots"]: point["accuracy"] for point in row["few_shot"]}
            assert row["shots_to_match"] == shots_to_match(curve, other["accuracy"])
            assert row["shots_to_match_name"] == shots_to_match(curve, other["name_accuracy"])


def test_a_tower_that_tells_classes_apart(few_emoji):
    names = sorted(set(few_emoji["subgroup"]))
    table = torch.eye(3)[[names.index(name) for name in few_emoji["subgroup"]]]
    results = evaluate_emoji_probes(*table_tower(few_emoji, table), progress=False)
    for split in TESTED:
        row = results["subgroup"][split]
        assert row["accuracy"] == row["balanced_accuracy"] == 100
        assert [point["accuracies"] for point in row["few_shot"]] == [[100] * DRAWS] * len(SHOTS)
        assert row["zero_shot"] == 0 and row["shots_to_match"] == 1  # all texts are one: ties count as wrong
        assert row["pixels_accuracy"] < 100
    assert results["subgroup"]["fits"]["features"]["converged"] is True


def test_no_fit_sees_a_test_picture(few_emoji):
    tested = torch.from_numpy(np.isin(few_emoji["split"], TESTED))
    names = sorted(set(few_emoji["subgroup"]))
    table = torch.eye(3)[[names.index(name) for name in few_emoji["subgroup"]]]
    table += 0.1 * torch.randn(table.shape)
    other = torch.where(tested[:, None], -table, table)
    first, second = (evaluate_emoji_probes(*table_tower(few_emoji, one), progress=False) for one in (table, other))
    for column in ("subgroup", "group"):
        assert first[column]["fits"] == second[column]["fits"]
        for split in TESTED:
            assert first[column][split]["accuracy"] > 90 and second[column][split]["accuracy"] < 10


def test_few_shot_rows_hold_concepts_by_three_artists(few_emoji, results):
    rows = np.flatnonzero(np.array(few_emoji["split"]) == "train")
    captions = np.array(few_emoji["caption"])[rows]
    subgroups = np.array(few_emoji["subgroup"])[rows]
    sizes = [len(set(captions[subgroups == name])) for name in set(subgroups)]
    for point in results["subgroup"]["style"]["few_shot"]:
        concepts = sum(min(size, point["shots"]) for size in sizes)
        assert concepts < point["examples"] <= 3 * concepts
        assert point["short_classes"] == sum(size < point["shots"] for size in sizes)


def test_the_result_is_json_and_the_seed_moves_few_shots_alone(few_emoji, results):
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    other = evaluate_emoji_probes(*small_clip(), batch_size=64, progress=False, seed=1)
    for split in TESTED:
        row, moved = results["group"][split], other["group"][split]
        assert row["accuracy"] == moved["accuracy"] and row["zero_shot"] == moved["zero_shot"]
    assert results["group"]["style"]["few_shot"] != other["group"]["style"]["few_shot"]
    assert (results["seed"], other["seed"], results["normalize_size"]) == (0, 1, True)
