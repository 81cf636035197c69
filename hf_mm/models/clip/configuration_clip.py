"""Configurations of CLIP and its towers (Radford et al. 2021, arXiv 2103.00020)."""

import math

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, CLIPConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ...nn.patches import to_pair
from ...nn.positions import INTERPOLATIONS
from ..vit.configuration_vit import validate_patches, validate_transformer
from .presets_clip import preset

VISION_POOLINGS = ("pooler", "cls", "mean")
TEXT_POOLINGS = ("pooler", "cls", "mean", "last")
TRANSFORMERS_TYPES = {"clip": "mm_clip", "clip_text_model": "mm_clip_text", "clip_vision_model": "mm_clip_vision"}


class _ReadsTransformersClip:
    """Reads a ``config.json`` that transformers' own CLIP wrote as if one of ours had written it."""

    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") in TRANSFORMERS_TYPES:
            config_dict = from_transformers_config(config_dict)
        return config_dict, kwargs


def from_transformers_config(config_dict: dict) -> dict:
    """Translates the config of transformers' CLIP, or of one of its towers, into the fields of ours.

    Old files carry ``eos_token_id: 2``, which means "the largest id of the row": the end token is the last of the
    vocabulary, the start token the one before it, and texts are padded with the end token. They also repeat the towers
    under other names, which `CLIPConfig` settles.
    """
    config_dict = dict(config_dict)
    if config_dict["model_type"] == "clip":
        config_dict |= CLIPConfig.from_dict(dict(config_dict)).to_dict()
        for name in ("text_config", "vision_config"):
            config_dict.pop(f"{name}_dict", None)
            config_dict[name] = from_transformers_config(config_dict[name])
    config_dict["model_type"] = TRANSFORMERS_TYPES[config_dict["model_type"]]
    if config_dict["model_type"] == "mm_clip_text" and config_dict.get("eos_token_id") == 2:
        end = config_dict.get("vocab_size", MMClipTextConfig.vocab_size) - 1
        config_dict |= {"eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    if config_dict["model_type"] == "mm_clip_vision":
        config_dict["pos_embed_interpolation"] = "bicubic"
    return config_dict


@strict
class MMClipTextConfig(_ReadsTransformersClip, PreTrainedConfig):
    """CLIP's text tower. The defaults are those of ViT-B/32.

    Args:
        vocab_size: number of token ids.
        hidden_size: width of the tokens.
        intermediate_size: width of the MLPs.
        num_hidden_layers: number of blocks.
        num_attention_heads: must divide `hidden_size`.
        max_position_embeddings: the context, the longest text in tokens.
        hidden_act: ``quick_gelu`` for the original weights, ``gelu`` for most later ones.
        layer_norm_eps: eps of every LayerNorm.
        attention_dropout: on attention weights.
        projection_dim: width of the joint space; used by the dual model.
        initializer_factor: scales every initial standard deviation.
        pad_token_id: fills short rows on the right; never seen by the pooled token.
        bos_token_id: first token of every text.
        eos_token_id: the text is pooled where this id first occurs.
    """

    model_type = "mm_clip_text"
    base_config_key = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: int | float = 0.0
    projection_dim: int | None = 512
    initializer_factor: int | float = 1.0
    pad_token_id: int | None = 49407
    bos_token_id: int | None = 49406
    eos_token_id: int = 49407

    def validate_architecture(self):
        """Refuses combinations of fields that no model can be built from."""
        validate_transformer(self)
        if not 0 <= self.eos_token_id < self.vocab_size:
            raise ValueError(
                f"eos_token_id ({self.eos_token_id}) must be an id of the vocabulary, which has {self.vocab_size}: "
                "texts are pooled at that token."
            )


@strict
class MMClipVisionConfig(_ReadsTransformersClip, PreTrainedConfig):
    """CLIP's Vision Transformer tower. The defaults are those of ViT-B/32.

    Args:
        hidden_size: width of the tokens.
        intermediate_size: width of the MLPs.
        num_hidden_layers: number of blocks.
        num_attention_heads: must divide `hidden_size`.
        num_channels: of the pictures.
        image_size: side, or ``(height, width)``, that the position table is made for.
        patch_size: side, or ``(height, width)``, of a patch; must tile `image_size`.
        hidden_act: ``quick_gelu`` for the original weights, ``gelu`` for most later ones.
        layer_norm_eps: eps of every LayerNorm.
        attention_dropout: on attention weights.
        projection_dim: width of the joint space; used by the dual model.
        pos_embed_interpolation: how the position table follows another grid, one of ``"bicubic_antialias"``
            (open_clip), ``"bicubic"`` (transformers), ``"bilinear_corners"``.
        initializer_factor: scales every initial standard deviation.
    """

    model_type = "mm_clip_vision"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: int | float = 0.0
    projection_dim: int | None = 512
    pos_embed_interpolation: str = "bicubic_antialias"
    initializer_factor: int | float = 1.0

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`."""
        (height, width), patch = to_pair(self.image_size), to_pair(self.patch_size)
        return height // patch[0], width // patch[1]

    def validate_architecture(self):
        """Refuses combinations of fields that no model can be built from."""
        validate_transformer(self)
        validate_patches(self)
        validate_interpolation(self)


@strict
class MMClipResNetConfig(PreTrainedConfig):
    """CLIP's ResNet tower. The defaults are those of RN50.

    Args:
        depths: number of bottleneck blocks of each of the four stages.
        width: channels w after the stem; the stages end with 4 w, 8 w, 16 w and 32 w.
        num_attention_heads: of the attention pool; must divide 32 w.
        num_channels: of the pictures.
        image_size: side, or ``(height, width)``, that the pool's position table is made for, multiples of 32.
        batch_norm_eps: eps of every BatchNorm.
        projection_dim: width of the joint space, into which the attention pool itself projects; within `MMClipConfig`
            by default that of the whole.
        pos_embed_interpolation: how the pool's position table follows another grid, see `MMClipVisionConfig`.
        initializer_factor: scales the initial standard deviations of the attention pool.
    """

    model_type = "mm_clip_resnet"
    base_config_key = "vision_config"

    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    num_attention_heads: int = 32
    num_channels: int = 3
    image_size: int | list[int] | tuple[int, int] = 224
    batch_norm_eps: float = 1e-5
    projection_dim: int = 1024
    pos_embed_interpolation: str = "bicubic_antialias"
    initializer_factor: int | float = 1.0

    def __post_init__(self, **kwargs):
        if implied := {"hidden_size", "patch_size", "num_hidden_layers"} & kwargs.keys():
            raise ValueError(
                f"{', '.join(sorted(implied))} follow from width and depths in a ResNet tower: give these."
            )
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return 32 * self.width

    @property
    def num_hidden_layers(self) -> int:
        """Stages: `hidden_states` are what the stem gives and what they give."""
        return len(self.depths)

    @property
    def patch_size(self) -> int:
        """Side of the square of pixels that a position of the last stage stands for."""
        return 32

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the last stage at `image_size`."""
        height, width = to_pair(self.image_size)
        return height // self.patch_size, width // self.patch_size

    def validate_architecture(self):
        """Refuses combinations of fields that no model can be built from."""
        validate_patches(self)
        validate_interpolation(self)
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise ValueError(f"depths must be four numbers of blocks of at least 1, not {list(self.depths)}.")
        if self.width % 2 or self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"width ({self.width}) must be even, and 32 times it a multiple of num_attention_heads "
                f"({self.num_attention_heads})."
            )


@strict
class MMClipConfig(_ReadsTransformersClip, PreTrainedConfig):
    """CLIP: a picture tower and a text tower that meet in one space.

    Args:
        vision_config: config, or dict of one, of the picture tower; a dict without ``model_type`` is an
            `MMClipVisionConfig`. Any vision encoder that `AutoModel` opens is welcome: ``mm_clip_resnet``, ``mm_vit``,
            ``dinov2``, ``convnext``, …
        text_config: config, or dict of one, of the text tower: ours, or any text encoder that `AutoModel` opens.
        vision_pooling: what stands for a picture: the tower's own ``"pooler"`` output, its first token (``"cls"``) or
            the mean of its tokens, or of its feature map (``"mean"``).
        text_pooling: what stands for a text: ``"pooler"``, ``"cls"``, ``"mean"`` of the tokens that are no padding, or
            the ``"last"`` of them, for decoders.
        projection_dim: width of the joint space.
        logit_scale_init_value: logarithm of the factor that multiplies cosine similarities; ln(1 / 0.07) at first.
        initializer_factor: scales the initial standard deviation of both projections.
    """

    model_type = "mm_clip"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="mm_clip_vision"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="mm_clip_text"),
    }
    # Logits are of one batch's pictures and texts: they do not add up to a prediction of a data set.
    keys_to_ignore_at_inference = ["logits_per_image", "logits_per_text", "text_model_output", "vision_model_output"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_pooling: str = "pooler"
    text_pooling: str = "pooler"
    projection_dim: int = 512
    logit_scale_init_value: int | float = math.log(1 / 0.07)
    initializer_factor: int | float = 1.0

    def __post_init__(self, **kwargs):
        if isinstance(self.vision_config, dict) and self.vision_config.get("model_type") == "mm_clip_resnet":
            self.vision_config = {"projection_dim": self.projection_dim, **self.vision_config}
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, name: str, **fields) -> "MMClipConfig":
        """The config of a published model.

        Args:
            name: such as ``"RN50"`` or ``"ViT-B-32"``, see `PRESETS`. OpenAI's nine have QuickGELU, as their weights
                need; open_clip's own sizes GELU.
            **fields: of `MMClipConfig`, in place of the preset's.

        Raises:
            ValueError: there is no such preset.
        """
        return cls(**{**preset(name), **fields})

    def validate_architecture(self):
        """Refuses combinations of fields that no model can be built from."""
        for field, choices in (("vision_pooling", VISION_POOLINGS), ("text_pooling", TEXT_POOLINGS)):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} must be one of {', '.join(choices)}, not {getattr(self, field)!r}.")
        if projects_itself(self.vision_config) and self.vision_pooling != "pooler":
            raise ValueError("the ResNet tower's attention pool is its projection: vision_pooling must be 'pooler'.")
        if projects_itself(self.vision_config) and self.vision_config.projection_dim != self.projection_dim:
            raise ValueError(
                f"the ResNet tower projects to {self.vision_config.projection_dim} dimensions itself, but projection_dim "
                f"is {self.projection_dim}: give both the same."
            )


def projects_itself(vision_config: PreTrainedConfig) -> bool:
    """Whether the picture tower's pooled output lies in the joint space already."""
    return isinstance(vision_config, MMClipResNetConfig)


def validate_interpolation(config) -> None:
    """Raises ValueError for an unknown `pos_embed_interpolation`."""
    if config.pos_embed_interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"pos_embed_interpolation must be one of {', '.join(INTERPOLATIONS)}, "
            f"not {config.pos_embed_interpolation!r}."
        )


__all__ = ["MMClipConfig", "MMClipResNetConfig", "MMClipTextConfig", "MMClipVisionConfig"]
