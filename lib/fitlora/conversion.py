"""A model's tensors that its checkpoint has under other names, or in parts.

transformers stores models in the form that they were published in, and computes with some in another:
a mixture's experts are stored one by one, and the model has them all in one tensor; Mixtral's router is
stored under `block_sparse_moe`, and the model says `mlp`. Its own rules, by which `from_pretrained`
loads them, tell here which stored tensors make which of the model's.
"""

import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fitlora.artifacts import read_json

# Operations of transformers' that take tensors alone; others want the model, or undo a quantization.
_PLAIN = {"MergeModulelist", "Concatenate", "Transpose"}


@dataclass(frozen=True)
class Conversion:
    """How one tensor of the model, `target`, is made.

    rule: transformers' own; None where the tensor is stored as it is, under another name.
    sources: stored names, by the pattern of the rule that they match.
    """

    target: str
    rule: Any
    sources: dict[str, list[str]] = field(default_factory=dict)

    def make(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor. read: gives a stored one. For a moment there are three copies of it."""
        if self.rule is None:
            ((name,),) = self.sources.values()
            return read(name)
        rule = copy.deepcopy(self.rule)
        for pattern, names in self.sources.items():
            for name in names:
                rule.add_tensor(self.target, name, pattern, functools.partial(read, name))
        made: Tensor = rule.convert(self.target)[self.target]
        return made


def conversions(folder: Path, stored: Iterable[str]) -> dict[str, Conversion]:
    """The model's tensors that are made of stored ones under other names, by the model's names.

    folder: has the model's config.json; without one, and for a model with code of its own, nothing is.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    try:
        config = read_json(folder / "config.json")
    except FileNotFoundError:
        return {}
    if not isinstance(config, dict) or "auto_map" in config:
        return {}
    # as transformers looks for them: by the class where that has rules, and else by the kind of model
    kinds = [*(config.get("architectures") or ()), config.get("model_type")]
    rules: list[Any] = next(filter(None, map(get_checkpoint_conversion_mapping, kinds)), [])
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    found: dict[str, Conversion] = {}
    for name in sorted(stored, key=dot_natural_key):  # experts in their order
        target, pattern = rename_source_key(name, renamings, converters)
        rule = by_pattern.get(pattern)
        if target != name and (rule is None or _is_plain(rule)):
            made = found.setdefault(target, Conversion(target, rule))
            made.sources.setdefault(pattern or name, []).append(name)
    return found


def _is_plain(rule: Any) -> bool:
    """Whether it makes one tensor, by operations that are known."""
    operations = {type(operation).__name__ for operation in rule.operations}
    return len(rule.target_patterns) == 1 and operations <= _PLAIN
