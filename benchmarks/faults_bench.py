"""A project small enough to be trained hundreds of times, and ways to disturb its training.

The project is a tiny model and a few rows, with the artifacts that training reads; training is the
pipeline's own stage. A disturbance stays outside of it: signals from another process, files that are
spoiled, limits of the operating system, and errors raised between operators, where an allocator or a
driver would raise them (`Disturbance`).
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import make_checkpoint
from fitlora.adapter import WEIGHTS
from fitlora.artifacts import (
    ADAPTER,
    HARDWARE,
    PLAN,
    QUANTIZED_MODEL,
    SCRATCH,
    TRAINING_LOG,
    Hardware,
    PlanArtifact,
    Rates,
)
from fitlora.checkpoint import Checkpoint
from fitlora.errors import UserError
from fitlora.memory.trace import MemoryTrace
from fitlora.memory.tracker import MemoryTracker
from fitlora.params import Params, check_params
from fitlora.pipeline.train_adapters import train_adapters
from fitlora.plan import Plan
from fitlora.planner.chain import Freedom
from fitlora.planner.size import ModelSize
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.step.build import StepSkeleton
from fitlora.step.training_step import TrainingStep
from fitlora.training import run
from fitlora.training.checkpoint import FOLDER

STEPS, CHECKPOINT_EVERY = 8, 2
# What differs between runs.
TIMES = ("seconds", "tokens_per_second", "allocated_bytes", "phase_bytes", "component_bytes")


def make_project(folder: Path) -> None:
    """The artifacts that training reads, and the rows."""
    model = folder / "model"
    make_checkpoint("tiny", model, torch.device("cpu"))
    quantize_checkpoint(
        model,
        folder / QUANTIZED_MODEL,
        spec=QuantSpec.of(params_of(folder).quantization),
        device=torch.device("cpu"),
    )
    draw = random.Random(0)
    for name, count in (("train", 24), ("validation", 6)):
        lines = []
        for _ in range(count):
            words = [
                draw.choice(("red", "green", "blue", "one", "two", "three")) for _ in range(12)
            ]
            prompt, answer = words[: draw.randint(2, 6)], words[6 : draw.randint(7, 12)]
            lines.append(json.dumps({"prompt": " ".join(prompt), "completion": " ".join(answer)}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    rates = Rates(
        host_to_device_bytes_per_second=None,
        device_to_host_bytes_per_second=None,
        device_copy_bytes_per_second=None,
        disk_read_bytes_per_second=None,
        product_flops_per_second={},
    )
    Hardware(
        device="cpu",
        gpus=(),
        cpu_name="",
        cpu_cores=1,
        host_memory_bytes=2**34,
        host_budget_bytes=2**34,
        budget_bytes=2**30,
        context_bytes=0,
        workspace_bytes=0,
        rates=rates,
        target=None,
    ).write(folder / HARDWARE)
    plan = Plan(
        device="cpu",
        effective_batch_size=8,
        micro_batch_size=8,
        evaluation_batch_size=4,
        sequence_length=64,
        compute_dtype="float32",
        optimizer="adamw",
        loss_chunk_tokens=256,
    )
    PlanArtifact(plan=plan, reasons={}).write(folder / PLAN)


def params_of(folder: Path, **train: Any) -> Params:
    """params.yaml of the project. train: keys of that section that differ."""
    return check_params(
        {
            "model": {"id": str(folder / "model")},
            "data": {
                "train": str(folder / "train.jsonl"),
                "validation": str(folder / "validation.jsonl"),
                "max_length": 64,
            },
            "hardware": {"device": "cpu"},
            "lora": {"r": 4, "dropout": 0.1},
            "train": {
                "effective_batch_size": 8,
                "max_steps": STEPS,
                "warmup_steps": 2,
                "learning_rate": 1.0e-2,
                "evaluate_every": 4,
                "checkpoint_every": CHECKPOINT_EVERY,
                **train,
            },
        }
    )


@dataclass(frozen=True)
class Result:
    """What a run left."""

    status: int
    output: str
    adapter: bytes | None
    records: list[dict[str, Any]]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["event"] == "step"]

    @property
    def last_step(self) -> int:
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def resumed_at(self) -> int:
        """The step from which it went on; 0 where it began anew."""
        mark = "going on after step "
        place = self.output.rfind(mark)
        return 0 if place < 0 else int(self.output[place + len(mark) :].split()[0])

    def untimed(self) -> list[dict[str, Any]]:
        """The log apart from times and from what the tracker only sometimes measures."""
        return [
            {key: value for key, value in record.items() if key not in TIMES}
            for record in self.records
            if record["event"] != "end"
        ]


class Bench:
    """Copies of the project, and training in them."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.template = work / "template"
        if not self.template.exists():
            make_project(self.template)
        self._count = 0

    def project(self) -> Path:
        """A fresh copy."""
        self._count += 1
        folder = self.work / f"project{self._count}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.template, folder)
        return folder

    def train(self, folder: Path, around: Any = None, **train: Any) -> Result:
        """Trains in this process. around: a context manager that disturbs."""
        output, status = "", 0
        with tempfile.TemporaryFile("w+") as file:
            with contextlib.redirect_stdout(file), around or contextlib.nullcontext():
                status = _train(folder, train)
            file.seek(0)
            output = file.read()
        return self.left(folder, status, output)

    def train_apart(
        self,
        folder: Path,
        disturb: Callable[[int], None] = lambda pid: None,
        prepare: Callable[[], None] = lambda: None,
        **train: Any,
    ) -> Result:
        """Trains in a process of its own, which is forked, so that it need not import anything.

        disturb: called with its id while it runs. prepare: called in it before it trains.
        """
        with tempfile.NamedTemporaryFile("w+") as file:
            pid = os.fork()
            if pid == 0:
                os.dup2(file.fileno(), 1)
                sys.stdout = os.fdopen(1, "w", buffering=1)
                status = 1
                try:
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                    prepare()
                    status = _train(folder, train)
                finally:
                    sys.stdout.flush()
                    os._exit(status)
            disturb(pid)
            _, ended = os.waitpid(pid, 0)
            file.seek(0)
            return self.left(folder, os.waitstatus_to_exitcode(ended), file.read())

    def left(self, folder: Path, status: int, output: str) -> Result:
        weights, log = folder / ADAPTER / WEIGHTS, folder / TRAINING_LOG
        lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
        return Result(
            status,
            output,
            weights.read_bytes() if weights.is_file() else None,
            [json.loads(line) for line in lines if line.endswith("\n")],
        )


def _train(folder: Path, train: dict[str, Any]) -> int:
    """The stage, and the status that a command of it would end with."""
    try:
        train_adapters(params_of(folder, **train), folder)
    except UserError as error:
        print(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a project, oldest first."""
    return sorted((folder / SCRATCH / FOLDER).glob("*/step-*"))


def signal_at(
    log: Path, lines: int, seconds: float, number: signal.Signals
) -> Callable[[int], None]:
    """Sends a signal `seconds` after a run's log has so many lines, wherever the run then is."""

    def disturb(pid: int) -> None:
        while lines and not (log.is_file() and log.read_bytes().count(b"\n") >= lines):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return  # it came to its end first
            time.sleep(0.005)
        time.sleep(seconds)
        os.kill(pid, number)

    return disturb


@dataclass
class Disturbance(TorchDispatchMode):
    """Raises an error instead of running the operators with these numbers.

    Operators count in the phases of the step and of saving; `phases` has, after a run, the numbers of
    each phase's. error: told the phase, makes the error; None of it lets the operator run.
    """

    at: frozenset[int] = frozenset()
    error: Callable[[str], BaseException | None] = lambda phase: torch.OutOfMemoryError(
        f"CUDA out of memory (injected in {phase})"
    )
    phases: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    raised: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._count = 0
        self._phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._phase:
            self._count += 1
            self.phases[self._phase].append(self._count)
            if self._count in self.at:
                self.raised += 1
                error = self.error(self._phase)
                if error is not None:
                    raise error
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Disturbs the training that runs inside."""
        with _told_of_phases(self._enter), self:
            yield

    @contextlib.contextmanager
    def _enter(self, name: str) -> Iterator[None]:
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before


class LimitedMemory(MemoryTrace):
    """A CPU whose memory ends, as a GPU's does, and ends earlier while somebody else has some of it.

    limit: bytes of live tensors at each operator of the run, by its number.
    """

    def __init__(self, limit: Callable[[int], int]) -> None:
        super().__init__()
        self.limit = limit
        self.overflows = self.operators = self.highest = 0
        self._inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self._inside:
            self.operators += 1
            self.highest = max(self.highest, self.live_bytes)
            if self.live_bytes > self.limit(self.operators):
                self.overflows += 1
                del out
                raise torch.OutOfMemoryError("CUDA out of memory (another process has it)")
        return out

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        with _told_of_phases(self._enter), self:
            yield

    @contextlib.contextmanager
    def _enter(self, name: str) -> Iterator[None]:
        self._inside += name in ("forward", "backward")
        try:
            yield
        finally:
            self._inside -= name in ("forward", "backward")


@contextlib.contextmanager
def _told_of_phases(enter: Callable[[str], Any]) -> Iterator[None]:
    """Has `enter` entered with each phase of training that is entered, and with "loading".

    Of loading what safetensors does is left out: it maps the file and allocates nothing.
    """
    plain, make, read = MemoryTracker.phase, run.step_skeleton, Checkpoint.tensor

    class Told(StepSkeleton):
        def fill(self, *arguments: Any) -> TrainingStep:
            with enter("loading"):
                return super().fill(*arguments)

    @contextlib.contextmanager
    def phase(self: MemoryTracker, name: str) -> Iterator[None]:
        with plain(self, name), enter(name):
            yield

    def skeleton(*arguments: Any) -> StepSkeleton:
        return Told(**vars(make(*arguments)))

    def tensor(self: Checkpoint, name: str) -> torch.Tensor:
        with enter(""):
            return read(self, name)

    MemoryTracker.phase, run.step_skeleton = phase, skeleton  # type: ignore[method-assign]
    Checkpoint.tensor = tensor  # type: ignore[method-assign]
    try:
        yield
    finally:
        MemoryTracker.phase, run.step_skeleton = plain, make  # type: ignore[method-assign]
        Checkpoint.tensor = read  # type: ignore[method-assign]


@contextlib.contextmanager
def host_apart() -> Iterator[None]:
    """Lets the ladder move things to the host, as if the CPU's memory were a GPU's and apart from it."""
    plain = Freedom.most

    def most(start: Plan, model: ModelSize) -> Freedom:
        return plain(start.replace(device="cuda"), model)

    Freedom.most = most  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Freedom.most = plain  # type: ignore[method-assign]
