"""How long rows take from a file to tokens, and how much memory: 100,000 of them on the CPU.

Rows are the shipped ones over and over, each told from the others by a number, as JSONL, as CSV with
prompt and completion, and as conversations of six turns. Each is read in a process of its own, whose
peak is its high-water mark; `import_peak_bytes` is the mark before the first row is read.
`cpu_seconds` is of all cores together, and says what the machine's other work adds to `seconds`.

    python -m benchmarks.data --json benchmarks/results/data.cpu.json
"""

import argparse
import csv
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, write_result
from fitlora.data.sources import Source
from fitlora.data.templates import load_tokenizer
from fitlora.params import DataParams
from fitlora.training.data import tokenize

MODEL = ROOT / "assets" / "sample_model"


def write_rows(folder: Path, count: int) -> list[Path]:
    """A file of `count` rows in each form."""
    lines = (ROOT / "assets/data/train.jsonl").read_text(encoding="utf-8").splitlines()
    shipped = [json.loads(line)["messages"] for line in lines]
    files = [folder / name for name in ("messages.jsonl", "prompts.csv", "six_turns.jsonl")]
    with (
        files[0].open("w", encoding="utf-8") as short,
        files[1].open("w", encoding="utf-8", newline="") as table,
        files[2].open("w", encoding="utf-8") as long,
    ):
        writer = csv.writer(table)
        writer.writerow(["prompt", "completion"])
        for index in range(count):
            turns = [dict(m) for i in range(3) for m in shipped[(index + 7 * i) % len(shipped)]]
            turns[0]["content"] += f" ({index})"
            short.write(json.dumps({"messages": turns[:2]}) + "\n")
            writer.writerow([turns[0]["content"], turns[1]["content"]])
            long.write(json.dumps({"messages": turns}) + "\n")
    return files


def measure(file: Path, queue: Any) -> None:
    """Reads a file; puts a flat row of figures into the queue."""
    tokenizer = load_tokenizer(MODEL)
    before = _peak_bytes()
    start, cpu = time.perf_counter(), time.process_time()
    split = tokenize(
        Source(str(file), (file,)),
        tokenizer,
        DataParams(max_length=1024),
        vocabulary=len(tokenizer),
    )
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    queue.put(
        {
            "form": file.name,
            "rows": split.facts.rows,
            "tokens": split.facts.tokens,
            "file_bytes": file.stat().st_size,
            "cores": len(os.sched_getaffinity(0)),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu, 2),
            "rows_per_second": round(split.facts.rows / seconds),
            "peak_bytes": _peak_bytes(),
            "import_peak_bytes": before,
        }
    )


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where the figures go; printed otherwise")
    parser.add_argument("--rows", type=int, default=100_000)
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for file in write_rows(Path(folder), args.rows):
            queue = spawn.Queue()
            process = spawn.Process(target=measure, args=(file, queue))
            process.start()
            found.append(queue.get())
            process.join()
            print(json.dumps(found[-1]), flush=True)
    if args.json is not None:
        write_result(args.json, "data", found)


if __name__ == "__main__":
    main()
