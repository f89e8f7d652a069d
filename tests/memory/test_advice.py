"""Warnings come once and in time; recommendations have figures."""

import random

from fitlora.memory.advice import WINDOW, Edge, Growth, Measured, recommendations
from fitlora.units import GIB, MIB


def test_growth_is_told_from_noise() -> None:
    draw = random.Random(0)
    steady, leaking = Growth(), Growth()
    found = [steady.add(GIB + draw.randrange(40 * MIB)) for _ in range(500)]
    assert found == [None] * 500
    jump = Growth()
    assert [jump.add(GIB + (5 * MIB if i > 60 else 0)) for i in range(200)] == [None] * 200, (
        "a cache that fills once is no leak"
    )
    rates = [leaking.add(GIB + i * MIB // 4 + draw.randrange(MIB)) for i in range(3 * WINDOW)]
    assert rates[:-1] == [None] * (3 * WINDOW - 1)
    assert rates[-1] is not None
    assert 0.2 * MIB < rates[-1] < 0.3 * MIB


def test_more_than_predicted_is_said_once_and_with_what_is_left() -> None:
    edge = Edge(predicted_bytes=4 * GIB, limit_bytes=8 * GIB)
    assert edge.look(1, peak_bytes=4 * GIB) == []
    (warning,) = edge.look(2, peak_bytes=5 * GIB)
    assert warning == (
        "step 2: 5.00 GiB were allocated, 1.00 GiB more than predicted (4.00 GiB); 3.00 GiB are left "
        "to the limit"
    )
    assert edge.look(3, peak_bytes=6 * GIB) == []
    (near,) = edge.look(4, peak_bytes=int(7.9 * GIB))
    assert "7.90 GiB of the 8.00 GiB" in near


def test_what_is_not_known_is_not_looked_at() -> None:
    edge = Edge()
    for step in range(200):
        assert edge.look(step, peak_bytes=step * GIB, host_free_share=0.5) == []


def test_a_leak_is_told_with_when_it_ends() -> None:
    edge = Edge(limit_bytes=GIB)
    found = [w for step in range(100) for w in edge.look(step, live_bytes=step * 2 * MIB)]
    (warning,) = found
    assert "the device holds between steps grows by 2.00 MiB each" in warning
    assert "which reaches the limit in 465 of them" in warning
    (host,) = [w for step in range(100) for w in Edge().look(step, host_bytes=step)] or [None]
    assert host is None
    (host,) = [w for edge in [Edge()] for s in range(90) for w in edge.look(s, host_bytes=s * GIB)]
    assert "the process holds" in host


def test_the_host_running_short() -> None:
    edge = Edge()
    (warning,) = edge.look(None, host_free_share=0.031)
    assert warning.startswith("only 3.1% of the host's memory is free")
    assert edge.look(None, host_free_share=0.01) == []


MEASURED = Measured(
    peak_bytes=5 * GIB,
    reserved_bytes=6 * GIB,
    process_bytes=int(6.5 * GIB),
    budget_bytes=8 * GIB,
    phase_bytes={"forward": 4 * GIB, "backward": 5 * GIB, "optimizer": GIB},
)


def test_recommendations_in_figures() -> None:
    larger = [("no layer recomputed", 9 * GIB), ("twice the micro-batch", 7 * GIB)]
    headroom, peak, fragmentation, padding = recommendations(MEASURED, 0.2345, larger)
    assert headroom == (
        "headroom: 1.50 GiB of the budget (19%) were never used; twice the micro-batch would fit "
        "(7.00 GiB predicted)"
    )
    assert peak == "peak: backward, with 5.00 GiB; next is forward, with 4.00 GiB"
    assert fragmentation.startswith("fragmentation: 1.00 GiB (16.7%) of what was reserved; ")
    assert "23.4%" in padding
    assert MEASURED.is_idle
    (first, *_) = recommendations(MEASURED, 0.0, larger[:1])
    assert first.endswith("no layer recomputed would take 1.00 GiB more than there is")


def test_what_the_allocator_reserves_at_a_time_is_no_fragmentation() -> None:
    small = Measured(96 * MIB, 112 * MIB, 900 * MIB, 8 * GIB, {})
    (line,) = (one for one in recommendations(small, 0.0) if one.startswith("fragmentation"))
    assert line == "fragmentation: 16.00 MiB (14.3%) of what was reserved"


def test_recommendations_without_a_device_of_its_own() -> None:
    cpu = Measured(GIB, None, None, None, {})
    assert [line.partition(":")[0] for line in recommendations(cpu, 0.5)] == ["padding"]
    assert not cpu.is_idle
