"""Rows and labels of BLIP-2 against ids laid out by hand, and against transformers' own processor."""

import base64
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    Blip2Processor,
    ImageTextToTextPipeline,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config
from hf_mm.models.blip2.processing_blip2 import MMBlip2Processor
from hf_mm.models.blip2.text_blip2 import clean_caption
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil

SLOT, QUERIES = -200, 3
SLOTS = [SLOT] * QUERIES
IGNORED = -100
IMAGES = [Image.fromarray(np.full((20 + i, 30, 3), 40 * i + 20, dtype=np.uint8)) for i in range(4)]
A, B, C, D = IMAGES
WORDS = [
    "a",
    "photo",
    "of",
    "cat",
    "dog",
    "red",
    "two",
    "what",
    "color",
    "is",
    "it",
    "question",
    ":",
    "answer",
    "short",
    "?",
    ".",
    ",",
    "one",
    "answers",
    "dogs",
    "and",
    "on",
    "the",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def word_tokenizer(before: list[str], after: list[str], special: list[str], **options) -> PreTrainedTokenizerFast:
    """One token a word of lower-cased text, between the tokens `before` and `after`."""
    vocab = {word: number for number, word in enumerate([*special, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=special[0]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if before or after:
        frame = [(token, vocab[token]) for token in before + after]
        backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=frame)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=special[0], **options)


@pytest.fixture(scope="module")
def bert():
    special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    named = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return word_tokenizer(["[CLS]"], ["[SEP]"], special, **named, bos_token="[DEC]", model_max_length=40)


@pytest.fixture(scope="module")
def t5():
    return word_tokenizer([], ["</s>"], ["<unk>", "<pad>", "</s>"], pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def opt():
    """As OPT's: byte-level, the start token is the end token, "\\n" is a token."""
    return byte_level("</s>", model_max_length=64)


@pytest.fixture
def chat():
    """As SmolLM's and Qwen's: no start token, pad = end, a template for texts alone."""
    tokenizer = byte_level(None, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def byte_level(bos: str | None, **options) -> PreTrainedTokenizerFast:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    pairs = [("Ġ", "c"), ("a", "t"), ("Ġc", "at"), ("Ġ", "a"), ("o", "f"), ("Ġ", "of")]
    merged = ["".join(pair) for pair in pairs]
    vocab = {token: number for number, token in enumerate([*special, *symbols, *merged])}
    backend = Tokenizer(models.BPE(vocab, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos is not None:
        frame = [(bos, vocab[bos])]
        backend.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=frame)
    named = {"eos_token": "</s>", "pad_token": "<pad>"} | ({} if bos is None else {"bos_token": bos})
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, **named | options, extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    )


@pytest.fixture(scope="module")
def image_processor():
    return MMClipImageProcessorPil(size={"height": 8, "width": 8}, do_center_crop=False)


@pytest.fixture(scope="module")
def stage_1(image_processor, bert):
    return MMBlip2Processor(image_processor, bert)


@pytest.fixture(scope="module")
def opt_processor(image_processor, opt):
    return MMBlip2Processor(image_processor, opt, num_query_tokens=QUERIES, eos="\n")


@pytest.fixture(scope="module")
def t5_processor(image_processor, t5):
    return MMBlip2Processor(image_processor, t5, num_query_tokens=QUERIES, is_encoder_decoder=True)


def pieces(tokenizer, *texts: str | None) -> list[int]:
    """Ids of texts tokenised one by one, where None is a picture."""
    rows = [SLOTS if text is None else tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [number for row in rows for number in row]


def rows(batch, name="input_ids") -> list[list[int]]:
    """Rows without their padding."""
    return [row[mask.bool()].tolist() for row, mask in zip(batch[name], batch["attention_mask"], strict=True)]


def same(batch, expected):
    assert batch.keys() == expected.keys()
    for name, values in batch.items():
        assert torch.equal(values, expected[name]), name


# Stage 1


def test_stage_1_pictures_and_texts(stage_1, bert, image_processor):
    batch = stage_1(images=[A, B], text=["A photo of a CAT.", "dog!"])
    assert set(batch) == {"pixel_values", "input_ids", "attention_mask"}
    words = [bert.convert_tokens_to_ids(word) for word in ["[CLS]", "a", "photo", "of", "a", "cat", "[SEP]"]]
    dog = [bert.convert_tokens_to_ids(word) for word in ["[CLS]", "dog", "[SEP]"]]
    assert batch.input_ids.tolist() == [words, dog + [bert.pad_token_id] * 4]
    assert batch.attention_mask.tolist() == [[1] * 7, [1] * 3 + [0] * 4]
    assert torch.equal(batch.pixel_values, image_processor([A, B], return_tensors="pt")["pixel_values"])
    assert set(stage_1(images=[[A], [B, C]])) == {"pixel_values"}
    assert set(stage_1(text="a dog")) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 32),
        ({"mode": "contrastive"}, 32),
        ({"mode": "matching"}, 35),
        ({"max_length": 9}, 9),
        ({"max_length": 99}, 40),
    ],
)
def test_stage_1_lengths(stage_1, bert, options, length):
    """Section 3.1: 32 in training, 35 in the retrieval evaluation, never more than there are positions."""
    ids = stage_1(text="cat " * 45, **options).input_ids[0].tolist()
    assert ids == [bert.cls_token_id] + [bert.convert_tokens_to_ids("cat")] * (length - 2) + [bert.sep_token_id]


def test_stage_1_blank_captions_are_framed(stage_1, bert):
    batch = stage_1(text=["", "  ", "..."])
    assert batch.input_ids.tolist() == [[bert.cls_token_id, bert.sep_token_id]] * 3


def test_stage_1_beginnings_of_captions(stage_1, bert):
    """Start token and text, no end token, padded on the left."""
    batch = stage_1(text=["a photo", "a"], mode="generation")
    words = bert(["a photo"], add_special_tokens=False)["input_ids"][0]
    start, pad = bert.cls_token_id, bert.pad_token_id
    assert batch["input_ids"].tolist() == [[start, *words], [pad] * (len(words) - 1) + [start, words[0]]]
    assert batch["attention_mask"].tolist() == [[1] * (len(words) + 1), [0] * (len(words) - 1) + [1, 1]]


def test_stage_1_wrong_calls(stage_1, image_processor, bert):
    with pytest.raises(ValueError, match="nothing to process"):
        stage_1()
    with pytest.raises(ValueError, match="Text 1 is None"):
        stage_1(text=["a dog", None])
    with pytest.raises(ValueError, match="empty"):
        stage_1(text=[])
    with pytest.raises(ValueError, match="contrastive, matching, generation, not 'caption'"):
        stage_1(text="a dog", mode="caption")
    with pytest.raises(ValueError, match="stage 2"):
        stage_1(images=A, text="a photo", suffix="a dog")
    with pytest.raises(ValueError, match="47 tokens exceeds the 40"):
        stage_1(text="cat " * 45, truncation=False)
    with pytest.raises(ValueError, match="leave qformer_tokenizer out"):
        MMBlip2Processor(image_processor, bert, bert)


def test_stage_1_text_as_it_stands(image_processor, bert):
    raw = MMBlip2Processor(image_processor, bert, clean_text=False)
    assert raw(text="a cat.").input_ids[0].tolist() == bert("a cat.")["input_ids"]


# Stage 2: what the model is given

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
    assert rows(processor(text=["a", "cat"], num_images=1)) == [
        pieces(opt, None, "</s>", "a"),
        pieces(opt, None, "</s>", "cat"),
    ]


def test_texts_without_pictures(opt_processor, opt):
    assert opt_processor(text="a cat").input_ids.tolist() == [opt("a cat")["input_ids"]]
    batch = opt_processor(images=[[], []], text=["a cat", "cat"])
    assert set(batch) == {"input_ids", "attention_mask"}
    assert rows(batch) == [opt("a cat")["input_ids"], opt("cat")["input_ids"]]


# Stage 2: what it learns


def test_caption_without_prompt(opt_processor, opt):
    """Section 3.5: ``[v…][</s>][w…]["\\n"][pad…]``; the start token is learnt, pads and slots never (F29)."""
    batch = opt_processor(images=[A, B], suffix=["A cat.", "a photo of a cat"])
    newline = pieces(opt, "\n")
    assert len(newline) == 1
    words = [pieces(opt, "</s>", text) + newline for text in ("a cat", "a photo of a cat")]
    pads = len(words[1]) - len(words[0])
    assert batch.input_ids.tolist() == [SLOTS + words[0] + [opt.pad_token_id] * pads, SLOTS + words[1]]
    unlearnt = [IGNORED] * QUERIES
    assert batch.labels.tolist() == [unlearnt + words[0] + [IGNORED] * pads, unlearnt + words[1]]
    same(batch, opt_processor(images=[A, B], suffix=["A cat.", "a photo of a cat"], mode="caption"))


def test_caption_with_prompt(opt_processor, opt):
    """Section 3.5: the first tokens, as many as "a photo of" and its start token have, are not learnt."""
    batch = opt_processor(images=A, text="a photo of", suffix="a cat")
    known = len(opt("a photo of")["input_ids"])
    words = [*opt("a photo of a cat")["input_ids"], *pieces(opt, "\n")]
    assert batch.input_ids.tolist() == [SLOTS + words]
    assert batch.labels.tolist() == [[IGNORED] * (QUERIES + known) + words[known:]]


@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_equals_the_published_steps_for_opt(opt_processor, opt, prompt):
    """LAVIS `Blip2OPT.forward`, again: join texts and newline, pad, mask pads, mask the prompt, put pictures before."""
    captions = ["a cat", "cat " * 40 if not prompt else "cat", "dog"]
    joined = [f"{prompt} {clean_caption(caption)}".strip() + "\n" for caption in captions]
    tokens = opt(joined, padding="longest", truncation=True, max_length=32, padding_side="right", return_tensors="pt")
    targets = tokens.input_ids.masked_fill(tokens.input_ids == opt.pad_token_id, IGNORED)
    if prompt:
        targets[:, : opt(prompt, return_tensors="pt").attention_mask.sum(1).item()] = IGNORED
    ones = torch.ones(3, QUERIES, dtype=torch.long)
    batch = opt_processor(images=[A, B, C], text=prompt, suffix=captions)
    keep = [0, 1, 2] if prompt else [0, 2]  # the published training lost the end of a caption that was cut
    assert torch.equal(batch.input_ids[keep], torch.cat([ones * SLOT, tokens.input_ids], 1)[keep])
    assert torch.equal(batch.attention_mask, torch.cat([ones, tokens.attention_mask], 1))
    assert torch.equal(batch.labels[keep], torch.cat([ones * IGNORED, targets], 1)[keep])
    if not prompt:
        assert torch.equal(batch.labels[1, :-1], torch.cat([ones * IGNORED, targets], 1)[1, :-1])
        assert batch.labels[1, -1] == opt_processor.eos_token_id


def test_equals_the_published_steps_for_t5(t5_processor, t5):
    """LAVIS `Blip2T5.forward`, again."""
    prompts, captions = ["a photo of", "a", "the color of the cat"], ["a cat", "two dogs on the cat", "red"]
    inputs = t5(prompts, padding="longest", truncation=True, max_length=32, return_tensors="pt")
    outputs = t5(captions, padding="longest", truncation=True, max_length=32, return_tensors="pt")
    ones = torch.ones(3, QUERIES, dtype=torch.long)
    batch = t5_processor(images=[A, B, C], text=prompts, suffix=captions)
    assert torch.equal(batch.input_ids, torch.cat([ones * SLOT, inputs.input_ids], 1))
    assert torch.equal(batch.attention_mask, torch.cat([ones, inputs.attention_mask], 1))
    assert torch.equal(batch.labels, outputs.input_ids.masked_fill(outputs.input_ids == t5.pad_token_id, IGNORED))


def test_words_of_a_tokenizer_that_marks_their_beginning(image_processor):
    """As Llama's and T5's: prompt and caption together are tokenised as one text."""
    vocab = [("<unk>", 0.0), ("▁a", -1.0), ("▁photo", -1.0), ("▁of", -1.0), ("▁cat", -1.0), ("cat", -1.5), ("▁", -3.0)]
    backend = Tokenizer(models.Unigram([*vocab, (".", -2.0), ("▁.", -4.5)], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    processor = MMBlip2Processor(image_processor, tokenizer, num_query_tokens=QUERIES, eos=".")
    batch = processor(images=A, text="a photo of", suffix="A cat.")
    assert batch.input_ids.tolist() == [[*SLOTS, 1, 2, 3, 1, 4, 7]]
    assert batch.labels.tolist() == [[IGNORED] * 6 + [1, 4, 7]]
    assert processor(text="a photo <image>cat", num_images=1).input_ids.tolist() == [[1, 2, 6, *SLOTS, 4]]


def test_one_prompt_for_all_captions(opt_processor):
    one = opt_processor(images=[A, B], text="a photo of", suffix=["a cat", "cat"])
    each = opt_processor(images=[A, B], text=["a photo of"] * 2, suffix=["a cat", "cat"])
    same(one, each)


def test_a_prompt_is_tokenised_as_when_generating(image_processor, opt):
    """Where words would merge across the end of the prompt, the prompt keeps its tokens."""
    processor = MMBlip2Processor(image_processor, opt, num_query_tokens=QUERIES)
    prompt, suffix = "a ", "cat"
    assert opt("a cat")["input_ids"][: len(opt("a ")["input_ids"])] != opt("a ")["input_ids"]
    given = processor(images=A, text=prompt).input_ids[0].tolist()
    batch = processor(images=A, text=prompt, suffix=suffix)
    assert batch.input_ids[0].tolist() == [*given, *pieces(opt, "cat"), opt.eos_token_id]
    assert batch.labels[0].tolist() == [IGNORED] * len(given) + [*pieces(opt, "cat"), opt.eos_token_id]


def test_a_start_token_before_the_pictures_is_not_learnt(image_processor, opt):
    first = MMBlip2Processor(image_processor, opt, num_query_tokens=QUERIES, bos_first=True)
    batch = first(images=A, suffix="a cat")
    words = [*pieces(opt, "a cat"), opt.eos_token_id]
    assert batch.input_ids[0].tolist() == [opt.bos_token_id, *SLOTS, *words]
    assert batch.labels[0].tolist() == [IGNORED] * (QUERIES + 1) + words


@pytest.mark.parametrize("eos", [None, "<|im_end|>", 3, "\n", "."])
def test_the_end_token_is_learnt_once(image_processor, chat, eos):
    """Also where it is the pad token, or the caption brings it along."""
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES, eos=eos, clean_text=False)
    end = pieces(chat, eos)[0] if eos in ("\n", ".") else 3
    assert processor.eos_token_id == end
    text = "a cat" + {".": ".", "\n": "\n"}.get(eos, "")
    batch = processor(images=[A, B], suffix=[text, "a photo of a cat"])
    assert batch.input_ids[0].tolist().count(end) - int((batch.attention_mask[0] == 0).sum()) * (end == 3) == 1
    assert rows(batch, "labels") == [
        [IGNORED] * QUERIES + pieces(chat, "a cat") + [end],
        [IGNORED] * QUERIES + pieces(chat, "a photo of a cat") + [end],
    ]
    assert (batch.labels[batch.attention_mask == 0] == IGNORED).all()


def test_only_words_are_learnt(opt_processor):
    """F29: rows with different numbers of pictures, in several places."""
    batch = opt_processor(
        images=[[A, B], [C]], text=["<image> a <image> of", "photo <image>"], suffix=["cat", "a photo of a cat"]
    )
    assert (batch.labels[batch.input_ids == SLOT] == IGNORED).all()
    assert (batch.labels[batch.attention_mask == 0] == IGNORED).all()
    assert opt_processor.decode(batch.labels[1]) == "a photo of a cat"
    learnt = batch.labels != IGNORED
    assert torch.equal(batch.labels[learnt], batch.input_ids[learnt])


def test_captions_of_an_encoder_decoder(t5_processor, t5):
    """Section 3.5: encoder ``[v…][prompt][</s>]``, labels caption and ``</s>``, pads -100."""
    batch = t5_processor(images=[A, B], text="a photo of", suffix=["A cat!", "two dogs on the cat"])
    end = t5.eos_token_id
    assert batch.input_ids.tolist() == [[*pieces(t5, None, "a photo of"), end]] * 2
    assert batch.labels.tolist() == [
        [*pieces(t5, "a cat"), end, *[IGNORED] * 3],
        [*pieces(t5, "two dogs on the cat"), end],
    ]
    assert t5_processor(images=A, suffix="cat").input_ids.tolist() == [[*SLOTS, end]]


def test_labels_of_an_encoder_decoder_are_framed_by_its_tokenizer(image_processor, bert):
    """As BART's, whose targets begin with a start token."""
    processor = MMBlip2Processor(image_processor, bert, num_query_tokens=QUERIES, is_encoder_decoder=True, eos="[SEP]")
    batch = processor(images=A, text="a photo", suffix="cat")
    assert batch.labels.tolist() == [bert("cat")["input_ids"]]
    assert batch.input_ids.tolist() == [[*SLOTS, *bert("a photo")["input_ids"]]]


@pytest.mark.parametrize(("kind", "template"), [("opt", "Question: {} Answer:"), ("t5", "Question: {} Short answer:")])
def test_questions(request, kind, template):
    processor, tokenizer = request.getfixturevalue(f"{kind}_processor"), request.getfixturevalue(kind)
    asked = template.format("what color is the cat?")
    begin, end = ([tokenizer.bos_token_id], []) if kind == "opt" else ([], [tokenizer.eos_token_id])
    given = [*SLOTS, *begin, *pieces(tokenizer, asked), *end]
    for text in ("What color is the (cat)?", "<image>What color is the cat?", "<image> what color is the cat? "):
        batch = processor(images=A, text=text, mode="vqa")
        assert batch.input_ids.tolist() == [given]
        assert "labels" not in batch
    trained = processor(images=[A], text=["What color is the (cat)?"], suffix=["Red."], mode="vqa")
    if kind == "opt":
        words = pieces(tokenizer, " Red.", "\n")
        assert trained.input_ids.tolist() == [given + words]
        assert trained.labels.tolist() == [[IGNORED] * len(given) + words]
    else:
        assert trained.input_ids.tolist() == [given]
        assert trained.labels.tolist() == [[*pieces(tokenizer, "red."), tokenizer.eos_token_id]]


def test_questions_enter_the_qformer_once_a_picture(image_processor, opt, bert):
    processor = MMBlip2Processor(image_processor, opt, bert, num_query_tokens=QUERIES)
    text = ["<image><image>Is it a dog?", "is it?", "What is it?"]
    batch = processor(images=[[A, B], [], [C]], text=text, mode="vqa")
    first, last = bert("is it a dog?")["input_ids"], bert("what is it?")["input_ids"]
    assert batch.qformer_input_ids.tolist() == [first, first, last + [bert.pad_token_id]]
    assert batch.qformer_attention_mask.tolist() == [[1] * 7, [1] * 7, [1] * 6 + [0]]
    assert set(batch) == set(processor.model_input_names)
    assert "qformer_input_ids" not in processor(images=A, text="a photo of")
    assert "qformer_input_ids" not in processor(text="is it?", mode="vqa")


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_prefixes(request, kind):
    processor, tokenizer = request.getfixturevalue(f"{kind}_processor"), request.getfixturevalue(kind)
    captions = ["A photo of two dogs and a cat.", "cat", "two dogs"]
    seen = set()
    for seed in range(12):
        seeds = [(seed, 0, row) for row in range(3)]
        batch = processor(images=[A, B, C], text=captions, mode="prefix_lm", rng=seeds)
        decoded = [processor.decode(row, skip_special_tokens=True) for row in batch.labels]
        assert decoded[1:] == ["cat", "dogs"]
        assert "a photo of two dogs and a cat".endswith(decoded[0])
        seen.add(8 - len(decoded[0].split()))
        last = processor(images=C, text=captions[2], mode="prefix_lm", rng=seeds[2:])
        assert rows(last) == rows(batch)[2:]
        if kind == "t5":
            given = "a photo of two dogs and a cat".removesuffix(decoded[0]).strip()
            assert rows(batch)[0] == [*pieces(tokenizer, None, given), tokenizer.eos_token_id]
            assert rows(batch)[1] == [*SLOTS, tokenizer.eos_token_id]
    assert seen == {1, 2, 3, 4}
    generators = [np.random.default_rng(3), np.random.default_rng(3)]
    same(*(processor(images=[A, B, C], text=captions, mode="prefix_lm", rng=rng) for rng in generators))


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


# Casts (F14)


def test_a_cast_touches_pixels_alone(image_processor, opt, bert):
    processor = MMBlip2Processor(image_processor, opt, bert, num_query_tokens=QUERIES)
    given = {"images": A, "text": "what is it", "suffix": "cat", "mode": "vqa"}
    before, after = processor(**given), processor(**given).to(torch.bfloat16)
    assert after.pixel_values.dtype == torch.bfloat16
    assert len(after) == 6
    for name in set(after) - {"pixel_values"}:
        assert after[name].dtype == torch.int64
        assert torch.equal(after[name], before[name])


# Texts of what was generated


def test_decoding(opt_processor, opt):
    batch = opt_processor(images=[A, B], text=["a photo of", "a"])
    new = [pieces(opt, text, "\n") for text in (" a cat", " photo")]
    new = [ids + [opt.pad_token_id] * (8 - len(ids)) for ids in new]
    generated = torch.cat([batch.input_ids, torch.tensor(new)], dim=1)
    assert opt_processor.batch_decode(generated, skip_special_tokens=True) == ["a photo of a cat", "a photo"]
    assert opt_processor.post_process_image_text_to_text(generated) == ["a photo of a cat", "a photo"]
    assert opt_processor.post_process_image_text_to_text(generated, input_ids=batch.input_ids) == ["a cat", "photo"]
    assert opt_processor.decode(generated[0], skip_special_tokens=True, input_ids=batch.input_ids[0]) == "a cat"
    assert opt_processor.decode(generated[0].tolist(), skip_special_tokens=True) == "a photo of a cat"
    assert opt_processor.decode(SLOT) == ""
    assert opt_processor.decode([]) == ""
    assert opt_processor.batch_decode(np.array(generated)[:1], skip_special_tokens=True) == ["a photo of a cat"]
    assert opt_processor.batch_decode([]) == []


def test_decoding_an_encoder_decoder(t5_processor, t5):
    batch = t5_processor(images=A, text="a photo of")
    generated = torch.tensor([[t5.pad_token_id, *pieces(t5, "a cat"), t5.eos_token_id, t5.pad_token_id]])
    assert t5_processor.post_process_image_text_to_text(generated) == ["a cat"]
    assert t5_processor.post_process_image_text_to_text(generated, input_ids=batch.input_ids) == ["a cat"]


# Chats

CHAT = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "what is it?"}]},
]
RENDERED = "<|im_start|>system\na<|im_end|>\n<|im_start|>user\n<image>what is it?<|im_end|>\n<|im_start|>assistant\n"


def test_chats_by_the_template_of_the_language_model(image_processor, chat):
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES)
    options = {"add_generation_prompt": True}
    assert processor.apply_chat_template(CHAT, **options) == RENDERED
    assert processor.apply_chat_template([CHAT, CHAT], **options) == [RENDERED] * 2
    options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template(CHAT, **options)
    before, after = RENDERED.split("<image>")
    assert batch.input_ids.tolist() == [pieces(chat, before, None, after)]
    assert batch.pixel_values.shape == (1, 3, 8, 8)
    two = processor.apply_chat_template([CHAT, CHAT[:1]], **options)
    assert rows(two)[0] == batch.input_ids[0].tolist()
    assert rows(two)[1] == pieces(chat, "<|im_start|>system\na<|im_end|>\n<|im_start|>assistant\n")
    assert two.pixel_values.shape[0] == 1
    without = processor.apply_chat_template(CHAT[:1], **options)
    assert set(without) == {"input_ids", "attention_mask"}
    assert CHAT[1]["content"][0] == {"type": "image", "image": A}


def test_features_in_chats(image_processor, chat):
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES)
    message = {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "image"}]}
    options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"num_images": 1}}
    batch = processor.apply_chat_template([message], **options)
    assert rows(batch) == [pieces(chat, "<|im_start|>user\na ", None, "<|im_end|>\n")]


def test_chats_by_a_template_of_its_own(image_processor, chat):
    template = (
        "{% for message in messages %}{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}[<image>]{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES, chat_template=template)
    assert processor.apply_chat_template(CHAT[1:]) == "[<image>]what is it?"
    batch = processor.apply_chat_template(CHAT[1:], tokenize=True, return_dict=True)
    assert rows(batch) == [pieces(chat, "[", None, "]what is it?")]


def test_pictures_of_chats_in_any_form(image_processor, chat, tmp_path):
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES)
    A.save(tmp_path / "a.png")
    code = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    url = f"data:image/png;base64,{code}"
    items = [
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "image", "base64": code},
        {"type": "image", "base64": url},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    batch = processor.apply_chat_template([{"role": "user", "content": items}], tokenize=True, return_dict=True)
    assert torch.equal(batch.pixel_values, processor(images=[A] * 5, text=["a"] * 5).pixel_values)
    assert (batch.input_ids == SLOT).sum() == 5 * QUERIES


def test_an_answer_in_a_chat_is_learnt(image_processor, chat):
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES)
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template(CHAT, processor_kwargs={"suffix": "a cat"}, **options)
    given = processor.apply_chat_template(CHAT, **options).input_ids[0].tolist()
    learnt = [*pieces(chat, "a cat"), chat.eos_token_id]
    assert batch.input_ids.tolist() == [given + learnt]
    assert batch.labels.tolist() == [[IGNORED] * len(given) + learnt]


def test_wrong_chats(image_processor, chat, opt):
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES)
    with pytest.raises(ValueError, match="text or an image, not 'video'"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "url": "a"}]}])
    with pytest.raises(ValueError, match="chat_template"):
        MMBlip2Processor(image_processor, opt, num_query_tokens=QUERIES).apply_chat_template(CHAT)


# Files

SETTINGS = {
    "num_query_tokens": 5,
    "image_token": "<picture>",
    "image_token_id": -7,
    "is_encoder_decoder": True,
    "bos_first": True,
    "eos": "\n",
    "prompt": "a photo of",
    "question_template": "Q: {} A:",
    "max_text_length": 20,
    "clean_text": False,
}


@pytest.fixture(scope="module")
def registered():
    AutoConfig.register("mm_blip2", MMBlip2Config, exist_ok=True)
    AutoProcessor.register(MMBlip2Config, MMBlip2Processor, exist_ok=True)


@pytest.mark.parametrize("with_qformer", [False, True])
def test_save_and_load(registered, tmp_path, image_processor, chat, bert, with_qformer):
    processor = MMBlip2Processor(image_processor, chat, bert if with_qformer else None, **SETTINGS)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "qformer_tokenizer").is_dir() == with_qformer
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MMBlip2Processor
    assert {name: getattr(loaded, name) for name in SETTINGS} == SETTINGS
    assert processor.qformer_tokenizer is (bert if with_qformer else None)
    assert loaded.tokenizer.get_vocab() == chat.get_vocab()
    assert loaded.image_processor.to_dict() == image_processor.to_dict()
    given = {"images": A, "text": "what is it", "suffix": "a cat", "mode": "vqa"}
    same(loaded(**given), processor(**given))
    assert ("qformer_input_ids" in loaded(**given)) == with_qformer
    assert loaded.apply_chat_template(CHAT) == processor.apply_chat_template(CHAT)
    same(pickle.loads(pickle.dumps(processor))(**given), processor(**given))
    loaded.save_pretrained(tmp_path / "again")
    files = [json.loads((folder / "processor_config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert files[0] == files[1]


def test_save_and_load_stage_1(registered, tmp_path, stage_1):
    stage_1.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.num_query_tokens is None
    same(loaded(images=A, text="a cat"), stage_1(images=A, text="a cat"))


def test_settings_may_be_changed_on_loading(registered, tmp_path, opt_processor):
    opt_processor.save_pretrained(tmp_path)
    loaded = MMBlip2Processor.from_pretrained(tmp_path, prompt="a cat", num_query_tokens=7)
    assert (loaded.prompt, loaded.num_query_tokens, loaded.eos) == ("a cat", 7, "\n")


def test_a_template_of_its_own_survives_loading(registered, tmp_path, image_processor, chat):
    template = "{% for item in messages[0]['content'] %}{{ '<image>' if item['type'] == 'image' else item['text'] }}{% endfor %}"
    processor = MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES, chat_template=template)
    processor.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).apply_chat_template(CHAT[1:]) == "<image>what is it?"


def test_the_image_processor_loads_alone(registered, tmp_path, opt_processor):
    AutoImageProcessor.register(MMBlip2Config, image_processor_classes={"pil": MMClipImageProcessorPil}, exist_ok=True)
    opt_processor.save_pretrained(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).to_dict() == opt_processor.image_processor.to_dict()


# Pipeline


class Parrot(OPTForCausalLM):
    """Says the same after every prompt, and knows what it was given."""

    def generate(self, input_ids, attention_mask, pixel_values=None, generation_config=None, **kwargs):
        self.given = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
        return torch.cat([input_ids, self.words.expand(len(input_ids), -1)], dim=1)


def parrot(processor, text: str, dtype=torch.float32):
    tokenizer = processor.tokenizer
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        ffn_dim=8,
        word_embed_proj_dim=8,
    )
    model = Parrot(config).to(dtype)
    model.words = torch.tensor([[*pieces(tokenizer, text), processor.eos_token_id, tokenizer.pad_token_id]])
    return ImageTextToTextPipeline(model=model, processor=processor)


@pytest.mark.parametrize("text", ["a photo of", "<image>a photo of"])
def test_pipeline(opt_processor, opt, text, tmp_path):
    pipe = parrot(opt_processor, " a cat", torch.bfloat16)
    (answer,) = pipe(A, text=text)
    assert answer == {"input_text": text, "generated_text": f"{text} a cat"}
    assert pipe.model.given["input_ids"].tolist() == [pieces(opt, None, "</s>", "a photo of")]
    assert pipe.model.given["pixel_values"].dtype == torch.bfloat16
    (answer,) = pipe(A, text=text, return_full_text=False)
    assert answer["generated_text"].strip() == "a cat"
    A.save(tmp_path / "a.png")
    assert pipe(str(tmp_path / "a.png"), text=text) == pipe(A, text=text)
    several = pipe([A, B], text=[text, "a"], return_full_text=False)
    assert [answer["generated_text"].strip() for answer in several] == ["a cat"] * 2
    assert rows(pipe.model.given) == [pieces(opt, None, "</s>", "a photo of"), pieces(opt, None, "</s>", "a")]
    assert pipe.model.given["attention_mask"][1, 0] == 0


def test_questions_by_pipeline(opt_processor, opt):
    pipe = parrot(opt_processor, " red")
    (answer,) = pipe(A, text="what color is it?", mode="vqa", return_full_text=False)
    assert answer["generated_text"].strip() == "red"
    asked = "Question: what color is it? Answer:"
    assert pipe.model.given["input_ids"].tolist() == [pieces(opt, None, "</s>", asked)]


def test_chats_by_pipeline(image_processor, chat):
    pipe = parrot(MMBlip2Processor(image_processor, chat, num_query_tokens=QUERIES), "a cat")
    messages = [{"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": "what is it?"}]}]
    (answer,) = pipe(text=messages)
    assert answer["generated_text"] == [*messages, {"role": "assistant", "content": "a cat"}]
    expected = pieces(chat, "<|im_start|>user\n", None, "what is it?<|im_end|>\n<|im_start|>assistant\n")
    assert pipe.model.given["input_ids"].tolist() == [expected]
    (answer,) = pipe(text=[*messages, {"role": "assistant", "content": [{"type": "text", "text": "it is "}]}])
    assert answer["generated_text"][-1]["content"] == [{"type": "text", "text": "it is a cat"}]
