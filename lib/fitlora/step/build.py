"""THE training step: built from a model's config, a Plan and a source of weights, and from nothing else.

`build_step` makes it for three purposes. On fake tensors it tells every allocation; on the device with
noise for weights it is the probe; with a checkpoint it trains. Only the `Weights` differ, and no line
in here asks which of them it has.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fitlora.errors import UserError
from fitlora.model import decoder_layers, expert_names
from fitlora.offload.optimizer import CPUOffloadOptimizer
from fitlora.offload.transport import Transport
from fitlora.params import LoraParams, TrainParams
from fitlora.plan import Optimizer, Plan
from fitlora.step import attention
from fitlora.step.batch import StepContext
from fitlora.step.devices import Devices
from fitlora.step.families import goes_together, recognise
from fitlora.step.layer import DecoderLayer
from fitlora.step.linear import FrozenLinear, Linear4bit, LoraLinear
from fitlora.step.network import AutogradNetwork, HandNetwork, Network
from fitlora.step.placement import Placement
from fitlora.step.recompute import arrange
from fitlora.step.settings import StepSettings
from fitlora.step.skeleton import skeleton
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import Weights
from fitlora.step.whole import train_whole


@dataclass(frozen=True)
class StepSkeleton:
    """The whole step but for its tensors. It is filled once.

    together: whether sequences may lie behind each other in a micro-batch. layers: the decoder layers
    that are done by hand, none where autograd does them; and the reason.
    """

    model: nn.Module
    plan: Plan
    settings: StepSettings
    context: StepContext
    together: bool
    layers: Sequence[DecoderLayer]
    reason: str

    def fill(
        self,
        weights: Weights,
        transport: Transport | None = None,
        devices: Devices | None = None,
    ) -> TrainingStep:
        """Puts every tensor in its place and makes the optimizer.

        transport: what moves bytes between host and device; None makes one where the Plan needs it.
        devices: None for those that begin with the weights'.
        """
        layers = decoder_layers(self.model)
        if not self.layers:
            self._check_general()
        for verb, chosen in (
            ("recomputes", self.plan.recompute_layers),
            ("streams", self.plan.streamed_layers),
        ):
            beyond = [index for index in chosen if index >= len(layers)]
            if beyond:
                raise UserError(
                    f"the Plan {verb} layer {beyond[0]}, and the model has {len(layers)}"
                )
        devices = devices or Devices.of(self.plan, len(layers), weights.device)
        placement = Placement(self.model, self.plan, weights, devices, transport)
        network: Network
        by_hand = None
        if self.layers:
            network = by_hand = HandNetwork(self.model, self.layers, self.plan, placement)
        else:
            network = AutogradNetwork(
                self.model, self.context, self.plan, placement, together=self.together
            )
        if weights.fresh and self.settings.lora is not None and self.settings.lora.dora:
            _start_magnitudes(layers, placement)
        arrange(layers, self.plan.recompute_layers, at_home=placement.at_home)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = (
            make_optimizer(trained, self.plan.optimizer, self.settings.train, weights)
            if trained
            else None
        )
        if optimizer is not None and self.plan.optimizer_device == "host":
            leaving = by_hand is not None
            optimizer = CPUOffloadOptimizer(
                optimizer,
                transport=placement.transport,
                offload_gradients=leaving,
                overlap=leaving,
            )
            if by_hand is not None:
                (bank,) = by_hand.banks  # on several devices no part is on the host
                bank.host = optimizer
        return TrainingStep(
            self.model, self.plan, self.settings, self.context, network, optimizer, weights.device
        )

    def _check_general(self) -> None:
        """What the general way cannot do, said before anything is loaded."""
        if expert_names(self.model) and self.plan.storage_dtype != "bfloat16":
            raise UserError(
                f"the experts of a {type(self.model).__name__} are computed in bfloat16 and not in "
                f"{self.plan.compute_dtype}; set plan.compute_dtype: bfloat16"
            )
        text = cast(Any, self.model).config.get_text_config()
        shared: int = getattr(text, "num_kv_shared_layers", 0)
        if self.plan.recompute_layers and shared:
            raise UserError(
                f"layers of a {type(self.model).__name__} attend to keys and values of others, which no "
                "layer hands on that is recomputed; set plan.recompute: none"
            )
        kept = set(self.plan.streamed_layers) - set(self.plan.recompute_layers)
        if kept:
            raise UserError(
                f"layer {min(kept)} is streamed and not recomputed, which needs a family that FitLoRA "
                f"does by hand ({self.reason}); recompute every streamed layer"
            )
        if (
            self.plan.checkpoints == "host"
            or self.plan.compute_dtype == "float8"
            or self.plan.micro_batches_per_pass > 1
            or self.plan.layers_per_device
        ):
            raise UserError(
                "checkpoints on the host, float8, layers spread over devices and micro-batches that "
                f"share a pass need a family that FitLoRA does by hand ({self.reason})"
            )


@torch.no_grad()
def _start_magnitudes(layers: Sequence[nn.Module], placement: Placement) -> None:
    placement.begin(backward_follows=False)
    for index, layer in enumerate(layers):
        with placement.at_home(index):
            for module in layer.modules():
                if isinstance(module, LoraLinear):
                    module.start_magnitude()


def step_skeleton(config: Any, plan: Plan, settings: StepSettings) -> StepSkeleton:
    """The model with its adapters on the meta device, wired for the step.

    config: a transformers config. Made outside of any fake tensor mode: its computed buffers are real.
    """
    attention.register()
    model = skeleton(
        config,
        dtype=getattr(torch, plan.storage_dtype),
        spec=settings.spec,
        keep=settings.quantization.keep_in_16_bits,
        trust_remote_code=settings.trust_remote_code,
    )
    together = goes_together(model)
    if together:
        cast(Any, model).set_attn_implementation(attention.NAME)
    context = StepContext()
    bare: set[str] = set()
    if settings.lora is not None:
        add_adapters(model, settings.lora)
        bare = _bare(model) if settings.lora.target_modules == "all-linear" else set()
    for stream, layer in enumerate(m for m in model.modules() if isinstance(m, LoraLinear)):
        layer.stream, layer.context = stream, context
    layers, reason = recognise(model)
    if not together:
        reason += ", and each sequence goes through it by itself"
    if bare:
        reason += f"; {', '.join(sorted(bare))} without adapters, as PEFT puts none there"
    for stream, group in enumerate(group for layer in layers for group in layer.groups):
        for adapter in group.adapters:
            adapter.stream = stream
    for module in model.modules():
        # transformers hands its attention function the module, so the context rides on that
        module.fitlora_context = context  # type: ignore[assignment]
    return StepSkeleton(model, plan, settings, context, together, layers, reason)


def build_step(
    config: Any,
    plan: Plan,
    settings: StepSettings,
    weights: Weights,
    transport: Transport | None = None,
) -> TrainingStep:
    """The step. config: a transformers config; weights: fake, noise or a checkpoint."""
    return step_skeleton(config, plan, settings).fill(weights, transport)


def lora_targets(model: nn.Module) -> list[str]:
    """The last parts of the names of the layers that have adapters."""
    names = (name for name, module in model.named_modules() if isinstance(module, LoraLinear))
    return sorted({_leaf(name) for name in names})


def _leaf(name: str) -> str:
    """The last part of a layer's name, and the one before where that is but a number."""
    *_, parent, leaf = name.split(".")
    return f"{parent}.{leaf}" if leaf.isdigit() else leaf


def _bare(model: nn.Module) -> set[str]:
    """The last parts of the names of the frozen linear layers that have no adapters."""
    return {
        _leaf(name)
        for name, module in model.named_modules()
        if isinstance(module, FrozenLinear | Linear4bit) and ".base_layer" not in name
    }


def peft_config(model: nn.Module, lora: LoraParams) -> Any:
    """peft's description of the adapters; raises UserError where nothing matches.

    all-linear means what PEFT puts adapters on. Where other layers are named, that is refused.
    """
    from peft import LoraConfig

    leaves = _bare(model)
    if not leaves:
        raise UserError(
            f"a {type(model).__name__} has no linear layers that FitLoRA knows, so that nothing of it "
            "could be quantized or adapted; take another model"
        )
    everything = lora.target_modules == "all-linear"
    asked = leaves if everything else set(lora.target_modules)
    if unknown := sorted(asked - leaves):
        raise UserError(
            f"lora.target_modules has {', '.join(unknown)}, and this model has "
            f"{', '.join(sorted(leaves))}; or say all-linear"
        )
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(asked),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({Linear4bit: LoraLinear, FrozenLinear: LoraLinear})
    experts, fused = _meant_as_experts(config, model), _left_to_kernels(config, model)
    config.target_modules -= experts | fused
    if (experts or fused) and not everything:
        names, why = (
            (experts, "mean the experts, which are not trained here")
            if experts
            else (fused, "belong to Mamba's kernels, which ask no adapter")
        )
        raise UserError(
            f"lora.target_modules: of a {type(model).__name__}, PEFT has {', '.join(sorted(names))} "
            f"{why}; set lora.target_modules: [{', '.join(sorted(config.target_modules))}]"
        )
    return config


def _meant_as_experts(config: Any, model: nn.Module) -> set[str]:
    """Names of layers that PEFT takes for those of a mixture's experts.

    It would leave layers of that name out, when the adapter is made and whenever one is loaded.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    asked, wanted = set(config.target_modules), copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(wanted, model, None)
    except ValueError:  # some of what experts have, and not all
        return asked & {"gate_proj", "up_proj", "down_proj"}
    return asked - set(wanted.target_modules)


def _left_to_kernels(config: Any, model: nn.Module) -> set[str]:
    """Names of layers that PEFT refuses, as a state space's kernels take their weights alone."""
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    found = set()
    for name in config.target_modules:
        try:
            _check_lora_target_modules_mamba(config, model, name)
        except ValueError:
            found.add(name)
    return found


def add_adapters(model: nn.Module, lora: LoraParams) -> None:
    """Puts peft's LoRA layers on the skeleton's frozen linear layers, their weights on meta."""
    from peft import inject_adapter_in_model

    config = peft_config(model, lora)
    with warnings.catch_warnings():
        # peft does not know our layers by name; that they have in_features is all it needs
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        try:
            inject_adapter_in_model(config, model, LoraLinear.adapter, low_cpu_mem_usage=True)
        except ValueError as error:
            asked = ", ".join(sorted(config.target_modules))
            raise UserError(
                f"PEFT puts no adapters on a {type(model).__name__} so: {error} Set "
                f"lora.target_modules to others of: {asked}"
            ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    train_whole(model, lora)


def make_optimizer(
    parameters: list[nn.Parameter], kind: Optimizer, train: TrainParams, weights: Weights
) -> torch.optim.Optimizer:
    """AdamW by PyTorch (fused: no temporaries), or bitsandbytes' 8-bit and paged ones."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1]},
        # biases, norms and magnitudes are not drawn to zero
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.beta1, train.beta2),
        "eps": train.epsilon,
        "weight_decay": train.weight_decay,
    }
    if kind == "adamw":
        optimizer = torch.optim.AdamW(groups, fused=True, **settings)
        # every device that a step is on can; tensors on meta are what an estimate has
        cast(Any, optimizer)._need_device_dtype_check_for_fused = False
        return optimizer
    import bitsandbytes

    make = {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw": bitsandbytes.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }[kind]
    with unset_fake_temporarily():  # its code books are computed, and need numbers
        optimizer = make(groups, **settings)
    if weights.device.type == "meta":
        optimizer.is_paged = False  # pages are the driver's; an estimate finds these states by size
    for name, book in optimizer.name2qmap.items():
        optimizer.name2qmap[name] = weights.constant(name, book)
    return cast(torch.optim.Optimizer, optimizer)
