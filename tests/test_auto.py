import subprocess
import sys

import pytest
import transformers
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, ViTConfig, ViTModel
from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

import hf_mm
from hf_mm import MODELS
from hf_mm.auto import register_all

HEAVY = ("transformers.trainer", "matplotlib", "datasets", "peft", "pandas", "evaluate")


def test_import_is_light():
    """Heavy libraries are imported where they are needed, not with the package."""
    code = f"import sys, hf_mm; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def classes(entry) -> set[type]:
    own = {entry.config, entry.tokenizer, entry.processor, *entry.models.values(), *entry.image_processors.values()}
    return own - {None}


@pytest.mark.parametrize("model_type", MODELS)
def test_no_name_belongs_to_transformers(model_type):
    """A built-in class of the same name would be opened in its place."""
    assert model_type not in CONFIG_MAPPING_NAMES
    for own in classes(MODELS[model_type]):
        assert own.__module__.startswith("hf_mm.")
        assert not hasattr(transformers, own.__name__)


@pytest.mark.parametrize("model_type", MODELS)
def test_the_config_knows_its_type(model_type):
    assert MODELS[model_type].config.model_type == model_type
    assert type(AutoConfig.for_model(model_type)) is MODELS[model_type].config
    assert len({own.__name__ for own in classes(MODELS[model_type])}) == len(classes(MODELS[model_type]))


def test_registering_twice_changes_nothing():
    register_all()
    register_all()
    for entry in MODELS.values():
        for auto_class, model in entry.models.items():
            assert auto_class._model_mapping[entry.config] is model


def test_the_models_of_transformers_stay_theirs(tmp_path):
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    for config, model in (
        (CLIPConfig(text_config={**tiny, "vocab_size": 49408}, vision_config=tiny), CLIPModel),
        (ViTConfig(**tiny), ViTModel),
    ):
        folder = tmp_path / model.__name__
        model(config).save_pretrained(folder)
        assert type(AutoModel.from_pretrained(folder)) is model


def test_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert hf_mm.__version__ == version("hf-mm")
