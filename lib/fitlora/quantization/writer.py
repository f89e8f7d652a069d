"""A model's folder, written shard by shard, that appears whole or not at all.

A new folder mirrors the one it is made from: the same shard files with other tensors in them, and
every other file (tokenizer, generation config, chat template) as it was. It grows under a hidden name
beside its place and is renamed when it is complete. Tensors are made when their turn to be written
comes, so that a shard need not fit in memory.

The bytes follow from the content alone: no date, no version of a library, keys in a fixed order.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fitlora.checkpoint import DTYPES, TensorInfo
from fitlora.console import say
from fitlora.errors import UserError
from fitlora.units import format_bytes

INDEX = "model.safetensors.index.json"
# Weights in any format, and pickles, which are weights or worse.
_WEIGHTS = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5",
    ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".tflite", ".npz", ".npy", ".ot",
)  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when it is written."""

    info: TensorInfo
    make: Callable[[], Tensor]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor | Pending]) -> int:
    """Writes one safetensors file with the metadata {"format": "pt"}; returns the tensors' bytes.

    Wider dtypes come first, as the format's own library has it, so that every tensor is aligned;
    then by name. The library itself would want all tensors at once.
    """
    infos = {
        name: value.info
        if isinstance(value, Pending)
        else TensorInfo(value.dtype, tuple(value.shape))
        for name, value in tensors.items()
    }
    order = sorted(tensors, key=lambda name: (-infos[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + infos[name].bytes
        header[name] = {
            "dtype": _CODES[infos[name].dtype],
            "shape": list(infos[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = tensors[name]
            tensor = value.make() if isinstance(value, Pending) else value
            assert TensorInfo(tensor.dtype, tuple(tensor.shape)) == infos[name], name
            if tensor.numel():
                file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    path.chmod(0o644)
    return end


class ModelWriter:
    """Writes the folder `target` after the pattern of `source`; used as a context.

    Leaving the context before `finish`, by an error or an interrupt, removes what was written; what a
    killed run left behind is removed by the next one. Raises UserError where `target` is something
    other than a model's folder, or lies in `source`.
    """

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self._partial = target.parent / f".{target.name}.partial"
        self._shards: dict[str, str] = {}
        self._total_bytes = 0

    def __enter__(self) -> "ModelWriter":
        source, target = self.source.resolve(), self.target.resolve()
        if target == source or source in target.parents:
            raise UserError(f"{self.target} lies in {self.source}, which it is made from")
        if self.target.exists() and not (
            self.target.is_dir()
            and ((self.target / "config.json").exists() or not any(self.target.iterdir()))
        ):
            raise UserError(f"{self.target} exists and is not a model's folder; move it away")
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)

    def write_shard(self, file: str, tensors: Mapping[str, Tensor | Pending]) -> None:
        """Adds one file of weights."""
        self._total_bytes += write_safetensors(self._partial / file, tensors)
        self._shards.update(dict.fromkeys(tensors, file))

    def finish(self, config: Mapping[str, Any]) -> int:
        """Adds all that is not weights, puts the folder in its place; returns the weights' bytes.

        config: the new config.json.
        """
        for file in other_files(self.source):
            copy = self._partial / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source / file, copy)
            copy.chmod(0o644)
        self._write_json("config.json", config)
        if set(self._shards.values()) != {"model.safetensors"}:
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": dict(sorted(self._shards.items())),
            }
            self._write_json(INDEX, index)
        if self.target.exists():
            shutil.rmtree(self.target)
        os.replace(self._partial, self.target)
        return self._total_bytes

    def _write_json(self, file: str, content: Mapping[str, Any]) -> None:
        path = self._partial / file
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        path.chmod(0o644)


def other_files(folder: Path) -> list[Path]:
    """What belongs to a model beside its config and weights, relative to `folder`, in order.

    Left out: weights in any format and pickles, hidden files, and folders that hold such weights
    (another format's export, with that format's config in it).
    """
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "config.json" or _is_weights(path):
            continue
        if path.is_file():
            found.append(path.relative_to(folder))
        elif path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file()]
            if not any(_is_weights(p) for p in inside):
                found += [p.relative_to(folder) for p in inside if not _is_hidden(p, folder)]
    return found


def _is_weights(path: Path) -> bool:
    return path.name.endswith(_WEIGHTS)


def _is_hidden(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return any(part.startswith(".") or part == "__pycache__" for part in parts)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands, keys in their order; raises UserError where it cannot be read."""
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {folder} is not a model's folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return content


def bfloat16_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model stored in bfloat16 and not quantized."""
    new = _with_bfloat16({k: v for k, v in content.items() if k != "quantization_config"})
    if "dtype" not in new and "torch_dtype" not in new:
        new["dtype"] = "bfloat16"
    return new


def _with_bfloat16(content: Mapping[str, Any]) -> dict[str, Any]:
    new = dict(content)
    for key, value in content.items():
        if key in ("dtype", "torch_dtype"):  # the newer and the older name
            new[key] = "bfloat16"
        elif isinstance(value, dict):  # the parts of a composite model have their own
            new[key] = _with_bfloat16(value)
    return new


@contextmanager
def progress(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Shows how far the work is, its rate and the time left; gives what to call with bytes done.

    A bar on a terminal, and elsewhere a line every 10 seconds.
    """
    if sys.stdout.isatty():
        with _bar(title, total_bytes) as advance:
            yield advance
        return
    start = spoken = time.monotonic()
    done = 0

    def speak(count: int) -> None:
        nonlocal done, spoken
        done += count
        now = time.monotonic()
        if now - spoken >= PLAIN_SECONDS and done < total_bytes:
            spoken = now
            rate = done / (now - start)
            say(
                f"{title}: {format_bytes(done)} of {format_bytes(total_bytes)}, "
                f"{format_bytes(int(rate))}/s, {(total_bytes - done) / max(rate, 1):.0f} s left"
            )

    yield speak


@contextmanager
def _bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=total_bytes)
        yield lambda count: bar.advance(task, count)
