"""The contenders of the benchmarks do the same work: equal losses and gradients from equal weights."""

from argparse import Namespace

import pytest

pytest.importorskip("open_clip")

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import clip_models, conversion, pic2word_step, train_step_resnet
from benchmarks.harness import interleave
from benchmarks.report import Report
from benchmarks.train_step import check_agreement, contenders, make_step


@pytest.mark.parametrize("documented", [False, True])
def test_contenders_of_the_train_step_agree(documented):
    models, inputs = contenders(clip_models.quick(clip_models.TINY), "cpu", documented)
    assert all(model.training for model in models.values())
    losses = check_agreement(models, inputs)
    assert set(losses) == {"hf_mm", "transformers", "open_clip"}


@pytest.mark.parametrize("spoiled", ["hf_mm", "transformers", "open_clip"])
def test_a_contender_with_other_weights_is_noticed(spoiled):
    models, inputs = contenders(clip_models.quick(clip_models.TINY), "cpu", documented=False)
    names = ("fc1.weight", "c_fc.weight")
    matrix = next(weight for name, weight in models[spoiled].named_parameters() if name.endswith(names))
    with torch.no_grad():
        matrix.mul_(1.5)
    with pytest.raises(AssertionError, match="differ"):
        check_agreement(models, inputs)


def test_all_contenders_train_alike():
    """Five steps of the timed function leave the same loss."""
    models, inputs = contenders(clip_models.quick(clip_models.TINY), "cpu", documented=False)
    first = check_agreement(models, inputs)
    losses = clip_models.loss_functions(models)
    for name in models:
        step = make_step(models[name], losses[name], inputs[name])
        for _ in range(5):
            step()
    last = {name: losses[name](*inputs[name]).item() for name in models}
    assert max(last.values()) - min(last.values()) < 1e-3
    assert all(last[name] < first[name] - 0.01 for name in models)


def test_the_work_is_counted_as_torch_counts_it():
    """torch's counter of multiplications over a forward and backward pass, with attention as plain products."""
    size = clip_models.quick(clip_models.TINY)
    models, inputs = contenders(size, "cpu", documented=False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        clip_models.loss_functions(models)["transformers"](*inputs["transformers"]).backward()
    assert size.train_flops(size.num_tokens) == counter.get_total_flops()


def test_contenders_of_the_resnets_step_agree_and_ours_multiplies_less():
    size = train_step_resnet.quick()
    models, inputs = train_step_resnet.build_both(size), clip_models.random_batch(size)
    assert set(check_agreement(models, dict.fromkeys(models, inputs))) == {"hf_mm", "open_clip"}
    flops = train_step_resnet.count_flops(models, inputs)
    assert 0.5 * flops["open_clip"] < flops["hf_mm"] < flops["open_clip"]


@pytest.mark.parametrize("kind", conversion.MODELS)
def test_every_contender_opens_the_file(kind, tmp_path):
    path = str(conversion.write_file(kind, tmp_path, quick=True))
    for name in ("hf_mm", "hf_mm, to a folder", *(["open_clip"] if kind == "archive" else [])):
        assert conversion.child(name, kind, path, "seconds") > 0


def test_contenders_of_the_pic2word_step_agree_and_train_the_mapper_alone(tmp_path):
    contenders = pic2word_step.Contenders(clip_models.quick(pic2word_step.SIZES[0]), "cpu", tmp_path)
    contenders.check()
    before = {name: value.clone() for name, value in contenders.ours.state_dict().items()}
    for way in (contenders.cached, contenders.live, contenders.transformers):
        contenders.step(way, autocast=False)()
    changed = {name for name, value in contenders.ours.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("mapper.")}
    contenders.check()


def test_ratios_and_targets_of_a_report():
    """Closed form: ours 2 s, the best peer 3 s; rounds 1.5, 2.0, 1.0."""
    args = Namespace(device="cpu", dtype="float32", quick=True, rounds=3)
    report = Report("name", "title", args, [])
    costs = {"hf_mm": [2.0, 1.0, 3.0], "near": [3.0, 2.0, 3.0], "far": [9.0, 1.0, 9.0]}
    for at_least in (1.5, 1.51):
        report.add("speed", costs, at_least=at_least, flops=4e9, share=1e9)
    for at_most in (0.65, 0.67):
        report.add("size", costs, at_most=at_most)
    speed, too_slow, too_large, size = report.claims
    assert speed["best_peer"] == "near"
    assert speed["ratio_of_medians"] == speed["median_of_round_ratios"] == 1.5
    assert size["ratio_of_medians"] == size["median_of_round_ratios"] == pytest.approx(2 / 3)
    assert [claim["met"] for claim in report.claims] == [True, False, False, True]
    row = speed["contenders"]["hf_mm"]
    assert (row["median"], row["q1"], row["q3"], row["min"], row["max"]) == (2000, 1500, 2500, 1000, 3000)
    assert row["gflops"] == 2.0


def test_a_target_needs_both_ratios():
    report = Report("name", "title", Namespace(device="cpu", dtype="float32", quick=True, rounds=3), [])
    costs = {"hf_mm": [1.0, 2.0, 3.0], "peer": [1.0, 2.4, 2.4]}  # medians 1.2, rounds 1.0, 1.2, 0.8
    report.add("speed", costs, at_least=1.1)
    assert report.claims[0]["ratio_of_medians"] == pytest.approx(1.2)
    assert report.claims[0]["median_of_round_ratios"] == 1.0
    assert report.claims[0]["met"] is False


def test_a_quick_check_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.report.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.report.matmul_peak", lambda *_: 1.0)
    for quick in (True, False):
        report = Report("name", "title", Namespace(device="cpu", dtype="float32", quick=True, rounds=1), [])
        report.add("speed", {"hf_mm": [1.0], "peer": [1.0]}, at_least=1.1, flops=1.0, share=0.7)
        report.args.quick = quick
        report.finish()
        assert "target ≥ 1.1: **missed**" in capsys.readouterr().out
        assert sorted(path.name for path in tmp_path.iterdir()) == ([] if quick else ["name.json", "name.md"])


def test_rounds_are_interleaved():
    seen = []
    costs = interleave({name: lambda name=name: seen.append(name) for name in "abc"}, rounds=4, warmup=2)
    assert all(sorted(seen[start : start + 3]) == ["a", "b", "c"] for start in range(0, 18, 3)) and len(seen) == 18
    assert {name: len(seconds) for name, seconds in costs.items()} == {"a": 4, "b": 4, "c": 4}
