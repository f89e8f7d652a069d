"""What the model is: its folder, its config, and its modules without weights."""

import fnmatch
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fitlora.errors import UserError

DEFINITION_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
WEIGHT_FILES = ("*.safetensors",)


def resolve_model(model_id: str, revision: str | None, *, weights: bool) -> Path:
    """The folder that holds the model, fetched from the hub where `model_id` is not a folder.

    weights: whether the weights are needed, or the config and tokenizer alone. Raises UserError when
    there is no such folder, or when a hub id comes without a full commit as its revision.
    """
    folder = Path(model_id)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model.id {model_id} has no config.json; it is not a model's folder")
        return folder
    if folder.is_absolute() or model_id.startswith(".") or model_id.count("/") != 1:
        raise UserError(f"model.id {model_id} is neither a folder nor a hub id (owner/name)")
    if revision is None:
        raise UserError(
            f"model.id {model_id} is no folder here, so it is read as a hub id, which needs "
            "model.revision: the full commit (40 hex digits, quoted), so that every run gets the "
            "same weights"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*DEFINITION_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.id {model_id} at {revision} could not be fetched: {error}; where the hub cannot be "
            "reached, give a folder that has the model"
        ) from None


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has any file that a tokenizer is loaded from."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return any((folder / name).is_file() for name in names)


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's transformers config; raises UserError for an unknown or unreadable one."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{folder}/config.json cannot be read: {error}") from None


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's repeated blocks, bottom up."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    stacks = [
        list(module)
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    if not stacks:
        raise UserError(
            f"{type(model).__name__} has no decoder layers that FitLoRA can find; take another model"
        )
    return max(stacks, key=len)


def linear_names(model: nn.Module, keep: Sequence[str] = ()) -> Iterator[str]:
    """The linear layers that are quantized: all but the head and those that `keep` matches.

    keep: parts of names, or patterns with `*`. Layers with a forward of their own (some routers of
    experts) are no linear layers, nor is what Mamba's mixers call `dt_proj`: they multiply with its
    weight by themselves.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if type(module).forward is not nn.Linear.forward or module is head:
            continue
        if name.endswith("dt_proj"):
            continue
        if any(part in name.split(".") or fnmatch.fnmatch(name, part) for part in keep):
            continue
        yield name


def expert_names(model: nn.Module) -> list[str]:
    """Weights of many linear layers in one tensor, (experts, out, in); no convolution's."""
    return [
        f"{prefix}.{leaf}"
        for prefix, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]


class _NothingToFill(TorchDispatchMode):
    """Leaves meta tensors as they are: to fill one takes a millisecond, and comes to nothing."""

    FILLS = frozenset(
        (
            torch.ops.aten.normal_,
            torch.ops.aten.uniform_,
            torch.ops.aten.fill_,
            torch.ops.aten.zero_,
        )
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in self.FILLS and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def empty_model(config: Any, *, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """The model as transformers defines it, parameters on meta, computed buffers real.

    It attends in plain operations, which every model has. Raises UserError where transformers cannot
    make a causal language model of the config, and where it is none: one whose attention looks ahead.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False), _NothingToFill():  # type: ignore[no-untyped-call]
        try:
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                attn_implementation="eager",
            )
        except (
            ImportError,
            AssertionError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise UserError(
                f"transformers cannot make a causal language model of this {config.model_type} config "
                f"({type(error).__name__}: {error}); look at its config.json, or take another model"
            ) from error
    if _looks_ahead(model):
        raise UserError(
            f"a {type(model).__name__} with this config looks ahead in its attention, so that it cannot "
            "learn to predict the next token; take a causal model"
        )
    model.tie_weights()
    return cast(nn.Module, model)


def _looks_ahead(model: Any) -> bool:
    """Whether a token sees what comes behind it."""
    config = model.config
    if not getattr(config, "is_causal", True):
        return True
    if getattr(config, "use_bidirectional_attention", None) in (
        True,
        "all",
    ):  # else in images alone
        return True
    # of encoders; some decoders say it as well, and their attention another thing
    encoder = getattr(config, "is_decoder", None) is False
    return encoder and not any(getattr(module, "is_causal", False) for module in model.modules())
