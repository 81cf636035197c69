"""A picture's word is never lost: where placeholders stand, checked by tokenising the pieces between them by hand."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import AutoProcessor, BertTokenizer, CLIPTokenizer, GPT2Tokenizer

from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer, clip_vocabulary
from hf_mm.models.pic2word.processing_pic2word import Pic2WordProcessor

# Glued stars are tokens of their own, as "*," is 41895 in CLIP's vocabulary.
CORPUS = ["a photo of a cat *, (*) ** *! in red, by day", "*, (*) ** *! a photo of a dog"] * 3
CONTEXT = 24
STAR = 265
SIZES = [(30, 20), (20, 30), (9, 9), (16, 40), (12, 12)]
IMAGES = [PILImage.fromarray(np.full((*size, 3), 40 * i + 20, dtype=np.uint8)) for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def tokenizer():
    return MMClipTokenizer.train_from_iterator(CORPUS, 560, model_max_length=CONTEXT)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return Pic2WordProcessor(MMClipImageProcessorPil(size=16), tokenizer)


def same(batch, expected):
    assert batch.keys() == expected.keys()
    for name, values in batch.items():
        assert torch.equal(values, expected[name]), name


def by_hand(tokenizer, pieces: list[str | None]) -> tuple[list[int], list[bool]]:
    """Ids and mask of a text in pieces, where None is a picture: each piece is tokenised alone."""
    ids, mask = [tokenizer.bos_token_id], [False]
    for piece in pieces:
        own = [STAR] if piece is None else tokenizer(piece, add_special_tokens=False, truncation=False)["input_ids"]
        ids, mask = ids + own, mask + [piece is None] * len(own)
    return [*ids, tokenizer.eos_token_id], [*mask, False]


def test_glued_stars_are_other_tokens(tokenizer):
    """So that the cases below can fail."""
    assert tokenizer("*", add_special_tokens=False)["input_ids"] == [STAR]
    for glued in ("*,", "(*)", "**", "*!"):
        assert STAR not in tokenizer(glued)["input_ids"]
    assert STAR in tokenizer("&ast;")["input_ids"]


TEXTS = {
    "a photo of *": ["a photo of", None],
    "*": [None],
    "a photo of *, red": ["a photo of", None, ", red"],
    "a photo of * , red": ["a photo of", None, ", red"],
    "a cat (*) in red": ["a cat (", None, ") in red"],
    "**": [None, None],
    "*,*!": [None, ",", None, "!"],
    "* *": [None, None],
    "  * \n\t* ": [None, None],
    "a*b": ["a", None, "b"],
    "*s cat": [None, "s cat"],
    "*'s cat": [None, "'s cat"],
    "A Photo OF *": ["a photo of", None],
    "日本 * é🐱": ["日本", None, "é🐱"],
    # literal stars, by the escape
    r"a \* photo of *": ["a *", "photo of", None],
    r"a photo of * \*": ["a photo of", None, "*"],
    r"\** cat": ["*", None, "cat"],
    r"*\* cat": [None, "*", "cat"],
    r"* \* *": [None, "*", None],
    r"*\**": [None, "*", None],
    r"\* \* * \*": ["* *", None, "*"],
    r"\*\*": ["**"],
    r"\*,* \*,": ["*,", None, "*,"],
    r"a\*b * cat": ["a*b", None, "cat"],
    r"\*": ["*"],
    # and by other spellings of it
    "&ast; cat": ["* cat"],
    "&ast; *": ["*", None],
    "* &ast;": [None, "*"],
    "*&ast;*": [None, "*", None],
    "* &#42; a photo of * &#x2a;": [None, "* a photo of", None, "*"],
    "&amp;ast; *": ["*", None],
    "＊ *": ["*", None],
    r"\* &ast; * \*": ["* *", None, "*"],
    "cat": ["cat"],
    "": [],
}


@pytest.mark.parametrize(("text", "pieces"), TEXTS.items(), ids=map(repr, TEXTS))
def test_placeholders_and_literal_stars(processor, text, pieces):
    """Section 2.2: the placeholder is a token by itself, whatever it is written against."""
    ids, mask = by_hand(processor.tokenizer, pieces)
    number = sum(mask)
    batch = processor(text=text, num_images=number)
    assert batch.input_ids.tolist() == [ids]
    assert batch.attention_mask.tolist() == [[1] * len(ids)]
    if number:
        assert batch.placeholder_mask.dtype == torch.bool
        assert batch.placeholder_mask.tolist() == [mask]
    else:
        assert "placeholder_mask" not in batch
    with pytest.raises(ValueError, match=f"0 has {number} "):
        processor(text=text, num_images=number + 1)
    together = processor(text=["a photo of * by day", text], num_images=[1, number])
    assert together.input_ids[1, : len(ids)].tolist() == ids
    assert together.placeholder_mask[1, : len(ids)].tolist() == mask
    assert together.placeholder_mask.sum().item() == 1 + number
    assert together.placeholder_mask.shape == together.input_ids.shape == together.attention_mask.shape


def test_a_batch_is_its_rows(processor):
    """Escapes in one row change no other."""
    texts = ["a photo of *", r"\* * cat", "*, * and *", "&ast; in * red"]
    batch = processor(text=texts, num_images=[1, 1, 3, 1])
    for row, (text, number) in enumerate(zip(texts, [1, 1, 3, 1], strict=True)):
        alone = processor(text=text, num_images=number)
        length = alone.input_ids.shape[1]
        assert torch.equal(batch.input_ids[row, :length], alone.input_ids[0])
        assert torch.equal(batch.placeholder_mask[row, :length], alone.placeholder_mask[0])
        assert not batch.placeholder_mask[row, length:].any()
        assert not batch.attention_mask[row, length:].any()


ONE_A_ROW = {
    "list": lambda: IMAGES[:2],
    "tuple": lambda: tuple(IMAGES[:2]),
    "generator": lambda: (image for image in IMAGES[:2]),
    "nested": lambda: [[IMAGES[0]], [IMAGES[1]]],
    "nested tuples": lambda: ((IMAGES[0],), (IMAGES[1],)),
    "mixed": lambda: [IMAGES[0], [IMAGES[1]]],
    "column of a dataset": lambda: Dataset.from_dict({"image": IMAGES[:2]}, features=Features({"image": Image()}))[
        "image"
    ],
}


@pytest.mark.parametrize("images", ONE_A_ROW.values(), ids=ONE_A_ROW)
def test_one_picture_a_text_in_any_form(processor, images):
    texts = ["a photo of *", "*, red"]
    expected = processor(text=texts, num_images=1)
    expected["pixel_values"] = processor.image_processor(IMAGES[:2], return_tensors="pt").pixel_values
    same(processor(images=images(), text=texts), expected)
    same(processor(images=images(), text=tuple(texts)), expected)
    same(processor(images(), (text for text in texts)), expected)
    column = Dataset.from_dict({"caption": texts}, features=Features({"caption": Value("string")}))["caption"]
    same(processor(images=images(), text=column), expected)


@pytest.mark.parametrize("library", [np.asarray, torch.as_tensor, list], ids=["numpy", "torch", "list of arrays"])
def test_one_array_of_all_pictures(processor, library):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 18, 3), dtype=np.uint8)
    expected = processor.image_processor([PILImage.fromarray(p) for p in pixels], return_tensors="pt").pixel_values
    if library is torch.as_tensor:
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    pixels = library(pixels)
    batch = processor(images=pixels, text=["a photo of *"] * 3)
    assert torch.equal(batch.pixel_values, expected)
    assert batch.placeholder_mask.sum(dim=1).tolist() == [1, 1, 1]
    batch = processor(images=pixels, text="* and * and *")
    assert torch.equal(batch.pixel_values, expected)
    with pytest.raises(ValueError, match="3"):
        processor(images=pixels, text=["a photo of *"] * 2)


def test_one_picture_as_an_array_is_one_picture(processor):
    pixels = np.zeros((20, 18, 3), dtype=np.uint8)
    for one in (pixels, torch.zeros(3, 20, 18, dtype=torch.uint8), PILImage.fromarray(pixels)):
        batch = processor(images=one, text="a photo of *")
        assert batch.pixel_values.shape == (1, 3, 16, 16)
        with pytest.raises(ValueError, match="0 has 2 placeholders"):
            processor(images=one, text="* and *")


SEVERAL_A_ROW = {
    "nested": lambda: [IMAGES[:2], [IMAGES[2]], IMAGES[3:]],
    "tuples": lambda: (tuple(IMAGES[:2]), (IMAGES[2],), tuple(IMAGES[3:])),
    "a bare one among lists": lambda: [IMAGES[:2], IMAGES[2], IMAGES[3:]],
    "generators": lambda: ((image for image in row) for row in (IMAGES[:2], IMAGES[2:3], IMAGES[3:])),
    "flat": lambda: IMAGES,
    "flat generator": lambda: iter(IMAGES),
    "column of lists": lambda: Dataset.from_dict(
        {"images": [IMAGES[:2], IMAGES[2:3], IMAGES[3:]]}, features=Features({"images": [Image()]})
    )["images"],
}


@pytest.mark.parametrize("images", SEVERAL_A_ROW.values(), ids=SEVERAL_A_ROW)
def test_several_pictures_a_text_in_reading_order(processor, images):
    texts = ["* and *", "a photo of *", "*,*"]
    expected = processor(text=texts, num_images=[2, 1, 2])
    expected["pixel_values"] = processor.image_processor(IMAGES, return_tensors="pt").pixel_values
    same(processor(images=images(), text=texts), expected)


@pytest.mark.parametrize("images", [IMAGES[:2], [IMAGES[:2]], tuple(IMAGES[:2])], ids=["flat", "nested", "tuple"])
def test_several_pictures_of_one_text(processor, images):
    batch = processor(images=images, text="* with *")
    assert batch.pixel_values.shape == (2, 3, 16, 16)
    assert batch.placeholder_mask.sum().item() == 2
    with pytest.raises(ValueError, match="0 has 1 placeholder"):
        processor(images=images, text="a photo of *")


MISMATCHES = {
    "missing": (IMAGES[:2], ["a photo of *", "a photo"], 1, 0, 1),
    "doubled": (IMAGES[:2], ["a photo of *", "* *"], 1, 2, 1),
    "escaped": (IMAGES[:2], [r"a photo of \*", "*"], 0, 0, 1),
    "an entity": (IMAGES[:2], ["*", "&ast;"], 1, 0, 1),
    "in other rows": ([IMAGES[:1], IMAGES[1:3]], ["* *", "*"], 0, 2, 1),
    "none for it": ([IMAGES[:1], []], ["*", "*"], 1, 1, 0),
    "as many in all, but a row without": (IMAGES[:2], ["* *", "a photo"], 0, 2, 1),
    "one picture, F31": (IMAGES[:1], "* and *", 0, 2, 1),
    "two pictures, F31": (IMAGES[:2], "a photo of *", 0, 1, 2),
    "nothing written": (IMAGES[0], "", 0, 0, 1),
}


@pytest.mark.parametrize(("images", "text", "row", "written", "given"), MISMATCHES.values(), ids=MISMATCHES)
def test_a_text_with_other_than_its_pictures_is_named(processor, images, text, row, written, given):
    with pytest.raises(ValueError, match=rf"(?i)(row|text) {row} has {written} .*{given} picture") as refused:
        processor(images=images, text=text)
    assert "\n" not in str(refused.value)


def test_pictures_for_more_texts_than_there_are(processor):
    with pytest.raises(ValueError, match="3.*2"):
        processor(images=IMAGES[:3], text=["a photo of *"] * 2)
    with pytest.raises(ValueError, match="3.*2"):
        processor(text=["a photo of *"] * 2, num_images=[1, 1, 1])


def test_a_plain_text_with_a_placeholder_has_no_picture_for_it(processor):
    with pytest.raises(ValueError, match=r"1 has 1 placeholder.*\\\*"):
        processor(text=["a cat", "a photo of *"])
    batch = processor(text=[r"a \* cat", "a cat"])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert (batch.input_ids == STAR).sum().item() == 1


def test_what_each_call_returns(processor):
    assert set(processor(images=IMAGES)) == {"pixel_values"}
    assert processor(images=IMAGES).pixel_values.shape == (5, 3, 16, 16)
    assert set(processor(text="a cat")) == {"input_ids", "attention_mask"}
    everything = {"pixel_values", "input_ids", "attention_mask", "placeholder_mask"}
    assert set(processor(images=IMAGES[0], text="*")) == everything == set(processor.model_input_names)
    with pytest.raises(ValueError, match="images, text, or both"):
        processor()
    with pytest.raises(ValueError, match="num_images"):
        processor(images=IMAGES[0], text="*", num_images=1)


@pytest.mark.parametrize("number", [1, [1, 1], (1, 1), np.array([1, 1]), torch.tensor([1, 1])], ids=str)
def test_numbers_of_pictures_in_any_form(processor, number):
    assert processor(text=["*", "a *"], num_images=number).placeholder_mask.sum(dim=1).tolist() == [1, 1]


@pytest.mark.parametrize("missing", [None, float("nan"), 3])
def test_missing_texts_and_pictures_are_named(processor, missing):
    with pytest.raises(ValueError, match="Text 1 is"):
        processor(IMAGES[:2], ["*", missing])
    with pytest.raises((ValueError, TypeError), match="Image 1: "):
        processor([IMAGES[0], missing], ["*", "*"])
    for images, text in (([], ["*"]), (IMAGES, []), ([[]], ["*"])):
        with pytest.raises(ValueError):
            processor(images, text)


WORDS = "cat " * 30


@pytest.mark.parametrize(
    "text",
    [
        f"{WORDS} *",
        f"* {WORDS} *",
        "cat " * 22 + "*",
        rf"\* {WORDS} *",
        f"&ast; {WORDS} *",
        f"＊ {WORDS} *",
        rf"* \* {WORDS} *",
        f"* &ast; {WORDS} *",
        rf"{WORDS} * \*",
    ],
    ids=[
        "cut off",
        "the second",
        "by one token",
        "with an escape left",
        "with an entity left",
        "with a wide star left",
        "the second, an escape left",
        "the second, an entity left",
        "and a star behind it",
    ],
)
@pytest.mark.parametrize("others", [0, 1])
def test_a_placeholder_that_would_be_cut_off_is_refused(processor, text, others):
    number = text.count("*") - text.count("\\*")
    texts, numbers = ["*"] * others + [text], [1] * others + [number]
    with pytest.raises(ValueError, match=rf"(?i)(row|text) {others} .*cut") as refused:
        processor(text=texts, num_images=numbers)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (f"a photo of * {WORDS}", ["a photo of", None, WORDS]),
        (f"*,* {WORDS} \\*", [None, ",", None, WORDS]),
        ("cat " * 21 + "*", ["cat " * 21, None]),
        ("cat " * 21 + "* \\* cat", ["cat " * 21, None, "* cat"]),
        (rf"\* * {WORDS}", ["*", None, WORDS]),
        (f"&ast; * {WORDS}", ["*", None, WORDS]),
    ],
)
def test_what_is_cut_behind_the_placeholder_is_no_matter(processor, text, pieces):
    ids, mask = by_hand(processor.tokenizer, pieces)
    batch = processor(text=text, num_images=sum(mask))
    ids = ids[: CONTEXT - 1] + ids[-1:] if len(ids) > CONTEXT else ids
    assert batch.input_ids.tolist() == [ids]
    assert batch.placeholder_mask.tolist() == [(mask + [False] * CONTEXT)[: len(ids)]]


@pytest.mark.parametrize("length", [3, 4, 5, 6])
def test_a_shorter_context_cuts_the_same_way(processor, length):
    if length < 6:
        with pytest.raises(ValueError, match="cut"):
            processor(text="a photo of *", num_images=1, max_length=length)
    else:
        batch = processor(text="a photo of * by day", num_images=1, max_length=length, truncation=True)
        assert batch.input_ids.shape == (1, length)
        assert batch.placeholder_mask.sum().item() == 1


def test_without_truncation_nothing_is_cut(processor):
    batch = processor(text=rf"\* {WORDS} *", num_images=1, truncation=False)
    assert batch.input_ids.shape[1] == 1 + 1 + 30 + 1 + 1
    assert batch.placeholder_mask[0].nonzero().tolist() == [[32]]


def test_an_end_token_in_the_text_does_not_hide_the_picture(processor):
    """The text is pooled at its first end token: a picture behind it would be ignored."""
    with pytest.raises(ValueError):
        processor(text="a cat <|endoftext|> *", num_images=1)


def test_tensors_by_default_and_on_request(processor):
    texts = ["a photo of *", "*"]
    batch = processor(IMAGES[:2], texts)
    assert all(isinstance(values, torch.Tensor) for values in batch.values())
    arrays = processor(IMAGES[:2], texts, return_tensors="np")
    assert all(isinstance(values, np.ndarray) for values in arrays.values())
    lists = processor(IMAGES[:2], texts, return_tensors=None)
    assert lists["placeholder_mask"] == batch.placeholder_mask.tolist() == arrays["placeholder_mask"].tolist()
    assert lists["input_ids"] == batch.input_ids.tolist()
    ragged = processor(text=texts, num_images=1, padding=False, return_tensors=None)
    assert [len(row) for row in ragged["placeholder_mask"]] == [len(row) for row in ragged["input_ids"]]
    assert len(ragged["input_ids"][0]) > len(ragged["input_ids"][1])


def test_options_reach_the_parts(processor):
    batch = processor(IMAGES[:2], ["*", r"\* *"], padding="max_length", size=8)
    assert batch.input_ids.shape == batch.placeholder_mask.shape == (2, CONTEXT)
    assert batch.placeholder_mask.nonzero().tolist() == [[0, 1], [1, 2]]
    assert batch.pixel_values.shape == (2, 3, 8, 8)
    batch = processor(IMAGES[0], "*", images_kwargs={"size": 8}, text_kwargs={"padding": "max_length"})
    assert batch.pixel_values.shape == (1, 3, 8, 8)
    assert batch.input_ids.shape == (1, CONTEXT)


def test_a_cast_leaves_ids_and_masks_alone(processor):
    cast = processor(IMAGES[0], "a photo of *").to(torch.bfloat16)
    assert cast.pixel_values.dtype == torch.bfloat16
    assert cast.input_ids.dtype == torch.int64
    assert cast.placeholder_mask.dtype == torch.bool


@pytest.mark.parametrize("placeholder", ["*", "@", "cat"])
def test_every_setting_survives_saving(tokenizer, placeholder, tmp_path):
    image_processor = MMClipImageProcessorPil(
        size=16, crop_size={"height": 12, "width": 14}, image_mean=(0.1, 0.2, 0.3)
    )
    processor = Pic2WordProcessor(image_processor, tokenizer, placeholder=placeholder)
    processor.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "processor_config.json").read_text())
    for reopened in (
        Pic2WordProcessor.from_pretrained(tmp_path, backend="pil"),
        AutoProcessor.from_pretrained(tmp_path, backend="pil"),
    ):
        assert type(reopened) is Pic2WordProcessor
        assert reopened.placeholder == placeholder
        assert reopened.placeholder_token_id == processor.placeholder_token_id
        same(reopened(IMAGES[0], f"a photo of {placeholder}"), processor(IMAGES[0], f"a photo of {placeholder}"))


def test_another_placeholder(tokenizer):
    """One token, also of one's own; with it a star is a star, and the escape is before it."""
    own = MMClipTokenizer.train_from_iterator(CORPUS, 560, model_max_length=CONTEXT)
    own.add_tokens(["<pic>"])
    for placeholder, table in (("@", tokenizer), ("<pic>", own)):
        processor = Pic2WordProcessor(MMClipImageProcessorPil(size=16), table, placeholder=placeholder)
        batch = processor(IMAGES[0], f"a * cat{placeholder}, \\{placeholder}")
        assert (batch.input_ids == processor.placeholder_token_id).sum().item() == 2
        place = int(batch.placeholder_mask[0].nonzero())
        assert batch.input_ids[0, place] == processor.placeholder_token_id
        assert place == 1 + len(table("a * cat", add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("placeholder", ["<pic>", "* *", "", " "])
def test_a_placeholder_that_is_not_one_token_is_refused(tokenizer, placeholder):
    with pytest.raises(ValueError, match="one token"):
        Pic2WordProcessor(MMClipImageProcessorPil(size=16), tokenizer, placeholder=placeholder)


def bert() -> BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "*", ",", "red", "(", ")", "cat"]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=CONTEXT)


def clip() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=clip_vocabulary([("*", ",</w>")]), merges=[("*", ",</w>")], model_max_length=CONTEXT)


@pytest.mark.parametrize("build", [bert, clip])
def test_tokenizers_of_transformers(build):
    tokenizer = build()
    processor = Pic2WordProcessor(MMClipImageProcessorPil(size=16), tokenizer)
    star = tokenizer("*", add_special_tokens=False)["input_ids"]
    assert len(star) == 1
    for text, pieces in (
        ("a photo of *, red", ["a photo of", None, ", red"]),
        (r"\* cat (*)", ["* cat (", None, ")"]),
        ("**", [None, None]),
    ):
        ids = tokenizer("")["input_ids"][:1]
        mask = [False]
        for piece in pieces:
            own = star if piece is None else tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids, mask = ids + own, mask + [piece is None] * len(own)
        batch = processor(text=[text, "a photo of a cat * cat cat cat cat"], num_images=[sum(mask), 1])
        assert batch.input_ids[0, : len(ids)].tolist() == ids
        assert batch.placeholder_mask[0, : len(ids)].tolist() == mask
        assert batch.placeholder_mask[0].sum() == sum(mask)
    with pytest.raises(ValueError, match="cut"):
        processor(text=r"\* " + "cat " * 40 + "*", num_images=1)


@pytest.mark.parametrize("text", ["cat *", r"\* cat *", r"* \* cat"])
def test_padding_on_the_left(text):
    """Where the tokenizer of another text tower pads so."""
    tokenizer = bert()
    tokenizer.padding_side = "left"
    processor = Pic2WordProcessor(MMClipImageProcessorPil(size=16), tokenizer)
    tokenizer.padding_side = "right"
    right = processor(text=text, num_images=1)
    tokenizer.padding_side = "left"
    batch = processor(text=[text, "a photo of a cat cat cat *"], num_images=1)
    length = right.input_ids.shape[1]
    assert torch.equal(batch.input_ids[0, -length:], right.input_ids[0])
    assert torch.equal(batch.placeholder_mask[0, -length:], right.placeholder_mask[0])
    assert not batch.placeholder_mask[0, :-length].any()


@pytest.mark.parametrize("text", ["cat *", r"\* cat *", r"* \* cat"])
def test_a_tokenizer_that_adds_no_end(text):
    """A decoder's: the placeholder may be the last token of all."""
    tokenizer = bert()
    tokenizer.backend_tokenizer.post_processor = None
    processor = Pic2WordProcessor(MMClipImageProcessorPil(size=16), tokenizer)
    batch = processor(text=text, num_images=1)
    tokens = text.replace("\\*", "x").split()
    assert batch.placeholder_mask.tolist() == [[token == "*" for token in tokens]]


def test_a_placeholder_that_is_another_token_inside_a_text_is_no_cut(tmp_path):
    """GPT-2's star after white space is another token than its star at the beginning: said when it is built, or found."""
    symbols = list(clip_vocabulary([]))[:256]
    vocab = {symbol: index for index, symbol in enumerate([*symbols, "Ġ*", "<|endoftext|>"])}
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=[("Ġ", "*")])
    tokenizer.pad_token = "<|endoftext|>"
    try:
        processor = Pic2WordProcessor(MMClipImageProcessorPil(size=16), tokenizer)
    except ValueError as refused:
        assert "token" in str(refused)
        return
    assert processor(text="a photo of * , red", num_images=1).placeholder_mask.sum().item() == 1
