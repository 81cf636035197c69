import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hub.server import faults_of_card
from huggingface_hub import ModelCard
from jinja2 import UndefinedError
from PIL import Image

from hf_mm.data.emoji import load_emoji
from hf_mm.evaluation.retrieval import evaluate_retrieval
from hf_mm.hub.model_card import build_model_card, find_template, shown_name
from hf_mm.hub.standalone import INSTALL
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.clip.processing_clip import MMClipProcessor
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer
from hf_mm.models.pic2word.modeling_pic2word import Pic2WordModel
from hf_mm.models.pic2word.processing_pic2word import Pic2WordProcessor

RECALL = re.compile(r"(i2t|t2i)_r(\d+)")
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    tokenizer = MMClipTokenizer.train_from_iterator(["red apple", "green apple"], 540, model_max_length=12)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = MMClipConfig(
        projection_dim=8,
        vision_config={**TOWER, "image_size": 16, "patch_size": 8},
        text_config={**TOWER, "vocab_size": len(tokenizer), "max_position_embeddings": 12, **ids},
    )
    return MMClipModel(config), MMClipProcessor(MMClipImageProcessorPil(size=16), tokenizer)


@pytest.fixture
def pic2word(clip):
    processor = Pic2WordProcessor(clip[1].image_processor, clip[1].tokenizer)
    return Pic2WordModel.from_clip_pretrained(clip[0], processor.placeholder_token_id, hidden_dim=4), processor


def retrieval_row(rng, pixels=True):
    """Figures that no two places of the card share."""
    names = ["i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r10"]
    names += [f"chance_{name}" for name in ("r1", "r10", "t2i_r1", "t2i_r10")]
    row = {name: float(value) for name, value in zip(names, rng.uniform(1, 100, len(names)), strict=True)}
    row |= {name: float(rng.uniform(1, 100)) if pixels else None for name in ("pixels_r1", "pixels_r10")}
    return {"images": int(rng.integers(1000, 9999)), "captions": int(rng.integers(1000, 9999)), **row}


def emoji_metrics(seed):
    rng = np.random.default_rng(seed)
    subgroup = ("accuracy", "top5", "chance", "majority", "pixels_accuracy")
    return {
        "cell": retrieval_row(rng),
        "concept": retrieval_row(rng, pixels=False),
        "fit": {**retrieval_row(rng), "is_result": False},
        "subgroup": {"cell": {"images": 211, "classes": 96, **{name: rng.uniform(1, 100) for name in subgroup}}},
        "temperature": 0.05,
    }


def card_of(clip, metrics, folder, source="emoji", license="other", **changes):
    facts = {
        "training": {"steps": 1500, "seconds": 301.2, "loss": 2.123456789},
        "data": {"source": source, "pictures": 3948, "skipped": {"row 3": "no caption", "row 7": "broken"}},
        "settings": {
            "source": source,
            "split": "train",
            "learning_rate": 2e-3,
            "bpe_file": None,
            "model_name_or_path": None,
            "vision_config": {"stem_channels": [24, 48], "stem": "conv|norm"},
        },
        "machine": {"device": "CPU", "torch": torch.__version__},
    } | changes
    card = build_model_card("clip", model_name="mine", model=clip[0], metrics=metrics, license=license, **facts)
    card.save(folder / "README.md")
    return ModelCard.load(folder / "README.md")


def index_of(card):
    """The model index as {(evaluation, test set): {metric: value}}, with the metrics named as in evaluation."""
    directions = {"picture to caption": "i2t", "caption to picture": "t2i"}
    index = {}
    assert not faults_of_card(str(card))
    for result in card.data.eval_results or []:
        direction, recall = result.metric_name.rsplit(" ", 1)
        assert result.metric_type == f"recall_at_{recall.removeprefix('R@')}"
        cell = index.setdefault((result.dataset_config, result.dataset_split), {})
        cell[f"{directions[direction]}_r{recall.removeprefix('R@')}"] = result.metric_value
    return index


def recalls(row):
    return {name: value for name, value in row.items() if RECALL.fullmatch(name)}


def tables(text):
    """The cells of every table row."""
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


def test_model_index_holds_the_results_and_not_what_training_saw(clip, tmp_path):
    metrics = {"size_normalized": emoji_metrics(0), "original": emoji_metrics(1)}
    card = card_of(clip, metrics, tmp_path)
    assert index_of(card) == {
        (form, cell): recalls(metrics[form][cell]) for form in metrics for cell in ("cell", "concept")
    }


def test_tables_hold_every_figure_beside_chance_and_baseline(clip, tmp_path):
    metrics = {"size_normalized": emoji_metrics(0), "original": emoji_metrics(1)}
    rows = [row for row in tables(card_of(clip, metrics, tmp_path).text) if len(row) == 8]

    def shown(row, *names):
        return " / ".join("–" if row[name] is None else f"{row[name]:.1f}" for name in names)

    expected = [
        [
            f"{row['images']:,}",
            f"{row['captions']:,}",
            shown(row, "i2t_r1", "i2t_r5", "i2t_r10"),
            shown(row, "chance_r1", "chance_r10"),
            shown(row, "pixels_r1", "pixels_r10"),
            shown(row, "t2i_r1", "t2i_r10"),
            shown(row, "chance_t2i_r1", "chance_t2i_r10"),
        ]
        for form in metrics.values()
        for row in (form["cell"], form["concept"])
    ]
    assert [row[1:] for row in rows if row[3].count("/") == 2 and row[0] != "%"] == expected

    subgroups = [form["subgroup"]["cell"] for form in metrics.values()]
    names = ("accuracy", "top5", "chance", "majority", "pixels_accuracy")
    found = [row[1:] for row in rows if row[1:3] == ["211", "96"]]
    assert found == [["211", "96", *(f"{row[name]:.1f}" for name in names)] for row in subgroups]


def test_small_figures_keep_two_digits(clip, tmp_path):
    row = retrieval_row(np.random.default_rng(0)) | {"chance_r1": 0.0712, "chance_r10": 0.712, "t2i_r1": 0.0}
    text = card_of(clip, {"cell": row}, tmp_path).text
    assert "| 0.07 / 0.71 |" in text and "| 0.0 / " in text


def test_metadata(clip, tmp_path):
    metadata = card_of(clip, {"cell": retrieval_row(np.random.default_rng(0))}, tmp_path).data
    assert metadata.license == "other"
    assert metadata.library_name == "transformers"
    assert metadata.pipeline_tag == "zero-shot-image-classification"
    assert metadata.tags == ["hf_mm", "mm_clip"]
    assert metadata.model_name == "mine"


@pytest.mark.parametrize("metrics", [{}, {"original": {}}, {"cell": retrieval_row(np.random.default_rng(0), False)}])
@pytest.mark.parametrize("source", ["emoji", "someone/pictures", "/home/someone/holidays"])
def test_every_placeholder_is_filled(clip, tmp_path, metrics, source):
    text = str(card_of(clip, metrics, tmp_path, source=source))
    assert not re.search(r"\{\{|\{%|%\}|Undefined|None|\n\n\n\n", text)
    assert re.search(r"2 rows could not be read", text)
    assert "`conv\\|norm`" in text


def test_a_users_own_pictures(clip, tmp_path):
    model, processor = clip
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    captions = [[f"apple {number}", "red apple"] for number in range(6)]
    metrics = evaluate_retrieval(model, processor, list(map(Image.fromarray, pixels)), captions, progress=False)
    for given in (metrics, {"held_out": metrics}):
        card = card_of(clip, given, tmp_path, source="/home/someone/holidays")
        assert index_of(card) == {(None, "held_out"): recalls(metrics)}
        row = next(row for row in tables(card.text) if row[0] == "pictures held out")
        assert row[1:3] == ["6", "7"]
        assert row[4] == f"{metrics['chance_i2t_r1']:.1f} / {metrics['chance_i2t_r10']:.1f}"
        assert row[5] == "– / –"
    assert "/home" not in str(card) and "holidays" in card.text
    assert card.data.datasets is None
    assert "OpenMoji" not in card.text


def test_what_is_on_the_hub_is_linked(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"source": "someone/pictures", "model_name_or_path": "someone/clip"}
    card = card_of(clip, {}, tmp_path, source="someone/pictures", settings=settings)
    assert card.data.datasets == ["someone/pictures"] and card.data.base_model == "someone/clip"
    for folder in ("someone/pictures", "someone/clip"):
        (tmp_path / folder).mkdir(parents=True)
    card = card_of(clip, {}, tmp_path, source="someone/pictures", settings=settings)
    assert card.data.datasets is None and card.data.base_model is None
    assert "someone" not in str(card)


@pytest.mark.parametrize(
    ("source", "dataset_type"),
    [
        ("emoji", "Emoji-by-four-artists"),
        ("/home/me/my pictures (new)", "my-pictures-new"),
        ("/home/me/写真", "private"),
        ("someone/pictures", "someone/pictures"),
    ],
)
def test_the_type_of_the_data_set_is_one_that_the_hub_takes(clip, tmp_path, source, dataset_type):
    """It refuses a card with another: letters, digits and ``_-.``, with one slash after an owner's name."""
    card = card_of(clip, {"cell": retrieval_row(np.random.default_rng(0))}, tmp_path, source=source)
    assert {result.dataset_type for result in card.data.eval_results} == {dataset_type}
    assert not faults_of_card(str(card))


def test_the_card_in_the_repository_is_one_that_the_hub_takes():
    card = (Path(__file__).parents[2] / "checkpoints/mm-clip-emoji/README.md").read_text()
    assert not faults_of_card(card)
    assert INSTALL in card and "pip install ftfy" in card


def test_what_was_local_when_it_was_trained_is_no_id(clip, tmp_path, monkeypatch):
    """Wherever the card is written: the files that were there then need not be there now, nor the other way round."""
    monkeypatch.chdir(tmp_path)
    data = {"source": "data/pics", "pictures": 3, "skipped": {}}
    settings = {"source": "data/pics", "model_name_or_path": "data/clip"}
    is_local = {"source": True, "model_name_or_path": True}
    metrics = {"cell": retrieval_row(np.random.default_rng(0))}
    card = card_of(clip, metrics, tmp_path, data={**data, "is_local": is_local}, settings=settings)
    assert card.data.datasets is None and card.data.base_model is None and "data/" not in str(card)
    assert {result.dataset_type for result in card.data.eval_results} == {"pics"}
    for name in ("pics", "clip"):
        (tmp_path / "data" / name).mkdir(parents=True)
    is_local = {"source": False, "model_name_or_path": False}
    card = card_of(clip, metrics, tmp_path, data={**data, "is_local": is_local}, settings=settings)
    assert card.data.datasets == ["data/pics"] and card.data.base_model == "data/clip"
    assert "| `source` | `data/pics` |" in card.text


@pytest.mark.parametrize(
    ("folder", "shown"),
    [("outputs/mine", "outputs/mine"), ("./mine", "mine"), (".", "here"), ("../here", "here"), ("/a/b", "b")],
)
def test_the_name_that_a_card_shows(tmp_path, monkeypatch, folder, shown):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert shown_name(Path(folder)) == shown


def test_emoji_are_attributed_as_in_the_notice(clip, tmp_path):
    """Every picture's licence and its whole attribution, whose wording the licences fix."""
    rows = [row for row in tables(card_of(clip, {}, tmp_path).text) if len(row) == 3]
    notice = " ".join((Path(__file__).parents[2] / "NOTICE").read_text().split())
    licenses = {row[1] for row in rows if "http" in row[2]}
    assert licenses == set(load_emoji("all", skin_tones=True).unique("license"))
    assert all(license in notice for license in licenses)
    for style, _, attribution in rows:
        if style.startswith(("Noto", "Twemoji", "Fluent", "OpenMoji")):
            assert attribution in notice


def test_license_of_the_weights(clip, tmp_path):
    assert "licence of these weights is not settled" in card_of(clip, {}, tmp_path).text
    card = card_of(clip, {}, tmp_path, license="mit")
    assert card.data.license == "mit" and "published under `mit`" in card.text


def test_the_code_runs(clip, tmp_path, monkeypatch, capsys):
    card = card_of(clip, {}, tmp_path)
    monkeypatch.chdir(tmp_path)
    for part in clip:
        part.save_pretrained("mine")
    Image.new("RGB", (24, 20), "red").save("picture.png")
    blocks = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert len(blocks) == 2
    assert INSTALL in card.text and "pip install ftfy" in card.text
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    scores, probabilities, shapes = capsys.readouterr().out.strip().splitlines()
    answers = json.loads(scores.replace("'", '"'))
    assert {answer["label"] for answer in answers} == {"a face", "a cat", "a car"}
    assert sum(answer["score"] for answer in answers) == pytest.approx(1)
    assert sum(map(float, re.findall(r"\d\.\d+", probabilities))) == pytest.approx(1, abs=1e-3)
    assert shapes == "torch.Size([1, 8]) torch.Size([2, 8])"


def test_missing_template_names_the_ones_there_are():
    with pytest.raises(ValueError, match=r"no model card template 'flip': choose from .*clip"):
        find_template("flip")


def test_a_setting_that_the_template_lacks_is_an_error(clip, tmp_path):
    """A card is never printed with a blank where a fact belongs."""
    with pytest.raises(UndefinedError, match="split"):
        card_of(clip, {}, tmp_path, settings={})


METHODS = ("composed", "image_only", "text_only", "image_text", "pixels", "name", "chance")


def composed_result(rng, domains):
    """Of a protocol of composed retrieval, with figures that no two places of the card share."""
    groups = {
        domain: {method: {f"r{k}": float(rng.uniform(1, 100)) for k in (1, 10, 50)} for method in METHODS}
        for domain in (*domains, "mean")
    }
    counts = {"queries": dict.fromkeys(domains, 1111), "gallery": int(rng.integers(5000, 9999))}
    return {"split": "concept", "prompt": "* in the style of {style}", "results": groups, "filtered": {}, **counts}


def composed_metrics(seed=0):
    rng = np.random.default_rng(seed)
    domains = {"style_conversion": ("noto", "fluent"), "attribute_edit": ("light", "dark")}
    return {
        protocol: {split: composed_result(rng, names) for split in ("cell", "concept")}
        for protocol, names in domains.items()
    }


def pic2word_card(pic2word, metrics, folder, source="emoji", base="someone/clip", base_is_local=False, **changes):
    model = pic2word[0]
    model.config.base_models = {"clip": {"name": base, "revision": None if base_is_local else "1f3c"}}
    facts = {
        "training": {"steps": 1000, "seconds": 20.5},
        "data": {
            "source": source,
            "pictures": 3948,
            "skipped": {},
            "is_local": {"source": False, "model_name_or_path": base_is_local},
        },
        "settings": {"split": "train", "model_name_or_path": base, "prompt": "a photo of *", "placeholder": "*"},
        "machine": {"device": "CPU"},
        "license": "other",
    } | changes
    build_model_card("pic2word", model_name="mine", model=model, metrics=metrics, **facts).save(folder / "README.md")
    return ModelCard.load(folder / "README.md")


def test_composed_retrieval_is_printed_beside_every_baseline_and_indexed(pic2word, tmp_path):
    metrics = composed_metrics()
    card = pic2word_card(pic2word, metrics, tmp_path)
    rows = tables(card.text)
    for by_split in metrics.values():
        for result in by_split.values():
            groups = result["results"]
            for method in METHODS:
                figures = [" / ".join(f"{groups[name][method][f'r{k}']:.1f}" for k in (1, 10, 50)) for name in groups]
                assert [row[1:] for row in rows].count(figures) == 1
            assert (
                f"{sum(result['queries'].values()):,} queries" in card.text and f"{result['gallery']:,}" in card.text
            )

    index = {
        (result.task_type, result.dataset_config, result.dataset_split, result.metric_type): result.metric_value
        for result in card.data.eval_results
    }
    assert index == {
        ("composed-image-retrieval", f"{protocol} {name}", split, f"recall_at_{k}"): group["composed"][f"r{k}"]
        for protocol, by_split in metrics.items()
        for split, result in by_split.items()
        for name, group in result["results"].items()
        for k in (1, 10, 50)
    }
    assert not faults_of_card(str(card))


def test_a_pic2word_names_its_frozen_clip(pic2word, tmp_path):
    """Also where it goes on from another Pic2Word; of a folder the last part only."""
    card = pic2word_card(pic2word, {}, tmp_path)
    assert (
        "`someone/clip`, revision `1f3c`, type `mm_clip`" in card.text
        and "| mapping network | 8 → 4 → 4 → 16," in card.text
    )
    assert card.data.base_model == "someone/clip" and card.data.pipeline_tag == "image-feature-extraction"
    assert card.data.tags == ["hf_mm", "pic2word"]
    trained = 8 * 4 + 4 + 4 * 4 + 4 + 4 * 16 + 16
    assert f"{pic2word[0].num_parameters():,}, of which {trained} were trained" in card.text
    card = pic2word_card(pic2word, {}, tmp_path, base="/home/someone/clip", base_is_local=True)
    assert "`clip`, revision not recorded" in card.text and "someone" not in str(card) and card.data.base_model is None
    settings = {"split": "train", "model_name_or_path": "someone/earlier", "prompt": "a photo of *"}
    card = pic2word_card(pic2word, {}, tmp_path, settings=settings)
    assert card.data.base_model == "someone/earlier" and "`someone/clip`, revision `1f3c`" in card.text


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("a photo/drawing of *", "a photo/drawing of *"),
        ("/home/me/my prompts/one", "one"),
        ("my/prompts", "my/prompts"),
    ],
)
def test_a_sentence_with_a_slash_is_no_path(pic2word, tmp_path, prompt, shown):
    settings = {"prompt": prompt, "placeholder": "*", "model_name_or_path": "someone/clip", "split": "train"}
    assert [["prompt", shown]] == [
        [row[0].strip("`"), row[1].strip("`")]
        for row in tables(pic2word_card(pic2word, {}, tmp_path, settings=settings).text)
        if row[0].strip("`") == "prompt"
    ]


@pytest.mark.parametrize("source", ["emoji", "someone/pictures"])
def test_words_of_a_users_pictures(pic2word, tmp_path, source):
    row = {f"{kind}word_r{k}": 3.0 * k + len(kind) for kind in ("", "chance_") for k in (1, 5, 10)}
    card = pic2word_card(pic2word, {"held_out": {"images": 60, **row}}, tmp_path, source=source)
    assert ["the sentence with the picture as a word", "3.0", "15.0", "30.0"] in tables(card.text)
    assert ["a random order", "10.0", "22.0", "37.0"] in tables(card.text)
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"recall_at_1": 3.0, "recall_at_5": 15.0, "recall_at_10": 30.0}
    assert not faults_of_card(str(card))


@pytest.mark.parametrize("source", ["emoji", "someone/pictures", "/home/someone/holidays"])
@pytest.mark.parametrize("metrics", [{}, composed_metrics()])
def test_every_placeholder_of_a_pic2word_is_filled(pic2word, tmp_path, metrics, source):
    text = str(pic2word_card(pic2word, metrics, tmp_path, source=source))
    assert not re.search(r"\{\{|\{%|%\}|Undefined|None|\n\n\n\n", text)
    assert ("OpenMoji" in text) == (source == "emoji") and "is an open question" in text


def test_the_code_of_a_pic2word_runs(pic2word, tmp_path, monkeypatch, capsys):
    card = pic2word_card(pic2word, {}, tmp_path)
    monkeypatch.chdir(tmp_path)
    for part in pic2word:
        part.save_pretrained("mine")
    Path("my_pictures").mkdir()
    for name, colour in (("picture", "red"), ("one", "blue"), ("another", "green"), ("my_pictures/a", "tan")):
        Image.new("RGB", (24, 20), colour).save(f"{name}.png")
    blocks = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    answer, cosines = capsys.readouterr().out.strip().splitlines()
    assert answer.startswith("a.png ") and -1 <= float(answer.split()[1]) <= 1
    assert re.fullmatch(r"tensor\(\[-?\d\.\d+, +-?\d\.\d+\]\)", cosines)
