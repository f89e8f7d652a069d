"""Where a params.yaml comes from: every key with its meaning, and templates for common cards.

A template changes a few defaults and says why. Its model, rank, learning rate and batch are those that
the QLoRA paper (Dettmers et al., 2023) used for models of that size; its memory budget leaves what an
NVIDIA driver and a desktop take of a card's nominal memory. How the step is laid out is the planner's
to answer when it runs; what it answers for one card of that size is told.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fitlora.params import Params, check_params, with_changes

SAMPLES = Path(__file__).resolve().parents[2] / "assets"  # of a checkout

# The newest of 8B; there is no Llama-3.3-8B. Public commits, so that every run gets the same weights.
_LLAMA_8B = {
    "model.id": "meta-llama/Llama-3.1-8B",
    "model.revision": "d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
}
_LLAMA_70B = {
    "model.id": "meta-llama/Llama-3.3-70B-Instruct",
    "model.revision": "6f6073b423013f6a7d4d9f39144961bfbfbc386b",
}
_RUN = {
    "train.effective_batch_size": 16,
    "train.epochs": 1.0,
    "train.max_steps": None,
    "train.learning_rate": 2.0e-4,
}


@dataclass(frozen=True)
class Preset:
    """Changed keys, what to know first, and what to know of single keys.

    card: one that it is for. planned: the planner's answer there, with 16 GiB of host memory, which
    tests hold. None where it depends on how many cards there are.
    """

    title: str
    changes: Mapping[str, Any]
    head: Sequence[str] = ()
    notes: Mapping[str, str] = field(default_factory=dict)
    card: str | None = None
    planned: str | None = None


_GATED = "The model is gated: accept its licence on the hub and log in once with: hf auth login"
_NO_8B = (
    "A Llama 3.3 of 8B was never released; of that size the newest is 3.1",
    "and of 70B, 3.3 exists as Instruct only.",
)
_AUTO = (
    "Say auto for lora.r, lora.alpha and data.max_length to have them found from rows and budget."
)

PRESETS = {
    "8gb": Preset(
        "8 GB GPU, like an RTX 3070 or 4060",
        {**_LLAMA_8B, **_RUN, "hardware.memory_budget": "7.5GiB", "lora.r": 8, "lora.alpha": 16.0},
        head=(
            *_NO_8B,
            _GATED,
            "CPU offloading is the planner's: what the GPU has no room for is kept in host memory",
            "(plan.stream_layers, checkpoints, embedding, head, optimizer_device: auto).",
            _AUTO,
        ),
        notes={"hardware.memory_budget": "8 GiB less the driver's and a desktop's; null: all"},
        card="RTX 3070",
        planned="micro-batch 3 x 6 accumulation x 512 tokens, 0 layers recomputed, bfloat16, adamw on "
        "cuda, on the host: 26 layers, embedding",
    ),
    "16gb": Preset(
        "16 GB GPU, like an RTX 4060 Ti or 4080",
        {**_LLAMA_8B, **_RUN, "hardware.memory_budget": "15GiB", "data.max_length": 1024},
        head=(*_NO_8B, _GATED, "An RTX 4090 has 24 GB: for it take --preset 24gb.", _AUTO),
        notes={"hardware.memory_budget": "16 GiB less the driver's and a desktop's; null: all"},
        card="RTX 4060 Ti 16GB",
        planned="micro-batch 3 x 6 accumulation x 1024 tokens, 0 layers recomputed, bfloat16, adamw on "
        "cuda, on the host: embedding",
    ),
    "24gb": Preset(
        "24 GB GPU, like an RTX 3090 or 4090",
        {**_LLAMA_8B, **_RUN, "hardware.memory_budget": "23GiB", "data.max_length": 2048},
        head=(*_NO_8B, _GATED, _AUTO),
        notes={"hardware.memory_budget": "24 GiB less the driver's and a desktop's; null: all"},
        card="RTX 4090",
        planned="micro-batch 2 x 8 accumulation x 2048 tokens, 0 layers recomputed, bfloat16, adamw on "
        "cuda",
    ),
    "multi-gpu": Preset(
        "70B on several GPUs of one host",
        {
            **_LLAMA_70B,
            **_RUN,
            "train.learning_rate": 1.0e-4,
            "lora.r": 32,
            "lora.alpha": 64.0,
            "data.max_length": 1024,
        },
        head=(
            *_NO_8B,
            _GATED,
            "Every GPU that is here gets its part of a batch (train.devices). What they have no room",
            "for of 70B in 4 bits is streamed from one copy in about 40 GiB of host memory.",
            _AUTO,
        ),
    ),
}


def preset_params(name: str | None, changes: Sequence[str] = (), folder: Path = Path()) -> Params:
    """The defaults, as preset `name` and then `changes` (`key=value`) have them.

    folder: where the file will lie. The shipped samples are named from there, or by their full path.
    """
    content: dict[str, Any] = {}
    if not (folder / Params().model.id).is_dir() and SAMPLES.is_dir():
        content["model.id"] = str(SAMPLES / "sample_model")
        content["data.train"] = str(SAMPLES / "data" / "train.jsonl")
        content["data.validation"] = str(SAMPLES / "data" / "validation.jsonl")
    if name is not None:
        content |= PRESETS[name].changes
    sections: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        section, _, leaf = key.partition(".")
        sections.setdefault(section, {})[leaf] = value
    return check_params(with_changes(sections, changes), f"preset {name or 'default'} with --set")


def preset_text(name: str | None, params: Params) -> str:
    """params.yaml with a comment for each key. name: the preset that `params` were made from."""
    if name is None:
        return params_text(params)
    preset = PRESETS[name]
    head = [f"FitLoRA for: {preset.title}.", *preset.head]
    if preset.planned is not None:
        head += [f"As it is, the planner answers for an {preset.card}, by its maker's figures:"]
        head += [f"  {line}" for line in textwrap.wrap(preset.planned, 90)]
    return params_text(params, head=head, notes=preset.notes)


def params_text(
    params: Params, *, head: Sequence[str] = (), notes: Mapping[str, str] | None = None
) -> str:
    """Params as YAML with every key and its meaning. notes: other words for some keys."""
    return "\n".join(_lines(params, head, notes or {})) + "\n"


def _lines(params: Params, head: Sequence[str], notes: Mapping[str, str]) -> Iterator[str]:
    yield from (f"# {line}" for line in head)
    if head:
        yield "#"
    yield "# Write numbers like 2.0e-4, with a point: every reader of YAML takes those for numbers."
    for section, about in Params.model_fields.items():
        keys: BaseModel = getattr(params, section)
        yield ""
        yield f"# {(type(keys).__doc__ or '').strip().partition(chr(10))[0]}"
        yield f"{section}:"
        assert about.default_factory is not None
        for key, described in type(keys).model_fields.items():
            value = yaml_value(getattr(keys, key))
            note = notes.get(f"{section}.{key}", described.description or "")
            yield f"  {key}: {value}  # {note}"


_PLAIN = re.compile(r"[A-Za-z_/][A-Za-z0-9_./-]*")
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def yaml_value(value: Any) -> str:
    """A value as YAML 1.2 and 1.1 alike read it.

    >>> yaml_value(1e-8), yaml_value(None), yaml_value(("q_proj",)), yaml_value("8GiB")
    ('1.0e-08', 'null', '[q_proj]', '"8GiB"')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, BaseModel):
        inner = ", ".join(f"{key}: {yaml_value(one)}" for key, one in value)
        return f"{{{inner}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(yaml_value(one) for one in value)}]"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    escaped = "".join(_escaped(character) for character in text)
    return f'"{escaped}"'


def _number(value: float) -> str:
    """The shortest text that reads back the same, with a point in it: 1e-08 is text to YAML 1.1."""
    mantissa, exponent, power = repr(value).partition("e")
    if exponent and "." not in mantissa:
        mantissa += ".0"
    return mantissa + exponent + power


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\u{ord(character):04x}"
