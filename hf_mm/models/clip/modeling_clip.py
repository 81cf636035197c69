"""CLIP, with a Vision Transformer tower or any other (Radford et al. 2021, arXiv 2103.00020).

Parameters carry the names that transformers' CLIP has on disk, so that its checkpoints open here unchanged.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...losses.contrastive import at_least_float32, check_pairs, image_text_contrastive_loss
from ...nn.attention import Attention
from ...nn.blocks import MLP, TransformerEncoder, token_at
from ...nn.patches import patch_grid, to_pair
from ...nn.positions import resize_position_table
from ...nn.pretrained import MMPreTrainedModel, torch_default_
from .configuration_clip import MMClipConfig, MMClipTextConfig, MMClipVisionConfig, projects_itself

PADDED_ON_THE_LEFT = "the text tower takes padding on the right only: set tokenizer.padding_side = 'right'."


@dataclass
class MMClipOutput(ModelOutput):
    """What `MMClipModel.forward` returns.

    Attributes:
        loss: scalar, where it was asked for and pictures and texts are equally many.
        logits_per_image: ``(num_images, num_texts)`` scaled cosine similarities, in float32 also of a half-precision
            model: at a scale of 100 a step of bfloat16 is half a logit.
        logits_per_text: its transpose.
        text_embeds: ``(num_texts, projection_dim)`` of unit length.
        image_embeds: ``(num_images, projection_dim)`` of unit length.
        text_model_output, vision_model_output: of the towers. Their `last_hidden_state` is there only where
            ``output_hidden_states=True`` or ``output_attentions=True`` asks for more than embeddings (the text's
            tokens end at the longest text's end token); otherwise the last block computes the pooled token alone.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


class MMClipPreTrainedModel(MMPreTrainedModel):
    """What CLIP and its towers share: their initialisation."""

    config: MMClipConfig
    base_model_prefix = "clip"
    input_modalities = ("image", "text")
    accepts_loss_kwargs = False
    _no_split_modules = ["MMClipTextEmbeddings", "MMClipVisionEmbeddings", "TransformerBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The initialisation of OpenAI's release, in which the picture tower's blocks keep torch's defaults."""
        factor = self.config.initializer_factor
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            torch_default_(module)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=factor * 0.02)
        else:
            super()._init_weights(module)

        if isinstance(module, Attention):
            self._init_attention(module, factor)
        elif isinstance(module, MLP) and isinstance(self, MMClipTextModel):
            width = self.config.hidden_size
            init.normal_(module.fc1.weight, std=factor * (2 * width) ** -0.5)
            init.normal_(module.fc2.weight, std=factor * self._residual_std())
        elif isinstance(module, MMClipTextEmbeddings):
            init.normal_(module.position_embedding.weight, std=factor * 0.01)
        elif isinstance(module, MMClipVisionEmbeddings):
            std = factor * self.config.hidden_size**-0.5
            init.normal_(module.class_embedding, std=std)
            init.normal_(module.position_embedding.weight, std=std)
        elif isinstance(module, MMClipModel):
            for projection in (module.visual_projection, module.text_projection):
                if isinstance(projection, nn.Linear):
                    init.normal_(projection.weight, std=factor * projection.in_features**-0.5)
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    def _init_attention(self, module: Attention, factor: float):
        for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
            init.zeros_(projection.bias)
        inputs = (module.q_proj, module.k_proj, module.v_proj)
        if isinstance(self, MMClipTextModel):
            for projection in inputs:
                init.normal_(projection.weight, std=factor * self.config.hidden_size**-0.5)
            init.normal_(module.out_proj.weight, std=factor * self._residual_std())
        else:
            # Xavier over the fused (3 D, D) matrix of torch's MultiheadAttention: bound sqrt(6 / (3 D + D)).
            bound = factor * (6 / (4 * self.config.hidden_size)) ** 0.5
            for projection in inputs:
                init.uniform_(projection.weight, -bound, bound)

    def _residual_std(self) -> float:
        return self.config.hidden_size**-0.5 * (2 * self.config.num_hidden_layers) ** -0.5


class MMClipTextEmbeddings(nn.Module):
    """Token table plus position table."""

    def __init__(self, config: MMClipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        tokens = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        context = self.position_embedding.num_embeddings
        if tokens.shape[1] > context:
            raise ValueError(
                f"the text has {tokens.shape[1]} tokens but the model's context is {context}: "
                "let the processor cut it (truncation=True)."
            )
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)
        return tokens + self.position_embedding(position_ids)


class MMClipTextModel(MMClipPreTrainedModel):
    """The text tower: a causal Transformer whose state at the end token is the text."""

    config: MMClipTextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    pools_alone = True
    _input_embed_layer = "token_embedding"
    _keys_to_ignore_on_load_unexpected = [r"vision_model\.", r"(visual|text)_projection\.", r"logit_scale"]

    def __init__(self, config: MMClipTextConfig):
        super().__init__(config)
        self.embeddings = MMClipTextEmbeddings(config)
        self.encoder = TransformerEncoder(config, is_causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pooling_positions: torch.Tensor | None = None,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes texts.

        Args:
            input_ids: ``(B, T)``, padded on the right.
            attention_mask: ``(B, T)``, 1 for tokens. Padding on the right needs none: causality hides it.
            position_ids: ``(B, T)`` or ``(1, T)``.
            inputs_embeds: ``(B, T, D)`` in place of `input_ids`, positions not yet added.
            pooling_positions: ``(B,)``, the token that stands for the text. By default the first end token of
                `input_ids`; with `inputs_embeds`, the last token that `attention_mask` keeps.
            pooled_only: compute no token that `pooler_output` does not need and return no `last_hidden_state`; without
                effect where hidden states or attention maps are asked for.

        Returns:
            `last_hidden_state` ``(B, T, D)`` after the final norm, `pooler_output` ``(B, D)``.

        Raises:
            ValueError: neither or both of ids and embeddings, a text beyond the context, a row without end token, a
                mask of another shape, padding on the left.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both and not neither.")
        if pooling_positions is None and input_ids is not None:
            pooling_positions = self.end_positions(input_ids)
        hidden_states = self.embeddings(input_ids, inputs_embeds, position_ids)
        check_mask_shape(attention_mask, hidden_states.shape[:2])
        if pooling_positions is None:
            pooling_positions = last_kept_positions(attention_mask, hidden_states)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=drop_right_padding(attention_mask),
            cache=None,
            position_ids=None,
        )
        if self._pools_alone(pooled_only, kwargs):
            last_mask = self._mask_of(pooling_positions, attention_mask, hidden_states)
            hidden_states = self.encoder(hidden_states, mask, pooling_positions, last_mask, **kwargs)
            return BaseModelOutputWithPooling(pooler_output=self.final_layer_norm(hidden_states)[:, 0])
        hidden_states = self.final_layer_norm(self.encoder(hidden_states, mask, **kwargs))
        pooled = token_at(hidden_states, pooling_positions)[:, 0]
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def _mask_of(
        self, positions: torch.Tensor, attention_mask: torch.Tensor | None, hidden_states: torch.Tensor
    ) -> torch.Tensor | None:
        """What the token at each position looks at: those up to itself that `attention_mask` keeps."""
        steps = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        seen = steps <= positions[:, None]
        if attention_mask is not None:
            seen = seen & attention_mask.bool()
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=hidden_states[:, :1],
            encoder_hidden_states=hidden_states,
            attention_mask=seen,
        )

    def end_positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """``(B,)``: where each row's first end token stands.

        Raises:
            ValueError: an id is beyond the vocabulary, a row has no end token, or begins with it and goes on: it is
                padded on the left.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be (batch, tokens), but its shape is {tuple(input_ids.shape)}.")
        is_end = input_ids == self.config.eos_token_id
        positions = is_end.int().argmax(dim=1)
        if torch.compiler.is_compiling():
            return positions
        if (highest := int(input_ids.max())) >= self.config.vocab_size:
            raise ValueError(
                f"input_ids holds id {highest}, but the model's vocabulary has {self.config.vocab_size}: after adding "
                "tokens call model.resize_token_embeddings(len(tokenizer))."
            )
        if not is_end.any(dim=1).all():
            row = int(is_end.any(dim=1).int().argmin())
            raise ValueError(
                f"row {row} of input_ids has no end token (id {self.config.eos_token_id}), where the text is pooled: "
                "tokenise with this model's own tokenizer."
            )
        if (is_end[:, 0] & ~is_end.all(dim=1)).any():
            raise ValueError(PADDED_ON_THE_LEFT)
        return positions


def check_mask_shape(attention_mask: torch.Tensor | None, shape: torch.Size) -> None:
    """Raises ValueError for a mask that is not one number a token."""
    if attention_mask is not None and attention_mask.shape != shape:
        raise ValueError(
            f"attention_mask must have the shape of the texts, {tuple(shape)}, not {tuple(attention_mask.shape)}."
        )


def drop_right_padding(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Drops a padding mask that only hides the right end, which causality hides anyway; refuses padding on the left."""
    if attention_mask is None or torch.compiler.is_compiling():
        return attention_mask
    refuse_left_padding(attention_mask)
    return None if (attention_mask[:, 1:] <= attention_mask[:, :-1]).all() else attention_mask


def refuse_left_padding(attention_mask: torch.Tensor | None) -> None:
    """Raises ValueError where a row begins with padding, which a tower that pools its first token would take for it."""
    if attention_mask is not None and not torch.compiler.is_compiling() and not attention_mask[:, 0].all():
        raise ValueError(PADDED_ON_THE_LEFT)


def last_kept_positions(attention_mask: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor:
    """``(B,)``: the last position of each row that the mask keeps; without a mask, the last of all."""
    if attention_mask is None:
        return torch.full((hidden_states.shape[0],), hidden_states.shape[1] - 1, device=hidden_states.device)
    steps = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask.bool() * steps).argmax(dim=1)


class MMClipVisionEmbeddings(nn.Module):
    """Class token and patches, plus position table."""

    def __init__(self, config: MMClipVisionConfig):
        super().__init__()
        self.config = config
        patch_size = to_pair(config.patch_size)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, patch_size, patch_size, bias=False)
        rows, columns = config.grid_size
        self.position_embedding = nn.Embedding(1 + rows * columns, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        config = self.config
        grid = patch_grid(
            pixel_values,
            config.num_channels,
            to_pair(config.image_size),
            to_pair(config.patch_size),
            interpolate_pos_encoding,
        )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(patches.shape[0], 1, -1), patches], dim=1)
        positions = torch.arange(self.position_embedding.num_embeddings, device=tokens.device)
        return tokens + resize_position_table(
            self.position_embedding(positions),
            config.grid_size,
            grid,
            config.pos_embed_interpolation,
            num_prefix_tokens=1,
        )


class MMClipVisionModel(MMClipPreTrainedModel):
    """The picture tower: a ViT with a norm before its blocks; only the class token is normed after them."""

    config: MMClipVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    pools_alone = True
    _input_embed_layer = "patch_embedding"
    _keys_to_ignore_on_load_unexpected = [r"text_model\.", r"(visual|text)_projection\.", r"logit_scale"]

    def __init__(self, config: MMClipVisionConfig):
        super().__init__(config)
        self.embeddings = MMClipVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelt as on disk
        self.encoder = TransformerEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes pictures.

        Args:
            pixel_values: ``(B, C, H, W)``, normalised.
            interpolate_pos_encoding: accept any H and W that patches tile; the position table follows.
            pooled_only: compute no token that `pooler_output` does not need and return no `last_hidden_state`; without
                effect where hidden states or attention maps are asked for.

        Returns:
            `last_hidden_state` ``(B, 1 + N, D)`` (not normed), `pooler_output` ``(B, D)`` (the normed class token).

        Raises:
            ValueError: pictures of another size or number of channels than the config says.
        """
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding))
        alone = self._pools_alone(pooled_only, kwargs)
        hidden_states = self.encoder(hidden_states, position=0 if alone else None, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=None if alone else hidden_states, pooler_output=self.post_layernorm(hidden_states[:, 0])
        )


class MMClipModel(MMClipPreTrainedModel):
    """Both towers, their projections into one space, and the temperature of the loss."""

    config: MMClipConfig

    def __init__(self, config: MMClipConfig):
        super().__init__(config)
        self.vision_model = build_tower(config.vision_config, config.vision_pooling)
        self.text_model = build_tower(config.text_config, config.text_pooling)
        self.visual_projection = (
            nn.Identity()
            if projects_itself(config.vision_config)
            else nn.Linear(pooled_width(config.vision_config), config.projection_dim, bias=False)
        )
        self.text_projection = nn.Linear(pooled_width(config.text_config), config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.post_init()

    @classmethod
    def from_vision_text_pretrained(cls, vision_model: str, text_model: str, **fields) -> "MMClipModel":
        """Joins two pretrained encoders; the projections are new and need training.

        Args:
            vision_model: folder or Hub id of a picture encoder, or of a model that has one as ``vision_model``.
            text_model: folder or Hub id of a text encoder, or of a model that has one as ``text_model``.
            **fields: of `MMClipConfig`, such as `projection_dim`, `vision_pooling` and `text_pooling`.
        """
        vision, text = AutoModel.from_pretrained(vision_model), AutoModel.from_pretrained(text_model)
        vision, text = getattr(vision, "vision_model", vision), getattr(text, "text_model", text)
        model = cls(MMClipConfig(vision_config=vision.config, text_config=text.config, **fields))
        for tower, weights in ((model.vision_model, vision.state_dict()), (model.text_model, text.state_dict())):
            tower.load_state_dict({name: weights[name] for name in tower.state_dict()})
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pooling_positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes texts into the joint space.

        Rows padded beyond the longest text are cut first: exact, since nothing after an end token is ever looked at.

        Args:
            input_ids: ``(B, T)``; the other arguments are those of `MMClipTextModel.forward`.

        Returns:
            The text tower's output with `pooler_output` ``(B, projection_dim)``, not yet of unit length, and with
            tokens only where hidden states or attention maps are asked for.
        """
        options = kwargs
        if isinstance(self.text_model, MMClipTextModel):
            if input_ids is not None and pooling_positions is None:
                pooling_positions = self.text_model.end_positions(input_ids)
                check_mask_shape(attention_mask, input_ids.shape)
                if not torch.compiler.is_compiling():
                    length = int(pooling_positions.max()) + 1
                    input_ids = input_ids[:, :length]
                    attention_mask = attention_mask[:, :length] if attention_mask is not None else None
                    position_ids = position_ids[:, :length] if position_ids is not None else None
            alone = self.config.text_pooling == "pooler"
            options = {**kwargs, "pooling_positions": pooling_positions, "pooled_only": alone}
        elif pooling_positions is not None:
            raise ValueError(
                "pooling_positions are of MMClipTextModel: set MMClipConfig(text_pooling=...) for others."
            )
        elif self.config.text_pooling in ("pooler", "cls"):
            refuse_left_padding(attention_mask)
        given = {"position_ids": position_ids, "inputs_embeds": inputs_embeds}
        options |= {name: value for name, value in given.items() if value is not None}
        outputs = self.text_model(input_ids=input_ids, attention_mask=attention_mask, **options)
        pooled = pool(outputs, self.config.text_pooling, "text", attention_mask)
        return with_pooled(outputs, self.text_projection(pooled))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes pictures into the joint space.

        Args:
            pixel_values: ``(B, C, H, W)``, normalised.
            interpolate_pos_encoding: accept any H and W that patches tile, where the tower can.

        Returns:
            The picture tower's output with `pooler_output` ``(B, projection_dim)``, not yet of unit length, and with
            tokens only where hidden states or attention maps are asked for.
        """
        alone = self.config.vision_pooling == "pooler" and getattr(self.vision_model, "pools_alone", False)
        options = {"pooled_only": True} if alone else {}
        if interpolate_pos_encoding:
            options["interpolate_pos_encoding"] = True
        outputs = self.vision_model(pixel_values=pixel_values.to(self.vision_model.dtype), **options, **kwargs)
        pooled = pool(outputs, self.config.vision_pooling, "vision")
        return with_pooled(outputs, self.visual_projection(pooled))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pooling_positions: torch.Tensor | None = None,
        image_ids: torch.Tensor | None = None,
        text_ids: torch.Tensor | None = None,
        return_loss: bool = True,
        gather_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MMClipOutput:
        """Compares pictures with texts.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds, pooling_positions: of N texts, see
                `MMClipTextModel.forward`.
            pixel_values: ``(M, C, H, W)``, M pictures.
            image_ids, text_ids: ``(M,)``, ``(N,)`` integers; equal ids are never each other's negatives.
            return_loss: compute the contrastive loss of pairs (picture i, text i). In eval mode M and N may differ;
                there is no loss then.
            gather_loss: take the loss over all ranks. By default in training only, so that one process may call the
                model alone for inference; an evaluation loop in which every rank takes part passes True.
            interpolate_pos_encoding: accept pictures of any size that patches tile.

        Raises:
            ValueError: pictures or texts are missing; in training their numbers differ.
        """
        if pixel_values is None or (input_ids is None and inputs_embeds is None):
            raise ValueError(
                "MMClipModel compares pictures with texts and needs pixel_values and input_ids: for one of the two "
                "call get_image_features or get_text_features."
            )
        num_images = pixel_values.shape[0]
        num_texts = (input_ids if inputs_embeds is None else inputs_embeds).shape[0]
        with_loss = return_loss and (self.training or num_images == num_texts)
        if with_loss:
            check_pairs(num_images, num_texts, image_ids, text_ids)
        # Texts first: whatever is wrong with a call is found before BatchNorm has counted its pictures.
        text = self.get_text_features(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            pooling_positions=pooling_positions,
            **kwargs,
        )
        vision = self.get_image_features(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        image_embeds = nn.functional.normalize(at_least_float32(vision.pooler_output), dim=-1)
        text_embeds = nn.functional.normalize(at_least_float32(text.pooler_output), dim=-1)
        scale = self.logit_scale.exp()

        loss = None
        if with_loss:
            gather = self.training if gather_loss is None else gather_loss
            loss = image_text_contrastive_loss(image_embeds, text_embeds, scale, image_ids, text_ids, gather=gather)
        with torch.autocast(image_embeds.device.type, enabled=False):
            logits_per_image = scale * image_embeds @ text_embeds.T
        return MMClipOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_image.T.contiguous(),
            text_embeds=text_embeds.to(scale.dtype),
            image_embeds=image_embeds.to(scale.dtype),
            text_model_output=text,
            vision_model_output=vision,
        )


def build_tower(config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
    """The encoder of a config, without the pooling layer that `pooling` would leave untrained."""
    if pooling == "pooler":
        return AutoModel.from_config(config)
    try:
        return AutoModel.from_config(config, add_pooling_layer=False)
    except TypeError:  # it has no such argument
        return AutoModel.from_config(config)


def pooled_width(config: PreTrainedConfig) -> int:
    """Width of an encoder's tokens: convolutional ones have one for each stage."""
    width = getattr(config, "hidden_size", None) or getattr(config, "hidden_sizes", [None])[-1]
    if width is None:
        raise ValueError(
            f"{config.model_type} has neither hidden_size nor hidden_sizes: it is no encoder for a tower."
        )
    return width


def pool(outputs: ModelOutput, pooling: str, tower: str, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """``(B, D)``: what stands for each picture or text.

    Args:
        outputs: of any encoder: `last_hidden_state` ``(B, T, D)`` or ``(B, D, H, W)``, and perhaps `pooler_output`.
        pooling: see `MMClipConfig`.
        tower: ``"vision"`` or ``"text"``, for the message.
        attention_mask: ``(B, T)``, 1 for tokens.

    Raises:
        ValueError: the encoder has no pooled output.
    """
    if pooling == "pooler":
        if outputs.get("pooler_output") is None:
            raise ValueError(
                f"the {tower} tower has no pooled output: give MMClipConfig another {tower}_pooling, such as 'mean'."
            )
        return outputs.pooler_output.flatten(1)
    tokens = outputs.last_hidden_state
    tokens = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens
    if pooling == "cls":
        return tokens[:, 0]
    if pooling == "last":
        return token_at(tokens, last_kept_positions(attention_mask, tokens))[:, 0]
    if attention_mask is None:
        return tokens.mean(dim=1)
    kept = attention_mask[..., None].to(tokens.dtype)
    return (tokens * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)


def with_pooled(outputs: ModelOutput, pooled: torch.Tensor) -> BaseModelOutputWithPooling:
    """The output of any encoder with another `pooler_output`."""
    return BaseModelOutputWithPooling(
        last_hidden_state=outputs.get("last_hidden_state"),
        pooler_output=pooled,
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
    )


class ToVector(ConversionOps):
    """Reads a scalar of shape () or (1,) as (1,). What is saved keeps (1,), so that a training run can resume from it."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        ((_, tensors),) = input_dict.items()
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        return {target_patterns[0]: tensor.reshape(1)}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


register_checkpoint_conversion_mapping(
    "MMClipModel", [WeightConverter("logit_scale", "logit_scale", operations=[ToVector()])], overwrite=True
)


__all__ = ["MMClipModel", "MMClipPreTrainedModel", "MMClipTextModel", "MMClipVisionModel"]
