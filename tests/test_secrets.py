"""What must not be read, and what must not be told: no pickle, no code of a checkpoint, no token."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from fitlora.params import ModelParams, Params
from tests.tiny_models import make_checkpoint
from tests.training.test_run import train_in

LIBRARY = Path(__file__).resolve().parents[1] / "lib" / "fitlora"
SECRETS = {
    name: f"secret-of-{name}"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
}
# Readers that run what a file says.
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {("torch", "load"), ("torch.jit", "load"), ("yaml", "load"), ("numpy", "load")}


def test_nothing_is_read_that_could_run() -> None:
    files = sorted(LIBRARY.rglob("*.py"))
    assert len(files) > 50
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                assert (owner, node.func.attr) not in UNSAFE_CALLS, f"{file}:{node.lineno}"
            for name in names:
                assert name.partition(".")[0] not in UNSAFE_MODULES, f"{file}:{node.lineno}"


def test_code_of_a_checkpoint_is_not_run_unless_asked_for() -> None:
    assert ModelParams().trust_remote_code is False


def keys(content: Any) -> set[str]:
    if not isinstance(content, dict):
        return set()
    return {*content, *(key for value in content.values() for key in keys(value))}


def test_no_param_takes_a_secret() -> None:
    found = keys(Params().model_dump())
    assert len(found) > 50
    for key in found:
        assert not any(word in key for word in ("secret", "password", "api_key", "auth", "hf_"))
        assert not key.endswith("token")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A run with secrets in its environment, and code that is trusted; and what it said."""
    import contextlib
    import io

    folder = tmp_path_factory.mktemp("run")
    checkpoint = make_checkpoint(folder / "model", "llama", tokenizer=False)
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        settings = {"max_steps": 2, "checkpoint_every": 1}
        patch.setattr("fitlora.training.checkpoint.Checkpoints.clear", lambda self: None)
        _, end, _ = train_in(folder / "trained", checkpoint, settings, trusted=True)
    return folder, end, said.getvalue()


def test_a_token_reaches_no_file_and_no_line(run: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, said = run
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any("checkpoint.json" in path.name for path in files)
    assert any("adapter" in path.name for path in files)
    for path in files:
        content = path.read_bytes()
        for value in SECRETS.values():
            assert value.encode() not in content, path
    for value in SECRETS.values():
        assert value not in said


def test_trusted_code_is_named_in_the_record(run: tuple[Path, dict[str, Any], str]) -> None:
    folder, end, _ = run
    assert end["trust_remote_code"] is True
    last = (folder / "trained" / "training.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["trust_remote_code"] is True
