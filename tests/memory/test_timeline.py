"""Timelines in plain numbers: levels, and the step from few layers to many."""

import random

import pytest

from fitlora.memory.timeline import (
    Block,
    Irregular,
    Level,
    Segment,
    Timeline,
    deepened,
    levels,
    representatives,
)

A, B = Segment(0, 0, "forward", ""), Segment(0, 0, "backward", "kept layers")


def test_levels() -> None:
    line = Timeline()
    line.enter(A)
    weight = line.allocate(Block(100, A, "", "load"))
    saved = line.allocate(Block(30, A, "0", "mm"))
    line.free(line.allocate(Block(50, A, "0", "scratch")))
    line.enter(B)
    line.free(saved)
    gradient = line.allocate(Block(20, B, "0", "mm"))
    found = levels(line, {"weights": [weight], "gradients": [gradient]}, rest="other")
    assert found[A] == Level({"weights": 100, "gradients": 0, "other": 80}, "forward, 0, scratch")
    assert found[B].components == {"weights": 100, "gradients": 0, "other": 30}
    assert found[B].instant == "backward of kept layers"
    assert found[A].bytes == 180


def test_an_instant_names_its_layer() -> None:
    line = Timeline(layer=17)
    made = line.allocate(Block(1, B, "model.layers.1.mlp.up_proj", "aten::mm"))
    assert line.instant(made) == "backward of layer 17, mlp.up_proj, aten::mm"


@pytest.mark.parametrize(
    ("kinds", "reach", "chosen"),
    [
        ("a" * 80, 1, "aaa"),
        ("a" * 80, 2, "aaaaa"),
        ("a" * 40 + "b" * 40, 1, "aaabbb"),
        ("aaaaab" * 5 + "aaaa", 1, "aaabaaa"),
        ("ab" * 13, 1, "abab"),
        ("a", 1, "a"),
        ("abc", 1, "abc"),
    ],
)
def test_few_layers_stand_for_all(kinds: str, reach: int, chosen: str) -> None:
    layers, places, _ = representatives(kinds, reach)
    assert "".join(kinds[layer] for layer in layers) == chosen
    for layer, place in enumerate(places):
        for near in range(-reach, reach + 1):
            beside = layer + near
            wanted = kinds[beside] if 0 <= beside < len(kinds) else None
            there = place + near
            assert (chosen[there] if 0 <= there < len(chosen) else None) == wanted


def test_any_order_of_kinds_has_representatives() -> None:
    draw = random.Random(3)
    for _ in range(50):
        kinds = [draw.choice("aab") for _ in range(draw.randint(1, 60))]
        layers, places, _ = representatives(kinds, 1)
        assert layers == sorted(set(layers))
        assert [kinds[layers[place]] for place in places] == kinds


def run(kinds: str, window: int = 1, own: str = "") -> Timeline:
    """Two passes over layers: each keeps a block for its way back, and frees an input on its way up.

    The size of what a layer makes is its kind's. window: how far behind it its input is let go. own: of
    each layer, what it loads before.
    """
    line = Timeline()
    for line.layer, loaded in enumerate(own):
        if loaded != "-":
            line.allocate(Block(ord(loaded), A, "", "load"))
    line.layer = None
    whole = Block(
        sum(map(ord, kinds)) * 512,
        A,
        "",
        "flat",
        parts={i: ord(k) * 512 for i, k in enumerate(kinds)},
    )
    line.allocate(whole)
    for _ in range(2):
        inputs, kept = [], []
        line.enter(A)
        for layer, kind in enumerate(kinds):
            line.layer = layer
            inputs.append(line.allocate(Block(ord(kind), A, "", "in")))
            kept.append(line.allocate(Block(2 * ord(kind), A, "", "kept")))
            if layer >= window:
                line.free(inputs.pop(0))
        line.layer = None
        line.enter(B)
        for number in inputs:
            line.free(number)
        for layer in reversed(range(len(kinds))):
            line.layer = layer
            line.free(line.allocate(Block(1, B, "", "scratch")))
            line.free(kept.pop())
        line.layer = None
    return line


@pytest.mark.parametrize("kinds", ["a" * 12, "aaabbbbbb", "aaab" * 4, "a" * 7 + "b" * 5 + "ab" * 4])
@pytest.mark.parametrize("window", [1, 2])
def test_many_layers_are_written_out_of_few(kinds: str, window: int) -> None:
    layers, places, _ = representatives(kinds, window)
    assert len(layers) < len(kinds)
    few, whole = run("".join(kinds[layer] for layer in layers), window), run(kinds, window)
    found = deepened(few, places, window)
    assert found.events == whole.events
    assert [(b.size, b.operator) for b in found.blocks] == [
        (b.size, b.operator) for b in whole.blocks
    ]
    assert found.layers == whole.layers
    assert found.origin is not None
    assert all(
        few.blocks[n].operator == b.operator
        for n, b in zip(found.origin, found.blocks, strict=True)
    )
    assert levels(found, {}, rest="all") == levels(whole, {}, rest="all")


@pytest.mark.parametrize("own", ["x-" * 6, "--xy" * 3, "-" * 11 + "x", "xxxxx-xxxxxx"])
def test_what_is_a_layers_own_needs_no_neighbours_of_its_kind(own: str) -> None:
    layers, places, dealt = representatives("a" * 12, 2, own)
    assert len(layers) <= 5 + 2
    few = run("a" * len(layers), 2, "".join(map(str, dealt)))
    found, whole = deepened(few, places, 2), run("a" * 12, 2, own)
    assert found.events == whole.events
    assert [b.size for b in found.blocks] == [b.size for b in whole.blocks]
    assert found.layers == whole.layers


def test_patterns_of_what_is_a_layers_own_have_the_same_few_layers() -> None:
    """Of 34 layers every sixth is of another kind; as many as there are patterns were traced before."""
    kinds = ("aaaaab" * 6)[:34]
    found = set()
    for count in range(4, 32):
        own = ["x" if layer * count % 34 < count else "-" for layer in range(34)]
        own[0] = "first"
        layers, places, dealt = representatives(kinds, 2, own)
        assert [dealt[place] for place in places] == own
        assert [kinds[layers[place]] for place in places] == list(kinds)
        found.add((tuple(layers), tuple(dealt)))
    assert len(found) <= 8


def test_layers_that_matter_farther_off_are_found_out() -> None:
    _, places, _ = representatives("a" * 12, 1)
    with pytest.raises(Irregular, match="what is"):
        deepened(run("aaa", window=2), places, 1)


def test_what_is_freed_in_another_size_is_found_out() -> None:
    few = run("aaaa")
    _, places, _ = representatives("a" * 12, 1)
    made = zip(few.blocks, few.layers, strict=True)
    changed = next(n for n, (b, layer) in enumerate(made) if b.operator == "in" and layer == 1)
    few.blocks[changed] = Block(9, A, "", "in")  # which every layer but one would make
    with pytest.raises(Irregular, match="is not there in every layer"):
        deepened(few, [place + (place == 2) for place in places], 1)


def test_what_one_layer_leaves_behind_is_found_out() -> None:
    few = run("aaa")
    few.layer = 1
    made = few.allocate(Block(5, B, "", "left"))
    few.layer = 2
    few.free(made)
    with pytest.raises(Irregular, match="what is left is freed"):
        deepened(few, [0, *[1] * 10, 2], 1)
