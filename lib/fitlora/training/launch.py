"""Starting the processes of a run on this host, as torchrun does: by PyTorch's elastic agent.

So that `dvc repro` and everything else that trains needs no launcher. The agent watches its processes:
where one is lost it ends the others, and a signal to it reaches all of them. Nothing is started again
by itself, as most errors would only come again; `torchrun --max-restarts` does that.
"""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from uuid import uuid4

from fitlora.errors import UserError


def launch(processes: int, module: str, arguments: Sequence[str]) -> None:
    """Runs `python -m module arguments` in so many processes on this host, to the end of all of them.

    Raises SystemExit with the status of the first that failed (it has said why), KeyboardInterrupt
    after Ctrl-C, and UserError where a signal ended one.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        local_addr="localhost",  # a host's own name need not lead anywhere
    )
    with _own_handlers():
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
        except ChildFailedError as error:
            failures = error.failures
            rank = min(failures, key=lambda rank: _is_consequence(failures[rank].exitcode))
            failure = failures[rank]
            if failure.exitcode > 0:
                raise SystemExit(failure.exitcode) from None
            name = signal.Signals(-failure.exitcode).name
            raise UserError(
                f"process {rank} of {processes} was ended by {name} (the kernel does that for want of "
                "host memory); the same command goes on from what is saved"
            ) from None


def _is_consequence(status: int) -> int:
    """How likely a process ended so because another one did: with a message, or by the agent."""
    return 2 if status == -signal.SIGTERM else int(status > 0)


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Puts back the handlers of signals, which the agent takes for itself."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
