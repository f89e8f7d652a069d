"""The rows of a run as sequences of tokens, and the facts about them that planning needs.

Rows are read, checked, put through the template and tokenized in a stream, so that what is held is
their tokens and nothing else. A bad row (one that cannot be read, has a field missing, no answer, or
none within the limit) has a place and a reason; all of them are reported at once, or skipped and
counted where params say so.
"""

import hashlib
import json
import struct
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import tee
from pathlib import Path
from typing import Any

from fitlora.artifacts import Padding, Percentiles, SequenceSize, Split
from fitlora.console import say
from fitlora.data.encoding import encode
from fitlora.data.formats import Format, Row, format_of, make_row
from fitlora.data.packing import pack, padding_share
from fitlora.data.readers import read_records
from fitlora.data.sources import Source, find_source, held_out_of
from fitlora.data.templates import load_tokenizer
from fitlora.errors import UserError
from fitlora.params import DataParams
from fitlora.step.batch import TokenSequence

_SHOWN = 20  # problems listed in one message; the rest are counted
_SHOWN_SKIPPED = 5
_LINE_SECONDS = 5.0  # between two lines that say how far it is


@dataclass(frozen=True)
class TokenizedSplit:
    """Rows as sequences, packed ones where params say so, and the facts that planning needs."""

    sequences: Sequence[TokenSequence]
    facts: Split
    source: Source


@dataclass
class BadRows:
    """What is wrong with rows, with their places: the first few in words, the rest as a number."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, place: str, line: int, reason: str) -> None:
        """Counts one."""
        self.count += 1
        if self.count <= _SHOWN:
            self.first.append(f"{place}:{line}: {reason}")

    def check(self, on_bad_row: str) -> None:
        """Raises UserError that lists them, or says what is skipped."""
        if not self.count:
            return
        if on_bad_row == "skip":
            say(f"{self.count} bad row(s) are skipped (data.on_bad_row: skip), such as")
            for problem in self.first[:_SHOWN_SKIPPED]:
                say(f"  {problem}")
            return
        more = self.count - _SHOWN
        tail = [f"and {more} more"] if more > 0 else []
        raise UserError("\n".join([f"{self.count} bad row(s):", *self.first, *tail]))


def read_rows(source: Source, data: DataParams, bad: BadRows) -> Iterator[tuple[int, Format, Row]]:
    """The good rows of a source: their position among all, their form, and themselves."""
    for position, record in enumerate(read_records(source)):
        if record.problem is not None:
            bad.add(record.place, record.line, record.problem)
            continue
        try:
            kind: Format = format_of(record.content) if data.format == "auto" else data.format
            row = make_row(record.content, kind, place=record.place, line=record.line)
        except ValueError as error:
            bad.add(record.place, record.line, str(error))
            continue
        yield position, kind, row


def rows_of(split: TokenizedSplit, data: DataParams, count: int | None) -> list[Row]:
    """The rows of the split's first `count` sequences, which are not packed; None: of all."""
    wanted = [sequence.sample for sequence in split.sequences[:count]]
    among = set(wanted)
    rows = {p: row for p, _, row in read_rows(split.source, data, BadRows()) if p in among}
    return [rows[position] for position in wanted]


@dataclass
class _Tokens:
    """The sequences of a source, and what is known of each beside its tokens."""

    source: Source
    sequences: list[TokenSequence] = field(default_factory=list)
    kinds: list[Format] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    truncated: set[int] = field(default_factory=set)
    rewritten: dict[int, int] = field(default_factory=dict)
    bad: int = 0

    def split(self, indices: Sequence[int] | None = None) -> TokenizedSplit:
        """All of them, or some, as a split."""
        chosen = range(len(self.sequences)) if indices is None else indices
        sequences = [self.sequences[index] for index in chosen]
        facts = _facts(self.source.name, sequences).model_copy(
            update={
                "formats": dict(sorted(Counter(self.kinds[index] for index in chosen).items())),
                "truncated_rows": sum(index in self.truncated for index in chosen),
                "skipped_rows": self.bad,
                "rewritten_answers": sum(self.rewritten.get(index, 0) for index in chosen),
            }
        )
        return TokenizedSplit(sequences, facts, self.source)


def tokenize(
    source: Source, tokenizer: Any, data: DataParams, *, vocabulary: int
) -> TokenizedSplit:
    """Reads and tokenizes all rows of a source.

    vocabulary: the model's, to catch a tokenizer that belongs to another model. Raises UserError for
    bad rows, those among them that are left without an answer by the cut, and where no row is left.
    """
    bad = BadRows()
    found = _tokenize(source, tokenizer, data, vocabulary, bad)
    bad.check(data.on_bad_row)
    _check_some(found)
    return found.split()


def _check_some(found: _Tokens) -> None:
    if not found.sequences:
        raise UserError(
            f"{found.source.name} has no rows{' that are good' if found.bad else ''}; add some, or name "
            "another file (data.train, data.validation)"
        )


def _tokenize(
    source: Source, tokenizer: Any, data: DataParams, vocabulary: int, bad: BadRows
) -> _Tokens:
    found, before, limit = _Tokens(source), bad.count, token_limit(data)
    start = spoken = time.monotonic()
    rows, ahead = tee(read_rows(source, data, bad))
    encoded = encode(tokenizer, (row for _, _, row in ahead), data.train_on)
    for done, ((position, kind, row), tokens) in enumerate(zip(rows, encoded, strict=True), 1):
        ids, learned, problem = tokens.ids, tokens.learned, tokens.problem
        long = len(ids) > limit
        if problem is None and long and data.on_long_row == "bad":
            problem = f"{len(ids)} tokens, more than data.max_length {limit}"
        if long:
            ids, learned = ids[:limit], learned[:limit]
        if problem is None and max(ids, default=0) >= vocabulary:
            raise UserError(
                f"{row.place}:{row.line}: token id {max(ids)} is beyond the model's {vocabulary}"
            )
        sequence = TokenSequence(position, ids, learned)
        if problem is None and sequence.target_tokens == 0:
            problem = f"nothing of the answer is within data.max_length {limit}"
        if problem is not None:
            bad.add(row.place, row.line, problem)
            continue
        if long:
            found.truncated.add(len(found.sequences))
        if tokens.rewritten:
            found.rewritten[len(found.sequences)] = tokens.rewritten
        found.sequences.append(sequence)
        found.kinds.append(kind)
        if data.validation is None:
            found.digests.append(_digest(row, data.validation_seed))
        now = time.monotonic()
        if now - spoken >= _LINE_SECONDS:
            spoken = now
            say(f"{source.name}: {done:,} rows tokenized, {done / (now - start):,.0f} rows/s")
    found.bad = bad.count - before
    return found


def token_limit(data: DataParams) -> int:
    """data.max_length, which has a number by now: `auto` is replaced when the first stage begins."""
    assert data.max_length != "auto"
    return data.max_length


def _digest(row: Row, seed: int) -> bytes:
    """8 bytes that follow from the row's content and the seed."""
    content = json.dumps([row.messages, row.tools, row.text], sort_keys=True)
    key = f"{seed}".encode()
    return hashlib.blake2b(content.encode(), digest_size=8, key=key).digest()


def _facts(source: str, sequences: Sequence[TokenSequence]) -> Split:
    lengths = sorted(len(s.tokens) for s in sequences)
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(struct.pack("<I", len(sequence.tokens)))
        digest.update(_little_endian(sequence.tokens))
        digest.update(bytes(sequence.learned))

    def at(share: float) -> int:
        return lengths[min(len(lengths) - 1, int(share * len(lengths)))]

    return Split(
        source=source,
        rows=len(sequences),
        formats={},
        tokens=sum(lengths),
        target_tokens=sum(s.target_tokens for s in sequences),
        truncated_rows=0,
        skipped_rows=0,
        length=Percentiles(p50=at(0.5), p90=at(0.9), p99=at(0.99), maximum=lengths[-1]),
        fingerprint=digest.hexdigest(),
    )


def _little_endian(tokens: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)


def longest(sequences: Sequence[TokenSequence], count: int) -> list[TokenSequence]:
    """The `count` heaviest, heaviest first; the earlier row where two are alike.

    By tokens, then by the longest part, which attention's scores grow with, then by learned tokens.
    """
    return [sequences[position] for position in longest_positions(sequences, count)]


def longest_positions(sequences: Sequence[TokenSequence], count: int) -> list[int]:
    """Where the `count` heaviest sequences are, heaviest first."""

    def weight(position: int) -> tuple[int, int, int, int]:
        s = sequences[position]
        return (-len(s.tokens), -max(s.lengths), -s.target_tokens, position)

    return sorted(range(len(sequences)), key=weight)[:count]


def sizes(sequences: Sequence[TokenSequence]) -> tuple[SequenceSize, ...]:
    """The sequences as far as memory is concerned."""
    return tuple(
        SequenceSize(
            tokens=len(s.tokens),
            target_tokens=s.target_tokens,
            parts=s.lengths if len(s.lengths) > 1 else (),
        )
        for s in sequences
    )


def load_splits(
    data: DataParams, folder: Path, vocabulary: int, *, trust_remote_code: bool = False
) -> tuple[TokenizedSplit, TokenizedSplit]:
    """Training and validation rows as params name them, with the tokenizer of the model's folder.

    Raises UserError that lists the bad rows of both. Validation rows are never packed.
    """
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    train_source, held_out = find_sources(data)
    bad = BadRows()
    found = _tokenize(train_source, tokenizer, data, vocabulary, bad)
    other = None if held_out is None else _tokenize(held_out, tokenizer, data, vocabulary, bad)
    bad.check(data.on_bad_row)
    for tokens in (found, other):
        if tokens is not None:
            _check_some(tokens)
    if other is None:
        kept, away = _parted(found, data.validation_share)
        train, validation = found.split(kept), found.split(away)
    else:
        train, validation = found.split(), other.split()
    if data.packing:
        train = replace(train, sequences=pack(train.sequences, token_limit(data)))
    return train, validation


def load_validation(data: DataParams, tokenizer: Any, vocabulary: int) -> TokenizedSplit:
    """The validation rows alone, the same as `load_splits` gives. Raises UserError for bad rows."""
    if data.validation is not None:
        held_out = _named_validation(data.validation, data)
        return tokenize(held_out, tokenizer, data, vocabulary=vocabulary)
    train_source, held_out_files = find_sources(data)
    if held_out_files is not None:
        return tokenize(held_out_files, tokenizer, data, vocabulary=vocabulary)
    bad = BadRows()
    found = _tokenize(train_source, tokenizer, data, vocabulary, bad)
    bad.check(data.on_bad_row)
    _check_some(found)
    return found.split(_parted(found, data.validation_share)[1])


def find_sources(data: DataParams) -> tuple[Source, Source | None]:
    """Where the rows to train on and those held out lie; None where train's are split.

    Raises UserError where there are none, or where both would be the same rows.
    """
    train = find_source(data.train, "data.train", "train", data.revision)
    if data.validation is None:
        return train, held_out_of(train)
    held_out = _named_validation(data.validation, data)
    if set(train.files) & set(held_out.files) or (train.hub and train.hub == held_out.hub):
        raise UserError(
            f"data.train and data.validation both name {held_out.name}, so nothing would be held out; "
            "name another, or set data.validation to null to split data.train"
        )
    return train, held_out


def _named_validation(name: str, data: DataParams) -> Source:
    return find_source(name, "data.validation", "validation", data.revision)


def _parted(found: _Tokens, share: float) -> tuple[list[int], list[int]]:
    """Positions that are kept for training, and that are held out.

    Rows with the lowest digests are held out, so that neither their order nor what rows are added
    elsewhere decides much, and rows that are alike are on the same side.
    """
    order = sorted(found.digests)
    limit = order[max(1, round(share * len(order))) - 1]
    kept = [i for i, digest in enumerate(found.digests) if digest > limit]
    away = [i for i, digest in enumerate(found.digests) if digest <= limit]
    if not kept:
        raise UserError(
            f"{found.source.name}: {len(order)} rows are too few, or too much alike, to hold a "
            f"data.validation_share of {share} out; name data.validation, or lower the share"
        )
    return kept, away


def _sample(sequence: TokenSequence) -> int:
    return sequence.sample


def padding_of(sequences: Sequence[TokenSequence], batch: int) -> Padding:
    """What padding `batch` sequences to the longest would cost, before packing and after."""
    # in the rows' own order, so that packing does not change what is said of them
    rows = [len(p.tokens) for p in sorted((p for s in sequences for p in s.parts), key=_sample)]
    packed = len(rows) > len(sequences)
    return Padding(
        batch=batch,
        rows_share=padding_share(rows, batch),
        packed_share=padding_share([len(s.tokens) for s in sequences], batch) if packed else None,
        sequences=len(sequences),
    )
