"""The eager kernel against torch's own, and the module's two ways of attending."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from hf_mm.nn.attention import Attention, eager_attention_forward


def heads(dtype=torch.float64, batch=2, number=3, length=7, width=5):
    return torch.randn(3, batch, number, length, width, dtype=dtype).unbind(0)


def module(training: bool = False):
    return SimpleNamespace(training=training)


@pytest.mark.parametrize("masked", [False, True])
def test_eager_equals_torch(masked):
    query, key, value = heads()
    mask = torch.randn(2, 1, 7, 7, dtype=torch.float64).masked_fill(torch.rand(2, 1, 7, 7) < 0.3, -1e9)
    mask = mask if masked else None
    mixed, weights = eager_attention_forward(module(), query, key, value, mask, scaling=0.3)
    reference = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    torch.testing.assert_close(mixed, reference.transpose(1, 2), rtol=1e-12, atol=1e-13)
    assert weights.shape == (2, 3, 7, 7)
    torch.testing.assert_close(weights @ value, reference, rtol=1e-12, atol=1e-13)


def test_half_precision_goes_through_float32():
    """Scores that differ by less than bfloat16 can tell still share out the attention."""
    query, key, value = heads(torch.bfloat16, length=64)
    _, weights = eager_attention_forward(module(), query, key, value, None, scaling=1.0)
    reference = (query @ key.mT).float().softmax(-1)
    assert weights.dtype == torch.bfloat16
    torch.testing.assert_close(weights, reference.bfloat16(), rtol=0, atol=0)


def test_dropout_only_in_training():
    query, key, value = heads()
    options = {"attention_mask": None, "scaling": 1.0, "dropout": 0.5}
    _, kept = eager_attention_forward(module(training=False), query, key, value, **options)
    _, dropped = eager_attention_forward(module(training=True), query, key, value, **options)
    torch.testing.assert_close(kept.sum(-1), torch.ones_like(kept.sum(-1)))
    zero = dropped == 0
    assert 0.3 < zero.double().mean() < 0.7
    torch.testing.assert_close(dropped[~zero], 2 * kept[~zero])


def attention(kernel: str, **options) -> Attention:
    config = SimpleNamespace(hidden_size=12, num_attention_heads=3, attention_dropout=0.0, _attn_implementation=kernel)
    torch.manual_seed(0)
    return Attention(config, **options).double()


@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_looks_where_it_may(causal):
    """A causal position is blind to what comes after it, another is not."""
    attend = attention("sdpa", is_causal=causal)
    tokens = torch.randn(2, 6, 12, dtype=torch.float64)
    changed = tokens.clone()
    changed[:, 4:] += 1.0
    before, after = attend(tokens)[0], attend(changed)[0]
    assert torch.equal(before[:, :4], after[:, :4]) == causal
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_heads_are_worked_out_one_by_one(kernel):
    attend = attention(kernel)
    tokens = torch.randn(2, 6, 12, dtype=torch.float64)
    projections = [attend.q_proj, attend.k_proj, attend.v_proj]
    query, key, value = (F.linear(tokens, linear.weight, linear.bias) for linear in projections)
    mixed = [
        (query[..., part] @ key[..., part].mT / 2).softmax(-1) @ value[..., part]
        for part in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    torch.testing.assert_close(attend(tokens)[0], attend.out_proj(torch.cat(mixed, -1)), rtol=1e-12, atol=1e-13)


def test_bias_of_the_inputs_is_a_choice():
    with_bias, without = attention("eager"), attention("eager", qkv_bias=False)
    missing = {name for name, _ in with_bias.named_parameters()} - {name for name, _ in without.named_parameters()}
    assert missing == {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
