"""The training run: batches through the step, validation in between, the best and the last kept.

The loop decides nothing about memory or speed; the Plan has, and the step follows it. Numbers are read
from the device only when a line is written, so that the host runs ahead.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitlora.artifacts import dump_line
from fitlora.errors import UserError
from fitlora.memory.tracker import MemoryTracker
from fitlora.params import TrainParams
from fitlora.step.batch import TokenSequence
from fitlora.step.training_step import TrainingStep, learning_rate
from fitlora.training.batches import Batches, share_of

_DIVERGED = (
    "nothing was saved from there on. A lower train.learning_rate or a longer train.warmup_steps is "
    "the usual way out"
)
# What DVC plots; every point has every one, as its plots need.
_CURVES = ("loss", "validation_loss", "learning_rate", "tokens_per_second", "allocated_bytes")


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: the adapter after its last step, and the one with the lowest loss."""

    steps: int
    last: dict[str, Tensor]
    best: dict[str, Tensor]
    best_loss: float | None
    best_step: int
    stopped_early: bool


@dataclass
class Ranks:
    """The processes that share an effective batch; one alone by default.

    reduce sums tensors over the processes, in place.
    """

    rank: int = 0
    devices: int = 1
    reduce: Callable[[Sequence[Tensor]], None] | None = None

    @classmethod
    def of(cls, accelerator: Any) -> "Ranks":
        """As accelerate has them."""
        if accelerator.num_processes == 1:
            return cls()

        def reduce(tensors: Sequence[Tensor]) -> None:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

        return cls(accelerator.process_index, accelerator.num_processes, reduce)


@dataclass
class Run:
    """One training run.

    log: called with each record ("step", "evaluation"), on the first rank. validation may be empty:
    then the last adapter is the best. Raises UserError when the loss is no longer a number.
    """

    step: TrainingStep
    batches: Batches
    validation: Sequence[TokenSequence]
    train: TrainParams
    tracker: MemoryTracker
    log: Callable[[dict[str, Any]], None]
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.max_steps is not None:
            return self.train.max_steps
        assert self.train.epochs is not None
        return self.batches.steps_of(self.train.epochs)

    def __call__(self) -> Outcome:
        total = self.total_steps
        best_loss: float | None = None
        best_step, without_better, done, stopped = total, 0, 0, False
        best: dict[str, Tensor] | None = None
        self.step.phase = self.tracker.phase
        for index in range(total):
            self._train_step(index, total)
            done = index + 1
            every = self.train.evaluate_every
            if not (done == total or (every is not None and done % every == 0)):
                continue
            loss = self._validate(done)
            if loss is None:
                continue
            if best_loss is None or loss < best_loss:
                best_loss, best_step, without_better = loss, done, 0
                best = self.step.adapter_state()
            else:
                without_better += 1
            patience = self.train.early_stopping
            if patience is not None and without_better >= patience and done < total:
                stopped = True
                break
        last = self.step.adapter_state()
        return Outcome(done, last, best or last, best_loss, best_step, stopped)

    def _train_step(self, index: int, total: int) -> None:
        start = time.perf_counter()
        batch = self.batches.batch(index)
        rate = learning_rate(index, total, self.train)
        result = self.step.run(
            share_of(batch, self.ranks.rank, self.ranks.devices),
            step=index,
            learning_rate=rate,
            total_target_tokens=sum(s.target_tokens for s in batch),
            reduce_gradients=self.ranks.reduce,
        )
        loss, norm = float(result.loss), float(result.gradient_norm)
        seconds = time.perf_counter() - start
        if not math.isfinite(loss):
            raise UserError(f"the loss of step {index + 1} is {loss}; {_DIVERGED}")
        tokens = sum(len(s.tokens) for s in batch)
        memory = self.tracker.update(step=index + 1)
        self.log(
            {
                "event": "step",
                "step": index + 1,
                "loss": loss,
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens": tokens,
                "tokens_per_second": round(tokens / seconds, 1),
                "allocated_bytes": memory["peak_allocated_bytes"],
                "reserved_bytes": memory["reserved_bytes"],
            }
        )

    def _validate(self, done: int) -> float | None:
        """Mean loss over the validation rows' target tokens, over all ranks; None without rows."""
        if not self.validation:
            return None
        start = time.perf_counter()
        mine = share_of(self.validation, self.ranks.rank, self.ranks.devices)
        summed, count = self.step.evaluate(mine)
        totals = torch.stack([summed, torch.full_like(summed, count)])
        if self.ranks.reduce is not None:
            self.ranks.reduce([totals])
        loss = float(totals[0] / totals[1])
        if not math.isfinite(loss):
            raise UserError(f"the validation loss after step {done} is {loss}; {_DIVERGED}")
        self.log(
            {
                "event": "evaluation",
                "step": done,
                "validation_loss": loss,
                "seconds": round(time.perf_counter() - start, 3),
            }
        )
        return loss


class RunLog:
    """artifacts/training.jsonl as it grows, and the curves that DVC plots, written at the end.

    path: None keeps the points and writes nothing, for the ranks beside the first.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
        self._points: dict[int, dict[str, Any]] = {}

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line, at once."""
        if self._file is not None:
            self._file.write(dump_line(record))
            self._file.flush()
        if "step" in record:
            empty = {"step": record["step"], **dict.fromkeys(_CURVES)}
            point = self._points.setdefault(record["step"], empty)
            point.update({key: record[key] for key in _CURVES if record.get(key) is not None})

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def curves(self) -> list[dict[str, Any]]:
        """One point for each step, for plots."""
        return [self._points[step] for step in sorted(self._points)]
