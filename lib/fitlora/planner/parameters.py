"""What the seed's templates vary, from the budget: `auto_find_parameters`.

In this order, each by estimates of the step and never by running it:

1. Sequence length (`data.max_length`): the longest row of the data, to a multiple of 8, so that nothing
   is cut and no limit is higher than it need be; at most what was given, and what the model has.
2. Recomputation (`plan.recompute`): auto, so that the planner recomputes as few layers as fit.
3. Rank (`lora.r`, with `lora.alpha` in proportion): the one that was given, or else the highest of the
   templates'; halved until the smallest layout of the step (one sequence at once, every layer
   recomputed) fits the budget. An adapter to go on from has its rank already.
4. If not even the lowest rank fits, the sequence length is halved until it does; what is longer is cut
   and counted. The planner then says what would help where nothing fits at all.
"""

from pathlib import Path
from typing import Any

from fitlora.artifacts import HARDWARE, Hardware, SequenceSize
from fitlora.console import say
from fitlora.memory.estimate import Load, estimate
from fitlora.model import load_config, resolve_model
from fitlora.params import Params
from fitlora.planner.search import ModelSize, default_plan
from fitlora.step.settings import StepSettings
from fitlora.training.data import load_splits

HIGHEST_RANK = 32  # of the templates
LOWEST_RANK = 4
SHORTEST = 64  # tokens: a question and an answer
LONGEST = 32768  # where the model does not say how many positions it has


def find_parameters(
    params: Params,
    root: Path,
    *,
    rank: int = HIGHEST_RANK,
    max_length: int | None = None,
    keep_recompute: bool = False,
) -> Params:
    """The params with what was found in them; says what and why. Needs the hardware's profile.

    rank, max_length: the highest to consider. keep_recompute: leave `plan.recompute` as it is.
    """
    hardware = Hardware.read(root / HARDWARE)
    trusted = params.model.trust_remote_code
    folder = resolve_model(params.model.id, params.model.revision, weights=False)
    config = load_config(folder, trust_remote_code=trusted)
    size = ModelSize.of(config)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or LONGEST
    limit: int = min(max_length or positions, positions)
    splits = load_splits(
        params.data.model_copy(update={"max_length": limit}),
        folder,
        size.vocabulary,
        trust_remote_code=trusted,
    )
    longest = max(split.facts.length.maximum for split in splits)
    length = min(limit, -(-longest // 8) * 8)
    params = _with(params, "data", max_length=length)
    if not keep_recompute:
        params = _with(params, "plan", recompute="auto")
    lengths, ranks = _halves(length, min(SHORTEST, length)), _halves(rank, min(LOWEST_RANK, rank))
    if params.train.from_adapter is not None:
        rank, ranks = params.lora.r, [params.lora.r]
    tried = [(length, r) for r in ranks] + [(n, ranks[-1]) for n in lengths[1:]]
    for tokens, r in tried:
        found = _with(params, "data", max_length=tokens)
        found = _with(found, "lora", r=r, alpha=params.lora.alpha * r / params.lora.r)
        if _smallest_fits(config, found, size, tokens, hardware):
            break
    cut = f", shorter than the longest row ({longest}) to fit" if tokens < longest else ""
    say(f"found      data.max_length {tokens}: the longest row has {longest} tokens{cut}")
    why = f"lowered from {rank} to fit" if r < rank else "the highest that was asked for"
    say(f"found      lora.r {r}: {why}")
    return found


def _with(params: Params, section: str, **changes: Any) -> Params:
    """Params with some keys of a section changed."""
    return params.model_copy(update={section: getattr(params, section).model_copy(update=changes)})


def _halves(highest: int, lowest: int) -> list[int]:
    """`highest`, half of it, and so on down to `lowest`."""
    found = [highest]
    while found[-1] // 2 >= lowest:
        found.append(found[-1] // 2)
    return found


def _smallest_fits(
    config: Any, params: Params, size: ModelSize, tokens: int, hardware: Hardware
) -> bool:
    sequence = SequenceSize(tokens=tokens, target_tokens=tokens - 1)
    load = Load([sequence], [sequence])
    plan = default_plan(params, hardware, size, load.tokens, sequence_length=tokens).replace(
        micro_batch_size=1, evaluation_batch_size=1
    )
    if params.plan.recompute == "auto":
        plan = plan.replace(recompute_layers=tuple(range(size.layers)))
    return estimate(config, plan, StepSettings.of(params), load, hardware).fits
