"""Rows of a file as the library reads them, for tests that are about something else."""

from pathlib import Path
from typing import Any

from fitlora.data.formats import Row
from fitlora.data.sources import Source
from fitlora.params import DataParams
from fitlora.training.data import BadRows, TokenizedSplit, read_rows, tokenize


def rows_in(path: Path, **data: Any) -> list[Row]:
    """The rows of a file; raises UserError for bad ones. data: params."""
    params, bad = DataParams(**data), BadRows()
    rows = [row for _, _, row in read_rows(Source(str(path), (path,)), params, bad)]
    bad.check(params.on_bad_row)
    return rows


def tokenized(path: Path, tokenizer: Any, *, vocabulary: int, **data: Any) -> TokenizedSplit:
    """A file's rows as sequences. data: params."""
    source = Source(str(path), (path,))
    return tokenize(source, tokenizer, DataParams(**data), vocabulary=vocabulary)
