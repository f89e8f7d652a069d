"""The pipeline as one Python object: `MemoryEfficientTrainer`.

It has the names that people know from transformers and the seed of this project, and no logic of its
own: arguments become params, and `train` and `evaluate` run the pipeline's stages into `output_dir`.
What an argument asks for and FitLoRA does not have is refused by its name, never ignored.
"""

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitlora.artifacts import (
    ADAPTER,
    HARDWARE,
    MERGED_MODEL,
    QUANTIZED_MODEL,
    SCRATCH,
    Hardware,
)
from fitlora.console import say
from fitlora.errors import UserError
from fitlora.params import LoraParams, QuantizationParams, TrainParams, check_params
from fitlora.presets import SAMPLES
from fitlora.units import format_bytes

if TYPE_CHECKING:
    from fitlora.artifacts import Evaluation

# The defaults are those of params.yaml; here they are only shown.
_QUANTIZATION, _LORA, _TRAIN = QuantizationParams(), LoraParams(), TrainParams()
MEMORY_LOG = SCRATCH / "memory" / "memory.jsonl"  # where the run's tracker writes
MEMORY_LOGS = Path("memory_logs")
# What keeps the planner from host memory.
_ALL_ON_DEVICE: dict[str, Any] = {
    "stream_layers": 0,
    "checkpoints": "device",
    "embedding": "device",
    "head": "device",
    "optimizer_device": "device",
}


class MemoryEfficientTrainer:
    """Fine-tunes a model with QLoRA in the memory that is there.

        trainer = MemoryEfficientTrainer("my/model", "outputs", train_file="rows.jsonl",
                                         validation_file="held_out.jsonl")
        trainer.train()
        trainer.evaluate()
        trainer.save_model("my/adapter")

    model_name_or_path: a folder, or a hub id with `revision`, its full commit.
    output_dir: gets artifacts/ and params.yaml, for `fitlora chat --root` and its like.
    train_file, validation_file: rows, in any form that `data.train` takes; a share of the first is held
        out where the second is left out. The shipped sample data without either.
    bits: 4, or 16 for no quantization. double_quant, quant_type: how 4 bits are stored.
    lora_r: rank of the adapters; with `auto_find_parameters` the highest to consider.
    lora_alpha: twice the rank by default.
    cpu_offloading: let the planner keep in host memory what the GPU has no room for: layers' frozen
        weights, activation checkpoints, embedding, head, optimizer. False keeps all on the GPU. On the
        CPU as the device there is nothing to choose.
    gradient_checkpointing: recompute the activations of every layer, or of none. Left out, or with
        `auto_find_parameters`, of as few as the budget asks for.
    auto_find_batch_size: the planner finds the micro-batch. Otherwise it is
        `per_device_train_batch_size` (1 by default), which must fit.
    per_device_train_batch_size, gradient_accumulation_steps: their product is the effective batch,
        which stays as it is however the planner splits it up; 32 where either is left out.
    auto_find_parameters: finds rank, sequence length and recomputation from the budget; the order is
        that of `fitlora.planner.parameters`.
    max_seq_length: tokens that are kept of a row.
    num_train_epochs, max_steps: the length of the run, one of the two; 100 steps by default.
    memory_profiling: copies the memory of each step to output_dir/memory_logs and prints each phase's
        peak.
    memory_budget: like "8GiB"; all of the device's memory by default.
    device_map: "auto" for every GPU that is here, each with its part of a batch or a range of the
        layers, whichever the planner forecasts to be faster; "cuda" for the first one, "cpu" for none.
        Left out, the first GPU where there is one.
    from_adapter: folder of an adapter to go on from.

    Raises UserError, which says what to change, for whatever cannot be.
    """

    def __init__(
        self,
        model_name_or_path: str | Path,
        output_dir: str | Path,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        train_file: str | Path | None = None,
        validation_file: str | Path | None = None,
        bits: int = _QUANTIZATION.bits,
        double_quant: bool = _QUANTIZATION.double,
        quant_type: str = _QUANTIZATION.type,
        lora_r: int | None = None,
        lora_alpha: float | None = None,
        lora_dropout: float = _LORA.dropout,
        memory_profiling: bool = False,
        cpu_offloading: bool = True,
        gradient_checkpointing: bool | None = None,
        auto_find_batch_size: bool = False,
        auto_find_parameters: bool = False,
        device_map: str | None = None,
        memory_budget: str | None = None,
        per_device_train_batch_size: int | None = None,
        gradient_accumulation_steps: int | None = None,
        max_seq_length: int | None = None,
        learning_rate: float = _TRAIN.learning_rate,
        num_train_epochs: float | None = None,
        max_steps: int | None = None,
        warmup_steps: int | None = None,
        optim: str = _TRAIN.optimizer,
        from_adapter: str | Path | None = None,
        seed: int = _TRAIN.seed,
    ) -> None:
        if train_file is None and validation_file is not None:
            raise UserError("give train_file too: the sample data is not what you want to validate")
        if lora_r is not None and (not isinstance(lora_r, int) or lora_r < 1):
            raise UserError(f"lora_r is {lora_r!r}; it is a rank, 1 or more")
        self.output_dir = Path(output_dir)
        self.memory_profiling = memory_profiling
        self.auto_find_parameters = auto_find_parameters
        self._rank, self._max_length = lora_r, max_seq_length
        self._alpha = lora_alpha
        default_alpha = _LORA.alpha if lora_r is None else 2.0 * lora_r
        train: dict[str, Any] = {
            "effective_batch_size": _effective_batch_size(
                per_device_train_batch_size, gradient_accumulation_steps
            ),
            "learning_rate": learning_rate,
            "optimizer": optim,
            "from_adapter": None if from_adapter is None else str(from_adapter),
            "seed": seed,
            "devices": "auto" if device_map == "auto" else 1,
        }
        if num_train_epochs is not None or max_steps is not None:
            train |= {"epochs": num_train_epochs, "max_steps": max_steps}
        if warmup_steps is not None:
            train["warmup_steps"] = warmup_steps
        self.params = check_params(
            {
                "model": {
                    "id": str(model_name_or_path),
                    "revision": revision,
                    "trust_remote_code": trust_remote_code,
                },
                "data": _data(train_file, validation_file, max_seq_length),
                "hardware": {"device": _device(device_map), "memory_budget": memory_budget},
                "quantization": {"bits": bits, "type": quant_type, "double": double_quant},
                "lora": {
                    "r": _LORA.r if lora_r is None else lora_r,
                    "alpha": default_alpha if lora_alpha is None else lora_alpha,
                    "dropout": lora_dropout,
                },
                "plan": {
                    "micro_batch_size": (
                        "auto" if auto_find_batch_size else per_device_train_batch_size or 1
                    ),
                    "recompute": _recompute(gradient_checkpointing, auto_find_parameters),
                    **({} if cpu_offloading else _ALL_ON_DEVICE),
                },
                "train": train,
            },
            "MemoryEfficientTrainer, in the words of params.yaml,",
        )

    def train(self) -> dict[str, Any]:
        """Profiles, estimates, plans, quantizes and trains; returns the training log's last record.

        What an earlier run left in `output_dir` is replaced.
        """
        from fitlora.pipeline.everything import open_output, run_stages
        from fitlora.pipeline.train_adapters import train_adapters

        open_output(self.params, self.output_dir, force=True)
        run_stages(self.params, self.output_dir, "profile_hardware")
        if self.auto_find_parameters:
            self._find_parameters()
            open_output(self.params, self.output_dir, force=True)
        run_stages(
            self.params, self.output_dir, "estimate_memory", "find_batch_size", "quantize_model"
        )
        (self.output_dir / MEMORY_LOG).unlink(missing_ok=True)  # it would be added to
        end = train_adapters(self.params, self.output_dir)
        if self.memory_profiling:
            _keep_memory_log(self.output_dir)
        return end

    def _find_parameters(self) -> None:
        """Numbers for rank and sequence length, up to what was given, from the budget."""
        from fitlora.model import load_config, resolve_model
        from fitlora.params import with_found
        from fitlora.planner.parameters import HIGHEST_RANK, find_parameters

        params = self.params
        folder = resolve_model(params.model.id, params.model.revision, weights=False)
        data = params.data.model_copy(update={"max_length": "auto"})
        lora = params.lora
        if params.train.from_adapter is None:  # which has its rank
            alpha = "auto" if self._alpha is None else self._alpha
            lora = lora.model_copy(update={"r": "auto", "alpha": alpha})
        params = params.model_copy(update={"data": data, "lora": lora})
        found = find_parameters(
            params,
            folder,
            load_config(folder, trust_remote_code=params.model.trust_remote_code),
            Hardware.read(self.output_dir / HARDWARE),
            highest_rank=self._rank or HIGHEST_RANK,
            longest=self._max_length,
        )
        self.params = with_found(params, found, "this")

    def evaluate(self) -> "Evaluation":
        """Merges the adapter, and compares base, quantized base, adapter and merged model."""
        from fitlora.pipeline.merge_and_evaluate import merge_and_evaluate

        self._require(ADAPTER, "train()")
        return merge_and_evaluate(self.params, self.output_dir)

    def save_model(self, directory: str | Path | None = None, *, merged: bool = False) -> Path:
        """Copies the adapter, with the tokenizer, to `directory`; returns it.

        directory: output_dir/model by default; not a folder with something else in it. merged: the
        merged model instead, which `evaluate` makes.
        """
        source = self._require(*((MERGED_MODEL, "evaluate()") if merged else (ADAPTER, "train()")))
        target = self.output_dir / "model" if directory is None else Path(directory)
        if target.exists() and (not target.is_dir() or not _is_a_model(target)):
            raise UserError(f"{target} is there and holds no saved model; name another folder")
        partial = target.parent / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            # the other of best and last stays with the run
            others = shutil.ignore_patterns("best", "last")
            shutil.copytree(source, partial, copy_function=shutil.copyfile, ignore=others)
            if not merged:
                for file in (self.output_dir / QUANTIZED_MODEL).iterdir():
                    if file.name.startswith("tokenizer") or file.suffix == ".jinja":
                        shutil.copyfile(file, partial / file.name)
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    def _require(self, path: Path, method: str) -> Path:
        found = self.output_dir / path
        if not found.exists():
            raise UserError(f"{found} is not there yet: call {method} first")
        return found


def _effective_batch_size(per_device: int | None, accumulation: int | None) -> int:
    for name, value in (
        ("per_device_train_batch_size", per_device),
        ("gradient_accumulation_steps", accumulation),
    ):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"{name} is {value!r}; it is a count, 1 or more")
    if per_device is not None and accumulation is not None:
        return per_device * accumulation
    return max(_TRAIN.effective_batch_size, per_device or 1)


def _data(
    train: str | Path | None, validation: str | Path | None, max_length: int | None
) -> dict[str, Any]:
    length = {} if max_length is None else {"max_length": max_length}
    if train is not None:
        held_out = None if validation is None else str(validation)
        return {"train": str(train), "validation": held_out, **length}
    files = {name: SAMPLES / "data" / f"{name}.jsonl" for name in ("train", "validation")}
    if not all(file.is_file() for file in files.values()):
        raise UserError("the shipped sample data is not here; give train_file and validation_file")
    return {**{name: str(file) for name, file in files.items()}, **length}


def _device(device_map: str | None) -> str:
    if device_map is None or device_map == "auto":
        return "auto"
    if device_map in ("cuda", "cpu"):
        return device_map
    raise UserError(
        f"device_map is {device_map!r}; it is 'cuda' or 'cpu' for one device, or 'auto' for every "
        "GPU that is here. Which those are is chosen with CUDA_VISIBLE_DEVICES"
    )


def _recompute(checkpointing: bool | None, auto: bool) -> str:
    if checkpointing is False:
        return "none"
    return "all" if checkpointing and not auto else "auto"


def _is_a_model(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return not names or bool(names & {"adapter_config.json", "config.json"})


def _keep_memory_log(root: Path) -> None:
    """The tracker's log beside the artifacts, and its peaks in words."""
    target = root / MEMORY_LOGS / MEMORY_LOG.name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(root / MEMORY_LOG, target)
    peaks: dict[str, int] = defaultdict(int)
    for line in target.read_text(encoding="utf-8").splitlines():
        for phase, count in json.loads(line)["phases"].items():
            peaks[phase] = max(peaks[phase], count)
    for phase, count in peaks.items():
        say(f"peak in {phase:<12}{format_bytes(count):>12}")
    say(f"memory of every step: {target}")
