"""Pic2Word: a picture becomes a word of a frozen CLIP's text tower (Saito et al. 2023, arXiv 2302.03084)."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ...composite.dual_encoder import check_ids, texts_with_words, vision_side, word_embeddings
from ...composite.freezing import is_trained, upstream
from ...composite.modeling_composite import MMCompositeModel
from ...losses.contrastive import at_least_float32, check_pairs, image_text_contrastive_loss
from ...nn.pretrained import MMPreTrainedModel, torch_default_
from .configuration_pic2word import Pic2WordConfig, Pic2WordMapperConfig


@dataclass
class Pic2WordMapperOutput(ModelOutput):
    """What `Pic2WordMapper.forward` returns.

    Attributes:
        pseudo_words: ``(M, word_dim)``, token embeddings.
    """

    pseudo_words: torch.Tensor | None = None


@dataclass
class Pic2WordOutput(ModelOutput):
    """What `Pic2WordModel.forward` returns.

    Attributes:
        loss: scalar, where it was asked for and every text holds one picture.
        logits_per_image: ``(M, N)`` scaled cosine similarities of pictures and composed texts, in float32 at least.
        logits_per_text: its transpose.
        composed_embeds: ``(N, D)`` texts with pictures for words, of unit length.
        image_embeds: ``(M, D)`` of unit length.
        pseudo_words: ``(M, word_dim)``.
        text_model_output, vision_model_output: of the towers; with `vision_features` there is none of the latter.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    composed_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    pseudo_words: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


def torch_defaults_for_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        torch_default_(module)


class Pic2WordMapper(MMPreTrainedModel):
    """The mapping network f_M (section 3.1): picture embedding in, token embedding out."""

    config: Pic2WordMapperConfig
    base_model_prefix = "mapper"
    main_input_name = "image_embeds"
    input_modalities = ("image",)
    supports_gradient_checkpointing = False

    def __init__(self, config: Pic2WordMapperConfig):
        super().__init__(config)
        widths = [config.image_dim] + [config.hidden_dim] * config.num_hidden_layers
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.dropout = nn.Dropout(config.dropout)
        self.fc_out = nn.Linear(config.hidden_dim, config.word_dim)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        torch_defaults_for_linear(module)

    @can_return_tuple
    def forward(self, image_embeds: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> Pic2WordMapperOutput:
        """Turns pictures into words.

        Args:
            image_embeds: ``(M, image_dim)``, CLIP's picture embeddings, projected and *not* of unit length.

        Raises:
            ValueError: they have another width or are no matrix.
        """
        width = self.config.image_dim
        if image_embeds.ndim != 2 or image_embeds.shape[1] != width:
            raise ValueError(
                f"picture embeddings must be (pictures, {width}), not {tuple(image_embeds.shape)}: take them from the "
                "CLIP that this mapping network was trained on."
            )
        hidden = image_embeds.to(self.fc_out.weight.dtype)
        for layer in self.layers:
            hidden = self.dropout(layer(hidden)).relu()
        return Pic2WordMapperOutput(pseudo_words=self.fc_out(hidden))


class Pic2WordModel(MMCompositeModel):
    """A frozen CLIP and the mapping network.

    In training, the picture tower is upstream of what trains and the text tower downstream: gradients reach the mapping
    network through the text tower, whose weights stay as they are.
    """

    config: Pic2WordConfig
    input_modalities = ("image", "text")
    accepts_loss_kwargs = False
    frozen_parts = {"clip": AutoModel}

    def __init__(self, config: Pic2WordConfig, clip: PreTrainedModel | None = None):
        super().__init__(config)
        self.clip = self._part_or_new("clip", clip)
        self.mapper = Pic2WordMapper(config.mapper_config)
        self.post_init()

    @classmethod
    def from_clip_pretrained(
        cls, clip: str | PreTrainedModel, placeholder_token_id: int = 265, **mapper_fields
    ) -> "Pic2WordModel":
        """Puts a new mapping network on a pretrained dual encoder.

        Args:
            clip: folder or Hub id of a dual encoder, or the model itself.
            placeholder_token_id: id of the placeholder in its vocabulary.
            **mapper_fields: of `Pic2WordMapperConfig`, such as `hidden_dim`.

        Raises:
            ValueError: it is no dual encoder.
        """
        clip = clip if isinstance(clip, PreTrainedModel) else AutoModel.from_pretrained(clip)
        check_dual_encoder(clip)
        source = {"name": clip.name_or_path, "revision": getattr(clip.config, "_commit_hash", None)}
        config = Pic2WordConfig(
            clip_config=clip.config,
            mapper_config=mapper_fields,
            placeholder_token_id=placeholder_token_id,
            base_models={"clip": source},
            attn_implementation=clip.config._attn_implementation,
        )
        return cls(config, clip).eval()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        torch_defaults_for_linear(module)

    def get_input_embeddings(self) -> nn.Module:
        return word_embeddings(self.clip)

    def set_input_embeddings(self, value: nn.Module):
        self.clip.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """The frozen CLIP's picture embeddings: `pooler_output` ``(M, D)`` of pixels ``(M, C, H, W)``, not of unit
        length."""
        self.hold_frozen_parts()
        with upstream(*vision_side(self.clip)):
            return self.clip.get_image_features(pixel_values=pixel_values, **kwargs)

    @torch.no_grad()
    def vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``(M, D)``: what `forward` and `get_composed_features` take as `vision_features` in place of pixels."""
        return self.get_image_features(pixel_values).pooler_output

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """The frozen CLIP's text embeddings: `pooler_output` ``(N, D)`` of ids ``(N, T)``, not of unit length."""
        self.hold_frozen_parts()
        check_ids(self.clip, input_ids)
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        return self.clip.get_text_features(input_ids=input_ids, **mask, **kwargs)

    @can_return_tuple
    def get_composed_features(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        placeholder_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes texts in which pictures stand for words (section 3.2).

        Args:
            input_ids: ``(N, T)``, padded on the right.
            pixel_values: ``(M, C, H, W)``; the k-th picture becomes the k-th placeholder of the batch, row by row.
            attention_mask: ``(N, T)``, 1 for tokens.
            placeholder_mask: ``(N, T)``, true where a picture goes; by default wherever `placeholder_token_id` stands. The
                processor gives it, so that a literal ``*`` of a caption is none.
            vision_features: ``(M, D)`` in place of pixels, see `vision_features()`.

        Returns:
            The text tower's output with `pooler_output` ``(N, D)`` in the joint space, not of unit length.

        Raises:
            ValueError: both or neither of pixels and features; features while the picture tower trains; a row without
                placeholder; placeholders and pictures are not equally many; the mask or the features have another shape.
        """
        features = self._features_of(pixel_values, vision_features, {}).pooler_output
        return self._compose(features, input_ids, attention_mask, placeholder_mask, kwargs)[0]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        placeholder_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
        return_loss: bool = True,
        gather_loss: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Pic2WordOutput:
        """Compares pictures with texts that hold them: ``a photo of *`` should mean its picture (equation 3).

        Args:
            input_ids, pixel_values, attention_mask, placeholder_mask, vision_features: see `get_composed_features`.
            image_ids: ``(M,)`` integers; pictures with equal ids are never each other's negatives.
            return_loss: compute the contrastive loss of pairs (picture i, text i). In eval mode M and N may differ; there
                is no loss then.
            gather_loss: take the loss over all ranks. By default in training only.

        Raises:
            ValueError: as `get_composed_features`; in training M and N differ.
        """
        if input_ids is None:
            raise ValueError("Pic2WordModel needs input_ids with a placeholder for every picture: call its processor.")
        vision = self._features_of(pixel_values, vision_features, kwargs)
        features = vision.pooler_output
        num_images, num_texts = features.shape[0], input_ids.shape[0]
        with_loss = return_loss and (self.training or num_images == num_texts)
        if with_loss:
            check_pairs(num_images, num_texts, image_ids)
        text, pseudo_words = self._compose(features, input_ids, attention_mask, placeholder_mask, kwargs)
        image_embeds = nn.functional.normalize(at_least_float32(features), dim=-1)
        composed_embeds = nn.functional.normalize(at_least_float32(text.pooler_output), dim=-1)
        scale = self.clip.logit_scale.exp()

        loss = None
        if with_loss:
            gather = self.training if gather_loss is None else gather_loss
            loss = image_text_contrastive_loss(image_embeds, composed_embeds, scale, image_ids, gather=gather)
        with torch.autocast(image_embeds.device.type, enabled=False):
            logits_per_image = scale * image_embeds @ composed_embeds.T
        return Pic2WordOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T.contiguous(),
            composed_embeds=composed_embeds.to(scale.dtype),
            image_embeds=image_embeds.to(scale.dtype),
            pseudo_words=pseudo_words,
            text_model_output=text,
            vision_model_output=vision if pixel_values is not None else None,
        )

    def _features_of(
        self, pixel_values: torch.Tensor | None, vision_features: torch.Tensor | None, kwargs: dict
    ) -> BaseModelOutputWithPooling:
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("give either pixel_values or vision_features, not both and not neither.")
        if vision_features is not None:
            if self.training and any(map(is_trained, vision_side(self.clip))):
                raise ValueError(
                    "the picture tower trains, itself or by adapters, which vision_features would pass by: give "
                    "pixel_values."
                )
            return BaseModelOutputWithPooling(pooler_output=vision_features)
        return self.get_image_features(pixel_values, **kwargs)

    def _compose(
        self,
        features: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        placeholder_mask: torch.Tensor | None,
        kwargs: dict,
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """The text tower's output for pictures as words, and the words."""
        self.hold_frozen_parts()
        if placeholder_mask is None:
            placeholder_mask = input_ids == self.config.placeholder_token_id
        check_shapes(input_ids, attention_mask=attention_mask, placeholder_mask=placeholder_mask)
        self._check_placeholders(placeholder_mask, features.shape[0])
        words = self.mapper(features).pseudo_words
        places = placeholder_mask.bool()
        text = texts_with_words(self.clip, input_ids, words, places, attention_mask, **kwargs)
        check_places(self.config.clip_config.text_config, input_ids, places, attention_mask)
        return text, words

    def _check_placeholders(self, mask: torch.Tensor, num_images: int) -> None:
        if torch.compiler.is_compiling():
            return
        per_row = mask.sum(dim=1)
        if not per_row.all():
            raise ValueError(
                f"row {int(per_row.argmin())} of input_ids has no placeholder (id {self.config.placeholder_token_id}): "
                "its picture would be ignored; write the text with the processor, which keeps '*' apart from other signs."
            )
        if (total := int(per_row.sum())) != num_images:
            raise ValueError(
                f"the texts have {total} placeholders ({per_row.tolist()} a row), but there are {num_images} pictures."
            )


def check_dual_encoder(clip: PreTrainedModel) -> None:
    """Raises ValueError where a model does not embed pictures and texts into one space, or has no temperature."""
    needed = ("get_image_features", "get_text_features", "text_model", "logit_scale")
    if lacking := [name for name in needed if not hasattr(clip, name)]:
        raise ValueError(
            f"{clip.name_or_path or 'the model given'} is a {type(clip).__name__}, which is no dual encoder of pictures "
            f"and texts (it has no {lacking[0]}): give a CLIP, say."
        )


def check_shapes(input_ids: torch.Tensor, **masks: torch.Tensor | None) -> None:
    """Raises ValueError where the ids are no batch, or a mask is not one number a token."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be (texts, tokens), but its shape is {tuple(input_ids.shape)}.")
    for name, mask in masks.items():
        if mask is not None and mask.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, not {tuple(mask.shape)}."
            )


def check_places(
    text_config: PreTrainedConfig, input_ids: torch.Tensor, places: torch.Tensor, attention_mask: torch.Tensor | None
) -> None:
    """Raises ValueError for a placeholder that no pooled token looks at."""
    if torch.compiler.is_compiling():
        return
    end = text_config.eos_token_id
    end = text_config.vocab_size - 1 if end == 2 else end  # as transformers' CLIP reads 2
    ignored = torch.zeros_like(places) if end is None else (input_ids == end).cumsum(dim=1) > 0
    if attention_mask is not None:
        ignored = ignored | ~attention_mask.bool()
    if (lost := (places & ignored).any(dim=1)).any():
        raise ValueError(
            f"row {int(lost.int().argmax())} has a placeholder at or behind its end token or in its padding, where its "
            "picture would be ignored."
        )


__all__ = ["Pic2WordMapper", "Pic2WordModel"]
