"""Timelines in plain numbers: levels, what lives, and the step from shallow to deep."""

import pytest

from fitlora.memory.timeline import Block, Level, Segment, Timeline, deepen, levels

A, B = Segment(0, 0, "forward", ""), Segment(0, 0, "backward", "kept layers")


def test_levels_and_what_lives() -> None:
    line = Timeline()
    line.entered.append((0, A))
    weight = line.allocate(Block(100, A, "", "load"))
    saved = line.allocate(Block(30, A, "0", "mm"))
    line.free(line.allocate(Block(50, A, "0", "scratch")))
    line.entered.append((len(line.events), B))
    line.free(saved)
    gradient = line.allocate(Block(20, B, "0", "mm"))
    assert line.peaks() == {A: (180, 3), B: (130, 4)}
    assert line.live(3) == [weight, saved, 2]
    assert line.live(len(line.events)) == [weight, gradient]
    found = levels(line, {"weights": [weight], "gradients": [gradient]}, rest="other")
    assert found[A] == Level({"weights": 100, "gradients": 0, "other": 80}, "forward, 0, scratch")
    assert found[B].components == {"weights": 100, "gradients": 0, "other": 30}
    assert found[A].bytes == 180


def test_a_segment_without_allocations_has_what_it_found() -> None:
    line = Timeline()
    line.entered.append((0, A))
    line.allocate(Block(10, A, "", ""))
    line.entered.append((1, B))
    assert line.peaks() == {A: (10, 1), B: (10, 1)}


def test_deepening_is_a_line_for_each_stack() -> None:
    def level(weights: int, activations: int) -> Level:
        return Level({"weights": weights, "activations": activations}, "there")

    base = {A: level(10, 100), B: level(10, 50)}
    more_kept = {A: level(12, 130), B: level(12, 50)}
    more_recomputed = {A: level(12, 101), B: level(12, 51)}
    found = deepen(base, [(more_kept, 3), (more_recomputed, 10)])
    assert found[A] == level(10 + 6 + 20, 100 + 90 + 10)
    assert found[B] == level(36, 60)
    with pytest.raises(ValueError, match="different segments"):
        deepen(base, [({A: level(1, 1)}, 1)])
