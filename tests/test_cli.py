"""The command is a door: what is behind it is tested where it is."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from contract.cases import CASES
from evaluation.composed.composed_toys import small_pic2word, write_cirr
from hub.server import HubServer
from huggingface_hub import ModelCard

from hf_mm import cli


@pytest.fixture
def folder(tmp_path):
    case = next(case for case in CASES if case.name == "mm_vit classifier")
    case.build().save_pretrained(tmp_path / "model")
    case.preparer.save_pretrained(tmp_path / "model")
    (tmp_path / "model/conversion.json").write_text('{"sources": [{"name": "someone/theirs"}]}')
    return tmp_path / "model"


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "hf_mm.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_a_card_and_a_push_from_the_shell(folder, tmp_path):
    assert cli.main(["card", str(folder), "--license", "mit", "--name", "someone/model"]) == 0
    with HubServer() as hub:
        done = run("push", folder, "someone/model", "--message", "first", **hub.environment(tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        commits = hub.repositories["someone/model"].history()
    assert [commit.message for commit in commits] == ["first", "initial commit"]
    assert commits[0].files["README.md"] == (folder / "README.md").read_bytes()
    assert done.stdout.strip().endswith(commits[0].oid)
    assert "model.safetensors" in done.stderr  # the upload's progress


def test_an_error_is_one_sentence_and_exit_code_1(folder, capsys):
    assert cli.main(["push", str(folder), "someone/model"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "hf-mm card" in line


def test_a_card_of_a_tuned_model(folder):
    (folder / "conversion.json").unlink()
    given = ["--license", "mit", "--base-model", "someone/theirs", "--dataset", "my pictures"]
    assert cli.main(["card", str(folder), *given]) == 0
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "someone/theirs")
    assert "my pictures" in card.text


def test_an_option_that_does_not_fit_is_called_as_it_was_typed(tmp_path, capsys):
    assert cli.main(["convert", "vit", "x", str(tmp_path / "out"), "--to", "timm", "--heads", "3"]) == 1
    assert "leave --heads out" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pic2word(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "pic2word"
    for part in small_pic2word():
        part.save_pretrained(folder)
    return folder


def test_an_evaluation_from_the_shell(pic2word, tmp_path, capsys):
    data, output, submission = write_cirr(tmp_path / "cirr"), tmp_path / "results.json", tmp_path / "out/mine.json"
    options = ["--output", str(output), "--submission", str(submission), "--batch-size", "3"]
    assert cli.main(["evaluate", "cirr", str(pic2word), str(data), *options]) == 0
    shown, result = capsys.readouterr().out, json.loads(output.read_text())
    assert result["protocol"] == "cirr" and result["queries"] == 4
    assert f"{result['results']['val']['chance']['r1']:.1f}" in shown and "chance" in shown
    assert "published: Pic2Word, ViT-L/14 " in shown and str(output) in shown
    assert f"{submission} is for the evaluation server" in shown
    assert json.loads(submission.read_text())["metric"] == "recall" and len(result["submissions"]) == 8


def test_evaluations_that_cannot_be(pic2word, folder, tmp_path, capsys):
    for arguments, message in (
        (["cirr", str(pic2word), str(tmp_path)], "split.rc2.val.json is missing: annotations are"),
        (["cirr", str(pic2word), str(tmp_path), "--split", "test1"], "pass submission"),
        (["fashioniq", str(pic2word), str(tmp_path)], "cap.dress.val.json is missing"),
        (["domain-conversion", str(pic2word), str(tmp_path)], "imagenet-r is missing"),
        (["object-composition", str(pic2word), str(tmp_path), "--seed", "1"], "instances_val2017.json is missing"),
        (["cirr", str(folder), str(tmp_path)], "pass a Pic2Word model and its processor"),
        (["cirr", str(pic2word), str(tmp_path), "--output", str(tmp_path)], "is a folder: name a file"),
    ):
        assert cli.main(["evaluate", *arguments]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["card", "nowhere"], "nowhere holds no config.json"),
        (["push", "nowhere", "someone/model"], "nowhere holds no config.json"),
        (["push", ".", "not an id"], "'not an id' is no id"),
    ],
)
def test_errors(arguments, message, capsys):
    assert cli.main(arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["push"], ["push", "a", "b", "--shim", "--no-standalone"]])
def test_wrong_usage_is_explained(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2 and "usage: hf-mm" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    for add_command in cli.COMMANDS:
        assert add_command.__name__.removeprefix("add_") in shown


def test_the_installed_command_is_this_door():
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    assert tomllib.loads(pyproject.read_text())["project"]["scripts"] == {
        "hf-mm": f"{cli.__name__}:{cli.main.__name__}"
    }
