"""Layers spread over several devices: the same step to the bit, and each tensor where it belongs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fitlora.errors import UserError
from fitlora.step.build import step_skeleton
from fitlora.step.devices import Devices
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import EmptyWeights
from tests.step import steps
from tests.step.test_network import make

CPU = torch.device("cpu")
IN_ADAMW = ("aten::_fused_adamw_", "aten::_foreach_add_")
DEVICES = [torch.device("cpu", number) for number in range(3)]


def pair(case: str, counts: tuple[int, ...], **plan: Any) -> tuple[TrainingStep, TrainingStep]:
    """A step on one device, and one on several with the same weights."""
    one = make(case, **plan)
    several = make(case, layers_per_device=counts, **plan)
    return one, steps.same_weights(several, one)


def learn(made: TrainingStep, first: int, last: int) -> list[tuple[float, float]]:
    found = []
    for step in range(first, last):
        result = made.run(steps.sequences(7, seed=step), step=step, learning_rate=1e-2)
        found.append((float(result.loss), float(result.gradient_norm)))
    return found


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("case", "counts", "plan"),
    [
        ("llama", (1, 2), {"micro_batch_size": 3}),
        ("llama", (1, 1, 1), {"recompute_layers": (0, 1), "micro_batch_size": 3}),
        ("qwen3 with windows", (2, 1), {"dtype": "bfloat16", "recompute_layers": (0, 1, 2)}),
        ("gemma3", (1, 2), {"mlp_chunk_tokens": 16, "recompute_layers": (0, 1, 2)}),
        ("gemma2", (2, 1), {"frozen_layers": (0,)}),
        ("phi3", (1, 2), {"frozen_layers": (0, 1)}),
    ],
)
def test_several_devices_compute_what_one_does(
    case: str, counts: tuple[int, ...], plan: dict[str, Any]
) -> None:
    tied = {"config": {"tie_word_embeddings": case.startswith("gemma")}}
    one, several = pair(case, counts, dropout=0.1, **tied, **plan)
    assert learn(one, 0, 3) == learn(several, 0, 3)
    assert equal(one.adapter_state(), several.adapter_state())
    held_out = steps.sequences(5, seed=9)
    assert one.evaluate(held_out) == several.evaluate(held_out)


def test_a_run_goes_on_over_other_devices() -> None:
    one, several = pair("llama", (1, 2))
    whole = learn(one, 0, 4)
    assert learn(several, 0, 2) == whole[:2]
    again = steps.same_weights(make("llama", layers_per_device=(2, 1)), several)
    again.load_adapter_state(several.adapter_state())
    again.load_optimizer_state(*several.optimizer_state())
    assert learn(again, 2, 4) == whole[2:]
    assert not again.can_adopt(several.plan)


class EachInItsPlace(TorchDispatchMode):
    """Raises where an operator has tensors of two devices, or of another than the one at work.

    A copy may have two, of which it writes one. PyTorch's optimizer finds its way by itself.
    """

    def __init__(self, devices: Devices) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.devices, self.used, self.copies = devices, set[torch.device](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        found = {t.device for t in tensors} & set(DEVICES)  # the host is none of them
        if func._schema.name == "aten::copy_":
            self.copies += len(found) > 1
            found = {args[0].device}
        here = self.devices.all[self.devices.here]
        by_itself = func.namespace == "prim" or func._schema.name in IN_ADAMW
        assert found <= {here} or (by_itself and len(found) == 1), f"{func}: {found}, not {here}"
        self.used |= found
        return out


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_each_computes_with_its_own(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors, which tell devices apart that this machine does not have."""
    # what they would say of a loss is not there to be read
    monkeypatch.setattr(TrainingStep, "_accepted", staticmethod(lambda *_: True))
    config = steps.config(num_hidden_layers=3, tie_word_embeddings=tied)
    plan = steps.plan(layers_per_device=(1, 1, 1), compute_dtype="bfloat16")
    skeleton = step_skeleton(config, plan, steps.settings())
    devices = Devices(DEVICES, plan.layers_per_device)
    places = EachInItsPlace(devices)
    with FakeTensorMode(), places:
        made = skeleton.fill(EmptyWeights(DEVICES[0]), devices=devices)
        for step in range(2):
            made.run(steps.sequences(7), step=step, learning_rate=1e-3, loss_scale=8.0)
        loss, _ = made.evaluate(steps.sequences(3))
        assert loss.device == DEVICES[0]
    assert places.used == set(DEVICES)
    assert places.copies > 0
    assert made.optimizer is not None
    for name, parameter in made.adapters.items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        device = DEVICES[layer]
        assert parameter.device == device
        assert made.optimizer.state[parameter]["exp_avg"].device == device
    embed = made.model.get_input_embeddings().weight  # type: ignore[operator]
    head = made.model.get_output_embeddings().weight  # type: ignore[operator]
    assert (embed.device, head.device) == (DEVICES[2 if tied else 0], DEVICES[2])
    books = {buffer.device for name, buffer in made.model.named_buffers() if "code" in name}
    assert books == {*DEVICES}


def test_the_gpu_at_work_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered = []

    @contextmanager
    def device(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    gpus = [torch.device("cuda", number) for number in range(2)]
    devices = Devices(gpus, (3, 1))
    with devices.at_layer(3), devices.at_layer(3), devices.at_layer(2):
        assert entered == [gpus[1], gpus[0]]


def test_hidden_states_are_copied_only_between_devices() -> None:
    devices = Devices([CPU, CPU], (1, 1))
    x = torch.ones(2)
    assert devices.bring(x, 0) is x
    with devices.at(1):
        brought = devices.bring(x, 0)
        assert brought is not x
        assert torch.equal(brought, x)
        with pytest.raises(ZeroDivisionError), devices.at(0):
            raise ZeroDivisionError
        assert devices.here == 1
    assert devices.here == 0
    batch = steps.step().micro_batch(steps.sequences(2))
    assert batch.moved(lambda t: t) == batch


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layers_per_device": (2,)}, "2 devices or more"),
        ({"layers_per_device": (2, 0)}, "a layer or more"),
        ({"layers_per_device": (1, 1), "devices": 2, "micro_batch_size": 1}, "share a batch"),
        ({"layers_per_device": (1, 1), "streamed_layers": (0,)}, "parts on the host"),
        ({"layers_per_device": (1, 1), "checkpoints": "host"}, "parts on the host"),
        ({"layers_per_device": (1, 1), "optimizer_device": "host"}, "parts on the host"),
        ({"layers_per_device": (1, 1), "optimizer": "adamw_8bit"}, "code books"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        steps.plan(**changes)


def test_a_plan_of_another_model_or_machine_is_refused() -> None:
    with pytest.raises(UserError, match="spreads 4 layers over devices, and the model has 3"):
        make("llama", layers_per_device=(2, 2))
    with pytest.raises(UserError, match="2 GPUs, and there are 0 here"):
        Devices.of(steps.plan(layers_per_device=(1, 1)), 2, torch.device("cuda"))
    with pytest.raises(UserError, match="layers spread over devices"):
        make("granite", layers_per_device=(1, 2))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_compute_what_one_does() -> None:
    """But for attention's backward, which adds up with atomics."""
    gpu = {"device": "cuda", "compute_dtype": "bfloat16", "micro_batch_size": 3}
    untied = {"num_hidden_layers": 4, "tie_word_embeddings": False}
    one = steps.step(steps.plan(**gpu), device="cuda", **untied)
    several = steps.step(steps.plan(layers_per_device=(3, 1), **gpu), device="cuda", **untied)
    assert {p.device.index for p in several.adapters.values()} == {0, 1}
    held_out = steps.sequences(5, seed=9)
    assert one.evaluate(held_out) == several.evaluate(held_out), "noise goes on from GPU to GPU"
    batch = steps.sequences(7)
    assert steps.distance(steps.gradients(several, batch), steps.gradients(one, batch)) < 1e-2
    for (loss, norm), (other, other_norm) in zip(
        learn(one, 0, 4), learn(several, 0, 4), strict=True
    ):
        assert loss == pytest.approx(other, rel=1e-3)
        assert norm == pytest.approx(other_norm, rel=1e-2)
