"""The command line: what each command says to people and to programs, and how it ends."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import click
import pytest
import torch
from click.testing import CliRunner, Result

from fitlora import artifacts, console, rates
from fitlora.artifacts import Hardware, ModelFacts
from fitlora.cli import main
from fitlora.errors import UserError
from fitlora.params import read_params
from fitlora.plan import ComputeDtype, Plan

ROOT = Path(__file__).resolve().parents[1]
FITLORA = str(Path(sys.executable).parent / "fitlora")
ROWS = (ROOT / "assets/data/train.jsonl").read_text(encoding="utf-8").splitlines()
PARAMS = f"""\
model: {{id: {ROOT / "assets/sample_model"}}}
data: {{train: train.jsonl, validation: held_out.jsonl, max_length: 128}}
hardware: {{device: cpu}}
lora: {{r: 2, alpha: 4.0}}
train: {{effective_batch_size: 4, max_steps: 2, warmup_steps: 0}}
evaluate: {{rows: 2, max_new_tokens: 2, samples: 1}}
"""


def fitlora(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params and data, and a machine that is measured in no time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rates, "disk_read_rate", lambda folder: 10**9)
    monkeypatch.setattr(rates, "product_rate", lambda *arguments: 10**11)
    write_project(tmp_path)
    return tmp_path


def write_project(folder: Path) -> None:
    (folder / "params.yaml").write_text(PARAMS)
    (folder / "train.jsonl").write_text("\n".join(ROWS[:6]), encoding="utf-8")
    (folder / "held_out.jsonl").write_text("\n".join(ROWS[6:8]), encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fitlora run --out out --json` leaves, with what it printed beside it."""
    folder = tmp_path_factory.mktemp("run")
    write_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(rates, "disk_read_rate", lambda path: 10**9)
        patch.setattr(rates, "product_rate", lambda *arguments: 10**11)
        done = fitlora("run", "--out", "out", "--json", "--set", "lora.r=3")
    assert done.exit_code == 0, done.output
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


# --- any model, any card --------------------------------------------------------------------------

MODEL = str(ROOT / "assets/sample_model")


def test_estimate_of_a_model_and_a_card() -> None:
    asked = ("estimate", MODEL, "--gpu-memory", "700MiB", "--seq-length", "64")
    done = fitlora(*asked, "--recompute", "1", "--keep", "attention", "--rank", "4", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    estimate = found["estimate"]
    assert estimate["plan"]["recompute_keeps"] == ["attention"]
    assert estimate["plan"]["recompute_layers"] == [0]
    assert estimate["fits"] is (found["left_bytes"] >= 0) is True
    assert found["longest_sequence"] >= 64
    assert found["largest_micro_batch"] == found["longest_sequence"] // 64
    assert found["way_out"] is None


def test_a_model_that_is_known_by_name_needs_no_folder() -> None:
    asked = ("--seq-length", "64", "--recompute", "all", "--json")
    done = fitlora("estimate", "Qwen2.5-0.5B", "--gpu-memory", "8GiB", *asked)
    assert done.exit_code == 0, done.output
    estimate = json.loads(done.stdout)["estimate"]
    assert len(estimate["plan"]["recompute_layers"]) == 24
    assert estimate["components"]["weights"] > 494_032_768 / 2


def test_estimate_takes_a_whole_plan_and_says_what_is_lacking(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan = {
        "device": "cuda", "effective_batch_size": 4, "micro_batch_size": 4, "sequence_length": 128,
        "evaluation_batch_size": 4, "compute_dtype": "bfloat16", "optimizer": "adamw",
        "loss_chunk_tokens": 64,
    }  # fmt: skip
    file.write_text(json.dumps({"plan": plan}))
    card = ("--gpu-memory", "621MiB", "--host-memory", "64MiB")
    done = fitlora("estimate", MODEL, *card, "--plan", str(file))
    assert done.exit_code == 0, done.output
    assert "micro-batch 4 x 1 accumulation x 128 tokens" in done.stdout
    lacking = r"[\d.]+ [KM]iB are lacking, [\d.]+ [MG]iB of the host's memory are lacking"
    assert re.search(rf"in 621.00 MiB: does not fit, {lacking}", done.stdout)
    assert "activations" in done.stdout
    assert re.search(r"no layout of it fits, the smallest takes [\d.]+ MiB", done.stdout)


# Every decision of a Plan by an option, otherwise than by default; what does not go together is apart.
KNOBS = (
    "--accumulation 3 --micro-batch 2 --micro-batches-per-pass 2 --devices 2 --evaluation-batch 3 "
    "--seq-length 64 --recompute 0-1,3 --keep attention --keep mlp --freeze 1 --layer-dtype float32 "
    "--compute-dtype float16 --stream 0,2-3 --slots 3 --disk 1 --checkpoints host --embedding host "
    "--head host --optimizer-device host --loss-chunk 7 --mlp-chunk 0",
    "--layers-per-device 1,3 --attention plain",
    "--optimizer paged_adamw_8bit --recompute none --stream none --freeze none",
)


def planned(monkeypatch: pytest.MonkeyPatch, options: str) -> dict[str, Any]:
    """The plan that options ask for; nothing is traced."""
    monkeypatch.setattr(
        "fitlora.cli.estimate._answer",
        lambda question, model: {"plan": question.plan.model_dump(mode="json")},
    )
    done = fitlora("estimate", MODEL, "--gpu-memory", "8GiB", "--json", *options.split())
    assert done.exit_code == 0, done.output
    plan: dict[str, Any] = json.loads(done.stdout)["plan"]
    return plan


def test_every_decision_of_a_plan_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = planned(monkeypatch, "")
    found = [planned(monkeypatch, options) for options in KNOBS]
    decided = {name for plan in found for name in plan if plan[name] != usual[name]}
    assert set(Plan.model_fields) - decided == {"device"}  # which is the card's
    first = found[0]
    assert first["recompute_layers"] == [0, 1, 3]
    assert first["streamed_layers"] == [0, 2, 3]
    assert first["frozen_layers"] == [0]
    assert first["recompute_keeps"] == ["attention", "mlp"]
    assert first["effective_batch_size"] == 12
    assert first["mlp_chunk_tokens"] is None


@pytest.mark.parametrize("dtype", get_args(ComputeDtype))
def test_every_precision_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    assert planned(monkeypatch, f"--compute-dtype {dtype}")["compute_dtype"] == dtype


def test_precision_is_what_the_card_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [planned(monkeypatch, f"--capability {version}") for version in ("7.5", "8.6")]
    assert [plan["compute_dtype"] for plan in found] == ["float16", "bfloat16"]


def test_the_table_of_a_model() -> None:
    asked = ("estimate", MODEL, "--table", "--seq-length", "64")
    standard, qlora = fitlora(*asked).stdout.splitlines()[1:3]
    assert standard.split()[-7:] == ["?"] * 7  # a bound says when a card is too small, and no more
    assert qlora.split()[-7:] == ["yes"] * 7
    done = fitlora(*asked, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["cards_gib"] == [8, 12, 16, 24, 40, 48, 80]
    streamed = found["qlora_with_offload"]
    assert streamed["plan"]["streamed_layers"]
    assert streamed["components"]["weights"] < found["qlora"]["components"]["weights"]


ASKED = ("estimate", MODEL, "--gpu-memory", "8GiB")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("estimate", MODEL), "--gpu-memory 8GiB"),
        (("estimate", MODEL, "--gpu-memory", "much"), "is not a size"),
        (("estimate", "nowhere", "--gpu-memory", "8GiB"), "neither a folder nor a hub id"),
        ((*ASKED, "--recompute", "99"), "a number up to"),
        ((*ASKED, "--stream", "99"), "the model has"),
        ((*ASKED, "--freeze", "0-9"), "the model has 4 layers"),
        ((*ASKED, "--stream", "3-2"), "like 0-7,12"),
        ((*ASKED, "--disk", "1"), "0 layers are streamed"),
        ((*ASKED, "--layers-per-device", "2+2"), "like 2,2"),
        ((*ASKED, "--layers-per-device", "2,3"), "the model has"),
        (
            (*ASKED, "--capability", "8.6", "--layer-dtype", "float8"),
            "layer_dtype is float8, which 8GiB lacks",
        ),
        (
            (*ASKED, "--capability", "7.5", "--compute-dtype", "bfloat16"),
            "which 8GiB lacks; use float16",
        ),
        (
            (*ASKED, "--capability", "7.5", "--attention", "flash"),
            "8GiB has no FlashAttention; use plain",
        ),
        ((*ASKED, "--plan", "no.json"), "has no Plan"),
        ((*ASKED, "--target", "nothing"), "nothing"),
    ],
)
def test_estimate_says_what_is_wrong_with_a_question(arguments: tuple[str, ...], said: str) -> None:
    done = fitlora(*arguments)
    assert done.exit_code == 2, done.output
    assert said in done.stderr


def test_a_plan_for_a_card_that_is_not_here() -> None:
    asked = ("plan", MODEL, "--gpu", "RTX 3070", "--seq-length", "64")
    done = fitlora(*asked, "--set", "train.effective_batch_size=4", "--set", "lora.r=4")
    assert done.exit_code == 0, done.output
    for words in (
        r"target +RTX 3070, 8.00 GiB",
        r"by its maker's figures",
        r"micro_batch_size +4 +the whole effective batch fits at once",
        r"predicted +[\d,]+ tokens/s, held up by the host, which launches that work",
        r"not probed: the plan is for a GPU that is not here",
    ):
        assert re.search(words, done.stdout), words


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", MODEL), 'takes both: fitlora plan ./model --gpu "RTX 3070"'),
        (("plan", "--gpu", "RTX 3070"), "set hardware.target"),
        (("plan", "llama-9b", "--gpu", "RTX 3070"), "nor a size known by name; did you mean"),
        (("plan", MODEL, "--gpu", "RTX 9999"), "is not among the GPUs that are known"),
        (("plan", MODEL, "--gpu", "T4", "--set", "lora.r=auto"), "give numbers"),
    ],
)
def test_plan_says_what_is_wrong_with_a_card(arguments: tuple[str, ...], said: str) -> None:
    done = fitlora(*arguments)
    assert done.exit_code == 2, done.output
    assert said in done.stderr


def test_probe_compares_the_estimate_with_the_device(project: Path) -> None:
    done = fitlora("probe", MODEL, "--seq-length", "32", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["fits"]
    error = found["predicted_allocated_bytes"] / found["measured_allocated_bytes"] - 1
    assert abs(error) < 0.01


# --- help -----------------------------------------------------------------------------------------


def commands() -> list[click.Command]:
    return list(main.commands.values())


def test_the_commands_are_those_that_were_asked_for() -> None:
    assert set(main.commands) == {
        "init", "profile", "estimate", "plan", "quantize", "train", "evaluate", "run", "chat",
        "summary", "compare", "probe",
    }  # fmt: skip


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.name)
def test_help_says_what_it_does_and_gives_examples_that_parse(command: click.Command) -> None:
    text = fitlora(command.name, "--help").output
    assert command.help.splitlines()[0].split(".")[0][:40] in " ".join(text.split())
    examples = re.findall(rf"^  +fitlora {command.name}\b(.*)$", text, re.MULTILINE)
    assert examples
    for option in command.params:
        assert isinstance(option, click.Argument) or option.help, option.name
    for example in examples:
        known = {name for option in command.params for name in option.opts}
        assert set(re.findall(r" (--[a-z-]+)", example)) <= known


def test_help_loads_no_torch() -> None:
    code = "import sys; from fitlora.cli import main; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- params ---------------------------------------------------------------------------------------


def test_set_changes_a_key_for_one_command(project: Path) -> None:
    done = fitlora("profile", "--set", "hardware.memory_budget=1GiB", "--json")
    assert done.exit_code == 0, done.output
    assert Hardware.read(artifacts.HARDWARE).budget_bytes == 2**30
    assert read_params(Path("params.yaml")).hardware.memory_budget is None


def test_params_of_the_root_come_before_those_that_are_here(project: Path) -> None:
    Path("other").mkdir()
    params = "model: {id: nowhere}\n"
    Path("other/params.yaml").write_text(params)
    assert "nowhere" in fitlora("profile", "--root", "other").stderr
    assert fitlora("profile", "--root", "other", "--params", "params.yaml").exit_code == 0
    assert (project / "other" / artifacts.HARDWARE).is_file()
    assert not (project / artifacts.HARDWARE).exists()


# --- answers --------------------------------------------------------------------------------------


def test_json_is_all_that_is_on_stdout(project: Path) -> None:
    done = fitlora("profile", "--json")
    assert json.loads(done.stdout)["device"] == "cpu"
    assert "may be used" in done.stderr
    plain = fitlora("profile")
    assert "may be used" in plain.stdout
    assert plain.stderr == ""


def test_run_leaves_a_whole_run_in_its_folder(finished: Path) -> None:
    summary = json.loads((finished / "stdout").read_text())
    assert summary["steps"] == 2
    assert set(summary["models"]) == {"base", "quantized_base", "adapter", "merged"}
    said = (finished / "stderr").read_text()
    stages = re.findall(r"^\[(\d)/6\] (\w+)$", said, re.MULTILINE)
    assert [name for _, name in stages] == list(console.COMMANDS)
    assert said.index("expected time") < said.index("step 1/2")
    assert {path.name for path in finished.iterdir()} == {
        "out", "params.yaml", "train.jsonl", "held_out.jsonl", "stdout", "stderr",
    }  # fmt: skip


def test_the_folder_of_a_run_is_enough_for_later_commands(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, with the params that were changed by --set in it."""
    monkeypatch.chdir(tmp_path)
    out = str(finished / "out")
    assert read_params(finished / "out" / "params.yaml").lora.r == 3
    shown = fitlora("summary", "--root", out)
    assert shown.exit_code == 0, shown.output
    assert "held-out rows" in shown.output
    again = fitlora("evaluate", "--root", out, "--json", "--set", "evaluate.rows=1")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["rows"] == 1


def test_training_goes_on_from_an_adapter(finished: Path, project: Path) -> None:
    adapter = finished / "out" / artifacts.ADAPTER
    sets = ("--set", f"train.from_adapter={adapter}", "--set", "lora.r=3")
    done = fitlora("run", "--out", "more", *sets)
    assert done.exit_code == 0, done.output
    assert f"going on from the adapter in {adapter}" in done.output
    facts = ModelFacts.read(Path("more") / artifacts.MODEL)
    assert facts.adapter is not None
    assert ModelFacts.read(finished / "out" / artifacts.MODEL).adapter is None

    def first_loss(root: Path) -> float:
        lines = (root / artifacts.TRAINING_LOG).read_text().splitlines()
        return float(json.loads(lines[0])["loss"])

    def last_loss(root: Path) -> float:
        lines = [json.loads(line) for line in (root / artifacts.TRAINING_LOG).open()]
        return float([line for line in lines if line["event"] == "step"][-1]["loss"])

    # the first step has the same rows in both
    assert first_loss(Path("more")) < first_loss(finished / "out") - 0.01
    assert last_loss(Path("more")) > 0


# --- chat -----------------------------------------------------------------------------------------


def chat(finished: Path, *arguments: str, stdin: str | None = None) -> Result:
    root = str(finished / "out")
    return fitlora("chat", "--root", root, "--max-new-tokens", "8", *arguments, stdin=stdin)


def test_chat_answers_a_prompt_the_same_each_time(finished: Path) -> None:
    one, two = (chat(finished, "--prompt", "Ledger line:") for _ in range(2))
    assert one.exit_code == 0, one.output
    assert one.stdout == two.stdout
    assert one.stdout.endswith("\n")


def test_chat_answers_each_line_by_itself(finished: Path) -> None:
    alone = [chat(finished, "--prompt", text).stdout for text in ("one", "two words")]
    both = chat(finished, stdin="one\n\ntwo words\n")
    assert both.stdout == "".join(alone)


def test_chat_in_a_terminal_remembers_until_it_is_told_to_begin_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fitlora import chat as module

    asked: list[list[str]] = []

    def answer(messages: list[dict[str, str]], write: object) -> str:
        asked.append([message["content"] for message in messages])
        if messages[-1]["content"] == "stop":
            raise KeyboardInterrupt
        if messages[-1]["content"] == "long":
            raise UserError("too long")
        return f"answer to {messages[-1]['content']}"

    lines = iter(["one", "", "stop", "long", "two", "/new", "three"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    model = module.Chat(*(None,) * 3, temperature=0.0, max_new_tokens=1)
    monkeypatch.setattr(model, "answer", answer)
    module.converse(model)
    one = ["one", "answer to one"]
    assert asked == [["one"], [*one, "stop"], [*one, "long"], [*one, "two"], ["three"]]
    assert "error: too long" in capsys.readouterr().err


def test_chat_writes_whole_characters_as_they_come(finished: Path) -> None:
    from fitlora.chat import _Stream
    from tests.tiny_models import make_tokenizer

    tokenizer = make_tokenizer(finished / "bytes")
    text = "né ☃!"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    written: list[str] = []
    stream = _Stream(tokenizer, [tokenizer.eos_token_id], written.append)
    for value in [[1, 2, 3], *tokens, tokenizer.eos_token_id]:
        stream.put(torch.tensor(value))
    stream.end()
    assert "".join(written) == stream.text == text
    assert written == list(text), "a character is written once all its tokens are there"


def test_chat_with_the_merged_model_and_a_temperature(finished: Path) -> None:
    assert chat(finished, "--merged", "--prompt", "one").exit_code == 0
    drawn = [chat(finished, "--temperature", "5", "--prompt", "one").stdout for _ in range(2)]
    assert drawn[0] == drawn[1], "drawn from the run's seed"
    assert drawn[0] != chat(finished, "--prompt", "one").stdout


# --- endings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_is_called_one(project: Path, monkeypatch: pytest.MonkeyPatch, debug: bool) -> None:
    def broken(folder: Path) -> int:
        raise ZeroDivisionError("no")

    monkeypatch.setattr(rates, "disk_read_rate", broken)
    done = fitlora("profile", *(["--debug"] if debug else []))
    assert done.exit_code == 1
    assert "internal error: ZeroDivisionError: no" in done.stderr
    assert "--debug" in done.stderr
    assert ("Traceback" in done.stderr) == debug


def test_debug_shows_the_traceback_of_a_mistake_too(project: Path) -> None:
    done = fitlora("plan", "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert "artifacts/hardware.json is missing" in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        MemoryError(),
    ],
    ids=["allocator", "library", "host"],
)
def test_out_of_memory_is_not_called_a_bug(
    project: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(folder: Path) -> int:
        raise error

    monkeypatch.setattr(rates, "disk_read_rate", full)
    done = fitlora("profile")
    assert done.exit_code == 2
    assert "hardware.memory_budget" in done.stderr


def test_messages_name_commands_where_dvc_does_not_keep_the_artifacts(project: Path) -> None:
    text = "make it again with: dvc repro --force quantize_model"
    assert console.in_commands(text, None) == "make it again with: fitlora quantize"
    assert console.in_commands(text, Path("o")) == "make it again with: fitlora quantize --root o"
    assert console.in_commands("run: dvc repro", None) == "run: dvc repro"
    Path("dvc.yaml").touch()
    assert console.in_commands(text, None) == text
    assert console.in_commands(text, Path("o")) == "make it again with: fitlora quantize --root o"


def test_a_process_of_several_names_what_the_user_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "launch.json"
    given.write_text(read_params(ROOT / "params.yaml").model_dump_json())
    monkeypatch.setattr(sys, "argv", ["train_rank", str(given), str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("fitlora.pipeline.train_rank", run_name="__main__")
    message = capsys.readouterr().err
    assert f"plan.json is missing; make it with: fitlora plan --root {tmp_path}" in message


def test_every_stage_has_a_command() -> None:
    from scripts import stage_deps

    assert set(console.COMMANDS) == set(stage_deps.stages())
    assert set(console.COMMANDS.values()) <= set(main.commands)


@pytest.mark.slow
def test_ctrl_c_leaves_only_whole_artifacts(finished: Path, tmp_path: Path) -> None:
    """In a process of its own, in the middle of training, over an earlier run."""
    write_project(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "lib"), "PYTHONUNBUFFERED": "1"}
    command = [FITLORA, "run", "--out", "out", "--set", "train.max_steps=100000"]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "Traceback" not in errors
    assert "stopped. Each artifact under out/artifacts is whole" in errors
    left = {path.name for path in (tmp_path / "out" / "artifacts").iterdir()}
    assert not any(name.startswith(".") for name in left)
    assert "adapter" not in left
    assert {"plan.json", "quantized_model"} <= left
