"""CLIP's ResNet tower (Radford et al. 2021, section 2.4): ResNet-D, anti-aliased, with an attention pool at its end.

Parameters carry the names of OpenAI's release.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...nn.attention import attend
from ...nn.blocks import token_at
from ...nn.patches import patch_grid, to_pair
from ...nn.positions import resize_position_table
from ...nn.pretrained import MMPreTrainedModel, torch_default_
from .configuration_clip import MMClipResNetConfig


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm whose running statistics see every picture once, and stay as they are where its weight is frozen."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        use_batch = self.training and self.weight.requires_grad
        # Gradient checkpointing computes a block again in backward, when its statistics have been counted.
        again = use_batch and not torch.compiler.is_compiling() and _inside_backward()
        if use_batch and not again:
            return super().forward(features)
        return nn.functional.batch_norm(
            features,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            use_batch,
            momentum=0.0,
            eps=self.eps,
        )


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class Bottleneck(GradientCheckpointingLayer):
    """1x1, 3x3 and 1x1 convolution beside a shortcut; where it halves the picture, an average pool does, on both ways."""

    def __init__(self, in_channels: int, planes: int, stride: int, config: MMClipResNetConfig):
        super().__init__()
        out_channels = 4 * planes
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = BatchNorm(planes, eps=config.batch_norm_eps)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(planes, eps=config.batch_norm_eps)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.bn3 = BatchNorm(out_channels, eps=config.batch_norm_eps)
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), BatchNorm(out_channels, eps=config.batch_norm_eps)
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` to ``(B, 4 * planes, H / stride, W / stride)``."""
        main = torch.relu_(self.bn1(self.conv1(features)))
        main = torch.relu_(self.bn2(self.conv2(main)))
        main = self.bn3(self.conv3(self.avgpool(main)))
        shortcut = features if self.downsample is None else self.downsample(self.avgpool(features))
        return torch.relu_(main.add_(shortcut))


class Stage(nn.Sequential):
    """Blocks of one resolution; the first may halve it."""

    def __init__(self, in_channels: int, planes: int, depth: int, stride: int, config: MMClipResNetConfig):
        later = (Bottleneck(4 * planes, planes, 1, config) for _ in range(depth - 1))
        super().__init__(Bottleneck(in_channels, planes, stride, config), *later)


class AttnPool(nn.Module):
    """The mean of all positions asks all positions, itself included: one layer of attention with one query."""

    def __init__(self, config: MMClipResNetConfig):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = 0.0
        rows, columns = config.grid_size
        self.positional_embedding = nn.Parameter(torch.empty(1 + rows * columns, config.hidden_size))
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.projection_dim)

    def forward(self, features: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``(B, C, rows, columns)`` to ``(B, projection_dim)`` and, with the eager kernel, ``(B, H, 1, 1 + N)``."""
        config = self.config
        positions = resize_position_table(
            self.positional_embedding,
            config.grid_size,
            features.shape[-2:],
            config.pos_embed_interpolation,
            num_prefix_tokens=1,
        )
        tokens = features.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1) + positions
        pooled, weights = attend(
            self, self.q_proj(token_at(tokens, 0)), self.k_proj(tokens), self.v_proj(tokens), **kwargs
        )
        return self.c_proj(pooled[:, 0]), weights


class MMClipResNetModel(MMPreTrainedModel):
    """The ResNet picture tower. Its pooled output lies in the joint space: the attention pool projects.

    In training a picture depends on its batch, through BatchNorm, and several processes each see statistics of their own.
    ``vision_model.requires_grad_(False)``, or an adapter around it, freezes the running statistics too.
    """

    config: MMClipResNetConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    accepts_loss_kwargs = False
    _no_split_modules = ["Bottleneck", "AttnPool"]
    _input_embed_layer = "conv1"
    _keys_to_ignore_on_load_unexpected = [r"text_model\.", r"text_projection\.", r"logit_scale"]
    _can_record_outputs = {"hidden_states": Stage, "attentions": AttnPool}

    def __init__(self, config: MMClipResNetConfig):
        super().__init__(config)
        width = config.width
        self.conv1 = nn.Conv2d(config.num_channels, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = BatchNorm(width // 2, eps=config.batch_norm_eps)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(width // 2, eps=config.batch_norm_eps)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = BatchNorm(width, eps=config.batch_norm_eps)
        self.avgpool = nn.AvgPool2d(2)
        self.layer1 = Stage(width, width, config.depths[0], 1, config)
        self.layer2 = Stage(4 * width, 2 * width, config.depths[1], 2, config)
        self.layer3 = Stage(8 * width, 4 * width, config.depths[2], 2, config)
        self.layer4 = Stage(16 * width, 8 * width, config.depths[3], 2, config)
        self.attnpool = AttnPool(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """The initialisation of OpenAI's release: torch's defaults, but a block starts as its shortcut."""
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            torch_default_(module)
        else:
            super()._init_weights(module)

        if isinstance(module, Bottleneck):
            init.zeros_(module.bn3.weight)
        elif isinstance(module, AttnPool):
            std = self.config.initializer_factor * self.config.hidden_size**-0.5
            init.normal_(module.positional_embedding, std=std)
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.c_proj):
                init.normal_(projection.weight, std=std)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes pictures.

        Args:
            pixel_values: ``(B, C, H, W)``, normalised.
            interpolate_pos_encoding: accept any H and W that are multiples of 32; the position table of the attention
                pool follows.

        Returns:
            `last_hidden_state` ``(B, 32 w, H / 32, W / 32)``, the feature map of the last stage, and `pooler_output`
            ``(B, projection_dim)``. `hidden_states` are the stem's output and those of the four stages; `attentions`
            has the one map of the attention pool, ``(B, heads, 1, 1 + N)``, its mean first.

        Raises:
            ValueError: pictures of another size or number of channels than the config says.
        """
        config = self.config
        patch_grid(
            pixel_values,
            config.num_channels,
            to_pair(config.image_size),
            to_pair(config.patch_size),
            interpolate_pos_encoding,
        )
        features = torch.relu_(self.bn1(self.conv1(pixel_values.to(self.conv1.weight.dtype))))
        features = torch.relu_(self.bn2(self.conv2(features)))
        features = self.avgpool(torch.relu_(self.bn3(self.conv3(features))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            features = stage(features)
        pooled, _ = self.attnpool(features, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=pooled)


__all__ = ["MMClipResNetModel"]
