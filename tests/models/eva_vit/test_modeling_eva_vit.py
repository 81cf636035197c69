import math

import pytest
import torch
from contract.cases import PICTURE, largest_error, recomputed
from contract.oracles import eva_vit_oracle
from torch import nn

from hf_mm.composite.vision_tower import tower_layout, tower_tokens
from hf_mm.models.eva_vit.configuration_eva_vit import EvaViTConfig
from hf_mm.models.eva_vit.modeling_eva_vit import EvaViTModel
from hf_mm.nn.positions import resize_position_table

LAYERS = 3


def tiny(**changes) -> EvaViTModel:
    """A tiny model in eval mode, every parameter moved off its initial value."""
    torch.manual_seed(0)
    model = EvaViTModel(EvaViTConfig(**{**PICTURE, "num_hidden_layers": LAYERS, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pixels(*size, number=3, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(5), dtype=dtype)


def errors(model: EvaViTModel, inputs: dict, **changes) -> tuple[float, float]:
    """The largest relative errors of any layer's tokens and of any gradient, from transformers' tower."""
    oracle = eva_vit_oracle(model, **changes)
    model.zero_grad()
    ours, theirs = model(**inputs, output_hidden_states=True), oracle.run(**inputs, output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs["hidden_states"]) == LAYERS + 1
    for outputs in (ours.hidden_states, theirs["hidden_states"]):
        sum(state.sin().mean() for state in outputs).backward()
    pairs = list(zip(ours.hidden_states, theirs["hidden_states"], strict=True))
    pairs.append((ours.last_hidden_state, theirs["last_hidden_state"]))
    gradients = [(parameter.grad, oracle.parameters[name].grad) for name, parameter in model.named_parameters()]
    return tuple(max(largest_error(*pair) for pair in some) for some in (pairs, gradients))


TOLERANCES = pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=str)


@TOLERANCES
def test_every_layer_and_gradient_as_transformers_has_them(dtype, bound):
    model = tiny().to(dtype)
    assert max(errors(model, {"pixel_values": pixels(32, 32, dtype=dtype)})) <= bound


@TOLERANCES
@pytest.mark.parametrize("changes", [{"hidden_act": "gelu_pytorch_tanh"}, {"layer_norm_eps": 1e-5}], ids=str)
def test_another_activation_or_eps_is_noticed(changes, dtype, bound):
    model = tiny().to(dtype)
    assert min(errors(model, {"pixel_values": pixels(32, 32, dtype=dtype)}, **changes)) > bound


@TOLERANCES
@pytest.mark.parametrize("size", [(32, 32), (48, 48), (16, 24), (64, 8)], ids=str)
def test_any_resolution_as_transformers_does_it(size, dtype, bound):
    model = tiny().to(dtype)
    inputs = {"pixel_values": pixels(*size, dtype=dtype), "interpolate_pos_encoding": True}
    assert model(**inputs).last_hidden_state.shape == (3, 1 + size[0] * size[1] // 64, 48)
    assert max(errors(model, inputs)) <= bound


def test_another_grid_at_call_time_equals_a_table_resized_before():
    model, resized = tiny(image_size=(32, 48)).double(), tiny(image_size=(40, 24)).double()
    weights = model.state_dict()
    table = weights["embeddings.position_embeddings"][0]
    new = resize_position_table(table, (4, 6), (5, 3), "bicubic", num_prefix_tokens=1)
    assert torch.equal(new[0], table[0])
    resized.load_state_dict({**weights, "embeddings.position_embeddings": new[None]})
    pictures = pixels(40, 24, dtype=torch.float64)
    at_call = model(pictures, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(at_call, resized(pictures).last_hidden_state)


def test_published_number_of_parameters():
    """The frozen ViT-g of a public log has 985,952,256: with `ln_vision`, and a bias of zeros for the keys of 39 blocks."""
    with torch.device("meta"):
        tower = EvaViTModel(EvaViTConfig())
    assert tower.num_parameters() + 2 * 1408 + 39 * 1408 == 985_952_256
    assert tower_layout(EvaViTConfig()).num_tokens == 257
    assert tower_layout(EvaViTConfig(image_size=364)).num_tokens == 677
    assert tower_layout(EvaViTConfig(image_size=490)).num_tokens == 1226


def test_keys_have_no_bias_and_there_is_no_norm_after_the_blocks():
    names = set(tiny().state_dict())
    block = {name.removeprefix("encoder.layers.0.") for name in names if name.startswith("encoder.layers.0.")}
    modules = ("layer_norm1", "self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "layer_norm2", "mlp.fc1")
    expected = {f"{name}.{kind}" for name in (*modules, "mlp.fc2") for kind in ("weight", "bias")}
    assert block == expected | {"self_attn.k_proj.weight"}
    outside = {name for name in names if not name.startswith("encoder.layers.")}
    embeddings = ("cls_token", "position_embeddings", "patch_embeddings.weight", "patch_embeddings.bias")
    assert outside == {f"embeddings.{name}" for name in embeddings}


def test_what_ends_a_residual_branch_starts_smaller_in_deeper_blocks():
    """BEiT's rule: standard deviation 0.02 / sqrt(2 n) in the n-th block; six standard errors."""
    model = EvaViTModel(EvaViTConfig(**{**PICTURE, "num_hidden_layers": 8, "initializer_range": 0.03}))
    for number, layer in enumerate(model.encoder.layers, start=1):
        for weight in (layer.self_attn.out_proj.weight, layer.mlp.fc2.weight):
            expected = 0.03 / math.sqrt(2 * number)
            assert weight.std().item() == pytest.approx(expected, rel=6 / math.sqrt(2 * weight.numel()))
        assert layer.mlp.fc1.weight.std().item() == pytest.approx(0.03, rel=6 / math.sqrt(2 * 96 * 48))


def test_pooled_is_the_class_token_and_alone_it_is_the_same():
    model, pictures = tiny().double(), pixels(32, 32, dtype=torch.float64)
    every, alone = (model(pictures, pooled_only=only) for only in (False, True))
    assert torch.equal(every.pooler_output, every.last_hidden_state[:, 0])
    assert alone.last_hidden_state is None
    assert largest_error(alone.pooler_output, every.pooler_output) <= 1e-12


def test_a_composite_reads_its_tokens():
    """The last layer as it is, and any other, all with the class token first."""
    model, pictures = tiny(), pixels(32, 32)
    layout = tower_layout(model.config)
    assert (layout.width, layout.grid, layout.num_prefix_tokens) == (48, (4, 4), 1)
    outputs = model(pictures, output_hidden_states=True)
    assert torch.equal(tower_tokens(model, pictures), outputs.last_hidden_state)
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert torch.equal(tower_tokens(model, pictures, layer=-2), outputs.hidden_states[-2])
    assert torch.equal(tower_tokens(model, pictures, class_token=False), outputs.last_hidden_state[:, 1:])


def test_attention_maps_are_those_of_the_queries_and_keys():
    """softmax(q k^T / sqrt(d)) of the first block, from its own projections; one map a block."""
    model, pictures = tiny(attn_implementation="eager").double(), pixels(32, 32, dtype=torch.float64)
    outputs = model(pictures, output_attentions=True)
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(3, 2, 17, 17)] * LAYERS
    first = model.encoder.layers[0]
    normed = first.layer_norm1(model.embeddings(pictures))
    query = normed @ first.self_attn.q_proj.weight.T + first.self_attn.q_proj.bias
    key = normed @ first.self_attn.k_proj.weight.T
    scores = torch.stack([q @ k.mT for q, k in zip(query.split(24, 2), key.split(24, 2), strict=True)], 1)
    assert largest_error(outputs.attentions[0], (scores / math.sqrt(24)).softmax(-1)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sdpa_equals_eager(dtype):
    pictures = pixels(32, 32, dtype=dtype)
    eager, sdpa = (
        tiny(attn_implementation=kernel).to(dtype)(pictures).last_hidden_state for kernel in ("eager", "sdpa")
    )
    assert largest_error(sdpa, eager) <= (1e-12 if dtype == torch.float64 else 1e-5)


def test_checkpointing_computes_every_block_twice_with_equal_gradients():
    plain, checkpointed = tiny().double().train(), tiny().double().train()
    checkpointed.activation_checkpointing_enable()
    counts = []
    for block in recomputed(checkpointed):
        counts.append([])
        block.mlp.fc1.register_forward_hook(lambda *_, count=counts[-1]: count.append(1))
    for model in (plain, checkpointed):
        model(pixels(32, 32, dtype=torch.float64)).last_hidden_state.sin().sum().backward()
    assert [len(count) for count in counts] == [2] * LAYERS
    for (name, ours), theirs in zip(checkpointed.named_parameters(), plain.parameters(), strict=True):
        assert largest_error(ours.grad, theirs.grad) <= 1e-12, name


@pytest.mark.parametrize("field", ["attention_dropout", "drop_path_rate"])
def test_regularisation_acts_in_training_only(field):
    pictures = pixels(32, 32)
    model, plain = tiny(attn_implementation="eager", **{field: 0.5}), tiny(attn_implementation="eager")
    assert torch.equal(model(pictures).last_hidden_state, plain(pictures).last_hidden_state)
    model.train()
    first, second = (model(pictures).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("inputs", [{}, {"interpolate_pos_encoding": True}], ids=str)
def test_compiles_whole(inputs):
    model, pictures = tiny(), pixels(*((48, 40) if inputs else (32, 32)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert largest_error(compiled(pictures, **inputs)[0], model(pictures, **inputs)[0]) <= 1e-6


def test_a_norm_after_it_trains_it_whole():
    """As in BLIP-2, whose `ln_vision` reads all tokens: every parameter gets a gradient."""
    model = tiny().train()
    norm = nn.LayerNorm(48, eps=1e-5)
    norm(model(pixels(32, 32)).last_hidden_state).sin().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in model.parameters())
