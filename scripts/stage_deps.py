"""Holds the library files that dvc.yaml lists for each stage against the stage's real imports.

DVC does not trace imports: a stage runs again only when a file that dvc.yaml names has changed. This
reads the imports of stages/NAME.py (those inside functions too, and theirs in turn) from the source,
without running any of it, and writes the list into dvc.yaml. `make deps` runs it, and
tests/test_pipeline_contract.py fails where the list is not what this would write.

What it cannot see it refuses: a module imported by a computed name, or a name taken from a package
that only passes it on.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DVC_FILE = ROOT / "dvc.yaml"

# Modules that no stage depends on, because what they say cannot change the bytes of an output. What
# only they import is left out with them: a docstring in params.py must not re-quantize a 70B model.
EXCUSED = {
    "fitlora.params": "says which values are allowed; the values are params in dvc.yaml",
    "fitlora.artifacts": "how JSON artifacts are written and checked; their content comes in as deps",
    "fitlora.errors": "names of errors",
    "fitlora.console": "how stages speak to the user",
    "fitlora.units": "bytes in and out of words; the hardware profile, which parses, always runs",
    "fitlora.report.memory": "lines of text for the user",
    "fitlora.report.frontier": "a picture for the user, beside the outputs",
    "fitlora.planner.refusal": "what a stage says that ends without an output",
    "fitlora.training.progress": "a bar, or lines, for the user",
    "fitlora.progress": "a bar, or lines, for the user",
    "fitlora.memory.tracker": "measures; what it measured is not held to be the same bytes again",
}

CODE = re.compile(r"^\s+- (?:lib|stages)/\S+\.py\s*$")


def stages(root: Path = ROOT) -> tuple[str, ...]:
    """The names of the stages, which are the files in stages/."""
    files = sorted((root / "stages").glob("*.py"))
    return tuple(path.stem for path in files if path.stem != "__init__")


def code_of(stage: str, root: Path = ROOT) -> tuple[str, ...]:
    """The files whose change may change what `stage` writes, as paths from the root.

    Raises ValueError for an import that cannot be followed.
    """
    found: dict[str, Path] = {}
    waiting = [f"stages.{stage}"]
    while waiting:
        module = waiting.pop()
        if module in found or module in EXCUSED:
            continue
        path = _file_of(module, root)
        if path is None:
            raise ValueError(f"{module} is imported, and there is no such module")
        if path.name == "__init__.py":
            continue  # tests hold that packages import nothing by themselves
        found[module] = path
        waiting.extend(_imports(path, module, root))
    names = sorted(path.relative_to(root).as_posix() for path in found.values())
    own = f"stages/{stage}.py"
    return (own, *(name for name in names if name != own))


def _file_of(module: str, root: Path) -> Path | None:
    """Where a module of the project lies; None when it is not the project's, or not a module."""
    top, *rest = module.split(".")
    base = {"fitlora": root / "lib" / "fitlora", "stages": root / "stages"}.get(top)
    if base is None:
        return None
    file = base.joinpath(*rest)
    if rest and file.with_suffix(".py").is_file():
        return file.with_suffix(".py")
    return file / "__init__.py" if (file / "__init__.py").is_file() else None


def _imports(path: Path, module: str, root: Path) -> Iterator[str]:
    """The project's modules that a file imports."""
    for node in _running_code(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        where = f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_ours(alias.name):
                    yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")[: -node.level]
                base = ".".join([*parts, base] if base else parts)
            if not _is_ours(base):
                continue
            home = _file_of(base, root)
            for alias in node.names:
                if _file_of(f"{base}.{alias.name}", root) is not None:
                    yield f"{base}.{alias.name}"
                elif home is None or home.name != "__init__.py":
                    yield base
                elif alias.name not in _defined(home):
                    raise ValueError(
                        f"{where}: take {alias.name} from the module that defines it, not from "
                        f"the package {base}"
                    )
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if not (isinstance(first, ast.Constant) and isinstance(first.value, str)):
                raise ValueError(f"{where}: a module imported by a computed name")
            if _is_ours(first.value):
                yield first.value


def _running_code(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`, which never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and _name(node.test) == "TYPE_CHECKING":
            for other in node.orelse:
                yield other
                yield from _running_code(other)
            continue
        yield node
        yield from _running_code(node)


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in ("fitlora", "stages")


def _name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else None


def _defined(path: Path) -> set[str]:
    """Names that a file binds by itself at its top, not by importing them."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def with_code(text: str, code: dict[str, tuple[str, ...]]) -> str:
    """dvc.yaml's text with the code of each stage in `code` at the end of its deps.

    Lines are replaced and nothing is parsed, so that comments and order stay as they are.
    """
    lines: list[str] = []
    stage: str | None = None
    in_stages = in_deps = False
    for line in [*text.splitlines(), ""]:
        indent = len(line) - len(line.lstrip())
        blank = not line.strip()
        if in_deps and (blank or (indent <= 4 and not line.startswith("    - "))):
            lines.extend(f"      - {path}" for path in code[stage or ""])
            in_deps = False
        if not blank and indent == 0 and not line.startswith("#"):
            in_stages, stage = line.startswith("stages:"), None
        elif in_stages and (match := re.fullmatch(r"  (\w+):\s*", line)):
            stage = match[1]
        elif stage in code and re.fullmatch(r"    deps:\s*", line):
            in_deps = True
        if not (in_deps and CODE.match(line)):
            lines.append(line)
    return "\n".join(lines[:-1]) + "\n"


def main() -> int:
    text = DVC_FILE.read_text(encoding="utf-8")
    code: dict[str, tuple[str, ...]] = {}
    for stage in stages():
        try:
            code[stage] = code_of(stage)
        except ValueError as error:
            print(f"error: {stage}: {error}", file=sys.stderr)
    new = with_code(text, code)
    if len(code) < len(stages()):
        return 1
    if new == text:
        print("dvc.yaml lists what the stages import already")
        return 0
    DVC_FILE.write_text(new, encoding="utf-8")
    print("dvc.yaml: the stages' code is listed again; look at it with git diff")
    return 0


if __name__ == "__main__":
    sys.exit(main())
