"""How near is the planner's speed model? Its forecast of every training step that was measured.

    python -m benchmarks.speed_model

It needs no GPU: plans and tokens per second are those of the result files of a device, and the rates are
what the hardware profile measured on it (`three_ways`). `error` is the forecast's share of what was
measured, less one. Rows of an earlier step, which launched more (`measured_commit` is null or an older
one), are held against what the step does today. The time of a launch was taken from a row of
step_speed_earlier, and hosts differ: it is what most of the larger errors come from.

What the planner asks of the model is an order: `regret` is what it loses at each budget by taking the
plan of step_speed's that is forecast to be the fastest, of those whose process stays within the budget.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, shape_config, write_result
from benchmarks.planner_regret import GRID, Task, grid_plan
from benchmarks.step_speed import BUDGETS_GIB
from fitlora.artifacts import Hardware
from fitlora.offload.residency import spread
from fitlora.plan import Plan
from fitlora.planner.search import MLP_CHUNK_TOKENS, loss_chunk
from fitlora.planner.speed import Shape, forecast
from fitlora.units import GIB

RESULTS = ROOT / "benchmarks" / "results"
GOAL = 0.15
RANK = 16  # of all these runs

Row = dict[str, Any]
Content = dict[str, Any]


def hardware_of(content: Content) -> Hardware:
    """The machine that a result file was measured on, of which it holds the profile."""
    known = {k: v for k, v in content["hardware"].items() if k in Hardware.model_fields}
    return Hardware.model_validate_json(json.dumps(known))


def plan_of(row: Row, **decisions: Any) -> Plan:
    """The plan of a measured row: what it names and, by `decisions`, what follows from its program."""
    config = shape_config(row["model"])
    base = {
        "device": "cuda",
        "effective_batch_size": row["micro_batch"],
        "micro_batch_size": row["micro_batch"],
        "evaluation_batch_size": 1,
        "sequence_length": row["sequence_length"],
        "compute_dtype": row["compute_dtype"],
        "optimizer": "adamw",
        "loss_chunk_tokens": loss_chunk(config.vocab_size),
        "mlp_chunk_tokens": MLP_CHUNK_TOKENS,
    }
    return Plan.model_validate({**base, **decisions})


def layers_of(row: Row) -> int:
    return int(shape_config(row["model"]).num_hidden_layers)


# --- what was measured, by the program that did ------------------------------------------------------

# The row, the plan that it measured, and its tokens per second
Measured = tuple[Row, Plan, float]


def step_speed(content: Content) -> Iterator[Measured]:
    for row in content["rows"]:
        if row["system"] == "fitlora" and "budget_gib" not in row and "error" not in row:
            plan = plan_of(
                row,
                recompute_layers=range(round(row["recomputed_share"] * layers_of(row))),
                recompute_keeps=row["recompute_keeps"],
                **dict.fromkeys(row["on_the_host"], "host"),
            )
            yield row, plan, row["tokens_per_second"]


def precision_and_freezing(content: Content) -> Iterator[Measured]:
    for row in content["rows"]:
        if row["part"] in ("precision", "frozen") and "error" not in row:
            first = 0 if row["backward_ends_at_layer"] else 1
            plan = plan_of(
                row,
                layer_dtype=row["layer_dtype"],
                # rows that do not tell are of steps that had plain attention in float16
                attention=row.get(
                    "attention", "plain" if row["compute_dtype"] == "float16" else "flash"
                ),
                frozen_layers=range(first, first + row["frozen_layers"]),
                recompute_layers=range(row["recomputed_layers"]),
            )
            yield row, plan, row["tokens_per_second"]


def offload(content: Content) -> Iterator[Measured]:
    """Each row's own run, and the same work with everything on the device."""
    places = ("checkpoints", "embedding", "head", "optimizer_device")
    for row in content["rows"]:
        if not row["fits"] or row["throttle_gb_per_second"] is not None or "error" in row:
            continue
        resident = plan_of(row, recompute_layers=range(layers_of(row)))
        plan = resident.replace(
            streamed_layers=spread(layers_of(row), row["streamed_layers"]),
            disk_layers=row.get("disk_layers", 0),
            **{name: row[name] for name in places},
        )
        yield row, plan, row["tokens_per_second"]
        if row["resident_tokens_per_second"] is not None:
            yield row, resident, row["resident_tokens_per_second"]


def three_ways(content: Content) -> Iterator[Measured]:
    for row in content["rows"]:
        layers = layers_of(row) if row["recompute"] == "all" else 0
        yield row, plan_of(row, recompute_layers=range(layers)), row["probed_tokens_per_second"]


def pipeline(content: Content) -> Iterator[Measured]:
    """The probe of the run's plan: one micro-batch, with the default dropout."""
    plan = Plan.model_validate_json(json.dumps(content["plan"]["plan"]))
    alone = plan.replace(effective_batch_size=plan.micro_batch_size)
    measured = content["training"][-1]["forecast_tokens_per_second"]
    yield {**content["rows"][0], "dropout": True}, alone, measured


def planner_regret(content: Content) -> Iterator[Measured]:
    """The grid's plans, with all micro-batches of a step and its optimizer."""
    rows = {row["key"]: row for row in content["plans"] if "tokens_per_second" in row}
    for key, layouts in GRID.items():
        for layout in layouts:
            plan = grid_plan(key, layout, "cuda")
            row = rows.get(Task(key[0], plan).key)
            if row is not None:
                yield row, plan, row["tokens_per_second"]


SOURCES: dict[str, Callable[[Content], Iterator[Measured]]] = {
    "step_speed": step_speed,
    "precision_and_freezing": precision_and_freezing,
    "offload": offload,
    "three_ways": three_ways,
    "pipeline": pipeline,
    "planner_regret": planner_regret,
}


def held_against(name: str, content: Content, hardware: Hardware) -> Iterator[Row]:
    """A row for each step that the result file of program `name` holds."""
    for row, plan, measured in SOURCES[name](content):
        config, dropout = shape_config(row["model"]), row.get("dropout", False)
        shape = Shape.of(config, bits=4, rank=RANK, dropout=dropout)
        assert shape is not None
        tokens = plan.micro_batch_size * plan.sequence_length
        found = forecast(plan, shape, hardware.rates, tokens)
        assert found is not None
        # where a file's rows have a commit each, those that have none are older than the file
        own = any("commit" in other for other in content["rows"])
        yield {
            "measured_by": name,
            "measured_commit": row.get("commit") if own else content["commit"],
            "model": row["model"],
            "dropout": dropout,
            "described": plan.describe(),
            "measured_tokens_per_second": measured,
            "predicted_tokens_per_second": found.tokens_per_second,
            "error": found.tokens_per_second / measured - 1,
            "bound": found.bound,
            "process_bytes": row.get("process_bytes"),
        }


def regrets(rows: Sequence[Row]) -> Iterator[Row]:
    """For each budget, what is forecast to be the fastest beside what was."""
    todays = [
        row
        for row in rows
        if row["measured_by"] == "step_speed"
        and row["measured_commit"] is not None
        and "bfloat16" in row["described"]
    ]
    for budget in BUDGETS_GIB:
        within = [row for row in todays if row["process_bytes"] <= budget * GIB]
        chosen = max(within, key=lambda row: row["predicted_tokens_per_second"])
        best = max(within, key=lambda row: row["measured_tokens_per_second"])
        reached = [row["measured_tokens_per_second"] for row in (chosen, best)]
        yield {
            "budget_gib": budget,
            "plans": len(within),
            "chosen": chosen["described"],
            "chosen_tokens_per_second": reached[0],
            "best_tokens_per_second": reached[1],
            "regret": 1 - reached[0] / reached[1],
        }


def line(row: Row) -> str:
    return (
        f"{row['error']:+7.1%}  {row['predicted_tokens_per_second']:8,.0f} of "
        f"{row['measured_tokens_per_second']:8,.0f}  {row['bound']:<9}{row['measured_by']:<23}"
        f"{row['model']}: {row['described']}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="h200", help="as the result files' names have it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--json", type=Path, help="by default beside them")
    args = parser.parse_args(argv)
    contents = {
        name: json.loads((args.results / f"{name}.{args.device}.json").read_text())
        for name in SOURCES
    }
    facts = contents["three_ways"]
    rows = [
        row
        for name, content in contents.items()
        for row in held_against(name, content, hardware_of(facts))
    ]
    errors = [abs(row["error"]) for row in rows]
    summary = {
        "rows": len(rows),
        "within_goal": sum(error <= GOAL for error in errors),
        "mean_error": statistics.fmean(errors),
        "worst_error": max(errors),
    }
    for row in sorted(rows, key=lambda row: row["error"]):
        print(line(row))
    print(
        f"{summary['within_goal']} of {len(rows)} within {GOAL:.0%}, mean error "
        f"{summary['mean_error']:.1%}, worst {summary['worst_error']:.1%}"
    )
    regret = list(regrets(rows))
    for row in regret:
        print(f"{row['budget_gib']:>3} GiB: {row['regret']:.1%} lost by {row['chosen']}")
    path = args.json or args.results / f"speed_model.{args.device}.json"
    device = facts["device"]
    write_result(path, "speed_model", rows, device=device, summary=summary, regret=regret)


if __name__ == "__main__":
    main()
