"""From a 16-bit checkpoint to a 4-bit one, tensor by tensor, in little memory.

The new folder mirrors the source: the same shards, with each linear layer's weight replaced by its
4-bit parts (`layout`) and everything else in bfloat16, and a config that stock transformers loads.
Which layers are quantized follows from the model's definition and not from the names in the files, so
that what is stored is exactly what the training step expects to find. Everything that can be refused
is refused by its name from the files' headers, before the first weight is read.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fitlora.checkpoint import Checkpoint, TensorInfo
from fitlora.console import say
from fitlora.errors import UserError
from fitlora.model import empty_model, expert_names, linear_names, load_config
from fitlora.progress import progress
from fitlora.quantization.layout import (
    QuantSpec,
    find_state,
    nested_code,
    part_names,
    read_state,
    spec_of,
)
from fitlora.quantization.reading import read_ahead
from fitlora.quantization.weight import CHUNK_ELEMENTS, quantize_pieces, require_finite
from fitlora.quantization.writer import (
    ModelWriter,
    Pending,
    bfloat16_config,
    read_config,
)
from fitlora.units import format_bytes

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SHARDS = 4  # that are quantized, and wait in memory to be written, at once
# Weights that are quantized at once. On a GPU a thread waits for the disk, the link and the kernels in
# turn; on the CPU PyTorch splits the work of one weight.
WORKERS = {"cuda": 4, "cpu": 1}
_SHOWN = 3  # names in a message that could have thousands


def quantize_checkpoint(
    source: Path,
    target: Path,
    *,
    spec: QuantSpec | None,
    keep: Sequence[str] = (),
    trust_remote_code: bool = False,
    device: torch.device,
) -> None:
    """Writes the model in `source` to `target`, its linear layers quantized by `spec`.

    source: a folder with config.json and safetensors. spec: None leaves all in 16 bits. keep: linear
    layers that stay in 16 bits, as `fitlora.model.linear_names` reads it; the head always does.
    device: where weights are quantized.

    Everything that stays is stored in bfloat16; integers as they are. A source that bitsandbytes
    quantized in the same way goes through as it is. `target` is replaced at the end, when all is
    written; a run that was killed goes on after its last shard. Host memory: four shards of 4-bit
    weights, which are about one of the source, and a few pieces. GPU memory: four pieces, each
    with about 12 bytes a weight of CHUNK_ELEMENTS.

    Raises UserError, with the name of the tensor, layer or file, for what cannot be quantized, and
    ArtifactError for damaged files.
    """
    content = read_config(source)
    checkpoint = _open(source)
    model = _empty_model(source, trust_remote_code)
    everywhere = list(linear_names(model))
    _check_keep(keep, everywhere, model)
    layers = list(linear_names(model, keep)) if spec is not None else []
    if spec is not None and not layers:
        raise UserError(
            f"{source}: {type(model).__name__} has no linear layer to quantize; set "
            "quantization.bits: 16"
        )
    weights = {f"{name}.weight": cast(nn.Linear, model.get_submodule(name)) for name in layers}
    infos = {name: checkpoint.info(name) for name in sorted(checkpoint.shards)}
    _check_names(model, weights, checkpoint)
    done = _check_stored(source, content, checkpoint, spec, weights)
    if not done:
        _check_weights(source, weights, infos)
    parts = {part for name in weights for part in part_names(name, spec)} if done and spec else ()
    _check_rest(
        source, [name for name in infos if name not in weights and name not in parts], infos
    )
    _tell(model, weights, infos, parts, done)

    config = bfloat16_config(content)
    if spec is not None:
        kept = [name for name in everywhere if f"{name}.weight" not in weights]
        config["quantization_config"] = quantization_config(spec, [*_head_names(model), *kept])
    files, total = checkpoint.files(), sum(info.bytes for info in infos.values())
    key = _fingerprint(checkpoint, content, spec, sorted(weights))
    with ModelWriter(source, target, resume=key) as writer:
        left = {file: names for file, names in files.items() if not writer.has(file)}
        if len(left) < len(files):
            say(f"{len(files) - len(left)} of {len(files)} shards were done before, and stay")
        work = _Work(checkpoint, infos, spec, frozenset(() if done else weights), parts, device)
        title = "copying" if done or spec is None else "quantizing"
        size_left = sum(infos[n].bytes for names in left.values() for n in names)
        with progress(title, size_left, in_bytes=True) as advance:
            work.write(writer, left, advance)
        size = writer.finish(config)
    how = "stored in 16 bits" if spec is None else f"{len(layers)} linear layers in {spec.type}"
    say(f"{target}: {how}, {format_bytes(total)} became {format_bytes(size)}")


@dataclass(frozen=True)
class _Work:
    """What becomes of each tensor. chosen: to be quantized. parts: stored in 4 bits already."""

    checkpoint: Checkpoint
    infos: dict[str, TensorInfo]
    spec: QuantSpec | None
    chosen: frozenset[str]
    parts: Container[str]
    device: torch.device

    def write(
        self, writer: ModelWriter, files: dict[str, list[str]], advance: Callable[[int], None]
    ) -> None:
        """Reads, quantizes and writes at once: each weight and each shard in a thread of its own."""
        with (
            ThreadPoolExecutor(SHARDS) as shards,
            ThreadPoolExecutor(WORKERS[self.device.type], initializer=self._start) as workers,
        ):
            writing = [
                shards.submit(self._write_shard, writer, file, names, workers, advance)
                for file, names in files.items()
            ]
            try:
                for future in as_completed(writing):
                    future.result()
            finally:
                shards.shutdown(wait=False, cancel_futures=True)
                workers.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        """Gives a thread its own queue on the GPU, so that none waits for another's work."""
        if self.device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(self.device))

    def _write_shard(
        self,
        writer: ModelWriter,
        file: str,
        names: list[str],
        workers: ThreadPoolExecutor,
        advance: Callable[[int], None],
    ) -> None:
        tensors: dict[str, Tensor | Pending] = {}
        waiting = []
        for name in names:
            info = self.infos[name]
            if name in self.chosen:
                waiting.append(workers.submit(self._quantized, name, advance))
            else:
                stored = _stored_info(info, as_it_is=name in self.parts)
                make = functools.partial(stored_pieces, self.checkpoint, name, stored, advance)
                tensors[name] = Pending(stored, make)
        for future in waiting:
            tensors.update(future.result())
        writer.write_shard(file, tensors)

    def _quantized(self, name: str, advance: Callable[[int], None]) -> dict[str, Tensor]:
        assert self.spec is not None
        pinned = self.device.type == "cuda"
        with contextlib.closing(
            read_ahead(self.checkpoint, name, CHUNK_ELEMENTS, pinned=pinned)
        ) as pieces:
            own = self._moved(pieces, advance)
            return quantize_pieces(name, self.infos[name], own, self.spec, self.device)

    def _moved(self, pieces: Iterable[Tensor], advance: Callable[[int], None]) -> Iterator[Tensor]:
        for piece in pieces:
            yield piece.to(self.device, non_blocking=True)  # its codes are waited for
            advance(piece.nbytes)


def _fingerprint(checkpoint: Checkpoint, *facts: object) -> str:
    """A key of the source's files, of `facts`, and of the code that makes one from the other.

    A source's file counts as the same by its name, size, time of change and header.
    """
    digest = hashlib.sha256(repr(facts).encode())
    for file in checkpoint.files():
        path = (checkpoint.folder / file).resolve()
        stat = path.stat()
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode())
        with path.open("rb") as content:
            digest.update(content.read(int.from_bytes(content.read(8), "little")))
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:16]


def quantization_config(spec: QuantSpec, skip: Iterable[str]) -> dict[str, Any]:
    """What config.json says of the quantization, in transformers' terms.

    skip: the linear layers that are not quantized, by their full names. The block size is not among
    the terms: each weight's own state has it.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": spec.type,
        "bnb_4bit_use_double_quant": spec.double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip),
        "llm_int8_threshold": 6.0,
    }


def _open(source: Path) -> Checkpoint:
    weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json", ".h5", ".gguf")
    if not any(path.name.endswith(weights) for path in source.iterdir()):
        raise UserError(
            f"{source} has a config and no weights; that is enough to estimate and to probe, and "
            "quantizing and training need its safetensors files"
        )
    return Checkpoint(source)


def _empty_model(source: Path, trust_remote_code: bool) -> nn.Module:
    config = load_config(source, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return empty_model(config, dtype=torch.bfloat16, trust_remote_code=trust_remote_code)


def _head_names(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [name for name, module in model.named_modules() if module is head]


def _some(names: Iterable[str]) -> str:
    found = sorted(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def _check_keep(keep: Sequence[str], everywhere: list[str], model: nn.Module) -> None:
    for part in keep:
        if part not in _head_names(model) and len(list(linear_names(model, [part]))) == len(
            everywhere
        ):
            raise UserError(
                f"quantization.keep_in_16_bits: {part} is no part of any linear layer's name, like "
                f"{_some(everywhere)}"
            )


def _check_names(model: nn.Module, weights: Iterable[str], checkpoint: Checkpoint) -> None:
    """Files may hold more than the model has (old buffers), and nothing less.

    weights: of linear layers that are quantized, which have to be stored as the model has them.
    """
    source, stored = checkpoint.folder, checkpoint.shards.keys()
    wanted = {name for name, _ in model.named_parameters()}  # tied ones once
    missing = wanted - stored - checkpoint.converted.keys()
    if missing:
        raise UserError(f"{source} lacks {len(missing)} tensor(s): {_some(missing)}")
    other = set(weights) - stored
    if other:
        raise UserError(
            f"{source} stores {len(other)} linear layer(s) under other names than the model has: "
            f"{_some(other)}; load it in transformers and save_pretrained with "
            "save_original_format=False"
        )


def _check_stored(
    source: Path,
    content: dict[str, Any],
    checkpoint: Checkpoint,
    spec: QuantSpec | None,
    weights: dict[str, nn.Linear],
) -> bool:
    """Whether the source's weights are stored by `spec` already; raises UserError where otherwise."""
    stored = content.get("quantization_config")
    quantized = [
        name for name in checkpoint.shards if find_state(checkpoint.shards, name) is not None
    ]
    if stored is None and not quantized:
        return False
    method = (stored or {}).get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or not quantized:
        raise UserError(
            f"{source} is quantized already, by {method}"
            + (" to 8 bits" if (stored or {}).get("load_in_8bit") else "")
            + "; give the 16-bit model"
        )
    if spec is None:
        raise UserError(
            f"{source} is quantized to 4 bits, so its 16-bit weights are gone; set "
            "quantization.bits: 4, or give the 16-bit model"
        )
    other = set(quantized) ^ set(weights)
    if other:
        raise UserError(
            f"{source} is quantized already, in other layers than quantization.keep_in_16_bits "
            f"says: {_some(other)}"
        )
    for name, layer in weights.items():
        key = find_state(checkpoint.shards, name)
        assert key is not None
        state = read_state(checkpoint, key)
        found, shape = spec_of(state), (layer.out_features, layer.in_features)
        if tuple(state["shape"]) != shape:
            raise UserError(
                f"{source}: {name} is {tuple(state['shape'])}, and config.json makes it {shape}"
            )
        if found != spec:
            raise UserError(
                f"{source} is quantized already: {name} is {_words(found)}, and params.yaml asks for "
                f"{_words(spec)}; change quantization.*, or give the 16-bit model"
            )
        parts = part_names(name, spec)
        missing = [part for part in parts if part not in checkpoint]
        if missing:
            raise UserError(f"{source} lacks {len(missing)} tensor(s): {_some(missing)}")
        if checkpoint.info(name).dtype != torch.uint8:
            raise UserError(
                f"{source}: {name} is stored as {checkpoint.info(name).dtype} (quant_storage), and "
                "FitLoRA reads uint8; give the 16-bit model"
            )
        nested_map = f"{name}.nested_quant_map"
        if spec.double and not torch.equal(checkpoint.tensor(nested_map), nested_code()):
            raise UserError(f"{source}: {nested_map} is not bitsandbytes' code book of scales")
    return True


def _words(spec: QuantSpec) -> str:
    double = "with" if spec.double else "without"
    return f"{spec.type} in blocks of {spec.block_size} {double} double quantization"


def _check_weights(
    source: Path, weights: dict[str, nn.Linear], infos: dict[str, TensorInfo]
) -> None:
    for name, layer in weights.items():
        info, shape = infos[name], (layer.out_features, layer.in_features)
        if info.shape != shape:
            raise UserError(f"{source}: {name} is {info.shape}, and config.json makes it {shape}")
        if info.dtype not in FLOATS:
            raise UserError(f"{source}: {name} is {info.dtype}; weights have 16 or 32 bits")


def _check_rest(source: Path, names: Iterable[str], infos: dict[str, TensorInfo]) -> None:
    for name in names:
        if infos[name].dtype == torch.float64:
            raise UserError(f"{source}: {name} is float64; weights have 16 or 32 bits")


def _tell(
    model: nn.Module,
    weights: Iterable[str],
    infos: dict[str, TensorInfo],
    parts: Iterable[str],
    done: bool,
) -> None:
    """Says what a user might not expect."""
    if done:
        say("the source is quantized in this way already, and goes through as it is")
    experts = expert_names(model)
    if experts:
        say(
            f"{len(experts)} weights hold many experts in one 3-D tensor and stay in 16 bits: "
            f"{_some(experts)}"
        )
    rest = set(infos) - set(weights) - set(parts)
    for dtype in (torch.float32, torch.float16):
        names = [name for name in rest if infos[name].dtype == dtype]
        if names:
            say(
                f"{len(names)} tensors are {str(dtype).removeprefix('torch.')} and become "
                f"bfloat16: {_some(names)}"
            )


def _stored_info(info: TensorInfo, *, as_it_is: bool) -> TensorInfo:
    """What a tensor that is not quantized is stored as: bfloat16 if it is floating."""
    if as_it_is or info.dtype not in FLOATS:
        return info
    return TensorInfo(torch.bfloat16, info.shape)


def stored_pieces(
    checkpoint: Checkpoint, name: str, info: TensorInfo, advance: Callable[[int], None]
) -> Iterator[Tensor]:
    """A tensor that is not quantized, in pieces of the dtype that it is stored in."""

    def convert(source: Tensor) -> Tensor:
        piece = source.to(info.dtype)
        if info.dtype.is_floating_point:
            require_finite(name, piece)
        return piece

    element_bytes = checkpoint.info(name).dtype.itemsize
    for piece in read_ahead(checkpoint, name, CHUNK_ELEMENTS, then=convert):
        yield piece
        advance(piece.numel() * element_bytes)
