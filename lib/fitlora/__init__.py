"""FitLoRA: fine-tune the biggest language model that your memory can hold.

Names are loaded when first used, so that `import fitlora` costs nothing and the parts that need no
torch (params, artifacts, plan, the planner's search) stay free of it.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "CPUOffloadOptimizer": "fitlora.offload.optimizer",
    "MemoryEfficientTrainer": "fitlora.trainer",
    "MemoryTracker": "fitlora.memory.tracker",
    "Params": "fitlora.params",
    "Plan": "fitlora.plan",
    "UserError": "fitlora.errors",
    "find_optimal_batch_size": "fitlora.planner.user_model",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'fitlora' has no attribute {name!r}") from None
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
