"""The authors' file of Pic2Word: what is read, with which CLIP, what is refused, and the way back."""

import json
import re

import pytest
import torch
from contract.cases import pictures, tokenizer, vocabulary
from contract.published import mapper_state, open_clip_json, openai_state, pic2word_content
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor, CLIPModel

from hf_mm.cli import main
from hf_mm.conversion import peers
from hf_mm.conversion.checkpoint import Origin
from hf_mm.conversion.rules import ConversionError
from hf_mm.hub import convert
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.conversion_clip import read_clip, transformers_config
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.modeling_clip import MMClipTextModel
from hf_mm.models.pic2word.configuration_pic2word import Pic2WordConfig, Pic2WordMapperConfig
from hf_mm.models.pic2word.conversion_pic2word import (
    export_pic2word,
    mapper_config,
    open_pic2word,
    read_mapper,
    read_pic2word,
    save_as_pic2word,
)
from hf_mm.models.pic2word.modeling_pic2word import Pic2WordMapper, Pic2WordModel
from hf_mm.models.pic2word.processing_pic2word import Pic2WordProcessor

TOWER = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 1}
RESNET = {
    "model_type": "mm_clip_resnet",
    "depths": [1, 1, 1, 1],
    "width": 8,
    "num_attention_heads": 4,
    "image_size": 64,
}
JOINT, HIDDEN = 24, 20


def clip_config(resnet: bool = False, activation: str = "quick_gelu", **text) -> MMClipConfig:
    """Widths of 64, whose heads shapes tell."""
    vit = {**TOWER, "image_size": 32, "patch_size": 8, "hidden_act": activation}
    return MMClipConfig(
        vision_config={**(RESNET if resnet else vit), "projection_dim": JOINT},
        text_config={**TOWER, "hidden_act": activation, **vocabulary(), **text, "projection_dim": JOINT},
        projection_dim=JOINT,
    )


def drawn_mapper(image_dim: int = JOINT, word_dim: int = 64, layers: int = 2) -> dict[str, torch.Tensor]:
    config = Pic2WordMapperConfig(image_dim=image_dim, hidden_dim=HIDDEN, word_dim=word_dim, num_hidden_layers=layers)
    return mapper_state(config)


def authors_file(path, clip, mapper=None, *prefixes):
    torch.save(pic2word_content(clip, drawn_mapper() if mapper is None else mapper, *prefixes), path)
    return path


def tokenizer_folder(folder):
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def written_out(mapper: dict[str, torch.Tensor], embeds: torch.Tensor) -> torch.Tensor:
    """W3 max(0, W2 max(0, W1 v + b1) + b2) + b3."""
    first, second = ((mapper[f"layers.{n}.0.weight"], mapper[f"layers.{n}.0.bias"]) for n in (0, 1))
    hidden = (first[0] @ embeds.T + first[1][:, None]).clamp(min=0)
    hidden = (second[0] @ hidden + second[1][:, None]).clamp(min=0)
    return (mapper["fc_out.weight"] @ hidden + mapper["fc_out.bias"][:, None]).T


# What is read


@pytest.mark.parametrize("clip_prefix", ["", "module."])
@pytest.mark.parametrize("mapper_prefix", ["", "module."])
def test_both_forms_of_names(tmp_path, clip_prefix, mapper_prefix):
    state, mapper = openai_state(clip_config()), drawn_mapper()
    path = authors_file(tmp_path / "pic2word_model.pt", state, mapper, clip_prefix, mapper_prefix)
    conversion, processor = read_pic2word(path, tokenizer=tokenizer_folder(tmp_path))
    model = conversion.build()
    assert type(model) is Pic2WordModel
    ours = {"layers.0": "layers.0.0", "layers.1": "layers.1.0", "fc_out": "fc_out"}
    expected = {f"{name}.{p}": mapper[f"{theirs}.{p}"] for name, theirs in ours.items() for p in ("weight", "bias")}
    assert model.mapper.state_dict().keys() == expected.keys()
    assert all(torch.equal(model.mapper.state_dict()[name], tensor) for name, tensor in expected.items())
    assert torch.equal(model.clip.text_projection.weight, state["text_projection"].T)
    assert processor.placeholder_token_id == model.config.placeholder_token_id == 265
    assert not any(parameter.requires_grad for parameter in model.clip.parameters())
    assert all(parameter.requires_grad for parameter in model.mapper.parameters())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_shapes_tell_the_sizes_of_the_mapping_network(layers):
    config = mapper_config(drawn_mapper(image_dim=11, word_dim=13, layers=layers))
    assert (config.image_dim, config.hidden_dim, config.word_dim) == (11, HIDDEN, 13)
    assert (config.num_hidden_layers, config.dropout) == (layers, 0.1)


def test_the_published_sizes_have_the_published_number_of_parameters():
    shapes = {"layers.0.0": (512, 768), "layers.1.0": (512, 512), "fc_out": (768, 512)}
    meta = {f"{name}.weight": torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        mapper = Pic2WordMapper(mapper_config(meta))
    assert mapper.num_parameters() == 1_050_368


def test_the_mapping_network_alone(tmp_path):
    mapper = drawn_mapper()
    published = open_pic2word(authors_file(tmp_path / "p.pt", openai_state(clip_config()), mapper))
    model, embeds = read_mapper(published).build(), torch.randn(3, JOINT)
    with torch.no_grad():
        words = model(embeds).pseudo_words
    assert torch.allclose(words, written_out(mapper, embeds), atol=1e-6)


def test_a_folder_opens_as_it_was_read(tmp_path):
    path = authors_file(tmp_path / "p.pt", openai_state(clip_config()))
    conversion, processor = read_pic2word(path, tokenizer=tokenizer_folder(tmp_path))
    folder, expected = conversion.save(tmp_path / "out", processor=processor, progress=False), conversion.build()
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    batch = AutoProcessor.from_pretrained(folder)(images=pictures(2), text=["a * , red", "*"])
    with torch.no_grad():
        ours, theirs = model(**batch), expected(**batch)
    assert torch.equal(ours.logits_per_image, theirs.logits_per_image)
    (source,) = json.loads((folder / "conversion.json").read_text())["sources"]
    assert source["name"] == "p.pt"
    assert not list(folder.glob("*.pt"))


def as_openai(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' CLIP in OpenAI's names, written out without the converter's table."""
    named = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
        "text_model.encoder.layers": "transformer.resblocks",
        "vision_model.encoder.layers": "visual.transformer.resblocks",
        "layer_norm": "ln_",
        "self_attn.out_proj": "attn.out_proj",
        "fc1": "c_fc",
        "fc2": "c_proj",
    }
    found = {"text_projection": state["text_projection.weight"].T, "visual.proj": state["visual_projection.weight"].T}
    for key, tensor in state.items():
        name = key
        for theirs, openai in named.items():
            name = name.replace(theirs, openai)
        if "q_proj" in name:
            parts = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[re.sub(r"self_attn\.q_proj\.", "attn.in_proj_", name)] = torch.cat(parts)
        elif not re.search("[kv]_proj|_projection|position_ids", name):
            found[name] = tensor
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


@pytest.fixture
def peer():
    """transformers' own CLIP, with QuickGELU."""
    model = CLIPModel(transformers_config(clip_config())).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_stored_clip_means_what_the_peer_s_does(tmp_path, peer):
    """Embeddings of texts with a picture, against transformers' CLIP with a hook and the equations written out."""
    mapper = drawn_mapper()
    path = authors_file(tmp_path / "p.pt", as_openai(peer.state_dict()), mapper)
    conversion, processor = read_pic2word(path, tokenizer=tokenizer_folder(tmp_path))
    model, batch = conversion.build(), processor(images=pictures(3), text=["* in red", "two blue *", "a *"])
    with torch.no_grad():
        embeds = peer.get_image_features(batch["pixel_values"]).pooler_output
        rows, places = batch["placeholder_mask"].nonzero(as_tuple=True)
        words = written_out(mapper, embeds)
        peer.text_model.embeddings.token_embedding.register_forward_hook(
            lambda module, inputs, output: output.index_put((rows, places), words)
        )
        theirs = peer.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
        ours = model.get_composed_features(**batch).pooler_output
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# With a CLIP by name


def as_lone_file(folder, config, state):
    save_file(state, folder / "clip.safetensors")
    return folder / "clip.safetensors", tokenizer_folder(folder)


def as_half_file(folder, config, state):
    half = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in state.items()}
    return as_lone_file(folder, config, half)


def as_open_clip(folder, config, state):
    tokenizer().save_pretrained(folder / "clip")
    save_file(state, folder / "clip" / "open_clip_model.safetensors")
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps(open_clip_json(config)))
    return folder / "clip", None


def as_ours(folder, config, state):
    source, beside = as_lone_file(folder, config, state)
    conversion, processor = read_clip(source, activation=config.text_config.hidden_act, tokenizer=beside)
    return conversion.save(folder / "clip", processor=processor, progress=False), None


FORMS = {"file": as_lone_file, "half": as_half_file, "open_clip": as_open_clip, "ours": as_ours}


@pytest.mark.parametrize(("form", "resnet"), [*((form, False) for form in FORMS), ("file", True)])
def test_the_named_clip_is_taken_and_the_stored_one_dropped(tmp_path, form, resnet):
    config = clip_config(resnet)
    state = openai_state(config)
    source = authors_file(tmp_path / "p.pt", state)
    clip, beside = FORMS[form](tmp_path, config, state)
    conversion, _ = read_pic2word(source, clip, tokenizer=beside)
    assert [origin.name for origin in conversion.checkpoint.origins][:2] == ["p.pt", clip.name]
    assert conversion.empty.config.base_models["clip"]["name"] == conversion.checkpoint.origins[-1].name
    kept = conversion.build().clip.text_projection.weight
    assert torch.equal(
        kept, (state["text_projection"].half().float() if form == "half" else state["text_projection"]).T
    )


def test_the_named_clip_of_transformers(tmp_path, peer):
    peer.save_pretrained(tmp_path / "clip")
    tokenizer().save_pretrained(tmp_path / "clip")
    source = authors_file(tmp_path / "p.pt", as_openai(peer.state_dict()))
    conversion, _ = read_pic2word(source, tmp_path / "clip")
    assert torch.equal(conversion.build().clip.logit_scale, peer.logit_scale.detach().reshape(1))


def test_where_a_clip_of_ours_came_from_is_recorded_too(tmp_path):
    config = clip_config()
    state = openai_state(config)
    clip, _ = as_ours(tmp_path, config, state)
    record = json.loads((clip / "conversion.json").read_text())
    record["sources"] = [{"name": "someone/clip", "revision": "c0ffee", "sha256": "ab" * 32}]
    (clip / "conversion.json").write_text(json.dumps(record))
    conversion, _ = read_pic2word(authors_file(tmp_path / "p.pt", state), clip)
    assert conversion.checkpoint.origins[2:] == (Origin("someone/clip", "c0ffee", "ab" * 32),)
    record["sources"] = [{"title": "x"}]
    (clip / "conversion.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"^conversion\.json .*title[^\n]*$"):
        read_pic2word(tmp_path / "p.pt", clip)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_half_a_precision_cannot_tell_is_no_difference(tmp_path, dtype):
    """Of either file: the published CLIP is in half precision, and a training in it stores it so."""
    whole = openai_state(clip_config())
    narrow = {name: tensor.to(dtype) if tensor.ndim > 1 else tensor for name, tensor in whole.items()}
    for number, (stored, base) in enumerate([(whole, narrow), (narrow, whole)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        clip, beside = as_lone_file(folder, None, base)
        read_pic2word(authors_file(folder / "p.pt", stored), clip, tokenizer=beside)
        changed = {**stored, "visual.proj": stored["visual.proj"].clone()}
        changed["visual.proj"][3, 2] *= 1 + 2 * torch.finfo(dtype).eps
        with pytest.raises(ConversionError, match=r"differs in visual\.proj, by up to \d"):
            read_pic2word(authors_file(folder / "q.pt", changed), clip, tokenizer=beside)


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("visual.proj", lambda tensor: tensor + 0.25, "2.5e-01"),
        ("transformer.resblocks.0.attn.in_proj_bias", lambda tensor: tensor.roll(1), "e-01"),
        ("logit_scale", lambda tensor: tensor - 0.5, "5.0e-01"),
        ("ln_final.weight", lambda tensor: tensor * torch.nan, "inf"),
    ],
)
def test_another_clip_is_refused_by_key_and_size(tmp_path, key, change, said):
    config = clip_config()
    state = openai_state(config)
    clip, beside = as_lone_file(tmp_path, config, state)
    source = authors_file(tmp_path / "p.pt", {**state, key: change(state[key])})
    with pytest.raises(ConversionError) as refusal:
        read_pic2word(source, clip, tokenizer=beside)
    assert re.search(
        rf"p\.pt is not clip\.safetensors: it differs in {re.escape(key)}, by up to \S*{said}", str(refusal.value)
    )
    assert "leave --clip out" in str(refusal.value)


def test_a_clip_of_other_sizes_is_refused_by_key(tmp_path):
    config = clip_config()
    deeper = {**TOWER, "num_hidden_layers": 2}
    clip, beside = as_lone_file(tmp_path, config, openai_state(clip_config(**deeper)))
    with pytest.raises(
        ConversionError, match=r"p\.pt is not clip\.safetensors \(.*encoder\.layers\.1.*leave --clip out"
    ):
        read_pic2word(authors_file(tmp_path / "p.pt", openai_state(config)), clip, tokenizer=beside)


@pytest.mark.parametrize("form", ["open_clip", "ours"])
def test_the_same_numbers_with_another_activation_are_another_clip(tmp_path, form):
    config = clip_config(activation="gelu")
    state = openai_state(config)
    clip, beside = FORMS[form](tmp_path, config, state)
    with pytest.raises(ValueError, match="declares the activation gelu, .*quick_gelu"):
        read_pic2word(authors_file(tmp_path / "p.pt", state), clip, tokenizer=beside)


def test_a_tower_alone_is_no_clip(tmp_path, peer):
    peer.text_model.save_pretrained(tmp_path / "clip")
    tokenizer().save_pretrained(tmp_path / "clip")
    assert isinstance(read_clip(tmp_path / "clip")[0].empty, MMClipTextModel)
    with pytest.raises(ValueError, match="clip holds one tower of a CLIP"):
        read_pic2word(authors_file(tmp_path / "p.pt", as_openai(peer.state_dict())), tmp_path / "clip")


def test_options_that_say_nothing_are_refused(tmp_path):
    config = clip_config()
    state = openai_state(config)
    source, (clip, _) = authors_file(tmp_path / "p.pt", state), as_ours(tmp_path, config, state)
    with pytest.raises(ValueError, match="leave --clip-revision out"):
        read_pic2word(source, clip_revision="main")
    with pytest.raises(ValueError, match="leave --tokenizer out"):
        read_pic2word(source, clip, tokenizer=tmp_path / "tokenizer")
    (clip / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^clip holds no processor of CLIP: [^\n]+$"):
        read_pic2word(source, clip)


# What is refused


def dropped(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


CLIP, MAPPER = openai_state(clip_config()), drawn_mapper()
REFUSED = {
    "a key of the mapping network is missing": (CLIP, dropped(MAPPER, "layers.1.0.bias"), r"layers\.1\.bias"),
    "its first key is": (CLIP, dropped(MAPPER, "layers.0.0.weight"), r"lacks layers\.0\.0\.weight"),
    "its last layer is": (CLIP, dropped(MAPPER, "fc_out.weight"), r"lacks fc_out\.weight"),
    "it has a norm": (CLIP, {**MAPPER, "layers.0.3.weight": torch.ones(HIDDEN)}, r"layers\.0\.3\.weight"),
    "a layer is left out": (
        CLIP,
        {name.replace("layers.1", "layers.2"): tensor for name, tensor in MAPPER.items()},
        r"layers\.1\.weight",
    ),
    "it reads another width": (
        CLIP,
        drawn_mapper(image_dim=32),
        r"state_dict_img2text\.layers\.0\.0\.weight .*32.* 24",
    ),
    "it writes another width": (CLIP, drawn_mapper(word_dim=48), r"state_dict_img2text\.fc_out\.weight .*48.* 64"),
    "a layer has another width": (CLIP, {**MAPPER, "layers.1.0.weight": torch.ones(9, 9)}, r"layers\.1\.weight"),
    "a weight is no matrix": (CLIP, {**MAPPER, "fc_out.weight": torch.ones(4)}, r"fc_out\.weight \(4,\)"),
    "a key of the CLIP is missing": (dropped(CLIP, "visual.proj"), MAPPER, r"visual"),
    "it has more than a CLIP": ({**CLIP, "extra_ln_final.weight": torch.ones(64)}, MAPPER, r"extra_ln_final\.weight"),
    "there is no mapping network": (CLIP, {}, r"lacks layers\.0\.0\.weight"),
}


@pytest.mark.parametrize(
    ("what", "named"), [*((what, False) for what in REFUSED), *((what, True) for what in REFUSED if "CLIP" in what)]
)
def test_what_does_not_fit_is_refused_by_name_and_nothing_written(tmp_path, what, named):
    clip_state, mapper, keys = REFUSED[what]
    source = authors_file(tmp_path / "p.pt", clip_state, mapper)
    clip, beside = as_lone_file(tmp_path, None, CLIP)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConversionError, match=rf"^[^\n]*{keys}[^\n]*$"):
        convert.convert_pic2word(
            str(source), tmp_path / "out", clip=str(clip) if named else None, tokenizer=str(beside)
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_files_that_are_no_pic2word_are_refused(tmp_path):
    whole = authors_file(tmp_path / "whole.pt", CLIP).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"epoch": 3, "state_dict": CLIP, "optimizer": {}}, tmp_path / "clip.pt")
    torch.save(CLIP, tmp_path / "flat.pt")
    save_file(CLIP, tmp_path / "clip.safetensors")
    for name, said in {
        "cut.pt": "copy or download it again",
        "clip.pt": "no entry state_dict_img2text: it has epoch, optimizer, state_dict",
        "flat.pt": "no entry state_dict, state_dict_img2text: it has .* and 30 more",
        "clip.safetensors": "no entry state_dict, state_dict_img2text: it is no training checkpoint",
    }.items():
        with pytest.raises(ConversionError, match=rf"^{re.escape(name)} [^\n]*{said}[^\n]*$"):
            convert.convert_pic2word(str(tmp_path / name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Back


@pytest.mark.parametrize("resnet", [False, True])
def test_there_and_back_is_bit_equal(tmp_path, resnet):
    state, mapper = openai_state(clip_config(resnet)), drawn_mapper()
    source = authors_file(tmp_path / "p.pt", state, mapper)
    model = read_pic2word(source, tokenizer=tokenizer_folder(tmp_path))[0].build()
    back = export_pic2word(model)
    for entry, expected in (("state_dict", state), ("state_dict_img2text", mapper)):
        assert back[entry].keys() == expected.keys()
        for name, tensor in expected.items():
            assert back[entry][name].dtype == tensor.dtype
            assert torch.equal(back[entry][name], tensor), name


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A folder of ours with the published vocabulary."""
    text = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    source = authors_file(tmp_path_factory.mktemp("authors") / "p.pt", openai_state(clip_config(**text)))
    conversion, processor = read_pic2word(source)
    return conversion.save(tmp_path_factory.mktemp("ours") / "out", processor=processor, progress=False)


def test_the_file_that_is_written_back_is_the_authors(tmp_path, ours):
    folder = convert.export_pic2word(ours, tmp_path / "theirs", "pic2word")
    (path,) = folder.iterdir()
    assert path.name == "pic2word_model.pt"
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"epoch", "name", "state_dict", "state_dict_img2text"}
    again, model = read_pic2word(path)[0].build().state_dict(), Pic2WordModel.from_pretrained(ours).state_dict()
    assert again.keys() == model.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.items())


def widened(config):
    config.text_config.intermediate_size = 128


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda config: setattr(config.text_config, "hidden_act", "gelu"), "QuickGELU in one tower"),
        (
            lambda config: [setattr(t, "hidden_act", "gelu") for t in (config.text_config, config.vision_config)],
            "'gelu'",
        ),
        (lambda config: setattr(config.text_config, "num_attention_heads", 2), "2 heads in a width of 64"),
        (lambda config: setattr(config.vision_config, "layer_norm_eps", 1e-6), "layer_norm_eps = 1e-06"),
        (widened, "MLP of 128"),
    ],
)
def test_what_the_authors_code_cannot_be_is_named_and_nothing_written(tmp_path, change, named):
    config = clip_config()
    change(config)
    model = Pic2WordModel(Pic2WordConfig(clip_config=config))
    with pytest.raises(ValueError, match=named):
        export_pic2word(model)
    processor = Pic2WordProcessor(MMClipImageProcessorPil(size=32), tokenizer())
    with pytest.raises(ValueError, match="no tokenizer but the published one"):
        save_as_pic2word(model, processor, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# The command


def test_the_folder_has_a_card_that_names_both_sources(tmp_path):
    config = clip_config()
    state = openai_state(config)
    clip, _ = as_ours(tmp_path, config, state)
    source = authors_file(tmp_path / "pic2word_model.pt", state)
    out = convert.convert_pic2word(str(source), tmp_path / "out", clip=str(clip), dtype="float16")
    card = (out / "README.md").read_text()
    for origin in ("pic2word_model.pt", "`clip`", "clip.safetensors"):
        assert origin in card
    assert "state no licence for the weights of the mapping network" in card
    assert "tensor by tensor, and was left out" in card
    assert "license: other" in card
    assert AutoModel.from_pretrained(out).dtype == torch.float16
    assert AutoModel.from_pretrained(out).config.base_models == {
        "clip": {"name": "clip.safetensors", "revision": None}
    }


def test_the_card_of_the_stored_clip_says_so(tmp_path):
    source = authors_file(tmp_path / "p.pt", CLIP)
    out = convert.convert_pic2word(
        str(source), tmp_path / "out", tokenizer=str(tokenizer_folder(tmp_path)), license="mit"
    )
    card = (out / "README.md").read_text()
    assert "the one that the authors' file stores" in card
    assert "published under `mit`" in card
    assert "state no licence" not in card


def test_a_missing_peer_is_one_sentence_before_anything_is_read(tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    with pytest.raises(OSError, match="pip install open_clip_torch"):
        convert.convert_pic2word("no source", tmp_path / "out", check=True)
    with pytest.raises(ValueError, match="compares in float32"):
        convert.convert_pic2word("no source", tmp_path / "out", check=True, dtype="float16")
    with pytest.raises(ValueError, match="dtype must be one of float32, float16, bfloat16, not 'int8'"):
        convert.convert_pic2word("no source", tmp_path / "out", dtype="int8")
    assert not list(tmp_path.iterdir())


def test_the_command_goes_there_and_back(tmp_path, ours, capsys):
    assert main(["convert", "pic2word", str(ours), str(tmp_path / "back"), "--to", "pic2word"]) == 0
    source, again = str(tmp_path / "back" / "pic2word_model.pt"), tmp_path / "again"
    command = ["convert", "pic2word", source, "--clip", str(ours), str(again)]
    assert main(command) == 1
    assert "no whole CLIP checkpoint" in capsys.readouterr().err
    assert main(["convert", "pic2word", source, str(again), "--dtype", "bfloat16"]) == 0
    expected = AutoModel.from_pretrained(ours).to(torch.bfloat16).state_dict()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in AutoModel.from_pretrained(again).state_dict().items()
    )
    for option in ("--clip", "--dtype"):
        command = ["convert", "pic2word", str(ours), str(tmp_path / "other"), "--to", "pic2word", option, "float16"]
        assert main(command) == 1
        assert f"leave {option} out" in capsys.readouterr().err
