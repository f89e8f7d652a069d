"""Tokens per second over memory, as a picture: what each further GiB buys.

Plain SVG, whose colours follow the reader's light or dark page. Every point has its own words as a
tooltip, and each series a line through its frontier: what nothing smaller is as fast as.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from fitlora.artifacts import write_text_atomically
from fitlora.errors import UserError
from fitlora.planner.search import Choice
from fitlora.planner.task import Task
from fitlora.units import GIB

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 58, 48
CARDS_GIB = (4, 6, 8, 12, 16, 24, 48, 80)  # sizes that the Plan's is shown among


@dataclass(frozen=True)
class Point:
    """A plan by the memory of its process and its speed. words: of its tooltip."""

    process_bytes: int
    tokens_per_second: float
    words: str


@dataclass(frozen=True)
class Series:
    """Points of one colour: on a light page, and on a dark one."""

    name: str
    light: str
    dark: str
    points: Sequence[Point]


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that nothing smaller is as fast as, by memory."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.process_bytes, -p.tokens_per_second)):
        if not best or point.tokens_per_second > best[-1].tokens_per_second:
            best.append(point)
    return best


def write_frontier(path: Path, task: Task, choice: Choice) -> None:
    """Writes the picture of a task's Plan among the plans for other sizes of its memory.

    Each is searched for as the Plan was, without a probe. Raises UserError where no speed is known.
    """
    search = task.search()
    sizes = [] if choice.forecast is None else [search.within(card * GIB) for card in CARDS_GIB]
    others = [other for other in sizes if other is not None]
    write_text_atomically(path, plot_of(choice, others, task.hardware.budget_bytes))


def plot_of(choice: Choice, others: Sequence[Choice], budget_bytes: int) -> str:
    """The picture itself. others: the plans for other sizes."""
    if choice.forecast is None:
        raise UserError(
            "the frontier shows speed over memory, and the speed of this device or model is not known; "
            "name a known card with --gpu, or leave the picture out"
        )
    points = {
        each.plan: Point(
            each.estimate.process_bytes, each.forecast.tokens_per_second, each.plan.describe()
        )
        for each in [choice, *others]
        if each.forecast is not None
    }
    series = [
        Series("the fastest plan for each size", "#1559c7", "#7db1ff", list(points.values())),
        Series(
            f"the Plan, for {budget_bytes / GIB:g} GiB", "#b3261e", "#ff8f86", [points[choice.plan]]
        ),
    ]
    return plot(series, "What memory buys: speed by forecast", CARDS_GIB)


def plot(
    series: Sequence[Series], title: str, marks: Sequence[float], span: Sequence[float] = ()
) -> str:
    """An SVG of all series. marks: of the axis of memory, in GiB; span: what it shows at least."""
    found = [point for one in series for point in one.points]
    shown = [*span, *(point.process_bytes / GIB for point in found)]
    low, high = min(shown), max(shown)
    if low == high:
        low, high = 0.8 * low, 1.2 * high
    top, step = _scale(max(point.tokens_per_second for point in found))

    def x(gib: float) -> float:
        share = math.log(gib / low) / math.log(high / low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(speed: float) -> float:
        return _HEIGHT - _BOTTOM - speed / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_text(_LEFT, 20, title, "title")]
    for speed in range(0, top + 1, step):
        parts.append(_line(_LEFT, y(speed), _WIDTH - _RIGHT, y(speed), "grid"))
        parts.append(_text(_LEFT - 8, y(speed) + 4, f"{speed:,}", "end"))
    for mark in marks:
        if low <= mark <= high:
            parts.append(_line(x(mark), _TOP, x(mark), y(0), "budget"))
            parts.append(_text(x(mark), y(0) + 18, f"{mark:g}", "middle"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(_text(middle, _HEIGHT - 10, "memory of the process, GiB", "middle"))
    parts.append(_text(_LEFT - 56, _TOP - 10, "tokens/s", ""))
    place = float(_LEFT)
    for number, one in enumerate(series):
        if not one.points:
            continue
        best = frontier(one.points)
        where = [(x(p.process_bytes / GIB), y(p.tokens_per_second)) for p in best]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in where)
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
        for point in one.points:
            a, b = x(point.process_bytes / GIB), y(point.tokens_per_second)
            kept = "dot" if point in best else "dot behind"
            tip = f"{one.name}: {point.tokens_per_second:,.0f} tokens/s, {point.words}"
            parts.append(
                f'<circle class="{kept} s{number}" cx="{a:.1f}" cy="{b:.1f}" r="3.5">'
                f"<title>{escape(tip)}</title></circle>"
            )
        parts.append(f'<circle class="dot s{number}" cx="{place + 5:.1f}" cy="36" r="4.5"/>')
        parts.append(_text(place + 14, 40, one.name, ""))
        place += 14 + 6.4 * len(one.name) + 18
    return _document(parts, title, series)


def _scale(highest: float) -> tuple[int, int]:
    """The top of an axis and its step, which is 1, 2 or 5 of some power of ten."""
    ten = 10 ** max(0, math.floor(math.log10(max(1.0, highest / 5))))
    step = next(n * ten for n in (1, 2, 5, 10) if n * ten >= highest / 5)
    return step * math.ceil(highest / step), step


def _document(parts: Sequence[str], title: str, series: Sequence[Series]) -> str:
    def colours(values: Sequence[str]) -> str:
        return "".join(
            f".s{number}{{stroke:{value};fill:{value}}}" for number, value in enumerate(values)
        )

    style = (
        "text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#3c4450}"
        ".title{font-size:14px;font-weight:600;fill:#16191d}"
        ".end{text-anchor:end}.middle{text-anchor:middle}"
        ".grid{stroke:#d5dae1}.budget{stroke:#b9c1cb;stroke-dasharray:2 4}"
        ".line{stroke-width:2;fill:none!important}.dot.behind{opacity:.35}"
        + colours([one.light for one in series])
        + "@media(prefers-color-scheme:dark){text{fill:#b8c1cc}.title{fill:#eef1f5}"
        ".grid{stroke:#333b45}.budget{stroke:#4a5563}" + colours([one.dark for one in series]) + "}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
