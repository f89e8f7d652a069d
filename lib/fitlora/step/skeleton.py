"""The model without weights, in the form that it trains in.

A skeleton has every module and no weight (parameters on the meta device), with the linear layers
already 4-bit or frozen. The same skeleton is filled with fake tensors to estimate, with noise to
probe, and with a checkpoint to train.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from fitlora.model import empty_model, linear_names
from fitlora.quantization.layout import QuantSpec, nested_code
from fitlora.step.linear import FrozenLinear, Linear4bit


def skeleton(
    config: Any,
    *,
    dtype: torch.dtype,
    spec: QuantSpec | None,
    keep: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model with its linear layers frozen: in 4 bits by `spec`, or as they are where it is None.

    dtype: what everything that is not quantized is stored and computed in.
    """
    if getattr(config, "quantization_config", None) is not None:
        config = type(config).from_dict(
            {k: v for k, v in config.to_dict().items() if k != "quantization_config"}
        )
    model = empty_model(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.requires_grad_(False)
    quantized = set(linear_names(model, keep)) if spec is not None else set()
    code = nested_code() if spec is not None and spec.double else None
    for name in list(linear_names(model)):
        parent = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        linear = cast(nn.Linear, getattr(parent, leaf))
        if name in quantized:
            assert spec is not None
            new: nn.Module = Linear4bit(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                spec=spec,
                nested_code=code,
                dtype=dtype,
            )
            setattr(parent, leaf, new)
        else:
            linear.__class__ = FrozenLinear
    return model
