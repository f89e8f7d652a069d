"""What the stages hand to each other, as strict, versioned models.

Each artifact is one JSON file that says what it is (`kind`) and which shape it has (`version`). It
is written beside its place and renamed, so that it is never half there, and read strictly: a
damaged, foreign or newer file is answered with its name, what is wrong, and the stage that makes it
again. This module imports no torch.
"""

import functools
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, ParamSpec, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fitlora.errors import ArtifactError, UserError
from fitlora.plan import Plan
from fitlora.units import MIB

HARDWARE = Path("artifacts/hardware.json")
MODEL = Path("artifacts/model.json")
DATA = Path("artifacts/data.json")
MEMORY_ESTIMATE = Path("artifacts/memory_estimate.json")
DATASET = Path("artifacts/dataset.json")
PLAN = Path("artifacts/plan.json")
QUANTIZED_MODEL = Path("artifacts/quantized_model")
ADAPTER = Path("artifacts/adapter")
TRAINING_LOG = Path("artifacts/training.jsonl")
CURVES = Path("artifacts/curves.json")
MERGED_MODEL = Path("artifacts/merged_model")
EVALUATION = Path("artifacts/evaluation.json")
RUN = Path("artifacts/run.json")
REPORT = Path("reports/report.html")
SCRATCH = Path(".fitlora")
PROBE_LOG = Path("logs/probe.json")
MEMORY_LOG = Path("logs/memory.json")

Self = TypeVar("Self", bound="Artifact")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def write_text_atomically(path: Path, text: str) -> None:
    """Writes beside `path` and renames: readers see the old text or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes private files; artifacts are for sharing
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def parse_json(text: str | bytes) -> Any:
    """What JSON says; raises ValueError, in words, for all that keeps it from being read.

    Python's own reader also ends in a RecursionError, where lists lie in lists without end.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, way_out: str = "") -> Any:
    """What a JSON file says; raises FileNotFoundError, and ArtifactError for what cannot be read.

    way_out: ends the message.
    """
    end = f"; {way_out}" if way_out else ""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror or error}){end}") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged ({error}){end}") from None


_MAKERS = {
    QUANTIZED_MODEL: "quantize_model",
    ADAPTER: "train_adapters",
    MERGED_MODEL: "merge_and_evaluate",
}


def names_remedy(stage: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A stage whose errors about a folder of tensors say which stage makes that folder again.

    What reads such a folder reads models of any kind and from anywhere, and cannot know.
    """

    @functools.wraps(stage)
    def naming(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        try:
            return stage(*arguments, **options)
        except UserError as error:
            text = str(error)
            maker = next((m for path, m in _MAKERS.items() if path.as_posix() in text), None)
            if maker is None or "dvc repro" in text:
                raise
            again = f"{text}; make it again with: dvc repro --force {maker}"
            raise ArtifactError(again) from error

    return naming


class Record(BaseModel):
    """A part of an artifact. Its numbers are finite: JSON has no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Artifact(Record):
    """A JSON file that one stage writes and others read."""

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1
    STAGE: ClassVar[str]

    def write(self, path: Path) -> None:
        """Writes the artifact, atomically and with the same bytes for the same content."""
        content = {"kind": self.KIND, "version": self.VERSION, **self.model_dump(mode="json")}
        write_text_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls: type[Self], path: Path) -> Self:
        """Reads and checks the artifact; raises ArtifactError that names the way out."""
        again = f"make it again with: dvc repro --force {cls.STAGE}"
        try:
            content = read_json(path, again)
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing; make it with: dvc repro {cls.STAGE}") from None
        if not isinstance(content, Mapping) or content.get("kind") != cls.KIND:
            found = content.get("kind") if isinstance(content, Mapping) else type(content).__name__
            raise ArtifactError(f"{path} is not a FitLoRA {cls.KIND} (it says {found!r}); {again}")
        version = content.get("version")
        if version != cls.VERSION:
            newer = isinstance(version, int) and version > cls.VERSION
            way = "upgrade fitlora, or " if newer else ""
            raise ArtifactError(
                f"{path} has version {version!r} and this program reads {cls.VERSION}; {way}{again}"
            )
        body = {key: value for key, value in content.items() if key not in ("kind", "version")}
        try:
            return cls.model_validate_json(json.dumps(body))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ArtifactError(f"{path} is damaged at {where}: {first['msg']}; {again}") from None


class Gpu(Record):
    """What a GPU is: facts that do not change from run to run."""

    name: str
    compute_capability: str
    memory_bytes: int
    bf16: bool
    fp8: bool


class Rates(Record):
    """Speeds, measured and rounded coarsely, or documented; None where not known, or not there."""

    host_to_device_bytes_per_second: int | None
    device_to_host_bytes_per_second: int | None
    device_copy_bytes_per_second: int | None
    disk_read_bytes_per_second: int | None
    product_flops_per_second: dict[str, int] = Field(
        description="by compute dtype: what a large matrix product reaches"
    )


# What NCCL takes of a GPU that shares a batch: buffers of its channels, and its kernels. Assumed and not
# measured; benchmarks/several_gpus.py measures it.
NCCL_BYTES = 512 * MIB


class Hardware(Artifact):
    """What the machine is and how much of it may be used."""

    KIND: ClassVar[str] = "hardware"
    STAGE: ClassVar[str] = "profile_hardware"

    device: Literal["cuda", "cpu"]
    gpus: tuple[Gpu, ...] = Field(strict=False)
    cpu_name: str
    cpu_cores: int
    host_memory_bytes: int
    host_budget_bytes: int = Field(description="host memory that may be used")
    budget_bytes: int = Field(description="of the device's memory, context included")
    context_bytes: int = Field(description="CUDA's own memory beside the allocator; 0 on the CPU")
    workspace_bytes: int = Field(
        description="what libraries (cuBLAS) keep inside the allocator; 0 on the CPU"
    )
    rates: Rates
    target: str | None = Field(description="the described GPU that stands in for this machine's")

    @property
    def allocator_bytes(self) -> int:
        """What PyTorch's allocator may reserve on the device."""
        return self.budget_bytes - self.context_bytes

    def among(self, devices: int) -> "Hardware":
        """The same for one of several processes: NCCL's buffers are beside its allocator as well."""
        if self.device == "cpu" or devices == 1:
            return self
        beside = self.context_bytes + NCCL_BYTES
        # by the class: a copy hands on all facts, and reads these two alone
        return Hardware.model_copy(self, update={"context_bytes": beside})

    def processes_here(self, devices: int) -> int:
        """How many of a run's processes are on this host."""
        return min(devices, len(self.gpus)) if self.device == "cuda" else devices


class ModelFacts(Artifact):
    """Which model it is, by content.

    Later stages depend on these facts and not on the folder, which for a hub model is not here.
    """

    KIND: ClassVar[str] = "model"
    STAGE: ClassVar[str] = "profile_hardware"

    source: str
    revision: str | None
    definition: str = Field(description="sha256 of config and tokenizer; a hub model's commit")
    weights: str | None = Field(
        description="the same of the weights, of samples of them where a target is planned for; "
        "None for a config alone"
    )
    adapter: str | None = Field(
        None, description="sha256 of the adapter that training goes on from; None for a new one"
    )


class SequenceSize(Record):
    """One sequence as far as memory is concerned."""

    tokens: int
    target_tokens: int = Field(description="tokens that count in the loss")
    parts: tuple[int, ...] = Field(
        (), strict=False, description="tokens of each part of a packed one; empty for any other"
    )


class Percentiles(Record):
    p50: int
    p90: int
    p99: int
    maximum: int


class Split(Record):
    """Rows to train on, or held out, after tokenizing and before packing."""

    source: str
    rows: int
    formats: dict[str, int] = Field(description="how many rows have each form")
    tokens: int
    target_tokens: int
    truncated_rows: int = Field(description="cut to data.max_length")
    skipped_rows: int = Field(description="bad ones that data.on_bad_row: skip left out")
    rewritten_answers: int = Field(
        0, description="earlier ones that the chat template writes otherwise later: not learned"
    )
    length: Percentiles
    fingerprint: str = Field(description="sha256 over the token ids and loss masks, in order")


class Padding(Record):
    """What padding would cost: this program has none, as rows lie behind each other."""

    batch: int = Field(description="sequences that would be padded to the longest among them")
    rows_share: float = Field(description="padding's share of the tokens, a row a sequence")
    packed_share: float | None = Field(description="the same when packed; None where it is not")
    sequences: int = Field(description="that training draws its batches from: packed ones, or rows")


class Dataset(Artifact):
    """What the data is, as far as planning needs to know."""

    KIND: ClassVar[str] = "dataset"
    STAGE: ClassVar[str] = "estimate_memory"

    train: Split | None = Field(
        description="None where the model's folder has no tokenizer: then lengths are assumed"
    )
    validation: Split | None
    longest_train: tuple[SequenceSize, ...] = Field(
        strict=False, description="the longest sequences, longest first, one effective batch"
    )
    longest_validation: tuple[SequenceSize, ...] = Field(strict=False)
    padding: Padding | None = Field(description="of the rows to train on; None without any")


class DataFacts(Artifact):
    """Which data it is, by content, for what DVC cannot depend on: a hub's split, or none.

    None where there is nothing to be found; the stage that reads the data says what is wrong.
    """

    KIND: ClassVar[str] = "data"
    STAGE: ClassVar[str] = "profile_hardware"

    train: str | None = Field(description="sha256 of the files; of a hub's split, its commit")
    validation: str | None = Field(description="the same; of rows split from train, train's")


class Components(Record):
    """Bytes at the instant of the peak, by what they are for. They add up to the peak."""

    weights: int
    adapters: int
    gradients: int
    optimizer_states: int
    activations: int
    temporary_buffers: int
    library_workspaces: int

    @property
    def total(self) -> int:
        return sum(self.model_dump().values())


class Estimate(Record):
    """What one Plan is predicted to take on the device."""

    plan: Plan
    peak_allocated_bytes: int
    safe_peak_bytes: int | None = Field(
        None, description="what the allocator will not reserve more than; None in older records"
    )
    peak_reserved_bytes: int | None = Field(
        None, description="what the allocator will reserve; None on the CPU, whose is not modelled"
    )
    paged_bytes: int = Field(0, description="of paged optimizer states, beside the allocator")
    process_bytes: int = Field(description="the safe peak, paged states and the context")
    host_pinned_bytes: int = Field(
        0, description="of a host's memory, for what is not on its devices; by all processes there"
    )
    host_unpinned_bytes: int = Field(
        0, description="the same, not pinned: the optimizer's states, where they are there"
    )
    host_copies_bytes: int = Field(
        0,
        description="the same, in a training run: the best adapter, and a checkpoint that is written",
    )
    host_own_bytes: int = Field(
        0,
        description="the same, for Python, CUDA and libraries; 0 on the CPU, where it is not told",
    )
    device_peak_bytes: tuple[int, ...] = Field(
        (),
        strict=False,
        description="peak_allocated_bytes of each device that layers are spread over, in order; all "
        "else is of the heaviest. Empty for one device",
    )
    fits: bool
    instant: str = Field(description="when the peak is reached: phase and module")
    phase_peak_bytes: dict[str, int]
    components: Components

    @property
    def host_bytes(self) -> int:
        """Of a host's memory, the most that a run has: all but the pages of files."""
        planned = self.host_pinned_bytes + self.host_unpinned_bytes + self.host_copies_bytes
        return planned + self.host_own_bytes

    @property
    def heaviest_device(self) -> int:
        """The number of the device that all but `device_peak_bytes` is of."""
        each = self.device_peak_bytes
        return each.index(self.peak_allocated_bytes) if each else 0


class Card(Record):
    """Whether a GPU of one size would hold the step, and laid out how."""

    gib: int
    fits: bool
    plan: str | None = Field(description="in words: the first of the plans tried that fits")
    process_bytes: int | None
    host_pinned_bytes: int | None


class Moment(Record):
    """The highest level of a stretch of a step."""

    name: str
    components: Components


class Found(Record):
    """Numbers for params that say `auto`; of those that say a number, the number."""

    lora_r: int
    lora_alpha: float
    max_length: int = Field(description="of a sequence, in tokens: data.max_length")


class MemoryEstimate(Artifact):
    """The default plan and its neighbours, before anything ran."""

    KIND: ClassVar[str] = "memory_estimate"
    STAGE: ClassVar[str] = "estimate_memory"

    model: str
    parameters: int
    trainable_parameters: int
    budget_bytes: int
    default: Estimate
    neighbours: dict[str, Estimate] = Field(description="by what was changed of the default")
    over_step: tuple[Moment, ...] = Field(
        (),
        strict=False,
        description="the default's step from its forward to its evaluation, in order",
    )
    cards: tuple[Card, ...] = Field(
        (), strict=False, description="GPUs of the usual sizes; empty in older records"
    )
    found: Found | None = Field(None, description="None where no param says auto")


class PlanArtifact(Artifact):
    """The Plan that training will follow, and why."""

    KIND: ClassVar[str] = "plan"
    STAGE: ClassVar[str] = "find_batch_size"

    plan: Plan
    reasons: dict[str, str] = Field(description="by decision; words only, no measurement")
    found: Found | None = Field(None, description="as the estimate has it, for the stages after it")


Interval = Annotated[tuple[float, float], Field(strict=False)]  # JSON has lists


class Metrics(Record):
    """One model on the held-out rows, each figure with its 95% interval over such rows."""

    loss: float
    perplexity: float
    exact_match: float = Field(description="share of answers that equal the expected one")
    loss_interval: Interval
    perplexity_interval: Interval
    exact_match_interval: Interval


class Group(Record):
    """Some of the held-out rows, and each model on them."""

    by: Literal["length", "source"]
    name: str
    rows: int
    models: dict[str, Metrics]


class Fidelity(Record):
    """How far next-token distributions are from those of `Gate.against`, along held-out rows."""

    tokens: int = Field(description="at which both were compared")
    kl_divergence: float = Field(description="mean nats a token")
    top1_agreement: float = Field(description="share of tokens where both rank the same first")


class Gate(Record):
    """What the merged model was measured by before it was kept, and the limits it kept."""

    base: Literal["dequantized", "original"] = Field(description="what was merged into")
    bits: Literal[16, 4] = Field(description="how the merged model is stored")
    against: str = Field(
        description="whose predictions it was held against: `adapter`, on the weights that it was "
        "trained on, or `adapter_on_original`, on the 16-bit ones that it was merged into"
    )
    max_kl_divergence: float
    min_top1_agreement: float
    max_exact_match_drop: float

    @property
    def into(self) -> str:
        """`base` as people read it."""
        trained_on = self.base == "dequantized"
        return "the weights that it was trained on" if trained_on else "the original weights"

    @property
    def reference(self) -> str:
        """`against` as people read it."""
        return "the adapter" + " on the original weights" * (self.against != "adapter")


class Sample(Record):
    """One held-out row and what each model answered."""

    prompt: str
    expected: str
    answers: dict[str, str]


def model_titles(base_bits: int) -> dict[str, str]:
    """What people read of each model that is compared. base_bits: as in `Evaluation`."""
    quantized = f"{base_bits}-bit base"
    return {"base": "base", "quantized_base": quantized, "adapter": "adapter", "merged": "merged"}


class Evaluation(Artifact):
    """Base, quantized base, adapter and merged model on the same held-out rows."""

    KIND: ClassVar[str] = "evaluation"
    STAGE: ClassVar[str] = "merge_and_evaluate"
    VERSION: ClassVar[int] = 4

    rows: int
    base_bits: Literal[16, 4] = Field(description="of the weights that the adapter was trained on")
    base: Metrics
    quantized_base: Metrics
    adapter: Metrics
    merged: Metrics
    gate: Gate
    fidelity: dict[str, Fidelity] = Field(
        description="by model, but for that which they are held against"
    )
    groups: tuple[Group, ...] = Field(strict=False)
    devices: dict[str, str] = Field(description="where each model was evaluated")
    samples: tuple[Sample, ...] = Field(strict=False)

    @property
    def titles(self) -> dict[str, str]:
        """What people read, by model, in the order that they are shown."""
        return model_titles(self.base_bits)


class RunFigures(Artifact):
    """What a run took, in few numbers, so that DVC tells experiments apart by them."""

    KIND: ClassVar[str] = "run"
    STAGE: ClassVar[str] = "merge_and_evaluate"

    steps: int
    seconds: float
    tokens_per_second: float = Field(description="of the median step")
    forecast_tokens_per_second: float | None
    predicted_peak_bytes: int
    measured_peak_bytes: int
    measured_reserved_bytes: int | None
    changes_of_plan: int


def dump_line(content: Mapping[str, Any]) -> str:
    """One line of a JSONL log."""
    return json.dumps(content, ensure_ascii=False) + "\n"
