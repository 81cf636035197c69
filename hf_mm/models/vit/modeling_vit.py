"""Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.blocks import MLP, TransformerEncoder
from ...nn.patches import ConvStem, patch_grid, to_pair
from ...nn.positions import resize_position_table
from ...nn.pretrained import MMPreTrainedModel, lecun_normal_
from .configuration_vit import MMViTConfig


class MMViTEmbeddings(nn.Module):
    """Patches, the class token where pooling needs one, and positions (equation 1)."""

    def __init__(self, config: MMViTConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = (
            nn.Conv2d(config.num_channels, config.hidden_size, to_pair(config.patch_size), to_pair(config.patch_size))
            if config.stem == "patch"
            else ConvStem(
                config.num_channels,
                config.hidden_size,
                config.stem_channels,
                config.stem_norm,
                config.stem_num_groups,
                config.layer_norm_eps,
            )
        )
        self.num_prefix_tokens = 1 if config.pooling == "cls" else 0
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if self.num_prefix_tokens else None
        rows, columns = config.grid_size
        self.position_embeddings = nn.Parameter(
            torch.empty(1, self.num_prefix_tokens + rows * columns, config.hidden_size)
        )
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        config = self.config
        grid = patch_grid(
            pixel_values,
            config.num_channels,
            to_pair(config.image_size),
            to_pair(config.patch_size),
            interpolate_pos_encoding,
        )
        tokens = self.patch_embeddings(pixel_values.to(self.position_embeddings.dtype)).flatten(2).transpose(1, 2)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        positions = resize_position_table(
            self.position_embeddings[0], config.grid_size, grid, config.pos_embed_interpolation, self.num_prefix_tokens
        )
        return self.dropout(tokens + positions)


class MMViTPreTrainedModel(MMPreTrainedModel):
    """What the trunk and the classifier share: their initialisation."""

    config: MMViTConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _no_split_modules = ["MMViTEmbeddings", "TransformerBlock"]
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The authors' initialisation: matrices Xavier-uniform, convolutions LeCun-normal, the head zero."""
        if isinstance(module, nn.Conv2d):
            lecun_normal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

        if isinstance(module, MLP):
            init.normal_(module.fc1.bias, std=1e-6)
            init.normal_(module.fc2.bias, std=1e-6)
        elif isinstance(module, MMViTEmbeddings):
            init.normal_(module.position_embeddings, std=self.config.initializer_range)
            if module.cls_token is not None:
                init.zeros_(module.cls_token)
        elif isinstance(module, MMViTModel) and module.pre_logits is not None:
            lecun_normal_(module.pre_logits.weight)
        elif isinstance(module, MMViTForImageClassification) and self.config.num_labels:
            init.zeros_(module.classifier.weight)


class MMViTModel(MMViTPreTrainedModel):
    """The trunk: pictures to normalised tokens and one pooled vector."""

    pools_alone = True

    def __init__(self, config: MMViTConfig):
        super().__init__(config)
        self.embeddings = MMViTEmbeddings(config)
        self.encoder = TransformerEncoder(
            config,
            qkv_bias=config.qkv_bias,
            dropout=config.hidden_dropout,
            drop_path_rate=config.drop_path_rate,
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pre_logits = nn.Linear(config.hidden_size, config.hidden_size) if config.pre_logits else None
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
                effect where hidden states or attention maps are asked for, or with mean pooling, which needs every
                token.
            kwargs: ``output_hidden_states`` (True, or a list of indices such as ``[-2]`` for those layers alone) and
                ``output_attentions``, among others.

        Returns:
            `last_hidden_state` ``(B, N, D)`` after the final norm (the class token first, where there is one) and
            `pooler_output` ``(B, D)``. `hidden_states` are those before the final norm, embeddings first.

        Raises:
            ValueError: pictures of another size or number of channels than the config says.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        alone = self.config.pooling == "cls" and self._pools_alone(pooled_only, kwargs)
        hidden_states = self.layernorm(self.encoder(hidden_states, position=0 if alone else None, **kwargs))
        pooled = hidden_states[:, 0] if self.config.pooling == "cls" else hidden_states.mean(dim=1)
        if self.pre_logits is not None:
            pooled = torch.tanh(self.pre_logits(pooled))
        return BaseModelOutputWithPooling(last_hidden_state=None if alone else hidden_states, pooler_output=pooled)


class MMViTForImageClassification(MMViTPreTrainedModel):
    """A ViT with a linear head; ``num_labels=0`` takes the head off and returns the pooled features as logits."""

    def __init__(self, config: MMViTConfig):
        super().__init__(config)
        self.vit = MMViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Classifies pictures.

        Args:
            pixel_values: ``(B, C, H, W)``, normalised.
            labels: ``(B,)`` class indices (or floats for regression, ``(B, K)`` for several labels).
            interpolate_pos_encoding: see `MMViTModel.forward`.

        Returns:
            `logits` ``(B, num_labels)``, `loss` where labels are given.

        Raises:
            ValueError: labels for a model without classes.
        """
        if labels is not None and not self.config.num_labels:
            raise ValueError("this model has no classes (num_labels=0), so labels have no loss: leave them out.")
        outputs = self.vit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, pooled_only=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self._loss(logits, labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of `config.problem_type`, or of what the labels look like.

        (transformers' own writes its guess into the config, which makes a compiled model compile again.)
        """
        problem = self.config.problem_type
        if problem == "regression" or (problem is None and self.config.num_labels == 1):
            return nn.functional.mse_loss(logits.reshape(labels.shape), labels.to(logits.dtype))
        if problem == "multi_label_classification" or (problem is None and labels.is_floating_point()):
            return nn.functional.binary_cross_entropy_with_logits(logits, labels)
        return nn.functional.cross_entropy(logits, labels)


__all__ = ["MMViTForImageClassification", "MMViTModel", "MMViTPreTrainedModel"]
