"""Row 3: a sample answers the same alone and in a batch.

Every model here takes one picture a sample, and pads texts on the right only: row 12 refuses the left.
"""

import pytest
import torch

from .cases import cases_for, in_double, largest_error

PER_SAMPLE = ("logits", "image_embeds", "text_embeds", "pooler_output")


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
    for name, filler in (("input_ids", 0), ("attention_mask", 0)):
        filling = torch.full((4, 3), filler)
        padded[name] = torch.cat([batch[name], filling], dim=1)
    with torch.no_grad():
        short, long = model(**batch), model(**padded)
    for name in PER_SAMPLE:
        if short.get(name) is not None:
            assert largest_error(long[name], short[name]) <= 1e-12, name
