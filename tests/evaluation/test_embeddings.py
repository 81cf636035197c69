import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from torch import nn
from toys import TableModel, TableProcessor, noise, small_clip

from hf_mm.evaluation.embeddings import embed_images, embed_texts

TEXTS = ["a dog", "a photo of a cat and a dog", "", "a dog", "cat", "a red cat"]


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_embeddings_are_those_of_the_forward_pass(clip, batch_size):
    model, processor = clip
    pictures = noise(7)
    images = embed_images(model, processor, pictures, batch_size, progress=False)
    texts = embed_texts(model, processor, TEXTS, batch_size, progress=False)
    with torch.no_grad():
        outputs = model.eval()(**processor(images=pictures, text=TEXTS))
    torch.testing.assert_close(images, outputs.image_embeds, rtol=0, atol=1e-6)
    torch.testing.assert_close(texts, outputs.text_embeds, rtol=0, atol=1e-6)


def test_equal_texts_are_encoded_once_and_long_ones_apart_from_short_ones():
    seen = []

    class Processor(TableProcessor):
        def __call__(self, text=None, **kwargs):
            seen.append(text)
            return super().__call__(text=text)

    texts = ["100", "2", "2", "111", "3", "100"]
    model = TableModel(torch.eye(1), torch.eye(112))
    embeddings = embed_texts(model, Processor(), texts, batch_size=2, progress=False)
    assert seen == [["2", "3"], ["100", "111"]]
    assert embeddings.argmax(dim=1).tolist() == [100, 2, 2, 111, 3, 100]


def test_a_lazy_column_equals_a_list(clip):
    pictures = noise(5)
    column = Dataset.from_dict({"image": pictures}, features=Features({"image": ImageFeature()}))["image"]
    assert torch.equal(
        embed_images(*clip, column, 2, progress=False), embed_images(*clip, pictures, 2, progress=False)
    )


def test_every_module_keeps_its_mode_also_after_a_failure(clip):
    model, processor = clip
    model.train()
    model.text_model.eval()
    before = [module.training for module in model.modules()]
    for pictures in (noise(2), ["no such file"]):
        try:
            embed_images(model, processor, pictures, progress=False)
        except (ValueError, OSError):
            assert pictures == ["no such file"]
        assert [module.training for module in model.modules()] == before
    model.eval()


def test_dropout_is_off_and_no_graph_is_kept(clip):
    model, processor = clip
    model.train()
    first, second = (embed_images(model, processor, noise(3), progress=False) for _ in range(2))
    model.eval()
    assert torch.equal(first, second)
    head = nn.Linear(8, 1)  # embeddings can be trained upon
    head(first).sum().backward()
    assert not first.requires_grad and head.weight.grad.abs().sum() > 0


def test_a_half_precision_model_gives_float32_of_unit_length(clip):
    """F14: the processor's float32 pixels suit a model in bfloat16."""
    model, processor = small_clip()
    exact = embed_images(model, processor, noise(4), progress=False)
    rough = embed_images(model.to(torch.bfloat16), processor, noise(4), progress=False)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough.norm(dim=1), torch.ones(4))
    assert (rough - exact).abs().max() <= 2e-2 * exact.abs().max()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda clip: embed_images(*clip, []), ValueError, "nothing to embed"),
        (lambda clip: embed_texts(*clip, []), ValueError, "nothing to embed"),
        (lambda clip: embed_texts(*clip, "a cat"), TypeError, "list of strings"),
        (lambda clip: embed_images(*clip, noise(1), batch_size=0), ValueError, "at least 1"),
    ],
)
def test_bad_input_is_refused(clip, call, error, message):
    with pytest.raises(error, match=message):
        call(clip)
