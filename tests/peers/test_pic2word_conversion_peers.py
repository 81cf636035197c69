"""The authors' file of Pic2Word over open_clip's own CLIP, converted and checked by the command."""

import pytest

pytest.importorskip("open_clip", reason="open_clip is in the environment of the peers alone")

import open_clip
import torch
from contract.published import mapper_state, pic2word_content

from hf_mm.cli import main
from hf_mm.models.pic2word import conversion_pic2word
from hf_mm.models.pic2word.configuration_pic2word import Pic2WordMapperConfig


def authors_file(path, resnet=False):
    """Over open_clip's model with heads of 64 and QuickGELU, as the authors' code builds it."""
    vit = {"layers": 2, "width": 64, "head_width": 64, "patch_size": 8, "image_size": 32}
    tower = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "patch_size": None, "image_size": 64}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=24, quick_gelu=True, vision_cfg=tower if resnet else vit, text_cfg=text)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mapper = mapper_state(Pic2WordMapperConfig(image_dim=24, hidden_dim=20, word_dim=64))
    torch.save(pic2word_content(model.state_dict(), mapper), path)
    return str(path)


@pytest.mark.parametrize("resnet", [False, True])
def test_the_check_passes(tmp_path, resnet, capsys):
    source = authors_file(tmp_path / "p.pt", resnet)
    assert main(["convert", "pic2word", source, str(tmp_path / "out"), "--check"]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    for name in ("picture embeddings", "pseudo-words", "composed embeddings"):
        assert name in printed


def test_the_check_finds_another_activation_and_a_wrong_table(tmp_path, capsys, monkeypatch):
    source, out = authors_file(tmp_path / "p.pt"), str(tmp_path / "out")
    monkeypatch.setattr(conversion_pic2word, "ACTIVATION", "gelu")
    assert main(["convert", "pic2word", source, out, "--check"]) == 1
    assert "disagrees with open_clip's CLIP with the published equations" in capsys.readouterr().err
    monkeypatch.undo()

    rules = conversion_pic2word.mapper_rules()
    wrong = conversion_pic2word.rename("fc_out.bias", "fc_out.bias")
    halved = type(wrong)(wrong.sources, wrong.targets, lambda tensors: [tensors[0] / 2], wrong.backward)
    kept = conversion_pic2word.rename("fc_out.weight", "fc_out.weight")
    monkeypatch.setattr(conversion_pic2word, "mapper_rules", lambda: [rules[0], kept, halved])
    assert main(["convert", "pic2word", source, out, "--check"]) == 1
    assert "pseudo-words" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
