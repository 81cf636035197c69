"""Multi-head self-attention through transformers' attention interface (Vaswani et al. 2017, section 3.2.2)."""

from __future__ import annotations

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q k^T * scaling + mask) v, the reference that every other kernel must equal.

    Args:
        query, key, value: ``(B, H, T, d)``.
        attention_mask: additive, broadcastable to ``(B, H, T, T)``, or None.

    Returns:
        The mixed values ``(B, T, H, d)`` and the attention weights ``(B, H, T, T)``.
    """
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32))
    weights = weights.to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    """Self-attention whose kernel is ``config._attn_implementation``.

    Args:
        config: gives ``hidden_size``, ``num_attention_heads``, ``attention_dropout``.
        is_causal: a position sees itself and what stands before it.
        qkv_bias: whether query, key and value projections have a bias.
        k_bias: whether the key projection has one too. (Its bias adds one number to all scores of a query, which
            softmax takes out again.)
    """

    def __init__(self, config, is_causal: bool = False, qkv_bias: bool = True, k_bias: bool = True):
        super().__init__()
        self.config = config
        self.is_causal = is_causal
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_dropout

        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=qkv_bias and k_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=qkv_bias)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        asking: torch.Tensor | None = None,
        cache: Cache | None = None,
        layer: int = 0,
        **kwargs,
    ):
        """Lets every token, or those that ask, look at all tokens.

        Args:
            hidden_states: ``(B, T, D)``, what is looked at.
            asking: ``(B, Q, D)``, what looks; by default all of `hidden_states`.
            cache: holds keys and values of earlier tokens, which are looked at too, and takes up those of these.
            layer: which layer of the cache is this one's.

        Returns:
            ``(B, Q, D)`` and, with the eager kernel, the weights ``(B, H, Q, T)``.
        """
        query = self.q_proj(hidden_states if asking is None else asking)
        key, value = self.k_proj(hidden_states), self.v_proj(hidden_states)
        if cache is not None:
            key, value = (kept[:, 0] for kept in cache.update(key[:, None], value[:, None], layer))
        mixed, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.out_proj(mixed), weights


class CrossAttention(nn.Module):
    """Attention of one sequence to another, whose keys and values may be made once and used many times.

    Args:
        config: gives ``hidden_size``, ``num_attention_heads``, ``attention_dropout``.
        source_width: width of the other sequence.
    """

    def __init__(self, config, source_width: int):
        super().__init__()
        self.config = config
        self.is_causal = False
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_dropout

        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(source_width, config.hidden_size)
        self.v_proj = nn.Linear(source_width, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def keys_values(self, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of ``(B, N, D)`` for a source ``(B, N, source_width)``."""
        return self.k_proj(source), self.v_proj(source)

    def forward(
        self,
        hidden_states: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """``(B, Q, D)`` to ``(B, Q, D)`` and, with the eager kernel, the weights ``(B, H, Q, N)``."""
        mixed, weights = attend(self, self.q_proj(hidden_states), *keys_values, attention_mask, **kwargs)
        return self.out_proj(mixed), weights


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Mixes values head by head with the kernel ``module.config._attn_implementation``.

    Args:
        module: gives ``config``, ``head_dim``, ``scaling``, ``dropout``, ``is_causal``.
        query: ``(B, Q, D)``.
        key, value: ``(B, T, D)``.
        attention_mask: in the form that the kernel takes, broadcastable to ``(B, H, Q, T)``.

    Returns:
        ``(B, Q, D)`` and, with the eager kernel, the weights ``(B, H, Q, T)``.
    """
    query, key, value = (
        projected.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for projected in (query, key, value)
    )
    kernel = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager_attention_forward)
    mixed, weights = kernel(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=module.scaling,
        dropout=module.dropout if module.training else 0.0,
        **kwargs,
    )
    return mixed.flatten(2), weights
