"""Does the planner choose well? Its plans beside a grid of others, and trained where they were drawn.

    python -m benchmarks.planner_regret --side planned --json FILE     on any CPU, for the H200's facts
    python -m benchmarks.planner_regret --side measured --limit-seconds 540 --json FILE   on that GPU
    … --what cells|cases      the regret alone, or the drawn cases alone
    … --model llama-3-70b     only what is of this model
    … --tiny                  both sides on the CPU, at tiny sizes

A *cell* is a model, a budget and a length. The planner is given the facts of the GPU with the budget in
place of its memory, and chooses without a probe. Its plan is then held to that budget on the GPU: an
overflow there is what a probe would have found. The plans that it is compared with are those of `GRID`,
written down here before anything was measured: what peers do, and what one would try by hand. They are
measured once without a limit, and count in every cell that what they reserve fits, the `MOST` largest
of them. Regret is one minus the chosen plan's share of the best plan's tokens/s, its own among them.

A *case* is a draw of model, budget, length and rank. Its plan is held to the budget, rehearsed as a
probe would, and then trained for three steps. accelerate's find_executable_batch_size is given the same
budget and our own step, with everything on the device and every layer recomputed. The summary says in
how many cases our micro-batch is at least as large, and what share of its time search and probe took;
and, as the planner looks for the fastest and not for the largest, the same of the largest micro-batch by
estimates, which need no GPU.

Speed is that of an effective batch: a step of one micro-batch and one of two tell what a micro-batch
takes and what the optimizer does. Steps that differ in what `TrainingStep.adopt` can change share one
model. What was measured stays in the file, and is not measured again unless --again.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, SHAPES, device_name, shape_config, write_result
from fitlora.artifacts import Hardware, Rates
from fitlora.device import give_back_memory, is_lost, is_overflow, limit_memory
from fitlora.errors import UserError
from fitlora.memory.estimate import Estimator, Load, rehearse, sequences_of
from fitlora.offload.host_memory import HostMemory
from fitlora.offload.residency import spread
from fitlora.offload.transport import make_transport
from fitlora.params import Params, check_params
from fitlora.plan import Plan
from fitlora.planner import task as planner_task
from fitlora.planner.find import find_plan
from fitlora.planner.search import loss_chunk
from fitlora.planner.speed import Shape, forecast
from fitlora.step.build import build_step
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights
from fitlora.units import GIB

SEED, COUNT = 20261124, 60
MOST = 16  # plans of the grid that a cell is held against
TOKENS = 32768  # of an effective batch in a cell
CASE_TOKENS = 16384  # and in a case
MOST_SEQUENCES = 16  # of either
HOST_GIB = 96
FACTS = ROOT / "benchmarks" / "results" / "three_ways.h200.json"

Row = dict[str, Any]
# micro-batch, share of the layers recomputed, what those keep, what is on the host, share streamed
Layout = tuple[int, float, tuple[str, ...], tuple[str, ...], float]

_TABLES, _UNSLOTH = ("embedding", "head"), ("checkpoints",)
_ALL = ("checkpoints", "embedding", "head", "optimizer_device")
_KEPT = ("attention",)
GRID: dict[tuple[str, int], tuple[Layout, ...]] = {
    ("llama-3-8b", 2048): (
        *((size, 1.0, (), (), 0.0) for size in (1, 2, 4, 8)),  # peft: gradient checkpointing
        *((size, 0.0, (), (), 0.0) for size in (1, 2, 3, 4, 8)),  # and without
        *((size, 1.0, (), _UNSLOTH, 0.0) for size in (2, 4, 8)),  # Unsloth's checkpoints
        *((size, 1.0, (), _ALL, 1.0) for size in (1, 4)),  # ZeRO-3 with offload
        *((size, 0.5, (), (), 0.0) for size in (2, 4)),
        (4, 1.0, _KEPT, (), 0.0),
        (8, 0.5, _KEPT, (), 0.0),
        (1, 1.0, (), _TABLES, 0.0),
        (4, 1.0, (), (*_UNSLOTH, *_TABLES), 0.5),
    ),
    ("llama-3-8b", 8192): (
        *((size, 1.0, (), (), 0.0) for size in (1, 2, 4)),
        *((size, 0.0, (), (), 0.0) for size in (1, 2)),
        *((size, 1.0, (), _UNSLOTH, 0.0) for size in (1, 2, 4)),
        *((size, 1.0, (), _ALL, 1.0) for size in (1, 2)),
        *((size, 0.5, (), (), 0.0) for size in (1, 2)),
        (1, 1.0, _KEPT, (), 0.0),
        (2, 1.0, _KEPT, (), 0.0),
        (1, 1.0, (), (*_UNSLOTH, *_TABLES), 0.5),
    ),
    ("llama-3-70b", 2048): (
        *((size, 1.0, (), (), 0.0) for size in (1, 2, 4, 8)),
        *((size, 1.0, (), _UNSLOTH, 0.0) for size in (4,)),
        *((size, 1.0, (), _ALL, 1.0) for size in (1, 2, 4, 8)),
        *((size, 1.0, (), _UNSLOTH, 0.5) for size in (1, 4)),
        (1, 0.0, (), (), 0.0),
        (2, 0.5, (), (), 0.0),
        (4, 1.0, _KEPT, (), 0.0),
    ),
    ("tiny", 64): ((1, 1.0, (), (), 0.0), (2, 0.5, (), (), 0.0)),
}  # fmt: skip
BUDGETS_GIB: dict[tuple[str, int], tuple[float, ...]] = {
    ("llama-3-8b", 2048): (6, 8, 12, 16, 24, 48, 80),
    ("llama-3-8b", 8192): (6, 8, 12, 16, 24, 48, 80),
    ("llama-3-70b", 2048): (8, 24, 48, 80),
    ("tiny", 64): (1, 2),
}
CASE_MODELS = tuple(
    name for name in SHAPES if name not in ("tiny", "benchmark", "llama-3-70b", "olmo-2-1b")
)


@dataclass(frozen=True)
class Question:
    """What is asked of the planner. case: the number of a drawn one, None for a cell."""

    model: str
    budget_gib: float
    sequence_length: int
    rank: int = 16
    case: int | None = None

    @property
    def effective_batch_size(self) -> int:
        tokens = TOKENS if self.case is None else CASE_TOKENS
        return min(MOST_SEQUENCES, max(1, tokens // self.sequence_length))

    @classmethod
    def of(cls, row: Row) -> "Question":
        """What a row of the result file answers."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})

    def params(self) -> Params:
        lora = {"r": self.rank, "alpha": 2.0 * self.rank, "dropout": 0.0}
        train = {"effective_batch_size": self.effective_batch_size}
        return check_params({"lora": lora, "train": train})

    def load(self) -> Load:
        return Load.uniform(self.effective_batch_size, self.sequence_length)

    def within(self, hardware: Hardware) -> Hardware:
        """The hardware with the budget in place of its memory, described and not here."""
        changes = {
            "budget_bytes": int(self.budget_gib * GIB),
            "host_budget_bytes": min(hardware.host_budget_bytes, HOST_GIB * GIB),
        }
        return hardware.model_copy(update=changes)


def cells(*, tiny: bool) -> list[Question]:
    return [
        Question(model, budget, length)
        for (model, length), budgets in BUDGETS_GIB.items()
        for budget in budgets
        if (model == "tiny") is tiny
    ]


def draw_cases(*, tiny: bool) -> list[Question]:
    """Always the same ones."""
    draw = random.Random(SEED)
    found = []
    for number in range(COUNT):
        low, high = math.log(2.5), math.log(24)
        budget = round(math.exp(draw.uniform(low, high)), 2)
        length = draw.choice((512, 1024, 2048, 4096, 8192))
        rank = draw.choice((4, 8, 16, 32, 64))
        found.append(Question(draw.choice(CASE_MODELS), budget, length, rank, number))
    if tiny:
        return [replace(q, model="tiny", sequence_length=64) for q in found[:2]]
    return found


def grid_plan(key: tuple[str, int], layout: Layout, device: str) -> Plan:
    """One of the grid. Its evaluation takes the least, as no one looks at it."""
    model, length = key
    micro, recomputed, keeps, host, streamed = layout
    config = shape_config(model)
    layers = config.num_hidden_layers
    return Plan.model_validate(
        {
            "device": device,
            "effective_batch_size": Question(model, 0, length).effective_batch_size,
            "micro_batch_size": micro,
            "evaluation_batch_size": 1,
            "sequence_length": length,
            "recompute_layers": tuple(range(round(recomputed * layers))),
            "recompute_keeps": keeps,
            "compute_dtype": "bfloat16" if device == "cuda" else "float32",
            "optimizer": "adamw",
            "loss_chunk_tokens": loss_chunk(config.vocab_size),
            "streamed_layers": spread(layers, round(streamed * layers)),
            **dict.fromkeys(host, "host"),
        }
    )


# --- planning ------------------------------------------------------------------------------------


def choose(asked: Question, hardware: Hardware) -> Row:
    """The planner's answer for the described hardware, or why it has none."""
    torch.set_num_threads(1)
    config, params = shape_config(asked.model), asked.params()
    there = asked.within(hardware).model_copy(update={"target": hardware.target or "described"})
    start, cpu = time.perf_counter(), time.process_time()
    row: Row = asdict(asked)
    try:
        choice, _ = find_plan(planner_task.Task(config, params, asked.load(), there))
    except UserError as error:
        row |= {"plan": None, "refused": str(error)}
    else:
        plan, shape = choice.plan, Shape.of(config, bits=4, rank=asked.rank)
        tokens = plan.micro_batch_size * asked.sequence_length
        speed = shape and forecast(plan, shape, there.rates, tokens)
        row |= {
            "plan": plan.model_dump(mode="json"),
            "described": plan.describe(),
            "predicted_process_bytes": choice.estimate.process_bytes,
            "predicted_reserved_bytes": choice.estimate.peak_reserved_bytes,
            "predicted_tokens_per_second": speed and speed.tokens_per_second,
        }
    row["search_seconds"] = time.perf_counter() - start
    row["search_cpu_seconds"] = time.process_time() - cpu
    if asked.case is not None and row["plan"] is not None:
        row |= find_by_estimates(asked, choice.plan, there)
    return row


def find_by_estimates(asked: Question, plan: Plan, hardware: Hardware) -> Row:
    """What accelerate is asked for below, the largest micro-batch, by estimates; 0 where none fits."""
    config, settings = shape_config(asked.model), StepSettings.of(asked.params())
    start = time.perf_counter()
    estimate = Estimator(config, settings, asked.load(), hardware)
    everything = on_device(plan, config.num_hidden_layers)
    sizes = range(1, asked.effective_batch_size + 1)
    largest = bisect_left(  # as many sizes fit as the largest that does has sequences
        sizes, True, key=lambda size: not estimate(everything.replace(micro_batch_size=size)).fits
    )
    return {"largest_micro_batch": largest, "largest_seconds": time.perf_counter() - start}


def on_device(plan: Plan, layers: int) -> Plan:
    """Everything on the device and every layer recomputed."""
    parts = ("checkpoints", "embedding", "head", "optimizer_device")
    return plan.replace(
        recompute_layers=range(layers),
        recompute_keeps=(),
        streamed_layers=(),
        evaluation_batch_size=1,
        **dict.fromkeys(parts, "device"),
    )


def planned(questions: Sequence[Question], hardware: Hardware, workers: int) -> Iterator[Row]:
    """An answer to each, as they come."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for done in as_completed([pool.submit(choose, asked, hardware) for asked in questions]):
            yield done.result()


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A plan to measure. asked: the question that it answers; None for one of the grid."""

    model: str
    plan: Plan
    rank: int = 16
    asked: Question | None = None

    @property
    def key(self) -> str:
        where = "grid" if self.asked is None else f"{self.asked.case} {self.asked.budget_gib}"
        return f"{where} {self.model} {self.plan.sequence_length} {self.plan.fingerprint()}"

    @classmethod
    def of(cls, answer: Row) -> "Task":
        """What the planner answered to one question."""
        asked = Question.of(answer)
        plan = Plan.model_validate_json(json.dumps(answer["plan"]))
        return cls(asked.model, plan, asked.rank, asked)

    @property
    def is_case(self) -> bool:
        """Whether it answers a drawn question."""
        return self.asked is not None and self.asked.case is not None

    @property
    def built_with(self) -> tuple[Any, ...]:
        """What a step cannot change once it is built; a limit is for one step alone."""
        fixed = self.plan.replace(micro_batch_size=1, recompute_layers=(), recompute_keeps=())
        return self.model, self.rank, self.asked, fixed.replace(evaluation_batch_size=1)


def key_of(answer: Row) -> str | None:
    """The key of the plan that was answered; None where none fits."""
    return None if answer["plan"] is None else Task.of(answer).key


def build(task: Task, hardware: Hardware) -> TrainingStep:
    device = torch.device(hardware.device)
    transport = make_transport(device, HostMemory(hardware.host_budget_bytes))
    lora = {"r": task.rank, "alpha": 2.0 * task.rank, "dropout": 0.0}
    settings = StepSettings.of(check_params({"lora": lora}))
    return build_step(
        shape_config(task.model), task.plan, settings, RandomWeights(device), transport
    )


def speed_of(step: TrainingStep, plan: Plan, *, rehearsed: bool) -> Row:
    """Seconds of a micro-batch and of the optimizer, and peak memory.

    rehearsed: after all that a probe does, where the peak is to be told of a whole run; what that is
    compared with gets a step to warm up, whose peak is the least that a run of it takes.
    """
    give_back_memory()
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    load = Load.uniform(plan.micro_batch_size, plan.sequence_length)
    heavy = sequences_of(load.train)
    if rehearsed:
        rehearse(step, load)
    else:
        step.run(heavy, step=1, learning_rate=0.0)
    one = _seconds(step, lambda: step.run(heavy, step=2, learning_rate=0.0))
    two = _seconds(step, lambda: step.run(heavy * 2, step=3, learning_rate=0.0))
    micro = two - one if two > one else one
    optimizer = max(0.0, one - micro)
    count = plan.effective_batch_size / plan.micro_batch_size
    tokens = plan.effective_batch_size * plan.sequence_length
    return {
        "micro_batch_seconds": micro,
        "optimizer_seconds": optimizer,
        "tokens_per_second": tokens / (count * micro + optimizer),
        **_peaks(step.device),
    }


def _peaks(device: torch.device) -> Row:
    if device.type == "cpu":
        return {"peak_reserved_bytes": 0, "retries": 0}
    return {
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "retries": torch.cuda.memory_stats()["num_alloc_retries"],
    }


def _seconds(step: TrainingStep, work: Callable[[], object]) -> float:
    """The faster of two runs; of a long one there is one."""
    found = []
    while len(found) < 2 and sum(found) < 3.0:
        _wait(step.device)
        start = time.perf_counter()
        work()
        _wait(step.device)
        found.append(time.perf_counter() - start)
    return min(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def train_case(task: Task, hardware: Hardware) -> Row:
    """A rehearsal, as a probe runs it, and three steps of training on sequences of any length."""
    asked = task.asked
    assert asked is not None
    start = time.perf_counter()
    step = build(task, hardware)
    rehearse(step, asked.load())
    _wait(step.device)
    probed = time.perf_counter() - start
    draw = random.Random(asked.case)
    for index in range(3):
        longest = asked.sequence_length
        lengths = [longest, *(draw.randint(longest // 8, longest) for _ in asked.load().train[1:])]
        batch = [s for length in lengths for s in sequences_of(Load.uniform(1, length).train)]
        step.run(batch, step=2 + index, learning_rate=1e-4)
    _wait(step.device)
    return {
        "probe_seconds": probed,
        "train_seconds": time.perf_counter() - start - probed,
        **_peaks(step.device),
    }


def find_by_halving(task: Task, hardware: Hardware) -> Row:
    """accelerate's way to a micro-batch for the same question, with our step."""
    from accelerate.utils import find_executable_batch_size

    asked = task.asked
    assert asked is not None
    plan = on_device(task.plan, shape_config(task.model).num_hidden_layers)
    start, trials = time.perf_counter(), 0

    def attempt(batch_size: int) -> int:
        nonlocal trials
        trials += 1
        step.adopt(plan.replace(micro_batch_size=batch_size))
        heavy = sequences_of(asked.load().train[:batch_size])
        for index in range(2):
            step.run(heavy, step=index, learning_rate=0.0)
        _wait(step.device)
        return batch_size

    found = 0
    try:
        step = build(replace(task, plan=plan), hardware)
        find = find_executable_batch_size(attempt, starting_batch_size=asked.effective_batch_size)
        found = find()
    except RuntimeError as error:
        if not is_overflow(error) and "No executable batch size" not in str(error):
            raise
    return {
        "accelerate_micro_batch": found,
        "accelerate_trials": trials,
        "accelerate_seconds": time.perf_counter() - start,
    }


def measure(tasks: Sequence[Task], hardware: Hardware, out: Path, seconds: float) -> None:
    """One after the other for so long; those that can share a step do. A line of `out` each."""
    began = time.perf_counter()
    step: TrainingStep | None = None
    built: tuple[Any, ...] | None = None
    for task in sorted(tasks, key=_order):
        if time.perf_counter() - began > seconds:
            break
        here = hardware if task.asked is None else task.asked.within(hardware)
        limit_memory(here)
        found: Row = {}
        try:
            if task.is_case:
                step = built = None
                found = _apart(task, here)
            else:
                if step is None or built != task.built_with:
                    step = built = None  # one model at a time
                    give_back_memory()
                    step, built = build(task, here), task.built_with
                step.adopt(task.plan)
                found = speed_of(step, task.plan, rehearsed=task.asked is not None)
        # whatever a plan comes to is its row; only a device that is gone ends them all
        except Exception as error:
            traceback.print_exc()
            if is_lost(error) or "illegal" in str(error):
                raise
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
            found["overflow"] = isinstance(error, RuntimeError) and is_overflow(error)
        if "error" in found:
            step = built = None
        give_back_memory()
        with out.open("a") as file:
            file.write(json.dumps({"key": task.key, **found}) + "\n")


def _apart(task: Task, hardware: Hardware) -> Row:
    """Our way and accelerate's, each from an empty device."""
    give_back_memory()
    if hardware.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found: Row = {}
    try:
        found = train_case(task, hardware)
    except RuntimeError as error:
        if not is_overflow(error):
            raise
        found = {"overflow": True}
    give_back_memory()
    return {**found, **find_by_halving(task, hardware)}


def _order(task: Task) -> tuple[Any, ...]:
    case = -1 if task.asked is None or task.asked.case is None else task.asked.case
    return case, task.model, task.plan.sequence_length, repr(task.built_with), task.key


# --- the tables ----------------------------------------------------------------------------------


def cell_row(answer: Row, measured: Sequence[Row], context_bytes: int) -> Row | None:
    """The regret of one cell; None before its plan was measured. measured: rows of plans."""
    budget, key = answer["budget_gib"], key_of(answer)
    mine = next((row for row in measured if row["key"] == key), None)
    if mine is None:
        return None
    same = [
        row
        for row in measured
        if (row["model"], row["sequence_length"]) == (answer["model"], answer["sequence_length"])
    ]
    fitting = [
        row
        for row in same
        if row["budget_gib"] is None
        and "tokens_per_second" in row
        and row["peak_reserved_bytes"] + context_bytes <= budget * GIB
    ]
    fitting = sorted(fitting, key=lambda row: -row["peak_reserved_bytes"])[:MOST]
    best = max((row["tokens_per_second"] for row in fitting), default=None)
    chosen = mine.get("tokens_per_second")
    found = {
        "model": answer["model"],
        "budget_gib": budget,
        "sequence_length": answer["sequence_length"],
        "chosen": answer["described"],
        "chosen_tokens_per_second": chosen,
        "best_tokens_per_second": best,
        "best": max(fitting, key=lambda row: row["tokens_per_second"])["described"]
        if fitting
        else None,
        "compared_with": len(fitting),
        "share_of_best": chosen / max(best or 0.0, chosen) if chosen else None,
        "overflows": int(bool(mine.get("overflow"))),
        "probes": 1,
        "search_seconds": answer["search_seconds"],
        "search_cpu_seconds": answer["search_cpu_seconds"],
        "predicted_tokens_per_second": answer["predicted_tokens_per_second"],
        "predicted_process_bytes": answer["predicted_process_bytes"],
        "measured_process_bytes": mine.get("peak_reserved_bytes", 0) + context_bytes,
    }
    predicted = answer["predicted_tokens_per_second"]
    found["speed_error"] = predicted / chosen - 1 if predicted and chosen else None
    return found


def summarize(rows: Sequence[Row], cases: Sequence[Row]) -> Row:
    shares = [row["share_of_best"] for row in rows if row["share_of_best"] is not None]
    overflowed = [case for case in cases if case.get("overflow")]
    trained = [case for case in cases if "train_seconds" in case]
    errors = [abs(row["speed_error"]) for row in rows if row["speed_error"] is not None]
    found: Row = {
        "cells": len(rows),
        "cells_overflowed": sum(row["overflows"] for row in rows),
        "cases_trained": len(trained),
        "cases_overflowed": len(overflowed),
        "cases_refused": sum("refused" in case for case in cases),
        "cases_failed": sum("error" in case for case in cases),
        "micro_batch_at_least_accelerates": sum(
            case["plan"]["micro_batch_size"] >= case["accelerate_micro_batch"] for case in trained
        ),
    }
    if trained:
        ours = sum(case["search_seconds"] + case["probe_seconds"] for case in trained)
        theirs = sum(case["accelerate_seconds"] for case in trained)
        found |= {
            "search_and_probe_seconds": ours,
            "accelerate_seconds": theirs,
            "share_of_accelerates_time": ours / theirs,
            "largest_at_least_accelerates": sum(
                case["largest_micro_batch"] >= case["accelerate_micro_batch"] for case in trained
            ),
            "largest_seconds": sum(case["largest_seconds"] for case in trained),
        }
    if shares:
        found |= {"least_share_of_best": min(shares), "mean_share": sum(shares) / len(shares)}
    if errors:
        found |= {"speed_worst_error": max(errors), "speed_mean_error": sum(errors) / len(errors)}
    return found


# --- both sides ----------------------------------------------------------------------------------


class Table:
    """The result file: answers of the planner, plans that were measured, cells and cases."""

    def __init__(self, path: Path, hardware: Hardware, device: str) -> None:
        content = json.loads(path.read_text()) if path.is_file() else {}
        self.path, self.hardware, self.device = path, hardware, device
        self._lock = threading.Lock()
        self.answers: list[Row] = content.get("answers", [])
        self.plans: list[Row] = content.get("plans", [])

    def answer(self, row: Row) -> None:
        asked = Question.of(row)
        self.answers = [a for a in self.answers if Question.of(a) != asked] + [row]
        self.write()

    def measured(self, task: Task, found: Row) -> None:
        row = {
            "key": task.key,
            "model": task.model,
            "sequence_length": task.plan.sequence_length,
            "budget_gib": task.asked and task.asked.budget_gib,
            "case": task.asked and task.asked.case,
            "described": task.plan.describe(),
            **found,
        }
        with self._lock:
            self.plans = [old for old in self.plans if old["key"] != task.key] + [row]
            self.write()

    def tasks(self, questions: Sequence[Question], *, grid: bool) -> list[Task]:
        """Every plan to measure: the answers', and the grid's of the same models and lengths."""
        found = []
        for row in self.answers:
            if Question.of(row) in questions and row["plan"] is not None:
                found.append(Task.of(row))
        if grid:
            for key in {(q.model, q.sequence_length) for q in questions if q.case is None}:
                plans = [grid_plan(key, layout, self.hardware.device) for layout in GRID[key]]
                found += [Task(key[0], plan) for plan in plans]
        return found

    def rows(self) -> list[Row]:
        context = self.hardware.context_bytes
        drawn = [row for row in self.plans if row["case"] is None]
        answers = [a for a in self.answers if a["case"] is None and a["plan"] is not None]
        order = {key: index for index, key in enumerate(BUDGETS_GIB)}
        answers.sort(key=lambda a: (order[a["model"], a["sequence_length"]], a["budget_gib"]))
        rows = (cell_row(answer, drawn, context) for answer in answers)
        return [row for row in rows if row is not None]

    def cases(self) -> list[Row]:
        measured = {row["key"]: row for row in self.plans if row["case"] is not None}
        answers = sorted(
            (a for a in self.answers if a["case"] is not None), key=lambda a: a["case"]
        )
        return [{**measured.get(key_of(answer), {}), **answer} for answer in answers]

    def write(self) -> None:
        answered = {key_of(answer) for answer in self.answers}
        self.plans = [
            row for row in self.plans if row["budget_gib"] is None or row["key"] in answered
        ]
        rows, cases = self.rows(), self.cases()
        write_result(
            self.path,
            "planner_regret",
            rows,
            device=self.device,
            seed=SEED,
            hardware=self.hardware.model_dump(mode="json"),
            summary=summarize(rows, cases),
            cases=cases,
            answers=self.answers,
            plans=self.plans,
        )


def run_measuring(tasks: list[Task], table: Table, args: argparse.Namespace) -> None:
    """Speeds one after the other, each alone on the device; then cases, several at one time."""
    end = time.perf_counter() + args.limit_seconds
    drawn = [task for task in tasks if task.is_case]
    _run_lane([task for task in tasks if not task.is_case], table, args.work, end)
    with ThreadPoolExecutor(args.at_once) as lanes:
        running = [
            lanes.submit(_run_lane, drawn[i :: args.at_once], table, args.work / f"lane-{i}", end)
            for i in range(args.at_once)
        ]
    for lane in running:
        lane.result()  # raises what it died of


def _run_lane(tasks: list[Task], table: Table, work: Path, end: float) -> None:
    """In processes of their own: where one dies, its plan's row says so, and another goes on."""
    work.mkdir(parents=True, exist_ok=True)
    out, log = work / "measurements", work / "measure.log"
    out.unlink(missing_ok=True)
    left = {task.key: task for task in sorted(tasks, key=_order)}
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "8"}
    while left and time.perf_counter() < end:
        listed = [
            {"model": t.model, "plan": t.plan.model_dump(mode="json"), "rank": t.rank,
             "asked": t.asked and asdict(t.asked)}
            for t in left.values()
        ]  # fmt: skip
        (work / "tasks").write_text(json.dumps(listed))
        (work / "hardware").write_text(table.hardware.model_dump_json())
        command = [sys.executable, "-m", "benchmarks.planner_regret", "--role", "measure"]
        command += ["--work", str(work), f"--limit-seconds={end - time.perf_counter()}"]
        with log.open("a") as file:
            child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        running = True
        while running:
            running = child.poll() is None
            lines = out.read_text().splitlines(keepends=True) if out.is_file() else []
            for line in lines:
                found = json.loads(line) if line.endswith("\n") else {"key": ""}
                if found["key"] in left:
                    task = left.pop(found["key"])
                    table.measured(task, found)
                    print(task.key, found.get("tokens_per_second") or found, flush=True)
            time.sleep(0.2)
        if child.returncode != 0 and left:
            task = left.pop(next(iter(left)))
            words = log.read_text().strip().splitlines()[-1:]
            table.measured(task, {"error": f"the process died: {' '.join(words)}"[:300]})
    if left:
        print(f"{len(left)} plans are left to be measured: run it again")


def act(args: argparse.Namespace) -> None:
    """What the measuring process does."""
    tasks = [
        Task(
            row["model"],
            Plan.model_validate_json(json.dumps(row["plan"])),
            row["rank"],
            Question(**row["asked"]) if row["asked"] else None,
        )
        for row in json.loads((args.work / "tasks").read_text())
    ]
    hardware = Hardware.model_validate_json((args.work / "hardware").read_text())
    measure(tasks, hardware, args.work / "measurements", args.limit_seconds)


def facts(args: argparse.Namespace) -> tuple[Hardware, str]:
    """The described hardware, and the device's name."""
    if args.tiny:
        from fitlora.hardware import profile

        here = profile(check_params({"hardware": {"device": "cpu"}}).hardware, args.work)
        unknown = dict.fromkeys(Rates.model_fields)
        rates = Rates.model_validate({**unknown, "product_flops_per_second": {}})
        return here.model_copy(update={"rates": rates}), device_name()
    content = json.loads(args.facts.read_text())
    known = {k: v for k, v in content["hardware"].items() if k in Hardware.model_fields}
    return Hardware.model_validate_json(json.dumps(known)), content["device"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", choices=("planned", "measured"), help="the other stays as it is")
    parser.add_argument("--what", choices=("cells", "cases"), help="both by default")
    parser.add_argument("--model", choices=SHAPES, help="all by default")
    parser.add_argument("--cases", help="A:B, numbers from A up to before B")
    parser.add_argument("--again", action="store_true", help="also what is there")
    parser.add_argument("--limit-seconds", type=float, default=3600, help="to begin measuring in")
    parser.add_argument(
        "--at-once", type=int, default=1, help="cases that are measured at one time, at most"
    )
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--facts", type=Path, default=FACTS, help="a result file with hardware")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--work", type=Path, default=ROOT / ".fitlora" / "planner_regret")
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks" / "results" / "planner_regret.h200.json"
    )
    parser.add_argument("--role", choices=("measure",), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.role is not None:
        act(args)
        return
    hardware, device = facts(args)
    table = Table(args.json, hardware, device)
    questions = [] if args.what == "cases" else cells(tiny=args.tiny)
    if args.what != "cells":
        start, _, end = (args.cases or ":").partition(":")
        drawn = draw_cases(tiny=args.tiny)
        questions += drawn[int(start or 0) : int(end or len(drawn))]
    questions = [q for q in questions if args.model in (None, q.model)]
    if args.side != "measured":
        known = [] if args.again else [Question.of(row) for row in table.answers]
        for row in planned([q for q in questions if q not in known], hardware, args.workers):
            table.answer(row)
            words = row.get("described") or row["refused"]
            print(f"{row['model']} {row['budget_gib']} GiB x {row['sequence_length']}: {words}, "
                  f"{row['search_seconds']:.1f} s", flush=True)  # fmt: skip
    if args.side != "planned":
        done = set() if args.again else {row["key"] for row in table.plans if "error" not in row}
        tasks = table.tasks(questions, grid=args.what != "cases")
        run_measuring([task for task in tasks if task.key not in done], table, args)
    print(json.dumps(summarize(table.rows(), table.cases()), indent=1))


if __name__ == "__main__":
    main()
