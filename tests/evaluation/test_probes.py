import json
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from toys import noise, small_clip

from hf_mm.evaluation import emoji_probes, probes
from hf_mm.evaluation.probes import (
    STRENGTHS,
    choose_strength,
    draw_shots,
    few_shot_probe,
    fit_few_shot,
    fit_probe,
    linear_probe,
    search_strength,
    shots_to_match,
    tower_features,
)


def blobs(seed: int, count: int, classes: int = 7, spread: float = 0.6, dimensions: int = 5):
    """Overlapping classes of unequal size around fixed centres, away from the origin."""
    centres = 3 + np.random.default_rng(99).normal(size=(classes, dimensions))
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), (classes * rng.random(count - classes) ** 2).astype(int)])
    return centres[labels] + spread * rng.normal(size=(count, dimensions)), labels


def gradient(probe, features, labels, strength):
    """Largest entry of the gradient per example of Σ cross-entropy + strength/2 · Σ weights², by autograd.

    In the coordinates of centred features, in which scikit-learn stops at 1e-4.
    """
    two, mean = len(probe.classes) == 2, features.mean(axis=0)
    weight, bias = torch.from_numpy(probe.weight), torch.from_numpy(probe.bias + probe.weight @ mean)
    if two:  # one vector of weights, half of it for and half against
        weight, bias = weight[1:] - weight[:1], bias[1:] - bias[:1]
    weight.requires_grad_(), bias.requires_grad_()
    scores = torch.from_numpy(features - mean) @ weight.T + bias
    scores = torch.cat([torch.zeros_like(scores), scores], dim=1) if two else scores
    loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels), reduction="sum")
    (loss + strength / 2 * weight.square().sum()).backward()
    return max(weight.grad.abs().max(), bias.grad.abs().max()).item() / len(labels)


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("strength", [0.3, 20.0])
def test_the_gradient_vanishes_for_the_documented_strength_alone(classes, strength):
    features, labels = blobs(0, 80, classes)
    probe = fit_probe(features, labels, strength)
    assert probe.converged and probe.strength == strength
    assert gradient(probe, features, labels, strength) < 1e-4
    assert gradient(probe, features, labels, 1 / strength) > 1e-2
    assert gradient(probe, features, labels, 2 * strength) > 1e-3


def test_the_bias_is_free():
    """However strong the penalty, the classes keep their frequencies; where the features lie does not matter."""
    features, labels = blobs(0, 80, 3)
    probe = fit_probe(features, labels, 1e6)
    shares = torch.from_numpy(probe.scores(features)).softmax(dim=1).mean(dim=0)
    np.testing.assert_allclose(shares, np.bincount(labels) / 80, atol=1e-3)  # the solver stops at a gradient of 1e-4
    near, far = (fit_probe(features + shift, labels, 1.0) for shift in (0, 100))
    np.testing.assert_allclose(near.weight, far.weight, atol=1e-6)
    np.testing.assert_allclose(near.scores(features), far.scores(features + 100), atol=1e-6)


def test_strengths_are_an_eighth_of_a_decade_apart():
    assert len(STRENGTHS) == 97
    np.testing.assert_allclose(STRENGTHS[[0, 16, 48, 96]], [1e-6, 1e-4, 1, 1e6], rtol=1e-12)
    np.testing.assert_allclose(STRENGTHS[1:] / STRENGTHS[:-1], 10**0.125)
    assert np.isclose(1 / STRENGTHS, 0.316, rtol=1e-3).sum() == 1  # C of the published CIFAR100 example


@pytest.mark.parametrize("peak", range(97))
def test_the_search_finds_every_peak_in_15_tries_on_the_grid(peak):
    tried = []

    def score(strength):
        tried.append(strength)
        distance = np.log10(strength / STRENGTHS[peak])
        return -distance if distance > 0 else 3 * distance

    assert search_strength(score) == STRENGTHS[peak]
    np.testing.assert_allclose(tried[:7], 10.0 ** np.arange(-6, 7, 2))
    assert len(tried) == len(set(tried)) <= 15
    assert set(tried) <= set(STRENGTHS.tolist())


def test_of_equal_scores_the_middle_wins():
    assert search_strength(lambda strength: 1.0) == 1
    low, high = STRENGTHS[[20, 70]]  # of the seven first strengths those of index 32, 48 and 64 are between
    assert search_strength(lambda strength: float(low <= strength <= high)) == STRENGTHS[48]


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="strength 1e-06 is nan"):
        search_strength(lambda strength: float("nan"))


def noisy(seed, count=120):
    """One dimension of signal among 60: too weak and too strong penalties both cost."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    features = rng.normal(size=(count, 60))
    features[:, 0] += 2.0 * labels
    return features, labels


def test_an_exhaustive_search_agrees():
    train, val = noisy(0), noisy(1, 400)
    losses, accuracy = {}, {}
    for strength in map(float, STRENGTHS):
        scores = fit_probe(*train, strength).scores(val[0])
        losses[strength] = torch.nn.functional.cross_entropy(torch.from_numpy(scores), torch.from_numpy(val[1])).item()
        accuracy[strength] = accuracy_score(val[1], scores.argmax(axis=1))
    best = min(losses, key=losses.get)
    assert STRENGTHS[0] < best < STRENGTHS[-1]
    assert search_strength(lambda strength: -losses[strength]) == best
    strength, counts = choose_strength(*train, *val)
    assert accuracy[strength] == max(accuracy.values()) > accuracy[1e-6] + 0.05
    assert search_strength(accuracy.__getitem__) == strength
    assert counts["search_fits"] == 15 and 0 <= counts["search_unconverged"] < 15


def test_the_last_fit_sees_train_and_validation_examples():
    train, val, test = blobs(0, 60), blobs(1, 60), blobs(2, 300)
    result = linear_probe(*train, *test, *val)
    strength, counts = choose_strength(*train, *val)
    both = fit_probe(np.concatenate([train[0], val[0]]), np.concatenate([train[1], val[1]]), strength)
    expected = {**both.evaluate(*test), "train_examples": 120, "strength": strength, "converged": True, **counts}
    assert result == expected
    assert result["accuracy"] != linear_probe(*train, *test, strength=strength)["accuracy"]
    assert json.loads(json.dumps(result)) == result


def test_metrics_agree_with_scikit_learn():
    train, test = blobs(0, 60), blobs(1, 300)
    result = linear_probe(*train, *test, strength=1.0)
    scores = fit_probe(*train, 1.0).scores(test[0])
    assert result["accuracy"] == pytest.approx(100 * accuracy_score(test[1], scores.argmax(axis=1)))
    assert result["balanced_accuracy"] == pytest.approx(100 * balanced_accuracy_score(test[1], scores.argmax(axis=1)))
    assert result["top5"] == pytest.approx(100 * top_k_accuracy_score(test[1], scores, k=5))
    assert result["majority"] == pytest.approx(100 * np.bincount(test[1]).max() / 300)
    assert result["chance"] == pytest.approx(100 / 7)
    assert (result["examples"], result["classes"], result["train_examples"]) == (300, 7, 60)


def test_a_class_without_test_examples_does_not_count():
    train, (features, labels) = blobs(0, 60), blobs(1, 300)
    present = labels != 3
    features, labels = features[present], labels[present]
    predictions = fit_probe(*train, 1.0).scores(features).argmax(axis=1)
    recalls = [np.mean(predictions[labels == label] == label) for label in (0, 1, 2, 4, 5, 6)]
    metrics = linear_probe(*train, features, labels, strength=1.0)
    assert metrics["balanced_accuracy"] == pytest.approx(100 * np.mean(recalls))
    assert metrics["chance"] == pytest.approx(100 / 7)


def test_separable_classes_are_all_right():
    train, val, test = (blobs(seed, 70, spread=0.01) for seed in range(3))
    result = linear_probe(*train, *test, *val)
    assert result["accuracy"] == result["balanced_accuracy"] == result["top5"] == 100


def test_names_of_classes_and_kinds_of_arrays_do_not_matter():
    train, val, test = blobs(0, 60), blobs(1, 60), blobs(2, 300)
    names = np.array(["w", "c", "x", "a", "z", "b", "m"])
    expected = linear_probe(*train, *test, *val)
    renamed = linear_probe(train[0], names[train[1]], test[0], names[test[1]], val[0], list(names[val[1]]))
    assert renamed == pytest.approx(expected)
    tensors = [torch.from_numpy(array) for pair in (train, test, val) for array in pair]
    assert linear_probe(*tensors) == expected
    few = {"shots": (1, 3), "strength": 1.0}
    renamed = few_shot_probe(train[0], names[train[1]], test[0], names[test[1]], **few)
    for row, other in zip(renamed["curve"], few_shot_probe(*train, *test, **few)["curve"], strict=True):
        assert row["accuracies"] == pytest.approx(other["accuracies"])


def test_half_precision_is_read_as_float32():
    features, labels = blobs(0, 60)
    half = torch.from_numpy(features).bfloat16().requires_grad_()
    assert fit_probe(half, labels, 1.0).weight.dtype == np.float32
    np.testing.assert_array_equal(
        fit_probe(half, labels, 1.0).weight, fit_probe(half.detach().float().numpy(), labels, 1.0).weight
    )


def test_a_fit_cut_short_is_reported_and_not_warned_of():
    train, val, test = blobs(0, 60), blobs(1, 60), blobs(2, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = linear_probe(*train, *test, *val, max_iter=1)
        few = few_shot_probe(*train, *test, shots=(1, 2), draws=2, strength=1.0, max_iter=1)
    assert result["converged"] is False
    assert result["search_unconverged"] == result["search_fits"] >= 11
    assert [row["unconverged"] for row in few["curve"]] == [2, 2]


@pytest.mark.parametrize("shots", [1, 2, 5])
def test_each_class_gives_its_shots_or_all_it_has(shots):
    labels = np.random.default_rng(0).permutation(np.repeat(["a", "b", "c"], [1, 4, 20]))
    rows = draw_shots(labels, shots)
    assert len(rows) == len(set(rows.tolist()))
    counts = dict(zip(*np.unique(labels[rows], return_counts=True), strict=True))
    assert counts == {"a": 1, "b": min(4, shots), "c": shots}


def test_groups_are_drawn_whole():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), rng.integers(1, 4, 12))
    labels, names = np.repeat([0, 1], 6)[groups], np.array(list("lkjihgfedcba"))[groups]
    rows = draw_shots(labels, 2, groups=names)
    for label in (0, 1):
        drawn = set(names[rows][labels[rows] == label])
        assert len(drawn) == 2
        assert np.isin(names, list(drawn)).sum() == np.isin(names[rows], list(drawn)).sum()
    np.testing.assert_array_equal(rows, draw_shots(labels, 2, groups=groups))  # the names of groups do not matter


def test_every_example_is_as_likely_as_another():
    labels = np.array([0] * 4 + [1] * 4)
    counts = np.zeros(8)
    for draw in range(2000):
        counts[draw_shots(labels, 1, draw)] += 1
    np.testing.assert_allclose(counts / 2000, 0.25, atol=0.04)  # four standard deviations


def test_draws_depend_on_seed_shots_and_draw_alone():
    labels = np.repeat([0, 1, 2], 20)
    draws = {key: tuple(draw_shots(labels, 4, *key)) for key in ((0, 0), (1, 0), (0, 1), (1, 1))}
    assert len(set(draws.values())) == 4
    assert draws[1, 0] == tuple(draw_shots(labels, 4, 1, 0))
    assert not set(draw_shots(labels, 2).tolist()) <= set(draws[0, 0])
    train, test = blobs(0, 100), blobs(1, 100)
    wide = few_shot_probe(*train, *test, shots=(1, 4), draws=3, strength=1.0)
    narrow = few_shot_probe(*train, *test, shots=(4,), draws=2, strength=1.0)
    assert wide["curve"][1]["accuracies"][:2] == narrow["curve"][0]["accuracies"]


def test_a_few_shot_probe_is_the_fit_of_its_draw():
    train, test = blobs(0, 100), blobs(1, 200)
    result = few_shot_probe(*train, *test, shots=(1, 4), draws=2, seed=3, strength=0.5)
    for row in result["curve"]:
        rows = [draw_shots(train[1], row["shots"], draw, 3) for draw in range(2)]
        accuracies = [fit_probe(train[0][own], train[1][own], 0.5).evaluate(*test)["accuracy"] for own in rows]
        assert row["accuracies"] == accuracies
        assert row["accuracy"] == pytest.approx(np.mean(accuracies))
        assert row["examples"] == np.mean([len(own) for own in rows])
        assert row["short_classes"] == (np.bincount(train[1]) < row["shots"]).sum()
    assert result["strength"] == 0.5 and "search_fits" not in result
    assert json.loads(json.dumps(result)) == result


def test_the_strength_of_few_shots_is_that_of_the_first_draw_of_the_most():
    train, val, test = blobs(0, 100), blobs(1, 80), blobs(2, 80)
    result = few_shot_probe(*train, *test, shots=(4, 1), draws=1, val_features=val[0], val_labels=val[1])
    rows = draw_shots(train[1], 4)
    strength, counts = choose_strength(train[0][rows], train[1][rows], *val)
    assert {key: result[key] for key in ("strength", *counts)} == {"strength": strength, **counts}
    fits, _ = fit_few_shot(*train, (4,), 1, strength=strength)
    assert result["curve"][0]["accuracy"] == fits[0].probe.evaluate(*test)["accuracy"]
    assert [row["shots"] for row in result["curve"]] == [4, 1]


def test_short_classes_are_counted_in_groups():
    features, labels = blobs(0, 60, 2)
    order = np.argsort(labels, kind="stable")
    features, labels = features[order], labels[order]
    groups = np.where(labels == 0, np.arange(60), 1000)  # class 1 is one group
    fits, _ = fit_few_shot(features, labels, (1, 2), 1, groups=groups, strength=1.0)
    assert [fit.short_classes for fit in fits] == [0, 1]
    assert [fit.examples for fit in fits] == [1 + (labels == 1).sum(), 2 + (labels == 1).sum()]


@pytest.mark.parametrize(
    ("accuracies", "target", "expected"),
    [
        ({1: 10, 4: 30}, 20, 2),
        ({1: 10, 2: 20, 4: 30, 8: 50}, 40, 4 * 2**0.5),
        ({8: 50, 1: 10, 4: 30, 2: 20}, 30, 4),
        ({1: 10, 2: 40, 4: 20, 8: 50}, 25, 2**0.5),
        ({2: 10, 4: 10}, 10, 2),
        ({2: 10}, 3, 2),
        ({2: 10, 4: 20}, 20.5, None),
    ],
)
def test_shots_to_match_by_hand(accuracies, target, expected):
    assert shots_to_match(accuracies, target) == (expected if expected is None else pytest.approx(expected))


def test_tower_features_are_before_the_projection_and_raw():
    model, processor = small_clip()
    model.train()
    pictures = noise(5)
    features = tower_features(model, processor, pictures, batch_size=2, progress=False)
    assert model.training and model.vision_model.training and not features.requires_grad
    with torch.no_grad():
        outputs = model.eval()(**processor(images=pictures, text=["a cat"] * 5))
        projected = model.visual_projection(features)
    assert features.shape == (5, 16)
    torch.testing.assert_close(torch.nn.functional.normalize(projected, dim=-1), outputs.image_embeds)
    with pytest.raises(ValueError, match="nothing to embed"):
        tower_features(model, processor, [])


def test_scikit_learn_is_loaded_by_a_fit_alone():
    for module in (probes, emoji_probes):
        names = [
            getattr(value, "__module__", None) or getattr(value, "__name__", "") for value in vars(module).values()
        ]
        assert not [name for name in names if str(name).startswith("sklearn")]


GOOD = (np.eye(4), np.array([0, 1, 0, 1]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit_probe(np.eye(3), [0, 1], 1.0), r"training features \(3, 3\) and labels \(2,\)"),
        (lambda: fit_probe(np.zeros((0, 3)), [], 1.0), "at least one"),
        (lambda: fit_probe(np.full((4, 4), np.nan), GOOD[1], 1.0), "training features hold NaN"),
        (lambda: fit_probe(np.eye(2), [5, 5], 1.0), "a probe needs two classes"),
        (lambda: fit_probe(*GOOD, 0.0), "strength is 0.0"),
        (lambda: fit_probe(*GOOD, 1.0).evaluate(np.eye(4), [0, 1, 2, 1]), "test label .*2.* is not among"),
        (lambda: linear_probe(*GOOD, *GOOD), "pass either a validation set"),
        (lambda: linear_probe(*GOOD, *GOOD, *GOOD, strength=1.0), "pass either a validation set"),
        (lambda: linear_probe(*GOOD, *GOOD, np.eye(4)), "needs both"),
        (lambda: linear_probe(*GOOD, *GOOD, np.eye(4), [0, 1, 0, 7]), "validation label .*7.* is not among"),
        (lambda: linear_probe(*GOOD, np.full((1, 4), np.inf), [0], strength=1.0), "test features hold NaN or inf"),
        (lambda: few_shot_probe(*GOOD, *GOOD), "pass either a validation set"),
        (lambda: few_shot_probe(*GOOD, *GOOD, draws=0, strength=1.0), "5 numbers of shots and 0 draws"),
        (lambda: few_shot_probe(*GOOD, *GOOD, shots=(0,), strength=1.0), "shots is 0"),
        (lambda: draw_shots(GOOD[1], 1, groups=[0, 1]), "4 labels and 2 groups"),
        (lambda: draw_shots(GOOD[1], 1, groups=[0, 0, 1, 1]), "group .*0.* has examples of two classes"),
        (lambda: shots_to_match({}, 1), "at least one"),
        (lambda: shots_to_match({0: 1}, 1), "positive numbers"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
