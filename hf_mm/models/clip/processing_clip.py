"""Processor of CLIP: pictures and texts in, `pixel_values`, `input_ids` and `attention_mask` out."""

from typing import Any

from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .tokenization_clip import check_texts


class MMClipProcessor(ProcessorMixin):
    """Prepares pictures, texts, or both for a CLIP model.

    Any number of pictures goes with any number of texts. Results are torch tensors unless `return_tensors` says
    otherwise; texts are padded to the longest of the batch and cut to the context of the text tower.

    Args:
        image_processor: a CLIP image processor, see `MMClipImageProcessorPil`.
        tokenizer: see `MMClipTokenizer`; another text tower has its own.
    """

    text_kwargs = {"padding": True, "truncation": True, "return_tensors": "pt"}
    images_kwargs = {"return_tensors": "pt"}

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs) -> BatchFeature:
        """Prepares a batch.

        Args:
            images: one picture or any nesting of pictures, see `hf_mm.image_utils.to_rgb`.
            text: one text or several.
            **kwargs: options of the image processor and the tokenizer.

        Returns:
            `pixel_values` (B, 3, n, n) of the images, `input_ids` and `attention_mask` (N, T) of the texts.

        Raises:
            ValueError: If both are missing, a text is missing or no string, or a text is longer than the context while
                `truncation=False`.
        """
        if images is None and text is None:
            raise ValueError("Give images, text, or both: there is nothing to process.")
        text = None if text is None else check_texts(text)
        batch = super().__call__(images=images, text=text, **kwargs)
        if text is not None:
            self._refuse_long_texts(batch["input_ids"])
        return batch

    def _refuse_long_texts(self, input_ids: Any) -> None:
        rows = [input_ids] if isinstance(input_ids[0], int) else input_ids
        longest, context = max(map(len, rows)), self.tokenizer.model_max_length
        if longest > context:
            raise ValueError(
                f"A text of {longest} tokens exceeds the context of {context}: leave truncation on or shorten it."
            )
