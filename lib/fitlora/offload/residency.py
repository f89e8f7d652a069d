"""Frozen weights that pass through the device: a ring of slots, filled ahead of the computation.

Frozen weights only travel from the host to the device. Each streamed layer lies in one flat pinned
buffer on the host, and takes one copy to reach a slot: a flat buffer on the device, allocated once,
with the views that the layer's modules need made once. Nothing is allocated, and nothing copied back,
in a step.

Forward visits the layers upwards and backward downwards, so what a layer leaves behind at the turn is
what is wanted next. When a layer is left, the layers that will be wanted soonest keep or get the
slots (Belady's rule, with the future known), so with k slots the top k are not fetched again for
backward, nor the lowest k for the next forward.

A streamed layer's parameters are bound to its slot between `enter` and `leave` only. In between they
are of a kind that raises when it is computed with, so that no layer ever works with another's weights.
Autograd must therefore save handles of the layers and never their tensors (`fitlora.step.linear`).
"""

from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fitlora.offload.disk import BUFFERS, DiskRing
from fitlora.offload.transport import Mark, Transport, aligned, tensor_bytes, untraced, view_as
from fitlora.step.linear import FrozenLinear, Linear4bit

PURPOSE = "streamed weights"


class Away(Tensor):
    """Shape and dtype of a weight that is not on the device now. To compute with it is an error.

    (torch.mm takes a tensor on meta beside one of the CPU, and returns noise.)
    """

    _TELLS = frozenset({"__get__", "size", "dim", "numel", "element_size", "untyped_storage"})

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ not in cls._TELLS:
            raise RuntimeError(f"{func.__name__} of a streamed weight whose layer is not entered")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Place:
    """Where one parameter of a layer lies in the layer's flat buffer."""

    module: nn.Module
    leaf: str
    offset: int
    parameter: nn.Parameter  # on meta: its shape and dtype
    away: Away  # what is bound while it is not on the device


def _places(layer: nn.Module) -> list[_Place]:
    """The frozen linear layers' parameters; others (norms) may be saved by autograd, and stay."""
    found, offset = [], 0
    for module in layer.modules():
        if not isinstance(module, FrozenLinear | Linear4bit):
            continue
        for leaf, parameter in module._parameters.items():
            if parameter is None or parameter.requires_grad:
                continue
            with untraced():  # no fake tensor, even among fake ones
                away = Tensor._make_subclass(Away, parameter)
            found.append(_Place(module, leaf, offset, parameter, away))
            offset += aligned(tensor_bytes(parameter))
    return found


_Layout = tuple[tuple[int, torch.dtype, torch.Size], ...]


def _layout(places: Sequence[_Place]) -> _Layout:
    return tuple((p.offset, p.parameter.dtype, p.parameter.shape) for p in places)


def _size(places: Sequence[_Place]) -> int:
    last = places[-1]
    return last.offset + aligned(tensor_bytes(last.parameter))


def streamed_bytes(layer: nn.Module) -> int:
    """Bytes of a decoder layer that pass through a slot; the layer may be on meta."""
    places = _places(layer)
    return _size(places) if places else 0


def spread(layers: int, streamed: int) -> tuple[int, ...]:
    """Which of `layers` layers to stream where `streamed` of them have to be.

    The resident ones are spread evenly: each gives the transfers between its neighbours time to catch
    up. None of them is at an end, where slots are freed as early as a pass begins and wanted as late as
    it ends. `tests/offload/test_residency.py` holds that against every other choice.
    """
    assert 0 <= streamed <= layers
    count = layers - streamed
    resident = {(index + 1) * layers // (count + 1) for index in range(count)}
    return tuple(index for index in range(layers) if index not in resident)


def streaming(layers: int, streamed: int) -> dict[str, Any]:
    """What a Plan says of streaming `streamed` of `layers` layers: which, and through how many slots.

    A third slot takes the place of a resident layer and is never slower: copies go on while a resident
    layer computes. Where no layer is resident there is nothing to go ahead of.
    """
    slots = 3 if 0 < streamed < layers else 2
    return {"streamed_layers": spread(layers, streamed), "streaming_slots": slots}


class _Slot:
    """A buffer on the device, whose weights it has, and when it may be read and written."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.holds: int | None = None  # place in the order of visits
        self.filled: Mark | Future[Mark] = None  # the copy that fills it
        self.read: Mark = None  # the computation that last read it
        self._views: dict[_Layout, list[nn.Parameter]] = {}

    def views(self, layout: _Layout, places: Sequence[_Place]) -> list[nn.Parameter]:
        """The parameters of a layer in this slot, made once for all layers that are alike."""
        if layout not in self._views:
            self._views[layout] = [
                nn.Parameter(view_as(self.flat, p.offset, p.parameter), requires_grad=False)
                for p in places
            ]
        return self._views[layout]


class Residency:
    """Where the weights of a stack of layers are, and when they move.

    layers: the decoder layers, bottom up, on meta. streamed: the numbers of those whose weights are
    on the host, ascending. slots: the most of them that are on the device at one time. on_disk: which of
    the streamed ones are in a file below `folder` instead of pinned memory, `disk_buffers` of them on
    the host at one time (`fitlora.offload.disk`).

    To fill it: `places` maps the id of each streamed parameter to its tensor on the host; when all are
    filled, `start`. Raises UserError where the host's memory budget, or the disk, is too small.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        streamed: Sequence[int],
        transport: Transport,
        *,
        slots: int = 2,
        on_disk: Collection[int] = (),
        folder: Path | None = None,
        disk_buffers: int = BUFFERS,
    ) -> None:
        assert list(streamed) == sorted(set(streamed)), "streamed layers must be ascending"
        assert slots >= 1
        self.transport = transport
        self._numbers = {index: number for number, index in enumerate(streamed)}
        self._layers = [_places(layers[index]) for index in streamed]
        assert all(self._layers), "a streamed layer has no frozen weights"
        self._layouts = [_layout(places) for places in self._layers]
        self._count = min(slots, len(streamed))
        sizes = {self._numbers[index]: _size(_places(layers[index])) for index in on_disk}
        self._disk = None
        if sizes:
            assert folder is not None, "layers on disk want a folder"
            self._disk = DiskRing(sizes, transport, folder, buffers=disk_buffers)
        self._host: dict[int, Tensor] = {}  # the pinned ones
        self.places: dict[int, Tensor] = {}
        for number, places in enumerate(self._layers):
            if self._disk is not None and number in self._disk:
                flat = self._disk.image(number)
            else:
                flat = self._host[number] = transport.reserve(_size(places), PURPOSE, alike=True)
            with transport.hidden():
                for place in places:
                    view = view_as(flat, place.offset, place.parameter)
                    self.places[id(place.parameter)] = view
        self._slots: list[_Slot] = []
        self._entered: dict[int, tuple[_Slot, bool]] = {}
        self._turns, self._end = False, 0

    def start(self) -> None:
        """Makes the slots and fetches the lowest layers; the host's buffers are full and pinned."""
        self.places = {}
        size = max(map(_size, self._layers), default=0)
        self._slots = [
            _Slot(torch.empty(size, dtype=torch.uint8, device=self.transport.device))
            for _ in range(self._count)
        ]
        for layout, places in zip(self._layouts, self._layers, strict=True):
            self._unbind(places)
            for slot in self._slots:
                slot.views(layout, places)
        self._fetch(range(len(self._layers)))

    @property
    def slot_tensors(self) -> list[Tensor]:
        """The ring's buffers on the device."""
        return [slot.flat for slot in self._slots]

    def layer_bytes(self, index: int) -> int:
        """Of a layer's weights that pass through the slots; 0 for one that stays."""
        number = self._numbers.get(index)
        return 0 if number is None else _size(self._layers[number])

    def begin(self, *, backward_follows: bool, lowest: int = 0) -> None:
        """A pass over the layers begins at the lowest.

        backward_follows: whether it comes back down, as far as layer `lowest`, or begins again from
        below. What a broken pass left behind is put in order.
        """
        self._turns = backward_follows
        self._end = sum(index < lowest for index in self._numbers)
        for number in list(self._entered):
            self._leave(number)
        self._fetch(range(len(self._layers)))

    def enter(self, index: int, *, backward: bool = False) -> None:
        """Makes the weights of layer `index` usable by the computation that follows."""
        number = self._numbers.get(index)
        if number is None:
            return
        slot = self._find(number)
        if slot is None:  # nobody expected it: no pass of a step ends up here
            slot = self._spare(range(len(self._layers)))
            self._fill(slot, number)
        self._entered[number] = (slot, backward)
        filled = slot.filled
        self.transport.wait(filled.result() if isinstance(filled, Future) else filled)
        places = self._layers[number]
        for place, view in zip(places, slot.views(self._layouts[number], places), strict=True):
            place.module._parameters[place.leaf] = view

    def leave(self, index: int) -> None:
        """The computation is done with layer `index`: its slot goes to what is wanted next."""
        number = self._numbers.get(index)
        if number is None:
            return
        backward = self._leave(number)
        self._fetch(self._wanted_after(number, backward))

    def reset(self) -> None:
        """Waits for what is under way and forgets the pass: after an exception or an interruption."""
        if self._disk is not None:
            self._disk.reset()
        self.transport.drain()
        for number in list(self._entered):
            self._leave(number)

    def _leave(self, number: int) -> bool:
        slot, backward = self._entered[number]
        slot.read = self.transport.mark()
        self._unbind(self._layers[number])
        del self._entered[number]
        return backward

    def _wanted_after(self, number: int, backward: bool) -> Sequence[int]:
        """All layers, those that will be wanted first at the front, when `number` has been left."""
        count, end = len(self._layers), self._end
        if backward:
            return [
                *range(number - 1, end - 1, -1),
                *range(min(end, number)),
                *range(number, count),
            ]
        if self._turns:
            return [
                *range(number + 1, count), *range(number, end - 1, -1), *range(min(end, number + 1))
            ]  # fmt: skip
        return [*range(number + 1, count), *range(number + 1)]

    def _fetch(self, wanted: Sequence[int]) -> None:
        """Fills slots with the first of `wanted` that fit and are not there yet."""
        for number in wanted[: self._count]:
            if self._find(number) is None:
                self._fill(self._spare(wanted), number)
        if self._disk is not None:
            self._disk.expect([number for number in wanted if self._find(number) is None])

    def _find(self, number: int) -> _Slot | None:
        return next((slot for slot in self._slots if slot.holds == number), None)

    def _spare(self, wanted: Sequence[int]) -> _Slot:
        """The slot in no use whose layer is wanted last."""
        used = [slot for slot, _ in self._entered.values()]
        free = [slot for slot in self._slots if slot not in used]
        assert free, "more layers are entered at one time than there are slots"
        rank = {number: place for place, number in enumerate(wanted)}
        return max(free, key=lambda s: len(rank) if s.holds is None else rank[s.holds])

    def _fill(self, slot: _Slot, number: int) -> None:
        slot.holds = None  # an interruption in between leaves it unknown
        place = slot.flat[: _size(self._layers[number])]
        if self._disk is not None and number in self._disk:
            slot.filled = self._disk.upload(number, place, slot.read)
        else:
            slot.filled = self.transport.upload(place, self._host[number], slot.read)
        slot.holds = number

    @staticmethod
    def _unbind(places: Sequence[_Place]) -> None:
        for place in places:
            place.module._parameters[place.leaf] = cast(nn.Parameter, place.away)
