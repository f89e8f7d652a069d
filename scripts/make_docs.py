"""docs/params.md, from the models that define the keys; a test holds the file to what this writes.

`make docs` runs it.
Nothing is said of a key here: its meaning, default and bounds are where it is defined.
"""

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fitlora.gpu_facts import CARDS
from fitlora.params import Params, TargetParams
from fitlora.presets import yaml_value

PATH = Path(__file__).resolve().parents[1] / "docs" / "params.md"
HEAD = """\
# The keys of params.yaml

Made by `make docs` from `lib/fitlora/params.py`; not edited by hand.

Every key may be left out: it then has its default. An unknown key, a value that is not allowed and
keys that contradict each other are all reported at once, before anything runs. `fitlora init` writes a
file with every key; `--set key=value` changes one for one command, and `dvc exp run -S key=value` for
one experiment. Write numbers like `2.0e-4`, with a point.
"""
_BOUNDS = {
    "Ge": ("at least", "ge"),
    "Gt": ("above", "gt"),
    "Le": ("at most", "le"),
    "Lt": ("below", "lt"),
}
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "`true` or `false`"}


def text() -> str:
    """The whole of docs/params.md."""
    return "\n".join([HEAD, *_sections()])


def _sections() -> Iterator[str]:
    for name, field in Params.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        yield from _table(name, section)
    yield from _table("hardware.target", TargetParams)
    yield (
        "Where `hardware.target` is null, there is no such section. Memory and compute capability are "
        f"known of: {', '.join(CARDS)}."
    )
    yield ""


def _table(name: str, section: type[BaseModel]) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    yield (section.__doc__ or "").strip()
    yield ""
    yield "| key | default | allowed | meaning |"
    yield "|---|---|---|---|"
    for key, field in section.model_fields.items():
        default = "none" if field.is_required() else f"`{yaml_value(field.default)}`"
        cells = (f"`{name}.{key}`", default, allowed(field), field.description or "")
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def allowed(field: FieldInfo) -> str:
    """What a key may be, in words."""
    return " or ".join(dict.fromkeys(_kinds(field.annotation, field.metadata)))


def _kinds(annotation: Any, metadata: Any) -> Iterator[str]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        for inner in get_args(annotation):
            yield from _kinds(inner, metadata)
    elif origin is Literal:
        yield ", ".join(f"`{yaml_value(value)}`" for value in get_args(annotation))
    elif annotation is type(None):
        yield "`null`"
    elif hasattr(annotation, "__metadata__"):  # Annotated
        inner, *more = get_args(annotation)
        yield from _kinds(inner, [*more, *metadata])
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "a section"
    elif origin is tuple:
        inner = get_args(annotation)[0]
        yield "a list of " + (" or ".join(_kinds(inner, [])) if get_origin(inner) else "names")
    else:
        yield _WORDS[annotation] + _bounds(metadata)


def _bounds(metadata: Any) -> str:
    found = []
    for constraint in _flat(metadata):
        kind = type(constraint).__name__
        if kind in _BOUNDS:
            word, attribute = _BOUNDS[kind]
            found.append(f"{word} {getattr(constraint, attribute)}")
        elif getattr(constraint, "pattern", None):
            found.append(f"like `{constraint.pattern}`")
        elif (
            getattr(constraint, "func", None) is not None and constraint.func.__name__ == "_is_size"
        ):
            found.append("like `8GiB`")
    return f", {', '.join(found)}" if found else ""


def _flat(metadata: Any) -> Iterator[Any]:
    """Constraints, with those inside a Field of an Annotated."""
    for constraint in metadata:
        if isinstance(constraint, FieldInfo):
            yield from constraint.metadata
        else:
            yield constraint


def main() -> int:
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(text(), encoding="utf-8")
    print(f"{PATH} is written; look at it with git diff")
    return 0


if __name__ == "__main__":
    sys.exit(main())
