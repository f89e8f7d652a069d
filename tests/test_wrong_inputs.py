"""Wrong inputs as a user makes them: each ends with status 2 and one message that names the thing and
the way out, shows no traceback, and leaves no file behind and none changed.

Each was tried by hand before it became a line here. They run in this process, in a copy of a project
whose six stages have run once.
"""

import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants
import pytest
from click.testing import CliRunner, Result

from fitlora import artifacts, rates
from fitlora.cli import main

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "assets" / "sample_model"
COMMIT = "abcdef0123" * 4
PARAMS = f"""\
model: {{id: {MODEL}}}
data: {{train: train.jsonl, validation: held_out.jsonl, max_length: 128}}
hardware: {{device: cpu}}
lora: {{r: 2, alpha: 4.0, target_modules: [q_proj]}}
train: {{effective_batch_size: 4, max_steps: 1, warmup_steps: 0}}
evaluate: {{rows: 2, max_new_tokens: 2, samples: 1}}
"""
# What a command may have written before it found the mistake: whole, and no result.
HARMLESS = (".fitlora/", "logs/", "artifacts/model.json", "artifacts/data.json")

Setup = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A mistake. says: what the message has in it, the thing and the way out among it."""

    name: str
    command: str
    says: tuple[str, ...]
    setup: Setup = lambda: None


def fitlora(command: str) -> Result:
    return CliRunner().invoke(main, shlex.split(command))


def measure_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rates, "disk_read_rate", lambda folder: 10**9)
    patch.setattr(rates, "product_rate", lambda *arguments: 10**11)
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after a run of everything."""
    folder = tmp_path_factory.mktemp("wrong") / "finished"
    folder.mkdir()
    rows = (ROOT / "assets/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        measure_nothing(patch)
        Path("params.yaml").write_text(PARAMS)
        Path("train.jsonl").write_text("\n".join(rows[:6]), encoding="utf-8")
        Path("held_out.jsonl").write_text("\n".join(rows[6:8]), encoding="utf-8")
        for command in ("profile", "estimate", "plan", "quantize", "train", "evaluate"):
            done = fitlora(command)
            assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be spoiled."""
    folder = tmp_path / "project"
    shutil.copytree(finished, folder)
    monkeypatch.chdir(folder)
    measure_nothing(monkeypatch)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    return {name: content for name, content in found.items() if not name.startswith(HARMLESS)}


def write(name: str, content: str | bytes) -> Setup:
    def setup() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return setup


def make(name: str) -> Setup:
    return lambda: Path(name).mkdir()


def append(name: str, line: str) -> Setup:
    return lambda: Path(name).write_text(f"{Path(name).read_text()}\n{line}\n")


def remove(name: str) -> Setup:
    return lambda: shutil.rmtree(name) if Path(name).is_dir() else Path(name).unlink()


def model_without(*patterns: str) -> Setup:
    def setup() -> None:
        shutil.copytree(MODEL, "my_model")
        for pattern in patterns:
            for path in Path("my_model").glob(pattern):
                path.unlink()

    return setup


def model_with(name: str, content: bytes) -> Setup:
    return lambda: (model_without()(), (Path("my_model") / name).write_bytes(content))


def pickled_model() -> None:
    model_without()()
    Path("my_model/model.safetensors").rename("my_model/pytorch_model.bin")


def copy(source: Path, target: str) -> Setup:
    return lambda: shutil.copytree(source, target)


def edit_json(path: Path, **changes: object) -> Setup:
    return lambda: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path) -> Setup:
    return lambda: path.write_bytes(path.read_bytes()[:100])


HARDWARE, PLAN, ADAPTER = artifacts.HARDWARE, artifacts.PLAN, artifacts.ADAPTER
QUANTIZED = artifacts.QUANTIZED_MODEL

CASES = (
    # params.yaml and --set
    Case(
        "no params.yaml",
        "profile",
        ("params.yaml is missing", "fitlora init"),
        remove("params.yaml"),
    ),
    Case(
        "broken YAML",
        "profile",
        ("params.yaml is not YAML", "line 1"),
        write("params.yaml", "train: [1"),
    ),
    Case("not text", "profile", ("params.yaml is not YAML",), write("params.yaml", b"\xff\xfe")),
    Case(
        "unknown key",
        "profile",
        ("train.learning_rat: no such key", "did you mean train.learning_rate?"),
        write("params.yaml", "train: {learning_rat: 1.0}"),
    ),
    Case(
        "several problems at once",
        "profile",
        ("3 problem(s)", "lora.r: found 0", "data: found 5", "nonsense: no such key"),
        write("params.yaml", "lora: {r: 0}\ndata: 5\nnonsense: 1"),
    ),
    Case(
        "a number that is text to YAML 1.1",
        "profile --set train.learning_rate=fast",
        ("train.learning_rate: found 'fast'", "should be a number"),
    ),
    Case(
        "--set of a key that is misspelled",
        "train --set lora.rr=8",
        ("lora.rr: no such key", "did you mean lora.r?"),
    ),
    Case(
        "--set without a value",
        "train --set lora.r",
        ("'lora.r' is not a change", "train.learning_rate=2.0e-4"),
    ),
    Case(
        "--set below a number",
        "train --set lora.r.x=1",
        ("lora.r: found {'x': 1}", "should be 'auto', or a whole number"),
    ),
    Case(
        "--set with broken YAML",
        "train --set lora.target_modules=[q_proj",
        ("the value of lora.target_modules is not YAML",),
    ),
    Case("8 bits", "quantize --set quantization.bits=8", ("quantization.bits: found 8", "use 4")),
    Case(
        "both lengths",
        "train --set train.epochs=1",
        ("exactly one of epochs and max_steps", "null for the other"),
    ),
    Case(
        "micro-batch beyond the effective batch",
        "plan --set plan.micro_batch_size=9",
        ("plan.micro_batch_size 9 is larger than train.effective_batch_size 4",),
    ),
    Case(
        "paged optimizer on the CPU",
        "plan --set train.optimizer=paged_adamw",
        ("paged_adamw needs a CUDA device", "use adamw or adamw_8bit"),
    ),
    Case(
        "paged optimizer where auto is the CPU",
        "estimate --set train.optimizer=paged_adamw --set hardware.device=auto",
        ("paged_adamw needs a CUDA device", "use adamw or adamw_8bit"),
    ),
    # the machine
    Case(
        "a budget that is no size",
        "profile --set hardware.memory_budget=lots",
        ("hardware.memory_budget: found 'lots'", "write it like 8GiB"),
    ),
    Case(
        "a budget beyond the memory",
        "profile --set hardware.memory_budget=900TiB",
        ("hardware.memory_budget is 900TiB", "lower it, or set it to null"),
    ),
    Case(
        "a budget that nothing fits",
        "plan",
        ("nothing fits 1.00 MiB", "Ways out", "a budget of 0.25GiB", "data.max_length 64"),
        edit_json(HARDWARE, budget_bytes=2**20),
    ),
    Case(
        "a target beside the CPU",
        "profile --set hardware.target='{name: x, memory: 8GiB, compute_capability: \"8.9\"}'",
        ("hardware.target describes a GPU", "set one of them to null or auto"),
    ),
    Case(
        "a target and a run",
        "run --out out --set hardware.device=auto "
        "--set hardware.target='{name: x, memory: 8GiB, compute_capability: \"8.9\"}'",
        ("hardware.target describes x", "set it to null"),
    ),
    Case(
        "training on a target",
        "train",
        ("plans for GPU x", "remove hardware.target"),
        lambda: (
            edit_json(HARDWARE, device="cuda", target="x")(),
            edit_json(PLAN, plan={**json.loads(PLAN.read_text())["plan"], "device": "cuda"})(),
        ),
    ),
    # the model
    Case(
        "no such folder",
        "profile --set model.id=./nowhere",
        ("model.id ./nowhere is neither a folder nor a hub id", "owner/name"),
    ),
    Case(
        "a hub id without a revision",
        "profile --set model.id=owner/name",
        ("model.id owner/name", "needs model.revision: the full commit"),
    ),
    Case(
        "a short revision",
        "profile --set model.id=owner/name --set model.revision=abc123",
        ("model.revision: found 'abc123'", "the full commit"),
    ),
    Case(
        "a model that was never released",
        "profile --set model.id=meta-llama/Llama-3.3-8B",
        ("meta-llama/Llama-3.3-8B was never released", "meta-llama/Llama-3.1-8B"),
    ),
    Case(
        "a hub model that cannot be fetched",
        f"estimate --set model.id=owner/name --set model.revision='{COMMIT}'",
        (f"model.id owner/name at {COMMIT} could not be fetched", "give a folder"),
    ),
    Case(
        "a folder without a config",
        "profile --set model.id=./my_model",
        ("my_model has no config.json",),
        model_without("config.json"),
    ),
    Case(
        "a damaged config",
        "estimate --set model.id=./my_model",
        ("my_model/config.json cannot be read",),
        model_with("config.json", b"{"),
    ),
    Case(
        "an architecture that nobody knows",
        "estimate --set model.id=./my_model",
        ("my_model/config.json cannot be read", "zork"),
        model_with("config.json", b'{"model_type": "zork"}'),
    ),
    Case(
        "a folder without weights",
        "quantize --set model.id=./my_model",
        ("has a config and no weights", "need its safetensors"),
        model_without("*.safetensors"),
    ),
    Case(
        "weights in a pickle",
        "quantize --set model.id=./my_model",
        ("reads safetensors only", "save_pretrained"),
        pickled_model,
    ),
    Case(
        "weights cut short",
        "quantize --set model.id=./my_model",
        ("my_model/model.safetensors", "cannot be read"),
        model_with("model.safetensors", MODEL.joinpath("model.safetensors").read_bytes()[:9999]),
    ),
    Case(
        "a quantized model and other params",
        "quantize --set model.id=./q4 --set quantization.type=fp4",
        ("q4 is quantized already", "nf4", "change quantization.*, or give the 16-bit model"),
        copy(QUANTIZED, "q4"),
    ),
    Case(
        "a quantized model without 4 bits",
        "quantize --set model.id=./q4 --set quantization.bits=16",
        ("q4 is quantized to 4 bits", "set quantization.bits: 4"),
        copy(QUANTIZED, "q4"),
    ),
    Case(
        "merging into 16-bit weights that are not there",
        "estimate --set model.id=./q4 --set merge.base=original",
        ("./q4 has 4-bit ones only", "merge.base: dequantized", "name the 16-bit model"),
        copy(QUANTIZED, "q4"),
    ),
    Case(
        "a found rank for an adapter that has one",
        "estimate --set lora.r=auto --set train.from_adapter=mine",
        ("lora.r auto", "train.from_adapter has its own"),
    ),
    Case(
        "a found length without a tokenizer",
        "estimate --set data.max_length=auto --set model.id=./my_model",
        ("data.max_length auto follows from the rows", "no tokenizer", "give a number"),
        model_without("tokenizer*", "*.jinja"),
    ),
    Case(
        "auto where the estimate was made for numbers",
        "plan --set data.max_length=auto",
        ("artifacts/memory_estimate.json was made for numbers", "fitlora estimate"),
    ),
    Case(
        "auto where the plan was made for numbers",
        "train --set lora.r=auto",
        ("params say auto", "artifacts/plan.json was made for numbers", "fitlora plan"),
    ),
    Case(
        "a layer that the model does not have",
        "estimate --set lora.target_modules=[q_prj]",
        ("lora.target_modules has q_prj", "q_proj", "or say all-linear"),
    ),
    Case(
        "more layers than there are",
        "estimate --set plan.recompute=77",
        ("plan.recompute is 77", "the model has 4 layers"),
    ),
    # the data
    Case(
        "no such file",
        "estimate --set data.train=nowhere.jsonl",
        ("nowhere.jsonl is missing (data.train)", "no such file or folder in /"),
    ),
    Case(
        "bad rows",
        "estimate",
        ("train.jsonl:7:", "train.jsonl:8:"),
        append("train.jsonl", '{"messages": 1}\n{'),
    ),
    Case(
        "no rows",
        "estimate --set data.validation=empty.jsonl",
        ("empty.jsonl has no rows", "add some, or name another file (data.train, data.validation)"),
        write("empty.jsonl", ""),
    ),
    Case(
        "fewer rows than a batch",
        "estimate --set train.effective_batch_size=64",
        ("data.train has 6 rows", "train.effective_batch_size 64", "lower it, or add rows"),
    ),
    Case(
        "no room for an answer",
        "estimate --set data.max_length=8",
        ("train.jsonl:1:", "data.max_length 8"),
    ),
    Case(
        "a template that hides the question once it is answered",
        "estimate --set model.id=./my_model",
        ("8 bad row(s)", "train.jsonl:1:", "cannot be told from its prompt", "data.train_on: all"),
        model_with(
            "chat_template.jinja",
            b"{% for m in messages %}{{ m.role }}{{ m.content if loop.last else '...' }}{% endfor %}"
            b"{% if add_generation_prompt %}assistant{% endif %}",
        ),
    ),
    # artifacts
    Case(
        "a stage before its turn",
        "plan",
        ("artifacts/memory_estimate.json is missing", "fitlora estimate"),
        remove("artifacts/memory_estimate.json"),
    ),
    Case(
        "training without weights",
        "train",
        ("artifacts/quantized_model holds no model", "fitlora quantize"),
        remove("artifacts/quantized_model"),
    ),
    *(
        Case(
            f"a damaged {path.name} of the 4-bit model in {command.split()[0]}",
            command,
            (f"{path}", "make it again with: fitlora quantize"),
            spoil(path),
        )
        for command in ("train", "chat --prompt hello")
        for path, spoil in (
            (QUANTIZED / "model.safetensors", cut),
            (QUANTIZED / "config.json", cut),
        )
    ),
    Case(
        "a 4-bit model without its tokenizer",
        "train",
        (f"{QUANTIZED} has no usable tokenizer", "make it again with: fitlora quantize"),
        remove(str(QUANTIZED / "tokenizer.json")),
    ),
    Case(
        "evaluating without an adapter",
        "evaluate",
        ("artifacts/adapter", "is missing", "fitlora train"),
        remove("artifacts/adapter"),
    ),
    Case("a damaged artifact", "train", (str(PLAN), "is damaged", "fitlora plan"), cut(PLAN)),
    Case(
        "a foreign artifact",
        "train",
        (f"{PLAN} is not a FitLoRA plan", "it says 'recipe'", "fitlora plan"),
        edit_json(PLAN, kind="recipe"),
    ),
    Case(
        "an artifact of a newer version",
        "train",
        ("has version 99", "upgrade fitlora, or", "fitlora profile"),
        edit_json(HARDWARE, version=99),
    ),
    Case(
        "other quantization than the checkpoint's",
        "train --set quantization.type=fp4",
        ("artifacts/quantized_model", "nf4", "fp4", "fitlora quantize"),
    ),
    Case(
        "an adapter of another rank",
        "evaluate --set lora.r=4",
        ("adapter_config.json says r 2", "fitlora train"),
    ),
    Case(
        "a damaged adapter",
        "chat --prompt hello",
        ("adapter_model.safetensors is damaged", "fitlora train"),
        cut(ADAPTER / "adapter_model.safetensors"),
    ),
    # train.from_adapter
    Case(
        "an adapter to go on from that is not there",
        "profile --set train.from_adapter=nowhere",
        ("train.from_adapter nowhere has no adapter_config.json", "or null"),
    ),
    Case(
        "an adapter to go on from where the new one goes",
        "train --set train.from_adapter=artifacts/adapter",
        ("is where training writes", "copy the folder"),
    ),
    Case(
        "an adapter to go on from of another rank",
        "train --set train.from_adapter=mine --set lora.r=4",
        ("train.from_adapter mine: its r is 2 and lora.r is 4", "set lora.r: 2"),
        copy(ADAPTER, "mine"),
    ),
    Case(
        "an adapter to go on from of another scale",
        "train --set train.from_adapter=mine --set lora.rslora=true",
        ("its rslora is False and lora.rslora is True", "set lora.rslora: False"),
        copy(ADAPTER, "mine"),
    ),
    Case(
        "an adapter to go on from on other layers",
        "train --set train.from_adapter=mine --set lora.target_modules=[v_proj]",
        (
            "train.from_adapter mine has adapters on 4 layers (q_proj)",
            "(v_proj)",
            "must be the same",
        ),
        copy(ADAPTER, "mine"),
    ),
    Case(
        "an adapter to go on from of another kind",
        "train --set train.from_adapter=mine",
        ("train.from_adapter mine: its lora_bias is True", "does not train"),
        lambda: (
            copy(ADAPTER, "mine")(),
            edit_json(Path("mine/adapter_config.json"), lora_bias=True)(),
        ),
    ),
    # places
    Case("an output that is a file", "run --out train.jsonl", ("train.jsonl is a file", "folder")),
    Case(
        "an output that has a run",
        "run --out .",
        ("holds a run already", "--force"),
    ),
    Case("an output below a file", "run --out train.jsonl/x", ("cannot be written",)),
    Case("a root that is not there", "summary --root nowhere", ("--root nowhere is not a folder",)),
    Case("a params.yaml that is there", "init", ("params.yaml is there already", "--force")),
    Case(
        "a folder for a params.yaml",
        "init --params my",
        ("my is a folder", "name a file"),
        make("my"),
    ),
    Case("an unknown preset", "init --preset 12gb", ("'12gb' is not one of", "'8gb'")),
    Case("an unknown option", "train --learning-rate 1", ("No such option",)),
    Case("an empty question", "chat --prompt=", ("--prompt is empty",)),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_wrong_input(project: Path, case: Case) -> None:
    case.setup()
    before = contents(project)
    done = fitlora(case.command)
    assert done.exit_code == 2, done.output
    for part in case.says:
        assert part in done.stderr
    assert "Traceback" not in done.output
    assert "dvc repro " not in done.stderr, "DVC does not keep these artifacts"
    assert contents(project) == before


def test_a_damaged_4_bit_model_in_evaluate(project: Path) -> None:
    """Which sets the earlier merged model aside before it reads this one."""
    cut(QUANTIZED / "model.safetensors")()
    done = fitlora("evaluate")
    assert done.exit_code == 2
    assert f"{QUANTIZED}/model.safetensors" in done.stderr
    assert "make it again with: fitlora quantize" in done.stderr


def test_there_are_forty_and_more() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40


def test_a_full_disk_leaves_what_was_there(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(project)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "artifacts/plan.json")

    monkeypatch.setattr(artifacts.os, "fsync", full)
    for command in ("profile", "estimate", "plan"):
        done = fitlora(command)
        assert (done.exit_code, done.stderr.strip()) == (
            2,
            "error: artifacts/plan.json: No space left on device",
        )
    assert contents(project) == before


@pytest.mark.parametrize("command", ["quantize", "train"])
def test_a_disk_that_fills_while_tensors_are_written(
    project: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    before = contents(project)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    import safetensors.torch

    from fitlora.quantization import writer

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr(writer, "write_safetensors", full)
    done = fitlora(command)
    assert done.exit_code == 2
    assert "No space left on device" in done.stderr
    logs = {"artifacts/training.jsonl", "artifacts/curves.json"}
    after = contents(project)
    assert {n: c for n, c in after.items() if n not in logs} == {
        n: c for n, c in before.items() if n not in logs
    }
