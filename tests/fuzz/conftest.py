"""How many inputs: 60 for each reader as a rule, and 10,000 in a documented run:

pytest tests/fuzz --hypothesis-profile=thorough
"""

from datetime import timedelta

from hypothesis import HealthCheck, settings

READERS = 8
_COMMON = {
    "deadline": timedelta(seconds=5),  # an input that takes longer hangs
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("quick", max_examples=60, derandomize=True, **_COMMON)
settings.register_profile("thorough", max_examples=-(-10_000 // READERS), **_COMMON)
settings.load_profile("quick")
