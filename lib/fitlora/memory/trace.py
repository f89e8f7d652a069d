"""Every allocation and free of the step, in order, by watching the operators run.

A `MemoryTrace` sees each operator's outputs. A storage that it has not seen is an allocation; the
moment its last tensor dies is the free. Nothing here knows what the step does, so the trace cannot
disagree with it. On tensors without content (on meta) this is the estimate; on the CPU's real tensors
it is the measurement, as the CPU has no allocator that could be asked.

Left out: memory that is not a tensor's (the CUDA context, library handles), and what operators
allocate and free inside, but for the kernels that say so in `fitlora.step.ops.scratch_bytes`.
"""

import itertools
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fitlora.memory.timeline import Block as TimelineBlock
from fitlora.memory.timeline import Segment, Timeline
from fitlora.step.ops import scratch_bytes

# Operators that write to their first argument and return it as it was.
_WRITERS = frozenset(
    f"aten::{name}_"
    for name in ("add", "addmm", "bitwise_xor", "copy", "div", "fill", "index_copy", "mul", "zero")
)
# In its formulas autograd writes into zeros that it has made, but for an operator that is watched, of
# which it asks a copy.
_aten = torch.ops.aten
_WRITTEN = {
    _aten.index_add.default: _aten.index_add_.default,
    _aten.index_put.default: _aten.index_put_.default,
    _aten.scatter.src: _aten.scatter_.src,
    _aten.scatter_add.default: _aten.scatter_add_.default,
}
BLOCK = 512  # the CUDA allocator hands out multiples of this


def rounded(count: int) -> int:
    """Bytes that the CUDA allocator takes from its pool for a tensor of `count` bytes."""
    return -(-count // BLOCK) * BLOCK


@dataclass(frozen=True)
class Block:
    """One storage: how large, and what for."""

    size: int
    phase: str
    module: str


@dataclass(frozen=True)
class Peak:
    """The most that was alive at one time since the trace began or was last reset."""

    bytes: int
    phase: str
    module: str
    operator: str
    live: dict[int, Block]


class MemoryTrace(TorchDispatchMode):
    """Counts live tensor storage; use as a context manager around the step.

    round_up: count as the CUDA allocator would (multiples of 512 bytes), or plain bytes. timeline:
    where every allocation and free is written down, which a long run has no room for; `Peak.live`
    is then empty, as the timeline tells the same. at_work: which of the step's devices that is told of
    an allocation; the counts here are of all of them. shapes: whether what is on meta stands for the
    device, and nothing else is counted; else meta is what is not counted.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        round_up: bool = True,
        timeline: Timeline | None = None,
        at_work: Callable[[], int] = lambda: 0,
        shapes: bool = False,
    ) -> None:
        super().__init__()
        self.timeline, self._at_work = timeline, at_work
        self._shapes = shapes
        self._segment = Segment(0, 0, "build", "")
        self._numbers: dict[int, int] = {}
        self._size = rounded if round_up else int
        self.live: dict[int, Block] = {}  # by number, in order of allocation
        self._next = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        # Models ask whether all of something is as in the plain case (a row is one sequence, nothing is
        # masked), and of what a step gives them it is. Other values are not known without content.
        self._alls: weakref.WeakSet[Any] = weakref.WeakSet()
        self.live_bytes = 0
        self.phase_peaks: dict[str, int] = defaultdict(int)
        self.phase = "build"
        self._modules: list[str] = []
        self._peak = Peak(0, self.phase, "", "", {})
        self._hooks: list[Any] = []
        if model is not None:
            self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Names allocations by the module that runs, from now on."""
        for name, module in model.named_modules():
            if not name:
                continue

            def enter(_: nn.Module, __: Any, name: str = name) -> None:
                self._modules.append(name)

            def leave(_: nn.Module, __: Any, ___: Any) -> None:
                self._modules.pop()

            self._hooks.append(module.register_forward_pre_hook(enter))
            self._hooks.append(module.register_forward_hook(leave, always_call=True))

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.timeline = None  # what dies from now on is no part of the run
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Books what happens inside under `phase`."""
        before, self.phase = self.phase, phase
        self._raise_phase_peak(self.live_bytes)
        segment = self._segment
        self.enter(phase=phase, part="")
        try:
            yield
        finally:
            self.phase = before
            self.enter(phase=before, part=segment.part)

    def enter(self, **changes: Any) -> None:
        """Begins another segment of the timeline: `step`, `micro_batch`, `phase` or `part` change."""
        if self.timeline is not None:
            self._segment = replace(self._segment, **changes)
            self.timeline.enter(self._segment)

    @property
    def peak(self) -> Peak:
        return self._peak

    def reset_peak(self) -> None:
        """Forgets earlier peaks; what is alive now is the new one."""
        self._peak = Peak(self.live_bytes, self.phase, "", "", dict(self.live))
        self.phase_peaks.clear()

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made before the trace began."""
        for tensor in tensors:
            self._see(tensor)
        self._raise_peak("")

    def numbers_of(self, tensors: Iterable[Tensor]) -> set[int]:
        """The numbers that the timeline has for the blocks that these tensors lie in."""
        return {self._numbers[key] for key in self.blocks_of(tensors)}

    def alive(self) -> set[int]:
        """The timeline's numbers of the blocks that are alive."""
        return {self._numbers[key] for key in self.live}

    def blocks_of(self, tensors: Iterable[Tensor]) -> set[int]:
        """The numbers of the blocks that these tensors lie in, as `Peak.live` has them."""
        found = set()
        for tensor in tensors:
            key = self._known.get(tensor.untyped_storage())
            if key is not None:
                found.add(key)
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # what a recomputed layer does itself has gradients switched on
        if func in _WRITTEN and torch._C._current_graph_task_id() != -1:
            func = func if torch.is_grad_enabled() else _WRITTEN[func]
        name = func._schema.name
        scratch = scratch_bytes.get(name)
        extra = 0 if scratch is None else sum(self._size(block) for block in scratch(*args))
        if name == "aten::_local_scalar_dense" and args[0].untyped_storage() in self._alls:
            return True
        # what only writes has no result to find out, where there are no numbers
        if self._shapes and name in _WRITERS and args[0].is_meta:
            return args[0]
        void = self._shapes and not func._schema.returns
        out = None if void else func(*args, **(kwargs or {}))
        if self._shapes and name == "aten::all" and isinstance(out, Tensor):
            self._alls.add(out.untyped_storage())
        grown = False
        for index, leaf in enumerate((out,) if isinstance(out, Tensor) else tree_leaves(out)):
            if isinstance(leaf, Tensor) and self._see(leaf, name):
                grown = True
                inputs = args[0] if args and isinstance(args[0], list | tuple) else ()
                if self.timeline is not None and any(isinstance(x, Tensor) for x in inputs):
                    self._attribute(leaf, inputs, None if leaf is out else index)
        if extra and self.timeline is not None:
            module = self._modules[-1] if self._modules else ""
            block = Block(extra, self.phase, module)
            self.timeline.free(self._note(block, name))
        if grown or extra:  # a kernel has its outputs and its scratch at the same time
            self._raise_peak(name, extra)
        return out

    def _attribute(self, made: Tensor, inputs: Sequence[Any], index: int | None) -> None:
        """What was made of many tensors outside of the layers is for those that they are for.

        index: of the input that it was made of, None where it was made of all alike.
        """
        assert self.timeline is not None
        if self.timeline.layer is not None:
            return
        number = self._numbers[self._known[made.untyped_storage()]]
        if index is not None and index < len(inputs):
            layers = list(self._parts_of(inputs[index]))
            self.timeline.layers[number] = layers[0] if len(layers) == 1 else None
            return
        parts = [self._parts_of(tensor) for tensor in inputs]
        if all(parts):
            total: Counter[int] = Counter()
            for part in parts:
                total.update(part)
            block = self.timeline.blocks[number]
            self.timeline.blocks[number] = replace(block, parts=dict(total))

    def _parts_of(self, tensor: Any) -> Mapping[int, int]:
        """A tensor's bytes by the layers that they are for; empty where that is not known.

        A block that has a part of each of several layers has them behind each other.
        """
        assert self.timeline is not None
        key = self._known.get(tensor.untyped_storage()) if isinstance(tensor, Tensor) else None
        if key is None:
            return {}
        number, size = self._numbers[key], tensor.numel() * tensor.element_size()
        parts, layer = self.timeline.blocks[number].parts, self.timeline.layers[number]
        if parts is None:
            return {} if layer is None else {layer: size}
        if size == sum(parts.values()):
            return parts
        ends = itertools.accumulate(parts.values())
        start = tensor.storage_offset() * tensor.element_size()
        return {next(n for n, end in zip(parts, ends, strict=True) if start < end): size}

    def _see(self, tensor: Tensor, operator: str = "") -> bool:
        if tensor.is_meta is not self._shapes:
            return False
        storage = tensor.untyped_storage()
        if storage in self._known:
            return False
        key, self._next = self._next, self._next + 1
        self._known[storage] = key
        block = Block(
            self._size(storage.nbytes()), self.phase, self._modules[-1] if self._modules else ""
        )
        if self.timeline is not None:
            self._numbers[key] = self._note(block, operator)
        self.live[key] = block
        self.live_bytes += block.size
        weakref.finalize(storage, self._free, key).atexit = False
        return True

    def _free(self, key: int) -> None:
        self.live_bytes -= self.live.pop(key).size
        if self.timeline is not None:
            self.timeline.free(self._numbers[key])

    def _note(self, block: Block, operator: str) -> int:
        assert self.timeline is not None
        return self.timeline.allocate(
            TimelineBlock(
                block.size,
                self._segment,
                block.module,
                operator,
                device=self._at_work(),
            )
        )

    def _raise_peak(self, operator: str, extra: int = 0) -> None:
        now = self.live_bytes + extra
        self._raise_phase_peak(now)
        if now > self._peak.bytes:
            module = self._modules[-1] if self._modules else ""
            live = dict(self.live) if self.timeline is None else {}
            if extra and self.timeline is None:
                live[-1] = Block(extra, self.phase, module)
            self._peak = Peak(now, self.phase, module, operator, live)

    def _raise_phase_peak(self, now: int) -> None:
        self.phase_peaks[self.phase] = max(self.phase_peaks[self.phase], now)
