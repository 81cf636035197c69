import io
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image

from hf_mm.plots.figures import (
    GREEN,
    INK,
    LIGHT_GREEN,
    plot_answers,
    plot_attention,
    plot_captions,
    plot_composed,
    plot_few_shot,
    plot_losses,
    plot_matching_accuracy,
    plot_mistakes,
    plot_neighbours,
    plot_query_attention,
    plot_recalls,
    plot_retrieval,
    plot_robustness,
    plot_runs,
    plot_stage1,
    plot_style_shift,
    plot_temperature,
    plot_words,
    token_attention,
)

LOG = [
    {"step": 10, "loss": 4.0, "contrastive_loss": 3.0, "view_loss": 2.0, "temperature": 0.07},
    {"step": 15, "eval_loss": 9.0},
    {"step": 20, "loss": 3.0, "contrastive_loss": 2.5, "view_loss": 1.0, "temperature": 0.06},
    {"step": 20, "train_runtime": 1.0, "train_loss": 3.5},
]
FEW_SHOT = {
    "few_shot": [
        {"shots": 1, "accuracy": 10.0, "accuracies": [8.0, 12.0]},
        {"shots": 4, "accuracy": 30.0, "accuracies": [30.0, 30.0]},
    ],
    "pixels_few_shot": [
        {"shots": 1, "accuracy": 5.0, "accuracies": [4.0, 6.0]},
        {"shots": 4, "accuracy": 9.0, "accuracies": [9.0, 9.0]},
    ],
    "zero_shot": 20.0,
    "zero_shot_name": 7.0,
    "chance": 1.0,
    "shots_to_match": 2.0,
    "shots_to_match_name": 1.0,
}
ROBUSTNESS = {  # odds of 1/9, 3/7, 1 before; after, by the line, a third of these
    "reference": [{"in": 10.0, "shift": 100 / 28}, {"in": 30.0, "shift": 12.5}, {"in": 50.0, "shift": 25.0}],
    "slope": 1.0,
    "intercept": -np.log(3),
    "expected": 40.0,
    "model": {"in": 200 / 3, "shift": 55.0},
    "effective_robustness": 15.0,
    "extrapolated": True,
}
COLOURS = ["red", "green", "blue", "yellow", "black", "purple"]


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), COLOURS[index]) for index in range(count)]


def shown(ax) -> np.ndarray:
    return np.asarray(ax.get_images()[0].get_array())


def test_curves_are_what_was_logged():
    lines = {line.get_label(): line.get_xydata().tolist() for line in plot_losses(LOG).axes[0].lines}
    assert lines == {
        "loss": [[10, 4], [20, 3]],
        "contrastive loss": [[10, 3], [20, 2.5]],
        "view loss": [[10, 2], [20, 1]],
    }
    (temperature,) = plot_temperature(LOG).axes[0].lines
    assert temperature.get_xydata().tolist() == [[10, 0.07], [20, 0.06]]


def test_a_plain_trainer_has_one_curve_and_no_legend():
    ax = plot_losses([{"step": 1, "loss": 2.0}]).axes[0]
    assert len(ax.lines) == 1 and ax.get_legend() is None


@pytest.mark.parametrize(("plot", "word"), [(plot_losses, "'loss'"), (plot_temperature, "'temperature'")])
def test_a_log_without_it_is_refused(plot, word):
    with pytest.raises(ValueError, match=f"no entry with {word}"):
        plot([{"step": 1, "train_runtime": 2.0}])


def test_right_pictures_are_framed_and_nothing_else():
    results = [pictures(3), pictures(3)[::-1]]
    hits = [[False, True, False], [True, False, True]]
    figure = plot_retrieval(["a $100 note", "x" * 100], results, hits)
    assert len(figure.axes) == 6
    for ax, picture, hit in zip(figure.axes, sum(results, []), sum(hits, []), strict=True):
        assert np.array_equal(shown(ax), np.asarray(picture))
        assert {to_hex(spine.get_edgecolor()) == GREEN for spine in ax.spines.values()} == {hit}
    titles = [text.get_text() for text in figure.texts]
    assert titles[0] == "a $100 note" and titles[1].endswith("…") and len(titles) == 2


def test_neighbours_stand_under_their_artists_and_right_ones_are_framed():
    drawings, results = pictures(2), [pictures(5)[2:4], pictures(6)[4:]]
    hits = [[False, True], [True, False]]
    figure = plot_neighbours(["Noto", "Fluent", "OpenMoji"], ["cat", "dog"], drawings, results, hits)
    assert [text.get_text() for text in figure.texts] == ["Noto", "Fluent", "OpenMoji", "cat", "dog"]
    for row in range(2):
        own, *found = figure.axes[3 * row : 3 * row + 3]
        for ax, picture in zip((own, *found), (drawings[row], *results[row]), strict=True):
            assert np.array_equal(shown(ax), np.asarray(picture))
        assert {to_hex(spine.get_edgecolor()) for spine in own.spines.values()} == {INK}
        for ax, hit in zip(found, hits[row], strict=True):
            assert {to_hex(spine.get_edgecolor()) == GREEN for spine in ax.spines.values()} == {hit}
    for column, heading in enumerate(figure.texts[:3]):
        assert heading.get_position()[0] == pytest.approx(figure.axes[column].get_position().x0)
        assert heading.get_position()[1] > figure.axes[column].get_position().y1


def test_a_mistake_is_told_with_both_pictures():
    figure = plot_mistakes(pictures(2), ["dog", "x" * 60], [0.875, 0.3], pictures(4)[2:], ["cat", "$1"], [12, 1500])
    left, words, right = figure.axes[3:]
    assert np.array_equal(shown(left), np.asarray(pictures(2)[1]))
    assert np.array_equal(shown(right), np.asarray(pictures(4)[3]))
    assert [text.get_text() for text in figure.axes[1].texts] == ["dog", "88% sure", "is: cat", "guess number 12"]
    answer, *others = [text.get_text() for text in words.texts]
    assert answer.endswith("…") and others == ["30% sure", "is: $1", "guess number 1,500"]


def test_few_shot_curves_are_what_was_measured_and_cross_where_they_are_marked():
    ax = plot_few_shot(FEW_SHOT).axes[0]
    lines = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert lines["probe, features"].get_xydata().tolist() == [[1, 10], [4, 30]]
    assert lines["probe, pixels"].get_xydata().tolist() == [[1, 5], [4, 9]]
    for name, height in (("zero-shot, names", 20), ("zero-shot, class name", 7), ("chance", 1)):
        assert set(lines[name].get_ydata()) == {height}
    draws = [dots.get_offsets().tolist() for dots in ax.collections]
    assert draws == [[[1, 8], [1, 12], [4, 30], [4, 30]], [[1, 4], [1, 6], [4, 9], [4, 9]]]

    (mark,) = [line for line in ax.lines if len(line.get_xdata()) == 1]  # the class name is beaten from the start
    assert [text.get_text() for text in ax.texts] == ["2.0"]
    start, end = ax.transData.transform(lines["probe, features"].get_xydata())
    np.testing.assert_allclose(ax.transData.transform(mark.get_xydata())[0], (start + end) / 2)


def test_few_shot_without_a_crossing_has_no_mark():
    ax = plot_few_shot(FEW_SHOT | {"zero_shot": 60.0, "shots_to_match": None}).axes[0]
    assert len(ax.texts) == 0 and all(len(line.get_xdata()) > 1 for line in ax.lines)


def test_the_model_stands_off_the_line_of_the_others():
    ax = plot_robustness(ROBUSTNESS).axes[0]
    (points,) = ax.collections
    odds = np.exp(points.get_offsets())
    np.testing.assert_allclose(odds[:, 0], [1 / 9, 3 / 7, 1])
    lines = {line.get_label(): line for line in ax.lines}
    for one in (points.get_offsets(), lines["their line"].get_xydata()):
        np.testing.assert_allclose(one[:, 1], one[:, 0] - np.log(3))
    assert np.exp(lines["their line"].get_xdata()).tolist() == pytest.approx([1 / 9, 1])
    (beyond,) = [line for line in ax.lines if line.get_linestyle() == ":"]
    np.testing.assert_allclose(np.exp(beyond.get_xydata()), [[1, 1 / 3], [2, 2 / 3]])
    np.testing.assert_allclose(np.exp(lines["this model, +15.0 points"].get_xydata()), [[2, 55 / 45]])
    (distance,) = [
        line
        for line in ax.lines
        if line.get_color() == lines["this model, +15.0 points"].get_color() and len(line.get_xdata()) == 2
    ]
    np.testing.assert_allclose(np.exp(distance.get_xydata()), [[2, 40 / 60], [2, 55 / 45]])
    for axis in (ax.xaxis, ax.yaxis):
        for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True):
            assert 100 / (1 + np.exp(-place)) == pytest.approx(float(label.get_text()))


def test_a_model_among_the_others_needs_no_guess():
    row = ROBUSTNESS | {"model": {"in": 30.0, "shift": 10.0}, "effective_robustness": -2.5, "extrapolated": False}
    ax = plot_robustness(row).axes[0]
    assert all(line.get_linestyle() != ":" for line in ax.lines)
    assert "this model, −2.5 points" in [line.get_label() for line in ax.lines]


def test_captions_are_drawn_as_they_are_written():
    caption = r"from $\nothing$ to 100"  # as mathematics, an error
    for figure in (
        plot_retrieval([caption], [pictures(1)], [[True]]),
        plot_captions(pictures(1), [[caption]], [{caption + "?"}], [[0.5]]),
        plot_mistakes(pictures(1), [caption], [0.5], pictures(1), [caption], [2]),
        plot_style_shift([{"name": caption, "r1": 1.0, "r10": 2.0, "chance_r10": 0.1, "pixels_r10": None}]),
    ):
        file = io.BytesIO()
        figure.savefig(file, format="svg")
        assert file.getvalue().startswith(b"<?xml")


def test_right_captions_are_marked_and_missed_ones_are_told():
    figure = plot_captions(pictures(2), [["cat", "dog"], ["cat", "dog"]], [{"dog"}, ["owl"]], [[0.6, 0.3], [0.5, 0.2]])
    hit, miss = figure.axes[1], figure.axes[3]
    assert [bar.get_width() for bar in hit.patches] == [0.6, 0.3]
    assert [to_hex(bar.get_facecolor()) == LIGHT_GREEN for bar in hit.patches] == [False, True]
    assert [text.get_text() for text in hit.texts] == ["cat", "60%", "✓ dog", "30%"]
    assert [text.get_text() for text in miss.texts] == ["cat", "50%", "dog", "20%", "is: owl"]
    assert np.array_equal(shown(figure.axes[2]), np.asarray(pictures(2)[1]))


def test_bars_and_marks_of_the_style_shift():
    rows = [
        {"name": "known", "r1": 20.0, "r10": 60.0, "chance_r10": 0.7, "pixels_r10": 50.0},
        {"name": "new", "r1": 10.0, "r10": 30.0, "chance_r10": 6.1, "pixels_r10": None},
    ]
    ax = plot_style_shift(rows).axes[0]
    assert [[bar.get_height() for bar in bars] for bars in ax.containers] == [[20, 10], [60, 30]]
    marks = {marks.get_label(): [segment[0][1] for segment in marks.get_segments()] for marks in ax.collections}
    assert marks == {"chance, R@10": [0.7, 6.1], "nearest pixels, R@10": [50.0]}
    for bar, segment in zip(ax.containers[1], ax.collections[0].get_segments(), strict=True):
        assert segment[0][0] <= bar.get_x() and bar.get_x() + bar.get_width() <= segment[1][0]


def test_attention_is_strongest_where_the_map_is():
    image = Image.new("RGB", (64, 48), "white")
    maps = torch.zeros(3, 3, 4)
    for index, (row, column) in enumerate([(0, 0), (1, 2), (2, 3)]):
        maps[index, row, column] = 1
    figure = plot_attention([image] * 3, maps)
    assert len(figure.axes) == 6
    for index, (row, column) in enumerate([(0, 0), (1, 2), (2, 3)]):
        assert np.array_equal(shown(figure.axes[2 * index]), np.asarray(image))
        overlay = shown(figure.axes[2 * index + 1]).astype(int)
        tint = overlay[..., 0] - overlay[..., 2]
        y, x = np.unravel_index(tint.argmax(), tint.shape)
        assert (y // 16, x // 16) == (row, column)
        assert tint[24 if row != 1 else 0, 0 if column else 63] == 0


def test_attention_of_a_class_token_and_of_mean_pooling():
    weights = torch.rand(2, 3, 7, 7, dtype=torch.float64).softmax(dim=-1)
    earlier = torch.full_like(weights, 1 / 7)
    maps = token_attention([earlier, weights], num_prefix_tokens=1, grid=(2, 3))
    expected = weights[:, :, 0, 1:].numpy().mean(axis=1)
    np.testing.assert_allclose(maps.reshape(2, 6), expected / expected.sum(axis=1, keepdims=True), rtol=1e-12)
    pooled = token_attention([earlier, weights], num_prefix_tokens=0, grid=(1, 7))
    np.testing.assert_allclose(pooled[:, 0], weights.numpy().mean(axis=(1, 2)), rtol=1e-12)
    np.testing.assert_allclose(pooled.sum(dim=(1, 2)), [1, 1], rtol=1e-12)


@pytest.mark.parametrize(
    ("plot", "arguments", "error", "message"),
    [
        (plot_retrieval, ([], [], []), ValueError, "at least one"),
        (plot_retrieval, (["a"], [pictures(1)], []), ValueError, "not 1, 0, 1"),
        (plot_captions, ([], [], [], []), ValueError, "at least one"),
        (plot_neighbours, (["Noto"], [], [], [], []), ValueError, "at least one"),
        (plot_neighbours, (["a", "b"], ["cat"], pictures(1), [pictures(1)], []), ValueError, "not 1, 1, 0, 1"),
        (plot_mistakes, ([], [], [], [], [], []), ValueError, "at least one"),
        (plot_mistakes, (pictures(1), ["a"], [1.0], pictures(1), ["b"], []), ValueError, "not 1, 1, 1, 1, 0, 1"),
        (plot_captions, (pictures(1), [["a"]], ["a"], [[1.0]]), TypeError, "list of strings"),
        (plot_style_shift, ([],), ValueError, "rows is empty"),
        (plot_attention, (pictures(1), torch.ones(2, 2)), ValueError, "one map a picture"),
        (plot_attention, (pictures(2), torch.ones(1, 2, 2)), ValueError, "one map a picture"),
        (token_attention, ([torch.ones(1, 1, 5, 5)], 0, (2, 2)), ValueError, "5 tokens are not 0 prefix"),
    ],
)
def test_bad_input_is_refused(plot, arguments, error, message):
    with pytest.raises(error, match=message):
        plot(*arguments)


def test_plotting_leaves_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    plot_losses(LOG)
    with pytest.raises(ValueError):
        plot_style_shift([])
    assert dict(matplotlib.rcParams) == before


def test_nothing_loads_pyplot():
    code = "import sys, hf_mm.plots.clip_report; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_composed_queries_stand_over_what_each_way_finds():
    queries, targets = pictures(2), pictures(4)[2:]
    results = {"as a word": [pictures(3), pictures(3)[::-1]], "alone": [pictures(6)[3:], pictures(5)[2:]]}
    hits = {"as a word": [[False, True, False], [False] * 3], "alone": [[False] * 3, [True, False, True]]}
    figure = plot_composed(queries, ["* by $noto", "y" * 100], targets, results, hits)
    assert len(figure.axes) == 2 * (2 + 2 * 3)
    for number in range(2):
        query, target, *found = figure.axes[8 * number : 8 * number + 8]
        assert np.array_equal(shown(query), np.asarray(queries[number]))
        assert np.array_equal(shown(target), np.asarray(targets[number]))
        expected = [*results["as a word"][number], *results["alone"][number]]
        assert all(np.array_equal(shown(ax), np.asarray(own)) for ax, own in zip(found, expected, strict=True))
        framed = [to_hex(ax.spines["left"].get_edgecolor()) == GREEN for ax in found]
        assert framed == [*hits["as a word"][number], *hits["alone"][number]]
        boxes = [ax.get_position() for ax in (query, target, *found)]
        assert boxes[0].y0 > boxes[1].y1 and all(box.x0 > boxes[0].x1 for box in boxes[2:])
        assert all(min(box.min) >= 0 and max(box.max) <= 1 for box in boxes)
        assert all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    texts = [text.get_text() for text in figure.texts]
    assert texts[0] == "* by $noto" and texts.count("asked for") == 2 and texts.count("alone") == 2
    assert sum(text.endswith("…") for text in texts) == 1


def test_recalls_are_bars_in_the_order_given_with_chance_over_each_group():
    groups = {"noto": {"word": 30.0, "alone": 20.0}, "mean": {"word": 25.0, "alone": 15.0}}
    ax = plot_recalls(groups, {"noto": 1.5, "mean": 2.0}, "found, %").axes[0]
    heights = [[bar.get_height() for bar in container] for container in ax.containers]
    assert heights == [[30.0, 25.0], [20.0, 15.0]] and [c.get_label() for c in ax.containers] == ["word", "alone"]
    (chance,) = ax.collections
    assert [segment[0][1] for segment in chance.get_segments()] == [1.5, 2.0]
    for place, (left, right) in enumerate(segment[:, 0] for segment in chance.get_segments()):
        bars = [container[place] for container in ax.containers]
        assert left < min(bar.get_x() for bar in bars) and right > max(bar.get_x() + bar.get_width() for bar in bars)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["noto", "mean"] and ax.get_ylim()[1] > 30


def test_words_are_listed_under_the_name_and_its_own_are_marked():
    figure = plot_words(
        pictures(2),
        ["red cat", "dog"],
        [["cat", "car"], ["sun", "z" * 40]],
        [[0.5, -0.125], [0.25, 0.2]],
        [[True, False], [False, False]],
    )
    rows = [[text.get_text() for text in ax.texts] for ax in figure.axes[1::2]]
    assert rows[0] == ["red cat", "✓ cat", "0.50", "car", "−0.12"]
    assert rows[1][:3] == ["dog", "sun", "0.25"] and rows[1][3].endswith("…")
    widths = [[bar.get_width() for bar in ax.patches] for ax in figure.axes[1::2]]
    assert widths == [[0.5, 0], [0.25, 0.2]] and {ax.get_xlim() for ax in figure.axes[1::2]} == {(0, 0.5)}
    assert [to_hex(bar.get_facecolor()) == LIGHT_GREEN for bar in figure.axes[1].patches] == [True, False]
    assert np.array_equal(shown(figure.axes[2]), np.asarray(pictures(2)[1]))


def test_what_does_not_belong_together_is_refused():
    one, found = pictures(1), {"alone": [pictures(2)]}
    with pytest.raises(ValueError, match="as queries"):
        plot_composed(one, ["a", "b"], one, found, {"alone": [[True, False]]})
    with pytest.raises(ValueError, match="as queries"):
        plot_composed(one, ["a"], one, found, {"other": [[True, False]]})
    with pytest.raises(ValueError, match="at least one"):
        plot_composed([], [], [], {}, {})
    with pytest.raises(ValueError, match="groups is empty"):
        plot_recalls({}, {}, "%")
    with pytest.raises(ValueError, match="as images, at least one, not 1, 1, 1, 2, 1"):
        plot_words(one, ["a"], [["b"]], [[0.1]], [[True], [False]])


def test_answers_stand_in_order_beside_their_picture_and_right_ones_are_marked():
    figure = plot_answers(
        pictures(2),
        ["red $1 cat", "x" * 50],
        {"the model": ["dog", "z" * 40], "blind": ["red cat", "sun"]},
        {"the model": [False, False], "blind": [True, False]},
    )
    for number, picture in enumerate(pictures(2)):
        assert np.array_equal(shown(figure.axes[2 * number]), np.asarray(picture))
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes[1::2]]
    assert texts[0] == ["red $1 cat", "the model", "dog", "blind", "✓ red cat"]
    assert texts[1][0].endswith("…") and texts[1][2].endswith("…") and texts[1][4] == "sun"
    green = [[text.get_color() == GREEN for text in ax.texts] for ax in figure.axes[1::2]]
    assert green == [[False, False, False, False, True], [False] * 5]


@pytest.mark.parametrize("queries", [1, 6])
def test_query_maps_stand_under_their_number_without_overlap(queries):
    image = Image.new("RGB", (32, 32), "white")
    maps = torch.zeros(2, queries, 2, 2)
    for number in range(queries):
        maps[0, number, number % 2, 0] = maps[1, number, number % 2, 1] = 1
    figure = plot_query_attention(["one", "two"], [image] * 2, maps)
    assert len(figure.axes) == 2 * (1 + queries)
    for row in range(2):
        axes = figure.axes[row * (1 + queries) :][: 1 + queries]
        assert np.array_equal(shown(axes[0]), np.asarray(image))
        for number, ax in enumerate(axes[1:]):
            overlay = shown(ax).astype(int)
            tint = overlay[..., 0] - overlay[..., 2]
            y, x = np.unravel_index(tint.argmax(), tint.shape)
            assert (y // 16, x // 16) == (number % 2, row)
    header = [text for text in figure.texts if text.get_text() not in ("one", "two")]
    assert [text.get_text() for text in header] == ["picture", *(f"query {number + 1}" for number in range(queries))]
    figure.savefig(io.BytesIO(), format="svg")
    boxes = [text.get_window_extent() for text in header]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    assert boxes[-1].x1 <= figure.bbox.x1


STAGE1 = [
    {"step": 1, "loss_itc": 4.0, "loss_itm": 0.7, "loss_itg": 5.0, "accuracy_itm_right_pair": 0.0}
    | {"accuracy_itm_drawn_image": 1.0, "accuracy_itm_drawn_text": 0.9},
    {"step": 2, "eval_loss": 1.0},
    {"step": 3, "loss_itc": 3.0, "loss_itm": 0.5, "loss_itg": 2.0, "accuracy_itm_right_pair": 0.25}
    | {"accuracy_itm_drawn_image": 0.75, "accuracy_itm_drawn_text": 0.5},
]


def test_losses_of_stage_1_stand_over_what_a_guess_without_looking_costs():
    """The lines by torch's cross-entropy: of logits that are alike, and of the shares of right and drawn pairs."""
    smooth = torch.nn.functional.cross_entropy(torch.ones(1, 96), torch.tensor([5]), label_smoothing=0.1).item()
    shares = torch.tensor([[2 / 3, 1 / 3]]).log().expand(3, 2)
    constant = torch.nn.functional.cross_entropy(shares, torch.tensor([1, 0, 0])).item()
    figure = plot_stage1(STAGE1, batch_size=96, unigram_loss=3.5)
    curves = [[[1, 4.0], [3, 3.0]], [[1, 0.7], [3, 0.5]], [[1, 5.0], [3, 2.0]]]
    for ax, curve, height in zip(figure.axes, curves, (smooth, constant, 3.5), strict=True):
        assert ax.lines[0].get_xydata().tolist() == curve
        assert ax.lines[1].get_ydata() == pytest.approx([height] * 2, abs=1e-5)
        assert f"{height:.2f}" in ax.get_title(loc="right") and ax.get_ylim()[1] > height
    assert [ax.get_title(loc="left")[-4:-1] for ax in figure.axes] == ["ITC", "ITM", "ITG"]
    assert [len(ax.lines) for ax in plot_stage1(STAGE1).axes] == [1, 2, 1]


def test_matching_accuracy_is_drawn_apart_for_each_kind_of_pair():
    lines = {line.get_label(): line.get_xydata().tolist() for line in plot_matching_accuracy(STAGE1).axes[0].lines}
    assert lines == {
        "right pair": [[1, 0], [3, 25]],
        "drawn image": [[1, 100], [3, 75]],
        "drawn text": [[1, 90], [3, 50]],
    }


def test_runs_share_their_axes():
    figure = plot_runs({"with pictures": LOG, "without sight": [{"step": 5, "loss": 4.5}]})
    (ax,) = figure.axes
    assert {line.get_label(): line.get_xydata().tolist() for line in ax.lines} == {
        "with pictures": [[10, 4], [20, 3]],
        "without sight": [[5, 4.5]],
    }
    assert len({line.get_color() for line in ax.lines}) == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["with pictures", "without sight"]


@pytest.mark.parametrize(
    ("plot", "arguments", "message"),
    [
        (plot_answers, ([], [], {}, {}), "at least one"),
        (plot_answers, (pictures(1), ["a"], {"x": ["b", "c"]}, {"x": [True]}), "not 1, 2"),
        (plot_answers, (pictures(1), ["a"], {"x": ["b"]}, {"y": [True]}), "of each speaker"),
        (plot_query_attention, ([], [], torch.ones(0, 1, 2, 2)), "at least one"),
        (plot_query_attention, (["a"], pictures(1), torch.ones(1, 2, 2)), "as (n, queries, rows, cols)"),
        (plot_query_attention, (["a", "b"], pictures(1), torch.ones(1, 1, 2, 2)), "not 2 and (1, 1, 2, 2) for 1"),
        (plot_stage1, (STAGE1, 0), "batch_size is 0"),
        (plot_stage1, ([{"step": 1, "loss_itc": 1.0}],), "no entry with 'loss_itm'"),
        (plot_matching_accuracy, (LOG,), "no entry with 'accuracy_itm_right_pair'"),
        (plot_runs, ({},), "there are 0 runs"),
        (plot_runs, (dict.fromkeys("abcd", LOG),), "there are 4 runs"),
        (plot_runs, ({"a": LOG, "b": [{"step": 1}]},), "no entry with 'loss'"),
    ],
)
def test_figures_of_blip2_refuse_what_they_cannot_draw(plot, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plot(*arguments)
