"""Which models take the fast step: the decoder layers that `fitlora.step.layer` can do by hand.

A family is known by its `model_type` and by its modules being transformers' own; its parts are then
read off the modules, so that sizes, biases, windows and fused projections need no table. Whatever is
not recognised goes through transformers' forward and autograd, with the same weights and the same
results, and the reason is said.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast

from torch import nn

from fitlora.model import decoder_layers
from fitlora.step.group import LinearGroup
from fitlora.step.layer import DecoderLayer, Norm
from fitlora.step.linear import FrozenLinear, Linear4bit, LoraLinear
from fitlora.step.whole import whole_parameters

FAMILIES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text"}
)
_GEMMA = frozenset({"gemma", "gemma2", "gemma3_text"})  # norm weights are stored less one
_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


# Models that keep sequences apart which lie behind each other in one row: all that goes from token to
# token is attention, made by the function that transformers is given, and positions are those it is
# given. `benchmarks/families.py` has compared each with its sequences one by one. Others get each
# sequence by itself, and attend in transformers' own plain operations.
TOGETHER = FAMILIES | frozenset(
    {
        "afmoe", "apertus", "arcee", "aria_text", "bitnet", "cohere", "cohere2", "cohere2_moe",
        "cwm", "deepseek_v2", "deepseek_v3", "diffllama", "dots1", "ernie4_5", "ernie4_5_moe",
        "exaone4", "exaone_moe", "flex_olmo", "gemma3", "gemma4", "gemma4_text", "glm", "glm4",
        "glm4_moe", "glm4_moe_lite", "gpt_bigcode", "gpt_neox", "granite", "granitemoe",
        "granitemoeshared", "helium", "hunyuan_v1_dense", "hunyuan_v1_moe", "hyperclovax",
        "internlm3", "jais2", "jetmoe", "minicpm3", "minimax_m2", "ministral", "ministral3",
        "mixtral", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "persimmon",
        "phi", "phi4_multimodal", "qwen2_moe", "qwen3_moe", "seed_oss", "smollm3", "solar_open",
        "stablelm", "starcoder2", "vaultgemma", "youtu",
    }
)  # fmt: skip


def goes_together(model: nn.Module) -> bool:
    """Whether sequences may lie behind each other in a micro-batch of the model."""
    config = cast(Any, model).config
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        config.model_type in TOGETHER
        and _is_transformers_own(model)
        and kinds <= {"full_attention", "sliding_attention"}
    )


def _is_transformers_own(model: nn.Module) -> bool:
    return type(model).__module__.startswith("transformers.models.")


def recognise(model: nn.Module) -> tuple[list[DecoderLayer], str]:
    """The model's layers done by hand, bottom up, or none; and the reason."""
    config = cast(Any, model).config
    family = config.model_type
    if family not in FAMILIES:
        return [], f"{family} has no step by hand"
    if not _is_transformers_own(model):
        return [], f"{type(model).__name__} is not transformers' own"
    act = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if act not in _ACTIVATIONS:
        return [], f"the activation {act} has no kernel"
    layers = decoder_layers(model)
    if any(isinstance(m, LoraLinear) and m.magnitude is not None for m in model.modules()):
        return [], "DoRA has no step by hand"
    whole = next(iter(whole_parameters(model)), None)
    if whole is not None:
        return [], f"{whole} is trained, and by hand adapters alone are"
    foreign = next((name for layer in layers for name in _foreign(layer)), None)
    if foreign is not None:
        return [], f"its {foreign} is no frozen linear layer"
    return [_layer(layer, config, _ACTIVATIONS[act]) for layer in layers], f"{family} by hand"


def _foreign(layer: nn.Module) -> list[str]:
    """Names of the projections that are neither frozen layers of ours nor adapters on them."""
    attention, mlp = cast(Any, layer).self_attn, cast(Any, layer).mlp
    return [
        name
        for part in (attention, mlp)
        for name, module in part.named_children()
        if name.endswith("_proj") and not isinstance(module, FrozenLinear | Linear4bit | LoraLinear)
    ]


def _layer(
    module: nn.Module, config: Any, activation: Literal["silu", "gelu_tanh"]
) -> DecoderLayer:
    layer: Any = module
    attention, mlp = layer.self_attn, layer.mlp
    family = config.model_type
    offset = 1.0 if family in _GEMMA else 0.0
    sandwich = hasattr(layer, "pre_feedforward_layernorm")

    def norm(part: nn.Module) -> Norm:
        return Norm.of(part, offset)

    head_size = attention.head_dim
    window = getattr(attention, "sliding_window", None)
    if family in ("mistral", "phi3"):
        window = getattr(config, "sliding_window", None)
    return DecoderLayer(
        qkv=_group(attention, ("qkv_proj",), ("q_proj", "k_proj", "v_proj"), fused=True),
        o=LinearGroup([attention.o_proj]),
        gate_up=_group(mlp, ("gate_up_proj",), ("gate_proj", "up_proj")),
        down=LinearGroup([mlp.down_proj]),
        input_norm=norm(layer.input_layernorm),
        mlp_norm=norm(
            layer.pre_feedforward_layernorm if sandwich else layer.post_attention_layernorm
        ),
        attention_out_norm=norm(layer.post_attention_layernorm) if sandwich else None,
        mlp_out_norm=norm(layer.post_feedforward_layernorm) if sandwich else None,
        q_norm=norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=head_size,
        scale=float(attention.scaling),
        # transformers counts the token itself, and the kernels those to its left
        window=-1 if window is None else int(window) - 1,
        softcap=getattr(attention, "attn_logit_softcapping", None) if family == "gemma2" else None,
        activation=activation,
        kind=getattr(attention, "layer_type", None) or "",
    )


def _group(
    parent: Any, whole: Sequence[str], parts: Sequence[str], *, fused: bool = False
) -> LinearGroup:
    names = whole if hasattr(parent, whole[0]) else parts
    return LinearGroup([getattr(parent, name) for name in names], fused=fused)
