"""One process of a run that was started for several: python -m fitlora.pipeline.train_rank PARAMS ROOT.

PARAMS is a file with all params as JSON, as what is trained need not be what a params.yaml says.
"""

import functools
import sys
from pathlib import Path

from fitlora.console import run
from fitlora.params import Params
from fitlora.pipeline.train_adapters import train_adapters


def main(params: Path, root: Path) -> None:
    train_adapters(Params.model_validate_json(params.read_text("utf-8")), root)


if __name__ == "__main__":
    given, where = map(Path, sys.argv[1:])
    run(functools.partial(main, given, where), where)
