"""A tensor in flat pieces, read ahead of their use by threads into a few buffers.

A mapped file is read page by page when the page is touched, one thread waiting for each. Reading ahead
in large pieces keeps the disk busy while the last piece is worked on, and memory bounded for any size
of tensor; and pinned buffers go to a GPU at the link's full rate.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fitlora.checkpoint import Checkpoint

_THREADS = 2
_BUFFERS = _THREADS + 1  # one in use, the others being filled


def _unchanged(piece: Tensor) -> Tensor:
    return piece


def read_ahead(
    checkpoint: Checkpoint,
    name: str,
    piece_elements: int,
    *,
    pinned: bool = False,
    then: Callable[[Tensor], Tensor] = _unchanged,
) -> Generator[Tensor, None, None]:
    """The tensor in flat pieces of its own dtype on the CPU, in order.

    A piece is valid until the next one is asked for. All but the last have `piece_elements`. pinned:
    for CUDA. then: what the reading thread makes of each piece. Raises ArtifactError that names a file
    which ends too early, and what `then` raises.
    """
    info = checkpoint.info(name)
    step = piece_elements * info.dtype.itemsize
    starts = range(0, info.bytes, step)
    buffers = [
        torch.empty(min(step, info.bytes), dtype=torch.uint8, pin_memory=pinned)
        for _ in range(min(_BUFFERS, len(starts)))
    ]

    def read(number: int) -> Tensor:
        start = starts[number]
        buffer = buffers[number % len(buffers)][: min(step, info.bytes - start)]
        checkpoint.read_into(name, start, buffer)
        return then(buffer.view(info.dtype))

    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[Future[Tensor]] = deque()
        try:
            for number in range(len(starts)):
                if len(waiting) == len(buffers):
                    yield waiting.popleft().result()  # and its buffer is free when we go on
                waiting.append(pool.submit(read, number))
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
