"""Inputs that readers meet: noise, and good files with something wrong in them."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

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


def spoiled(content: bytes) -> st.SearchStrategy[bytes]:
    """Noise, nasty files, or `content` with a piece cut out, put in, or changed."""
    places = st.integers(0, len(content))

    def splice(start: int, length: int, piece: bytes) -> bytes:
        return content[:start] + piece + content[start + length :]

    pieces = st.binary(max_size=8) | st.sampled_from(NASTY[2:9])
    spliced = st.builds(splice, places, st.integers(0, 40), pieces)
    return st.binary(max_size=300) | st.sampled_from(NASTY) | JSON.map(dumped) | spliced


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


def fails_only_with(kinds: type[Exception], read: Callable[[], object]) -> None:
    """Reads; an error must be one of ours, with words in it."""
    try:
        read()
    except kinds as error:
        message = str(error)
    else:
        return
    assert message.strip()
