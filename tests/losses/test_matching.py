"""The draw of hard negatives, and the loss over right and drawn pairs."""

import math

import pytest
import torch

from hf_mm.losses.matching import (
    IGNORED,
    draw_hard_negatives,
    image_text_matching_loss,
    matching_labels,
    mean_of_labelled,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class TestDraws:
    ROW = torch.tensor([1.3, -0.4, 0.2, 2.0, -1.5, 0.9])

    @pytest.mark.parametrize("right", [[0], [3], [1, 3, 4], [0, 1, 2, 4, 5]], ids=str)
    def test_shares_are_the_softmax_over_the_wrong_ones(self, right):
        """Pearson's statistic, far below what has a chance of one in a million; no right one in 40,000 draws."""
        number = 40_000
        same = torch.zeros(number, 6, dtype=torch.bool)
        same[:, right] = True
        drawn, valid = draw_hard_negatives(self.ROW.repeat(number, 1), same, seeded(), gather=False)
        assert drawn.shape == valid.shape == (number,) and valid.all()
        counts = torch.bincount(drawn, minlength=6).double()
        assert counts[right].sum() == 0
        wrong = [column for column in range(6) if column not in right]
        expected = number * self.ROW[wrong].double().softmax(0)
        statistic = ((counts[wrong] - expected) ** 2 / expected).sum().item()
        assert statistic < {1: 1e-9, 3: 27.7, 5: 33.4}[len(wrong)]

    def test_rows_and_columns_are_independent(self):
        """Of two equal rows, the pair of draws has the product of their shares."""
        number, same = 20_000, torch.eye(3, dtype=torch.bool)[:2]
        logits = torch.tensor([[0.0, 0.5, -0.5], [1.0, 0.0, 0.2]])
        pairs = torch.zeros(3, 3)
        generator = seeded()
        for _ in range(number):
            drawn, _ = draw_hard_negatives(logits, same, generator, gather=False)
            pairs[drawn[0], drawn[1]] += 1
        shares = [row.masked_fill(right, -torch.inf).softmax(0) for row, right in zip(logits, same, strict=True)]
        expected = number * shares[0][:, None] * shares[1]
        kept = expected > 0
        assert pairs[~kept].sum() == 0
        assert ((pairs - expected)[kept] ** 2 / expected[kept]).sum() < 30

    @pytest.mark.parametrize("scale", [1e4, 1e8])
    def test_extreme_logits(self, scale):
        """The right columns are never drawn, however likely; of the wrong ones the likeliest always."""
        logits = scale * torch.tensor([[9.0, -3.0, -2.0, -4.0]]).repeat(500, 1)
        same = torch.tensor([[True, False, False, False]]).repeat(500, 1)
        drawn, valid = draw_hard_negatives(logits, same, seeded(), gather=False)
        assert valid.all() and (drawn == 2).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        logits = torch.full((3000, 3), -14.0, dtype=dtype)
        logits[:, 0] = 14.0
        same = torch.tensor([[True, False, False]]).repeat(3000, 1)
        drawn, valid = draw_hard_negatives(logits, same, seeded(), gather=False)
        assert valid.all() and abs((drawn == 1).double().mean() - 0.5) < 0.05 and (drawn > 0).all()

    def test_a_row_that_is_all_right_draws_nothing(self):
        same = torch.tensor([[True, True, True], [False, True, False]])
        drawn, valid = draw_hard_negatives(torch.randn(2, 3), same, seeded(), gather=False)
        assert valid.tolist() == [False, True]
        assert 0 <= drawn[0] < 3 and drawn[1] in (0, 2)

    def test_one_of_one(self):
        drawn, valid = draw_hard_negatives(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), seeded())
        assert drawn.tolist() == [0] and valid.tolist() == [False]

    def test_a_seed_repeats_the_draw(self):
        logits, same = torch.randn(64, 64), torch.eye(64, dtype=torch.bool)
        draws = [draw_hard_negatives(logits, same, seeded(seed))[0] for seed in (1, 1, 2)]
        assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
        torch.manual_seed(5)
        default = draw_hard_negatives(logits, same)[0]
        assert not torch.equal(default, draw_hard_negatives(logits, same)[0])
        torch.manual_seed(5)
        assert torch.equal(default, draw_hard_negatives(logits, same)[0])

    def test_draws_carry_no_gradient_and_change_nothing(self):
        logits = torch.randn(4, 4, requires_grad=True)
        before, same = logits.detach().clone(), torch.eye(4, dtype=torch.bool)
        drawn, _ = draw_hard_negatives(logits, same, seeded())
        assert not drawn.requires_grad and drawn.dtype == torch.long
        assert torch.equal(logits, before) and torch.equal(same, torch.eye(4, dtype=torch.bool))


ALL = (torch.ones(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool))
SOME = (torch.tensor([True, False, True, True]), torch.tensor([False, False, True, False]))
NONE = (torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool))


class TestLoss:
    def test_labels(self):
        assert matching_labels(ALL).tolist() == [1] * 4 + [0] * 8
        assert matching_labels(SOME).tolist() == [1] * 4 + [0, IGNORED, 0, 0] + [IGNORED, IGNORED, 0, IGNORED]
        assert IGNORED == -100

    @pytest.mark.parametrize("valid", [ALL, SOME, NONE], ids=["all", "some", "none"])
    def test_is_the_mean_of_what_was_drawn(self, valid):
        logits = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)
        labels = matching_labels(valid).tolist()
        terms = [
            torch.log(1 + torch.exp(logits[row, 1 - label] - logits[row, label]))
            for row, label in enumerate(labels)
            if label >= 0
        ]
        reference = sum(terms) / len(terms)
        loss = image_text_matching_loss(logits, valid)
        torch.testing.assert_close(loss, reference, rtol=1e-12, atol=0)
        ours, theirs = (torch.autograd.grad(each, logits)[0] for each in (loss, reference))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)

    def test_the_best_constant_guess(self):
        """One in three matches: the entropy of a third, and no other constant is below it."""
        entropy = math.log(3) - 2 / 3 * math.log(2)
        assert entropy == pytest.approx(0.6365, abs=5e-5)

        def loss_of(share):
            guess = torch.tensor([math.log(1 - share), math.log(share)], dtype=torch.float64)
            return image_text_matching_loss(guess.repeat(12, 1), ALL).item()

        assert loss_of(1 / 3) == pytest.approx(entropy, rel=1e-12)
        assert min(loss_of(0.30), loss_of(0.36), loss_of(0.5)) > entropy

    def test_half_precision_is_summed_in_float32(self):
        logits = torch.randn(12, 2).bfloat16()
        loss = image_text_matching_loss(logits, ALL)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(image_text_matching_loss(logits.double(), ALL).item(), rel=1e-5)


class TestMeanOfLabelled:
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
    def test_is_torchs_cross_entropy(self, smoothing):
        logits = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([3, IGNORED, 0, 6, IGNORED, 2, 2, 5, IGNORED])
        loss = mean_of_labelled(logits, labels, smoothing)
        reference = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        torch.testing.assert_close(loss, reference, rtol=1e-12, atol=0)
        ours, theirs = (torch.autograd.grad(each, logits)[0] for each in (loss, reference))
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize("number", [0, 3])
    def test_without_a_label_is_zero_with_a_gradient(self, number):
        logits = torch.randn(number, 7, requires_grad=True)
        loss = mean_of_labelled(logits, torch.full((number,), IGNORED))
        loss.backward()
        assert loss.item() == 0.0
        assert torch.equal(logits.grad, torch.zeros(number, 7))

    def test_the_floor_that_smoothing_leaves(self):
        """Of BERT's vocabulary and [DEC], 1.358."""
        size, smoothing = 30523, 0.1
        shares = torch.full((size,), smoothing / size, dtype=torch.float64)
        shares[5] += 1 - smoothing
        loss = mean_of_labelled(shares.log()[None], torch.tensor([5]), smoothing).item()
        assert loss == pytest.approx(-(shares * shares.log()).sum().item(), rel=1e-12)
        assert loss == pytest.approx(1.358, abs=1e-3)
