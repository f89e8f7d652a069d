"""Files by their content: one sum for all and each file read once, or samples."""

import hashlib
from pathlib import Path

import pytest

from fitlora import fingerprints
from fitlora.fingerprints import fingerprint, sampled


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Of unlike sizes, the last more than one part; the largest is not the first by name."""
    sizes = {"b": 3, "a": 0, "c": fingerprints.PART_BYTES + 5}
    made = [tmp_path / name for name in sizes]
    for file, size in zip(made, sizes.values(), strict=True):
        file.write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    return made


def test_it_is_the_sum_of_names_and_contents_in_order(files: list[Path], tmp_path: Path) -> None:
    lines = [f"{f.name}:{hashlib.sha256(f.read_bytes()).hexdigest()}\n" for f in sorted(files)]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    cache = tmp_path / "cache.json"
    assert fingerprint(files, cache) == expected
    assert fingerprint(iter(reversed(files)), cache) == expected
    assert fingerprint([], cache) is None


def test_a_file_is_read_again_when_it_has_changed_and_only_then(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def digest(file: Path, advance: object) -> str:
        read.append(file.name)
        return file.read_bytes()[:3].hex()

    monkeypatch.setattr(fingerprints, "_digest", digest)
    cache = tmp_path / "cache.json"
    first = fingerprint(files, cache)
    assert sorted(read) == ["a", "b", "c"]
    assert fingerprint(files, cache) == first
    assert len(read) == 3
    files[0].write_bytes(b"other")
    assert fingerprint(files, cache) != first
    assert read[3:] == ["b"]


def test_how_much_was_read_is_told(files: list[Path]) -> None:
    told: list[int] = []
    fingerprints._digest(files[2], told.append)
    assert told == [fingerprints.PART_BYTES, 5]


def test_samples_tell_files_apart(tmp_path: Path) -> None:
    small, large = tmp_path / "a", tmp_path / "b"
    small.write_bytes(bytes(1000))
    large.write_bytes(bytes(5_000_000))
    first = sampled([small, large])
    assert sampled([large, small]) == first
    small.write_bytes(bytes(999) + b"\1")
    changed = sampled([small, large])
    assert changed != first, "of a small file every byte counts"
    large.write_bytes(bytes(4_999_999) + b"\1")
    assert sampled([small, large]) != changed, "of a large one its beginning and its end"
    large.write_bytes(bytes(4_999_998))
    assert sampled([small, large]) != changed
