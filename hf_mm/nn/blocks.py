"""The pre-norm Transformer block of ViT (Dosovitskiy et al. 2021, equations 2 and 3) and of both CLIP towers."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import Attention
from .drop_path import DropPath, linear_drop_path_rates


class MLP(nn.Module):
    """Linear, activation, Linear, each followed by dropout. ``(..., D)`` to ``(..., D)``."""

    def __init__(self, config, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(self.activation(self.fc1(hidden_states)))
        return self.dropout(self.fc2(hidden_states))


class TransformerBlock(GradientCheckpointingLayer):
    """x + MSA(LN(x)), then x + MLP(LN(x)).

    Args:
        config: gives ``hidden_size``, ``intermediate_size``, ``num_attention_heads``, ``hidden_act``,
            ``layer_norm_eps``, ``attention_dropout``.
        is_causal: attention looks back only.
        qkv_bias: bias of the query, key and value projections.
        k_bias: whether the key projection has one too, see `Attention`.
        dropout: after the attention's output projection and after both linear layers of the MLP.
        drop_path: stochastic-depth rate of both branches.
    """

    def __init__(
        self,
        config,
        is_causal: bool = False,
        qkv_bias: bool = True,
        k_bias: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config, is_causal=is_causal, qkv_bias=qkv_bias, k_bias=k_bias)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config, dropout=dropout)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position: int | torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """``(B, T, D)`` to ``(B, T, D)``, or to ``(B, 1, D)`` where only the token at `position` is wanted."""
        normed, asking = self.layer_norm1(hidden_states), None
        if position is not None:
            asking, hidden_states = token_at(normed, position), token_at(hidden_states, position)
        attended, _ = self.self_attn(normed, attention_mask, asking, **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(attended))
        return hidden_states + self.drop_path(self.mlp(self.layer_norm2(hidden_states)))


def token_at(hidden_states: torch.Tensor, position: int | torch.Tensor) -> torch.Tensor:
    """``(B, T, D)`` to ``(B, 1, D)``: the token at one position, or at one ``(B,)`` for each row."""
    if isinstance(position, int):
        return hidden_states[:, position : position + 1].contiguous()
    return hidden_states.gather(1, position[:, None, None].expand(-1, -1, hidden_states.shape[-1]))


class TransformerEncoder(nn.Module):
    """`config.num_hidden_layers` blocks, stochastic depth rising linearly to `drop_path_rate`."""

    def __init__(
        self,
        config,
        is_causal: bool = False,
        qkv_bias: bool = True,
        k_bias: bool = True,
        dropout: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerBlock(
                config, is_causal=is_causal, qkv_bias=qkv_bias, k_bias=k_bias, dropout=dropout, drop_path=rate
            )
            for rate in linear_drop_path_rates(drop_path_rate, config.num_hidden_layers)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position: int | torch.Tensor | None = None,
        last_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """``(B, T, D)`` to ``(B, T, D)``, or to ``(B, 1, D)`` where only the token at `position` is wanted.

        Nothing reads the other tokens of the last block, so of these it computes keys and values alone: exact, and
        less work by most of a block.

        Args:
            position: of the one token, for all rows or ``(B,)`` for each.
            last_mask: attention mask of that token, ``(B, 1, 1, T)``.
        """
        for layer in self.layers[:-1]:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        if position is None:
            return self.layers[-1](hidden_states, attention_mask, **kwargs)
        return self.layers[-1](hidden_states, last_mask, position, **kwargs)
