"""Reading a model's safetensors files by tensor name. Nothing else is ever read back."""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fitlora.artifacts import read_json
from fitlora.conversion import Conversion, conversions
from fitlora.errors import ArtifactError, UserError

# The dtypes of the safetensors format that FitLoRA reads; float8 and the like are refused by name.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """The safetensors files of a model's folder, by tensor name. Files are opened when needed.

    shards: the file of each tensor, by the name that it is stored under.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._starts: dict[str, dict[str, int]] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            content = read_json(index)
            try:
                self.shards: dict[str, str] = dict(content["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise ArtifactError(f"{index} is damaged: {error!r}") from None
            for file in self.shards.values():
                self._check(file)
        elif (folder / "model.safetensors").is_file():
            self.shards = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            raise UserError(
                f"{folder} has no model.safetensors and no index of shards; FitLoRA reads safetensors "
                "only (a pickle checkpoint is converted by loading it in transformers and "
                "save_pretrained)"
            )

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._files:
            self._check(file)
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ArtifactError(f"{self.folder / file} cannot be read: {error}") from None
        return self._files[file]

    def __contains__(self, name: str) -> bool:
        return name in self.shards

    @functools.cached_property
    def converted(self) -> dict[str, Conversion]:
        """The model's tensors that are stored under other names, or in parts, by the model's names."""
        return conversions(self.folder, self.shards)

    def tensor(self, name: str) -> Tensor:
        """The tensor, on the CPU; raises ArtifactError where there is none of that name.

        name: as it is stored, or as the model has it.
        """
        if name not in self.shards:
            if name not in self.converted:
                raise ArtifactError(f"{self.folder} has no tensor {name}")
            try:
                return self.converted[name].make(self.tensor)
            except RuntimeError as error:  # parts of unlike shapes, or fewer of one kind
                raise ArtifactError(
                    f"{self.folder}: the parts of {name} do not fit together: {error}"
                ) from None
        from safetensors import SafetensorError

        try:
            tensor: Tensor = self._open(self.shards[name]).get_tensor(name)
        except SafetensorError as error:
            path = self.folder / self.shards[name]
            raise ArtifactError(f"{path} has no tensor {name}: {error}") from None
        return tensor

    def info(self, name: str) -> TensorInfo:
        """A tensor's dtype and shape, from the header alone.

        Raises ArtifactError where the file is missing, cut short or without that tensor, and
        UserError for a dtype that is not read.
        """
        from safetensors import SafetensorError

        path = self.folder / self.shards[name]
        try:
            part = self._open(self.shards[name]).get_slice(name)
        except SafetensorError as error:
            raise ArtifactError(f"{path} has no tensor {name}: {error}") from None
        kind = part.get_dtype()
        if kind not in DTYPES:
            raise UserError(
                f"{path}: {name} is stored as {kind}, which FitLoRA does not read; convert the "
                "model to 16 bits first"
            )
        return TensorInfo(DTYPES[kind], tuple(part.get_shape()))

    def read_into(self, name: str, start: int, buffer: Tensor) -> None:
        """Fills `buffer`, uint8 on the CPU, with the tensor's bytes from `start` on; for any thread.

        Raises ArtifactError where the file has become too short or cannot be read.
        """
        path = self.folder / self.shards[name]
        view = memoryview(buffer.numpy().data)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(self._start(name) + start)
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise ArtifactError(f"{path} ends within {name}; it was cut short")
                    view = view[count:]
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from None

    def _start(self, name: str) -> int:
        """Where a tensor's bytes begin in its file."""
        file = self.shards[name]
        if file not in self._starts:
            self._open(file)  # checks the header
            with (self.folder / file).open("rb") as content:
                length = int.from_bytes(content.read(8), "little")
                header = json.loads(content.read(length))
            header.pop("__metadata__", None)
            self._starts[file] = {
                key: 8 + length + value["data_offsets"][0] for key, value in header.items()
            }
        return self._starts[file][name]

    def files(self) -> dict[str, list[str]]:
        """The tensors' names by the file that they lie in, both in order.

        Raises ArtifactError for an index that points out of the folder.
        """
        files: dict[str, list[str]] = {}
        for name in sorted(self.shards):
            files.setdefault(self.shards[name], []).append(name)
        for file in files:
            self._check(file)
        return dict(sorted(files.items()))

    def _check(self, file: object) -> None:
        """Raises ArtifactError for a name that leads out of the folder, or is none."""
        if not isinstance(file, str) or not file or Path(file).name != file or "\0" in file:
            raise ArtifactError(f"{self.folder}: the index names {file!r}, not a plain file")
