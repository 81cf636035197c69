"""BLIP-2 of LAVIS to ours and back.

State dicts are written out from the table of names in the specification. The oracle is transformers' BLIP-2, which gets them
by that table, too.
"""

import json

import pytest
import torch
from PIL import Image
from published_blip2s import (
    JOINT,
    LAYERS,
    MLP,
    PLACES,
    QUERIES,
    TOWER,
    VOCABULARY,
    WIDTH,
    as_transformers,
    eva_state,
    generation_peer,
    lavis_file,
    lavis_state,
    opt_model,
    opt_tokenizer,
    require_equal,
    require_same_generation,
    require_same_retrieval,
    retrieval_peer,
)
from transformers import AutoModel, AutoProcessor

from hf_mm.conversion.rules import ConversionError
from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config, MMBlip2QFormerConfig
from hf_mm.models.blip2.conversion_blip2 import qformer_config, read_blip2
from hf_mm.models.blip2.conversion_blip2_export import export_lavis, save_as_lavis
from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration
from hf_mm.models.blip2.modeling_blip2_captioning import MMBlip2ForQFormerCaptioning
from hf_mm.models.blip2.modeling_blip2_stage1 import MMBlip2ForImageTextRetrieval, MMBlip2ForPreTraining
from hf_mm.models.eva_vit.configuration_eva_vit import EvaViTConfig

# Stage 1


def test_stage_1_means_what_the_peer_s_does(stage1_file, eva_file, bert_folder):
    conversion, processor, notes = read_blip2(stage1_file, vision=eva_file, tokenizer=bert_folder)
    ours, theirs = conversion.build(), retrieval_peer()
    assert type(ours) is MMBlip2ForPreTraining
    theirs.load_state_dict(as_transformers({**eva_state("visual_encoder."), **lavis_state()}))
    theirs.vision_model.post_layernorm.eps = 1e-5
    require_same_retrieval(ours, theirs, 1e-9)
    assert ours.temperature.shape == (1,) and ours.temperature.item() == pytest.approx(0.083)
    assert notes == []


def test_the_head_that_generates_text_is_kept(stage1_file, eva_file, bert_folder):
    ours, state = read_blip2(stage1_file, vision=eva_file, tokenizer=bert_folder)[0].build(), lavis_state()
    head, hidden = "Qformer.cls.predictions", torch.randn(2, 3, WIDTH)
    expected = hidden @ state[f"{head}.transform.dense.weight"].T + state[f"{head}.transform.dense.bias"]
    expected = 0.5 * expected * (1 + torch.erf(expected / 2**0.5))
    expected = (expected - expected.mean(-1, keepdim=True)) / expected.std(-1, correction=0, keepdim=True)
    expected = expected * state[f"{head}.transform.LayerNorm.weight"] + state[f"{head}.transform.LayerNorm.bias"]
    expected = expected @ state["Qformer.bert.embeddings.word_embeddings.weight"].T + state[f"{head}.bias"]
    with torch.no_grad():
        assert torch.allclose(ours.lm_head(hidden), expected, atol=1e-5)
    assert ours.lm_head.decoder.weight is ours.qformer.embeddings.word_embeddings.weight


def test_shapes_and_tokenizer_tell_the_config(stage1_file, eva_file, bert_folder):
    config = read_blip2(stage1_file, vision=eva_file, tokenizer=bert_folder)[0].empty.config
    qformer = config.qformer_config
    assert (qformer.num_query_tokens, qformer.hidden_size, qformer.num_hidden_layers) == (QUERIES, WIDTH, LAYERS)
    assert (qformer.num_attention_heads, qformer.intermediate_size) == (1, MLP)
    assert (qformer.cross_attention_frequency, qformer.encoder_hidden_size) == (2, TOWER["width"])
    assert (qformer.vocab_size, qformer.max_position_embeddings) == (VOCABULARY, PLACES)
    ids = (qformer.pad_token_id, qformer.cls_token_id, qformer.sep_token_id, qformer.bos_token_id)
    assert ids == (0, 2, 3, VOCABULARY - 1)
    assert (config.joint_dim, config.vision_norm_eps, config.vision_feature_layer) == (JOINT, 1e-5, -1)
    assert (qformer.hidden_act, qformer.layer_norm_eps, qformer.dropout) == ("gelu", 1e-12, 0.1)
    assert isinstance(config.vision_config, EvaViTConfig) and config.text_config is None
    assert config.base_models == {"vision_tower": {"name": "eva_vit_g.pth", "revision": None}}


def test_a_folder_of_stage_1_opens(tmp_path, stage1_file, eva_file, bert_folder):
    conversion, processor, _ = read_blip2(stage1_file, vision=eva_file, tokenizer=bert_folder)
    folder = conversion.save(tmp_path / "out", processor=processor, progress=False)
    model, loading = MMBlip2ForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    require_equal(model.state_dict(), conversion.build().state_dict())
    assert isinstance(AutoModel.from_pretrained(folder).config, MMBlip2Config)
    opened = AutoProcessor.from_pretrained(folder)
    picture = Image.new("RGB", (40, 30), (200, 10, 10))
    batch = opened(images=[picture], text=["a red cat"])
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    assert batch["input_ids"].tolist() == [[2, 5, 6, 8, 3]]
    squashed = torch.tensor([200, 10, 10]) / 255 - torch.tensor([0.48145466, 0.4578275, 0.40821073])
    squashed = squashed / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    assert torch.allclose(batch["pixel_values"][0].mean((1, 2)), squashed, atol=1e-5)
    sources = json.loads((folder / "conversion.json").read_text())["sources"]
    assert [source["name"] for source in sources] == ["blip2_pretrained.pth", "eva_vit_g.pth"]
    assert all(source["sha256"] for source in sources)


@pytest.mark.parametrize("model_class", [MMBlip2ForImageTextRetrieval, MMBlip2ForQFormerCaptioning])
def test_stage_1_opens_as_each_of_its_uses(tmp_path, stage1_file, eva_file, bert_folder, model_class):
    conversion, processor, _ = read_blip2(stage1_file, vision=eva_file, tokenizer=bert_folder)
    folder = conversion.save(tmp_path / "out", processor=processor, progress=False)
    model, loading = model_class.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
    assert all(name.startswith("lm_head.") for name in loading["unexpected_keys"])
    whole = conversion.build().state_dict()
    require_equal(model.state_dict(), {name: whole[name] for name in model.state_dict()})


def test_a_fine_tuned_file_has_its_tower(tmp_path, bert_folder):
    state = {**lavis_state(), **eva_state("visual_encoder.", side=42)}
    path = lavis_file(tmp_path / "blip2_finetune_coco.pth", state)
    conversion, processor, _ = read_blip2(path, tokenizer=bert_folder)
    assert conversion.empty.config.vision_config.image_size == 42
    assert processor.image_processor.size == {"height": 42, "width": 42}
    require_equal(export_lavis(conversion.build()), state)
    with pytest.raises(ValueError, match="leave --vision out"):
        read_blip2(path, vision=path, tokenizer=bert_folder)


def test_a_tower_of_ours(tmp_path, stage1_file, eva_file, bert_folder):
    expected = read_blip2(stage1_file, vision=eva_file, tokenizer=bert_folder)[0].build()
    expected.vision_tower.save_pretrained(tmp_path / "eva")
    conversion, _, _ = read_blip2(stage1_file, vision=tmp_path / "eva", tokenizer=bert_folder)
    require_equal(conversion.build().state_dict(), expected.state_dict())


def test_stage_1_back_to_lavis(tmp_path, stage1_file, eva_file, bert_folder):
    conversion, processor, _ = read_blip2(stage1_file, vision=eva_file, tokenizer=bert_folder)
    folder = save_as_lavis(conversion.build(), processor, tmp_path / "back")
    content = torch.load(folder / "blip2.pth", weights_only=True)
    require_equal(content["model"], {**lavis_state(), **eva_state("visual_encoder.")})
    again = read_blip2(folder / "blip2.pth", tokenizer=bert_folder)[0].build()
    require_equal(again.state_dict(), conversion.build().state_dict())


# Stage 2


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_stage_2_means_what_the_peer_s_does(tmp_path, eva_file, request, kind):
    state = lavis_state(f"{kind}_proj")
    path = lavis_file(tmp_path / f"blip2_pretrained_{kind}.pth", state)
    conversion, processor, notes = read_blip2(
        path, vision=eva_file, language_model=request.getfixturevalue(f"{kind}_folder")
    )
    ours, theirs = conversion.build(), generation_peer(kind)
    assert type(ours) is MMBlip2ForConditionalGeneration
    named = as_transformers({**eva_state("visual_encoder."), **state})
    lm = {name: tensor for name, tensor in theirs.state_dict().items() if name.startswith("language_model.")}
    theirs.load_state_dict(named | lm)
    theirs.vision_model.post_layernorm.eps = 1e-5
    require_same_generation(ours, theirs, 1e-9)
    assert not ours.config.qformer_config.use_text
    assert len(notes) == 1
    if kind == "opt":
        new_line = opt_tokenizer()("\n", add_special_tokens=False)["input_ids"]
        assert [ours.generation_config.eos_token_id] == new_line == [processor.eos_token_id]
        assert conversion.empty.generation_config.eos_token_id == new_line[0]
    else:
        assert ours.config.text_config.dense_act_fn == "gelu"
        assert ours.generation_config.eos_token_id == processor.eos_token_id == 1
    require_equal(export_lavis(conversion.build()), {**state, **eva_state("visual_encoder.")})


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_folder_of_stage_2_opens(tmp_path, eva_file, request, kind):
    path = lavis_file(tmp_path / "stage2.pth", lavis_state(f"{kind}_proj"))
    language_model = request.getfixturevalue(f"{kind}_folder")
    conversion, processor, _ = read_blip2(path, vision=eva_file, language_model=language_model)
    folder = conversion.save(tmp_path / "out", processor=processor, progress=False)
    model, loading = MMBlip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    require_equal(model.state_dict(), conversion.build().state_dict())
    batch = AutoProcessor.from_pretrained(folder)(images=[Image.new("RGB", (30, 30))], text=["a red cat"])
    new = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(new, conversion.build().generate(**batch, max_new_tokens=3, do_sample=False))
    if kind == "t5":
        assert model.language_model.encoder.block[0].layer[1].DenseReluDense.act(torch.tensor(1.0)).item() == (
            pytest.approx(0.5 * (1 + torch.erf(torch.tensor(0.5**0.5)).item()), abs=1e-6)
        )
    sources = json.loads((folder / "conversion.json").read_text())["sources"]
    assert [source["name"] for source in sources] == ["stage2.pth", "eva_vit_g.pth", language_model.name]
    assert set(model.config.base_models) == {"vision_tower", "language_model"}


def test_a_captioner_has_its_tower(tmp_path, t5_folder):
    state = {**lavis_state("t5_proj"), **eva_state("visual_encoder.", side=42)}
    path = lavis_file(tmp_path / "blip2_caption_flant5xl.pth", state)
    conversion, processor, _ = read_blip2(path, language_model=t5_folder)
    assert conversion.empty.config.vision_config.image_size == processor.image_processor.size.height == 42
    assert conversion.empty.config.base_models["vision_tower"]["name"] == "blip2_caption_flant5xl.pth"
    require_equal(export_lavis(conversion.build()), state)


def test_what_the_file_holds_of_the_language_model_must_be_it(tmp_path, eva_file, opt_folder):
    """LAVIS saves tied tensors of the frozen model by their second name."""
    head = opt_model().lm_head.weight.detach()
    state = {**lavis_state("opt_proj"), "opt_model.lm_head.weight": head.half()}
    conversion, _, _ = read_blip2(lavis_file(tmp_path / "a.pth", state), vision=eva_file, language_model=opt_folder)
    require_equal(export_lavis(conversion.build()), {**lavis_state("opt_proj"), **eva_state("visual_encoder.")})
    state["opt_model.lm_head.weight"] = head + 0.1
    with pytest.raises(ConversionError, match="it differs in lm_head.weight"):
        read_blip2(lavis_file(tmp_path / "b.pth", state), vision=eva_file, language_model=opt_folder)


# Precision


def test_numbers_keep_the_widest_dtype_or_the_one_asked(tmp_path, bert_folder):
    half = {name: t.half() if t.is_floating_point() else t for name, t in lavis_state().items()}
    tower = {name: t.half() for name, t in eva_state().items()}
    torch.save(tower, tmp_path / "eva.pth")
    path = lavis_file(tmp_path / "half.pth", half)
    model = read_blip2(path, vision=tmp_path / "eva.pth", tokenizer=bert_folder)[0].build()
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    require_equal(export_lavis(model), {**half, **{f"visual_encoder.{name}": t for name, t in tower.items()}})
    mixed = lavis_file(tmp_path / "mixed.pth", lavis_state())
    model = read_blip2(mixed, vision=tmp_path / "eva.pth", tokenizer=bert_folder)[0].build()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model = read_blip2(mixed, vision=tmp_path / "eva.pth", tokenizer=bert_folder, dtype=torch.bfloat16)[0].build()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_frozen_language_model_in_half_precision(tmp_path, eva_file):
    """The whole is float32, which rounds nothing, unless another dtype is asked for."""
    opt_model().half().save_pretrained(tmp_path / "half")
    opt_tokenizer().save_pretrained(tmp_path / "half")
    path = lavis_file(tmp_path / "stage2.pth", lavis_state("opt_proj"))
    for dtype, expected in ((None, torch.float32), (torch.float16, torch.float16)):
        conversion, processor, _ = read_blip2(path, vision=eva_file, language_model=tmp_path / "half", dtype=dtype)
        model = conversion.build()
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        folder = conversion.save(tmp_path / str(expected), processor=processor, progress=False)
        require_equal(MMBlip2ForConditionalGeneration.from_pretrained(folder).state_dict(), model.state_dict())


# Published sizes


def test_the_published_sizes_have_the_published_number_of_parameters():
    """186,705,470 train in stage 1 with ViT-g, as a public log of a training prints."""
    config = MMBlip2Config(vision_config={"model_type": "eva_vit", "num_hidden_layers": 1})
    with torch.device("meta"):
        model = MMBlip2ForPreTraining(config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 186_705_470


def test_the_published_q_former_has_the_default_config():
    """Its shapes as the specification lists them; `[DEC]` is the last of 30,523 words."""
    bert = "Qformer.bert"
    shapes = {
        "query_tokens": (1, 32, 768),
        f"{bert}.embeddings.word_embeddings.weight": (30523, 768),
        f"{bert}.embeddings.position_embeddings.weight": (512, 768),
        **{f"{bert}.encoder.layer.{i}.intermediate_query.dense.weight": (3072, 768) for i in range(12)},
        **{f"{bert}.encoder.layer.{i}.crossattention.self.key.weight": (768, 1408) for i in range(0, 12, 2)},
    }
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert qformer_config(tensors).to_dict() == MMBlip2QFormerConfig().to_dict()
