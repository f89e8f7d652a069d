"""What tests of the loop and of recovery share: a step that follows a script, and runs around it."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fitlora.memory.tracker import MemoryTracker
from fitlora.params import TrainParams
from fitlora.plan import Plan
from fitlora.planner.chain import Freedom
from fitlora.planner.ladder import Ladder
from fitlora.planner.size import ModelSize
from fitlora.step.batch import TokenSequence
from fitlora.step.training_step import StepResult
from fitlora.training.agreement import Agreement
from fitlora.training.batches import Batches
from fitlora.training.checkpoint import Checkpoints
from fitlora.training.identity import Identity
from fitlora.training.log import RunLog
from fitlora.training.loop import Run
from fitlora.training.parallel import Ranks
from fitlora.training.recovery import Recovery
from tests.step import steps

Records = list[dict[str, Any]]
LAYERS = 2


class FakeStep:
    """A step whose losses are a script: what the loop does with them is what is looked at.

    overflows: called at each attempt with the optimizer step and the plan; an error that it gives is
    raised.
    """

    def __init__(
        self,
        validation: Sequence[float] = (),
        train: Sequence[float] = (),
        overflows: Callable[[int, Plan], BaseException | None] = lambda step, plan: None,
        plan: Plan | None = None,
    ) -> None:
        self.device = torch.device("cpu")
        self.plan = plan or steps.plan()
        self.validation, self.train, self.overflows = list(validation), list(train), overflows
        self.done = 0
        self.rates: list[float] = []
        self.seen: list[tuple[int, ...]] = []  # samples of each step that came to its end
        self.half_updated = False
        self.abandoned = 0
        self.phase: Any = None

    def run(self, sequences: Any, *, step: int, learning_rate: float, **options: Any) -> Any:
        assert step == self.done
        for name in ("forward", "backward", "optimizer"):
            with self.phase(name):
                error = self.overflows(step, self.plan) if name == "backward" else None
                if error is not None:
                    raise error
        loss = self.train[step] if self.train else 1.0 / (self.done + 1)
        updated = options["accept"](loss, 0.5)
        if updated:
            self.done += 1
            self.rates.append(learning_rate)
            self.seen.append(tuple(sequence.sample for sequence in sequences))
        return StepResult(torch.tensor(loss), torch.tensor(0.5), 1, 1, updated)

    def evaluate(self, sequences: Sequence[TokenSequence]) -> tuple[Tensor, int]:
        """The next of the script's losses for each of the sequences, of which all are in one batch."""
        loss = self.validation.pop(0)
        tokens = sum(sequence.target_tokens for sequence in sequences)
        return torch.tensor(loss * tokens, dtype=torch.float64), tokens

    def can_adopt(self, plan: Plan) -> bool:
        return plan.uses_host == self.plan.uses_host

    def adopt(self, plan: Plan) -> None:
        assert self.can_adopt(plan)
        self.plan = plan

    def abandon(self) -> None:
        self.abandoned += 1

    def parts(self) -> dict[str, list[Tensor]]:
        return {}

    def tensors(self) -> list[Tensor]:
        return []

    def adapter_state(self) -> dict[str, Tensor]:
        return {"a": torch.tensor(self.done)}

    def load_adapter_state(self, state: dict[str, Tensor]) -> None:
        self.done = int(state["a"])
        del self.seen[self.done :], self.rates[self.done :]

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        return {"a/exp_avg": torch.ones(3)}, {"a/step": self.done}

    def load_optimizer_state(self, tensors: dict[str, Tensor], numbers: dict[str, float]) -> None:
        assert numbers["a/step"] == self.done
        self.half_updated = False


def make_run(
    folder: Path,
    step: Any,
    *,
    batches: Batches | None = None,
    validation: Sequence[TokenSequence] | None = None,
    ranks: Ranks | None = None,
    identity: str = "test",
    predict: Callable[[Plan, bool], int | None] | None = None,
    wait: Callable[[float], None] = lambda seconds: None,
    anew: Callable[[Plan], Any] | None = None,
    host: bool = False,
    layers: int = LAYERS,
    **train: Any,
) -> Run:
    """A run whose checkpoints are below `folder`. predict: by default less for a smaller plan.

    anew: makes a step for a plan; None takes `step` for every one. host: whether the ladder may move
    things to the host. It has begun, with a new adapter.
    """
    log = RunLog()
    ranks = ranks or Ranks()
    plan = step.plan
    model = ModelSize(layers, steps.VOCABULARY)
    free = Freedom.most(plan.replace(device="cuda" if host else "cpu"), model)
    ladder = Ladder(plan, free, predict or size)

    def build(plan: Plan) -> Any:
        return step if anew is None else anew(plan)

    run = Run(
        batches=batches or Batches(steps.sequences(4), 2, seed=0),
        validation=steps.sequences(4) if validation is None else validation,
        train=TrainParams.model_validate({"max_steps": 10, "evaluate_every": None, **train}),
        tracker=MemoryTracker(folder / f"memory{ranks.rank}", "cpu"),
        log=log,
        record=log.write,
        checkpoints=Checkpoints(folder, Identity({"run": identity}), say=lambda text: None),
        recovery=Recovery(
            build,
            ladder,
            log.write,
            [torch.device("cpu")],
            agreement=Agreement(ranks),
            wait=wait,
        ),
        ranks=ranks,
    )
    run.recovery.begin()
    return run


Result = TypeVar("Result")


class ThreadRanks(Ranks):
    """A rank that is a thread; sums are taken where all of them wait."""

    def __init__(self, rank: int, barrier: threading.Barrier, shared: dict[int, Any]) -> None:
        self.rank, self.devices = rank, barrier.parties
        self._barrier, self._shared = barrier, shared

    def reduce(self, tensors: Sequence[Tensor]) -> None:
        for tensor, others in zip(
            tensors, zip(*self.gather([t.clone() for t in tensors]), strict=True), strict=True
        ):
            tensor.copy_(sum(others))

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    def gather(self, value: Any) -> list[Any]:
        self._shared[self.rank] = value
        self._barrier.wait(60)
        found = [self._shared[rank] for rank in range(self.devices)]
        self._barrier.wait(60)
        return found

    def from_first(self, make: Callable[[], Any]) -> Any:
        return self.gather(make() if self.is_first else None)[0]


def in_ranks(devices: int, work: Callable[[Ranks], Result]) -> list[Result]:
    """What `work` gives on each rank."""
    barrier = threading.Barrier(devices)
    shared: dict[int, Any] = {}

    def ranks_of(index: int) -> Ranks:
        return ThreadRanks(index, barrier, shared)

    found: dict[int, Result] = {}

    def run(index: int) -> None:
        try:
            found[index] = work(ranks_of(index))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(index,)) for index in range(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(devices))
    return [found[index] for index in range(devices)]


def size(plan: Plan, evaluation: bool) -> int:
    """A plan's predicted bytes for tests: any smaller decision takes less."""
    hosted = [plan.checkpoints, plan.embedding, plan.head, plan.optimizer_device].count("host")
    fewer = len(plan.streamed_layers) + hosted
    if evaluation:
        return 1000 * plan.evaluation_batch_size + plan.loss_chunk_tokens - fewer
    rest = 100 * (8 - len(plan.recompute_layers) - fewer) + plan.loss_chunk_tokens // 100
    return 1000 * plan.micro_batch_size + rest
