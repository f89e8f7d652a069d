"""The training step: how it is built from a model and a Plan, and its kernels."""
