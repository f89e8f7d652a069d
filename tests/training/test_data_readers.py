"""Files, folders and hub splits: what is read, in what order, and what cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest

from fitlora.data.readers import Record, read_records
from fitlora.data.sources import HubSplit, Source, fact, find_source, held_out_of
from fitlora.errors import UserError
from fitlora.params import DataParams
from fitlora.pipeline.profile_hardware import data_facts
from tests.rows import rows_in

ASKED = {"prompt": "q", "completion": "a"}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def read(path: Path, content: bytes) -> list[tuple[int, Any]]:
    """By line: the row, or the reason why there is none."""
    path.write_bytes(content)
    records = list(read_records(Source(str(path), (path,))))
    assert {record.place for record in records} <= {str(path)}
    return [(r.line, r.content if r.problem is None else r.problem) for r in records]


def test_json_arrays(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = [{"text": "a\nb"}, {"text": "ü"}]
    for indent in (None, 1):
        found = read(path, json.dumps(rows, indent=indent, ensure_ascii=False).encode())
        assert [content for _, content in found] == rows
    assert [line for line, _ in found] == [2, 5]
    assert [c for _, c in read(path, b"\xef\xbb\xbf" + json.dumps(rows).encode())] == rows
    assert read(path, b" [ ] ") == []
    assert read(path, b'{"text": "x"}\n{"text": "y"}\n') == [(1, {"text": "x"}), (2, {"text": "y"})]


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b'[{"a": 1},\n {"a": 2,}\n]', 2, "not JSON"),
        (b'[{"a": 1},\n {"a": "\xff"}]', 2, "not UTF-8"),
        (b'[{"a": 1}\n {"a": 2}]', 2, "without a comma"),
        (b'[{"a": 1},\n', 2, "no end"),
        (b'[{"a": 1}\n', 2, "without a comma"),
        (b'[{"a": 1}]\n[]', 1, "something follows"),
        (b'"text"', 1, "not a JSON array"),
    ],
)
def test_broken_json_arrays(content: bytes, line: int, reason: str, tmp_path: Path) -> None:
    found = read(tmp_path / "rows.json", content)
    assert found[-1][0] == line
    assert reason in found[-1][1]
    assert all(found[0] == (1, {"a": 1}) for _ in found[1:])


def test_rows_after_a_bad_one_in_an_array_are_read(tmp_path: Path) -> None:
    found = read(tmp_path / "rows.json", b'[{"a": "\xff"}, {"a": 1}]')
    assert found == [(1, "not UTF-8"), (1, {"a": 1})]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = "x" * 200_000  # beyond the csv module's own limit
    content = f'\ufeffprompt, completion\r\n"two\nlines","say ""a"""\r\n\r\n{long},ü\r\n'
    assert read(path, content.encode()) == [
        (2, {"prompt": "two\nlines", "completion": 'say "a"'}),
        (5, {"prompt": long, "completion": "ü"}),
    ]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_without_commas_is_told_once(tmp_path: Path, mark: str) -> None:
    content = f"prompt{mark}completion\nq{mark}a\nq{mark}a\n"
    ((line, reason),) = read(tmp_path / "rows.csv", content.encode())
    assert line == 1
    assert reason == f"one column, {f'prompt{mark}completion'!r}: fields are separated by commas"


def test_bad_rows_of_a_csv_are_all_named(tmp_path: Path) -> None:
    content = b'prompt,completion\na,b\nonly\na,b,c\na,\xff\n"a"x,b\na,b\n"no end,\n'
    assert read(tmp_path / "rows.csv", content) == [
        (2, {"prompt": "a", "completion": "b"}),
        (3, "1 fields, and the header has 2"),
        (4, "3 fields, and the header has 2"),
        (5, "not UTF-8"),
        (6, "not CSV (',' expected after '\"')"),
        (7, {"prompt": "a", "completion": "b"}),
        (8, "not CSV (unexpected end of data)"),
    ]


def test_a_mark_within_a_file_is_named(tmp_path: Path) -> None:
    """As where files with a byte order mark were put together."""
    row = json.dumps(ASKED).encode()
    found = read(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + row + b"\n\xef\xbb\xbf" + row)
    assert found == [(1, ASKED), (2, "not JSON (a byte order mark within the file)")]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    call = {"role": "assistant", "content": "a", "name": "n"}
    rows = [{"messages": [{"role": "user", "content": "q", "name": None}, call]}] * 3
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    found = rows_in(path)
    assert [row.line for row in found] == [1, 2, 3]
    assert found[0].messages == [{"role": "user", "content": "q"}, call]
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"rows\.parquet is no Parquet file"):
        rows_in(path)


def test_a_hub_split_is_loaded_at_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((args, options))
        return [ASKED]

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = find_source("someone/rows:main:test", "data.train", "train", COMMIT)
    assert list(read_records(source)) == [Record("someone/rows:main:test", 1, ASKED)]
    assert asked == [(("someone/rows", "main"), {"split": "test", "revision": COMMIT})]

    def fail(*args: Any, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        UserError, match=f"someone/rows.* at {COMMIT} could not be fetched: no netw"
    ):
        list(read_records(source))


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("someone/rows", HubSplit("someone/rows", None, "validation", COMMIT)),
        ("someone/rows:test", HubSplit("someone/rows", None, "test", COMMIT)),
        ("someone/rows:main:test", HubSplit("someone/rows", "main", "test", COMMIT)),
    ],
)
def test_hub_ids(name: str, hub: HubSplit) -> None:
    assert find_source(name, "data.validation", "validation", COMMIT).hub == hub
    with pytest.raises(UserError, match=r"data\.validation someone/rows.*data\.revision"):
        find_source(name, "data.validation", "validation", None)


@pytest.mark.parametrize("name", ["rows.jsonl", "some/rows.csv", "/nowhere/at/all", "a/b/c"])
def test_what_is_nowhere_is_missing(name: str) -> None:
    with pytest.raises(UserError, match=r"is missing \(data\.train\)"):
        find_source(name, "data.train", "train", COMMIT)


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text("[]")
    return folder


def test_a_folder_of_splits(tmp_path: Path) -> None:
    folder = touch(
        tmp_path, "train-2.jsonl", "train-1.jsonl", "validation.jsonl", "README.md", "test.jsonl"
    )
    train = find_source(str(folder), "data.train", "train", None)
    assert [file.name for file in train.files] == ["train-1.jsonl", "train-2.jsonl"]
    held_out = held_out_of(train)
    assert held_out is not None
    assert [file.name for file in held_out.files] == ["validation.jsonl"]
    assert find_source(str(folder), "data.validation", "validation", None) == held_out
    (folder / "validation.jsonl").unlink()
    assert held_out_of(train) is None
    with pytest.raises(UserError, match=r"none named validation\.\*"):
        find_source(str(folder), "data.validation", "validation", None)


def test_a_folder_of_one_kind(tmp_path: Path) -> None:
    folder = touch(tmp_path / "rows", "b.json", "a.json", "notes.txt")
    found = find_source(str(folder), "data.train", "train", None)
    assert [file.name for file in found.files] == ["a.json", "b.json"]
    touch(folder, "c.csv")
    with pytest.raises(UserError, match=r"files of several kinds \(\.csv, \.json\)"):
        find_source(str(folder), "data.train", "train", None)
    with pytest.raises(UserError, match="has no files of rows"):
        find_source(str(touch(tmp_path / "empty", "x.txt")), "data.train", "train", None)
    with pytest.raises(UserError, match=r"rows are read from \.jsonl, \.json, \.csv and \.parquet"):
        find_source(str(tmp_path / "empty/x.txt"), "data.train", "train", None)


# --- what the pipeline depends on --------------------------------------------------------------------


def test_facts_follow_the_content(tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    folder = touch(tmp_path / "rows", "train.jsonl", "validation.jsonl")

    def facts(**changes: Any) -> tuple[str | None, str | None]:
        base = {"train": str(folder), "validation": str(folder)}
        found = data_facts(DataParams(**{**base, **changes}), cache)
        return found.train, found.validation

    first = facts()
    assert None not in first
    assert facts() == facts(validation=None) == first  # the folder's own validation file
    (folder / "train.jsonl").write_text("[5]")
    second = facts()
    assert second[0] != first[0]
    assert second[1] == first[1]
    alone = facts(train=str(folder / "train.jsonl"), validation=None)
    assert alone[0] == alone[1]  # validation is split from it
    assert facts(train="someone/rows", revision=COMMIT)[0] == f"someone/rows@{COMMIT}"
    assert facts(train="nowhere.jsonl") == (None, first[1])


def test_a_fact_covers_every_file(tmp_path: Path) -> None:
    folder = touch(tmp_path, "a.jsonl", "b.jsonl")
    seen: list[Path] = []

    def keep(files: Any) -> str:
        seen.extend(files)
        return "sum"

    assert fact(find_source(str(folder), "data.train", "train", None), keep) == "sum"
    assert [file.name for file in seen] == ["a.jsonl", "b.jsonl"]
