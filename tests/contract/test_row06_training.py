"""Row 6: transformers' own Trainer trains the models, on one process and several, and evaluates them."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from datasets import Dataset
from transformers import AutoProcessor

from .cases import FOLDER, blocks, cases_for, first_layer, in_double, largest_error, recomputed, trained
from .training import NUM_SAMPLES, run_of, samples_of, trainer_for, with_loss

EVERY = pytest.mark.parametrize("case", cases_for(6), ids=str)
WITH_LOSS = pytest.mark.parametrize("case", cases_for(6, with_loss), ids=str)
PER_PICTURE = pytest.mark.parametrize("case", cases_for(6, lambda case: case.loss and not case.exceptions), ids=str)
PER_BATCH = pytest.mark.parametrize("case", cases_for(6, lambda case: bool(case.exceptions)), ids=str)
ADDED_UP = pytest.mark.parametrize("case", cases_for(6, lambda case: "labels" in case.inputs or case.speaks), ids=str)
WITH_LABELS = pytest.mark.parametrize("case", cases_for(6, lambda case: "labels" in case.inputs), ids=str)


def assert_same_training(one, other):
    (weights, losses), (other_weights, other_losses) = one, other
    assert losses == pytest.approx(other_losses, rel=1e-6)
    assert max(largest_error(other_weights[name], value) for name, value in weights.items()) <= 1e-9


@WITH_LOSS
def test_overfits_one_batch(case, tmp_path):
    batch, config = case.batch(4), case.config()
    if hasattr(config, "label_smoothing"):  # with which no loss comes near 0
        config.label_smoothing = 0.0
    if case.speaks:  # a language model that nobody trained says no sentence, so that it trains too, without dropout
        config.text_config.dropout_rate = config.text_config.attention_dropout = 0.0
    model = case.build(config)
    if case.speaks:
        model.language_model.requires_grad_(True)
    if case.frozen_parts:  # a frozen tower that nobody trained hardly tells its pictures apart
        shape = model.vision_features(batch.pop("pixel_values")).shape
        batch["vision_features"] = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    samples = samples_of(batch)
    trainer = trainer_for(
        case,
        tmp_path,
        model=model,
        samples=samples,
        max_steps=120 if case.model_type == "mm_blip2" else 40,
        optim="adamw_torch",
        learning_rate=5e-3,
        remove_unused_columns=True,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 1.0
    assert losses[-1] < 0.02


@ADDED_UP
def test_four_accumulated_batches_equal_one(case, tmp_path):
    """F10: the mean is over samples or over tokens, of which batches have unequal numbers. A contrastive loss has no
    such equality: its negatives are the batch."""
    once = run_of(case, tmp_path, per_device_train_batch_size=8)
    accumulated = run_of(case, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same_training(once, accumulated)


@PER_PICTURE
def test_accumulation_takes_the_mean_of_its_batches(case, tmp_path):
    """Twice the same batch is as once."""
    samples = samples_of(in_double(case.batch(NUM_SAMPLES)))
    options = {"per_device_train_batch_size": NUM_SAMPLES, "train_sampling_strategy": "sequential", "max_steps": 1}
    once = run_of(case, tmp_path, samples=samples, **options)
    twice = run_of(case, tmp_path, samples=2 * samples, gradient_accumulation_steps=2, **options)
    assert_same_training(once, twice)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    root = tmp_path_factory.mktemp("two_processes")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "contract.training", str(root)]
    done = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [case.name for case in cases_for(6, with_loss)]
    return {name: torch.load(root / f"{number}.pt") for number, name in enumerate(names)}


@PER_PICTURE
def test_two_processes_equal_one(case, two_processes, tmp_path):
    world_size, *training = two_processes[case.name]
    assert world_size == 2
    assert_same_training(run_of(case, tmp_path), training)


@PER_BATCH
def test_what_the_case_excepts_does_not_hold(case, two_processes, tmp_path):
    """BatchNorm: two processes have statistics of half a batch, and accumulated batches are counted one by one."""
    assert set(case.exceptions) == {"accumulation", "processes"}
    (weights, losses), (_, other_weights, other_losses) = run_of(case, tmp_path), two_processes[case.name]
    assert losses != pytest.approx(other_losses, rel=1e-3)
    counters = [name for name in weights if name.endswith("num_batches_tracked")]
    assert counters
    assert {int(weights[name]) for name in counters} == {int(other_weights[name]) for name in counters} == {2}
    accumulated, _ = run_of(case, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    assert {int(accumulated[name]) for name in counters} == {4}


@PER_BATCH
def test_with_its_tower_frozen_nothing_is_excepted(case, tmp_path):
    """Twice the same batch is as once, and the statistics stay as they are."""
    samples = samples_of(in_double(case.batch(NUM_SAMPLES)))
    options = {"per_device_train_batch_size": NUM_SAMPLES, "train_sampling_strategy": "sequential", "max_steps": 1}
    models = [case.build().double() for _ in range(2)]
    for model in models:
        model.vision_model.requires_grad_(False)
    before = {name: value.clone() for name, value in models[0].vision_model.state_dict().items()}
    once = run_of(case, tmp_path, model=models[0], samples=samples, **options)
    twice = run_of(case, tmp_path, model=models[1], samples=2 * samples, gradient_accumulation_steps=2, **options)
    assert_same_training(once, twice)
    after = models[0].vision_model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@EVERY
def test_checkpointing_recomputes_every_block_and_changes_no_gradient(case):
    batch = in_double(case.batch(4))

    def calls_and_gradients(checkpointing: bool):
        model, calls = case.build().double().train(), Counter()
        if checkpointing:
            model.activation_checkpointing_enable()
        for number, block in enumerate(blocks(model)):
            first_layer(block).register_forward_pre_hook(lambda *_, number=number: calls.update([number]))
        outputs = case.read(model(**batch), batch)
        sum(value.square().sum() for value in outputs.values()).backward()
        gradients = {name: parameter.grad for name, parameter in trained(model).items()}
        return calls, gradients, dict(model.named_buffers())

    calls, gradients, buffers = calls_and_gradients(checkpointing=False)
    checkpointed_calls, checkpointed_gradients, checkpointed_buffers = calls_and_gradients(checkpointing=True)
    model = case.build()
    again = {id(block) for block in recomputed(model)}
    assert again
    times = {number: 2 if id(block) in again else 1 for number, block in enumerate(blocks(model))}
    assert calls.keys() == times.keys()
    assert checkpointed_calls == {number: times[number] * count for number, count in calls.items()}
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], gradient, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(checkpointed_buffers[name], buffer) for name, buffer in buffers.items())


@WITH_LOSS
def test_checkpointing_in_trainer_ends_with_equal_weights(case, tmp_path):
    assert_same_training(run_of(case, tmp_path), run_of(case, tmp_path, activation_checkpointing=True))


@WITH_LOSS
@pytest.mark.parametrize("loss_only", [True, False])
def test_evaluation_reports_the_mean_loss_also_with_a_smaller_last_batch(case, tmp_path, loss_only):
    model, batch = case.build().double(), in_double(case.batch(6))
    trainer = trainer_for(case, tmp_path, model=model, per_device_eval_batch_size=4, prediction_loss_only=loss_only)
    metrics = trainer.evaluate(samples_of(batch))
    with torch.no_grad():
        parts = [
            model(**{name: value[rows] for name, value in batch.items()}).loss for rows in (slice(4), slice(4, 6))
        ]
    assert metrics["eval_loss"] == pytest.approx((4 * parts[0] + 2 * parts[1]).item() / 6, rel=1e-6)


@WITH_LOSS
def test_no_input_is_dropped_and_other_columns_are(case, tmp_path):
    batch = case.batch(NUM_SAMPLES)
    batch |= {name: torch.arange(NUM_SAMPLES) for name in ("image_ids", "text_ids") if case.takes(name)}
    columns = {name: value.tolist() for name, value in batch.items()}
    dataset = Dataset.from_dict({**columns, "photographer": ["somebody"] * NUM_SAMPLES}).with_format("torch")
    trainer, received = trainer_for(case, tmp_path, model=case.build(), samples=dataset, max_steps=1), []
    trainer.model.register_forward_pre_hook(
        lambda module, args, inputs: received.append(set(inputs)), with_kwargs=True
    )
    trainer.train()
    assert [names - {"generator", "num_items_in_batch"} for names in received] == [set(batch)]


@WITH_LABELS
def test_a_lazy_transform_sees_the_raw_pictures(case, tmp_path):
    """F05: with remove_unused_columns=False a column called img reaches our image processor in both loops."""
    pictures, prepared = case.raw(NUM_SAMPLES)["images"], case.batch(NUM_SAMPLES)
    dataset = Dataset.from_dict({"img": pictures, "label": prepared["labels"].tolist()}).with_transform(
        lambda rows: {**case.preparer(rows["img"], return_tensors="pt"), "labels": rows["label"]}
    )
    arguments = {"max_steps": 1, "remove_unused_columns": False}
    trainer = trainer_for(case, tmp_path, model=case.build(), samples=dataset, **arguments)
    with torch.no_grad():
        expected = trainer.model(**prepared).loss.item()
    assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.train().global_step == 1


@WITH_LOSS
def test_a_checkpoint_opens_alone(case, tmp_path):
    """F07: Processor included, so that the folder can prepare what it is given."""
    trainer = trainer_for(
        case, tmp_path, model=case.build(), samples=samples_of(case.batch(4)), save_strategy="steps", save_steps=2
    )
    trainer.processing_class = case.preparer
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    model, prepare = case.auto_class.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    raw = {name: value for name, value in case.raw(3).items() if name in case.inputs}
    batch, original = prepare(**raw, return_tensors="pt"), case.preparer(**raw, return_tensors="pt")
    assert set(batch) == set(original)
    assert all(torch.equal(batch[name], original[name]) for name in original)
    weights = trainer.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
