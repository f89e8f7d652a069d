"""The adapter into the weights: W' = W + scale * B A, shard by shard.

What was trained as a whole (biases, saved modules) takes the place of the base's. The result is an
ordinary model: in bfloat16, or in 4 bits again, which rounds each changed weight once more. By default
it is made from the 4-bit weights as the training step dequantizes them, since those are what the adapter
learned to correct; the original weights are slightly better ones, but not the ones that it was fitted
to. How far a merge is from what was trained is measured (`gate`), not assumed.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fitlora.step.ops  # noqa: F401  (registers the operators)
from fitlora.artifacts import read_json
from fitlora.checkpoint import DTYPES, Checkpoint, TensorInfo
from fitlora.console import say
from fitlora.errors import ArtifactError, UserError
from fitlora.progress import progress
from fitlora.quantization.layout import (
    find_state,
    nested_code,
    part_names,
    read_state,
    spec_of,
)
from fitlora.quantization.weight import CHUNK_ELEMENTS, quantize_weight, require_finite
from fitlora.quantization.writer import (
    ModelWriter,
    Pending,
    bfloat16_config,
    read_config,
)
from fitlora.step.linear import Linear4bit
from fitlora.step.weights import CheckpointWeights
from fitlora.units import format_bytes

PREFIX = "base_model.model."
_MAGNITUDE = "magnitude_vector"
# Settings of an adapter that say nothing of what its product is; every other one must be off.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "revision", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# Ways to start an adapter that leave the base model's weights alone.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class Update:
    """One layer's adapter. a: (r, in), b: (out, r), magnitude: (out,) where it is DoRA's; as stored."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class _Stored:
    """A checkpoint, what its tensors are, and the quantization state of each 4-bit weight."""

    checkpoint: Checkpoint
    infos: dict[str, TensorInfo]
    states: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, folder: Path) -> "_Stored":
        checkpoint = Checkpoint(folder)
        infos = {name: checkpoint.info(name) for name in sorted(checkpoint.shards)}
        keys = {name: find_state(checkpoint.shards, name) for name in infos}
        states = {n: read_state(checkpoint, key) for n, key in keys.items() if key}
        return cls(checkpoint, infos, states)

    def parts(self, names: Iterable[str]) -> set[str]:
        """All tensors that the 4-bit weights of these names are stored as."""
        return {part for name in names for part in part_names(name, spec_of(self.states[name]))}


def merge_checkpoint(
    *,
    original: Path,
    quantized: Path,
    adapter: Path,
    target: Path,
    base: Literal["dequantized", "original"],
    bits: Literal[16, 4] = 16,
    device: torch.device,
    compute_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes the merged model to `target`, in the shards of the base, ready to load.

    original: the 16-bit model's folder. quantized: what the quantize stage made of it. adapter: a
    peft LoRA folder. base: which of the two the adapter goes into. bits: 16 stores bfloat16; 4
    quantizes the changed weights as `quantized` is and takes its other tensors as they are.
    compute_dtype: what 4-bit weights are dequantized to before the sum, which is taken in float32: the
    dtype that training computed in.

    `target` is replaced at the end, when all is written. Host memory: the adapter and one layer, and
    with 4 bits one shard. Raises UserError for an adapter of another kind, one whose tensors do not fit
    the model, and weights that are not finite; ArtifactError for damaged or missing files.
    """
    source = original if base == "original" else quantized
    layout = quantized if bits == 4 else source  # whose files the new ones mirror
    content = read_config(layout)
    given = _Stored.open(source)
    if base == "original" and (given.states or "quantization_config" in read_config(source)):
        raise UserError(
            f"{source} is quantized itself; set merge.base: dequantized, or give the 16-bit model"
        )
    mirrored = given if layout == source else _Stored.open(layout)
    if bits == 4 and not mirrored.states:
        raise UserError(f"{layout} has no 4-bit weights; set merge.bits: 16")
    updates = read_adapter(adapter)
    _check_updates(adapter, source, content, updates, given)
    merge = _Merge(given, updates, device, compute_dtype)
    total = sum(info.bytes for info in mirrored.infos.values())
    with (
        ModelWriter(layout, target) as writer,
        progress("merging", total, in_bytes=True) as advance,
    ):
        for file, names in mirrored.checkpoint.files().items():
            make = _shard_in_4_bits if bits == 4 else _shard_in_16_bits
            tensors = make(names, merge, mirrored, advance)
            if tensors:
                writer.write_shard(file, tensors)
        size = writer.finish(content if bits == 4 else bfloat16_config(content))
    say(f"{len(updates)} updates merged into the {base} weights: {format_bytes(size)}")


Shard = dict[str, Tensor | Pending]
Advance = Callable[[int], None]


def _shard_in_16_bits(
    names: Sequence[str], merge: "_Merge", mirrored: _Stored, advance: Advance
) -> Shard:
    tensors: Shard = {}
    parts = mirrored.parts(mirrored.states)
    for name in names:
        if name in mirrored.states or name not in parts:
            info = _merged_info(mirrored.infos[name], mirrored.states.get(name))
            make = functools.partial(merge.tensor, name, info, advance, mirrored.infos[name].bytes)
            tensors[name] = Pending(info, make)
    return tensors


def _shard_in_4_bits(
    names: Sequence[str], merge: "_Merge", mirrored: _Stored, advance: Advance
) -> Shard:
    """Changed weights are quantized anew; the rest is as it is stored."""
    tensors: Shard = {}
    changed = mirrored.states.keys() & merge.updates.keys()
    parts = mirrored.parts(changed)
    for name in names:
        info = mirrored.infos[name]
        if name in changed:
            state = mirrored.states[name]
            whole = TensorInfo(torch.bfloat16, tuple(state["shape"]))
            weight = merge.tensor(name, whole, advance, info.bytes)
            tensors.update(quantize_weight(name, weight, spec_of(state), merge.device))
        elif name in merge.updates:
            tensors[name] = Pending(
                info, functools.partial(merge.tensor, name, info, advance, info.bytes)
            )
        elif name not in parts:
            tensors[name] = Pending(info, functools.partial(mirrored.checkpoint.tensor, name))
            advance(info.bytes)
    return tensors


def read_adapter(folder: Path) -> dict[str, Update | Tensor]:
    """A peft LoRA folder, by the name of the weight that each update, or tensor instead, belongs to.

    Raises UserError for an adapter that is more than A, B and magnitudes of linear layers, biases and
    saved modules (ranks by layer, …), by the name of its setting or tensor.
    """
    config = _adapter_config(folder)
    alpha, rank = config["lora_alpha"], config["r"]
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ArtifactError(f"{file} is missing; FitLoRA reads safetensors only")
    tensors = _read_file(file)
    dims = {"A.weight": 2, "B.weight": 2}
    if config.get("use_dora"):
        dims[_MAGNITUDE] = 1
    saved = tuple(config.get("modules_to_save") or ())
    layers: dict[str, dict[str, Tensor]] = {}
    updates: dict[str, Update | Tensor] = {}
    for name, tensor in tensors.items():
        require_finite(name, tensor)
        within = name.removeprefix(PREFIX)
        whole, _, part = within.rpartition(".")
        if whole.endswith(saved) or (part == "bias" and config.get("bias", "none") != "none"):
            updates[f"{whole.removesuffix('.base_layer')}.{part}"] = tensor
            continue
        module, _, leaf = within.rpartition(".lora_")
        if within == name or tensor.dim() != dims.get(leaf):
            raise UserError(
                f"{file}: {name} is no part of a linear layer's LoRA; it cannot be merged"
            )
        layers.setdefault(module, {})[leaf.removesuffix(".weight")] = tensor
    for module, pair in layers.items():
        for side, other in (("A", "B"), ("B", "A")):
            if side not in pair:
                raise UserError(f"{file} has lora_{other} of {module} and no lora_{side}")
        if pair["A"].shape[0] != rank or pair["B"].shape[1] != rank:
            raise UserError(
                f"{file}: {module} is not of rank {rank}, which adapter_config.json says"
            )
        magnitude = pair.get(_MAGNITUDE)
        if len(pair) != len(dims) or (
            magnitude is not None and len(magnitude) != pair["B"].shape[0]
        ):
            raise UserError(f"{file}: {module} has no magnitude for each of its outputs")
        updates[f"{module}.weight"] = Update(pair["A"], pair["B"], scale, magnitude)
    if not updates:
        raise UserError(f"{file} is empty")
    return updates


def _adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; {folder} is not an adapter's folder") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path} is no LoRA adapter's; FitLoRA merges LoRA only")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), int | float) or config[key] <= 0:
            raise ArtifactError(f"{path} is damaged: {key} is {config.get(key)!r}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise ArtifactError(f"{path} is damaged: modules_to_save is {saved!r}")
    for key, value in config.items():
        if key not in _HARMLESS and value:
            raise UserError(
                f"{path}: {key} is {value!r}, a kind of LoRA that cannot be merged here"
            )
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        raise UserError(
            f"{path}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base "
            "model's weights as well; such an adapter cannot be merged here"
        )
    return config


def _read_file(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            kinds = {name: content.get_slice(name).get_dtype() for name in content.keys()}  # noqa: SIM118
            unknown = {name: kind for name, kind in kinds.items() if kind not in DTYPES}
            if unknown:
                raise UserError(f"{file}: unknown dtypes {unknown}")
            return {name: content.get_tensor(name) for name in sorted(kinds)}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from None


def _check_updates(
    adapter: Path,
    source: Path,
    content: dict[str, Any],
    updates: Mapping[str, Update | Tensor],
    given: _Stored,
) -> None:
    """Every update must find its weight."""
    for name, update in updates.items():
        if name not in given.infos:
            raise UserError(f"{adapter} has an update of {name}, which {source} does not have")
        table = name == "lm_head.weight" or (isinstance(update, Tensor) and update.dim() > 1)
        if table and content.get("tie_word_embeddings"):
            raise UserError(
                f"{adapter} has an update of {name}, and this model's embedding is its head as well; "
                "merging would change both"
            )
        state = given.states.get(name)
        shape = given.infos[name].shape if state is None else tuple(state["shape"])
        if shape != tuple(update.shape):
            raise UserError(
                f"{adapter}: the update of {name} is {tuple(update.shape)}, the weight {shape}"
            )


def _merged_info(info: TensorInfo, state: dict[str, Any] | None) -> TensorInfo:
    if state is not None:
        return TensorInfo(torch.bfloat16, tuple(state["shape"]))
    floating = info.dtype.is_floating_point
    return TensorInfo(torch.bfloat16 if floating else info.dtype, info.shape)


class _Merge:
    """Makes the merged model's tensors, one at a time."""

    def __init__(
        self,
        given: _Stored,
        updates: Mapping[str, Update | Tensor],
        device: torch.device,
        compute_dtype: torch.dtype,
    ) -> None:
        self.updates, self.device = updates, device
        self._given, self._compute_dtype = given, compute_dtype
        self._weights = CheckpointWeights(given.checkpoint.folder, device)
        self._code = nested_code().to(device)

    def tensor(self, name: str, info: TensorInfo, advance: Advance, read_bytes: int) -> Tensor:
        """The tensor as the merged model has it in 16 bits, on the CPU."""
        given, update = self._given, self.updates.get(name)
        if isinstance(update, Tensor):
            merged = update.to(info.dtype)
        else:
            stored = name not in given.states
            weight = given.checkpoint.tensor(name) if stored else self._dequantized(name)
            merged = weight.to("cpu", info.dtype) if update is None else self._sum(weight, update)
        if info.dtype.is_floating_point:
            require_finite(name, merged)
        advance(read_bytes)
        return merged

    def _sum(self, weight: Tensor, update: Update) -> Tensor:
        """bfloat16 (out, in), some rows at a time."""
        a = update.a.to(self.device, torch.float32)
        b = update.b.to(self.device, torch.float32)
        merged = torch.empty(weight.shape, dtype=torch.bfloat16)
        rows = max(1, CHUNK_ELEMENTS // weight.shape[1])
        for start in range(0, weight.shape[0], rows):
            part = slice(start, start + rows)
            base = weight[part].to(self.device, torch.float32)
            turned = torch.addmm(base, b[part], a, alpha=update.scale)
            if update.magnitude is not None:
                norms = torch.linalg.vector_norm(turned, dim=1)
                turned.mul_((update.magnitude[part].to(self.device) / norms)[:, None])
            merged[part] = turned
        return merged

    def _dequantized(self, name: str) -> Tensor:
        """The weight as training computes with it, on the device."""
        module = name.removesuffix(".weight")
        state = self._given.states[name]
        out_features, in_features = state["shape"]
        layer = Linear4bit(
            in_features,
            out_features,
            bias=False,
            spec=spec_of(state),
            nested_code=self._code,
            dtype=self._compute_dtype,
        )
        for leaf, like in list(layer.named_parameters()):
            value = self._weights.frozen(f"{module}.{leaf}", like)
            setattr(layer, leaf, nn.Parameter(value, requires_grad=False))
        return layer.compute_weight(self._compute_dtype)
