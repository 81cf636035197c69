"""Row 1: outputs, losses and gradients equal those of an independent oracle."""

import pytest
import torch
from torch.nn import functional as F

from .cases import cases_for, in_double, largest_error, trained

EVERY = pytest.mark.parametrize("case", cases_for(1), ids=str)


def outputs_and_gradients(outputs: dict, parameters: dict) -> tuple[dict, dict]:
    """The outputs, and the gradients of a fixed mixture of all of them, the loss among them."""
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (value * torch.randn(value.shape, generator=generator, dtype=value.dtype)).sum() / value.numel() ** 0.5
        for _, value in sorted(outputs.items())
    )
    total.backward()
    return outputs, {name: parameter.grad for name, parameter in parameters.items()}


def compare(case, dtype, **changes) -> tuple[dict, dict]:
    """The largest relative error of every output and every gradient."""
    model = case.build().to(dtype)
    batch = in_double(case.batch(5)) if dtype == torch.float64 else case.batch(5)
    oracle = case.oracle(model, **changes)
    ours, our_gradients = outputs_and_gradients(case.read(model(**batch), batch), trained(model))
    theirs, their_gradients = outputs_and_gradients(case.read(oracle.run(**batch), batch), oracle.parameters)
    assert set(ours) == set(theirs)
    assert set(our_gradients) == set(their_gradients)

    # The softmax takes no notice of a bias of the keys: its gradient is rounding error around zero.
    scale = max(gradient.abs().max() for gradient in their_gradients.values())
    gradient_errors = {}
    for name, reference in their_gradients.items():
        difference = (our_gradients[name].reshape(reference.shape) - reference).abs().max()
        gradient_errors[name] = (difference / (scale if "k_proj.bias" in name else reference.abs().max())).item()
    return {name: largest_error(ours[name], theirs[name]) for name in ours}, gradient_errors


def worst(errors: dict[str, float]) -> tuple[float, str]:
    return max((error, name) for name, error in errors.items())


@EVERY
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
def test_outputs_losses_and_gradients(case, dtype, bound):
    outputs, gradients = compare(case, dtype)
    assert worst(outputs) <= (bound, "")
    assert worst(gradients) <= (bound, "")


@pytest.mark.parametrize("case", cases_for(1, lambda case: case.model_type == "pic2word_mapper"), ids=str)
def test_dropout_stands_between_linear_and_relu(case):
    """In training the output is the published equation's with the masks that the same seed draws."""
    config = case.config()
    config.dropout = 0.4
    mapper = case.build(config).double().train()
    (embeds,) = in_double(case.batch(5)).values()
    torch.manual_seed(3)
    ours = mapper(embeds).pseudo_words
    torch.manual_seed(3)
    hidden = embeds
    for layer in mapper.layers:
        preactivation = hidden @ layer.weight.T + layer.bias
        mask = F.dropout(torch.ones_like(preactivation), config.dropout)
        assert 0 < (mask == 0).double().mean() < 1
        hidden = (mask * preactivation).clamp(min=0)
    assert largest_error(ours, hidden @ mapper.fc_out.weight.T + mapper.fc_out.bias) <= 1e-12
    assert largest_error(ours, mapper.eval()(embeds).pseudo_words) > 1e-3


@EVERY
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)
def test_another_activation_is_noticed(case, dtype, bound):
    outputs, gradients = compare(case, dtype, hidden_act=case.other_activation)
    assert worst(outputs) > (bound, "")
    assert worst(gradients) > (bound, "")
