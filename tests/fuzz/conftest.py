"""How many inputs: 60 for each reader, always the same; python -m benchmarks.fuzz takes 10,000."""

from hypothesis import settings

from tests.fuzz.inputs import SETTINGS

settings.register_profile("quick", max_examples=60, derandomize=True, **SETTINGS)
settings.load_profile("quick")
