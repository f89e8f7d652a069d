"""A micro-batch through the model and back: by hand where the family is known, else by autograd.

Both have the same face: `begin` an optimizer step, `train` on a micro-batch (the adapters' gradients
are added up), and the `loss` of one without gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fitlora.model import decoder_layers
from fitlora.offload.vocabulary import sliced_loss
from fitlora.plan import Plan
from fitlora.step.bank import AdapterBank
from fitlora.step.batch import MicroBatch, StepContext
from fitlora.step.layer import DecoderLayer, Norm, Positions, Saved
from fitlora.step.loss import chunked_cross_entropy, head_loss
from fitlora.step.placement import Placement, scale_of

Phase = Callable[[str], AbstractContextManager[Any]]
# Told which decoder layer is at work, None outside of them: a trace books memory by it.
Watch = Callable[[int | None], None]


class Network(Protocol):
    """What a training step runs."""

    watch: Watch
    placement: Placement

    def adopt(self, plan: Plan) -> None:
        """Goes on as the plan says; between steps."""

    def begin(self) -> None:
        """Begins an optimizer step."""

    def reset(self) -> None:
        """Forgets a micro-batch that was broken off: nothing is under way any more."""

    def train(self, batch: MicroBatch, *, scale: float, phase: Phase) -> Tensor:
        """Adds the gradients of `scale` times the summed loss; returns that loss, float32 ()."""

    def loss(self, batch: MicroBatch, *, scale: float) -> Tensor:
        """The same loss without dropout and without gradients."""

    def gradients(self) -> list[Tensor]:
        """All of the adapters' gradients that are on the device, in as few tensors as they lie in."""


def _nobody(layer: int | None) -> None:
    pass


class HandNetwork:
    """Layers with a backward of their own. model: a causal model of a known family, filled."""

    def __init__(
        self, model: nn.Module, layers: Sequence[DecoderLayer], plan: Plan, placement: Placement
    ) -> None:
        self.model, self.layers = cast(Any, model), layers
        self.plan, self.placement = plan, placement
        self.bank = AdapterBank(
            [layer.groups for layer in layers],
            getattr(torch, plan.storage_dtype),
            leaving=plan.optimizer_device == "host",
        )
        self.decoder = self.model.get_decoder()
        self.head = self.model.get_output_embeddings()
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
        self.bank.dtype = self.dtype
        self.bank.freeze(plan.frozen_layers)
        for layer in self.layers:
            for group in layer.groups:
                group.in_float8(plan.float8_products)

    def begin(self) -> None:
        self.bank.begin()

    def reset(self) -> None:
        self.placement.reset()

    @torch.no_grad()
    def train(self, batch: MicroBatch, *, scale: float, phase: Phase) -> Tensor:
        chunk = self.plan.mlp_chunk_tokens
        with phase("forward"):
            self.placement.begin(backward_follows=True, lowest=self.lowest)
            positions = self._positions(batch)
            hidden = self._embed(batch)
            saved: list[Saved | None] = []
            for index, layer in enumerate(self.layers):
                keep = self.plan.keeps(index) if index >= self.lowest else None
                if index == max(0, len(self.layers) - 2) and self.placement.head is not None:
                    self.placement.head.fetch()  # the link is idle while the top layers compute
                waits = keep is not None and self._waits_on_host(index)
                if waits:
                    assert self.placement.checkpoints is not None
                    self.placement.checkpoints.put(index, hidden)
                with self._at_work(index):
                    out, kept = layer.forward(
                        hidden,
                        batch,
                        positions[layer.kind],
                        self._keys(index, batch),
                        keep,
                        mlp_chunk=chunk,
                    )
                if kept is not None and waits:
                    kept.hidden = None
                saved.append(kept)
                hidden = out
                del kept, out
            self.watch(None)
            tokens = hidden.shape
            hidden = hidden.index_select(0, batch.target_rows)
            loss, grad = self._loss(hidden, batch, scale, gradient=True)
        with phase("backward"):
            assert grad is not None
            grad = grad.to(self.dtype)
            grad = self.norm.backward(grad, hidden, None, grad)
            device = hidden.device
            del hidden
            whole: Tensor | None = torch.zeros(tokens, dtype=self.dtype, device=device).index_copy_(
                0, batch.target_rows, grad
            )
            del grad
            for index in range(len(self.layers) - 1, self.lowest - 1, -1):
                layer, kept = self.layers[index], saved.pop()
                assert kept is not None
                assert whole is not None
                with self._at_work(index, backward=True):
                    if kept.hidden is None:
                        assert self.placement.checkpoints is not None
                        kept.hidden = self.placement.checkpoints.get(index)
                    whole = layer.backward(
                        whole, kept, batch, positions[layer.kind], self._keys(index, batch),
                        wanted=index > self.lowest, mlp_chunk=chunk,
                    )  # fmt: skip
                del kept
            self.watch(None)
        return loss

    @torch.no_grad()
    def loss(self, batch: MicroBatch, *, scale: float) -> Tensor:
        self.placement.begin(backward_follows=False)
        positions = self._positions(batch)
        hidden = self._embed(batch)
        for index, layer in enumerate(self.layers):
            with self._at_work(index):
                hidden, _ = layer.forward(
                    hidden, batch, positions[layer.kind], None, None,
                    mlp_chunk=self.plan.mlp_chunk_tokens,
                )  # fmt: skip
        self.watch(None)
        loss, _ = self._loss(
            hidden.index_select(0, batch.target_rows), batch, scale, gradient=False
        )
        return loss

    def gradients(self) -> list[Tensor]:
        return [] if self.bank.gradients is None else [self.bank.gradients]

    @contextmanager
    def _at_work(self, layer: int, *, backward: bool = False) -> Iterator[None]:
        """The layer's weights and adapters are there inside."""
        self.watch(layer)
        with self.placement.at_home(layer, backward=backward):
            self.bank.enter(layer, backward=backward)
            yield
            self.bank.leave(layer, backward=backward)

    def _keys(self, layer: int, batch: MicroBatch) -> Tensor | None:
        """Of the layer's dropout masks. A frozen adapter is a part of the model, and drops nothing."""
        drops = self.dropout > 0 and layer not in self.plan.frozen_layers
        return batch.row_keys if drops else None

    def _waits_on_host(self, layer: int) -> bool:
        return self.plan.checkpoints == "host" and layer in self.plan.recompute_layers

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

    def _loss(
        self, hidden: Tensor, batch: MicroBatch, scale: float, *, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        head = self.placement.head
        # the head stays in what its table is stored in, whatever the layers compute in
        hidden = self.norm(hidden).to(getattr(torch, self.plan.storage_dtype))
        if head is not None:
            return sliced_loss(
                hidden,
                head.slices,
                batch.targets,
                bias=self.head.bias,
                scale=scale,
                # as many logits at one time as `loss_chunk_tokens` whole rows of them have
                chunk=self.plan.loss_chunk_tokens * head.count,
                gradient=gradient,
            )
        return head_loss(
            hidden,
            self.head.weight,
            batch.targets,
            bias=self.head.bias,
            scale=scale,
            softcap=self.softcap,
            chunk=self.plan.loss_chunk_tokens,
            gradient=gradient,
        )


# Models whose logits are the head's product and nothing more, so that the loss may take the head by
# itself. Others go through their own forward, logits and all.
PLAIN_HEAD = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma3_text", "olmo2", "smollm3"}
)


class AutogradNetwork:
    """transformers' own forward, and autograd: any causal model."""

    def __init__(
        self, model: nn.Module, context: StepContext, plan: Plan, placement: Placement
    ) -> None:
        self.model, self.context = cast(Any, model), context
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

    def train(self, batch: MicroBatch, *, scale: float, phase: Phase) -> Tensor:
        with phase("forward"):
            self.placement.begin(backward_follows=True, lowest=self.plan.lowest_learning)
            loss = self._loss(batch, scale)
        with phase("backward"):
            loss.backward()
        return loss.detach()

    @torch.no_grad()
    def loss(self, batch: MicroBatch, *, scale: float) -> Tensor:
        self.placement.begin(backward_follows=False)
        return self._loss(batch, scale)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def _loss(self, batch: MicroBatch, scale: float) -> Tensor:
        self.context.enter(batch)
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        if self.model.config.model_type in PLAIN_HEAD and self.placement.head is None:
            hidden = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state[0]
            head = self.model.get_output_embeddings()
            return chunked_cross_entropy(
                hidden.index_select(0, batch.target_rows),
                head.weight,
                batch.targets,
                scale=scale,
                chunk=self.plan.loss_chunk_tokens,
                bias=head.bias,
            )
        logits = self.model(**inputs, use_cache=False).logits[0]
        logits = logits.index_select(0, batch.target_rows)
        loss = nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum")
        return loss * scale
