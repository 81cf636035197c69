"""From rows to batches: what the training loops draw, and a collator for any `datasets.Dataset` with the stock Trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from random import Random
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset as HFIterableDataset
from transformers.utils import logging

from ..image_utils import RGBImageProcessorPil
from .augment import NUM_DRAWS, ImageAugmentation
from .features import FeatureRows
from .image_text import (
    BrokenRow,
    Columns,
    ImageText,
    ImageTextRows,
    any_caption,
    find_id_column,
    prompt_columns,
    stable_id,
)
from .sampling import Draw

logger = logging.get_logger(__name__)

IGNORED = -100  # the label of what is not learnt
MOST_KNOWN = 2**16  # captions whose tokens are kept

TextOf = Callable[[ImageText, Random], str]
LabelOf = Callable[[ImageText], str]


def at_model_size(image: Any, image_processor: Any) -> torch.Tensor:
    """A picture as the processor resizes and crops it, before it normalises: ``(3, n, n)`` uint8."""
    if isinstance(image_processor, RGBImageProcessorPil):
        return image_processor.fit(image)
    outputs = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
    return torch.from_numpy(np.rint(outputs["pixel_values"][0]).astype(np.uint8))


class _Samples:
    """Turns a row into a training sample. All that is random in it comes from (seed, epoch, index, copy)."""

    def __init__(
        self, image_processor: Any, text_of: TextOf = any_caption, seed: int = 0, label_of: LabelOf | None = None
    ):
        self.image_processor, self.text_of, self.seed, self.label_of = image_processor, text_of, seed, label_of

    def pixels(self, row: ImageText) -> torch.Tensor:
        return at_model_size(row.image, self.image_processor)

    def sample(self, row: ImageText, draw: Draw, pixels: torch.Tensor) -> dict[str, Any]:
        return {
            "pixels": pixels,
            **self.words(row, draw),
            "may_flip": row.row.get("flip_ok") is not False,
            "image_id": row.image_id,
            "group": row.group,
        }

    def words(self, row: ImageText, draw: Draw) -> dict[str, Any]:
        """The text of a sample, and numbers for all else that is random in it."""
        rng = Random(f"{self.seed}/{draw.epoch}/{draw.index}/{draw.copy}")
        return {
            "text": self.text_of(row, rng),
            "draws": [rng.random() for _ in range(NUM_DRAWS)],
            **({"label": self.label_of(row)} if self.label_of else {}),
        }


class ImageTextDraws(torch.utils.data.Dataset):
    """Training samples of map-style rows, asked for by `Draw`.

    A broken row is replaced by the next good one, so that batches stay full and every caption keeps its own picture;
    the sample says what was skipped.

    Args:
        rows: see `open_rows`.
        image_processor: of the model.
        text_of: chooses the text of a sample.
        seed: of everything a sample draws.
        strict: raise at a broken row.
        cache_images: keep every picture at the model's size in memory.
        label_of: a class of the picture, in words, that is told beside its text.
    """

    def __init__(
        self,
        rows: ImageTextRows,
        image_processor: Any,
        text_of: TextOf = any_caption,
        seed: int = 0,
        strict: bool = False,
        cache_images: bool = False,
        label_of: LabelOf | None = None,
    ):
        self.rows, self.strict = rows, strict
        self.samples = _Samples(image_processor, text_of, seed, label_of)
        self.cache: dict[int, tuple[ImageText, torch.Tensor]] | None = {} if cache_images else None
        self.broken: dict[int, tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        draw = draw if isinstance(draw, Draw) else Draw(0, draw)
        skipped = []
        for offset in range(len(self)):
            index = (draw.index + offset) % len(self)
            try:
                row, pixels = self._read(index)
            except BrokenRow as error:
                if self.strict:
                    raise
                skipped.append((error.row, error.reason))
                continue
            return {**self.samples.sample(row, draw, pixels), "skipped": skipped}
        raise ValueError(f"None of the {len(self)} rows can be read{_first(skipped)}.")

    def _read(self, index: int) -> tuple[ImageText, torch.Tensor]:
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        if index in self.broken:
            raise BrokenRow(*self.broken[index])
        try:
            row = self.rows[index]
        except BrokenRow as error:
            self.broken[index] = error.row, error.reason
            raise
        pixels = self.samples.pixels(row)
        if self.cache is not None:
            self.cache[index] = replace(row, image=None), pixels
        return row, pixels


class ImageTextStream(torch.utils.data.IterableDataset):
    """Training samples of a stream, without end: each pass is shuffled anew. Broken rows are left out.

    Args:
        stream: rows with undecoded pictures, already this rank's part.
        columns: what its columns hold.
        image_processor, text_of, seed, strict, label_of: see `ImageTextDraws`.
        shuffle_buffer: rows among which the stream is shuffled; their undecoded pictures are in memory.
    """

    is_split_by_rank = True

    def __init__(
        self,
        stream: HFIterableDataset,
        columns: Columns,
        image_processor: Any,
        text_of: TextOf = any_caption,
        seed: int = 0,
        strict: bool = False,
        shuffle_buffer: int = 1_000,
        label_of: LabelOf | None = None,
    ):
        self.stream, self.columns, self.strict, self.shuffle_buffer = stream, columns, strict, shuffle_buffer
        self.samples = _Samples(image_processor, text_of, seed, label_of)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch, skipped = 0, []
        while True:
            found = False
            for number, fields in enumerate(self._shuffled(epoch)):
                try:
                    row = self.columns.read(fields, self._called(fields))
                except BrokenRow as error:
                    if self.strict:
                        raise
                    skipped.append((error.row, error.reason))
                    continue
                found = True
                # The group sets ranks and workers apart, which all count from 0.
                draw = Draw(epoch, stable_id(row.group), number)
                yield {**self.samples.sample(row, draw, self.samples.pixels(row)), "skipped": skipped}
                skipped = []
            if not found and not skipped and torch.utils.data.get_worker_info():
                return  # more workers than shards
            if not found:
                raise ValueError(f"No row of the stream can be read{_first(skipped)}.")
            epoch += 1

    def _called(self, fields: dict[str, Any]) -> str:
        """What a message calls a row without id and file after the word "row": the same in every pass."""
        if self.columns.caption is not None:
            return f"with {fields.get(self.columns.caption)!r:.80}"
        picture = fields.get(self.columns.image)
        content = picture.get("bytes") if isinstance(picture, dict) else picture
        if isinstance(content, bytes):
            return f"with picture {hashlib.blake2b(content, digest_size=6).hexdigest()}"
        return f"with {fields!r:.80}"

    def _shuffled(self, epoch: int) -> HFIterableDataset:
        """The stream in the order of one pass. (`set_epoch` would write to memory that workers share.)"""
        seed = stable_id(f"{self.samples.seed}/{epoch}")
        return self.stream.shuffle(seed=seed, buffer_size=self.shuffle_buffer)


class CaptionedFeatures(torch.utils.data.Dataset):
    """Cached features with texts of their rows: what `ImageTextDraws` gives, with `vision_features` in place of pixels.

    The texts that a draw gives are those of `ImageTextDraws`, as long as all rows are kept.

    Args:
        features: of the rows that are kept.
        rows: all rows.
        kept: which of them have features, in their order.
        text_of, seed, label_of: see `ImageTextDraws`.
    """

    def __init__(
        self,
        features: FeatureRows,
        rows: ImageTextRows,
        kept: Sequence[int],
        text_of: TextOf = any_caption,
        seed: int = 0,
        label_of: LabelOf | None = None,
    ):
        self.features, self.columns = features, rows.columns
        self.rows = rows.dataset.remove_columns([rows.columns.image]).select(kept)
        self.samples = _Samples(None, text_of, seed, label_of)

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw | int]) -> list[dict[str, Any]]:
        draws = [draw if isinstance(draw, Draw) else Draw(0, draw) for draw in draws]
        given = self.features.__getitems__(draws)
        columns = self.rows[[draw.index for draw in draws]]
        rows = [{name: values[place] for name, values in columns.items()} for place in range(len(draws))]
        return [
            {**self.samples.words(self._sample(draw.index, row, own["group"]), draw), **own}
            for draw, row, own in zip(draws, rows, given, strict=True)
        ]

    def _sample(self, index: int, row: dict[str, Any], group: str) -> ImageText:
        return ImageText(None, self.columns.captions(row), f"row {index}", group, row)


class ContrastiveCollator:
    """Samples of `ImageTextDraws` or `ImageTextStream` to the inputs of a dual encoder.

    Args:
        processor: of the model.
        augmentation: changes the pictures; None gives exactly what the processor gives.
    """

    def __init__(self, processor: Any, augmentation: ImageAugmentation | None = None):
        self.processor, self.augmentation = processor, augmentation

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [sample["text"] for sample in samples]
        tokens = self.processor.tokenizer(texts, padding=True, return_tensors="pt")
        return {
            **self._labels(samples),
            "pixel_values": self.pixel_values(samples),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "image_ids": torch.tensor([stable_id(sample["group"]) for sample in samples]),
            "text_ids": torch.tensor([stable_id(text.strip().lower()) for text in texts]),
            "skipped": [row for sample in samples for row in sample["skipped"]],
        }

    def _labels(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The texts of the batch's classes, and which of them each picture is of."""
        if "label" not in samples[0]:
            return {}
        classes = sorted({sample["label"] for sample in samples})
        tokens = self.processor.tokenizer(classes, padding=True, return_tensors="pt")
        return {
            "labels": torch.tensor([classes.index(sample["label"]) for sample in samples]),
            "label_input_ids": tokens["input_ids"],
            "label_attention_mask": tokens["attention_mask"],
        }

    def pictures(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The pictures of samples, or their cached features, as a composite takes them."""
        if "vision_features" in samples[0]:
            return {"vision_features": torch.stack([sample["vision_features"] for sample in samples])}
        return {"pixel_values": self.pixel_values(samples)}

    def pixel_values(self, samples: list[dict[str, Any]]) -> torch.Tensor:
        """The pictures of samples, augmented and normalised: ``(B, C, H, W)``."""
        pixels = torch.stack([sample["pixels"] for sample in samples])
        image_processor, options = self.processor.image_processor, {}
        if self.augmentation is not None:
            draws = torch.tensor([sample["draws"] for sample in samples])
            may_flip = torch.tensor([sample["may_flip"] for sample in samples])
            pixels, options = self.augmentation(pixels, draws, may_flip), {"do_rescale": False}
        if isinstance(image_processor, RGBImageProcessorPil):
            return image_processor.normalize_levels(pixels)
        return image_processor(
            list(pixels),
            do_resize=False,
            do_center_crop=False,
            input_data_format="channels_first",
            return_tensors="pt",
            **options,
        )["pixel_values"]


class PromptCollator(ContrastiveCollator):
    """Samples of pictures, or of their cached features, to the inputs of a composite: each picture in a sentence.

    Args:
        processor: of the model; called with ``num_images=1``, it says where the picture stands in the sentence.
        prompt: the sentence, with one placeholder. Where it names columns in braces, each sample's ``"text"`` is its own,
            see `fill_prompt`.
        augmentation: see `ContrastiveCollator`; what is cached stays as it is.
    """

    def __init__(self, processor: Any, prompt: str, augmentation: ImageAugmentation | None = None):
        super().__init__(processor, augmentation)
        self.prompt = processor(text=prompt, num_images=1, return_tensors="pt")
        self.has_columns = bool(prompt_columns(prompt))

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        if self.has_columns:
            batch = dict(
                self.processor(text=[sample["text"] for sample in samples], num_images=1, return_tensors="pt")
            )
        else:
            batch = {name: row.expand(len(samples), -1) for name, row in self.prompt.items()}
        return {
            **batch,
            **self.pictures(samples),
            "image_ids": torch.tensor([stable_id(sample["group"]) for sample in samples]),
            "skipped": [row for sample in samples for row in sample.get("skipped", [])],
        }


class QFormerCollator(ContrastiveCollator):
    """Samples of pictures, or of their cached features, with texts to the inputs of a Q-Former (stage 1).

    Args:
        processor: of stage 1, such as `MMBlip2Processor` without `num_query_tokens`.
        augmentation: see `ContrastiveCollator`; what is cached stays as it is.
    """

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self.processor(text=[sample["text"] for sample in samples], return_tensors="pt"),
            **self.pictures(samples),
            "image_ids": torch.tensor([stable_id(sample["group"]) for sample in samples]),
            "skipped": [row for sample in samples for row in sample.get("skipped", [])],
        }


class LanguageCollator(ContrastiveCollator):
    """Samples of pictures, or of their cached features, with texts to the inputs of a language model (stage 2).

    Args:
        processor: of stage 2, such as `MMBlip2Processor` with `num_query_tokens`.
        mode: of the processor: ``"caption"`` (a sample's text is learnt after the processor's prompt), ``"vqa"`` (it is
            the answer to the sample's ``"label"``, the question) or ``"prefix_lm"`` (it is split, where the sample's
            ``"draws"`` say).
        augmentation: see `ContrastiveCollator`; what is cached stays as it is.
        blind: give features of zeros, to learn what can be said without sight: one row, which `Blip2Trainer` expands to
            all texts. Features must be cached.
    """

    def __init__(
        self, processor: Any, mode: str = "caption", augmentation: ImageAugmentation | None = None, blind: bool = False
    ):
        super().__init__(processor, augmentation)
        self.mode, self.blind = mode, blind

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self.texts(samples),
            **self.pictures(samples),
            "skipped": [row for sample in samples for row in sample.get("skipped", [])],
        }

    def texts(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`; of questions that enter the Q-Former, its inputs too."""
        texts = [sample["text"] for sample in samples]
        if self.mode == "prefix_lm":
            seeds = [int(sample["draws"][0] * 2**32) for sample in samples]
            given = {"text": texts, "rng": seeds}
        elif self.mode == "vqa":
            given = {"text": [sample["label"] for sample in samples], "suffix": texts}
        else:
            given = {"suffix": texts}
        return dict(self.processor(**given, mode=self.mode, num_images=[1] * len(samples), return_tensors="pt"))

    def pictures(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """See `ContrastiveCollator.pictures`."""
        pictures = super().pictures(samples)
        return {name: torch.zeros_like(given[:1]) for name, given in pictures.items()} if self.blind else pictures


class WordCollator(LanguageCollator):
    """Samples of pictures, or of their cached features, with captions to the inputs of the word warm-up: the first tokens
    of a caption in the place of the soft tokens, as `hf_mm.losses.words.word_loss` takes them.

    Args:
        processor: of stage 2.
        captions: of which the vocabulary is made; tokens of others have no target.
        augmentation, blind: see `LanguageCollator`.

    Attributes:
        word_ids: ``(V,)``, the tokens of the vocabulary, in their order.
    """

    def __init__(
        self,
        processor: Any,
        captions: Iterable[str],
        augmentation: ImageAugmentation | None = None,
        blind: bool = False,
    ):
        super().__init__(processor, "caption", augmentation, blind)
        alone = processor(num_images=[1], return_tensors="pt")["input_ids"]
        self.begin = 0 if processor.is_encoder_decoder else alone.shape[1]
        ids, captions = {processor.eos_token_id}, iter(captions)
        while chunk := list(islice(captions, 1024)):
            ids.update(self._tokens(chunk).flatten().tolist())
        self.word_ids = torch.tensor(sorted(ids))
        self.known: dict[str, torch.Tensor] = {}

    def texts(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`word_targets` ``(B, Nq)``: the first tokens of the captions, counted in `word_ids`, filled up with the end."""
        captions = [sample["text"] for sample in samples]
        if new := list(dict.fromkeys(caption for caption in captions if caption not in self.known)):
            if len(self.known) + len(new) > MOST_KNOWN:
                self.known.clear()
                new = list(dict.fromkeys(captions))
            self.known |= zip(new, self._tokens(new), strict=True)
        tokens = torch.stack([self.known[caption] for caption in captions])
        targets = torch.searchsorted(self.word_ids, tokens).clamp(max=len(self.word_ids) - 1)
        return {"word_targets": targets.masked_fill(self.word_ids[targets] != tokens, IGNORED)}

    def _tokens(self, captions: list[str]) -> torch.Tensor:
        given = self.processor(suffix=captions, mode="caption", num_images=[1] * len(captions), return_tensors="pt")
        labels, number = given["labels"][:, self.begin :], self.processor.num_query_tokens
        labels = torch.nn.functional.pad(labels, (0, max(0, number - labels.shape[1])), value=IGNORED)[:, :number]
        return labels.masked_fill(labels == IGNORED, self.processor.eos_token_id)


class ImageTextCollator:
    """For a `datasets.Dataset` of pictures and captions and the stock Trainer (``remove_unused_columns=False``).

    A column of pictures that is cast to ``Image(decode=False)`` leaves the decoding to the collator, which then can
    tell which row is broken.

    Args:
        processor: of the model.
        image_column: column of the pictures.
        caption_column: column of the captions; of a list, the first that is not blank is taken. A blank text is the
            empty text: start and end token.
        strict: raise at a missing or broken picture or a missing caption (None, NaN); else its row is left out of the
            batch, logged, and added to `skipped` (of this process, where a DataLoader has workers).

    Raises:
        ValueError: a batch is empty, a column is missing, a row is broken (`strict`), or no row of a batch is left.
    """

    def __init__(self, processor: Any, image_column: str = "image", caption_column: str = "text", strict: bool = True):
        self.processor, self.strict = processor, strict
        self.image_column, self.caption_column = image_column, caption_column
        self.skipped: list[tuple[str, str]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if not rows:
            raise ValueError("A batch needs at least one row.")
        columns = self._columns(rows[0])
        good, skipped = [], []
        for number, row in enumerate(rows):
            try:
                name = f"{number} of this batch ({row.get(columns.caption)!r:.80})"
                good.append(columns.read(row, name, allow_blank=True))
            except BrokenRow as error:
                if self.strict:
                    raise
                logger.warning(f"Left out {error}")
                skipped.append((error.row, error.reason))
        self.skipped += skipped
        if not good:
            raise ValueError(f"None of the {len(rows)} rows of this batch can be read{_first(skipped)}.")
        images, texts = [row.image for row in good], [row.captions[0] for row in good]
        return dict(self.processor(images=images, text=texts, return_tensors="pt"))

    def _columns(self, row: dict[str, Any]) -> Columns:
        for argument in ("image_column", "caption_column"):
            name = getattr(self, argument)
            if name not in row:
                raise ValueError(
                    f"The rows have no column {name!r}, only {', '.join(row) or 'none'}: set {argument}, and "
                    "remove_unused_columns=False in TrainingArguments, without which Trainer drops raw columns."
                )
        return Columns(self.image_column, self.caption_column, row_id=find_id_column(row))


def _first(skipped: list[tuple[str, str]]) -> str:
    return f"; the first: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
