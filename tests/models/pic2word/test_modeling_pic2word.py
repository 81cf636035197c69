"""Pic2Word against the paper's equations, the published code's way of inserting the word, and any CLIP underneath."""

import copy
import math
import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import (
    AlignConfig,
    AltCLIPConfig,
    AutoModel,
    BertConfig,
    ChineseCLIPConfig,
    CLIPConfig,
    CLIPTextConfig,
    GPT2Config,
    MetaClip2Config,
    SiglipConfig,
    VisionTextDualEncoderConfig,
    ViTConfig,
)

from hf_mm.models.clip.configuration_clip import MMClipConfig, MMClipResNetConfig
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.pic2word.configuration_pic2word import Pic2WordMapperConfig
from hf_mm.models.pic2word.modeling_pic2word import Pic2WordMapper, Pic2WordModel

STAR, START, END, PAD = 5, 48, 49, 49
FREE = 30  # ids from here on stand in no text
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURE = {**SMALL, "hidden_size": 40, "image_size": 32, "patch_size": 8}
SPECIALS = {"vocab_size": 50, "bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
TEXT = {**SMALL, **SPECIALS, "max_position_embeddings": 12}
BERT = {**SMALL, "vocab_size": 50, "pad_token_id": PAD, "max_position_embeddings": 16}
ROBERTA = {**SMALL, "vocab_size": 50, "pad_token_id": 1, "max_position_embeddings": 16, "project_dim": 24}
DUALS = {
    "mm_clip": MMClipConfig(vision_config=PICTURE, text_config=TEXT, projection_dim=24),
    "mm_clip over a ResNet": MMClipConfig(
        vision_config=MMClipResNetConfig(
            depths=(1, 1, 1, 1), width=8, num_attention_heads=4, image_size=32, projection_dim=24
        ),
        text_config=TEXT,
        projection_dim=24,
    ),
    "mm_clip over bert, mean": MMClipConfig(
        vision_config=PICTURE, text_config=BertConfig(**BERT), text_pooling="mean", projection_dim=24
    ),
    "mm_clip over bert, cls": MMClipConfig(
        vision_config=PICTURE, text_config=BertConfig(**BERT), text_pooling="cls", projection_dim=24
    ),
    "mm_clip over gpt2, last": MMClipConfig(
        vision_config=PICTURE,
        text_config=GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=50),
        text_pooling="last",
        projection_dim=24,
    ),
    "mm_clip over transformers' text tower": MMClipConfig(
        vision_config=PICTURE, text_config=CLIPTextConfig(**TEXT), projection_dim=24
    ),
    "clip": CLIPConfig(text_config=TEXT, vision_config=PICTURE, projection_dim=24),
    "clip of old": CLIPConfig(text_config={**TEXT, "eos_token_id": 2}, vision_config=PICTURE, projection_dim=24),
    "siglip": SiglipConfig(text_config=TEXT, vision_config={**PICTURE, "hidden_size": 32}),
    "chinese_clip": ChineseCLIPConfig(text_config=BERT, vision_config=PICTURE, projection_dim=24),
    "altclip": AltCLIPConfig(text_config=ROBERTA, vision_config=PICTURE, projection_dim=24),
    "metaclip_2": MetaClip2Config(text_config=TEXT, vision_config=PICTURE, projection_dim=24),
    "vision-text-dual-encoder": VisionTextDualEncoderConfig(
        vision_config=ViTConfig(**PICTURE).to_dict(), text_config=BertConfig(**BERT).to_dict(), projection_dim=24
    ),
}
# "a photo of *", "* by a *, * too", "* *", and placeholders in the places of four texts with none, one, two in a row
IDS = torch.tensor(
    [
        [START, 1, 2, 3, STAR, END, PAD, PAD, PAD],
        [START, STAR, 7, 2, STAR, 8, STAR, 9, END],
        [START, STAR, STAR, END, PAD, PAD, PAD, PAD, PAD],
    ]
)
MASK = torch.tensor([[1] * 6 + [0] * 3, [1] * 9, [1] * 4 + [0] * 5])
PLACES = IDS == STAR
PIXELS = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
PROMPT = torch.tensor([[START, 1, 2, 3, STAR, END]])


def dual_encoder(name: str = "mm_clip"):
    """A tiny one, no weight or bias of which is zero or one."""
    torch.manual_seed(0)
    dual = AutoModel.from_config(DUALS[name])
    for parameter in dual.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return dual.eval()


def pic2word(name: str = "mm_clip", **fields) -> Pic2WordModel:
    dual = dual_encoder(name)
    torch.manual_seed(1)
    return Pic2WordModel.from_clip_pretrained(
        dual, **{"placeholder_token_id": STAR, "hidden_dim": 20, **fields}
    ).eval()


def words_by_hand(model: Pic2WordModel, features: torch.Tensor) -> torch.Tensor:
    """Section 3.1: Linear and ReLU twice, and Linear."""
    weights = model.mapper.state_dict(keep_vars=True)
    for layer in range(model.config.mapper_config.num_hidden_layers):
        features = torch.relu(features @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"])
    return features @ weights["fc_out.weight"].T + weights["fc_out.bias"]


def texts_by_table(dual, ids, words, places, mask):
    """The encoder as it is, for texts of ids: each word becomes the row of an id that no text holds."""
    dual, ids = copy.deepcopy(dual), ids.clone()
    ids[places] = FREE + torch.arange(len(words))
    with torch.no_grad():
        dual.text_model.get_input_embeddings().weight[FREE : FREE + len(words)] = words
        return dual.get_text_features(input_ids=ids, attention_mask=mask).pooler_output


def assert_within(ours: torch.Tensor, reference: torch.Tensor, relative: float):
    assert ours.shape == reference.shape
    worst = (ours - reference).abs().max() / reference.abs().max()
    assert worst <= relative, f"relative error {worst:.1e}"


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("padding", [1, 5], ids=["one pad", "five"])
def test_replacing_the_placeholder_is_inserting_the_word_before_the_end(padding):
    """The published training path: ids of "a photo of", the word put where the end token stands, the rest moved right,
    the last pad dropped, pooled one position later."""
    model = pic2word()
    features = model.vision_features(PIXELS)
    words = words_by_hand(model, features)
    plain = torch.tensor([[START, 1, 2, 3, END] + [PAD] * padding] * 6)
    table = model.clip.text_model.get_input_embeddings()
    with torch.no_grad():
        embeds = table(plain)
        inserted = torch.cat([embeds[:, :4], words[:, None], embeds[:, 4:-1]], dim=1)
        # What stands behind the end token is seen by none: this package leaves it out, and sums in the same order.
        published = model.clip.get_text_features(
            inputs_embeds=inserted[:, :6], pooling_positions=torch.full((6,), 5)
        ).pooler_output
    replaced = torch.tensor([[START, 1, 2, 3, STAR, END] + [PAD] * (padding - 1)] * 6)
    composed = model.get_composed_features(replaced, vision_features=features).pooler_output
    assert (composed - published).abs().max() == 0.0


def test_the_published_mapper_has_as_many_parameters():
    """Section 2.2 over ViT-L/14."""
    with torch.device("meta"):
        mapper = Pic2WordMapper(Pic2WordMapperConfig())
    assert sum(parameter.numel() for parameter in mapper.parameters()) == 1_050_368
    assert {name: tuple(weight.shape) for name, weight in mapper.state_dict().items()} == {
        "layers.0.weight": (512, 768),
        "layers.0.bias": (512,),
        "layers.1.weight": (512, 512),
        "layers.1.bias": (512,),
        "fc_out.weight": (768, 512),
        "fc_out.bias": (768,),
    }


def test_the_mapper_begins_as_torch_makes_a_linear_layer():
    """Uniform within fan_in^-1/2, weights and biases."""
    mapper = Pic2WordMapper(Pic2WordMapperConfig())
    for layer in (*mapper.layers, mapper.fc_out):
        bound = layer.in_features**-0.5
        for tensor, tolerance in ((layer.weight, 0.01), (layer.bias, 0.1)):
            assert tensor.abs().max() <= bound
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=tolerance)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_mapper_is_the_equation(layers):
    model = pic2word(num_hidden_layers=layers).double()
    features = torch.randn(7, 24, dtype=torch.float64)
    assert_within(model.mapper(features).pseudo_words, words_by_hand(model, features), 1e-12)
    assert torch.equal(model.mapper(features, return_dict=False)[0], model.mapper(features).pseudo_words)


def test_dropout_keeps_the_mean_of_a_hidden_layer_and_acts_in_training_alone():
    """Dropout before a ReLU commutes with it, so the mean over draws of one hidden layer's mapper is that without."""
    mapper = Pic2WordMapper(Pic2WordMapperConfig(image_dim=8, hidden_dim=16, word_dim=4, num_hidden_layers=1)).eval()
    features = torch.randn(1, 8).expand(20_000, 8)
    kept = mapper(features).pseudo_words
    assert (kept == kept[0]).all()
    drawn = mapper.train()(features).pseudo_words
    spread = drawn.std(dim=0)
    assert (spread > 0).all()
    assert ((drawn.mean(dim=0) - kept[0]).abs() < 5 * spread / math.sqrt(20_000)).all()
    hidden = torch.relu(features[:1] @ mapper.layers[0].weight.T + mapper.layers[0].bias)
    variance = ((hidden * mapper.fc_out.weight) ** 2).sum(dim=1) * 0.1 / 0.9
    torch.testing.assert_close(spread**2, variance, rtol=0.1, atol=0)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
@pytest.mark.parametrize("ours", [True, False], ids=["over ours", "over theirs"])
def test_parity_with_transformers_clip_and_a_hook(ours, dtype, relative, tmp_path):
    """Features, loss and the gradients of the mapping network by transformers' own CLIP."""
    theirs = dual_encoder("clip")
    theirs.save_pretrained(tmp_path)
    base = MMClipModel.from_pretrained(tmp_path) if ours else theirs
    model = Pic2WordModel.from_clip_pretrained(copy.deepcopy(base), placeholder_token_id=STAR, hidden_dim=20).to(dtype)
    model.eval()
    assert type(model.clip) is (MMClipModel if ours else type(theirs))
    theirs, pixels, ids = theirs.to(dtype), PIXELS.to(dtype), PROMPT.repeat(6, 1)

    with torch.no_grad():
        features = theirs.get_image_features(pixel_values=pixels).pooler_output
    words = words_by_hand(model, features)

    def put(module, args, embeds):
        return torch.where((args[0] == STAR)[..., None], words[:, None], embeds)

    hook = theirs.text_model.embeddings.token_embedding.register_forward_hook(put)
    queries = theirs.get_text_features(input_ids=ids).pooler_output
    hook.remove()
    logits = theirs.logit_scale.exp() * unit(features) @ unit(queries).T
    targets = torch.arange(6)
    loss = (nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.T, targets)) / 2
    gradients = torch.autograd.grad(loss, list(model.mapper.parameters()))

    out = model(input_ids=ids, pixel_values=pixels)
    assert_within(model.get_image_features(pixels).pooler_output, features, relative)
    assert_within(model.get_composed_features(ids, pixels).pooler_output, queries, relative)
    assert_within(
        model.get_text_features(ids).pooler_output, theirs.get_text_features(input_ids=ids).pooler_output, relative
    )
    assert_within(out.pseudo_words, words, relative)
    assert_within(out.image_embeds, unit(features), relative)
    assert_within(out.composed_embeds, unit(queries), relative)
    assert_within(out.logits_per_image, logits, relative)
    assert torch.equal(out.logits_per_text, out.logits_per_image.T)
    assert_within(out.loss, loss, relative)
    out.loss.backward()
    for parameter, gradient in zip(model.mapper.parameters(), gradients, strict=True):
        assert_within(parameter.grad, gradient, 10 * relative)


@pytest.mark.parametrize("name", DUALS)
def test_words_stand_in_their_own_places_over_any_dual_encoder(name):
    """Several pictures a text, at positions of each row's own: as if each word were a row of the table."""
    model = pic2word(name).double()
    pixels = PIXELS.double()
    features = model.get_image_features(pixels).pooler_output
    assert torch.equal(features, model.clip.get_image_features(pixel_values=pixels).pooler_output)
    assert torch.equal(features, model.vision_features(pixels))
    words = words_by_hand(model, features)
    expected = texts_by_table(model.clip, IDS, words, PLACES, MASK)
    composed = model.get_composed_features(IDS, pixels, attention_mask=MASK)
    assert_within(composed.pooler_output, expected, 1e-9)
    given = model.get_composed_features(IDS, vision_features=features, attention_mask=MASK, placeholder_mask=PLACES)
    assert torch.equal(given.pooler_output, composed.pooler_output)
    out = model(IDS, pixels, attention_mask=MASK)
    assert out.loss is None
    assert_within(out.composed_embeds, unit(expected), 1e-9)
    assert_within(out.image_embeds, unit(features), 1e-9)
    plain = model.clip.get_text_features(input_ids=IDS, attention_mask=MASK).pooler_output
    assert torch.equal(model.get_text_features(IDS, MASK).pooler_output, plain)
    assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", DUALS)
def test_the_loss_is_that_of_the_cosines(name):
    """Equation 3 with the encoder's own frozen scale; a bias, as SigLIP has, is the same for all and falls out."""
    model = pic2word(name, dropout=0.0).double().train()
    ids, mask = PROMPT.repeat(6, 1), torch.ones(6, 6, dtype=torch.long)
    pixels = PIXELS.double()
    out = model(ids, pixels, attention_mask=mask)
    words = words_by_hand(model, model.vision_features(pixels))
    queries = unit(texts_by_table(model.clip, ids, words, ids == STAR, mask))
    logits = model.clip.logit_scale.exp() * unit(model.vision_features(pixels)) @ queries.T
    loss = -(logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()).mean() / 2
    assert out.loss.shape == ()
    assert_within(out.loss, loss, 1e-9)
    out.loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.mapper.parameters())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.clip.parameters())


def test_every_picture_reaches_its_own_text_at_its_own_place_and_no_other():
    """F31: no picture's word is left out."""
    model = pic2word()
    out = model(IDS, PIXELS)
    out.pseudo_words.retain_grad()
    rows = [0, 1, 1, 1, 2, 2]
    for text in range(3):
        out.pseudo_words.grad = None
        out.composed_embeds[text, 0].backward(retain_graph=True)
        for picture, row in enumerate(rows):
            assert bool(out.pseudo_words.grad[picture].abs().max() > 1e-6) == (row == text)


def test_swapped_pictures_change_their_text_alone():
    model = pic2word()
    order = torch.tensor([0, 1, 3, 2, 4, 5])
    before, after = (model.get_composed_features(IDS, pixels).pooler_output for pixels in (PIXELS, PIXELS[order]))
    changed = (before - after).abs().amax(dim=1)
    assert changed[1] > 1e-3
    assert changed[[0, 2]].max() < 1e-6


def test_permuted_rows_are_permuted_texts():
    model = pic2word()
    expected = model.get_composed_features(IDS, PIXELS).pooler_output[[2, 0, 1]]
    permuted = model.get_composed_features(IDS[[2, 0, 1]], PIXELS[[4, 5, 0, 1, 2, 3]]).pooler_output
    assert_within(permuted, expected, 1e-6)


@pytest.mark.parametrize("name", ["mm_clip", "clip", "siglip", "altclip", "mm_clip over bert, mean"])
def test_a_batch_is_its_texts_one_by_one(name):
    model = pic2word(name)
    together = model.get_composed_features(IDS, PIXELS, attention_mask=MASK).pooler_output
    first = 0
    for row, (ids, mask) in enumerate(zip(IDS, MASK, strict=True)):
        number = int((ids == STAR).sum())
        # SigLIP pools the last position and sees its padding: there the whole row is the text.
        length = len(ids) if name == "siglip" else int(mask.sum())
        alone = model.get_composed_features(
            ids[None, :length], PIXELS[first : first + number], attention_mask=mask[None, :length]
        )
        assert_within(alone.pooler_output, together[row : row + 1], 1e-5)
        first += number


def test_a_literal_star_stays_a_word():
    """A caption's own star keeps its table row where the mask leaves it out."""
    model = pic2word().double()
    ids = torch.tensor([[START, STAR, 3, STAR, 4, STAR, END]])
    features = model.vision_features(PIXELS[:1].double())
    words = words_by_hand(model, features)
    outputs = []
    for place in (1, 3, 5):
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[0, place] = True
        outputs.append(model.get_composed_features(ids, vision_features=features, placeholder_mask=mask).pooler_output)
        assert_within(outputs[-1], texts_by_table(model.clip, ids, words, mask, None), 1e-9)
    assert min((outputs[0] - outputs[1]).abs().max(), (outputs[1] - outputs[2]).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32])
def test_masks_and_ids_of_any_whole_type(dtype):
    model = pic2word()
    expected = model.get_composed_features(IDS, PIXELS).pooler_output
    ours = model.get_composed_features(
        IDS.int(), PIXELS, placeholder_mask=PLACES.to(dtype), attention_mask=MASK.bool()
    )
    assert_within(ours.pooler_output, expected, 1e-6)


REFUSED = {
    "neither": ({}, "pixel_values"),
    "both": ({"pixel_values": PIXELS, "vision_features": torch.zeros(6, 24)}, "vision_features"),
    "fewer pictures": ({"pixel_values": PIXELS[:5]}, "6.*5|5.*6"),
    "more pictures": ({"vision_features": torch.zeros(7, 24)}, "6.*7|7.*6"),
    "mask of another shape": ({"pixel_values": PIXELS, "placeholder_mask": PLACES[:, :-1]}, "placeholder_mask"),
    "mask of other rows": ({"pixel_values": PIXELS, "placeholder_mask": PLACES[:2]}, "placeholder_mask"),
    "features of another width": ({"vision_features": torch.zeros(6, 25)}, "25"),
    "features of one picture, no matrix": ({"vision_features": torch.zeros(24)}, "24"),
    "a row without": (
        {"pixel_values": PIXELS[:5], "placeholder_mask": PLACES & torch.tensor([[False], [True], [True]])},
        "row 0|[Rr]ow 0|text 0",
    ),
}


@pytest.mark.parametrize(("inputs", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("name", ["mm_clip", "clip"])
def test_what_does_not_match_is_refused(name, inputs, message):
    model = pic2word(name)
    for call in (model.get_composed_features, model):
        with pytest.raises(ValueError, match=message) as refused:
            call(input_ids=IDS, **inputs)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "place", [(0, 5), (0, 7)], ids=["the end token, where the text is pooled", "behind it, where nothing looks"]
)
@pytest.mark.parametrize("name", ["mm_clip", "clip"])
def test_a_picture_that_would_be_lost_is_refused(name, place):
    """F31: a word where no token is looked at influences nothing."""
    places = torch.zeros_like(PLACES)
    places[place] = places[1, 1] = places[2, 1] = True
    with pytest.raises(ValueError, match="placeholder"):
        pic2word(name).get_composed_features(IDS, PIXELS[:3], attention_mask=MASK, placeholder_mask=places)


def test_texts_without_end_and_padded_on_the_left_are_refused():
    model = pic2word()
    with pytest.raises(ValueError, match="end token"):
        model.get_composed_features(torch.tensor([[START, 1, STAR, 3]]), PIXELS[:1])
    with pytest.raises(ValueError, match="right"):
        model.get_composed_features(torch.tensor([[PAD, START, 1, STAR, END]]), PIXELS[:1])


def test_pairs_in_training():
    model = pic2word()
    ids = PROMPT.repeat(6, 1)
    assert model(ids, PIXELS).loss is not None
    assert model(ids, PIXELS, return_loss=False).loss is None
    assert model.train()(ids, PIXELS, return_loss=False).loss is None
    with pytest.raises(ValueError, match="6 pictures and 3 texts"):
        model(IDS, PIXELS)


def test_pictures_with_equal_ids_are_no_negatives():
    model = pic2word().double()
    ids, same = PROMPT.repeat(6, 1), torch.tensor([4, 7, 4, 2, 7, 4])
    out = model(ids, PIXELS.double(), image_ids=same)
    logits = out.logits_per_image
    wrong = (same[:, None] == same) & ~torch.eye(6, dtype=torch.bool)
    logits = logits.masked_fill(wrong, -math.inf)
    loss = -(logits.log_softmax(0).diagonal() + logits.log_softmax(1).diagonal()).mean() / 2
    assert_within(out.loss, loss, 1e-12)
    assert model(ids, PIXELS.double(), image_ids=torch.zeros(6, dtype=torch.long)).loss == 0.0


def test_features_in_place_of_pixels_are_bit_equal_in_training():
    model = pic2word().train()
    features = model.vision_features(PIXELS)
    assert not features.requires_grad
    gradients = []
    for inputs in ({"pixel_values": PIXELS}, {"vision_features": features}):
        torch.manual_seed(3)
        model.zero_grad()
        out = model(PROMPT.repeat(6, 1), **inputs)
        out.loss.backward()
        gradients.append([out.loss.detach(), *(parameter.grad.clone() for parameter in model.mapper.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_features_are_refused_while_the_picture_tower_trains():
    """They would pass it by: it would never change. A text tower that trains sees every step, and so may they."""
    model = pic2word().train()
    features = model.vision_features(PIXELS)
    ids = PROMPT.repeat(6, 1)
    model.clip.text_model.requires_grad_(True)
    model(ids, vision_features=features).loss.backward()
    model.clip.vision_model.requires_grad_(True)
    for call in (model, model.get_composed_features):
        with pytest.raises(ValueError, match="the picture tower trains, .*: give pixel_values"):
            call(ids, vision_features=features)
    model(ids, PIXELS).loss.backward()
    assert model.eval()(ids, vision_features=features).composed_embeds.shape == (6, 24)


def test_features_are_refused_beside_adapters_of_the_picture_tower():
    model = pic2word()
    features = model.vision_features(PIXELS)
    inject_adapter_in_model(LoraConfig(target_modules=r".*vision_model.*\.q_proj"), model.clip)
    model.train()
    with pytest.raises(ValueError, match="by adapters"):
        model(PROMPT.repeat(6, 1), vision_features=features)


@pytest.mark.parametrize("config", [BertConfig(**BERT), AlignConfig(text_config=BERT)], ids=["bert", "align"])
def test_a_base_that_is_no_dual_encoder_is_refused(config):
    with torch.device("meta"):
        base = AutoModel.from_config(config)
    with pytest.raises(ValueError, match=rf"the model given is a {type(base).__name__}, which is no dual encoder"):
        Pic2WordModel.from_clip_pretrained(base)


def test_training_moves_the_mapper_alone():
    model = pic2word().train()
    frozen = {name: tensor.clone() for name, tensor in model.clip.state_dict().items()}
    trained = {name: tensor.clone() for name, tensor in model.mapper.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(40):
        loss = model(PROMPT.repeat(6, 1), PIXELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.clip.state_dict()[name], tensor) for name, tensor in frozen.items())
    assert not any(torch.equal(model.mapper.state_dict()[name], tensor) for name, tensor in trained.items())


@pytest.mark.parametrize("name", ["mm_clip", "clip", "siglip"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_frozen_clip_in_half_precision_under_a_mapper_in_float32(name, dtype):
    """Memory of half, training of whole: outputs near those of float32, gradients float32 and finite."""
    whole = pic2word(name, dropout=0.0)
    model = copy.deepcopy(whole)
    model.clip.to(dtype)
    ids, mask = PROMPT.repeat(6, 1), torch.ones(6, 6, dtype=torch.long)
    reference = whole(ids, PIXELS, attention_mask=mask)
    model.train()
    out = model(ids, PIXELS, attention_mask=mask)
    assert out.logits_per_image.dtype == out.loss.dtype == torch.float32
    assert_within(out.composed_embeds.float(), reference.composed_embeds, 5e-2)
    out.loss.backward()
    for parameter in model.mapper.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0
    assert_within(model.get_composed_features(ids, PIXELS, mask).pooler_output.float(), reference_of(whole, ids), 5e-2)


def reference_of(model, ids):
    return model.get_composed_features(ids, PIXELS).pooler_output


def test_opened_again_it_is_the_same(tmp_path):
    model = pic2word()
    model.save_pretrained(tmp_path)
    reopened = AutoModel.from_pretrained(tmp_path)
    assert type(reopened) is Pic2WordModel
    assert torch.equal(reopened(IDS, PIXELS).composed_embeds, model(IDS, PIXELS).composed_embeds)
    assert not any(parameter.requires_grad for parameter in reopened.clip.parameters())
    assert all(parameter.requires_grad for parameter in reopened.mapper.parameters())
    model.mapper.save_pretrained(tmp_path / "mapper")
    mapper = AutoModel.from_pretrained(tmp_path / "mapper")
    assert type(mapper) is Pic2WordMapper
    features = model.vision_features(PIXELS)
    assert torch.equal(mapper(features).pseudo_words, model.mapper(features).pseudo_words)


def test_tuples_on_request():
    model = pic2word()
    out = model(PROMPT, PIXELS[:1])
    as_tuple = model(PROMPT, PIXELS[:1], return_dict=False)
    assert torch.equal(as_tuple[0], out.loss)
    assert torch.equal(as_tuple[1], out.logits_per_image)


def on_one_rank(rank: int, folder, ids: torch.Tensor):
    """This rank's half of the batch: our loss's gradient, and those of two schemes with a gather that is none."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        model = pic2word(dropout=0.0).double()
        alone = model(ids[:1], PIXELS[:1].double()).loss if rank == 0 else None  # would wait for ever if it gathered
        model.train()
        own = slice(3 * rank, 3 * rank + 3)
        out = model(ids[own], PIXELS[own].double())
        parameters = list(model.mapper.parameters())
        results = {"ours": (out.loss.detach(), torch.autograd.grad(out.loss, parameters, retain_graph=True))}
        for scheme in ("published", "local loss"):
            everything = []
            for rows in (out.image_embeds, out.composed_embeds):
                parts = [torch.empty_like(rows) for _ in range(2)]
                dist.all_gather(parts, rows.detach().contiguous())
                parts[rank] = rows
                everything.append(torch.cat(parts))
            if scheme == "local loss":
                everything = [rows.detach() for rows in everything]
            images, texts = everything
            scale = model.clip.logit_scale.exp()
            if scheme == "published":
                logits, back = scale * images @ texts.T, scale * texts @ images.T
                targets = torch.arange(6)
            else:
                logits, back = scale * out.image_embeds @ texts.T, scale * out.composed_embeds @ images.T
                targets = torch.arange(6)[own]
            loss = (nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(back, targets)) / 2
            results[scheme] = (loss.detach(), torch.autograd.grad(loss, parameters, retain_graph=True))
        torch.save({**results, "alone": alone}, folder / f"{rank}.pt")
        dist.barrier()
    except Exception:
        (folder / f"{rank}.error").write_text(traceback.format_exc())


def test_two_processes_equal_one_and_the_biased_gathers_do_not(tmp_path):
    """The mean over ranks is the gradient of one batch; the published scheme's is half of it, a local loss without
    gradients through the gather another."""
    ids = PROMPT.repeat(6, 1)
    ranks = [
        multiprocessing.get_context("fork").Process(target=on_one_rank, args=(rank, tmp_path, ids))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        if process.is_alive():
            process.kill()
    errors = [path.read_text() for path in tmp_path.glob("*.error")]
    assert not errors, errors
    answers = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    model = pic2word(dropout=0.0).double()
    model.train()
    loss = model(ids, PIXELS.double()).loss
    expected = torch.autograd.grad(loss, list(model.mapper.parameters()))
    means = {
        scheme: [torch.stack(parts).mean(0) for parts in zip(*(answer[scheme][1] for answer in answers), strict=True)]
        for scheme in ("ours", "published", "local loss")
    }
    assert_within(torch.stack([answer["ours"][0] for answer in answers]).mean(), loss.detach(), 1e-12)
    for ours, reference in zip(means["ours"], expected, strict=True):
        assert_within(ours, reference, 1e-10)
    for published, reference in zip(means["published"], expected, strict=True):
        assert_within(2 * published, reference, 1e-10)
    worst = max(
        (local - reference).abs().max() / reference.abs().max()
        for local, reference in zip(means["local loss"], expected, strict=True)
    )
    assert worst > 0.05
    assert answers[0]["alone"] == 0.0
