"""Tiny checkpoints, made once for all tests of this folder; nobody writes into them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import make_checkpoint


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`source("llama", tied=True, shards=3)`: the folder of a tiny model, made when first wanted."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(family: str, **options: Any) -> Path:
        key = (family, *sorted((name, str(value)) for name, value in options.items()))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family), family, **options)
        return made[key]

    return get
