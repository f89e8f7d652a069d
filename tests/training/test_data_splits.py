"""Bad and long rows, and the rows that are held out of those to train on."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fitlora.data.templates import load_tokenizer
from fitlora.errors import UserError
from fitlora.evaluation.answers import end_tokens, make_questions
from fitlora.model import load_config
from fitlora.params import DataParams, TrainParams, check_params
from fitlora.step.build import build_step
from fitlora.step.settings import StepSettings
from fitlora.training import data as module
from fitlora.training.data import (
    TokenizedSplit,
    find_sources,
    load_splits,
    load_validation,
    rows_of,
)
from tests.tiny_models import VOCABULARY, make_tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    make_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def row(number: int) -> dict[str, str]:
    return {"prompt": f"question {number}", "completion": f"answer {number}"}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return str(path)


def load(model: Path, **data: Any) -> tuple[TokenizedSplit, TokenizedSplit]:
    return load_splits(DataParams(**data), model, VOCABULARY)


# --- bad and long ----------------------------------------------------------------------------------


def test_bad_rows_of_every_kind_and_file_are_told_at_once(model: Path, tmp_path: Path) -> None:
    long = {"prompt": "q" * 90, "completion": "a"}
    train = write(tmp_path / "train.jsonl", row(0), "{\n", long, row(1), {"prompt": "x"})
    held_out = write(tmp_path / "held_out.jsonl", long, row(2))
    with pytest.raises(UserError) as caught:
        load(model, train=train, validation=held_out, max_length=64)
    first, *lines = str(caught.value).splitlines()
    assert first == "4 bad row(s):"
    cut = "nothing of the answer is within data.max_length 64"
    for line in (f"{train}:2: not JSON", f"{train}:3: {cut}", f'{train}:5: no "completion"'):
        assert any(found.startswith(line) for found in lines)
    assert lines[-1] == f"{held_out}:1: {cut}"


def test_bad_rows_are_skipped_and_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.jsonl", "{\n" * 7, row(0), {"prompt": "x"}, row(1))
    held_out = write(tmp_path / "held_out.jsonl", row(2), "[]\n", row(3))
    data = DataParams(train=train, validation=held_out, on_bad_row="skip")
    found, other = load_splits(data, model, VOCABULARY)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "9 bad row(s) are skipped (data.on_bad_row: skip), such as"
    assert len(said) == 6
    assert said[1].startswith(f"  {train}:1: not JSON")
    assert (found.facts.rows, found.facts.skipped_rows) == (2, 8)
    assert (other.facts.rows, other.facts.skipped_rows) == (2, 1)
    # rows and sequences stay together
    assert [r.answer for r in rows_of(other, data, None)] == ["answer 2", "answer 3"]
    assert [r.answer for r in rows_of(other, data, 1)] == ["answer 2"]
    with pytest.raises(UserError, match=r"train\.jsonl has no rows that are good"):
        load(model, train=write(tmp_path / "train.jsonl", "{\n"), validation=held_out,
             on_bad_row="skip")  # fmt: skip


def test_long_rows_are_cut_or_bad(model: Path, tmp_path: Path) -> None:
    long = {"prompt": "q", "completion": "a" * 90}
    train = write(tmp_path / "train.jsonl", row(0), long)
    files: dict[str, Any] = {"train": train, "validation": write(tmp_path / "v.jsonl", row(1))}
    found, _ = load(model, **files, max_length=64)
    assert found.facts.truncated_rows == 1
    with pytest.raises(UserError) as caught:
        load(model, **files, max_length=64, on_long_row="bad")
    assert f"{train}:2: 95 tokens, more than data.max_length 64" in str(caught.value)
    found, _ = load(model, **files, max_length=64, on_long_row="bad", on_bad_row="skip")
    assert (found.facts.rows, found.facts.truncated_rows, found.facts.skipped_rows) == (1, 0, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("on_bad_row", "ignore"),
        ("on_long_row", "split"),
        ("packing", "yes"),
        ("revision", "main"),
        ("validation_share", 0.0),
        ("validation_share", 1.0),
        ("validation_seed", "x"),
        ("train", ""),
    ],
)
def test_wrong_values_are_refused_by_key(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"data\.{key}: found .*\("):
        check_params({"data": {key: value}})


def test_how_far_it_is_is_said(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_LINE_SECONDS", 0.0)
    train = write(tmp_path / "train.jsonl", *(row(i) for i in range(10)))
    load(model, train=train, validation=write(tmp_path / "v.jsonl", row(20)))
    said = capsys.readouterr().out
    for done in (4, 8, 10):
        assert f"{train}: {done} rows tokenized, " in said


# --- held out --------------------------------------------------------------------------------------


def answers(split: TokenizedSplit, data: DataParams) -> set[str]:
    return {found.answer for found in rows_of(split, data, None)}


def test_a_share_is_held_out_whatever_the_order(model: Path, tmp_path: Path) -> None:
    rows = [row(i) for i in range(60)]
    train = write(tmp_path / "train.jsonl", *rows)
    data = DataParams(train=train, validation=None, validation_share=0.2)
    kept, away = load_splits(data, model, VOCABULARY)
    assert (kept.facts.rows, away.facts.rows) == (48, 12)
    held_out = answers(away, data)
    assert held_out | answers(kept, data) == {r["completion"] for r in rows}
    assert load_validation(data, load_tokenizer(model), VOCABULARY) == away
    random.Random(1).shuffle(rows)
    write(tmp_path / "train.jsonl", *rows)
    assert answers(load_splits(data, model, VOCABULARY)[1], data) == held_out
    other = data.model_copy(update={"validation_seed": 1})
    assert answers(load_splits(other, model, VOCABULARY)[1], other) != held_out


def test_rows_alike_are_on_one_side(model: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", *[row(i % 10) for i in range(40)])
    data = DataParams(train=train, validation=None, validation_share=0.3)
    kept, away = load_splits(data, model, VOCABULARY)
    assert answers(kept, data).isdisjoint(answers(away, data))
    assert (kept.facts.rows, away.facts.rows) == (28, 12)
    write(tmp_path / "train.jsonl", *[row(0)] * 3)
    with pytest.raises(UserError, match=r"3 rows are too few, or too much alike"):
        load_splits(data, model, VOCABULARY)


def test_the_folders_own_validation_file_comes_first(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl", *(row(i) for i in range(10)))
    write(folder / "validation.jsonl", row(20))
    data = DataParams(train=str(folder), validation=None)
    kept, away = load_splits(data, model, VOCABULARY)
    assert (kept.facts.rows, away.facts.rows) == (10, 1)
    assert load_validation(data, load_tokenizer(model), VOCABULARY) == away


def test_the_same_rows_are_not_held_out(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", row(0))
    with pytest.raises(UserError, match=r"both name .*data\.validation to null"):
        find_sources(DataParams(train=train, validation=train))


# --- learning to stop ------------------------------------------------------------------------------


def test_a_text_is_continued_and_a_call_is_expected_as_it_is_written(model: Path) -> None:
    from fitlora.data.formats import make_row

    tokenizer = load_tokenizer(model)
    text = make_row({"text": "first second"}, "text")
    (question,) = make_questions([text], tokenizer)
    assert (question.prompt, question.expected) == ("first ", "second")
    assert tokenizer.decode(list(question.tokens)).strip() == "first"
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] or '' }}"
        "{% for c in m.get('tool_calls', []) %}{{ c['name'] }}(){% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [{"name": "look"}]},
    ]
    call = make_row({"messages": messages}, "messages")
    (question,) = make_questions([call], tokenizer)
    assert (question.prompt, question.expected) == ("q", "look()")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_a_model_learns_to_stop_where_padding_is_the_end(kind: str, tmp_path: Path) -> None:
    """Trained for a while on two rows, it says them and ends, with a pad token that is the eos."""
    import torch

    from fitlora.evaluation.answers import generate_answers
    from fitlora.params import LoraParams, QuantizationParams
    from fitlora.step.weights import CheckpointWeights
    from tests.step import steps
    from tests.tiny_models import make_checkpoint

    folder = make_checkpoint(tmp_path / "model", "llama", dtype=torch.float32)
    tokenizer = make_tokenizer(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    content: list[Any] = [{"prompt": "a", "completion": "xy"}, {"prompt": "b", "completion": "zzz"}]
    if kind == "text":
        content = [{"text": "abxyzw"}, {"text": "bcdefgh"}]
    train = write(tmp_path / "train.jsonl", *content)
    data = DataParams(train=train, validation=write(tmp_path / "v.jsonl", *content))
    rows, validation = load_splits(data, folder, VOCABULARY)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id

    settings = StepSettings(
        QuantizationParams(bits=16), LoraParams(r=16, alpha=32, dropout=0.0), TrainParams()
    )
    plan = steps.plan(effective_batch_size=2, micro_batch_size=2)
    config = load_config(folder)
    step = build_step(
        config, plan, settings, CheckpointWeights(folder, torch.device("cpu"), seed=0)
    )
    for index in range(100):
        step.run(rows.sequences, step=index, learning_rate=1e-2)
    found = rows_of(validation, data, None)
    questions = make_questions(found, tokenizer)
    given = generate_answers(
        step,
        questions,
        tokenizer,
        ends=end_tokens(folder, config, tokenizer, found),
        max_new_tokens=20,
        rows=2,
        advance=lambda count: None,
    )
    assert given == [question.expected for question in questions]
