import pytest
import torch
from contract.cases import PICTURE, largest_error
from contract.oracles import vit_trunk_oracle
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageClassification
from transformers.utils import logging as transformers_logging

from hf_mm.models.vit.configuration_vit import MMViTConfig
from hf_mm.models.vit.modeling_vit import MMViTForImageClassification, MMViTModel
from hf_mm.nn.positions import INTERPOLATIONS, resize_position_table


def tiny(model_class=MMViTModel, **changes):
    """A tiny model in eval mode, every parameter moved off its initial value."""
    torch.manual_seed(0)
    model = model_class(MMViTConfig(**{**PICTURE, "stem_num_groups": 4, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pixels(*size, number=3, dtype=torch.float32):
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(5), dtype=dtype)


PUBLISHED = {  # width, layers, heads, patch: parameters of the trunk, and with a head of 1000 classes
    "Ti/16": (192, 12, 3, 16, 5_524_416, 5_717_416),
    "S/32": (384, 12, 6, 32, 22_493_952, 22_878_952),
    "S/16": (384, 12, 6, 16, 21_665_664, 22_050_664),
    "B/32": (768, 12, 12, 32, 87_455_232, 88_224_232),
    "B/16": (768, 12, 12, 16, 85_798_656, 86_567_656),
    "B/8": (768, 12, 12, 8, 85_807_872, 86_576_872),
    "L/32": (1024, 24, 16, 32, 305_510_400, 306_535_400),
    "L/16": (1024, 24, 16, 16, 303_301_632, 304_326_632),
    "H/14": (1280, 32, 16, 14, 630_764_800, 632_045_800),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_variants_have_their_number_of_parameters(name):
    width, layers, heads, patch, trunk, with_head = PUBLISHED[name]
    config = MMViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        patch_size=patch,
        num_labels=1000,
    )
    with torch.device("meta"):
        assert MMViTModel(config).num_parameters() == trunk
        assert MMViTForImageClassification(config).num_parameters() == with_head


def test_pre_logits_of_base_16_add_a_square_layer():
    with torch.device("meta"):
        assert MMViTModel(MMViTConfig(pre_logits=True)).num_parameters() == 86_389_248


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (16, 16), (24, 64), (64, 8)])
def test_any_resolution_as_transformers_does_it(size):
    model = tiny(pos_embed_interpolation="bicubic", pre_logits=True).double()
    oracle = vit_trunk_oracle(model)
    inputs = {"pixel_values": pixels(*size, dtype=torch.float64), "interpolate_pos_encoding": True}
    ours, theirs = model(**inputs), oracle.run(**inputs)
    assert largest_error(ours.last_hidden_state, theirs["last_hidden_state"]) <= 1e-9
    assert largest_error(ours.pooler_output, theirs["pooler_output"]) <= 1e-9


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_another_grid_at_call_time_equals_a_table_resized_before(interpolation, pooling, stem):
    options = {"pos_embed_interpolation": interpolation, "pooling": pooling, "stem": stem}
    model = tiny(image_size=(32, 48), **options).double()
    resized = tiny(image_size=(40, 24), **options).double()
    prefix = 1 if pooling == "cls" else 0
    weights = model.state_dict()
    table = weights["embeddings.position_embeddings"][0]
    weights["embeddings.position_embeddings"] = resize_position_table(table, (4, 6), (5, 3), interpolation, prefix)[
        None
    ]
    resized.load_state_dict(weights)
    pictures = pixels(40, 24, dtype=torch.float64)
    at_call = model(pictures, interpolate_pos_encoding=True).last_hidden_state
    assert at_call.shape == (3, prefix + 15, 48)
    assert torch.equal(at_call, resized(pictures).last_hidden_state)


def test_the_size_it_was_built_for_needs_no_interpolation():
    model, pictures = tiny(image_size=(32, 48)), pixels(32, 48)
    assert torch.equal(model(pictures).pooler_output, model(pictures, interpolate_pos_encoding=True).pooler_output)


def test_pooling():
    pictures = pixels(32, 32)
    mean, token = tiny(pooling="mean")(pictures), tiny(pooling="cls")(pictures)
    assert mean.last_hidden_state.shape == (3, 16, 48) and token.last_hidden_state.shape == (3, 17, 48)
    torch.testing.assert_close(mean.pooler_output, mean.last_hidden_state.mean(1))
    assert torch.equal(token.pooler_output, token.last_hidden_state[:, 0])
    assert "embeddings.cls_token" not in tiny(pooling="mean").state_dict()


def test_patches_are_read_row_by_row():
    """A change in the second patch of the first row changes the second token of the embeddings, and no other."""
    model = tiny(pooling="mean", image_size=(32, 48))
    pictures = pixels(32, 48)
    changed = pictures.clone()
    changed[:, :, :8, 8:16] += 1.0
    difference = (model.embeddings(changed) - model.embeddings(pictures)).abs().amax((0, 2))
    assert difference.nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize("field", ["hidden_dropout", "attention_dropout", "drop_path_rate"])
def test_regularisation_acts_in_training_only(field):
    pictures = pixels(32, 32)
    model, plain = tiny(attn_implementation="eager", **{field: 0.5}), tiny(attn_implementation="eager")
    assert torch.equal(model(pictures).pooler_output, plain(pictures).pooler_output)
    model.train()
    first, second = model(pictures).pooler_output, model(pictures).pooler_output
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("labels", "num_labels", "loss"),
    [
        (torch.tensor([0, 4, 2]), 5, F.cross_entropy),
        (torch.tensor([[1.0, 0, 0, 1, 0], [0.0] * 5, [1.0] * 5]), 5, F.binary_cross_entropy_with_logits),
        (torch.tensor([0.3, -1.0, 2.0]), 1, lambda logits, labels: F.mse_loss(logits[:, 0], labels)),
    ],
    ids=["one class", "several classes", "regression"],
)
def test_loss_follows_the_labels(labels, num_labels, loss):
    outputs = tiny(MMViTForImageClassification, num_labels=num_labels)(pixels(32, 32), labels=labels)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))


HEAD = {"classifier.weight", "classifier.bias"}
VARIANTS = [{}, {"pooling": "mean"}, {"pooling": "mean", "stem": "conv"}, {"pre_logits": True}]


@pytest.fixture(params=VARIANTS, ids=str)
def ten_classes(request, tmp_path):
    model = tiny(MMViTForImageClassification, num_labels=10, **request.param)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def body(model) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name not in HEAD}


def assert_same_body(model, opened):
    assert body(model).keys() == body(opened).keys()
    assert all(torch.equal(body(opened)[name], value) for name, value in body(model).items())


def test_three_classes_out_of_ten_replace_the_head_alone(ten_classes):
    """F20: the body stays bit-equal and the new head is zero."""
    model, folder = ten_classes
    opened, info = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert_same_body(model, opened)
    assert {key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]} == HEAD
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert opened.classifier.weight.shape == (3, 48)
    assert (opened.classifier.weight == 0).all() and (opened.classifier.bias == 0).all()


def test_three_classes_out_of_ten_are_refused_unless_allowed(ten_classes, caplog):
    """F20: the tensors that do not fit are listed, the head's alone."""
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageClassification.from_pretrained(ten_classes[1], num_labels=3)
    report = [line.split("|")[0].strip() for line in caplog.text.splitlines() if "MISMATCH |" in line]
    assert set(report) == HEAD


def test_no_classes_give_the_pooled_features(ten_classes):
    """F20: zero classes are no head."""
    model, folder = ten_classes
    opened = AutoModelForImageClassification.from_pretrained(folder, num_labels=0)
    assert_same_body(model, opened)
    pictures = pixels(32, 32)
    assert torch.equal(opened(pictures).logits, model.vit(pictures, pooled_only=True).pooler_output)
    opened.save_pretrained(folder / "headless")
    again = AutoModelForImageClassification.from_pretrained(folder / "headless")
    assert torch.equal(again(pictures).logits, opened(pictures).logits)


@pytest.mark.parametrize("changes", [{}, {"pre_logits": True}, {"pooling": "mean", "stem": "conv"}])
def test_the_pooled_token_alone_is_the_same(changes):
    model = tiny(**changes).double()
    every, alone = (model(pixels(32, 32).double(), pooled_only=only) for only in (False, True))
    assert largest_error(alone.pooler_output, every.pooler_output) <= 1e-12
    assert (alone.last_hidden_state is None) == (model.config.pooling == "cls")


def test_labels_without_classes_are_refused():
    """F20: without a head there is no loss."""
    with pytest.raises(ValueError, match="num_labels|labels"):
        tiny(MMViTForImageClassification, num_labels=0)(pixels(32, 32), labels=torch.tensor([0, 0, 0]))


def test_the_trunk_opens_from_a_classifier_and_the_reverse(ten_classes):
    """F20: the bare backbone loads every tensor but the head's."""
    model, folder = ten_classes
    trunk, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(trunk) is MMViTModel
    assert not info["missing_keys"] and not info["mismatched_keys"]
    pictures = pixels(32, 32)
    assert torch.equal(trunk(pictures).pooler_output, model.vit(pictures).pooler_output)

    trunk.save_pretrained(folder / "trunk")
    with_head, info = MMViTForImageClassification.from_pretrained(
        folder / "trunk", num_labels=4, output_loading_info=True
    )
    assert_same_body(model, with_head)
    assert set(info["missing_keys"]) == HEAD
    assert (with_head.classifier.weight == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_half_precision_takes_float32_pictures(dtype, stem, tmp_path):
    """F14: pictures are cast to the weights."""
    model = MMViTModel(MMViTConfig(**PICTURE, stem=stem, stem_num_groups=4)).eval()
    pictures = pixels(48, 40)
    model.save_pretrained(tmp_path)
    half = MMViTModel.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    outputs = half(pictures, interpolate_pos_encoding=True)
    assert outputs.pooler_output.dtype == dtype
    assert torch.isfinite(outputs.last_hidden_state).all()
    reference = model(pictures, interpolate_pos_encoding=True).pooler_output
    assert largest_error(outputs.pooler_output.float(), reference) <= (2e-2 if dtype == torch.bfloat16 else 5e-3)
    assert torch.equal(half(pictures.to(dtype), interpolate_pos_encoding=True).pooler_output, outputs.pooler_output)


def test_training_on_float16_weights_is_warned_of(caplog):
    """F18: Adam's eps of 1e-8 is zero in float16."""
    model = MMViTModel(MMViTConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16))
    transformers_logging.warning_once.cache_clear()
    transformers_logging.enable_propagation()
    model.half().eval().train()
    transformers_logging.disable_propagation()
    assert "open the model with dtype=torch.float32" in caplog.text
