import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from toys import TableModel, TableProcessor, noise, small_clip

from hf_mm.evaluation.embeddings import embed_texts
from hf_mm.evaluation.zero_shot import (
    build_classifier,
    evaluate_zero_shot,
    fill_templates,
    load_classifier,
    save_classifier,
)

NAMES = [str(number) for number in range(8)]


def evaluate(image_table, labels, text_table=None):
    model = TableModel(image_table, torch.eye(8) if text_table is None else text_table)
    return evaluate_zero_shot(
        model, TableProcessor(), range(len(labels)), labels, NAMES, templates=["{}"], progress=False
    )


def test_a_perfect_model_on_unequal_classes():
    labels = [0, 0, 0, 1, 2]
    metrics = evaluate(torch.eye(8)[labels], labels)
    assert metrics == {
        "images": 5,
        "classes": 8,
        "top1": 100,
        "top5": 100,
        "balanced_accuracy": 100,
        "chance_top1": 12.5,
        "chance_top5": 62.5,
        "majority": 60,
    }


def test_always_the_majority_class():
    labels = np.array([0, 0, 0, 1, 2])
    metrics = evaluate(torch.eye(8)[[0] * 5], labels)
    assert metrics["top1"] == metrics["majority"] == 60
    assert metrics["balanced_accuracy"] == pytest.approx(100 / 3)


def test_a_constant_model_is_right_nowhere():
    metrics = evaluate(torch.ones(5, 3), [0, 0, 0, 1, 2], torch.ones(8, 3))
    assert metrics["top1"] == metrics["top5"] == metrics["balanced_accuracy"] == 0


def test_a_class_is_the_mean_of_unit_embeddings_of_its_texts():
    model, processor = small_clip()
    texts = [["a cat", "a red cat", "cat"], ["a dog"]]
    cats = embed_texts(model, processor, texts[0], progress=False).numpy().astype(np.float64).mean(axis=0)
    classifier = build_classifier(model, processor, texts, progress=False)
    np.testing.assert_allclose(classifier[0], cats / np.linalg.norm(cats), atol=1e-6)
    np.testing.assert_allclose(classifier[1], embed_texts(model, processor, ["a dog"], progress=False)[0], atol=1e-6)


def test_templates_hold_every_name_of_a_class():
    texts = fill_templates(["cat", ["dog", "{hound}"]], ["a {}.", "{} or {}"])
    assert texts == [["a cat.", "cat or cat"], ["a dog.", "dog or dog", "a {hound}.", "{hound} or {hound}"]]


def test_a_saved_classifier_is_the_same(tmp_path):
    classifier, names = torch.randn(3, 4).T[:3], ["cat", ["dog", "hound"], "naïve ’quote’"]
    save_classifier(classifier, names, tmp_path / "classes.safetensors")
    loaded, loaded_names = load_classifier(tmp_path / "classes.safetensors")
    assert torch.equal(loaded, classifier)
    assert loaded_names == names


def test_another_file_is_no_classifier(tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no classifier"):
        load_classifier(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="3 classes and there are 1 names"):
        save_classifier(torch.ones(3, 2), ["cat"], tmp_path / "never.safetensors")
    assert not (tmp_path / "never.safetensors").exists()


@pytest.mark.parametrize(
    ("labels", "names", "templates", "error", "message"),
    [
        ([0], NAMES, ["{}"], ValueError, "2 images and 1 labels"),
        ([0, 8], NAMES, ["{}"], ValueError, "labels run from 0 to 8, but there are 8"),
        ([0.5, 1.0], NAMES, ["{}"], ValueError, "integers from 0 to 7"),
        ([0, 1], NAMES, ["a photo"], ValueError, "no {} where"),
        ([0, 1], NAMES, "a {}", TypeError, "list of strings"),
        ([0, 1], NAMES, [], ValueError, "no templates"),
        ([0, 1], ["0", []], ["{}"], ValueError, "class 1 has no text"),
    ],
)
def test_bad_input_is_refused(labels, names, templates, error, message):
    model = TableModel(torch.eye(8), torch.eye(8))
    with pytest.raises(error, match=message):
        evaluate_zero_shot(model, TableProcessor(), range(2), labels, names, templates)


def test_the_texts_of_a_class_are_a_list():
    with pytest.raises(TypeError, match="class 0 are one string"):
        build_classifier(*small_clip(), ["a cat"])


def test_a_class_text_beyond_the_context_is_cut():
    """F15: it does not fail the evaluation."""
    whole, cut = (build_classifier(*small_clip(), [["cat " * words]], progress=False) for words in (200, 12))
    torch.testing.assert_close(whole, cut)


def test_a_real_clip_end_to_end():
    model, processor = small_clip()
    pictures, labels = noise(6), [0, 1, 2, 0, 1, 0]
    names, templates = ["cat", "dog", "car"], ["a photo of a {}.", "{}"]
    metrics = evaluate_zero_shot(model, processor, pictures, labels, names, templates, batch_size=4, progress=False)
    with torch.no_grad():
        texts = [template.replace("{}", name) for name in names for template in templates]
        outputs = model.eval()(**processor(images=pictures, text=texts))
    scores = outputs.image_embeds @ torch.nn.functional.normalize(outputs.text_embeds.view(3, 2, -1).mean(1), dim=-1).T
    right = scores.argmax(dim=1) == torch.tensor(labels)
    assert metrics["top1"] == pytest.approx(100 * right.double().mean().item())
    assert metrics["majority"] == 50
