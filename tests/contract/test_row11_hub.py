"""Row 11: what is pushed opens for everyone, with the same bits: with hf_mm, and without it by the generated code.

A composite has code that needs hf_mm installed, though not imported, and says so.
"""

import pytest
from hub.opener import answers
from hub.opening import assert_same_answers, job_of, run_opener
from hub.server import HubServer
from huggingface_hub import ModelCard

from hf_mm.hub.converted_card import converted_card
from hf_mm.hub.push import push_folder
from hf_mm.hub.standalone import INSTALL

from .cases import cases_for

EVERY = pytest.mark.parametrize("case", cases_for(11), ids=str)
STANDALONE = pytest.mark.parametrize("case", cases_for(11, lambda case: not case.frozen_parts), ids=str)
COMPOSITES = pytest.mark.parametrize("case", cases_for(11, lambda case: bool(case.frozen_parts)), ids=str)


def name_of(case) -> str:
    return case.name.replace(" ", "-").replace(",", "")


def id_of(case) -> str:
    return f"someone/{name_of(case)}"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """Every case saved, pushed, and opened from the Hub in fresh processes."""
    root = tmp_path_factory.mktemp("row11")
    with HubServer() as hub, pytest.MonkeyPatch.context() as monkeypatch:
        hub.attach(monkeypatch)
        for case in cases_for(11):
            folder = root / name_of(case)
            model = case.build()
            model.save_pretrained(folder)
            case.preparer.save_pretrained(folder)
            origin = {"name": "https://example.org/weights.pt", "sha256": "0" * 64}
            card = converted_card(type(model), model.config, [origin], "mit", name_of(case))
            card.save(folder / "README.md")
            push_folder(folder, id_of(case), shim=bool(case.frozen_parts))
        jobs = {name_of(case): job_of(case, id_of(case)) for case in cases_for(11)}
        environment = hub.environment(root / "home")
        with_hf_mm = {name: {**job, "tasks": ()} for name, job in jobs.items()}  # its pipelines are row 9
        composites = {name_of(case): with_hf_mm[name_of(case)] for case in cases_for(11) if case.frozen_parts}
        jobs |= composites
        modes = {"without": jobs, "beside": composites, "with": with_hf_mm}
        found = run_opener(modes, root / "opened", environment)
    saved = {name: answers(str(root / name), job) for name, job in jobs.items()}
    commits = {name: repository.history() for name, repository in hub.repositories.items()}
    return {**found, "saved": saved, "commits": commits, "root": root}


@EVERY
def test_one_commit_holds_all_the_folder_does(case, pushed):
    commits = pushed["commits"][id_of(case)]
    folder = pushed["root"] / name_of(case)
    assert [commit.message for commit in commits] == [f"Push {name_of(case)}", "initial commit"]
    names = {path.name for path in folder.iterdir()}
    assert names | {".gitattributes"} == {name for name in commits[0].files if not name.endswith(".py")}
    assert commits[0].files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert not list(folder.glob("*.py"))


@EVERY
def test_with_hf_mm_its_own_classes_are_opened_and_no_trust_is_asked(case, pushed):
    name = name_of(case)
    assert_same_answers(pushed["with"][name], pushed["saved"][name])
    classes = dict(pushed["with"][name]["classes"])
    if case.model_type == "mm_blip2":  # whose tokenizers are those of other models
        classes.pop("AutoTokenizer", None)
    assert all(own.startswith("hf_mm.models.") for own in classes.values())


@COMPOSITES
def test_beside_hf_mm_a_composite_opens_by_the_code_that_imports_it(case, pushed):
    assert_same_answers(pushed["beside"][name_of(case)], pushed["saved"][name_of(case)])


@COMPOSITES
def test_without_hf_mm_a_composite_says_how_to_install_it(case, pushed):
    assert INSTALL in pushed["without"][name_of(case)]["error"]


@STANDALONE
def test_without_hf_mm_the_generated_code_gives_the_same_bits(case, pushed):
    name = name_of(case)
    assert_same_answers(pushed["without"][name], pushed["saved"][name])
    assert all(own.startswith("transformers_modules.") for own in pushed["without"][name]["classes"].values())


@EVERY
def test_the_card_opens_the_model_by_its_id(case, pushed):
    card = ModelCard(pushed["commits"][id_of(case)][0].files["README.md"].decode())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == case.pipeline_tag
    assert card.data.license == "mit"
    assert f'"{id_of(case)}"' in card.text and f'"{name_of(case)}"' not in card.text
    for part in ("Where the weights come from", "0" * 64, "Licence", "How to use it", "What was changed"):
        assert part in card.text
