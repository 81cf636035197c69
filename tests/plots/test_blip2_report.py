import copy
import re

import numpy as np
import pytest
import torch
from models.blip2.small import lively, qformer_fields
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from hf_mm.data.emoji import load_emoji
from hf_mm.models.blip2.configuration_blip2 import MMBlip2Config
from hf_mm.models.blip2.initialization_blip2 import learn_wordpiece
from hf_mm.models.blip2.modeling_blip2 import MMBlip2ForConditionalGeneration
from hf_mm.models.blip2.modeling_blip2_base import MMBlip2Model
from hf_mm.models.blip2.modeling_blip2_stage1 import MMBlip2ForPreTraining
from hf_mm.models.blip2.processing_blip2 import MMBlip2Processor
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.plots import blip2_report as report_module
from hf_mm.plots.blip2_report import (
    SHOWN,
    SPLITS,
    blip2_report,
    hard_matches,
    last_mean,
    overlap,
    query_attention,
    reached,
    square_grid,
    unigram_loss,
)
from hf_mm.plots.figures import (
    plot_answers,
    plot_captions,
    plot_losses,
    plot_query_attention,
    plot_runs,
    plot_stage1,
)

PLOTS = (plot_answers, plot_captions, plot_losses, plot_query_attention, plot_runs, plot_stage1)
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER |= {"image_size": 16, "patch_size": 4}
STAGE1_LOG = [
    {
        "step": 10 * step,
        "loss": 4.0,
        "loss_itc": 2.0,
        "loss_itm": 0.7 - 0.05 * step,
        "loss_itg": 1.0,
        "accuracy_itm_right_pair": 0.1,
        "accuracy_itm_drawn_image": 0.8,
        "accuracy_itm_drawn_text": 0.9,
    }
    for step in (1, 2)
]
LOGS = {
    "stage1": STAGE1_LOG,
    "words": [{"step": 10, "loss": 6.0}],
    "stage2": [{"step": 10, "loss": 4.0}],
    "blind": [{"step": 10, "loss": 5.0}],
}
MODEL = {"nll": 3.66, "nll_other": 5.31, "gap": 1.65, "gap_se": 0.11, "win_rate": 91.4, "win_rate_se": 2.3}
MODEL |= {"word_f1": 19.4, "other_word_f1": 5.2, "exact": 1.5}
RANKED = {"top1": 32.1, "top5": 64.2, "plain_top1": 8.3, "plain_top5": 20.4, "group_top1": 48.5}
BLIND = {"nll": 3.92, "nll_other": 3.92, "gap": -0.01, "win_rate": 0.0, "word_f1": 3.1, "other_word_f1": 3.4}
BLIND |= {"exact": 0.2}
NEAREST = {"word_f1": 33.3, "other_word_f1": 4.1, "exact": 21.6}
ACCEPT = {
    "cell": {"gap": 0.9, "nll": 0, "win_rate": 80, "top1": 40, "word_f1_gain": 6},
    "style": {"gap": 1.7},
}


@pytest.fixture(scope="module")
def few_emoji():
    """Subgroups with pictures in every split."""
    whole = load_emoji("all", styles=["noto", "twemoji", "fluent"])
    kept = {"person-gesture", "plant-other", "event"}
    return whole.select([row for row, subgroup in enumerate(whole["subgroup"]) if subgroup in kept])


@pytest.fixture(scope="module")
def of_split(few_emoji):
    splits = np.array(few_emoji["split"][:])
    return {split: few_emoji.select(np.flatnonzero(splits == split)) for split in (*SHOWN, "train")}


@pytest.fixture(scope="module")
def stage1(few_emoji):
    """Over a tower of 16 places."""
    tokenizer = learn_wordpiece(few_emoji["caption"][:], 300)
    tokenizer.model_max_length = 24
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "bos")}
    fields = qformer_fields(True, num_hidden_layers=4, max_position_embeddings=24, vocab_size=len(tokenizer), **ids)
    config = MMBlip2Config(vision_config=vision_config("mm_vit"), qformer_config=fields, joint_dim=8)
    model = lively(MMBlip2ForPreTraining(config), 0.4)
    nn.init.constant_(model.temperature, 0.1)
    return model, MMBlip2Processor(MMClipImageProcessorPil(size=16), tokenizer)


@pytest.fixture(scope="module")
def stage2(stage1):
    language_model = LlamaForCausalLM(
        LlamaConfig(vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    model = MMBlip2ForConditionalGeneration.from_stage1(stage1[0], language_model)
    return model, MMBlip2Processor(stage1[1].image_processor, stage1[1].tokenizer, num_query_tokens=3)


@pytest.fixture(scope="module")
def results(of_split):
    retrieval = {
        f"{prefix}{way}_{metric}": 10.0 * place + number
        for place, prefix in enumerate(("", "itc_", "chance_"))
        for number, (way, metric) in enumerate((way, metric) for way in ("i2t", "t2i") for metric in ("r1", "r10"))
    }
    splits = {}
    for split in SPLITS:
        row = {"pictures": 1234, "model": MODEL, "blind": BLIND, "nearest": NEAREST}
        row |= {"chance": {"gap": 0.0, "win_rate": 50.0}}
        if split in SHOWN:
            row["model"] = MODEL | RANKED
            row["blind"] = BLIND | {"plain_top1": 1.6, "plain_top5": 5.7}
            row["nearest"] = NEAREST | {"top1": 44.1, "top5": 70.2, "group_top1": 64.3}
            row["chance"] = row["chance"] | {"top1": 1.0, "top5": 5.0, "group_top1": 12.5}
            names = of_split[split]["caption"][:]
            row["examples"] = [
                {
                    "row": place,
                    "truth": names[place],
                    "model": names[place].upper() + "." if place % 2 else "a thing",
                    "blind": "person",
                    "nearest": names[place - 1],
                }
                for place in range(0, len(names), 2 if split == "concept" else 1)
            ]
        splits[split] = row
    retrieval |= {"images": 9, "captions": 7, "reranked": 5}
    return {"splits": splits, "retrieval": dict.fromkeys(SHOWN, retrieval), "accept": ACCEPT}


@pytest.fixture(scope="module")
def reported(stage1, stage2, results, of_split, tmp_path_factory):
    """The page, and what its figures were drawn from."""
    drawn = {plot.__name__: [] for plot in PLOTS}

    def record(plot):
        return lambda *given: drawn[plot.__name__].append(given) or plot(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "load_emoji", lambda split, **_: of_split[split])
        for plot in PLOTS:
            patch.setattr(report_module, plot.__name__, record(plot))
        path = tmp_path_factory.mktemp("report") / "report.html"
        given = (*stage1, *stage2, results, LOGS, path)
        assert blip2_report(*given, progress=False, stage1_batch_size=96) == path
    return path.read_text(encoding="utf-8"), drawn


def vision_config(kind: str):
    return AutoConfig.for_model(kind, **TOWER, **({"pooling": "mean"} if kind == "mm_vit" else {}))


def table_rows(page: str, name: str) -> list[list[str]]:
    """Cells of the rows with this name, a line of a cell after the other."""
    rows = re.findall(rf'<tr><th scope="row">{name}(?:<small>.*?</small>)*</th>(.*?)</tr>', page)
    return [
        [" ".join(re.findall(r"[^<>]+(?=<)", cell)) for cell in re.findall(r'<td class="number">(.*?</)td>', row)]
        for row in rows
    ]


def test_the_page_prints_what_was_measured_beside_what_needs_no_sight(reported):
    page = reported[0]
    dashes = ["–"] * 3
    ranked = ["32.1 8.3", "64.2 20.4", "48.5"]
    model = ["3.66", "1.65 ± 0.11", "91.4 ± 2.3"], ["19.4", "14.2", "1.5"]
    assert table_rows(page, "The model") == [[*model[0], *each, *model[1]] for each in (ranked, ranked, dashes)]
    assert table_rows(page, "Other picture") == [["5.31", *["–"] * 5, "5.2", "–", "–"]] * 3
    blind = ["3.92", "−0.01", "0.0"], ["3.1", "−0.3", "0.20"]
    plain = ["– 1.6", "– 5.7", "–"]
    assert table_rows(page, "Trained blind") == [[*blind[0], *each, *blind[1]] for each in (plain, plain, dashes)]
    tower = ["44.1", "70.2", "64.3"]
    assert table_rows(page, "Nearest picture") == [
        [*dashes, *each, "33.3", "29.2", "21.6"] for each in (tower, tower, dashes)
    ]
    order = ["1.0 1.0", "5.0 5.0", "12.5"]
    assert table_rows(page, "Chance") == [["–", "0.00", "50.0", *each, *dashes] for each in (order, order, dashes)]
    assert "1,234 pictures" in page and "exact, %<small>not claimed</small>" in page
    searched = [f"{n}.0 cosine {10 + n}.0 chance {20 + n}.0" for n in range(4)]
    rows = [
        row
        for words in ("New drawings of known emoji", "New emoji")
        for row in table_rows(page, words)
        if "cosine" in row[0]
    ]
    assert rows == [searched] * 2


def test_thresholds_are_told_reached_or_missed(reported, results):
    cell, concept, style = table_rows(reported[0], "To be reached")
    assert cell == [
        *("≤ 3.92 reached", "≥ 0.9 reached", "≥ 80 reached"),
        *("≥ 40 missed", "–", "–", "–", "≥ 6 reached", "–"),
    ]
    assert concept == ["–"] * 9 and style == ["–", "≥ 1.7 missed", *["–"] * 7]
    assert "Of 6 thresholds it reaches 4." in reported[0]
    row = results["splits"]["cell"]
    assert reached(row, "top1", 32.1) and not reached(row, "top1", 32.2)
    assert reached(row, "word_f1_gain", 14.0) and not reached(row, "word_f1_gain", 14.3)
    assert not reached(row | {"blind": {"nll": 3.6}}, "nll", 9)
    assert not reached(results["splits"]["style"], "top1", 0.0)


def test_the_lead_tells_gaps_and_claims_no_exact_names(reported):
    (lead,) = re.findall(r"<header>.*?</header>", reported[0], flags=re.DOTALL)
    assert "costs 1.65 nats more" in lead and "has −0.01 and −0.01" in lead
    assert "91.4 % (chance 50.0 %)" in lead and "32.1 % (chance 1.0 %)" in lead
    assert "Exactly right are 1.5 %" in lead and "right for 21.6 % and 21.6 %" in lead and "no claim rests" in lead


def test_captions_stand_beside_their_own_pictures(reported, results, of_split):
    for split, (images, truths, answers, hits) in zip(SHOWN, reported[1]["plot_answers"], strict=True):
        examples = {example["row"]: example for example in results["splits"][split]["examples"]}
        looks = {of_split[split][row]["image"].tobytes(): row for row in examples}
        rows = [looks[image.tobytes()] for image in images]
        assert len(rows) == 6 == len(set(rows)) and rows != list(examples)[:6]
        for place, row in enumerate(rows):
            example = examples[row]
            assert truths[place] == example["truth"]
            said = [answers[name][place] for name in ("the model", "blind", "nearest")]
            assert said == [example["model"], example["blind"], example["nearest"]]
            assert hits["the model"][place] == bool(row % 2) and not hits["blind"][place]


def every_pair(stage1, images, captions):
    """Cosines and probabilities of a match of all pictures with all captions, from one plain call each."""
    model, processor = stage1
    texts = list(dict.fromkeys(captions))
    inputs = dict(processor(images=images, text=texts, mode="matching", return_tensors="pt"))
    with torch.no_grad():
        logits = model.get_matching_logits(**inputs)
        pictures = model.get_image_features(inputs["pixel_values"]).pooler_output
        words = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    return texts, torch.einsum("mqd,nd->mqn", pictures, words).amax(dim=1), logits.softmax(dim=-1)[..., 1]


def test_hard_matches_are_the_nearest_wrong_captions(stage1, of_split):
    rows = of_split["concept"].select(range(9))
    images, captions = list(rows["image"]), [*rows["caption"][:7], rows["caption"][6], "another name of the first"]
    ids = [*range(8), 0]
    images[8] = images[0]
    found = hard_matches(*stage1, images, captions, ids, batch_size=4, progress=False)
    texts, cosines, probabilities = every_pair(stage1, images, captions)
    assert found.texts == texts and len(texts) < 9
    for row in range(9):
        own = {captions[other] for other in range(9) if captions[other] == captions[row] or ids[other] == ids[row]}
        wrong = sorted((n for n, text in enumerate(texts) if text not in own), key=lambda n: -cosines[row, n])
        assert found.columns[row].tolist() == [texts.index(captions[row]), *wrong[:3]]
    torch.testing.assert_close(found.probabilities, probabilities.gather(1, found.columns), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="a picture has 0 wrong captions, but 3 are asked for"):
        hard_matches(*stage1, images[:2], ["a", "a"], [0, 1], progress=False)


def test_the_page_tells_how_often_the_right_caption_wins(reported, stage1, of_split):
    page, drawn = reported
    for split, (images, captions, truths, scores) in zip(SHOWN, drawn["plot_captions"], strict=True):
        rows = of_split[split]
        texts, cosines, probabilities = every_pair(stage1, list(rows["image"]), rows["caption"][:])
        looks = [image.tobytes() for image in rows["image"]]
        right = torch.tensor([[text == name for text in texts] for name in rows["caption"]])
        wrong = cosines.masked_fill(right, -2).argmax(dim=1)
        wins = probabilities[right] > probabilities.gather(1, wrong[:, None])[:, 0]
        share = f"{100 * wins.double().mean():.1f} % of {len(rows)} pictures"
        assert f"For {SPLITS[split]}, the right caption wins over the nearest wrong one for {share}" in page
        assert len(images) == 4
        for image, own, truth, bars in zip(images, captions, truths, scores, strict=True):
            row = looks.index(image.tobytes())
            assert truth == {rows["caption"][row]} and truth < set(own) and len(own) == 4
            assert bars == sorted(bars, reverse=True)
            expected = [probabilities[row, texts.index(text)].item() for text in own]
            np.testing.assert_allclose(bars, expected, atol=1e-5)


def test_wins_and_the_plateau_in_words():
    def words(wins: int) -> str:
        return report_module._wins_in_words(torch.arange(100) < wins, "new emoji")

    assert "for 61.0 % of 100 pictures, with a standard error of 4.9: above chance" in words(61)
    assert words(59).endswith("not to be told from chance, which is 50 %.")
    assert words(39).endswith("below chance, which is 50 %.")
    log = [{"step": step, "loss_itm": 0.5} for step in range(30)] + [{"step": 31, "loss": 1.0}]
    assert "hardly" not in report_module._plateau_in_words(log)
    near = log[:-4] + [{"step": 32 + step, "loss_itm": value} for step, value in enumerate((0.62, 0.64, 0.63))]
    assert last_mean(near, "loss_itm") == pytest.approx((0.62 + 0.64 + 0.63) / 3)  # a tenth of 30
    assert "came to 0.630" in report_module._plateau_in_words(near)
    assert "has hardly learnt to match" in report_module._plateau_in_words(near)


@pytest.mark.parametrize("training", [False, True])
def test_attention_of_queries_is_that_of_the_last_block_that_looks(stage2, training):
    model, processor = stage2
    model.train(training)
    pixels = torch.randn(2, 3, 16, 16)
    kernel = model.qformer.config._attn_implementation
    layer = [layer.cross_attn for layer in model.qformer.layers if layer.cross_attn is not None][-1]
    seen = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    try:
        weights = query_attention(model, pixels)
    finally:
        hook.remove()
    assert model.training is training and model.qformer.config._attn_implementation == kernel == "sdpa"
    (queries, (keys, _)) = seen[0]
    with torch.inference_mode():
        asked = layer.q_proj(queries).view(2, 3, 2, 8)
        scores = torch.einsum("bqhd,bkhd->bhqk", asked, keys.view(2, -1, 2, 8)) / 8**0.5
    torch.testing.assert_close(weights, scores.softmax(dim=-1).mean(dim=1))
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3))
    model.eval()


def test_the_attention_kernel_comes_back_after_an_error(stage2):
    with pytest.raises(ValueError):
        query_attention(stage2[0], torch.zeros(2, 3, 24, 16))
    assert stage2[0].qformer.config._attn_implementation == "sdpa"


def test_maps_are_drawn_beside_their_pictures(reported, stage2, of_split):
    model, processor = stage2
    for split, (names, images, maps) in zip(SHOWN, reported[1]["plot_query_attention"], strict=True):
        looks = {
            image.tobytes(): name
            for image, name in zip(of_split[split]["image"], of_split[split]["caption"], strict=True)
        }
        assert [looks[image.tobytes()] for image in images] == names and len(names) == 2
        weights = query_attention(model, processor(images=images, return_tensors="pt")["pixel_values"])
        torch.testing.assert_close(maps, weights.view(2, 3, 4, 4))


def test_only_a_square_grid_has_maps(stage2):
    def model_of(kind: str, **fields):
        return MMBlip2Model(
            MMBlip2Config(vision_config=vision_config(kind), qformer_config=qformer_fields(), **fields)
        )

    assert square_grid(stage2[0], (16, 16), 16) == 4
    assert square_grid(stage2[0], (8, 32), 16) is None
    clip = model_of("mm_clip_vision")
    assert clip.vision_features(torch.zeros(1, 3, 16, 16)).shape[1] == 17 and square_grid(clip, (16, 16), 17) is None
    assert square_grid(model_of("mm_clip_vision", vision_class_token=False), (16, 16), 16) == 4


def test_without_a_grid_the_page_says_so(stage2, of_split, monkeypatch):
    monkeypatch.setattr(report_module, "square_grid", lambda *_: None)
    rng = report_module.Random(0)
    section = report_module._queries(*stage2, {split: of_split[split] for split in SHOWN}, rng)
    assert not section.figures and "16 tokens of this vision tower are not a square grid" in section.text


def test_overlap_of_maps():
    corners = torch.eye(4)[None, :3]
    assert overlap(corners) == 0 and overlap(corners[:, [1, 1, 1]]) == 1
    halves = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]]])
    assert overlap(halves) == pytest.approx(0.5)
    one_query = report_module._overlap_in_words(halves.transpose(0, 1))
    assert one_query == "Here, the maps of one query on two pictures overlap by 50 %; 100 % would be the same places."


def test_the_unigram_loss_is_the_best_constant_guess(stage1):
    """Found once more by descent on the generation loss itself, with logits that are alike everywhere."""
    model, processor = stage1
    texts = ["cherry blossom", "rose", "rose", "a waving hand!"]
    inputs = processor(text=texts, return_tensors="pt")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)[:, 1:].flatten()
    logits = torch.zeros(model.config.qformer_config.vocab_size, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def loss():
        optimizer.zero_grad()
        everywhere = logits.expand(len(labels), -1)
        value = nn.functional.cross_entropy(everywhere, labels, label_smoothing=model.config.label_smoothing)
        value.backward()
        return value

    optimizer.step(loss)
    assert unigram_loss(model, processor, texts) == pytest.approx(loss().item(), abs=1e-6)


def test_curves_are_of_their_runs(reported, stage1, of_split):
    drawn = reported[1]
    guess = unigram_loss(*stage1, of_split["train"]["caption"][:])
    assert drawn["plot_stage1"] == [(STAGE1_LOG, 96, guess)]
    assert drawn["plot_losses"] == [(LOGS["words"],)]
    assert drawn["plot_runs"] == [({"with pictures": LOGS["stage2"], "without sight": LOGS["blind"]},)]


def test_the_page_describes_each_figure_and_names_the_artists(reported):
    page = reported[0]
    alts = re.findall(r'alt="([^"]*)"', page)
    assert len(alts) == 2 + 2 + 2 + 4 and all(alts)
    for owner in ("Google", "Twitter", "Microsoft", "OpenMoji (https://openmoji.org/)", "CC BY-SA 4.0"):
        assert owner in page


def without(tree: dict, *path: str) -> dict:
    tree = copy.deepcopy(tree)
    part = tree
    for key in path[:-1]:
        part = part[key]
    del part[path[-1]]
    return tree


@pytest.mark.parametrize(
    "path",
    [
        ("accept",),
        ("splits", "style"),
        ("splits", "style", "pictures"),
        ("splits", "cell", "model", "gap_se"),
        ("splits", "cell", "blind", "plain_top5"),
        ("splits", "concept", "nearest", "group_top1"),
        ("splits", "concept", "examples"),
        ("retrieval", "concept"),
        ("retrieval", "cell", "itc_t2i_r10"),
        ("retrieval", "cell", "reranked"),
    ],
)
def test_what_the_results_lack_is_named(results, path, tmp_path):
    place = "results" + "".join(f"['{key}']" for key in path[:-1])
    with pytest.raises(ValueError, match=re.escape(f"{place} has no '{path[-1]}'")):
        blip2_report(None, None, None, None, without(results, *path), LOGS, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_what_the_rest_lacks_is_named(results, of_split, monkeypatch, tmp_path):
    def refused(message: str, results=results, logs=LOGS):
        with pytest.raises(ValueError, match=re.escape(message)):
            blip2_report(None, None, None, None, results, logs, tmp_path / "report.html")

    refused("log_histories has no 'blind'", logs=without(LOGS, "blind"))
    refused("log_histories['words'] has no 'loss'", logs=LOGS | {"words": [{"step": 1}]})
    refused("log_histories['stage1'] has no 'loss_itm'", logs=LOGS | {"stage1": [{"step": 1, "loss_itc": 1.0}]})
    refused("results['accept']['cell'] has 'bleu'", results | {"accept": {"cell": {"bleu": 1}}})
    refused("results['accept'] has 'both'", results | {"accept": {"both": {}}})
    monkeypatch.setattr(report_module, "load_emoji", lambda split, **_: of_split[split])
    changed = copy.deepcopy(results)
    changed["splits"]["cell"]["examples"][0]["row"] = len(of_split["cell"])
    refused(f"has the row {len(of_split['cell'])}", changed)
    refused("has no 'blind'", without(results, "splits", "cell", "examples", 0, "blind"))
    changed["splits"]["cell"]["examples"] = []
    refused("['examples'] is empty", changed)
    assert list(tmp_path.iterdir()) == []
