"""Inputs that readers meet: noise, and good files with something wrong in them."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
# Of hypothesis, however many inputs there are.
SETTINGS: dict[str, Any] = {
    "deadline": timedelta(seconds=5),  # an input that takes longer hangs
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
# What has broken readers of JSON: too deep, too long a number, no number, surrogates, a second key.
NASTY = [
    b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5_000, b"1e999", b"NaN", b"-Infinity", b'"\\ud800"',
    b'{"kind": 1, "kind": 2}', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"", b"null", b"\x00",
    b'"' + b"x" * 70_000,
]  # fmt: skip

_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["../x", "/etc/passwd", "a\x00b", "\ud800", "~", "${x}"])
)  # fmt: skip
JSON = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=12,
)


def dumped(value: Any) -> bytes:
    """As JSON; surrogates by themselves become bytes that are no UTF-8."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", errors="surrogatepass")


def spliced(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` with a piece cut out, put in, or changed."""
    places = st.integers(0, len(content))

    def splice(start: int, length: int, piece: bytes) -> bytes:
        return content[:start] + piece + content[start + length :]

    pieces = st.binary(max_size=8) | st.sampled_from(NASTY[2:9])
    return st.builds(splice, places, st.integers(0, 40), pieces)


def spoiled(content: bytes) -> st.SearchStrategy[bytes]:
    """Noise, nasty files, or `content` that was spliced."""
    noise = st.binary(max_size=300) | st.sampled_from(NASTY) | JSON.map(dumped)
    return noise | spliced(content)


def changed(content: Any) -> st.SearchStrategy[Any]:
    """Plain data with the value at one of its places replaced, taken away or joined by another."""
    places: list[tuple[Any, ...]] = []

    def walk(value: Any, path: tuple[Any, ...]) -> None:
        places.append(path)
        items = value.items() if isinstance(value, dict) else ()
        items = enumerate(value) if isinstance(value, list) else items
        for key, inner in items:
            walk(inner, (*path, key))

    walk(content, ())

    def put(path: tuple[Any, ...], new: Any, how: str) -> Any:
        if not path:
            return new
        whole = json.loads(json.dumps(content))
        inside = whole
        for key in path[:-1]:
            inside = inside[key]
        if how == "drop":
            del inside[path[-1]]
        elif how == "add" and isinstance(inside, dict):
            inside[str(new)[:20]] = new
        else:
            inside[path[-1]] = new
        return whole

    return st.builds(put, st.sampled_from(places), JSON, st.sampled_from(["put", "drop", "add"]))


# Where Python and its packages lie, whose files a first import opens.
_CODE = tuple(Path(place).resolve() for place in (sys.prefix, sys.base_prefix, ROOT))
_opened: list[Path] = []
outcomes: Counter[str] = Counter()


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | bytes):
        _opened.append(Path(os.fsdecode(arguments[0])))


sys.addaudithook(_note)  # which stays for as long as the process does


def fails_only_with(kinds: type[Exception], read: Callable[[], object], folder: Path) -> None:
    """Reads; an error must be one of ours, with words in it, and no file outside may be opened."""
    _opened.clear()
    try:
        read()
    except kinds as error:
        assert str(error).strip()  # noqa: PT017
        outcomes["refused"] += 1
    else:
        outcomes["read"] += 1
    for path in _opened:
        assert any(path.resolve().is_relative_to(place) for place in (folder.resolve(), *_CODE)), (
            path
        )
