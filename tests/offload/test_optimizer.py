"""An optimizer on the host is the plain one, to the bit where both compute in fp32."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fitlora.errors import UserError
from fitlora.memory.trace import MemoryTrace, rounded
from fitlora.offload import optimizer as module
from fitlora.offload.host_memory import HostMemory, anonymous_bytes
from fitlora.offload.optimizer import CPUOffloadOptimizer
from fitlora.offload.transport import HostTransport, TracedTransport
from fitlora.step.optimizer_state import make_states
from tests.offload.transports import DelayedTransport

CPU = torch.device("cpu")
Make = Callable[[list[Any]], torch.optim.Optimizer]


class Foreign(torch.optim.Optimizer):
    """One that counts its steps in the group: it must not be cut into buckets."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] / group["count"])
        return loss


OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "foreign": lambda p: Foreign(p, {"lr": 0.05}),
}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    make = torch.Generator().manual_seed(0)
    shapes = ((4, 6), (6,), (3, 5, 2), (7, 4))
    return [nn.Parameter(torch.randn(s, generator=make).to(dtype)) for s in shapes]


def loss_of(params: list[nn.Parameter], step: int) -> Tensor:
    """The last parameter has no gradient in every third step."""
    used = params[:-1] if step % 3 == 2 else params
    return torch.stack([(p.float() * (0.5 + step)).sin().square().sum() for p in used]).sum()


def train(
    params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range, parts: int = 1
) -> list[Tensor]:
    for step in steps:

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            for part in range(parts):
                loss = loss_of(params, step + part)
                loss.backward()
            return loss

        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step(closure)
    return [p.detach().clone() for p in params]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUCKET_BYTES", 100)
    monkeypatch.setattr(module, "_IN_FLIGHT", 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("offload_gradients", [False, True])
def test_it_is_the_plain_optimizer(name: str, offload_gradients: bool) -> None:
    expected_params = parameters()
    expected = train(expected_params, OPTIMIZERS[name](expected_params), range(7), parts=2)
    for seed in range(2):
        params = parameters()
        optimizer = CPUOffloadOptimizer(
            OPTIMIZERS[name](params),
            transport=DelayedTransport(seed, 1e-4),
            offload_gradients=offload_gradients,
        )
        assert_same(train(params, optimizer, range(7), parts=2), expected)
        assert all((p.grad is None) == offload_gradients for p in params[:-1])


def test_gradients_leave_the_device_while_backward_runs() -> None:
    params = parameters()
    optimizer = CPUOffloadOptimizer(OPTIMIZERS["adamw"](params), offload_gradients=True)
    loss_of(params, 0).backward()
    assert all(p.grad is None for p in params)
    plain = parameters()
    loss_of(plain, 0).backward()
    norm = optimizer.clip_grad_norm_(0.5)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(plain, 0.5))
    OPTIMIZERS["adamw"](plain).step()
    optimizer.step()
    assert_same([p.detach() for p in params], [p.detach() for p in plain])


def test_groups_have_their_own_settings_and_may_be_added() -> None:
    def run(wrap: Callable[[torch.optim.Optimizer], torch.optim.Optimizer]) -> list[Tensor]:
        params = parameters()
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:3], "weight_decay": 0.5}]
        optimizer = wrap(torch.optim.AdamW(groups, lr=0.01))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for step in range(4):
            if step == 2:
                optimizer.add_param_group({"params": params[3:], "lr": 1.0})
            optimizer.zero_grad()
            loss_of(params, step).backward()
            optimizer.step()
            scheduler.step()
        return [p.detach() for p in params]

    assert_same(run(CPUOffloadOptimizer), run(lambda optimizer: optimizer))


@pytest.mark.parametrize("first", ["plain", "offload"])
@pytest.mark.parametrize("second", ["plain", "offload"])
def test_either_loads_the_others_state(first: str, second: str) -> None:
    wrap: dict[str, Any] = {"plain": lambda optimizer: optimizer, "offload": CPUOffloadOptimizer}
    expected_params = parameters()
    expected = train(expected_params, OPTIMIZERS["adamw"](expected_params), range(6))
    params = parameters()
    optimizer = wrap[first](OPTIMIZERS["adamw"](params))
    train(params, optimizer, range(3))
    state = optimizer.state_dict()
    again = [nn.Parameter(p.detach().clone()) for p in params]
    other = wrap[second](OPTIMIZERS["adamw"](again))
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert_same(train(again, other, range(3, 6)), expected)


@pytest.mark.parametrize("weights_first", [False, True])
@pytest.mark.parametrize("offload_gradients", [False, True])
def test_bf16_parameters_have_fp32_masters_that_are_saved(
    weights_first: bool, offload_gradients: bool
) -> None:
    def make(params: list[nn.Parameter]) -> CPUOffloadOptimizer:
        return CPUOffloadOptimizer(OPTIMIZERS["adamw"](params), offload_gradients=offload_gradients)

    masters = [nn.Parameter(p.detach().float()) for p in parameters(torch.bfloat16)]
    plain = OPTIMIZERS["adamw"](masters)
    params = parameters(torch.bfloat16)
    optimizer = make(params)
    for step in range(8):
        if step == 4:  # stopped and resumed
            state = optimizer.state_dict()
            values = [p.detach().clone() for p in params]
            params = parameters(torch.bfloat16)
            optimizer = make(params)
            for part in ("weights", "state") if weights_first else ("state", "weights"):
                if part == "state":
                    optimizer.load_state_dict(state)
                else:
                    with torch.no_grad():
                        for p, value in zip(params, values, strict=True):
                            p.copy_(value)
        rounded_params = [nn.Parameter(m.detach().bfloat16()) for m in masters]
        loss_of(rounded_params, step).backward()
        for m, p in zip(masters, rounded_params, strict=True):
            m.grad = None if p.grad is None else p.grad.float()
        for group in [*plain.param_groups, *optimizer.param_groups]:
            group["lr"] = 1e-4  # far below what bf16 could add
        plain.step()
        optimizer.zero_grad()
        loss_of(params, step).backward()
        optimizer.step()
        assert_same([p.detach() for p in params], [m.detach().bfloat16() for m in masters])
    saved = optimizer.state_dict()["state"]
    assert_same([saved[i]["master"] for i in range(4)], [m.detach() for m in masters])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_user_writes_to_a_parameter_counts(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = CPUOffloadOptimizer(torch.optim.SGD(params, lr=0.0))
    params[0].data.fill_(2.0)  # before the first step
    train(params, optimizer, range(1))
    assert torch.equal(params[0].detach(), torch.full_like(params[0], 2.0))
    with torch.no_grad():
        params[1].fill_(3.0)
    train(params, optimizer, range(1, 2))
    assert torch.equal(params[1].detach(), torch.full_like(params[1], 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_of_views_is_no_change_of_the_users(dtype: torch.dtype) -> None:
    """Views of one buffer have one version, so an update of any changes that of all."""
    flat = torch.randn(60, generator=torch.Generator().manual_seed(0)).to(dtype)
    params = [nn.Parameter(part.view(4, 5)) for part in flat.split(20)]
    transport = HostTransport(CPU)
    optimizer = CPUOffloadOptimizer(torch.optim.AdamW(params), transport=transport)
    came_down = []
    for step in range(3):
        before = transport.downloaded_bytes
        train(params, optimizer, range(step, step + 1))
        came_down.append(transport.downloaded_bytes - before)
    gradients = flat.numel() * flat.element_size()
    assert came_down == [2 * gradients, gradients, gradients * 2 // 3]  # the first brings masters
    with torch.no_grad():
        params[1].fill_(3.0)
    assert torch.equal(optimizer.master(params[1]), torch.full((4, 5), 3.0))


def test_neighbours_in_memory_are_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of memory, which is not that of the parameters; a gap ends what goes together."""
    monkeypatch.setattr(module, "BUCKET_BYTES", 10_000)
    flat = torch.randn(7 * 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    cuts = [flat[384:768], flat[:128], flat[128:384]]  # the rest is no one's
    other = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    params = [nn.Parameter(cut.view(-1, 8)) for cut in cuts] + [nn.Parameter(other)]
    plain = [nn.Parameter(p.detach().float().clone()) for p in params]
    copies: list[tuple[str, int]] = []

    class Counting(HostTransport):
        def _upload(self, destination: Tensor, source: Tensor, after: Any) -> None:
            copies.append(("up", source.numel()))
            super()._upload(destination, source, after)

        def _download(self, destination: Tensor, source: Tensor, after: Any) -> None:
            copies.append(("down", source.numel()))
            super()._download(destination, source, after)

    optimizer = CPUOffloadOptimizer(
        torch.optim.SGD(params, lr=1.0), transport=Counting(CPU), offload_gradients=True
    )
    expected = torch.optim.SGD(plain, lr=1.0)
    gradients = torch.arange(7 * 128.0).bfloat16()
    for _ in range(2):
        for p, q, place in zip(params, plain, (384, 0, 128, None), strict=True):
            cut = torch.ones(28) if place is None else gradients[place : place + p.numel()]
            p.grad, q.grad = cut.bfloat16().view_as(p), cut.float().view_as(q).clone()
        optimizer._send_down([optimizer._masters[p] for p in params])
        optimizer.clip_grad_norm_(None)
    assert copies == 2 * [("down", 768), ("down", 28)]
    optimizer.step()
    optimizer.zero_grad()
    assert copies[-2:] == [("up", 768), ("up", 28)]
    for q in plain:
        assert q.grad is not None
        q.grad.mul_(2)  # two backwards' sum
    expected.step()
    assert_same([optimizer.master(p) for p in params], [q.detach() for q in plain])


def test_an_existing_state_moves_along() -> None:
    expected_params = parameters()
    expected = train(expected_params, OPTIMIZERS["adamw"](expected_params), range(5))
    params = parameters()
    plain = OPTIMIZERS["adamw"](params)
    train(params, plain, range(2))
    assert_same(train(params, CPUOffloadOptimizer(plain), range(2, 5)), expected)


@pytest.mark.parametrize("fake", [False, True])
def test_the_device_has_the_parameters_and_nothing_more(fake: bool) -> None:
    size = 1000
    with FakeTensorMode() if fake else torch.enable_grad():
        transport = (TracedTransport if fake else HostTransport)(CPU)
        with MemoryTrace() as trace:
            params = [nn.Parameter(torch.ones(size)) for _ in range(4)]
            optimizer = CPUOffloadOptimizer(
                torch.optim.AdamW(params), transport=transport, offload_gradients=True
            )
            before = trace.live_bytes
            assert before == 4 * rounded(4 * size)
            for _ in range(2):
                for p in params:
                    p.grad = torch.ones(size)
                optimizer.step()
                optimizer.zero_grad()
            assert trace.live_bytes == before
            assert trace.peak.bytes == before + 4 * rounded(4 * size)
    assert transport.pinned_bytes >= 4 * 3 * 4 * size


def test_states_may_be_made_ahead_and_taken_away() -> None:
    params = parameters()
    optimizer = CPUOffloadOptimizer(OPTIMIZERS["adamw"](params))
    make_states(optimizer.inner)
    assert set(optimizer.state) == set(params)
    made = optimizer.state[params[0]]["exp_avg"]
    train(params, optimizer, range(1))
    assert optimizer.state[params[0]]["exp_avg"] is made
    assert made.abs().sum() > 0
    optimizer.state.clear()
    assert len(optimizer.inner.state) == 0


def test_a_backward_without_autograd_sends_its_gradients() -> None:
    params = parameters()
    optimizer = CPUOffloadOptimizer(OPTIMIZERS["sgd"](params), offload_gradients=True)
    before = params[0].detach().clone()
    for _ in range(2):
        params[0].grad = torch.ones_like(params[0])
        optimizer.send_down(params)
        assert params[0].grad is None
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), before - 0.05 * 2)


class Gated(torch.optim.SGD):
    """Its step waits for a gate, and may fail behind it."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=0.05)
        self.gate = threading.Event()
        self.error: Exception | None = None

    def step(self, closure: Any = None) -> Any:
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return super().step(closure)


def test_an_update_is_waited_for_where_its_parameters_are_wanted() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    gated = Gated(params)
    optimizer = CPUOffloadOptimizer(gated, offload_gradients=True, overlap=True)
    loss_of(params, 0).backward()
    optimizer.step()
    optimizer.zero_grad()  # behind the update
    assert_same([p.detach() for p in params], before)
    waiting = threading.Thread(target=optimizer.receive, args=(params[:1],))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    gated.gate.set()
    waiting.join(10)
    optimizer.join()
    expected = parameters()
    loss_of(expected, 0).backward()
    OPTIMIZERS["sgd"](expected).step()
    assert_same([p.detach() for p in params], [p.detach() for p in expected])
    assert float(optimizer.clip_grad_norm_(None)) == 0.0


def test_an_update_that_failed_on_the_hosts_thread_is_half_done() -> None:
    params = parameters()
    gated = Gated(params)
    gated.gate.set()
    optimizer = CPUOffloadOptimizer(gated, offload_gradients=True, overlap=True)
    for error in (None, MemoryError("the host is full"), None):
        gated.error = error
        loss_of(params, 0).backward()
        optimizer.step()
        if error is not None:
            with pytest.raises(MemoryError, match="the host is full"):
                optimizer.receive(params)
            optimizer.zero_grad()
        assert optimizer.half_updated == (error is not None)
        optimizer.half_updated = False  # as whoever puts the last good state back says
        optimizer.join()


def test_the_hosts_thread_leaves_cores_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    optimizer = CPUOffloadOptimizer(torch.optim.SGD(parameters(), lr=0.1))
    monkeypatch.undo()
    assert optimizer._ask(torch.get_num_threads).result() == 4
    assert torch.get_num_threads() == ours


def test_lbfgs_is_refused() -> None:
    with pytest.raises(UserError, match="use AdamW"):
        CPUOffloadOptimizer(torch.optim.LBFGS(parameters()))


def test_host_memory_is_refused_with_figures() -> None:
    transport = HostTransport(CPU, HostMemory(anonymous_bytes() + 1000))
    with pytest.raises(UserError, match="optimizer masters and gradients needs"):
        CPUOffloadOptimizer(
            torch.optim.AdamW([nn.Parameter(torch.ones(1000))]), transport=transport
        )
