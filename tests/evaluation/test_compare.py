"""Four models on the same rows, one in memory at a time."""

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora.artifacts import Evaluation
from fitlora.errors import ArtifactError, UserError
from fitlora.evaluation import compare as module
from fitlora.evaluation.compare import HeldOut, compare, measure, read_held_out
from fitlora.evaluation.gate import MergeRejected, gate_of
from fitlora.evaluation.merge import merge_checkpoint
from fitlora.evaluation.models import Contender, Memory, Place, load
from fitlora.params import DataParams, EvaluateParams, MergeParams
from fitlora.plan import Plan
from fitlora.step.training_step import TrainingStep
from tests.evaluation.forms import CPU, Tiny

MEMORY = Memory(CPU, 2**30, 2**30)
NAMES = ["base", "quantized_base", "adapter", "merged"]
MEASURED = ["adapter", "merged", "base", "quantized_base", "adapter_on_original"]
OPEN = MergeParams(max_kl_divergence=1e9, min_top1_agreement=0)


def held_out_of(tiny: Tiny, **evaluate: Any) -> HeldOut:
    settings = {"max_new_tokens": 8, "rows": 4, **evaluate}
    data = DataParams(validation=str(tiny.rows), max_length=128)
    return read_held_out(tiny.original, data, EvaluateParams(**settings))


def test_four_models_side_by_side(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = list(tiny.models().values())
    assert [model.name for model in models] == [*NAMES, "adapter_on_original"]
    held_out = held_out_of(tiny)
    found = compare(models, held_out, tiny.plan, MEMORY, limits=MergeParams(), samples=2)
    said = capsys.readouterr().out
    assert found.rows == 4
    assert found.devices == dict.fromkeys(NAMES, "cpu, float32")
    for name, title in zip(NAMES, ("base", "4-bit base", "adapter", "merged"), strict=True):
        metrics = getattr(found, name)
        alone = measure(tiny.models()[name], held_out, tiny.plan, HERE)
        assert metrics == alone.metrics(range(4))
        assert metrics.perplexity == math.exp(metrics.loss)
        assert metrics.exact_match == 0
        assert f"{title:<15} loss {metrics.loss:.4f}, perplexity" in said
    assert len({found.base.loss, found.quantized_base.loss, found.adapter.loss}) == 3
    assert found.merged.loss == pytest.approx(found.adapter.loss, abs=0.02)
    assert [sample.prompt for sample in found.samples] == [q.prompt for q in held_out.questions[:2]]
    assert found.samples[1].expected == "answer 1"
    assert [list(sample.answers) for sample in found.samples] == [NAMES, NAMES]
    answers = [sample.answers["adapter"] for sample in found.samples]
    assert answers == measure(tiny.models()["adapter"], held_out, tiny.plan, HERE).answers[:2]
    assert found.gate == gate_of(MergeParams(), "adapter")
    assert set(found.fidelity) == set(MEASURED) - {"adapter"}
    assert found.fidelity["merged"].kl_divergence < 0.001
    assert found.fidelity["base"].kl_divergence > 0.01
    between = found.fidelity["adapter_on_original"].kl_divergence
    assert found.fidelity["merged"].kl_divergence < between < found.fidelity["base"].kl_divergence
    assert sum(group.rows for group in found.groups if group.by == "length") == 4
    for group in found.groups:
        rows = held_out.groups[group.by][group.name]
        assert group.models["merged"] == measure(
            tiny.models()["merged"], held_out, tiny.plan, HERE
        ).metrics(rows)
    found.write(tmp_path / "evaluation.json")
    assert Evaluation.read(tmp_path / "evaluation.json") == found


def test_a_merge_into_the_original_is_held_against_the_adapter_there(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge_checkpoint(
        original=tiny.original,
        quantized=tiny.quantized,
        adapter=tiny.adapter,
        target=tmp_path / "merged",
        base="original",
        device=CPU,
    )
    models = list(tiny.models(merged=tmp_path / "merged").values())
    limits = MergeParams(base="original")
    found = compare(models, held_out_of(tiny), tiny.plan, MEMORY, limits=limits, samples=0)
    assert found.gate.against == "adapter_on_original"
    assert set(found.fidelity) == {"adapter", "merged", "base", "quantized_base"}
    between = found.fidelity["adapter"].kl_divergence
    assert found.fidelity["merged"].kl_divergence < 0.001 < between
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split(" loss")[0].strip() for line in lines] == [
        "on 16-bit base", "adapter", "merged", "base", "4-bit base",
    ]  # fmt: skip
    assert "from the adapter on the original weights: KL" in lines[2]


HERE = Place(CPU, "float32", 64)


def test_right_answers_are_counted(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = held_out_of(tiny)
    monkeypatch.setattr(
        module, "generate_answers", lambda *a, **k: ["answer 0", "no", "answer 2", "answer 3"]
    )
    result = measure(tiny.models()["base"], held_out, tiny.plan, HERE)
    assert result.metrics(range(4)).exact_match == 3 / 4
    assert result.metrics([0, 1]).exact_match == 1 / 2


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        ({"scale": 2.0}, ["max_kl_divergence", "min_top1_agreement"]),
        ({"bits": 4}, ["max_kl_divergence", "merge.base: original"]),
    ],
    ids=["twice the update", "4 bits"],
)
def test_a_broken_merge_fails_before_the_bases_are_measured(
    tiny: Tiny,
    spoil: dict[str, Any],
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fitlora.evaluation import merge as merging

    plain = merging.read_adapter

    def spoiled(folder: Path) -> dict[str, merging.Update]:
        times = spoil.get("scale", 1.0)
        found = plain(folder)
        return {n: merging.Update(u.a, u.b, u.scale * times) for n, u in found.items()}

    monkeypatch.setattr(merging, "read_adapter", spoiled)
    bits = spoil.get("bits", 16)
    merge_checkpoint(
        original=tiny.original,
        quantized=tiny.quantized,
        adapter=tiny.adapter,
        target=tmp_path / "merged",
        base="dequantized",
        bits=bits,
        device=CPU,
        compute_dtype=torch.float32,
    )
    models = tiny.models(merged=tmp_path / "merged", bits=bits)
    limits = MergeParams(bits=bits)
    with pytest.raises(MergeRejected) as caught:
        compare(
            list(models.values()), held_out_of(tiny), tiny.plan, MEMORY, limits=limits, samples=0
        )
    for words in named:
        assert words in str(caught.value)
    assert "base  " not in capsys.readouterr().out
    # the same model passes where the limits are wide
    wide = OPEN.model_copy(update={"bits": bits})
    compare(list(models.values()), held_out_of(tiny), tiny.plan, MEMORY, limits=wide, samples=0)


def test_one_model_is_in_memory_at_a_time(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    given_back: list[int] = []

    def watched(model: Contender, plan: Plan, place: Place) -> TrainingStep:
        alive.append(sum(reference() is not None for reference in made))
        step = load(model, plan, place)
        made.extend(weakref.ref(parameter) for parameter in step.model.parameters())
        return step

    def give_back() -> None:
        given_back.append(len(alive))
        gc.collect()  # as giving memory back begins
        assert all(reference() is None for reference in made)

    monkeypatch.setattr(module, "load", watched)
    monkeypatch.setattr(module, "give_back_memory", give_back)
    models = list(tiny.models().values())
    compare(models, held_out_of(tiny, rows=1), tiny.plan, MEMORY, limits=OPEN, samples=0)
    assert alive == [0, 0, 0, 0, 0]
    assert given_back == [1, 2, 3, 4, 5]  # after each
    assert len(made) > 60


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (torch.OutOfMemoryError, "too much"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
    ],
    ids=["allocator", "cublas"],
)
def test_model_that_overflows_goes_to_the_cpu(
    tiny: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: type[RuntimeError],
    text: str,
) -> None:
    failed: list[weakref.ref[Any]] = []

    def overflowing(model: Contender, plan: Plan, place: Place) -> TrainingStep:
        step = load(model, plan, place)
        if model.name == "merged" and place.compute_dtype == "float32":
            failed.extend(weakref.ref(parameter) for parameter in step.model.parameters())
            raise kind(text)
        assert all(reference() is None for reference in failed)
        return step

    monkeypatch.setattr(module, "load", overflowing)
    held_out = held_out_of(tiny, rows=2)
    models = list(tiny.models().values())
    found = compare(models, held_out, tiny.plan, MEMORY, limits=OPEN, samples=0)
    assert found.devices == {**dict.fromkeys(NAMES, "cpu, float32"), "merged": "cpu, bfloat16"}
    assert failed
    assert "merged overflows the device even row by row" in capsys.readouterr().out
    assert found.merged.loss == pytest.approx(found.adapter.loss, abs=0.1)


def test_another_error_is_no_overflow(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(model: Contender, plan: Plan, place: Place) -> TrainingStep:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(module, "load", failing)
    models = list(tiny.models().values())
    with pytest.raises(RuntimeError, match="shapes do not match"):
        compare(models, held_out_of(tiny, rows=1), tiny.plan, MEMORY, limits=OPEN, samples=0)


def test_model_that_does_not_fit_is_said_to_go_to_the_cpu(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = Memory(CPU, 2**18, 2**30)
    models = list(tiny.models().values())
    held_out = held_out_of(tiny, rows=1)
    found = compare(models, held_out, tiny.plan, memory, limits=OPEN, samples=0)
    assert found.devices == {
        "base": "cpu, bfloat16",
        "quantized_base": "cpu, float32",
        "adapter": "cpu, float32",
        "merged": "cpu, bfloat16",
    }
    said = capsys.readouterr().out
    assert "base is evaluated on the CPU: " in said
    assert "merged is evaluated on the CPU: " in said
    assert "adapter is evaluated" not in said


# --- the rows -------------------------------------------------------------------------------------


def test_rows_are_the_first_ones_of_the_file(tiny: Tiny) -> None:
    every, some = held_out_of(tiny, rows=None), held_out_of(tiny, rows=3)
    assert len(every.questions) == len(every.sequences) == 8
    assert some.questions == every.questions[:3]
    assert some.sequences == every.sequences[:3]
    assert some.ends == (258,)
    assert every.longest_tokens == max(len(s.tokens) for s in every.sequences)


def test_long_prompts_are_said(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    held_out_of(tiny, rows=None)
    assert capsys.readouterr().out == ""
    held_out = held_out_of(tiny, rows=None, max_new_tokens=216)  # 40 of 256 positions are left
    longer = sum(len(q.tokens) > 40 for q in held_out.questions)
    assert 0 < longer < 8
    assert f"{longer} of 8 prompts are longer than 40 tokens" in capsys.readouterr().out


def test_bad_rows_are_named(tiny: Tiny, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(tiny.rows.read_text() + '{"messages": []}\n')
    with pytest.raises(UserError, match=r"rows.jsonl:9: the last message is not the assistant's"):
        read_held_out(tiny.original, DataParams(validation=str(rows)), EvaluateParams())


def test_damaged_model_is_named(tiny: Tiny, tmp_path: Path) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_bytes((tiny.merged / "model.safetensors").read_bytes()[:1000])
    (tmp_path / "config.json").write_text((tiny.merged / "config.json").read_text())
    model = Contender("merged", "merged", tmp_path, tiny.models()["merged"].quantization)
    with pytest.raises(ArtifactError, match=r"model.safetensors cannot be read"):
        measure(model, held_out_of(tiny), tiny.plan, HERE)


# --- how far it is --------------------------------------------------------------------------------
