"""Tells whether two modules hold the same weights."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn


def fingerprint(module: nn.Module) -> str:
    """A checksum of all that a module's state dict holds, parameters and buffers.

    It is the same in every process, on every device and for every memory layout; another name, dtype, shape or bit
    changes it. One tensor at a time is copied to the CPU.

    Args:
        module: any module whose tensors have values.

    Returns:
        32 hexadecimal digits (BLAKE2b).

    Raises:
        ValueError: an entry of the state dict is no tensor, or a tensor on the meta device.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            what = "on the meta device" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
            raise ValueError(f"{name} is {what}: only tensors with values have a fingerprint.")
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
