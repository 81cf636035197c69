"""Captions scored from a kept start, against reading every text whole, picture by picture."""

import pytest
import torch
from models.blip2.small import LANGUAGE_MODELS, QUERIES, SLOT, pictures, places_read, stage2
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hf_mm.evaluation.caption_ranking import score_captions
from hf_mm.models.blip2.processing_blip2 import MMBlip2Processor
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil

WORDS = ["<s>", "<pad>", "</s>", ".", ":", *"abcdefgh"]
CAPTIONS = ["a b", "c", "d e f a b", "g", "a b c"]
CAUSAL = [name for name, (family, _) in LANGUAGE_MODELS.items() if family not in ("t5", "bart")]


def processor_of(model, **fields):
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<pad>"
    )
    return MMBlip2Processor(
        MMClipImageProcessorPil(),
        tokenizer,
        num_query_tokens=QUERIES,
        image_token_id=SLOT,
        is_encoder_decoder=model.config.is_encoder_decoder,
        **fields,
    )


def read_whole(model, processor, features, caption):
    """Log-likelihood of a caption and its tokens, by one pass over the whole text."""
    inputs = processor(num_images=[1], suffix=[caption], mode="caption", return_tensors="pt")
    labels = inputs.pop("labels")[0]
    with torch.no_grad():
        logits = model(**inputs, vision_features=features[None]).logits[0].double()
    places = (labels != -100).nonzero().flatten()
    return logits.log_softmax(-1)[places - 1, labels[places]].sum(), len(places)


@pytest.mark.parametrize("prompt", [":", "c a: a. <image> :"], ids=["picture", "words"])
@pytest.mark.parametrize("language_model", CAUSAL)
def test_scores_equal_reading_each_text_whole(language_model, prompt, monkeypatch):
    """Words before the picture are read once for all pictures."""
    monkeypatch.setattr("hf_mm.composite.language_model.FEWEST_SPARED", 1)
    model = stage2(language_model=language_model)
    processor = processor_of(model, prompt=prompt, eos=".")
    features = model.vision_features(pictures(3))
    places = places_read(model.language_model)
    sums, lengths = score_captions(model, processor, features, CAPTIONS, places=7, progress=False)
    before = len(processor.tokenizer(prompt.partition("<image>")[0]).input_ids) if "<image>" in prompt else 0
    assert places[: 1 + bool(before)] == ([before] if before else []) + [3 * (1 + QUERIES)]
    for row in range(3):
        for column, caption in enumerate(CAPTIONS):
            whole, tokens = read_whole(model, processor, features[row], caption)
            assert tokens == lengths[column] == len(caption.split()) + 1
            torch.testing.assert_close(sums[row, column].double(), whole, rtol=1e-5, atol=1e-5)
    assert sums.std(dim=0).min() > 1e-4  # pictures matter


def test_only_wanted_pairs_are_scored():
    model = stage2()
    processor = processor_of(model, prompt=":", eos=".")
    features = model.vision_features(pictures(4))
    wanted = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    wanted[2] = False
    seen = []
    model.language_model.register_forward_hook(
        lambda module, args, kwargs, outputs: (
            seen.append(kwargs["input_ids"].shape) if "input_ids" in kwargs else None
        ),
        with_kwargs=True,
    )
    sums, _ = score_captions(model, processor, features, CAPTIONS, wanted, progress=False)
    whole, _ = score_captions(model, processor, features, CAPTIONS, progress=False)
    assert torch.equal(sums.isfinite(), wanted)
    torch.testing.assert_close(sums[wanted], whole[wanted])
    read = sum(rows * length for rows, length in seen)
    tokens = torch.tensor([len(caption.split()) for caption in CAPTIONS])
    assert read == int((wanted * tokens).sum()) + int(4 * tokens.sum())  # the end of a caption is never read


def test_what_cannot_be_scored_is_refused():
    model = stage2(language_model="t5")
    processor = processor_of(model)
    features = torch.zeros(1, 17, 16)
    with pytest.raises(ValueError, match="encoder-decoder"):
        score_captions(model, processor, features, CAPTIONS)
    model = stage2()
    processor = processor_of(model)
    with pytest.raises(ValueError, match="nothing to score"):
        score_captions(model, processor, features, [])
    with pytest.raises(ValueError, match="nothing to score"):
        score_captions(model, processor, features[:0], CAPTIONS)
    with pytest.raises(ValueError, match="places is 0"):
        score_captions(model, processor, features, CAPTIONS, places=0)
    with pytest.raises(ValueError, match=r"wanted is \(1, 4\)"):
        score_captions(model, processor, features, CAPTIONS, torch.ones(1, 4, dtype=torch.bool))
