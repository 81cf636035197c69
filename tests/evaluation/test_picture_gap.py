import math
from collections import Counter

import pytest
import torch

from hf_mm.evaluation.picture_gap import (
    evaluate_picture_gap,
    other_rows,
    picture_gap,
    rank_captions,
    standard_error,
)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 100])
def test_every_row_gets_another_and_each_once(count):
    for seed in range(20):
        other = other_rows(count, seed)
        assert sorted(other.tolist()) == list(range(count))
        assert (other != torch.arange(count)).all()
        assert torch.equal(other, other_rows(count, seed))
    assert count == 2 or len({tuple(other_rows(count, seed).tolist()) for seed in range(20)}) > 1


@pytest.mark.parametrize("groups", ["aabb", "aab-", "abcabc", "aaabbbccc", "aaaabcde", "zzyxzyxz", "ab"])
def test_no_row_gets_one_of_its_group(groups):
    for seed in range(50):
        other = other_rows(len(groups), seed, groups).tolist()
        assert Counter(other) == Counter(range(len(groups)))
        assert all(groups[row] != own for row, own in zip(other, groups, strict=True))


def test_every_other_row_is_as_likely():
    draws = torch.stack([other_rows(5, seed) for seed in range(2000)])
    shares = torch.stack([(draws == row).double().mean(dim=0) for row in range(5)])
    expected = 0.25 * (1 - torch.eye(5, dtype=torch.double))
    torch.testing.assert_close(shares, expected, atol=0.05, rtol=0)  # 5 standard errors


@pytest.mark.parametrize(
    ("count", "groups", "message"),
    [(1, None, "1 of 1 rows"), (3, "aab", "2 of 3 rows are of one group"), (3, "ab", "3 rows and 2 groups")],
)
def test_rows_that_cannot_change_places_are_refused(count, groups, message):
    with pytest.raises(ValueError, match=message):
        other_rows(count, 0, groups)


def test_gap_by_hand():
    own, other = torch.tensor([1.0, 2.0, 3.0, 2.0]), torch.tensor([2.0, 2.0, 5.0, 3.0])
    metrics = picture_gap(own, other)
    assert metrics == pytest.approx(
        {
            "captions": 4,
            "nll": 2,
            "nll_se": math.sqrt(2 / 3 / 4),
            "nll_other": 3,
            "nll_other_se": math.sqrt(6 / 3 / 4),
            "gap": 1,  # 1, 0, 2, 1
            "gap_se": math.sqrt(2 / 3 / 4),
            "win_rate": 75,  # the tie is no win
            "win_rate_se": 100 * math.sqrt(0.75 * 0.25 / 3),
        }
    )
    assert math.isnan(picture_gap(own[:1], other[:1])["gap_se"])


def test_the_standard_error_is_how_far_means_scatter():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, 25, generator=generator) * 3 + 1
    assert standard_error(samples[0]) == pytest.approx(samples[0].std().item() / 5)
    mean_error = sum(standard_error(sample) ** 2 for sample in samples) / len(samples)
    assert mean_error == pytest.approx(samples.mean(dim=1).var().item(), rel=0.05)


@pytest.mark.parametrize(("sight", "wins"), [(0.0, 0), (1.5, 100)])
def test_a_blind_model_has_no_gap_and_one_that_sees_has(sight, wins):
    captions = [f"caption {row}" for row in range(30)]
    asked = []

    def nll(rows, texts):
        asked.append(rows)
        wrong = torch.tensor([float(text != captions[row]) for row, text in zip(rows.tolist(), texts, strict=True)])
        return 2 + sight * wrong

    metrics = evaluate_picture_gap(nll, captions, seed=3)
    assert (metrics["nll"], metrics["gap"], metrics["win_rate"], metrics["gap_se"]) == (2, sight, wins, 0)
    assert torch.equal(asked[0], torch.arange(30))
    assert torch.equal(asked[1], other_rows(30, 3))


@pytest.mark.parametrize(
    ("own", "other", "message"),
    [
        (torch.ones(2), torch.ones(3), r"own \(2,\) and other \(3,\)"),
        (torch.ones(0), torch.ones(0), "at least one"),
        (torch.tensor([1.0, math.nan]), torch.ones(2), "NaN or infinite"),
        (torch.ones(2), torch.tensor([1.0, math.inf]), "NaN or infinite"),
    ],
)
def test_bad_likelihoods_are_refused(own, other, message):
    with pytest.raises(ValueError, match=message):
        picture_gap(own, other)


def test_ranking_by_hand():
    scores = torch.full((4, 10), -9.0)
    scores[:, :6] = torch.tensor([-1.0, -2, -3, -4, -5, -6])
    metrics = rank_captions(scores, torch.tensor([0, 1, 4, 5]))
    assert (metrics["top1"], metrics["top5"]) == (25, 75)
    assert (metrics["chance_top1"], metrics["chance_top5"]) == (10, 50)
    assert metrics["top1_se"] == metrics["top5_se"] == pytest.approx(25)
    assert (metrics["pictures"], metrics["candidates"]) == (4, 10)


def test_pictures_with_fewer_candidates():
    scores = torch.tensor([[0.3, 0.1, -torch.inf, -torch.inf], [0.3, 0.1, 0.2, 0.4]])
    metrics = rank_captions(scores, torch.tensor([0, 0]))
    assert (metrics["top1"], metrics["top5"]) == (50, 100)
    assert metrics["chance_top1"] == pytest.approx(100 * (1 / 2 + 1 / 4) / 2)
    assert metrics["chance_top5"] == 100
    assert metrics["candidates"] == 3


def test_a_constant_score_is_no_right_answer():
    metrics = rank_captions(torch.zeros(3, 6), torch.tensor([0, 3, 5]))
    assert (metrics["top1"], metrics["top5"]) == (0, 0)


def test_random_scores_reach_chance():
    scores = torch.rand(20000, 20, generator=torch.Generator().manual_seed(0))
    metrics = rank_captions(scores, torch.full((20000,), 7))
    for k in ("top1", "top5"):
        assert abs(metrics[k] - metrics[f"chance_{k}"]) < 4 * metrics[f"{k}_se"]


@pytest.mark.parametrize(
    ("scores", "right", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0]), r"scores \(2, 3\) must be"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "right runs from 0 to 3, but there are 3"),
        (torch.tensor([[0.0, -math.inf]]), torch.tensor([1]), "must be a candidate"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), "NaN or infinity"),
        (torch.tensor([[0.0, math.inf]]), torch.tensor([0]), "NaN or infinity"),
    ],
)
def test_bad_scores_are_refused(scores, right, message):
    with pytest.raises(ValueError, match=message):
        rank_captions(scores, right)
