"""BLIP-2 of transformers to ours and back, and ours that came from LAVIS to transformers."""

import logging

import pytest
from PIL import Image
from published_blip2s import (
    QUERIES,
    generation_peer,
    lavis_file,
    lavis_state,
    opt_tokenizer,
    read_tensors,
    require_equal,
    require_same_generation,
    require_same_retrieval,
    retrieval_peer,
    save_peer,
    t5_tokenizer,
)
from safetensors.torch import save_file
from transformers import AutoProcessor, BertTokenizer, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from hf_mm.models.blip2.conversion_blip2 import read_blip2
from hf_mm.models.blip2.conversion_blip2_export import export_transformers, save_as_transformers
from hf_mm.models.blip2.modeling_blip2_stage1 import MMBlip2ForImageTextRetrieval


def test_their_retrieval(tmp_path, bert_folder):
    theirs = retrieval_peer()
    tokenizer = BertTokenizer.from_pretrained(bert_folder, bos_token="[DEC]")
    save_peer(theirs, tmp_path / "hub", tokenizer)
    conversion, processor, notes = read_blip2(tmp_path / "hub")
    ours = conversion.build()
    assert type(ours) is MMBlip2ForImageTextRetrieval
    assert ours.config.vision_norm_eps == 1e-6
    assert ours.temperature.tolist() == [pytest.approx(0.07)] and "no temperature" in notes[0]
    require_same_retrieval(ours, theirs, 1e-9)
    assert list(processor.image_processor.image_mean) == [0.4] * 3
    assert not processor.image_processor.do_center_crop


def test_their_retrieval_and_back(tmp_path, bert_folder):
    theirs = retrieval_peer()
    save_peer(theirs, tmp_path / "hub", BertTokenizer.from_pretrained(bert_folder, bos_token="[DEC]"))
    conversion, processor, _ = read_blip2(tmp_path / "hub")
    folder = save_as_transformers(conversion.build(), processor, tmp_path / "back")
    again, loading = Blip2ForImageTextRetrieval.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    require_equal(again.state_dict(), theirs.state_dict())
    for part in ("vision_config", "qformer_config"):
        assert getattr(again.config, part).to_diff_dict() | {
            "initializer_range": 0,
            "dtype": 0,
            "architectures": 0,
        } == (getattr(theirs.config, part).to_diff_dict() | {"initializer_range": 0, "dtype": 0, "architectures": 0})
    their_processor = AutoProcessor.from_pretrained(folder)
    assert type(their_processor).__name__ == "Blip2Processor"


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_their_generation_and_back(tmp_path, kind):
    theirs = generation_peer(kind)
    tokenizer = opt_tokenizer() if kind == "opt" else t5_tokenizer()
    save_peer(theirs, tmp_path / "hub", tokenizer)
    conversion, processor, notes = read_blip2(tmp_path / "hub")
    ours = conversion.build()
    assert notes == []
    assert ours.config.image_token_id == theirs.config.image_token_index == processor.image_token_id
    require_same_generation(ours, theirs, 1e-9)
    assert ours.generation_config.eos_token_id == processor.eos_token_id == (7 if kind == "opt" else 1)
    config, state = export_transformers(conversion.build())
    expected = generation_peer(kind)
    expected.save_pretrained(tmp_path / "plain")
    require_equal(state, read_tensors(tmp_path / "plain"))
    assert config.image_token_index == theirs.config.image_token_index


def test_repeated_tied_tensors_are_read_once(tmp_path):
    """As older folders have them."""
    theirs = generation_peer("opt")
    folder = save_peer(theirs, tmp_path / "hub", opt_tokenizer())
    state, name = read_tensors(folder), "language_model.lm_head.weight"
    state[name] = state["language_model.model.decoder.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors")
    once = read_blip2(folder)[0].build()
    assert once.language_model.lm_head.weight is once.language_model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_stage_2_to_transformers(tmp_path, eva_file, request, kind):
    """The picture's tokens become a new word, and the new model says what ours says."""
    path = lavis_file(tmp_path / "stage2.pth", lavis_state(f"{kind}_proj"))
    conversion, processor, _ = read_blip2(
        path, vision=eva_file, language_model=request.getfixturevalue(f"{kind}_folder")
    )
    ours = conversion.build()
    folder = save_as_transformers(ours, processor, tmp_path / "back")
    theirs, loading = Blip2ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    theirs.vision_model.post_layernorm.eps = 1e-5  # which is what the warning is about
    require_same_generation(ours.float(), theirs, 1e-9)
    batch = AutoProcessor.from_pretrained(folder)(
        images=[Image.new("RGB", (30, 30))], text=["a red cat"], return_tensors="pt"
    )
    assert int((batch["input_ids"] == theirs.config.image_token_index).sum()) == QUERIES


def test_what_transformers_leaves_out_is_said(tmp_path, bert_folder, stage1_file, eva_file, caplog, monkeypatch):
    conversion, processor, _ = read_blip2(stage1_file, vision=eva_file, tokenizer=bert_folder)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    folder = save_as_transformers(conversion.build(), processor, tmp_path / "back")
    assert any("eps, 1e-06, not 1e-05" in message for message in caplog.messages)
    assert any("no lm_head, temperature: left out" in message for message in caplog.messages)
    theirs = Blip2ForImageTextRetrieval.from_pretrained(folder)
    theirs.vision_model.post_layernorm.eps = 1e-5
    require_same_retrieval(conversion.build(), theirs, 1e-9)
