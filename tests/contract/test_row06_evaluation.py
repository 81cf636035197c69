"""Row 6: what transformers' own Trainer hands to a metric function. Accumulation (F10) is in test_row06_training.py."""

import numpy as np
import pytest
import torch

from .cases import all_configs, cases_for
from .training import samples_of, trainer_for

WITH_LABELS = pytest.mark.parametrize("case", cases_for(6, lambda case: "labels" in case.inputs), ids=str)
PAIRS = pytest.mark.parametrize("case", cases_for(6, lambda case: case.compares), ids=str)
SPEAKING = pytest.mark.parametrize("case", cases_for(6, lambda case: case.speaks), ids=str)
RECORDED = pytest.mark.parametrize("recorded", [False, True], ids=["plain", "recording hidden states"])
SAMPLES, BATCH = 5, 2
EMBEDDINGS = ("text_embeds", "composed_embeds", "image_embeds", "pseudo_words")


def evaluated(case, folder, recorded: bool):
    """What the metric function was given for five samples in batches of two, and the model."""
    model, seen = case.build(), []
    for config in all_configs(model.config):
        config.output_hidden_states = recorded
    trainer = trainer_for(case, folder, model=model, per_device_eval_batch_size=BATCH)
    trainer.compute_metrics = lambda prediction: seen.append(prediction) or {}
    assert np.isfinite(trainer.evaluate(samples_of(case.batch(SAMPLES)))["eval_loss"])
    (prediction,) = seen
    return model, prediction


@WITH_LABELS
@RECORDED
def test_predictions_are_one_array_of_logits(case, recorded, tmp_path):
    """F09: one row a sample, with its label, and no hidden state."""
    model, prediction = evaluated(case, tmp_path, recorded)
    batch = case.batch(SAMPLES)
    assert isinstance(prediction.predictions, np.ndarray)
    with torch.no_grad():
        expected = model(**batch).logits
    np.testing.assert_allclose(prediction.predictions, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(prediction.label_ids, batch["labels"])


@PAIRS
@RECORDED
def test_predictions_of_pairs_are_their_embeddings(case, recorded, tmp_path):
    """F09: one row a sample; logits among a batch's own pairs are no prediction, and towers' outputs neither."""
    model, prediction = evaluated(case, tmp_path, recorded)
    batch = case.batch(SAMPLES)
    with torch.no_grad():
        outputs = model(**batch)
    names = [name for name in outputs if name in EMBEDDINGS]
    assert len(names) >= 2
    for array, name in zip(prediction.predictions, names, strict=True):
        assert isinstance(array, np.ndarray)
        np.testing.assert_allclose(array, outputs[name], rtol=1e-4, atol=1e-5)


@SPEAKING
@RECORDED
def test_predictions_of_words_are_one_array_of_logits(case, recorded, tmp_path):
    """F09: a row a sample and a score a word, as labels are; soft tokens and caches are no prediction."""
    model, prediction = evaluated(case, tmp_path, recorded)
    batch = case.batch(SAMPLES)
    with torch.no_grad():
        expected = model(**batch).logits
    assert isinstance(prediction.predictions, np.ndarray)
    assert prediction.predictions.shape[:2] == prediction.label_ids.shape
    np.testing.assert_array_equal(prediction.label_ids, batch["labels"])
    kept = case.places(batch)["logits"].bool()
    np.testing.assert_allclose(prediction.predictions[kept], expected[kept], rtol=1e-4, atol=1e-5)
