"""A decoder layer, forward and backward by hand.

Autograd keeps what each operator might need; a layer whose backward is written out keeps what the Plan
says, and makes the rest again. The order of its work is the point of this file: norms, activations and
rotations are cheap and never kept; products and attention are kept first where there is memory; what
is made again stops short of the last product, whose output no backward needs; gradients overwrite
what they were computed from. Frozen weights get no gradient, so none is prepared.

Shapes: T tokens of a micro-batch laid behind each other, H hidden, h heads of size d.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fitlora.plan import Kept
from fitlora.step import pointwise
from fitlora.step.attention import attend, attend_backward
from fitlora.step.batch import MicroBatch
from fitlora.step.group import LinearGroup, joined


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm: x / rms(x) * (weight + offset). module: transformers'."""

    module: nn.Module
    eps: float
    offset: float  # 1 for Gemma, whose weights are stored less one

    @classmethod
    def of(cls, module: nn.Module, offset: float) -> "Norm":
        """From a norm of transformers', whose weight may still be moved."""
        part = cast(Any, module)
        eps = part.variance_epsilon if hasattr(part, "variance_epsilon") else part.eps
        return cls(module, float(eps), offset)

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.module.weight)

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        pointwise.rms_norm(x, self.weight, self.eps, self.offset, out)
        return out

    def after_add(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """a + b, in the memory of b, and its norm."""
        out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
        pointwise.add_rms_norm(a, b, self.weight, self.eps, self.offset, b, out)
        return b, out

    def backward(self, dy: Tensor, x: Tensor, residual: Tensor | None, out: Tensor) -> Tensor:
        """The gradient of x, plus `residual`, written to `out`, which may be dy."""
        pointwise.rms_norm_backward(dy, x, self.weight, self.eps, self.offset, residual, out)
        return out


@dataclass(frozen=True)
class Positions:
    """Cosine and sine of every token's angles, float32 (T, half of the rotated features)."""

    cos: Tensor
    sin: Tensor


@dataclass
class Saved:
    """What a layer's forward leaves for its backward; what is None is made again."""

    hidden: Tensor | None  # the layer's input (T, H); None while it waits on the host
    qkv: Tensor | None = None  # (T, (h + 2 kv) d), rotated where no norm comes before the rotation
    qkv_narrow: Tensor | None = None
    attended: Tensor | None = None  # (T, h d)
    attention: tuple[Tensor, ...] | None = None
    middle: Tensor | None = None  # (T, H), the residual stream between attention and MLP
    o: Tensor | None = None  # (T, H), what the norm behind attention was given, where there is one
    o_narrow: Tensor | None = None
    gate_up: list[Tensor] = field(default_factory=list)  # (T, intermediate) each, or one for both
    gate_up_narrow: Tensor | None = None
    down: Tensor | None = None  # (T, H), what the norm behind the MLP was given, where there is one
    down_narrow: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """One layer: its parts, taken from transformers' modules by `fitlora.step.families`."""

    qkv: LinearGroup
    o: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup
    input_norm: Norm
    mlp_norm: Norm
    attention_out_norm: Norm | None  # behind attention and MLP: Gemma 2 and 3
    mlp_out_norm: Norm | None
    q_norm: Norm | None  # of each head: Qwen 3, Gemma 3
    k_norm: Norm | None
    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int  # tokens to the left that are seen; -1 for all
    softcap: float | None
    activation: Literal["silu", "gelu_tanh"]
    kind: str  # which rotation it takes

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return (self.qkv, self.o, self.gate_up, self.down)

    @property
    def has_adapters(self) -> bool:
        return any(group.adapters for group in self.groups)

    # --- forward ---------------------------------------------------------------------------------

    def forward(
        self,
        hidden: Tensor,
        batch: MicroBatch,
        positions: Positions,
        keys: Tensor | None,
        keep: Collection[Kept] | None,
        *,
        mlp_chunk: int | None = None,
    ) -> tuple[Tensor, Saved | None]:
        """hidden: (T, H), which stays as it is. keys: of the dropout masks, None without dropout.

        keep: what to keep for backward beside the input; None where there will be no backward.
        mlp_chunk: tokens that go through the MLP at one time where it is not kept; None for all.
        Returns the layer's output and what was kept.
        """
        kept = keep or ()
        saved = Saved(hidden)
        self._project(saved, positions, keys)
        self._attend(saved, batch, positions)
        if "qkv" not in kept:
            saved.qkv = saved.qkv_narrow = None
        out = self._enter_mlp(saved, keys)  # the MLP's input gives way to the output, part by part
        if "attention" not in kept:
            saved.attended = saved.attention = None
        for part in _parts(len(out), None if "mlp" in kept else mlp_chunk):
            self._mlp(out[part], saved, _of(keys, part), _known(saved.middle)[part], "mlp" in kept)
        if "middle" not in kept:
            saved.middle = saved.o = saved.o_narrow = None
        return out, None if keep is None else saved

    def _project(self, saved: Saved, positions: Positions, keys: Tensor | None) -> None:
        parts, saved.qkv_narrow = self.qkv.forward(self.input_norm(_known(saved.hidden)), keys)
        saved.qkv = joined(parts)
        if self.q_norm is None:
            q, k, _ = self._heads(saved.qkv)
            pointwise.rope(q, k, positions.cos, positions.sin, False)

    def _attend(self, saved: Saved, batch: MicroBatch, positions: Positions) -> None:
        q, k, v = self._rotated(_known(saved.qkv), positions)
        out, saved.attention = attend(q, k, v, batch, self.scale, self.window, self.softcap)
        saved.attended = out.view(len(out), -1)

    def _enter_mlp(self, saved: Saved, keys: Tensor | None) -> Tensor:
        """Makes the residual stream between attention and MLP; returns its norm."""
        (o,), saved.o_narrow = self.o.forward(_known(saved.attended), keys)
        if self.attention_out_norm is not None:
            saved.o = o
            o = self.attention_out_norm(o)
        saved.middle, n = self.mlp_norm.after_add(_known(saved.hidden), o)
        return n

    def _mlp(
        self, n: Tensor, saved: Saved, keys: Tensor | None, middle: Tensor, keep: bool
    ) -> None:
        """From the MLP's input to the layer's output, in the memory of n."""
        self._gate_up(saved, n, keys)
        out = self._leave_mlp(saved, keys, keep=keep)
        if self.mlp_out_norm is not None:
            saved.down = out if keep else None
            out = self.mlp_out_norm(out)
        torch.add(out, middle, out=n)

    def _gate_up(self, saved: Saved, n: Tensor, keys: Tensor | None) -> None:
        saved.gate_up, saved.gate_up_narrow = self.gate_up.forward(n, keys)

    def _leave_mlp(self, saved: Saved, keys: Tensor | None, *, keep: bool) -> Tensor:
        """down(act(gate) * up); where not to `keep`, gate and up are given up on the way."""
        gate, up = _halves(saved.gate_up)
        m = gate.new_empty(gate.shape) if keep else gate
        pointwise.glu(gate, up, self.activation, m)
        del gate, up
        if not keep:
            saved.gate_up, saved.gate_up_narrow = [], None
        (out,), narrow = self.down.forward(m, keys)
        saved.down_narrow = narrow if keep else None
        return out

    # --- backward --------------------------------------------------------------------------------

    def backward(
        self,
        grad: Tensor,
        saved: Saved,
        batch: MicroBatch,
        positions: Positions,
        keys: Tensor | None,
        *,
        wanted: bool,
        mlp_chunk: int | None = None,
    ) -> Tensor | None:
        """Adds the adapters' gradients; returns the gradient of the input (T, H) where `wanted`.

        grad: (T, H), of the output; it is overwritten, and `saved` is used up.
        """
        n = self._make_again(saved, batch, positions, keys)
        for part in _parts(len(n), None if saved.gate_up else mlp_chunk):
            middle = _known(saved.middle)[part]
            self._mlp_backward(grad[part], saved, n[part], middle, _of(keys, part))
        del n, middle
        return self._attention_backward(grad, saved, batch, positions, keys, wanted=wanted)

    def _make_again(
        self, saved: Saved, batch: MicroBatch, positions: Positions, keys: Tensor | None
    ) -> Tensor:
        """What was not kept, up to the MLP; returns the MLP's input."""
        if saved.qkv is None:
            self._project(saved, positions, keys)
        if saved.attended is None:
            self._attend(saved, batch, positions)
        if saved.middle is None:
            return self._enter_mlp(saved, keys)
        return self.mlp_norm(saved.middle)

    def _make_mlp_again(self, saved: Saved, n: Tensor, keys: Tensor | None) -> None:
        self._gate_up(saved, n, keys)
        if self.mlp_out_norm is not None:  # the one product more that a norm behind it needs
            gate, up = _halves(saved.gate_up)
            m = gate.new_empty(gate.shape)
            pointwise.glu(gate, up, self.activation, m)
            (saved.down,), saved.down_narrow = self.down.forward(m, keys)

    def _mlp_backward(
        self, grad: Tensor, saved: Saved, n: Tensor, middle: Tensor, keys: Tensor | None
    ) -> None:
        """Turns the gradient of the layer's output into that of the residual stream before the MLP."""
        if not saved.gate_up:
            self._make_mlp_again(saved, n, keys)
        out_grad = grad
        if self.mlp_out_norm is not None:
            out_grad = self.mlp_out_norm.backward(
                grad, _known(saved.down), None, torch.empty_like(grad)
            )
            saved.down = None
        m, narrow_grad = self.down.input_gradient([out_grad], keys, wanted=True)
        assert m is not None
        gate, up = _halves(saved.gate_up)
        pointwise.glu_backward(m, gate, up, self.activation)
        self.down.adapter_gradients([out_grad], m, saved.down_narrow, narrow_grad, keys)
        del m, gate, up, out_grad
        dn, narrow_grad = self.gate_up.input_gradient(saved.gate_up, keys, wanted=True)
        self.gate_up.adapter_gradients(saved.gate_up, n, saved.gate_up_narrow, narrow_grad, keys)
        saved.gate_up, saved.gate_up_narrow, saved.down_narrow = [], None, None
        assert dn is not None
        self.mlp_norm.backward(dn, middle, grad, grad)

    def _attention_backward(
        self,
        grad: Tensor,
        saved: Saved,
        batch: MicroBatch,
        positions: Positions,
        keys: Tensor | None,
        *,
        wanted: bool,
    ) -> Tensor | None:
        """From the residual stream before the MLP to the layer's input."""
        o_grad = grad
        if self.attention_out_norm is not None:
            o_grad = self.attention_out_norm.backward(
                grad, _known(saved.o), None, torch.empty_like(grad)
            )
        saved.middle = saved.o = None
        attended = _known(saved.attended)
        da, narrow_grad = self.o.input_gradient([o_grad], keys, wanted=True)
        self.o.adapter_gradients([o_grad], attended, saved.o_narrow, narrow_grad, keys)
        del o_grad
        assert da is not None
        dqkv = self._scores_backward(da, saved, batch, positions)
        del da, attended
        saved.attended = saved.attention = saved.o_narrow = None
        gradients = [dqkv] if len(self.qkv.sizes) == 1 else list(dqkv.split(self.qkv.sizes, 1))
        dn, narrow_grad = self.qkv.input_gradient(gradients, keys, wanted=wanted)
        if self.qkv.learns:
            n = self.input_norm(_known(saved.hidden))
            self.qkv.adapter_gradients(gradients, n, saved.qkv_narrow, narrow_grad, keys)
            del n
        saved.qkv_narrow = None
        return None if dn is None else self.input_norm.backward(dn, _known(saved.hidden), grad, dn)

    def _scores_backward(
        self, da: Tensor, saved: Saved, batch: MicroBatch, positions: Positions
    ) -> Tensor:
        """The gradient of qkv, in memory of its own."""
        qkv = _known(saved.qkv)
        q, k, v = self._rotated(qkv, positions)
        dq, dk, dv = attend_backward(
            da.view(len(da), self.heads, -1), q, k, v, _known(saved.attended).view(q.shape),
            saved.attention, batch, self.scale, self.window, self.softcap,
        )  # fmt: skip
        del q, k, v
        pointwise.rope(dq, dk, positions.cos, positions.sin, True)
        whole = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        q_place, k_place, v_place = self._heads(whole)
        v_place.copy_(dv)
        for norm, raw, gradient, place in (
            (self.q_norm, 0, dq, q_place),
            (self.k_norm, 1, dk, k_place),
        ):
            if norm is None:
                place.copy_(gradient)
            else:
                norm.backward(gradient, self._heads(qkv)[raw], None, place)
        saved.qkv = None
        return whole

    # --- heads -----------------------------------------------------------------------------------

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, h, d) and twice (T, kv, d), slices of qkv."""
        heads = qkv.view(len(qkv), -1, self.head_size)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 1)
        return q, k, v

    def _rotated(self, qkv: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """The same as attention takes them; where they are normed first, in memory of their own."""
        q, k, v = self._heads(qkv)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
            pointwise.rope(q, k, positions.cos, positions.sin, False)
        return q, k, v


def _known(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _of(keys: Tensor | None, part: slice) -> Tensor | None:
    return None if keys is None else keys[part]


def _parts(tokens: int, chunk: int | None) -> Iterator[slice]:
    """`tokens` in parts of `chunk`; all as one where it is None."""
    chunk = chunk or max(1, tokens)
    return (slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk))


def _halves(gate_up: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gate and up, each (T, intermediate), of two products' outputs or of one's."""
    gate, up = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, 1)
    return gate, up
