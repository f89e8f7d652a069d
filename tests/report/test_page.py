"""The report says what the artifacts say, and nothing in the data can get out of its place."""

import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fitlora.artifacts import (
    DATASET,
    MEMORY_ESTIMATE,
    PLAN,
    REPORT,
    TRAINING_LOG,
    Card,
    MemoryEstimate,
    Sample,
)
from fitlora.errors import ArtifactError
from fitlora.evaluation.gate import gate_of
from fitlora.params import MergeParams, Params, check_params, with_changes
from fitlora.report.memory import outcome_lines
from fitlora.report.page import write_report
from fitlora.report.sections import Trained
from tests.report.runs import STEPS, make_evaluation, make_plan, write_facts, write_log


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_facts(tmp_path)
    write_log(tmp_path)
    return tmp_path


def report(root: Path, params: Params | None = None, **evaluation: Any) -> str:
    trained = Trained.read(params or Params(), root)
    path = write_report(trained, make_evaluation(**evaluation), root)
    assert path == root / REPORT
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """The page as a browser takes it apart: its elements, its words, its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._inside.pop() == tag  # every element is closed, in order

    def handle_data(self, data: str) -> None:
        if self._inside[-1:] == ["script"]:
            self.scripts.append(data)
        elif self._inside[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_figures_are_those_of_the_artifacts(root: Path) -> None:
    page = Page(report(root))
    for words in (
        "assets/sample_model",
        "97.5% of 200 held-out rows; the base had 0.0%",
        "peak memory 198.00 MiB predicted 200.00 MiB: off by +1.0%",
        "61 s 12 steps; best validation at step 12",
        "1,006 tokens a second",  # 1,006.5, the median step
        "adapter 97.5% 96.5% – 98.0% 0.0300 0.0270 – 0.0330 2.000 cpu, float32",
        "By length held-out rows",
        "9 to 30 tokens 120",
        "mean KL divergence (nats a token) 2.5e-08 at most 0.003",
        "same likeliest next token 99.95% at least 95.00%",
        "exact answers lost 0.5%",
        "9e-05 nats a token away, and ranks the same token first at 99.80%",
        "micro batch size 8 the largest that fits",
        "half the micro-batch ✓ fits 99.00 MiB 104.00 MiB micro-batch 4 x 8",
        "2,000, 1 skipped",
        "median 20, p90 30, longest 64; 3 cut",
        "1.00 GiB of the host's memory",
        make_plan().fingerprint(),
        "None was taken: memory never ran short.",
    ):
        assert words in page.text, words
    assert "Recommendations" not in page.text


def test_the_file_is_alone_and_the_same_each_time(root: Path) -> None:
    text = report(root)
    assert report(root) == text
    page = Page(text)
    assert not any(name in ("link", "img", "iframe") for name, _ in page.elements)
    for _, attributes in page.elements:
        assert not {"src", "href"} & set(attributes)
    policy = next(a["content"] for n, a in page.elements if a.get("http-equiv"))
    assert str(policy).startswith("default-src 'none'")
    assert len(text.encode()) < 2_000_000
    assert "sourceMappingURL" not in text


def test_charts_have_their_places_and_their_numbers(root: Path) -> None:
    page = Page(report(root))
    charts = json.loads(page.scripts[0])
    places = {str(a["id"]) for n, a in page.elements if str(a.get("id")).startswith("chart-")}
    assert places == {f"chart-{name}" for name in charts}
    assert len(charts) == 8
    loss = charts["loss"]["data"]["values"]
    assert [row["value"] for row in loss if row["what"] == "training"][:2] == [3.0, 0.75]
    assert charts["loss"]["layer"][0]["encoding"]["y"]["scale"] == {"type": "log"}
    memory = charts["memory"]
    lines = [(row["step"], row["what"], row["value"]) for row in memory["data"]["values"]]
    assert lines == [
        (1, "measured peak", 198.0), (2, "measured peak", 198.0),
        (1, "predicted peak", 200.0), (STEPS, "predicted peak", 200.0),
    ]  # fmt: skip
    area, _ = memory["layer"]
    parts = [(row["step"], row["component"], row["value"]) for row in area["data"]["values"]]
    assert parts == [(s, *part) for s in (1, 2) for part in (("weights", 66), ("activations", 132))]
    phases = charts["phases"]["data"]["values"]
    assert {"phase": "backward", "value": 198.0, "what": "measured"} in phases
    assert {"phase": "backward", "value": 200.0, "what": "predicted"} in phases
    parts = [row for row in charts["components"]["data"]["values"] if row["bar"] == "default plan"]
    assert sum(row["value"] for row in parts) == pytest.approx(200.0)
    step = charts["over-step"]["data"]["values"]
    assert sorted({row["bar"] for row in step}) == ["000 forward", "001 backward", "002 backward"]
    assert charts["over-step"]["layer"][-1]["data"]["values"] == [{"peak": 200.0}]


def test_an_estimate_without_the_step_s_course_has_no_chart_of_it(root: Path) -> None:
    found = MemoryEstimate.read(root / MEMORY_ESTIMATE)
    found.model_copy(update={"over_step": ()}).write(root / MEMORY_ESTIMATE)
    assert "over-step" not in report(root)


HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)> &amp; <!-- \u2028 “ß” '


def test_markup_in_the_data_stays_text(root: Path) -> None:
    plain = Page(report(root))
    names = ("base", "quantized_base", "adapter", "merged")
    sample = Sample(prompt=HOSTILE, expected=HOSTILE, answers=dict.fromkeys(names, HOSTILE))
    group = make_evaluation().groups[0].model_copy(update={"name": HOSTILE})
    record = {"event": "plan", "step": 3, "cause": HOSTILE, "before": {"a": 1}, "after": {"a": 2}}
    write_log(root, record, recommendations=[HOSTILE])
    for path in (DATASET, MEMORY_ESTIMATE):  # names that the user chose
        text = (root / path).read_text()
        text = text.replace("data/train.jsonl", json.dumps(HOSTILE)[1:-1])
        text = text.replace("half the micro-batch", json.dumps(HOSTILE)[1:-1])
        (root / path).write_text(text)
    params = check_params({"data": {"validation": HOSTILE}})
    text = report(root, params, samples=(sample,), groups=(group,))
    page = Page(text)
    # the names of elements are those of a report without it, but for cells and items more
    assert {name for name, _ in page.elements} <= {name for name, _ in plain.elements} | {
        "ul",
        "li",
    }
    assert not any("onerror" in attributes for _, attributes in page.elements)
    assert len(page.scripts) == len(plain.scripts) == 4
    assert page.scripts[1:] == plain.scripts[1:]
    assert page.text.count('<script>alert("x")</script>') >= 10
    charts = json.loads(page.scripts[0])
    assert any(row["bar"] == HOSTILE for row in charts["components"]["data"]["values"])
    assert "<" not in page.scripts[0]


def test_fallbacks_and_recommendations_are_shown(root: Path) -> None:
    before, after = make_plan(), make_plan(micro_batch_size=4, recompute_layers=(0, 1))
    record = {
        "event": "plan",
        "step": 7,
        "cause": "the device overflowed",
        "before": before.model_dump(mode="json"),
        "after": after.model_dump(mode="json"),
    }
    write_log(
        root,
        record,
        recommendations=["headroom: 3 GiB"],
        warnings=["step 3: a leak"],
        forecast_tokens_per_second=1234.0,
        stopped_early=True,
    )
    page = Page(report(root))
    assert "the device overflowed" in page.text
    assert "micro batch size 8 → 4; recompute layers 0 layers → 2 layers" in page.text
    assert "Warnings step 3: a leak Recommendations headroom: 3 GiB" in page.text
    assert "forecast 1,234" in page.text
    assert "12 steps, stopped early" in page.text
    speed = json.loads(page.scripts[0])["speed"]
    assert speed["layer"][-1]["data"]["values"] == [{"value": 1234.0, "what": "forecast"}]


def test_settings_that_are_not_the_defaults_are_in_the_command(root: Path) -> None:
    given = {
        "model": {"id": "some/model", "revision": "0" * 40},
        "lora": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": "my rows: all.jsonl", "validation": None},
        "train": {"learning_rate": 1e-5, "freeze": "speed"},
        "hardware": {"memory_budget": "8GiB"},
        "plan": {"micro_batch_size": 2},
    }
    text = Page(report(root, check_params(given))).text
    command = text[text.index("fitlora run") : text.index("model definition")].replace("\\ ", "")
    changes = [word for word in shlex.split(command)[4:] if word != "--set"]
    assert "lora.r=8" in changes
    assert check_params(with_changes({}, changes)) == check_params(given)


def test_sources_are_groups_too(root: Path) -> None:
    plain = make_evaluation().groups
    more = plain[0].model_copy(update={"by": "source", "name": "wiki"})
    text = Page(report(root, groups=(*plain, more))).text
    assert "By length and source" in text
    assert "wiki 120" in text


def test_a_log_without_components_has_the_peaks_alone(root: Path) -> None:
    path = root / TRAINING_LOG
    old = [json.loads(line) for line in path.read_text().splitlines()]
    for record in old:
        record.pop("component_bytes", None)
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    charts = json.loads(Page(report(root)).scripts[0])
    assert len(charts["memory"]["layer"]) == 1


def test_each_process_of_several_shows_its_memory(root: Path) -> None:
    assert "Process by process" not in Page(report(root)).text
    path = root / TRAINING_LOG
    *lines, last = path.read_text().splitlines()
    end = json.loads(last)
    end["processes"] = [
        {
            "rank": rank, "host": f"box{rank}", "device": f"cuda:{rank}",
            "measured_peak_bytes": (rank + 5) * 2**30, "measured_reserved_bytes": None,
        }
        for rank in range(2)
    ]  # fmt: skip
    path.write_text("\n".join([*lines, json.dumps(end)]) + "\n")
    text = Page(report(root)).text
    assert "Process by process" in text
    for rank in range(2):
        assert f"{rank} box{rank} cuda:{rank} {rank + 5}.00 GiB" in text
    assert f"  process 1 on box1, cuda:1: {6:.2f} GiB" in list(outcome_lines(end))


def test_plans_are_held_against_the_budget_and_cards(root: Path) -> None:
    found = MemoryEstimate.read(root / MEMORY_ESTIMATE)
    assert "another card" not in Page(report(root)).text
    small = Card(gib=8, fits=False, plan=None, process_bytes=None, host_pinned_bytes=None)
    large = Card(gib=12, fits=True, plan="half of it", process_bytes=9 * 2**30, host_pinned_bytes=0)
    found.model_copy(update={"cards": (small, large)}).write(root / MEMORY_ESTIMATE)
    text = Page(report(root)).text
    assert "This run was on a CPU, which says nothing of a GPU." in text
    assert "card whole process plan 8 GiB ✗ does not fit none of those tried" in text
    assert "12 GiB ✓ fits 9.00 GiB half of it" in text
    assert "pinned on the host" not in text

    plan = found.default.plan.replace(device="cuda")
    away = {"plan": plan, "host_pinned_bytes": 5 * 2**30, "fits": False}
    default = found.default.model_copy(update=away)
    card = large.model_copy(update={"host_pinned_bytes": 3 * 2**30})
    changes = {"default": default, "neighbours": {}, "cards": (small, card)}
    found.model_copy(update=changes).write(root / MEMORY_ESTIMATE)
    text = Page(report(root)).text
    assert "This run was on a CPU" not in text
    assert "in 1.00 GiB peak whole process pinned on the host plan" in text
    assert "✗ does not fit 200.00 MiB 205.00 MiB 5.00 GiB micro-batch" in text
    assert "12 GiB ✓ fits 9.00 GiB 3.00 GiB half of it" in text


def test_a_run_without_samples_or_groups(root: Path) -> None:
    page = Page(report(root, samples=(), groups=(), fidelity={
        "merged": make_evaluation().fidelity["merged"]}))  # fmt: skip
    assert "Before and after" not in page.text
    assert "By length" not in page.text
    assert "What the other base" not in page.text


def test_a_merge_into_the_original_names_what_it_was_held_against(root: Path) -> None:
    found = make_evaluation()
    fidelity = {**found.fidelity, "adapter": found.fidelity["adapter_on_original"]}
    del fidelity["adapter_on_original"]
    gate = gate_of(MergeParams(base="original"), "adapter_on_original")
    text = Page(report(root, gate=gate, fidelity=fidelity)).text
    assert "merged into the original weights and stored in 16 bits" in text
    assert "with what the adapter on the original weights predicts, unmerged" in text
    assert "the adapter on the weights it was trained on is 9e-05 nats a token away" in text


@pytest.mark.parametrize(
    ("path", "stage"),
    [(PLAN, "find_batch_size"), (TRAINING_LOG, "train_adapters"), (DATASET, "estimate_memory")],
)
def test_a_missing_artifact_names_its_stage(root: Path, path: Path, stage: str) -> None:
    (root / path).unlink()
    with pytest.raises(ArtifactError, match=f"make it with: dvc repro {stage}"):
        report(root)
    assert not (root / REPORT).exists()


@pytest.mark.parametrize("text", ["", "{", "[]\n", '{"event": "step", "step": 1}\n'])
def test_a_log_that_was_cut_short(root: Path, text: str) -> None:
    (root / TRAINING_LOG).write_text(text)
    with pytest.raises(ArtifactError, match=re.escape(str(TRAINING_LOG))):
        report(root)
