from types import SimpleNamespace

import pytest
import torch

from hf_mm.nn.blocks import TransformerBlock


def block(**options) -> TransformerBlock:
    config = SimpleNamespace(
        hidden_size=12,
        intermediate_size=24,
        num_attention_heads=3,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        attention_dropout=0.0,
        _attn_implementation="eager",
    )
    return TransformerBlock(config, **options)


@pytest.mark.parametrize("option", ["dropout", "drop_path"])
def test_both_branches_are_dropped(option):
    """Where everything but a trace is dropped, what enters the block leaves it; a branch left alone would show."""
    tokens = torch.randn(4, 5, 12)
    built = block(**{option: 1 - 1e-7}).train()
    assert torch.equal(built(tokens), tokens)
    assert not torch.isclose(built.eval()(tokens), tokens).any(dim=-1).all()
