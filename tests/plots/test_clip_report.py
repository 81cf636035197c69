import re

import pytest
import torch
from evaluation.toys import noise, small_clip

from hf_mm.data.emoji import load_emoji
from hf_mm.evaluation import style_shift
from hf_mm.evaluation.style_shift import evaluate_emoji
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.plots import clip_report as clip_report_module
from hf_mm.plots.clip_report import CELLS, VALIDATION, attention_maps, clip_report
from hf_mm.plots.figures import plot_retrieval

LOG = [{"step": 600, "loss": 3.0, "temperature": 0.07}, {"step": 620, "loss": 2.0, "temperature": 0.06}]


@pytest.fixture(scope="module")
def few_emoji():
    """Subgroups with pictures in every split by every artist."""
    whole = load_emoji("all")
    subgroups = {"plant-other", "person-gesture", "event", "food-prepared", "animal-mammal"}
    return whole.select([row for row, subgroup in enumerate(whole["subgroup"]) if subgroup in subgroups])


@pytest.fixture(scope="module")
def reported(few_emoji, tmp_path_factory):
    """A small CLIP, what was measured of it, the page about it, and the searches that the page shows."""
    model, processor = small_clip()
    searches = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (style_shift, clip_report_module):
            patch.setattr(module, "load_emoji", lambda *args, **kwargs: few_emoji)
        patch.setattr(
            clip_report_module, "plot_retrieval", lambda *found: searches.append(found) or plot_retrieval(*found)
        )
        metrics = {form: evaluate_emoji(model, processor, progress=False) for form in ("size_normalized", "original")}
        path = tmp_path_factory.mktemp("report") / "report.html"
        assert clip_report(model, processor, metrics, LOG, path, progress=False) == path
    return model, metrics, path.read_text(encoding="utf-8"), searches


def table_row(page: str, name: str, table: int = 0) -> list[float | None]:
    """The large numbers (None for a dash) of the row with this name in the n-th table that has one."""
    row = re.findall(rf'<tr><th scope="row">{re.escape(name)}<small>.*?</tr>', page)[table]
    return [None if cell == "–" else float(cell) for cell in re.findall(r'<td class="number">([^<]*)', row)]


def test_the_page_prints_what_was_measured(reported):
    _, metrics, page, _ = reported
    normalized = metrics["size_normalized"]
    naming = ("i2t_r1", "i2t_r5", "i2t_r10", "chance_r1", "chance_r10", "pixels_r1", "pixels_r10")
    finding = ("t2i_r1", "t2i_r10", "chance_t2i_r1", "chance_t2i_r10")
    kinds = ("accuracy", "top5", "balanced_accuracy", "name_accuracy", "chance", "majority", "pixels_accuracy")
    for split, description in (CELLS | VALIDATION).items():
        by_table = [(normalized[split], naming), (normalized[split], finding)]
        if split in CELLS:
            by_table += [(normalized["subgroup"][split], kinds), (normalized["group"][split], kinds)]
        for table, (row, keys) in enumerate(by_table):
            printed = table_row(page, description.capitalize(), table)
            assert printed == pytest.approx([row[key] for key in keys], abs=0.051)
    assert table_row(page, "Training pictures") == pytest.approx([normalized["fit"][key] for key in naming], abs=0.051)
    assert page.index("Memory, not a result") < page.index("Training pictures")
    openmoji = normalized["styles"]["openmoji"]
    known = [openmoji["seen"][key] for key in ("i2t_r1", "i2t_r10", "chance_r10", "pixels_r10")]
    new = [openmoji["new"][key] for key in ("i2t_r1", "i2t_r10", "chance_r10")]
    assert table_row(page, "OpenMoji, new") == pytest.approx(known + new, abs=0.051)
    assert "for 620 steps" in page


def test_the_page_shows_all_it_should_and_names_the_artists(reported):
    page = reported[2]
    alts = re.findall(r'alt="([^"]*)"', page)
    assert len(alts) == 2 + 4 + 2 + 2 + 2 + 2 and all(alts)
    for owner in ("Google", "Twitter", "Microsoft", "OpenMoji (https://openmoji.org/)", "CC BY-SA 4.0", "CC BY 4.0"):
        assert owner in page


def test_searches_find_pictures_that_training_never_saw(reported, few_emoji):
    model, _, _, searches = reported
    unseen = few_emoji.select([row for row, split in enumerate(few_emoji["split"]) if split in CELLS])
    trained = {
        image.tobytes()
        for image, split in zip(few_emoji["image"], few_emoji["split"], strict=True)
        if split == "train"
    }
    names_of = {}
    for image, name in zip(unseen["image"], unseen["caption"], strict=True):
        names_of.setdefault(image.tobytes(), set()).add(name)
    for queries, results, hits in searches:
        assert len(queries) == len(set(queries)) == 6
        for query, pictures, right in zip(queries, results, hits, strict=True):
            found = [picture.tobytes() for picture in pictures]
            assert len(found) == 6 and trained.isdisjoint(found)
            assert right == [query in names_of[look] for look in found]
    known = set(few_emoji.filter(lambda split: split == "train", input_columns="split")["caption"])
    assert set(searches[0][0]) <= known and known.isdisjoint(searches[1][0])


@pytest.mark.parametrize("tower", ["mm_clip_vision", "mm_vit"])
def test_attention_maps_follow_the_tower_and_leave_it_as_it_was(tower):
    model, processor = small_clip()
    pooling = {"pooling": "mean"} if tower == "mm_vit" else {}
    vision = {"model_type": tower, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, **pooling}
    config = MMClipConfig(
        projection_dim=8,
        vision_config={**vision, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8},
        text_config=model.config.text_config.to_dict(),
    )
    model = MMClipModel(config).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    kernel = model.vision_model.config._attn_implementation
    maps = attention_maps(model, processor, noise(3))
    assert model.training and model.vision_model.config._attn_implementation == kernel == "sdpa"

    model.eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        last = model.vision_model(processor(images=noise(3))["pixel_values"], output_attentions=True).attentions[-1]
    expected = last[:, :, 0, 1:].mean(1) if tower == "mm_clip_vision" else last.mean((1, 2))
    torch.testing.assert_close(maps.flatten(1), expected / expected.sum(-1, keepdim=True))
    assert maps.shape == (3, 2, 2)


def test_metrics_of_one_form_are_refused(tmp_path):
    with pytest.raises(ValueError, match="metrics has no 'original'"):
        clip_report(*small_clip(), {"size_normalized": {"cell": {}}}, LOG, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []
