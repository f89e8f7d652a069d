"""Merging, metrics and answers."""
