"""What BLIP-2's converter refuses, in one sentence that names it: wrong sources, and models that have no way back."""

import pytest
import torch
from published_blip2s import (
    Drawn,
    clip_sources,
    clip_state,
    eva_state,
    lavis_file,
    lavis_state,
    opt_model,
    opt_tokenizer,
    read_tensors,
    retrieval_peer,
    save_peer,
    without,
)
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer

from hf_mm.conversion.rules import ConversionError
from hf_mm.models.blip2.conversion_blip2 import read_blip2
from hf_mm.models.blip2.conversion_blip2_export import export_lavis, export_transformers, save_as_transformers

# Keys


@pytest.mark.parametrize(
    "name",
    [
        "query_tokens",
        "temp",
        "itm_head.bias",
        "ln_vision.weight",
        "Qformer.cls.predictions.transform.dense.weight",
        "Qformer.cls.predictions.decoder.weight",
        "Qformer.bert.encoder.layer.1.output.dense.weight",
        "Qformer.bert.encoder.layer.2.crossattention.self.key.bias",
        "Qformer.bert.embeddings.position_embeddings.weight",
    ],
)
def test_a_missing_key_is_named(tmp_path, eva_file, bert_folder, name):
    path = lavis_file(tmp_path / "cut.pth", without(lavis_state(), name))
    with pytest.raises(ConversionError) as raised:
        read_blip2(path, vision=eva_file, tokenizer=bert_folder)
    ours = {
        "itm_head.bias": "itm_head.bias",
        "Qformer.cls.predictions.transform.dense.weight": "lm_head.transform.weight",
        "Qformer.bert.encoder.layer.1.output.dense.weight": "qformer.layers.1.text_mlp.fc2.weight",
        "Qformer.bert.encoder.layer.2.crossattention.self.key.bias": "qformer.layers.2.cross_attn.k_proj.bias",
        "Qformer.bert.embeddings.position_embeddings.weight": "qformer.embeddings.position_embeddings.weight",
    }
    assert ours.get(name, name) in str(raised.value)


def test_a_key_too_many_is_named(tmp_path, eva_file, bert_folder):
    path = lavis_file(tmp_path / "more.pth", {**lavis_state(), "Qformer.bert.pooler.dense.weight": torch.ones(2)})
    with pytest.raises(ConversionError, match="Qformer.bert.pooler.dense.weight"):
        read_blip2(path, vision=eva_file, tokenizer=bert_folder)


def test_a_file_of_something_else_is_told_apart(tmp_path):
    path = lavis_file(tmp_path / "odd.pth", {"conv.weight": torch.ones(2)})
    with pytest.raises(ConversionError, match="The file holds no Q-Former, so that it is none of BLIP-2"):
        read_blip2(path)


@pytest.mark.parametrize("name", ["Qformer.cls.predictions.decoder.weight", "Qformer.cls.predictions.decoder.bias"])
def test_a_head_that_is_not_tied_is_refused(tmp_path, eva_file, bert_folder, name):
    state = lavis_state()
    state[name] = state[name] + 1
    with pytest.raises(ConversionError, match=f"{name} are one tensor"):
        read_blip2(lavis_file(tmp_path / "untied.pth", state), vision=eva_file, tokenizer=bert_folder)


def test_keys_with_a_bias_are_refused(tmp_path, bert_folder):
    theirs = retrieval_peer()
    with torch.no_grad():
        theirs.vision_model.encoder.layers[1].self_attn.qkv.bias += 0.1
    save_peer(theirs, tmp_path / "hub", BertTokenizer.from_pretrained(bert_folder, bos_token="[DEC]"))
    with pytest.raises(ConversionError, match="encoder.layers.1.self_attn.qkv.bias"):
        read_blip2(tmp_path / "hub")


def test_a_folder_of_theirs_that_is_not_whole(tmp_path, bert_folder):
    folder = save_peer(
        retrieval_peer(), tmp_path / "hub", BertTokenizer.from_pretrained(bert_folder, bos_token="[DEC]")
    )
    state = read_tensors(folder)
    save_file(without(state, "qformer.encoder.layer.3.output_query.dense.bias"), folder / "model.safetensors")
    with pytest.raises(ConversionError, match="qformer.layers.3.query_mlp.fc2.bias"):
        read_blip2(folder)
    save_file({**state, "qformer.pooler.weight": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ConversionError, match="qformer.pooler.weight"):
        read_blip2(folder)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json of type blip-2"):
        read_blip2(folder)


def test_an_unwhole_language_model_is_refused(tmp_path, eva_file, opt_folder):
    state = load_file(opt_folder / "model.safetensors")
    opt_model().save_pretrained(tmp_path / "lm")
    opt_tokenizer().save_pretrained(tmp_path / "lm")
    name = "model.decoder.layers.1.fc2.bias"
    save_file(without(state, name), tmp_path / "lm" / "model.safetensors", metadata={"format": "pt"})
    path = lavis_file(tmp_path / "stage2.pth", lavis_state("opt_proj"))
    with pytest.raises(ConversionError, match=name):
        read_blip2(path, vision=eva_file, language_model=tmp_path / "lm")


# Files


def test_a_file_that_is_cut_short(tmp_path, stage1_file, eva_file, bert_folder):
    (tmp_path / "half.pth").write_bytes(stage1_file.read_bytes()[:20000])
    with pytest.raises(ConversionError, match="half.pth is no whole file"):
        read_blip2(tmp_path / "half.pth", vision=eva_file, tokenizer=bert_folder)


def test_code_in_the_file_is_not_run(tmp_path, eva_file, bert_folder):
    content = {"model": lavis_state(), "config": bytearray, "epoch": 0}
    torch.save({**content, "config": print}, tmp_path / "bad.pth")
    with pytest.raises(ConversionError, match="only plain tensors"):
        read_blip2(tmp_path / "bad.pth", vision=eva_file, tokenizer=bert_folder)


def test_other_models_are_named(tmp_path, eva_file, bert_folder):
    for key, other in (("llm_proj.weight", "InstructBLIP"), ("text_encoder.x", "BLIP, the first")):
        path = lavis_file(tmp_path / f"{key}.pth", {**lavis_state(), key: torch.ones(2)})
        with pytest.raises(ValueError, match=other):
            read_blip2(path, vision=eva_file, tokenizer=bert_folder)


# Parts


def test_the_tower_must_fit_and_be_named(tmp_path, stage1_file, bert_folder):
    with pytest.raises(ValueError, match="name it with --vision"):
        read_blip2(stage1_file, tokenizer=bert_folder)
    with pytest.raises(ConversionError, match="no EVA ViT"):
        read_blip2(stage1_file, vision=stage1_file, tokenizer=bert_folder)
    wide = Drawn()
    for name, tensor in eva_state().items():
        wide.draw(name, *(128 * size // 64 if size in (64, 192) else size for size in tensor.shape))
    torch.save(dict(wide), tmp_path / "wide.pth")
    with pytest.raises(ConversionError, match="ln_vision.weight is for features of 64, but the tower's have 128"):
        read_blip2(stage1_file, vision=tmp_path / "wide.pth", tokenizer=bert_folder)


def test_another_clip_is_refused(tmp_path, stage1_file, bert_folder):
    torch.save(clip_state(blocks=12), tmp_path / "B.pth")
    with pytest.raises(ValueError, match="12 blocks: BLIP-2 was trained on ViT-L/14"):
        read_blip2(stage1_file, vision=tmp_path / "B.pth", tokenizer=bert_folder)


def test_the_wrong_language_model_is_refused(tmp_path, eva_file, opt_folder, t5_folder):
    path = lavis_file(tmp_path / "stage2.pth", lavis_state("opt_proj"))
    with pytest.raises(ValueError, match="opt_proj was trained for a language model of type opt, but .* type t5"):
        read_blip2(path, vision=eva_file, language_model=t5_folder)
    with pytest.raises(ValueError, match="name it with --language-model"):
        read_blip2(path, vision=eva_file)


def test_options_that_say_nothing_are_refused(tmp_path, stage1_file, eva_file, bert_folder, opt_folder):
    with pytest.raises(ValueError, match="leave --language-model out"):
        read_blip2(stage1_file, vision=eva_file, language_model=opt_folder, tokenizer=bert_folder)
    save_peer(retrieval_peer(), tmp_path / "hub", BertTokenizer.from_pretrained(bert_folder, bos_token="[DEC]"))
    with pytest.raises(ValueError, match="leave --vision out"):
        read_blip2(tmp_path / "hub", vision=eva_file)


def test_another_vocabulary_is_refused(tmp_path, stage1_file, eva_file):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nx\n")
    BertTokenizer.from_pretrained(tmp_path / "words").save_pretrained(tmp_path / "words")
    with pytest.raises(ValueError, match="7 words with .DEC., .* but the Q-Former 16"):
        read_blip2(stage1_file, vision=eva_file, tokenizer=tmp_path / "words")
    with pytest.raises(ValueError, match="has no tokenizer that opens"):
        read_blip2(stage1_file, vision=eva_file, tokenizer=tmp_path / "nothing")


# The ways back


def test_what_lavis_cannot_be(tmp_path, bert_folder, stage1_file, eva_file):
    folder = save_peer(
        retrieval_peer(), tmp_path / "hub", BertTokenizer.from_pretrained(bert_folder, bos_token="[DEC]")
    )
    with pytest.raises(ValueError, match="heads that a MMBlip2ForImageTextRetrieval lacks"):
        export_lavis(read_blip2(folder)[0].build())
    model = read_blip2(stage1_file, vision=eva_file, tokenizer=bert_folder)[0].build()
    model.config.vision_norm_eps, model.config.vision_class_token = 1e-6, False
    with pytest.raises(ValueError, match="no vision_norm_eps = 1e-06, no features without the class token"):
        export_lavis(model)


def test_what_transformers_cannot_be(tmp_path, bert_folder, stage1_file, opt_folder, eva_file):
    clip = tmp_path / clip_sources(tmp_path)["flat"]
    conversion, processor, _ = read_blip2(stage1_file, vision=clip, tokenizer=bert_folder)
    with pytest.raises(ValueError, match="no tower of type mm_clip_vision, no vision_feature_layer = -2"):
        save_as_transformers(conversion.build(), processor, tmp_path / "back")
    path = lavis_file(tmp_path / "stage2.pth", lavis_state("opt_proj"))
    model = read_blip2(path, vision=eva_file, language_model=opt_folder)[0].build()
    with pytest.raises(ValueError, match="no word -200 for a picture in a vocabulary of 272"):
        export_transformers(model)
    assert not (tmp_path / "back").exists()
