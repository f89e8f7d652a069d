"""How many inputs: 60 for each reader as a rule, and 10,000 in the documented run:

python -m benchmarks.fuzz --json benchmarks/results/fuzz.cpu.json
"""

from datetime import timedelta

from hypothesis import HealthCheck, settings

settings.register_profile(
    "quick",
    max_examples=60,
    derandomize=True,
    deadline=timedelta(seconds=5),  # an input that takes longer hangs
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("quick")
