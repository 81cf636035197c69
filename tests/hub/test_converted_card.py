import json

import pytest
from contract.cases import CASES
from hub.server import faults_of_card
from huggingface_hub import ModelCard
from transformers import BertConfig, BertModel

from hf_mm.hub.converted_card import converted_card, finetuned_card
from hf_mm.hub.folder_card import write_card
from hf_mm.hub.model_card import build_model_card
from hf_mm.hub.standalone import INSTALL

HASH = "0123456789abcdef" * 4
EVERY = pytest.mark.parametrize("case", CASES, ids=str)


def card_of(case, *origins, license="mit", name="mine"):
    origins = origins or ({"name": "someone/theirs", "revision": "v1", "sha256": HASH},)
    return converted_card(case.model_class, case.config(), origins, license, name)


def case_of(name):
    return next(case for case in CASES if case.name == name)


def table(card, title):
    """The rows under a heading, without their header."""
    section = card.text.split(f"## {title}")[1].split("## ")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"][
        2:
    ]


@EVERY
def test_metadata(case):
    data = card_of(case).data
    assert (data.library_name, data.license, data.base_model) == ("transformers", "mit", ["someone/theirs"])
    assert data.pipeline_tag == case.pipeline_tag
    assert data.tags == ["hf_mm", case.model_type]


@EVERY
def test_the_parameters_are_counted(case):
    assert f"\n{case.build().num_parameters():,} parameters, stored as float32." in card_of(case).text


def reads_by_clip(case) -> bool:
    """Whether CLIP's tokenizer prepares its texts, which ftfy mends first."""
    return "text" in case.inputs and "blip2" not in case.name


@EVERY
def test_no_cell_is_left_unfilled(case):
    text = card_of(case).text
    assert "{{" not in text and "{%" not in text and "None" not in text
    assert '"mine"' in text and INSTALL in text
    assert ("pip install ftfy" in text) == reads_by_clip(case)


def test_origins_are_listed_with_what_is_known():
    card = card_of(
        case_of("mm_clip"),
        {"name": "someone/theirs", "revision": "v1", "sha256": HASH},
        {"name": "/home/me/secret/weights.pt", "revision": None, "sha256": HASH},
        {"name": "https://example.org/a/b.pt?token=secret"},
        {"name": "theirs.safetensors"},
        {"name": "gpt2", "revision": "v2"},
    )
    assert table(card, "Where the weights come from") == [
        ["`someone/theirs`", "`v1`", f"`{HASH}`"],
        ["`weights.pt`", "not recorded", f"`{HASH}`"],
        ["`https://example.org/a/b.pt`", "not recorded", "not recorded"],
        ["`theirs.safetensors`", "not recorded", "not recorded"],
        ["`gpt2`", "`v2`", "not recorded"],
    ]
    assert card.data.base_model == ["someone/theirs", "gpt2"]
    assert "secret" not in str(card)


def test_the_licence_is_given_or_said_to_be_open():
    assert "published under `mit`" in card_of(case_of("mm_clip")).text
    other = card_of(case_of("mm_clip"), license="other")
    assert other.data.license == "other" and "was not given" in other.text


def test_origins_and_a_known_class_are_needed():
    case = case_of("mm_clip")
    with pytest.raises(ValueError, match="at least one origin"):
        converted_card(case.model_class, case.config(), [], "mit", "mine")
    with pytest.raises(ValueError, match="BertModel is not a class of the type 'bert'"):
        converted_card(BertModel, BertConfig(), [{"name": "x"}], "mit", "mine")


class TestFineTuned:
    def card(self, case, license="mit", **given):
        return finetuned_card(case.model_class, case.config(), license, "mine", **given)

    @EVERY
    def test_what_the_config_tells_and_no_blank(self, case):
        card = self.card(case)
        assert card.data.pipeline_tag == case.pipeline_tag and card.data.license == "mit"
        assert f"\n{case.build().num_parameters():,} parameters, stored as float32." in card.text
        assert "{{" not in card.text and "{%" not in card.text and "None" not in card.text
        assert '"mine"' in card.text and INSTALL in card.text
        assert ("pip install ftfy" in card.text) == reads_by_clip(case)
        assert card.data.base_model is None and card.data.datasets is None
        assert [row[1] for row in table(card, "Training")] == ["unknown", "unknown"]
        assert "not recorded" in card.text and "scratch" not in card.text
        assert not faults_of_card(str(card))

    @pytest.mark.parametrize(
        ("given", "base_model", "datasets", "shown"),
        [
            ({"base_model": "RN50"}, None, None, ["`RN50`", "unknown"]),
            ({"base_model": "a/clip", "dataset": "b/pics"}, "a/clip", ["b/pics"], ["`a/clip`", "`b/pics`"]),
            ({"base_model": "/home/me/clip", "dataset": "my pictures"}, None, None, ["`clip`", "`my pictures`"]),
        ],
    )
    def test_what_is_given(self, given, base_model, datasets, shown):
        card = self.card(case_of("mm_clip"), **given)
        assert card.data.base_model == base_model and card.data.datasets == datasets
        assert [row[1] for row in table(card, "Training")] == shown
        assert "/home" not in str(card)
        assert not faults_of_card(str(card))

    def test_the_licence_is_given_or_said_to_be_open(self):
        assert "published under `mit`" in self.card(case_of("mm_clip")).text
        assert "not settled: those of" in self.card(case_of("mm_clip"), license="other").text


class TestFolder:
    def save(self, case, folder, **records):
        case.build().save_pretrained(folder)
        for name, content in records.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder

    def test_of_a_conversion(self, tmp_path):
        record = {"sources": [{"name": "someone/theirs", "revision": "v1", "sha256": HASH}], "versions": {}}
        case = case_of("mm_vit classifier")
        folder = self.save(case, tmp_path / "mine", conversion=record)
        assert write_card(folder, "mit") == folder / "README.md"
        assert str(ModelCard.load(folder / "README.md")) == str(card_of(case))
        assert 'model="me/mine"' in write_card(folder, model_name="me/mine").read_text()

    def test_of_a_run(self, tmp_path):
        case = case_of("mm_clip")
        results = {"metrics": {}, "training": {"steps": 7}, "data": {"source": "x", "pictures": 3, "skipped": {}}}
        results["machine"] = {"device": "CPU"}
        settings = {"learning_rate": 0.5}
        folder = self.save(case, tmp_path / "mine", recipe=settings, results=results)
        write_card(folder)
        expected = build_model_card(
            "clip", model_name="mine", model=case.build(), settings=settings, license="other", **results
        )
        assert (folder / "README.md").read_text() == str(expected)

    def test_of_a_model_that_was_tuned_in_some_other_way(self, tmp_path):
        case = case_of("mm_clip")
        folder = self.save(case, tmp_path / "mine")
        (folder / "README.md").write_text("[More Information Needed]")
        write_card(folder, "mit", base_model="a/clip", dataset="b/pics")
        expected = finetuned_card(case.model_class, case.config(), "mit", "mine", "a/clip", "b/pics")
        assert (folder / "README.md").read_text() == str(expected)

    @pytest.mark.parametrize("given", [{"base_model": "a/clip"}, {"dataset": "b/pics"}])
    def test_what_a_record_tells_is_not_given_otherwise(self, tmp_path, given):
        folder = self.save(case_of("mm_clip"), tmp_path, conversion={"sources": [{"name": "someone/theirs"}]})
        with pytest.raises(ValueError, match="conversion.json tells base model and data set: leave them out"):
            write_card(folder, **given)

    @pytest.mark.parametrize(
        ("records", "message"),
        [
            ({"recipe": {}}, "a run that is not finished, of recipe.json alone"),
            ({"results": {}}, "a run that is not finished, of results.json alone"),
            ({"conversion": {}}, "conversion.json is no record.*sources"),
            ({"conversion": {"sources": []}}, "at least one origin"),
            ({"recipe": {}, "results": {"metrics": {}}}, "results.json is no record.*training"),
        ],
    )
    def test_a_folder_without_a_whole_record_is_refused_and_its_card_kept(self, tmp_path, records, message):
        folder = self.save(case_of("mm_clip"), tmp_path, **records)
        (folder / "README.md").write_text("mine")
        before = {path.name for path in folder.iterdir()}
        with pytest.raises(ValueError, match=message):
            write_card(folder)
        assert (folder / "README.md").read_text() == "mine"
        assert {path.name for path in folder.iterdir()} == before
