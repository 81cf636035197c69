from types import SimpleNamespace

import pytest
import torch
from toys import TableModel, TableProcessor

from hf_mm.evaluation.image_text_matching import (
    best_query_cosines,
    evaluate_image_text_matching,
    matching_head,
    rerank,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(cosines, table, k):
    """Query by query, as the published evaluation: everything -100 but the k nearest, which get logit and cosine."""
    scores = torch.full_like(cosines, -100.0)
    for query, row in enumerate(cosines):
        for answer in sorted(range(len(row)), key=lambda answer: -row[answer])[:k]:
            scores[query, answer] = table[query, answer, 1] + row[answer]
    return scores


@pytest.mark.parametrize("k", [1, 3, 7, 9, 128])
@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_reranking_is_that_of_every_query_alone(k, batch_size):
    cosines, table, asked = random(7, 9) / 3, random(7, 9, 2, seed=1) * 5, []

    def match_logits(rows, columns):
        assert len(rows) <= batch_size
        asked.extend(zip(rows.tolist(), columns.tolist(), strict=True))
        return table[rows, columns]

    to_texts, to_images = rerank(cosines, match_logits, k, batch_size, progress=False)
    torch.testing.assert_close(to_texts, brute_force(cosines, table, k))
    torch.testing.assert_close(to_images, brute_force(cosines.T, table.transpose(0, 1), k))
    assert len(asked) == len(set(asked))
    assert asked == sorted(asked)
    if k >= 9:
        assert len(asked) == 63


def test_cosines_are_of_the_query_that_is_nearest():
    images, texts = random(5, 3, 4), random(6, 4, seed=1)
    for chunk in (1, 2, 256):
        cosines = best_query_cosines(images, texts, chunk)
        for row in range(5):
            for column in range(6):
                nearest = max(torch.cosine_similarity(query, texts[column], dim=0) for query in images[row])
                assert cosines[row, column].item() == pytest.approx(nearest.item(), abs=1e-6)
    torch.testing.assert_close(best_query_cosines(images[:, 0], texts), best_query_cosines(images[:, :1], texts))


class MatchingModel(TableModel):
    """Embeddings and matching logits are tables; text number n has the id n + 1."""

    def __init__(self, image_table, text_table, logits):
        super().__init__(image_table, text_table)
        self.logits, self.read, self.calls = logits, [], 0

    def get_image_features(self, pixel_values=None, vision_features=None):
        rows = pixel_values if vision_features is None else vision_features
        return SimpleNamespace(pooler_output=self.image_table[rows.long()])

    def get_text_features(self, input_ids):
        return SimpleNamespace(pooler_output=self.text_table[input_ids])

    def get_matching_logits(self, input_ids, pixel_values=None, vision_features=None, pairs=None):
        assert not self.training and not torch.is_grad_enabled()
        rows = (pixel_values if vision_features is None else vision_features).long()
        assert len(rows) == len(rows.unique()) and len(input_ids) == len(input_ids.unique())
        self.read += rows.tolist()
        self.calls += 1
        return self.logits[rows[pairs[:, 0]], input_ids[pairs[:, 1]]]


class MatchingProcessor(TableProcessor):
    def __call__(self, images=None, text=None, mode=None, **kwargs):
        assert text is None or mode == "matching"
        return super().__call__(images, text, **kwargs)


CAPTIONS = [["0", "1"], ["2"], ["3"], ["4", "0"]]
OWN = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [1, 0, 0, 0, 1]]).bool()


def matching_model():
    logits = torch.stack([random(4, 5), 10.0 * OWN], dim=-1)
    return MatchingModel(random(4, 3, 6, seed=2), random(5, 6, seed=3), logits).train()


@pytest.mark.parametrize("cached", [False, True])
def test_the_head_mends_what_cosines_confuse(cached):
    model = matching_model()
    source = {"images": None, "vision_features": torch.arange(4.0)} if cached else {"images": range(4)}
    metrics = evaluate_image_text_matching(
        model, MatchingProcessor(), captions=CAPTIONS, batch_size=3, progress=False, **source
    )
    assert (metrics["images"], metrics["captions"]) == (4, 5)
    assert metrics["i2t_r1"] == metrics["t2i_r1"] == metrics["i2t_mrr"] == 100
    cosines = best_query_cosines(random(4, 3, 6, seed=2), random(5, 6, seed=3))
    best = cosines.argmax(dim=1)
    assert metrics["itc_i2t_r1"] == 25 * OWN[torch.arange(4), best].sum() < 100
    assert metrics["itc_t2i_r1"] == 20 * OWN[cosines.argmax(dim=0), torch.arange(5)].sum() < 100
    assert metrics["chance_i2t_r1"] == pytest.approx(100 * (2 + 1 + 1 + 2) / 4 / 5)
    assert not any(name.startswith("itc_chance") for name in metrics)
    assert model.training


def test_what_is_not_among_the_nearest_is_not_found():
    images = torch.eye(4)[:, None]
    model = MatchingModel(images, torch.eye(4)[[1, 0, 2, 3]], torch.stack([torch.zeros(4, 4), 3 * torch.eye(4)], -1))
    captions = [[str(row)] for row in range(4)]
    options = {"captions": captions, "progress": False}
    assert evaluate_image_text_matching(model, MatchingProcessor(), range(4), k=1, **options)["i2t_r1"] == 50
    assert evaluate_image_text_matching(model, MatchingProcessor(), range(4), k=4, **options)["i2t_r1"] == 100


def test_pictures_of_one_id_share_their_captions():
    model = matching_model()
    model.logits = torch.stack([torch.zeros(4, 5), torch.zeros(4, 5)], -1)
    model.logits[0, 2, 1] = 9.0
    own, shared = (
        evaluate_image_text_matching(model, MatchingProcessor(), range(4), CAPTIONS, ids=ids, progress=False)
        for ids in (None, "aabc")
    )
    assert shared["chance_i2t_r1"] > own["chance_i2t_r1"]
    assert shared["i2t_r1"] >= own["i2t_r1"] + 25


def test_the_head_reads_each_picture_of_a_call_once():
    model = matching_model()
    match = matching_head(model, MatchingProcessor(), range(4), ["0", "1", "2", "3", "4"])
    logits = match(torch.tensor([0, 0, 0, 2, 2]), torch.tensor([4, 1, 0, 0, 4]))
    torch.testing.assert_close(logits, model.logits[[0, 0, 0, 2, 2], [4, 1, 0, 0, 4]])
    assert model.read == [0, 2]
    assert model.calls == 1


@pytest.mark.parametrize(
    ("images", "captions", "options", "error", "message"),
    [
        (range(2), [["0"]], {}, ValueError, "2 images and 1 lists"),
        (range(2), ["0", "1"], {}, TypeError, "image 0 are one string"),
        (range(2), [["0"], []], {}, ValueError, "image 1 has no caption"),
        (range(2), [["0"], ["1"]], {"ids": [1]}, ValueError, "1 ids"),
        (range(2), [["0"], ["1"]], {"k": 0}, ValueError, "k is 0"),
        (
            range(2),
            [["0"], ["1"]],
            {"vision_features": torch.zeros(2)},
            ValueError,
            "either images or vision_features",
        ),
        (None, [["0"], ["1"]], {}, ValueError, "either images or vision_features"),
    ],
)
def test_bad_input_is_refused(images, captions, options, error, message):
    with pytest.raises(error, match=message):
        evaluate_image_text_matching(
            matching_model(), MatchingProcessor(), images, captions, progress=False, **options
        )


@pytest.mark.parametrize(
    ("cosines", "options", "logits", "message"),
    [
        (torch.ones(2, 2), {"batch_size": 0}, torch.zeros(4, 2), "batch_size is 0"),
        (torch.ones(2), {}, torch.zeros(4, 2), r"cosines \(2,\)"),
        (torch.full((2, 2), torch.nan), {}, torch.zeros(4, 2), "NaN"),
        (torch.ones(2, 2), {}, torch.zeros(4), r"gave \(4,\) for 4 pairs"),
    ],
)
def test_bad_scores_are_refused(cosines, options, logits, message):
    with pytest.raises(ValueError, match=message):
        rerank(cosines, lambda rows, columns: logits, progress=False, **options)
