"""MemoryEfficientTrainer and the script around it: the seed's names, on the pipeline's own stages."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fitlora
from fitlora import MemoryEfficientTrainer, UserError, rates
from fitlora.artifacts import ADAPTER, PLAN, PlanArtifact
from fitlora.params import Params, read_params
from scripts import run_memory_efficient_training as script

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "assets" / "sample_model"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "disk_read_rate", lambda folder: 10**9)
    monkeypatch.setattr(rates, "product_rate", lambda *arguments: 10**11)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    rows = (ROOT / "assets/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "train.jsonl").write_text("\n".join(rows[:8]), encoding="utf-8")
    (folder / "held_out.jsonl").write_text("\n".join(rows[8:10]), encoding="utf-8")
    return {
        "train_file": str(folder / "train.jsonl"),
        "validation_file": str(folder / "held_out.jsonl"),
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: dict[str, str]) -> Any:
    """The seed's template for 16 GB, without what is refused, and with a short run of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "disk_read_rate", lambda folder: 10**9)
        patch.setattr(rates, "product_rate", lambda *arguments: 10**11)
        trainer = MemoryEfficientTrainer(
            model_name_or_path=MODEL,
            output_dir=tmp_path_factory.mktemp("trained") / "outputs",
            bits=4,
            double_quant=True,
            quant_type="nf4",
            lora_r=4,
            memory_profiling=True,
            cpu_offloading=False,
            gradient_checkpointing=True,
            auto_find_batch_size=True,
            auto_find_parameters=True,
            device_map="cpu",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=2,
            warmup_steps=0,
            **data,
        )
        end = trainer.train()
    assert end["steps"] == 2
    return trainer


def params_of(**arguments: Any) -> Params:
    return MemoryEfficientTrainer(MODEL, "unused", **arguments).params


# --- a run ----------------------------------------------------------------------------------------


def test_found_parameters_are_those_of_the_run(trained: Any) -> None:
    params = read_params(trained.output_dir / "params.yaml")
    assert params == trained.params
    assert params.lora.r == 4
    assert params.lora.alpha == 8
    assert params.data.max_length % 8 == 0
    plan = PlanArtifact.read(trained.output_dir / PLAN).plan
    assert plan.effective_batch_size == 4
    assert plan.micro_batch_size == 4, "found: the whole effective batch fits at once"
    assert params.data.max_length - 16 < plan.sequence_length <= params.data.max_length


def test_memory_profiling_keeps_a_line_for_each_step(trained: Any) -> None:
    log = trained.output_dir / "memory_logs" / "memory.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert set(lines[0]["phases"]) >= {"forward", "backward", "optimizer"}


def test_evaluates_and_saves(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"call evaluate\(\) first"):
        trained.save_model(tmp_path / "merged", merged=True)
    found = trained.evaluate()
    assert found.rows == 2
    saved = trained.save_model(tmp_path / "adapter")
    assert (saved / "adapter_config.json").is_file()
    assert (saved / "tokenizer.json").is_file()
    assert not [path for path in saved.iterdir() if path.is_dir()]
    adapter = (trained.output_dir / ADAPTER / "adapter_model.safetensors").read_bytes()
    assert (saved / "adapter_model.safetensors").read_bytes() == adapter
    assert trained.save_model(tmp_path / "adapter") == saved, "replaces what it saved"
    merged = trained.save_model(tmp_path / "merged", merged=True)
    assert (merged / "model.safetensors").is_file()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds no saved model"):
        trained.save_model(tmp_path / "else")
    assert not list(tmp_path.glob(".*"))


def test_stock_peft_loads_what_is_saved(trained: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = trained.save_model(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    model = PeftModel.from_pretrained(base, saved)
    assert model.peft_config["default"].r == 4
    assert AutoTokenizer.from_pretrained(saved).eos_token is not None


def test_goes_on_from_what_it_saved(
    trained: Any, tmp_path: Path, data: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    saved = trained.save_model(tmp_path / "adapter")
    MemoryEfficientTrainer(
        MODEL, tmp_path / "more", from_adapter=saved, lora_r=4, device_map="cpu",
        auto_find_parameters=True, per_device_train_batch_size=2, gradient_accumulation_steps=1,
        max_steps=1, **data,
    ).train()  # fmt: skip
    assert f"going on from the adapter in {saved}" in capsys.readouterr().out


def test_nothing_before_its_turn(tmp_path: Path) -> None:
    trainer = MemoryEfficientTrainer(MODEL, tmp_path / "outputs")
    for method in (trainer.evaluate, trainer.save_model):
        with pytest.raises(UserError, match=r"call train\(\) first"):
            method()
    assert not trainer.output_dir.exists()


# --- arguments ------------------------------------------------------------------------------------


def test_defaults_are_those_of_params() -> None:
    params, defaults = params_of(), Params()
    assert params.quantization == defaults.quantization
    assert params.lora == defaults.lora
    # one device, unless device_map is "auto"
    assert params.train == defaults.train.model_copy(update={"devices": 1})
    assert params.data.max_length == defaults.data.max_length
    assert Path(params.data.train).is_file(), "the shipped data"
    assert params_of(train_file="rows.jsonl").data.validation is None, "a share of the rows"


@pytest.mark.parametrize(
    ("arguments", "micro", "effective"),
    [
        ({}, 1, 32),
        ({"auto_find_batch_size": True}, "auto", 32),
        ({"per_device_train_batch_size": 4}, 4, 32),
        ({"per_device_train_batch_size": 64}, 64, 64),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}, 4, 12),
        (
            {
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 3,
                "auto_find_batch_size": True,
            },
            "auto",
            12,
        ),
    ],
)
def test_batch(arguments: dict[str, Any], micro: int | str, effective: int) -> None:
    params = params_of(**arguments)
    assert params.plan.micro_batch_size == micro
    assert params.train.effective_batch_size == effective


@pytest.mark.parametrize(
    ("checkpointing", "auto", "recompute"),
    [
        (None, False, "auto"), (True, False, "all"), (False, False, "none"),
        (None, True, "auto"), (True, True, "auto"), (False, True, "none"),
    ],
)  # fmt: skip
def test_gradient_checkpointing(checkpointing: bool | None, auto: bool, recompute: str) -> None:
    params = params_of(gradient_checkpointing=checkpointing, auto_find_parameters=auto)
    assert params.plan.recompute == recompute


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"bits": 8}, "quantization.bits: found 8"),
        ({"device_map": "balanced"}, "device_map is 'balanced'.*'cuda' or 'cpu'.*'auto'"),
        ({"device_map": "cpu", "optim": "paged_adamw"}, "paged_adamw needs a CUDA device"),
        ({"validation_file": "rows.jsonl"}, "give train_file too"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps is -1"),
        ({"lora_r": 0}, "lora_r is 0"),
        ({"num_train_epochs": 1.0, "max_steps": 5}, "exactly one of epochs and max_steps"),
        ({"memory_budget": "much"}, "'much' is not a size"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        params_of(**arguments)


def test_the_seeds_model_is_refused_with_what_there_is() -> None:
    with pytest.raises(UserError, match=r"never released.*meta-llama/Llama-3\.1-8B"):
        MemoryEfficientTrainer("meta-llama/Llama-3.3-8B", "unused")


@pytest.mark.parametrize(
    ("device_map", "devices"), [(None, 1), ("cuda", 1), ("cpu", 1), ("auto", "auto")]
)
def test_auto_is_every_gpu_and_else_there_is_one(device_map: str | None, devices: object) -> None:
    assert params_of(device_map=device_map).train.devices == devices


def test_offloading_is_the_planners_unless_it_is_forbidden() -> None:
    names = ("stream_layers", "checkpoints", "embedding", "head", "optimizer_device")
    for allowed in ({}, {"cpu_offloading": True}):
        plan = params_of(**allowed).plan
        assert {getattr(plan, name) for name in names} == {"auto"}
    plan = params_of(cpu_offloading=False).plan
    assert plan.stream_layers == 0
    assert {getattr(plan, name) for name in names[1:]} == {"device"}


def test_the_seeds_optimizer_wraps_another_one() -> None:
    import torch

    from fitlora import CPUOffloadOptimizer

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = CPUOffloadOptimizer(torch.optim.SGD([weight], lr=0.5))
    weight.sum().backward()
    optimizer.step()
    assert weight.tolist() == [0.5] * 3


def test_every_name_of_the_package_is_there() -> None:
    for name in fitlora.__all__:
        assert getattr(fitlora, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fitlora.nothing  # noqa: B018


# --- auto_find_parameters -------------------------------------------------------------------------


# --- the script -----------------------------------------------------------------------------------


def test_every_flag_is_an_argument_and_the_other_way_round() -> None:
    flags = {action.dest for action in script.parser()._actions} - {"help"}
    arguments = set(inspect.signature(MemoryEfficientTrainer).parameters)
    assert flags == arguments - {"trust_remote_code"}


@pytest.mark.slow
def test_the_seeds_command(tmp_path: Path, data: dict[str, str]) -> None:
    """As the seed document has it, with the shipped model and a short run."""
    command = [
        sys.executable, "scripts/run_memory_efficient_training.py",
        "--model_name_or_path", "assets/sample_model", "--output_dir", str(tmp_path / "outputs"),
        "--bits", "4", "--lora_r", "16",
        "--auto_find_batch_size", "--auto_find_parameters", "--memory_profiling",
        "--cpu_offloading", "--device_map", "cpu", "--max_steps", "1",
        "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1",
        "--train_file", data["train_file"], "--validation_file", data["validation_file"],
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT / "lib"), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "model" / "adapter_config.json").is_file()
