"""A model's folder, written shard by shard, that appears whole or not at all.

A new folder mirrors the one it is made from: the same shard files with other tensors in them, and
every other file (tokenizer, generation config, chat template) as it was. It grows under a hidden name
beside its place, on the same disk, and is renamed when it is complete. Tensors are made when their turn
to be written comes, in pieces where they are large, so that a shard need not fit in memory.

A run that was killed can be taken up again: with a key of all that the content follows from, shards
that it completed are used again, each after its checksum.

The bytes follow from the content alone: no date, no version of a library, keys in a fixed order.
"""

import errno
import glob
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fitlora.artifacts import read_json
from fitlora.checkpoint import DTYPES, TensorInfo
from fitlora.errors import ArtifactError, UserError

INDEX = "model.safetensors.index.json"
# Weights in any format, and pickles, which are weights or worse.
_WEIGHTS = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5",
    ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data", ".tflite", ".npz", ".npy", ".ot",
)  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_DONE = ".done"  # beside a shard that is complete: what was written


@dataclass(frozen=True)
class Pending:
    """A tensor that is made when it is written: whole, or as its flat pieces in order."""

    info: TensorInfo
    make: Callable[[], Tensor | Iterable[Tensor]]


@dataclass(frozen=True)
class Written:
    """What a file holds. bytes: of the tensors. checksum: CRC-32 of all of the file."""

    bytes: int
    checksum: int
    names: tuple[str, ...]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor | Pending]) -> Written:
    """Writes one safetensors file with the metadata {"format": "pt"}.

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
    text = len(text).to_bytes(8, "little") + text
    checksum = zlib.crc32(text)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(1) as aside:
        _reserve(file.fileno(), len(text) + end)
        _write(file, memoryview(text))
        for name in order:
            value = tensors[name]
            made = value.make() if isinstance(value, Pending) else value
            left = infos[name].bytes
            for piece in (made,) if isinstance(made, Tensor) else made:
                assert piece.dtype == infos[name].dtype, name
                left -= piece.nbytes
                if piece.numel():
                    data = piece.contiguous().view(-1).view(torch.uint8).numpy().data
                    # zlib and the system both let other threads run meanwhile
                    summing = aside.submit(zlib.crc32, data, checksum)
                    _write(file, data)
                    checksum = summing.result()
            assert left == 0, name
    path.chmod(0o644)
    return Written(end, checksum, tuple(order))


def _reserve(file: int, size: int) -> None:
    """Takes the file's place on the disk: a full one is known at once, and writing is faster then."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not every file system can
            raise


def _write(file: Any, data: memoryview) -> None:
    """All of it: one call of the system writes 2 GiB at most."""
    while data:
        data = data[file.write(data) :]


class ModelWriter:
    """Writes the folder `target` after the pattern of `source`; used as a context.

    resume: None, or a key of all that the content follows from; a run with the same key finds the
    shards that a former one completed before it was killed. Leaving the context before `finish` removes
    what was written, except that with a key and after anything but a UserError (an interrupt, a full
    disk) it stays for the next run. What another key's run left is removed by the next one. Raises
    UserError where `target` is something other than a model's folder, or lies in `source`.
    """

    def __init__(self, source: Path, target: Path, *, resume: str | None = None) -> None:
        self.source, self.target = source, target
        middle = "" if resume is None else f".{resume}"
        self._partial = target.parent / f".{target.name}{middle}.partial"
        self._resume = resume is not None
        self._shards: dict[str, Written] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "ModelWriter":
        source, target = self.source.resolve(), self.target.resolve()
        if target == source or source in target.parents:
            raise UserError(f"{self.target} lies in {self.source}, which it is made from")
        if self.target.exists() and not (
            self.target.is_dir()
            and ((self.target / "config.json").exists() or not any(self.target.iterdir()))
        ):
            raise UserError(f"{self.target} exists and is not a model's folder; move it away")
        for stale in self.target.parent.glob(f".{glob.escape(self.target.name)}*.partial"):
            if not (self._resume and stale == self._partial):
                shutil.rmtree(stale, ignore_errors=True)
        self._partial.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        keep = self._resume and kind is not None and not issubclass(kind, UserError)
        if not (keep and any(self._partial.glob(f"*{_DONE}"))):
            shutil.rmtree(self._partial, ignore_errors=True)

    def has(self, file: str) -> bool:
        """Whether a former run completed this shard; it then counts as written."""
        try:
            content = read_json(self._partial / f"{file}{_DONE}")
            checksum = 0
            with (self._partial / file).open("rb") as shard:
                while data := shard.read(1 << 24):
                    checksum = zlib.crc32(data, checksum)
        except (FileNotFoundError, ArtifactError):
            return False
        if checksum != content["checksum"]:
            return False
        with self._lock:
            self._shards[file] = Written(content["bytes"], checksum, tuple(content["names"]))
        return True

    def write_shard(self, file: str, tensors: Mapping[str, Tensor | Pending]) -> None:
        """Adds one file of weights; several threads may do so at once."""
        path = self._partial / f"{file}.part"
        written = write_safetensors(path, tensors)
        path.replace(self._partial / file)
        if self._resume:
            self._write_json(f"{file}{_DONE}", asdict(written))
        with self._lock:
            self._shards[file] = written

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
        total = sum(written.bytes for written in self._shards.values())
        if set(self._shards) != {"model.safetensors"}:
            files = {name: file for file, shard in self._shards.items() for name in shard.names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
            self._write_json(INDEX, index)
        for done in self._partial.glob(f"*{_DONE}"):
            done.unlink()
        if self.target.exists():
            shutil.rmtree(self.target)
        os.replace(self._partial, self.target)
        return total

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
        content = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {folder} is not a model's folder") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no object)")
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
