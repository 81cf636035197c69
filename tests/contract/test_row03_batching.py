"""Row 3: a sample answers the same alone and in a batch.

CLIP's texts are padded on the right only: row 12 refuses the left. BLIP-2's may be padded on either side.
"""

import pytest
import torch

from .cases import cases_for, in_double, largest_error

PER_SAMPLE = (
    "logits",
    "image_embeds",
    "text_embeds",
    "composed_embeds",
    "pseudo_words",
    "pooler_output",
    "soft_tokens",
)
PER_SAMPLE += ("text_hidden_state",)
PADDED = ("input_ids", "attention_mask", "placeholder_mask")
BOTH_SIDES = pytest.mark.parametrize(
    "case", cases_for(3, lambda case: case.model_type.startswith("mm_blip2")), ids=str
)
SPEAKING = pytest.mark.parametrize("case", cases_for(3, lambda case: case.speaks), ids=str)


def samples(case, outputs, batch) -> dict[str, list[torch.Tensor]]:
    """Of each output over samples one tensor a sample, without padding."""
    places = case.places(batch)
    read = {name: list(outputs[name]) for name in PER_SAMPLE if outputs.get(name) is not None}
    if not read or case.takes("encoder_hidden_states"):
        read["last_hidden_state"] = list(outputs["last_hidden_state"])
    return {
        name: [row[kept.bool()] for row, kept in zip(rows, places[name], strict=True)] if name in places else rows
        for name, rows in read.items()
    }


def assert_close(ours: dict[str, list[torch.Tensor]], expected: dict[str, list[torch.Tensor]], bound: float = 1e-12):
    assert set(ours) == set(expected)
    for name, rows in expected.items():
        for row, reference in zip(ours[name], rows, strict=True):
            assert largest_error(row, reference) <= bound, name


@pytest.mark.parametrize("case", cases_for(3), ids=str)
def test_a_batch_equals_its_samples_one_by_one(case):
    """Each sample is prepared alone too, so that its text is not padded."""
    model = case.build().double()
    raw = {name: value for name, value in case.raw(4).items() if name in case.inputs}
    batch = in_double(case.batch(4))
    with torch.no_grad():
        together = model(**batch)
        expected = samples(case, together, batch)
        for i in range(4):
            one = in_double(case.batch(1, **{name: [value[i]] for name, value in raw.items()}))
            assert_close(samples(case, model(**one), one), {name: [rows[i]] for name, rows in expected.items()})


@pytest.mark.parametrize("case", cases_for(3), ids=str)
def test_order_and_company_do_not_matter(case):
    model, batch = case.build().double(), in_double(case.batch(4))
    order = torch.tensor([2, 0, 3])
    with torch.no_grad():
        expected = samples(case, model(**batch), batch)
        chosen = {name: value[order] for name, value in batch.items()}
        some = samples(case, model(**chosen), chosen)
    assert_close(some, {name: [rows[row] for row in order] for name, rows in expected.items()})


@pytest.mark.parametrize("case", cases_for(3, lambda case: "text" in case.inputs), ids=str)
def test_length_of_padding_does_not_matter(case):
    model, batch = case.build().double(), in_double(case.batch(4))
    padded = dict(batch)
    for name in PADDED:
        if name in batch:
            padded[name] = torch.cat([batch[name], torch.zeros(4, 3, dtype=batch[name].dtype)], dim=1)
    if case.speaks:
        padded["labels"] = torch.nn.functional.pad(batch["labels"], (0, 3), value=-100)
    with torch.no_grad():
        assert_close(samples(case, model(**padded), padded), samples(case, model(**batch), batch))


@BOTH_SIDES
def test_padding_on_the_left_equals_padding_on_the_right(case):
    """Rows of several lengths, rolled until their padding stands first; what stands there is no matter either."""
    model, batch = case.build().double(), in_double(case.batch(4))
    mask = batch.get("attention_mask", torch.ones(4, 1, dtype=torch.long))
    assert "text" not in case.inputs or len(set(mask.sum(1).tolist())) > 1
    columns = mask.argsort(dim=1, stable=True)
    left = {name: value.gather(1, columns) if name in PADDED else value for name, value in batch.items()}
    if "input_ids" in left:
        left["input_ids"] = left["input_ids"].masked_fill(left["attention_mask"] == 0, 5)
    if case.speaks and not case.config().is_encoder_decoder:
        left["labels"] = batch["labels"].gather(1, columns)
    with torch.no_grad():
        right_outputs, left_outputs = model(**batch), model(**left)
        expected = samples(case, right_outputs, batch)
    assert_close(samples(case, left_outputs, left), expected, bound=1e-9)
    if case.loss:
        assert left_outputs.loss == pytest.approx(right_outputs.loss.item(), rel=1e-9)
        model.train()
        losses = [model(**inputs).loss.item() for inputs in (left, batch)]
        assert losses == pytest.approx([right_outputs.loss.item()] * 2, rel=1e-9)


TOLD = ["<image> over a <image> and a <image>", "grey", "what is <image> it <image>", "a drawing of what"]
HOW_MANY = [3, 0, 2, 1]


@SPEAKING
def test_texts_take_their_own_pictures_wherever_they_stand(case):
    """Three, none, two and one in one batch: as each text alone, and rows in any order."""
    model, images = case.build().double(), case.raw(sum(HOW_MANY))["images"]
    ends = torch.tensor(HOW_MANY).cumsum(0).tolist()
    rows = [images[end - number : end] for end, number in zip(ends, HOW_MANY, strict=True)]

    def said(order: list[int], **changed) -> dict[str, list[torch.Tensor]]:
        raw = {"images": rows, "text": TOLD, "suffix": case.suffixes}
        chosen = {name: [values[row] for row in order] for name, values in raw.items()}
        batch = in_double(case.batch(len(order), **{**chosen, **changed}))
        with torch.no_grad():
            return {"logits": samples(case, model(**batch), batch)["logits"]}

    together = said([0, 1, 2, 3])["logits"]
    assert_close(said([3, 1, 0, 2]), {"logits": [together[row] for row in (3, 1, 0, 2)]})
    for row in range(4):
        assert_close(said([row]), {"logits": [together[row]]})
    turned = said([0], images=[rows[0][::-1]])["logits"]
    assert largest_error(turned[0], together[0]) > 1e-3


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
