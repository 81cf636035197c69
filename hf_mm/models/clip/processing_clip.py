"""Processor of CLIP: pictures and texts in, `pixel_values`, `input_ids` and `attention_mask` out."""

from typing import Any

from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from hf_mm.models.clip.tokenization_clip import check_texts


class MMClipProcessor(ProcessorMixin):
    """Prepare pictures, texts, or both for a CLIP model.

    Any number of pictures goes with any number of texts. Results are torch tensors unless `return_tensors` says
    otherwise; texts are padded to the longest of the batch and cut to the context of the text tower.

    Args:
        image_processor: A CLIP image processor, see [`MMClipImageProcessorPil`].
        tokenizer: See [`MMClipTokenizer`].
    """

    text_kwargs = {"padding": True, "return_tensors": "pt"}
    images_kwargs = {"return_tensors": "pt"}

    def __init__(self, image_processor=None, tokenizer=None, **kwargs):
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: One picture or any nesting of pictures, see [`hf_mm.image_utils.to_rgb`].
            text: One text or several.
            **kwargs: Options of the image processor and the tokenizer.

        Returns:
            `pixel_values` (B, 3, n, n) if there are images; `input_ids` and `attention_mask` (N, T) if there are texts.

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
        context = self.tokenizer.model_max_length
        longest = max(map(len, input_ids)) if len(input_ids) and hasattr(input_ids[0], "__len__") else len(input_ids)
        if longest > context:
            raise ValueError(
                f"A text of {longest} tokens exceeds the context of {context}: leave truncation on or shorten it."
            )
