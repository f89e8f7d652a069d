"""The report in a real browser: nothing goes wrong, charts are drawn, and no page is too wide."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fitlora.artifacts import Sample
from fitlora.params import Params
from fitlora.report.page import write_report
from fitlora.report.sections import Trained
from tests.report.browser import Browser, browser, find_chromium
from tests.report.runs import make_evaluation, write_facts, write_log
from tests.report.test_page import HOSTILE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed"),
]
# Each chart's drawn shapes: Vega gives each one its role.
MARKS = """Object.fromEntries([...document.querySelectorAll('.chart')].map(chart => [
    chart.id,
    chart.querySelectorAll('svg .mark-rect path, svg .mark-line path, svg .mark-rule line').length
]))"""
TOO_WIDE = """[...document.querySelectorAll('body *')].filter(element =>
    element.getBoundingClientRect().right > innerWidth + 1 && !element.closest('.scroll')
).map(element => element.outerHTML.slice(0, 80))"""

CUT = """[...document.querySelectorAll('.chart')].flatMap(chart =>
    [...chart.querySelectorAll('svg text')].filter(text => {
        const [inner, outer] = [text.getBoundingClientRect(), chart.getBoundingClientRect()];
        return inner.right > outer.right + 1 || inner.left < outer.left - 1;
    }).map(text => `${chart.id}: ${text.textContent}`)
)"""


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with markup in the data, long words, a change of plan and recommendations."""
    root = tmp_path_factory.mktemp("run")
    write_facts(root)
    change = {"event": "plan", "step": 3, "cause": HOSTILE, "before": {"a": 1}, "after": {"a": 2}}
    write_log(root, change, recommendations=[HOSTILE], forecast_tokens_per_second=1100.0)
    names = ("base", "quantized_base", "adapter", "merged")
    samples = (
        Sample(prompt=HOSTILE, expected=HOSTILE, answers=dict.fromkeys(names, HOSTILE)),
        Sample(prompt="long" * 200, expected="x" * 500, answers=dict.fromkeys(names, "y" * 900)),
    )
    trained = Trained.read(Params(), root)
    return write_report(trained, make_evaluation(samples=samples), root)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_whole_at_any_width(tab: Browser, page: Path, width: int, dark: bool) -> None:
    tab.open(page, width=width, dark=dark)
    marks = tab.evaluate(MARKS)
    assert len(marks) == 8
    assert all(count > 0 for count in marks.values()), marks
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate(TOO_WIDE) == []
    assert tab.evaluate(CUT) == []
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    red = int(background.removeprefix("rgb(").split(",")[0])
    assert (red < 64) == dark
    assert tab.problems == []


def test_markup_in_the_data_does_nothing(tab: Browser, page: Path) -> None:
    tab.call(
        "Page.addScriptToEvaluateOnNewDocument",
        source="window.called = 0; window.alert = () => { window.called += 1; };",
    )
    tab.open(page, width=1280)
    assert tab.evaluate("window.called") == 0
    assert tab.evaluate("document.querySelectorAll('img').length") == 0
    assert tab.evaluate("document.querySelectorAll('script').length") == 4
    assert tab.problems == []


def test_charts_are_drawn_again_where_the_reader_turns_dark(tab: Browser, page: Path) -> None:
    tab.open(page, width=1280)
    color = """getComputedStyle(
        document.querySelector('#chart-loss .role-axis-label text')).fill"""
    light = tab.evaluate(color)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    tab.call("Emulation.setEmulatedMedia", features=features)
    tab.evaluate("new Promise(done => setTimeout(done, 500))")
    assert tab.evaluate(color) != light
    assert len(tab.evaluate(MARKS)) == 8
    assert tab.problems == []


def test_a_page_that_does_wrong_is_seen(tab: Browser, tmp_path: Path) -> None:
    """That these tests can fail: a page that fetches, throws, and is too wide."""
    wrong = tmp_path / "wrong.html"
    wrong.write_text(
        "<html data-charts='drawn'><img src='http://127.0.0.1:9/x.png'>"
        "<div style='width: 3000px'>x</div><script>throw new Error('x')</script></html>"
    )
    tab.open(wrong, width=390)
    tab.evaluate("new Promise(done => setTimeout(done, 200))")
    assert any("http://127.0.0.1:9" in problem for problem in tab.problems)
    assert any("Error: x" in problem for problem in tab.problems)
    assert tab.evaluate("document.documentElement.scrollWidth") > 390
    tab.problems.clear()
