"""The loss of the word warm-up, against its equation written out."""

import math

import pytest
import torch

from hf_mm.losses.words import IGNORED, PULL, word_loss


def test_loss_is_the_equation():
    """CE(softmax(a P (E - mean E)^T / s), w) + 0.3 |P - E_w|^2 / s with s = mean |E - mean E|^2, over the targets there are, by loops."""
    generator = torch.Generator().manual_seed(0)
    soft, words = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 2, 5), (7, 5)))
    targets = torch.tensor([[0, 6], [3, IGNORED], [2, 2]])
    loss, right = word_loss(soft, words, targets, 1.7)
    costs, hits = [], []
    centred = words - words.mean(dim=0)
    spread = sum(float(row @ row) for row in centred) / 7
    for i, k in [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1)]:
        scores = [1.7 * float(soft[i, k] @ row) / spread for row in centred]
        miss = soft[i, k] - words[targets[i, k]]
        costs.append(math.log(sum(map(math.exp, scores))) - scores[targets[i, k]] + PULL * float(miss @ miss) / spread)
        hits.append(scores.index(max(scores)) == int(targets[i, k]))
    assert loss.item() == pytest.approx(sum(costs) / 5)
    assert right.item() == pytest.approx(sum(hits) / 5)


def test_what_all_words_have_in_common_tells_none_from_another():
    soft, words = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    targets = torch.tensor([[0, 1, 2], [3, 4, 5]])
    far = words + 10 * torch.randn(4, dtype=torch.float64)

    def cross_entropy(words):
        spread = words.var(dim=0, correction=0).sum()
        misses = (soft - words[targets]).square().sum(dim=-1).mean()
        return word_loss(soft, words, targets, 2.0)[0] - PULL * misses / spread

    torch.testing.assert_close(cross_entropy(words), cross_entropy(far))


def test_soft_tokens_at_their_words_cost_nothing_and_are_right():
    words = 10 * torch.eye(4)
    targets = torch.tensor([[2, 0]])
    for size in (1, 1e-3):
        loss, right = word_loss(size * words[targets], size * words, targets, 30.0)
        assert loss < 1e-6 and right == 1


def test_gradients_reach_soft_tokens_and_scale_and_are_zero_without_targets():
    soft, scale = torch.randn(1, 2, 4, requires_grad=True), torch.ones(1, requires_grad=True)
    word_loss(soft, torch.randn(5, 4), torch.tensor([[1, IGNORED]]), scale)[0].sum().backward()
    assert soft.grad[0, 0].any() and not soft.grad[0, 1].any() and scale.grad.any()
    soft.grad = None
    loss, right = word_loss(soft, torch.randn(5, 4), torch.full((1, 2), IGNORED), 1.0)
    loss.backward()
    assert loss == 0 and right == 0 and not soft.grad.any()


def test_half_precision_is_computed_in_float32():
    soft, words = torch.randn(2, 2, 8), torch.randn(5, 8)
    targets = torch.zeros(2, 2, dtype=torch.long)
    loss, _ = word_loss(soft.bfloat16(), words, targets, 1.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, word_loss(soft.bfloat16().float(), words, targets, 1.0)[0])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"must be \(B, K, D\), \(V, D\) and \(B, K\)") as refused:
        word_loss(torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 2, dtype=torch.long), 1.0)
    assert "\n" not in str(refused.value)
