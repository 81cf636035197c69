"""Captions by the Q-Former itself, without a language model."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ...composite.language_model import label_loss
from .configuration_blip2 import MMBlip2Config
from .modeling_blip2_base import MMBlip2PreTrainedModel
from .modeling_qformer import MMBlip2QFormerOutput, QFormerLMHead


@dataclass
class MMBlip2LanguageOutput(ModelOutput):
    """What the language model says of a picture.

    Args:
        loss: of the tokens that have a label.
        logits: ``(B, T, V)``; in training with labels there are none, for only positions with a label are computed.
        soft_tokens: ``(M, Nq, D)``, the pictures as the language model reads them.
        qformer_outputs: of the pictures.
        cache: of the language model.
        language_model_outputs: all that the language model gives; in training with labels there is none.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    soft_tokens: torch.Tensor | None = None
    qformer_outputs: MMBlip2QFormerOutput | None = None
    cache: Cache | None = None
    language_model_outputs: ModelOutput | None = None


class MMBlip2ForQFormerCaptioning(MMBlip2PreTrainedModel, GenerationMixin):
    """Captions without a language model: the Q-Former's own text, word by word, as the generation loss trained it."""

    main_input_name = "input_ids"
    accepts_loss_kwargs = True
    _keys_to_ignore_on_load_unexpected = [r"^(vision|text)_projection\.", r"^itm_head\.", r"^temperature$"]
    _tied_weights_keys = {"lm_head.decoder.weight": "qformer.embeddings.word_embeddings.weight"}

    def __init__(self, config: MMBlip2Config, vision_tower: PreTrainedModel | None = None):
        super().__init__(config, vision_tower)
        if not config.qformer_config.use_text:
            raise ValueError(
                "captions are texts of the Q-Former, which this one has none of, as in a stage 2: open a stage 1, or set "
                "use_text."
            )
        self.lm_head = QFormerLMHead(config.qformer_config)
        self.post_init()
        ids = config.qformer_config
        self.generation_config.bos_token_id = ids.bos_token_id
        self.generation_config.eos_token_id = ids.sep_token_id
        self.generation_config.pad_token_id = ids.pad_token_id

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, QFormerLMHead):
            module.init_weights(self.config.qformer_config.initializer_range)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Module):
        self.lm_head.decoder = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MMBlip2LanguageOutput:
        """Scores the next word of each place of a text.

        Args:
            input_ids: ``(B, T)``, one text a picture, its first token ``[CLS]`` or ``[DEC]``, which is read as ``[DEC]``.
            pixel_values, vision_features: of B pictures; none is needed once `cache` is filled.
            attention_mask: ``(B, T)``, of all text so far.
            labels: ``(B, T)``, the ids that should stand there, -100 where there is no telling; the loss compares each
                place with the next one's label.
            cache: of earlier words.
            num_items_in_batch: labels in the whole batch, of which this may be a part; by default those given.

        Raises:
            ValueError: there is no text, pictures and texts are not equally many, or pictures come after a filled cache.
        """
        self.hold_frozen_parts()
        if input_ids is None:
            raise ValueError("a caption begins with [DEC]: give input_ids, or call generate.")
        qformer, filled = self.qformer, cache is not None and cache.get_seq_length() > 0
        if use_cache and cache is None:
            cache = DynamicCache()
        keys_values = None
        if filled and (pixel_values is not None or vision_features is not None):
            raise ValueError("the cache holds the picture already: leave pixel_values and vision_features out.")
        if not filled:
            tokens = self._picture_tokens(pixel_values, vision_features, interpolate_pos_encoding)
            if tokens.shape[0] != input_ids.shape[0]:
                raise ValueError(
                    f"there are {tokens.shape[0]} pictures for {input_ids.shape[0]} texts: give one each."
                )
            keys_values = qformer.picture_keys_values(tokens)
            input_ids = qformer.begun_by_dec(input_ids, attention_mask)
        outputs = qformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            text_mode="causal",
            picture_keys_values=keys_values,
            cache=cache,
            **kwargs,
        )
        logits = self.lm_head(outputs.text_hidden_state)
        loss = None
        if labels is not None:
            loss = label_loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), num_items_in_batch)
        return MMBlip2LanguageOutput(loss=loss, logits=logits, cache=cache, qformer_outputs=outputs)

    def prepare_inputs_for_generation(self, input_ids, cache=None, attention_mask=None, **kwargs):
        """See `transformers.GenerationMixin`; after the first step only the new word is read."""
        inputs = {"cache": cache, "attention_mask": attention_mask, "use_cache": kwargs.get("use_cache", True)}
        if cache is not None and cache.get_seq_length() > 0:
            return {**inputs, "input_ids": input_ids[:, -1:]}
        picture = {name: kwargs.get(name) for name in ("pixel_values", "vision_features")}
        return {**inputs, **picture, "input_ids": input_ids}

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        """Writes a caption of each picture; see `transformers.GenerationMixin.generate`.

        Args:
            pixel_values: ``(B, C, H, W)``.
            input_ids: ``(B, T)``, what the captions begin with, ``[CLS]`` or ``[DEC]`` first; by default that alone.
            vision_features: ``(B, N, E)`` in place of pixels.
            **kwargs: of `transformers.GenerationMixin.generate`.

        Returns:
            ``(B, T)``, `input_ids` and what follows.

        Raises:
            ValueError: both or neither of pixels and features, or texts padded on the right.
        """
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("a caption needs a picture: give either pixel_values or vision_features.")
        if pixel_values is not None:
            vision_features = self.vision_features(pixel_values, interpolate_pos_encoding)
        if input_ids is None:
            begin = self.config.qformer_config.bos_token_id
            input_ids = torch.full((vision_features.shape[0], 1), begin, device=vision_features.device)
        mask = kwargs.get("attention_mask")
        if mask is not None and not mask[:, -1].all():
            raise ValueError(
                "texts are padded on the right, where new words would follow padding: set padding_side='left'."
            )
        return super().generate(input_ids=input_ids, vision_features=vision_features, **kwargs)


__all__ = ["MMBlip2ForQFormerCaptioning"]
