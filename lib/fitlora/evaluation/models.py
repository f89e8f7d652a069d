"""The four models that are compared, each through the one step that also trains.

Base, quantized base, adapter and merged model differ in their folder, in how the weights are stored and
in whether there are adapters, and in nothing else: the same builder makes them all, so a difference in
the result is the model's and not the harness's.

The Plan is proven for the 4-bit weights. The 16-bit ones of base and merged model may be too large for
the device; then the CPU evaluates them, in bfloat16, the type that they are stored in: the weights are
then mapped from their files, and a machine that cannot hold them all reads them again and again
rather than fail.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fitlora.adapter import CONFIG, load_adapter
from fitlora.artifacts import model_titles, read_json
from fitlora.errors import ArtifactError
from fitlora.model import decoder_layers, load_config
from fitlora.params import LoraParams, QuantizationParams, TrainParams
from fitlora.plan import ComputeDtype, Plan
from fitlora.step.build import StepSkeleton, step_skeleton
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import CheckpointWeights
from fitlora.units import format_bytes

MAXIMUM_ROWS = 64  # of one batch; larger ones were not faster on 2 CPU cores
# Of the memory beside the weights, what a batch may take; the rest is for what the bound leaves out.
BATCH_SHARE = 0.5
ON_ORIGINAL = "adapter_on_original"


@dataclass(frozen=True)
class Contender:
    """One of the models. `name` is its key in the artifact, `title` what people read."""

    name: str
    title: str
    folder: Path
    quantization: QuantizationParams
    lora: LoraParams | None = None
    adapter: Path | None = None
    trust_remote_code: bool = False

    @property
    def fits_the_plan(self) -> bool:
        """Whether these are the weights that the Plan was proven with, or larger ones."""
        return self.name in ("quantized_base", "adapter")


@dataclass(frozen=True)
class Place:
    """Where a model is evaluated, and how many rows go through it at once."""

    device: torch.device
    compute_dtype: ComputeDtype
    rows: int

    def __str__(self) -> str:
        return f"{self.device.type}, {self.compute_dtype}"


@dataclass(frozen=True)
class Memory:
    """What may be used. device_bytes: of the device, without the CUDA context."""

    device: torch.device
    device_bytes: int
    host_bytes: int


def contenders(
    *,
    original: Path,
    quantized: Path,
    adapter: Path,
    merged: Path,
    quantization: QuantizationParams,
    lora: LoraParams,
    merged_bits: Literal[16, 4] = 16,
    trust_remote_code: bool = False,
) -> tuple[Contender, ...]:
    """The four models in the order in which they are shown, and then the adapter on the original.

    The last is what merge.base: original comes to, without a merge; it is left out where nothing was
    quantized here. An original that is quantized itself has no 16-bit weights, and is its own base.
    """
    plain = quantization.model_copy(update={"bits": 16})
    config = load_config(original, trust_remote_code=trust_remote_code)
    stored = getattr(config, "quantization_config", None) is not None

    titles = {**model_titles(quantization.bits), ON_ORIGINAL: "on 16-bit base"}

    def contender(name: str, folder: Path, how: QuantizationParams, **adapters: Any) -> Contender:
        return Contender(
            name, titles[name], folder, how, trust_remote_code=trust_remote_code, **adapters
        )

    with_adapter = {"lora": lora, "adapter": adapter}
    found = (
        contender("base", original, quantization if stored else plain),
        contender("quantized_base", quantized, quantization),
        contender("adapter", quantized, quantization, **with_adapter),
        contender("merged", merged, plain if merged_bits == 16 else quantization),
    )
    if stored or quantization.bits == 16:
        return found
    return (*found, contender(ON_ORIGINAL, original, plain, **with_adapter))


def check_adapter(folder: Path, lora: LoraParams) -> None:
    """Raises ArtifactError where the adapter is missing, damaged, or trained with other params.

    The step takes `lora` from params, the merge takes the adapter's own config: they must agree.
    """
    again = "train it again with: dvc repro --force train_adapters"
    path = folder / CONFIG
    try:
        content = read_json(path, again)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; make it with: dvc repro train_adapters") from None
    unsaid = {"use_rslora": False, "use_dora": False, "bias": "none", "modules_to_save": None}
    described = {**unsaid, **content} if isinstance(content, dict) else {}
    agreed = (
        ("r", lora.r),
        ("lora_alpha", lora.alpha),
        ("use_rslora", lora.rslora),
        ("use_dora", lora.dora),
        ("bias", lora.bias),
        ("modules_to_save", sorted(lora.modules_to_save) or None),
    )
    for key, wanted in agreed:
        found = described.get(key)
        if found != wanted:
            raise ArtifactError(f"{path} says {key} {found!r}, and params.yaml {wanted!r}; {again}")
    load_adapter(folder)


def check_folder(folder: Path, stage: str) -> None:
    """Raises ArtifactError where the model's folder, which `stage` makes, is not there."""
    if not (folder / "config.json").is_file():
        raise ArtifactError(f"{folder} holds no model; make it with: dvc repro --force {stage}")


def choose_place(
    contender: Contender, plan: Plan, memory: Memory, *, prompt_tokens: int, new_tokens: int
) -> tuple[Place, str | None]:
    """Where the model is evaluated, and why where that is not the Plan's device or dtype.

    prompt_tokens: of the longest row. Weights count with their bytes in the Plan's dtype, and with a
    margin of one row (`row_bytes`) and one chunk of the loss's logits; larger ones go to the CPU.
    """
    config = load_config(contender.folder, trust_remote_code=contender.trust_remote_code)
    model = _skeleton(contender, config, plan).model
    weights = weight_bytes(model)
    dtype = cast(ComputeDtype, plan.storage_dtype)  # answers are not computed in float8
    row = row_bytes(config, prompt_tokens, new_tokens, dtype)
    margin = row + _logits_bytes(config, plan.loss_chunk_tokens, dtype)
    proven = contender.fits_the_plan and not plan.layers_per_device  # for one device, that is
    if proven or weights + margin <= memory.device_bytes:
        if proven:
            weights -= _bytes_on_host(model, plan)
        return Place(memory.device, dtype, _rows(memory.device_bytes - weights, row)), None
    reason = (
        f"{format_bytes(weights)} of weights and a margin of {format_bytes(margin)} are more than "
        f"the {format_bytes(memory.device_bytes)} that may be used of {memory.device.type}"
    )
    return on_cpu(contender, memory, prompt_tokens=prompt_tokens, new_tokens=new_tokens), reason


def on_cpu(contender: Contender, memory: Memory, *, prompt_tokens: int, new_tokens: int) -> Place:
    """The place where every model can be evaluated: the CPU, with 16-bit weights mapped from files."""
    config = load_config(contender.folder, trust_remote_code=contender.trust_remote_code)
    row = row_bytes(config, prompt_tokens, new_tokens, "bfloat16")
    # the mapped weights take what is left; half of the budget is theirs in any case
    return Place(torch.device("cpu"), "bfloat16", _rows(memory.host_bytes // 2, row))


def _rows(free_bytes: int, row: int) -> int:
    return max(1, min(MAXIMUM_ROWS, int(free_bytes * BATCH_SHARE) // row))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, tied ones once; they may be on meta."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _bytes_on_host(model: nn.Module, plan: Plan) -> int:
    """Bytes of the weights that the Plan streams, less the slots that they pass through."""
    layers = decoder_layers(model)
    streamed = [weight_bytes(layers[index]) for index in plan.streamed_layers]
    return sum(streamed) - plan.streaming_slots * max(streamed, default=0)


def row_bytes(config: Any, prompt_tokens: int, new_tokens: int, dtype: ComputeDtype) -> int:
    """A quick bound of what one row takes beside the weights while it is answered.

    Its keys and values in every layer, the activations of one layer on the prompt, and the logits of
    one token in fp32 with two copies. It leaves out the allocator's holes, experts of which several
    work at once, and what a model has beside a plain decoder.
    """
    text = config.get_text_config()
    size = _itemsize(dtype)
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    cache = 2 * text.num_hidden_layers * kv_heads * head_size * size * (prompt_tokens + new_tokens)
    # input, normed, residual and output; q, attention's output; gate, up and their product
    layer = (4 * text.hidden_size + 2 * heads * head_size + 3 * inner) * size * prompt_tokens
    return int(cache + layer + 3 * 4 * text.vocab_size)


def _logits_bytes(config: Any, tokens: int, dtype: ComputeDtype) -> int:
    """A chunk of the loss: logits as they are computed, in fp32, and a copy of those."""
    return int(tokens * config.get_text_config().vocab_size * (_itemsize(dtype) + 8))


def _itemsize(dtype: ComputeDtype) -> int:
    found: torch.dtype = getattr(torch, dtype)
    return found.itemsize


def _skeleton(contender: Contender, config: Any, plan: Plan) -> StepSkeleton:
    settings = StepSettings(
        contender.quantization,
        contender.lora,
        TrainParams(),  # for the optimizer, which takes no step here
        trust_remote_code=contender.trust_remote_code,
    )
    return step_skeleton(config, plan, settings)


def _evaluated(plan: Plan, place: Place, *, as_placed: bool) -> Plan:
    """The Plan as far as it is about evaluating at a place.

    as_placed: weights are where the Plan has them, some of them on the host; otherwise all are on the
    device. They are all on one, as answers are given by transformers' own forward. The optimizer and
    recomputation are training's: plain AdamW has no state before its first step, and layers that are
    streamed have to be called recomputed, which without gradients none is.
    """
    plan = plan.replace(layers_per_device=())
    if not as_placed or place.device.type != plan.device:
        nothing = {"streamed_layers": (), "disk_layers": 0}
        plan = plan.replace(**nothing, embedding="device", head="device")
    return plan.replace(
        device=place.device.type,
        compute_dtype=place.compute_dtype,
        evaluation_batch_size=min(plan.evaluation_batch_size, place.rows),
        recompute_layers=plan.streamed_layers,
        recompute_keeps=(),
        checkpoints="device",
        optimizer="adamw",
        optimizer_device="device",
    )


def load(contender: Contender, plan: Plan, place: Place) -> TrainingStep:
    """The model, ready to be evaluated at its place.

    Raises ArtifactError for weights or an adapter that are damaged or do not belong together.
    """
    config = load_config(contender.folder, trust_remote_code=contender.trust_remote_code)
    plan = _evaluated(plan, place, as_placed=contender.fits_the_plan)
    skeleton = _skeleton(contender, config, plan)
    adapter: dict[str, Tensor] | None = None
    if contender.adapter is not None:
        adapter = load_adapter(contender.adapter)
    weights = CheckpointWeights(contender.folder, place.device, adapter=adapter)
    if skeleton.settings.spec is not None:
        weights.check(skeleton.settings.spec)
    step = skeleton.fill(weights)
    unused = sorted(set(adapter or {}) - set(step.adapters))
    if unused:
        raise ArtifactError(
            f"{contender.adapter} has {unused[0]}, and lora.target_modules does not; train it again "
            "with: dvc repro --force train_adapters"
        )
    step.model.eval()
    return step
