import ast
import json
import shutil
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from contract.cases import CASES, TEXT, vocabulary
from hub.opener import answers
from hub.opening import OFFLINE, assert_same_answers, job_of, run_opener, write_standalone
from transformers.dynamic_module_utils import get_relative_import_files

from hf_mm import MODELS, __version__
from hf_mm.hub import standalone
from hf_mm.hub.standalone import shim_files, standalone_changes, standalone_files
from hf_mm.models.clip import image_processing_clip
from hf_mm.models.clip.configuration_clip import MMClipConfig

CHECKPOINT = Path(__file__).parents[2] / "checkpoints/mm-clip-emoji"
EVERY_TYPE = pytest.mark.parametrize("model_type", MODELS)


def case(name):
    return next(case for case in CASES if case.name == name)


def save(case, folder):
    case.build().save_pretrained(folder)
    case.preparer.save_pretrained(folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def relative_imports(source):
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]


def all_imports(source):
    """Top-level packages that a source imports from elsewhere."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names}


@EVERY_TYPE
def test_files_import_each_other_alone_and_in_the_form_that_the_loader_reads(model_type, tmp_path):
    files = standalone_files(model_type)
    for name, source in files.items():
        (tmp_path / name).write_text(source)
        for node in relative_imports(source):
            assert node.level == 1 and f"{node.module}.py" in files, f"{name}: {ast.unparse(node)}"
        assert "hf_mm" not in all_imports(source)
    for name, source in files.items():  # what transformers copies with each file
        found = get_relative_import_files(tmp_path / name)
        assert {f"{node.module}.py" for node in relative_imports(source)} <= {Path(path).name for path in found}
        assert all(Path(path).is_file() for path in found)


@EVERY_TYPE
def test_files_are_the_sources_but_for_imports(model_type):
    """A header line, imports that point into the folder, and in the file that is opened first an ending."""
    ended = 0
    for source in standalone_files(model_type).values():
        header, _, rest = source.partition("\n")
        assert header.startswith("# Generated from hf_mm/") and f"of hf_mm {__version__}. Apache-2.0" in header
        origin = header.split()[3].removesuffix(".py").replace("/", ".")
        ours = ast.parse(Path(find_spec(origin).origin).read_text()).body
        flat = ast.parse(rest).body
        ended += len(flat) > len(ours)
        for found, expected in zip(flat, ours, strict=False):
            if isinstance(expected, ast.ImportFrom):
                assert [alias.name for alias in found.names] == [alias.name for alias in expected.names]
            elif not any(isinstance(node, ast.ImportFrom) for node in ast.walk(expected)):
                assert ast.dump(found) == ast.dump(expected)
    assert ended == 1


def test_a_composite_takes_the_towers_that_it_has():
    vit = standalone_files(case("mm_clip with mm_vit").config())
    assert {"modeling_vit.py", "modeling_clip.py", "hf_mm_nn_attention.py"} <= set(vit)
    assert "modeling_vit.py" not in standalone_files(case("mm_clip").config())


def test_a_type_that_is_not_ours_is_refused():
    with pytest.raises(ValueError, match="'bert' is no model type of hf_mm"):
        standalone_files("bert")
    with pytest.raises(ValueError, match="'bert' is no model type of hf_mm"):
        shim_files("bert")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import hf_mm.nn.blocks\n", "imports hf_mm whole"),
        ("from . import attention\n", "imports from the package hf_mm.nn"),
        ("from ..models.clip import modeling_clip\n", "imports from the package hf_mm.models.clip"),
        ("from .attention \\\n    import Attention\n", "line 1.*one line"),
    ],
)
def test_an_import_that_a_flat_folder_cannot_have_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        standalone._flatten("hf_mm.nn.made_up", source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no config.json"),
        ("{", "cannot be read"),
        ('{"model_type": "bert"}', "'bert' is no model type of hf_mm"),
        ('{"model_type": "mm_clip", "projection_dim": "wide"}', "cannot be read.*projection_dim"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}', "cannot be read"),
    ],
)
def test_a_folder_without_a_model_of_ours_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        standalone_changes(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"] * (content is not None)


def test_a_folder_of_an_adapter_is_told_apart(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter and not its model: push it with PEFT"):
        standalone_changes(tmp_path)


def test_writing_adds_code_and_places_and_changes_nothing_else(tmp_path):
    folder = save(case("mm_clip"), tmp_path / "model")
    before = contents(folder)
    write_standalone(folder)
    after = contents(folder)
    assert {name for name in after if name not in before} == set(standalone_files("mm_clip"))
    for name in before:
        if before[name] != after[name]:
            assert name.endswith(".json")
            assert without_auto_map(json.loads(after[name])) == json.loads(before[name])
    write_standalone(folder)
    assert contents(folder) == after


def without_auto_map(value):
    if isinstance(value, dict):
        return {key: without_auto_map(item) for key, item in value.items() if key != "auto_map"}
    return value


def test_every_auto_class_of_the_table_has_a_place(tmp_path):
    folder = save(case("mm_clip"), tmp_path)
    write_standalone(folder)
    files = standalone_files("mm_clip")

    def check(reference, own):
        module, _, name = reference.partition(".")
        assert name == own.__name__
        assert name in {getattr(node, "name", None) for node in ast.parse(files[f"{module}.py"]).body} | {
            alias.name for node in relative_imports(files[f"{module}.py"]) for alias in node.names
        }

    entry = MODELS["mm_clip"]
    config = json.loads((folder / "config.json").read_text())["auto_map"]
    for auto_class, model in entry.models.items():
        check(config[auto_class.__name__], model)
    check(config["AutoConfig"], entry.config)
    processor = json.loads((folder / "processor_config.json").read_text())
    check(processor["auto_map"]["AutoProcessor"], entry.processor)
    (image_processor,) = processor["image_processor"]["auto_map"]["AutoImageProcessor"].values()
    check(image_processor, entry.image_processors["pil"])
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())["auto_map"]["AutoTokenizer"]
    check(tokenizer[1], entry.tokenizer)


def test_classes_that_are_not_ours_are_not_placed(tmp_path):
    """Such as the tokenizer of a text tower from elsewhere."""
    folder = save(case("mm_clip"), tmp_path)
    tokenizer, processor = folder / "tokenizer_config.json", folder / "processor_config.json"
    tokenizer.write_text(tokenizer.read_text().replace("MMClipTokenizer", "BertTokenizer"))
    processor.write_text(processor.read_text().replace("MMClipImageProcessor", "CLIPImageProcessor"))
    changes = standalone_changes(folder)
    assert "tokenizer_config.json" not in changes
    changed = json.loads(changes["processor_config.json"])
    assert changed["auto_map"] == {"AutoProcessor": "processing_clip.MMClipProcessor"}
    assert changed["image_processor"] == json.loads(processor.read_text())["image_processor"]


@pytest.mark.parametrize("saved_as", ["MMClipImageProcessor", "MMClipImageProcessorPil"])
def test_what_was_saved_beside_torchvision_is_opened_by_what_every_machine_has(saved_as, tmp_path, monkeypatch):
    """The class of the torchvision backend needs it when it is opened; both read the same settings."""
    folder = save(case("mm_clip"), tmp_path)
    processor = folder / "processor_config.json"
    settings = json.loads(processor.read_text())
    settings["image_processor"]["image_processor_type"] = saved_as
    processor.write_text(json.dumps(settings))
    entry = MODELS["mm_clip"]
    both = {"torchvision": image_processing_clip.MMClipImageProcessor, **entry.image_processors}
    monkeypatch.setitem(MODELS, "mm_clip", replace(entry, image_processors=both))
    placed = json.loads(standalone_changes(folder)["processor_config.json"])["image_processor"]["auto_map"]
    assert placed == {"AutoImageProcessor": {"pil": "image_processing_clip.MMClipImageProcessorPil"}}
    assert "MMClipImageProcessor\n" not in shim_files("mm_clip")["hf_mm_shim.py"]


def clip_with_dinov2():
    tower = {"model_type": "dinov2", "image_size": 32, "patch_size": 8, "hidden_size": 32}
    tower |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**TEXT, **vocabulary()}
    config = partial(MMClipConfig, vision_config=tower, text_config=text, projection_dim=24)
    return replace(case("mm_clip"), name="mm_clip with dinov2", config=config)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Folders opened in a process that has no hf_mm, saved there and opened again; and what hf_mm says to each."""
    root = tmp_path_factory.mktemp("local")
    shutil.copytree(CHECKPOINT, root / "trained")
    folders = {"trained": (case("mm_clip with mm_vit"), root / "trained")}
    for name in ("mm_clip", "mm_clip with mm_vit", "mm_vit classifier", "mm_clip_text"):
        folders[name.replace(" ", "_")] = (case(name), save(case(name), root / name.replace(" ", "_")))
    folders["mm_clip_with_dinov2"] = (clip_with_dinov2(), save(clip_with_dinov2(), root / "mm_clip_with_dinov2"))
    jobs = {name: job_of(own, folder, save=True) for name, (own, folder) in folders.items()}
    for name in jobs.keys() - {"trained", "mm_vit_classifier"}:  # pipelines of every case: row 11 of the contract
        jobs[name]["tasks"] = ()
    bare = job_of(case("mm_clip"), root / "mm_clip")
    bare["tasks"] = ()
    for inputs in bare["prepare"].values():
        if "text" in inputs:
            inputs["text"] = ["a café", "über", "naïve"]  # not plain, but nothing to mend
    expected = {name: answers(job["source"], job) for name, job in {**jobs, "bare": bare}.items()}
    for _, folder in folders.values():
        write_standalone(folder)
    # Another folder of the same name and type, whose code has other bytes; and then the first again.
    other = shutil.copytree(root / "mm_clip", root / "zz" / "mm_clip")
    blocks = other / "hf_mm_nn_blocks.py"
    blocks.write_text("# other bytes\n" + blocks.read_text())
    jobs |= {"zz": {**jobs["mm_clip"], "source": str(other)}, "zz_the_first_again": jobs["mm_clip"]}
    expected |= {"zz": expected["mm_clip"], "zz_the_first_again": expected["mm_clip"]}
    jobs["shim"] = {**jobs["mm_clip"], "source": str(with_shim(root / "shim")), "save": False}
    shim = {**jobs["shim"], "save": True}
    first = {auto: {**shim, "first": auto} for auto in ("AutoConfig", "AutoModel", *shim["prepare"])}
    found = run_opener(
        {"without": {**jobs, "bare": bare}, "bare": {"bare": bare}, "beside": first}, root / "opened", OFFLINE
    )
    return {**found, "expected": expected}


def with_shim(folder):
    write_standalone(save(case("mm_clip"), folder), shim=True)
    return folder


SAVED_AGAIN = ("trained", "mm_clip", "mm_clip_with_mm_vit", "mm_clip_with_dinov2", "mm_vit_classifier", "mm_clip_text")
JOBS = (*SAVED_AGAIN, "zz", "zz_the_first_again")


@pytest.mark.parametrize("name", JOBS)
def test_a_local_folder_opens_without_hf_mm_with_the_same_bits(local, name):
    found = local["without"][name]
    assert_same_answers(found, local["expected"][name])
    assert all(own.startswith("transformers_modules.") for own in found["classes"].values())


@pytest.mark.parametrize("name", SAVED_AGAIN)
def test_what_was_opened_without_hf_mm_can_be_saved_and_opened_again(local, name):
    assert_same_answers(local["without"][name]["again"], local["expected"][name])


def test_without_ftfy_it_opens_too_and_says_what_is_read_differently(local):
    for way, is_missing in (("bare", True), ("without", False)):
        assert_same_answers(local[way]["bare"], local["expected"]["bare"])
        assert is_missing == any("pip install ftfy" in text for text in local[way]["bare"]["warnings"])


def test_the_shim_says_how_to_install_hf_mm(local):
    error = local["without"]["shim"]["error"]
    assert "hf_mm" in error and "pip install hf-mm" in error


@pytest.mark.parametrize("first", ["AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer"])
def test_the_shim_opens_the_classes_of_hf_mm_where_it_is_not_imported(local, first):
    """Whichever AutoClass is asked first; and what was opened so can be saved, without copies of hf_mm's sources."""
    found, expected = local["beside"][first], local["expected"]["mm_clip"]
    assert_same_answers(found, expected)
    assert found["classes"] == expected["classes"]
    assert_same_answers(found["again"], expected)


def test_the_shim_is_one_file(tmp_path):
    assert [path.name for path in with_shim(tmp_path).glob("*.py")] == ["hf_mm_shim.py"]
