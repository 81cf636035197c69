"""What an optimizer is given: which parameters decay, and none in half precision."""

from __future__ import annotations

import re

import torch
from torch import nn

# Tables and tokens are looked up, not multiplied: pulling them to zero removes information.
UNDECAYED = re.compile(r"(position|class|cls)_?(embedding|token)")


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that decay: matrices and convolution kernels.

    Gains, biases and the logit scale have one dimension and do not decay (Radford et al. 2021, section 2.5); position
    tables and class tokens do not either.
    """
    return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2 and not UNDECAYED.search(name)]


def refuse_half_precision(model: nn.Module) -> None:
    """Raises ValueError where a trainable weight is float16 or bfloat16.

    Adam's eps of 1e-8 is zero in float16 and small updates vanish in bfloat16: weights stay in float32 and the forward
    pass runs in half precision (``bf16=True``).
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')} and trainable: open the model with "
                "dtype=torch.float32 and pass bf16=True (or fp16=True) to train in mixed precision."
            )


def refuse_unsaved_parameters(model: nn.Module) -> None:
    """Raises ValueError where a trainable weight beside an adapter is not in the adapter's file, which alone is saved."""
    if not hasattr(model, "peft_config"):
        return
    from peft import get_peft_model_state_dict

    saved = {tensor.data_ptr() for tensor in get_peft_model_state_dict(model).values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() not in saved:
            raise ValueError(
                f"{name} is trainable but no part of the adapter, whose file alone is saved: freeze it, or train its "
                "module whole with modules_to_save."
            )
