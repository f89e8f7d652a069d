"""A whole run on a tiny checkpoint: its files, and that memory was as predicted."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fitlora.adapter import CONFIG, WEIGHTS, load_adapter
from fitlora.artifacts import Hardware, PlanArtifact, Rates
from fitlora.errors import UserError
from fitlora.params import Params, check_params
from fitlora.pipeline.train_adapters import _train
from fitlora.plan import Plan
from fitlora.step import build
from fitlora.step.training_step import TrainingStep
from fitlora.training import recovery
from fitlora.training.data import TokenizedSplit
from fitlora.training.loop import Run
from fitlora.training.parallel import Ranks
from fitlora.training.precision import Precision
from fitlora.training.run import Places, _numbers, train
from tests.rows import tokenized
from tests.step import steps
from tests.tiny_models import VOCABULARY, make_checkpoint, make_config, make_tokenizer

HARDWARE = Hardware(
    device="cpu", gpus=(), cpu_name="", cpu_cores=1, host_memory_bytes=1, host_budget_bytes=2**40,
    budget_bytes=2**30, context_bytes=0, workspace_bytes=0, target=None,
    rates=Rates(
        host_to_device_bytes_per_second=None, device_to_host_bytes_per_second=None,
        device_copy_bytes_per_second=None, disk_read_bytes_per_second=None,
        product_flops_per_second={},
    ),
)  # fmt: skip
TRAIN: dict[str, Any] = {
    "effective_batch_size": 4, "max_steps": 6, "evaluate_every": 2, "warmup_steps": 0,
    "learning_rate": 3e-2, "schedule": "constant",
}  # fmt: skip


def rows(folder: Path, count: int, start: int, *, alike: bool = False) -> TokenizedSplit:
    path = folder / f"rows{start}.jsonl"
    lines = []
    for index in range(start, start + count):
        question, answer = "ab" * (index % 7 + 1), "xyz"[index % 3] * (index % 3 + 1)
        if alike:
            question, answer = "ab", "xyz"
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    tokenizer = make_tokenizer(folder / "tokenizer")
    return tokenized(path, tokenizer, max_length=64, vocabulary=VOCABULARY)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "llama", tokenizer=False)


def plan(split: TokenizedSplit, **changes: Any) -> Plan:
    base: dict[str, Any] = {
        "effective_batch_size": 4, "micro_batch_size": 2, "evaluation_batch_size": 3,
        "sequence_length": split.facts.length.maximum,
    }  # fmt: skip
    return steps.plan(**{**base, **changes})


def train_in(
    folder: Path,
    checkpoint: Path,
    settings: dict[str, Any] | None = None,
    *,
    alike: bool = False,
    trusted: bool = False,
    lora: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[Places, dict[str, Any], Params]:
    """A run whose files are in `folder`; its places, last record and params. changes: to the Plan."""
    params = check_params(
        {
            "model": {"trust_remote_code": trusted},
            "quantization": {"bits": 16},
            "lora": {"r": 4, "dropout": 0.1, **(lora or {})},
            "train": {**TRAIN, **(settings or {})},
        }
    )
    folder.mkdir(exist_ok=True)
    split = rows(folder, 13, 0, alike=alike)
    places = Places(
        adapter=folder / "adapter",
        log=folder / "training.jsonl",
        curves=folder / "curves.json",
        scratch=folder / "scratch",
        memory_log=folder / "logs" / "memory.json",
    )
    end = train(
        params,
        plan(split, **changes),
        HARDWARE,
        config=make_config("llama"),
        checkpoint=checkpoint,
        rows=split,
        validation=rows(folder, 5, 100, alike=alike),
        places=places,
    )
    return places, end, params


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path
) -> tuple[Places, dict[str, Any], Params]:
    return train_in(tmp_path_factory.mktemp("run"), checkpoint)


def test_the_log_tells_the_run(done: tuple[Places, dict[str, Any], Params]) -> None:
    places, end, _ = done
    records = [json.loads(line) for line in places.log.read_text().splitlines()]
    steps_ = [r for r in records if r["event"] == "step"]
    validations = [r for r in records if r["event"] == "evaluation"]
    assert [r["step"] for r in steps_] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in validations] == [2, 4, 6]
    assert records[-1] == end
    assert end["steps"] == 6
    assert end["best_validation_loss"] == min(r["validation_loss"] for r in validations)
    assert steps_[-1]["loss"] < steps_[0]["loss"]
    assert {r["learning_rate"] for r in steps_} == {3e-2}


def test_layers_spread_over_devices_learn_what_they_do_on_one(
    done: tuple[Places, dict[str, Any], Params], tmp_path: Path, checkpoint: Path
) -> None:
    places, end, _ = train_in(tmp_path, checkpoint, layers_per_device=(1, 1))
    alone = load_adapter(done[0].adapter)
    spread = load_adapter(places.adapter)
    assert alone.keys() == spread.keys()
    assert all(torch.equal(alone[name], spread[name]) for name in alone)
    assert end["best_validation_loss"] == done[1]["best_validation_loss"]
    assert end["predicted_peak_bytes"] < done[1]["predicted_peak_bytes"]
    assert [(p["rank"], p["device"]) for p in end["processes"]] == [(0, "cpu"), (0, "cpu")]


def test_one_of_several_processes_spreads_nothing(tmp_path: Path) -> None:
    spread = PlanArtifact(plan=steps.plan(layers_per_device=(1, 1)), reasons={})
    ranks = Ranks()
    ranks.devices = 2
    with pytest.raises(UserError, match="start the training without a launcher"):
        _train(check_params({}), spread, HARDWARE, tmp_path, ranks)


def test_memory_is_about_as_predicted(done: tuple[Places, dict[str, Any], Params]) -> None:
    """Rows differ in length here, and on the CPU the copy of the best adapter lies beside the rest."""
    places, end, _ = done
    best = sum(t.nbytes for t in load_adapter(places.adapter).values())
    predicted = end["predicted_peak_bytes"]
    assert 0.9 * predicted < end["measured_peak_bytes"] <= predicted + best
    assert end["measured_reserved_bytes"] is None
    lines = (places.scratch / "memory" / "memory.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_what_memory_came_to_is_written_where_it_is_found(
    done: tuple[Places, dict[str, Any], Params],
) -> None:
    places, end, _ = done
    assert places.memory_log is not None
    found = json.loads(places.memory_log.read_text())
    assert found["measured_peak_bytes"] == end["measured_peak_bytes"]
    assert {"forward", "backward", "optimizer", "evaluation"} <= set(found["phase_bytes"])
    assert max(found["phase_bytes"].values()) == end["measured_peak_bytes"]
    assert found["tracker_seconds"] < found["seconds"]
    kinds = [line.partition(":")[0] for line in found["recommendations"]]
    assert kinds == ["peak", "padding"], "a CPU has no budget of its own, and no allocator"


def test_numbers_for_trackers_have_phases_and_components() -> None:
    record = {
        "event": "step", "step": 3, "loss": 1.5, "reserved_bytes": None,
        "phase_bytes": {"forward": 7, "backward": 9}, "component_bytes": {"weights": 5},
    }  # fmt: skip
    assert _numbers(record) == {
        "loss": 1.5, "memory/forward_bytes": 7, "memory/backward_bytes": 9,
        "memory/weights_bytes": 5,
    }  # fmt: skip
    assert _numbers({"event": "plan", "step": 3, "cause": "x", "before": {}, "after": {}}) == {}


def cut_short(patch: pytest.MonkeyPatch) -> None:
    """Has a run break off in its sixth step."""
    plain = TrainingStep.run

    def cut(self: TrainingStep, sequences: Any, *, step: int, **options: Any) -> Any:
        if step == 5:
            raise EOFError
        return plain(self, sequences, step=step, **options)

    patch.setattr(TrainingStep, "run", cut)


def test_a_run_cut_short_is_found_and_ends_as_if_it_had_not_been(
    done: tuple[Places, dict[str, Any], Params],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut_short(monkeypatch)
    with pytest.raises(EOFError):
        train_in(tmp_path / "cut", checkpoint, {"checkpoint_every": 2})
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "adapter").exists()
    train_in(tmp_path / "cut", checkpoint, {"learning_rate": 1e-3, "max_steps": 1})
    said = capsys.readouterr().out
    assert "not going on from" in said
    assert "train.learning_rate is 0.001, and was 0.03" in said
    again, end, _ = train_in(tmp_path / "cut", checkpoint, {"checkpoint_every": 3})
    assert "going on after step 4 of 6" in capsys.readouterr().out
    assert end["steps"] == 6
    for name in (WEIGHTS, f"last/{WEIGHTS}"):
        assert (again.adapter / name).read_bytes() == (done[0].adapter / name).read_bytes()
    assert not list((again.scratch / "checkpoints").iterdir()), "a finished run needs none"


@pytest.mark.slow
def test_whole_modules_are_saved_gone_on_with_and_taken_up_again(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lora = {"modules_to_save": ["embed_tokens", "lm_head", "norm"]}
    once, end, _ = train_in(tmp_path / "once", checkpoint, lora=lora)
    assert "general step, which is slower: model.embed_tokens" in capsys.readouterr().out
    cut_short(monkeypatch)
    with pytest.raises(EOFError):
        train_in(tmp_path / "cut", checkpoint, {"checkpoint_every": 2}, lora=lora)
    monkeypatch.undo()
    again, _, _ = train_in(tmp_path / "cut", checkpoint, {"checkpoint_every": 2}, lora=lora)
    assert "going on after step 4 of 6" in capsys.readouterr().out
    assert (again.adapter / WEIGHTS).read_bytes() == (once.adapter / WEIGHTS).read_bytes()
    start = {"from_adapter": str(once.adapter), "learning_rate": 1e-9, "max_steps": 1}
    _, further, _ = train_in(tmp_path / "further", checkpoint, start, lora=lora)
    best = end["best_validation_loss"]
    assert further["best_validation_loss"] == pytest.approx(best, rel=1e-4)


def test_a_run_stopped_when_all_was_done_still_tells_its_memory(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Run._validate

    def validate(self: Run) -> None:
        plain(self)
        if self.progress.done == self.total_steps:
            self.stop.asked = signal.SIGTERM

    monkeypatch.setattr(Run, "_validate", validate)
    with pytest.raises(SystemExit):
        train_in(tmp_path, checkpoint)
    monkeypatch.undo()
    places, end, _ = train_in(tmp_path, checkpoint)
    records = [json.loads(line) for line in places.log.read_text().splitlines()]
    peaks = [r["allocated_bytes"] for r in records if r.get("allocated_bytes")]
    assert end["measured_peak_bytes"] == max(peaks)


@pytest.mark.parametrize("from_adapter", [False, True])
def test_the_model_is_built_once_for_its_step(
    from_adapter: bool,
    done: tuple[Places, dict[str, Any], Params],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, made = build.skeleton, []

    def counted(*arguments: Any, **options: Any) -> Any:
        made.append(arguments)
        return plain(*arguments, **options)

    monkeypatch.setattr(build, "skeleton", counted)
    start = {"from_adapter": str(done[0].adapter)} if from_adapter else {}
    train_in(tmp_path / "run", checkpoint, {"max_steps": 1, **start})
    assert len(made) == 2, "and once for the estimate, which takes fewer layers of a larger model"


def test_where_nothing_fits_the_way_out_is_told_in_figures(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = TrainingStep.run

    def short(self: TrainingStep, sequences: Any, **options: Any) -> Any:
        if self.device.type == "meta":  # an estimate
            return plain(self, sequences, **options)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainingStep, "run", short)
    monkeypatch.setattr(recovery, "WAITS", ())
    half = plan(rows(tmp_path, 13, 0)).sequence_length // 2
    with pytest.raises(UserError, match=rf"data.max_length \({half} would take [\d.]+ KiB\)"):
        train_in(tmp_path, checkpoint)


def test_curves_have_every_step_and_the_same_keys(
    done: tuple[Places, dict[str, Any], Params],
) -> None:
    curves = json.loads(done[0].curves.read_text())
    assert [point["step"] for point in curves] == [1, 2, 3, 4, 5, 6]
    assert len({tuple(point) for point in curves}) == 1
    assert [point["validation_loss"] is not None for point in curves] == [False, True] * 3


def test_the_adapter_and_the_other_one(done: tuple[Places, dict[str, Any], Params]) -> None:
    places, _, params = done
    best, last = load_adapter(places.adapter), load_adapter(places.adapter / "last")
    assert best.keys() == last.keys()
    config = json.loads((places.adapter / CONFIG).read_text())
    assert config["r"] == params.lora.r
    assert config["base_model_name_or_path"] == params.model.id


def test_the_same_run_gives_the_same_bytes(
    done: tuple[Places, dict[str, Any], Params], checkpoint: Path, tmp_path: Path
) -> None:
    again, _, _ = train_in(tmp_path / "again", checkpoint)
    for name in (WEIGHTS, CONFIG, f"last/{WEIGHTS}", f"last/{CONFIG}"):
        assert (again.adapter / name).read_bytes() == (done[0].adapter / name).read_bytes()


def test_keeping_the_last(
    done: tuple[Places, dict[str, Any], Params], checkpoint: Path, tmp_path: Path
) -> None:
    other, _, _ = train_in(
        tmp_path / "other",
        checkpoint,
        {"keep": "last"},
        micro_batch_size=4,
        recompute_layers=(0, 1),
    )
    assert not (other.adapter / "last").exists()
    pairs = ((other.adapter, done[0].adapter / "last"), (other.adapter / "best", done[0].adapter))
    for mine, theirs in pairs:
        expected = load_adapter(theirs)
        for name, tensor in load_adapter(mine).items():
            # another layout of the same run: alike to summation order, which AdamW's sign may stretch
            torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=2e-3)


def test_what_a_switch_of_precision_takes_is_predicted_as_well(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 3, "evaluate_every": None, "precision": "dynamic"}
    bf16 = {"compute_dtype": "bfloat16"}
    _, narrow, _ = train_in(tmp_path / "narrow", checkpoint, settings, alike=True, **bf16)
    _, wide, _ = train_in(
        tmp_path / "wide", checkpoint, settings, alike=True, layer_dtype="float32", **bf16
    )
    accept, left = Precision.accept, [True]

    def refuses(self: Precision, done: int, loss: float, norm: float) -> bool:
        spoiled = done == 1 and bool(left) and bool(left.pop())
        return accept(self, done, math.nan if spoiled else loss, norm)

    monkeypatch.setattr(Precision, "accept", refuses)
    _, end, _ = train_in(tmp_path / "run", checkpoint, settings, alike=True, **bf16)
    assert narrow["predicted_peak_bytes"] < end["predicted_peak_bytes"]
    assert end["predicted_peak_bytes"] == wide["predicted_peak_bytes"]
    assert not end["warnings"]


@pytest.mark.parametrize(
    ("changes", "freeze", "unwatched"),
    # the code books of the 8-bit states were there before the tracker watched
    [
        ({"micro_batch_size": 1}, "off", 0),
        ({"optimizer": "adamw_8bit"}, "off", 2 * 256 * 4),
        ({"frozen_layers": (0,)}, "speed", 0),
    ],
)
def test_memory_is_exactly_as_predicted_where_rows_are_alike(
    changes: dict[str, Any], freeze: str, unwatched: int, checkpoint: Path, tmp_path: Path
) -> None:
    settings = {"max_steps": 2, "evaluate_every": None, "freeze": freeze}
    _, end, _ = train_in(tmp_path, checkpoint, settings, alike=True, **changes)
    assert end["measured_peak_bytes"] == end["predicted_peak_bytes"] - unwatched
