"""Does training die? Faults by the hundred, and what each cost.

    python -m benchmarks.faults --json benchmarks/results/faults.cpu.json

Each fault hits a real training run of a tiny 4-bit model on the CPU: the pipeline's own stage, in this
process or in a forked one. What is compared is what it leaves with what an undisturbed run leaves:
after an overflow the losses to summation order, after anything else the adapter's bytes and the log's
lines (apart from times). Instants are drawn with a seed. A row counts how often a fault was injected
(`injected`), how often the run or its repetition came to the promised end (`survived`), the most steps
that had to be done again (`lost_steps`), and how often a result differed (`result_differs`).
"""

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write_result
from benchmarks.faults_bench import (
    CHECKPOINT_EVERY,
    STEPS,
    Bench,
    Disturbance,
    LimitedMemory,
    Result,
    host_apart,
    saved,
    signal_at,
)
from fitlora.artifacts import HARDWARE, PLAN, QUANTIZED_MODEL, TRAINING_LOG
from fitlora.plan import Plan
from fitlora.training.checkpoint import MANIFEST, TENSORS

PHASES = ("loading", "forward", "backward", "optimizer", "evaluation", "save")
# Overflows in a row: from as many as there are rungs up to the first on the host, to all there are.
RUNGS = (4, 7)
# Of a loss: what another order of summation came to, times ten.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Found:
    """What came of one fault."""

    survived: bool
    lost_steps: int = 0
    differs: bool = False
    says: str = ""  # the line that told the user


@dataclass
class Faults:
    """The faults, on a bench. Each method injects one kind `count` times."""

    bench: Bench
    draw: random.Random

    def __post_init__(self) -> None:
        start = time.perf_counter()
        self.undisturbed = self.bench.train_apart(self.bench.project())
        self.seconds = time.perf_counter() - start
        assert self.undisturbed.status == 0, self.undisturbed.output
        counting = Disturbance()
        self.bench.train(self.bench.project(), counting.around())
        self.operators = counting.phases

    # --- memory -------------------------------------------------------------------------------------

    def overflow(self, phase: str, count: int) -> Iterator[Found]:
        """An allocation fails once, at any operator of a phase."""
        for _ in range(count):
            at = frozenset({self.draw.choice(self.operators[phase])})
            disturbance = Disturbance(at)
            found = self.bench.train(self.bench.project(), disturbance.around())
            assert disturbance.raised == 1
            yield self._same_to_order(found)

    def pressure(self, count: int) -> Iterator[Found]:
        """Another process takes memory for a while, so that only smaller plans fit."""
        free = LimitedMemory(lambda operator: sys.maxsize)
        self.bench.train(self.bench.project(), free.around())
        for _ in range(count):
            start = self.draw.randrange(free.operators)
            end = start + self.draw.randrange(free.operators)
            left = int(free.highest * self.draw.uniform(0.75, 0.95))

            def limit(operator: int, start: int = start, end: int = end, left: int = left) -> int:
                return left if start <= operator < end else sys.maxsize

            limited = LimitedMemory(limit)
            found = self.bench.train(self.bench.project(), limited.around())
            yield self._same_to_order(found)

    def to_the_host(self, count: int) -> Iterator[Found]:
        """Every attempt overflows until the step has been made anew with more of it on the host."""
        for _ in range(count):
            start = self.draw.choice(self.operators[self.draw.choice(("forward", "backward"))])
            times = self.draw.randint(*RUNGS)
            disturbance = Disturbance(frozenset(range(start, start + 3 * times, 3)))
            with host_apart():
                found = self.bench.train(self.bench.project(), disturbance.around())
            plans = [Plan.model_validate(r["after"]) for r in found.records if r["event"] == "plan"]
            same = self._same_to_order(found)
            moved = bool(plans) and plans[-1].uses_host
            yield Found(same.survived and moved, same.lost_steps, same.differs, same.says)

    def host_memory(self, count: int) -> Iterator[Found]:
        """The host's allocator fails, as PyTorch says it on the CPU."""
        text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 65536 bytes."
        for _ in range(count):
            at = self.draw.choice(self.operators[self.draw.choice(PHASES)])
            disturbance = Disturbance(frozenset({at}), lambda phase: RuntimeError(text))
            yield self._same_to_order(self.bench.train(self.bench.project(), disturbance.around()))

    def nothing_fits(self, count: int) -> Iterator[Found]:
        """Memory stays short for the smallest plan too; then it is there again."""
        for _ in range(count):
            folder = self.bench.project()
            start = self.draw.choice(self.operators["backward"])
            ever = Disturbance(frozenset(range(start, 10**6)))
            stopped = self.bench.train(folder, ever.around())
            told = self._error(stopped, "smallest plan", "free")
            again = self.bench.train(folder)
            same = self._same_to_order(again)
            yield Found(told and same.survived, same.lost_steps, same.differs, stopped.output)

    # --- the process --------------------------------------------------------------------------------

    def signals(self, number: signal.Signals, count: int) -> Iterator[Found]:
        """A signal at any instant of the run, from its start; the same command then goes on."""
        orderly = number != signal.SIGKILL
        lines = len(self.undisturbed.records)
        for _ in range(count):
            folder = self.bench.project()
            at_line = self.draw.randrange(lines)
            after = self.draw.uniform(0, 2 * self.seconds / lines)
            disturb = signal_at(folder / TRAINING_LOG, at_line, after, number)
            hit = self.bench.train_apart(folder, disturb)
            at = hit.last_step
            again = self.bench.train_apart(folder)
            over = (
                hit.status == 0 or hit.adapter == self.undisturbed.adapter
            )  # nothing to go on with
            lost = 0 if over else max(0, at - again.resumed_at)
            as_promised = lost <= (0 if orderly and "which is saved" in hit.output else _PROMISED)
            found = self._identical(again, lost)
            ending = hit.output.splitlines()[-1] if hit.output else ""
            yield Found(found.survived and as_promised, lost, found.differs, ending)

    def lost_gpu(self, count: int) -> Iterator[Found]:
        """The driver says that the GPU is gone; later it is there again."""
        for _ in range(count):
            folder = self.bench.project()
            at = self.draw.choice(self.operators["backward"])
            gone = Disturbance(
                frozenset({at}),
                lambda phase: RuntimeError("CUDA error: unspecified launch failure"),
            )
            stopped = self.bench.train(folder, gone.around())
            again = self.bench.train(folder)
            lost = stopped.last_step - again.resumed_at
            told = self._error(stopped, "GPU was lost", "same command")
            found = self._identical(again, lost)
            yield Found(told and found.survived, lost, found.differs, stopped.output)

    # --- files --------------------------------------------------------------------------------------

    def full_disk(self, count: int) -> Iterator[Found]:
        """No room for a checkpoint: the system refuses to let files grow so far."""
        for _ in range(count):
            folder = self.bench.project()
            size = self.draw.randrange(2_000, 60_000)

            def no_room(size: int = size) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

            stopped = self.bench.train_apart(folder, prepare=no_room)
            again = self.bench.train_apart(folder)
            lost = stopped.last_step - again.resumed_at
            told = self._error(stopped, "cannot be written", "Make room")
            found = self._identical(again, lost)
            yield Found(told and found.survived, lost, found.differs, stopped.output)

    def damaged_checkpoint(self, spoil: Callable[[Path], object], count: int) -> Iterator[Found]:
        """The newest checkpoint is damaged: it is named, and the one before is used."""
        for _ in range(count):
            folder = self.bench.project()
            self._stop_in_the_middle(folder)
            before, newest = saved(folder)[-2:]
            spoil(newest)
            again = self.bench.train(folder)
            lost = int(newest.name[-8:]) - again.resumed_at
            named = newest.name in again.output and "skipped" in again.output
            found = self._identical(again, lost)
            right = again.resumed_at == int(before.name[-8:])
            yield Found(found.survived and named and right, lost, found.differs, again.output)

    def foreign_checkpoint(self, count: int) -> Iterator[Found]:
        """Another run's checkpoint lies where this run's would."""
        for _ in range(count):
            folder, other = self.bench.project(), self.bench.project()
            self._stop_in_the_middle(folder)
            self._stop_in_the_middle(other, seed=self.draw.randrange(1, 1000))
            theirs, mine = saved(other)[-1], saved(folder)[-1]
            for old in saved(folder):
                shutil.rmtree(old)
            shutil.copytree(theirs, mine)
            again = self.bench.train(folder)
            named = "other inputs" in again.output and "train.seed" in again.output
            found = self._identical(again, 0)
            anew = again.resumed_at == 0
            yield Found(found.survived and named and anew, 0, found.differs, again.output)

    def damaged_artifact(self, name: Path, count: int) -> Iterator[Found]:
        """A file that training reads is cut short. name: its path, or a pattern for it."""
        for _ in range(count):
            folder = self.bench.project()
            file = sorted(folder.glob(str(name)))[-1]
            content = file.read_bytes()
            cut = self.draw.randrange(1, len(content) - 1)
            file.write_bytes(content[:cut])
            stopped = self.bench.train(folder)
            told = self._error(stopped, file.name, "dvc repro")
            file.write_bytes(content)
            found = self._identical(self.bench.train(folder), 0)
            yield Found(told and found.survived, 0, found.differs, stopped.output)

    def changed_inputs(self, what: str, count: int) -> Iterator[Found]:
        """Data or params change between a run that was cut short and the next: it begins anew."""
        for index in range(count):
            folder, fresh = self.bench.project(), self.bench.project()
            self._stop_in_the_middle(folder)
            train: dict[str, Any] = {}
            if what == "params":
                train["learning_rate"] = 5e-3 / (index + 1)
            else:
                row = f'{{"prompt": "new {index}", "completion": "rows"}}\n'
                for each in (folder, fresh):
                    with (each / "train.jsonl").open("a") as file:
                        file.write(row)
            again = self.bench.train(folder, **train)
            expected = self.bench.train(fresh, **train)
            named = "train.learning_rate" if what == "params" else "the training rows"
            told = "not going on from" in again.output and named in again.output
            differs = again.adapter != expected.adapter
            survived = again.status == 0 and told and again.resumed_at == 0 and not differs
            yield Found(survived, 0, differs, again.output)

    def diverged(self, count: int) -> Iterator[Found]:
        """The loss is no longer a number."""
        for index in range(count):
            folder = self.bench.project()
            stopped = self.bench.train(folder, learning_rate=10.0 ** (30 + index), warmup_steps=0)
            told = self._error(stopped, "loss of step", "train.learning_rate")
            found = self._identical(self.bench.train(folder), 0)
            yield Found(told and found.survived, 0, found.differs, stopped.output)

    # --- what is looked at --------------------------------------------------------------------------

    def _stop_in_the_middle(self, folder: Path, **train: Any) -> None:
        """A run that a signal stopped, with two checkpoints at the least."""
        at = self.draw.choice(self.operators["forward"][len(self.operators["forward"]) // 2 :])

        def end(phase: str) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        stopped = self.bench.train(folder, Disturbance(frozenset({at}), end).around(), **train)
        assert stopped.status == 128 + signal.SIGTERM, stopped.output
        assert len(saved(folder)) >= 2

    def _error(self, found: Result, *words: str) -> bool:
        """Whether it ended with a message that has these words: the thing, and the way out."""
        return found.status == 2 and all(word in found.output for word in words)

    def _identical(self, found: Result, lost: int) -> Found:
        """Against the undisturbed run, to the byte."""
        differs = (
            found.adapter != self.undisturbed.adapter
            or found.untimed() != self.undisturbed.untimed()
        )
        return Found(found.status == 0 and not differs, lost, differs, found.output)

    def _same_to_order(self, found: Result) -> Found:
        """Against the undisturbed run, to summation order: the same samples, once each, in any split."""
        if found.status != 0:
            return Found(False, differs=True, says=found.output)
        theirs, mine = self.undisturbed.steps, found.steps
        once = [(r["step"], r["tokens"]) for r in mine] == [
            (r["step"], r["tokens"]) for r in theirs
        ]
        losses = zip(_losses(self.undisturbed), _losses(found), strict=True)
        differs = not once or any(abs(a - b) > TOLERANCE * abs(a) for a, b in losses)
        return Found(not differs, 0, differs, found.output)


_PROMISED = CHECKPOINT_EVERY


def _losses(found: Result) -> list[float]:
    kept = ("step", "evaluation")
    records = [record for record in found.records if record["event"] in kept]
    return [record.get("loss", record.get("validation_loss")) for record in records]


def _flip(file: str, draw: random.Random) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        content = bytearray((folder / file).read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (folder / file).write_bytes(content)

    return spoil


def _cut(file: str, draw: random.Random) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        size = (folder / file).stat().st_size
        os.truncate(folder / file, draw.randrange(size))

    return spoil


def kinds(faults: Faults, share: float) -> Iterator[tuple[str, Iterator[Found]]]:
    """Every kind of fault by its name; `share` of the documented counts, one of each at the least."""

    def times(count: int) -> int:
        return max(1, round(count * share))

    draw = faults.draw
    # forked ones first, from a process that has trained little
    yield "kill -9", faults.signals(signal.SIGKILL, times(50))
    yield "SIGTERM", faults.signals(signal.SIGTERM, times(10))
    yield "SIGINT", faults.signals(signal.SIGINT, times(10))
    for phase in PHASES:
        yield (
            f"overflow in {phase}",
            faults.overflow(phase, times(20 if phase != "loading" else 10)),
        )
    yield "pressure from another process", faults.pressure(times(5))
    yield "overflows down to the host", faults.to_the_host(times(10))
    yield "memory short for every plan", faults.nothing_fits(times(2))
    yield "host memory short", faults.host_memory(times(5))
    yield "disk full", faults.full_disk(times(5))
    yield "checkpoint: a bit flipped", faults.damaged_checkpoint(_flip(TENSORS, draw), times(3))
    yield "checkpoint: cut short", faults.damaged_checkpoint(_cut(TENSORS, draw), times(3))
    yield "checkpoint: manifest flipped", faults.damaged_checkpoint(_flip(MANIFEST, draw), times(3))
    yield "checkpoint: unreadable", faults.damaged_checkpoint(_unreadable, times(2))
    yield "checkpoint: foreign", faults.foreign_checkpoint(times(3))
    yield "artifact corrupted: plan", faults.damaged_artifact(PLAN, times(3))
    yield "artifact corrupted: hardware", faults.damaged_artifact(HARDWARE, times(2))
    weights = QUANTIZED_MODEL / "*.safetensors"
    yield "safetensors cut short", faults.damaged_artifact(weights, times(3))
    yield "data changed under the run", faults.changed_inputs("data", times(2))
    yield "params changed under the run", faults.changed_inputs("params", times(2))
    yield "loss not finite", faults.diverged(times(2))
    yield "GPU vanished", faults.lost_gpu(times(4))


def _unreadable(folder: Path) -> None:
    """A file in place of which there is something that cannot be read as one."""
    (folder / TENSORS).unlink()
    (folder / TENSORS).mkdir()


def run(work: Path, seed: int, share: float, only: str = "") -> Iterator[dict[str, Any]]:
    """A row for each kind of fault, as soon as it is there; they are printed as well."""
    faults = Faults(Bench(work), random.Random(seed))
    for name, every in kinds(faults, share):
        if only not in name:
            continue
        found = list(every)
        row = {
            "fault": name,
            "injected": len(found),
            "survived": sum(one.survived for one in found),
            "lost_steps": max(one.lost_steps for one in found),
            "result_differs": sum(one.differs for one in found),
        }
        print(*(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True)
        for one in found:
            if not one.survived:
                print(one.says, flush=True)
        yield row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the documented counts")
    parser.add_argument("--only", default="", help="faults with this in their name")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # forked processes have none of a pool's threads
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    injected = survived = 0
    with tempfile.TemporaryDirectory() as work:
        for row in run(Path(work), args.seed, args.share, args.only):
            rows.append(row)
            injected, survived = injected + row["injected"], survived + row["survived"]
            if args.json is not None:
                write_result(
                    args.json,
                    "faults",
                    rows,
                    seed=args.seed,
                    steps=STEPS,
                    checkpoint_every=CHECKPOINT_EVERY,
                    injected=injected,
                    survived=survived,
                )
    print(f"{injected} faults, {survived} survived, in {time.perf_counter() - start:.0f} s")
    return 0 if survived == injected else 1


if __name__ == "__main__":
    sys.exit(main())
