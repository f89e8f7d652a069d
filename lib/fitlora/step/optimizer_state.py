"""The optimizer's states, of whichever optimizer: made ahead, taken out, put back.

PyTorch's and bitsandbytes' optimizers make their states inside their first step, one parameter after
the other, so that running out of memory there leaves a step half done. Made ahead, an update allocates
nothing. They are put back into the tensors that are there, so that paged ones stay paged. Only an
optimizer on the host takes its states back itself, as it counts them against the host's budget.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from fitlora.offload.optimizer import CPUOffloadOptimizer

# Code books that bitsandbytes' 8-bit states share; they belong to the optimizer and never change.
_SHARED = ("qmap1", "qmap2")


def make_states(
    optimizer: Optimizer,
    at: Callable[[Tensor], AbstractContextManager[None]] = lambda parameter: nullcontext(),
) -> None:
    """Allocates what the optimizer would allocate in its first step; what is there stays as it is.

    Parameters that require no gradient get none. A parameter's is made inside of `at` it, and where the
    optimizer is on the host of its master there. Run out of memory, it leaves whole states and none half
    made.
    """
    worker: Optimizer = optimizer
    hidden: Callable[[], AbstractContextManager[None]] = nullcontext
    if isinstance(optimizer, CPUOffloadOptimizer):
        worker, hidden = optimizer.inner, optimizer.transport.hidden
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter.requires_grad and not optimizer.state.get(parameter):
                own = worker.param_groups[number]["params"][index]
                with at(parameter), hidden():
                    optimizer.state[parameter] = _state(worker, own, number, index)


def _state(optimizer: Optimizer, parameter: Tensor, number: int, index: int) -> dict[str, Any]:
    """Zeros, as torch.optim.AdamW (fused) has them, or as bitsandbytes makes them itself."""
    if isinstance(optimizer, torch.optim.AdamW):
        return {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    group = optimizer.param_groups[number]
    try:
        cast(Any, optimizer).init_state(group, parameter, number, index)
        return cast(dict[str, Any], optimizer.state[parameter])
    finally:
        optimizer.state.pop(parameter, None)  # it fills a state piece by piece


def entries(
    optimizer: Optimizer, parameters: Mapping[str, Tensor]
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each entry of each state that is saved: its name here, the state that holds it, its key there."""
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        for key in state:
            if key not in _SHARED:
                yield f"{name}/{key}", state, key


def _load(
    optimizer: CPUOffloadOptimizer,
    parameters: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor | float],
) -> None:
    """Has the optimizer make its states, from what they are to be."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    # those that do not learn have no name here, and no state
    ordered = [names.get(id(p)) for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Tensor | float]] = {}
    for entry, value in wanted.items():
        name, _, key = entry.rpartition("/")
        if name in ordered:
            states.setdefault(ordered.index(name), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def take_states(
    optimizer: Optimizer, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Copies on the CPU of all states' tensors, and their plain numbers, by parameter name and key.

    parameters: the optimizer's, by name. Both are empty before the first update.
    """
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for name, state, key in entries(optimizer, parameters):
        value = state[key]
        if isinstance(value, Tensor):
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        else:
            numbers[name] = value
    return tensors, numbers


def put_states(
    optimizer: Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, float],
) -> None:
    """Puts back what `take_states` gave. Raises ValueError where it is of another optimizer."""
    if not tensors and not numbers:
        optimizer.state.clear()
        return
    if isinstance(optimizer, CPUOffloadOptimizer):
        _load(optimizer, parameters, {**tensors, **numbers})
    make_states(optimizer)
    names = {name for name, _, _ in entries(optimizer, parameters)}
    if names != tensors.keys() | numbers.keys():
        raise ValueError("the optimizer's states are of another optimizer")
    for name, state, key in entries(optimizer, parameters):
        value = state[key]
        if not isinstance(value, Tensor):
            state[key] = numbers[name]
        elif value.shape != tensors[name].shape or value.dtype != tensors[name].dtype:
            raise ValueError(f"the optimizer's {name} is of another size")
        else:
            value.copy_(tensors[name])
