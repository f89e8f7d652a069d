"""Micro-batches through the model and back: by hand where the family is known, else by autograd.

Both have the same face: `begin` an optimizer step, `train` on micro-batches (the adapters' gradients
are added up), and the `loss` of one without gradients.

By hand, the micro-batches of one `train` share a pass over the layers: each layer is done with all of
them before the next one is, so that what streams comes once for all. Between two layers each of them
leaves its residual stream on the device, which is little beside what a layer in work takes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fitlora.model import decoder_layers
from fitlora.offload.vocabulary import StreamedHead, sliced_losses
from fitlora.plan import Plan
from fitlora.step.bank import AdapterBank
from fitlora.step.batch import MicroBatch, StepContext
from fitlora.step.layer import DecoderLayer, Norm, Positions, Saved
from fitlora.step.loss import chunked_cross_entropy, head_loss, sliced_cross_entropy
from fitlora.step.placement import Placement, scale_of

Phase = Callable[[str], AbstractContextManager[Any]]
# Told which decoder layer is at work, None outside of them: a trace books memory by it.
Watch = Callable[[int | None], None]


class Network(Protocol):
    """What a training step runs."""

    watch: Watch
    placement: Placement
    together: bool  # whether sequences may lie behind each other in a micro-batch

    def adopt(self, plan: Plan) -> None:
        """Goes on as the plan says; between steps."""

    def begin(self) -> None:
        """Begins an optimizer step."""

    def reset(self) -> None:
        """Forgets a pass that was broken off: nothing is under way any more."""

    def train(self, batches: Sequence[MicroBatch], *, scale: float, phase: Phase) -> list[Tensor]:
        """Adds the gradients of `scale` times each summed loss; returns the losses, float32 ()."""

    def loss(self, batch: MicroBatch, *, scale: float) -> Tensor:
        """The same loss without dropout and without gradients."""

    def gradients(self) -> dict[int, list[Tensor]]:
        """The gradients that are on devices, by their numbers, in as few tensors as they lie in."""

    def shared_by_layers(self) -> list[tuple[Tensor, dict[int, int]]]:
        """Tensors on devices that have a part of each of several layers, with the bytes of each."""


def _nobody(layer: int | None) -> None:
    pass


@dataclass
class _Way:
    """A micro-batch on its way up through the layers and down again.

    each: the micro-batch, and its positions by kind of layer, on each device. device: the number of the
    one that it has come to.
    """

    each: Sequence[tuple[MicroBatch, dict[str, Positions]]]
    device: int
    # (T, H): what the next layer reads, on the way down its gradient; at the top, the targets' rows
    hidden: Tensor | None = None
    saved: list[Saved | None] = field(default_factory=list)  # by layer; None below the lowest
    gradient: Tensor | None = None  # (targets, H), of the loss

    @property
    def batch(self) -> MicroBatch:
        return self.each[self.device][0]

    @property
    def positions(self) -> dict[str, Positions]:
        return self.each[self.device][1]

    def take(self) -> Tensor:
        """`hidden`, which is the caller's alone from here on."""
        hidden, self.hidden = self.hidden, None
        assert hidden is not None
        return hidden


class HandNetwork:
    """Layers with a backward of their own. model: a causal model of a known family, filled."""

    together = True

    def __init__(
        self, model: nn.Module, layers: Sequence[DecoderLayer], plan: Plan, placement: Placement
    ) -> None:
        self.model, self.layers = cast(Any, model), layers
        self.plan, self.placement = plan, placement
        self.devices = placement.devices
        self.banks = [self._bank(number) for number in range(len(self.devices.all))]
        self.decoder = self.model.get_decoder()
        self.head = self.model.get_output_embeddings()
        self._with_embedding = self.devices.embedding(model)
        self.watch: Watch = _nobody
        config = self.model.config
        self.softcap = getattr(config, "final_logit_softcapping", None) or 0.0
        self.norm = Norm.of(self.decoder.norm, layers[0].input_norm.offset)
        adapters = [lora for layer in layers for group in layer.groups for lora in group.adapters]
        self.dropout = adapters[0].rate if adapters else 0.0
        self.adopt(plan)

    def adopt(self, plan: Plan) -> None:
        self.plan = plan
        self.dtype: torch.dtype = getattr(torch, plan.activation_dtype)
        # below the lowest adapter that learns there is nothing to learn, so backward ends there
        learn = [layer.has_adapters for layer in self.layers]
        for index in plan.frozen_layers:
            learn[index] = False
        self.lowest = learn.index(True) if True in learn else len(learn)
        for bank in self.banks:
            bank.dtype = self.dtype
            bank.freeze(plan.frozen_layers)
        for layer in self.layers:
            for group in layer.groups:
                group.in_float8(plan.float8_products)

    def _bank(self, number: int) -> AdapterBank:
        """The adapters of device `number`."""
        with self.devices.at(number):
            return AdapterBank(
                {index: self.layers[index].groups for index in self.devices.ranges[number]},
                getattr(torch, self.plan.storage_dtype),
                leaving=self.plan.optimizer_device == "host",
            )

    def begin(self) -> None:
        for number, bank in enumerate(self.banks):
            with self.devices.at(number):
                bank.begin()

    def reset(self) -> None:
        self.placement.reset()

    @torch.no_grad()
    def train(self, batches: Sequence[MicroBatch], *, scale: float, phase: Phase) -> list[Tensor]:
        with phase("forward"):
            self.placement.begin(backward_follows=True, lowest=self.lowest)
            ways = self._up(batches, learns=True)
            losses = self._losses(ways, scale, gradient=True)
        with phase("backward"):
            with self.devices.at(self.devices.last):
                for way in ways:
                    self._turn(way)
            self._down(ways)
        return losses[::-1]

    @torch.no_grad()
    def loss(self, batch: MicroBatch, *, scale: float) -> Tensor:
        self.placement.begin(backward_follows=False)
        return self._losses(self._up([batch], learns=False), scale, gradient=False)[0]

    def _up(self, batches: Sequence[MicroBatch], *, learns: bool) -> list[_Way]:
        """All micro-batches through each layer in turn, the last of them first.

        Backward has them in their order, so that gradients add up as they do one by one, and checkpoints
        are a stack.
        """
        ways = []
        for batch in reversed(batches):
            way = _Way(self._on_each(batch), self._with_embedding)
            with self.devices.at(way.device):
                self._hand_on(way, 0, self._embed(way.batch), learns)
            ways.append(way)
        for index in range(len(self.layers)):
            if index == max(0, len(self.layers) - 2) and self.placement.head is not None:
                self.placement.head.fetch()  # the link is idle while the top layers compute
            with self._at_work(index):
                for way in ways:
                    self._forward(way, index, learns)
        self.watch(None)
        return ways

    def _fetch(self, way: _Way) -> None:
        """Brings the micro-batch to the device at work, from the one that it has come to."""
        if way.device != self.devices.here:
            way.hidden = self.devices.bring(way.take(), way.device)
            way.device = self.devices.here

    def _forward(self, way: _Way, index: int, learns: bool) -> None:
        self._fetch(way)
        layer, hidden = self.layers[index], way.hidden
        assert hidden is not None
        out, kept = layer.forward(
            hidden,
            way.batch,
            way.positions[layer.kind],
            self._keys(index, way.batch) if learns else None,
            self.plan.keeps(index) if learns and index >= self.lowest else None,
            mlp_chunk=self.plan.mlp_chunk_tokens,
        )
        if kept is not None and self._waits_on_host(index):
            kept.hidden = None
        way.saved.append(kept)
        del hidden
        self._hand_on(way, index + 1, out, learns)

    def _hand_on(self, way: _Way, index: int, hidden: Tensor, learns: bool) -> None:
        """hidden: what layer `index` reads."""
        way.hidden = hidden
        if learns and self._waits_on_host(index):
            assert self.placement.checkpoints is not None
            self.placement.checkpoints.put(index, hidden)

    def _turn(self, way: _Way) -> None:
        """From the gradient of the rows that the loss was taken of to that of the top layer's output."""
        grad, way.gradient = way.gradient, None
        assert grad is not None
        grad = grad.to(self.dtype)
        hidden = way.take()
        grad = self.norm.backward(grad, hidden, None, grad)
        del hidden
        shape = (len(way.batch.tokens), grad.shape[1])
        whole = torch.zeros(shape, dtype=self.dtype, device=grad.device)
        way.hidden = whole.index_copy_(0, way.batch.target_rows, grad)

    def _down(self, ways: Sequence[_Way]) -> None:
        for index in range(len(self.layers) - 1, self.lowest - 1, -1):
            with self._at_work(index, backward=True):
                for way in reversed(ways):
                    self._backward(way, index)
        self.watch(None)

    def _backward(self, way: _Way, index: int) -> None:
        self._fetch(way)
        layer, kept = self.layers[index], way.saved.pop()
        assert kept is not None
        if kept.hidden is None:
            assert self.placement.checkpoints is not None
            kept.hidden = self.placement.checkpoints.get(index)
        way.hidden = layer.backward(
            way.take(), kept, way.batch, way.positions[layer.kind], self._keys(index, way.batch),
            wanted=index > self.lowest, mlp_chunk=self.plan.mlp_chunk_tokens,
        )  # fmt: skip

    def gradients(self) -> dict[int, list[Tensor]]:
        found = {number: bank.gradients for number, bank in enumerate(self.banks)}
        return {number: [flat] for number, flat in found.items() if flat is not None}

    def shared_by_layers(self) -> list[tuple[Tensor, dict[int, int]]]:
        return [shared for bank in self.banks for shared in bank.by_layer()]

    @contextmanager
    def _at_work(self, layer: int, *, backward: bool = False) -> Iterator[None]:
        """The layer's weights and adapters are there inside."""
        self.watch(layer)
        with self.placement.at_home(layer, backward=backward):
            bank = self.banks[self.devices.here]
            bank.enter(layer, backward=backward)
            yield
            bank.leave(layer, backward=backward)

    def _keys(self, layer: int, batch: MicroBatch) -> Tensor | None:
        """Of the layer's dropout masks. A frozen adapter is a part of the model, and drops nothing."""
        drops = self.dropout > 0 and layer not in self.plan.frozen_layers
        return batch.row_keys if drops else None

    def _waits_on_host(self, layer: int) -> bool:
        """Whether the layer's input waits there for backward."""
        recomputes = layer >= self.lowest and layer in self.plan.recompute_layers
        return recomputes and self.plan.checkpoints == "host"

    def _on_each(self, batch: MicroBatch) -> list[tuple[MicroBatch, dict[str, Positions]]]:
        """The micro-batch and its angles on each device."""
        positions = self._positions(batch)

        def moved(
            bring: Callable[[Tensor], Tensor],
        ) -> tuple[MicroBatch, dict[str, Positions]]:
            return batch.moved(bring), {
                kind: Positions(bring(found.cos), bring(found.sin))
                for kind, found in positions.items()
            }

        return self.devices.on_each(moved)

    def _embed(self, batch: MicroBatch) -> Tensor:
        table = self.placement.embedding
        if table is None:
            return cast(Tensor, self.decoder.embed_tokens(batch.input_ids)[0]).to(self.dtype)
        rows = table.rows(batch.tokens)
        scale = scale_of(self.decoder.embed_tokens)
        return (rows if scale == 1.0 else rows.mul_(scale)).to(self.dtype)

    def _positions(self, batch: MicroBatch) -> dict[str, Positions]:
        """Angles by kind of layer: some models turn their windowed layers at another rate."""
        rotary = self.decoder.rotary_emb
        like = torch.empty(0, dtype=torch.float32, device=batch.input_ids.device)
        by_kind = self.model.config.model_type == "gemma3_text"
        found: dict[str, Positions] = {}
        for kind in dict.fromkeys(layer.kind for layer in self.layers):
            if found and not by_kind:
                found[kind] = next(iter(found.values()))
                continue
            cos, sin = rotary(like, batch.position_ids, *([kind] if by_kind else []))
            half = cos.shape[-1] // 2  # transformers has every angle twice
            found[kind] = Positions(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
        return found

    def _losses(self, ways: Sequence[_Way], scale: float, *, gradient: bool) -> list[Tensor]:
        """Each one's loss, on the first device; their gradients are left with them."""
        with self.devices.at(self.devices.last):
            for way in ways:
                way.hidden = way.take().index_select(0, way.batch.target_rows)
            if self.placement.head is not None:
                found = self._sliced_losses(self.placement.head, ways, scale, gradient=gradient)
            else:
                found = [self._head_loss(way, scale, gradient=gradient) for way in ways]
        for way, (_, grad) in zip(ways, found, strict=True):
            way.gradient = grad
        return [self.devices.bring(loss, self.devices.last) for loss, _ in found]

    def _head_loss(
        self, way: _Way, scale: float, *, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        return head_loss(
            self._normed(way),
            self.head.weight,
            way.batch.targets,
            bias=self.head.bias,
            scale=scale,
            softcap=self.softcap,
            chunk=self.plan.loss_chunk_tokens,
            gradient=gradient,
        )

    def _sliced_losses(
        self, head: StreamedHead, ways: Sequence[_Way], scale: float, *, gradient: bool
    ) -> list[tuple[Tensor, Tensor | None]]:
        return sliced_losses(
            [(self._normed(way), way.batch.targets) for way in ways],
            head.slices,
            bias=self.head.bias,
            scale=scale,
            chunk=head.rows_at_once(self.plan.loss_chunk_tokens),
            gradient=gradient,
        )

    def _normed(self, way: _Way) -> Tensor:
        """What the head reads, in what its table is stored in, whatever the layers compute in."""
        assert way.hidden is not None
        return self.norm(way.hidden).to(getattr(torch, self.plan.storage_dtype))


# Models whose logits are the head's product and nothing more, so that the loss may take the head by
# itself. Others go through their own forward, logits and all.
PLAIN_HEAD = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma3_text", "olmo2", "smollm3"}
)


def model_inputs(batch: MicroBatch, *, together: bool) -> dict[str, Any]:
    """What transformers' forward is given. together: as of a `Network`."""
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    if together:  # of one sequence alone they are what the model takes by itself
        inputs["position_ids"] = batch.position_ids
    return inputs


class AutogradNetwork:
    """transformers' own forward, and autograd: any causal model.

    together: whether sequences behind each other stay apart in it; else micro-batches have one each.
    """

    def __init__(
        self,
        model: nn.Module,
        context: StepContext,
        plan: Plan,
        placement: Placement,
        *,
        together: bool = True,
    ) -> None:
        self.model, self.context, self.together = cast(Any, model), context, together
        self.plan, self.placement = plan, placement
        self.watch: Watch = _nobody
        layers = decoder_layers(model)
        for index, layer in enumerate(layers):
            self._announce(index, layer, last=layer is layers[-1])

    def _announce(self, index: int, layer: nn.Module, *, last: bool) -> None:
        """Has the layer say when it is at work, forward and backward."""

        def before(*_: Any) -> None:
            self.watch(index)

        def after(_: Any, __: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if self.watch is not _nobody and hidden.requires_grad:
                hidden.register_hook(lambda grad: self.watch(index))
            if last:
                self.watch(None)

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    def adopt(self, plan: Plan) -> None:
        self.plan = plan

    def begin(self) -> None:
        pass

    def reset(self) -> None:
        self.placement.reset()

    def train(self, batches: Sequence[MicroBatch], *, scale: float, phase: Phase) -> list[Tensor]:
        return [self._train(batch, scale, phase) for batch in batches]

    def _train(self, batch: MicroBatch, scale: float, phase: Phase) -> Tensor:
        with phase("forward"):
            self.placement.begin(backward_follows=True, lowest=self.plan.lowest_learning)
            loss = self._loss(batch, scale)
        with phase("backward"):
            loss.backward()
            self.watch(None)
        return loss.detach()

    @torch.no_grad()
    def loss(self, batch: MicroBatch, *, scale: float) -> Tensor:
        self.placement.begin(backward_follows=False)
        return self._loss(batch, scale)

    def gradients(self) -> dict[int, list[Tensor]]:
        found = [p.grad for p in self.model.parameters() if p.grad is not None]
        return {0: found} if found else {}

    def shared_by_layers(self) -> list[tuple[Tensor, dict[int, int]]]:
        return []

    def _loss(self, batch: MicroBatch, scale: float) -> Tensor:
        self.context.enter(batch)
        inputs = model_inputs(batch, together=self.together)
        if self.model.config.model_type in PLAIN_HEAD:
            hidden = self.model.get_decoder()(**inputs).last_hidden_state[0]
            hidden = hidden.index_select(0, batch.target_rows)
            head, chunk = self.model.get_output_embeddings(), self.plan.loss_chunk_tokens
            about = {"scale": scale, "bias": head.bias}
            if (streamed := self.placement.head) is not None:
                chunk = streamed.rows_at_once(chunk)
                return sliced_cross_entropy(
                    hidden, streamed.slices, batch.targets, chunk=chunk, **about
                )
            return chunked_cross_entropy(hidden, head.weight, batch.targets, chunk=chunk, **about)
        logits = self.model(**inputs).logits[0]
        logits = logits.index_select(0, batch.target_rows)
        loss = nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
        return loss * scale
