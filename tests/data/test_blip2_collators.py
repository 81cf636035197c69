"""Batches of both stages of BLIP-2: cached features and pictures side by side with the right texts."""

import pickle
from random import Random

import datasets
import pytest
import torch
from drawn import NAMES, encoded, picture, tiny_processor
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hf_mm.data.collators import (
    CaptionedFeatures,
    ImageTextDraws,
    LanguageCollator,
    QFormerCollator,
    WordCollator,
)
from hf_mm.data.features import FeatureRows, FeatureSpec, compute_features, view_key
from hf_mm.data.image_text import Columns, ImageTextRows, stable_id
from hf_mm.data.sampling import Draw
from hf_mm.models.blip2.initialization_blip2 import learn_wordpiece
from hf_mm.models.blip2.processing_blip2 import MMBlip2Processor

COLUMNS = Columns("image", "caption")
CAPTIONS = [[f"a {name} picture", f"it is {name}"] for name in NAMES]
WORDS = ["<s>", "</s>", "<unk>", *NAMES, "a", "picture", "it", "is", ":", "what", "?", "Question", "Answer"]


def rows() -> ImageTextRows:
    images = [{"bytes": encoded(picture(name)), "path": None} for name in NAMES]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "caption": datasets.List(datasets.Value("string"))}
    )
    return ImageTextRows(
        datasets.Dataset.from_dict({"image": images, "caption": CAPTIONS}, features=features), COLUMNS
    )


def language_tokenizer(begins: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    if begins:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def stage1_processor() -> MMBlip2Processor:
    tokenizer = learn_wordpiece([text for own in CAPTIONS for text in own], 120)
    return MMBlip2Processor(tiny_processor().image_processor, tokenizer)


def stage2_processor(begins: bool = False, **fields) -> MMBlip2Processor:
    fields = {"num_query_tokens": 3, "prompt": ":", "eos": "?", **fields}
    return MMBlip2Processor(tiny_processor().image_processor, language_tokenizer(begins), **fields)


def cached(folder, views: int = 1) -> CaptionedFeatures:
    """Features that say which row and view they are of: ``[[row, view]]``."""
    keys = [f"picture {number}" for number in range(8)]
    pairs = [(row, view) for row in range(8) for view in range(views)]
    store = compute_features(
        lambda batch: torch.tensor(batch, dtype=torch.float32)[:, None],
        [list(pair) for pair in pairs],
        [view_key(keys[row], view) for row, view in pairs],
        FeatureSpec("weights", {}, "numbers", {}),
        folder,
        progress=False,
    )
    kept = [7, 2, 5, 0]
    features = FeatureRows(store, [keys[row] for row in kept], views, [f"thing {row // 2}" for row in kept])
    return CaptionedFeatures(features, rows(), kept, seed=3)


def live(**options) -> ImageTextDraws:
    return ImageTextDraws(rows(), tiny_processor().image_processor, seed=3, **options)


def test_each_kept_row_has_its_own_captions_beside_its_features(tmp_path):
    dataset = cached(tmp_path, views=2)
    assert len(dataset) == 4
    for epoch in range(4):
        for place, row in enumerate((7, 2, 5, 0)):
            sample = dataset[Draw(epoch, place)]
            assert sample["vision_features"].tolist() == [[row, epoch % 2]]
            assert sample["text"] in CAPTIONS[row] and sample["group"] == f"thing {row // 2}"
    texts = {dataset[Draw(epoch, 0)]["text"] for epoch in range(20)}
    assert texts == set(CAPTIONS[7])
    whole = dataset.__getitems__([Draw(1, place) for place in range(4)])
    assert [sample["text"] for sample in whole] == [dataset[Draw(1, place)]["text"] for place in range(4)]
    assert pickle.loads(pickle.dumps(dataset))[Draw(1, 2)]["text"] == dataset[Draw(1, 2)]["text"]


def test_cached_and_live_samples_draw_the_same(tmp_path):
    """Text and numbers alike, where all rows are kept: a run with features reads the captions of one without."""
    pictures = live(label_of=lambda row: row.captions[1])
    keys = [f"picture {number}" for number in range(8)]
    store = compute_features(
        lambda batch: torch.zeros(len(batch), 1, 2),
        list(range(8)),
        keys,
        FeatureSpec("", {}, "", {}),
        tmp_path,
        progress=False,
    )
    features = CaptionedFeatures(
        FeatureRows(store, keys), rows(), range(8), seed=3, label_of=lambda row: row.captions[1]
    )
    for draw in (Draw(0, 0), Draw(2, 5), Draw(2, 5, 1)):
        one, other = pictures[draw], features[draw]
        assert {name: one[name] for name in ("text", "draws", "label")} == {
            name: other[name] for name in ("text", "draws", "label")
        }


def test_stage1_batches_of_features_and_of_pictures(tmp_path):
    processor = stage1_processor()
    collator = QFormerCollator(processor)
    samples = cached(tmp_path, views=1).__getitems__([Draw(0, place) for place in range(4)])
    batch = collator(samples)
    assert batch.keys() == {"input_ids", "attention_mask", "vision_features", "image_ids", "skipped"}
    assert batch["vision_features"][:, 0, 0].tolist() == [7, 2, 5, 0]
    assert batch["image_ids"].tolist() == [stable_id(f"thing {row // 2}") for row in (7, 2, 5, 0)]
    texts = processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == [sample["text"] for sample in samples]
    assert (batch["input_ids"][:, 0] == processor.tokenizer.cls_token_id).all()

    dataset = live()
    batch = collator([dataset[Draw(0, row)] for row in (1, 6)])
    assert "vision_features" not in batch
    expected = processor(images=[picture(NAMES[1]), picture(NAMES[6])])["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)


def test_captions_are_learnt_after_the_prompt(tmp_path):
    processor = stage2_processor()
    samples = cached(tmp_path).__getitems__([Draw(0, place) for place in range(4)])
    batch = LanguageCollator(processor)(samples)
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "vision_features", "skipped"}
    assert (batch["input_ids"][:, :3] == -200).all()
    assert (batch["input_ids"][:, 3] == WORDS.index(":")).all() and (batch["labels"][:, :4] == -100).all()
    end = WORDS.index("?")
    for sample, labels in zip(samples, batch["labels"], strict=True):
        assert labels[4:].tolist() == [*(WORDS.index(word) for word in sample["text"].split()), end]


def test_blind_features_are_zeros_and_texts_are_as_they_are(tmp_path):
    samples = cached(tmp_path).__getitems__([Draw(0, place) for place in range(4)])
    seeing, blind = (LanguageCollator(stage2_processor(), blind=blind)(samples) for blind in (False, True))
    assert seeing["vision_features"].any() and not blind["vision_features"].any()
    assert seeing["vision_features"][:1].shape == blind["vision_features"].shape  # one picture of all texts
    assert torch.equal(seeing["labels"], blind["labels"])


def test_a_question_is_the_prompt_and_its_answer_is_learnt():
    dataset = live(text_of=lambda row, rng: rng.choice(["blue", "red"]), label_of=lambda row: "What is it?")
    samples = [dataset[Draw(0, row)] for row in range(4)]
    batch = LanguageCollator(stage2_processor(eos=None), "vqa")(samples)
    learnt = [[WORDS[number] for number in row if number != -100] for row in batch["labels"].tolist()]
    assert learnt == [[sample["text"], "</s>"] for sample in samples]
    asked = [WORDS[number] for number in batch["input_ids"][0].tolist()[3:] if number >= 0]
    assert asked[:6] == ["Question", ":", "what", "is", "it", "?"]


def test_a_caption_is_split_where_its_draw_says():
    """The same in every process, and elsewhere in another epoch."""
    dataset = live(text_of=lambda row, rng: " ".join(["red", "blue", "green", "white"] * 3))
    collator = LanguageCollator(stage2_processor(), "prefix_lm")

    def split(epoch: int) -> list[int]:
        batch = collator([dataset[Draw(epoch, row)] for row in range(8)])
        return (batch["labels"] != -100).sum(dim=1).tolist()

    assert split(0) == split(0) != split(1)
    assert set(split(0) + split(1) + split(2)) <= set(range(7, 13)) and len(set(split(0))) > 2


def test_targets_are_the_first_tokens_filled_up_with_the_end():
    processor = stage2_processor()
    collator = WordCollator(processor, ["a red picture", "it is blue", "white"])
    known = [WORDS[number] for number in collator.word_ids.tolist()]
    assert known == sorted({"a", "red", "picture", "it", "is", "blue", "white", "?"}, key=WORDS.index)
    texts = ["a red picture", "white", "it is green", "it is"]
    batch = collator.texts([{"text": text} for text in texts])
    told = [["-" if number == -100 else known[number] for number in row] for row in batch["word_targets"].tolist()]
    assert told == [["a", "red", "picture"], ["white", "?", "?"], ["it", "is", "-"], ["it", "is", "?"]]


@pytest.mark.parametrize(("begins", "bos_first"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("prompt", ["", ":"])
def test_targets_leave_out_what_stands_before_the_caption(begins, bos_first, prompt):
    """The start token too, which without a prompt is learnt in stage 2."""
    processor = stage2_processor(begins, bos_first=bos_first, prompt=prompt)
    collator = WordCollator(processor, ["red picture"])
    (targets,) = collator.texts([{"text": "red picture"}])["word_targets"].tolist()
    assert [WORDS[collator.word_ids[number]] for number in targets] == ["red", "picture", "?"]


def test_word_batches_hold_pictures_and_targets(tmp_path):
    samples = cached(tmp_path).__getitems__([Draw(0, place) for place in range(4)])
    collator = WordCollator(stage2_processor(), [text for own in CAPTIONS for text in own])
    batch = collator(samples)
    assert batch.keys() == {"word_targets", "vision_features", "skipped"}
    assert batch["word_targets"].shape == (4, 3)


def test_draws_stay_those_that_they_were():
    """`ImageTextDraws` of other models: text and numbers come from one generator, in this order."""
    sample = live()[Draw(2, 5, 1)]
    rng = Random("3/2/5/1")
    assert sample["text"] == rng.choice(CAPTIONS[5])
    assert sample["draws"] == [rng.random() for _ in sample["draws"]]
