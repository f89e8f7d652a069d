"""Artifacts: what is written is read, whole or not at all, and what is wrong with a file is said."""

import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fitlora import artifacts
from fitlora.artifacts import (
    Artifact,
    Components,
    DataFacts,
    Dataset,
    Estimate,
    Evaluation,
    Fidelity,
    Gate,
    Gpu,
    Group,
    Hardware,
    MemoryEstimate,
    Metrics,
    ModelFacts,
    Padding,
    Percentiles,
    PlanArtifact,
    Rates,
    RunFigures,
    Sample,
    SequenceSize,
    Split,
    write_text_atomically,
)
from fitlora.errors import ArtifactError
from fitlora.plan import Plan

PLAN = Plan(
    device="cpu",
    effective_batch_size=8,
    micro_batch_size=3,
    evaluation_batch_size=2,
    sequence_length=64,
    recompute_layers=(0, 1, 5),
    compute_dtype="float32",
    optimizer="adamw",
    loss_chunk_tokens=256,
)
ESTIMATE = Estimate(
    plan=PLAN,
    peak_allocated_bytes=28,
    process_bytes=2**40,
    fits=True,
    instant="backward of model.layers.0, aten::mm",
    phase_peak_bytes={"forward": 20, "backward": 28},
    components=Components(
        weights=1, adapters=2, gradients=3, optimizer_states=4, activations=5,
        temporary_buffers=6, library_workspaces=7,
    ),
)  # fmt: skip
SPLIT = Split(
    source="daten/ä.jsonl", rows=3, formats={"messages": 3}, tokens=30, target_tokens=12,
    truncated_rows=1, skipped_rows=2,
    length=Percentiles(p50=9, p90=12, p99=12, maximum=12), fingerprint="ab" * 32,
)  # fmt: skip
METRICS = Metrics(
    loss=0.1, perplexity=1.1051709180756477, exact_match=2 / 3, loss_interval=(0.05, 0.2),
    perplexity_interval=(1.05, 1.2), exact_match_interval=(0.0, 1.0),
)  # fmt: skip

EXAMPLES: list[Artifact] = [
    Hardware(
        device="cuda",
        gpus=(Gpu(name="NVIDIA X", compute_capability="9.0", memory_bytes=2**36, bf16=True, fp8=True),),
        cpu_name="a CPU",
        cpu_cores=8,
        host_memory_bytes=2**37,
        host_budget_bytes=2**36,
        budget_bytes=2**33,
        context_bytes=2**29,
        workspace_bytes=2**25,
        rates=Rates(
            host_to_device_bytes_per_second=10**10,
            device_to_host_bytes_per_second=None,
            device_copy_bytes_per_second=10**12,
            disk_read_bytes_per_second=None,
            product_flops_per_second={"bfloat16": 10**14},
        ),
        target=None,
    ),
    ModelFacts(source="assets/sample_model", revision=None, definition="0" * 64, weights=None),
    Dataset(
        train=SPLIT,
        validation=SPLIT,
        longest_train=(SequenceSize(tokens=12, target_tokens=4),) * 2,
        longest_validation=(),
        padding=Padding(batch=2, rows_share=0.25, packed_share=None, sequences=3),
    ),
    DataFacts(train="0" * 64, validation=None),
    MemoryEstimate(
        model="m", parameters=1, trainable_parameters=1, budget_bytes=1,
        default=ESTIMATE, neighbours={"half the micro-batch": ESTIMATE},
    ),
    PlanArtifact(plan=PLAN, reasons={"micro_batch_size": "as params say"}),
    Evaluation(
        rows=3, base_bits=16, base=METRICS, quantized_base=METRICS, adapter=METRICS, merged=METRICS,
        gate=Gate(
            base="dequantized", bits=16, against="adapter", max_kl_divergence=0.01,
            min_top1_agreement=0.95, max_exact_match_drop=0.01,
        ),
        fidelity={"merged": Fidelity(tokens=9, kl_divergence=1e-9, top1_agreement=1.0)},
        groups=(Group(by="length", name="3 tokens", rows=3, models={"base": METRICS}),),
        devices={"base": "cpu"},
        samples=(Sample(prompt="?", expected="“ja”\n", answers={"base": "\u2028"}),),
    ),
    RunFigures(
        steps=9, seconds=1.5, tokens_per_second=10.0, forecast_tokens_per_second=None,
        predicted_peak_bytes=3, measured_peak_bytes=2, measured_reserved_bytes=None,
        changes_of_plan=0,
    ),
]  # fmt: skip
EACH = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.KIND)


def test_every_artifact_has_an_example() -> None:
    assert {type(example) for example in EXAMPLES} == set(Artifact.__subclasses__())
    assert len({example.KIND for example in EXAMPLES}) == len(EXAMPLES)


@EACH
def test_round_trip(example: Artifact, tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "artifact.json"
    example.write(file)
    assert type(example).read(file) == example


@EACH
def test_same_content_gives_same_bytes(example: Artifact, tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    example.write(first)
    type(example).read(first).write(second)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().endswith(b"}\n")


@EACH
def test_a_stage_of_the_pipeline_makes_it(example: Artifact) -> None:
    assert (Path(__file__).parent.parent / "stages" / f"{example.STAGE}.py").is_file()


def broken(content: dict[str, Any]) -> dict[str, bytes]:
    """Files that are wrong, by what the message has to say."""
    text = json.dumps(content).encode()
    first = next(key for key in content if key not in ("kind", "version"))

    def changed(**changes: Any) -> bytes:
        return json.dumps({**content, **changes}).encode()

    without = {key: value for key, value in content.items() if key != first}
    return {
        "damaged": text[: len(text) // 2],
        "is damaged (": b"",
        "damaged (": b'{"kind": "\xff"}',
        "(it says 'other')": changed(kind="other"),
        "(it says 'list')": b"[]",
        "(it says None)": json.dumps({k: v for k, v in content.items() if k != "kind"}).encode(),
        "upgrade fitlora": changed(version=content["version"] + 1),
        "has version 0": changed(version=0),
        "has version '1'": changed(version="1"),
        f"damaged at {first}": changed(**{first: {"no": "such"}}),
        f"damaged at {first}: Field required": json.dumps(without).encode(),
        "damaged at more": changed(more=1),
    }


@EACH
def test_a_wrong_file_is_named_with_what_is_wrong_and_its_stage(
    example: Artifact, tmp_path: Path
) -> None:
    file = tmp_path / "artifact.json"
    example.write(file)
    for said, content in broken(json.loads(file.read_text())).items():
        file.write_bytes(content)
        with pytest.raises(ArtifactError) as caught:
            type(example).read(file)
        text = str(caught.value)
        assert said in text
        assert str(file) in text
        assert f"dvc repro --force {example.STAGE}" in text


def test_a_missing_file_is_made_without_force(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"plan\.json is missing; .*dvc repro find_batch_size$"):
        PlanArtifact.read(tmp_path / "plan.json")


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        PlanArtifact.read(tmp_path)


def test_one_artifact_is_not_read_as_another(tmp_path: Path) -> None:
    EXAMPLES[0].write(tmp_path / "hardware.json")
    with pytest.raises(ArtifactError, match="not a FitLoRA plan"):
        PlanArtifact.read(tmp_path / "hardware.json")


def test_an_inconsistent_plan_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    next(e for e in EXAMPLES if isinstance(e, PlanArtifact)).write(file)
    file.write_text(file.read_text().replace('"micro_batch_size": 3', '"micro_batch_size": 9'))
    with pytest.raises(ArtifactError, match="damaged at plan"):
        PlanArtifact.read(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite_as_json_has_no_others(value: float) -> None:
    with pytest.raises(ValidationError):
        METRICS.model_validate({**METRICS.model_dump(), "loss": value})


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_failure_while_writing_leaves_the_old_file(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.json"
    write_text_atomically(file, "old")

    def fails(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(artifacts.os, call, fails)
    with pytest.raises(OSError, match="no space"):
        write_text_atomically(file, "new")
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_interruption_leaves_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text_atomically(tmp_path / "a.json", "new")
    assert os.listdir(tmp_path) == []


def test_a_linked_file_is_replaced_and_not_edited(tmp_path: Path) -> None:
    """DVC may link an out to its cache; what the link points to must stay as it is."""
    cached, link = tmp_path / "cached", tmp_path / "a.json"
    cached.write_text("cached")
    cached.chmod(0o444)
    link.symlink_to(cached)
    write_text_atomically(link, "new")
    assert cached.read_text() == "cached"
    assert not link.is_symlink()
    assert link.read_text() == "new"
    assert stat.S_IMODE(link.stat().st_mode) == 0o644


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    texts = ["a" * 200_000, "b" * 100_000]
    write_text_atomically(file, texts[0])
    done = threading.Event()

    def write() -> None:
        for index in range(60):
            write_text_atomically(file, texts[index % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while not done.is_set():
        assert file.read_text() in texts
        reads += 1
    writer.join()
    assert reads > 0
