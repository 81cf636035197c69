import itertools

import pytest
import torch

from hf_mm.evaluation.metrics import (
    Accuracy,
    BalancedAccuracy,
    chance_recall_at_k,
    chance_reciprocal_rank,
    label_ranks,
    mean_reciprocal_rank,
    recall_at_k,
    retrieval_metrics,
    retrieval_ranks,
)


def test_ranks_by_hand():
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    positives = torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]]).bool()
    ranks = retrieval_ranks(similarity, positives)
    assert ranks.tolist() == [1, 3, 2, 1]
    assert recall_at_k(ranks, 1) == 50
    assert recall_at_k(ranks, 2) == 75
    assert mean_reciprocal_rank(ranks) == pytest.approx(100 * (1 + 1 / 3 + 1 / 2 + 1) / 4)


def test_ties_count_against_the_model():
    similarity = torch.tensor([[0.5, 0.5, 0.5, 0.2], [0.5, 0.5 + 5e-7, 0.2, 0.2]])
    positives = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0]]).bool()
    assert retrieval_ranks(similarity, positives).tolist() == [3, 2]


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_a_constant_model_is_last(value):
    positives = torch.eye(20).bool()
    metrics = retrieval_metrics(torch.full((20, 20), value), positives, "i2t")
    assert metrics["i2t_r1"] == metrics["i2t_r10"] == 0
    assert metrics["i2t_mrr"] == pytest.approx(5)
    assert metrics["chance_i2t_r10"] == pytest.approx(50)


@pytest.mark.parametrize("gallery", [1, 4, 6])
def test_chance_is_the_mean_over_all_orders(gallery):
    for count in range(1, gallery + 1):
        positives = torch.zeros(1, gallery, dtype=torch.bool)
        positives[0, :count] = True
        orders = torch.tensor(list(itertools.permutations(range(gallery)))).float()
        ranks = retrieval_ranks(orders, positives.expand(len(orders), -1))
        for k in (1, 2, 5, 10):
            assert chance_recall_at_k(positives.sum(1), gallery, k) == pytest.approx(recall_at_k(ranks, k))
        assert chance_reciprocal_rank(positives.sum(1), gallery) == pytest.approx(mean_reciprocal_rank(ranks))


def test_chance_averages_over_queries():
    assert chance_recall_at_k(torch.tensor([1, 1, 3]), 4, 1) == pytest.approx(100 * (0.25 + 0.25 + 0.75) / 3)


@pytest.mark.parametrize(
    ("similarity", "positives", "message"),
    [
        (torch.tensor([[float("nan"), 0.0]]), torch.tensor([[True, False]]), "NaN"),
        (torch.zeros(1, 2), torch.zeros(1, 2).bool(), "query 0 has no right answer"),
        (torch.zeros(1, 2), torch.ones(2, 1).bool(), "must both be"),
    ],
)
def test_what_has_no_rank_is_refused(similarity, positives, message):
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(similarity, positives)


def test_accuracies_by_hand():
    data = {"references": [0, 0, 0, 0, 1, 1, 2], "predictions": [0, 0, 0, 1, 1, 0, 5]}
    assert Accuracy().compute(**data) == {"accuracy": pytest.approx(4 / 7)}
    assert BalancedAccuracy().compute(**data) == {"balanced_accuracy": pytest.approx((3 / 4 + 1 / 2 + 0) / 3)}


def test_a_metric_can_be_fed_in_batches_and_used_again():
    metric = BalancedAccuracy()
    for expected, references in ((0.75, [0, 0, 1]), (1.0, [0, 1, 1])):
        metric.add_batch(predictions=[0, 1], references=references[:2])
        metric.add(prediction=1, reference=references[2])
        assert metric.compute() == {"balanced_accuracy": expected}


def test_one_right_answer_is_ranked_as_by_the_general_rule():
    """With scores so coarse that most of them tie."""
    scores, labels = torch.randint(-3, 4, (60, 7)) / 4, torch.randint(7, (60,))
    expected = retrieval_ranks(scores, torch.nn.functional.one_hot(labels, 7).bool())
    assert torch.equal(label_ranks(scores, labels), expected)
    assert len(set(expected.tolist())) > 3
    with pytest.raises(ValueError, match="NaN"):
        label_ranks(scores.where(scores < 0.7, torch.nan), labels)
