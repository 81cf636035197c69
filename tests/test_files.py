"""A file that is there whole or not at all."""

import json
import os

import pytest

from hf_mm.files import write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("indent", [2, None])
def test_what_is_written_is_read_as_it_was(tmp_path, indent):
    value = {"b": [1, None, "straße 😀"], "a": {"x": 0.1}}
    write_json(tmp_path / "one.json", value, indent=indent)
    content = (tmp_path / "one.json").read_bytes()
    assert json.loads(content) == value and list(json.loads(content)) == ["b", "a"]
    assert "straße 😀".encode() in content and content.endswith(b"}\n")
    assert (b" 0.1" in content) == (indent is not None)
    write_json(tmp_path / "one.json", value, indent=indent, sort_keys=True)
    assert list(json.loads((tmp_path / "one.json").read_bytes())) == ["a", "b"]
    assert names(tmp_path) == ["one.json"]


def test_a_value_that_json_cannot_hold_leaves_what_was_there(tmp_path):
    write_json(tmp_path / "one.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "one.json", {"a": object()})
    assert json.loads((tmp_path / "one.json").read_text()) == {"a": 1}
    assert names(tmp_path) == ["one.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_what_was_there(tmp_path, monkeypatch, failing):
    write_json(tmp_path / "one.json", {"a": 1})

    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "one.json", {"a": 2})
    assert json.loads((tmp_path / "one.json").read_text()) == {"a": 1}
    assert names(tmp_path) == ["one.json"]
