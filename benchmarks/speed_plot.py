"""The README's table and plot of what `benchmarks.step_speed` measured, drawn from its result file.

    python -m benchmarks.speed_plot benchmarks/results/step_speed.h200.json

writes docs/step_speed.svg and the table between its marks in README.md, and names every measured case
of transformers + peft that no case of ours is both as fast as and as small as. The plot is plain SVG
whose colours follow the reader's light or dark page.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from benchmarks.step_speed import BUDGETS_GIB, best_within
from fitlora.report import frontier
from fitlora.report.frontier import Point, Series
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
    series = [
        Series(
            *titled,
            [
                Point(row["process_bytes"], row["tokens_per_second"], _layout(row))
                for row in found
                if (row["system"], row["compute_dtype"]) == kind
            ],
        )
        for kind, titled in SERIES.items()
    ]
    return frontier.plot(series, title, BUDGETS_GIB, span=(6.0, 80.0))


def _layout(row: Row) -> str:
    return (
        f"micro-batch {row['micro_batch']}, {row['recomputed_share']:.0%} of the layers recomputed, "
        f"{row['process_bytes'] / GIB:.1f} GiB"
    )


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
