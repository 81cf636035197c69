import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from hf_mm.composite.dual_encoder import word_embeddings
from hf_mm.data.emoji import load_emoji
from hf_mm.evaluation import emoji_composed
from hf_mm.evaluation.emoji_composed import embed_emoji, evaluate_attribute_edit, evaluate_style_conversion
from hf_mm.models.clip.configuration_clip import MMClipConfig
from hf_mm.models.clip.image_processing_clip import MMClipImageProcessorPil
from hf_mm.models.clip.modeling_clip import MMClipModel
from hf_mm.models.clip.tokenization_clip import MMClipTokenizer
from hf_mm.models.pic2word.modeling_pic2word import Pic2WordModel
from hf_mm.models.pic2word.processing_pic2word import Pic2WordProcessor
from hf_mm.plots import pic2word_report as report_module
from hf_mm.plots.figures import plot_composed, plot_recalls, plot_words
from hf_mm.plots.pic2word_report import ROWS, SPLITS, margin_in_words, nearest_words, pic2word_report, words_of

LOG = [{"step": 20, "loss": 3.0}, {"step": 40, "loss": 2.0}]
WAYS = {"composed": "picture as a word", "image_only": "picture alone", "text_only": "words alone"}


@pytest.fixture(scope="module")
def few_emoji():
    """A subgroup with skin tones and one without."""
    whole = load_emoji("all", skin_tones=True)
    kept = {"person-gesture", "plant-other"}
    return whole.select([row for row, subgroup in enumerate(whole["subgroup"]) if subgroup in kept])


@pytest.fixture(scope="module")
def pic2word(few_emoji):
    """For 16x16 pictures, with random weights large enough to tell inputs apart."""
    torch.manual_seed(0)
    texts = [f"{name} in the style of noto" for name in few_emoji["caption"]]
    tokenizer = MMClipTokenizer.train_from_iterator(texts, 640, model_max_length=48)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    clip = MMClipModel(
        MMClipConfig(
            projection_dim=8,
            vision_config={**tower, "image_size": 16, "patch_size": 8},
            text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 48, **ends},
        )
    )
    processor = Pic2WordProcessor(MMClipImageProcessorPil(size=16), tokenizer)
    model = Pic2WordModel.from_clip_pretrained(clip, processor.placeholder_token_id, hidden_dim=8)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    return model, processor


@pytest.fixture(scope="module")
def reported(pic2word, few_emoji, tmp_path_factory):
    """What was measured, the page about it, and what its figures were drawn from."""
    drawn = {plot.__name__: [] for plot in (plot_composed, plot_recalls, plot_words)}

    def record(plot):
        def drawing(*given):
            drawn[plot.__name__].append(given)
            return plot(*given) if len(drawn[plot.__name__]) == 1 else Figure()  # one of each kind, for time's sake

        return drawing

    with pytest.MonkeyPatch.context() as patch:
        for module in (emoji_composed, report_module):
            patch.setattr(module, "load_emoji", lambda *args, **kwargs: few_emoji)
        for plot in (plot_composed, plot_recalls, plot_words):
            patch.setattr(report_module, plot.__name__, record(plot))
        pictures = embed_emoji(*pic2word, progress=False)
        metrics = {
            name: {split: evaluate(*pic2word, pictures, split, progress=False) for split in reversed(SPLITS)}
            for name, evaluate in (
                ("attribute_edit", evaluate_attribute_edit),
                ("style_conversion", evaluate_style_conversion),
            )
        }
        path = tmp_path_factory.mktemp("report") / "report.html"
        assert pic2word_report(*pic2word, metrics, LOG, path, pictures, progress=False) == path
    return metrics, path.read_text(encoding="utf-8"), drawn


def questions_of(result):
    return {"style_conversion": ("noto", "twemoji", "fluent"), "attribute_edit": ("light", "medium", "dark")}[result]


def test_the_page_prints_what_was_measured_beside_baselines_and_chance(reported):
    metrics, page, _ = reported
    printed = {
        name: iter(re.findall(rf'<tr><th scope="row">{name[0].upper() + name[1:]}</th>(.*?)</tr>', page))
        for name in ROWS.values()
    }
    for protocol in ("style_conversion", "attribute_edit"):
        for split in SPLITS:
            result = metrics[protocol][split]
            for gallery in ("results", "filtered"):
                for method, name in ROWS.items():
                    row = next(printed[name])
                    cells = re.findall(r'"number">([\d.]+)<small>first ([\d.]+), of 50 ([\d.]+)<', row)
                    expected = [
                        [result[gallery][domain][method][metric] for metric in ("r10", "r1", "r50")]
                        for domain in (*questions_of(protocol), "mean")
                    ]
                    np.testing.assert_allclose(np.array(cells, dtype=float), expected, atol=0.051)
            for name in list(ROWS.values())[:4]:
                shares = re.findall(r'"number">([\d.]+)<', next(printed[name]))
                assert sum(map(float, shares)) == pytest.approx(100, abs=0.3)
    assert all(next(rows, None) is None for rows in printed.values())
    mean = metrics["style_conversion"]["concept"]["results"]["mean"]
    lead = re.findall(r"<header>.*?</header>", page, flags=re.DOTALL)[0]
    assert f"{report_module.format_percent(mean['composed']['r10'])} % of the questions" in lead
    assert margin_in_words(mean) in lead


def test_bars_are_the_recalls_of_each_domain(reported):
    metrics, _, drawn = reported
    order = [(protocol, split) for protocol in ("style_conversion", "attribute_edit") for split in SPLITS]
    for (protocol, split), (groups, chance, _) in zip(order, drawn["plot_recalls"], strict=True):
        result = metrics[protocol][split]["results"]
        assert list(groups) == [*questions_of(protocol), "mean"]
        for domain, row in groups.items():
            assert row["picture as a word"] == result[domain]["composed"]["r10"]
            assert row["16x16 pixels alone"] == result[domain]["pixels"]["r10"]
            assert chance[domain] == result[domain]["chance"]["r10"]


def test_the_pictures_found_are_the_nearest_and_framed_where_right(reported, pic2word, few_emoji):
    (model, processor), drawn = pic2word, reported[2]
    columns = {name: np.array(few_emoji[name][:]) for name in ("style", "base", "skin_tone", "split")}
    images = list(few_emoji["image"])
    looks = [image.tobytes() for image in images]
    with torch.inference_mode():
        pixels = processor(images=images)["pixel_values"]
        gallery = nn.functional.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    tones = {"light": 1, "medium": 3, "dark": 5}
    for number, (queries, sentences, targets, results, hits) in enumerate(drawn["plot_composed"]):
        is_style, split = number < 2, list(SPLITS)[number % 2]
        searched = np.flatnonzero(columns["skin_tone"] == 0) if is_style else np.arange(len(images))
        for place, (query, sentence, target) in enumerate(zip(queries, sentences, targets, strict=True)):
            text = sentence.strip("“”")
            domain = text.split()[-1] if is_style else text.split()[2]
            own = [row for row in searched if looks[row] == query.tobytes() and columns["split"][row] == split]
            wanted = [row for row in searched if looks[row] == target.tobytes()]
            assert any(
                columns["base"][row] == columns["base"][right]
                and (columns["style"][right], columns["skin_tone"][right])
                == ((domain, 0) if is_style else (columns["style"][row], tones[domain]))
                for row in own
                for right in wanted
            )
            words = re.sub(r"^\* (: )?", "", text)
            with torch.inference_mode():
                picture = nn.functional.normalize(model.get_image_features(pixels[own[:1]]).pooler_output, dim=-1)[0]
                alone = model.get_text_features(**processor(text=words)).pooler_output[0]
                composed = model.get_composed_features(**processor(images=query, text=text)).pooler_output[0]
            asked = {"composed": composed, "image_only": picture, "text_only": alone}
            asked = {WAYS[way]: nn.functional.normalize(vector, dim=-1) for way, vector in asked.items()}
            asked["picture plus words"] = nn.functional.normalize(
                asked["picture alone"] + asked["words alone"], dim=-1
            )
            others = np.array([row for row in searched if row not in own])
            for name, vector in asked.items():
                found = [picture.tobytes() for picture in results[name][place]]
                cosines = (gallery @ vector).numpy()
                best = np.sort(cosines[others])[::-1][:5]
                shown = [max(cosines[row] for row in others if looks[row] == look) for look in found]
                np.testing.assert_allclose(shown, best, atol=1e-5)
                assert hits[name][place] == [look == target.tobytes() for look in found]


def test_words_of_pictures_are_the_nearest_of_the_token_table(reported, pic2word, few_emoji):
    """A mapping network that always writes the embedding of "tree", twice as long."""
    (model, processor), drawn = pic2word, reported[2]
    vocabulary = [
        word for word in sorted(words_of(" ".join(few_emoji["caption"]))) if len(ids_of(processor, word)) == 1
    ]
    table = word_embeddings(model.clip).weight.detach()
    rows = nn.functional.normalize(table[[ids_of(processor, word)[0] for word in vocabulary]], dim=-1)
    layer = model.mapper.fc_out
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    try:
        nn.init.zeros_(layer.weight)
        layer.bias.data.copy_(2 * table[ids_of(processor, "tree")[0]])
        near = nearest_words(model, processor.tokenizer, torch.randn(3, 8), vocabulary, count=2)
    finally:
        layer.load_state_dict(before)
    cosines = rows[vocabulary.index("tree")] @ rows.T
    second = vocabulary[int(cosines.topk(2).indices[1])]
    assert near.words == [["tree", second]] * 3 and near.vocabulary == set(vocabulary)
    torch.testing.assert_close(near.cosines[0], cosines.topk(2).values)
    torch.testing.assert_close(near.lengths, 2 * table[ids_of(processor, "tree")[0]].norm().expand(3))
    assert near.word_cosine == pytest.approx(
        float((rows @ rows.T - 2 * torch.eye(len(rows))).amax(1).mean()), abs=1e-5
    )

    for (images, names, words, cosines, hits), split in zip(drawn["plot_words"], SPLITS, strict=True):
        rows = zip(few_emoji["caption"], few_emoji["split"], strict=True)
        assert len(images) == 4 and set(names) <= {name for name, of in rows if of == split}
        for name, found, near_by, right in zip(names, words, cosines, hits, strict=True):
            assert near_by == sorted(near_by, reverse=True) and len(set(found)) == 5
            assert right == [word in words_of(name) for word in found]


def ids_of(processor, word):
    return processor.tokenizer(word, add_special_tokens=False)["input_ids"]


def test_small_things():
    assert words_of("woman's Keycap: 10, tête-à-tête") == {"woman", "keycap", "tête"}
    rows = {"composed": 12.0, "image_only": 9.5, "text_only": 1.0, "image_text": 11.0}
    mean = {method: {"r10": value} for method, value in rows.items()}
    assert margin_in_words(mean) == (
        "The best baseline, picture plus words, finds 11.0 %: the picture as a word finds 1.0 points more."
    )
    mean["composed"]["r10"] = 10.0
    assert margin_in_words(mean).endswith("1.0 points less.")


def test_the_page_names_the_artists_and_describes_each_figure(reported):
    page = reported[1]
    alts = re.findall(r'alt="([^"]*)"', page)
    assert len(alts) == 2 * 2 * 2 + 2 + 1 and all(alts)
    for owner in ("Google", "Twitter", "Microsoft", "OpenMoji (https://openmoji.org/)", "CC BY-SA 4.0"):
        assert owner in page


def test_what_is_missing_is_named(pic2word, tmp_path):
    with pytest.raises(ValueError, match="metrics has no 'attribute_edit'"):
        pic2word_report(*pic2word, {"style_conversion": {"cell": {}}}, LOG, tmp_path / "report.html")
    with pytest.raises(ValueError, match="0 of 1 words are one token"):
        nearest_words(pic2word[0], pic2word[1].tokenizer, torch.zeros(1, 8), ["xylophonist"])
    assert list(tmp_path.iterdir()) == []
