"""Contrastive losses against loops over their equations, and over two processes against one."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract.cases import CASES

from hf_mm.losses.contrastive import image_text_contrastive_loss, supervised_contrastive_loss

from .ranks import IDS, IMAGE_IDS, ROWS, TEMPERATURE, embeddings

TESTS = Path(__file__).parents[1]


def by_loops(images, texts, scale, image_ids=None, text_ids=None):
    """The mean over pairs and both directions of -log of the share of the right one among what may be compared."""

    def negative(i, j):
        return i != j and all(ids is None or ids[i] != ids[j] for ids in (image_ids, text_ids))

    terms = []
    for queries, keys in ((images, texts), (texts, images)):
        for i in range(len(images)):
            right = torch.exp(scale * queries[i].dot(keys[i]))
            wrong = [torch.exp(scale * queries[i].dot(keys[j])) for j in range(len(images)) if negative(i, j)]
            terms.append(-torch.log(right / (right + sum(wrong, torch.zeros(1)))))
    return sum(terms) / len(terms)


def supervised_by_loops(embeds, ids, temperature):
    """Khosla et al. 2020, equation 2."""
    rows = range(len(embeds))
    total = 0.0
    for i in rows:
        others = sum(torch.exp(embeds[i].dot(embeds[a]) / temperature) for a in rows if a != i)
        positives = [p for p in rows if p != i and ids[p] == ids[i]]
        for p in positives:
            total = total - torch.log(torch.exp(embeds[i].dot(embeds[p]) / temperature) / others) / len(positives)
    return total / len(embeds)


def assert_same(ours, reference):
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one.reshape(other.shape), other, rtol=1e-10, atol=1e-12)


def with_gradients(loss, leaves):
    return loss, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_loss_and_gradients_are_those_of_the_equation(ids):
    leaves = embeddings()
    assert_same(
        with_gradients(image_text_contrastive_loss(*leaves, **ids), leaves),
        with_gradients(by_loops(*leaves, **ids), leaves),
    )


def test_masked_ids_change_the_loss():
    """So that the four cases above are four."""
    losses = [image_text_contrastive_loss(*embeddings(), **ids).item() for ids in IDS.values()]
    assert len({round(loss, 6) for loss in losses}) == 4
    assert losses[0] == max(losses)


def test_one_thing_only_has_no_negatives():
    leaves = embeddings()
    for name in ("image_ids", "text_ids"):
        loss, *gradients = with_gradients(
            image_text_contrastive_loss(*leaves, **{name: torch.full((ROWS,), 4)}), leaves
        )
        assert loss == 0.0
        assert all((gradient == 0.0).all() for gradient in gradients)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_equal_embeddings_are_a_guess_among_the_other_groups(group):
    same = torch.ones(ROWS, 4, dtype=torch.float64) / 2
    loss = image_text_contrastive_loss(same, same, torch.tensor(7.0), image_ids=torch.arange(ROWS) // group)
    assert loss.item() == pytest.approx(math.log(ROWS - group + 1), abs=1e-12)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_orthogonal_pairs(shape):
    eye = torch.eye(ROWS, dtype=torch.float64)
    loss = image_text_contrastive_loss(eye, eye, torch.full(shape, 3.0, dtype=torch.float64))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(math.log1p((ROWS - 1) * math.exp(-3.0)), rel=1e-12)


def test_half_precision_is_summed_in_float32():
    images, texts, scale = (leaf.detach().bfloat16() for leaf in embeddings())
    loss = image_text_contrastive_loss(images, texts, scale, image_ids=IMAGE_IDS)
    assert loss.dtype == torch.float32
    reference = by_loops(images.double(), texts.double(), scale.double(), image_ids=IMAGE_IDS)
    assert loss.item() == pytest.approx(reference.item(), rel=2e-2)


@pytest.mark.parametrize(
    ("images", "texts", "ids", "message"),
    [
        (4, 3, {}, "4 pictures and 3 texts"),
        (4, 4, {"image_ids": torch.arange(3)}, r"image_ids.*\(4,\).*\(3,\)"),
        (4, 4, {"text_ids": torch.zeros(4, 4)}, r"text_ids.*\(4,\).*\(4, 4\)"),
    ],
    ids=["counts", "image ids", "text ids"],
)
def test_inputs_that_do_not_match_are_refused(images, texts, ids, message):
    with pytest.raises(ValueError, match=message):
        image_text_contrastive_loss(torch.zeros(images, 2), torch.zeros(texts, 2), torch.ones(1), **ids)


def test_supervised_loss_and_gradient_are_those_of_the_equation():
    embeds = embeddings()[0]
    assert_same(
        with_gradients(supervised_contrastive_loss(embeds, IMAGE_IDS, TEMPERATURE), [embeds]),
        with_gradients(supervised_by_loops(embeds, IMAGE_IDS, TEMPERATURE), [embeds]),
    )


def test_supervised_loss_of_equal_rows_is_a_guess_among_the_others():
    same = torch.ones(ROWS, 4, dtype=torch.float64) / 2
    loss = supervised_contrastive_loss(same, torch.zeros(ROWS, dtype=torch.long), 0.1)
    assert loss.item() == pytest.approx(math.log(ROWS - 1), abs=1e-12)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_rows_without_a_positive_count_as_zero(rows):
    embeds = embeddings(rows)[0]
    loss, gradient = with_gradients(supervised_contrastive_loss(embeds, torch.arange(rows), 0.1), [embeds])
    assert loss == 0.0
    assert (gradient == 0.0).all()


@pytest.mark.parametrize("ids", [torch.arange(ROWS - 1), torch.zeros(ROWS, 1)], ids=["too few", "two dimensions"])
def test_supervised_ids_that_do_not_match_are_refused(ids):
    with pytest.raises(ValueError, match=rf"ids.*\({ROWS},\)"):
        supervised_contrastive_loss(embeddings()[0], ids, 0.1)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "losses.ranks", "equal", str(folder)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def mean_over_ranks(ranks, name):
    """As DDP leaves it: the mean of losses and shared gradients, and of each rank's rows their part of it."""
    loss, *gradients = zip(*(answers[name] for answers in ranks), strict=True)
    rows = [torch.cat(parts) / 2 for parts in gradients[:2]]
    shared = [torch.stack(parts).mean(0) for parts in gradients[2:]]
    return torch.stack(loss).mean(), *rows, *shared


@pytest.mark.parametrize("name", IDS)
def test_two_processes_equal_one_big_batch(two_ranks, name):
    leaves = embeddings()
    assert_same(mean_over_ranks(two_ranks, name), with_gradients(by_loops(*leaves, **IDS[name]), leaves))


def test_two_processes_equal_one_for_the_supervised_loss(two_ranks):
    embeds = embeddings()[0]
    reference = with_gradients(supervised_by_loops(embeds, IMAGE_IDS, TEMPERATURE), [embeds])
    assert_same(mean_over_ranks(two_ranks, "supervised"), reference)


def test_one_rank_alone_may_ask_the_model(two_ranks):
    case = next(case for case in CASES if case.name == "mm_clip")
    with torch.no_grad():
        assert torch.equal(two_ranks[0]["lone"], case.build()(**case.batch(3)).loss)


def test_unequal_batches_are_refused_on_every_rank(tmp_path):
    """Each process ends by itself, with the sentence: none is aborted, none waits."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "losses.ranks", "unequal", str(tmp_path)],
            cwd=TESTS,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, stderr = process.communicate(timeout=240)
        assert process.returncode == 1
        sentence = stderr.strip().splitlines()[-1]
        assert "ValueError: every rank needs the same number of rows" in sentence
        assert "[3, 2]" in sentence and "dataloader_drop_last=True" in sentence
