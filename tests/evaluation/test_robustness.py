import json
import math

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from scipy.stats import linregress
from toys import TableModel, TableProcessor

from hf_mm.data.emoji import load_emoji
from hf_mm.evaluation import emoji_robustness, style_shift
from hf_mm.evaluation.emoji_robustness import SHIFTS, evaluate_emoji_robustness
from hf_mm.evaluation.robustness import clip_accuracy, effective_robustness

IN = [12.0, 25.0, 33.0, 60.0, 80.0]


def on_line(accuracy, slope=0.8, intercept=-0.5):
    odds = math.exp(intercept) * (accuracy / (100 - accuracy)) ** slope
    return 100 * odds / (1 + odds)


# ------------------------------------------------------------------------------------------------------------- the line


def test_models_on_a_line_and_one_above_it_by_a_known_amount():
    shift = [on_line(accuracy) for accuracy in IN]
    result = effective_robustness(IN, shift, 50.0, on_line(50.0))
    assert (result["slope"], result["intercept"]) == pytest.approx((0.8, -0.5))
    assert result["expected"] == pytest.approx(100 / (1 + math.exp(0.5)))
    assert result["effective_robustness"] == pytest.approx(0, abs=1e-9)
    assert result["scatter"] == pytest.approx(0, abs=1e-9)
    above = effective_robustness(IN, shift, 50.0, on_line(50.0) + 7)
    assert above["effective_robustness"] == pytest.approx(7)
    assert effective_robustness(IN, shift, 50.0, on_line(50.0) - 7)["effective_robustness"] == pytest.approx(-7)


def test_scattered_models_agree_with_scipy():
    shift = np.array([on_line(accuracy) for accuracy in IN]) + [2, -3, 1, 4, -2]
    result = effective_robustness(IN, shift, 40.0, 41.0)
    line = linregress(logit(np.array(IN) / 100), logit(shift / 100))
    fitted = 100 * expit(line.intercept + line.slope * logit(np.array(IN) / 100))
    assert (result["slope"], result["intercept"]) == pytest.approx((line.slope, line.intercept))
    assert result["scatter"] == pytest.approx(math.sqrt(sum((shift - fitted) ** 2) / 3))
    assert result["effective_robustness"] == pytest.approx(41 - 100 * expit(line.intercept + line.slope * logit(0.4)))


def test_without_a_shift_nothing_is_gained():
    result = effective_robustness(IN, IN, 42.0, 45.0)
    assert (result["slope"], result["intercept"], result["expected"]) == pytest.approx((1, 0, 42))


@pytest.mark.parametrize(("accuracy", "extrapolated"), [(11.9, True), (12.0, False), (80.0, False), (80.1, True)])
def test_a_model_beyond_the_standard_models_is_marked(accuracy, extrapolated):
    assert effective_robustness(IN, IN, accuracy, 10.0)["extrapolated"] is extrapolated


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([10, 20], [5, 10], 15, 8), "there are 2 standard models"),
        (([10, 20, 30], [5, 10], 15, 8), r"shapes \(3,\) and \(2,\)"),
        (([[10, 20, 30]], [[5, 10, 15]], 15, 8), r"shapes \(1, 3\)"),
        (([10, 20, 30], [0, 10, 15], 15, 8), "accuracy 0.0 has no logit"),
        (([10, 20, 100], [5, 10, 15], 15, 8), "accuracy 100.0 has no logit"),
        (([10, 20, 30], [5, 10, 15], 15, 0), "accuracy 0.0 has no logit"),
        (([10, 20, float("nan")], [5, 10, 15], 15, 8), "accuracy nan has no logit"),
        (([20, 20, 20], [5, 10, 15], 15, 8), "all standard models have accuracy 20.0"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        effective_robustness(*arguments)


def test_clipping_leaves_half_a_picture():
    assert clip_accuracy(0, 200) == 0.25
    assert clip_accuracy(100, 200) == 99.75
    assert clip_accuracy(0.5, 200) == 0.5  # one picture


# ------------------------------------------------------------------------------------------------------------ the emoji


@pytest.fixture
def few_emoji(monkeypatch):
    """Six subgroups, which have pictures in every split."""
    whole = load_emoji("all")
    subgroups = ["plant-other", "person-gesture", "event", "animal-mammal", "clothing", "geometric"]
    few = whole.select(np.flatnonzero(np.isin(whole["subgroup"][:], subgroups)))
    for module in (emoji_robustness, style_shift):
        monkeypatch.setattr(module, "load_emoji", lambda *args, **kwargs: few)
    return few


def model_of_subgroups(emoji, wrong=()):
    """Knows the subgroup of every caption, and of all pictures but those in the splits `wrong`."""
    subgroups = sorted(set(emoji["subgroup"]))
    texts, pictures = {}, {}
    for row in emoji:
        own = subgroups.index(row["subgroup"])
        texts[row["caption"]] = own
        pictures[row["image"].tobytes()] = (own + 1) % len(subgroups) if row["split"] in wrong else own
    table = torch.eye(len(subgroups) + 1)  # bare names of subgroups are unknown
    processor = TableProcessor(lambda image: pictures[image.tobytes()], lambda text: texts.get(text, len(subgroups)))
    return TableModel(table, table), processor


def test_a_model_that_bears_the_shift_and_one_that_does_not(few_emoji):
    robust = evaluate_emoji_robustness(*model_of_subgroups(few_emoji), progress=False)
    fragile = evaluate_emoji_robustness(*model_of_subgroups(few_emoji, ("style", "both")), progress=False)
    sizes = {name: list(few_emoji["split"]).count(name) for pair in SHIFTS.values() for name in pair}
    for name, (before, after) in SHIFTS.items():
        assert (robust[name]["images"], robust[name]["images_shift"]) == (sizes[before], sizes[after])
        assert robust[name]["model"] == pytest.approx(
            {"in": 100 - 50 / sizes[before], "shift": 100 - 50 / sizes[after]}
        )
        assert fragile[name]["model"]["shift"] == pytest.approx(50 / sizes[after])
        assert robust[name]["effective_robustness"] > 0 > fragile[name]["effective_robustness"]
        assert robust[name]["expected"] == fragile[name]["expected"]
        assert robust[name]["extrapolated"] is True


def test_the_points_agree_with_the_benchmark(few_emoji):
    model, processor = model_of_subgroups(few_emoji, ("cell",))
    numbers = model.image_table
    numbers[1] = torch.tensor([0, 1, 1.5, 0, 0, 0, 0])  # taken for its neighbour
    robustness = evaluate_emoji_robustness(model, processor, progress=False)
    benchmark = style_shift.evaluate_emoji(model, processor, progress=False)["subgroup"]
    for name, (before, after) in SHIFTS.items():
        points = {point["name"]: point for point in robustness[name]["reference"]}
        assert len(points) == 36
        pixels = points["nearest neighbor, 16x16 pixels, 100% of the concepts"]
        for side, split in (("in", before), ("shift", after)):
            images = benchmark[split]["images"]
            assert robustness[name]["model"][side] == clip_accuracy(benchmark[split]["accuracy"], images)
            assert pixels[side] == pytest.approx(benchmark[split]["pixels_accuracy"])
    assert 50 < robustness["new_concepts"]["model"]["shift"] < 99


def test_the_line_is_that_of_the_points_it_shows_and_the_result_is_json(few_emoji):
    result = evaluate_emoji_robustness(*model_of_subgroups(few_emoji), progress=False)
    for name in SHIFTS:
        before, after = ([point[side] for point in result[name]["reference"]] for side in ("in", "shift"))
        model = result[name]["model"]
        expected = effective_robustness(before, after, model["in"], model["shift"])
        assert {key: result[name][key] for key in expected} == expected
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["seed"], result["normalize_size"]) == (0, True)


def test_the_seed_draws_the_concepts(monkeypatch, few_emoji):
    monkeypatch.setattr(emoji_robustness, "SIDES", (4,))
    model = model_of_subgroups(few_emoji)
    first, again, other = (evaluate_emoji_robustness(*model, progress=False, seed=seed) for seed in (1, 1, 2))
    assert first == again
    for one, two in zip(first["new_concepts"]["reference"], other["new_concepts"]["reference"], strict=True):
        assert one["name"] == two["name"]
        assert "100%" not in one["name"] or one == two
    assert first["new_concepts"]["reference"] != other["new_concepts"]["reference"]
