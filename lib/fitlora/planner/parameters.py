"""What the seed's templates vary, from the budget: the numbers for params that say `auto`.

In this order, each by estimates of the step and never by running it:

1. Sequence length (`data.max_length`): the longest row of the data, to a multiple of 8, so that nothing
   is cut and no limit is higher than it need be; at most what the model has positions for.
2. Rank (`lora.r`): the highest of the templates', halved until the smallest layout of the step (one
   sequence at once, every layer recomputed, all on the host that may be there, unless params say
   otherwise) fits the budget.
3. If not even the lowest rank fits, the sequence length is halved until it does; what is longer is cut
   and counted. The planner then says what would help where nothing fits at all.

`lora.alpha` is twice the rank. What params give a number for stays as it is. The estimate's stage finds
these and writes them down; the stages after it read them there.
"""

from pathlib import Path
from typing import Any

from fitlora.artifacts import Found, Hardware, SequenceSize
from fitlora.console import say
from fitlora.errors import UserError
from fitlora.memory.estimate import Load
from fitlora.model import has_tokenizer
from fitlora.params import Params, with_found
from fitlora.planner.search import NothingFits
from fitlora.planner.size import ModelSize
from fitlora.planner.task import LOWEST_RANK, Task
from fitlora.training.data import load_splits

HIGHEST_RANK = 32  # of the templates
SHORTEST = 64  # tokens: a question and an answer
LONGEST = 32768  # where the model does not say how many positions it has


def find_parameters(
    params: Params,
    folder: Path,
    config: Any,
    hardware: Hardware,
    *,
    highest_rank: int = HIGHEST_RANK,
    longest: int | None = None,
) -> Found | None:
    """Numbers for what says `auto`, said with their reasons; None where nothing does.

    folder: the model's, with its tokenizer. config: its transformers config. highest_rank, longest: the
    most to consider (longest: tokens of a sequence). Raises UserError for bad rows, and for a length
    that would follow from rows where the model has no tokenizer.
    """
    lora, given = params.lora, params.data.max_length
    if "auto" not in (lora.r, lora.alpha, given):
        return None
    size = ModelSize.of(config)
    length = _longest_row(params, folder, config, size, longest) if given == "auto" else given
    lengths = _halves(length, min(SHORTEST, length)) if given == "auto" else [length]
    ranks = _halves(highest_rank, min(LOWEST_RANK, highest_rank)) if lora.r == "auto" else [lora.r]
    tried = [(length, rank) for rank in ranks] + [(tokens, ranks[-1]) for tokens in lengths[1:]]
    for tokens, rank in tried:
        found = Found(
            lora_r=rank,
            lora_alpha=2.0 * rank if lora.alpha == "auto" else lora.alpha,
            max_length=tokens,
        )
        if _smallest_fits(config, with_found(params, found, "this"), tokens, hardware):
            break
    if given == "auto":
        cut = f"shortened from {length} to fit" if tokens < length else "as the longest row needs"
        say(f"found      data.max_length {tokens}: {cut}")
    if lora.r == "auto":
        why = f"lowered from {ranks[0]} to fit" if rank < ranks[0] else "the highest considered"
        say(f"found      lora.r {rank}: {why}")
    return found


def _longest_row(
    params: Params, folder: Path, config: Any, size: ModelSize, longest: int | None
) -> int:
    """Tokens of the longest row, to a multiple of 8; at most `longest`, and the model's positions."""
    if not has_tokenizer(folder):
        raise UserError(
            f"data.max_length auto follows from the rows, and {folder} has no tokenizer to read them "
            "with; give a number"
        )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or LONGEST
    limit: int = min(longest or positions, positions)
    splits = load_splits(
        params.data.model_copy(update={"max_length": limit, "packing": False}),
        folder,
        size.vocabulary,
        trust_remote_code=params.model.trust_remote_code,
    )
    return min(limit, -(-max(split.facts.length.maximum for split in splits) // 8) * 8)


def _halves(highest: int, lowest: int) -> list[int]:
    """`highest`, half of it, and so on down to `lowest`."""
    found = [highest]
    while found[-1] // 2 >= lowest:
        found.append(found[-1] // 2)
    return found


def _smallest_fits(config: Any, params: Params, tokens: int, hardware: Hardware) -> bool:
    """Whether the smallest layout that params leave fits. tokens: of every sequence."""
    sequences = [SequenceSize(tokens=tokens, target_tokens=tokens - 1)]
    load = Load(sequences * params.train.effective_batch_size, sequences * _held_out(params))
    task = Task(config, params, load, hardware)
    for host in (False, True):
        found = task.smallest(host=host)
        if found.fits:
            return True
    if found.process_bytes > hardware.budget_bytes:
        return False
    # the device has room where all is moved, and the host has not: a part of it may fit both
    try:
        next(task.search().fitting())
    except NothingFits:
        return False
    return True


def _held_out(params: Params) -> int:
    """The most sequences that are evaluated at once."""
    asked = params.plan.evaluation_batch_size
    return params.train.effective_batch_size if asked == "auto" else asked
