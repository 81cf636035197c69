"""The weights that come with the repository are what their card says."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor

from hf_mm.evaluation.style_shift import evaluate_emoji

FOLDER = Path(__file__).parents[1] / "checkpoints/mm-clip-emoji"
METRICS = {
    "picture to caption R@1": "i2t_r1",
    "picture to caption R@5": "i2t_r5",
    "picture to caption R@10": "i2t_r10",
    "caption to picture R@1": "t2i_r1",
    "caption to picture R@5": "t2i_r5",
    "caption to picture R@10": "t2i_r10",
}


@pytest.mark.parametrize("folder", [FOLDER, FOLDER.with_name("mm-clip-emoji-styled")], ids=lambda folder: folder.name)
def test_it_is_small_and_holds_what_is_needed_alone(folder):
    assert {file.name for file in folder.iterdir()} == {
        *("README.md", "config.json", "model.safetensors"),
        *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 5_000_000


@pytest.mark.parametrize("form", ["size_normalized", "original"])
def test_an_evaluation_finds_the_figures_of_the_card(form):
    """To one picture or name, which rounding on another processor may cost."""
    model, processor = AutoModel.from_pretrained(FOLDER).eval(), AutoProcessor.from_pretrained(FOLDER)
    metrics = evaluate_emoji(model, processor, normalize_size=form == "size_normalized", progress=False)
    results = [
        result for result in ModelCard.load(FOLDER / "README.md").data.eval_results if result.dataset_config == form
    ]
    assert {result.dataset_split for result in results} >= {"cell", "style", "concept", "both"}
    for result in results:
        row = metrics[result.dataset_split]
        one = 100 / min(row["images"], row["captions"]) + 1e-6
        assert result.metric_value == pytest.approx(row[METRICS[result.metric_name]], abs=one), result


def test_it_knows_a_face_from_a_fruit():
    from transformers import pipeline

    from hf_mm.data.emoji import load_emoji

    emoji = load_emoji("style", normalize_size=True)
    classify = pipeline("zero-shot-image-classification", model=str(FOLDER))
    labels = {"face-smiling": "face", "food-fruit": "fruit", "animal-mammal": "animal"}
    rows = [row for row in emoji if row["subgroup"] in labels]
    answers = classify(
        [row["image"] for row in rows], candidate_labels=list(labels.values()), hypothesis_template="{}"
    )
    right = [answer[0]["label"] == labels[row["subgroup"]] for answer, row in zip(answers, rows, strict=True)]
    assert len(rows) >= 50
    assert sum(right) / len(right) >= 0.7  # chance is a third
