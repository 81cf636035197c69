"""CLIP over encoders of transformers: what stands for a picture or a text, saving, joining pretrained ones."""

import pytest
import torch
from contract.cases import pictures
from huggingface_hub.errors import StrictDataclassClassValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    DistilBertConfig,
    GPT2Config,
    ResNetConfig,
    SiglipVisionConfig,
    SwinConfig,
    TokenizersBackend,
    ViTConfig,
    ViTImageProcessorPil,
)

from hf_mm.models.clip.configuration_clip import MMClipConfig, MMClipTextConfig, MMClipVisionConfig
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.clip.processing_clip import MMClipProcessor
from hf_mm.models.vit.configuration_vit import MMViTConfig

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURE = {"image_size": 32, "patch_size": 8}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 40]}
VISION = {
    "clip_vision_model": CLIPVisionConfig(**SMALL, **PICTURE),
    "vit": ViTConfig(**SMALL, **PICTURE),
    "dinov2": Dinov2Config(**SMALL, **PICTURE),
    "siglip_vision_model": SiglipVisionConfig(**SMALL, **PICTURE),
    "swin": SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4),
    "convnext": ConvNextConfig(**STAGES),
    "mm_vit": MMViTConfig(**SMALL, **PICTURE),
    "mm_clip_vision": MMClipVisionConfig(**SMALL, **PICTURE),
    "resnet": ResNetConfig(embedding_size=8, layer_type="basic", **STAGES),
}
WORDS = {"vocab_size": 50, "pad_token_id": 0}
TEXT = {
    "clip_text_model": CLIPTextConfig(**SMALL, **WORDS, bos_token_id=48, eos_token_id=49, max_position_embeddings=16),
    "mm_clip_text": MMClipTextConfig(
        **{**SMALL, **WORDS}, bos_token_id=48, eos_token_id=49, max_position_embeddings=16
    ),
    "bert": BertConfig(**SMALL, **WORDS),
    "distilbert": DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=2, **WORDS),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=50, bos_token_id=1, eos_token_id=2),
}
IDS = torch.tensor([[48, 5, 6, 7, 49], [48, 9, 49, 0, 0], [48, 5, 9, 49, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def clip(vision: str = "dinov2", text: str = "bert", **fields) -> MMClipModel:
    torch.manual_seed(0)
    fields = {"vision_config": VISION[vision], "text_config": TEXT[text], "projection_dim": 24, **fields}
    return MMClipModel(MMClipConfig(**fields)).eval()


def kept_tokens(states: torch.Tensor) -> list[torch.Tensor]:
    return [row[: int(mask.sum())] for row, mask in zip(states, MASK, strict=True)]


@pytest.mark.parametrize("vision", VISION)
def test_pictures_by_the_pooled_output_of_any_encoder(vision):
    model = clip(vision)
    pooled = model.vision_model(PIXELS).pooler_output.flatten(1)
    expected = pooled @ model.visual_projection.weight.T
    torch.testing.assert_close(model.get_image_features(PIXELS).pooler_output, expected)


@pytest.mark.parametrize("vision", VISION)
def test_pictures_by_the_mean_of_their_tokens_or_their_feature_map(vision):
    model = clip(vision, vision_pooling="mean")
    states = model.vision_model(PIXELS).last_hidden_state
    mean = states.mean((2, 3)) if states.ndim == 4 else states.mean(1)
    expected = mean @ model.visual_projection.weight.T
    torch.testing.assert_close(model.get_image_features(PIXELS).pooler_output, expected)


@pytest.mark.parametrize("text", ["mm_clip_text", "bert", "distilbert", "gpt2"])
@pytest.mark.parametrize(
    ("pooling", "of_row"),
    [
        ("cls", lambda tokens: tokens[0]),
        ("mean", lambda tokens: tokens.mean(0)),
        ("last", lambda tokens: tokens[-1]),
    ],
)
def test_texts_without_their_padding(text, pooling, of_row):
    model = clip(text=text, text_pooling=pooling)
    states = model.text_model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    pooled = torch.stack([of_row(tokens) for tokens in kept_tokens(states)])
    features = model.get_text_features(IDS, attention_mask=MASK).pooler_output
    torch.testing.assert_close(features, pooled @ model.text_projection.weight.T)
    alone = model.get_text_features(IDS[1:2, :3], attention_mask=MASK[1:2, :3]).pooler_output
    torch.testing.assert_close(features[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["bert", "clip_text_model", "mm_clip_text"])
def test_texts_by_the_pooled_output_of_any_encoder(text):
    model = clip(text=text)
    pooled = model.text_model(input_ids=IDS, attention_mask=MASK).pooler_output
    features = model.get_text_features(IDS, attention_mask=MASK).pooler_output
    torch.testing.assert_close(features, pooled @ model.text_projection.weight.T)


def test_an_encoder_without_pooled_output_says_so():
    with pytest.raises(ValueError, match="text tower has no pooled output.*text_pooling"):
        clip(text="distilbert").get_text_features(IDS, attention_mask=MASK)


@pytest.mark.parametrize("field", ["vision_pooling", "text_pooling"])
def test_an_unknown_pooling_is_refused(field):
    with pytest.raises(StrictDataclassClassValidationError, match=f"{field} must be one of.*'first'"):
        clip(**{field: "first"})


@pytest.mark.parametrize("pooling", ["pooler", "cls"])
def test_padding_on_the_left_of_a_tower_that_pools_its_first_token_is_refused(pooling):
    with pytest.raises(ValueError, match="padding on the right"):
        clip(text_pooling=pooling).get_text_features(IDS.flip(1), attention_mask=MASK.flip(1))


def test_the_last_token_is_found_behind_padding_on_the_left():
    """No causal tower minds what stands before its text, once positions are given."""
    model = clip(text="gpt2", text_pooling="last")
    ids, mask = IDS.clone(), MASK.flip(1)
    for row, kept in enumerate(MASK.sum(1)):
        ids[row] = torch.cat([IDS[row, kept:], IDS[row, :kept]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    left = model.get_text_features(ids, attention_mask=mask, position_ids=positions).pooler_output
    right = model.get_text_features(IDS, attention_mask=MASK).pooler_output
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_a_config_that_is_no_encoder_is_refused():
    with pytest.raises(ValueError, match="clip has neither hidden_size nor hidden_sizes"):
        MMClipModel(MMClipConfig(vision_config=CLIPConfig(), text_config=TEXT["bert"]))


def test_positions_of_another_tower_are_refused():
    with pytest.raises(ValueError, match="pooling_positions.*text_pooling"):
        clip().get_text_features(IDS, attention_mask=MASK, pooling_positions=torch.tensor([1, 1, 1]))


UNREAD = {  # what their own pooled output alone reads, and cannot be built without
    "clip_vision_model": "vision_model.post_layernorm.",
    "siglip_vision_model": "vision_model.head.",
    "convnext": "vision_model.layernorm.",
    "mm_clip_vision": "vision_model.post_layernorm.",
}


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_every_parameter_trains(vision, pooling):
    """A pooling layer that nothing reads would have no gradient, which stops a run on several processes."""
    model = clip(vision, vision_pooling=pooling, text_pooling="cls").train()
    model(input_ids=IDS, attention_mask=MASK, pixel_values=PIXELS).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    unread = UNREAD.get(vision, "mask_token") if pooling == "mean" else "mask_token"
    assert all(unread in name or name.endswith("mask_token") for name in without), without


@pytest.mark.parametrize(("vision", "text"), [("dinov2", "bert"), ("convnext", "gpt2"), ("vit", "distilbert")])
def test_what_is_saved_opens_with_the_same_answers(vision, text, tmp_path):
    model = clip(vision, text, text_pooling="mean", vision_pooling="mean")
    model.save_pretrained(tmp_path)
    opened, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(opened.vision_model) is type(model.vision_model)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "pixel_values": PIXELS}
    assert torch.equal(opened(**inputs).logits_per_image, model(**inputs).logits_per_image)


def test_half_precision_takes_the_processors_pictures():
    model = clip().to(torch.bfloat16)
    assert model.get_image_features(PIXELS).pooler_output.dtype == torch.bfloat16


@pytest.mark.parametrize("text_pooling", ["pooler", "cls"])
def test_two_pretrained_encoders_are_joined(tmp_path, text_pooling):
    vision, text = AutoModel.from_config(VISION["dinov2"]), AutoModel.from_config(TEXT["bert"])
    vision.save_pretrained(tmp_path / "vision")
    text.save_pretrained(tmp_path / "text")
    model = MMClipModel.from_vision_text_pretrained(
        str(tmp_path / "vision"), str(tmp_path / "text"), projection_dim=24, text_pooling=text_pooling
    )
    assert not model.training
    for tower, source in ((model.vision_model, vision), (model.text_model, text)):
        weights = source.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in tower.state_dict().items())
    assert ("pooler.dense.weight" in model.text_model.state_dict()) is (text_pooling == "pooler")


def test_the_tower_of_a_whole_model_is_taken(tmp_path):
    whole = AutoModel.from_config(
        CLIPConfig(text_config=TEXT["clip_text_model"], vision_config=VISION["clip_vision_model"], projection_dim=8)
    )
    whole.save_pretrained(tmp_path)
    model = MMClipModel.from_vision_text_pretrained(str(tmp_path), str(tmp_path), projection_dim=24)
    name = "encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(model.vision_model.get_parameter(name), whole.vision_model.get_parameter(name))
    assert torch.equal(model.text_model.get_parameter(name), whole.text_model.get_parameter(name))


@pytest.fixture
def processor() -> MMClipProcessor:
    words = ["[PAD]", "[UNK]", *["a", "red", "blue", "square", "circle", "and", "line"]]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = TokenizersBackend(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=6)
    return MMClipProcessor(ViTImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)


def test_a_processor_of_their_parts_prepares_for_it_and_opens_again(processor, tmp_path):
    texts = ["a red square", "a blue circle and a red line and a blue square"]
    batch = processor(images=pictures(2), text=texts)
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].sum(1).tolist() == [3, 6]
    model = clip("vit", "bert")
    logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}).logits_per_image
    assert logits.shape == (2, 2)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    opened = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(opened, MMClipProcessor)
    again = opened(images=pictures(2), text=texts)
    assert all(torch.equal(again[name], value) for name, value in batch.items())


def test_lengths_of_two_towers_do_not_matter_to_the_loss():
    """The loss of CLIP over the embeddings of both encoders, written out."""
    model = clip("swin", "gpt2", text_pooling="last")
    outputs = model(input_ids=IDS, attention_mask=MASK, pixel_values=PIXELS)
    image = nn.functional.normalize(model.get_image_features(PIXELS).pooler_output, dim=1)
    text = nn.functional.normalize(model.get_text_features(IDS, attention_mask=MASK).pooler_output, dim=1)
    logits = model.logit_scale.exp() * image @ text.T
    expected = -(logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()).mean() / 2
    torch.testing.assert_close(outputs.loss, expected)
