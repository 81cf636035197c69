"""Stage 2: held to transformers' BLIP-2, to its own rows one by one, and to what its docstrings promise."""

import pytest
import torch
from small import (
    QUERIES,
    SLOT,
    batch_of,
    feed,
    labels_of,
    lively,
    pictures,
    places_read,
    slots,
    stage2,
    text_config,
)
from transformers import Blip2Config, Blip2ForConditionalGeneration, Trainer, TrainingArguments
from transformers.generation.streamers import BaseStreamer

from hf_mm.composite import language_model
from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config
from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration

TWO_TEXT_ONE = [[*slots(), 0, 5, 6, *slots(), 7, 8], [9, 10, 11, 12], [0, *slots(), 13, 14]]
DECODERS = ["opt", "llama", "gpt2"]
FAMILIES = [*DECODERS, "t5"]


# --- parity with transformers ---

# A prefix of ours, then of theirs; what follows is called alike.
TOWER = {
    "embeddings.patch_embeddings": "embeddings.patch_embedding",
    "encoder.layers.{i}.layer_norm1": "encoder.layers.{i}.layer_norm1",
    "encoder.layers.{i}.layer_norm2": "encoder.layers.{i}.layer_norm2",
    "encoder.layers.{i}.self_attn.out_proj": "encoder.layers.{i}.self_attn.projection",
    "encoder.layers.{i}.mlp.fc1": "encoder.layers.{i}.mlp.fc1",
    "encoder.layers.{i}.mlp.fc2": "encoder.layers.{i}.mlp.fc2",
}
QFORMER = {
    "layers.{i}.self_attn.q_proj": "encoder.layer.{i}.attention.attention.query",
    "layers.{i}.self_attn.k_proj": "encoder.layer.{i}.attention.attention.key",
    "layers.{i}.self_attn.v_proj": "encoder.layer.{i}.attention.attention.value",
    "layers.{i}.self_attn.out_proj": "encoder.layer.{i}.attention.output.dense",
    "layers.{i}.self_attn_layer_norm": "encoder.layer.{i}.attention.output.LayerNorm",
    "layers.{i}.query_mlp.fc1": "encoder.layer.{i}.intermediate_query.dense",
    "layers.{i}.query_mlp.fc2": "encoder.layer.{i}.output_query.dense",
    "layers.{i}.query_layer_norm": "encoder.layer.{i}.output_query.LayerNorm",
}
CROSS = {
    "layers.{i}.cross_attn.q_proj": "encoder.layer.{i}.crossattention.attention.query",
    "layers.{i}.cross_attn.k_proj": "encoder.layer.{i}.crossattention.attention.key",
    "layers.{i}.cross_attn.v_proj": "encoder.layer.{i}.crossattention.attention.value",
    "layers.{i}.cross_attn.out_proj": "encoder.layer.{i}.crossattention.output.dense",
    "layers.{i}.cross_attn_layer_norm": "encoder.layer.{i}.crossattention.output.LayerNorm",
}
LAYERS = 3


def state_from_theirs(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of transformers' model under our names. Every one of theirs is used once, or this raises."""
    theirs = dict(theirs)
    ours = {
        "vision_tower.embeddings.cls_token": theirs.pop("vision_model.embeddings.class_embedding"),
        "vision_tower.embeddings.position_embeddings": theirs.pop("vision_model.embeddings.position_embedding"),
        "qformer.embeddings.query_tokens": theirs.pop("query_tokens"),
    }

    def move(mine: str, other: str) -> None:
        for end in ("weight", "bias"):
            ours[f"{mine}.{end}"] = theirs.pop(f"{other}.{end}")

    for layer in range(LAYERS):
        attention = f"vision_model.encoder.layers.{layer}.self_attn.qkv"
        weights, biases = theirs.pop(f"{attention}.weight").chunk(3), theirs.pop(f"{attention}.bias").chunk(3)
        assert not biases[1].any()
        for name, weight, bias in zip("qkv", weights, biases, strict=True):
            ours[f"vision_tower.encoder.layers.{layer}.self_attn.{name}_proj.weight"] = weight
            if name != "k":
                ours[f"vision_tower.encoder.layers.{layer}.self_attn.{name}_proj.bias"] = bias
        for table, prefixes in ((TOWER, ("vision_tower", "vision_model")), (QFORMER, ("qformer", "qformer"))):
            for mine, other in table.items():
                if "{i}" in mine:
                    move(f"{prefixes[0]}.{mine.format(i=layer)}", f"{prefixes[1]}.{other.format(i=layer)}")
        if layer % 2 == 0:
            for mine, other in CROSS.items():
                move(f"qformer.{mine.format(i=layer)}", f"qformer.{other.format(i=layer)}")
    move("vision_tower.embeddings.patch_embeddings", "vision_model.embeddings.patch_embedding")
    move("vision_norm", "vision_model.post_layernorm")
    move("qformer.embeddings.layer_norm", "qformer.layernorm")
    move("language_projection", "language_projection")
    for name in [name for name in theirs if name.startswith("language_model.")]:
        ours[name] = theirs.pop(name)
    assert not theirs, sorted(theirs)
    return ours


def both(name: str) -> tuple[MMBlip2ForConditionalGeneration, Blip2ForConditionalGeneration]:
    """Ours and transformers' with the same weights, in float64."""
    tower = {"hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 40}
    tower |= {"image_size": 28, "patch_size": 14, "layer_norm_eps": 1e-5}
    qformer = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24}
    text = text_config(name).to_dict()
    config = Blip2Config(
        vision_config={**tower, "initializer_range": 0.02},
        qformer_config={**qformer, "encoder_hidden_size": 24, "vocab_size": 40},
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=63,
    )
    theirs = lively(Blip2ForConditionalGeneration(config))
    for layer in theirs.vision_model.encoder.layers:
        layer.self_attn.qkv.bias.data.view(3, -1)[1] = 0  # EVA's keys have no bias
    config = MMBlip2Config(
        vision_config={"model_type": "eva_vit", **tower},
        qformer_config={**qformer, "num_query_tokens": QUERIES, "use_text": False},
        text_config=text,
        vision_norm_eps=1e-5,
        image_token_id=63,
    )
    ours = MMBlip2ForConditionalGeneration(config)
    ours.load_state_dict(state_from_theirs(theirs.state_dict()), strict=True)
    return ours.double().eval(), theirs.double().eval()


def with_their_slots(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == SLOT, 63)}


def small_pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(2)).double()


@pytest.mark.parametrize("name", ["opt", "llama", "t5"])
@torch.no_grad()
def test_logits_and_loss_are_those_of_transformers(name):
    ours, theirs = both(name)
    batch = with_their_slots(feed(ours, TWO_TEXT_ONE))
    mine, other = ours(**batch, pixel_values=small_pictures(3)), theirs(**batch, pixel_values=small_pictures(3))

    kept = torch.ones_like(batch["labels"], dtype=torch.bool) if name == "t5" else batch["attention_mask"] == 1
    assert (mine.logits - other.logits)[kept].abs().max() < 1e-9 * other.logits.abs().max()
    assert torch.allclose(mine.loss, other.loss.double(), rtol=1e-6)  # theirs is float32


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["opt", "llama", "t5"])
@torch.no_grad()
def test_generates_what_transformers_generates(name, beams):
    ours, theirs = both(name)
    batch = with_their_slots(batch_of([[*slots(), 0, 5, 6], [*slots(), 7], [0, *slots(), 8, 9]], "left"))
    asked = {**batch, "pixel_values": small_pictures(3), "num_beams": beams, "max_new_tokens": 7, "do_sample": False}
    mine, other = ours.generate(**asked), theirs.generate(**asked)

    assert torch.equal(mine, other)


@torch.no_grad()
def test_pictures_alone_begin_as_in_transformers():
    ours, theirs = both("opt")
    mine = ours.generate(pixel_values=small_pictures(2), max_new_tokens=5, do_sample=False)
    assert torch.equal(mine, theirs.generate(pixel_values=small_pictures(2), max_new_tokens=5, do_sample=False))


# --- the loss ---


@pytest.mark.parametrize("name", FAMILIES)
def test_no_label_anywhere_is_a_loss_of_0_with_gradients_of_0(name):
    model = stage2(language_model=name).train()
    batch = feed(model, TWO_TEXT_ONE)
    loss = model(**{**batch, "labels": torch.full_like(batch["labels"], -100)}, pixel_values=pictures(3)).loss
    loss.backward()

    assert loss.item() == 0
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert not parameter.grad.any(), parameter_name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_without_labels_adds_nothing(name, training):
    model = stage2(language_model=name).train(training)
    batch = feed(model, TWO_TEXT_ONE)
    alone = {key: value[:2] for key, value in batch.items()}
    batch["labels"][2] = -100
    together = model(**batch, pixel_values=pictures(3)).loss
    assert torch.allclose(together, model(**alone, pixel_values=pictures(3)[:2]).loss, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_loss_is_over_labels_alone(training):
    """Prompt, slots and padding have none: the loss is the mean over the two answers' tokens."""
    model = stage2().double().train(training)
    batch = batch_of([[*slots(), 0, 5, 6, 7], [0, 9, *slots(), 10]])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, -2:], labels[1, 5] = torch.tensor([6, 7]), 10
    logits = model.eval()(**batch, pixel_values=pictures(2).double()).logits.log_softmax(-1)
    expected = -(logits[0, -3, 6] + logits[0, -2, 7] + logits[1, 4, 10]) / 3

    loss = model.train(training)(**batch, labels=labels, pixel_values=pictures(2).double()).loss
    assert torch.allclose(loss, expected, rtol=1e-10)


@pytest.mark.parametrize("name", FAMILIES)
def test_num_items_in_batch_divides_the_sum(name):
    model = stage2(language_model=name).double().train()
    batch, images = feed(model, TWO_TEXT_ONE), pictures(3).double()
    count = (batch["labels"] != -100).sum()
    if name != "t5":
        count = (batch["labels"][:, 1:] != -100).sum()
    mean = model(**batch, pixel_values=images).loss
    for items in (10 * count, 10 * int(count)):
        assert torch.allclose(
            model(**batch, pixel_values=images, num_items_in_batch=items).loss, mean / 10, rtol=1e-10
        )


def collated(samples: list[dict]) -> dict[str, torch.Tensor]:
    batch = batch_of([sample["ids"] for sample in samples])
    return {**batch, "labels": labels_of(batch), "pixel_values": torch.stack([s["picture"] for s in samples])}


def samples() -> list[dict]:
    images = pictures(4).double()
    counts = (2, 9, 3, 14)
    return [
        {"ids": [*slots(), *range(4, 4 + count)], "picture": image}
        for count, image in zip(counts, images, strict=True)
    ]


def trainer_of(model, folder, **arguments) -> Trainer:
    fields = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    fields |= {"use_cpu": True, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "max_steps": 1}
    fields |= {"disable_tqdm": True, "remove_unused_columns": False}
    options = {name: arguments.pop(name) for name in ("compute_metrics",) if name in arguments}
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**fields, **arguments}),
        train_dataset=samples(),
        eval_dataset=[*samples(), samples()[0]],
        data_collator=collated,
        **options,
    )


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_accumulation_changes_neither_loss_nor_step(name, tmp_path):
    """Parts of 2, 9, 3 and 14 labels."""
    runs = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = trainer_of(
            stage2(language_model=name).double(),
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs.append((losses, trainer.model.state_dict()))
    before = stage2(language_model=name).double().state_dict()
    assert not torch.equal(before["language_projection.weight"], runs[0][1]["language_projection.weight"])
    for losses, state in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-4)  # logged with four digits
        for key, value in runs[0][1].items():
            assert torch.allclose(state[key], value, rtol=1e-9, atol=1e-12), key


@pytest.mark.parametrize("use_cache", [True, False])
def test_evaluation_hands_a_metric_one_array_of_logits(use_cache, tmp_path):
    seen = {}

    def measure(prediction):
        seen.update(logits=prediction.predictions, labels=prediction.label_ids)
        return {"rows": len(prediction.label_ids)}

    model = stage2().double()
    model.language_model.config.use_cache = use_cache
    trainer = trainer_of(model, tmp_path, per_device_eval_batch_size=2, compute_metrics=measure)
    metrics = trainer.evaluate()

    assert not isinstance(seen["logits"], tuple), [getattr(part, "shape", type(part)) for part in seen["logits"]]
    assert seen["logits"].shape == (5, QUERIES + 14, 64)
    assert seen["labels"].shape == (5, QUERIES + 14)
    assert (seen["logits"][4, QUERIES + 2 :] == -100).all()
    assert metrics["eval_loss"] > 0


# --- pictures in their places ---


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_permuted_rows_permute_the_outputs(name):
    model = stage2(language_model=name).double()
    batch, images = feed(model, TWO_TEXT_ONE), pictures(3).double()
    order = torch.tensor([2, 0, 1])
    moved = {key: value[order] for key, value in batch.items()}
    logits = model(**moved, pixel_values=images[[2, 0, 1]]).logits
    assert torch.allclose(logits, model(**batch, pixel_values=images).logits[order], rtol=0, atol=1e-12)


@torch.no_grad()
def test_pictures_fill_their_slots_in_reading_order():
    model = stage2().double()
    images = pictures(3).double()
    singles = [model.get_image_features(image[None]).pooler_output[0] for image in images]
    seen = []
    model.language_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**batch_of(TWO_TEXT_ONE), pixel_values=images)
    for place, soft in (((0, 0), singles[0]), ((0, 6), singles[1]), ((2, 1), singles[2])):
        row, start = place
        assert torch.allclose(seen[0][row, start : start + QUERIES], soft, rtol=0, atol=1e-12)
    table = model.language_model.get_input_embeddings().weight
    assert torch.equal(seen[0][1, :4], table[torch.tensor([9, 10, 11, 12])])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_sees_its_own_pictures_alone(name):
    model = stage2(language_model=name).double().train()
    batch = feed(model, TWO_TEXT_ONE)
    features = model.vision_features(pictures(3).double()).requires_grad_()
    for row, own in ((0, [0, 1]), (1, []), (2, [2])):
        labels = torch.full_like(batch["labels"], -100)
        labels[row] = batch["labels"][row]
        (gradient,) = torch.autograd.grad(
            model(**{**batch, "labels": labels}, vision_features=features).loss, features
        )
        for picture in range(3):
            assert gradient[picture].any() == (picture in own)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_text_without_pictures_is_as_by_itself(name):
    model = stage2(language_model=name)
    batch = feed(model, TWO_TEXT_ONE)
    together = [model(**batch, pixel_values=pictures(3, seed=seed)).logits[1] for seed in (1, 2)]
    alone = {"input_ids": batch["input_ids"][1:2, :4], "labels": batch["labels"][1:2]}
    if name != "t5":
        alone["labels"] = alone["labels"][:, :4]
    single = model(**alone).logits[0]

    assert torch.equal(*together)
    assert torch.allclose(together[0][: len(single)], single, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_question_enters_the_qformer_beside_its_own_picture():
    model = stage2(use_text=True).double()
    batch, images = batch_of(TWO_TEXT_ONE), pictures(3).double()
    question = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0], [1, 8, 9, 2]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])

    def logits(ids, attention_mask=mask):
        questions = {"qformer_input_ids": ids, "qformer_attention_mask": attention_mask}
        return model(**batch, pixel_values=images, **questions).logits

    reference = logits(question)
    other = question.clone()
    other[2, 1] = 20
    padded = question.clone()
    padded[1, 3] = 9
    assert torch.allclose(logits(padded), reference, rtol=0, atol=1e-12)
    assert torch.equal(logits(other)[:2], reference[:2])
    assert (logits(other)[2] - reference[2]).abs().max() > 1e-4
    assert (model(**batch, pixel_values=images).logits - reference).abs().max() > 1e-4


# --- wrong calls ---


def wrong_calls(model) -> dict[str, dict]:
    image, right = pictures(1), batch_of([[*slots(), 5]])
    wide = torch.randn(1, 17, 17)
    return {
        "a slot too many": {**batch_of([[*slots(), SLOT, 5]]), "pixel_values": image},
        "a slot too few": {**batch_of([[*slots()[1:], 5]]), "pixel_values": image},
        "no slot": {**batch_of([[5, 6, 7]]), "pixel_values": image},
        "no picture": right,
        "fewer pictures": {**batch_of([[*slots(2), 5]]), "pixel_values": image},
        "more pictures": {**right, "pixel_values": pictures(2)},
        "rows that do not fit, a total that does": {
            **batch_of([[SLOT, SLOT, 5], [*slots(), SLOT]]),
            "pixel_values": pictures(2),
        },
        "features of another width": {**right, "vision_features": wide},
        "features of another rank": {**right, "vision_features": wide[0]},
        "pictures and features": {**right, "pixel_values": image, "vision_features": model.vision_features(image)},
        "an id beyond the vocabulary": {**batch_of([[*slots(), 64]]), "pixel_values": image},
        "nothing": {},
        "pictures alone": {"pixel_values": image},
        "a question without text in the Q-Former": {
            **right,
            "pixel_values": image,
            "qformer_input_ids": torch.tensor([[1, 2]]),
        },
        "labels of another length": {**right, "pixel_values": image, "labels": torch.tensor([[5, 5]])},
        "labels of slots": {**right, "pixel_values": image, "labels": right["input_ids"]},
        "a label beyond the vocabulary": {**right, "pixel_values": image, "labels": right["input_ids"] * 0 + 64},
        "labels without rows": {**right, "pixel_values": image, "labels": torch.tensor([5])},
        "labels and few logits": {**right, "pixel_values": image, "labels": labels_of(right), "logits_to_keep": 1},
        "a mask of another length": {**right, "pixel_values": image, "attention_mask": torch.ones(1, 2)},
        "rows without tokens": {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
        "no rows": {"input_ids": torch.zeros(0, 4, dtype=torch.long)},
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", list(wrong_calls(stage2())))
def test_a_wrong_call_is_refused_in_a_sentence(case, training):
    model = stage2().train(training)
    with pytest.raises(ValueError, match=r"\w+ \w+ \w+"):
        model(**wrong_calls(model)[case])


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_pictures_by_another_name_are_not_passed_over(name):
    model, words = stage2(language_model=name), batch_of([[5, 6, 7]])
    for wrong in ({"pixel_value": pictures(1)}, {"images": [pictures(1)[0]]}):
        with pytest.raises(TypeError, match="there is no argument '.*': pictures are given as pixel_values"):
            model(**words, labels=words["input_ids"], **wrong)
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            model.generate(**words, **wrong)


def test_texts_are_ids_alone():
    model, embeds = stage2(), torch.randn(1, 3, 24)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="texts are given as input_ids"):
            call(**batch_of([[5, 6, 7]]), inputs_embeds=embeds)


def test_encoder_decoders_refuse_the_labels_of_others():
    """Which stand behind the text, where the encoder reads them."""
    model, batch = stage2(language_model="t5"), batch_of([[*slots(), 5, 6, 7]])
    labels = torch.tensor([[-100] * 4 + [6, 7]])
    with pytest.raises(ValueError, match="an encoder would read what is to be learnt, .* is_encoder_decoder=True"):
        model(**batch, pixel_values=pictures(1), labels=labels)
    others = torch.tensor([[-100] * 4 + [8, 7]])  # the start of what is said is given
    assert model(**batch, pixel_values=pictures(1), labels=others).loss > 0
    none = torch.full((1, 6), -100)  # of a row from which nothing is learnt
    assert model.train()(**batch, pixel_values=pictures(1), labels=none).loss == 0


def test_guidance_is_refused():
    with pytest.raises(ValueError, match="guidance_scale needs a second text"):
        stage2().generate(**batch_of([[*slots(), 5]]), pixel_values=pictures(1), guidance_scale=1.5)


def test_encoder_decoders_refuse_labels_of_other_rows():
    model = stage2(language_model="t5")
    with pytest.raises(ValueError, match=r"labels must be \(texts, tokens\) for 1 texts, but their shape is \(2, 3\)"):
        model(**batch_of([[*slots(), 5]]), pixel_values=pictures(1), labels=torch.full((2, 3), 5))


def test_more_places_than_the_language_model_has_learnt_are_refused():
    model = stage2(language_model="gpt2")
    long = batch_of([[*slots(), *[5] * (129 - QUERIES)]])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="a text has 129 places, pictures included, but gpt2 has learnt 128"):
            call(**long, pixel_values=pictures(1))


@pytest.mark.parametrize("case", ["a slot too many", "no slot", "no picture", "pictures and features", "nothing"])
def test_generate_refuses_it_too(case):
    model = stage2()
    with pytest.raises(ValueError, match=r"\w+ \w+ \w+"):
        model.generate(**wrong_calls(model)[case], max_new_tokens=2)


def test_new_words_do_not_follow_padding():
    with pytest.raises(ValueError, match="left"):
        stage2().generate(**batch_of(PROMPTS, "right"), pixel_values=pictures(3), max_new_tokens=2)


def test_arguments_are_not_written_to():
    model = stage2().train()
    batch = {**feed(model, TWO_TEXT_ONE, "left"), "pixel_values": pictures(3)}
    before = {key: value.clone() for key, value in batch.items()}
    model(**batch).loss.backward()
    del batch["labels"], before["labels"]
    model.generate(**batch, max_new_tokens=2)
    for key, value in before.items():
        assert torch.equal(batch[key], value), key


# --- generation ---

PROMPTS = [[*slots(), 0, 5, 6, *slots(), 7, 8], [0, 9, 10], [0, *slots(), 13]]
OWN = [slice(0, 2), slice(0, 0), slice(2, 3)]


def asked(**fields) -> dict:
    return {"max_new_tokens": 6, "do_sample": False, **fields}


def without_prompt(model, generated: torch.Tensor, prompt: int) -> torch.Tensor:
    return generated[:, 1 if model.config.is_encoder_decoder else prompt :]


def row_alone(model, row: int, images: torch.Tensor, **fields) -> torch.Tensor:
    ids = torch.tensor([PROMPTS[row]])
    own = images[OWN[row]] if len(images[OWN[row]]) else None
    return without_prompt(model, model.generate(input_ids=ids, pixel_values=own, **fields), ids.shape[1])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_generates_what_its_rows_do(name, beams):
    model = stage2(language_model=name).double()
    images, batch = pictures(3).double(), batch_of(PROMPTS, "left")
    fields = asked(num_beams=beams, num_return_sequences=2 if beams > 1 else 1, min_new_tokens=6)
    generated = model.generate(**batch, pixel_values=images, **fields)
    new = without_prompt(model, generated, batch["input_ids"].shape[1])
    singles = torch.cat([row_alone(model, row, images, **fields) for row in range(3)])

    assert new.shape == (3 * fields["num_return_sequences"], 6)
    assert torch.equal(new, singles)
    if beams > 1:
        assert (new[::2] != new[1::2]).any(1).all()
    if name != "t5":
        prompts = batch["input_ids"].repeat_interleave(fields["num_return_sequences"], 0)
        assert torch.equal(generated[:, : prompts.shape[1]], prompts)


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_follow_the_seed(name):
    model = stage2(language_model=name)
    batch = {**batch_of(PROMPTS, "left"), "pixel_values": pictures(3)}
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.generate(**batch, **asked(do_sample=True, num_return_sequences=2, min_new_tokens=6)))
    assert runs[0].shape[0] == 6
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["opt", "t5"])
def test_pictures_are_read_once(name, beams):
    model = stage2(language_model=name)
    calls = []
    model.vision_tower.register_forward_hook(lambda *_: calls.append("tower"))
    model.qformer.register_forward_hook(lambda *_: calls.append("qformer"))
    model.generate(**batch_of(PROMPTS, "left"), pixel_values=pictures(3), **asked(num_beams=beams))
    assert calls == ["tower", "qformer"]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_picture_of_all_texts_is_read_once_in_training(name, monkeypatch):
    """Loss and every gradient are those of the picture repeated."""
    monkeypatch.setattr(language_model, "FEWEST_SPARED", 1)
    model = stage2(language_model=name).double().train()
    batch = feed(model, [[0, *slots(), 5, 6, 7], [0, *slots(), 5, 8, 9], [0, *slots(), 5, 6, 10]])
    picture = model.vision_features(pictures(1).double())
    read, places = [], places_read(model.language_model)
    model.qformer.register_forward_pre_hook(lambda _, args: read.append(len(args[0])))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    results = []
    for features in (picture.repeat(3, 1, 1), picture.expand(3, -1, -1)):
        outputs = model(**batch, vision_features=features)
        gradients = torch.autograd.grad(outputs.loss, trained, allow_unused=True, materialize_grads=True)
        results.append((outputs.loss.detach(), outputs.soft_tokens.detach(), *gradients))
    assert read == [3, 1]
    length = batch["input_ids"].shape[1] - 1
    if name != "t5":
        # The start token alone; with the picture, all before its last query, from which a word is predicted.
        assert places == [1, 3 * (length - 1), QUERIES, 3 * (length - QUERIES)]
    assert max(gradient.abs().max() for gradient in results[0][2:]) > 1e-3
    torch.testing.assert_close(*results, atol=1e-7, rtol=1e-6)  # Llama norms in float32
    model.config.qformer_config.dropout = 0.1  # every text has a draw of its own
    model(**batch, vision_features=picture.expand(3, -1, -1))
    assert read == [3, 1, 3]


@pytest.mark.parametrize("shared", [False, True], ids=["whole", "shared"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_text_costs_is_the_loss_of_it_alone(name, shared, monkeypatch):
    monkeypatch.setattr(language_model, "FEWEST_SPARED", 1 if shared else 1000)
    model = stage2(language_model=name).double().eval()
    rows = [[0, 3, 4, *slots(), 5, 6, 7], [0, 3, 4, *slots(), 8, 9, 11, 2], [0, 3, 4, *slots(), 10]]
    batch, images = feed(model, rows), pictures(3).double()
    if name != "t5":
        batch["labels"][:, :4] = -100  # the words before the pictures are given
    places = places_read(model.language_model)
    costs = model.label_nll(**batch, pixel_values=images)
    length = batch["input_ids"].shape[1] - 1
    assert name == "t5" or places == ([3, 3 * (length - 3)] if shared else [3 * length])
    for row in range(3):
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        loss = model(**alone, pixel_values=images[row : row + 1]).loss
        torch.testing.assert_close(costs[row], loss.float(), atol=1e-6, rtol=1e-6)
    assert costs.unique().numel() == 3
    batch["labels"][1] = -100
    assert model.label_nll(**batch, pixel_values=images).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("name", FAMILIES)
def test_features_stand_in_for_pictures_when_generating(name):
    model = stage2(language_model=name)
    batch, images = batch_of(PROMPTS, "left"), pictures(3)
    features = model.vision_features(images)
    model.vision_tower.register_forward_pre_hook(lambda *_: pytest.fail("the tower ran"))
    from_features = model.generate(**batch, vision_features=features, **asked())
    assert torch.equal(from_features, stage2(language_model=name).generate(**batch, pixel_values=images, **asked()))


@pytest.mark.parametrize("name", FAMILIES)
def test_generates_in_eval_mode_or_not_the_same(name):
    model = stage2(language_model=name)
    batch = {**batch_of(PROMPTS, "left"), "pixel_values": pictures(3)}
    reference = model.generate(**batch, **asked())
    assert torch.equal(model.train().generate(**batch, **asked()), reference)


def first_new(model, row: int) -> list[int]:
    return row_alone(model, row, pictures(3).double(), **asked(max_new_tokens=8, min_new_tokens=8))[0].tolist()


def ends_row_0_early(model) -> list[int]:
    """What every beam of row 0 says second."""
    beams = asked(max_new_tokens=2, min_new_tokens=2, num_beams=3, num_return_sequences=3)
    return sorted({*row_alone(model, 0, pictures(3).double(), **beams)[:, 1].tolist(), first_new(model, 0)[1]})


@pytest.mark.parametrize("pad", [None, 33])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["opt", "llama", "t5"])
def test_a_row_that_ends_early_is_padded_and_unchanged(name, beams, pad):
    """The language model's own id for padding is none, or another than that of the call."""
    model = stage2(language_model=name).double()
    eos = ends_row_0_early(model)
    model.language_model.config.pad_token_id = None if pad is None else 1
    model.language_model.generation_config.pad_token_id = model.language_model.config.pad_token_id
    fields = asked(
        num_beams=beams,
        max_new_tokens=8,
        eos_token_id=eos,
        early_stopping=beams > 1,
        **({"pad_token_id": pad} if pad else {}),
    )
    batch, images = batch_of(PROMPTS, "left"), pictures(3).double()
    new = without_prompt(model, model.generate(**batch, pixel_values=images, **fields), batch["input_ids"].shape[1])

    filler = pad or eos[0]
    early = 0
    for row in range(3):
        single = row_alone(model, row, images, **fields)[0]
        assert torch.equal(new[row, : len(single)], single)
        rest = new[row, len(single) :]
        assert all(token == filler for token in rest.tolist())
        early += len(rest) > 0
    assert early


@pytest.mark.parametrize("name", ["opt", "llama", "t5"])
def test_a_list_of_ends_stops_at_the_first(name):
    model = stage2(language_model=name).double()
    said = first_new(model, 0)
    images = pictures(3).double()
    new = row_alone(model, 0, images, **asked(max_new_tokens=8, eos_token_id=[said[3], said[2]]))[0].tolist()
    assert new == said[: min(said.index(said[3]), said.index(said[2])) + 1]
    held = row_alone(model, 0, images, **asked(max_new_tokens=8, min_new_tokens=8, eos_token_id=[said[3], said[2]]))
    assert held.shape[1] == 8
    assert not {said[2], said[3]} & set(held[0, :7].tolist())


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_pictures_alone_begin_with_the_first_token(name):
    model = stage2(language_model=name)
    alone = model.generate(pixel_values=pictures(2), **asked())
    ids = torch.tensor([[*slots(), 0]] * 2)
    assert torch.equal(alone, model.generate(input_ids=ids, pixel_values=pictures(2), **asked()))
    features = model.vision_features(pictures(2))
    assert torch.equal(alone, model.generate(vision_features=features, **asked()))


def test_an_encoder_reads_pictures_and_the_end():
    """As in the published T5, whose `bos_token_id` is the end of its texts."""
    model, logits = stage2(language_model="t5"), asked(return_dict_in_generate=True, output_logits=True)
    ids = torch.tensor([[*slots(), 2]] * 2)
    alone = model.generate(pixel_values=pictures(2), **logits).logits
    assert torch.equal(torch.stack(alone), torch.stack(model.generate(ids, pictures(2), **logits).logits))


class Collects(BaseStreamer):
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value: torch.Tensor):
        self.parts.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("name", FAMILIES)
def test_a_streamer_gets_every_new_token(name):
    model, streamer = stage2(language_model=name).double(), Collects()
    new = row_alone(model, 2, pictures(3).double(), **asked(streamer=streamer))[0].tolist()
    assert [token for part in streamer.parts[1:] for token in part] == new
    assert streamer.ended


def test_max_length_counts_the_prompt():
    model = stage2()
    batch = {**batch_of(PROMPTS, "left"), "pixel_values": pictures(3)}
    longest = batch["input_ids"].shape[1] + 4
    generated = model.generate(**batch, max_length=longest, min_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(**batch, **asked(max_new_tokens=4, min_new_tokens=4)))


def test_generate_gives_scores_and_sequences_where_asked():
    model = stage2()
    batch = {**batch_of(PROMPTS, "left"), "pixel_values": pictures(3)}
    outputs = model.generate(**batch, **asked(return_dict_in_generate=True, output_scores=True))
    assert torch.equal(outputs.sequences, model.generate(**batch, **asked()))
    assert len(outputs.scores) == outputs.sequences.shape[1] - batch["input_ids"].shape[1]


def test_a_filled_cache_is_refused():
    model = stage2()
    ids = torch.tensor([[5, 6]])
    cache = model.language_model(input_ids=ids, use_cache=True).cache
    with pytest.raises(ValueError, match="takes no cache: call generate"):
        model(input_ids=ids, cache=cache)


def test_a_batch_without_pictures_trains():
    """Its gradients are zero: on one rank of several it must not stop the others."""
    model = stage2().train()
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)


# --- compiled ---


@torch.no_grad()
def test_a_compiled_model_passes_over_no_picture():
    model, image = stage2(), pictures(1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(**batch_of([[*slots(), 5]]), pixel_values=image)
    with pytest.raises(RuntimeError, match="the text has not as many slots as there are soft tokens"):
        compiled(**batch_of([[5, 6, 7, 8]]), pixel_values=image)
    with pytest.raises(RuntimeError, match="a text has slots of a picture in part: 3 are one"):
        compiled(**batch_of([[SLOT, SLOT, 5, 6], [SLOT, 5, 6, 7]]), pixel_values=image)
