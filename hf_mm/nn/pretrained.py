"""What every model of the package is."""

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging

from .attention import Attention
from .blocks import TransformerBlock

logger = logging.get_logger(__name__)


class MMPreTrainedModel(PreTrainedModel):
    """A `PreTrainedModel` made of `TransformerBlock`s, whose `_init_weights` uses `transformers.initialization` alone."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": TransformerBlock, "attentions": Attention}
    pools_alone = False  # whether forward has `pooled_only`

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """See `transformers.PreTrainedModel.from_pretrained`. Raises OSError for a file of weights that is cut short."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"the weights of {pretrained_model_name_or_path} are cut short or no safetensors file ({error}): "
                "copy or download them again."
            ) from error

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs):
        """See `transformers.PreTrainedModel`. With ``use_reentrant=True`` embeddings require gradients, or none would
        reach adapters behind pictures."""
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)
        if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
            self.enable_input_require_grads()

    def train(self, mode: bool = True):
        """See `torch.nn.Module.train`. Warns of float16 weights that train, in which Adam's default eps is zero."""
        trained = next((p for p in self.parameters() if p.requires_grad), None) if mode else None
        if trained is not None and trained.dtype == torch.float16:
            logger.warning_once(
                "The weights are float16, in which plain Adam ends in NaN: open the model with dtype=torch.float32 and "
                "train with fp16=True or bf16=True."
            )
        return super().train(mode)

    def _pools_alone(self, pooled_only: bool, kwargs: dict) -> bool:
        """Whether only the pooled token is wanted: not where hidden states or attention maps are recorded."""
        recorded = [
            kwargs.get(name, getattr(self.config, name, None))
            for name in ("output_hidden_states", "output_attentions")
        ]
        return pooled_only and all(record is None or record is False for record in recorded)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False):
        # For classes outside transformers the base class passes over modules without parameters of their own, such as
        # Attention, to protect loaded weights. transformers.initialization protects them one by one.
        super()._initialize_weights(module)


def lecun_normal_(tensor: torch.Tensor) -> torch.Tensor:
    """Normal of standard deviation fan_in^-1/2, cut at two deviations of the uncut one, as flax has it."""
    uncut = tensor[0].numel() ** -0.5 / 0.87962566103423978
    return init.trunc_normal_(tensor, std=uncut, a=-2 * uncut, b=2 * uncut)


def torch_default_(layer: nn.Linear | nn.Conv2d) -> None:
    """What torch does to a new layer: weight and bias uniform within fan_in^-1/2."""
    init.kaiming_uniform_(layer.weight, a=5**0.5)
    if layer.bias is not None:
        bound = layer.weight[0].numel() ** -0.5
        init.uniform_(layer.bias, -bound, bound)
