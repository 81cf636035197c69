import pytest
import torch
from toys import TableModel, TableProcessor, noise, small_clip

from hf_mm.evaluation.embeddings import embed_images, embed_texts
from hf_mm.evaluation.retrieval import evaluate_retrieval

PROCESSOR = TableProcessor()


def evaluate(image_table, text_table, captions, **options):
    model = TableModel(image_table, text_table)
    return evaluate_retrieval(model, PROCESSOR, range(len(captions)), captions, progress=False, **options)


def test_a_perfect_model():
    metrics = evaluate(torch.eye(12), torch.eye(12), [[str(i)] for i in range(12)])
    assert {metrics[key] for key in metrics if key.startswith(("i2t", "t2i"))} == {100}
    assert metrics["images"] == metrics["captions"] == 12
    for side in ("i2t", "t2i"):
        assert metrics[f"chance_{side}_r1"] == pytest.approx(100 / 12)
        assert metrics[f"chance_{side}_r10"] == pytest.approx(1000 / 12)
        assert metrics[f"chance_{side}_mrr"] == pytest.approx(100 / 12 * sum(1 / rank for rank in range(1, 13)))


def test_a_constant_model_is_worse_than_chance():
    metrics = evaluate(torch.ones(12, 3), torch.ones(12, 3), [[str(i)] for i in range(12)])
    for side in ("i2t", "t2i"):
        assert all(metrics[f"{side}_r{k}"] == 0 for k in (1, 5, 10))
        assert metrics[f"{side}_mrr"] < metrics[f"chance_{side}_mrr"]


def test_several_captions_one_of_them_found():
    # pictures lie on the axes; captions 0 and 1 belong to picture 0, captions 2 and 3 to picture 1
    texts = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
    metrics = evaluate(torch.eye(2), texts, [["0", "1"], ["2", "3"]])
    assert metrics["i2t_r1"] == 100
    assert metrics["t2i_r1"] == 50
    assert metrics["t2i_mrr"] == 75
    assert metrics["chance_i2t_r1"] == metrics["chance_t2i_r1"] == 50
    assert metrics["captions"] == 4


def test_a_shared_caption_and_a_shared_id_are_right_for_both_pictures():
    swapped = torch.eye(2)[[1, 0]]
    assert evaluate(swapped, torch.eye(2), [["0"], ["1"]])["i2t_r1"] == 0
    assert evaluate(swapped, torch.eye(2), [["0"], ["1"]], ids=["x", "x"])["i2t_r1"] == 100
    shared = evaluate(torch.eye(2), torch.eye(2), [["0"], ["0"]], gallery=["0", "1"])
    assert (shared["i2t_r1"], shared["t2i_r1"], shared["chance_t2i_r1"]) == (50, 100, 100)


def test_a_larger_gallery_makes_the_task_harder_for_pictures_only():
    texts = torch.tensor([[0.8, 0.6], [0.0, 1.0], [1.0, 0.0]])
    own = evaluate(torch.eye(2), texts, [["0"], ["1"]])
    large = evaluate(torch.eye(2), texts, [["0"], ["1"]], gallery=["2", "1", "0"])
    assert (own["i2t_r1"], large["i2t_r1"]) == (100, 50)
    assert large["captions"] == 3
    assert large["chance_i2t_r1"] == pytest.approx(100 / 3)
    assert {key: own[key] for key in own if "t2i" in key} == {key: large[key] for key in large if "t2i" in key}


def test_a_real_clip_agrees_with_sorting():
    model, processor = small_clip()
    pictures, captions = noise(9), [f"a photo of {number} cats" for number in range(9)]
    metrics = evaluate_retrieval(
        model, processor, pictures, [[caption] for caption in captions], batch_size=4, progress=False
    )
    cosines = (
        embed_images(model, processor, pictures, progress=False)
        @ embed_texts(model, processor, captions, progress=False).T
    )
    for side, scores in (("i2t", cosines), ("t2i", cosines.T)):
        places = (scores.argsort(dim=1, descending=True) == torch.arange(9)[:, None]).int().argmax(dim=1) + 1
        assert metrics[f"{side}_r5"] == pytest.approx(100 * (places <= 5).double().mean().item())
        assert metrics[f"{side}_mrr"] == pytest.approx(100 * (1 / places.double()).mean().item())


@pytest.mark.parametrize(
    ("captions", "options", "error", "message"),
    [
        ([["0"]], {}, ValueError, "2 images and 1 lists"),
        (["0", "1"], {}, TypeError, "image 0 are one string"),
        ([["0"], []], {}, ValueError, "image 1 has no caption"),
        ([["0"], ["1"]], {"gallery": ["0"]}, ValueError, "lacks 1 captions of the images, such as '1'"),
        ([["0"], ["1"]], {"ids": [3]}, ValueError, "1 ids"),
    ],
)
def test_bad_input_is_refused(captions, options, error, message):
    model = TableModel(torch.eye(2), torch.eye(2))
    with pytest.raises(error, match=message):
        evaluate_retrieval(model, PROCESSOR, range(2), captions, **options)
