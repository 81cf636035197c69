"""Tables of names: how they bind, and that every name on both sides is accounted for."""

import pytest
import torch

from hf_mm.conversion.rules import (
    MAX_NAMES,
    ConversionError,
    Rule,
    drop,
    first_line,
    inverse,
    listed,
    plan,
    rename,
    reshape,
    run,
    split,
    transpose,
)


def pairs(steps):
    return {(step.sources, step.targets) for step in steps}


def test_a_placeholder_stands_for_one_part_and_a_starred_one_for_any_rest():
    rules = [rename("block.{i}.{p}", "layers.{i}.{p}"), rename("tower.{rest*}", "vision.{rest*}")]
    names = ["block.0.bias", "block.11.bias", "tower.a", "tower.a.b.c"]
    assert pairs(plan(rules, names)) == {
        (("block.0.bias",), ("layers.0.bias",)),
        (("block.11.bias",), ("layers.11.bias",)),
        (("tower.a",), ("vision.a",)),
        (("tower.a.b.c",), ("vision.a.b.c",)),
    }
    with pytest.raises(ConversionError, match=r"does not have block\.0\.norm\.bias"):
        plan(rules, ["block.0.norm.bias"])


def test_names_are_no_regular_expressions():
    with pytest.raises(ConversionError, match="does not have axb"):
        plan([rename("a.b", "c")], ["axb"])
    assert pairs(plan([rename("a+b(c).d", "e")], ["a+b(c).d"])) == {(("a+b(c).d",), ("e",))}


def test_a_placeholder_that_is_there_twice_has_one_value():
    rule = Rule(("q.{i}", "k.{i}"), ("qk.{i}",), lambda t: [torch.cat(t)], lambda t: list(t[0].chunk(2)))
    assert pairs(plan([rule], ["q.0", "k.0"])) == {(("q.0", "k.0"), ("qk.0",))}
    with pytest.raises(ConversionError, match=r"lacks k\.0, q\.1"):
        plan([rule], ["q.0", "k.1"])


def test_every_complaint_is_made_at_once():
    rules = [rename("a", "x"), rename("b", "x"), rename("c", "y"), *drop("c")]
    with pytest.raises(ConversionError) as caught:
        plan(rules, ["a", "b", "c", "d"], ["x", "z"])
    message = str(caught.value)
    for part in ("does not have d", "nothing for the model's z", "no place for, its y"):
        assert part in message
    assert "two rules read c" in message and "two tensors for x" in message


def test_names_are_listed_up_to_a_number():
    names = [f"n{i:02}" for i in range(MAX_NAMES + 3)]
    assert listed(reversed(names)) == ", ".join(names[:MAX_NAMES]) + " and 3 more"


def test_the_inverse_of_a_table_undoes_it():
    rules = [
        split("qkv", ["q", "k", "v"]),
        split("fused", ["left", "right"], dim=1),
        transpose("proj", "projection"),
        reshape("scale", "scale", (1,), ()),
        rename("norm", "layer_norm"),
        *drop("unused"),
    ]
    source = {
        "qkv": torch.randn(6, 2),
        "fused": torch.randn(2, 6),
        "proj": torch.randn(2, 3),
        "scale": torch.tensor(2.0),
        "norm": torch.randn(4),
        "unused": torch.randn(1),
    }
    ours = dict(run(plan(rules, source), source))
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        **dict.fromkeys("qkv", (2, 2)),
        **dict.fromkeys(("left", "right"), (2, 3)),
        "projection": (3, 2),
        "scale": (1,),
        "layer_norm": (4,),
    }
    back = dict(run(plan(inverse(rules), ours), ours))
    assert set(back) == set(source) - {"unused"}
    for name, tensor in back.items():
        assert torch.equal(tensor, source[name]) and tensor.shape == source[name].shape


def test_nothing_is_computed_before_it_is_asked_for():
    calls = []

    def forward(tensors):
        calls.append(len(calls))
        return tensors

    tensors = {f"a.{i}": torch.ones(1) for i in range(3)}
    produced = run(plan([Rule(("a.{i}",), ("b.{i}",), forward, forward)], tensors), tensors)
    assert calls == []
    next(produced)
    assert calls == [0]


def test_a_rule_that_gives_another_number_of_tensors_fails():
    tensors = {"a": torch.ones(2)}
    with pytest.raises(ValueError):
        dict(run(plan([split("a", ["x", "y", "z"])], tensors), tensors))


def test_a_message_does_not_grow_with_the_names():
    names = listed("x" * (1 << 20) + str(i) for i in range(9))
    assert names.startswith("xxx") and names.endswith(" and 1 more") and len(names) < 3000


def test_the_first_line_of_an_error():
    assert first_line(ValueError("\nno such thing.\nand a trace")) == "no such thing"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(ValueError("x" * (1 << 20)))) == 300
