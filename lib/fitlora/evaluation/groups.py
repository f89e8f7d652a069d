"""Held-out rows in groups: by length, and by where they come from, if the data says so."""

from collections.abc import Sequence

from fitlora.data.readers import read_records
from fitlora.training.data import TokenizedSplit

_LENGTHS = 3  # groups by length, about as many rows in each
_COLUMN = "source"


def by_length(tokens: Sequence[int]) -> dict[str, list[int]]:
    """Positions of rows by their tokens, shortest first: about equal thirds.

    Rows of one length are in one group; fewer groups where lengths do not tell that many apart.
    """
    order = sorted(tokens)
    bounds = sorted({order[len(order) * part // _LENGTHS - 1] for part in range(1, _LENGTHS + 1)
                     if len(order) * part // _LENGTHS})  # fmt: skip
    groups: dict[str, list[int]] = {}
    low = order[0]
    for bound in bounds:
        inside = [i for i, count in enumerate(tokens) if low <= count <= bound]
        shortest = min(tokens[i] for i in inside)
        name = f"{bound} tokens" if shortest == bound else f"{shortest} to {bound} tokens"
        groups[name] = inside
        low = bound + 1
    return groups


def by_source(names: Sequence[str | None]) -> dict[str, list[int]]:
    """Positions of rows by their source's name; none where fewer than two are named."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if name is not None:
            groups.setdefault(name, []).append(index)
    return dict(sorted(groups.items())) if len(groups) > 1 else {}


def sources_of(split: TokenizedSplit, count: int | None) -> list[str | None]:
    """Where each of the split's first `count` rows comes from: its column "source", or else its file."""
    wanted = [sequence.sample for sequence in split.sequences[:count]]
    among = set(wanted)
    several = len(split.source.files) > 1
    names: dict[int, str | None] = {}
    for position, record in enumerate(read_records(split.source)):
        if position in among:
            content = record.content
            named = content.get(_COLUMN) if isinstance(content, dict) else None
            file = record.place.rpartition("/")[2] if several else None
            names[position] = named if isinstance(named, str) and named else file
    return [names[position] for position in wanted]
