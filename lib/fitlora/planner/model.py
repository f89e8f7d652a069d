"""What of a model its candidates depend on, read off the step that will be made of it.

Apart from the search, which imports no torch.
"""

from dataclasses import replace
from typing import Any, cast

from fitlora.plan import Plan
from fitlora.planner.size import ModelSize
from fitlora.step.build import StepSkeleton, step_skeleton
from fitlora.step.settings import StepSettings
from fitlora.step.whole import whole_parameters


def model_size(config: Any, settings: StepSettings) -> ModelSize:
    """The model's size, with what the settings make of it. config: a transformers config."""
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
    return size_of(config, step_skeleton(config, any_plan, settings))


def size_of(config: Any, skeleton: StepSkeleton) -> ModelSize:
    """The same of a step that is there, whatever its Plan."""
    size = ModelSize.of(config)
    model = cast(Any, skeleton.model)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return replace(
        size,
        embedding_moves=not embedding.requires_grad,
        head_moves=size.head_moves and not head.requires_grad,
        by_hand=bool(skeleton.layers),
        trained_whole=sum(p.numel() for p in whole_parameters(model).values()),
    )
