"""dvc.yaml says what each stage really stands on: its code, its params, the facts it reads.

DVC believes dvc.yaml. A library file that is missing there gives stale results, a key that is missing
gives stale results too, and one too many runs hours of training again for nothing. So the code is read
(never run), and each list is held equal to what the code does.
"""

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from fitlora import artifacts, params
from scripts import stage_deps

ROOT = stage_deps.ROOT
STAGES = (
    "profile_hardware",
    "estimate_memory",
    "find_batch_size",
    "quantize_model",
    "train_adapters",
    "merge_and_evaluate",
)

# Keys that a stage's code reads and dvc.yaml does not list for it: they cannot change what comes out.
_NUMBERS = "a number that the optimizer's step multiplies with: no size depends on it"
_OPTIMIZER = (
    "beta1",
    "beta2",
    "epsilon",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "weight_decay",
)
NOT_LISTED: dict[str, dict[str, str]] = {
    "estimate_memory": {f"train.{key}": _NUMBERS for key in _OPTIMIZER},
    "find_batch_size": {f"train.{key}": _NUMBERS for key in (*_OPTIMIZER, "seed")},
}
# Keys that are listed with their section though the code reads them elsewhere: none now.
ALSO_LISTED: dict[str, dict[str, str]] = {}

# The whole of what a 70B model is quantized again for.
QUANTIZE_CODE = {
    "stages/quantize_model.py",
    "lib/fitlora/checkpoint.py",
    "lib/fitlora/conversion.py",
    "lib/fitlora/model.py",
    "lib/fitlora/pipeline/quantize_model.py",
    "lib/fitlora/quantization/codes.py",
    "lib/fitlora/quantization/layout.py",
    "lib/fitlora/quantization/quantize.py",
    "lib/fitlora/quantization/reading.py",
    "lib/fitlora/quantization/reciprocal.py",
    "lib/fitlora/quantization/weight.py",
    "lib/fitlora/quantization/writer.py",
}


@cache
def pipeline() -> dict[str, Any]:
    content: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")
    return content


def listed_params(stage: str) -> dict[str, set[str]]:
    """By file: what dvc.yaml lists under `params` of a stage."""
    found: dict[str, set[str]] = {}
    for item in pipeline()["stages"][stage]["params"]:
        if isinstance(item, str):
            found.setdefault("params.yaml", set()).add(item)
        else:
            for file, names in item.items():
                found.setdefault(file, set()).update(names)
    return found


def listed_keys(stage: str) -> set[str]:
    """The keys of params.yaml that a stage depends on; a section stands for all of its keys."""
    entries = listed_params(stage).get("params.yaml", set())
    every = set(params.keys())
    for entry in entries:
        assert any(key == entry or key.startswith(f"{entry}.") for key in every), entry
    return {
        key
        for key in every
        if any(key == entry or key.startswith(f"{entry}.") for entry in entries)
    }


# --- what the code reads -------------------------------------------------------------------------

Owner = type[BaseModel]
OWNERS: dict[str, Owner] = {
    owner.__name__: owner
    for owner in (
        params.Params,
        *(field.annotation for field in params.Params.model_fields.values()),
        *artifacts.Artifact.__subclasses__(),
    )
    if isinstance(owner, type) and issubclass(owner, BaseModel)
}
SOURCES = {"read_params": params.Params, "check_params": params.Params}
WHOLE = {"model_dump", "model_dump_json", "model_copy"}


class Reader:
    """Finds which fields of the params and of the artifacts a stage's code reads.

    A small type inference: a variable or an attribute has a type by its annotation, or by what is
    assigned to it; reading a field of such a type counts. Names are told apart by file, attributes
    by the whole of the stage's code.
    """

    def __init__(self, files: tuple[str, ...]) -> None:
        self.trees = {file: ast.parse((ROOT / file).read_text(encoding="utf-8")) for file in files}
        self.names: dict[tuple[str, str], set[Owner]] = {}
        self.attributes: dict[str, set[Owner]] = {}
        self.file = ""
        size = -1
        while size != (size := self._size()):
            for file, tree in self.trees.items():
                self.file = file
                for node in ast.walk(tree):
                    self._bind(node)

    def reads(self) -> dict[str, set[str]]:
        """By the name of the model: its fields that are read."""
        found: dict[str, set[str]] = {}
        for file, tree in self.trees.items():
            self.file = file
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute):
                    for owner in self._types(node.value):
                        found.setdefault(owner.__name__, set()).update(_fields(owner, node.attr))
        return found

    def _size(self) -> int:
        return sum(map(len, [*self.names.values(), *self.attributes.values()]))

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.arg) and node.annotation is not None:
            self._learn(ast.Name(node.arg), _annotated(node.annotation))
        elif isinstance(node, ast.AnnAssign):
            self._learn(node.target, _annotated(node.annotation))
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    self._learn(
                        ast.Attribute(inner.target, inner.target.id), _annotated(inner.annotation)
                    )
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            self._learn(ast.Name(f"{node.name}()"), _annotated(node.returns))
            self._learn(ast.Attribute(ast.Name(""), f"{node.name}()"), _annotated(node.returns))
        elif isinstance(node, ast.NamedExpr):
            self._learn(node.target, self._types(node.value))
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for one, value in zip(target.elts, node.value.elts, strict=False):
                        self._learn(one, self._types(value))
                else:
                    self._learn(target, self._types(node.value))

    def _learn(self, target: ast.expr, owners: set[Owner]) -> None:
        if not owners:
            return
        if isinstance(target, ast.Name):
            self.names.setdefault((self.file, target.id), set()).update(owners)
        elif isinstance(target, ast.Attribute):
            self.attributes.setdefault(target.attr, set()).update(owners)

    def _types(self, node: ast.expr) -> set[Owner]:
        if isinstance(node, ast.Name):
            return self.names.get((self.file, node.id), set())
        if isinstance(node, ast.Attribute):
            inner = self._types(node.value)
            if inner:
                return {
                    found
                    for owner in inner
                    if node.attr in owner.model_fields
                    for found in _owners(owner.model_fields[node.attr].annotation)
                }
            return self.attributes.get(node.attr, set())
        if isinstance(node, ast.Call):
            return self._result(node.func)
        if isinstance(node, ast.IfExp):
            return self._types(node.body) | self._types(node.orelse)
        if isinstance(node, ast.BoolOp):
            return {found for value in node.values for found in self._types(value)}
        return set()

    def _result(self, function: ast.expr) -> set[Owner]:
        """What a call returns: a model made or read, or what a function of ours is annotated with."""
        if isinstance(function, ast.Attribute):
            if function.attr in ("read", "model_validate", "model_validate_json"):
                return _annotated(function.value)
            if function.attr == "model_copy":
                return self._types(function.value)
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        if name in SOURCES:
            return {SOURCES[name]}
        if name in OWNERS:
            return {OWNERS[name]}
        return self.attributes.get(f"{name}()", set())


def _annotated(node: ast.expr) -> set[Owner]:
    """The models that an annotation names, also in a union, a container or a string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _annotated(ast.parse(node.value, mode="eval").body)
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    names |= {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
    return {OWNERS[name] for name in names if name in OWNERS}


def _owners(annotation: Any) -> Iterator[Owner]:
    if isinstance(annotation, type) and annotation.__name__ in OWNERS:
        yield OWNERS[annotation.__name__]
    for inner in get_args(annotation):
        yield from _owners(inner)


def _fields(owner: Owner, attribute: str) -> set[str]:
    """The fields that reading an attribute reads: itself, all, or those behind a property."""
    if attribute in owner.model_fields:
        return {attribute}
    if attribute in WHOLE:
        return set(owner.model_fields)
    member = vars(owner).get(attribute)
    code = member.fget if isinstance(member, property) else member
    if not isinstance(code, types.FunctionType):
        return set()
    tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    return {
        field
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        for field in _fields(owner, node.attr)
    }


@cache
def reads_of(stage: str) -> dict[str, set[str]]:
    return Reader(stage_deps.code_of(stage)).reads()


def read_keys(stage: str) -> set[str]:
    """The keys of params.yaml that a stage's code reads."""
    reads = reads_of(stage)
    found = set()
    for section, field in params.Params.model_fields.items():
        assert isinstance(field.annotation, type)
        found |= {f"{section}.{name}" for name in reads.get(field.annotation.__name__, ())}
    return found


# --- the code -------------------------------------------------------------------------------------


def test_stages_are_the_files_in_stages() -> None:
    assert set(stage_deps.stages()) == set(STAGES)
    assert tuple(pipeline()["stages"]) == STAGES
    for stage in STAGES:
        assert pipeline()["stages"][stage]["cmd"] == f"python -m stages.{stage}"


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_code_that_the_stage_imports(stage: str) -> None:
    deps = pipeline()["stages"][stage]["deps"]
    code = [dep for dep in deps if dep.endswith(".py")]
    assert code == list(stage_deps.code_of(stage)), "run `make deps`"
    assert len(code) == len(set(code)) > 0


def test_nothing_but_its_code_quantizes_a_model_again() -> None:
    assert set(stage_deps.code_of("quantize_model")) == QUANTIZE_CODE


def test_excused_modules_exist_and_are_imported() -> None:
    files = [path for folder in ("lib", "stages") for path in (ROOT / folder).rglob("*.py")]
    sources = [path.read_text(encoding="utf-8") for path in files]
    for module, reason in stage_deps.EXCUSED.items():
        assert (ROOT / "lib" / f"{module.replace('.', '/')}.py").is_file(), module
        assert any(f"from {module} import" in source for source in sources), module
        assert reason


def test_packages_import_nothing_of_the_project() -> None:
    """So that a package's __init__ needs no place in dvc.yaml: it can change nothing."""
    packages = [*(ROOT / "lib").rglob("__init__.py"), ROOT / "stages" / "__init__.py"]
    assert len(packages) > 5
    for path in packages:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("fitlora") for alias in node.names), path
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                assert not (node.module or "").startswith("fitlora"), path


# --- the params -----------------------------------------------------------------------------------


def test_params_file_has_every_key_at_its_default() -> None:
    content = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    written = {f"{section}.{key}" for section, keys in content.items() for key in keys}
    assert written == set(params.keys())
    assert params.check_params(content) == params.Params()


def test_every_key_is_read_by_a_stage_that_lists_it() -> None:
    used = {key for stage in STAGES for key in listed_keys(stage) & read_keys(stage)}
    every = set(params.keys())
    assert len(every) > 40
    assert used == every


@pytest.mark.parametrize("stage", STAGES)
def test_stage_lists_the_keys_that_its_code_reads(stage: str) -> None:
    read, listed = read_keys(stage), listed_keys(stage)
    assert listed
    excused, extra = set(NOT_LISTED.get(stage, ())), set(ALSO_LISTED.get(stage, ()))
    assert read - listed - excused == set(), "read, and not in dvc.yaml: results could be stale"
    assert listed - read - extra == set(), "in dvc.yaml, not read: it would run again for nothing"
    assert excused <= read - listed, "excused for nothing"
    assert extra <= listed - read, "excused for nothing"


# --- the facts ------------------------------------------------------------------------------------


LINKS = {
    "rates.device_copy_bytes_per_second",
    "rates.device_to_host_bytes_per_second",
    "rates.host_to_device_bytes_per_second",
}


@pytest.mark.parametrize("stage", STAGES[1:])
def test_stage_lists_the_facts_of_the_machine_that_its_code_reads(stage: str) -> None:
    names = listed_params(stage).get("artifacts/hardware.json", set())
    # of the rates, the links of a GPU: product rates follow from `gpus`, and the disk's changes no plan
    assert {name for name in names if name.startswith("rates.")} in (set(), LINKS)
    listed = {name.partition(".")[0] for name in names}
    read = reads_of(stage).get("Hardware", set())
    assert read - listed == set(), "read, and not in dvc.yaml: results could be stale"
    assert listed - read == set(), "in dvc.yaml, and not read: it would run again for nothing"


def test_some_stages_read_facts_of_the_machine() -> None:
    assert sum(bool(reads_of(stage).get("Hardware")) for stage in STAGES[1:]) >= 2


@pytest.mark.parametrize("stage", STAGES[1:])
def test_stage_that_opens_the_source_model_lists_its_content(stage: str) -> None:
    """The model's folder may be a hub id, so no stage lists it: its content is a fact."""
    calls = [
        node
        for file in stage_deps.code_of(stage)
        if file != "lib/fitlora/model.py"  # which defines it
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "resolve_model"
    ]
    expected = {"definition"} if calls else set()
    for call in calls:
        (weights,) = (word.value for word in call.keywords if word.arg == "weights")
        if not (isinstance(weights, ast.Constant) and weights.value is False):
            expected.add("weights")
    if "lib/fitlora/training/start.py" in stage_deps.code_of(stage):
        expected.add("adapter")  # the one to go on from, which may be none
    assert listed_params(stage).get("artifacts/model.json", set()) == expected


def test_stage_that_reads_rows_lists_their_content() -> None:
    """The data may be a hub's split, so no stage lists its path: its content is a fact."""
    for stage in STAGES[1:]:
        reads = {
            node.func.id
            for file in stage_deps.code_of(stage)
            if file != "lib/fitlora/training/data.py"  # which defines them
            for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        expected = set()
        if "load_splits" in reads:
            expected = {"train", "validation"}
        elif "load_validation" in reads:
            expected = {"validation"}
        assert listed_params(stage).get("artifacts/data.json", set()) == expected, stage
        assert not any("${" in dep for dep in pipeline()["stages"][stage]["deps"])


def test_quantizing_depends_on_no_hardware() -> None:
    stage = pipeline()["stages"]["quantize_model"]
    assert "artifacts/hardware.json" not in listed_params("quantize_model")
    assert not any("hardware" in dep for dep in stage["deps"])


# --- the artifacts --------------------------------------------------------------------------------


def outs_of(stage: str) -> set[str]:
    outs = pipeline()["stages"][stage]["outs"]
    return {out if isinstance(out, str) else next(iter(out)) for out in outs}


def test_each_artifact_comes_from_the_stage_that_its_model_names() -> None:
    kinds = artifacts.Artifact.__subclasses__()
    assert len(kinds) >= 5
    for kind in kinds:
        assert f"artifacts/{kind.KIND}.json" in outs_of(kind.STAGE), kind.__name__


def test_every_out_is_one_that_the_library_names() -> None:
    places = {
        value.as_posix()
        for name, value in vars(artifacts).items()
        if isinstance(value, Path) and value.parts[0] in ("artifacts", "reports")
    }
    outs = {out for stage in STAGES for out in outs_of(stage)}
    assert len(outs) > 8
    assert outs == places


def test_expensive_outs_are_cached() -> None:
    """`cache: false` and `persist` turn the run cache off: a restored run would run again."""
    for stage in STAGES[1:]:
        definition = pipeline()["stages"][stage]
        assert all(isinstance(out, str) for out in definition["outs"]), stage
        assert "always_changed" not in definition, stage


def test_metrics_plots_and_artifacts_are_outs() -> None:
    outs = {out for stage in STAGES for out in outs_of(stage)}
    plotted = {file for plot in pipeline()["plots"] for file in next(iter(plot.values()))["y"]}
    models = {entry["path"] for entry in pipeline()["artifacts"].values()}
    assert {*pipeline()["metrics"], *plotted, *models} <= outs
    for plot in pipeline()["plots"]:
        definition = next(iter(plot.values()))
        assert {"template", "x", "y", "x_label", "y_label"} <= set(definition)
