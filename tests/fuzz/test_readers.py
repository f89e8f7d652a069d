"""Whatever a file holds, its reader gives what it says or an error with a message: no crash, no hang,
and no file that is read or written outside of the folder.
"""

import json
import shutil
import struct
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as serialized
from safetensors.torch import save_file

from fitlora.adapter import CONFIG, WEIGHTS, load_adapter
from fitlora.artifacts import Artifact
from fitlora.checkpoint import Checkpoint
from fitlora.data.formats import format_of, make_row
from fitlora.data.readers import read_records
from fitlora.data.sources import Source
from fitlora.errors import ArtifactError, UserError
from fitlora.evaluation.merge import read_adapter
from fitlora.evaluation.models import check_adapter
from fitlora.params import LoraParams, Params, check_params, read_params
from fitlora.planner.ladder import Rung
from fitlora.quantization.layout import QuantSpec, decode_state, state_key
from fitlora.quantization.weight import quantize_weight
from fitlora.report.log import TrainingLog
from fitlora.report.summary import _read_end
from fitlora.step.weights import CheckpointWeights
from fitlora.training.checkpoint import MANIFEST, Checkpoints, Progress, Snapshot, read_manifest
from fitlora.training.identity import Identity
from fitlora.training.start import read_start
from tests.fuzz.inputs import JSON, changed, dumped, fails_only_with, spliced, spoiled
from tests.step import steps
from tests.test_artifacts import EXAMPLES

ROOT = Path(__file__).resolve().parents[2]
PARAMS = (ROOT / "params.yaml").read_bytes()
ARTIFACTS: list[tuple[Artifact, dict[str, Any]]] = [
    (
        artifact,
        {"kind": artifact.KIND, "version": artifact.VERSION, **artifact.model_dump(mode="json")},
    )
    for artifact in EXAMPLES
]


# --- params ------------------------------------------------------------------------------------------


@given(content=spoiled(PARAMS))
def test_params_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    fails_only_with(UserError, lambda: read_params(path), tmp_path)


@given(content=changed(Params().model_dump(mode="json")))
def test_params_content(content: Any, tmp_path: Path) -> None:
    fails_only_with(UserError, lambda: check_params(content), tmp_path)


# --- artifacts ---------------------------------------------------------------------------------------


@given(
    data=st.data(),
    which=st.sampled_from(range(len(ARTIFACTS))),
    whole=st.booleans(),
)
def test_artifacts(data: st.DataObject, which: int, whole: bool, tmp_path: Path) -> None:
    artifact, content = ARTIFACTS[which]
    path = tmp_path / "artifact.json"
    file = changed(content).map(dumped) if whole else spoiled(dumped(content))
    path.write_bytes(data.draw(file))
    fails_only_with(ArtifactError, lambda: type(artifact).read(path), tmp_path)


LOG: list[dict[str, Any]] = [
    {
        "event": "step", "step": 1, "loss": 2.0, "learning_rate": 0.1, "tokens_per_second": 9.0,
        "allocated_bytes": 5, "reserved_bytes": None, "phase_bytes": {"forward": 5},
    },
    {"event": "evaluation", "step": 1, "validation_loss": 2.0},
    {"event": "plan", "step": 2, "cause": "x", "before": {}, "after": {}},
    {"event": "freeze", "step": 1, "cause": "x", "frozen_layers": [0]},
    {
        "event": "precision", "step": 2, "cause": "x", "before": "a", "after": "b", "loss_scale": 1.0,
    },
    {
        "event": "end", "steps": 1, "seconds": 1.0, "predicted_peak_bytes": 5,
        "measured_peak_bytes": 5, "measured_reserved_bytes": None,
    },
]  # fmt: skip


def lines_of(records: Any) -> bytes:
    every = records if isinstance(records, list) else [records]
    return b"".join(dumped(record) + b"\n" for record in every)


@given(content=spoiled(lines_of(LOG)) | changed(LOG).map(lines_of))
def test_training_log(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    path.write_bytes(content)
    fails_only_with(ArtifactError, lambda: _read_end(path), tmp_path)
    fails_only_with(ArtifactError, lambda: TrainingLog.read(path).figures(), tmp_path)


# --- data --------------------------------------------------------------------------------------------

ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "b", "output": "c"},
    {"text": "a"},
]
FILES = {
    "rows.jsonl": lines_of(ROWS),
    "rows.json": dumped(ROWS),
    "rows.csv": b'prompt,completion\na,b\n"c\nd",e\n',
}


def parquet() -> bytes:
    from pyarrow import BufferOutputStream, Table, parquet

    file = BufferOutputStream()
    parquet.write_table(Table.from_pylist([{"prompt": "a", "completion": "b"}] * 3), file)
    return bytes(file.getvalue())


@given(
    data=st.data(), name=st.sampled_from(sorted(FILES)), row=st.sampled_from(ROWS).flatmap(changed)
)
def test_rows(data: st.DataObject, name: str, row: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(data.draw(spoiled(FILES[name]) | st.just(dumped(row))))
    fails_only_with(UserError, lambda: read_rows(path), tmp_path)


@given(content=spoiled(parquet()) | spliced(parquet()))
def test_parquet(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    fails_only_with(UserError, lambda: read_rows(path), tmp_path)


def read_rows(path: Path) -> None:
    """All rows; a bad one has its reason."""
    for record in read_records(Source(str(path), (path,))):
        assert record.line >= 1
        if record.problem is not None:
            assert record.problem.strip()
            continue
        try:
            make_row(record.content, format_of(record.content), place="x", line=record.line)
        except ValueError as error:  # of a bad row, whose reason is shown with its place
            assert str(error).strip()  # noqa: PT017


# --- safetensors -------------------------------------------------------------------------------------

HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "U8", "shape": [8], "data_offsets": [24, 32]},
}
_LENGTHS = st.sampled_from([0, 1, 7, 2**31, 2**63, 2**64 - 1])


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    """A file with a header that may be wrong, of a length that may be wrong, and bytes for tensors."""
    header = draw(changed(HEADER).map(dumped) | spoiled(dumped(HEADER)) | st.just(dumped(HEADER)))
    length = draw(st.just(len(header)) | _LENGTHS)
    return struct.pack("<Q", length) + header + draw(st.just(bytes(32)) | st.binary(max_size=40))


def read_all(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    checkpoint.files()
    for name in list(checkpoint.shards):
        info = checkpoint.info(name)
        tensor = checkpoint.tensor(name)
        assert tensor.nbytes == info.bytes
        buffer = torch.empty(info.bytes, dtype=torch.uint8)
        checkpoint.read_into(name, 0, buffer)


@given(content=safetensors_files())
def test_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    fails_only_with(UserError, lambda: read_all(tmp_path), tmp_path)


WEIGHT = quantize_weight("w.weight", torch.ones(4, 32), QuantSpec(), torch.device("cpu"))
STATE = decode_state(WEIGHT.pop(state_key("w.weight", "nf4")))
LIKE = {
    "weight": WEIGHT["w.weight"],
    "absmax": WEIGHT["w.weight.absmax"],
    "nested_absmax": WEIGHT["w.weight.nested_absmax"],
    "nested_offset": torch.zeros(()),
}


@given(
    state=spoiled(dumped(STATE)) | changed(STATE).map(dumped) | st.just(dumped(STATE)),
    kind=st.just(torch.uint8) | st.sampled_from([torch.int8, torch.float32]),
    dimensions=st.just(1) | st.integers(0, 2),
    name=st.sampled_from(sorted(WEIGHT)),
    like=st.none() | st.tuples(st.integers(0, 2), st.integers(0, 70)),
)
def test_4_bit_weights(
    state: bytes,
    kind: torch.dtype,
    dimensions: int,
    name: str,
    like: tuple[int, int] | None,
    tmp_path: Path,
) -> None:
    """The state's JSON, its tensor's kind, and one of the other tensors may be wrong."""
    text = torch.tensor(list(state[:2000]), dtype=torch.uint8).to(kind)
    text = text[:1].squeeze() if dimensions == 0 else text.view(-1, *[1] * (dimensions - 1))
    parts = {**WEIGHT, state_key("w.weight", "nf4"): text}
    if like is not None:
        parts[name] = torch.zeros(like[1:] * like[0])
    save_file(parts, tmp_path / "model.safetensors")
    weights = CheckpointWeights(tmp_path, torch.device("cpu"))

    def read() -> None:
        weights.check(QuantSpec())
        for leaf, tensor in LIKE.items():
            weights.frozen(f"w.{leaf}", tensor)

    fails_only_with(ArtifactError, read, tmp_path)


@given(
    content=changed({"metadata": {}, "weight_map": {"a": "one.safetensors"}}).map(dumped)
    | JSON.map(lambda file: dumped({"weight_map": {"a": file}}))
)
def test_index_of_shards(content: bytes, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    fails_only_with(UserError, lambda: read_all(tmp_path), tmp_path)


def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    """However a tensor is asked for."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        index = {"weight_map": {"a": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for ask in (Checkpoint.tensor, Checkpoint.info):
            with pytest.raises(ArtifactError, match="not a plain file"):
                ask(Checkpoint(folder), "a")


# --- what a run leaves -------------------------------------------------------------------------------

IDENTITY = Identity({"train.seed": 0})
SNAPSHOT = Snapshot(
    progress=Progress(done=2),
    rung=Rung(top=steps.plan(), plan=steps.plan()),
    seconds=1.0,
    log=['{"event": "step", "step": 1}\n'],
    adapter={"a": torch.zeros(2)},
)


@given(data=st.data(), name=st.sampled_from([MANIFEST, "tensors.safetensors", "log.jsonl"]))
def test_checkpoints(data: st.DataObject, name: str, tmp_path: Path) -> None:
    said: list[str] = []
    store = Checkpoints(tmp_path, IDENTITY, said.append)
    shutil.rmtree(store.root, ignore_errors=True)
    with mock.patch("fitlora.training.checkpoint._flush"):  # to the disk, which takes longest
        folder = store.save(SNAPSHOT)
    good = (folder / name).read_bytes()
    bad = data.draw(spoiled(good))
    (folder / name).write_bytes(bad)
    fails_only_with(ArtifactError, lambda: read_manifest(folder), tmp_path)
    found = store.newest()
    same = bad == good or (name == MANIFEST and _as_json(bad) == json.loads(good))
    assert (found is not None) == same, "only what was written is believed"
    assert len(said) == (found is None)
    assert list(store.others()) == []


ADAPTER = serialized({f"base_model.model.q.lora_{side}.weight": torch.ones(4, 4) for side in "AB"})


def _as_json(content: bytes) -> Any:
    try:
        return json.loads(content.decode())  # from bytes it takes other encodings as well
    except (ValueError, RecursionError):
        return None


@given(
    config=changed({"r": 4, "lora_alpha": 8, "peft_type": "LORA", "bias": "none"}).map(dumped)
    | spoiled(b'{"r": 4, "lora_alpha": 8, "peft_type": "LORA"}'),
    weights=safetensors_files() | st.just(ADAPTER),
)
def test_adapters(config: bytes, weights: bytes, tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_bytes(config)
    (tmp_path / WEIGHTS).write_bytes(weights)
    fails_only_with(UserError, lambda: read_start(tmp_path, LoraParams(r=4, alpha=8.0)), tmp_path)
    fails_only_with(UserError, lambda: load_adapter(tmp_path), tmp_path)
    fails_only_with(
        UserError, lambda: check_adapter(tmp_path, LoraParams(r=4, alpha=8.0)), tmp_path
    )
    fails_only_with(UserError, lambda: read_adapter(tmp_path), tmp_path)
