"""EVA's Vision Transformer (Fang et al. 2022, arXiv 2211.07636), the picture tower of BLIP-2."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.blocks import TransformerEncoder
from ...nn.patches import patch_grid, to_pair
from ...nn.positions import resize_position_table
from ...nn.pretrained import MMPreTrainedModel, torch_default_
from .configuration_eva_vit import EvaViTConfig


class EvaViTEmbeddings(nn.Module):
    """Class token and patches, plus positions."""

    def __init__(self, config: EvaViTConfig):
        super().__init__()
        self.config = config
        patch_size = to_pair(config.patch_size)
        rows, columns = config.grid_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_embeddings = nn.Conv2d(config.num_channels, config.hidden_size, patch_size, patch_size)
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + rows * columns, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        config = self.config
        grid = patch_grid(
            pixel_values,
            config.num_channels,
            to_pair(config.image_size),
            to_pair(config.patch_size),
            interpolate_pos_encoding,
        )
        patches = self.patch_embeddings(pixel_values.to(self.position_embeddings.dtype)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        return tokens + resize_position_table(
            self.position_embeddings[0], config.grid_size, grid, "bicubic", num_prefix_tokens=1
        )


class EvaViTModel(MMPreTrainedModel):
    """Pre-norm blocks whose keys have no bias, and no norm after the last: who reads the tokens norms them."""

    config: EvaViTConfig
    base_model_prefix = "eva_vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    pools_alone = True
    _no_split_modules = ["EvaViTEmbeddings", "TransformerBlock"]
    _input_embed_layer = "patch_embeddings"

    def __init__(self, config: EvaViTConfig):
        super().__init__(config)
        self.embeddings = EvaViTEmbeddings(config)
        self.encoder = TransformerEncoder(config, k_bias=False, drop_path_rate=config.drop_path_rate)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """BEiT's initialisation, which EVA has too: the deeper a block, the less it adds at first."""
        std = self.config.initializer_range
        if isinstance(module, nn.Conv2d):
            torch_default_(module)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

        if isinstance(module, EvaViTEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
            init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, TransformerEncoder):
            for number, layer in enumerate(module.layers, start=1):
                for last in (layer.self_attn.out_proj, layer.mlp.fc2):
                    init.trunc_normal_(last.weight, std=std / (2 * number) ** 0.5)

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
            interpolate_pos_encoding: accept any H and W that patches tile; the position table follows (bicubic).
            pooled_only: compute no token that `pooler_output` does not need and return no `last_hidden_state`; without
                effect where hidden states or attention maps are asked for.
            kwargs: ``output_hidden_states`` and ``output_attentions``, among others.

        Returns:
            `last_hidden_state` ``(B, 1 + N, D)`` (not normed, the class token first) and `pooler_output` ``(B, D)``
            (the class token). `hidden_states` begin with the embeddings.

        Raises:
            ValueError: pictures of another size or number of channels than the config says.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        alone = self._pools_alone(pooled_only, kwargs)
        hidden_states = self.encoder(hidden_states, position=0 if alone else None, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=None if alone else hidden_states, pooler_output=hidden_states[:, 0]
        )


__all__ = ["EvaViTModel"]
