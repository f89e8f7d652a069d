"""What a run's memory says to its user: warnings while there is time, recommendations after the run.

Everything is arithmetic on what the tracker measured, in figures, and each warning is given once.

This module imports no torch.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fitlora.units import MIB, format_bytes

WINDOW = 16  # measurements in which growth has to go on to be taken for a leak
LEAST_GROWTH_BYTES = MIB  # of a window: less than any kernel's workspace that comes late
NEAR = 0.97  # of the limit: beyond the margin that a plan that fits keeps
HOST_LEFT = 0.05  # of the host's memory: where the kernel may soon end processes
FRAGMENTED = 0.10  # of what is reserved: worth a word
GRANULES = 2 * 20 * MIB  # the allocator reserves 20 MiB at a time; so little beyond is no sign
IDLE = 0.10  # of the budget: worth a word


@dataclass
class Growth:
    """Tells a leak from noise, and from what fills once.

    Of three windows the lowest of the last is above the highest of the first, and inside each of them
    it grows as well, at no less than a quarter of the rate.
    """

    values: deque[int] = field(default_factory=lambda: deque(maxlen=3 * WINDOW))

    def add(self, value: int) -> float | None:
        """Takes a measurement; bytes that each adds of late, where that looks like a leak."""
        self.values.append(value)
        if len(self.values) < 3 * WINDOW:
            return None
        every = list(self.values)
        windows = [every[start : start + WINDOW] for start in range(0, 3 * WINDOW, WINDOW)]
        if min(windows[2]) - max(windows[0]) < LEAST_GROWTH_BYTES:
            return None
        rate = (sum(windows[2]) - sum(windows[0])) / (2 * WINDOW * WINDOW)
        half = WINDOW // 2
        inside = min(sum(w[half:]) - sum(w[:half]) for w in windows) / (half * half)
        return rate if inside >= rate / 4 else None


@dataclass
class Edge:
    """Looks out for the edge of what there is. What is not known is None, and not looked at.

    predicted_bytes: the estimate's peak. limit_bytes: what may be allocated on the device.
    """

    predicted_bytes: int | None = None
    limit_bytes: int | None = None
    _given: set[str] = field(default_factory=set)
    _growth: dict[str, Growth] = field(default_factory=dict)

    def look(
        self,
        step: int | None,
        *,
        peak_bytes: int | None = None,
        live_bytes: int | None = None,
        host_bytes: int | None = None,
        host_free_share: float | None = None,
    ) -> list[str]:
        """The warnings that a measurement gives rise to, new ones only.

        peak_bytes: the most that was allocated since the last look; live_bytes: what is between steps;
        host_bytes: the size of the process; host_free_share: of the host's memory, what is free.
        """
        found = []
        for about, text in self._warnings(peak_bytes, live_bytes, host_bytes, host_free_share):
            if about not in self._given:
                self._given.add(about)
                found.append(f"step {step}: {text}" if step is not None else text)
        return found

    def _warnings(
        self, peak: int | None, live: int | None, host: int | None, free: float | None
    ) -> Iterator[tuple[str, str]]:
        limit, predicted = self.limit_bytes, self.predicted_bytes
        if peak is not None and predicted is not None and peak > predicted:
            yield (
                "prediction",
                f"{format_bytes(peak)} were allocated, {format_bytes(peak - predicted)} more than "
                f"predicted ({format_bytes(predicted)}){_left(limit, peak)}",
            )
        if peak is not None and limit is not None and peak > NEAR * limit:
            yield (
                "limit",
                f"{format_bytes(peak)} of the {format_bytes(limit)} that may be allocated were in use; "
                "should it overflow, the step is done again in a smaller plan",
            )
        for name, value in (("the device", live), ("the process", host)):
            growth = None
            if value is not None:
                growth = self._growth.setdefault(name, Growth()).add(value)
            if growth is not None and value is not None:
                room = limit - value if limit is not None and name == "the device" else None
                ahead = f", which reaches the limit in {room / growth:,.0f} of them" if room else ""
                yield (
                    name,
                    f"what {name} holds between steps grows by {format_bytes(int(growth))} each "
                    f"(now {format_bytes(value)}){ahead}; it looks like a leak",
                )
        if free is not None and free < HOST_LEFT:
            yield (
                "host",
                f"only {free:.1%} of the host's memory is free; the system may end processes soon. "
                "Close others, or set hardware.host_memory_budget",
            )


def _left(limit: int | None, peak: int) -> str:
    return "" if limit is None else f"; {format_bytes(max(0, limit - peak))} are left to the limit"


@dataclass(frozen=True)
class Measured:
    """What a run took. None is what the device does not have."""

    peak_bytes: int
    reserved_bytes: int | None
    process_bytes: int | None  # the most that the whole process may have taken of the budget
    budget_bytes: int | None
    phase_bytes: Mapping[str, int]

    @property
    def idle_share(self) -> float | None:
        """Of the budget, what was never used."""
        if self.process_bytes is None or self.budget_bytes is None:
            return None
        return 1 - self.process_bytes / self.budget_bytes

    @property
    def is_idle(self) -> bool:
        """Whether so much was never used that a larger plan might be worth a look."""
        return self.idle_share is not None and self.idle_share > IDLE


def _buys(budget_bytes: int, larger: Sequence[tuple[str, int]]) -> str:
    for what, size in larger:
        if size <= budget_bytes:
            return f"; {what} would fit ({format_bytes(size)} predicted)"
    if not larger:
        return ""
    what, size = min(larger, key=lambda item: item[1])
    return f"; {what} would take {format_bytes(size - budget_bytes)} more than there is"


def recommendations(
    measured: Measured, padding_share: float, larger: Sequence[tuple[str, int]] = ()
) -> Iterator[str]:
    """What the run's memory says about the next one, in figures.

    padding_share: of the tokens, what padding would have been. larger: faster plans than the one that
    was used, in words, and what each is predicted to take of the budget.
    """
    if measured.idle_share is not None and measured.budget_bytes is not None:
        share, budget = max(0.0, measured.idle_share), measured.budget_bytes
        unused = f"{format_bytes(int(share * budget))} of the budget ({share:.0%})"
        yield f"headroom: {unused} were never used{_buys(budget, larger)}"
    if measured.phase_bytes:
        order = sorted(measured.phase_bytes.items(), key=lambda item: -item[1])
        name, highest = order[0]
        text = f"peak: {name}, with {format_bytes(highest)}"
        if len(order) > 1:
            text += f"; next is {order[1][0]}, with {format_bytes(order[1][1])}"
        yield text
    if measured.reserved_bytes:
        lost = max(0, measured.reserved_bytes - measured.peak_bytes)
        share = lost / measured.reserved_bytes
        text = f"fragmentation: {format_bytes(lost)} ({share:.1%}) of what was reserved"
        if share > FRAGMENTED and lost > GRANULES:
            text += "; PYTORCH_CUDA_ALLOC_CONF may have turned expandable segments off"
        yield text
    yield (
        f"padding: none, as rows lie behind each other; padded they would have {padding_share:.1%} of "
        "waste"
    )
