"""The pipeline's stages: each reads params and artifacts, calls the library, writes artifacts."""

import logging

# On some CPUs bitsandbytes says at import that an optional kernel from a hub is missing. It is never
# used here, and a stage's first line should not look like a fault.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
