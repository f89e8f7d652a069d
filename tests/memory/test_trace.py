"""The trace against sequences of allocations that are known, on the CPU's real tensors."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fitlora.memory.trace import Block, MemoryTrace, rounded
from fitlora.step import ops

MB = 1 << 20


def mb(count: float) -> Tensor:
    return torch.empty(int(count * MB), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("count", "taken"), [(0, 0), (1, 512), (512, 512), (513, 1024), (10**6, 1_000_448)]
)
def test_blocks_are_those_of_the_cuda_allocator(count: int, taken: int) -> None:
    assert rounded(count) == taken
    with MemoryTrace() as trace:
        kept = torch.empty(count, dtype=torch.uint8)
        assert trace.live_bytes == taken
    assert len(kept) == count


def test_plain_bytes_where_asked() -> None:
    with MemoryTrace(round_up=False) as trace:
        kept = [torch.empty(3), torch.empty(7, dtype=torch.uint8)]
        assert trace.live_bytes == 12 + 7
    assert len(kept) == 2


def test_allocations_and_frees() -> None:
    with MemoryTrace() as trace:
        a = mb(1)
        assert trace.live_bytes == MB
        b = a + 1
        assert trace.live_bytes == 2 * MB
        del a
        assert trace.live_bytes == MB
        c = torch.cat([b, b])
        assert trace.live_bytes == 3 * MB
        del b, c
        assert trace.live_bytes == 0
        assert trace.live == {}
        assert trace.peak.bytes == 3 * MB
        assert trace.peak.operator == "aten::cat"


def test_views_share_their_block() -> None:
    with MemoryTrace() as trace:
        a = mb(1)
        views = [a.view(-1, 2), a[10:], a.t(), a.detach(), a.view(torch.int8), *a.split(1000)]
        assert trace.live_bytes == MB
        del a
        assert trace.live_bytes == MB, "a view keeps the block alive"
        views.clear()
        assert trace.live_bytes == 0


def test_in_place_and_out_add_nothing() -> None:
    with MemoryTrace() as trace:
        a = torch.zeros(MB // 4)
        a.add_(1).mul_(a)
        torch.add(a, a, out=a)
        a.copy_(a)
        assert trace.peak.bytes == MB
        a[:10] = 3.0
        assert trace.live_bytes == MB
        assert trace.peak.bytes <= MB + 512  # the number 3 as a tensor


def test_several_outputs_of_one_operator() -> None:
    with MemoryTrace() as trace:
        values, indices = torch.zeros(4, MB // 16).max(dim=0)
        assert trace.peak.bytes == MB + MB // 4 + MB // 2
        assert trace.live_bytes == MB // 4 + MB // 2
    assert values.shape == indices.shape


def test_temporaries_count_at_the_peak_and_not_after() -> None:
    with MemoryTrace() as trace:
        a = mb(1)
        total = ((a + 1) + (a + 2)).sum()
        assert trace.peak.bytes == 4 * MB  # a, both sums and what they add to
        assert trace.live_bytes == MB + 512
    assert total.dim() == 0


def test_tensors_from_before() -> None:
    before = mb(1)
    with MemoryTrace() as trace:
        after = mb(1)
        assert trace.live_bytes == MB
        trace.watch([before, before.view(-1, 2)])
        assert trace.live_bytes == 2 * MB
        trace.watch([before])
        assert trace.live_bytes == 2 * MB
        assert trace.peak.bytes == 2 * MB
        assert trace.blocks_of([before, after]) == set(trace.live)
        del before
        assert trace.live_bytes == MB
    assert len(after) == MB


def test_meta_tensors_are_nothing() -> None:
    with MemoryTrace() as trace:
        kept = torch.empty(MB, device="meta") + 1
        assert trace.live_bytes == 0
    assert len(kept) == MB


def test_what_autograd_keeps_is_alive() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(1024, 64)
    size = 1024 * 64 * 4
    with MemoryTrace() as trace:
        trace.watch([weight, x])
        before = trace.live_bytes
        y = torch.sigmoid(x @ weight)  # the sigmoid keeps its output, the product x and weight
        z = (y * 2).sum()
        del y
        assert trace.live_bytes - before == size + 512
        z.backward()
        del z
        assert weight.grad is not None
        assert trace.live_bytes - before == 64 * 64 * 4
        weight.grad = None
        assert trace.live_bytes == before


def test_phases() -> None:
    with MemoryTrace() as trace:
        a = mb(1)
        with trace.during("first"):
            b = mb(2)
            del b
        with trace.during("second"):
            with trace.during("inner"):
                c = mb(3)
            d = mb(1)
            del c, d
        with trace.during("idle"):
            pass
        with trace.during("first"):  # again, and smaller
            e = mb(0.5)
        assert trace.phase_peaks == {
            "build": MB, "first": 3 * MB, "second": 5 * MB, "inner": 4 * MB, "idle": MB,
        }  # fmt: skip
        assert trace.phase == "build"
        assert [b.phase for b in trace.live.values()] == ["build", "first"]
        assert (trace.peak.bytes, trace.peak.phase) == (5 * MB, "second")
    assert len(a) > len(e)


def test_a_phase_ends_with_an_error() -> None:
    def fails(trace: MemoryTrace) -> None:
        with trace.during("first"):
            raise RuntimeError

    with MemoryTrace() as trace:
        with pytest.raises(RuntimeError):
            fails(trace)
        assert trace.phase == "build"


def test_resetting_the_peak() -> None:
    with MemoryTrace() as trace:
        a = mb(1)
        b = mb(2)
        del b
        trace.reset_peak()
        assert trace.peak.bytes == MB
        assert not trace.phase_peaks
        assert list(trace.peak.live.values()) == [Block(MB, "build", "")]
        c = mb(0.5)
        assert trace.peak.bytes == 1.5 * MB
    assert len(a) > len(c)


def test_the_peak_says_what_was_alive_and_where() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.Sequential(nn.ReLU(), nn.Linear(256, 64)))
    x = torch.randn(4096, 64)
    with torch.no_grad(), MemoryTrace(model) as trace:
        trace.watch(model.parameters())
        model(x)
    inner = 4096 * 256 * 4
    peak = trace.peak
    assert peak.module == "1.1"
    assert peak.operator == "aten::addmm"
    assert [b.module for b in peak.live.values() if b.size == inner] == ["0", "1.0"]
    assert list(peak.live.values())[-1] == Block(4096 * 64 * 4, "build", "1.1")
    assert peak.bytes == sum(b.size for b in peak.live.values())
    # the hooks are gone, and the names with them
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_in_a_module_leaves_its_name() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError

    model = nn.Sequential(Fails())
    with MemoryTrace(model) as trace:
        with pytest.raises(RuntimeError):
            model(mb(1))
        kept = mb(1)
        assert [b.module for b in trace.live.values()] == [""]
    assert len(kept) == MB


def test_blocks_of() -> None:
    with MemoryTrace() as trace:
        a, b = mb(1), mb(2)
        assert trace.blocks_of([a]) == {0}
        assert trace.blocks_of([b[5:], b]) == {1}
        assert trace.blocks_of([]) == set()
    other = mb(1)
    assert trace.blocks_of([a, other]) == {0}


def test_scratch_is_there_beside_what_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's scratch counts while it runs, and by its blocks, each rounded up."""
    monkeypatch.setitem(ops.scratch_bytes, "aten::relu", lambda x: [MB, 1])
    with MemoryTrace() as trace:
        a = torch.zeros(MB // 4)
        with trace.during("kernel"):
            b = a.relu()
        assert trace.live_bytes == 2 * MB
        assert trace.peak.bytes == 3 * MB + 512
        assert trace.phase_peaks["kernel"] == 3 * MB + 512
        assert trace.peak.operator == "aten::relu"
        assert sum(block.size for block in trace.peak.live.values()) == trace.peak.bytes
        a.relu_()
    assert len(b) == MB // 4


def test_attention_backward_has_its_scratch() -> None:
    lengths, heads, size = [100, 60], 4, 32
    tokens = sum(lengths)
    starts = torch.tensor([0, 100, 160], dtype=torch.int32)
    q, g = torch.randn(tokens, heads, size), torch.randn(tokens, heads, size)
    k, v = torch.randn(tokens, 2, size), torch.randn(tokens, 2, size)
    out, lse, rng, unused = torch.ops.fitlora.attention(q, k, v, starts, lengths, 0.1, -1)
    with MemoryTrace() as trace:
        kept = torch.ops.fitlora.attention_backward(
            g, q, k, v, out, lse, rng, unused, starts, lengths, 0.1, -1
        )
        results = 4 * tokens * size * (heads + 2 + 2)
        padded = tokens + 2 * 128
        scratch = 4 * padded * heads * size + 4 * padded * heads + 2 * (4 * tokens * heads * size)
        assert trace.live_bytes == results
        assert trace.peak.bytes == results + scratch
    assert len(kept) == 3


def test_fake_tensors_count_like_real_ones() -> None:
    def work() -> list[Any]:
        a = torch.zeros(300, 77)
        b = (a @ a.t()).softmax(-1)
        c, _ = b.sort(dim=0)
        return [c[:7], torch.cat([a, a])]

    def traced() -> tuple[int, int, dict[str, int]]:
        with MemoryTrace() as trace:
            kept = work()
            result = trace.live_bytes, trace.peak.bytes, dict(trace.phase_peaks)
        kept.clear()
        gc.collect()
        assert trace.live_bytes == 0
        return result

    real = traced()
    with FakeTensorMode():
        assert traced() == real


def test_autograd_writes_into_the_zeros_that_it_makes() -> None:
    """As it does where nobody watches; and what a forward asks a copy of is one."""
    x = torch.zeros(1000, 256).requires_grad_()
    rows = torch.zeros(1000, dtype=torch.int64)
    y = x[rows]
    grad = torch.ones_like(y)
    with MemoryTrace() as trace:
        y.backward(grad)
        assert trace.peak.bytes == rounded(1000 * 256 * 4)
    assert x.grad is not None
    assert torch.equal(x.grad[0], torch.full((256,), 1000.0))
    with MemoryTrace() as trace, torch.no_grad():
        copy = x.index_add(0, rows, grad)
        assert trace.live_bytes == rounded(1000 * 256 * 4)
    assert float(copy.sum()) == x.numel()


def test_asking_whether_all_is_so_is_answered_without_content() -> None:
    with MemoryTrace(shapes=True):
        positions = torch.arange(7, device="meta")
        assert (positions.diff() == 1).all()
        with pytest.raises(RuntimeError, match="meta"):
            bool((positions == 1).any())


def test_grouped_products_have_scratch() -> None:
    a, b = torch.empty(64, 16), torch.empty(8, 16, 32)
    groups, maps = ops.scratch_bytes["aten::_grouped_mm"](a, b)
    assert groups == 8 * 60
    assert 2**16 < maps < 2**17
