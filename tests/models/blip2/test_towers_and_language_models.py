"""Stage 2 with any tower and any language model, held to the language model by itself, fed by hand."""

import pytest
import torch
from small import LANGUAGE_MODELS, SLOT, TOWERS, feed, pictures, slots, stage2
from torch.nn.functional import cross_entropy

PAIRS = [(tower, name) for tower in TOWERS for name in ("llama", "t5")]
PAIRS += [("mm_clip_vision", name) for name in LANGUAGE_MODELS if name not in ("llama", "t5")]
ROWS = [[0, *slots(), 5, 6], [9, 10, 11], [*slots(), 12, *slots(), 13, 14]]


def embedded_by_hand(model, input_ids: torch.Tensor, soft_tokens: torch.Tensor) -> torch.Tensor:
    """Every word looked up by the language model's embedding, every slot filled from the soft tokens, one by one."""
    table = model.language_model.get_input_embeddings()
    soft = iter(soft_tokens.flatten(0, 1))
    rows = [
        torch.stack([next(soft) if token == SLOT else table(torch.tensor([token]))[0] for token in row])
        for row in input_ids.tolist()
    ]
    assert next(soft, None) is None
    return torch.stack(rows)


def by_hand(model, batch: dict, images: torch.Tensor, **asked):
    soft_tokens = model.get_image_features(images).pooler_output
    embeds = embedded_by_hand(model, batch["input_ids"], soft_tokens)
    return model.language_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], **asked)


@pytest.mark.parametrize(("tower", "name"), PAIRS)
@torch.no_grad()
def test_logits_and_loss_are_those_of_the_language_model_fed_by_hand(tower, name):
    model = stage2(tower, name)
    images, batch = pictures(3, tower), feed(model, ROWS)

    outputs = model(**batch, pixel_values=images)
    expected = by_hand(model, batch, images, labels=batch["labels"])

    kept = batch["attention_mask"] == 1
    if model.config.is_encoder_decoder:
        kept = torch.ones_like(batch["labels"], dtype=torch.bool)
    assert outputs.logits.shape == expected.logits.shape
    assert (outputs.logits - expected.logits)[kept].abs().max() <= 1e-6 * expected.logits.abs().max()
    assert torch.allclose(outputs.loss, expected.loss, rtol=1e-6)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_pictures_and_words_change_the_logits(name):
    model = stage2(language_model=name)
    images, batch = pictures(3), feed(model, ROWS)
    reference = model(**batch, pixel_values=images).logits
    other_picture = model(**batch, pixel_values=pictures(3, seed=6)).logits
    changed = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == 12, 20)}
    other_word = model(**changed, pixel_values=images).logits

    assert (reference - other_picture).abs().max() > 1e-4
    assert (reference - other_word).abs().max() > 1e-4
    assert torch.equal(reference[1], other_picture[1])


@pytest.mark.parametrize("name", [name for name in LANGUAGE_MODELS if name not in ("t5", "bart")])
@torch.no_grad()
def test_loss_is_that_of_the_equation(name):
    """Mean over words of -log p(word | what stands before it)."""
    model = stage2(language_model=name).double()
    images, batch = pictures(3).double(), feed(model, ROWS)

    logits = by_hand(model, batch, images).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)

    assert torch.allclose(model(**batch, pixel_values=images).loss, expected, rtol=1e-12)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_equals_its_rows(name, side):
    """But for BART on the left, whose encoder counts its places from the first one, padding or not."""
    if (name, side) == ("bart", "left"):
        pytest.skip("BART's encoder takes padding on the right alone")
    model = stage2(language_model=name)
    images = pictures(3)
    per_row = [images[:1], None, images[1:]]
    batch = feed(model, ROWS, side)
    outputs = model(**batch, pixel_values=images)
    for row, ids in enumerate(ROWS):
        labels = batch["labels"][row]
        alone = {"input_ids": torch.tensor([ids]), "labels": labels[None]}
        if not model.config.is_encoder_decoder:
            alone["labels"] = torch.tensor([[-100 if token == SLOT else token for token in ids]])
        single = model(**alone, pixel_values=per_row[row])
        kept = outputs.logits[row]
        if not model.config.is_encoder_decoder:
            kept = kept[batch["attention_mask"][row] == 1]
        assert torch.allclose(kept, single.logits[0], rtol=0, atol=1e-5 * single.logits.abs().max())


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_training_step_reaches_everything_but_tower_and_language_model(name):
    model = stage2(language_model=name).train()
    batch = feed(model, ROWS)
    model(**batch, pixel_values=pictures(3)).loss.backward()

    for parameter_name, parameter in model.named_parameters():
        frozen = parameter_name.startswith(("vision_tower.", "language_model."))
        assert parameter.requires_grad is not frozen, parameter_name
        if not frozen and not parameter_name.endswith("k_proj.bias"):  # softmax is blind to what all keys share
            assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_trains_as_it_evaluates(name):
    """Without dropout, gradients too: with labels alone the product with the vocabulary is computed at these."""
    model = stage2(language_model=name).double()
    batch, images = feed(model, ROWS), pictures(3).double()
    logits, labels = by_hand(model, batch, images, labels=batch["labels"]).logits, batch["labels"]
    if not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()
    expected = model.language_projection.weight.grad.clone(), model.qformer.embeddings.query_tokens.grad.clone()
    model.zero_grad()
    loss = model(**batch, pixel_values=images).loss
    model.train()
    trained = model(**batch, pixel_values=images).loss
    trained.backward()

    assert torch.allclose(trained, loss, rtol=1e-12)
    assert torch.allclose(model.language_projection.weight.grad, expected[0], rtol=1e-9, atol=1e-14)
    assert torch.allclose(model.qformer.embeddings.query_tokens.grad, expected[1], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_generates_as_without_a_cache(name):
    model = stage2(language_model=name)
    batch = feed(model, ROWS, "right" if model.config.is_encoder_decoder else "left")
    del batch["labels"]
    asked = {**batch, "pixel_values": pictures(3), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(**asked)
    uncached = model.generate(**asked, use_cache=False)

    prompt = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    assert cached.shape == (3, prompt + 6)
    assert torch.equal(cached, uncached)
    if not model.config.is_encoder_decoder:
        assert torch.equal(cached[:, :prompt], batch["input_ids"])


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_greedy_ids_are_the_argmax_fed_back_by_hand(name):
    model = stage2(language_model=name).double()
    row, images = ROWS[2], pictures(2).double()
    generated = model.generate(
        input_ids=torch.tensor([row]), pixel_values=images, max_new_tokens=4, min_new_tokens=4, do_sample=False
    )[0].tolist()

    ids = [model.language_model.config.decoder_start_token_id] if model.config.is_encoder_decoder else list(row)
    for _ in range(4):
        if model.config.is_encoder_decoder:
            batch = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            logits = by_hand(model, batch, images, decoder_input_ids=torch.tensor([ids])).logits
        else:
            batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            logits = by_hand(model, batch, images).logits
        logits[..., 2] = -float("inf")  # the end, which min_new_tokens forbids
        ids.append(logits[0, -1].argmax().item())

    assert generated == ids


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_features_stand_in_for_pictures(tower):
    model = stage2(tower)
    images, batch = pictures(3, tower), feed(model, ROWS)
    features = model.vision_features(images)

    from_pictures, from_features = model(**batch, pixel_values=images), model(**batch, vision_features=features)
    assert torch.equal(from_pictures.logits, from_features.logits)
    assert torch.equal(from_pictures.loss, from_features.loss)
