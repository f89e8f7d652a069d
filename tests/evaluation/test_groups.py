"""Which held-out rows belong together."""

import json
from pathlib import Path

import pytest

from fitlora.data.sources import find_source
from fitlora.data.templates import load_tokenizer
from fitlora.evaluation.groups import by_length, by_source, sources_of
from fitlora.params import DataParams
from fitlora.training.data import TokenizedSplit, tokenize
from tests.evaluation.forms import Tiny


@pytest.mark.parametrize(
    ("tokens", "groups"),
    [
        (
            [5, 1, 4, 2, 6, 3],
            {"1 to 2 tokens": [1, 3], "3 to 4 tokens": [2, 5], "5 to 6 tokens": [0, 4]},
        ),
        ([7, 7, 7, 7], {"7 tokens": [0, 1, 2, 3]}),
        ([1, 9, 1, 1], {"1 tokens": [0, 2, 3], "9 tokens": [1]}),
        ([3], {"3 tokens": [0]}),
        ([8, 3], {"3 tokens": [1], "8 tokens": [0]}),
    ],
)  # fmt: skip
def test_thirds_by_length(tokens: list[int], groups: dict[str, list[int]]) -> None:
    assert by_length(tokens) == groups


def test_every_row_is_in_one_group_by_length() -> None:
    for rows in range(1, 40):
        tokens = [(i * 7919) % 11 for i in range(rows)]
        found = [row for group in by_length(tokens).values() for row in group]
        assert sorted(found) == list(range(rows))


def test_sources_are_groups_where_several_are_named() -> None:
    assert by_source(["b", "a", None, "b"]) == {"a": [1], "b": [0, 3]}
    assert by_source(["a", None, "a"]) == {}
    assert by_source([None, None]) == {}


def split_of(tiny: Tiny, path: Path) -> TokenizedSplit:
    source = find_source(str(path), "data.validation", "validation", None)
    return tokenize(source, load_tokenizer(tiny.original), DataParams(), vocabulary=288)


def row(prompt: str, **more: object) -> str:
    return json.dumps({"prompt": prompt, "completion": "yes", **more}) + "\n"


def test_source_is_a_column_or_else_the_file(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "validation-1.jsonl").write_text(row("a", source="wiki") + row("b"))
    (tmp_path / "validation-2.jsonl").write_text(row("c", source=7) + row("d", source="news"))
    names = ["wiki", "validation-1.jsonl", "validation-2.jsonl", "news"]
    assert sources_of(split_of(tiny, tmp_path), None) == names
    assert sources_of(split_of(tiny, tmp_path), 2) == names[:2]
    alone = split_of(tiny, tmp_path / "validation-1.jsonl")
    assert sources_of(alone, None) == ["wiki", None]
