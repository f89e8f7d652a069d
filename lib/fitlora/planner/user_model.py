"""The largest batch of a transformers model that the user holds: by trying it.

The pipeline's own planner knows its step and finds sizes by estimates. Here the model is anybody's, so
its step is run: at a few sizes, growing until one does not fit, and then bisecting.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from fitlora.console import say
from fitlora.device import give_back_memory, is_overflow
from fitlora.errors import UserError
from fitlora.machine import host_memory_bytes
from fitlora.memory.trace import MemoryTrace
from fitlora.units import format_bytes, parse_bytes

MAX_TRIALS = 6
LONGEST_DEFAULT = 2048  # tokenizers without a limit say 1e30
HOST_SHARE = 0.8  # of the host's free memory, where no budget is given


class _OverBudget(Exception):
    """A trial on the CPU has reached the budget."""


class _BoundedTrace(MemoryTrace):
    """A trace that stops the step at the operator that goes over the budget."""

    def __init__(self, model: nn.Module, limit_bytes: int) -> None:
        super().__init__(model, round_up=False)
        self._limit_bytes = limit_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.live_bytes > self._limit_bytes:
            raise _OverBudget
        return out


def find_optimal_batch_size(
    model: nn.Module,
    tokenizer: Any,
    start_batch_size: int = 8,
    *,
    sequence_length: int | None = None,
    memory_budget: str | int | None = None,
) -> int:
    """The largest batch found, in at most 6 trials, with which one training step of `model` fits.

    Measured is one step on `start_batch_size` rows of `sequence_length` random tokens, without padding,
    and then on more or fewer: forward with labels, backward, and beside its peak the two states that
    AdamW keeps of every trained parameter. No optimizer runs, and nothing is learned: parameters,
    gradients, `requires_grad`, training mode, buffers and the random state are left as they were found.

    On a CUDA device the peak is the caching allocator's (reserved memory), and a size that overflows
    does not fit. On the CPU live tensors are counted, and a step is stopped at the operator that goes
    over the budget: what is used beyond it is that operator's result at most.

    model: a transformers model that returns a loss for `labels`, on one device. sequence_length: by
    default the tokenizer's `model_max_length`, at most the model's positions and 2048. memory_budget:
    bytes or "8GiB" for model and step; by default what is free on the GPU, or 80% of the host's free
    memory, beside what the model holds already.

    Raises UserError where not even one row fits, or where nothing in the model is trained.
    """
    if not isinstance(start_batch_size, int) or start_batch_size < 1:
        raise UserError(f"start_batch_size is {start_batch_size!r}; it is a count, 1 or more")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError("no parameter of the model requires a gradient, so no step can be measured")
    device = trained[0].device
    if sequence_length is None:
        sequence_length = _default_length(model, tokenizer)
    if sequence_length < 2:
        raise UserError(f"sequence_length is {sequence_length}; a step needs 2 tokens or more")
    vocabulary = min(len(tokenizer), _embedding(model).num_embeddings)
    states = sum(2 * p.numel() * p.element_size() for p in trained)
    budget = _budget(model, device, memory_budget)

    def fits(rows: int) -> bool:
        ids = torch.randint(
            vocabulary, (rows, sequence_length), generator=torch.Generator().manual_seed(0)
        ).to(device)
        with _as_found(model):
            peak = _peak_bytes(model, ids, budget - states)
        found = "more than fits" if peak is None else format_bytes(peak + states)
        say(f"batch of {rows}: {found}, of {format_bytes(budget)}")
        return peak is not None

    fitting, failing, rows = 0, None, start_batch_size
    for _ in range(MAX_TRIALS):
        if fits(rows):
            fitting = rows
        else:
            failing = rows
        if failing is None:
            rows = 2 * fitting
        elif failing - fitting <= 1:
            break
        else:
            rows = (fitting + failing) // 2 if fitting else max(1, failing // 4)
    if fitting == 0:
        raise UserError(
            f"a batch of {failing} does not fit {format_bytes(budget)} at {sequence_length} tokens, the "
            "smallest that was tried; a shorter sequence_length, gradient checkpointing, or "
            "fewer trained parameters make the step smaller"
        )
    return fitting


def _embedding(model: Any) -> nn.Embedding:
    """The model's input embedding."""
    found = model.get_input_embeddings()
    assert isinstance(found, nn.Embedding)
    return found


def _default_length(model: Any, tokenizer: Any) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = (tokenizer.model_max_length, positions or LONGEST_DEFAULT, LONGEST_DEFAULT)
    return int(min(limits))


def _budget(model: nn.Module, device: torch.device, asked: str | int | None) -> int:
    if asked is not None:
        return parse_bytes(asked)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device))
    held = sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()])
    free = min(psutil.virtual_memory().available, host_memory_bytes())
    return int(free * HOST_SHARE) + held


def _peak_bytes(model: nn.Module, ids: Tensor, limit_bytes: int) -> int | None:
    """The peak of one step; None where it goes over the limit. ids: (rows, tokens)."""
    model.train()
    if ids.device.type == "cuda":
        give_back_memory()
        torch.cuda.reset_peak_memory_stats(ids.device)
        try:
            _step(model, ids)
        except RuntimeError as error:
            if not is_overflow(error):
                raise
            peak = None
        else:
            peak = torch.cuda.max_memory_reserved(ids.device)
        for parameter in model.parameters():
            parameter.grad = None
        give_back_memory()
    else:
        trace = _BoundedTrace(model, limit_bytes)
        try:
            with trace:
                trace.watch([*model.parameters(), *model.buffers(), ids])
                _step(model, ids)
        except _OverBudget:
            peak = None
        else:
            peak = trace.peak.bytes
    return peak if peak is not None and peak <= limit_bytes else None


def _step(model: Any, ids: Tensor) -> None:
    loss = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False
    ).loss
    if loss is None or not loss.requires_grad:
        raise UserError("the model returned no loss that depends on a trained parameter")
    loss.backward()


@contextmanager
def _as_found(model: nn.Module) -> Iterator[None]:
    """Puts gradients, training mode, buffers and the random state back."""
    gradients = [(p, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        for parameter, _ in gradients:
            parameter.grad = None
        try:
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, content in buffers:
                    if not torch.equal(buffer, content):
                        buffer.copy_(content)
