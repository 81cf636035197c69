"""What BLIP-2's processor lets a language model learn, against labels laid out by hand and the published steps."""

import numpy as np
import pytest
import torch
from small_processors import IGNORED, QUERIES, SLOT, SLOTS, A, B, C, pieces, rows, same
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_mm.models.blip2.processing_blip2 import MMBlip2Processor
from hf_mm.models.blip2.text_blip2 import clean_caption


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
    same(
        *(
            processor(images=[A, B, C], text=captions, mode="prefix_lm", rng=rng)
            for rng in (np.random.default_rng(3), 3)
        )
    )
