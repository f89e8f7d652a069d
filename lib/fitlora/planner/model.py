"""What of a model its candidates depend on, read off the step that will be made of it.

Apart from the search, which imports no torch.
"""

from typing import Any

from fitlora.plan import Plan
from fitlora.planner.size import ModelSize
from fitlora.step.build import step_skeleton
from fitlora.step.settings import StepSettings


def model_size(config: Any, settings: StepSettings) -> ModelSize:
    """The model's size, and whether its layers have a step by hand. config: a transformers config."""
    any_plan = Plan(
        device="cpu",
        effective_batch_size=1,
        micro_batch_size=1,
        evaluation_batch_size=1,
        sequence_length=1,
        compute_dtype="bfloat16",
        optimizer="adamw",
        loss_chunk_tokens=1,
    )
    return ModelSize.of(config, by_hand=bool(step_skeleton(config, any_plan, settings).layers))
