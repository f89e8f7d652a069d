"""What two processes of a test do: python -m tests.training.several_worker."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fitlora.console import run as run_main
from fitlora.offload.host_memory import HostMemory
from fitlora.offload.transport import make_transport
from fitlora.step.build import build_step
from fitlora.step.weights import RandomWeights
from fitlora.training.agreement import Agreement
from fitlora.training.batches import Batches
from fitlora.training.loop import Run
from fitlora.training.parallel import Ranks, joined
from tests.step import steps
from tests.training.runs import make_run

TRAIN: dict[str, Any] = {
    "max_steps": 6, "warmup_steps": 0, "learning_rate": 2e-3, "evaluate_every": 3,
    "checkpoint_every": 2, "effective_batch_size": 5,
}  # fmt: skip
WIDE = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4}


def make(folder: Path, ranks: Ranks) -> Run:
    """Six steps of five sequences, with dropout, that validate on seven."""
    plan = steps.plan(
        devices=ranks.devices, effective_batch_size=5, micro_batch_size=2, evaluation_batch_size=2
    )
    return make_run(
        folder,
        steps.step(plan, steps.settings(dropout=0.1, **TRAIN)),
        batches=Batches(steps.sequences(12), 5, seed=0),
        validation=steps.sequences(7, seed=1),
        ranks=ranks,
        **TRAIN,
    )


def figures(run: Run) -> list[float]:
    """Losses and norms of all steps and validations, in their order."""
    names = ("loss", "gradient_norm", "validation_loss")
    return [record[name] for record in run.log.records for name in names if name in record]


def mapped(word: str) -> dict[str, int]:
    """Bytes of this process's mappings whose name has `word`: resident, and its part of them."""
    found = {"Rss": 0, "Pss": 0}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            inside = word in line
        elif inside and first[:-1] in found:
            found[first[:-1]] += int(rest[0]) * 1024
    return found


def streamed(ranks: Ranks) -> dict[str, Any]:
    """Two steps with all on the device, and with every layer from host memory that they share."""
    losses, sizes = [], {}
    for layers in ((), (0, 1, 2, 3)):
        plan = steps.plan(
            devices=ranks.devices, micro_batch_size=2, streamed_layers=layers,
            recompute_layers=layers, embedding="host" if layers else "device",
            head="host" if layers else "device", micro_batches_per_pass=2 if layers else 1,
        )  # fmt: skip
        shared = ranks.shared_memory(Agreement(ranks).meet) if layers else None
        transport = make_transport(torch.device("cpu"), HostMemory(), shared)
        weights = RandomWeights(torch.device("cpu"))
        made = build_step(
            steps.config(**WIDE), plan, steps.settings(dropout=0.1), weights, transport
        )
        batch = steps.sequences(7)
        for step in range(2):
            found = made.run(
                batch[ranks.rank :: ranks.devices],
                step=step,
                learning_rate=1e-2,
                total_target_tokens=sum(s.target_tokens for s in batch),
                reduce_gradients=ranks.reduce,
            )
            losses.append(float(found.loss))
        ranks.any(False)  # pages are in use by all, or by none
        sizes = {"shared": transport.shared_bytes, **mapped("memfd:fitlora")}
        ranks.any(False)
    return {"losses": losses, **sizes}


def main() -> None:
    mode, folder = sys.argv[1], Path(sys.argv[2])
    with joined("cpu") as ranks:
        if mode == "check":
            found = {
                "place": [ranks.rank, ranks.devices, ranks.host_rank, ranks.host_devices],
                "gathered": ranks.gather({"rank": ranks.rank}),
                "from_first": ranks.from_first(lambda: ranks.rank),
                "any": [ranks.any(False), ranks.any(ranks.rank == 1)],
                "streamed": streamed(ranks),
            }
            (folder / f"found{ranks.rank}.json").write_text(json.dumps(found))
        print(f"this is process {ranks.rank}", flush=True)  # it may be ended by a signal
        run = make(folder / "run", ranks)
        run.begin()
        plain = run.recovery.step.run

        def step(*arguments: Any, **options: Any) -> Any:
            index = run.progress.done
            mark = folder / f"killed_in_step_{index + 1}"
            if ranks.rank == 1 and index in (3, 4) and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **options)

        run.recovery.step.run = step  # type: ignore[method-assign]
        with run.stop:
            run()
        (folder / f"figures{ranks.rank}.json").write_text(json.dumps(figures(run)))


if __name__ == "__main__":
    run_main(main)
