"""Several processes that share an effective batch: who they are, and how they agree.

Each has the model for itself, streamed or not, and works on every n-th sequence of a batch. What travels
is the adapters' gradients, summed once in an optimizer step, and a few flags. That is data parallelism
by PyTorch's process groups: NCCL between GPUs, gloo for what is on the host. The model is not wrapped,
as our gradients lie in one flat buffer that is summed in one call.

A process learns who it is from the environment that torchrun and `accelerate launch` set. Anything that
a collective raises, memory aside, means that another process is gone: `LostProcess`.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from fitlora.device import is_overflow
from fitlora.errors import UserError
from fitlora.offload.shared import SharedMemory, new_file

Value = TypeVar("Value")

# A process that died is noticed at once, by its broken connections. This is for a host that went silent,
# and is longer than what any process does alone: reading its part of the weights, saving a checkpoint.
TIMEOUT = timedelta(minutes=20)

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class LostProcess(Exception):
    """Another process of the run is gone, or does not answer."""


class Ranks:
    """The processes of a run: one alone.

    rank: of this process, from 0; the first one speaks, logs and saves. host_rank, host_devices: the
    same among the processes of this host that can share memory.
    """

    rank = 0
    devices = 1
    host_rank = 0
    host_devices = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sums each tensor over the processes, in place."""

    def any(self, flag: bool) -> bool:
        """Whether it is so on any of them. Each has to ask."""
        return flag

    def gather(self, value: Value) -> list[Value]:
        """What each of them gives, in their order."""
        return [value]

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What the first process makes, on all of them."""
        return make()

    def shared_memory(self, wait: Callable[[], object]) -> SharedMemory | None:
        """Memory that the processes of this host have in common; None for one that is alone there.

        wait: returns when all processes have called it.
        """
        return None


class JoinedRanks(Ranks):
    """By torch.distributed, whose default group is there. Raises LostProcess."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.devices = torch.distributed.get_world_size()
        here = _host()
        hosts = self.gather(here)
        self.host_rank = hosts[: self.rank].count(here)
        self.host_devices = hosts.count(here)
        self._leader = hosts.index(here)

    def reduce(self, tensors: Sequence[Tensor]) -> None:
        with _others_answer():
            under_way = [torch.distributed.all_reduce(t, async_op=True) for t in tensors]
            for work in under_way:
                work.wait()

    def any(self, flag: bool) -> bool:
        # on the host: an overflow is known there, and no GPU has to be waited for
        count = torch.full((), float(flag))
        self.reduce([count])
        return bool(count > 0)

    def gather(self, value: Value) -> list[Value]:
        found: list[Any] = [None] * self.devices
        with _others_answer():
            torch.distributed.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], Value]) -> Value:
        found: list[Any] = [make() if self.is_first else None]
        with _others_answer():
            torch.distributed.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        return found[0]  # type: ignore[no-any-return]

    def shared_memory(self, wait: Callable[[], object]) -> SharedMemory | None:
        file = new_file() if self.host_rank == 0 and self.host_devices > 1 else None
        process, number = self.gather((os.getpid(), file))[self._leader]
        if self.host_devices > 1 and file is None:
            file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR)
        self.any(False)  # the first one's is open until all have it
        if file is None:
            return None
        return SharedMemory(file, self.host_rank, self.host_devices, wait)


@contextmanager
def _others_answer() -> Iterator[None]:
    """Around a collective. gloo, NCCL and the store all raise RuntimeErrors of many words."""
    try:
        yield
    except RuntimeError as error:
        if is_overflow(error):
            raise
        # less where in gloo it was, and advice
        said = re.sub(r"^\[[^]]*\] ", "", str(error)).partition(". ")[0]
        raise LostProcess(f"another process of the run is gone ({said})") from error


def _host() -> tuple[str, str]:
    """Alike for processes that run on one kernel and see each other in /proc."""
    boot, pids = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.is_file():
        return f"{os.uname().nodename}:{os.getpid()}", ""
    return boot.read_text().strip(), os.readlink(pids)


def is_launched() -> bool:
    """Whether torchrun, or another launcher, has made this process one of a group."""
    return all(name in os.environ for name in _LAUNCHED)


@contextmanager
def joined(device: Literal["cuda", "cpu"]) -> Iterator[Ranks]:
    """The group that this process was launched into, inside; one process alone where it was not.

    On GPUs it makes the process's own one the current one. Processes but the first are silent on
    standard output. Raises UserError where there are more processes than GPUs, or the others do not
    come.
    """
    if not is_launched():
        yield Ranks()
        return
    local, size = int(os.environ["LOCAL_RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    options: dict[str, Any] = {"backend": "gloo"}
    if device == "cuda":
        count = torch.cuda.device_count()
        if local >= count:
            raise UserError(
                f"this is process {local + 1} of this host, which has {count} GPU(s); start one process "
                "for each GPU (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local)
        # with the device named, NCCL takes its memory now and not in the first step
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": torch.device("cuda", local)}
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    try:
        torch.distributed.init_process_group(timeout=TIMEOUT, **options)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of the run do not find each other: {error}") from None
    ranks = JoinedRanks()
    try:
        if ranks.is_first:
            yield ranks
        else:
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
                yield ranks
    except UserError as error:
        if ranks.is_first:
            raise
        raise UserError(f"process {ranks.rank}: {error}") from error
    except LostProcess as error:
        raise UserError(f"{error}; start the same command again") from None
    # not after an error: others may be gone, and would be waited for
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
