"""What lived when: the allocations and frees of a traced run, and what follows from them.

A timeline is the trace's whole result: every block with its size, where it was made and which decoder
layer it is for, and the order of allocations and frees. Peaks, their instants and what they are made
of are read off it afterwards, and so is what the allocator makes of it.

A deep model repeats its layers, so only a few need be traced (`representatives`): enough that every
layer of the deep model has one among them with the same neighbours, `reach` of them on each side, and
the same of whatever changes nothing but its own events (whether its weights are streamed). `deepened`
then writes the timeline of the deep model out of the shallow one: each sweep over the layers
becomes one over all of them, in which a layer does what its representative did, to the blocks of the
layers around it. That a layer frees what is there, in the size that its representative freed, and leaves
behind no more, is checked at every event: a model for which few layers do not tell of many is found out
and traced whole. Tests hold the result against whole traces, event by event.

This module imports no torch.
"""

import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fitlora.memory.allocator import rounded

_NUMBERED = re.compile(r"^.*?\.\d+\.?")  # up to a module's place in its layer


@dataclass(frozen=True)
class Segment:
    """A stretch of the run, and of the stack of alike layers that is at work."""

    step: int
    micro_batch: int  # where several share a pass, which pass
    phase: str  # load, forward, backward, optimizer, evaluation
    part: str  # which stack of layers, or "" outside of them

    def __str__(self) -> str:
        return f"{self.phase} of {self.part}" if self.part else self.phase


@dataclass(frozen=True)
class Block:
    """One allocation: its bytes, and what ran when it was made.

    parts: where it has a part of each of several layers and nothing else, the bytes of each. device:
    which of the step's it is on; None is all of them.
    """

    size: int
    segment: Segment
    module: str
    operator: str
    parts: Mapping[int, int] | None = None
    device: int | None = 0


@dataclass
class Timeline:
    """Blocks by number, and the order of events: `n` allocates block n, `~n` frees it.

    A kernel's scratch is a block that is freed by the next event. A segment that begins is an empty
    block. layers: for each block the decoder layer that it is for, None for what is none's. layer: the
    one at work now; at_work: for each event the one that was. origin: of a deepened timeline, for each
    block its number in the shallow one.
    """

    blocks: list[Block] = field(default_factory=list)
    layers: list[int | None] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    at_work: list[int | None] = field(default_factory=list)
    layer: int | None = None
    origin: list[int] | None = None

    def allocate(self, block: Block) -> int:
        """Appends the allocation of a block for the layer at work; returns its number."""
        self.blocks.append(block)
        self.layers.append(self.layer)
        self._append(len(self.blocks) - 1)
        return len(self.blocks) - 1

    def free(self, number: int) -> None:
        """Appends the free of a block."""
        self._append(~number)

    def enter(self, segment: Segment) -> None:
        """Another segment begins."""
        self.allocate(Block(0, segment, "", "", device=None))

    def instant(self, number: int) -> str:
        """When a block was made, in words."""
        block, layer = self.blocks[number], self.layers[number]
        where, module = str(block.segment), block.module
        if layer is not None:
            where = f"{block.segment.phase} of layer {layer}"
            module = _NUMBERED.sub("", module)
        return ", ".join(part for part in (where, module, block.operator) if part)

    def on(self, device: int) -> "Timeline":
        """What happened on one of several devices; blocks keep their numbers."""
        here = [block.device in (None, device) for block in self.blocks]
        events = [event for event in self.events if here[max(event, ~event)]]
        return Timeline(self.blocks, self.layers, events, origin=self.origin)

    def _append(self, event: int) -> None:
        self.events.append(event)
        self.at_work.append(self.layer)


@dataclass(frozen=True)
class Level:
    """The highest level of one segment: bytes by what they are for, and the instant."""

    components: Mapping[str, int]
    instant: str

    @property
    def bytes(self) -> int:
        return sum(self.components.values())


def levels(
    timeline: Timeline, purposes: Mapping[str, Iterable[int]], *, rest: str
) -> dict[Segment, Level]:
    """Each segment's highest level by purpose, in the order of the run.

    purposes: numbers of blocks by purpose, of the shallow timeline's where this one was deepened; the
    first that has a block counts, and others are `rest`.
    """
    names = [*purposes, rest]
    purpose_of: dict[int, int] = {}
    for index, numbers in enumerate(purposes.values()):
        for number in numbers:
            purpose_of.setdefault(number, index)
    origin = timeline.origin or range(len(timeline.blocks))
    kinds = [purpose_of.get(number, len(purposes)) for number in origin]
    highest: dict[Segment, _Highest] = {}
    now, level = [0] * len(names), 0
    blocks = timeline.blocks
    segment, most = None, _Highest()
    for event in timeline.events:
        if event < 0:
            size = blocks[~event].size
            now[kinds[~event]] -= size
            level -= size
            continue
        block = blocks[event]
        now[kinds[event]] += block.size
        level += block.size
        if (
            block.segment is not segment
        ):  # to look it up for every block would take most of the time
            segment = block.segment
            most = highest.setdefault(segment, _Highest())
        if level > most.bytes:
            most.bytes, most.parts, most.number = level, now.copy(), event
    return {
        segment: Level(dict(zip(names, most.parts, strict=True)), timeline.instant(most.number))
        for segment, most in highest.items()
    }


@dataclass(slots=True)
class _Highest:
    """The highest level so far: by purpose, and the block that made it."""

    bytes: int = -1
    parts: Sequence[int] = ()
    number: int = 0


# --- from few layers to many -----------------------------------------------------------------------


class Irregular(ValueError):
    """The layers that were traced do not tell of the others."""


def _surroundings(kinds: Sequence[Hashable], reach: int) -> list[tuple[Hashable, ...]]:
    """Each layer's kind between those of its neighbours; None beyond the ends."""
    padded = [*[None] * reach, *kinds, *[None] * reach]
    return [tuple(padded[i : i + 2 * reach + 1]) for i in range(len(kinds))]


def representatives(
    kinds: Sequence[Hashable], reach: int, own: Sequence[Hashable] = ()
) -> tuple[list[int], list[int], list[Hashable]]:
    """Few layers among which each layer has one with the same surroundings.

    kinds: of all layers, bottom up. own: of each, what else its representative shares with it, and
    matters to no neighbour. Returns those few, ascending, for every layer the place of its
    representative among them, and what each of the few has for its own, which may be another's.
    """
    around = _surroundings(kinds, reach)
    own = own or [None] * len(kinds)
    dealt = _dealt(around, own, reach)
    wanted = list(zip(around, dealt, strict=True))
    chosen = list(range(len(kinds)))
    while cut := _longest_repeat([around[i] for i in chosen], [wanted[i] for i in chosen]):
        del chosen[cut]
    few = _surroundings([kinds[i] for i in chosen], reach)
    assert few == [around[i] for i in chosen]
    places = {wanted[layer]: place for place, layer in reversed([*enumerate(chosen)])}
    found = [places[one] for one in zip(around, own, strict=True)]
    return chosen, found, [dealt[layer] for layer in chosen]


def _dealt(around: Sequence[Hashable], own: Sequence[Hashable], reach: int) -> list[Hashable]:
    """`own`, such that layers with the same surroundings have all of what several layers have.

    It matters to no neighbour, so that it may be anywhere, and where it always is in the same places,
    the few layers are the same for many patterns. What one layer has alone stays, and so do those below
    it and those within reach of the top.
    """
    count = Counter(own)
    several = [one for one in count if count[one] > 1]
    several.sort(key=repr)
    begin = max((layer + 1 for layer, one in enumerate(own) if count[one] == 1), default=0)
    alike: dict[Hashable, list[int]] = {}
    for layer in range(begin, len(own) - reach - 1):
        alike.setdefault(around[layer], []).append(layer)
    found = list(own)
    for layers in alike.values():
        if len(layers) >= len(several):
            for number, layer in enumerate(layers):
                found[layer] = several[number % len(several)]
    return found


def _longest_repeat(around: Sequence[Hashable], wanted: Sequence[Hashable]) -> slice | None:
    """The longest stretch of layers that may go: what follows it lies as its begin does, and of all
    that is wanted in it there is one elsewhere."""
    left = Counter(wanted)
    best, longest = None, 0
    for start in range(len(around)):
        inside: Counter[Hashable] = Counter()
        for end in range(start + 1, len(around)):
            last = wanted[end - 1]
            inside[last] += 1
            if inside[last] == left[last]:
                break
            if end - start > longest and around[end] == around[start]:
                best, longest = slice(start, end), end - start
    return best


@dataclass
class _Stretch:
    """Events of one layer in a row, or of none. sweep: its number, by which blocks find each other."""

    layer: int | None
    events: list[int] = field(default_factory=list)
    sweep: int = 0


def _stretches(timeline: Timeline) -> list[_Stretch]:
    """Where no layer is at work what is freed is a matter of the layer that it was for."""
    found: list[_Stretch] = []
    for event, layer in zip(timeline.events, timeline.at_work, strict=True):
        number = event if event >= 0 else ~event
        if layer is None:
            layer = timeline.layers[number]
        if not found or found[-1].layer != layer:
            found.append(_Stretch(layer))
        found[-1].events.append(event)
    return found


def _sweeps(stretches: Sequence[_Stretch]) -> list[tuple[list[_Stretch], int]]:
    """Runs of stretches that go over the layers in one direction (1 is upwards); numbers them."""
    found: list[tuple[list[_Stretch], int]] = []
    for stretch in stretches:
        if found and stretch.layer is not None:
            run, direction = found[-1]
            last = run[-1].layer
            if last is not None:
                way = 1 if stretch.layer > last else -1
                if len(run) == 1 or way == direction:
                    run.append(stretch)
                    found[-1] = (run, way)
                    continue
        found.append(([stretch], 1))
    for number, (run, _) in enumerate(found):
        for stretch in run:
            stretch.sweep = number
    return found


def deepened(shallow: Timeline, places: Sequence[int], reach: int) -> Timeline:
    """The timeline of a model with a layer for each of `places`, which is its representative's place.

    reach: the neighbours on each side by which those were chosen. Raises Irregular where the shallow
    timeline does not tell it.
    """
    sweeps = _sweeps(_stretches(shallow))
    # a block's address: the sweep that makes it and its number in the stretch, alike for all layers
    address: dict[int, tuple[int, int]] = {}
    made_by: dict[int, int | None] = {}
    for run, _ in sweeps:
        for stretch in run:
            made = [event for event in stretch.events if event >= 0]
            for order, number in enumerate(made):
                address[number] = (stretch.sweep, order)
                made_by[number] = stretch.layer
    # neighbours are meant by the distance to them; what an earlier sweep left at an end, by itself
    alone = {place: layer for layer, place in enumerate(places) if places.count(place) == 1}
    blocks = [_deep(block, places) for block in shallow.blocks]
    deep = Timeline(origin=[])
    assert deep.origin is not None
    alive: dict[tuple[tuple[int, int], int | None], int] = {}

    def repeat(stretch: _Stretch, layer: int | None) -> None:
        assert deep.origin is not None
        for event in stretch.events:
            if event >= 0:
                alive[address[event], layer] = len(deep.blocks)
                deep.events.append(len(deep.blocks))
                deep.blocks.append(blocks[event])
                deep.layers.append(layer)
                deep.origin.append(event)
                continue
            owner = made_by[~event]
            if owner is not None:
                assert layer is not None
                assert stretch.layer is not None
                distance, sweep = owner - stretch.layer, address[~event][0]
                if abs(distance) <= reach:
                    owner = layer + distance
                elif sweep != stretch.sweep:
                    owner = alone.get(owner)
                else:
                    raise Irregular(
                        f"{shallow.instant(~event)}: what is freed is too far from its layer"
                    )
            number = alive.pop((address[~event], owner), None)
            if number is None or not _alike(deep.blocks[number], blocks[~event]):
                raise Irregular(
                    f"{shallow.instant(~event)}: what is freed is not there in every layer"
                )
            deep.events.append(~number)

    for run, direction in sweeps:
        if run[0].layer is None:
            repeat(run[0], None)
            continue
        of = {stretch.layer: stretch for stretch in run}
        for layer in range(len(places))[::direction]:
            if places[layer] in of:
                repeat(of[places[layer]], layer)
    freed = {~event for event in shallow.events if event < 0}
    for number in alive.values():
        if deep.origin[number] in freed:
            raise Irregular(
                f"{deep.instant(number)}: what is left is freed in a layer that was traced"
            )
    return deep


def _deep(block: Block, places: Sequence[int]) -> Block:
    """The block in the deep model: what has a part of each layer is larger there."""
    if block.parts is None:
        return block
    whole = sum(block.parts.get(place, 0) for place in places)
    return replace(block, size=rounded(whole))


def _alike(one: Block, other: Block) -> bool:
    return one.size == other.size and one.operator == other.operator
