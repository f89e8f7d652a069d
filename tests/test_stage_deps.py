"""scripts/stage_deps.py follows every way of importing, refuses what it cannot, and keeps comments."""

from pathlib import Path

import pytest

from scripts.stage_deps import code_of, with_code


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A stage over a small library, with one import of each kind."""
    files = {
        "stages/__init__.py": "",
        "stages/cook.py": "from fitlora import oven\nimport fitlora.pan\nimport json\n",
        "lib/fitlora/__init__.py": "__version__ = '1'\n",
        "lib/fitlora/oven.py": "def f():\n    from fitlora.heat.gas import flame\n",
        "lib/fitlora/pan.py": (
            "from typing import TYPE_CHECKING\n"
            "from fitlora import __version__\n"
            "from fitlora.params import Params\n"
            "if TYPE_CHECKING:\n    from fitlora.spoon import Spoon\n"
        ),
        "lib/fitlora/spoon.py": "",
        "lib/fitlora/lid.py": "",
        "lib/fitlora/params.py": "from fitlora.spoon import Spoon\n",
        "lib/fitlora/heat/__init__.py": "",
        "lib/fitlora/heat/gas.py": "from . import pipe\nfrom ..lid import Lid\n",
        "lib/fitlora/heat/pipe.py": "import importlib\nimportlib.import_module('fitlora.oven')\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_follows_imports_of_every_kind(project: Path) -> None:
    assert code_of("cook", project) == (
        "stages/cook.py",
        "lib/fitlora/heat/gas.py",
        "lib/fitlora/heat/pipe.py",
        "lib/fitlora/lid.py",
        "lib/fitlora/oven.py",
        "lib/fitlora/pan.py",
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import importlib\nimportlib.import_module(name)", "computed name"),
        ("from fitlora.heat import flame", "the module that defines it"),
        ("import fitlora.nowhere", "no such module"),
    ],
)
def test_refuses_what_it_cannot_follow(project: Path, line: str, message: str) -> None:
    (project / "lib/fitlora/oven.py").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        code_of("cook", project)


TEXT = """\
# the kitchen
stages:
  cook:  
    deps:
      # what goes in
      - ${food}
      - lib/fitlora/old.py
    params:
      - heat

  wash:
    deps:
    outs:
      - plates   # clean
metrics:
  - stages/cook.py
"""


def test_writes_the_code_and_leaves_the_rest(project: Path) -> None:
    new = with_code(TEXT, {"cook": ("stages/cook.py", "lib/fitlora/pan.py"), "wash": ("a.py",)})
    assert new == TEXT.replace(
        "      - lib/fitlora/old.py\n", "      - stages/cook.py\n      - lib/fitlora/pan.py\n"
    ).replace("    deps:\n    outs:", "    deps:\n      - a.py\n    outs:")
    again = {"cook": ("stages/cook.py", "lib/fitlora/pan.py")}
    assert with_code(with_code(TEXT, again), again) == with_code(TEXT, again)
