"""Row 12: what a user is likely to get wrong is refused in one sentence."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from .cases import JOINT, all_configs, cases_for, vocabulary

EVERY = pytest.mark.parametrize("case", cases_for(12), ids=str)
CALLS = [(case, bad) for case in cases_for(12) for bad in case.bad_calls]


def tower_configs(config) -> list:
    """Of Transformer towers of ours; the ResNet's own wrong fields are in its own tests."""
    towers = [own for own in all_configs(config) if own.model_type.startswith("mm_") and hasattr(own, "hidden_act")]
    return [tower for tower in towers if tower.model_type != "mm_clip"]


WITH_TRANSFORMER = pytest.mark.parametrize(
    "case", cases_for(12, lambda case: bool(tower_configs(case.config()))), ids=str
)


def patched_configs(config) -> list:
    """Of such towers that cut pictures into patches."""
    return [own for own in tower_configs(config) if hasattr(own, "patch_size")]


WITH_PATCHES = pytest.mark.parametrize(
    "case", cases_for(12, lambda case: bool(patched_configs(case.config()))), ids=str
)


def one_sentence(error: BaseException) -> bool:
    text = str(error)
    return text.endswith(".") and "\n" not in text


@pytest.mark.parametrize(("case", "bad"), CALLS, ids=[f"{case}: {bad.name}" for case, bad in CALLS])
def test_a_wrong_call_is_refused_in_one_sentence(case, bad):
    """F15 where ids run beyond the context: both lengths are named."""
    with pytest.raises(ValueError, match=bad.message) as refusal:
        bad.call(case.build(), case.batch(3))
    assert one_sentence(refusal.value)


@WITH_TRANSFORMER
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_size": 50, "num_attention_heads": 4}, r"hidden_size \(50\).*num_attention_heads \(4\)"),
        ({"num_attention_heads": -1}, "num_attention_heads.*-1"),
        ({"hidden_act": "gleu"}, "hidden_act.*gleu"),
        ({"hidden_size": "48"}, "hidden_size"),
    ],
    ids=["heads do not divide", "negative heads", "unknown activation", "not a number"],
)
def test_a_config_no_model_can_be_built_from_is_refused(case, wrong, message):
    for config in tower_configs(case.config()):
        with pytest.raises(StrictDataclassError, match=message):
            type(config)(**{**config.to_dict(), **wrong})


@WITH_PATCHES
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 30}, r"image_size \(30\).*patch_size \(8\)"),
        ({"image_size": (32, 30)}, r"image_size.*patch_size \(8\)"),
        ({"patch_size": 5}, r"patch_size \(5\)"),
        ({"pos_embed_interpolation": "nearest"}, "pos_embed_interpolation.*bilinear_corners.*'nearest'"),
    ],
    ids=["size", "height alone fits", "patch", "unknown interpolation"],
)
def test_patches_that_do_not_tile_are_refused(case, wrong, message):
    for config in patched_configs(case.config()):
        fields = {**config.to_dict(), "stem": "patch", **wrong}
        with pytest.raises(StrictDataclassError, match=message):
            type(config)(**fields)


@pytest.mark.parametrize("case", cases_for(12, lambda case: case.model_type == "pic2word"), ids=str)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mapper_config": {"image_dim": JOINT + 1}}, rf"image_dim is {JOINT + 1}.*{JOINT}.*another CLIP"),
        ({"mapper_config": {"word_dim": 8}}, r"word_dim is 8.*32.*another CLIP"),
        ({"mapper_config": {"num_hidden_layers": 0}}, "num_hidden_layers.*0"),
        ({"mapper_config": {"dropout": 1.0}}, "dropout.*1.0"),
        ({"placeholder_token_id": 49_407}, rf"placeholder_token_id.*49407.*{vocabulary()['vocab_size']}"),
        ({"placeholder_token_id": -1}, "placeholder_token_id.*-1"),
    ],
    ids=["another joint space", "another text tower", "no layer", "all dropped", "beyond the vocabulary", "negative"],
)
def test_a_connector_that_does_not_fit_is_refused(case, wrong, message):
    fields = case.config().to_dict()
    with pytest.raises(StrictDataclassError, match=message):
        type(case.config())(**{**fields, **wrong})


@EVERY
def test_a_folder_that_is_no_checkpoint_is_refused(case, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(OSError, match=str(tmp_path)):
        case.model_class.from_pretrained(tmp_path)


@EVERY
def test_a_folder_without_weights_is_refused(case, tmp_path):
    case.config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=f"(?s)model.safetensors.*{tmp_path}"):
        case.model_class.from_pretrained(tmp_path)


@EVERY
def test_a_truncated_file_is_refused(case, tmp_path):
    case.build().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for kept in (len(whole) - 4, len(whole) // 2, 6, 0):
        weights.write_bytes(whole[:kept])
        with pytest.raises(Exception, match="(?i)safetensors|header|incomplete|metadata"):
            case.model_class.from_pretrained(tmp_path)


@WITH_TRANSFORMER
def test_weights_of_another_shape_are_refused_and_reported(case, tmp_path, caplog):
    case.build().save_pretrained(tmp_path)
    larger = case.config()
    for config in tower_configs(larger):
        config.intermediate_size += 8
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        case.model_class.from_pretrained(tmp_path, config=larger)
    assert "mlp.fc1.weight" in caplog.text and "MISMATCH" in caplog.text


@EVERY
def test_a_refused_call_leaves_the_model_as_it_was(case):
    model, batch = case.build(), case.batch(3)
    before = case.read(model(**batch), batch)
    for bad in case.bad_calls:
        with pytest.raises(ValueError):
            bad.call(model, case.batch(3))
    after = case.read(model.eval()(**batch), batch)
    assert all(torch.equal(after[name], value) for name, value in before.items())
