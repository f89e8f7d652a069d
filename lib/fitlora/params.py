"""params.yaml as strict models: each key is defined, documented and given its default here, once.

A wrong file is answered with every problem at once: the key's path, what was found, what is allowed,
and the nearest key for a misspelling. The file is YAML 1.2, the version that DVC reads as well:
`2e-4` is a number there, and a string to YAML 1.1 readers, so writing `2.0e-4` pleases both.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fitlora.artifacts import ADAPTER, Found
from fitlora.errors import UserError
from fitlora.plan import PAGED_OPTIMIZERS, Optimizer
from fitlora.units import parse_bytes

Tracker = Literal["tensorboard", "wandb", "dvclive"]

PARAMS_FILE = Path("params.yaml")
_MOST_TEXT = 65_536  # what is larger is some other file, over which a YAML reader takes minutes


def _is_size(text: str) -> str:
    parse_bytes(text)
    return text


Size = Annotated[str, AfterValidator(_is_size)]
Names = Annotated[tuple[str, ...], Field(strict=False)]  # YAML has lists

# Llama 3.3 is one model, and its name is often written for others.
_LLAMA_3_3 = "meta-llama/Llama-3.3-70B-Instruct"


def _is_released(model_id: str) -> str:
    """Refuses names that no hub ever had, before a fetch fails with a less helpful word."""
    if model_id.lower().startswith("meta-llama/llama-3.3-") and model_id != _LLAMA_3_3:
        raise ValueError(
            f"{model_id} was never released: Llama 3.3 is {_LLAMA_3_3} and nothing else; "
            "of 8B there is meta-llama/Llama-3.1-8B"
        )
    return model_id


def _is_no_output(path: str | None) -> str | None:
    if path is not None and Path(path) == ADAPTER:
        raise ValueError(
            f"{path} is where training writes, so it is gone when training starts; copy the folder "
            "elsewhere and name the copy"
        )
    return path


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelParams(Section):
    """The model to fine-tune."""

    id: Annotated[str, AfterValidator(_is_released)] = Field(
        "assets/sample_model",
        description="a folder (config.json alone is enough to estimate and probe) or a hub id",
    )
    revision: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{40}$",
        description="the full commit of a hub model, quoted; required for a hub id",
    )
    trust_remote_code: bool = Field(
        False, description="run code that comes with the model; off unless you trust its author"
    )


class DataParams(Section):
    """What it learns from."""

    train: str = Field(
        "assets/data/train.jsonl",
        min_length=1,
        description="rows to train on: a .jsonl, .json, .csv or .parquet file, a folder of them, or "
        "a hub dataset (owner/name, owner/name:split or owner/name:config:split)",
    )
    validation: str | None = Field(
        "assets/data/validation.jsonl",
        min_length=1,
        description="rows held out for validation and evaluation, as for train; null: the "
        "validation.* files of train's folder, or else a share of train's rows",
    )
    validation_share: float = Field(
        0.1, gt=0, lt=1, description="of train's rows, where validation is null: held out"
    )
    validation_seed: int = Field(
        0, description="chooses, with the rows' content and not their order, which are held out"
    )
    revision: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{40}$",
        description="the full commit of a hub dataset, quoted; required for a hub id",
    )
    format: Literal["auto", "messages", "prompt-completion", "instruction", "text"] = Field(
        "auto", description="what rows are; auto tells them by their columns"
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop", description="report every bad row and stop, or leave them out and count them"
    )
    max_length: Literal["auto"] | Annotated[int, Field(ge=8)] = Field(
        512,
        description="tokens of a sequence; auto: what the longest row has, or as much of it as the "
        "budget holds",
    )
    on_long_row: Literal["truncate", "bad"] = Field(
        "truncate", description="cut what is longer than max_length and count it, or call it bad"
    )
    packing: bool = Field(
        False,
        description="fill sequences up to max_length with several rows, kept apart; batch sizes "
        "then count packed sequences",
    )
    train_on: Literal["answers", "all"] = Field(
        "answers",
        description="loss on the assistant's answers only, or on every token; an earlier answer that "
        "the chat template writes otherwise later (without its thoughts) is read and not learned",
    )


class TargetParams(Section):
    """A GPU that is not in this machine, to plan for it."""

    name: str = Field(
        description="like RTX 3070; where it is among the known ones, its rates are known as well"
    )
    memory: Size | None = Field(None, description="like 8GiB; null: what a known one has")
    compute_capability: str | None = Field(
        None,
        pattern=r"^\d+\.\d$",
        description="as NVIDIA lists it: 8.6 for RTX 30, 8.9 for RTX 40; null: what a known one has",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class HardwareParams(Section):
    """What it may use."""

    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description="auto takes the GPU where there is one"
    )
    memory_budget: Size | None = Field(
        None, description="use no more than this (8GiB), CUDA context included"
    )
    host_memory_budget: Size | None = Field(
        None, description="use no more host memory than this (24GiB)"
    )
    target: TargetParams | None = Field(
        None,
        description="plan for this GPU instead of the one that is here; of a known one the name alone "
        "is enough",
    )


class QuantizationParams(Section):
    """How the frozen weights are stored. Never chosen by hardware."""

    bits: Literal[4, 16] = Field(4, description="4 quantizes; 16 leaves the weights as they are")
    type: Literal["nf4", "fp4"] = Field("nf4", description="the 4-bit code book")
    double: bool = Field(True, description="quantize the scales too (double quantization)")
    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        64, description="weights that share one scale"
    )
    keep_in_16_bits: Names = Field(
        (),
        description="name parts of linear layers that are not quantized; the head never is",
    )

    @field_validator("bits", mode="before")
    @classmethod
    def _not_8(cls, bits: object) -> object:
        if bits == 8:
            raise ValueError(
                "LLM.int8 rounds activations too and trains on noisier products than 4 bits' at twice "
                "their memory; use 4, or 16 where it fits"
            )
        return bits


class LoraParams(Section):
    """The adapters."""

    r: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        16,
        description="rank of the update matrices; auto: the highest of 32, 16, 8 and 4 that the budget "
        "holds",
    )
    alpha: Literal["auto"] | Annotated[float, Field(gt=0)] = Field(
        32.0, description="the update is scaled by alpha / r; auto: twice the rank"
    )
    rslora: bool = Field(
        False,
        description="rank-stabilised LoRA: the update is scaled by alpha / sqrt(r), so that high ranks "
        "learn as fast as low ones",
    )
    dora: bool = Field(
        False,
        description="DoRA: the magnitude of each output is learned apart from its direction; takes the "
        "general step, which is slower and larger",
    )
    dropout: float = Field(0.05, ge=0, le=0.9, description="dropout on their input")
    target_modules: Literal["all-linear"] | Annotated[Names, Field(min_length=1)] = Field(
        "all-linear",
        description="all-linear: what PEFT puts adapters on; or the last parts of the layers' names "
        "(q_proj, v_proj)",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none",
        description="biases of the model that are trained with them: all, or those of the layers that "
        "have an adapter; takes the general step, where there are any",
    )
    modules_to_save: Names = Field(
        (),
        description="what else is trained, as a whole, and saved with them: embedding, head and norms, "
        "by the ends of their names (embed_tokens, lm_head, norm); takes the general step",
    )


class PlanParams(Section):
    """What the planner decides; each is auto, or a value that it then keeps."""

    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="sequences that go through the model at once"
    )
    evaluation_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="the same, where only the loss is computed"
    )
    recompute: Literal["auto", "none", "all"] | Annotated[int, Field(ge=0)] = Field(
        "auto", description="decoder layers that recompute their activations: none, all, or N"
    )
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32", "float8"] = Field(
        "auto",
        description="auto: bfloat16 where the GPU has it, float16 (with scaled losses) where not, "
        "float32 on the CPU. float8 takes the products of frozen 4-bit weights in fp8 and all else in "
        "bfloat16; never chosen by itself",
    )
    stream_layers: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="decoder layers whose frozen weights come from host memory: N, 0 for none",
    )
    checkpoints: Literal["auto", "device", "host"] = Field(
        "auto", description="where the inputs of recomputed layers wait for the backward pass"
    )
    embedding: Literal["auto", "device", "host"] = Field(
        "auto",
        description="where the embedding's table is; the head's is the same where it is tied",
    )
    head: Literal["auto", "device", "host"] = Field(
        "auto", description="where the language-model head's table is"
    )
    optimizer_device: Literal["auto", "device", "host"] = Field(
        "auto", description="where the optimizer's state is, and where it computes"
    )


class TrainParams(Section):
    """The training run."""

    effective_batch_size: int = Field(
        32, ge=1, description="sequences of one optimizer step; never changed by the planner"
    )
    devices: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="processes that share an effective batch, a GPU each; auto: every GPU that is here, "
        "and one process on the CPU. With auto one process spreads layers over the GPUs where that is "
        "faster by forecast, or nothing else fits",
    )
    epochs: float | None = Field(
        None, gt=0, description="passes over the rows; either this or max_steps"
    )
    max_steps: int | None = Field(100, ge=1, description="optimizer steps")
    learning_rate: float = Field(2.0e-3, gt=0, description="at its highest")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="the learning rate's way down, after the warm-up"
    )
    warmup_steps: int = Field(10, ge=0, description="steps of linear rise from 0")
    optimizer: Optimizer = Field("adamw", description="8-bit and paged ones are bitsandbytes'")
    beta1: float = Field(0.9, ge=0, lt=1, description="memory of AdamW's mean gradient")
    beta2: float = Field(0.999, ge=0, lt=1, description="memory of its mean squared gradient")
    epsilon: float = Field(1.0e-8, gt=0, description="keeps its quotient finite")
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="share of a matrix taken off, times the rate; biases, norms and magnitudes keep all",
    )
    max_gradient_norm: float | None = Field(
        1.0, gt=0, description="gradients are scaled down to this norm; null: never"
    )
    precision: Literal["fixed", "dynamic"] = Field(
        "fixed",
        description="dynamic: a step that overflows, or whose loss is a spike, is done again in the "
        "next wider precision, and after a calm stretch it is narrower again; fixed: such a run ends",
    )
    freeze: Literal["off", "memory", "speed"] = Field(
        "off",
        description="a share of the layers whose adapters are not trained: memory, those with the "
        "smallest gradients; speed, the lowest, above which the backward pass then ends. More of them "
        "where memory runs out otherwise",
    )
    freeze_share: float = Field(
        0.5, gt=0, lt=1, description="of the layers that freeze freezes from the start"
    )
    from_adapter: Annotated[str | None, AfterValidator(_is_no_output)] = Field(
        None,
        description="folder of a LoRA adapter (PEFT's format) to go on from; null starts a new one",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="adapters' start, data order, dropout")
    evaluate_every: int | None = Field(
        50, ge=1, description="steps between validations; null: at the end only"
    )
    checkpoint_every: int | None = Field(
        50,
        ge=1,
        description="steps between checkpoints in .fitlora/, from which a run that was cut short goes "
        "on; null: only where it is stopped in an orderly way",
    )
    keep: Literal["best", "last"] = Field(
        "best", description="which adapter goes on: lowest validation loss, or the last"
    )
    early_stopping: int | None = Field(
        None, ge=1, description="stop after this many validations without a better loss"
    )
    trackers: Annotated[tuple[Tracker, ...], Field(strict=False)] = Field(
        (),
        description="where accelerate logs to, beside artifacts/training.jsonl: below "
        ".fitlora/trackers; pip install what is named",
    )

    @model_validator(mode="after")
    def _one_length(self) -> "TrainParams":
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give exactly one of epochs and max_steps, and null for the other")
        return self


class _Near(NamedTuple):
    """How near a merged model has to be by default."""

    max_kl_divergence: float
    min_top1_agreement: float


# By the bits that it is stored in. Of Llama 3 8B, on text, 8 bits with a scale for 32 weights are 0.0014
# nats and 97.7% away, and 4 such bits, by kind, 0.03 to 0.07 nats and 92% or less (llama.cpp, README of
# its perplexity tool); right and wrong merges of the shipped model: benchmarks/merge_gate.py.
AUTO_LIMITS = {16: _Near(0.003, 0.95), 4: _Near(0.1, 0.85)}


class MergeParams(Section):
    """The merged model, and what it must be measured by to be kept."""

    base: Literal["dequantized", "original"] = Field(
        "dequantized",
        description="merge into the weights that the adapter was trained on, or the 16-bit ones",
    )
    bits: Literal[16, 4] = Field(
        16,
        description="how the merged model is stored; 4 quantizes it again, which loses small updates "
        "unless base is original",
    )
    max_kl_divergence: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        "auto",
        description="mean nats a token from the adapter beside the base that it is merged into, along "
        f"held-out rows; auto: {AUTO_LIMITS[16].max_kl_divergence:g} with 16 bits, "
        f"{AUTO_LIMITS[4].max_kl_divergence:g} with 4",
    )
    min_top1_agreement: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Field(
        "auto",
        description="share of their tokens whose likeliest next one is the same; auto: "
        f"{AUTO_LIMITS[16].min_top1_agreement:g} with 16 bits, "
        f"{AUTO_LIMITS[4].min_top1_agreement:g} with 4",
    )
    max_exact_match_drop: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of rows, rounded up, that it may answer less than the trained adapter",
    )


class EvaluateParams(Section):
    """The comparison at the end."""

    rows: int | None = Field(
        None, ge=1, description="rows of data.validation that are used; null: all"
    )
    max_new_tokens: int = Field(128, ge=1, description="longest answer that is generated")
    samples: int = Field(5, ge=0, description="answers that are shown side by side")


class Params(Section):
    """The whole of params.yaml."""

    model: ModelParams = Field(default_factory=ModelParams)
    data: DataParams = Field(default_factory=DataParams)
    hardware: HardwareParams = Field(default_factory=HardwareParams)
    quantization: QuantizationParams = Field(default_factory=QuantizationParams)
    lora: LoraParams = Field(default_factory=LoraParams)
    plan: PlanParams = Field(default_factory=PlanParams)
    train: TrainParams = Field(default_factory=TrainParams)
    merge: MergeParams = Field(default_factory=MergeParams)
    evaluate: EvaluateParams = Field(default_factory=EvaluateParams)

    @model_validator(mode="after")
    def _consistent(self) -> "Params":
        micro = self.plan.micro_batch_size
        if isinstance(micro, int) and micro > self.train.effective_batch_size:
            raise ValueError(
                f"plan.micro_batch_size {micro} is larger than train.effective_batch_size "
                f"{self.train.effective_batch_size}"
            )
        devices = self.train.devices
        if isinstance(devices, int) and devices > self.train.effective_batch_size:
            raise ValueError(
                f"train.devices {devices} is larger than train.effective_batch_size "
                f"{self.train.effective_batch_size}, so some would have nothing to do"
            )
        if self.hardware.device == "cpu" and self.train.optimizer in PAGED_OPTIMIZERS:
            raise ValueError(
                f"train.optimizer {self.train.optimizer} needs a CUDA device, "
                "and hardware.device is cpu; use adamw or adamw_8bit"
            )
        if self.lora.r == "auto" and self.train.from_adapter is not None:
            raise ValueError(
                "lora.r auto finds a rank for a new adapter, and the one in train.from_adapter has its "
                "own; write that"
            )
        if self.lora.modules_to_save and self.train.freeze != "off":
            raise ValueError(
                "train.freeze ends the backward pass above frozen layers, and lora.modules_to_save may "
                "train what lies below them; use one of the two"
            )
        if self.merge.bits == 4 and self.quantization.bits == 16:
            raise ValueError(
                "merge.bits 4 quantizes as quantization says, which is 16 bits there; set one of them"
            )
        return self


def with_found(
    params: Params, found: Found | None, source: str, stage: str = "find_batch_size"
) -> Params:
    """Params with the numbers that an earlier stage found in place of `auto`.

    source: the artifact that `found` comes from, which `stage` makes. Raises UserError where it has
    none, because params said no `auto` when it was made.
    """
    lora, data = params.lora, params.data
    if "auto" not in (lora.r, lora.alpha, data.max_length):
        return params
    if found is None:
        raise UserError(
            f"params say auto for lora or data.max_length, and {source} was made for numbers; "
            f"make it again with: dvc repro {stage}"
        )
    in_lora = {"r": found.lora_r, "alpha": found.lora_alpha}
    changes = {key: value for key, value in in_lora.items() if getattr(lora, key) == "auto"}
    params = params.model_copy(update={"lora": lora.model_copy(update=changes)})
    if data.max_length == "auto":
        data = data.model_copy(update={"max_length": found.max_length})
    return params.model_copy(update={"data": data})


def keys(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[str]:
    """The dotted path of every key that params.yaml may have."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from keys(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def read_params(path: Path = PARAMS_FILE, changes: Sequence[str] = ()) -> Params:
    """Reads and checks params.yaml; raises UserError that lists every problem.

    changes: `key=value` with a dotted key and a value in YAML, in place of what the file says.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; run from the folder that has it")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if len(text) > _MOST_TEXT:
        raise UserError(
            f"{path} has {len(text):,} characters, and params have a few thousand; is it another file?"
        )
    content = parse_yaml(text, str(path))
    return check_params(with_changes({} if content is None else content, changes), str(path))


def parse_yaml(text: str, source: str) -> Any:
    """YAML 1.2 as plain data; raises UserError that names `source`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:  # a number or a depth without end
        raise UserError(f"{source} is not YAML: {error}") from None


def with_changes(content: Any, changes: Sequence[str]) -> Any:
    """Plain data with each `key=value` of `changes` in it; whether such keys exist is checked later.

    Raises UserError for a change that is not of that form.
    """
    for change in changes:
        key, equals, value = change.partition("=")
        path = key.strip().split(".")
        if not equals or not all(path):
            raise UserError(f"{change!r} is not a change; write it like train.learning_rate=2.0e-4")
        section = content
        if not isinstance(section, dict):
            break  # what is no section at all is told by the check
        for part in path[:-1]:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[path[-1]] = parse_yaml(value, f"the value of {key.strip()}")
    return content


def check_params(content: object, source: str = "params") -> Params:
    """Checks plain data against `Params`; raises UserError that lists every problem."""
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        problems = _explain(error.errors())
    raise UserError("\n".join([f"{source} has {len(problems)} problem(s):", *problems]))


# What pydantic says in Python's words, in YAML's.
_WORDS = {
    "tuple_type": "should be a list",
    "model_type": "should be a section with keys of its own",
    "string_type": "should be text",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "bool_type": "should be true or false",
    "missing": "is missing",
    "too_short": "should not be empty",
}


def _explain(errors: Sequence[Any]) -> list[str]:
    """One line for each key that is wrong; what a union's branches say of one value is joined."""
    known = set(_every_path())
    unknown: list[str] = []
    wrong: dict[str, tuple[str, list[str]]] = {}  # by key: what was found, what is allowed
    for error in errors:
        path = [str(part) for part in error["loc"]]
        if error["type"] == "extra_forbidden":
            unknown.append(f"  {'.'.join(path)}: no such key{_nearest(path, known)}")
            continue
        # pydantic adds the branch of a union to the path; the key ends where the model's fields end
        while path and ".".join(path) not in known:
            path.pop()
        message = _WORDS.get(error["type"], error["msg"])
        message = message.removeprefix("Value error, ").replace("Input should", "should", 1)
        message = message.replace("String should", "should", 1)
        found = "" if error["type"] == "missing" else f"found {error['input']!r}; "
        messages = wrong.setdefault(".".join(path), (found, []))[1]
        if message not in messages:
            messages.append(message)
    lines = []
    for where, (found, messages) in wrong.items():
        allowed = _join(messages)
        lines.append(f"  {where}: {found}{allowed}{_describe(where)}" if where else f"  {allowed}")
    return [*unknown, *lines]


def _join(messages: Sequence[str]) -> str:
    """`["should be 'auto'", "should be text"]` -> `"should be 'auto', or text"`."""
    start = "should be "
    if all(message.startswith(start) for message in messages):
        return start + ", or ".join(message.removeprefix(start) for message in messages)
    return "; ".join(messages)


def _nearest(path: list[str], known: set[str]) -> str:
    """A hint for a key that does not exist: one spelled like it beside it, or its name elsewhere."""
    *section, leaf = path
    beside = {k.rpartition(".")[2]: k for k in known if k.split(".")[:-1] == section}
    near = difflib.get_close_matches(leaf, beside, n=1, cutoff=0.6)
    elsewhere = sorted(key for key in known if key.rpartition(".")[2] == leaf)
    hints = [beside[near[0]]] if near else elsewhere
    return f"; did you mean {hints[0]}?" if hints else ""


def _every_path(model: type[BaseModel] = Params, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for inner in _models_of(field.annotation):
            yield from _every_path(inner, f"{prefix}{name}.")


def _models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_of(inner)


def _describe(path: str) -> str:
    model: type[BaseModel] = Params
    description = ""
    for part in path.split("."):
        field = model.model_fields[part]
        description = field.description or ""
        model = next(iter(_models_of(field.annotation)), model)
    return f" ({description})" if description else ""
