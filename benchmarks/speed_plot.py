"""The README's table and plot of what `benchmarks.step_speed` measured, drawn from its result file.

    python -m benchmarks.speed_plot benchmarks/results/step_speed.h200.json

writes docs/step_speed.svg and the table between its marks in README.md, and names every measured case
of transformers + peft that no case of ours is both as fast as and as small as. The plot is plain SVG
whose colours follow the reader's light or dark page.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from benchmarks.common import ROOT
from benchmarks.step_speed import BUDGETS_GIB, best_within
from fitlora.units import GIB

Row = dict[str, Any]

README, PLOT = ROOT / "README.md", ROOT / "docs" / "step_speed.svg"
MARKS = ("<!-- step_speed: by python -m benchmarks.speed_plot -->", "<!-- step_speed ends -->")
# system and dtype: title, colour on a light page, on a dark one
SERIES: dict[tuple[str, str], tuple[str, str, str]] = {
    ("fitlora", "float8"): ("FitLoRA, fp8", "#7a3fc4", "#c39bff"),
    ("fitlora", "bfloat16"): ("FitLoRA", "#1559c7", "#7db1ff"),
    ("unsloth", "bfloat16"): ("Unsloth", "#0b7a53", "#4fd1a1"),
    ("peft+liger", "bfloat16"): ("peft + Liger", "#a35c00", "#f2b45c"),
    ("peft", "bfloat16"): ("transformers + peft + bitsandbytes", "#b3261e", "#ff8f86"),
}
_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 58, 48


def measured(rows: Sequence[Row]) -> list[Row]:
    """Rows of cases that ran on a GPU, without those of budgets."""
    return [r for r in rows if "budget_gib" not in r and r.get("process_bytes") is not None]


def not_beaten(rows: Sequence[Row], baseline: str = "peft") -> list[Row]:
    """Cases of `baseline` that no case of ours in bf16 is as fast as in as little memory."""
    found = measured(rows)
    ours = [r for r in found if (r["system"], r["compute_dtype"]) == ("fitlora", "bfloat16")]
    return [
        row
        for row in found
        if row["system"] == baseline
        and not any(
            r["tokens_per_second"] >= row["tokens_per_second"]
            and r["process_bytes"] <= row["process_bytes"]
            for r in ours
        )
    ]


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Those that nothing smaller is as fast as, by memory."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda r: (r["process_bytes"], -r["tokens_per_second"])):
        if not best or row["tokens_per_second"] > best[-1]["tokens_per_second"]:
            best.append(row)
    return best


# --- the table -------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Tokens per second of the fastest case within each budget, as Markdown."""
    best = {
        (row["budget_gib"], row["system"], row["compute_dtype"]): row["tokens_per_second"]
        for row in best_within(measured(rows))
    }
    kinds = [kind for kind in SERIES if any(key[1:] == kind for key in best)]
    kinds.sort(key=lambda kind: (kind[0] != "fitlora", kind[1] == "float8"))
    head = "| budget | " + " | ".join(SERIES[kind][0] for kind in kinds) + " |"
    lines = [head, "|---" * (len(kinds) + 1) + "|"]
    for budget in BUDGETS_GIB:
        cells = [best.get((budget, *kind)) for kind in kinds]
        text = " | ".join("" if cell is None else f"{cell:,.0f}" for cell in cells)
        lines.append(f"| {budget} GiB | {text} |")
    return "\n".join(lines)


def with_table(document: str, rows: Sequence[Row]) -> str:
    """The document with the table between its marks."""
    before, _, rest = document.partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    assert mark, f"the document lacks {MARKS}"
    return f"{before}{MARKS[0]}\n\n{table(rows)}\n\n{MARKS[1]}{after}"


# --- the plot --------------------------------------------------------------------------------------


def plot(rows: Sequence[Row], title: str) -> str:
    """An SVG: tokens per second over the memory of the process, each system's frontier as a line."""
    found = measured(rows)
    low = min(6.0, *(row["process_bytes"] / GIB for row in found))
    high = max(80.0, *(row["process_bytes"] / GIB for row in found))
    top = 5000 * math.ceil(max(row["tokens_per_second"] for row in found) / 5000)

    def x(gib: float) -> float:
        share = math.log(gib / low) / math.log(high / low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(speed: float) -> float:
        return _HEIGHT - _BOTTOM - speed / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_text(_LEFT, 20, title, "title")]
    for speed in range(0, top + 1, 5000):
        parts.append(_line(_LEFT, y(speed), _WIDTH - _RIGHT, y(speed), "grid"))
        parts.append(_text(_LEFT - 8, y(speed) + 4, f"{speed:,}", "end"))
    for budget in BUDGETS_GIB:
        parts.append(_line(x(budget), _TOP, x(budget), y(0), "budget"))
        parts.append(_text(x(budget), y(0) + 18, str(budget), "middle"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(_text(middle, _HEIGHT - 10, "memory of the process, GiB", "middle"))
    parts.append(_text(_LEFT - 56, _TOP - 10, "tokens/s", ""))
    place = float(_LEFT)
    for number, (kind, (name, *_)) in enumerate(SERIES.items()):
        mine = [row for row in found if (row["system"], row["compute_dtype"]) == kind]
        if not mine:
            continue
        best = frontier(mine)
        points = [(x(row["process_bytes"] / GIB), y(row["tokens_per_second"])) for row in best]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
        for row in mine:
            a, b = x(row["process_bytes"] / GIB), y(row["tokens_per_second"])
            kept = "dot" if row in best else "dot behind"
            tip = f"{name}: {row['tokens_per_second']:,.0f} tokens/s, {_layout(row)}"
            parts.append(
                f'<circle class="{kept} s{number}" cx="{a:.1f}" cy="{b:.1f}" r="3.5">'
                f"<title>{escape(tip)}</title></circle>"
            )
        parts.append(f'<circle class="dot s{number}" cx="{place + 5:.1f}" cy="36" r="4.5"/>')
        parts.append(_text(place + 14, 40, name, ""))
        place += 14 + 6.4 * len(name) + 18
    return _document(parts, title)


def _layout(row: Row) -> str:
    return (
        f"micro-batch {row['micro_batch']}, {row['recomputed_share']:.0%} of the layers recomputed, "
        f"{row['process_bytes'] / GIB:.1f} GiB"
    )


def _document(parts: Sequence[str], title: str) -> str:
    def colours(which: int) -> str:
        return "".join(
            f".s{number}{{stroke:{found[which]};fill:{found[which]}}}"
            for number, found in enumerate(SERIES.values())
        )

    style = (
        "text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#3c4450}"
        ".title{font-size:14px;font-weight:600;fill:#16191d}"
        ".end{text-anchor:end}.middle{text-anchor:middle}"
        ".grid{stroke:#d5dae1}.budget{stroke:#b9c1cb;stroke-dasharray:2 4}"
        ".line{stroke-width:2;fill:none!important}.dot.behind{opacity:.35}"
        + colours(1)
        + "@media(prefers-color-scheme:dark){text{fill:#b8c1cc}.title{fill:#eef1f5}"
        ".grid{stroke:#333b45}.budget{stroke:#4a5563}" + colours(2) + "}"
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


def plot_of(result: dict[str, Any]) -> str:
    """The plot of a result file's content."""
    return plot(
        result["rows"],
        f"QLoRA steps of Llama-3-8B, samples of 2,048 tokens, one {result['device']}",
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    args = parser.parse_args(argv)
    result = json.loads(args.result.read_text())
    PLOT.write_text(plot_of(result))
    README.write_text(with_table(README.read_text(), result["rows"]))
    for row in not_beaten(result["rows"]):
        print(f"not beaten: {_layout(row)}, {row['tokens_per_second']:,.0f} tokens/s")


if __name__ == "__main__":
    main()
