import pytest
import torch
from transformers import PreTrainedConfig

from hf_mm.nn.blocks import TransformerEncoder
from hf_mm.nn.drop_path import DropPath, linear_drop_path_rates


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_whole_samples_are_dropped_and_the_mean_stays(rate):
    number = 20_000
    branch = torch.ones(number, 2, 3)
    dropped = DropPath(rate).train()(branch)
    per_sample = dropped.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    torch.testing.assert_close(per_sample[:, 0].unique(), torch.tensor([0.0, 1 / (1 - rate)]))
    deviation = (rate / (1 - rate) / number) ** 0.5
    assert dropped.mean().item() == pytest.approx(1.0, abs=5 * deviation)


def test_nothing_is_dropped_in_evaluation_or_at_rate_zero():
    branch = torch.randn(50, 4)
    assert torch.equal(DropPath(0.9).eval()(branch), branch)
    assert torch.equal(DropPath(0.0).train()(branch), branch)


def test_gradient_reaches_the_kept_samples_only():
    branch = torch.randn(200, 3, requires_grad=True)
    dropped = DropPath(0.5).train()(branch)
    dropped.sum().backward()
    kept = (dropped != 0).float()
    assert torch.equal(branch.grad, 2 * kept)


@pytest.mark.parametrize(("last", "layers"), [(0.3, 4), (0.2, 1), (0.0, 3)])
def test_rates_rise_linearly_from_zero(last, layers):
    rates = linear_drop_path_rates(last, layers)
    assert len(rates) == layers
    assert rates[0] == 0.0
    if layers > 1:
        assert rates[-1] == pytest.approx(last)
        assert torch.tensor(rates).diff().tolist() == pytest.approx([last / (layers - 1)] * (layers - 1))


def test_a_dropped_block_hands_its_input_on():
    """At a rate close to 1 nearly every sample leaves the last block as it came; the first block drops none."""

    class Config(PreTrainedConfig):
        hidden_size: int = 8
        intermediate_size: int = 16
        num_attention_heads: int = 2
        num_hidden_layers: int = 2
        hidden_act: str = "gelu"
        layer_norm_eps: float = 1e-6
        attention_dropout: float = 0.0

    encoder = TransformerEncoder(Config(attn_implementation="eager"), drop_path_rate=0.999).train()
    tokens = torch.randn(64, 5, 8)
    middle = encoder.layers[0](tokens)
    unchanged = (encoder.layers[1](middle) == middle).flatten(1).all(1)
    assert unchanged.sum() >= 62
    assert not (middle == tokens).flatten(1).all(1).any()
