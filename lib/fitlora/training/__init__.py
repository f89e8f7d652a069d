"""Rows, batches, the loop and its checkpoints."""
