import json

import pytest
import torch
from contract.cases import PICTURE, clip_config, largest_error
from contract.oracles import clip_oracle, clip_text_oracle, clip_vision_oracle
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModel, CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionModel

from hf_mm.losses.contrastive import image_text_contrastive_loss
from hf_mm.models.clip.configuration_clip import MMClipConfig, MMClipTextConfig, MMClipVisionConfig
from hf_mm.models.clip.modeling_clip import MMClipModel, MMClipTextModel, MMClipVisionModel
from hf_mm.nn.positions import INTERPOLATIONS, resize_position_table

START, END = 62, 63
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": END,
}


def perturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_clip(vision=(), text=(), **config) -> MMClipModel:
    torch.manual_seed(0)
    fields = {
        "vision_config": {**PICTURE, **dict(vision)},
        "text_config": {**TEXT, **dict(text)},
        "projection_dim": 24,
    }
    return perturbed(MMClipModel(MMClipConfig(**fields, **config))).double()


def tiny_text(**changes) -> MMClipTextModel:
    torch.manual_seed(0)
    return perturbed(MMClipTextModel(MMClipTextConfig(**{**TEXT, **changes}))).double()


def texts(*lengths: int, length: int | None = None, filler: int = END) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of texts of the given lengths, start and end included, padded to `length`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.full((len(lengths), length or max(lengths)), filler)
    mask = torch.zeros_like(ids)
    for row, number in enumerate(lengths):
        words = torch.randint(1, START, (number - 2,), generator=generator)
        ids[row, :number] = torch.cat([torch.tensor([START]), words, torch.tensor([END])])
        mask[row, :number] = 1
    return ids, mask


def pixels(*size, number=3, dtype=torch.float64):
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(5), dtype=dtype)


PUBLISHED = {  # patch, size, vision width, layers, joint width, text width: parameters of all, of each side
    "B/32": (32, 224, 768, 12, 512, 512, 151_277_313, 87_849_216, 63_428_096),
    "B/16": (16, 224, 768, 12, 512, 512, 149_620_737, 86_192_640, 63_428_096),
    "L/14": (14, 224, 1024, 24, 768, 768, 427_616_513, 303_966_208, 123_650_304),
    "L/14@336": (14, 336, 1024, 24, 768, 768, 427_944_193, 304_293_888, 123_650_304),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_variants_have_their_number_of_parameters(name):
    patch, size, width, layers, joint, text_width, total, image_side, text_side = PUBLISHED[name]
    vision = {
        "patch_size": patch,
        "image_size": size,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_attention_heads": text_width // 64,
    }
    with torch.device("meta"):
        model = MMClipModel(MMClipConfig(vision_config=vision, text_config=text, projection_dim=joint))
    assert model.num_parameters() == total
    assert model.vision_model.num_parameters() + model.visual_projection.weight.numel() == image_side
    assert model.text_model.num_parameters() + model.text_projection.weight.numel() == text_side


# --- the text tower -------------------------------------------------------------------------------------------------


def test_a_text_is_pooled_at_its_first_end_token_also_after_tokens_were_added():
    """Added ids are larger than the end token, and padding repeats it."""
    model = tiny_clip()
    model.resize_token_embeddings(70)
    ids, mask = texts(5, 9, 12)
    ids[0, 2], ids[1, 5], ids[2, 3] = 66, 69, 64
    features = model.get_text_features(ids, mask)
    states = model.text_model(ids, mask).last_hidden_state
    at_end = model.text_projection(states[range(3), [4, 8, 11]])
    torch.testing.assert_close(features.pooler_output, at_end, rtol=1e-12, atol=1e-12)
    assert (ids.argmax(1) != torch.tensor([4, 8, 11])).all()
    theirs = clip_text_oracle(model.text_model).run(input_ids=ids, attention_mask=mask)
    assert largest_error(model.text_model(ids, mask).pooler_output, theirs["pooler_output"]) <= 1e-9


def test_added_tokens_are_saved(tmp_path):
    model = tiny_clip()
    before = model.text_model.embeddings.token_embedding.weight.detach().clone()
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    opened = MMClipModel.from_pretrained(tmp_path)
    assert opened.config.text_config.vocab_size == 70
    weight = opened.get_input_embeddings().weight
    assert weight.shape == (70, 32)
    assert torch.equal(weight[:64], before)
    assert torch.equal(weight, model.get_input_embeddings().weight)


def test_added_tokens_start_like_the_others():
    """Or, by transformers' default, near the mean of the others."""
    torch.manual_seed(0)
    model = MMClipTextModel(MMClipTextConfig(**TEXT))
    model.resize_token_embeddings(2000, mean_resizing=False)
    added = model.get_input_embeddings().weight[64:]
    assert added.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("filler", [END, 0, 7])
def test_padding_to_the_context_costs_nothing_and_changes_nothing(filler):
    model = tiny_clip()
    short, mask = texts(4, 9, 6)
    long, long_mask = texts(4, 9, 6, length=16, filler=filler)
    reference = model.get_text_features(short, mask)
    for arguments in ((long, long_mask), (long, None), (short, None)):
        outputs = model.get_text_features(*arguments, output_hidden_states=True)
        assert outputs.last_hidden_state.shape == (3, 9, 32)
        torch.testing.assert_close(outputs.pooler_output, reference.pooler_output, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_mask_over_the_right_end_changes_nothing(kernel):
    model = tiny_text()
    model.set_attn_implementation(kernel)
    ids, mask = texts(4, 9, 6)
    with_mask, without = model(ids, mask), model(ids)
    assert torch.equal(with_mask.pooler_output, without.pooler_output)
    assert torch.equal(model(ids, mask.bool()).pooler_output, without.pooler_output)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_mask_with_a_hole_hides_what_transformers_hides(kernel):
    model = tiny_text()
    model.set_attn_implementation(kernel)
    ids, mask = texts(6, 9, 7)
    mask[0, 2] = mask[1, 4:6] = 0
    ours = model(ids, mask).pooler_output
    theirs = clip_text_oracle(model).run(input_ids=ids, attention_mask=mask)["pooler_output"]
    assert largest_error(ours, theirs) <= 1e-9
    without = model(ids).pooler_output
    assert torch.equal(ours[2], without[2])
    assert not torch.isclose(ours[:2], without[:2]).all(1).any()


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("hole", [False, True])
def test_the_pooled_token_alone_is_the_same_text(kernel, hole):
    model = tiny_text()
    model.set_attn_implementation(kernel)
    ids, mask = texts(6, 9, 7)
    if hole:
        mask[0, 2] = mask[1, 4:6] = 0
    for arguments in ((ids, mask), (ids, None)):
        every, alone = (model(*arguments, pooled_only=only) for only in (False, True))
        assert largest_error(alone.pooler_output, every.pooler_output) <= 1e-12
        assert alone.last_hidden_state is None


def test_the_pooled_token_alone_is_the_same_picture():
    torch.manual_seed(0)
    model = perturbed(MMClipVisionModel(MMClipVisionConfig(**PICTURE))).double()
    every, alone = (model(pixels(32, 32), pooled_only=only) for only in (False, True))
    assert largest_error(alone.pooler_output, every.pooler_output) <= 1e-12
    assert alone.last_hidden_state is None


def test_the_last_block_computes_the_pooled_token_alone():
    model, tokens = tiny_clip(), []
    for tower in (model.text_model, model.vision_model):
        for block in tower.encoder.layers:
            block.mlp.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    inputs = {"pixel_values": pixels(32, 32), "input_ids": texts(6, 9, 7)[0]}
    alone = model(**inputs)
    assert tokens == [9, 1, 17, 1]
    every = model(**inputs, output_hidden_states=True)
    assert tokens[4:] == [9, 9, 17, 17]
    assert every.text_model_output.last_hidden_state.shape == (3, 9, 32)
    assert every.vision_model_output.last_hidden_state.shape == (3, 17, 48)
    torch.testing.assert_close(alone.logits_per_image, every.logits_per_image, rtol=1e-12, atol=1e-12)


def test_positions_can_be_given():
    model = tiny_text()
    ids, mask = texts(6, 9, 7)
    positions = torch.arange(9).expand(3, 9)
    assert torch.equal(model(ids, mask, position_ids=positions).pooler_output, model(ids, mask).pooler_output)
    shifted = model(ids, mask, position_ids=positions + 3).pooler_output
    theirs = clip_text_oracle(model).run(input_ids=ids, attention_mask=mask, position_ids=positions + 3)
    assert largest_error(shifted, theirs["pooler_output"]) <= 1e-9


def test_positions_of_padded_texts_are_cut_with_them():
    model = tiny_clip()
    ids, mask = texts(4, 9, 6, length=14)
    features = model.get_text_features(ids, mask, position_ids=torch.arange(14)[None]).pooler_output
    assert torch.equal(features, model.get_text_features(ids, mask).pooler_output)


def test_embeddings_in_place_of_ids():
    """The text ends at the last token that the mask keeps, or where the caller says."""
    model = tiny_clip()
    ids, mask = texts(4, 9, 6)
    embedded = model.get_input_embeddings()(ids)
    reference = model.get_text_features(ids).pooler_output
    for options in ({"attention_mask": mask}, {"pooling_positions": torch.tensor([3, 8, 5])}):
        features = model.get_text_features(inputs_embeds=embedded, **options).pooler_output
        torch.testing.assert_close(features, reference, rtol=1e-12, atol=1e-12)
    one = model.get_text_features(inputs_embeds=embedded[1:2]).pooler_output
    torch.testing.assert_close(one, reference[1:2], rtol=1e-12, atol=1e-12)

    pictures = pixels(32, 32)
    from_ids = model(input_ids=ids, pixel_values=pictures)
    from_embeddings = model(inputs_embeds=embedded, attention_mask=mask, pixel_values=pictures)
    torch.testing.assert_close(from_embeddings.logits_per_image, from_ids.logits_per_image)
    torch.testing.assert_close(from_embeddings.loss, from_ids.loss)


def test_a_learned_pseudo_word_gets_its_gradient():
    """What textual inversion needs: the gradient of one embedding through the frozen tower."""
    model = tiny_clip().requires_grad_(False)
    ids, mask = texts(6, 6)
    word = torch.randn(32, dtype=torch.float64, requires_grad=True)
    embedded = model.get_input_embeddings()(ids).clone()
    embedded[:, 2] = word
    model.get_text_features(inputs_embeds=embedded, attention_mask=mask).pooler_output.square().sum().backward()
    assert word.grad.abs().min() > 0


def test_nothing_after_the_end_token_is_looked_at():
    model = tiny_text()
    ids, _ = texts(5, 9)
    changed = ids.clone()
    changed[0, 5:] = torch.tensor([1, 2, 3, 4])
    assert torch.equal(model(ids).pooler_output, model(changed).pooler_output)
    changed[0, 3] = 1
    assert not torch.equal(model(ids).pooler_output[0], model(changed).pooler_output[0])


# --- the picture tower ----------------------------------------------------------------------------------------------


def tiny_vision(**changes) -> MMClipVisionModel:
    torch.manual_seed(0)
    return perturbed(MMClipVisionModel(MMClipVisionConfig(**{**PICTURE, **changes}))).double()


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (16, 16), (24, 64), (64, 8)])
def test_any_resolution_as_transformers_does_it(size):
    model = tiny_vision(pos_embed_interpolation="bicubic")
    inputs = {"pixel_values": pixels(*size), "interpolate_pos_encoding": True}
    ours, theirs = model(**inputs), clip_vision_oracle(model).run(**inputs)
    assert largest_error(ours.last_hidden_state, theirs["last_hidden_state"]) <= 1e-9
    assert largest_error(ours.pooler_output, theirs["pooler_output"]) <= 1e-9


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_another_grid_at_call_time_equals_a_table_resized_before(interpolation):
    model = tiny_vision(image_size=(32, 48), pos_embed_interpolation=interpolation)
    resized = tiny_vision(image_size=(40, 24))
    weights = model.state_dict()
    table = weights["embeddings.position_embedding.weight"]
    weights["embeddings.position_embedding.weight"] = resize_position_table(table, (4, 6), (5, 3), interpolation, 1)
    resized.load_state_dict(weights)
    pictures = pixels(40, 24)
    at_call = model(pictures, interpolate_pos_encoding=True).last_hidden_state
    assert torch.equal(at_call, resized(pictures).last_hidden_state)


def test_only_the_class_token_is_normed_at_the_end():
    model = tiny_vision()
    outputs = model(pixels(32, 32))
    norm = model.post_layernorm
    reference = F.layer_norm(outputs.last_hidden_state[:, 0], (48,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(outputs.pooler_output, reference)


# --- both -----------------------------------------------------------------------------------------------------------


def test_embeddings_are_of_unit_length_and_features_are_not():
    model = tiny_clip()
    ids, mask = texts(4, 9, 6)
    outputs = model(ids, pixels(32, 32), mask)
    image, text = model.get_image_features(pixels(32, 32)).pooler_output, model.get_text_features(ids).pooler_output
    assert image.shape == text.shape == (3, 24)
    for embeds, features in ((outputs.image_embeds, image), (outputs.text_embeds, text)):
        lengths = features.norm(dim=1, keepdim=True)
        assert (lengths - 1).abs().min() > 1e-3
        torch.testing.assert_close(embeds, features / lengths)
    torch.testing.assert_close(
        outputs.logits_per_image, model.logit_scale.exp() * outputs.image_embeds @ outputs.text_embeds.T
    )
    assert torch.equal(outputs.logits_per_text, outputs.logits_per_image.T)
    assert outputs.logits_per_text.is_contiguous()


def test_one_picture_and_many_texts_have_logits_and_no_loss():
    model = tiny_clip()
    ids, mask = texts(4, 9, 6, 5)
    outputs = model(ids, pixels(32, 32, number=1), mask)
    assert outputs.loss is None
    assert outputs.logits_per_image.shape == (1, 4)
    assert model(ids, pixels(32, 32, number=4), mask).loss > 0
    assert model(ids, pixels(32, 32, number=4), mask, return_loss=False).loss is None
    assert model.train()(ids, pixels(32, 32, number=1), mask, return_loss=False).loss is None


@pytest.mark.parametrize("training", [False, True])
def test_ids_reach_the_loss(training):
    model = tiny_clip().train(training)
    ids, mask = texts(4, 9, 6)
    options = {"image_ids": torch.tensor([1, 1, 2]), "text_ids": torch.tensor([5, 6, 6])}
    outputs = model(ids, pixels(32, 32), mask, **options)
    expected = image_text_contrastive_loss(
        outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp(), gather=False, **options
    )
    torch.testing.assert_close(outputs.loss, expected)
    assert outputs.loss < model(ids, pixels(32, 32), mask).loss


def test_the_logit_scale_is_a_vector_and_no_parameter_is_a_scalar():
    model = tiny_clip()
    assert model.logit_scale.shape == (1,)
    assert all(parameter.ndim > 0 for parameter in model.parameters())


def test_outputs_can_be_a_tuple():
    model = tiny_clip()
    ids, mask = texts(4, 9, 6)
    outputs = model(ids, pixels(32, 32), mask)
    loss, per_image, *_ = model(ids, pixels(32, 32), mask, return_dict=False)
    assert torch.equal(loss, outputs.loss) and torch.equal(per_image, outputs.logits_per_image)


# --- checkpoints of transformers ------------------------------------------------------------------------------------


def their_clip() -> CLIPModel:
    torch.manual_seed(0)
    config = CLIPConfig(text_config=TEXT, vision_config=PICTURE, projection_dim=24)
    return perturbed(CLIPModel(config)).double()


@pytest.fixture
def theirs(tmp_path):
    model = their_clip()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def opened(model_class, folder):
    """The model, after nothing was reported about its keys."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model) is model_class
    return model


def inputs_of_both():
    ids, mask = texts(4, 9, 6)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(32, 32)}


def assert_same_answers(ours: MMClipModel, theirs: CLIPModel):
    batch = inputs_of_both()
    one, other = ours(**batch), theirs(**batch, return_loss=True)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds", "loss"):
        assert largest_error(one[name], other[name]) <= 1e-9, name


def test_a_folder_of_transformers_opens(theirs):
    model, folder = theirs
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert stored.get_slice("logit_scale").get_shape() == []
    ours = opened(MMClipModel, folder)
    assert ours.dtype == torch.float64
    assert ours.logit_scale.shape == (1,)
    assert_same_answers(ours, model)


def test_a_folder_of_transformers_opens_at_any_resolution(theirs):
    model, folder = theirs
    inputs = {"pixel_values": pixels(48, 24), "interpolate_pos_encoding": True}
    ours = opened(MMClipModel, folder).get_image_features(**inputs).pooler_output
    assert largest_error(ours, model.get_image_features(**inputs).pooler_output) <= 1e-9


@pytest.mark.parametrize("old", ["end token two", "towers repeated", "position ids in the file", "all"])
def test_an_old_folder_of_transformers_opens(theirs, old):
    _, folder = theirs
    config = json.loads((folder / "config.json").read_text())
    if old in ("end token two", "all"):
        config["text_config"] |= {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    if old in ("towers repeated", "all"):
        config |= {"text_config_dict": config["text_config"], "vision_config_dict": config["vision_config"]}
    if old in ("position ids in the file", "all"):
        weights = load_file(folder / "model.safetensors")
        weights["text_model.embeddings.position_ids"] = torch.arange(16)[None]
        weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_answers(opened(MMClipModel, folder), CLIPModel.from_pretrained(folder))


def test_towers_open_from_a_whole_model_of_ours_and_of_transformers(theirs, tmp_path):
    model, folder = theirs
    batch = inputs_of_both()
    opened(MMClipModel, folder).save_pretrained(tmp_path / "ours")
    for source in (folder, tmp_path / "ours"):
        vision = opened(MMClipVisionModel, source)(batch["pixel_values"]).pooler_output
        text = opened(MMClipTextModel, source)(batch["input_ids"]).pooler_output
        assert largest_error(vision, model.vision_model(batch["pixel_values"]).pooler_output) <= 1e-9
        assert largest_error(text, model.text_model(batch["input_ids"]).pooler_output) <= 1e-9


def test_towers_that_transformers_saved_alone_open(theirs, tmp_path):
    model, folder = theirs
    batch = inputs_of_both()
    CLIPTextModel.from_pretrained(folder).save_pretrained(tmp_path / "text")
    CLIPVisionModel.from_pretrained(folder).save_pretrained(tmp_path / "vision")
    text = opened(MMClipTextModel, tmp_path / "text")(batch["input_ids"]).pooler_output
    vision = opened(MMClipVisionModel, tmp_path / "vision")(batch["pixel_values"]).pooler_output
    assert largest_error(text, model.text_model(batch["input_ids"]).pooler_output) <= 1e-9
    assert largest_error(vision, model.vision_model(batch["pixel_values"]).pooler_output) <= 1e-9


def test_what_was_read_from_transformers_is_saved_as_ours(theirs, tmp_path):
    model, folder = theirs
    opened(MMClipModel, folder).save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "mm_clip"
    again = opened(MMClipModel, tmp_path / "ours")
    assert type(AutoModel.from_pretrained(tmp_path / "ours")) is MMClipModel
    assert_same_answers(again, model)
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert weights["logit_scale"].shape == (1,)
    their_weights = load_file(folder / "model.safetensors")
    assert weights.keys() == their_weights.keys()
    assert all(torch.equal(weights[name].reshape(value.shape), value) for name, value in their_weights.items())


def test_a_trained_state_loads_into_a_model_built_anew():
    """As a resumed run does, without from_pretrained."""
    model = tiny_clip()
    again = MMClipModel(model.config).double()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(**inputs_of_both()).logits_per_image, model(**inputs_of_both()).logits_per_image)


def test_the_oracle_of_the_contract_is_transformers_clip(theirs):
    model, folder = theirs
    oracle = clip_oracle(opened(MMClipModel, folder))
    assert torch.equal(oracle.run(**inputs_of_both())["loss"], model(**inputs_of_both(), return_loss=True).loss)


# --- half precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vision", ["mm_clip_vision", "mm_vit"])
def test_half_precision_takes_float32_pictures(dtype, vision, tmp_path):
    """F14, F18: pictures are cast to the weights, and nothing overflows."""
    model = MMClipModel(clip_config(model_type=vision)).eval()
    model.save_pretrained(tmp_path)
    half = MMClipModel.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    end = model.config.text_config.eos_token_id
    ids = torch.tensor([[end - 1, 5, 6, end], [end - 1, 7, end, end]])
    pictures = pixels(32, 32, number=2, dtype=torch.float32)
    outputs, reference = half(ids, pictures), model(ids, pictures)
    bound = 2e-2 if dtype == torch.bfloat16 else 5e-3
    for name in ("image_embeds", "text_embeds"):
        assert outputs[name].dtype == dtype
        assert largest_error(outputs[name].float(), reference[name]) <= bound
    assert torch.isfinite(outputs.logits_per_image).all() and torch.isfinite(outputs.loss)
    assert torch.equal(half(ids, pictures.to(dtype)).logits_per_image, outputs.logits_per_image)


def test_long_positions_stay_exact_in_bfloat16():
    """F14: Positions are ids: in bfloat16 257 would become 256."""
    model = tiny_text(max_position_embeddings=300).to(torch.bfloat16)
    ids, _ = texts(300)
    rows = torch.arange(300)[None]
    assert torch.equal(model(ids, position_ids=rows).pooler_output, model(ids).pooler_output)
    assert not torch.equal(
        model.embeddings(ids, None, rows)[0, 257], model.embeddings(ids, None, rows.clamp(max=256))[0, 257]
    )
