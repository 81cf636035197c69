"""Row 9: `pipeline(task, model=folder)` answers on a file, a PIL image and a batch, with what the model says."""

import logging
import struct
import zlib
from functools import partial

import pytest
import torch
from PIL import Image
from transformers import AutoModel, pipeline

from .cases import CONTEXT, cases_for

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
        pooled = outputs.get("pooler_output")  # which a model of several embeddings a picture has not
        found = [torch.tensor(row) for row in extract(inputs, batch_size=2, pool=pooled is not None)]
        torch.testing.assert_close(torch.cat(found), outputs.last_hidden_state if pooled is None else pooled)


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


@task("image-text-to-text")
def test_image_text_to_text(case, folder, files):
    """Greedy words after picture and text, also of unequal texts in a batch."""
    speak = pipeline("image-text-to-text", model=folder)
    images, texts = case.raw(3)["images"], ["a photo of", "what is it", "grey"]
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": case.preparer.tokenizer.all_special_ids}
    batch = case.preparer(images=images, text=texts, return_tensors="pt")
    sequences = case.build().generate(**batch, **options)
    expected = case.preparer.decode(sequences, skip_special_tokens=True, input_ids=batch["input_ids"])
    assert all(expected)

    def new_words(answers) -> list[str]:
        rows = [answer[0] if isinstance(answer, list) else answer for answer in answers]
        return [row["generated_text"].strip() for row in rows]

    for inputs in (images, files):
        one = speak(images=inputs[0], text=texts[0], return_full_text=False, generate_kwargs=options)
        assert new_words([one]) == expected[:1]
        for batch_size in (1, 3):
            answers = speak(
                images=inputs, text=texts, return_full_text=False, generate_kwargs=options, batch_size=batch_size
            )
            assert new_words(answers) == expected


@task("composed-image-retrieval")
def test_composed_image_retrieval(case, folder, files):
    """Cosines of composed texts and pictures, best first."""
    search = pipeline("composed-image-retrieval", model=folder)
    images, text = case.raw(5)["images"], "a photo of *, in red"
    search.index_pictures(images, progress=False)
    model, batch = case.build(), case.preparer(images=images[:3], text=[text] * 3, return_tensors="pt")
    with torch.no_grad():
        pictures = model.get_image_features(case.preparer(images=images, return_tensors="pt")["pixel_values"])
        composed = model.get_composed_features(**batch).pooler_output
    expected = torch.cosine_similarity(composed[:, None], pictures.pooler_output[None], dim=-1)

    def assert_answers(answers: list[dict], row: int):
        scores = [answer["score"] for answer in answers]
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx(expected[row, [answer["row"] for answer in answers]].tolist(), abs=1e-5)
        assert len({answer["row"] for answer in answers}) == 5

    for inputs in (images[:3], files):
        assert_answers(search(inputs[0], text, top_k=5), 0)
        for row, answers in enumerate(search(inputs, text, top_k=5, batch_size=2)):
            assert_answers(answers, row)


def words_and_pixels(pipe, path) -> tuple[str, list]:
    """What is said of a file, and what is seen, of which a tower that nobody trained hardly speaks."""
    seen = []
    hook = pipe.model.vision_tower.register_forward_pre_hook(
        lambda module, args, inputs: seen.append(inputs["pixel_values"].tolist()), with_kwargs=True
    )
    answer = pipe(str(path), text="a photo of", generate_kwargs={"max_new_tokens": 3, "do_sample": False})
    hook.remove()
    return answer[0]["generated_text"], seen


@pytest.fixture
def ask(case, folder):
    """The first pipeline of a case, as a function of a file."""
    pipe = pipeline(case.tasks[0], model=folder)
    if case.tasks[0] == "composed-image-retrieval":
        pipe.index_pictures(case.raw(3)["images"], progress=False)
        return lambda path: pipe(str(path), "a photo of *")
    options = {"candidate_labels": LABELS} if case.tasks[0].startswith("zero-shot") else {}
    if case.tasks[0] == "image-text-to-text":
        return partial(words_and_pixels, pipe)
    return lambda path: pipe(str(path), **options)


WITH_IMAGES = pytest.mark.parametrize("case", cases_for(9, lambda case: "images" in case.inputs), ids=str)


@WITH_IMAGES
def test_a_phone_photo_is_answered_like_its_upright_copy(case, ask, tmp_path):
    """F01: the orientation tag of a file counts."""
    upright = Image.new("RGB", (20, 40), "blue")
    upright.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.jpg", exif=exif)
    lying = Image.open(tmp_path / "photo.jpg").convert("RGB")
    lying.save(tmp_path / "lying.png")
    lying.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    assert ask(tmp_path / "photo.jpg") == ask(tmp_path / "upright.png") != ask(tmp_path / "lying.png")


@WITH_IMAGES
def test_metadata_that_is_no_text_does_not_matter(case, ask, files):
    """F01: a PNG whose XMP is not UTF-8 is answered like the one without."""
    with open(files[0], "rb") as file:
        png = file.read()
    body = b"iTXtXML:com.adobe.xmp\0\0\0\0\0\xff\xfe tiff:Orientation \xc3"
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    end_of_header = 8 + 12 + 13
    expected = ask(files[0])
    with open(files[0], "wb") as file:
        file.write(png[:end_of_header] + chunk + png[end_of_header:])
    assert ask(files[0]) == expected


@pytest.mark.parametrize("case", cases_for(9, lambda case: case.model_type == "mm_blip2" and case.compares), ids=str)
def test_a_label_beyond_the_positions_is_refused(case, folder):
    """F15: BERT's tokenizer cuts nothing unasked."""
    classify, image = pipeline("zero-shot-image-classification", model=folder), case.raw(1)["images"][0]
    with pytest.raises(ValueError, match=rf"202 tokens.*{CONTEXT} positions"):
        classify(image, candidate_labels=["a red square", "circle " * 200], hypothesis_template="{}")


@pytest.mark.parametrize("case", cases_for(9, lambda case: case.model_type == "mm_clip" and case.tasks), ids=str)
def test_a_label_beyond_the_context_is_cut(case, folder, caplog):
    """F15: its score is that of the words that fit, with one warning at most."""
    logging.Logger.warning_once.cache_clear()
    classify, image = pipeline("zero-shot-image-classification", model=folder), case.raw(1)["images"][0]

    def score(words: int) -> float:
        labels = ["a red square", "circle " * words]
        answers = classify(image, candidate_labels=labels, hypothesis_template="{}")
        return next(answer["score"] for answer in answers if answer["label"] == labels[1])

    assert score(200) == pytest.approx(score(CONTEXT), abs=1e-6)
    assert caplog.text.count("were cut") <= 1
