"""What models that are known by name take: all on a GPU, and with what the host can take moved there.

    python -m benchmarks.model_sizes

asks `fitlora estimate NAME --table` about each, on any CPU in minutes, and writes
benchmarks/results/model_sizes.cpu.json and docs/models.md. Nothing is measured: how near the estimates
are to what a GPU takes is told by benchmarks.estimate_accuracy.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from click.testing import CliRunner

from benchmarks.common import ROOT, write_result
from fitlora.artifacts import Estimate
from fitlora.cli import main as fitlora
from fitlora.known_models import SHAPES
from fitlora.units import GIB

RESULT = ROOT / "benchmarks" / "results" / "model_sizes.cpu.json"
PAGE = ROOT / "docs" / "models.md"
HEAD = """# What models take

One training step on a sample of 2,048 tokens: NF4 with double quantization, LoRA r=16 on all linear
layers, AdamW, every layer recomputed. GiB of the whole process on the GPU, CUDA's context of 620 MiB
included, and of the host. Full fine-tuning is a bound: weights and gradients in 16 bits, and nothing
else. All of these are estimates
([model_sizes.cpu.json](../benchmarks/results/model_sizes.cpu.json), `python -m benchmarks.model_sizes`);
how near such estimates come is [in the README](../README.md#a-real-size).

With offload all layers, checkpoints, embedding, head and optimizer are on the host, about the least
that a GPU can be left with. In between the planner uses what there is:
`fitlora plan NAME --gpu "RTX 4060"` says how, and how fast by forecast, in seconds, and
`fitlora estimate NAME --gpu-memory 8GiB` takes a layout apart. Later models of the same size take the
same: `llama-3-8b` is Llama 3.1 8B as well.

| name | parameters | full fine-tuning | QLoRA, all on the GPU | QLoRA with offload | of the host then |
|---|---|---|---|---|---|
"""


def rows() -> Iterator[dict[str, Any]]:
    """A row for each model, the smallest first."""
    for name in SHAPES:
        done = CliRunner().invoke(fitlora, ["estimate", name, "--table", "--json"])
        assert done.exit_code == 0, done.output
        found = json.loads(done.stdout)
        resident, offloaded = (
            Estimate.model_validate_json(json.dumps(found[way]))
            for way in ("qlora", "qlora_with_offload")
        )
        standard = found["standard_fine_tuning_at_least_bytes"]
        yield {
            "model": name,
            "parameters": standard // 4,  # two bytes of each, and two of its gradient
            "standard_fine_tuning_at_least_bytes": standard,
            "qlora_bytes": resident.process_bytes,
            "qlora_with_offload_bytes": offloaded.process_bytes,
            "qlora_with_offload_host_bytes": offloaded.host_bytes,
        }


def page(found: Sequence[dict[str, Any]]) -> str:
    """The whole document."""
    return HEAD + "".join(f"| {' | '.join(_cells(row))} |\n" for row in found)


def _cells(row: dict[str, Any]) -> Iterator[str]:
    yield f"`{row['model']}`"
    yield f"{row['parameters'] / 1e9:.1f} B"
    yield f"> {row['standard_fine_tuning_at_least_bytes'] / GIB:,.1f}"
    for key in ("qlora", "qlora_with_offload", "qlora_with_offload_host"):
        yield f"{row[f'{key}_bytes'] / GIB:,.1f}"


def main() -> None:
    found = sorted(rows(), key=lambda row: row["parameters"])
    write_result(RESULT, "model_sizes", found)
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
