"""One optimizer step: an effective batch cut into micro-batches, their gradients, one update.

`fitlora.step.build` makes a `TrainingStep`; what the model inside does with a micro-batch is the
model's business and the Plan's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fitlora.model import decoder_layers
from fitlora.offload.optimizer import CPUOffloadOptimizer
from fitlora.params import TrainParams
from fitlora.plan import Plan
from fitlora.step.batch import MicroBatch, StepContext, TokenSequence, make_micro_batch
from fitlora.step.linear import LoraLinear
from fitlora.step.network import Network
from fitlora.step.optimizer_state import make_states, put_states, take_states
from fitlora.step.recompute import arrange
from fitlora.step.settings import StepSettings

# Decisions that a step is built with. The others say how the same work is cut up.
_FIXED = (
    "device", "devices", "effective_batch_size", "sequence_length", "compute_dtype", "optimizer",
    "streamed_layers", "streaming_slots", "disk_layers", "checkpoints", "embedding", "head",
    "optimizer_device", "layers_per_device",
)  # fmt: skip

# Sums each tensor over the devices, in place.
Reduce = Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    loss: Tensor  # float32 (), mean over the effective batch's target tokens
    gradient_norm: Tensor  # float32 (), before clipping
    tokens: int
    target_tokens: int
    updated: bool = True  # whether it was accepted; otherwise no weight has changed


# Told an optimizer step's loss and gradient norm; says whether the weights are to be updated.
Accept = Callable[[float, float], bool]


def is_finite(loss: float, norm: float) -> bool:
    """Whether both are numbers: the least that an update asks."""
    return math.isfinite(loss) and math.isfinite(norm)


class TrainingStep:
    """A model with adapters, its optimizer, and how an effective batch goes through it.

    `phase` is entered with the name of each phase ("forward", "backward", "optimizer", "evaluation"):
    by a trace or a tracker to book memory, and by nobody otherwise.

    A step that ran out of memory has changed nothing but gradients, which `abandon` drops, and may be
    run again; unless `half_updated` says that it was stopped inside the update itself.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        settings: StepSettings,
        context: StepContext,
        network: Network,
        optimizer: torch.optim.Optimizer | None,
        device: torch.device,
    ) -> None:
        self.model, self.plan, self.settings = model, plan, settings
        self.context, self.network = context, network
        model.eval()
        self._lora = [module for module in model.modules() if isinstance(module, LoraLinear)]
        self.adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.by_layer = [
            [p for p in layer.parameters() if p.requires_grad] for layer in decoder_layers(model)
        ]
        self.devices = network.placement.devices
        self._device_of: dict[Tensor, int] = {
            p: self.devices.of_layer[layer] for layer, ps in enumerate(self.by_layer) for p in ps
        }
        self.device = device
        self.phase: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()
        self.optimizer = optimizer
        self._half_updated = False
        self._freeze(plan.frozen_layers)

    @property
    def half_updated(self) -> bool:
        """Whether an update was stopped half way; one on the host is waited for."""
        host = self.optimizer
        on_host = isinstance(host, CPUOffloadOptimizer) and host.half_updated
        return self._half_updated or on_host

    @half_updated.setter
    def half_updated(self, value: bool) -> None:
        self._half_updated = value

    def can_adopt(self, plan: Plan) -> bool:
        """Whether the step need not be built anew to go on as `plan` says."""
        return all(getattr(plan, name) == getattr(self.plan, name) for name in _FIXED)

    def adopt(self, plan: Plan) -> None:
        """Goes on as another Plan says, between steps.

        The layout changes no result. The layers' precision and which are frozen do; the optimizer's
        state of a layer that freezes is gone, and begins anew where it learns again.
        """
        assert self.can_adopt(plan)
        arrange(decoder_layers(self.model), plan.recompute_layers)
        if plan.frozen_layers != self.plan.frozen_layers:
            self._freeze(plan.frozen_layers)
        self.plan = plan
        self.network.adopt(plan)

    def _freeze(self, frozen: Sequence[int]) -> None:
        if isinstance(self.optimizer, CPUOffloadOptimizer):
            self.optimizer.join()
        for layer, parameters in enumerate(self.by_layer):
            for parameter in parameters:
                parameter.requires_grad_(layer not in frozen)
                if layer in frozen:
                    parameter.grad = None
                    if self.optimizer is not None:
                        self.optimizer.state.pop(parameter, None)

    @property
    def learning(self) -> dict[str, nn.Parameter]:
        """The adapters' weights that are trained, by name in the model."""
        return {name: p for name, p in self.adapters.items() if p.requires_grad}

    def abandon(self) -> None:
        """Drops the gradients of a step that did not come to its update; nothing is under way then."""
        self.network.reset()
        self._drop_gradients()
        if isinstance(self.optimizer, CPUOffloadOptimizer):
            self.optimizer.settle()

    def _drop_gradients(self) -> None:
        if isinstance(self.optimizer, CPUOffloadOptimizer):
            self.optimizer.zero_grad()
        for parameter in self.adapters.values():
            parameter.grad = None

    def parts(self) -> dict[str, list[Tensor]]:
        """What it holds now, by what it is for, whether on the device or on the host.

        weights: frozen ones, buffers, and the slots that streamed weights pass through.
        """
        adapters = {id(p) for p in self.adapters.values()}
        frozen = [p for p in self.model.parameters() if id(p) not in adapters]
        slots = self.network.placement.slot_tensors
        return {
            "weights": [*frozen, *self.model.buffers(), *slots],
            "adapters": list(self.adapters.values()),
            "gradients": [p.grad for p in self.adapters.values() if p.grad is not None],
            "optimizer_states": self.states_of(list(self.adapters.values())),
        }

    def states_of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The optimizer's states of these, as far as they are tensors."""
        states = {} if self.optimizer is None else self.optimizer.state
        found = (value for p in parameters for value in states.get(p, {}).values())
        return [value for value in found if isinstance(value, Tensor)]

    def tensors(self) -> list[Tensor]:
        """All of its parts."""
        return [tensor for held in self.parts().values() for tensor in held]

    def micro_batches(self, sequences: Sequence[TokenSequence]) -> list[Sequence[TokenSequence]]:
        """This device's share of an effective batch, cut as the Plan says; the last may be smaller."""
        return self.parts_of(sequences, self.plan.micro_batch_size)

    def parts_of(
        self, sequences: Sequence[TokenSequence], size: int
    ) -> list[Sequence[TokenSequence]]:
        """Parts of `size` sequences; each alone, unpacked, where the network cannot keep them apart."""
        if not self.network.together:
            return [[part] for sequence in sequences for part in sequence.parts]
        return [sequences[i : i + size] for i in range(0, len(sequences), size)]

    def micro_batch(
        self, sequences: Sequence[TokenSequence], *, seed: int = 0, step: int = 0
    ) -> MicroBatch:
        """The sequences as the network takes them; seed, step: for the dropout masks."""
        types = [getattr(torch, name) for name in self.plan.flash_types]
        return make_micro_batch(
            sequences, seed=seed, step=step, device=self.device, flash_types=types
        )

    def run(
        self,
        sequences: Sequence[TokenSequence],
        *,
        step: int,
        learning_rate: float,
        total_target_tokens: int | None = None,
        reduce_gradients: Reduce | None = None,
        loss_scale: float = 1.0,
        accept: Accept = is_finite,
    ) -> StepResult:
        """One optimizer step on this device's share of an effective batch.

        Gradients are those of the mean loss over the whole effective batch's target tokens, however
        it is split. total_target_tokens: of all devices; None where this one has the whole batch.
        reduce_gradients: None where this device has it all. loss_scale: what gradients are multiplied by
        on their way, so that float16 holds the small ones; results are without it. accept: where it says
        no the step changes nothing.
        """
        assert self.optimizer is not None, "the step was built without adapters"
        loss = self._gradients(sequences, step, total_target_tokens, loss_scale)
        with self.phase("optimizer"):
            norm = self._norm([loss], reduce_gradients).div_(loss_scale)
            loss.div_(loss_scale)
            updated = self._accepted(accept, loss, norm)
            if updated:
                self._update(learning_rate, norm, loss_scale)
            else:
                self.abandon()
        tokens = sum(len(s.tokens) for s in sequences)
        return StepResult(loss, norm, tokens, sum(s.target_tokens for s in sequences), updated)

    def survey(
        self,
        sequences: Sequence[TokenSequence],
        *,
        step: int,
        total_target_tokens: int | None = None,
        reduce_gradients: Reduce | None = None,
        loss_scale: float = 1.0,
    ) -> tuple[float, list[float]]:
        """The loss of an effective batch, and the squared norm of each layer's adapters' gradients.

        Nothing changes. 0 for a layer that is frozen, and a loss of 0 for shapes alone. Arguments as of
        `run`.
        """
        loss = self._gradients(sequences, step, total_target_tokens, loss_scale)
        with self.phase("optimizer"):
            self._norm([loss], reduce_gradients)
            found = [
                sum(self._squared_norm(p) for p in parameters if p.requires_grad)
                for parameters in self.by_layer
            ]
            self.abandon()
        told = 0.0 if loss.is_meta else float(loss) / loss_scale
        return told, [value / loss_scale**2 for value in found]

    def _squared_norm(self, parameter: Tensor) -> float:
        gradient = parameter.grad
        if isinstance(self.optimizer, CPUOffloadOptimizer) and self.optimizer.gradients_leave:
            gradient = self.optimizer.gradient(parameter)
        if gradient is None or gradient.is_meta:
            return 0.0
        return float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2

    def _drop(self, on: bool) -> None:
        """Adapters drop their inputs, or not.

        The model itself is always as it is in evaluation: its own dropout and the noise of its routers
        would not be the same when a layer is recomputed.
        """
        if self._lora and self._lora[0].training != on:  # setting thousands takes milliseconds
            for layer in self._lora:
                layer.train(on)

    def _gradients(
        self, sequences: Sequence[TokenSequence], step: int, total: int | None, loss_scale: float
    ) -> Tensor:
        """Makes the gradients; returns the loss. Both are `loss_scale` times what they are."""
        self._drop(True)
        if total is None:
            total = sum(s.target_tokens for s in sequences)
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        self.network.begin()
        parts, together = self.micro_batches(sequences), self.plan.micro_batches_per_pass
        for start in range(0, len(parts), together):
            batches = [
                self.micro_batch(part, seed=self.settings.train.seed, step=step)
                for part in parts[start : start + together]
            ]
            for one in self.network.train(batches, scale=loss_scale / total, phase=self.phase):
                loss.add_(one)
            del one, batches
        return loss

    @staticmethod
    def _accepted(accept: Accept, loss: Tensor, norm: Tensor) -> bool:
        """Reads both from the device; shapes alone have no values, and are accepted."""
        if loss.is_meta:
            return True
        return accept(float(loss), float(norm))

    def _update(self, learning_rate: float, norm: Tensor, loss_scale: float) -> None:
        """Clips and updates. All that is allocated is so before the first weight changes.

        norm: of the gradients, which are `loss_scale` times too large.
        """
        assert self.optimizer is not None
        self._scale_gradients(norm, loss_scale)
        make_states(self.optimizer, self._at)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.half_updated = True
        self.optimizer.step()
        self._drop_gradients()
        self.half_updated = False  # the last thing: what fails before it must not be done twice

    def _norm(self, also_reduced: list[Tensor], reduce: Reduce | None) -> Tensor:
        """Sums gradients over devices; returns their norm."""
        if isinstance(self.optimizer, CPUOffloadOptimizer) and self.optimizer.gradients_leave:
            if reduce is not None:
                reduce([*self.optimizer.gradients(), *also_reduced])
            return self.optimizer.gradient_norm()
        learning = self.learning.values()
        for parameter in learning:
            if parameter.grad is None:  # a device without a share of a small batch still takes part
                parameter.grad = torch.zeros_like(parameter)
        if reduce is not None:
            held = self.network.gradients().values()
            reduce([*(g for gradients in held for g in gradients), *also_reduced])
        # as torch.nn.utils.clip_grad_norm_ has it, which takes no tensors on meta; of each parameter, so
        # that it is the same to the bit wherever they are
        norms = []
        for number in range(len(self.devices.all)):
            mine = [p for p in learning if self._device_of.get(p, 0) == number]
            gradients = [p.grad for p in mine if p.grad is not None]
            if gradients:
                with self.devices.at(number):
                    each = torch.stack(torch._foreach_norm(gradients))
                norms.append(self.devices.bring(each, number))
        norm: Tensor = torch.linalg.vector_norm(norms[0] if len(norms) == 1 else torch.cat(norms))
        return norm

    def _at(self, parameter: Tensor) -> AbstractContextManager[None]:
        """The adapter's device is at work inside; one that is in no decoder layer is on the first."""
        return self.devices.at(self._device_of.get(parameter, 0))

    def _scale_gradients(self, norm: Tensor, loss_scale: float) -> None:
        """Takes the loss scale out, and clips."""
        limit = self.settings.train.max_gradient_norm
        if limit is None and loss_scale == 1.0:
            return
        factor = torch.ones_like(norm)
        if limit is not None:
            factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
        factor.div_(loss_scale)
        if isinstance(self.optimizer, CPUOffloadOptimizer) and self.optimizer.gradients_leave:
            self.optimizer.scale_gradients(factor)
        else:
            for number, gradients in self.network.gradients().items():
                with self.devices.at(number):
                    torch._foreach_mul_(gradients, self.devices.bring(factor, 0))

    @torch.no_grad()
    def evaluate(self, sequences: Sequence[TokenSequence]) -> tuple[Tensor, int]:
        """Summed loss, float64 (), and number of target tokens of the sequences, without dropout."""
        self._drop(False)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in self.parts_of(sequences, self.plan.evaluation_batch_size):
            batch = self.micro_batch(part)
            with self.phase("evaluation"):
                total.add_(self.network.loss(batch, scale=1.0))
        return total, sum(s.target_tokens for s in sequences)

    def adapter_state(self) -> dict[str, Tensor]:
        """Copies of the adapters' weights on the CPU, by name in the model."""
        return {
            name: self._master(p).to("cpu", copy=True).contiguous()
            for name, p in self.adapters.items()
        }

    def _master(self, parameter: Tensor) -> Tensor:
        """The adapter's weight as it is learned: on the host where the optimizer is."""
        if isinstance(self.optimizer, CPUOffloadOptimizer):
            return self.optimizer.master(parameter)
        return parameter.detach()

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts back what `adapter_state` gave."""
        if isinstance(self.optimizer, CPUOffloadOptimizer):
            self.optimizer.join()  # what is on its way up would overwrite it
        with torch.no_grad():
            for name, parameter in self.adapters.items():
                parameter.copy_(state[name])
                if isinstance(self.optimizer, CPUOffloadOptimizer):
                    self.optimizer.load_master(parameter, state[name])

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Copies of the optimizer's states on the CPU, tensors and plain numbers, by name."""
        assert self.optimizer is not None
        if isinstance(self.optimizer, CPUOffloadOptimizer):
            self.optimizer.join()  # an update may be under way
        return take_states(self.optimizer, self.adapters)

    def load_optimizer_state(
        self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]
    ) -> None:
        """Puts back what `optimizer_state` gave; raises ValueError where it is another one's.

        States of layers that are frozen now are left out.

        With `load_adapter_state` before it, this undoes an update that was stopped half way.
        """
        assert self.optimizer is not None
        learning = self.learning
        kept = {n: t for n, t in tensors.items() if n.rpartition("/")[0] in learning}
        rest = {n: v for n, v in numbers.items() if n.rpartition("/")[0] in learning}
        with torch.no_grad():
            put_states(self.optimizer, learning, kept, rest)
        self.half_updated = False
        if isinstance(self.optimizer, CPUOffloadOptimizer):
            self.optimizer.half_updated = False


def learning_rate(step: int, total_steps: int, train: TrainParams) -> float:
    """The learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule.

    cosine and linear reach 0 just after the last step.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / (train.warmup_steps + 1)
    if train.schedule == "constant":
        return train.learning_rate
    span = max(1, total_steps - train.warmup_steps)
    progress = min(1.0, (step - train.warmup_steps) / span)
    if train.schedule == "linear":
        return train.learning_rate * (1.0 - progress)
    return train.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
