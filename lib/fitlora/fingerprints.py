"""Files by their content: all of it, or samples where that is enough.

Samples tell other models apart, and those that were trained anew, which differ nearly everywhere. A few
weights that somebody wrote over they miss; all of the content takes minutes for a large model.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from fitlora.artifacts import read_json, write_text_atomically
from fitlora.errors import ArtifactError
from fitlora.progress import progress

READERS = 8  # files that are hashed at one time, at most
PART_BYTES = 2**22
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def fingerprint(files: Iterable[Path], cache: Path) -> str | None:
    """sha256 over the names and contents of files; None where there are none.

    cache: a JSON file that remembers the sum of a file by its path, size and time of change, so that
    16 GB of weights are read once and not at every run. New files are read several at a time, as one
    core hashes less than a disk gives.
    """
    try:
        known = read_json(cache)
    except (FileNotFoundError, ArtifactError):
        known = {}
    if not isinstance(known, dict):
        known = {}
    keys = {file: _identity(file) for file in sorted(files)}
    unread = {file: file.stat().st_size for file, key in keys.items() if key not in known}
    if unread:
        largest_first = sorted(unread, key=lambda file: -unread[file])
        with (
            progress("hashing files", sum(unread.values()), in_bytes=True) as advance,
            ThreadPoolExecutor(READERS) as pool,
        ):
            digests = pool.map(partial(_digest, advance=advance), largest_first)
            for file, digest in zip(largest_first, digests, strict=True):
                known[keys[file]] = digest
    write_text_atomically(cache, json.dumps(known, indent=0))
    total = hashlib.sha256()
    for file, key in keys.items():
        total.update(f"{file.name}:{known[key]}\n".encode())
    return total.hexdigest() if keys else None


def _identity(file: Path) -> str:
    stat = file.stat()
    return f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _digest(file: Path, advance: Callable[[int], None]) -> str:
    digest, part = hashlib.sha256(), memoryview(bytearray(PART_BYTES))
    with file.open("rb", buffering=0) as content:
        while count := content.readinto(part):
            digest.update(part[:count])
            advance(count)
    return digest.hexdigest()


def sampled(files: Iterable[Path]) -> str:
    """sha256 over the files' names, sizes and evenly spaced samples of their bytes."""
    total = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        total.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as content:
            for start in _starts(size):
                content.seek(start)
                total.update(content.read(_SAMPLE_BYTES))
    return total.hexdigest()


def _starts(size: int) -> Iterator[int]:
    """Where samples begin: all of a small file, from the header on of a large one."""
    if size <= _SAMPLES * _SAMPLE_BYTES:
        yield from range(0, size, _SAMPLE_BYTES)
        return
    for index in range(_SAMPLES):
        yield index * (size - _SAMPLE_BYTES) // (_SAMPLES - 1)
