"""Processor of Pic2Word: pictures, and texts in which ``*`` stands for a picture."""

import re
from collections.abc import Sequence
from typing import Any

from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from ...image_utils import deal_out
from ..clip.tokenization_clip import check_texts


class Pic2WordProcessor(ProcessorMixin):
    r"""Prepares pictures and texts for a Pic2Word model.

    In a text, each placeholder stands for a picture: ``"a photo of *, in red"``. White space around it is not needed, and
    it is never lost: a text whose placeholders are not as many as its pictures, or that is cut before one, is refused.
    ``\*`` is a literal star.

    Args:
        image_processor: of the frozen CLIP.
        tokenizer: of the frozen CLIP.
        placeholder: what stands for a picture, one token of the vocabulary.
    """

    text_kwargs = {"padding": True, "truncation": True}

    def __init__(self, image_processor=None, tokenizer=None, placeholder: str = "*", **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)
        self.placeholder = placeholder
        ids = tokenizer(f"{placeholder} {placeholder}", add_special_tokens=False)["input_ids"]
        if len(ids) != 2 or ids[0] != ids[1]:
            raise ValueError(
                f"the placeholder {placeholder!r} must be one token of the vocabulary, the same at the beginning of a text "
                f"and within it, but two of them are {ids}: choose another."
            )
        self.placeholder_token_id = ids[0]

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "placeholder_mask"]

    def __call__(
        self, images: Any = None, text: Any = None, num_images: int | Sequence[int] | None = None, **kwargs
    ) -> BatchFeature:
        """Prepares a batch.

        Args:
            images: one picture for each text, or for each text a list of pictures; a flat list of as many pictures as all
                texts have placeholders is dealt out in reading order. Pictures are what `hf_mm.image_utils.to_rgb` takes.
            text: one text or several.
            num_images: instead of images, how many pictures each text holds whose features the model will be given.
            **kwargs: options of the image processor and the tokenizer.

        Returns:
            `pixel_values` ``(M, C, H, W)`` of all pictures in reading order, and for texts `input_ids`, `attention_mask`
            and, where they hold pictures, `placeholder_mask`, each ``(N, T)``.

        Raises:
            ValueError: there is nothing to process; a row's placeholders and pictures are not equally many; a placeholder
                was cut off; a text is missing or no string.
        """
        if images is None and text is None:
            raise ValueError("Give images, text, or both: there is nothing to process.")
        options = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        tensor_type = kwargs.get("return_tensors", "pt")
        data = {}
        if text is not None:
            one, texts = isinstance(text, str), check_texts(text)
            texts = [texts] if one else texts
            rows = [self._split(row) for row in texts]
            marks = [len(row) - 1 for row in rows]
            counts, images = deal_out(images, marks, one, num_images, one_each=True)
            self._check_counts(marks, counts)
            data |= self._encode(rows, counts, {**options["text_kwargs"], "return_tensors": None})
        if images is not None:
            data |= self.image_processor(images, **{**options["images_kwargs"], "return_tensors": tensor_type})
        return BatchFeature(data, tensor_type=tensor_type)

    def _split(self, text: str) -> list[str]:
        """The pieces of a text between its placeholders, escapes resolved."""
        placeholder = re.escape(self.placeholder)
        pieces = re.split(rf"(?<!\\){placeholder}", text)
        return [piece.replace("\\" + self.placeholder, self.placeholder) for piece in pieces]

    def _check_counts(self, marks: list[int], counts: list[int]) -> None:
        for row, (there, wanted) in enumerate(zip(marks, counts, strict=True)):
            if there != wanted:
                raise ValueError(
                    f"Text {row} has {there} placeholders for {wanted} pictures: write one * for each picture, and \\* for "
                    "a star that is none."
                )

    def _encode(self, rows: list[list[str]], counts: list[int], options: dict) -> dict[str, list]:
        glue = f" {self.placeholder} "
        encoded = dict(self.tokenizer([glue.join(row) for row in rows], **options))
        if not any(counts):
            return encoded
        masks = [[False] * len(ids) for ids in encoded["input_ids"]]
        begin = self.tokenizer(self.placeholder)["input_ids"].index(self.placeholder_token_id)
        kept = encoded.get("attention_mask", [[1]] * len(rows))
        for number, (row, ids, mask) in enumerate(zip(rows, encoded["input_ids"], masks, strict=True)):
            # A placeholder stands after as many tokens as what comes before it has: a literal star may be the same token.
            befores = [glue.join(row[:end]) for end in range(1, len(row))]
            first = kept[number].index(1) + begin  # after padding on the left and the start token
            for nth, before in enumerate(befores, start=1):
                tokens = self.tokenizer(before, add_special_tokens=False, truncation=False)["input_ids"]
                place = first + len(tokens)
                if place >= len(ids) or ids[place] != self.placeholder_token_id:
                    raise ValueError(
                        f"Row {number} was cut before its placeholder number {nth}: shorten the text before it."
                    )
                if self.tokenizer.eos_token_id in tokens:
                    raise ValueError(
                        f"Row {number} has an end token before its placeholder number {nth}, which would be ignored: take "
                        f"{self.tokenizer.eos_token!r} out of the text."
                    )
                mask[place] = True
        return {**encoded, "placeholder_mask": masks}


__all__ = ["Pic2WordProcessor"]
