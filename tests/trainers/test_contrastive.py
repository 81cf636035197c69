"""The contrastive trainer: what it optimises, logs, keeps and refuses."""

import copy
import math

import pytest
import torch
from toy_run import Pairs, tiny_clip, toy_trainer
from transformers import AutoModel, AutoProcessor

from hf_mm.losses.contrastive import image_text_contrastive_loss, supervised_contrastive_loss
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.processing_clip import MMClipProcessor
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer
from hf_mm.trainers.callbacks import MAX_LOGIT_SCALE, ClampLogitScale, find_logit_scale
from hf_mm.trainers.contrastive import ContrastiveTrainer, ContrastiveTrainingArguments
from hf_mm.trainers.optim import decay_parameter_names


def collate(samples):
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def without_dropout(model):
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    return model


def test_loss_is_the_sum_of_both_terms(tmp_path):
    trainer = toy_trainer(str(tmp_path))
    model = without_dropout(trainer.model.train())
    batch = collate([Pairs()[i] for i in range(8)])
    loss = trainer.compute_loss(model, batch)
    outputs = model.eval()(**batch)
    scale = model.logit_scale.exp()
    expected = image_text_contrastive_loss(outputs.image_embeds, outputs.text_embeds, scale, batch["image_ids"])
    expected = expected + 0.5 * supervised_contrastive_loss(outputs.image_embeds, batch["image_ids"], 0.1)
    torch.testing.assert_close(loss, expected)


def test_labels_are_sorted_by_their_texts_and_logged_apart(tmp_path):
    """The third term is zero-shot classification among the texts of the batch's labels; each term is logged as it is."""
    trainer = toy_trainer(str(tmp_path), label_loss_weight=2.0)
    batch = collate([Pairs()[i] for i in range(8)])
    classes = Pairs()[20]["input_ids"][None].repeat(3, 1)
    classes[:, 2] = torch.arange(3)
    batch["labels"] = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
    model = without_dropout(trainer.model.train())
    loss = trainer.compute_loss(model, {**batch, "label_input_ids": classes, "label_attention_mask": None})

    outputs = model(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"], image_ids=batch["image_ids"])
    texts = torch.nn.functional.normalize(model.get_text_features(classes).pooler_output, dim=-1)
    logits = model.logit_scale.exp() * outputs.image_embeds @ texts.T
    label_loss = -logits.log_softmax(dim=1).gather(1, batch["labels"][:, None]).mean()
    view_loss = supervised_contrastive_loss(outputs.image_embeds, batch["image_ids"], 0.1)
    torch.testing.assert_close(loss, outputs.loss + 2.0 * label_loss + 0.5 * view_loss)
    trainer.log(logs := {"loss": loss.item()})
    expected = {"contrastive_loss": outputs.loss, "label_loss": label_loss, "view_loss": view_loss}
    assert {name: logs[name] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, abs=1e-3
    )


def test_a_weight_for_labels_needs_labels(tmp_path):
    trainer = toy_trainer(str(tmp_path), label_loss_weight=1.0)
    with pytest.raises(ValueError, match="labels in every batch"):
        trainer.compute_loss(trainer.model.train(), collate([Pairs()[i] for i in range(8)]))


def test_raw_columns_reach_the_collator(tmp_path):
    """F05: the trainer's own arguments never drop the columns of raw pictures."""
    arguments = ContrastiveTrainingArguments(output_dir=str(tmp_path), use_cpu=True, remove_unused_columns=True)
    assert not arguments.remove_unused_columns


def test_matrices_decay_and_nothing_else():
    model = tiny_clip()
    decayed = set(decay_parameter_names(model))
    assert {"visual_projection.weight", "text_model.embeddings.token_embedding.weight"} <= decayed
    kept = {name for name, _ in model.named_parameters()} - decayed
    assert "logit_scale" in kept
    assert "vision_model.embeddings.class_embedding" in kept
    assert {name for name in kept if "position_embedding" in name} == {
        "text_model.embeddings.position_embedding.weight",
        "vision_model.embeddings.position_embedding.weight",
    }
    assert all(name.endswith(".bias") or "norm" in name or "embedding" in name for name in kept - {"logit_scale"})


def test_optimizer_groups_follow_the_rule(tmp_path):
    trainer = toy_trainer(str(tmp_path), weight_decay=0.3)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    decay = {group["weight_decay"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}
    assert decay[0.3] == set(decay_parameter_names(trainer.model))
    assert decay[0.0] == set(names.values()) - decay[0.3]


@pytest.mark.parametrize(("before", "after"), [(5.0, MAX_LOGIT_SCALE), (-1.0, 0.0), (2.5, 2.5)])
def test_logit_scale_is_clamped_after_the_step(before, after):
    model = tiny_clip()
    torch.nn.init.constant_(model.logit_scale, before)
    ClampLogitScale().on_optimizer_step(None, None, None, model=model)
    assert model.logit_scale.item() == pytest.approx(after)
    assert model.logit_scale.requires_grad


def test_scale_never_leaves_its_range_while_training(tmp_path):
    trainer = toy_trainer(str(tmp_path), max_steps=3, save_strategy="no", learning_rate=1.0)
    torch.nn.init.constant_(find_logit_scale(trainer.model), MAX_LOGIT_SCALE - 1e-3)
    trainer.train()
    assert 0.0 <= trainer.model.logit_scale.item() <= MAX_LOGIT_SCALE + 1e-6


def test_log_names_both_losses_and_the_temperature(tmp_path):
    trainer = toy_trainer(str(tmp_path), max_steps=2, save_strategy="no", learning_rate=0.0)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["temperature"] == pytest.approx(0.07, abs=1e-5)
    assert entry["loss"] == pytest.approx(entry["contrastive_loss"] + 0.5 * entry["view_loss"], abs=2e-4)


def test_checkpoint_prepares_its_own_inputs(tmp_path):
    """F07: a checkpoint folder alone opens as processor and model."""
    tokenizer = MMClipTokenizer.train_from_iterator(["a cat", "a dog"], vocab_size=520, model_max_length=6)
    size = {"height": 16, "width": 16}
    processor = MMClipProcessor(MMClipImageProcessorPil(size={"shortest_edge": 16}, crop_size=size), tokenizer)
    arguments = ContrastiveTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, per_device_train_batch_size=4, use_cpu=True
    )
    vocab_size = len(tokenizer)
    trainer = ContrastiveTrainer(
        model=tiny_clip(vocab_size=vocab_size),
        args=arguments,
        train_dataset=Pairs(vocab_size),
        processing_class=processor,
    )
    trainer.train()
    opened = AutoProcessor.from_pretrained(tmp_path / "checkpoint-1")
    picture = torch.arange(20 * 30 * 3, dtype=torch.uint8).reshape(20, 30, 3)
    inputs, expected = (p(images=picture, text=["a cat"], return_tensors="pt") for p in (opened, processor))
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[key], expected[key]) for key in expected)
    model = AutoModel.from_pretrained(tmp_path / "checkpoint-1")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))


def test_a_tokenizer_alone_is_warned_about(tmp_path, caplog):
    """F07: a tokenizer in place of the processor cannot prepare pictures."""
    tokenizer = MMClipTokenizer.train_from_iterator(["a cat"], vocab_size=514, model_max_length=6)
    arguments = ContrastiveTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with caplog.at_level("WARNING"):
        import transformers

        transformers.utils.logging.enable_propagation()
        ContrastiveTrainer(model=tiny_clip(), args=arguments, train_dataset=Pairs(), processing_class=tokenizer)
        transformers.utils.logging.disable_propagation()
    assert "pass the whole processor" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_refused(tmp_path, dtype):
    """F18: Adam on half-precision weights ends in NaN or stands still."""
    arguments = ContrastiveTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="dtype=torch.float32 and pass bf16=True"):
        ContrastiveTrainer(model=tiny_clip().to(dtype), args=arguments, train_dataset=Pairs())


def test_autocast_leaves_the_loss_in_float32(tmp_path):
    """At a logit scale of 100 a step of bfloat16 is half a logit; what is compared is rounded once, by the towers."""
    batch = collate([Pairs()[i] for i in range(8)])
    model = tiny_clip().eval()
    torch.nn.init.constant_(model.logit_scale, MAX_LOGIT_SCALE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**batch)
        vision, text = model.get_image_features(batch["pixel_values"]), model.get_text_features(batch["input_ids"])
    features = (torch.nn.functional.normalize(tower.pooler_output.double(), dim=-1) for tower in (vision, text))
    expected = image_text_contrastive_loss(*features, model.logit_scale.double().exp(), batch["image_ids"])
    assert outputs.loss.dtype == torch.float32
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_resumed_run_remembers_its_time_and_what_it_skipped(tmp_path):
    first = toy_trainer(str(tmp_path), max_steps=2)
    first.record.skipped["row 3"] = "no picture"
    first.train()
    second = toy_trainer(str(tmp_path), max_steps=4)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.gather_skipped() == {"row 3": "no picture"}
    assert second.record.seconds > first.state.stateful_callbacks["RunRecord"]["attributes"]["seconds"] > 0


def test_unequal_pictures_and_texts_are_refused_in_training(tmp_path):
    model = tiny_clip().train()
    batch = collate([Pairs()[i] for i in range(4)])
    batch["input_ids"] = batch["input_ids"][:3]
    with pytest.raises(ValueError, match="4 pictures and 3 texts"):
        toy_trainer(str(tmp_path)).compute_loss(model, batch)


def test_evaluation_reports_a_loss_with_a_smaller_last_batch(tmp_path):
    trainer = toy_trainer(str(tmp_path), per_device_eval_batch_size=7, dataloader_drop_last=False)
    metrics = trainer.evaluate(Pairs())
    assert math.isfinite(metrics["eval_loss"])


def test_skipped_rows_are_collected_and_kept_from_the_model(tmp_path):
    """F04: what the collator left out reaches the run's summary."""
    trainer = toy_trainer(str(tmp_path))
    batch = collate([Pairs()[i] for i in range(4)])
    loss = trainer.compute_loss(copy.deepcopy(trainer.model).eval(), {**batch, "skipped": [("row 3", "no picture")]})
    assert torch.isfinite(loss)
    assert trainer.gather_skipped() == {"row 3": "no picture"}
