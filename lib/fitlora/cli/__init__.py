"""The `fitlora` command. It is loaded when asked for, so that the package itself imports nothing."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "main":
        return import_module("fitlora.cli.commands").main
    raise AttributeError(f"module 'fitlora.cli' has no attribute {name!r}")
