"""BLIP-2's converter from the shell."""

import pytest
import torch
from published_blip2s import (
    eva_state,
    generation_peer,
    lavis_file,
    lavis_state,
    opt_tokenizer,
    read_tensors,
    require_equal,
    retrieval_peer,
    save_peer,
    t5_tokenizer,
)
from transformers import BertTokenizer

from hf_mm.cli import main


@pytest.mark.parametrize("kind", ["retrieval", "opt", "t5"])
def test_there_and_back_from_the_shell(tmp_path, bert_folder, kind, capsys):
    theirs = retrieval_peer() if kind == "retrieval" else generation_peer(kind)
    tokenizer = {"opt": opt_tokenizer, "t5": t5_tokenizer}.get(kind)
    tokenizer = tokenizer() if tokenizer else BertTokenizer.from_pretrained(bert_folder, bos_token="[DEC]")
    if kind != "retrieval":  # as Blip2Processor leaves it
        missing = theirs.config.image_token_index - len(tokenizer)
        tokenizer.add_tokens([f"unused{number}" for number in range(missing)])
        tokenizer.add_tokens(["<image>"], special_tokens=True)
    hub, ours, back = save_peer(theirs, tmp_path / "hub", tokenizer), tmp_path / "ours", tmp_path / "back"
    assert main(["convert", "blip2", str(hub), str(ours), "--check"]) == 0
    assert "Largest relative difference from transformers' BLIP-2" in capsys.readouterr().out
    card = (ours / "README.md").read_text()
    assert ("no temperature" in card) == (kind == "retrieval")
    assert main(["convert", "blip2", str(ours), str(back), "--to", "transformers"]) == 0
    require_equal(read_tensors(back), read_tensors(hub))


def test_lavis_from_the_shell(tmp_path, eva_file, opt_folder, capsys):
    state = lavis_state("opt_proj")
    source = str(lavis_file(tmp_path / "blip2_pretrained_opt2.7b.pth", state))
    options = ["--vision", str(eva_file), "--language-model", str(opt_folder)]
    assert main(["convert", "blip2", source, str(tmp_path / "ours"), *options, "--dtype", "float32"]) == 0
    assert main(["convert", "blip2", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "lavis"]) == 0
    content = torch.load(tmp_path / "back" / "blip2.pth", weights_only=True)
    require_equal(content["model"], {**state, **eva_state("visual_encoder.")})
    capsys.readouterr()
    assert main(["convert", "blip2", source, str(tmp_path / "more"), *options, "--check"]) == 1
    assert "does not open LAVIS's files: leave --check out" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()
