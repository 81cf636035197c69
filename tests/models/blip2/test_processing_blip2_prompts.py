"""What BLIP-2's processor gives a language model, against ids laid out by hand and transformers' own processor."""

import numpy as np
import pytest
import torch
from small_processors import IMAGES, QUERIES, SLOTS, A, B, C, D, byte_level, pieces, rows, same, word_tokenizer
from transformers import Blip2Processor

from hf_mm.models.blip2.processing_blip2 import MMBlip2Processor

# Layouts

LAYOUTS = {
    "<image>a photo of": [None, "</s>", "a photo of"],
    "a photo of": [None, "</s>", "a photo of"],
    "": [None, "</s>"],
    "<image>": [None, "</s>"],
    "<image> a photo of": [None, "</s>", " a photo of"],
    "<image><image>a": [None, None, "</s>", "a"],
    " <image>\n<image> ": [None, None, "</s>", " "],
    "a <image> and<image>": ["</s>", "a ", None, " and", None],
    "<image>a<image> cat": [None, "</s>", "a", None, " cat"],
    "ca<image>t": ["</s>", "ca", None, "t"],
}


@pytest.mark.parametrize(("text", "layout"), LAYOUTS.items(), ids=map(repr, LAYOUTS))
def test_layout_of_a_decoder_only_model(opt_processor, opt, text, layout):
    """Section 3.5: pictures before the start token, each piece of text tokenised by itself, one start token."""
    number = max(text.count("<image>"), 1)
    batch = opt_processor(text=text, num_images=number)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch.input_ids.tolist() == [pieces(opt, *layout)]
    assert batch.attention_mask.tolist() == [[1] * batch.input_ids.shape[1]]
    with_pictures = opt_processor(images=IMAGES[:number], text=text)
    assert torch.equal(with_pictures.input_ids, batch.input_ids)
    assert with_pictures.pixel_values.shape == (number, 3, 8, 8)


@pytest.mark.parametrize(("text", "layout"), LAYOUTS.items(), ids=map(repr, LAYOUTS))
def test_start_token_first(image_processor, opt, text, layout):
    first = MMBlip2Processor(image_processor, opt, num_query_tokens=QUERIES, bos_first=True)
    others = [piece for piece in layout if piece != "</s>"]
    batch = first(text=text, num_images=max(text.count("<image>"), 1))
    assert batch.input_ids.tolist() == [[opt.bos_token_id, *pieces(opt, *others)]]


def test_layout_of_an_encoder_decoder(t5_processor, t5):
    batch = t5_processor(images=[A, B], text=["a photo of", "<image>cat"])
    end = t5.eos_token_id
    assert rows(batch) == [[*pieces(t5, None, "a photo of"), end], [*pieces(t5, None, "cat"), end]]
    assert batch.input_ids[1].tolist()[-2:] == [t5.pad_token_id] * 2


def test_an_end_token_never_ends_a_prompt(image_processor, bert):
    """A decoder-only model goes on from its prompt, though its tokenizer ends every text."""
    processor = MMBlip2Processor(image_processor, bert, num_query_tokens=QUERIES, eos="[SEP]")
    cls, sep = bert.cls_token_id, bert.sep_token_id
    assert processor(images=A, text="a photo").input_ids.tolist() == [[*SLOTS, cls, *pieces(bert, "a photo")]]
    batch = processor(images=A, text="a photo", suffix="of cat")
    assert batch.input_ids.tolist() == [[*SLOTS, cls, *pieces(bert, "a photo of cat"), sep]]


@pytest.mark.parametrize("text", ["a photo of", "cat", "Question: what is it? Answer:"])
def test_equals_transformers_with_a_token_for_pictures(image_processor, text):
    """One picture and a text, where the vocabulary has a token for pictures."""
    ours, theirs = byte_level("</s>"), byte_level("</s>")
    for tokenizer in (ours, theirs):
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    number = ours.convert_tokens_to_ids("<image>")
    peer = Blip2Processor(image_processor, theirs, num_query_tokens=QUERIES)
    processor = MMBlip2Processor(image_processor, ours, num_query_tokens=QUERIES, image_token_id=number)
    expected = peer(images=A, text=text, return_tensors="pt")
    same(processor(images=A, text=text), expected)
    same(
        processor(images=A, text=text, padding="max_length", padding_side="right", max_length=50),
        peer(images=A, text=text, return_tensors="pt", padding="max_length", max_length=50),
    )
    assert processor.decode(expected.input_ids[0], skip_special_tokens=True) == text


def test_the_tokenizer_stays_as_it_is(image_processor, opt):
    before = opt.backend_tokenizer.to_str(), opt.padding_side, len(opt), dict(opt.init_kwargs)
    processor = MMBlip2Processor(image_processor, opt, num_query_tokens=QUERIES, eos="\n")
    processor(images=[A, B], text=["a", "a photo"], padding_side="left", truncation=True, max_length=60)
    processor(images=[A, B], suffix=["a", "a photo"], padding="max_length", max_length=40)
    assert (opt.backend_tokenizer.to_str(), opt.padding_side, len(opt), dict(opt.init_kwargs)) == before
    assert "<image>" not in opt.get_vocab()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_of_the_tokenizer_does_not_matter(image_processor, side):
    tokenizer = byte_level("</s>", padding_side=side)
    processor = MMBlip2Processor(image_processor, tokenizer, num_query_tokens=QUERIES)
    short, long = pieces(tokenizer, None, "</s>", "a"), pieces(tokenizer, None, "</s>", "a cat")
    pads = [tokenizer.pad_token_id] * (len(long) - len(short))
    given = {"images": [A, B], "text": ["a", "a cat"]}
    assert processor(**given).input_ids.tolist() == [pads + short, long]
    assert processor(**given).attention_mask.tolist() == [[0] * len(pads) + [1] * len(short), [1] * len(long)]
    assert processor(**given, padding_side="right").input_ids.tolist() == [short + pads, long]
    assert processor(**given, return_tensors=None, padding=False).input_ids == [short, long]
    trained = processor(images=[A, B], suffix=["a", "a cat"])
    assert trained.attention_mask[0].tolist() == sorted(trained.attention_mask[0].tolist(), reverse=True)
    assert processor(**given, pad_to_multiple_of=16).input_ids.shape == (2, 16)


# Which picture belongs to which text (F35)

THREE = ["<image> a <image>", "a cat", "a <image>"]


@pytest.mark.parametrize("images", [[[A, B], [], [C]], [A, B, C], ((A, B), (), (C,)), iter([A, B, C])])
def test_nested_and_flat_pictures(opt_processor, opt, images):
    batch = opt_processor(images=images, text=THREE)
    assert rows(batch) == [
        pieces(opt, None, "</s>", " a ", None),
        pieces(opt, "</s>", "a cat"),
        pieces(opt, "</s>", "a ", None),
    ]
    same(batch, opt_processor(images=[[A, B], [], [C]], text=THREE))
    assert torch.equal(
        batch.pixel_values, opt_processor.image_processor([A, B, C], return_tensors="pt")["pixel_values"]
    )
    counted = opt_processor(text=THREE, num_images=[2, 0, 1])
    assert torch.equal(counted.input_ids, batch.input_ids)


def test_permuted_rows(opt_processor):
    batch = opt_processor(images=[[A, B], [], [C]], text=THREE)
    turned = opt_processor(images=[[C], [A, B], []], text=[THREE[2], THREE[0], THREE[1]])
    assert torch.equal(turned.input_ids, batch.input_ids[[2, 0, 1]])
    assert torch.equal(turned.attention_mask, batch.attention_mask[[2, 0, 1]])
    assert torch.equal(turned.pixel_values, batch.pixel_values[[2, 0, 1]])


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        ([[A], [], [B, C]], THREE, "Text 0 has 2 image tokens for 1 "),
        ([[A, B], [D], []], THREE, "Text 2 has 1 image tokens for 0 "),
        ([A, B], THREE, "pictures for 2 texts, but 3"),
        ([A, B, C, D], THREE, "pictures for 4 texts, but 3"),
        (None, THREE, "Text 0 has 2 image tokens for 0 "),
        (None, "<image>", "Text 0 has 1 image tokens for 0 "),
        ([A, B], "a photo", "Text 0 has 0 image tokens for 2 "),
        (A, ["a", "cat"], "pictures for 1 texts, but 2"),
    ],
)
def test_wrong_numbers_of_pictures(opt_processor, images, text, message):
    with pytest.raises(ValueError, match=message):
        opt_processor(images=images, text=text)


def test_pictures_without_texts_get_the_prompt(image_processor, opt):
    processor = MMBlip2Processor(image_processor, opt, num_query_tokens=QUERIES, prompt="a photo of")
    prompted = pieces(opt, None, "</s>", "a photo of")
    assert processor(images=A).input_ids.tolist() == [prompted]
    assert processor(images=[A, B]).input_ids.tolist() == [prompted] * 2
    assert processor(images=np.zeros((3, 9, 9, 3), np.uint8)).input_ids.tolist() == [prompted] * 3
    assert processor(num_images=[1, 1]).input_ids.tolist() == [prompted] * 2
    assert processor(num_images=1).input_ids.tolist() == [prompted]
    assert processor(images=A, text="").input_ids.tolist() == [prompted]
    assert processor(images=[A, B], text=["", "a"]).input_ids[0].tolist() == prompted
    learnt = [processor(images=A, suffix="a", **empty) for empty in ({}, {"text": ""})]
    assert all(torch.equal(learnt[0][name], learnt[1][name]) for name in ("input_ids", "labels"))
    assert rows(processor(text=["a", "cat"], num_images=1)) == [
        pieces(opt, None, "</s>", "a"),
        pieces(opt, None, "</s>", "cat"),
    ]


def test_texts_without_pictures(opt_processor, opt):
    assert opt_processor(text="a cat").input_ids.tolist() == [opt("a cat")["input_ids"]]
    batch = opt_processor(images=[[], []], text=["a cat", "cat"])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert rows(batch) == [opt("a cat")["input_ids"], opt("cat")["input_ids"]]


# Lengths


def test_captions_are_cut_with_their_end_kept(opt_processor, opt, t5_processor, t5):
    """Section 3.1: 32 tokens of text, pictures not counted."""
    batch = opt_processor(images=A, text="a", suffix="cat " * 40)
    words = [*pieces(opt, "</s>", "a" + " cat" * 31, "\n")]
    assert batch.input_ids.tolist() == [SLOTS + words]
    batch = t5_processor(images=A, text="photo " * 45, suffix="cat " * 45)
    assert batch.input_ids.tolist() == [[*pieces(t5, None, "photo " * 31), t5.eos_token_id]]
    assert batch.labels.tolist() == [[*pieces(t5, "cat " * 31), t5.eos_token_id]]
    whole = t5_processor(images=A, text="photo " * 45, suffix="cat " * 45, truncation=False)
    assert whole.labels.shape == (1, 46)
    assert whole.input_ids.shape == (1, QUERIES + 46)


def test_questions_are_not_cut(image_processor, opt):
    processor = MMBlip2Processor(image_processor, opt, num_query_tokens=QUERIES, max_text_length=4)
    batch = processor(images=A, text="what is it?", suffix="cat cat cat cat cat", mode="vqa")
    asked = pieces(opt, "</s>", "Question: what is it? Answer:")
    assert rows(batch)[0] == SLOTS + asked + pieces(opt, " cat cat cat") + [opt.eos_token_id]


def test_static_shapes(opt_processor, t5_processor):
    batch = opt_processor(images=[A, B], suffix=["cat", "a cat"], padding="max_length", max_length=40)
    assert batch.input_ids.shape == batch.labels.shape == (2, 40)
    batch = t5_processor(images=[A, B], suffix=["cat", "a cat"], padding="max_length", max_length=40)
    assert batch.input_ids.shape == (2, 40)
    assert batch.labels.shape == (2, 32)


def test_prompts_are_cut_where_asked_and_pictures_never(opt_processor, opt):
    row = pieces(opt, None, "</s>", "a photo of")
    assert opt_processor(images=A, text="a photo of", truncation=True, max_length=6).input_ids.tolist() == [row[:6]]
    with pytest.raises(ValueError, match=r"Row 0 .* 6 positions"):
        opt_processor(images=A, text="a photo of", max_length=6)
    with pytest.raises(ValueError, match=r"Row 1 was cut to 6 tokens before the end of a picture"):
        opt_processor(images=[A, B], text=["a", "photo <image>"], truncation=True, max_length=6)
    with pytest.raises(ValueError, match=r"Row 0 has 94 tokens, .* 64 positions"):
        opt_processor(images=A, text="a" * 90)
    assert opt_processor(images=A, text="a" * 90, truncation=True).input_ids.shape == (1, 64)
    with pytest.raises(ValueError, match=r"Row 0 has 95 tokens"):
        opt_processor(images=A, suffix="a" * 90, truncation=False)


# Wrong calls


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "nothing to process"),
        ({"images": A, "text": None, "suffix": [None]}, "Text 0 is None"),
        ({"images": [A, B], "text": ["a", float("nan")]}, "Text 1 is nan"),
        ({"images": [A, B], "suffix": ["cat", " "]}, "Suffix 1 is empty"),
        ({"images": [A, B], "suffix": ["cat", "..."]}, "Suffix 1 is empty"),
        ({"images": A, "suffix": "a <image>"}, "Suffix 0 has a picture"),
        ({"images": A, "suffix": ["a", "b"]}, "pictures for 1 texts, but 2"),
        ({"images": A, "text": ["a"], "suffix": ["a", "b"]}, "1 texts but 2 suffixes"),
        ({"images": A, "mode": "caption"}, "give them as suffix"),
        ({"images": A, "mode": "vqa"}, "needs text: questions"),
        ({"images": A, "text": "?!..", "mode": "matching"}, "generation, caption, vqa, prefix_lm, not 'matching'"),
        ({"images": A, "text": "..", "mode": "vqa"}, "Question 0 is empty"),
        ({"images": A, "text": "a", "suffix": "b", "mode": "generation"}, "leave suffix out"),
        ({"images": A, "text": "a cat", "mode": "prefix_lm"}, "give rng"),
        ({"images": A, "text": "a <image> cat", "mode": "prefix_lm", "rng": [0]}, "Caption 0 has a picture within"),
        ({"images": A, "text": ".", "mode": "prefix_lm", "rng": [0]}, "Caption 0 is empty"),
        ({"images": A, "text": "a cat", "mode": "prefix_lm", "rng": [0, 1]}, "2 seeds for 1 texts"),
        ({"images": A, "text": "a", "num_images": 1}, "leave it out where images are"),
        ({"text": 7}, "not 7"),
    ],
)
def test_wrong_calls(opt_processor, call, message):
    with pytest.raises(ValueError, match=message):
        opt_processor(**call)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_query_tokens": 0}, "at least 1, not 0"),
        ({"image_token": ""}, "must not be empty"),
        ({"image_token_id": 5}, "is the word .* of the tokenizer"),
        ({"question_template": "Question:"}, "must have one {}"),
        ({"max_text_length": 2}, "at least 3, not 2"),
        ({"eos": "cats"}, "'cats' is "),
    ],
)
def test_wrong_settings(image_processor, opt, settings, message):
    with pytest.raises(ValueError, match=message):
        MMBlip2Processor(image_processor, opt, **{"num_query_tokens": QUERIES} | settings)


def test_no_end_token(image_processor):
    tokenizer = word_tokenizer([], [], ["<unk>"])
    processor = MMBlip2Processor(image_processor, tokenizer, num_query_tokens=QUERIES)
    assert processor(images=A, text="a photo").input_ids.tolist() == [pieces(tokenizer, None, "a photo")]
    with pytest.raises(ValueError, match="needs max_length"):
        processor(images=A, text="a photo", padding="max_length")
    with pytest.raises(ValueError, match="no end token"):
        processor(images=A, suffix="a cat")
    with pytest.raises(ValueError, match="one token"):
        MMBlip2Processor(image_processor, tokenizer, num_query_tokens=QUERIES, eos="giraffe")
