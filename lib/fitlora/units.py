"""Bytes in and out of words. Everywhere else in the code a byte count is an `int`."""

import re

from fitlora.errors import UserError

KIB = 2**10
MIB = 2**20
GIB = 2**30

_UNITS = {
    "": 1, "b": 1,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": 2**40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """`"8GiB"` -> 8589934592. GiB is 2**30 and GB is 10**9; a bare number is bytes.

    Raises UserError when the text is not a size.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        value, unit = float(text), ""
    else:
        match = _PATTERN.fullmatch(str(text))
        if match is None or match[2].lower() not in _UNITS:
            raise UserError(f"{text!r} is not a size; write it like 8GiB, 7800MiB or 8.5GB")
        value, unit = float(match[1]), match[2].lower()
        if not unit and value < MIB:  # 8, where 8GiB was meant
            raise UserError(f"{text!r} would be bytes; write it with its unit, like {text}GiB")
    size = int(value * _UNITS[unit])
    if size <= 0:
        raise UserError(f"{text!r} is not a size above zero")
    return size


def format_bytes(count: int) -> str:
    """`9663676416` -> `"9.00 GiB"`."""
    for size, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(count) >= size:
            return f"{count / size:.2f} {name}"
    return f"{count} B"
