"""Configurations of Pic2Word and its mapping network (Saito et al. 2023, arXiv 2302.03084)."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from ...composite.dual_encoder import joint_width, word_width


@strict
class Pic2WordMapperConfig(PreTrainedConfig):
    """The mapping network. The defaults are those of the published model, over ViT-L/14.

    Args:
        image_dim: width of the picture embeddings that it reads, that of CLIP's joint space.
        hidden_dim: width of its hidden layers.
        word_dim: width of the word that it writes, that of CLIP's token embeddings.
        num_hidden_layers: number of hidden layers.
        dropout: in each hidden layer, before the ReLU.
    """

    model_type = "pic2word_mapper"
    base_config_key = "mapper_config"

    image_dim: int = 768
    hidden_dim: int = 512
    word_dim: int = 768
    num_hidden_layers: int = 2
    dropout: int | float = 0.1

    def validate_architecture(self):
        """Refuses combinations of fields that no model can be built from."""
        for name in ("image_dim", "hidden_dim", "word_dim", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}.")


@strict
class Pic2WordConfig(PreTrainedConfig):
    """Pic2Word: a frozen CLIP, and a mapping network that turns a picture into a word of its text tower.

    Args:
        clip_config: config, or dict of one, of the dual encoder: ``mm_clip``, or one of transformers' CLIP family; a dict
            without ``model_type`` is an `MMClipConfig`.
        mapper_config: config, or dict of one, of the mapping network; its two outer widths are CLIP's unless given.
        placeholder_token_id: the token that a picture's word replaces; 265 is ``*`` in CLIP's vocabulary.
        base_models: where the frozen CLIP came from, ``{"clip": {"name": folder or Hub id, "revision": commit or None}}``;
            `save_trained_part` records it, and `from_trained_part` looks for CLIP there.
    """

    model_type = "pic2word"
    sub_configs_defaults = {
        "clip_config": SubConfigSpec(config_class=AutoConfig, model_type="mm_clip"),
        "mapper_config": SubConfigSpec(config_class=Pic2WordMapperConfig),
    }
    keys_to_ignore_at_inference = ["logits_per_image", "logits_per_text", "text_model_output", "vision_model_output"]

    clip_config: dict | PreTrainedConfig | None = None
    mapper_config: dict | PreTrainedConfig | None = None
    placeholder_token_id: int = 265
    base_models: dict | None = None

    def __post_init__(self, **kwargs):
        mapper = self.mapper_config
        super().__post_init__(**kwargs)
        if not hasattr(self.clip_config, "text_config"):
            return  # refused below
        if mapper is None or isinstance(mapper, dict):
            widths = {"image_dim": joint_width(self.clip_config), "word_dim": word_width(self.clip_config)}
            self.mapper_config = Pic2WordMapperConfig(**{**widths, **(mapper or {})})

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """That of CLIP's text tower."""
        return self.clip_config.get_text_config(decoder, encoder)

    def validate_architecture(self):
        """Refuses combinations of fields that no model can be built from."""
        if not hasattr(self.clip_config, "text_config"):
            raise ValueError(
                f"clip_config is of {self.clip_config.model_type}, which is no dual encoder: give one of pictures and texts."
            )
        vocab_size = self.clip_config.text_config.vocab_size
        if not 0 <= self.placeholder_token_id < vocab_size:
            raise ValueError(
                f"placeholder_token_id ({self.placeholder_token_id}) must be an id of CLIP's vocabulary, which has "
                f"{vocab_size}."
            )
        text = self.clip_config.text_config
        if self.placeholder_token_id in (getattr(text, "bos_token_id", None), getattr(text, "eos_token_id", None)):
            raise ValueError(
                f"placeholder_token_id ({self.placeholder_token_id}) is the start or end token, which every text holds: "
                "choose another."
            )
        for name, width, of in (
            ("image_dim", joint_width(self.clip_config), "joint space"),
            ("word_dim", word_width(self.clip_config), "token embeddings"),
        ):
            if (own := getattr(self.mapper_config, name)) != width:
                raise ValueError(
                    f"mapper_config.{name} is {own}, but CLIP's {of} have width {width}: this mapping network was made "
                    "for another CLIP."
                )


__all__ = ["Pic2WordConfig", "Pic2WordMapperConfig"]
