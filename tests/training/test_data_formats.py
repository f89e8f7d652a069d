"""Every form that a row may have, and what it becomes."""

import json
from pathlib import Path
from typing import Any

import pytest

from fitlora.data.formats import FORMATS, format_of, make_row
from fitlora.data.templates import load_tokenizer
from fitlora.errors import UserError
from fitlora.params import DataParams, check_params
from tests.rows import rows_in, tokenized
from tests.tiny_models import VOCABULARY, make_tokenizer

ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
BRIEF = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"key": "x"}}}

SAME: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    ("messages", {"messages": ASKED}, ASKED),
    ("messages", {"messages": ASKED, "text": "rendered by somebody", "id": 5}, ASKED),
    ("messages", {"messages": json.dumps(ASKED)}, ASKED),  # as a CSV has them
    ("messages", {"conversations": ASKED}, ASKED),
    (
        "messages",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        ASKED,
    ),
    (
        "messages",
        {"conversations": [{"from": "system", "value": "s"}, *ASKED]},
        [BRIEF, *ASKED],
    ),
    ("messages", {"messages": [{**ASKED[0], "tool_calls": None}, ASKED[1]]}, ASKED),  # Parquet
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": t, "image": None} for t in ("a", "")],
                },
            ]
        },
        ASKED,
    ),
    ("prompt-completion", {"prompt": "q", "completion": "a"}, ASKED),
    ("prompt-completion", {"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
    ("prompt-completion", {"system": "s", "prompt": "q", "completion": "a"}, [BRIEF, *ASKED]),
    ("instruction", {"instruction": "q", "output": "a"}, ASKED),
    ("instruction", {"instruction": "q", "input": "", "output": "a", "text": "x"}, ASKED),
    (
        "instruction",
        {"instruction": "q", "input": "more", "output": "a"},
        [{"role": "user", "content": "q\n\nmore"}, ASKED[1]],
    ),
]


@pytest.mark.parametrize(("kind", "content", "messages"), SAME)
def test_forms_are_told_by_their_columns(
    kind: Any, content: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    assert format_of(content) == kind
    assert make_row(content, kind).messages == messages


def test_a_form_that_is_named_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": ASKED, "text": "a text"}))
    (row,) = rows_in(path, format="text")
    assert (row.text, row.messages) == ("a text", [])
    with pytest.raises(UserError, match=r'rows\.jsonl:1: no "instruction"'):
        rows_in(path, format="instruction")


def test_forms_in_params_are_those_that_there_are() -> None:
    for kind in ("auto", *FORMATS):
        assert check_params({"data": {"format": kind}}).data.format == kind
    with pytest.raises(UserError, match=r"data\.format: found 'alpaca'.*'instruction'"):
        check_params({"data": {"format": "alpaca"}})


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"messages": [{"role": "user", "content": []}, ASKED[1]]},
        "message 0 has content that is no text",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image", "text": "q"}]}, ASKED[1]]},
        "message 0 has content that is no text",
    ),
    ({"messages": [*ASKED, {"role": "assistant", "tool_calls": []}]}, "no text"),
    (
        {"messages": [{"role": "user", "content": "q", "tool_calls": [CALL]}, ASKED[1]]},
        "tool_calls",
    ),
    ({"messages": ASKED, "tools": "no JSON"}, '"tools" is no list'),
    ({"conversations": [{"from": "robot", "value": "q"}, ASKED[1]]}, "role 'robot'"),
    ({"conversations": [{"from": ["x"], "value": "q"}]}, "role"),
    ({"prompt": 5, "completion": "a"}, '"prompt" is no text'),
    ({"instruction": "q", "input": 5, "output": "a"}, '"input" is no text'),
    ({"prompt": "q\ud800", "completion": "a"}, '"prompt" has half a character'),
]


@pytest.mark.parametrize(("content", "reason"), BAD)
def test_what_is_wrong_with_a_row(content: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_row(content, format_of(content))


# --- through the template --------------------------------------------------------------------------


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    make_tokenizer(tmp_path / "model")
    return load_tokenizer(tmp_path / "model")


def write(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


def test_a_text_is_learned_whole_and_ends(tokenizer: Any, tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "once"}, {"text": "twice</s>"}, {"messages": ASKED})
    found = tokenized(path, tokenizer, vocabulary=VOCABULARY)
    texts = [tokenizer.decode(list(s.tokens)) for s in found.sequences]
    assert texts == ["once</s>", "twice</s>", "<|user|>q</s><|assistant|>a</s>"]
    assert [sum(s.learned) for s in found.sequences] == [5, 6, 2]
    assert found.facts.formats == {"messages": 1, "text": 2}


CALLS = (  # a template that knows tools
    "{% if tools %}[{{ tools[0]['name'] }}]{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% for call in m.get('tool_calls', []) %}"
    "{{ call['function']['name'] }}({{ call['function']['arguments'] | tojson }}){% endfor %}"
    "</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
USES_A_TOOL = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "found"},
    {"role": "assistant", "content": "a"},
]


def test_tool_calls_are_answers_as_the_template_writes_them(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = CALLS
    path = write(tmp_path, {"messages": USES_A_TOOL, "tools": [{"name": "look_up"}]})
    (sequence,) = tokenized(path, tokenizer, vocabulary=VOCABULARY).sequences
    assert tokenizer.decode(list(sequence.tokens)) == (
        '[look_up]<|user|>q</s><|assistant|>look_up({"key": "x"})</s><|tool|>found</s>'
        "<|assistant|>a</s>"
    )
    learned = [t for t, on in zip(sequence.tokens, sequence.learned, strict=True) if on]
    assert tokenizer.decode(learned) == 'look_up({"key": "x"})</s>a</s>'


@pytest.mark.parametrize("train_on", ["answers", "all"])
def test_a_template_without_tool_calls_is_told(
    tokenizer: Any, tmp_path: Path, train_on: str
) -> None:
    path = write(tmp_path, {"messages": ASKED}, {"messages": USES_A_TOOL})
    with pytest.raises(
        UserError, match=r"rows\.jsonl:2: the chat template leaves the call of look_up"
    ):
        tokenized(path, tokenizer, vocabulary=VOCABULARY, train_on=train_on)


def test_defaults_are_those_of_the_shipped_run() -> None:
    data = DataParams()
    assert (data.format, data.on_bad_row, data.on_long_row) == ("auto", "stop", "truncate")
    assert not data.packing
