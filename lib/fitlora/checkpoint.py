"""Reading a model's safetensors files by tensor name. Nothing else is ever read back."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from fitlora.errors import ArtifactError, UserError


class Checkpoint:
    """The safetensors files of a model's folder, by tensor name. Files are opened when needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                self.shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
                raise ArtifactError(f"{index} is damaged: {error!r}") from None
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
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ArtifactError(f"{self.folder / file} cannot be read: {error}") from None
        return self._files[file]

    def __contains__(self, name: str) -> bool:
        return name in self.shards

    def tensor(self, name: str) -> Tensor:
        """The tensor, on the CPU; raises ArtifactError where there is none of that name."""
        if name not in self.shards:
            raise ArtifactError(f"{self.folder} has no tensor {name}")
        tensor: Tensor = self._open(self.shards[name]).get_tensor(name)
        return tensor
