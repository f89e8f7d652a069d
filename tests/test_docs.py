"""The documents: docs/params.md is what `make docs` writes, every command in them exists, and the rows
of data that they show are read as they say."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest

from fitlora import params
from fitlora.cli import main
from fitlora.data.formats import FORMATS, format_of, make_row
from scripts import make_docs

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "docs/troubleshooting.md", "docs/params.md"]


def commands(document: str) -> list[str]:
    """The lines of a document's code blocks that run fitlora, without comments."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in blocks if not kind for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.partition("  #")[0].split("&&")]
    return [part for part in parts if part.startswith("fitlora ")]


def test_params_are_described_as_they_are_defined() -> None:
    assert (ROOT / "docs/params.md").read_text(encoding="utf-8") == make_docs.text(), "make docs"


def test_every_key_is_described() -> None:
    rows = re.findall(
        r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.+) \|$", make_docs.text(), re.MULTILINE
    )
    names = [name for name, *_ in rows]
    assert set(params.keys()) <= set(names)
    assert len(names) == len(set(names)) > 50
    assert all(meaning.strip() and allowed.strip() for _, _, allowed, meaning in rows)


def test_documents_have_commands() -> None:
    assert len(commands("docs/troubleshooting.md")) > 10
    assert len(commands("README.md")) >= 4


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_documents_parse(document: str) -> None:
    for line in commands(document):
        name, *arguments = shlex.split(line)[1:]
        command = main.commands[name]
        with click.Context(main) as parent:
            parent.obj = {"debug": False, "root": None}
            context = command.make_context(name, arguments, parent=parent)
        for change in context.params.get("changes", ()):
            key = change.partition("=")[0]
            assert key in set(params._every_path()), line


@pytest.mark.parametrize("document", ["README.md", "docs/troubleshooting.md"])
def test_keys_in_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    sections = "|".join(params.Params.model_fields)
    named = re.findall(rf"`((?:{sections})\.[\w.]+?)(?:: [^`]*)?`", text)
    assert named
    assert set(named) <= set(params._every_path())


def test_rows_in_the_readme_are_what_it_says() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("### The forms of data")[2].partition("## The command line")[0]
    shown = re.findall(r"^\| (?:`([\w-]+)`)? ?\| `(\{.*\})` \|$", section, re.MULTILINE)
    kinds = []
    for name, row in shown:
        kinds.append(name or kinds[-1])
        content = json.loads(row)
        assert format_of(content) == kinds[-1]
        make_row(content, format_of(content))
    assert set(kinds) == set(FORMATS)
    (block,) = re.findall(r"^```\n(\{.*?)^```$", section, re.DOTALL | re.MULTILINE)
    row = make_row(json.loads(block), "messages")
    assert row.tools is not None
    assert [m["role"] for m in row.messages] == ["user", "assistant", "tool", "assistant"]
