"""What of a model its candidates depend on, read off the step that will be made of it.

Apart from the search, which imports no torch.
"""

from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from torch import nn

from fitlora.memory.estimate import layer_kinds, shallow
from fitlora.memory.timeline import Irregular
from fitlora.model import decoder_layers
from fitlora.plan import Plan
from fitlora.planner.size import ModelSize
from fitlora.step.build import StepSkeleton, step_skeleton
from fitlora.step.linear import FrozenLinear, Linear4bit
from fitlora.step.settings import StepSettings
from fitlora.step.whole import whole_parameters


def model_size(
    config: Any, settings: StepSettings, kinds: Sequence[Hashable] | None = None
) -> ModelSize:
    """The model's size, with what the settings make of it. config: a transformers config.

    kinds: of its layers, where they are known (`fitlora.memory.estimate.layer_kinds`). Whether a model
    is done by hand, one layer of each kind tells.
    """
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
    few = config
    if not _trains_whole(settings) and config.get_text_config() is config:
        kinds = kinds or layer_kinds(config)
        with suppress(Irregular):
            few = shallow(config, [kinds.index(kind) for kind in dict.fromkeys(kinds)])
    return size_of(config, step_skeleton(few, any_plan, settings))


def _trains_whole(settings: StepSettings) -> bool:
    lora = settings.lora
    return lora is not None and (lora.bias != "none" or bool(lora.modules_to_save))


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
        layer_weights=frozenset(map(_linear_weights, decoder_layers(model))),
    )


def _linear_weights(layer: nn.Module) -> int:
    """Of a layer's frozen linear layers; of experts in one tensor, none."""
    frozen = (m for m in layer.modules() if isinstance(m, FrozenLinear | Linear4bit))
    return sum(m.in_features * m.out_features for m in frozen)
