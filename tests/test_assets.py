"""The shipped sample: small, consistent, made by the scripts beside it, and a fair test.

Fair means that what an adapter gains on the validation rows was learned from the training rows: no
fact is in both, and the base model never saw the task. How well the base and an adapter do is
measured elsewhere (assets/README.md has the figures); here is only what takes seconds.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
MODEL = ASSETS / "sample_model"

LEDGER_LINE = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d) \| (?P<party>[^|]+) \| "
    r"(?P<quantity>[\d.]+) (?P<unit>[a-z]+) \| (?P<money>[A-Z]{3} \d+\.\d\d)"
)


def script(name: str) -> ModuleType:
    """Import scripts/NAME.py as it sees itself when it is run: with scripts/ on the path."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def rows(split: str) -> list[dict[str, Any]]:
    text = (ASSETS / "data" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def test_the_sample_is_small() -> None:
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert files
    assert sum(path.stat().st_size for path in files) <= 8_000_000


@pytest.mark.parametrize(("split", "count"), [("train", 2000), ("validation", 200)])
def test_rows_are_valid_chats_in_the_fixed_format(split: str, count: int) -> None:
    instruction = script("make_sample_data").INSTRUCTION
    found = rows(split)
    assert len(found) == count
    for row in found:
        assert list(row) == ["messages"]
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"].startswith(f"{instruction}\n")
        assert LEDGER_LINE.fullmatch(assistant["content"]), assistant["content"]


def test_no_fact_and_no_sentence_is_in_both_splits() -> None:
    def keys(split: str) -> list[tuple[str, ...]]:
        matches = [LEDGER_LINE.fullmatch(row["messages"][1]["content"]) for row in rows(split)]
        return [match.group("date", "money", "unit", "party") for match in matches if match]

    def sentences(split: str) -> list[str]:
        return [row["messages"][0]["content"] for row in rows(split)]

    for of in (keys, sentences):
        train, validation = of("train"), of("validation")
        assert len(set(train)) == len(train) == 2000
        assert len(set(validation)) == len(validation) == 200
        assert not set(train) & set(validation)


def test_the_data_script_makes_the_committed_bytes(tmp_path: Path) -> None:
    script("make_sample_data").main(["--seed", "1", "--out", str(tmp_path)])
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / name).read_bytes() == (ASSETS / "data" / name).read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "On 3 March 2021, Zoë Åkesson paid EUR 1,340.50.",
        "  two  spaces,\ttabs\nand lines \n",
        "Ελλάδα, 東京 and 🙂 were never in the training text",
    ],
)
def test_the_tokenizer_gives_back_any_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.bos_token_id not in ids  # the chat template writes it, and only that
    assert tokenizer.decode(ids) == text


def test_the_chat_template_ends_with_eos_and_extends_its_own_prompt(tokenizer: Any) -> None:
    lengths = []
    for row in rows("validation"):
        messages = row["messages"]
        full = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(
            messages[:1], tokenize=False, add_generation_prompt=True
        )
        assert full == prompt + messages[1]["content"] + tokenizer.eos_token
        full_ids, prompt_ids = tokenizer(full).input_ids, tokenizer(prompt).input_ids
        assert full_ids[: len(prompt_ids)] == prompt_ids
        assert full_ids[0] == tokenizer.bos_token_id
        assert full_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in full_ids[len(prompt_ids) : -1]
        lengths.append(len(full_ids))
    assert 30 <= min(lengths) < max(lengths) <= 100


def test_special_tokens_agree(tokenizer: Any) -> None:
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    config, generation = AutoConfig.from_pretrained(MODEL), GenerationConfig.from_pretrained(MODEL)
    assert len({getattr(tokenizer, name) for name in special}) == 3
    for name in special:
        assert getattr(config, name) == getattr(generation, name) == getattr(tokenizer, name)
    for token in ("<|system|>", "<|user|>", "<|assistant|>"):
        assert len(tokenizer(token).input_ids) == 1
    assert config.vocab_size == len(tokenizer)


def test_every_matrix_is_whole_quantization_blocks() -> None:
    with safetensors.safe_open(MODEL / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2}
    assert len(matrices) == 1 + 4 * 7
    for name, shape in matrices.items():
        assert all(size % 64 == 0 for size in shape), (name, shape)


def test_the_base_model_never_saw_the_task() -> None:
    """Neither the instruction, nor a word of it, nor a piece of the format."""
    data, model = script("make_sample_data"), script("make_sample_model")
    text = "".join(
        piece.text
        for chunk in range(20)
        for document in model.draw_chunk(0, chunk)
        for piece in document
    )
    forbidden = (
        re.compile(re.escape(data.INSTRUCTION.split()[0]), re.IGNORECASE),
        re.compile(r"\d{4}-\d\d-\d\d \|"),
        re.compile(r"\| [\d.]+ [a-z]+ \|"),
        re.compile(r"\| [A-Z]{3} \d"),
    )
    target = "\n".join(message["content"] for message in rows("validation")[0]["messages"])
    for pattern in forbidden:
        assert pattern.search(target), f"{pattern.pattern} would miss the task itself"
        assert not pattern.search(text), pattern.pattern
    assert len(text) > 1_000_000


def test_training_documents_are_what_the_chat_template_writes(tokenizer: Any) -> None:
    compared = 0
    for document in script("make_sample_model").draw_chunk(0, 0):
        text = "".join(piece.text for piece in document)
        turns = re.findall(r"<\|(system|user|assistant)\|>\n(.*?)<\|end\|>", text, re.DOTALL)
        if turns:
            messages = [{"role": role, "content": content} for role, content in turns]
            assert tokenizer.apply_chat_template(messages, tokenize=False) == text
            compared += 1
    assert compared > 500


@pytest.mark.slow
def test_the_model_script_runs(tmp_path: Path) -> None:
    """In a process of its own: it makes torch deterministic for the whole process."""
    sizes = "--hidden-size 64 --intermediate-size 64 --layers 1 --heads 1 --kv-heads 1"
    amounts = "--documents 1000 --steps 2 --batch-tokens 1024 --device cpu"
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "scripts" / "make_sample_model.py"),
            *("--seed", "0", "--out", str(tmp_path), *sizes.split(), *amounts.split()),
        ],
        check=True,
    )
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {path.name for path in MODEL.iterdir()}
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == 1536
