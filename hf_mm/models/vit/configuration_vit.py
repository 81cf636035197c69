"""Configuration of the Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from ...nn.patches import to_pair
from ...nn.positions import INTERPOLATIONS


@strict
class MMViTConfig(PreTrainedConfig):
    """What a ViT is built from. The defaults are ViT-B/16 in the numerics of the authors' weights.

    Weights trained elsewhere need their own pair of `hidden_act` and `layer_norm_eps`: ``gelu_pytorch_tanh`` and 1e-6
    for the authors' files, ``gelu`` and 1e-12 for the ViT checkpoints of transformers.

    Args:
        hidden_size: width D of the tokens.
        num_hidden_layers: number of blocks.
        num_attention_heads: must divide `hidden_size`.
        intermediate_size: width of the MLPs.
        hidden_act: activation of the MLPs.
        layer_norm_eps: eps of every LayerNorm.
        image_size: side, or ``(height, width)``, that the position table is made for.
        patch_size: side, or ``(height, width)``, of a patch; must tile `image_size`.
        num_channels: of the pictures.
        qkv_bias: bias of the query, key and value projections.
        hidden_dropout: after positions are added, after attention, inside the MLPs.
        attention_dropout: on attention weights.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0 at the first.
        pooling: ``"cls"`` (a class token, its last state) or ``"mean"`` (no class token, mean of the patches).
        pre_logits: adds the tanh layer between pooling and head that the ImageNet-21k originals have.
        stem: ``"patch"`` (one convolution) or ``"conv"`` (3x3 stride-2 convolutions, Xiao et al. 2021).
        stem_channels: output channels of the stride-2 convolutions of ``stem="conv"``, ``log2(patch_size)`` of them;
            by default they double up to `hidden_size`.
        stem_norm: ``"group"`` or ``"layer"``; both leave a picture independent of its batch.
        stem_num_groups: groups of ``stem_norm="group"``.
        pos_embed_interpolation: how the position table follows another grid, one of ``"bilinear_corners"`` (authors),
            ``"bicubic"`` (transformers), ``"bicubic_antialias"`` (timm).
        initializer_range: standard deviation of the position table at initialisation.
    """

    model_type = "mm_vit"
    keys_to_ignore_at_inference = ["hidden_states", "attentions"]
    base_config_key = "vision_config"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    qkv_bias: bool = True
    hidden_dropout: int | float = 0.0
    attention_dropout: int | float = 0.0
    drop_path_rate: int | float = 0.0
    pooling: str = "cls"
    pre_logits: bool = False
    stem: str = "patch"
    stem_channels: list[int] | tuple[int, ...] | None = None
    stem_norm: str = "group"
    stem_num_groups: int = 8
    pos_embed_interpolation: str = "bilinear_corners"
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.stem == "conv" and self.stem_channels is None:
            halvings = to_pair(self.patch_size)[0].bit_length() - 1
            self.stem_channels = [self.hidden_size >> (halvings - 1 - i) for i in range(halvings)]
        super().__post_init__(**kwargs)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        (height, width), patch = to_pair(self.image_size), to_pair(self.patch_size)
        return height // patch[0], width // patch[1]

    def validate_architecture(self):
        """Refuses combinations of fields that no model can be built from."""
        validate_transformer(self)
        validate_patches(self)
        for field, choices in (
            ("pooling", ("cls", "mean")),
            ("stem", ("patch", "conv")),
            ("stem_norm", ("group", "layer")),
            ("pos_embed_interpolation", tuple(INTERPOLATIONS)),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} must be one of {', '.join(choices)}, not {getattr(self, field)!r}.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be at least 0 and below 1, not {self.drop_path_rate}.")
        if self.stem == "conv":
            self._validate_stem()

    def _validate_stem(self):
        reduction = 2 ** len(self.stem_channels)
        if to_pair(self.patch_size) != (reduction, reduction):
            raise ValueError(
                f"stem_channels has {len(self.stem_channels)} stride-2 convolutions, which make patches of "
                f"{reduction}x{reduction}, but patch_size is {self.patch_size}."
            )
        if self.stem_norm == "group" and any(channels % self.stem_num_groups for channels in self.stem_channels):
            raise ValueError(
                f"every entry of stem_channels {list(self.stem_channels)} must be a multiple of "
                f"stem_num_groups ({self.stem_num_groups})."
            )


def validate_transformer(config) -> None:
    """Raises ValueError where `hidden_size` cannot be split over the heads or the activation is unknown."""
    if config.num_attention_heads < 1:
        raise ValueError(f"num_attention_heads must be at least 1, not {config.num_attention_heads}.")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size ({config.hidden_size}) must be a multiple of num_attention_heads "
            f"({config.num_attention_heads})."
        )
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act {config.hidden_act!r} is not one of {', '.join(sorted(ACT2FN))}.")


def validate_patches(config) -> None:
    """Raises ValueError where patches of `patch_size` do not tile a picture of `image_size`."""
    image, patch = to_pair(config.image_size), to_pair(config.patch_size)
    if image[0] % patch[0] or image[1] % patch[1]:
        raise ValueError(
            f"image_size ({config.image_size}) must be a multiple of patch_size ({config.patch_size}) on both sides."
        )


__all__ = ["MMViTConfig"]
