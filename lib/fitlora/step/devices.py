"""The devices that one process has a step on, and which of its layers is on which.

Mostly it is one. Where a model's layers are spread over several, each has a range of them and computes
while the others wait: hidden states are handed on at the borders of ranges, and gradients on their way
back. The embedding is with the first range, the last norm and the head with the last one; so is a table
that is both, as its product with hidden states is the larger part.

What is made for a device is made inside of `at`. On GPUs that makes it the current one, which is where
Triton launches. And it tells which device a tensor is for where tensors do not: an estimate's are all on
meta, and a test's may all be on the CPU, which then stands for several devices and hands on as they do.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from fitlora.errors import UserError
from fitlora.model import decoder_layers
from fitlora.plan import Plan, layer_ranges

_ALREADY_THERE = nullcontext()


def next_devices(first: torch.device, count: int) -> list[torch.device]:
    """`first` and the GPUs behind it, so many. What is no GPU stands for all of them.

    Raises UserError where there are fewer.
    """
    if first.type != "cuda" or count == 1:
        return [first] * count
    lowest = first.index or 0
    if lowest + count > torch.cuda.device_count():
        raise UserError(
            f"the plan spreads layers over {count} GPUs, and there are {torch.cuda.device_count()} "
            "here; plan again with: dvc repro --force profile_hardware"
        )
    return [torch.device("cuda", lowest + number) for number in range(count)]


class Devices:
    """all: of the step, in the order of their layers. here: the number of the one at work.

    counts: how many of the decoder layers each has, bottom up.
    """

    def __init__(self, devices: Sequence[torch.device], counts: Sequence[int]) -> None:
        self.all, self.here = list(devices), 0
        self.ranges = layer_ranges(counts)
        self.of_layer = [number for number, layers in enumerate(self.ranges) for _ in layers]
        self.last = len(self.all) - 1

    @classmethod
    def of(cls, plan: Plan, layers: int, first: torch.device) -> "Devices":
        """As the Plan has it, for a model of so many layers.

        first: the device of the lowest layers; the next GPUs have the others (`next_devices`). Raises
        UserError where the Plan is for another model or for more GPUs than there are.
        """
        counts = plan.layers_per_device or (layers,)
        if sum(counts) != layers:
            raise UserError(
                f"the Plan spreads {sum(counts)} layers over devices, and the model has {layers}"
            )
        return cls(next_devices(first, len(counts)), counts)

    def at(self, number: int) -> AbstractContextManager[None]:
        """Device `number` is at work inside."""
        return _ALREADY_THERE if number == self.here else self._at(number)

    @contextmanager
    def _at(self, number: int) -> Iterator[None]:
        before, self.here = self.here, number
        device = self.all[number]
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                yield
        finally:
            self.here = before

    def at_layer(self, layer: int) -> AbstractContextManager[None]:
        """The device of decoder layer `layer` is at work inside."""
        return self.at(self.of_layer[layer])

    def bring(self, x: Tensor, number: int) -> Tensor:
        """`x`, which is on device `number`, on the one at work: a copy, where that is another one."""
        if number == self.here:
            return x
        # between GPUs both streams wait for the copy, as torch has it, so that x may be freed behind it
        return torch.empty(x.shape, dtype=x.dtype, device=self.all[self.here]).copy_(x)

    def on_each(self, move: Callable[[Callable[[Tensor], Tensor]], Any]) -> list[Any]:
        """What `move` makes on each device, given what brings a tensor of the first one there."""
        found = []
        for number in range(len(self.all)):
            with self.at(number):
                found.append(move(lambda x: self.bring(x, 0)))
        return found

    def embedding(self, model: nn.Module) -> int:
        """The device that the embedding's table is on."""
        ends = cast(Any, model)
        tied = ends.get_input_embeddings().weight is ends.get_output_embeddings().weight
        return self.last if tied else 0

    def modules(self, model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
        """The model's modules by name, of each device. They must be those of a known family."""
        named = list(model.named_modules())
        if self.last == 0:
            return [named]
        ends = cast(Any, model)
        owner = {
            id(ends.get_input_embeddings()): self.embedding(model),
            id(ends.get_decoder().norm): self.last,
            id(ends.get_output_embeddings()): self.last,
        }
        for layer, module in enumerate(decoder_layers(model)):
            owner |= {id(part): self.of_layer[layer] for part in module.modules()}
        found: list[list[tuple[str, nn.Module]]] = [[] for _ in self.all]
        for name, module in named:
            found[owner.get(id(module), 0)].append((name, module))
        return found
