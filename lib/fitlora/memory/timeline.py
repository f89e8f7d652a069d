"""What lived when: the allocations and frees of a traced run, and what follows from them.

A timeline is the trace's whole result: every block with its size and where it was made, and the order
of allocations and frees. Peaks, their instants and what they are made of are read off it afterwards.

A deep model repeats its layers, so its timeline need not be traced at full depth. Within a *segment*
(one pass over one stack of alike layers: the forward of the recomputed ones, say, in the second
micro-batch of the second step) memory goes up or down by the same bytes at every layer. Its highest
level is therefore at one end, and is linear in the number of layers of each stack. Traces of two and
three layers a stack give that line for every segment; the peak of the deep model is the highest of
the lines. A test holds this against traces at full depth, to the byte.

This module imports no torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Segment:
    """A stretch of the run in which memory changes evenly from layer to layer."""

    step: int
    micro_batch: int  # where several share a pass, which pass
    phase: str  # load, forward, backward, optimizer, evaluation
    part: str  # which stack of layers, or "" outside of them

    def __str__(self) -> str:
        return f"{self.phase} of {self.part}" if self.part else self.phase


@dataclass(frozen=True)
class Block:
    """One allocation: its bytes, what ran when it was made, and on which of the step's devices."""

    size: int
    segment: Segment
    module: str
    operator: str
    device: int = 0


@dataclass
class Timeline:
    """Blocks by number, and the order of events: `n` allocates block n, `~n` frees it.

    A kernel's scratch is a block that is freed by the next event. `entered` has, by position in
    `events`, the segments that began there.
    """

    blocks: list[Block] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    entered: list[tuple[int, Segment]] = field(default_factory=list)

    def allocate(self, block: Block) -> int:
        """Appends the allocation of a block; returns its number."""
        self.blocks.append(block)
        self.events.append(len(self.blocks) - 1)
        return len(self.blocks) - 1

    def free(self, number: int) -> None:
        """Appends the free of a block."""
        self.events.append(~number)

    def on(self, device: int) -> "Timeline":
        """What happened on one of several devices; blocks keep their numbers."""
        found = Timeline(self.blocks)
        entered = list(reversed(self.entered))
        for index, event in enumerate([*self.events, None]):
            while entered and entered[-1][0] == index:
                found.entered.append((len(found.events), entered.pop()[1]))
            if event is not None and self.blocks[max(event, ~event)].device == device:
                found.events.append(event)
        return found

    def peaks(self) -> dict[Segment, tuple[int, int]]:
        """The highest level of each segment, in bytes, and the number of events that led to it."""
        found: dict[Segment, tuple[int, int]] = {}
        entered = list(reversed(self.entered))
        level = 0

        def reach(segment: Segment, events: int) -> None:
            if level > found.get(segment, (-1, 0))[0]:
                found[segment] = (level, events)

        for index in range(len(self.events) + 1):
            while entered and entered[-1][0] == index:
                reach(entered.pop()[1], index)
            if index == len(self.events):
                break
            event = self.events[index]
            if event < 0:
                level -= self.blocks[~event].size
            else:
                level += self.blocks[event].size
                reach(self.blocks[event].segment, index + 1)
        return found

    def live(self, events: int) -> list[int]:
        """Numbers of the blocks that live after the first `events` events."""
        alive: dict[int, None] = {}
        for event in self.events[:events]:
            if event >= 0:
                alive[event] = None
            else:
                del alive[~event]
        return list(alive)


@dataclass(frozen=True)
class Level:
    """The highest level of one segment: bytes by what they are for, and the instant."""

    components: Mapping[str, int]
    instant: str

    @property
    def bytes(self) -> int:
        return sum(self.components.values())

    def plus(self, other: "Level", base: "Level", times: int) -> "Level":
        """This level with `times` the difference between `other` and `base` added."""
        components = {
            name: value + times * (other.components[name] - base.components[name])
            for name, value in self.components.items()
        }
        return Level(components, self.instant)


def levels(
    timeline: Timeline, purposes: Mapping[str, Iterable[int]], *, rest: str
) -> dict[Segment, Level]:
    """Each segment's highest level by purpose.

    purposes: numbers of blocks by purpose, the first that has a block counts; others are `rest`.
    """
    purpose_of: dict[int, str] = {}
    for name, numbers in purposes.items():
        for number in numbers:
            purpose_of.setdefault(number, name)
    found = {}
    for segment, (_, position) in timeline.peaks().items():
        components = dict.fromkeys([*purposes, rest], 0)
        for number in timeline.live(position):
            components[purpose_of.get(number, rest)] += timeline.blocks[number].size
        event = timeline.events[position - 1] if position else 0
        block = timeline.blocks[event if event >= 0 else ~event]
        where = ", ".join(part for part in (str(segment), block.module, block.operator) if part)
        found[segment] = Level(components, where)
    return found


def deepen(
    base: Mapping[Segment, Level], deeper: Sequence[tuple[Mapping[Segment, Level], int]]
) -> dict[Segment, Level]:
    """Levels of a deeper model from those of shallow ones.

    deeper: for each stack of layers that is to grow, the levels with one more layer in it, and how
    many more it is to have than `base`. All have the same segments (ValueError otherwise).
    """
    found = {}
    for segment, level in base.items():
        grown = level
        for other, times in deeper:
            if other.keys() != base.keys():
                raise ValueError("traces of different depth have different segments")
            grown = grown.plus(other[segment], level, times)
        found[segment] = grown
    return found
