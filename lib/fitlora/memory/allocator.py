"""What PyTorch's CUDA caching allocator reserves for a sequence of allocations and frees.

What fails on a GPU is not what is allocated but what is reserved: memory that the allocator took from
the driver and keeps, in blocks that may have the wrong sizes. This replays events through the
allocator's rules, as c10/cuda/CUDACachingAllocator.cpp has them (torch 2.4 and later):

- sizes are rounded up to 512 bytes; up to 1 MiB they live in a pool of their own;
- a free block is taken by best fit, the lowest address among equals, and split;
- a freed block joins the free ones beside it;
- with expandable segments, as `fitlora.device` sets them, a pool is one range of addresses that is
  mapped as far as it is needed, 2 MiB at a time for small blocks and 20 MiB for large ones. What is
  free before an unmapped stretch counts towards what is wanted, and best fit prefers it last;
- without them a miss takes a segment: 2 MiB for small blocks, 20 MiB for those below 10 MiB, else the
  size rounded up to 2 MiB;
- where a limit would be passed, all that is cached goes back to the driver first, and what is too much
  even then is an overflow.

Left out: other streams' pools (FitLoRA allocates on one stream) and captured graphs.

This module imports no torch.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

MIB = 2**20
ROUND = 512
SMALL = 1 * MIB  # the largest size in the pool of small blocks
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
MIN_LARGE = 10 * MIB  # from here on a segment is as large as what it is taken for
LARGE_ROUND = 2 * MIB
_ENDLESS = 2**60  # the address space of an expandable segment


class Overflow(Exception):
    """An allocation would have passed the limit even with nothing cached."""


def rounded(size: int) -> int:
    """Bytes of the block that serves a request of `size` bytes."""
    return max(ROUND, -(-size // ROUND) * ROUND)


def segment_size(size: int) -> int:
    """Bytes that are asked of the driver for a block of `size` bytes.

    With expandable segments it is only what the limit is held against.
    """
    if size <= SMALL:
        return SMALL_SEGMENT
    if size < MIN_LARGE:
        return LARGE_SEGMENT
    return -(-size // LARGE_ROUND) * LARGE_ROUND


@dataclass(eq=False, slots=True)
class _Block:
    """A stretch of a segment's addresses: allocated, free, or (not `mapped`) with no memory behind."""

    pool: "_Pool"
    address: int
    size: int
    allocated: bool = False
    mapped: bool = True
    before: "_Block | None" = None
    after: "_Block | None" = None

    @property
    def free(self) -> bool:
        return self.mapped and not self.allocated

    @property
    def could_grow(self) -> int:
        """Unmapped bytes behind it."""
        after = self.after
        return 0 if after is None or after.mapped else after.size

    def split(self, size: int) -> "_Block":
        """Keeps `size` bytes; the rest is a new block behind it, of the same kind."""
        rest = _Block(self.pool, self.address + size, self.size - size, mapped=self.mapped)
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.size, self.after = size, rest
        return rest

    def swallow_next(self) -> None:
        """Takes the block behind into itself."""
        gone = self.after
        assert gone is not None
        self.size += gone.size
        self.after = gone.after
        if gone.after is not None:
            gone.after.before = self


@dataclass
class _Pool:
    """The blocks of one kind. free: by size, then address; unmapped: by address."""

    small: bool
    free: list[tuple[int, int, _Block]] = field(default_factory=list)
    unmapped: list[_Block] = field(default_factory=list)

    @property
    def granule(self) -> int:
        return SMALL_SEGMENT if self.small else LARGE_SEGMENT

    def put(self, block: _Block) -> _Block:
        """Keeps a free block, joined with those beside it; returns what it became part of."""
        before, after = block.before, block.after
        if before is not None and before.free:
            self.remove(before)
            before.swallow_next()
            block = before
        if after is not None and after.free:
            self.remove(after)
            block.swallow_next()
        self.put_alone(block)
        return block

    def put_alone(self, block: _Block) -> None:
        """Keeps a free block as it is."""
        insort(self.free, (block.size, block.address, block))

    def remove(self, block: _Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.address))]

    def best_fit(self, size: int) -> _Block | None:
        """The free block to serve `size` bytes from, still in the pool."""
        index = bisect_left(self.free, (size,))
        if index == len(self.free):
            return None
        found = self.free[index][-1]
        while (grows := found.could_grow) and index + 1 < len(self.free):
            index += 1
            other = self.free[index][-1]
            if other.size + other.could_grow >= found.size + grows:
                break
            found = other
        return found


class Allocator:
    """The caching allocator of one device and stream. limit_bytes: the most it may reserve."""

    def __init__(self, *, expandable: bool = True, limit_bytes: int | None = None) -> None:
        self.expandable, self.limit_bytes = expandable, limit_bytes
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.retries = 0  # times that what was cached had to go back
        self._pools = (_Pool(small=False), _Pool(small=True))
        self._end = 0  # of the addresses in use, where each miss takes a segment
        if expandable:
            for pool in self._pools:
                pool.unmapped.append(_Block(pool, 0, _ENDLESS, mapped=False))

    def allocate(self, size: int) -> _Block:
        """A block for `size` bytes; raises Overflow where the limit leaves no room."""
        size = rounded(size)
        pool = self._pools[size <= SMALL]
        block = pool.best_fit(size) or self._more(pool, size)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = self._more(pool, size)
        if block is None:
            raise Overflow(f"{size:,} bytes beside {self.reserved_bytes:,} that are reserved")
        pool.remove(block)
        block.allocated = True
        rest = block.size - size
        # without expandable segments a large block keeps a rest of up to 1 MiB
        if rest >= ROUND if self.expandable or pool.small else rest > SMALL:
            pool.put_alone(block.split(size))  # what is behind a free block is not free
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return block

    def free(self, block: _Block) -> None:
        """Caches a block that `allocate` gave."""
        block.allocated = False
        self.allocated_bytes -= block.size
        block.pool.put(block)

    def empty_cache(self) -> None:
        """Gives back to the driver what nothing lies in: segments, or granules of expandable ones."""
        for pool in self._pools:
            for *_, block in list(pool.free):
                if self.expandable:
                    self._unmap(pool, block)
                elif block.before is None and block.after is None:
                    pool.remove(block)
                    self.reserved_bytes -= block.size

    def _more(self, pool: _Pool, size: int) -> _Block | None:
        """A free block with new memory in it, in the pool; None where the limit forbids it."""
        wanted = segment_size(size)
        if self.limit_bytes is not None and self.reserved_bytes + wanted > self.limit_bytes:
            return None
        if self.expandable:
            return self._grow(pool, size)
        block = _Block(pool, self._end, wanted)
        self._end += wanted
        self._reserve(wanted)
        return pool.put(block)

    def _grow(self, pool: _Pool, size: int) -> _Block:
        """Maps what lacks to a free block of `size` bytes, at the lowest place with the addresses."""
        for gap in pool.unmapped:
            start = gap.before if gap.before is not None and gap.before.free else gap
            room, block = 0, start
            while room < size and (block.free or not block.mapped):
                room += block.size
                if block.after is None:
                    break
                block = block.after
            if room >= size:
                break
        block = start
        if not block.mapped:
            block = self._map(pool, block, min(size, block.size))
        while block.size < size:
            assert block.after is not None
            block = self._map(pool, block.after, min(size - block.size, block.after.size))
        return block

    def _map(self, pool: _Pool, gap: _Block, size: int) -> _Block:
        """Memory for the first `size` bytes of `gap`, in whole granules; the free block it is in."""
        size = min(gap.size, -(-size // pool.granule) * pool.granule)
        index = pool.unmapped.index(gap)
        pool.unmapped[index : index + 1] = [gap.split(size)] if gap.size > size else []
        gap.mapped = True
        self._reserve(size)
        return pool.put(gap)

    def _unmap(self, pool: _Pool, block: _Block) -> None:
        """Gives back the whole granules of a free block."""
        start = -(-block.address // pool.granule) * pool.granule
        end = (block.address + block.size) // pool.granule * pool.granule
        if end <= start:
            return
        pool.remove(block)
        if start > block.address:
            kept, block = block, block.split(start - block.address)
            pool.put_alone(kept)
        if end < block.address + block.size:
            pool.put_alone(block.split(end - block.address))
        block.mapped = False
        self.reserved_bytes -= block.size
        for other in (block.before, block.after):
            if other is not None and not other.mapped:
                pool.unmapped.remove(other)
                if other is block.before:
                    other.swallow_next()
                    block = other
                else:
                    block.swallow_next()
        insort(pool.unmapped, block, key=lambda gap: gap.address)

    def _reserve(self, count: int) -> None:
        self.reserved_bytes += count
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)


def replay(
    sizes: Sequence[int],
    events: Sequence[int],
    *,
    expandable: bool = True,
    limit_bytes: int | None = None,
) -> Allocator:
    """The allocator after the events of a `Timeline`: `n` allocates `sizes[n]` bytes, `~n` frees them.

    Raises Overflow where they do not go into `limit_bytes`.
    """
    allocator = Allocator(expandable=expandable, limit_bytes=limit_bytes)
    blocks: dict[int, _Block] = {}
    for event in events:
        if event >= 0:
            if sizes[event]:  # an empty tensor has no block
                blocks[event] = allocator.allocate(sizes[event])
        elif ~event in blocks:
            allocator.free(blocks.pop(~event))
    return allocator
