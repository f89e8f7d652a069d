"""Tiny models in all their forms, made once; nobody writes into them."""

import pytest

from fitlora.params import QuantizationParams
from tests.evaluation.forms import PLAN, Tiny, make_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Quantized to 4 bits, computing in float32."""
    return make_tiny(tmp_path_factory.mktemp("tiny"), QuantizationParams(), PLAN)


@pytest.fixture(scope="session")
def tiny16(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Not quantized, computing in bfloat16."""
    plan = PLAN.replace(compute_dtype="bfloat16")
    return make_tiny(tmp_path_factory.mktemp("tiny16"), QuantizationParams(bits=16), plan)
