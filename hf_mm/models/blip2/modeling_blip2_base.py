"""What all of BLIP-2 shares: a frozen vision tower, a LayerNorm on its features, and the Q-Former."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from ...composite.freezing import is_trained, upstream
from ...composite.modeling_composite import MMCompositeModel
from ...composite.vision_tower import tower_tokens, vision_encoder
from ...nn.pretrained import torch_default_
from .configuration_blip2 import MMBlip2Config
from .modeling_qformer import MMBlip2QFormerModel, MMBlip2QFormerOutput


@dataclass
class MMBlip2ModelOutput(ModelOutput):
    """Soft tokens of pictures.

    Args:
        last_hidden_state: ``(M, Nq, d)``, the Q-Former's queries.
        pooler_output: ``(M, Nq, D)``, projected to the language model's width where there is one.
        qformer_outputs: all that the Q-Former gives.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    qformer_outputs: MMBlip2QFormerOutput | None = None


class AnyVisionTower:
    """Opens the vision encoder of whatever `AutoModel` opens."""

    part_of = staticmethod(vision_encoder)

    @staticmethod
    def from_config(config) -> PreTrainedModel:
        return vision_encoder(AutoModel.from_config(config))

    @staticmethod
    def from_pretrained(name: str, **kwargs) -> PreTrainedModel:
        return vision_encoder(AutoModel.from_pretrained(name, **kwargs))


class VisionNorm(nn.LayerNorm):
    """LayerNorm of the tower's features, in at least float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states.to(torch.promote_types(self.weight.dtype, torch.float32))
        weight, bias = self.weight.to(hidden_states.dtype), self.bias.to(hidden_states.dtype)
        normed = nn.functional.layer_norm(hidden_states, self.normalized_shape, weight, bias, self.eps)
        return normed.to(self.weight.dtype)


class MMBlip2PreTrainedModel(MMCompositeModel):
    """A frozen vision tower, a LayerNorm on its features, and a Q-Former."""

    config: MMBlip2Config
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    accepts_loss_kwargs = False
    frozen_parts = {"vision_tower": AnyVisionTower}
    part_configs = {"vision_tower": "vision_config", "language_model": "text_config"}
    _no_split_modules = ["QFormerEmbeddings", "QFormerLayer"]
    _skip_keys_device_placement = ["cache"]
    _can_record_outputs = {}

    def __init__(self, config: MMBlip2Config, vision_tower: PreTrainedModel | None = None):
        super().__init__(config)
        self.vision_tower = self._part_or_new("vision_tower", vision_tower)
        self.vision_norm = VisionNorm(config.qformer_config.encoder_hidden_size, eps=config.vision_norm_eps)
        self.qformer = MMBlip2QFormerModel(config.qformer_config)

    @classmethod
    def from_vision_pretrained(cls, vision_tower: str | PreTrainedModel, **fields) -> "MMBlip2PreTrainedModel":
        """Puts a new Q-Former on a pretrained vision tower.

        Args:
            vision_tower: folder or Hub id of a vision encoder or of a model that has one, or the encoder itself.
            **fields: of `MMBlip2Config`, such as ``qformer_config={"num_query_tokens": 8}``.
        """
        tower, source = opened(AnyVisionTower, vision_tower)
        kernels = {"vision_config": tower.config._attn_implementation, "": "sdpa"}
        config = MMBlip2Config(
            vision_config=tower.config, base_models={"vision_tower": source}, attn_implementation=kernels, **fields
        )
        return cls(config, vision_tower=tower).eval()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            torch_default_(module)

    def get_input_embeddings(self) -> nn.Module | None:
        return self.qformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.qformer.set_input_embeddings(value)

    @torch.no_grad()
    def vision_features(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """``(M, N, E)``: what every call takes as `vision_features` in place of pixels ``(M, C, H, W)``."""
        self.hold_frozen_parts()
        return self._tower_tokens(pixel_values, interpolate_pos_encoding)

    def _tower_tokens(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> torch.Tensor:
        config = self.config
        return tower_tokens(
            self.vision_tower,
            pixel_values.to(self.vision_tower.dtype),
            config.vision_feature_layer,
            config.vision_class_token,
            interpolate_pos_encoding,
        )

    def _picture_tokens(
        self,
        pixel_values: torch.Tensor | None,
        vision_features: torch.Tensor | None,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        """``(M, N, E)``: the tower's features, normed."""
        return self.vision_norm(self._features(pixel_values, vision_features, interpolate_pos_encoding))

    def _features(
        self,
        pixel_values: torch.Tensor | None,
        vision_features: torch.Tensor | None,
        interpolate_pos_encoding: bool,
    ) -> torch.Tensor:
        """``(M, N, E)``: the tower's features of pixels, or those that were given."""
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("give either pixel_values or vision_features, not both and not neither.")
        if vision_features is None:
            with upstream(self.vision_tower):
                vision_features = self._tower_tokens(pixel_values, interpolate_pos_encoding)
        elif self.training and is_trained(self.vision_tower):
            raise ValueError(
                "the vision tower trains, itself or by adapters, which vision_features would pass by: give pixel_values."
            )
        width = self.config.qformer_config.encoder_hidden_size
        if vision_features.ndim != 3 or vision_features.shape[-1] != width:
            raise ValueError(
                f"vision_features must be (pictures, tokens, {width}), not {tuple(vision_features.shape)}: compute them "
                "with vision_features() of this model."
            )
        return vision_features


class MMBlip2Model(MMBlip2PreTrainedModel):
    """Pictures to the Q-Former's queries: the part that all of BLIP-2 shares."""

    def __init__(self, config: MMBlip2Config, vision_tower: PreTrainedModel | None = None):
        super().__init__(config, vision_tower)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MMBlip2ModelOutput:
        """Reads pictures, with a text each where `input_ids` are given.

        Args:
            pixel_values: ``(M, C, H, W)``.
            vision_features: ``(M, N, E)`` in place of pixels, see `vision_features()`.
            input_ids, attention_mask: ``(M, T)``, of the Q-Former's tokenizer.
            interpolate_pos_encoding: accept pictures of another size than the tower's own.
        """
        self.hold_frozen_parts()
        tokens = self._picture_tokens(pixel_values, vision_features, interpolate_pos_encoding)
        outputs = self.qformer(tokens, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return MMBlip2ModelOutput(last_hidden_state=outputs.last_hidden_state, qformer_outputs=outputs)


def opened(auto: type, source: str | PreTrainedModel) -> tuple[PreTrainedModel, dict]:
    """The part of a model that is wanted, opened or handed over, and where it came from.

    Raises:
        ValueError: what was handed over is no such model.
    """
    if isinstance(source, nn.Module) and not isinstance(source, PreTrainedModel):
        raise ValueError(
            f"a {type(source).__name__} is no PreTrainedModel: give one, a folder or a Hub id (of what PEFT has wrapped, "
            "its get_base_model())."
        )
    model = source if isinstance(source, PreTrainedModel) else auto.from_pretrained(source)
    name = source.name_or_path if isinstance(source, PreTrainedModel) else str(source)
    revision = getattr(model.config, "_commit_hash", None)
    # Of a whole model, what is wanted has no name of its own.
    return auto.part_of(model), {"name": name, "revision": revision}


__all__ = ["MMBlip2Model"]
