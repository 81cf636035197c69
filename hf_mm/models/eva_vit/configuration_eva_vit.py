"""Configuration of EVA's Vision Transformer (Fang et al. 2022, arXiv 2211.07636)."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ...nn.patches import to_pair
from ..vit.configuration_vit import validate_patches, validate_transformer


@strict
class EvaViTConfig(PreTrainedConfig):
    """What an EVA ViT is built from. The defaults are EVA-CLIP g/14 without its last block, as BLIP-2 uses it.

    Args:
        hidden_size: width D of the tokens.
        num_hidden_layers: number of blocks; the published g/14 has a 40th, which BLIP-2 leaves out.
        num_attention_heads: must divide `hidden_size`.
        intermediate_size: width of the MLPs.
        hidden_act: activation of the MLPs.
        layer_norm_eps: eps of every LayerNorm.
        image_size: side, or ``(height, width)``, that the position table is made for.
        patch_size: side, or ``(height, width)``, of a patch; must tile `image_size`.
        num_channels: of the pictures.
        attention_dropout: on attention weights.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        initializer_range: standard deviation of class token, position table and matrices at initialisation; those that
            end a residual branch have it divided by the square root of twice their block's number.
    """

    model_type = "eva_vit"
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]
    base_config_key = "vision_config"

    hidden_size: int = 1408
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    intermediate_size: int = 6144
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 14
    num_channels: int = 3
    attention_dropout: int | float = 0.0
    drop_path_rate: int | float = 0.0
    initializer_range: float = 0.02

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        (height, width), patch = to_pair(self.image_size), to_pair(self.patch_size)
        return height // patch[0], width // patch[1]

    def validate_architecture(self):
        """Refuses combinations of fields that no model can be built from."""
        validate_transformer(self)
        validate_patches(self)
        for name in ("attention_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}.")


__all__ = ["EvaViTConfig"]
