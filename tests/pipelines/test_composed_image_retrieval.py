"""`pipeline("composed-image-retrieval")` against the model and the index called by hand; contract row 9."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from hf_mm.pipelines import register_pipelines
from hf_mm.pipelines.composed_image_retrieval import ComposedImageRetrievalPipeline
from hf_mm.pipelines.image_index import ImageIndex
from tests.evaluation.toys import noise, small_clip
from tests.pipelines.small import small_pic2word

TASK = "composed-image-retrieval"
PICTURES = noise(10, size=20)
TEXT = "a photo of *, in red"

register_pipelines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Model, index and some pictures as files."""
    folder = tmp_path_factory.mktemp("composed")
    model, processor = small_pic2word()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    ImageIndex.build(model, processor, PICTURES, progress=False).save(folder / "index")
    for number in range(3):
        PICTURES[number].save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def search(folder):
    return pipeline(TASK, model=str(folder / "model"), index=folder / "index", device="cpu")


def expected(images: list, texts: list[str], k: int = 5, exclude=None) -> list[list[tuple[str, float]]]:
    """What the model and a whole product say."""
    model, processor = small_pic2word()
    inputs = processor(images=images, text=texts)
    with torch.no_grad():
        queries = model.get_composed_features(**inputs).pooler_output
        gallery = model.get_image_features(processor(images=PICTURES)["pixel_values"]).pooler_output
    cosines = torch.nn.functional.normalize(queries, dim=-1) @ torch.nn.functional.normalize(gallery, dim=-1).T
    for row, ids in enumerate(exclude or []):
        cosines[row, list(map(int, ids))] = -2
    best = cosines.topk(k)
    return [
        [(str(i), score) for i, score in zip(*pair, strict=True)]
        for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def assert_equal(answers: list[dict], pairs: list[tuple[str, float]]) -> None:
    assert [answer["id"] for answer in answers] == [name for name, _ in pairs]
    assert [answer["score"] for answer in answers] == pytest.approx([score for _, score in pairs], abs=1e-6)


def test_a_file_a_picture_an_array_and_a_batch_are_answered_alike(search, folder):
    images = PICTURES[:3]
    one_by_one = expected(images, [TEXT] * 3)
    for number, image in enumerate(images):
        for given in (image, str(folder / f"{number}.png"), folder / f"{number}.png", np.asarray(image)):
            assert_equal(search(given, TEXT), one_by_one[number])
    for batch_size in (1, 2, 8):
        for answers, pairs in zip(search(images, TEXT, batch_size=batch_size), one_by_one, strict=True):
            assert_equal(answers, pairs)


def test_all_ways_to_ask(search):
    image, query = PICTURES[0], {"image": PICTURES[0], "text": TEXT}
    (pairs,) = expected([image], [TEXT], k=2)
    for answers in (
        search(image, TEXT, top_k=2),
        search(image=image, text=TEXT, top_k=2),
        search(query, top_k=2),
        search({"images": [image], "text": TEXT}, top_k=2),
        search([query], top_k=2)[0],
        search([image], [TEXT], top_k=2)[0],
        search(images=[image], text=TEXT, top_k=2),
        next(iter(search((one for one in [query]), top_k=2))),
    ):
        assert_equal(answers, pairs)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_of_any_length_and_pictures_of_any_number_share_a_batch(search, batch_size):
    a, b, c, d = PICTURES[:4]
    queries = [
        {"images": [a, b], "text": "* and *, red"},
        {"image": c, "text": "*"},
        {"images": [d], "text": "a photo of a * dog"},
    ]
    rows = expected([[a, b], [c], [d]], [query["text"] for query in queries])
    for answers, pairs in zip(search(queries, batch_size=batch_size), rows, strict=True):
        assert_equal(answers, pairs)
    assert search(images=[b, a], text="* and *, red")[0]["score"] != pytest.approx(rows[0][0][1], abs=1e-6)


def test_the_pictures_of_the_query_are_left_out(search, folder):
    queries = [
        {"image": str(folder / "1.png"), "text": TEXT},
        {"images": [PICTURES[2], PICTURES[0]], "text": "* *"},
        {"image": noise(11, size=20)[10], "text": TEXT, "id": "4"},
    ]
    exclude = [["1"], ["2", "0"], ["4"]]
    images = [[PICTURES[1]], [PICTURES[2], PICTURES[0]], [queries[2]["image"]]]
    rows = expected(images, [query["text"] for query in queries], k=7, exclude=exclude)
    for answers, pairs in zip(search(queries, top_k=7, exclude_query=True, batch_size=3), rows, strict=True):
        assert_equal(answers, pairs)
    assert len(search(queries[1], top_k=10, exclude_query=True)) == 8
    assert len(search(queries[1], top_k=99)) == 10


def test_options_may_be_given_once(folder):
    search = pipeline(TASK, model=str(folder / "model"), index=str(folder / "index"), top_k=2, exclude_query=True)
    assert "1" not in [answer["id"] for answer in search(PICTURES[1], TEXT, top_k=9)]
    assert len(search(PICTURES[1], TEXT)) == 2


def test_answers_show_their_pictures_and_columns(search):
    (answer,) = search(PICTURES[0], TEXT, top_k=1)
    assert list(answer) == ["score", "row", "id", "image"]
    assert answer["row"] == int(answer["id"])
    assert answer["image"].tobytes() == PICTURES[answer["row"]].tobytes()


def test_an_index_of_the_pipelines_own_model(folder):
    search = pipeline(TASK, model=str(folder / "model"))
    with pytest.raises(ValueError, match="there is no index to search: pass index= .* or call index_pictures"):
        search(PICTURES[0], TEXT)
    files = [folder / f"{number}.png" for number in range(3)]
    index = search.index_pictures(files, ids="abc", progress=False)
    assert search.index is index and len(index) == 3
    answers = search(PICTURES[0], TEXT)
    assert {answer["id"]: answer["image"] for answer in answers} == dict(zip("abc", map(str, files), strict=True))


def test_another_models_index_is_refused(search, folder, tmp_path):
    other, processor = small_pic2word()
    with torch.no_grad():
        other.clip.logit_scale += 1
    ImageIndex.build(other, processor, PICTURES[:2], progress=False).save(tmp_path / "index")
    with pytest.raises(ValueError, match="whose weights are not those of"):
        pipeline(TASK, model=str(folder / "model"), index=tmp_path / "index")
    before = search.index
    with pytest.raises(ValueError, match="whose weights"):
        search.index = tmp_path / "index"
    assert search.index is before


def test_another_mapping_network_and_the_bare_clip_share_the_index(folder):
    model, processor = small_pic2word(seed=1)
    ComposedImageRetrievalPipeline(model=model, processor=processor, index=folder / "index", device="cpu")
    ImageIndex.open(folder / "index").check(small_clip()[0], processor)


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ((PICTURES[0], "a photo in red"), "0 placeholders for 1 pictures"),
        ((PICTURES[0], "* and *"), "2 placeholders for 1 pictures"),
        (({"images": PICTURES[:2], "text": "*"},), "1 placeholders for 2 pictures"),
        ((PICTURES[0],), "a query has no text"),
        (("picture.png",), "a query has no text"),
        (({"text": TEXT},), "needs image, or images"),
        (({"image": PICTURES[0], "images": PICTURES[:1], "text": TEXT},), "not both"),
        (({"image": PICTURES[0], "text": TEXT, "caption": "x"},), "the key 'caption'"),
        ((PICTURES[:2], [TEXT]), "1 texts for 2 pictures"),
        ((None, TEXT), "there is no picture"),
        ((PICTURES[0], TEXT, PICTURES[:1]), "not both"),
    ],
)
def test_wrong_queries_are_refused(search, query, sentence):
    with pytest.raises(ValueError, match=sentence):
        search(*query)


def test_wrong_options_are_refused(search, tmp_path):
    with pytest.raises(ValueError, match="top_k is 0"):
        search(PICTURES[0], TEXT, top_k=0)
    with pytest.raises(TypeError, match="topk"):
        search(PICTURES[0], TEXT, topk=3)
    with pytest.raises(ValueError, match="no picture 'none' to exclude"):
        search({"image": PICTURES[0], "text": TEXT, "id": "none"}, exclude_query=True)
    with pytest.raises(FileNotFoundError, match="There is no image file"):
        search(str(tmp_path / "none.png"), TEXT)


def test_a_model_that_composes_nothing_is_refused(tmp_path):
    model, processor = small_clip()
    with pytest.raises(TypeError, match="MMClipModel does not compose pictures with texts"):
        ComposedImageRetrievalPipeline(model=model, processor=processor, device="cpu")


def test_half_precision(folder):
    search = pipeline(TASK, model=str(folder / "model"), dtype=torch.bfloat16, device="cpu")
    with pytest.raises(ValueError, match="in float32, and this model is in bfloat16"):
        search.index = folder / "index"
    search.index_pictures(PICTURES, progress=False)
    answers = search(PICTURES[:3], TEXT, top_k=10, batch_size=2)
    for found, pairs in zip(answers, expected(PICTURES[:3], [TEXT] * 3, k=10), strict=True):
        scores = {answer["id"]: answer["score"] for answer in found}
        assert scores == pytest.approx(dict(pairs), abs=4e-2)


def test_a_training_model_answers_without_dropout_and_trains_on(folder):
    model, processor = small_pic2word()
    model.train()
    search = ComposedImageRetrievalPipeline(model=model, processor=processor, index=folder / "index", device="cpu")
    assert_equal(search(PICTURES[0], TEXT), expected(PICTURES[:1], [TEXT])[0])
    assert model.mapper.training


def test_a_saved_pipeline_opens_without_remote_code(search, folder, tmp_path):
    search.save_pretrained(tmp_path / "saved")
    again = pipeline(TASK, model=str(tmp_path / "saved"), index=folder / "index", device="cpu")
    assert not list((tmp_path / "saved").glob("*.py"))
    assert_equal(again(PICTURES[0], TEXT), expected(PICTURES[:1], [TEXT])[0])


def test_the_task_is_registered_by_name():
    register_pipelines()
    entry = PIPELINE_REGISTRY.check_task(TASK)[1]
    assert entry["pt"] == (AutoModel,) and isinstance(entry["impl"], str)
    assert TASK in PIPELINE_REGISTRY.get_supported_tasks()
