"""Stage 2 of BLIP-2: a picture's queries as soft tokens of a frozen language model (Li et al. 2023, section 3.3)."""

import copy

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ...composite.language_model import (
    IGNORED,
    check_labels,
    decoder_input_ids_of,
    embed_with_slots,
    embedding_rms,
    embedding_width,
    generate_from_embeds,
    generating_language_model,
    is_expanded,
    label_logits,
    label_loss,
    language_model_from_config,
    open_language_model,
    read_embeds,
    shared_start,
    takes,
)
from .configuration_blip2 import MMBlip2Config
from .modeling_blip2_base import AnyVisionTower, MMBlip2Model, MMBlip2ModelOutput, MMBlip2PreTrainedModel, opened
from .modeling_blip2_captioning import MMBlip2ForQFormerCaptioning, MMBlip2LanguageOutput
from .modeling_blip2_stage1 import MMBlip2ForImageTextRetrieval, MMBlip2ForPreTraining


class AnyLanguageModel:
    """Opens a causal or an encoder-decoder language model."""

    part_of = staticmethod(generating_language_model)
    from_config = staticmethod(language_model_from_config)
    from_pretrained = staticmethod(open_language_model)


class MMBlip2ForConditionalGeneration(MMBlip2PreTrainedModel, GenerationMixin):
    """Stage 2: the Q-Former's queries become soft tokens of a frozen language model (section 3.3)."""

    frozen_parts = {"vision_tower": AnyVisionTower, "language_model": AnyLanguageModel}
    unquantized = ("vision_tower", "vision_norm", "qformer", "language_projection")
    accepts_loss_kwargs = True

    def __init__(
        self,
        config: MMBlip2Config,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        super().__init__(config, vision_tower)
        if config.text_config is None and language_model is None:
            raise ValueError(
                "stage 2 needs a language model: set text_config, or put a stage 1 before one with from_stage1."
            )
        self.language_model = self._part_or_new("language_model", language_model)
        self.language_projection = nn.Linear(config.qformer_config.hidden_size, embedding_width(self.language_model))
        self.post_init()
        self.generation_config = copy.deepcopy(self.language_model.generation_config)

    @classmethod
    def from_vision_language_pretrained(
        cls, vision_tower: str | PreTrainedModel, language_model: str | PreTrainedModel, **fields
    ) -> "MMBlip2ForConditionalGeneration":
        """Puts a new Q-Former between a pretrained vision tower and a pretrained language model.

        The soft tokens begin as large as the language model's words.

        Args:
            vision_tower: folder or Hub id of a vision encoder or of a model that has one, or the encoder itself.
            language_model: folder or Hub id of a causal or encoder-decoder language model, or the model itself.
            **fields: of `MMBlip2Config`; `qformer_config` has no text unless ``use_text`` is set.
        """
        tower, source = opened(AnyVisionTower, vision_tower)
        language_model, text_source = opened(AnyLanguageModel, language_model)
        qformer = fields.pop("qformer_config", None) or {}
        qformer = qformer if isinstance(qformer, dict) else qformer.to_dict()
        kernels = {
            "vision_config": tower.config._attn_implementation,
            "text_config": language_model.config._attn_implementation,
            "": "sdpa",
        }
        config = MMBlip2Config(
            vision_config=tower.config,
            text_config=language_model.config,
            attn_implementation=kernels,
            qformer_config={"use_text": False, **qformer},
            base_models={"vision_tower": source, "language_model": text_source},
            **fields,
        )
        model = cls(config, vision_tower=tower, language_model=language_model)
        model.match_word_scale()
        return model.eval()

    @classmethod
    def from_stage1(
        cls,
        stage1: str | MMBlip2PreTrainedModel,
        language_model: str | PreTrainedModel,
        use_text: bool = False,
        **fields,
    ) -> "MMBlip2ForConditionalGeneration":
        """Goes on from stage 1: its tower, LayerNorm and Q-Former, before a language model.

        Args:
            stage1: folder or Hub id of an `MMBlip2ForPreTraining`, or the model itself.
            language_model: see `from_vision_language_pretrained`.
            use_text: keep the Q-Former's text, so that a question can enter it.
            **fields: of `MMBlip2Config`.

        The tower is shared with a model that was handed over, and the language model is the one handed over, frozen.
        """
        if not isinstance(stage1, PreTrainedModel):
            stage1 = MMBlip2ForPreTraining.from_pretrained(stage1)
        config = stage1.config
        model = cls.from_vision_language_pretrained(
            stage1.vision_tower,
            language_model,
            qformer_config={**config.qformer_config.to_dict(), "use_text": use_text},
            vision_feature_layer=config.vision_feature_layer,
            vision_class_token=config.vision_class_token,
            vision_norm_eps=config.vision_norm_eps,
            **fields,
        )
        model.config.base_models["vision_tower"] = (config.base_models or {}).get(
            "vision_tower", model.config.base_models["vision_tower"]
        )
        model.vision_norm.load_state_dict(stage1.vision_norm.state_dict())
        own = model.qformer.state_dict()
        model.qformer.load_state_dict({name: t for name, t in stage1.qformer.state_dict().items() if name in own})
        return model

    @torch.no_grad()
    def match_word_scale(self) -> None:
        """Begins the projection anew, so that soft tokens have the root mean square of the language model's words."""
        scale = embedding_rms(self.language_model) / self.config.qformer_config.hidden_size**0.5
        self.language_projection.weight.normal_(std=scale)
        self.language_projection.bias.zero_()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.language_model.set_output_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """See `transformers.PreTrainedModel.resize_token_embeddings`: of the language model."""
        resized = self.language_model.resize_token_embeddings(*args, **kwargs)
        self.config.text_config = self.language_model.config
        self._freeze_parts()
        return resized

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MMBlip2ModelOutput:
        """Soft tokens of pictures: `pooler_output` ``(M, Nq, D)``, D the width of the language model's embeddings.

        In training without dropout, `vision_features` of one picture that were expanded to M (`torch.Tensor.expand`) are
        read once, and all else has one row.
        """
        self.hold_frozen_parts()
        count = None
        varies = self.config.qformer_config.dropout or self.config.qformer_config.attention_dropout
        if self.training and not varies and qformer_input_ids is None and is_expanded(vision_features):
            vision_features, count = vision_features[:1], len(vision_features)
        tokens = self._picture_tokens(pixel_values, vision_features, interpolate_pos_encoding)
        if qformer_input_ids is not None and qformer_input_ids.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"qformer_input_ids hold {qformer_input_ids.shape[0]} texts for {tokens.shape[0]} pictures: give one each."
            )
        outputs = self.qformer(tokens, input_ids=qformer_input_ids, attention_mask=qformer_attention_mask, **kwargs)
        soft_tokens = self.language_projection(outputs.last_hidden_state)
        if count is not None:
            soft_tokens = soft_tokens.expand(count, -1, -1)
        return MMBlip2ModelOutput(
            last_hidden_state=outputs.last_hidden_state, pooler_output=soft_tokens, qformer_outputs=outputs
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MMBlip2LanguageOutput:
        """Lets the language model read pictures and text.

        Args:
            input_ids: ``(B, T)``, with `num_query_tokens` times `image_token_id` for every picture, wherever it stands.
            pixel_values: ``(M, C, H, W)``, all pictures in reading order.
            attention_mask: ``(B, T)``, 1 for tokens and pictures.
            vision_features: ``(M, N, E)`` in place of pixels, see `vision_features()`; those of one picture, expanded, are
                read once, see `get_image_features`.
            qformer_input_ids, qformer_attention_mask: ``(M, T')``, a question to each picture that enters the Q-Former.
            labels: of a causal language model ``(B, T)``, aligned with `input_ids`; of an encoder-decoder ``(B, T')``, what
                the decoder should say. -100 where there is none, as at pictures and padding.
            decoder_input_ids, decoder_attention_mask: of an encoder-decoder; by default from the labels.
            interpolate_pos_encoding: accept pictures of another size than the tower's own.
            num_items_in_batch: labels in the whole batch, of which this may be a part; by default those given.
            **kwargs: of the language model's ``forward``.

        Raises:
            ValueError: pictures and slots are not equally many, or a call that the parts refuse.
            TypeError: an argument that the language model does not take.
        """
        self.hold_frozen_parts()
        self._check_shapes(input_ids, attention_mask, labels)
        kwargs = self._checked(kwargs)
        if "cache" in kwargs:
            raise ValueError("this model reads pictures and text at once and takes no cache: call generate.")
        if labels is not None and "logits_to_keep" in kwargs:
            raise ValueError("a loss needs the logits wherever there is a label: leave logits_to_keep or labels out.")
        kwargs.setdefault("use_cache", False)
        recorded = {name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs}
        images, inputs_embeds = self._embed(
            input_ids,
            pixel_values,
            vision_features,
            qformer_input_ids,
            qformer_attention_mask,
            interpolate_pos_encoding,
            **recorded,
        )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        decoder = {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
        decoder = {name: value for name, value in decoder.items() if value is not None}
        loss = outputs = None
        if labels is not None and self.training:
            kwargs.pop("use_cache")
            label_scores, targets = self._label_scores(
                images, inputs_embeds, input_ids, attention_mask, labels, **decoder, **kwargs
            )
            loss = label_loss(label_scores, targets, num_items_in_batch)
        else:
            if self.config.is_encoder_decoder and decoder_input_ids is None:
                if labels is None:
                    raise ValueError("an encoder-decoder needs labels or decoder_input_ids, or call generate.")
                decoder["decoder_input_ids"] = decoder_input_ids_of(self.language_model, labels)
            outputs = read_embeds(self.language_model, inputs_embeds, attention_mask, **decoder, **kwargs)
            if labels is not None:
                shift = 0 if self.config.is_encoder_decoder else 1
                scores, targets = outputs.logits[:, : labels.shape[1] - shift], labels[:, shift:]
                loss = label_loss(scores.flatten(0, 1), targets.flatten(), num_items_in_batch)
        return MMBlip2LanguageOutput(
            loss=loss,
            logits=None if outputs is None else outputs.logits,
            soft_tokens=None if images is None else images.pooler_output,
            qformer_outputs=None if images is None else images.qformer_outputs,
            cache=None if outputs is None else outputs.get("cache"),
            language_model_outputs=outputs,
        )

    @torch.no_grad()
    def label_nll(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **pictures: torch.Tensor | bool | None,
    ) -> torch.Tensor:
        """``(B,)``: what the labels of each text cost, in nats per token, float32; NaN where a text has none.

        For a model in eval mode. The vocabulary product is taken at labels alone, and the words that all texts begin with
        are read once.

        Args:
            input_ids, labels, attention_mask: see `forward`.
            **pictures: pixel_values or vision_features, and what goes with them, see `forward`.
        """
        self.hold_frozen_parts()
        self._check_shapes(input_ids, attention_mask, labels)
        images, inputs_embeds = self._embed(input_ids, **pictures)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        scores, targets = self._label_scores(images, inputs_embeds, input_ids, attention_mask, labels)
        nats = nn.functional.cross_entropy(scores.float(), targets.to(scores.device), reduction="none")
        rows = (
            (labels if self.config.is_encoder_decoder else labels[:, 1:]).ne(IGNORED).nonzero()[:, 0].to(nats.device)
        )
        sums = nats.new_zeros(len(labels)).index_add_(0, rows, nats)
        return sums / rows.bincount(minlength=len(labels))

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> torch.Tensor | ModelOutput:
        """Lets the language model go on after pictures and text; see its own `generate`. Pictures are read once.

        Args:
            input_ids: ``(B, T)``, padded on the left, with the slots of all pictures; by default the pictures alone and
                the token that the language model begins with.
            **kwargs: of `transformers.GenerationMixin.generate`.

        Returns:
            As a causal language model, `input_ids` and what follows; as an encoder-decoder, what it says.

        Raises:
            ValueError: see `forward`.
        """
        self.hold_frozen_parts()
        kwargs = _without_embeds(kwargs)
        if input_ids is None:
            input_ids = self._pictures_alone(pixel_values, vision_features)
        self._check_shapes(input_ids, attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        _, inputs_embeds = self._embed(
            input_ids,
            pixel_values,
            vision_features,
            qformer_input_ids,
            qformer_attention_mask,
            interpolate_pos_encoding,
        )
        self.language_model.generation_config = self.generation_config
        generated = generate_from_embeds(self.language_model, inputs_embeds, attention_mask, **kwargs)
        if self.config.is_encoder_decoder:
            return generated
        new = generated.sequences if isinstance(generated, ModelOutput) else generated
        whole = torch.cat([input_ids.repeat_interleave(new.shape[0] // input_ids.shape[0], dim=0), new], dim=1)
        if isinstance(generated, ModelOutput):
            generated.sequences = whole
            return generated
        return whole

    def _pictures_alone(self, pixel_values: torch.Tensor | None, vision_features: torch.Tensor | None) -> torch.Tensor:
        pictures = pixel_values if pixel_values is not None else vision_features
        if pictures is None:
            raise ValueError("there is nothing to go on from: give input_ids, pixel_values or vision_features.")
        config, text = self.config, self.language_model.config.get_text_config()
        begin = text.eos_token_id if config.is_encoder_decoder else text.bos_token_id
        begin = begin[0] if isinstance(begin, list) else begin
        slots = torch.full((pictures.shape[0], config.num_query_tokens), config.image_token_id, device=pictures.device)
        return slots if begin is None else nn.functional.pad(slots, (0, 1), value=begin)

    def _embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        qformer_input_ids: torch.Tensor | None = None,
        qformer_attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **recorded: bool,
    ) -> tuple[MMBlip2ModelOutput | None, torch.Tensor]:
        """The pictures, and ``(B, T, D)``: words and soft tokens in their places."""
        slots = input_ids == self.config.image_token_id
        images = None
        if pixel_values is not None or vision_features is not None or qformer_input_ids is not None:
            images = self.get_image_features(
                pixel_values,
                vision_features,
                qformer_input_ids,
                qformer_attention_mask,
                interpolate_pos_encoding,
                return_dict=True,
                **recorded,
            )
        self._check_slots(slots, 0 if images is None else images.pooler_output.shape[0])
        width = embedding_width(self.language_model)
        soft_tokens = (
            self.language_projection.weight.new_empty(0, self.config.num_query_tokens, width)
            if images is None
            else images.pooler_output
        )
        inputs_embeds = embed_with_slots(self.language_model, input_ids, slots, soft_tokens)
        if self.training and images is None:  # every rank needs a gradient for every parameter
            inputs_embeds = inputs_embeds + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)
        return images, inputs_embeds

    def _label_scores(
        self,
        images: MMBlip2ModelOutput | None,
        inputs_embeds: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        **lm_kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `label_logits`; what all texts begin with is read once."""
        slots = input_ids == self.config.image_token_id
        one_picture = images is not None and is_expanded(images.pooler_output)
        shared = shared_start(self.language_model, input_ids, slots, attention_mask, labels, one_picture)
        return label_logits(
            self.language_model, inputs_embeds, attention_mask, labels, shared, one_picture, **lm_kwargs
        )

    def _check_shapes(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, labels: torch.Tensor | None = None
    ) -> None:
        if input_ids is None:
            raise ValueError("the language model needs input_ids with slots for the pictures: call the processor.")
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(f"input_ids must be (texts, tokens), but its shape is {tuple(input_ids.shape)}.")
        beside = {"attention_mask": attention_mask, "labels": None if self.config.is_encoder_decoder else labels}
        for name, given in beside.items():
            if given is not None and given.shape != input_ids.shape:
                raise ValueError(
                    f"{name} must have the shape of input_ids, {tuple(input_ids.shape)}, not {tuple(given.shape)}."
                )
        if labels is None:
            return
        check_labels(self.language_model, labels, input_ids.shape[0])
        if self.config.is_encoder_decoder and not torch.compiler.is_compiling() and labels.shape == input_ids.shape:
            told = labels != IGNORED
            if told.any() and not told[:, 0].any() and (labels == input_ids)[told].all():
                raise ValueError(
                    "an encoder would read what is to be learnt, which stands in input_ids too: make the processor with "
                    "is_encoder_decoder=True."
                )

    def _checked(self, given: dict) -> dict:
        """What of the arguments says something (PEFT adds some of None). Refuses what nobody would read, such as pictures by
        another name."""
        given = {name: value for name, value in _without_embeds(given).items() if value is not None}
        for name in () if torch.compiler.is_compiling() else given:
            if name not in TransformersKwargs.__annotations__ and not takes(self.language_model, name):
                raise TypeError(
                    f"there is no argument {name!r}: pictures are given as pixel_values or vision_features, all else as "
                    f"{self.language_model.config.model_type} names it."
                )
        return given

    def _check_slots(self, slots: torch.Tensor, num_images: int) -> None:
        number = self.config.num_query_tokens
        per_row = slots.sum(dim=1)
        if torch.compiler.is_compiling():
            torch._assert_async(
                (per_row % number == 0).all(), f"a text has slots of a picture in part: {number} are one."
            )
        elif int(per_row.sum()) != num_images * number or (per_row % number).any():
            raise ValueError(
                f"input_ids have {per_row.tolist()} image slots a row (id {self.config.image_token_id}), but {num_images} "
                f"pictures need {number} each: prepare text and pictures with one call of the processor."
            )


def _without_embeds(given: dict) -> dict:
    """Raises ValueError where texts are given as embeddings, in which no slot could be told."""
    if given.get("inputs_embeds") is not None:
        raise ValueError("texts are given as input_ids, with slots for the pictures, and not as inputs_embeds.")
    return {name: value for name, value in given.items() if name != "inputs_embeds"}


__all__ = [
    "MMBlip2ForConditionalGeneration",
    "MMBlip2ForImageTextRetrieval",
    "MMBlip2ForPreTraining",
    "MMBlip2ForQFormerCaptioning",
    "MMBlip2Model",
]
