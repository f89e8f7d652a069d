"""What the machine is: fakes stand at the edges (NVML, torch's GPU queries, control groups)."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
import torch

from fitlora import device, gpu_facts, gpu_measurement, hardware, machine, rates
from fitlora.artifacts import Gpu, Hardware, Rates
from fitlora.errors import UserError
from fitlora.params import HardwareParams, TargetParams
from fitlora.units import GIB, MIB
from fitlora.worker import Lost, Worker

UUID = "GPU-12345678-0000-0000-0000-000000000000"
RTX_3070 = gpu_facts.describe_gpu("RTX 3070", "8.6", 8 * GIB)
RTX_4090 = gpu_facts.describe_gpu("RTX 4090", "8.9", 24 * GIB)
TARGET = TargetParams(name="RTX 3070", memory="8GiB", compute_capability="8.6")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


class FakeNvml:
    """NVML as far as it is used, over a table of processes; counts its sessions."""

    nvmlMemory_v2 = pynvml.nvmlMemory_v2

    def __init__(
        self,
        names: tuple[str, ...] = ("RTX 3070",),
        processes: dict[int, int | None] | None = None,
        used: int = 0,
        start_error: int | None = None,
    ) -> None:
        self.names = names
        self.processes = processes or {}
        self.used = used
        self.start_error = start_error
        self.sessions = self.ended = 0

    def nvmlInit(self) -> None:
        if self.start_error is not None:
            raise pynvml.NVMLError(self.start_error)
        self.sessions += 1

    def nvmlShutdown(self) -> None:
        self.ended += 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid != UUID:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return 0

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.names[handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int) -> Any:
        assert version == pynvml.nvmlMemory_v2, "the first version counts the driver's reserve"
        return SimpleNamespace(used=self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [SimpleNamespace(pid=p, usedGpuMemory=m) for p, m in self.processes.items()]


def make_rates(**changes: Any) -> Rates:
    rates = {
        "host_to_device_bytes_per_second": 50 * 10**9,
        "device_to_host_bytes_per_second": 50 * 10**9,
        "device_copy_bytes_per_second": 3 * 10**12,
        "disk_read_bytes_per_second": 2 * 10**9,
        "product_flops_per_second": {"bfloat16": 700 * 10**12, "float32": 50 * 10**12},
    }
    return Rates.model_validate({**rates, **changes})


def make_hardware(**changes: Any) -> Hardware:
    facts = {
        "device": "cuda",
        "gpus": (RTX_3070,),
        "cpu_name": "a CPU",
        "cpu_cores": 8,
        "host_memory_bytes": 32 * GIB,
        "host_budget_bytes": 32 * GIB,
        "budget_bytes": 8 * GIB,
        "context_bytes": 600 * MIB,
        "workspace_bytes": 17 * MIB,
        "rates": make_rates(),
        "target": None,
    }
    return Hardware.model_validate({**facts, **changes})


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A driver with one RTX 3070, in the place of this machine's."""
    fake = FakeNvml()
    for name in (name for name in dir(fake) if name.startswith("nvml")):
        monkeypatch.setattr(pynvml, name, getattr(fake, name))
    return fake


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> int:
    """A host of 16 GiB without control groups, whose disk and CPU are measured in no time."""
    memory = SimpleNamespace(total=16 * GIB + 5 * MIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(machine, "cgroup_memory_limit", lambda: None)
    monkeypatch.setattr(rates, "DISK_BYTES", 2 * MIB)
    monkeypatch.setattr(rates, "DISK_CHUNK_BYTES", MIB)
    monkeypatch.setattr(rates, "DISK_SECONDS", 0.01)
    monkeypatch.setattr(rates, "PRODUCT_SECONDS", 0.01)
    return 16 * GIB


def give_torch_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> None:
    def properties(index: int) -> Any:
        major, minor = gpu_facts.parse_capability(gpus[index].compute_capability)
        return SimpleNamespace(
            name=gpus[index].name,
            major=major,
            minor=minor,
            total_memory=gpus[index].memory_bytes,
            uuid=UUID.removeprefix("GPU-"),
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)


def measure_without_a_child(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[Any]:
    """Puts a finished measurement where the child process would make one; lists its arguments."""
    measurement = {
        "context_bytes": 600 * MIB,
        "context_source": "what NVML lists for the process",
        "workspace_bytes": 17 * MIB,
        "rates": make_rates(),
        **changes,
    }
    asked: list[Any] = []

    def measure(
        gpu: Gpu, uuid: str, used_before: int | None, disk: Path
    ) -> gpu_measurement.GpuMeasurement:
        asked.append((gpu, uuid, used_before))
        return gpu_measurement.GpuMeasurement.model_validate(measurement)

    monkeypatch.setattr(gpu_measurement, "measure_gpu_in_child", measure)
    return asked


# Facts that are looked up


@pytest.mark.parametrize(
    ("capability", "bf16", "fp8"),
    [
        ("6.1", False, False),
        ("7.5", False, False),
        ("8.0", True, False),
        ("8.6", True, False),
        ("8.9", True, True),
        ("9.0", True, True),
        ("10.0", True, True),
        ("12.0", True, True),
    ],
)
def test_types_follow_the_capability_as_a_version(capability: str, bf16: bool, fp8: bool) -> None:
    gpu = gpu_facts.describe_gpu("a GPU", capability, GIB)
    assert (gpu.bf16, gpu.fp8) == (bf16, fp8)


def test_documented_sizes_of_a_gpu_that_is_not_here() -> None:
    assert {c: gpu_facts.documented_workspace_bytes(c) for c in ("7.5", "8.6", "9.0", "12.0")} == {
        "7.5": 2 * 8_519_680,
        "8.6": 2 * 8_519_680,
        "9.0": 64 * MIB,
        "12.0": 64 * MIB,
    }
    assert {c: gpu_facts.documented_context_bytes(c) for c in ("8.6", "9.0", "12.0")} == {
        "8.6": 620 * MIB,
        "9.0": 620 * MIB,
        "12.0": 800 * MIB,
    }


def test_visible_gpus_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    give_torch_gpus(monkeypatch, RTX_4090, RTX_3070)
    assert machine.visible_gpus() == (RTX_4090, RTX_3070)


def test_cgroup_2_limit_is_the_lowest_on_the_way_up(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/pod/container\n")
    group = tmp_path / "mount/pod/container"
    group.mkdir(parents=True)
    assert machine.cgroup_memory_limit(membership, tmp_path / "mount") is None
    (group / "memory.max").write_text("max\n")
    assert machine.cgroup_memory_limit(membership, tmp_path / "mount") is None
    (group.parent / "memory.max").write_text(f"{3 * GIB}\n")
    assert machine.cgroup_memory_limit(membership, tmp_path / "mount") == 3 * GIB
    (group / "memory.max").write_text(f"{2 * GIB}\n")
    assert machine.cgroup_memory_limit(membership, tmp_path / "mount") == 2 * GIB


def test_cgroup_1_limit(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("5:cpu,cpuacct:/a\n4:memory:/a:b\n0::/\n")
    group = tmp_path / "mount/memory/a:b"
    group.mkdir(parents=True)
    (group.parent / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (group / "memory.limit_in_bytes").write_text(f"{5 * GIB}\n")
    assert machine.cgroup_memory_limit(membership, tmp_path / "mount") == 5 * GIB


def test_cgroup_path_of_the_host_falls_back_to_the_containers_root(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/system.slice/docker-123.scope\n")
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    assert machine.cgroup_memory_limit(membership, tmp_path) == 4 * GIB


def test_no_control_groups_is_no_limit(tmp_path: Path) -> None:
    assert machine.cgroup_memory_limit(tmp_path / "missing", tmp_path) is None


@pytest.mark.parametrize(
    ("total", "limit", "usable"),
    [
        (16 * GIB + 255 * MIB, None, 16 * GIB),
        (16 * GIB, 9223372036854771712, 16 * GIB),
        (16 * GIB, 4 * GIB + 300 * MIB, 4 * GIB + 256 * MIB),
    ],
)
def test_host_memory(
    monkeypatch: pytest.MonkeyPatch, total: int, limit: int | None, usable: int
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=total))
    monkeypatch.setattr(machine, "cgroup_memory_limit", lambda: limit)
    assert machine.host_memory_bytes() == usable


# NVML


def test_nvml_is_shut_down_also_after_an_error() -> None:
    fake = FakeNvml()
    with pytest.raises(pynvml.NVMLError_NotFound), device.nvml_session(fake) as nvml:
        device.device_used_bytes(nvml, "GPU-another")
    assert (fake.sessions, fake.ended) == (1, 1)


def test_nvml_that_did_not_start_is_not_shut_down() -> None:
    fake = FakeNvml(start_error=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    with pytest.raises(pynvml.NVMLError_DriverNotLoaded), device.nvml_session(fake):
        pass
    assert fake.ended == 0


@pytest.mark.parametrize(
    ("processes", "expected"),
    [({7: 900 * MIB, 8: MIB}, 900 * MIB), ({8: MIB}, None), ({7: None}, None), ({}, None)],
)
def test_memory_of_a_process(processes: dict[int, int | None], expected: int | None) -> None:
    assert device.process_used_bytes(FakeNvml(processes=processes), UUID, 7) == expected


# Which device


def test_auto_takes_the_gpu_and_cpu_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    give_torch_gpus(monkeypatch, RTX_3070)
    assert machine.choose_device("auto")[0] == "cuda"
    assert machine.choose_device("cuda")[0] == "cuda"
    assert machine.choose_device("cpu")[0] == "cpu"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"start_error": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND}, "no NVIDIA driver"),
        ({"names": ()}, "lists no GPU"),
        ({"cuda": None}, "built without CUDA .*RTX 3070"),
        ({"cuda": "13.0"}, "RTX 3070.*CUDA_VISIBLE_DEVICES"),
    ],
)
def test_without_a_gpu_auto_says_why_and_cuda_refuses(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, state: dict[str, Any], reason: str
) -> None:
    give_torch_gpus(monkeypatch)
    for key, value in state.items():
        monkeypatch.setattr(torch.version if key == "cuda" else nvml, key, value)
    device, why = machine.choose_device("auto")
    assert device == "cpu"
    with pytest.raises(UserError, match=rf"hardware\.device is cuda, but .*{reason}") as error:
        machine.choose_device("cuda")
    assert why in str(error.value)
    assert nvml.ended == nvml.sessions


# Rounding and hysteresis


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(0.0, 0), (7.4, 7), (0.2, 0), (99.6, 100), (55_400_000_000.0, 55 * 10**9), (999.0, 1000)],
)
def test_rates_have_two_digits(value: float, rounded: int) -> None:
    assert rates.round_rate(value) == rounded


@pytest.mark.parametrize(
    ("size", "rounded"),
    [
        (0, 0),
        (1, MIB),
        (2 * 8_519_680, 17 * MIB),
        (64 * MIB, 64 * MIB),
        (611 * MIB, 620 * MIB),
        (620 * MIB, 620 * MIB),
        (620 * MIB + 1, 630 * MIB),
        (1001 * MIB, 1100 * MIB),
    ],
)
def test_sizes_are_rounded_up(size: int, rounded: int) -> None:
    assert gpu_measurement.round_size(size) == rounded


def test_a_rate_within_15_percent_stays_and_one_beyond_changes() -> None:
    old = make_hardware()
    for factor, stays in ((0.84, False), (0.86, True), (1.14, True), (1.16, False)):
        rates = make_rates(
            host_to_device_bytes_per_second=int(50 * 10**9 * factor),
            disk_read_bytes_per_second=int(2 * 10**9 * factor),
            product_flops_per_second={
                "bfloat16": int(700 * 10**12 * factor),
                "float32": 50 * 10**12,
            },
        )
        new = make_hardware(rates=rates)
        assert hardware.keep_stable(new, old) == (old if stays else new), factor


def test_a_rate_is_not_carried_away_in_small_steps() -> None:
    first = current = make_hardware()
    for rate in (44, 56, 43, 57):
        new = make_hardware(rates=make_rates(host_to_device_bytes_per_second=rate * 10**9))
        current = hardware.keep_stable(new, current)
    assert current == first


def test_a_rate_that_comes_or_goes_is_taken_as_it_is() -> None:
    without = make_rates(disk_read_bytes_per_second=None, product_flops_per_second={})
    assert hardware.keep_stable(make_hardware(), make_hardware(rates=without)) == make_hardware()
    new = make_hardware(rates=without)
    assert hardware.keep_stable(new, make_hardware()) == new


@pytest.mark.parametrize("key", ["context_bytes", "workspace_bytes"])
def test_memory_that_is_taken_stays_only_when_it_did_not_grow(key: str) -> None:
    old = make_hardware(**{key: 600 * MIB})
    for size, kept in ((500, 500), (520, 600), (600, 600), (610, 610)):
        new = make_hardware(**{key: size * MIB})
        assert getattr(hardware.keep_stable(new, old), key) == kept * MIB, size


def test_a_former_context_that_fills_the_budget_is_not_kept() -> None:
    new = make_hardware(context_bytes=560 * MIB, budget_bytes=590 * MIB)
    assert hardware.keep_stable(new, make_hardware()).allocator_bytes == 30 * MIB


@pytest.mark.parametrize(
    "other",
    [
        {"gpus": (RTX_4090,)},
        {"cpu_name": "another CPU"},
        {"target": "RTX 3070"},
        {"device": "cpu", "gpus": ()},
    ],
)
def test_facts_of_another_machine_are_no_former_values(other: dict[str, Any]) -> None:
    new = make_hardware(context_bytes=590 * MIB)
    assert hardware.keep_stable(new, make_hardware(**other)) == new


def test_a_described_gpu_depends_on_its_description_alone() -> None:
    new = make_hardware(target="RTX 3070", context_bytes=590 * MIB)
    assert hardware.keep_stable(new, make_hardware(target="RTX 3070")) == new


def test_measuring_again_and_again_settles() -> None:
    """Noise of up to 7% about one true machine: the bytes change no more after the first runs."""
    noise = random.Random(0)
    current: Hardware | None = None
    seen = []
    for _ in range(200):
        new = make_hardware(
            context_bytes=gpu_measurement.round_size(int(610 * MIB * noise.uniform(0.99, 1.01))),
            rates=make_rates(
                host_to_device_bytes_per_second=rates.round_rate(55e9 * noise.uniform(0.94, 1.07))
            ),
        )
        current = new if current is None else hardware.keep_stable(new, current)
        seen.append(current)
    assert len(set(map(repr, seen[20:]))) == 1
    assert seen[-1].context_bytes == 620 * MIB


# Measuring


def test_disk_rate_is_positive_and_leaves_nothing(host: int, tmp_path: Path) -> None:
    rate = rates.disk_read_rate(tmp_path)
    assert rate is not None
    assert rate > 0
    assert rate == rates.round_rate(rate)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_is_measured_on_less(
    monkeypatch: pytest.MonkeyPatch, host: int, tmp_path: Path
) -> None:
    monkeypatch.setattr(rates, "DISK_SECONDS", 0.0)
    monkeypatch.setattr(rates, "DISK_BYTES", GIB)
    written = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda file: (written.append(file), real(file)))
    assert rates.disk_read_rate(tmp_path)
    assert len(written) == 1


def test_a_full_disk_is_said_and_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(rates, "DISK_BYTES", 2**60)
    assert rates.disk_read_rate(tmp_path) is None
    assert "disk is not measured" in capsys.readouterr().out


def test_a_disk_whose_cache_cannot_be_dropped_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    assert rates.disk_read_rate(tmp_path) is None


def test_product_rate_counts_two_operations_for_each_of_size_cubed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "fastest_seconds", lambda work, finish, seconds: (work(), 1.0)[1])
    random_state = torch.random.get_rng_state()
    assert rates.product_rate(torch.device("cpu"), torch.float32, 100, 5) == 10**7
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_the_fastest_run_counts_and_the_warm_up_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = iter([100.0, 3.0, 2.0, 5.0, 1.0])  # the first warms up; the last would be too late
    now = 0.0
    finished = 0

    def work() -> None:
        nonlocal now
        now += next(durations)

    def finish() -> None:
        nonlocal now, finished
        now += 0.25
        finished += 1

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert rates.fastest_seconds(work, finish, seconds=9.0) == 2.25
    assert finished == 4


def test_the_warm_step_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here on the CPU, to know that its shapes and types agree."""
    losses = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: losses.append(tensor.tolist()))
    gpu_measurement._warm_step(torch.device("cpu"), torch.bfloat16)
    (loss,) = losses
    assert abs(loss - torch.tensor(256.0).log().tolist()) < 0.5  # small weights: a fair guess


def test_a_cpu_is_its_threads_and_keeps_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    seen = []
    monkeypatch.setattr(rates, "disk_read_rate", lambda folder: None)
    monkeypatch.setattr(rates, "product_rate", lambda *_: seen.append(torch.get_num_threads()))
    with pytest.raises(TypeError):  # the fake's None is no rate
        rates.measure_cpu(tmp_path)
    assert seen == [1]
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(rates, "product_rate", lambda *_: 10**11)
    assert rates.measure_cpu(tmp_path).product_flops_per_second == {"float32": 3 * 10**11}
    assert seen == [1, 1, 3]


def test_copy_rate_is_of_the_bytes_that_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "fastest_seconds", lambda work, finish, seconds: (work(), 0.5)[1])
    source, target = torch.arange(100), torch.zeros(100, dtype=torch.int64)
    assert rates.copy_rate(source, target, 1600) == 3200
    assert torch.equal(source, target)


@pytest.mark.parametrize(
    ("own", "grown", "device", "context", "source"),
    [
        (700, 800, 900, 600, "NVML lists"),
        (None, 800, 900, 700, "grew by"),
        (None, None, 900, 800, "all that is used"),
        (150, 800, 900, 700, "grew by"),  # another process of the same id, in a container
        (None, -500, 900, 800, "all that is used"),  # another process went away meanwhile
        (None, 9000, 20000, 620, "documented"),  # the GPU is full of others
    ],
)
def test_the_context_comes_from_the_best_reading(
    own: int | None, grown: int | None, device: int, context: int, source: str
) -> None:
    readings = [None if reading is None else reading * MIB for reading in (own, grown, device)]
    size, words = gpu_measurement.choose_context("9.0", 100 * MIB, *readings)
    assert size == context * MIB
    assert source in words


@pytest.mark.slow
@needs_no_cuda
def test_a_measurement_that_fails_is_the_users_to_know(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_measurement, "disk_read_rate", lambda folder: None)
    with pytest.raises(UserError, match=r"measuring RTX 3070 ended in .*hardware\.device"):
        gpu_measurement.measure_gpu_in_child(RTX_3070, UUID, None, tmp_path)
    assert "in measure_gpu" in capfd.readouterr().err


@pytest.fixture
def worker_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens around a process that measures, in order; its result is 17 MiB of context."""
    events: list[Any] = []

    def start(worker: Worker, expected: Any) -> None:
        events.append(expected)

    def call(worker: Worker, *call: Any, seconds: float) -> gpu_measurement.GpuMeasurement:
        events.append(call)
        return gpu_measurement.GpuMeasurement(
            context_bytes=17 * MIB, context_source="a test", workspace_bytes=0,
            rates=make_rates(disk_read_bytes_per_second=None),
        )  # fmt: skip

    monkeypatch.setattr(Worker, "__init__", start)
    monkeypatch.setattr(Worker, "call", call)
    monkeypatch.setattr(Worker, "close", lambda worker: events.append("end"))
    monkeypatch.setattr(
        gpu_measurement, "disk_read_rate", lambda folder: events.append(folder) or 123
    )
    return events


def test_the_disk_is_measured_while_the_gpus_process_gets_ready(
    worker_calls: list[Any], tmp_path: Path
) -> None:
    found = gpu_measurement.measure_gpu_in_child(RTX_3070, UUID, 123, tmp_path)
    measure = gpu_measurement.measure_gpu
    assert worker_calls == [measure, tmp_path, (measure, UUID, 123), "end"]
    assert found.context_bytes == 17 * MIB
    assert found.rates == make_rates(disk_read_bytes_per_second=123)


def test_a_measurement_without_an_end_is_ended(
    worker_calls: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def hang(worker: Worker, *call: Any, seconds: float) -> Any:
        raise Lost(f"had no end after {seconds} s")

    monkeypatch.setattr(Worker, "call", hang)
    with pytest.raises(UserError, match="measuring RTX 3070 had no end after 120 s; see"):
        gpu_measurement.measure_gpu_in_child(RTX_3070, UUID, 123, tmp_path)
    assert worker_calls[-1] == "end"


# The profile


def test_profile_of_the_cpu(host: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = hardware.profile(HardwareParams(device="cpu"), tmp_path / "scratch")
    assert made.device == "cpu"
    assert made.gpus == ()
    assert made.budget_bytes == made.host_budget_bytes == made.host_memory_bytes == host
    assert made.context_bytes == made.workspace_bytes == 0
    assert made.cpu_cores >= 1
    assert made.cpu_name
    assert made.rates.host_to_device_bytes_per_second is None
    assert made.rates.disk_read_bytes_per_second is not None
    assert set(made.rates.product_flops_per_second) == {"float32"}
    assert "the CPU is the device: hardware.device is cpu" in capsys.readouterr().out


def test_profile_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, host: int, tmp_path: Path
) -> None:
    give_torch_gpus(monkeypatch, RTX_3070, RTX_3070)
    asked = measure_without_a_child(monkeypatch)
    nvml.used = 3 * MIB
    made = hardware.profile(HardwareParams(memory_budget="6GiB"), tmp_path)
    assert asked == [(RTX_3070, UUID, 3 * MIB)]
    assert made.device == "cuda"
    assert made.gpus == (RTX_3070, RTX_3070)
    assert made.budget_bytes == 6 * GIB
    assert made.context_bytes == 600 * MIB
    assert made.workspace_bytes == 17 * MIB
    assert made.allocator_bytes == 6 * GIB - 600 * MIB
    assert made.host_budget_bytes == host
    assert made.rates.disk_read_bytes_per_second is not None
    assert made.rates.host_to_device_bytes_per_second == 50 * 10**9
    assert made.target is None
    assert nvml.ended == nvml.sessions == 1


def test_profile_of_a_gpu_without_nvml(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, host: int, tmp_path: Path
) -> None:
    give_torch_gpus(monkeypatch, RTX_3070)
    nvml.start_error = pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
    asked = measure_without_a_child(monkeypatch)
    assert hardware.profile(HardwareParams(), tmp_path).budget_bytes == 8 * GIB
    assert asked == [(RTX_3070, UUID, None)]


def test_what_is_odd_about_the_gpus_is_said(
    monkeypatch: pytest.MonkeyPatch,
    nvml: FakeNvml,
    host: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    give_torch_gpus(monkeypatch, RTX_3070, RTX_4090)
    measure_without_a_child(monkeypatch)
    nvml.used = 2 * GIB
    hardware.profile(HardwareParams(), tmp_path)
    said = capsys.readouterr().out
    assert "the GPUs differ: RTX 3070 (8.00 GiB), RTX 4090 (24.00 GiB)" in said
    assert "2.00 GiB of RTX 3070 are in use by other processes" in said
    assert "context is what NVML lists for the process" in said
    hardware.profile(
        HardwareParams(memory_budget="6GiB"), tmp_path
    )  # which leaves the others theirs
    assert "in use by" not in capsys.readouterr().out


def test_profile_of_a_described_gpu_is_the_same_everywhere_but_for_the_host(
    monkeypatch: pytest.MonkeyPatch, host: int, tmp_path: Path
) -> None:
    def here(*gpus: Gpu) -> Hardware:
        give_torch_gpus(monkeypatch, *gpus)
        return hardware.profile(HardwareParams(target=TARGET), tmp_path / "scratch")

    made = here()
    assert made == here(RTX_4090)
    assert made.device == "cuda"
    assert made.gpus == (RTX_3070,)
    assert made.target == "RTX 3070"
    assert made.budget_bytes == 8 * GIB
    assert made.context_bytes == 620 * MIB
    assert made.workspace_bytes == 2 * 8_519_680
    assert made.host_memory_bytes == host
    assert not (tmp_path / "scratch").exists()


def test_of_a_described_gpu_its_maker_tells_the_rates(host: int, tmp_path: Path) -> None:
    rates = hardware.profile(HardwareParams(target=TARGET), tmp_path).rates
    assert 0.5 * 448e9 < (rates.device_copy_bytes_per_second or 0) < 448e9
    assert rates.host_to_device_bytes_per_second == rates.device_to_host_bytes_per_second
    assert set(rates.product_flops_per_second) == {"bfloat16", "float16"}
    unknown = TARGET.model_copy(update={"name": "a friend's"})
    rates = hardware.profile(HardwareParams(target=unknown), tmp_path).rates
    assert rates.product_flops_per_second == {}
    links = rates.model_dump(exclude={"product_flops_per_second"})
    assert links
    assert set(links.values()) == {None}


@pytest.mark.parametrize("name", ["RTX 3070", "rtx3070", "NVIDIA GeForce RTX 3070"])
def test_a_known_gpu_needs_no_more_than_its_name(host: int, tmp_path: Path, name: str) -> None:
    made = hardware.profile(HardwareParams(target=TargetParams(name=name)), tmp_path)
    assert made.gpus == (RTX_3070.model_copy(update={"name": name}),)
    assert "by its maker's figures" in "\n".join(hardware.describe(made))
    smaller = TargetParams(name=name, memory="6GiB")
    assert hardware.profile(HardwareParams(target=smaller), tmp_path).budget_bytes == 6 * GIB


def test_an_unknown_gpu_is_refused_with_those_like_it(host: int, tmp_path: Path) -> None:
    asked = HardwareParams(target=TargetParams(name="RTX 3075"))
    with pytest.raises(UserError, match=r"like it: .*RTX 3070.*memory: 8GiB, compute_capability"):
        hardware.profile(asked, tmp_path)


def test_the_known_gpus_are_what_they_may_be() -> None:
    for name, card in gpu_facts.CARDS.items():
        assert gpu_facts.find_card(name) is card
        major, minor = gpu_facts.parse_capability(card.capability)
        assert (7, 0) <= (major, minor) <= (12, 1)
        # what a byte from memory, and one from the link, has to be worth in operations
        assert 50 < card.tflops * 1000 / card.gb_per_second < 450
        assert 5 < card.gb_per_second / card.link_gb_per_second < 100
        rates = gpu_facts.documented_rates(card)
        assert ("bfloat16" in rates.product_flops_per_second) is (major >= 8)
    assert len({gpu_facts._plain(name) for name in gpu_facts.CARDS}) == len(gpu_facts.CARDS)


@pytest.mark.parametrize(
    ("params", "parts"),
    [
        (
            HardwareParams(device="cpu", memory_budget="20GiB"),
            ["hardware.memory_budget is 20GiB (20.00 GiB)", "16.00 GiB"],
        ),
        (
            HardwareParams(device="cpu", memory_budget="12GiB", host_memory_budget="10GiB"),
            ["hardware.memory_budget is 12GiB", "10.00 GiB"],
        ),
        (
            HardwareParams(device="cpu", host_memory_budget="17GB"),
            ["hardware.host_memory_budget is 17GB (15.83 GiB)", "15.75 GiB"],
        ),
        (
            HardwareParams(target=TARGET, memory_budget="9GiB"),
            ["hardware.memory_budget is 9GiB", "RTX 3070 has 8.00 GiB"],
        ),
        (
            HardwareParams(target=TARGET, memory_budget="620MiB"),
            ["budget of 620.00 MiB on RTX 3070", "context alone takes 620.00 MiB"],
        ),
        (
            HardwareParams(device="cpu", target=TARGET),
            ["hardware.target describes a GPU (RTX 3070)", "hardware.device is cpu"],
        ),
    ],
)
def test_what_cannot_be_had_is_named(
    monkeypatch: pytest.MonkeyPatch,
    host: int,
    tmp_path: Path,
    params: HardwareParams,
    parts: list[str],
) -> None:
    if params.host_memory_budget == "17GB":
        memory = SimpleNamespace(total=15 * GIB + 800 * MIB)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(UserError) as error:
        hardware.profile(params, tmp_path)
    for part in parts:
        assert part in str(error.value)


def test_a_budget_beyond_the_gpu_is_answered_before_measuring(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, host: int, tmp_path: Path
) -> None:
    give_torch_gpus(monkeypatch, RTX_3070)
    asked = measure_without_a_child(monkeypatch)
    with pytest.raises(UserError, match=r"is 9GiB .*RTX 3070 has 8\.00 GiB"):
        hardware.profile(HardwareParams(memory_budget="9GiB"), tmp_path)
    assert asked == []


def test_budgets_cap_the_cpu(host: int, tmp_path: Path) -> None:
    both = HardwareParams(device="cpu", memory_budget="6GiB", host_memory_budget="8GiB")
    made = hardware.profile(both, tmp_path)
    assert (made.budget_bytes, made.host_budget_bytes, made.host_memory_bytes) == (
        6 * GIB,
        8 * GIB,
        16 * GIB,
    )
    made = hardware.profile(HardwareParams(device="cpu", host_memory_budget="8GiB"), tmp_path)
    assert made.budget_bytes == 8 * GIB


def test_summary_names_what_how_much_and_how_fast() -> None:
    text = "\n".join(hardware.describe(make_hardware(gpus=(RTX_3070, RTX_3070))))
    for part in (
        "2 x RTX 3070",
        "8.6 (bf16)",
        "600.00 MiB",
        "host to GPU 46.57 GiB/s",
        "bfloat16 700 TFLOP/s",
    ):
        assert part in text
    text = "\n".join(hardware.describe(make_hardware(target="RTX 3070")))
    assert "target  RTX 3070" in text
    text = "\n".join(hardware.describe(make_hardware(device="cpu", gpus=())))
    assert "device  the CPU, 8.00 GiB may be used" in text


# Using it


def test_on_the_cpu_nothing_is_limited_and_tensors_live_there() -> None:
    artifact = make_hardware(device="cpu", gpus=(), context_bytes=0)
    assert device.torch_device(artifact) == torch.device("cpu")
    device.limit_memory(artifact)


@pytest.mark.parametrize("use", [device.torch_device, device.limit_memory])
def test_training_needs_the_gpu_that_was_planned_for(
    monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml, use: Any
) -> None:
    give_torch_gpus(monkeypatch)
    with pytest.raises(UserError, match=r"plans for GPU RTX 3070.*remove hardware\.target"):
        use(make_hardware(target="RTX 3070"))
    with pytest.raises(UserError, match=r"made with RTX 3070, but .*--force profile_hardware"):
        use(make_hardware())


def test_allocator_is_held_to_what_the_context_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    give_torch_gpus(monkeypatch, RTX_3070)
    limits = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX 3070")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 8 * GIB))
    monkeypatch.setattr(
        torch.cuda,
        "set_per_process_memory_fraction",
        lambda fraction, device: limits.append((int(fraction * 8 * GIB), device)),
    )
    device.limit_memory(make_hardware(budget_bytes=4 * GIB, context_bytes=512 * MIB))
    assert limits == [(4 * GIB - 512 * MIB, torch.device("cuda", 1))]
    with pytest.raises(UserError, match=r"budget is 9\.00 GiB, but RTX 3070 has 8\.00 GiB"):
        device.limit_memory(make_hardware(budget_bytes=9 * GIB))
    assert len(limits) == 1


# The real thing


@pytest.mark.gpu
@needs_cuda
def test_real_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reserved = torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0
    made = hardware.profile(HardwareParams(device="cuda"), tmp_path)
    with capsys.disabled():
        print(*hardware.describe(made), sep="\n")
    gpu = made.gpus[0]
    assert len(made.gpus) == torch.cuda.device_count()
    assert gpu.name == torch.cuda.get_device_name(0)
    assert gpu.bf16 == torch.cuda.is_bf16_supported(including_emulation=False)
    assert made.budget_bytes == gpu.memory_bytes
    assert 64 * MIB < made.context_bytes < 2 * GIB
    assert made.workspace_bytes % MIB == 0
    assert (
        gpu_facts.CUBLAS_THREADS * gpu_facts.CUBLAS_BYTES
        <= made.workspace_bytes
        <= 2 * gpu_facts.CUBLAS_THREADS * gpu_facts.CUBLAS_BYTES_LARGE
    )
    rates = made.rates.model_dump()
    products = rates.pop("product_flops_per_second")
    assert all(rate > 10**8 for rate in rates.values()), rates
    assert rates["device_copy_bytes_per_second"] > rates["host_to_device_bytes_per_second"]
    assert {"float16", "float32"} <= set(products)
    assert ("bfloat16" in products) == gpu.bf16
    assert all(rate > 10**11 for rate in products.values()), products
    again = torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0
    assert again == reserved, "the measurement allocated in the caller's process"


@pytest.mark.gpu
@needs_cuda
def test_real_profile_settles(tmp_path: Path) -> None:
    first = hardware.profile(HardwareParams(device="cuda"), tmp_path)
    second = hardware.keep_stable(hardware.profile(HardwareParams(device="cuda"), tmp_path), first)
    for key in ("gpus", "workspace_bytes", "budget_bytes", "host_memory_bytes"):
        assert getattr(second, key) == getattr(first, key)
    for key in ("host_to_device_bytes_per_second", "device_copy_bytes_per_second"):
        assert getattr(second.rates, key) == getattr(first.rates, key)


@pytest.mark.gpu
@needs_cuda
def test_real_allocator_overflows_at_the_budget_and_not_before() -> None:
    """In a process of its own: the limit is the process's, for good."""
    program = """
import torch
from fitlora.artifacts import Hardware, Rates
from fitlora import device, gpu_measurement, hardware, machine, rates
MIB = 2**20
artifact = Hardware(
    device="cuda", gpus=machine.visible_gpus(), cpu_name="", cpu_cores=1, host_memory_bytes=1,
    host_budget_bytes=1, budget_bytes=1624 * MIB, context_bytes=600 * MIB, workspace_bytes=0,
    rates=Rates(host_to_device_bytes_per_second=None, device_to_host_bytes_per_second=None,
    device_copy_bytes_per_second=None, disk_read_bytes_per_second=None,
    product_flops_per_second={}), target=None)
device.limit_memory(artifact)
device = device.torch_device(artifact)
assert artifact.allocator_bytes == 1024 * MIB
kept = torch.empty(1000 * MIB, dtype=torch.uint8, device=device)
try:
    torch.empty(100 * MIB, dtype=torch.uint8, device=device)
except torch.OutOfMemoryError:
    print("overflow at", torch.cuda.memory_reserved() // MIB)
"""
    library = str(Path(hardware.__file__).parents[1])
    path = [library, *filter(None, [os.environ.get("PYTHONPATH")])]
    child = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.stdout.strip() == "overflow at 1000", child.stderr
