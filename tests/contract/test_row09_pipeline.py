"""Row 9: `pipeline(task, model=folder)` answers on a file, a PIL image and a batch, with what the model says."""

import pytest
import torch
from transformers import AutoModel, pipeline

from .cases import cases_for

LABELS = ["red square", "circle", "line"]


@pytest.fixture
def folder(case, tmp_path):
    case.build().save_pretrained(tmp_path)
    case.preparer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def files(case, tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path, picture in zip(paths, case.raw(3)["images"], strict=True):
        picture.save(path)
    return paths


def task(name: str):
    return pytest.mark.parametrize("case", cases_for(9, lambda case: name in case.tasks), ids=str)


@pytest.mark.parametrize("case", cases_for(9), ids=str)
def test_every_case_has_a_pipeline(case):
    assert case.tasks


@task("zero-shot-image-classification")
def test_zero_shot_image_classification(case, folder, files):
    classify = pipeline("zero-shot-image-classification", model=folder)
    template = "a drawing of a {}"
    options = {"candidate_labels": LABELS, "hypothesis_template": template}
    images = case.raw(3)["images"]
    texts = [template.format(label) for label in LABELS]
    with torch.no_grad():
        logits = case.build()(**case.preparer(images=images, text=texts, return_tensors="pt")).logits_per_image
    expected = [dict(zip(LABELS, row, strict=True)) for row in logits.softmax(1).tolist()]

    def scores(answers):
        return {answer["label"]: answer["score"] for answer in answers}

    for inputs in (images, files):
        assert scores(classify(inputs[0], **options)) == pytest.approx(expected[0], abs=1e-6)
        for row, answers in enumerate(classify(inputs, batch_size=2, **options)):
            assert scores(answers) == pytest.approx(expected[row], abs=1e-6)


@task("image-classification")
def test_image_classification(case, folder, files):
    classify = pipeline("image-classification", model=folder, top_k=5)
    images, model = case.raw(3)["images"], case.build()
    with torch.no_grad():
        logits = model(**case.preparer(images, return_tensors="pt")).logits
    expected = [{model.config.id2label[i]: score for i, score in enumerate(row)} for row in logits.softmax(1).tolist()]

    def scores(answers):
        return {answer["label"]: answer["score"] for answer in answers}

    for inputs in (images, files):
        assert scores(classify(inputs[0])) == pytest.approx(expected[0], abs=1e-6)
        for row, answers in enumerate(classify(inputs, batch_size=3)):
            assert scores(answers) == pytest.approx(expected[row], abs=1e-6)


@task("image-feature-extraction")
def test_image_feature_extraction(case, folder, files):
    extract = pipeline("image-feature-extraction", model=folder)
    images = case.raw(3)["images"]
    with torch.no_grad():
        outputs = AutoModel.from_pretrained(folder)(**case.preparer(images, return_tensors="pt"))
    for inputs in (images, files):
        torch.testing.assert_close(torch.tensor(extract(inputs[0])), outputs.last_hidden_state[:1])
        pooled = [torch.tensor(row) for row in extract(inputs, batch_size=2, pool=True)]
        torch.testing.assert_close(torch.cat(pooled), outputs.pooler_output)


@task("feature-extraction")
def test_text_feature_extraction(case, folder):
    extract = pipeline("feature-extraction", model=folder)
    texts = case.raw(3)["text"]
    batch = case.batch(3)
    with torch.no_grad():
        states = case.build()(**batch).last_hidden_state
    for row, length in enumerate(batch["attention_mask"].sum(1)):
        torch.testing.assert_close(torch.tensor(extract(texts[row]))[0], states[row, :length])
    for row, features in enumerate(extract(texts, batch_size=2)):
        length = batch["attention_mask"][row].sum()
        torch.testing.assert_close(torch.tensor(features)[0, :length], states[row, :length])
