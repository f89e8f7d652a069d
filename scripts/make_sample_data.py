"""Make the sample data: plain notes about transactions, each to become one ledger line.

The task is small but has the shape of a real one: read a sentence that people write in many ways,
and answer in one fixed, compact format that a program could load.

    Ledger line:
    On March 3, 2021, Anna Lind bought 12.5 kilograms of flour for 340 euros.
    ->
    2021-03-03 | Anna Lind | 12.5 kg | EUR 340.00

The base model of `make_sample_model.py` can read such sentences and rewrite their parts, but has
never seen this instruction or this format, so what an adapter learns here shows in the exact match.

    python scripts/make_sample_data.py --seed 1 --out assets/data
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

from sample_language import Fact, Statement, draw_fact, iso_date, money, quantity, state

INSTRUCTION = "Ledger line:"


def ledger_line(fact: Fact) -> str:
    """The target format: date | party | quantity | money."""
    return " | ".join((iso_date(fact.date), fact.party, quantity(fact), money(fact)))


def row(statement: Statement) -> dict[str, list[dict[str, str]]]:
    """One row in chat format."""
    return {
        "messages": [
            {"role": "user", "content": f"{INSTRUCTION}\n{statement.sentence}"},
            {"role": "assistant", "content": ledger_line(statement.fact)},
        ]
    }


def draw_statements(seed: int, count: int) -> list[Statement]:
    """`count` statements, no two of one sentence or of one (date, amount, unit, name).

    Both splits are cut from one such list, so they have the same distribution and share no fact.
    """
    random = Random(f"sample data {seed}")
    seen: set[object] = set()
    statements: list[Statement] = []
    while len(statements) < count:
        statement = state(random, draw_fact(random))
        if statement.fact.key not in seen and statement.sentence not in seen:
            seen |= {statement.fact.key, statement.sentence}
            statements.append(statement)
    return statements


def write_jsonl(path: Path, statements: list[Statement]) -> None:
    """Write one row a line, UTF-8, with "\\n" on every system so that the bytes agree."""
    lines = (json.dumps(row(statement), ensure_ascii=False) + "\n" for statement in statements)
    path.write_bytes("".join(lines).encode())


def main(argv: list[str] | None = None) -> None:
    """Write train.jsonl and validation.jsonl."""
    parser = argparse.ArgumentParser(description="Make the sample data.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("assets/data"))
    parser.add_argument("--train-rows", type=int, default=2000)
    parser.add_argument("--validation-rows", type=int, default=200)
    arguments = parser.parse_args(argv)

    statements = draw_statements(arguments.seed, arguments.train_rows + arguments.validation_rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_jsonl(arguments.out / "train.jsonl", statements[: arguments.train_rows])
    write_jsonl(arguments.out / "validation.jsonl", statements[arguments.train_rows :])


if __name__ == "__main__":
    main()
