"""What switched precision and frozen layers cost, and what they buy.

    python -m benchmarks.precision_and_freezing --parts overflow frozen_loss frozen    # on a CPU
    python -m benchmarks.precision_and_freezing --parts precision frozen               # on a GPU

`overflow`: the shipped model with its up projections 2**k times as large and its down projections as
much smaller: the same function in every precision that can hold it, and beyond float16's largest number.
(Adapters are on attention alone, so that bfloat16 trains as ever.) The run in float16 overflows on
purpose and switches; another, in float8, is handed a loss that is no number in mid-run. Both are held
against the same run in bfloat16, and the same without switching ends at once.

`frozen_loss`: the shipped task with every choice of layers that can be frozen. Random freezing is the
mean over all choices of a number, so nothing is left to chance but the seed; the measure's choice and
the lowest layers are two of them.

`precision`, `frozen`: an optimizer step on random weights of --models' shapes: its time and peak, what
was predicted of them, and of `frozen` what that is beside nothing frozen. On the CPU, which has no
allocator to ask, the peak is of live tensors as an estimate counts them; time is the processor's, as
others use it too; and what the speed model has to know of it is measured here.

`frozen_run`, of `frozen` where the shipped model is among --models: its training, and the memory that
was predicted before it. The longest rows come first, when the optimizer has no states, so a short run
stays below its prediction by those states: what `memory` saves shows when such rows come again.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.common import ROOT, SHAPES, device_label, shape_config, write_result
from fitlora.artifacts import Hardware, Rates
from fitlora.device import give_back_memory
from fitlora.errors import UserError
from fitlora.hardware import profile
from fitlora.memory.estimate import Estimator, Load, rehearse, sequences_of, trace_step
from fitlora.model import load_config
from fitlora.params import HardwareParams, Params, check_params
from fitlora.plan import Plan
from fitlora.planner.freezing import planned
from fitlora.planner.search import attention_kernel, loss_chunk
from fitlora.planner.speed import Shape, forecast
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.rates import COPY_BYTES, copy_rate
from fitlora.step.build import build_step
from fitlora.step.network import HandNetwork
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights
from fitlora.training.data import load_splits
from fitlora.training.run import Places, train

PARTS = ("overflow", "frozen_loss", "precision", "frozen")
SAMPLE, SAMPLE_MODEL = "sample", ROOT / "assets" / "sample_model"
# what a CPU computes in a second
SMALL, SMALL_SHAPE = "small", {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096,
}  # fmt: skip
SHARES = (0.25, 0.5, 0.75)
RANK = 16
ROUNDS = 4  # of timed steps
RUN_STEPS = 3  # of a run whose memory alone is asked for
MICRO_BATCHES = 2  # of a step of the shipped task
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# compute_dtype, layer_dtype
PRECISIONS = (
    ("float8", None), ("bfloat16", None), ("float16", None), ("float32", None),
    ("float8", "bfloat16"), ("bfloat16", "float32"),
)  # fmt: skip

Row = dict[str, Any]


# --- runs of the shipped model -------------------------------------------------------------------


class Sample:
    """The shipped task, trained by the library's own run; `folder` is scratch.

    scale: by how much up projections are larger and down projections smaller than shipped.
    """

    def __init__(self, folder: Path, hardware: Hardware, scale: float = 1.0) -> None:
        self.folder, self.hardware = folder, hardware
        source, self.checkpoint = folder / "model", folder / "quantized"
        source.mkdir(parents=True)
        for file in SAMPLE_MODEL.iterdir():
            (source / file.name).write_bytes(file.read_bytes())
        weights = load_file(source / "model.safetensors")
        for name, weight in weights.items():
            if "up_proj" in name or "down_proj" in name:
                weight.mul_(scale if "up_proj" in name else 1.0 / scale)
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        spec = QuantSpec.of(check_params({}).quantization)
        quantize_checkpoint(source, self.checkpoint, spec=spec, device=torch.device("cpu"))
        self.config = load_config(self.checkpoint)
        self.rows, self.validation = load_splits(
            check_params({}).data, self.checkpoint, self.config.vocab_size
        )
        self._runs = 0

    @property
    def layers(self) -> int:
        """Decoder layers of the shipped model."""
        return int(self.config.num_hidden_layers)

    def run(self, params: Params, dtype: str, frozen: Sequence[int] = ()) -> list[Row]:
        """The records of a run; of one that ends early those so far, and the error in the last."""
        self._runs += 1
        folder = self.folder / f"run{self._runs}"
        batch = params.train.effective_batch_size
        plan = Plan.model_validate(
            {
                "device": self.hardware.device,
                "effective_batch_size": batch,
                "micro_batch_size": batch // MICRO_BATCHES,
                "evaluation_batch_size": batch,
                "sequence_length": self.rows.facts.length.maximum,
                "compute_dtype": dtype,
                "frozen_layers": tuple(frozen),
                "optimizer": "adamw",
                "loss_chunk_tokens": loss_chunk(self.config.vocab_size),
            }
        )
        places = Places(
            folder / "adapter", folder / "log.jsonl", folder / "curves.json", folder / "scratch"
        )
        with open("/dev/null", "w") as nowhere, contextlib.redirect_stdout(nowhere):
            try:
                train(
                    params,
                    plan,
                    self.hardware,
                    config=self.config,
                    checkpoint=self.checkpoint,
                    rows=self.rows,
                    validation=self.validation,
                    places=places,
                )
            except UserError as error:
                return [*_records(places.log), {"event": "error", "message": str(error)}]
        return _records(places.log)


def _records(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def validation_loss(records: Sequence[Row]) -> float | None:
    """Of the last adapter; None for a run that did not come to its end."""
    found = [r["validation_loss"] for r in records if r["event"] == "evaluation"]
    return float(found[-1]) if found and records[-1]["event"] == "end" else None


def params_of(args: argparse.Namespace, seed: int = 0, **more: Any) -> Params:
    settings = {
        "max_steps": args.steps, "warmup_steps": args.steps // 10, "evaluate_every": None,
        "checkpoint_every": None, "seed": seed, "effective_batch_size": args.batch,
        **more.pop("train", {}),
    }  # fmt: skip
    return check_params({"train": settings, **more})


@contextlib.contextmanager
def no_number_at(step: int) -> Iterator[None]:
    """The loss of one optimizer step is no number, once."""
    plain = HandNetwork.train
    passes = itertools.count(MICRO_BATCHES)

    def trains(self: HandNetwork, *arguments: Any, **options: Any) -> list[torch.Tensor]:
        return [
            # those on meta are the estimate's, of shapes alone
            loss if loss.is_meta or next(passes) // MICRO_BATCHES != step else loss * math.nan
            for loss in plain(self, *arguments, **options)
        ]

    HandNetwork.train = trains  # type: ignore[method-assign]
    try:
        yield
    finally:
        HandNetwork.train = plain  # type: ignore[method-assign]


def overflow(args: argparse.Namespace, hardware: Hardware) -> Iterator[Row]:
    """Runs that overflow on purpose beside the same run in bfloat16."""
    cases = (
        ("bfloat16", "fixed", 0), ("float32", "fixed", 0), ("float16", "fixed", 0),
        ("float16", "dynamic", 0), ("float8", "fixed", args.steps // 2),
        ("float8", "dynamic", args.steps // 2),
    )  # fmt: skip
    reference: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        sample = Sample(Path(folder), hardware, args.scale)
        for dtype, precision, spoiled in cases:
            params = params_of(
                args, train={"precision": precision}, lora={"target_modules": ATTENTION}
            )
            start = time.perf_counter()
            with no_number_at(spoiled) if spoiled else contextlib.nullcontext():
                records = sample.run(params, dtype)
            loss = validation_loss(records)
            reference = reference if dtype != "bfloat16" else loss
            switches = [r for r in records if r["event"] == "precision"]
            yield {
                "part": "overflow",
                "model": "sample",
                "compute_dtype": dtype,
                "precision": precision,
                "up_projection_scale": args.scale,
                "loss_spoiled_at_step": spoiled or None,
                "steps": sum(r["event"] == "step" for r in records),
                "steps_asked": args.steps,
                "switches": len(switches),
                "switched": "; ".join(
                    f"{r['step']}: {r['before']} to {r['after']} ({r['cause']})" for r in switches
                ),
                "validation_loss": loss,
                "difference_from_bfloat16": None
                if loss is None or reference is None
                else loss - reference,
                "error": records[-1].get("message"),
                "seconds": round(time.perf_counter() - start, 1),
            }


def frozen_loss(args: argparse.Namespace, hardware: Hardware) -> Iterator[Row]:
    """The shipped task with each choice of frozen layers, then each share in a row."""
    dtype = "bfloat16" if hardware.device == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as folder:
        sample = Sample(Path(folder), hardware)
        layers = sample.layers
        base = {"model": "sample", "compute_dtype": dtype, "steps": args.steps}
        for seed in range(args.seeds):
            losses: dict[tuple[int, ...], float] = {}
            for count in range(layers):
                for frozen in itertools.combinations(range(layers), count):
                    losses[frozen] = _loss_of(sample, params_of(args, seed), dtype, frozen)
                    row = {**base, "part": "frozen_choice", "seed": seed}
                    yield {**row, "frozen_layers": list(frozen), "validation_loss": losses[frozen]}
            for share in SHARES:
                count = round(share * layers)
                asked = {"freeze": "memory", "freeze_share": share}
                records = sample.run(params_of(args, seed, train=asked), dtype, range(1, count + 1))
                choice = next(r for r in records if r["event"] == "freeze")
                each = [loss for frozen, loss in losses.items() if len(frozen) == count]
                lowest = tuple(range(count))
                yield {
                    **base,
                    "part": "frozen_loss",
                    "seed": seed,
                    "frozen_share": share,
                    "frozen_layers": choice["frozen_layers"],
                    "gradient_shares": choice["gradient_shares"],
                    "nothing_frozen_loss": losses[()],
                    "measured_choice_loss": validation_loss(records),
                    "lowest_layers_loss": losses[lowest],
                    "random_mean_loss": statistics.fmean(each),
                    "random_best_loss": min(each),
                    "random_worst_loss": max(each),
                    "random_choices": len(each),
                }


def _loss_of(sample: Sample, params: Params, dtype: str, frozen: Sequence[int]) -> float:
    loss = validation_loss(sample.run(params, dtype, frozen))
    assert loss is not None
    return loss


# --- what a step costs ---------------------------------------------------------------------------


def config_of(model: str) -> Any:
    if model == SAMPLE:
        return load_config(SAMPLE_MODEL)
    return shape_config("tiny", **SMALL_SHAPE) if model == SMALL else shape_config(model)


class Costs:
    """Steps of one model: what they are predicted to take, and take."""

    def __init__(self, model: str, args: argparse.Namespace, hardware: Hardware) -> None:
        self.model, self.config, self.hardware = model, config_of(model), hardware
        self.layers = int(self.config.num_hidden_layers)
        self.load = Load.uniform(args.micro_batch, args.tokens)
        self.tokens = self.load.tokens(args.micro_batch)
        self.device = torch.device(hardware.device)
        self.plan = Plan(
            device=hardware.device,
            effective_batch_size=args.micro_batch,
            micro_batch_size=args.micro_batch,
            evaluation_batch_size=args.micro_batch,
            sequence_length=args.tokens,
            compute_dtype="bfloat16" if hardware.device == "cuda" else "float32",
            attention=attention_kernel(hardware)[0],
            optimizer="adamw",
            loss_chunk_tokens=loss_chunk(self.config.vocab_size),
        )
        shape = Shape.of(self.config, bits=4, rank=RANK)
        assert shape is not None
        self.shape = shape

    @staticmethod
    def settings(**train: Any) -> StepSettings:
        lora = {"r": RANK, "alpha": 2 * RANK, "dropout": 0.0}
        return StepSettings.of(check_params({"lora": lora, "train": train}))

    def predicted(self, plan: Plan, settings: StepSettings) -> Row:
        """The plan, and what is predicted of it."""
        estimate = Estimator(self.config, settings, self.load, self.hardware)(plan)
        speed = forecast(plan, self.shape, self.hardware.rates, self.tokens)
        return {
            "model": self.model,
            "sequence_length": plan.sequence_length,
            "micro_batch": plan.micro_batch_size,
            "compute_dtype": plan.compute_dtype,
            "layer_dtype": plan.layer_dtype,
            "attention": plan.attention,
            "frozen_layers": len(plan.frozen_layers),
            "backward_ends_at_layer": plan.lowest_learning,
            "recomputed_layers": len(plan.recompute_layers),
            "predicted_allocated_bytes": estimate.peak_allocated_bytes,
            "predicted_tokens_per_second": None if speed is None else speed.tokens_per_second,
        }

    def build(self, plan: Plan) -> TrainingStep:
        gc.collect()
        give_back_memory()
        return build_step(self.config, plan, self.settings(), RandomWeights(self.device))

    def peak(self, step: TrainingStep, settings: StepSettings) -> Row:
        """Of what an estimate traces, as the step's plan and `settings` have it."""
        if self.device.type == "cpu":
            weights = RandomWeights(self.device)
            found = trace_step(self.config, step.plan, settings, self.load, weights)
            return {"measured_allocated_bytes": found.peak_bytes}
        step.optimizer.state.clear()  # an estimate is of a run from its start
        torch.cuda.reset_peak_memory_stats()
        step.settings = settings
        rehearse(step, self.load)
        return {
            "measured_allocated_bytes": torch.cuda.max_memory_allocated(),
            "measured_reserved_bytes": torch.cuda.max_memory_reserved(),
        }

    def speeds(self, step: TrainingStep, plans: Sequence[Plan]) -> list[Row]:
        """Each plan's fastest step, as what others do on the machine only adds.

        The plans take turns, so that they all have the same machine.
        """
        batch = sequences_of(self.load.train)
        clock = time.perf_counter if self.device.type == "cuda" else time.process_time
        fastest = [math.inf] * len(plans)
        for _ in range(ROUNDS):
            for index, plan in enumerate(plans):
                step.adopt(plan)
                for _ in range(2):  # the first makes the optimizer's states
                    start = clock()
                    float(step.run(batch, step=0, learning_rate=1e-5).loss)
                    _wait(self.device)
                    seconds = clock() - start
                fastest[index] = min(fastest[index], seconds)
        return [{"step_seconds": s, "tokens_per_second": self.tokens / s} for s in fastest]


def _wait(device: torch.device) -> None:
    """Lets a GPU finish."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def precision_costs(args: argparse.Namespace, hardware: Hardware) -> Iterator[Row]:
    """A step in each precision."""
    for costs in (Costs(model, args, hardware) for model in args.models):
        for dtype, in_place in PRECISIONS:
            plan = costs.plan.replace(compute_dtype=dtype, layer_dtype=in_place)
            settings = costs.settings()
            row: Row = {"part": "precision", **costs.predicted(plan, settings)}
            try:
                step = costs.build(plan)
                row |= costs.peak(step, settings) | costs.speeds(step, [plan])[0]
                del step
            except Exception as error:  # a row that says so, and the next case
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            yield row


def frozen_costs(args: argparse.Namespace, hardware: Hardware) -> Iterator[Row]:
    """A step with each share of the layers frozen in each way, beside one with none."""
    for costs in (Costs(model, args, hardware) for model in args.models):
        step = costs.build(costs.plan)
        for recomputed in (0, costs.layers):
            plans, rows = [], []
            for asked in freezing():
                settings = costs.settings(**asked)
                plan = costs.plan.replace(
                    frozen_layers=planned(settings.train, costs.layers),
                    recompute_layers=range(recomputed),
                )
                step.adopt(plan)
                row = {"part": "frozen", **asked, **costs.predicted(plan, settings)}
                rows.append(row | costs.peak(step, settings))
                plans.append(plan)
            rows = [row | speed for row, speed in zip(rows, costs.speeds(step, plans), strict=True)]
            yield from (row | against(row, rows[0]) for row in rows)
        del step


def freezing() -> Iterator[dict[str, Any]]:
    """What params ask for."""
    yield {"freeze": "off"}
    for how, share in itertools.product(("memory", "speed"), SHARES):
        yield {"freeze": how, "freeze_share": share}


def against(row: Row, whole: Row) -> Row:
    """What freezing buys: bytes of the peak, and how many times as fast it is."""
    found: Row = {}
    for what, rate in (
        ("predicted", "predicted_tokens_per_second"),
        ("measured", "tokens_per_second"),
    ):
        peak = f"{what}_allocated_bytes"
        found[f"{what}_saved_bytes"] = whole[peak] - row[peak]
        if row.get(rate) and whole.get(rate):
            found[f"{what}_times_as_fast"] = round(row[rate] / whole[rate], 4)
    return found


def frozen_runs(args: argparse.Namespace, hardware: Hardware) -> Iterator[Row]:
    """The shipped task's memory, as its run was told before and came to."""
    dtype = "bfloat16" if hardware.device == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as folder:
        sample = Sample(Path(folder), hardware)
        whole: Row = {}
        for asked in freezing():
            steps = {"max_steps": RUN_STEPS, "warmup_steps": 0}
            params = params_of(args, train={**steps, **asked})
            frozen = planned(params.train, sample.layers)
            records = sample.run(params, dtype, frozen)
            end, choices = records[-1], [r for r in records if r["event"] == "freeze"]
            row = {
                "part": "frozen_run", "model": SAMPLE, **asked, "compute_dtype": dtype,
                "frozen_layers": choices[0]["frozen_layers"] if choices else list(frozen),
                "predicted_allocated_bytes": end["predicted_peak_bytes"],
                "measured_allocated_bytes": end["measured_peak_bytes"],
            }  # fmt: skip
            whole = whole or row
            yield row | against(row, whole)


def rows_of(args: argparse.Namespace, part: str, hardware: Hardware) -> Iterator[Row]:
    if part == "overflow":
        return overflow(args, hardware)
    if part == "frozen_loss":
        return frozen_loss(args, hardware)
    if hardware.device == "cpu":
        hardware = hardware.model_copy(update={"rates": with_copies(hardware.rates)})
    if part == "precision":
        return precision_costs(args, hardware)
    runs = frozen_runs(args, hardware) if SAMPLE in args.models else ()
    return itertools.chain(frozen_costs(args, hardware), runs)


def with_copies(rates: Rates) -> Rates:
    """A CPU's rates with that of its memory, which a profile does not need."""
    here = torch.ones(COPY_BYTES, dtype=torch.uint8)
    rate = copy_rate(here, torch.empty_like(here), 2 * COPY_BYTES)  # read and written
    return rates.model_copy(update={"device_copy_bytes_per_second": rate})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--models", nargs="+", choices=(SAMPLE, SMALL, *SHAPES), help="of steps' costs"
    )
    parser.add_argument("--tokens", type=int, help="of their sequences")
    parser.add_argument("--micro-batch", type=int, help="of so many")
    parser.add_argument("--steps", type=int, default=60, help="of a run of the shipped task")
    parser.add_argument("--batch", type=int, default=16, help="its effective batch")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--scale", type=float, default=2.0**14, help="of up projections")
    parser.add_argument("--limit-seconds", type=float, default=math.inf)
    parser.add_argument("--json", type=Path, help="result file; rows of other parts in it stay")
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    args.models = args.models or (["llama-3-8b"] if on_gpu else [SAMPLE, SMALL])
    args.tokens = args.tokens or (2048 if on_gpu else 256)
    args.micro_batch = args.micro_batch or (4 if on_gpu else 2)
    default = ROOT / "benchmarks" / "results" / f"precision_and_freezing.{device_label()}.json"
    path = args.json or default
    also = {"frozen_loss": "frozen_choice", "frozen": "frozen_run"}
    mine = {*args.parts, *(also[part] for part in args.parts if part in also)}
    rows: list[Row] = []
    if path.is_file():
        rows = [row for row in json.loads(path.read_text())["rows"] if row["part"] not in mine]
    end = time.perf_counter() + args.limit_seconds
    hardware = profile(HardwareParams(), ROOT)
    for row in itertools.chain.from_iterable(rows_of(args, part, hardware) for part in args.parts):
        rows.append(row)
        print(json.dumps(row), flush=True)
        write_result(path, "precision_and_freezing", rows)
        if time.perf_counter() > end:
            print("out of time")
            break


if __name__ == "__main__":
    main()
