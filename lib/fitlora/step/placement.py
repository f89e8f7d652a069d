"""Where the parts of a step are: on the device, or on the host and coming when they are wanted.

The Plan says which; here it is carried out. `Placement` stands between a skeleton and its source of
weights while it is filled, and afterwards has what moves things: the streamed layers' residency, the
activation checkpoints' stack, and the two ends of the model. Layers that are spread over several devices
have nothing on the host.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from fitlora.errors import UserError
from fitlora.model import decoder_layers
from fitlora.offload.checkpoints import HostCheckpoints
from fitlora.offload.loading import PlacedWeights
from fitlora.offload.residency import Residency, spread
from fitlora.offload.transport import Transport, make_transport
from fitlora.offload.vocabulary import HostEmbedding, StreamedHead, sliced_logits
from fitlora.plan import Plan
from fitlora.step.devices import Devices
from fitlora.step.weights import Weights, fill

HEAD_SLICE_BYTES = 128 * 2**20  # of the head's table on the device at one time, twice


class Placement:
    """Fills `model` as the Plan places it, on `devices`.

    transport: None makes one where something is on the host.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        weights: Weights,
        devices: Devices,
        transport: Transport | None = None,
    ) -> None:
        self.devices = devices
        self.residency: Residency | None = None
        self.checkpoints: HostCheckpoints | None = None
        self.embedding: HostEmbedding | None = None
        self.head: StreamedHead | None = None
        self.transport = transport
        if not plan.uses_host:
            for number, modules in enumerate(devices.modules(model)):
                weights = weights.on(devices.all[number])
                with devices.at(number):
                    fill(modules, weights)
            return
        self.transport = move = transport or make_transport(weights.device)
        places: dict[int, Tensor] = {}
        if plan.streamed_layers:
            self.residency = Residency(
                decoder_layers(model),
                plan.streamed_layers,
                move,
                slots=plan.streaming_slots,
                on_disk=on_disk(plan),
                folder=move.folder,
            )
            places |= self.residency.places
        ends = cast(Any, model)
        embed, head = ends.get_input_embeddings(), ends.get_output_embeddings()
        if embed.weight is head.weight and plan.embedding != plan.head:
            raise UserError(
                "this model's embedding is its head as well: the Plan's embedding and head must be in "
                f"the same place, and are {plan.embedding} and {plan.head}"
            )
        if plan.head == "host" and getattr(ends.config, "final_logit_softcapping", None):
            raise UserError("this model caps its logits, which needs the Plan's head on the device")
        for place, module in ((plan.embedding, embed), (plan.head, head)):
            if place == "host" and module.weight.requires_grad:
                raise UserError(
                    "lora.modules_to_save trains a table that plan.embedding or plan.head puts on the "
                    "host; set those to auto or device"
                )
            if place == "host" and id(module.weight) not in places:
                places[id(module.weight)] = move.reserve_like(
                    module.weight, "vocabulary tables", alike=True
                )
        tables = [places.get(id(module.weight)) for module in (embed, head)]
        placed = PlacedWeights(weights, places, move)
        fill(model.named_modules(), placed)
        placed.finish()
        if self.residency is not None:
            self.residency.start()
        if plan.checkpoints == "host":
            self.checkpoints = HostCheckpoints(move)
        if tables[0] is not None and plan.embedding == "host":
            tokens = plan.micro_batch_size * plan.sequence_length
            together = plan.micro_batches_per_pass
            self.embedding = HostEmbedding(tables[0], move, tokens=tokens, together=together)
            _embed_from(embed, self.embedding)
        if tables[1] is not None and plan.head == "host":
            rows = max(1, HEAD_SLICE_BYTES // (tables[1].shape[1] * tables[1].element_size()))
            self.head = StreamedHead(tables[1], move, rows=rows)
            _project_from(head, self.head)

    @property
    def slot_tensors(self) -> list[Tensor]:
        """What passes through the device's memory lies in these."""
        parts = (self.residency, self.head)
        return [slot for part in parts if part is not None for slot in part.slot_tensors]

    @contextmanager
    def at_home(self, layer: int, *, backward: bool = False) -> Iterator[None]:
        """The weights of decoder layer `layer` are on its device inside, which is the one at work."""
        with self.devices.at_layer(layer):
            if self.residency is None:
                yield
                return
            self.residency.enter(layer, backward=backward)
            yield  # after an exception `reset` puts everything in order
            self.residency.leave(layer)

    def begin(self, *, backward_follows: bool, lowest: int = 0) -> None:
        """A pass over the layers begins. lowest: the layer at which its backward ends."""
        if self.residency is not None:
            self.residency.begin(backward_follows=backward_follows, lowest=lowest)

    def reset(self) -> None:
        """Waits for what is under way and forgets it: after an exception or an interruption."""
        for part in (self.residency, self.checkpoints, self.head):
            if part is not None:
                part.reset()


def on_disk(plan: Plan) -> tuple[int, ...]:
    """The decoder layers that are read from disk: evenly among the streamed ones."""
    chosen = spread(len(plan.streamed_layers), plan.disk_layers)
    return tuple(plan.streamed_layers[index] for index in chosen)


def scale_of(embed: nn.Module) -> float:
    """What a model multiplies its embeddings by."""
    scale = getattr(embed, "scalar_embed_scale", None)
    return 1.0 if scale is None else float(scale)


def _embed_from(embed: nn.Module, table: HostEmbedding) -> None:
    """Has the module look up on the host: for whoever calls the model itself."""

    def forward(input_ids: Tensor) -> Tensor:
        known = table.transport.computes  # shapes alone have no tokens
        tokens = input_ids.flatten().tolist() if known else [0] * input_ids.numel()
        rows = table.rows(tokens).view(*input_ids.shape, -1)
        return rows * torch.tensor(scale_of(embed), dtype=rows.dtype, device=rows.device)

    embed.forward = forward


def _project_from(head: nn.Module, table: StreamedHead) -> None:
    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = sliced_logits(flat, table.slices, bias=cast(Any, head).bias)
        return logits.view(*hidden.shape[:-1], -1)

    head.forward = forward
