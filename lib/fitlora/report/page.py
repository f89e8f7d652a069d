"""reports/report.html: one run in one file, for people.

The page is made from the artifacts and from nothing else, so that no figure in it can disagree with
them, and the same artifacts give the same bytes. It has all that it needs inside (styles, data, the
chart library) and a content policy that forbids it to fetch anything. Text from models and data is
escaped where it enters; data for charts is JSON in which `<` is written as an escape.
"""

import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path

from fitlora.artifacts import REPORT, Evaluation, write_text_atomically
from fitlora.report import charts, sections
from fitlora.report.html import Html, join, tag
from fitlora.report.sections import Run, Trained

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "script-src 'unsafe-inline' 'unsafe-eval'"  # Vega compiles its expressions
)
_SCRIPTS = ("vega.min.js", "vega-lite.min.js", "page.js")


def write_report(trained: Trained, evaluation: Evaluation, root: Path = Path()) -> Path:
    """Writes the report of the run under `root`; returns its path."""
    path = root / REPORT
    write_text_atomically(path, page(Run(**vars(trained), evaluation=evaluation)))
    return path


def page(run: Run) -> str:
    """The whole page as text."""
    title = f"{run.params.model.id} · FitLoRA"
    drawn = dict(charts.of(run.evaluation, run.estimate, run.log))
    body = join(
        sections.head(run),
        sections.quality(run),
        sections.samples(run),
        sections.training(run),
        sections.memory(run),
        sections.plan(run),
        sections.ingredients(run),
        sections.reproduce(run),
    )
    return "".join(_document(title, body, drawn))


def _document(title: str, body: Html, drawn: Mapping[str, object]) -> Iterator[str]:
    yield "<!doctype html>\n"
    yield '<html lang="en"><head><meta charset="utf-8">\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield '<meta name="color-scheme" content="light dark">\n'
    yield f"{tag('title', title)}\n<style>\n{_asset('page.css')}</style></head>\n<body>\n"
    yield body
    yield f'\n<script type="application/json" id="charts">{_json(drawn)}</script>\n'
    for name in _SCRIPTS:
        yield f"<script>\n{_asset(name)}\n</script>\n"
    yield "</body></html>\n"


def _json(content: object) -> str:
    """JSON that no parser of HTML can take for the end of the script."""
    return json.dumps(content, ensure_ascii=False, sort_keys=True).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (files("fitlora.report") / "assets" / name).read_text(encoding="utf-8")
