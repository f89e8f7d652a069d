"""What switched precision and frozen layers cost, and what they buy.

    python -m benchmarks.precision_and_freezing --parts overflow frozen_loss      # a CPU is enough
    python -m benchmarks.precision_and_freezing --parts precision frozen          # on a GPU

`overflow`: the shipped model with its up projections 2**k times as large and its down projections as
much smaller: the same function in every precision that can hold it, and beyond float16's largest number.
(Adapters are on attention alone, so that bfloat16 trains as ever.) The run in float16 overflows on
purpose and switches; another, in float8, is handed a loss that is no number in mid-run. Both are held
against the same run in bfloat16, and the same without switching ends at once.

`frozen_loss`: the shipped task with every choice of layers that can be frozen. Random freezing is the
mean over all choices of a number, so nothing is left to chance but the seed; the measure's choice and
the lowest layers are two of them.

`precision`, `frozen`: an optimizer step on random weights of --model's shape: its time and peak, and
what was predicted of them.
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
from fitlora.artifacts import Hardware
from fitlora.device import give_back_memory
from fitlora.errors import UserError
from fitlora.hardware import profile
from fitlora.memory.estimate import Estimator, Load, sequences_of
from fitlora.model import load_config
from fitlora.params import HardwareParams, Params, check_params
from fitlora.plan import Plan
from fitlora.planner.search import loss_chunk
from fitlora.planner.speed import Shape, forecast
from fitlora.quantization.layout import QuantSpec
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.step.build import build_step
from fitlora.step.network import HandNetwork
from fitlora.step.settings import StepSettings
from fitlora.step.weights import RandomWeights
from fitlora.training.data import load_splits
from fitlora.training.run import Places, train

PARTS = ("overflow", "frozen_loss", "precision", "frozen")
SHARES = (0.25, 0.5, 0.75)
WARM_STEPS, TIMED_STEPS = 2, 3
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
        for file in (ROOT / "assets" / "sample_model").iterdir():
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

    def trains(self: HandNetwork, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = plain(self, *arguments, **options)
        if loss.is_meta:  # the estimate's, of shapes alone
            return loss
        return loss * math.nan if next(passes) // MICRO_BATCHES == step else loss

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


def cases_of(args: argparse.Namespace, part: str, layers: int) -> Iterator[dict[str, Any]]:
    """What differs of the Plans."""
    if part == "precision":
        for dtype, in_place in PRECISIONS:
            yield {"compute_dtype": dtype, "layer_dtype": in_place}
        return
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    for recomputed in (0, layers):
        for share in (0.0, *SHARES):
            for lowest in (0, 1) if share else (0,):
                frozen = range(lowest, lowest + min(layers - 1, round(share * layers)))
                yield {
                    "compute_dtype": dtype,
                    "frozen_layers": tuple(frozen),
                    "recompute_layers": tuple(range(recomputed)),
                }


def costs(args: argparse.Namespace, hardware: Hardware, part: str) -> Iterator[Row]:
    """A step's time and peak, and what was predicted of both."""
    config = shape_config(args.model)
    settings = StepSettings.of(
        check_params({"lora": {"r": 16, "alpha": 32, "dropout": 0.0}, "train": {}})
    )
    load = Load.uniform(args.micro_batch, args.tokens)
    estimator = Estimator(config, settings, load, hardware)
    shape = Shape.of(config, bits=4, rank=16)
    assert shape is not None
    for case in cases_of(args, part, config.num_hidden_layers):
        plan = Plan.model_validate(
            {
                "device": hardware.device,
                "effective_batch_size": args.micro_batch,
                "micro_batch_size": args.micro_batch,
                "evaluation_batch_size": args.micro_batch,
                "sequence_length": args.tokens,
                "optimizer": "adamw",
                "loss_chunk_tokens": loss_chunk(config.vocab_size),
                **case,
            }
        )
        tokens = args.micro_batch * args.tokens
        expected = forecast(plan, shape, hardware.rates, tokens)
        row: Row = {
            "part": part,
            "model": args.model,
            "sequence_length": args.tokens,
            "micro_batch": args.micro_batch,
            "compute_dtype": plan.compute_dtype,
            "layer_dtype": plan.layer_dtype,
            "frozen_layers": len(plan.frozen_layers),
            "backward_ends_at_layer": plan.lowest_learning,
            "recomputed_layers": len(plan.recompute_layers),
            "predicted_allocated_bytes": estimator(plan).peak_allocated_bytes,
            "predicted_tokens_per_second": None if expected is None else expected.tokens_per_second,
        }
        try:
            row |= measure(config, plan, settings, load)
        except Exception as error:  # a row that says so, and the next case
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        yield row


def measure(config: Any, plan: Plan, settings: StepSettings, load: Load) -> Row:
    """Median seconds of a step, and the allocator's peaks."""
    gc.collect()
    give_back_memory()
    device = torch.device(plan.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = build_step(config, plan, settings, RandomWeights(device))
    batch = sequences_of(load.train)
    seconds = []
    for index in range(WARM_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        result = step.run(
            batch, step=index, learning_rate=1e-5, accept=lambda loss, norm: math.isfinite(loss)
        )
        float(result.loss)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[WARM_STEPS:])
    found: Row = {
        "step_seconds": median,
        "tokens_per_second": result.tokens / median,
        "loss": float(result.loss),
        "measured_allocated_bytes": None,
        "measured_reserved_bytes": None,
    }
    if device.type == "cuda":
        found["measured_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["measured_reserved_bytes"] = torch.cuda.max_memory_reserved()
    return found


def rows_of(args: argparse.Namespace, part: str, hardware: Hardware) -> Iterator[Row]:
    if part == "overflow":
        return overflow(args, hardware)
    if part == "frozen_loss":
        return frozen_loss(args, hardware)
    return costs(args, hardware, part)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60, help="of a run of the shipped task")
    parser.add_argument("--batch", type=int, default=16, help="its effective batch")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--scale", type=float, default=2.0**14, help="of up projections")
    parser.add_argument("--limit-seconds", type=float, default=math.inf)
    parser.add_argument("--json", type=Path, help="result file; rows of other parts in it stay")
    args = parser.parse_args(argv)
    default = ROOT / "benchmarks" / "results" / f"precision_and_freezing.{device_label()}.json"
    path = args.json or default
    mine = {*args.parts, *(["frozen_choice"] if "frozen_loss" in args.parts else [])}
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
