"""Row 3: a sample answers the same alone and in a batch.

Every model here pads texts on the right only: row 12 refuses the left.
"""

import pytest
import torch

from .cases import cases_for, in_double, largest_error

PER_SAMPLE = ("logits", "image_embeds", "text_embeds", "composed_embeds", "pseudo_words", "pooler_output")


@pytest.mark.parametrize("case", cases_for(3), ids=str)
def test_a_batch_equals_its_samples_one_by_one(case):
    """Each sample is prepared alone too, so that its text is not padded."""
    model = case.build().double()
    raw = {name: value for name, value in case.raw(4).items() if name in case.inputs}
    batch = in_double(case.batch(4))
    with torch.no_grad():
        together = model(**batch)
        alone = [
            model(**in_double(case.batch(1, **{name: [value[i]] for name, value in raw.items()}))) for i in range(4)
        ]
    compared = [name for name in PER_SAMPLE if together.get(name) is not None]
    assert compared
    for name in compared:
        assert largest_error(torch.cat([outputs[name] for outputs in alone]), together[name]) <= 1e-12, name


@pytest.mark.parametrize("case", cases_for(3), ids=str)
def test_order_and_company_do_not_matter(case):
    model, batch = case.build().double(), in_double(case.batch(4))
    order = torch.tensor([2, 0, 3])
    with torch.no_grad():
        together = model(**batch)
        some = model(**{name: value[order] for name, value in batch.items()})
    for name in PER_SAMPLE:
        if together.get(name) is not None:
            assert largest_error(some[name], together[name][order]) <= 1e-12, name


@pytest.mark.parametrize("case", cases_for(3, lambda case: "text" in case.inputs), ids=str)
def test_length_of_padding_does_not_matter(case):
    model, batch = case.build().double(), in_double(case.batch(4))
    padded = dict(batch)
    for name in ("input_ids", "attention_mask", "placeholder_mask"):
        if name in batch:
            padded[name] = torch.cat([batch[name], torch.zeros(4, 3, dtype=batch[name].dtype)], dim=1)
    with torch.no_grad():
        short, long = model(**batch), model(**padded)
    for name in PER_SAMPLE:
        if short.get(name) is not None:
            assert largest_error(long[name], short[name]) <= 1e-12, name


SEVERAL = ["a * over a * and a *", "grey *", "a * on a *", "* and * and *"]
SPLIT = [3, 1, 2, 3]


@pytest.mark.parametrize("case", cases_for(3, lambda case: case.takes("placeholder_mask")), ids=str)
def test_texts_take_their_own_pictures_however_many(case):
    """Three, one, two and three in one batch: as each text alone, and rows in any order."""
    model, images = case.build().double(), case.raw(sum(SPLIT))["images"]
    ends = torch.tensor(SPLIT).cumsum(0).tolist()
    rows = [images[end - number : end] for end, number in zip(ends, SPLIT, strict=True)]

    def composed(order: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = case.batch(len(order), images=[rows[row] for row in order], text=[SEVERAL[row] for row in order])
        assert len(batch["pixel_values"]) == sum(SPLIT[row] for row in order)
        with torch.no_grad():
            outputs = model(**in_double(batch))
        assert (outputs.loss is None) == (len(order) != len(batch["pixel_values"]))
        return outputs.composed_embeds, outputs.image_embeds

    together, pictures = composed([0, 1, 2, 3])
    for embeds in (composed([3, 1, 0, 2])[0], torch.cat([composed([row])[0] for row in (3, 1, 0, 2)])):
        assert largest_error(embeds, together[[3, 1, 0, 2]]) <= 1e-12
    with torch.no_grad():
        features = model.get_image_features(in_double(case.batch(9, images=images, text=["*"] * 9))["pixel_values"])
    embeds = torch.nn.functional.normalize(features.pooler_output, dim=-1)
    assert largest_error(pictures, embeds) <= 1e-12

    other_order = rows[0][::-1]
    batch = in_double(case.batch(1, images=[other_order], text=SEVERAL[:1]))
    with torch.no_grad():
        assert largest_error(model(**batch).composed_embeds, together[:1]) > 1e-3
