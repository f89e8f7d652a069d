"""Where rows lie: a file, a folder of files, or a split of a hub dataset.

What is at a path is a path; only what is nowhere here is read as a hub id, which needs a revision, so
that every run gets the same rows. DVC cannot depend on a hub id, so the pipeline depends on `fact`,
which says for each of them what its content is.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fitlora.errors import UserError

KINDS = (".jsonl", ".json", ".csv", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")


@dataclass(frozen=True)
class HubSplit:
    """A split of a hub dataset at a full commit; config: None for the dataset's default one."""

    dataset: str
    config: str | None
    split: str
    revision: str


@dataclass(frozen=True)
class Source:
    """Files in the order in which they are read, or a hub's split. name: as the user wrote it."""

    name: str
    files: tuple[Path, ...] = ()
    hub: HubSplit | None = None


def find_source(name: str, key: str, split: str, revision: str | None) -> Source:
    """What `name` names. key: of params, for messages; split: "train" or "validation".

    A folder's rows are those of its files named `{split}.*` or `{split}-*`, or of all of its files
    where none is named after a split. Of a hub dataset, `owner/name` is its split `split`,
    `owner/name:other` another one and `owner/name:config:other` one of a config. Raises UserError
    where there are no rows.
    """
    path = Path(name)
    if path.is_dir():
        return Source(name, _files_in(path, key, split))
    if path.exists():
        if path.suffix.lower() not in KINDS:
            raise UserError(f"{name}: rows are read from {_either(KINDS)} files ({key})")
        return Source(name, (path,))
    if path.suffix.lower() in KINDS or not _HUB_ID.fullmatch(name):
        raise UserError(
            f"{name} is missing ({key}): there is no such file or folder in {Path.cwd()}"
        )
    if revision is None:
        raise UserError(
            f"{key} {name} is missing: there is no such file or folder here. As a hub dataset it needs "
            "data.revision: the full commit (40 hex digits, quoted), so that every run gets the same "
            "rows"
        )
    dataset, *rest = name.split(":")
    config = rest[0] if len(rest) == 2 else None
    return Source(name, hub=HubSplit(dataset, config, rest[-1] if rest else split, revision))


def held_out_of(train: Source) -> Source | None:
    """The validation files in the folder that `train` names; None where it has none."""
    folder = Path(train.name)
    if not folder.is_dir() or not _named(folder, "validation"):
        return None
    return Source(train.name, _files_in(folder, "data.validation", "validation"))


def _named(folder: Path, split: str) -> list[Path]:
    return [f for f in _readable(folder) if re.match(rf"{split}[.-]", f.name)]


def _readable(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in KINDS)


def _files_in(folder: Path, key: str, split: str) -> tuple[Path, ...]:
    files = _named(folder, split)
    if not files:
        others = [other for other in ("train", "validation") if _named(folder, other)]
        if others:
            raise UserError(
                f"{folder} has files named {others[0]}.* and none named {split}.* ({key}); name a file, "
                f"or add them"
            )
        files = _readable(folder)
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) != 1:
        found = f"files of several kinds ({', '.join(kinds)})" if kinds else "no files of rows"
        raise UserError(
            f"{folder} has {found}; rows are read from {_either(KINDS)} files, all of one kind ({key})"
        )
    return tuple(files)


def _either(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def fact(source: Source, fingerprint: Callable[[Iterable[Path]], str | None]) -> str | None:
    """What tells the source's content from another: a sum of its files, or a hub split's commit."""
    if source.hub is not None:
        return f"{source.name}@{source.hub.revision}"
    return fingerprint(source.files)
