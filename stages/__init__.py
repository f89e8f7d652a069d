"""The pipeline's stages: each reads params and artifacts, calls the library, writes artifacts."""
