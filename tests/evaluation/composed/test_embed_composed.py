import pytest
import torch
from evaluation.toys import noise

from hf_mm.evaluation import embeddings
from hf_mm.evaluation.embeddings import embed_composed, embed_images

TEXTS = ["a photo of * , a red cat", "*", "a * dog", r"a * of a \* cat", "* a dog of a photo"]


def one_by_one(model, processor, pictures, texts):
    rows = []
    for own, text in zip(pictures, texts, strict=True):
        inputs = processor(images=[own] if isinstance(own, list) else own, text=[text], return_tensors="pt")
        with torch.no_grad():
            rows.append(model.eval().get_composed_features(**inputs).pooler_output)
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def test_rows_are_those_of_one_text_after_another_in_order(pic2word):
    model, processor = pic2word
    pictures = noise(5)
    rows = embed_composed(model, processor, pictures, TEXTS, batch_size=2, progress=False)
    assert rows.dtype == torch.float32 and rows.norm(dim=1).allclose(torch.ones(5))
    torch.testing.assert_close(rows, one_by_one(model, processor, pictures, TEXTS), rtol=0, atol=1e-5)
    assert (rows[0] - rows[1]).abs().max() > 1e-3


def test_features_stand_in_for_pictures(pic2word):
    model, processor = pic2word
    pictures = noise(5)
    features = embed_images(model, processor, pictures, progress=False, normalize=False)
    with torch.no_grad():
        expected = model.vision_features(processor(images=pictures, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    assert not features.norm(dim=1).allclose(torch.ones(5), atol=1e-2)
    by_pixels = embed_composed(model, processor, pictures, TEXTS, progress=False)
    by_features = embed_composed(model, processor, None, TEXTS, progress=False, vision_features=features)
    assert by_features.equal(by_pixels)


def test_several_pictures_in_a_sentence(pic2word):
    model, processor = pic2word
    pictures = noise(6)
    texts = ["* and *", "a * with * , red", "a * on a *"]
    pairs = [pictures[0:2], pictures[2:4], pictures[4:6]]
    rows = embed_composed(model, processor, pairs, texts, batch_size=2, progress=False)
    torch.testing.assert_close(rows, one_by_one(model, processor, pairs, texts), rtol=0, atol=1e-5)
    features = embed_images(model, processor, pictures, progress=False, normalize=False).view(3, 2, -1)
    by_features = embed_composed(model, processor, None, texts, batch_size=2, progress=False, vision_features=features)
    torch.testing.assert_close(by_features, rows, rtol=0, atol=1e-6)
    swapped = embed_composed(
        model, processor, None, texts, batch_size=2, progress=False, vision_features=features.flip(1)
    )
    assert (swapped - rows).abs().max() > 1e-3


def test_the_mode_of_every_part_comes_back(pic2word):
    model, processor = pic2word
    model.mapper.train()
    rows = [embed_composed(model, processor, noise(2), ["*", "*"], progress=False) for _ in range(2)]
    assert rows[0].equal(rows[1]) and model.mapper.training and model.mapper.dropout.training
    model.eval()


def test_two_ranks_give_what_one_gives(pic2word, monkeypatch):
    model, processor = pic2word
    pictures, parts = noise(5), {}
    whole = embed_composed(model, processor, pictures, TEXTS, progress=False)
    monkeypatch.setattr(embeddings.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(embeddings.dist, "get_world_size", lambda: 2)
    for rank in (0, 1, 0):

        def gather(target, part, rank=rank):
            parts[rank] = part
            target[:] = [parts.get(0), parts.get(1)]

        monkeypatch.setattr(embeddings.dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(embeddings.dist, "all_gather_object", gather)
        result = embed_composed(model, processor, pictures, TEXTS, batch_size=2, progress=False)
    assert {rank: len(part) for rank, part in parts.items()} == {0: 3, 1: 2}
    torch.testing.assert_close(result, whole, rtol=0, atol=1e-6)


def test_wrong_calls(pic2word):
    model, processor = pic2word
    pictures = noise(2)

    def embed(*arguments, **options):
        return embed_composed(model, processor, *arguments, progress=False, **options)

    with pytest.raises(TypeError, match="texts is one string"):
        embed(pictures, "*")
    with pytest.raises(ValueError, match="either images or vision_features"):
        embed(None, ["*"])
    with pytest.raises(ValueError, match="either images or vision_features"):
        embed(pictures, ["*", "*"], vision_features=torch.ones(2, 8))
    with pytest.raises(ValueError, match="1 texts and 2 images"):
        embed(pictures, ["*"])
    with pytest.raises(ValueError, match="1 texts and 2 rows of vision_features"):
        embed(None, ["*"], vision_features=torch.ones(2, 8))
    with pytest.raises(ValueError, match="Text 0 has 2 placeholders for 1 pictures"):
        embed(pictures, ["* and *", "no picture"])
    with pytest.raises(ValueError, match="nothing to embed"):
        embed([], [])
