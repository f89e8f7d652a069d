"""An optimizer whose work and state are on the host.

The device keeps the parameters, in fp32 or bf16. On the host lie fp32 masters of them and all that the
wrapped optimizer keeps; it steps there, on gradients that came down, and the parameters go up again.
What it saves is the state (8 bytes a parameter with AdamW) and, under bf16, the masters; with
`offload_gradients` the gradients as well, which then leave the device as backward makes them.

All of the host's work is done by one thread of its own, in the order that it is asked for, beside the
device's: gradients are taken in as they come down, and an update is cut into buckets of parameters, of
which one goes up while the next is computed. The host's buffers have the parameters in the order of the
device's memory, so that neighbours there are one copy and one operation: a layer's adapters are many
small matrices, and the thread shares an interpreter with the one that launches kernels.

With `overlap` a step does not wait for its update: who is about to compute with a parameter asks for it
with `receive`, so that the next forward's lowest layers go while the higher ones' parameters are still
made. Only PyTorch's own optimizers are cut, whose update of a parameter depends on no other; a foreign
one may count steps or measure distances over all of them.

Masters follow their parameters: what was written to a parameter since the last step is seen by its
version and taken over, but for values that are the master's own, rounded. (Writing through `.data`
leaves no trace, and is seen only before the first step.)
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fitlora.errors import UserError
from fitlora.offload.transport import (
    Mark,
    Transport,
    aligned,
    make_transport,
    outline,
    tensor_bytes,
    untraced,
    view_as,
)

# Operators of the host's thread use a quarter of the cores, or so many: they wait for memory more than
# for cores, and OpenMP's threads spin for a while after each, so that on all cores they would keep the
# thread that launches kernels from its own.
MOST_THREADS = 8
BUCKET_BYTES = 16 * 2**20  # of masters: as little as keeps what a bucket costs by itself small
_IN_FLIGHT = 16  # gradients on their way down that autograd's backward leaves alive on the device
PURPOSE, STATE_PURPOSE = "optimizer masters and gradients", "optimizer state"


_Sent = tuple[list[Tensor], list[Mark]]  # gradients on their way down, and their copies' marks


@dataclass
class _Master:
    """One parameter's host side. The wires are pinned and have the parameter's dtype."""

    parameter: Tensor
    master: nn.Parameter  # fp32
    gradient: Tensor  # fp32
    up: Tensor  # wire; under fp32 the master itself
    down: Tensor  # wire; under fp32 and gradients that stay on the device, the gradient itself
    place: int  # in the order of the host's buffers
    version: int | None = None  # of the parameter, when the master was last like it
    has_gradient: bool = False
    norm: Tensor | None = None  # of the gradient
    taken: "Future[None] | None" = None  # the gradient that came down last, into `gradient`
    updated: "Future[Mark] | None" = None  # the parameter, as the last step made it


def _follows(tensor: Tensor, before: Tensor) -> bool:
    """Whether a tensor lies in memory where the one before it ends."""
    return (
        tensor.is_contiguous()
        and before.is_contiguous()
        and tensor.untyped_storage()._cdata == before.untyped_storage()._cdata
        and tensor.storage_offset() == before.storage_offset() + before.numel()
    )


def _joined(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of tensors of one size, those that are neighbours on both sides as one flat pair."""
    run: list[tuple[Tensor, Tensor]] = []

    def whole() -> tuple[Tensor, Tensor]:
        first, second = run[0]
        if len(run) == 1:
            return first, second
        size = (sum(one.numel() for one, _ in run),)
        with untraced():  # views of what a memory trace knows already, or is not to know
            return (
                first.as_strided(size, (1,), first.storage_offset()),
                second.as_strided(size, (1,), second.storage_offset()),
            )

    for pair in pairs:
        if run and not all(map(_follows, pair, run[-1])):
            yield whole()
            run = []
        run.append(pair)
    if run:
        yield whole()


def _by_memory(tensors: Sequence[Tensor]) -> list[int]:
    """The numbers of tensors in the order of memory, storages in the order that they come in."""
    storages: dict[int, int] = {}
    keys = []
    for tensor in tensors:
        storage = storages.setdefault(tensor.untyped_storage()._cdata, len(storages))
        keys.append((storage, tensor.storage_offset()))
    return sorted(range(len(tensors)), key=keys.__getitem__)


class _StateByMaster(MutableMapping[Tensor, dict[str, Any]]):
    """`states`, by the device's parameters, for who knows their masters; made when asked for."""

    def __init__(
        self, states: dict[Tensor, dict[str, Any]], parameters: dict[nn.Parameter, Tensor]
    ) -> None:
        self._states, self._parameters = states, parameters
        self._masters = {parameter: master for master, parameter in parameters.items()}

    def __getitem__(self, master: Tensor) -> dict[str, Any]:
        return self._states.setdefault(self._parameters[cast(nn.Parameter, master)], {})

    def __setitem__(self, master: Tensor, state: dict[str, Any]) -> None:
        self._states[self._parameters[cast(nn.Parameter, master)]] = state

    def __delitem__(self, master: Tensor) -> None:
        del self._states[self._parameters[cast(nn.Parameter, master)]]

    def __iter__(self) -> Iterator[Tensor]:
        return (self._masters[parameter] for parameter in self._states)

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, master: object) -> bool:
        return self._parameters.get(cast(nn.Parameter, master)) in self._states


class CPUOffloadOptimizer(torch.optim.Optimizer):
    """`optimizer`, made on the device's parameters, with its work and state on the host.

    It is used as the one that it wraps: learning rates in `param_groups`, `zero_grad`, `state_dict`
    (which either of them loads; under bf16 with the masters in it). On the CPU in fp32 its results are
    the plain optimizer's to the bit.

    inner: the wrapped optimizer, on the masters. state: by the device's parameters, on the host.
    transport: None makes one for the parameters' device. offload_gradients: gradients leave the device
    while backward runs; `.grad` is then None after it, and `clip_grad_norm_` here takes the place of
    `torch.nn.utils.clip_grad_norm_`. overlap: whoever computes with parameters calls `receive` before.
    Raises UserError where the host's memory budget is too small, and for LBFGS. What goes wrong on the
    host's thread is raised by the next call that waits for it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        transport: Transport | None = None,
        offload_gradients: bool = False,
        overlap: bool = False,
    ) -> None:
        self.inner = optimizer
        self.overlap = overlap
        device = next(p for group in optimizer.param_groups for p in group["params"]).device
        self.transport = transport or make_transport(device)
        self._offload_gradients = offload_gradients
        self._masters: dict[Tensor, _Master] = {}
        self._leaving: deque[_Sent] = deque()
        threads = max(1, min(MOST_THREADS, torch.get_num_threads() // 4))
        self._thread = ThreadPoolExecutor(1, "optimizer", torch.set_num_threads, (threads,))
        self._asked: list[Future[Any]] = []
        self._broke_off = False
        self._clip: Tensor | None = None  # what the next update multiplies gradients by
        self._state_bytes = 0
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UserError(
                "LBFGS asks for the loss several times in a step, which an optimizer on the host does "
                "not do; use AdamW"
            )
        self._divisible = type(optimizer).__module__.startswith("torch.optim.")
        given = dict(optimizer.state)
        groups = [dict(group) for group in optimizer.param_groups]
        super().__init__(groups, optimizer.defaults)
        for parameter, state in given.items():
            self.state[parameter] = {
                key: value.to("cpu", copy=True) if isinstance(value, Tensor) else value
                for key, value in state.items()
            }
        self._show_state()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.join()
        super().add_param_group(param_group)
        number = len(self.param_groups) - 1
        group = self.param_groups[number]
        masters = self._make_masters(group["params"])
        if number < len(self.inner.param_groups):
            self.inner.param_groups[number]["params"] = masters
        else:
            self._show_state()
            self.inner.add_param_group({**group, "params": masters})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what `closure` gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets = list(self._buckets())
        for bucket in buckets:
            self.send_down(one.parameter for one in bucket)
        self.join()
        self._leaving.clear()
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in outer.items() if key != "params"})
        self._follow_parameters()
        clip, self._clip = self._clip, None
        device = self.transport.mark()  # the device's last use of the parameters
        for bucket in buckets:
            updated = self._ask(self._update, bucket, clip, device)
            for one in bucket:
                one.updated = updated
        self._ask(self._end_step)
        if not self.overlap:
            self.join()
        return loss

    def receive(self, parameters: Iterable[Tensor]) -> None:
        """The device's later computation has `parameters` as the last step made them."""
        masters = [self._masters[parameter] for parameter in parameters]
        for updated in dict.fromkeys(one.updated for one in masters if one.updated is not None):
            self.transport.wait(updated.result())
        for one in masters:
            one.updated = None

    def join(self) -> None:
        """Waits for the host's thread and receives all parameters; raises what went wrong there."""
        self.settle()
        asked, self._asked = self._asked, []
        for one in asked:
            one.result()
        self.receive(self._masters)

    def settle(self) -> None:
        """Waits until the host's thread has nothing to do, however it ended."""
        wait(self._asked)

    @property
    def half_updated(self) -> bool:
        """Whether the last update has broken off, whose error is then forgotten; waits for its end."""
        self.settle()
        if self._broke_off:
            self._asked = []
            for one in self._masters.values():
                one.updated = None
        return self._broke_off

    @half_updated.setter
    def half_updated(self, value: bool) -> None:
        self._broke_off = value

    def _ask(self, work: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Has the host's thread do `work` after all that it was asked before."""
        if self.transport.computes:
            future = self._thread.submit(torch.no_grad()(work), *arguments)
        else:  # shapes alone are here, in a mode that other threads do not have
            future = Future()
            future.set_result(work(*arguments))
        self._asked.append(future)
        return future

    def send_down(self, parameters: Iterable[Tensor]) -> None:
        """Sends down the gradients of `parameters`; where they leave the device, `.grad` is then None.

        Hooks do that when autograd has finished one; a backward of another kind does it by itself.
        """
        ones = [self._masters[parameter] for parameter in parameters if parameter.grad is not None]
        if ones:
            self._leave(self._send_down(ones), 1)  # those of the call before are let go

    @property
    def gradients_leave(self) -> bool:
        """Whether gradients are on the host when a step begins."""
        return self._offload_gradients

    def master(self, parameter: Tensor) -> Tensor:
        """The fp32 master of a parameter, on the host."""
        self.join()
        self._follow_parameters()
        return self._masters[parameter].master.detach()

    def load_master(self, parameter: Tensor, value: Tensor) -> None:
        """Sets a parameter's master; the parameter itself has that value, rounded, already."""
        self.join()
        one = self._masters[parameter]
        with self.transport.hidden():
            one.master.data.copy_(value)
        one.version = parameter._version

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, those on the host as well."""
        super().zero_grad(set_to_none)
        self._clip = None
        self._ask(self._forget)

    def gradients(self) -> list[Tensor]:
        """The gradients on the host, fp32, of every trained parameter; zeros where there is none.

        To be summed over processes, in place, before they are clipped.
        """
        self.join()
        trained = [one for one in self._ordered() if one.parameter.requires_grad]
        for one in trained:
            one.norm = None  # it will be another one
            if not one.has_gradient:
                one.gradient.zero_()
                one.has_gradient = True
        return [one.gradient for one in trained]

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float | None) -> Tensor:
        """Has the next step scale gradients that are on the host to a total norm of `max_norm`.

        max_norm: None only measures. Returns the norm before, float32 () on the CPU.
        """
        norm = self.gradient_norm()
        if max_norm is not None:
            self.scale_gradients(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
        return norm

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The total norm of gradients that are on the host, float32 () on the CPU."""
        self.join()
        there = [one for one in self._masters.values() if one.has_gradient]
        self._find_norms(there)
        with self.transport.hidden():
            norms = [one.norm for one in there if one.norm is not None]
            return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def scale_gradients(self, factor: Tensor) -> None:
        """Has the next step multiply gradients that are on the host. factor: () on the CPU."""
        self._clip = factor

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """A parameter's gradient on the host, float32; None where it has none."""
        self.join()
        one = self._masters[parameter]
        return one.gradient if one.has_gradient else None

    def state_dict(self) -> dict[str, Any]:
        """As the wrapped optimizer's; the state of bf16 parameters has their fp32 `master` as well."""
        self.join()
        self._follow_parameters()
        packed = super().state_dict()
        for number, one in enumerate(self._ordered()):
            if one.parameter.dtype != torch.float32:
                state = packed["state"].get(number, {})
                packed["state"][number] = {**state, "master": one.master.detach()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict` gave here or from a plain optimizer of the same kind."""
        self.join()
        states, masters = {}, {}
        for number, state in state_dict["state"].items():
            rest = dict(state)
            if "master" in rest:
                masters[number] = rest.pop("master")
            if rest:
                states[number] = rest
        self.inner.load_state_dict({**state_dict, "state": states})
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            outer.update({key: value for key, value in inner.items() if key != "params"})
        for number, one in enumerate(self._ordered()):
            if number in masters:
                one.master.data.copy_(masters[number])
            one.version = None  # what the parameter is by now decides
        self.state.clear()
        for parameter, one in self._masters.items():
            if one.master in self.inner.state:
                self.state[parameter] = self.inner.state[one.master]
        self._show_state()
        self._count_state()

    def _make_masters(self, parameters: Sequence[Tensor]) -> list[nn.Parameter]:
        """The host sides of a group, in one buffer."""
        needed = [self._parts(parameter) for parameter in parameters]
        buffer = self.transport.reserve(sum(map(self.pinned_bytes, parameters)), PURPOSE)
        views: list[list[Tensor]] = [[] for _ in parameters]
        order, offset = _by_memory(parameters), 0
        with self.transport.hidden():
            for part in range(max(map(len, needed), default=0)):
                for number in order:
                    if part < len(needed[number]):
                        views[number].append(view_as(buffer, offset, needed[number][part]))
                        offset += aligned(tensor_bytes(needed[number][part]))
        first = len(self._masters)
        places = {number: first + place for place, number in enumerate(order)}
        found = []
        for number, (parameter, parts) in enumerate(zip(parameters, views, strict=True)):
            with self.transport.hidden():
                master = nn.Parameter(parts[0])
            up = parts[0] if parameter.dtype == torch.float32 else parts[2]
            down = parts[1] if len(parts) == 2 else parts[-1]
            one = _Master(parameter, master, parts[1], up, down, places[number])
            if self._offload_gradients and parameter.requires_grad:
                self._send_down_when_finished(one)
            self._masters[parameter] = one
            found.append(master)
        self.transport.pin()
        return found

    def pinned_bytes(self, parameter: Tensor) -> int:
        """Of a parameter's host side."""
        return sum(aligned(tensor_bytes(part)) for part in self._parts(parameter))

    def _parts(self, parameter: Tensor) -> list[Tensor]:
        """On meta: master, gradient, and the wires up and down where they are not the same memory."""
        fp32, wire = (outline(parameter.shape, dtype) for dtype in (torch.float32, parameter.dtype))
        if parameter.dtype != torch.float32:
            return [fp32, fp32, wire, wire]
        # what comes down is added to a sum where backward runs more than once
        return [fp32, fp32, wire] if self._offload_gradients else [fp32, fp32]

    def _send_down_when_finished(self, one: _Master) -> None:
        # autograd keeps a hook as long as the parameter, out of the garbage collector's sight: a hook
        # that held the optimizer, which holds the parameter, would keep both for ever
        mine = weakref.ref(self)

        def finished(parameter: Tensor) -> None:
            optimizer = mine()
            if optimizer is not None:
                optimizer._leave(optimizer._send_down([optimizer._masters[parameter]]), _IN_FLIGHT)

        cast(Any, one.parameter).register_post_accumulate_grad_hook(finished)

    def _ordered(self) -> Iterator[_Master]:
        return (self._masters[p] for group in self.param_groups for p in group["params"])

    def _follow_parameters(self) -> None:
        """Makes masters of parameters that were written to since the last step."""
        changed = [one for one in self._ordered() if one.version != one.parameter._version]
        marks = [
            self.transport.download(one.up, one.parameter.detach(), self.transport.mark())
            for one in changed
        ]
        for one, mark in zip(changed, marks, strict=True):
            self.transport.finish(mark)
            if self.transport.computes and one.up.dtype != torch.float32:
                with self.transport.hidden(), torch.no_grad():
                    own = one.master.to(one.up.dtype) == one.up
                    one.master.copy_(torch.where(own, one.master, one.up.float()))
            one.version = one.parameter._version

    def _send_down(self, ones: Sequence[_Master]) -> _Sent:
        """Gradients that backward has finished, to the host; they must live until the copies' marks."""
        ones = sorted(ones, key=lambda one: one.place)
        for one in ones:
            if one.taken is not None:  # the wire is free then
                one.taken.result()
        gradients = [cast(Tensor, one.parameter.grad).detach() for one in ones]
        here = self.transport.mark()
        wires = (one.down for one in ones)
        coming = [
            self.transport.download(down, gradient, here)
            for down, gradient in _joined(zip(wires, gradients, strict=True))
        ]
        taken = self._ask(self._take_in, ones, coming)
        for one in ones:
            one.taken = taken
            if self._offload_gradients:
                one.parameter.grad = None
        return gradients, coming

    def _leave(self, sent: _Sent, most: int) -> None:
        """Keeps alive what was sent; of all that ever was, the last `most` are."""
        self._leaving.append(sent)
        while len(self._leaving) > most:
            for copied in self._leaving[0][1]:
                self.transport.wait(copied)
            self._leaving.popleft()  # not before

    # what the host's thread does

    def _take_in(self, ones: Sequence[_Master], coming: Sequence[Mark]) -> None:
        """Adds the gradients that come down to what is there."""
        self.transport.finish(*coming)
        if self.transport.computes:
            with self.transport.hidden():
                more = ((one.gradient, one.down) for one in ones if one.has_gradient)
                for total, arrived in _joined(more):
                    total.add_(arrived)
                new = (
                    (one.gradient, one.down)
                    for one in ones
                    if not one.has_gradient and one.down is not one.gradient
                )
                for total, arrived in _joined(new):
                    total.copy_(arrived)
        for one in ones:
            one.has_gradient, one.norm = True, None
        if self._offload_gradients:
            self._find_norms(ones)

    def _find_norms(self, ones: Sequence[_Master]) -> None:
        """The norm of each gradient, where it is not known."""
        unknown = [one for one in ones if one.norm is None]
        if unknown:
            with self.transport.hidden():
                norms = torch._foreach_norm([one.gradient for one in unknown])
            for one, norm in zip(unknown, norms, strict=True):
                one.norm = norm

    def _forget(self) -> None:
        for one in self._masters.values():
            one.has_gradient = False

    def _update(self, bucket: list[_Master], clip: Tensor | None, device: Mark) -> Mark:
        """One update of parameters that have a gradient; returns the mark of their way up."""
        if self._broke_off:
            return None
        self._broke_off = True  # until it is through
        with_gradient = [one for one in bucket if one.has_gradient]
        if clip is not None and self.transport.computes:
            with self.transport.hidden():
                for gradient, _ in _joined((one.gradient, one.gradient) for one in with_gradient):
                    gradient.mul_(clip)
            for one in with_gradient:
                one.norm = None
        self._step_inner(bucket)
        mark = self._send_up(with_gradient, device)
        for one in with_gradient:
            # one that the device still has comes down again, and one that it has not is kept
            one.has_gradient = self._offload_gradients
        self._broke_off = False
        return mark

    def _end_step(self) -> None:
        # parameters that are views of one buffer have one version: each that went up changed all
        for one in self._masters.values():
            one.version = one.parameter._version
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            outer.update({key: value for key, value in inner.items() if key != "params"})
        self._count_state()

    def _send_up(self, ones: Sequence[_Master], device: Mark) -> Mark:
        """Parameters as their masters are; returns the mark of the last copy."""
        if self.transport.computes:
            rounded = (
                (one.up, one.master.detach()) for one in ones if one.up.dtype != torch.float32
            )
            with self.transport.hidden():
                for up, master in _joined(rounded):
                    up.copy_(master)
        mark = None
        for parameter, up in _joined((one.parameter.detach(), one.up) for one in ones):
            mark = self.transport.upload(parameter, up, device)
        return mark

    def _buckets(self) -> Iterator[list[_Master]]:
        bucket: list[_Master] = []
        size = 0
        for one in sorted(self._masters.values(), key=lambda one: one.place):
            bucket.append(one)
            size += tensor_bytes(one.master)
            if size >= BUCKET_BYTES and self._divisible:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket

    def _step_inner(self, bucket: list[_Master]) -> None:
        """The wrapped optimizer's step on these parameters alone."""
        if not self.transport.computes:
            return
        for one in bucket:
            one.master.grad = one.gradient if one.has_gradient else None
        whole = self.inner.param_groups
        chosen = {id(one.master) for one in bucket}
        if self._divisible:
            self.inner.param_groups = [
                {**group, "params": [p for p in group["params"] if id(p) in chosen]}
                for group in whole
            ]
        try:
            with self.transport.hidden():
                self.inner.step()
        finally:
            self.inner.param_groups = whole
            for one in bucket:
                one.master.grad = None

    def _show_state(self) -> None:
        """The wrapped optimizer's states are ours, under its own parameters."""
        parameters = {one.master: parameter for parameter, one in self._masters.items()}
        cast(Any, self.inner).state = _StateByMaster(self.state, parameters)

    def _count_state(self) -> None:
        """Counts the state against the host's budget, once it is there."""
        size = sum(
            tensor_bytes(value)
            for state in self.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        if size > self._state_bytes:
            memory, more = self.transport.memory, size - self._state_bytes
            memory.take(more, STATE_PURPOSE)
            weakref.finalize(self, memory.give, more, STATE_PURPOSE).atexit = False
            self._state_bytes = size
