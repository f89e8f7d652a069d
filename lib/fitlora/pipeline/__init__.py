"""The six stages as functions: what DVC, the command line and `MemoryEfficientTrainer` all call.

Each reads what earlier ones wrote under a root folder and writes its own; none knows who called it.
"""
