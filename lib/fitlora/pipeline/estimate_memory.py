"""The default plan and its neighbours, in bytes -> memory_estimate.json, dataset.json."""

from collections.abc import Sequence
from pathlib import Path

from fitlora.artifacts import (
    DATASET,
    HARDWARE,
    MEMORY_ESTIMATE,
    Card,
    Dataset,
    Estimate,
    Hardware,
    MemoryEstimate,
    SequenceSize,
)
from fitlora.console import say
from fitlora.errors import UserError
from fitlora.gpu_facts import documented_context_bytes, documented_workspace_bytes
from fitlora.memory.estimate import Estimator, Load, count_parameters
from fitlora.memory.moments import moments
from fitlora.memory.question import CARDS_GIB, fit_cards, ways_out
from fitlora.model import has_tokenizer, load_config, resolve_model
from fitlora.params import Params, with_found
from fitlora.plan import Plan
from fitlora.planner.parameters import find_parameters
from fitlora.planner.search import default_plan, device_count, neighbours
from fitlora.planner.size import ModelSize
from fitlora.report.memory import data_lines, estimate_lines
from fitlora.step.settings import StepSettings
from fitlora.training.batches import Batches
from fitlora.training.data import load_splits, longest, padding_of, sizes, token_limit
from fitlora.units import GIB

_REWRITTEN = (
    "rewritten  {count:,} earlier answers in {rows}: the chat template writes them otherwise once later "
    "turns follow, so they are read and not learned; a row that ends with such an answer learns it"
)
# Of the cards that a run on a CPU is told about: 12.0 is today's, and has the largest context.
_CAPABILITY = "12.0"


def estimate_memory(params: Params, root: Path = Path()) -> MemoryEstimate:
    """Tokenizes the data and traces the step that params describe."""
    trusted = params.model.trust_remote_code
    hardware = Hardware.read(root / HARDWARE)
    hardware = hardware.among(device_count(params, hardware))
    folder = resolve_model(params.model.id, params.model.revision, weights=False)
    config = load_config(folder, trust_remote_code=trusted)
    if params.merge.base == "original" and getattr(config, "quantization_config", None):
        raise UserError(
            f"merge.base original merges into 16-bit weights, and model.id {params.model.id} has 4-bit "
            "ones only; set merge.base: dequantized, or name the 16-bit model"
        )
    model = ModelSize.of(config)
    found = find_parameters(params, folder, config, hardware)
    params = with_found(params, found, "this")
    dataset = read_dataset(params, folder, model.vocabulary)
    dataset.write(root / DATASET)
    for line in data_lines(dataset):
        say(line)
    for split in (dataset.train, dataset.validation):
        if split is not None and split.rewritten_answers:
            say(_REWRITTEN.format(count=split.rewritten_answers, rows=split.source))

    load, settings = Load.of(dataset), StepSettings.of(params)
    start = default_plan(params, hardware, model, load.tokens, sequence_length=load.train[0].tokens)
    estimator = Estimator(config, settings, load, hardware)
    parameters, trainable = count_parameters(config, start, settings)
    default, traced = estimator(start), estimator.trace(start)
    dynamic = params.train.precision == "dynamic"
    near = neighbours(start, model.layers, dynamic=dynamic)
    others = {name: estimator(plan) for name, plan in near.items()}
    result = MemoryEstimate(
        model=params.model.id,
        parameters=parameters,
        trainable_parameters=trainable,
        budget_bytes=hardware.budget_bytes,
        default=default,
        neighbours=others,
        over_step=moments(traced.levels[0], estimator.workspace_bytes(traced)),
        cards=_cards(params, [default, *others.values()], estimator, by_hand=traced.by_hand),
        found=found,
    )
    result.write(root / MEMORY_ESTIMATE)
    for line in estimate_lines(result):
        say(line)
    return result


def _cards(
    params: Params, known: Sequence[Estimate], estimator: Estimator, *, by_hand: bool
) -> tuple[Card, ...]:
    """GPUs of the usual sizes, with what is known and the plans that take least.

    What a CPU takes says nothing of a GPU, which computes otherwise. So where the CPU computes, the
    default plan is asked about again, as a GPU has it: with a context and libraries' workspaces.
    """
    plan, beside = known[0].plan, 0
    if plan.device == "cpu":
        beside = documented_context_bytes(_CAPABILITY) + documented_workspace_bytes(_CAPABILITY)
        asked = params.plan.compute_dtype
        plan = plan.replace(device="cuda", compute_dtype="bfloat16" if asked == "auto" else asked)

    def on_a_card(other: Plan) -> Estimate:
        found = estimator(other)
        return found.model_copy(update={"process_bytes": found.process_bytes + beside})

    if beside:
        known = [on_a_card(plan)]
    if min(found.process_bytes for found in known) > CARDS_GIB[0] * GIB:
        less = list(ways_out(plan, estimator.config, by_hand=by_hand))[-3:]
        known = [*known, *(on_a_card(other) for _, other in less)]
    return fit_cards(known)


def read_dataset(params: Params, folder: Path, vocabulary: int) -> Dataset:
    """The data as the model's tokenizer sees it; lengths are assumed where it comes without one.

    Raises UserError for bad rows, and for fewer rows than an effective batch.
    """
    count = params.train.effective_batch_size
    if not has_tokenizer(folder):
        limit = token_limit(params.data)
        assumed = (SequenceSize(tokens=limit, target_tokens=limit - 1),) * count
        return Dataset(
            train=None,
            validation=None,
            longest_train=assumed,
            longest_validation=assumed,
            padding=None,
        )
    train, validation = load_splits(
        params.data, folder, vocabulary, trust_remote_code=params.model.trust_remote_code
    )
    Batches(train.sequences, count, params.train.seed)  # refuses too few rows, before anything runs
    return Dataset(
        train=train.facts,
        validation=validation.facts,
        longest_train=sizes(longest(train.sequences, count)),
        longest_validation=sizes(longest(validation.sequences, count)),
        padding=padding_of(train.sequences, count),
    )
