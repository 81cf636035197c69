"""Row 5: half precision answers as float32 does, and a cast reaches weights and pixels but no ids."""

import re

import pytest
import torch
from transformers import AutoModel

from .cases import cases_for, logit_scale, trained

BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 5e-3}
LONG = 300  # bfloat16 has no 257

EVERY = pytest.mark.parametrize("case", cases_for(5), ids=str)
WITH_LOSS = pytest.mark.parametrize("case", cases_for(5, lambda case: case.loss), ids=str)
WITH_IMAGES = pytest.mark.parametrize("case", cases_for(5, lambda case: "images" in case.inputs), ids=str)
WITH_POSITIONS = pytest.mark.parametrize("case", cases_for(5, lambda case: case.takes("position_ids")), ids=str)
WITH_PROCESSOR = pytest.mark.parametrize("case", cases_for(5, lambda case: case.has_processor), ids=str)
IN_HALF = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


def answer(case, model, batch) -> dict[str, torch.Tensor]:
    """The compared outputs in float32, of the inputs as they are."""
    case.drawing_alike(model)
    with torch.no_grad():
        return {name: value.float() for name, value in case.read(model(**batch), batch).items()}


def assert_within(bound: float, answers: dict[str, torch.Tensor], references: dict[str, torch.Tensor], model):
    """Errors are taken over the norm of the reference, those of logits of cosines over the scale of the cosines.

    (Random embeddings are nearly orthogonal: over their own maximum, the rounding of a cosine looks large. A tanh does
    the same to single elements. transformers' models err as much there.)
    """
    assert set(answers) == set(references)
    errors = {}
    for name, reference in references.items():
        assert torch.isfinite(answers[name]).all(), name
        difference = answers[name] - reference
        if name.startswith("logits_per"):
            errors[name] = difference.abs().max() / logit_scale(model)
        else:
            errors[name] = difference.norm() / reference.norm()
    assert max(errors.values()) <= bound, errors


def floating_dtypes(model) -> set[torch.dtype]:
    """Of all parameters and buffers but what transformers' own language models keep in float32 when they are opened:
    rotary frequencies, and of T5 in float16 the last layer of each MLP."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = re.compile(r"^language_model\..*(inv_freq$|\.wo\.)")
    return {tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point() and not kept.match(name)}


def prepared(case):
    """What the processor returns for three samples."""
    raw = {name: value for name, value in case.raw(3).items() if name in case.inputs}
    return case.preparer(**raw, return_tensors="pt", **({"padding": True} if case.inputs == ("text",) else {}))


@EVERY
@IN_HALF
def test_a_cast_model_answers_as_in_float32(case, dtype):
    """F14, F18: the pictures are the processor's, in float32."""
    batch = case.batch(3)
    reference = answer(case, case.build(), batch)
    assert_within(BOUNDS[dtype], answer(case, case.build().to(dtype), batch), reference, case.build())


@EVERY
@IN_HALF
def test_a_model_opened_in_half_precision_is_the_cast_one(case, dtype, tmp_path):
    case.build().save_pretrained(tmp_path)
    model, cast, batch = case.auto_class.from_pretrained(tmp_path, dtype=dtype), case.build().to(dtype), case.batch(3)
    assert model.dtype == model.config.dtype == dtype
    assert floating_dtypes(model) == floating_dtypes(cast) == {dtype}
    expected, answers = answer(case, cast, batch), answer(case, model, batch)
    if case.speaks:  # see floating_dtypes
        assert_within(BOUNDS[dtype], answers, answer(case, case.build(), batch), model)
        return
    for name, value in answers.items():
        assert torch.equal(value, expected[name]), name


@EVERY
@IN_HALF
def test_a_folder_opens_in_the_dtype_it_was_saved_in(case, dtype, tmp_path):
    saved = case.build().to(dtype)
    saved.save_pretrained(tmp_path)
    model = case.auto_class.from_pretrained(tmp_path)
    assert floating_dtypes(model) == {dtype}
    weights = saved.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert floating_dtypes(case.auto_class.from_pretrained(tmp_path, dtype=torch.float32)) == {torch.float32}


@EVERY
@IN_HALF
def test_a_model_made_from_its_config_has_the_dtype_asked_for(case, dtype):
    model = AutoModel.from_config(case.config(), dtype=dtype)
    assert floating_dtypes(model) == {dtype}
    assert torch.get_default_dtype() == torch.float32


@WITH_IMAGES
@IN_HALF
def test_float32_pictures_are_cast_to_the_weights(case, dtype):
    """F14: a cast batch and the processor's own float32 are the same to a model in half precision."""
    model, batch = case.build().to(dtype), case.batch(3)
    assert batch["pixel_values"].dtype == torch.float32
    cast = answer(case, model, {**batch, "pixel_values": batch["pixel_values"].to(dtype)})
    for name, value in answer(case, model, batch).items():
        assert torch.equal(value, cast[name]), name


@WITH_PROCESSOR
@IN_HALF
def test_a_cast_of_the_batch_reaches_pixels_alone(case, dtype):
    """F14: ids, masks and positions stay whole numbers, also those that half precision does not have."""
    batch = prepared(case)
    batch["position_ids"] = torch.arange(LONG)[None]
    original = {name: value.clone() for name, value in batch.items()}
    cast = batch.to(dtype)
    assert set(cast) == set(original)
    for name, value in cast.items():
        if original[name].is_floating_point():
            assert name == "pixel_values"
            assert torch.equal(value, original[name].to(dtype))
        else:
            assert value.dtype == original[name].dtype in (torch.int64, torch.bool)
            assert torch.equal(value, original[name]), name


@WITH_POSITIONS
def test_long_positions_are_exact_in_bfloat16(case):
    """F14: rounded to bfloat16, position 257 would be 256."""
    config = case.config()
    config.get_text_config().max_position_embeddings = LONG
    model, batch = case.model_class(config).eval().to(torch.bfloat16), case.batch(1)
    end = batch["input_ids"].max()
    batch["input_ids"] = torch.cat([torch.full((1, LONG - 1), 5), end.view(1, 1)], dim=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    expected, positions = answer(case, model, batch), torch.arange(LONG)[None]
    given = answer(case, model, {**batch, "position_ids": positions})
    assert all(torch.equal(given[name], value) for name, value in expected.items())
    rounded = positions.to(torch.bfloat16).long().clamp(max=LONG - 1)
    wrong = answer(case, model, {**batch, "position_ids": rounded})
    assert any(not torch.equal(wrong[name], value) for name, value in expected.items())


@EVERY
def test_autocast_answers_as_float32_does(case):
    model, batch = case.build(), case.batch(3)
    reference = answer(case, model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_within(BOUNDS[torch.bfloat16], answer(case, model, batch), reference, model)


@WITH_LOSS
def test_autocast_trains_on_a_float32_loss(case):
    model, batch = case.build().train(), case.batch(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    assert loss.dtype == torch.float32
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in trained(model).items()}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
