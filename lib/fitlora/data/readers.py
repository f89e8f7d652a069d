"""Rows out of files, each with its place; what cannot be read is handed on as a problem with a place.

JSONL, JSON and CSV have readers of their own, because a library that stops at the first bad line makes
the user find the others one run at a time. They hold one row at a time (JSON: one file), so that the
data may be larger than memory. Parquet comes through `pyarrow`, hub datasets through `datasets`: their
shape was checked when they were written.
"""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fitlora.data.sources import HubSplit, Source
from fitlora.errors import UserError

_BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """What stands at one place: some content, or the reason why there is none.

    line: of the file where the row begins, from 1; in Parquet and on the hub, the row's number.
    """

    place: str
    line: int
    content: Any
    problem: str | None = None


def read_records(source: Source) -> Iterator[Record]:
    """Every row of a source, in order; blank lines are none. Raises UserError for a missing split."""
    if source.hub is not None:
        yield from _read_hub(source.name, source.hub)
    for file in source.files:
        if file.suffix.lower() == ".csv":
            yield from _read_csv(file)
        elif file.suffix.lower() == ".parquet":
            yield from _read_parquet(file)
        elif file.suffix.lower() == ".json" and _is_array(file):
            yield from _read_json(file)
        else:
            yield from _read_lines(file)


def _read_lines(file: Path) -> Iterator[Record]:
    place = str(file)
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if number == 1:
                raw = raw.removeprefix(_BOM)
            if raw.strip():
                yield _parse(place, number, raw)


def _parse(place: str, line: int, raw: bytes) -> Record:
    try:
        return Record(place, line, json.loads(raw.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Record(place, line, None, f"not UTF-8 ({error.reason})")
    except json.JSONDecodeError as error:
        if raw.startswith(_BOM):
            return Record(place, line, None, "not JSON (a byte order mark within the file)")
        return Record(place, line, None, f"not JSON ({error.msg})")
    except (RecursionError, ValueError) as error:
        return Record(place, line, None, f"not JSON that can be read ({_beyond(error)})")


def _beyond(error: Exception) -> str:
    """Why Python reads no JSON that is JSON."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"


def _is_array(file: Path) -> bool:
    """Whether a .json file is an array of rows; many that are called so have an object a line."""
    with file.open("rb") as content:
        start = content.read(4096).removeprefix(_BOM).lstrip()
    return not start.startswith(b"{")


def _read_json(file: Path) -> Iterator[Record]:
    """The rows of an array, each by itself, so that a bad one has a line and the others are read."""
    place = str(file)
    # bytes that are no UTF-8 become lone surrogates, so that the row that has them can be named
    text = file.read_bytes().removeprefix(_BOM).decode("utf-8", errors="surrogateescape")
    decoder = json.JSONDecoder()
    position, line, counted = _skip(text, 0), 1, 0
    if not text[position:].strip():
        return
    if text[position] != "[":
        yield Record(place, 1, None, "not a JSON array of rows")
        return
    position = _skip(text, position + 1)
    first = True
    while position < len(text) and (text[position] != "]" or not first):
        line, counted = line + text.count("\n", counted, position), position
        try:
            content, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else _beyond(error)
            yield Record(
                place, line, None, f"not JSON ({reason}); the rest of the file was not read"
            )
            return
        bad = _has_raw_bytes(text[position:end])
        yield Record(place, line, None if bad else content, "not UTF-8" if bad else None)
        first = False
        position = _skip(text, end)
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] == "]":
            break
        else:
            line += text.count("\n", counted, position)
            yield Record(place, line, None, "not JSON (the array goes on without a comma)")
            return
    if position >= len(text):
        line += text.count("\n", counted, len(text))
        yield Record(place, line, None, "not JSON (the array has no end)")
    elif text[position + 1 :].strip():
        line += text.count("\n", counted, position)
        yield Record(place, line, None, "not JSON (something follows the array)")


def _skip(text: str, position: int) -> int:
    """Where the next character stands that is no blank."""
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _has_raw_bytes(text: str) -> bool:
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)


def _read_csv(file: Path) -> Iterator[Record]:
    """Rows as objects by the header's names, all text; an empty field is an empty text."""
    place = str(file)
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses long documents
    try:
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as content:
            reader = csv.reader(content, strict=True)
            header: list[str] | None = None
            while True:
                line = reader.line_num + 1
                try:
                    fields = next(reader, None)
                except csv.Error as error:
                    yield Record(place, line, None, f"not CSV ({error})")
                    continue
                if fields is None:
                    break
                if not any(field.strip() for field in fields):
                    continue
                if header is None:
                    header = [name.strip() for name in fields]
                    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
                        found = f"one column, {header[0]!r}: fields are separated by commas"
                        yield Record(place, line, None, found)
                        return
                    continue
                if any(_has_raw_bytes(field) for field in fields):
                    yield Record(place, line, None, "not UTF-8")
                elif len(fields) != len(header):
                    found = f"{len(fields)} fields, and the header has {len(header)}"
                    yield Record(place, line, None, found)
                else:
                    yield Record(place, line, dict(zip(header, fields, strict=True)))
    finally:
        csv.field_size_limit(limit)


def _read_parquet(file: Path) -> Iterator[Record]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as content:
            parts = content.iter_batches()
            yield from _numbered(str(file), (row for part in parts for row in part.to_pylist()))
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(f"{file} is no Parquet file that can be read: {error}") from None


def _read_hub(name: str, hub: HubSplit) -> Iterator[Record]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        rows = load_dataset(hub.dataset, hub.config, split=hub.split, revision=hub.revision)
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        raise UserError(
            f"the dataset {name} at {hub.revision} could not be fetched: {error}"
        ) from None
    yield from _numbered(name, rows)


def _numbered(place: str, rows: Any) -> Iterator[Record]:
    for number, row in enumerate(rows, start=1):
        yield Record(place, number, row)
