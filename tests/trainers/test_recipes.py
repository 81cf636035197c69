"""Reading recipes, and the folder of a run."""

from dataclasses import dataclass, field

import pytest

from hf_mm.trainers.picture import PictureTrainingArguments
from hf_mm.trainers.recipes import (
    RECIPE_FILE,
    RESULT_FILE,
    claim_output_dir,
    decisive_settings,
    parse_recipe,
    read_recipe,
    refuse_other_sampling,
)


@dataclass
class Shape:
    width: int = 8
    tower: dict | str | None = None


@dataclass
class Schedule:
    learning_rate: float = 1.0
    streaming: bool = field(default=False)


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_the_recipe_and_the_recipe_over_defaults(tmp_path):
    recipe = write(tmp_path, "model:\n  width: 16\n  tower: {layers: 2}\ntraining:\n  learning_rate: 2e-3\n")
    shape, schedule = parse_recipe((Shape, Schedule), [recipe, "--width", "32", "--streaming", "true"])
    assert shape == Shape(width=32, tower={"layers": 2})
    assert schedule == Schedule(learning_rate=2e-3, streaming=True)


def test_a_recipe_extends_another(tmp_path):
    (tmp_path / "base.yaml").write_text("model:\n  width: 16\ntraining:\n  learning_rate: 3.0\n")
    recipe = write(tmp_path, "extends: base.yaml\ntraining:\n  learning_rate: 4.0\n")
    assert read_recipe(recipe) == {"width": 16, "learning_rate": 4.0}


def test_without_a_recipe_flags_are_enough():
    shape, schedule = parse_recipe((Shape, Schedule), ["--learning_rate", "0.5"])
    assert (shape, schedule) == (Shape(), Schedule(learning_rate=0.5))


def test_unknown_setting_is_named_with_the_nearest_one(tmp_path):
    recipe = write(tmp_path, "training:\n  learning_rat: 1\n")
    with pytest.raises(ValueError, match="'learning_rat', which does not exist: 'learning_rate'"):
        parse_recipe((Shape, Schedule), [recipe])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("width: 3\n", "'width' must be a section"),
        ("a:\n  width: 3\nb:\n  width: 4\n", "sets 'width' in two sections"),
        ("a: [\n", "is not YAML"),
        ("- a\n- b\n", "must be made of sections"),
    ],
)
def test_bad_recipes(tmp_path, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_recipe(write(tmp_path, text))


def test_missing_recipe(tmp_path):
    with pytest.raises(ValueError, match="no.yaml cannot be read"):
        read_recipe(tmp_path / "no.yaml")


def test_a_folder_keeps_to_one_recipe(tmp_path):
    claim_output_dir(tmp_path / "run", {"learning_rate": 1e-3, "seed": 0})
    claim_output_dir(tmp_path / "run", {"learning_rate": 1e-3, "seed": 0})
    with pytest.raises(ValueError, match=r"learning_rate = 0.001, now it is 0.002: .* --overwrite true"):
        claim_output_dir(tmp_path / "run", {"learning_rate": 2e-3, "seed": 0})
    (tmp_path / "run" / "checkpoint-3").mkdir()
    (tmp_path / "run" / RESULT_FILE).touch()
    claim_output_dir(tmp_path / "run", {"learning_rate": 2e-3, "seed": 0}, overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [RECIPE_FILE]
    assert '"learning_rate": 0.002' in (tmp_path / "run" / RECIPE_FILE).read_text()


def test_sampling_is_decisive_where_it_is_not_the_usual_one(tmp_path):
    """Runs that were recorded before it counted were drawn at random, and go on."""
    plain, grouped = (
        decisive_settings(PictureTrainingArguments(output_dir=str(tmp_path), train_sampling_strategy=one))
        for one in ("random", "group_by_length")
    )
    assert grouped.items() - plain.items() == {("train_sampling_strategy", "group_by_length")}
    assert "train_sampling_strategy" not in plain


def test_sampling_that_nothing_would_follow_is_refused(tmp_path):
    args = PictureTrainingArguments(output_dir=str(tmp_path), train_sampling_strategy="sequential")
    with pytest.raises(ValueError, match=r"drawn random or group_by_length: .* cannot be sequential\.$"):
        refuse_other_sampling(args, "group_by_length")
    args = PictureTrainingArguments(output_dir=str(tmp_path), train_sampling_strategy="group_by_length")
    refuse_other_sampling(args, "group_by_length")
    with pytest.raises(ValueError, match="cannot be group_by_length"):
        refuse_other_sampling(args)
