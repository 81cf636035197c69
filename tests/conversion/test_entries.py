"""Training checkpoints that hold several state dicts: which are read, and what is refused."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_mm.conversion.checkpoint import Origin, open_checkpoint
from hf_mm.conversion.rules import ConversionError

WHOLE = {"model": {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.arange(2.0)}}
WHOLE |= {"head": {"fc.weight": torch.arange(4.0).half()}, "epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}}


def saved(path, **changes):
    torch.save({**WHOLE, **changes}, path)
    return path


@pytest.mark.parametrize("model_prefix", ["", "module.", "module._orig_mod."])
@pytest.mark.parametrize("head_prefix", ["", "module."])
def test_entries_are_parted_by_their_names(tmp_path, model_prefix, head_prefix):
    """Prefixes of the trainers are taken off each entry, which may have them or not."""
    prefixed = {
        entry: {f"{prefix}{name}": tensor for name, tensor in WHOLE[entry].items()}
        for entry, prefix in (("model", model_prefix), ("head", head_prefix))
    }
    path = saved(tmp_path / "epoch_3.pt", **prefixed)
    checkpoint = open_checkpoint(path, entries=("model", "head"))
    assert list(checkpoint.tensors) and set(checkpoint.tensors) == {"model.a.weight", "model.a.bias", "head.fc.weight"}
    for entry in ("model", "head"):
        part = checkpoint.select(f"{entry}.")
        assert set(part.tensors) == set(WHOLE[entry])
        assert all(torch.equal(part.tensors[name], tensor) for name, tensor in WHOLE[entry].items())
    assert checkpoint.origins == (Origin("epoch_3.pt", None, hashlib.sha256(path.read_bytes()).hexdigest()),)
    assert set(open_checkpoint(path, entries=["head"]).tensors) == {"head.fc.weight"}


def test_an_entry_that_is_called_like_a_prefix_keeps_its_name(tmp_path):
    torch.save({"module": {"a": torch.ones(1)}}, tmp_path / "m.pt")
    assert set(open_checkpoint(tmp_path / "m.pt", entries=["module"]).tensors) == {"module.a"}


def test_entries_of_a_file_in_a_folder(tmp_path):
    saved(tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path, entries=["head"])
    assert set(checkpoint.tensors) == {"head.fc.weight"} and checkpoint.folder == tmp_path


REFUSED = {
    "no such entry": ({}, ("head", "ema", "tail"), "no entry ema, tail: it has epoch, head, model, optimizer"),
    "a number": ({}, ("epoch",), "epoch of m.pt holds a int"),
    "the optimizer": ({}, ("optimizer",), "optimizer of m.pt holds what is no tensor: state"),
    "numbers for names": ({"head": {0: torch.ones(1)}}, ("head",), "head of m.pt calls its tensors 0"),
    "nothing": ({"head": {}}, ("head",), "m.pt holds no tensors"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_state_dict_is_refused_in_one_sentence(tmp_path, what):
    changes, entries, said = REFUSED[what]
    with pytest.raises(ConversionError, match=rf"^[^\n]*{re.escape(said)}[^\n]*$"):
        open_checkpoint(saved(tmp_path / "m.pt", **changes), entries=entries)


def test_files_without_entries_are_refused(tmp_path):
    save_file(WHOLE["head"], tmp_path / "m.safetensors")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    for name in ("m.safetensors", "list.pt"):
        with pytest.raises(ConversionError, match=f"^{name} has no entry head: it is no training checkpoint.$"):
            open_checkpoint(tmp_path / name, entries=["head"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone counts these pages")
def test_what_is_not_asked_for_takes_no_memory(tmp_path):
    def anonymous() -> int:
        return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    size = 1 << 26
    path = saved(tmp_path / "m.pt", optimizer={"state": {0: {"exp_avg": torch.ones(size // 4)}}})
    before = anonymous()
    checkpoint = open_checkpoint(path, entries=["model"])
    assert set(checkpoint.tensors) == {"model.a.weight", "model.a.bias"}
    assert anonymous() - before < size // 4
