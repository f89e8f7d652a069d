"""Tensors in flat pieces, read ahead of their use by threads into a few buffers.

A mapped file is read page by page when the page is touched, one thread waiting for each. Reading ahead
in large pieces keeps the disk busy while the last pieces are worked on, and memory bounded for any
size of tensor; and pinned buffers go to a GPU at the link's full rate.
"""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fitlora.checkpoint import Checkpoint

_BUFFERS = 4
_THREADS = 2


def piece_count(elements: int, piece_elements: int) -> int:
    """How many pieces `read_ahead` gives of a tensor."""
    return -(-elements // piece_elements)


def read_ahead(
    checkpoint: Checkpoint, names: Sequence[str], piece_elements: int, *, pinned: bool = False
) -> Generator[Tensor, None, None]:
    """The tensors one after the other, in flat pieces of their own dtype on the CPU.

    A piece is valid until the next one is asked for. All of a tensor's pieces but its last have
    `piece_elements`. pinned: for CUDA. Raises ArtifactError that names a file which ends too early.
    """
    jobs = []
    for name in names:
        info = checkpoint.info(name)
        step = piece_elements * info.dtype.itemsize
        for start in range(0, info.bytes, step):
            jobs.append((name, info.dtype, start, min(step, info.bytes - start)))
    size = max((job[3] for job in jobs), default=0)
    buffers = [
        torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        for _ in range(min(_BUFFERS, len(jobs)))
    ]

    def read(number: int) -> Tensor:
        name, dtype, start, length = jobs[number]
        buffer = buffers[number % len(buffers)][:length]
        checkpoint.read_into(name, start, buffer)
        return buffer.view(dtype)

    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[Future[Tensor]] = deque()
        try:
            for number in range(len(jobs)):
                if len(waiting) == len(buffers):
                    yield waiting.popleft().result()  # and its buffer is free when we go on
                waiting.append(pool.submit(read, number))
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
