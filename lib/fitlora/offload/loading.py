"""Weights on the way from their source to the host, without a stop on the device.

`PlacedWeights` stands between a skeleton and its source of weights. Tensors that have a place on the
host are written there, and the skeleton keeps a tensor on meta; the others pass as they are. A
checkpoint's bytes are read straight into their place, by several threads, once all are known; noise is
drawn in the order that a resident model asks for it, so that both get the same, and passes through the
device in parts.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fitlora.offload.transport import Transport, copy, outline, tensor_bytes
from fitlora.progress import progress
from fitlora.step.weights import CheckpointWeights, RandomWeights, Source

READERS = 8  # threads; one reads 1 to 3 GB/s from a warm page cache


@dataclass(frozen=True)
class _Read:
    """A tensor whose bytes in the checkpoint are those that are wanted."""

    name: str
    place: Tensor


class PlacedWeights:
    """`weights`, but for the tensors of `places`, by the id of the skeleton's parameter.

    Call `finish` when the skeleton is filled: until then places may be empty.
    """

    def __init__(self, weights: Source, places: Mapping[int, Tensor], transport: Transport) -> None:
        self.fresh = weights.fresh
        self._weights, self._places, self._transport = weights, places, transport
        self._reads: list[_Read] = []
        self._checkpoint = None
        if isinstance(weights, CheckpointWeights):
            self._checkpoint = weights.checkpoint
            # what is not read as it is (another dtype, scalars) is made on the host
            self._weights_here = CheckpointWeights(weights.checkpoint.folder, torch.device("cpu"))

    def frozen(self, name: str, like: Tensor) -> Tensor:
        place = self._places.get(id(like))
        if place is None:
            return self._weights.frozen(name, like)
        if self._transport.computes:
            self._write(name, like, place)
        return outline(like.shape, like.dtype)

    def adapter(self, name: str, like: Tensor) -> Tensor:
        return self._weights.adapter(name, like)

    def constant(self, name: str, value: Tensor) -> Tensor:
        return self._weights.constant(name, value)

    def finish(self) -> None:
        """Reads what is left to read and pins every buffer; raises ArtifactError as reading does."""
        checkpoint = self._checkpoint
        if checkpoint is not None and self._reads:
            total = sum(tensor_bytes(read.place) for read in self._reads)
            with (
                progress("loading weights to the host", total, in_bytes=True) as advance,
                ThreadPoolExecutor(READERS) as pool,
            ):

                def read(one: _Read) -> None:
                    checkpoint.read_into(one.name, 0, one.place.view(-1).view(torch.uint8))
                    advance(tensor_bytes(one.place))

                for _ in pool.map(read, self._reads):
                    pass
        self._reads = []
        self._transport.pin()

    def _write(self, name: str, like: Tensor, place: Tensor) -> None:
        fills = self._transport.fills(place)
        if isinstance(self._weights, RandomWeights):
            for where, noise in self._weights.parts(name, like):  # drawn in turn, wherever it goes
                if fills:
                    with self._transport.hidden():
                        copy(place.view(-1)[where], noise)
        if self._checkpoint is None or not fills:
            return
        module, _, leaf = name.rpartition(".")
        stored = f"{module}.weight.{leaf}" if leaf in ("absmax", "nested_absmax") else name
        if stored in self._checkpoint:
            info = self._checkpoint.info(stored)
            if info.dtype == like.dtype and info.shape == tuple(like.shape) and place.dim():
                self._reads.append(_Read(stored, place))
                return
        copy(place, self._weights_here.frozen(name, like))
