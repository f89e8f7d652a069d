"""params.yaml: the defaults, and what a wrong file is answered with."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from fitlora.errors import UserError
from fitlora.params import Params, _models_of, check_params, keys, read_params
from fitlora.units import GIB, MIB, format_bytes, parse_bytes

ROOT = Path(__file__).parent.parent


def read(folder: Path, text: str | bytes) -> Params:
    file = folder / "params.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_params(file)


def problems(content: object) -> list[str]:
    """The lines of the error, each without its indent; the first is the count."""
    with pytest.raises(UserError) as caught:
        check_params(content, "params.yaml")
    first, *lines = str(caught.value).splitlines()
    assert first == f"params.yaml has {len(lines)} problem(s):"
    return [line.strip() for line in lines]


def test_a_file_that_is_too_large_to_be_params(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"100,000 characters.*another file"):
        read_params(path)


def test_the_shipped_file_says_the_defaults() -> None:
    assert read_params(ROOT / "params.yaml") == Params()


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "# nothing\n") == Params()


def test_every_key_is_described() -> None:
    def undescribed(model: type[BaseModel], prefix: str) -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            inner = list(_models_of(field.annotation))
            if not inner and not field.description:
                found.append(prefix + name)
            for section in inner:
                found += undescribed(section, f"{prefix}{name}.")
        return found

    assert undescribed(Params, "") == []


def test_keys_are_those_of_the_shipped_file() -> None:
    from ruamel.yaml import YAML

    content = YAML(typ="safe", pure=True).load((ROOT / "params.yaml").read_text())
    written = [f"{section}.{key}" for section, values in content.items() for key in values]
    assert sorted(keys()) == sorted(written)
    assert len(written) > 30


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-4", 2e-4), ("2.0e-4", 2e-4), ("1", 1.0), ("1e3", 1000.0), (".5", 0.5)],
)
def test_numbers_are_those_of_yaml_1_2(tmp_path: Path, text: str, value: float) -> None:
    found = read(tmp_path, f"train:\n  learning_rate: {text}\n").train.learning_rate
    assert found == value
    assert type(found) is float


def test_words_of_yaml_1_1_are_no_booleans(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quantization\.double: found 'yes'"):
        read(tmp_path, "quantization:\n  double: yes\n")


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(
            tmp_path,
            "model:\n  idd: x\n"
            "quantization:\n  bits: 8\n"
            "plan:\n  recompute: some\n"
            "train:\n  learning_rate: fast\n  max_steps: 0\n"
            "nonsense: 1\n",
        )
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'params.yaml'} has 6 problem(s):")
    for part in (
        "model.idd: no such key; did you mean model.id?",
        "quantization.bits: found 8; LLM.int8 rounds activations too",
        "plan.recompute: found 'some'; should be 'auto', 'none' or 'all', or a whole number",
        "train.learning_rate: found 'fast'; should be a number (at its highest)",
        "train.max_steps: found 0; should be greater than or equal to 1",
        "nonsense: no such key",
    ):
        assert part in text
    assert len(text.splitlines()) == 7


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ({"train": {"learning_rat": 1.0}}, "; did you mean train.learning_rate?"),
        ({"trian": {}}, "; did you mean train?"),
        ({"hardware": {"target": {"memroy": "8GiB"}}}, "; did you mean hardware.target.memory?"),
        ({"learning_rate": 1.0}, "; did you mean train.learning_rate?"),  # in the wrong place
        ({"train": {"foo": 1}}, ""),  # nothing is like it, though every key begins with train
    ],
)
def test_the_nearest_key_is_named(content: Any, hint: str) -> None:
    unknown = [line for line in problems(content) if "no such key" in line]
    assert len(unknown) == 1
    assert unknown[0].endswith(f": no such key{hint}")


@pytest.mark.parametrize(
    ("section", "key", "value", "found"),
    [
        ("plan", "micro_batch_size", 0, "found 0; should be 'auto', or greater than or equal to 1"),
        ("plan", "micro_batch_size", "all", "found 'all'; should be 'auto', or a whole number"),
        ("plan", "recompute", -1, "found -1; should be 'auto', 'none' or 'all', or greater than"),
        ("lora", "target_modules", "q_proj", "found 'q_proj'; should be 'all-linear', or a list"),
        (
            "lora",
            "target_modules",
            ["q_proj", 3],
            "found ['q_proj', 3]; should be 'all-linear', or",
        ),
        ("lora", "target_modules", [], "found []; should be 'all-linear'; should not be empty"),
    ],
)
def test_a_key_of_several_forms_has_one_line(
    section: str, key: str, value: Any, found: str
) -> None:
    lines = problems({section: {key: value}})
    assert len(lines) == 1
    assert lines[0].startswith(f"{section}.{key}: {found}")
    assert lines[0].endswith(")")  # the description


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("plan", "micro_batch_size"),
        ("plan", "recompute"),
        ("lora", "r"),
        ("train", "max_steps"),
        ("train", "seed"),
        ("quantization", "bits"),
    ],
)
def test_a_boolean_is_no_number(section: str, key: str) -> None:
    assert len(problems({section: {key: True}})) == 1


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_are_finite(value: float) -> None:
    assert problems({"train": {"learning_rate": value}})[0].startswith("train.learning_rate: found")


@pytest.mark.parametrize("value", [None, 5, [1]])
def test_a_section_is_a_section(value: Any) -> None:
    assert problems({"data": value}) == [
        f"data: found {value!r}; should be a section with keys of its own"
    ]
    assert problems([value]) == ["should be a section with keys of its own"]


def test_a_target_may_be_a_name_alone() -> None:
    named, described = (
        check_params({"hardware": {"target": target}})
        for target in ("RTX 4090", {"name": "RTX 4090"})
    )
    assert named == described
    assert problems({"hardware": {"target": 4090}}) == [
        "hardware.target: found 4090; should be a section with keys of its own"
        " (plan for this GPU instead of the one that is here; of a known one the name alone is enough)"
    ]


def test_a_missing_key_is_told_without_its_section() -> None:
    lines = problems({"hardware": {"target": {"memory": "8GiB"}}})
    assert len(lines) == 1
    assert lines[0].startswith("hardware.target.name: is missing (")


@pytest.mark.parametrize(
    ("epochs", "max_steps", "right"),
    [(None, 1, True), (0.5, None, True), (1, 1, False), (None, None, False)],
)
def test_exactly_one_length(epochs: float | None, max_steps: int | None, right: bool) -> None:
    content = {"train": {"epochs": epochs, "max_steps": max_steps}}
    if right:
        assert check_params(content).train.epochs == epochs
    else:
        assert "exactly one of epochs and max_steps" in problems(content)[0]


@pytest.mark.parametrize("size", ["8GiB", "7800 MiB", "8.5GB", "8gib", "1000000000"])
def test_sizes_that_are_read(size: str) -> None:
    assert check_params({"hardware": {"memory_budget": size}}).hardware.memory_budget == size


@pytest.mark.parametrize("size", ["8 XB", "", "-1GiB", "0GiB", "GiB", "8 GiB or so", "8", 8, True])
def test_sizes_that_are_not(size: Any) -> None:
    assert problems({"hardware": {"memory_budget": size}})[0].startswith(
        f"hardware.memory_budget: found {size!r}; "
    )


def test_bytes() -> None:
    assert parse_bytes("8GiB") == 8 * GIB
    assert parse_bytes("8.5GB") == 8_500_000_000
    assert parse_bytes("0.5 MiB") == MIB // 2
    assert parse_bytes(17) == 17
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 * MIB // 2, 9 * GIB)] == [
        "0 B", "1023 B", "1.00 KiB", "1.50 MiB", "9.00 GiB",
    ]  # fmt: skip
    with pytest.raises(UserError):
        parse_bytes(True)


def test_sections_that_contradict_each_other() -> None:
    assert problems({"plan": {"micro_batch_size": 9}, "train": {"effective_batch_size": 8}}) == [
        "plan.micro_batch_size 9 is larger than train.effective_batch_size 8"
    ]
    assert (
        "paged_adamw needs a CUDA device"
        in problems({"hardware": {"device": "cpu"}, "train": {"optimizer": "paged_adamw"}})[0]
    )


def test_revision_is_a_whole_commit() -> None:
    check_params({"model": {"id": "a/b", "revision": "0123456789" * 4}})
    for revision in ("main", "0123456", 1234567890):
        assert problems({"model": {"revision": revision}})[0].startswith("model.revision: found")


@pytest.mark.parametrize("text", [b"train: [", b"a: 1\na: 2\n", b"\xff\xfe", b"- 1\n\t- 2"])
def test_what_is_not_yaml(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(UserError, match=r"params\.yaml is not YAML"):
        read(tmp_path, text)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing; run from the folder"):
        read_params(tmp_path / "params.yaml")


def test_nothing_that_plans_imports_torch() -> None:
    """Planning is arithmetic; the modules that do it start in milliseconds."""
    modules = ("params", "artifacts", "plan", "units", "errors", "planner.search")
    lines = [f"import fitlora.{name}" for name in modules]
    lines.append(
        "import sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={"PYTHONPATH": str(ROOT / "lib")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
