"""What the machine is, how fast its parts are, and how much of it may be used.

Two kinds of facts come together in one artifact. What a thing is (name, capability, memory) is read
from the driver, torch and the kernel. How fast it is, and what CUDA takes beside PyTorch's
allocator, cannot be looked up, so it is measured, in a few seconds. The trade-off is precision
against stability: every later stage may depend on these facts, so a measured one is rounded
coarsely and keeps its former value while it stays close (`keep_stable`). Free memory, clocks and
times change from minute to minute and never enter the artifact; they are only said.
"""

from pathlib import Path

import pynvml

from fitlora import gpu_facts, gpu_measurement, machine, rates
from fitlora.artifacts import Gpu, Hardware, Rates
from fitlora.console import say
from fitlora.device import device_used_bytes, gpu_uuid, nvml_session
from fitlora.errors import UserError
from fitlora.params import HardwareParams
from fitlora.units import MIB, format_bytes, parse_bytes

STABLE_SHARE = 0.15  # a measured fact this close to its former value keeps it


def profile(params: HardwareParams, disk: Path) -> Hardware:
    """What the machine is and how much of it may be used; takes seconds, and says what it notes.

    The first GPU is measured and all are listed. `disk` is a folder on the disk to measure, made
    if it is not there. Raises UserError where `params` asks for what is not here: cuda without a
    GPU, a target beside device cpu, a budget beyond the memory or within CUDA's context.
    """
    host_bytes = machine.host_memory_bytes()
    host_budget_bytes = _budget(
        "hardware.host_memory_budget", params.host_memory_budget, host_bytes, "this host"
    )
    gpus, device = _find_gpus(params)
    if device == "cuda":
        whose, capacity_bytes = gpus[0].name, gpus[0].memory_bytes
    else:
        whose, capacity_bytes = "this host, as far as it may be used,", host_budget_bytes
    budget_bytes = _budget("hardware.memory_budget", params.memory_budget, capacity_bytes, whose)

    context_bytes = workspace_bytes = 0
    if params.target is not None:
        context_bytes = gpu_facts.documented_context_bytes(gpus[0].compute_capability)
        workspace_bytes = gpu_facts.documented_workspace_bytes(gpus[0].compute_capability)
        speeds = gpu_facts.documented_rates(gpu_facts.find_card(params.target.name))
    else:
        disk.mkdir(parents=True, exist_ok=True)
        if device == "cuda":
            measured = _measure_first_gpu(gpus[0], budget_bytes, disk)
            context_bytes = measured.context_bytes
            workspace_bytes = measured.workspace_bytes
            speeds = measured.rates
        else:
            speeds = rates.measure_cpu(disk)
    if budget_bytes <= context_bytes:
        raise UserError(
            f"a budget of {format_bytes(budget_bytes)} on {whose} leaves nothing to compute in: "
            f"CUDA's context alone takes {format_bytes(context_bytes)}; "
            "raise hardware.memory_budget"
        )
    return Hardware(
        device=device,
        gpus=gpus,
        cpu_name=machine.cpu_name(),
        cpu_cores=machine.cpu_cores(),
        host_memory_bytes=host_bytes,
        host_budget_bytes=host_budget_bytes,
        budget_bytes=budget_bytes,
        context_bytes=context_bytes,
        workspace_bytes=workspace_bytes,
        rates=speeds,
        target=None if params.target is None else params.target.name,
    )


def _budget(key: str, size: str | None, capacity_bytes: int, whose: str) -> int:
    if size is None:
        return capacity_bytes
    wanted_bytes = parse_bytes(size)
    if wanted_bytes > capacity_bytes:
        raise UserError(
            f"{key} is {size} ({format_bytes(wanted_bytes)}), but {whose} has "
            f"{format_bytes(capacity_bytes)}; lower it, or set it to null to use all"
        )
    return wanted_bytes


def _find_gpus(params: HardwareParams) -> tuple[tuple[Gpu, ...], machine.Device]:
    target = params.target
    if target is not None:
        if params.device == "cpu":
            raise UserError(
                f"hardware.target describes a GPU ({target.name}), but hardware.device is cpu; "
                "set one of them to null or auto"
            )
        memory, capability = target.memory, target.compute_capability
        if memory is None or capability is None:
            card = gpu_facts.known_card(target.name)
            memory, capability = memory or card.memory, capability or card.capability
        return (gpu_facts.describe_gpu(target.name, capability, parse_bytes(memory)),), "cuda"
    device, reason = machine.choose_device(params.device)
    if device == "cpu":
        say(f"the CPU is the device: {reason}")
        return (), "cpu"
    gpus = machine.visible_gpus()
    if len(set(gpus)) > 1:
        names = ", ".join(f"{gpu.name} ({format_bytes(gpu.memory_bytes)})" for gpu in gpus)
        say(f"the GPUs differ: {names}; the first is profiled, and plans are made for it")
    return gpus, "cuda"


def _measure_first_gpu(gpu: Gpu, budget_bytes: int, disk: Path) -> gpu_measurement.GpuMeasurement:
    uuid = gpu_uuid()
    used_before = _used_bytes_if_told(uuid)
    if used_before is not None and used_before > max(64 * MIB, gpu.memory_bytes - budget_bytes):
        say(
            f"{format_bytes(used_before)} of {gpu.name} are in use by other processes, and the "
            f"budget of {format_bytes(budget_bytes)} counts on some of it; hardware.memory_budget "
            "can be lowered"
        )
    measured = gpu_measurement.measure_gpu_in_child(gpu, uuid, used_before, disk)
    say(f"CUDA's context is {measured.context_source}")
    return measured


def _used_bytes_if_told(uuid: str) -> int | None:
    try:
        with nvml_session() as nvml:
            return device_used_bytes(nvml, uuid)
    except pynvml.NVMLError:
        return None  # the caller has a way without it, and says which way it took


def keep_stable(new: Hardware, old: Hardware) -> Hardware:
    """`new`, with the measured facts that are within 15% of their former value left as they were.

    So noise changes no hash of a later stage. Memory that is taken (context, workspace) may only
    have shrunk to be left: a growth, however small, is memory that a plan would spend twice. Facts
    of other devices, or of a described one, are no former values.
    """
    machine = ("device", "gpus", "cpu_name", "target")
    if new.target is not None or any(getattr(new, key) != getattr(old, key) for key in machine):
        return new
    speeds, former = new.rates, old.rates
    links = {
        key: _keep_rate(getattr(speeds, key), getattr(former, key))
        for key in Rates.model_fields
        if key != "product_flops_per_second"
    }
    products = {
        dtype: _keep_rate(value, former.product_flops_per_second.get(dtype))
        for dtype, value in speeds.product_flops_per_second.items()
    }
    context_bytes = _keep_size(new.context_bytes, old.context_bytes)
    if context_bytes >= new.budget_bytes:  # the budget lies between the two
        context_bytes = new.context_bytes
    return new.model_copy(
        update={
            "rates": Rates.model_validate({**links, "product_flops_per_second": products}),
            "context_bytes": context_bytes,
            "workspace_bytes": _keep_size(new.workspace_bytes, old.workspace_bytes),
        }
    )


def _keep_rate(new: int | None, old: int | None) -> int | None:
    if new is None or old is None:
        return new
    return old if abs(new - old) <= STABLE_SHARE * old else new


def _keep_size(new: int, old: int) -> int:
    return old if (1 - STABLE_SHARE) * old <= new <= old else new


def describe(hardware: Hardware) -> list[str]:
    """What, how much and how fast, as lines for people."""
    lines = [
        f"host    {hardware.cpu_name}, {hardware.cpu_cores} cores, "
        f"{format_bytes(hardware.host_budget_bytes)} of "
        f"{format_bytes(hardware.host_memory_bytes)} may be used"
    ]
    if hardware.device == "cpu":
        lines.append(f"device  the CPU, {format_bytes(hardware.budget_bytes)} may be used")
    else:
        gpu = hardware.gpus[0]
        types = [name for name, has in (("bf16", gpu.bf16), ("fp8", gpu.fp8)) if has]
        count = f"{len(hardware.gpus)} x " if len(hardware.gpus) > 1 else ""
        role = "target" if hardware.target is not None else "device"
        lines.append(
            f"{role}  {count}{gpu.name}, {format_bytes(gpu.memory_bytes)}, compute capability "
            f"{gpu.compute_capability} ({', '.join(types) or 'neither bf16 nor fp8'})"
        )
        lines.append(
            f"budget  {format_bytes(hardware.budget_bytes)}, of which CUDA's context takes "
            f"{format_bytes(hardware.context_bytes)} and cuBLAS "
            f"{format_bytes(hardware.workspace_bytes)}"
        )
    found = hardware.rates
    links = (
        ("host to GPU", found.host_to_device_bytes_per_second),
        ("GPU to host", found.device_to_host_bytes_per_second),
        ("GPU copy", found.device_copy_bytes_per_second),
        ("disk read", found.disk_read_bytes_per_second),
    )
    speeds = [f"{name} {format_bytes(rate)}/s" for name, rate in links if rate is not None]
    speeds += [
        f"{dtype} {rate / 10**12:g} TFLOP/s"
        for dtype, rate in found.product_flops_per_second.items()
    ]
    told = ", by its maker's figures" if hardware.target is not None and speeds else ""
    lines.append(f"speed   {', '.join(speeds) or 'not known: the GPU is not here'}{told}")
    return lines
