"""The training run: batches through the step, validation in between, the best and the last kept.

The loop decides nothing about memory or speed; the Plan has, and the step follows it. Numbers are read
from the device only when a line is written, so that the host runs ahead.

Between two steps a run is a `Snapshot` and nothing else. It is saved now and then, and at the end of
whatever ends a run early, so that a run goes on from it as if nothing had happened.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fitlora.console import say
from fitlora.device import is_lost, memory_now
from fitlora.errors import UserError
from fitlora.memory.tracker import MemoryTracker
from fitlora.params import TrainParams
from fitlora.planner.freezing import SURVEYED_BATCHES, least_first
from fitlora.step.batch import TokenSequence
from fitlora.step.training_step import StepResult, TrainingStep, learning_rate
from fitlora.training.batches import Batches, share_of
from fitlora.training.checkpoint import Checkpoints, Progress, Snapshot
from fitlora.training.log import RunLog
from fitlora.training.parallel import LostProcess, Ranks
from fitlora.training.precision import Precision
from fitlora.training.recovery import (
    WAITS,
    HalfUpdated,
    Learned,
    NothingSmaller,
    Recovery,
)
from fitlora.training.stopping import Stop, StopAsked

_DIVERGED = (
    "nothing was saved from there on. A lower train.learning_rate or a longer train.warmup_steps is "
    "the usual way out"
)


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
class Run:
    """One training run. `begin` it, and call it.

    record: takes each record for the log, and may show it. validation may be empty: then the last
    adapter is the best. Raises UserError when the loss is no longer a number, the GPU is gone, or
    nothing smaller is left; and what `stop.ending` says where it was asked to stop.
    """

    batches: Batches
    validation: Sequence[TokenSequence]
    train: TrainParams
    tracker: MemoryTracker
    log: RunLog
    record: Callable[[dict[str, Any]], None]
    checkpoints: Checkpoints
    recovery: Recovery
    stop: Stop = field(default_factory=Stop)
    ranks: Ranks = field(default_factory=Ranks)
    seconds: float = 0.0  # of earlier parts of the run

    def __post_init__(self) -> None:
        self.recovery.made = self._take
        self.progress = Progress()
        self.precision = Precision(
            self.recovery, self.record, dynamic=self.train.precision == "dynamic"
        )
        self._best: dict[str, Tensor] = {}
        self._saved: Progress | None = None
        self._setbacks: list[int] = []
        self._start = time.perf_counter()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.train.max_steps is not None:
            return self.train.max_steps
        assert self.train.epochs is not None
        return self.batches.steps_of(self.train.epochs)

    @property
    def step(self) -> TrainingStep:
        """The step in use. Keep none: another may take its place, and wants its memory."""
        return self.recovery.step

    def _take(self, step: TrainingStep) -> None:
        """Has a step that was made just now tell its phases, and its tensors counted."""
        step.phase = self._phase
        self.tracker.also(step.tensors())

    def begin(self) -> bool:
        """Makes the step, and goes to the newest checkpoint of the same inputs, if there is one.

        Returns whether there was. Raises UserError where no plan of the ladder can be loaded.
        """
        snapshot = self.ranks.from_first(self.checkpoints.newest)
        if snapshot is None:
            self.recovery.begin()
            return False
        self.recovery.ladder.resume(snapshot.rung)
        self._restore(snapshot)
        self.seconds = snapshot.seconds
        return True

    def __call__(self) -> Outcome:
        try:
            if self._saved is None:
                if self.train.freeze == "speed":
                    self.recovery.ladder.freeze_in_order(range(self.recovery.ladder.free.layers))
                elif self.train.freeze == "memory":
                    self._choose_frozen()
                self._save()  # to go back to; and where it cannot be written, better now than in hours
            while self._go_on():
                pass
        except NothingSmaller as error:
            try:
                self._save_again()
            except UserError as too:  # what was saved before is as good
                raise UserError(f"{error}. Saved is step {self._saved_step}; {too}") from None
            raise
        except StopAsked:
            self.step.abandon()
            self._save_again()
            if self.ranks.is_first:
                say(
                    f"stopped by {self.stop.reason} after step {self.progress.done} of "
                    f"{self.total_steps}; {self._again}"
                )
            raise self.stop.ending() from None
        except LostProcess as error:
            raise UserError(self._lost(error)) from None
        except RuntimeError as error:
            if not is_lost(error):
                raise
            raise UserError(
                f"the GPU was lost in step {self.progress.done + 1} ({str(error).splitlines()[0]}). "
                f"When nvidia-smi shows it again: {self._again}"
            ) from None
        at = self.progress
        last = self.recovery.insist(self.step.adapter_state, "a copy of the adapter on the host")
        best_step = at.best_step if self._best else at.done
        early = at.done < self.total_steps
        return Outcome(at.done, last, self._best or last, at.best_loss, best_step, early)

    def _go_on(self) -> bool:
        """The next thing that is to be done, as a whole; False where nothing is."""
        done = self.progress.done
        self._check_stop()
        try:
            if self._is_due(self.train.evaluate_every) and self.progress.validated < done:
                self._validate()
            elif done == self.total_steps or self._out_of_patience():
                return False
            elif self._is_due(self.train.checkpoint_every) and self._saved_step != done:
                self._save()
            else:
                self.recovery.climb(done)
                self._train_step()
        except HalfUpdated as cause:
            self._go_back(str(cause))
        return True

    def _is_due(self, every: int | None) -> bool:
        done = self.progress.done
        return done > 0 and (done == self.total_steps or (every is not None and done % every == 0))

    def _out_of_patience(self) -> bool:
        patience = self.train.early_stopping
        return patience is not None and self.progress.without_better >= patience

    def _check_stop(self) -> None:
        if self.ranks.any(self.stop.asked is not None):
            raise StopAsked

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A phase of the step: where an overflow happened, what it took, and a place to stop at."""
        if self.ranks.devices == 1 and name in ("forward", "evaluation"):
            self.stop.check()
        self.recovery.phase = name
        with self.tracker.phase(name):
            yield

    # --- a step ---------------------------------------------------------------------------------------

    def _train_step(self) -> None:
        index, total = self.progress.done, self.total_steps
        batch = self.batches.batch(index)
        mine = share_of(batch, self.ranks.rank, self.ranks.devices)
        rate = learning_rate(index, total, self.train)
        target_tokens = sum(s.target_tokens for s in batch)
        start = time.perf_counter()

        def work() -> StepResult:
            return self.step.run(
                mine,
                step=index,
                learning_rate=rate,
                total_target_tokens=target_tokens,
                reduce_gradients=None if self.ranks.devices == 1 else self._reduce_for_good,
                loss_scale=self.precision.loss_scale,
                accept=lambda loss, norm: self.precision.accept(index, loss, norm),
            )

        with self.tracker.measuring("step", lambda: self.step.parts()):
            result = self.recovery.carry_out(work, step=index + 1)
        loss, norm = float(result.loss), float(result.gradient_norm)
        seconds = time.perf_counter() - start
        if not result.updated:  # and so to be done again
            if not self.precision.refused(index):
                raise UserError(self._diverged(f"the loss of step {index + 1} is {loss}", norm))
            return
        self.precision.count(index + 1, loss)
        self.progress = self.progress.model_copy(update={"done": index + 1})
        tokens = sum(len(s.tokens) for s in batch)
        memory = self.tracker.update(step=index + 1)
        # this step was not counted, and the evaluation before it was
        uncounted = set(memory["phases"]) == {"evaluation"}
        self.record(
            {
                "event": "step",
                "step": index + 1,
                "loss": loss,
                "learning_rate": rate,
                "gradient_norm": norm,
                "tokens": tokens,
                "tokens_per_second": round(tokens / seconds, 1),
                "allocated_bytes": None if uncounted else memory["peak_allocated_bytes"],
                "reserved_bytes": memory["reserved_bytes"],
                "phase_bytes": memory["phases"],
                "component_bytes": {} if uncounted else memory["components"],
            }
        )

    def _choose_frozen(self) -> None:
        """Has those layers frozen whose gradients matter least, as many as the Plan says."""
        ladder = self.recovery.ladder
        count = len(ladder.plan.frozen_layers)
        self.recovery.turn(frozen_layers=())
        scores = [0.0] * ladder.free.layers
        for index in range(min(SURVEYED_BATCHES, self.total_steps)):
            found = self._survey(index)
            scores = [sum(pair) for pair in zip(scores, found, strict=True)]
        order = least_first(scores)
        ladder.freeze_in_order(order)
        self.recovery.turn(frozen_layers=tuple(sorted(order[:count])))
        total = sum(scores)
        self.record(
            {
                "event": "freeze",
                "step": 1,
                "cause": "the least squared gradients of the first batches",
                "frozen_layers": list(ladder.plan.frozen_layers),
                "gradient_shares": [round(score / total, 6) for score in scores],
            }
        )

    def _survey(self, index: int) -> list[float]:
        """Each layer's squared gradient norm on a batch, at the weights as they are."""
        batch = self.batches.batch(index)
        mine = share_of(batch, self.ranks.rank, self.ranks.devices)

        def work() -> tuple[float, list[float]]:
            return self.step.survey(
                mine,
                step=index,
                total_target_tokens=sum(s.target_tokens for s in batch),
                reduce_gradients=None if self.ranks.devices == 1 else self._reduce,
                loss_scale=self.precision.loss_scale,
            )

        while True:
            with self.tracker.measuring("survey", lambda: self.step.parts()):
                loss, found = self.recovery.carry_out(work, step=1)
            norm = math.sqrt(sum(found))
            if self.precision.accept(0, loss, norm):
                return found
            if not self.precision.refused(0):
                raise UserError(self._diverged(f"batch {index + 1} has no finite gradients", norm))

    def _reduce(self, tensors: Sequence[Tensor]) -> None:
        """Sums over the processes, if all of them have come so far."""
        self.recovery.agreement.meet()
        self.ranks.reduce(tensors)

    def _reduce_for_good(self, tensors: Sequence[Tensor]) -> None:
        """The same; what follows is the update."""
        self.recovery.agreement.commit()
        self.ranks.reduce(tensors)

    # --- validation -----------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Measures the loss on the validation rows, and keeps the adapter if it is the best so far."""
        done = self.progress.done
        changes: dict[str, Any] = {"validated": done}
        if self.validation:
            loss = self._validation_loss(done)
            better = self.progress.best_loss is None or loss < self.progress.best_loss
            changes["without_better"] = 0 if better else self.progress.without_better + 1
            if better:
                changes |= {"best_loss": loss, "best_step": done}
                self._best = self.recovery.insist(
                    self.step.adapter_state, "a copy of the best adapter on the host"
                )
        self.progress = self.progress.model_copy(update=changes)

    def _validation_loss(self, done: int) -> float:
        """Mean loss over the validation rows' target tokens, over all ranks."""
        start = time.perf_counter()
        mine = share_of(self.validation, self.ranks.rank, self.ranks.devices)
        with self.tracker.measuring("evaluation", lambda: self.step.parts()):
            summed, tokens = self.recovery.carry_out(
                lambda: self.step.evaluate(mine), step=done, evaluation=True
            )
        totals = torch.stack([summed, torch.full_like(summed, tokens)])
        self.ranks.reduce([totals])
        loss = float(totals[0] / totals[1])
        if not math.isfinite(loss):
            raise UserError(self._diverged(f"the validation loss after step {done} is {loss}"))
        self.record(
            {
                "event": "evaluation",
                "step": done,
                "validation_loss": loss,
                "seconds": round(time.perf_counter() - start, 3),
            }
        )
        return loss

    def _lost(self, error: LostProcess) -> str:
        """What there is to say where another process is gone; the first one saves what it can."""
        again = "the same command goes on from the newest checkpoint"
        if self.ranks.is_first:
            # within an update there is nothing whole but what is saved
            if not self.recovery.agreement.committed:
                self.step.abandon()
                self._save_again()
            again = self._again
        return f"{error} in step {self.progress.done + 1} of {self.total_steps}; {again}"

    def _diverged(self, what: str, norm: float = 0.0) -> str:
        norm_too = "" if math.isfinite(norm) else f", the gradients' norm {norm}"
        wider = ""
        if self.precision.wider is not None and not self.precision.dynamic:
            wider = f"; with train.precision: dynamic it is tried in {self.precision.wider} first"
        saved = (
            "" if self._saved is None else f" (the last checkpoint is of step {self._saved_step})"
        )
        return f"{what}{norm_too}; {_DIVERGED}{wider}{saved}"

    # --- snapshots ------------------------------------------------------------------------------------

    @property
    def _saved_step(self) -> int | None:
        return None if self._saved is None else self._saved.done

    @property
    def _again(self) -> str:
        """What becomes of a run that has ended early."""
        if self._saved is None:
            return "nothing is saved yet, so the same command begins anew"
        return f"the same command goes on from step {self._saved_step}, which is saved"

    def _save_again(self) -> None:
        """Keeps a run that ends early; not one that has yet to choose its layers, which begins anew."""
        if self._saved is not None:
            self._save()

    def _save(self) -> None:
        """Keeps the run as it is now, if that is not done; on the first rank, which is enough."""
        if self.ranks.is_first and self._saved != self.progress:
            with self._phase("save"):
                snapshot = self._snapshot()
                self.recovery.insist(lambda: self.checkpoints.save(snapshot), "a checkpoint")
        self._saved = self.progress

    def _snapshot(self) -> Snapshot:
        learned = self.recovery.learned()
        return Snapshot(
            progress=self.progress,
            rung=self.recovery.ladder.rung,
            precision=self.precision.state,
            seconds=self.elapsed(),
            log=list(self.log.lines),
            adapter=learned.adapter,
            best=self._best,
            optimizer=learned.optimizer,
            numbers=learned.numbers,
        )

    def _restore(self, snapshot: Snapshot) -> None:
        """Makes the run what it was, in the plan in use."""
        self.progress = self._saved = snapshot.progress
        self.precision.state = snapshot.precision
        self._best = dict(snapshot.best)
        self.log.restore(snapshot.log)
        self.tracker.take_over(self.log.records)
        learned = Learned(snapshot.adapter, snapshot.optimizer, snapshot.numbers)
        self.recovery.go_on_from(learned, step=snapshot.progress.done + 1)

    def _go_back(self, cause: str) -> None:
        """To the newest checkpoint, after an update for which memory did not suffice.

        Raises UserError where the same update has failed too often.
        """
        failed = self.progress.done + 1
        self._setbacks.append(failed)
        times = self._setbacks.count(failed)
        if times > len(WAITS):
            raise UserError(
                f"out of memory in the update of step {failed}, again and again ({cause}): "
                f"{memory_now(*self.recovery.devices)}. When there is more, the same command goes on "
                f"from step {self._saved_step}, which is saved"
            )
        self.recovery.wait(WAITS[times - 1])
        snapshot = self.ranks.from_first(self.checkpoints.newest)
        if snapshot is None:
            raise UserError(f"{self.checkpoints.folder} is gone under the run; begin it anew")
        self._restore(snapshot)
        self.recovery.tell(
            failed,
            f"out of memory in the update of step {failed} ({cause}), so back to step "
            f"{self.progress.done}, which is saved",
            snapshot.rung.plan,
        )

    def elapsed(self) -> float:
        """Seconds that the run has taken, in all of its parts."""
        return self.seconds + time.perf_counter() - self._start
