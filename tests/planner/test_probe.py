"""Whatever becomes of a probe's own process is a result; and what a probe asks of the host's memory."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fitlora import known_models
from fitlora.artifacts import Estimate
from fitlora.device import gpu_uuid, nvml_session
from fitlora.errors import UserError
from fitlora.machine import visible_gpus
from fitlora.memory.estimate import Estimator, Load, estimate
from fitlora.offload.host_memory import HostMemoryShort
from fitlora.params import check_params
from fitlora.plan import Plan
from fitlora.planner import probe as module
from fitlora.planner.find import find_plan
from fitlora.planner.probe import Prober, ProbeResult, _probe_cuda, probe
from fitlora.planner.task import Task
from fitlora.step.settings import StepSettings
from fitlora.units import GIB, MIB
from fitlora.worker import Worker
from tests.planner.probes import stand_in
from tests.planner.test_search import NO_HOST, hardware
from tests.settled import settled_bytes
from tests.step import steps

CONFIG, PLAN, LOAD = steps.config(), steps.plan(), Load.uniform(7, 60)
SETTINGS = StepSettings.of(check_params({"lora": {"r": 4}}))
CPU = torch.device("cpu")


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture
def prober(monkeypatch: pytest.MonkeyPatch) -> Prober:
    """One for a GPU, whose process finds a stand-in for what it is to do."""
    monkeypatch.setattr(module, "probe", stand_in)
    card: Any = SimpleNamespace(device="cuda")
    nothing: Any = None
    return Prober(CONFIG.vocab_size, nothing, nothing, card)


def test_plans_that_fit_share_a_process_and_one_that_does_not_is_its_last(prober: Prober) -> None:
    plans: list[Any] = ["fits", "fits", "too large", "fits"]
    with prober as prove:
        found: list[Any] = [prove(plan) for plan in plans]
    assert [one.fits for one in found] == [True, True, False, True]
    first, second, third, fourth = (one.pid for one in found)
    assert first == second == third != fourth
    assert os.getpid() not in (first, fourth)
    assert not any(map(is_there, (first, fourth)))


@pytest.mark.parametrize(
    ("end", "why", "over"),
    [
        (signal.SIGSEGV, "was ended by SIGSEGV", None),
        (signal.SIGKILL, "was ended by SIGKILL (the kernel does that for want of host memory)", 0),
        ("hang", "had no end after 0.5 s", None),
        ("bug", "ended in AssertionError: the author's", None),
    ],
)
def test_a_process_that_is_lost_is_a_plan_that_does_not_fit(
    prober: Prober, end: Any, why: str, over: int | None
) -> None:
    prober.seconds = 0.5
    with prober as prove:
        found = prove(end)
        assert found == ProbeResult(end, False, why=f"its process {why}", host_over_bytes=over)
        after: Any = "fits"
        assert prove(after).fits


def test_what_is_the_users_to_mend_ends_the_search(prober: Prober) -> None:
    plan: Any = "refusal"
    with prober as prove, pytest.raises(UserError, match="the user's"):
        prove(plan)


def test_the_cpu_is_probed_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module, "Worker")
    here = hardware(GIB, device="cpu", gpus=())
    with Prober(CONFIG, SETTINGS, LOAD, here) as prove:
        found = prove(PLAN)
    expected = estimate(CONFIG, PLAN, SETTINGS, LOAD, here)
    assert found.peak_allocated_bytes == expected.peak_allocated_bytes
    assert found.host_peak_bytes is None


@pytest.mark.slow
def test_a_real_probe_finds_the_same_in_another_process() -> None:
    """All that a probe is asked, and what it answers, goes there and comes back."""
    question = (CONFIG, PLAN, SETTINGS, LOAD, hardware(GIB, device="cpu", gpus=()))
    with Worker(expected=probe) as worker:
        found = worker.call(probe, *question, seconds=120)
    assert found.plan == PLAN
    assert found.fits
    assert found.peak_allocated_bytes == probe(*question).peak_allocated_bytes


# --- the host's memory ----------------------------------------------------------------------------


SAVED = 512 * MIB


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], ProbeResult]:
    """A probe with a budget of the host, as on a GPU, which the CPU stands for; a save takes `SAVED`."""
    settled_bytes()
    rehearse_save = module.rehearse_save

    def save(step: Any) -> Any:
        best, *checkpoint = rehearse_save(step)
        return [best, {"much": torch.ones(SAVED, dtype=torch.uint8)}, *checkpoint]

    monkeypatch.setattr(module, "rehearse_save", save)
    for name in ("max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 7)
    plan = PLAN.replace(optimizer_device="host")
    return partial(_probe_cuda, CONFIG, plan, SETTINGS, LOAD, [CPU])


def test_what_a_probe_takes_of_the_host_is_told_with_a_saves_copies(
    on_gpu: Callable[[int], ProbeResult],
) -> None:
    before = settled_bytes()
    found = on_gpu(before + 2 * SAVED)
    assert found.fits
    assert found.host_peak_bytes is not None
    assert before + SAVED // 2 < found.host_peak_bytes < before + 2 * SAVED
    assert found.tokens_per_second is not None
    assert found.host_over_bytes is None


def test_processes_that_share_a_host_have_what_is_alike_and_a_checkpoint_once(
    on_gpu: Callable[..., ProbeResult],
) -> None:
    """Each has pages of its own beside it: here all that the tests' process has."""
    alone, three = on_gpu(2**40), on_gpu(2**40, 3)
    assert alone.host_peak_bytes is not None
    assert three.host_peak_bytes is not None
    own = (three.host_peak_bytes - alone.host_peak_bytes) / 2
    assert own == pytest.approx(alone.host_peak_bytes - SAVED, rel=0.1)
    found = on_gpu(alone.host_peak_bytes + SAVED // 4, 2)
    assert (found.fits, on_gpu(alone.host_peak_bytes + SAVED // 4).fits) == (False, True)


def test_a_probe_counts_the_processes_that_a_host_has_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "torch_device", lambda hardware: torch.device("cuda", 0))
    monkeypatch.setattr(module, "limit_memory", lambda hardware, devices: None)
    monkeypatch.setattr(module, "_probe_cuda", lambda *question: asked.append(question))
    two_here = hardware().model_copy(update={"gpus": hardware().gpus * 2})
    for count in (1, 2, 4):
        probe(CONFIG, PLAN.replace(devices=count, micro_batch_size=1), SETTINGS, LOAD, two_here)
    assert [question[-1] for question in asked] == [1, 2, 2]


def test_more_of_the_host_than_the_budget_does_not_fit(
    on_gpu: Callable[[int], ProbeResult],
) -> None:
    taken = on_gpu(2**40).host_peak_bytes
    assert taken is not None
    budget = taken - SAVED // 2
    found = on_gpu(budget)
    assert not found.fits
    assert found.tokens_per_second is None
    assert found.host_peak_bytes is not None
    assert found.host_over_bytes == found.host_peak_bytes - budget > SAVED // 4
    assert found.why is not None
    assert "of the host" in found.why


@pytest.mark.parametrize(
    ("error", "why", "over"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "it overflowed: CUDA out of", None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "it overflowed: Defa", None),
        (MemoryError(), "the host is out of memory", 0),
        (HostMemoryShort("weights needs 2 GiB"), "weights needs 2 GiB", 0),
        (RuntimeError("a bug"), None, None),
    ],
)
def test_memory_that_is_short_is_a_reason_and_other_errors_are_errors(
    monkeypatch: pytest.MonkeyPatch, error: Exception, why: str | None, over: int | None
) -> None:
    def fail(*question: Any) -> ProbeResult:
        raise error

    monkeypatch.setattr(module, "torch_device", lambda hardware: torch.device("cuda", 0))
    monkeypatch.setattr(module, "limit_memory", lambda hardware, devices: None)
    monkeypatch.setattr(module, "_probe_cuda", fail)
    if why is None:
        with pytest.raises(RuntimeError, match="a bug"):
            probe(CONFIG, PLAN, SETTINGS, LOAD, hardware())
        return
    found = probe(CONFIG, PLAN, SETTINGS, LOAD, hardware())
    assert not found.fits
    assert found.why is not None
    assert found.why.startswith(why)
    assert found.host_over_bytes == over


# --- a GPU ----------------------------------------------------------------------------------------


class Misled(Estimator):
    """Takes what is not recomputed for just as large as the budget."""

    def __call__(self, plan: Plan) -> Estimate:
        found = super().__call__(plan)
        if plan.recompute_layers:
            return found
        return found.model_copy(update={"process_bytes": self.hardware.budget_bytes, "fits": True})


def used_bytes() -> list[int]:
    """Of every GPU, by whomever; asked of the driver, for which no context is needed."""
    with nvml_session() as nvml:
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        found = [nvml.nvmlDeviceGetMemoryInfo(h, version=nvml.nvmlMemory_v2) for h in handles]
        return [memory.used for memory in found]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_search_goes_on_after_an_overflow_and_takes_nothing_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    budget, context = 6 * GIB, 700 * MIB
    here = hardware(
        budget, context_bytes=context, workspace_bytes=64 * MIB, host_budget_bytes=32 * GIB
    )
    config = known_models.config_of(known_models.SHAPES["llama-3.2-1b"])
    params = check_params({"train": {"effective_batch_size": 8}, "plan": NO_HOST})
    task = Task(config, params, Load.uniform(8, 2048), here)
    monkeypatch.setattr(Task, "estimator", Misled(config, task.settings, task.load, task.hardware))
    begun, before = torch.cuda.is_initialized(), used_bytes()
    choice, (first, second) = find_plan(task)
    assert torch.cuda.is_initialized() is begun
    visible_gpus(), gpu_uuid()  # which the profile asks first, where one process runs all stages
    for after, was in zip(used_bytes(), before, strict=True):
        assert after - was < 64 * MIB  # a context takes some hundred
    assert not first.fits
    assert first.why is not None
    assert "out of memory" in first.why
    assert second.fits
    assert second.plan == choice.plan
    assert second.peak_reserved_bytes is not None
    assert second.peak_reserved_bytes <= budget - context
    assert second.peak_allocated_bytes == pytest.approx(
        choice.estimate.peak_allocated_bytes, rel=0.015
    )
    assert second.host_peak_bytes is not None
    assert GIB // 4 < second.host_peak_bytes < 8 * GIB
