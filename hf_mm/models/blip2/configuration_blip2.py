"""Configurations of BLIP-2 and its Q-Former (Li et al. 2023, arXiv 2301.12597)."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec

from ...composite.vision_tower import tower_layout


@strict
class MMBlip2QFormerConfig(PreTrainedConfig):
    """The Q-Former (section 3.1). The defaults are the published ones, for ViT-g.

    Args:
        num_query_tokens: learned queries, the number of soft tokens a picture becomes.
        hidden_size: width of queries and text.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads of self- and cross-attention.
        intermediate_size: width inside the MLPs.
        cross_attention_frequency: every so many blocks, from the first, the queries attend to the picture.
        encoder_hidden_size: width of the picture's tokens.
        hidden_act: activation of the MLPs.
        dropout: after the embeddings and each sublayer.
        attention_dropout: of attention weights.
        layer_norm_eps: of every LayerNorm.
        initializer_range: standard deviation of new weights and queries.
        use_text: have word embeddings and a second MLP in every block, for text. Stage 2 needs neither, unless a question
            enters the Q-Former.
        vocab_size: of the text.
        max_position_embeddings: the longest text, in tokens.
        pad_token_id, cls_token_id, sep_token_id: of the tokenizer.
        bos_token_id: what begins a text that is to be generated, in place of `cls_token_id` (the published ``[DEC]``).
    """

    model_type = "mm_blip2_qformer"
    base_config_key = "qformer_config"
    attribute_map = {"eos_token_id": "sep_token_id"}

    num_query_tokens: int = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408
    hidden_act: str = "gelu"
    dropout: int | float = 0.1
    attention_dropout: int | float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    use_text: bool = True
    vocab_size: int = 30523
    max_position_embeddings: int = 512
    pad_token_id: int = 0
    cls_token_id: int = 101
    sep_token_id: int = 102
    bos_token_id: int = 30522

    def validate_architecture(self):
        """Refuses combinations of fields that no model can be built from."""
        positive = (
            "num_query_tokens",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "cross_attention_frequency",
            "encoder_hidden_size",
            "max_position_embeddings",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads ({self.num_attention_heads})."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(sorted(ACT2FN))}.")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}.")
        if self.use_text:
            for name in ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id"):
                if not 0 <= getattr(self, name) < self.vocab_size:
                    raise ValueError(
                        f"{name} ({getattr(self, name)}) must be an id of the vocabulary, which has {self.vocab_size}."
                    )


@strict
class MMBlip2Config(PreTrainedConfig):
    """BLIP-2: a frozen vision tower, a Q-Former, and in stage 2 a frozen language model.

    Args:
        vision_config: config, or dict of one, of any vision encoder that `AutoModel` opens; a dict without
            ``model_type`` is of `eva_vit`.
        qformer_config: config, or dict of one, of the Q-Former; `encoder_hidden_size` is the tower's width unless given.
        text_config: config, or dict with ``model_type``, of any causal or encoder-decoder language model; None where there
            is none, as in stage 1.
        vision_feature_layer: which features of the tower are read, see `hf_mm.composite.vision_tower.tower_tokens`: -2 for
            the published CLIP ViT-L.
        vision_class_token: whether class and register tokens are read too.
        vision_norm_eps: of the LayerNorm on the tower's features.
        joint_dim: width of the space in which pictures and texts are compared.
        itc_temperature: initial value of the divisor of the cosines.
        label_smoothing: of the contrastive and the generation loss of stage 1.
        gather_with_grad: let the contrastive loss reach the pictures and texts of other ranks. The published training did
            not.
        image_token_id: what stands for one soft token of a picture in `input_ids`. The default is no word of any
            vocabulary, so that none is lost and none has to be added.
        tie_word_embeddings: of the Q-Former's text.
        base_models: where the frozen parts came from, ``{part: {"name": folder or Hub id, "revision": commit or None}}``.
    """

    model_type = "mm_blip2"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="eva_vit"),
        "qformer_config": SubConfigSpec(config_class=MMBlip2QFormerConfig),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="opt", optional=True),
    }
    keys_to_ignore_at_inference = [
        "loss_itc",
        "loss_itm",
        "loss_itg",
        "logits_per_image",
        "logits_per_text",
        "accuracies",
        "negatives",
        "soft_tokens",
        "cache",
        "qformer_outputs",
        "language_model_outputs",
    ]

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_feature_layer: int = -1
    vision_class_token: bool = True
    vision_norm_eps: float = 1e-5
    joint_dim: int = 256
    itc_temperature: int | float = 0.07
    label_smoothing: int | float = 0.1
    gather_with_grad: bool = True
    image_token_id: int = -200
    tie_word_embeddings: bool = True
    base_models: dict | None = None

    def __post_init__(self, **kwargs):
        qformer = self.qformer_config
        is_width_given = not isinstance(qformer, dict | None) or "encoder_hidden_size" in (qformer or {})
        super().__post_init__(**kwargs)
        if not is_width_given:
            width = tower_layout(self.vision_config, self.vision_feature_layer).width
            self.qformer_config.encoder_hidden_size = width

    @property
    def num_query_tokens(self) -> int:
        """Soft tokens a picture."""
        return self.qformer_config.num_query_tokens

    @num_query_tokens.setter
    def num_query_tokens(self, value: int):
        raise ValueError("num_query_tokens is the Q-Former's: set it in qformer_config.")

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the language model is."""
        return bool(self.text_config is not None and self.text_config.is_encoder_decoder)

    @is_encoder_decoder.setter
    def is_encoder_decoder(self, value: bool):
        if value and not self.is_encoder_decoder:
            raise ValueError("is_encoder_decoder is the language model's: set it in text_config.")

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """That of the language model, or of the Q-Former's text where there is none."""
        if self.text_config is None:
            return self.qformer_config
        return self.text_config.get_text_config(decoder, encoder)

    def validate_architecture(self):
        """Refuses combinations of fields that no model can be built from."""
        if self.joint_dim < 1:
            raise ValueError(f"joint_dim must be at least 1, not {self.joint_dim}.")
        if self.itc_temperature <= 0:
            raise ValueError(f"itc_temperature divides and must be above 0, not {self.itc_temperature}.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), not {self.label_smoothing}.")
        self._check_width()

    def _check_width(self):
        """A pass through a tower without weights, which most configs are spared: the last layer's width is declared."""
        width = self.qformer_config.encoder_hidden_size
        if self.vision_feature_layer == -1 and width == getattr(self.vision_config, "hidden_size", None):
            return
        own = tower_layout(self.vision_config, self.vision_feature_layer).width
        if width != own:
            raise ValueError(
                f"qformer_config.encoder_hidden_size is {width}, but the features of the vision tower have width {own}: "
                "leave it out, or give the tower that this Q-Former was made for."
            )


__all__ = ["MMBlip2Config", "MMBlip2QFormerConfig"]
