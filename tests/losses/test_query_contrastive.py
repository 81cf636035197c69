"""BLIP-2's contrastive loss against loops over its equation, and values known in closed form."""

import math

import pytest
import torch

from hf_mm.losses.contrastive import query_text_contrastive_loss

IMAGE_IDS = torch.tensor([3, 1, 3, 2, 7, 3])
ROWS, QUERIES, WIDTH = 6, 4, 5


def embeddings(rows=ROWS, queries=QUERIES):
    """Pictures, texts and temperature, as leaves."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(rows, queries, WIDTH, generator=generator, dtype=torch.float64)
    texts = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    unit = [torch.nn.functional.normalize(each, dim=-1).requires_grad_() for each in (images, texts)]
    return *(each.detach().requires_grad_() for each in unit), torch.tensor(
        [0.3], dtype=torch.float64
    ).requires_grad_()


def by_loops(images, texts, temperature, image_ids=None, smoothing=0.0, detached=False):
    """Cross-entropy with soft targets; `detached`: what stands in the columns takes no gradient."""
    rows = range(len(images))
    ids = list(rows) if image_ids is None else image_ids.tolist()
    fixed = (lambda rows: rows.detach()) if detached else (lambda rows: rows)
    total = 0.0
    for i in rows:
        right = [ids[j] == ids[i] for j in rows]
        for forward in (True, False):
            if forward:
                cosines = [max(images[i, k] @ fixed(texts[j]) for k in range(images.shape[1])) for j in rows]
            else:
                cosines = [max(fixed(images[j])[k] @ texts[i] for k in range(images.shape[1])) for j in rows]
            shares = torch.stack([torch.exp(cosine / temperature[0]) for cosine in cosines])
            shares = shares / shares.sum()
            for j in rows:
                target = (1 - smoothing) * right[j] / sum(right) + smoothing / len(rows)
                total = total - target * torch.log(shares[j])
    return total / (2 * len(rows))


def with_gradients(loss, leaves):
    return loss, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("image_ids", [None, IMAGE_IDS], ids=["no ids", "ids"])
@pytest.mark.parametrize("queries", [1, QUERIES])
def test_loss_and_gradients_are_those_of_the_equation(queries, image_ids, smoothing, detached):
    leaves = embeddings(queries=queries)
    loss, per_image, per_text = query_text_contrastive_loss(
        *leaves, image_ids=image_ids, label_smoothing=smoothing, gather_with_grad=not detached
    )
    ours = with_gradients(loss, leaves)
    theirs = with_gradients(by_loops(*leaves, image_ids, smoothing, detached), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    images, texts, temperature = leaves
    best = torch.einsum("ikd,jd->ijk", images, texts).amax(-1) / temperature
    torch.testing.assert_close(per_image, best, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(per_text, best.T, rtol=1e-12, atol=1e-12)


def test_every_field_matters():
    """So that the cases above are several."""
    fields = [{}, {"image_ids": IMAGE_IDS}, {"label_smoothing": 0.1}, {"image_ids": IMAGE_IDS, "label_smoothing": 0.1}]
    losses = [query_text_contrastive_loss(*embeddings(), **each)[0].item() for each in fields]
    assert len({round(loss, 6) for loss in losses}) == 4
    gradients = []
    for gather_with_grad in (True, False):
        leaves = embeddings()
        loss = query_text_contrastive_loss(*leaves, gather_with_grad=gather_with_grad)[0]
        gradients.append(torch.autograd.grad(loss, leaves[1])[0])
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


def test_the_best_query_alone_takes_the_gradient():
    images, texts, temperature = embeddings(2, 3)
    loss = query_text_contrastive_loss(images, texts, temperature)[0]
    loss.backward()
    best = {(i, int((images[i] @ texts[j]).argmax())) for i in range(2) for j in range(2)}
    touched = {(i, k) for i, k in images.grad.abs().sum(-1).nonzero().tolist()}
    assert touched == best


@pytest.mark.parametrize(("rows", "floor"), [(64, 0.730), (256, 0.876), (1024, 1.017), (1680, 1.067)])
def test_the_floor_that_smoothing_leaves(rows, floor):
    """Of the best logits there are: the entropy of 1 - 0.1 + 0.1 / G and G - 1 times 0.1 / G."""
    wrong = 0.1 / rows
    right = 0.9 + wrong
    entropy = -right * math.log(right) - (rows - 1) * wrong * math.log(wrong)
    assert entropy == pytest.approx(floor, abs=6e-4)
    eye = torch.eye(rows, dtype=torch.float64)
    loss = query_text_contrastive_loss(eye[:, None], eye, 1 / math.log(right / wrong), label_smoothing=0.1)[0]
    assert loss.item() == pytest.approx(entropy, rel=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equal_embeddings_are_a_guess(smoothing):
    same = torch.ones(ROWS, WIDTH, dtype=torch.float64) / WIDTH**0.5
    loss = query_text_contrastive_loss(same[:, None], same, 0.07, IMAGE_IDS, label_smoothing=smoothing)[0]
    assert loss.item() == pytest.approx(math.log(ROWS), rel=1e-12)


def test_one_pair():
    leaves = embeddings(1)
    loss, per_image, per_text = query_text_contrastive_loss(*leaves, label_smoothing=0.1)
    assert loss.item() == 0.0 and per_image.shape == per_text.shape == (1, 1)
    assert all((gradient == 0.0).all() for gradient in torch.autograd.grad(loss, leaves))


def test_half_precision_is_summed_in_float32():
    images, texts, _ = (leaf.detach() for leaf in embeddings())
    loss = query_text_contrastive_loss(images.bfloat16(), texts.bfloat16(), torch.tensor(0.07), IMAGE_IDS, 0.1)[0]
    assert loss.dtype == torch.float32
    rounded = (images.bfloat16().double(), texts.bfloat16().double(), torch.tensor([0.07]).double())
    assert loss.item() == pytest.approx(by_loops(*rounded, IMAGE_IDS, 0.1).item(), rel=2e-2)


@pytest.mark.parametrize(
    ("texts", "ids", "message"),
    [(3, None, "4 pictures and 3 texts"), (4, torch.arange(3), r"image_ids.*\(4,\).*\(3,\)")],
    ids=["counts", "ids"],
)
def test_inputs_that_do_not_match_are_refused(texts, ids, message):
    with pytest.raises(ValueError, match=message):
        query_text_contrastive_loss(torch.zeros(4, 2, 2), torch.zeros(texts, 2), torch.ones(1), ids)
