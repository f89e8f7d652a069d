"""Tiny models of real architectures, written as real checkpoints: what tests quantize, train and merge.

Two layers of hidden size 64 and a byte-level tokenizer: a model is made in a few milliseconds, and yet
every name, fused layer, bias and tied head is the architecture's own, written by `save_pretrained`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

VOCABULARY = 288  # 256 bytes, the special tokens, and a few that nothing uses
SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    # in_features, out_features and their product are odd in the MLP
    "llama_odd": {
        "model_type": "llama", "hidden_size": 63, "intermediate_size": 95,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16,
    },
    "qwen2": {"model_type": "qwen2"},  # biases on q, k and v
    "phi3": {"model_type": "phi3"},  # fused qkv_proj and gate_up_proj
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "head_dim": 16,
    },
    # a router that is a linear layer with more to it
    "phimoe": {"model_type": "phimoe", "num_local_experts": 4, "num_experts_per_tok": 2},
    # dense layers and shared experts beside the others
    "glm4_moe": {
        "model_type": "glm4_moe", "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)


def make_config(family: str, *, tied: bool = False, **changes: Any) -> Any:
    """The transformers config of a tiny model. changes: config keys that differ."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        **{**_COMMON, **_FAMILIES[family], "tie_word_embeddings": tied, **changes}
    )


def make_checkpoint(
    folder: Path,
    family: str,
    *,
    tied: bool = False,
    shards: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """Writes a tiny model with random weights; returns `folder`.

    family: one of FAMILIES. shards: 1 for a single file, more for about so many with an index.
    changes: config keys that differ. Norms and biases are random too, so that a test sees a lost one.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(make_config(family, tied=tied, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.to(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = {} if shards == 1 else {"max_shard_size": -(-size // shards)}
    model.save_pretrained(folder, **limit)
    files = len(list(folder.glob("*.safetensors")))
    assert (files > 1) == (shards > 1), f"{files} files instead of about {shards}"
    if tokenizer:
        make_tokenizer(folder)
    return folder


def make_tokenizer(folder: Path) -> Any:
    """Writes a tokenizer of single bytes with a chat template; returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files, by name."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def dequantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A 4-bit checkpoint's tensors with its weights in float32: the layout's table in plain PyTorch.

    It shares no code with the library or with bitsandbytes' kernels.
    """
    plain = {name: tensor for name, tensor in tensors.items() if ".weight." not in name}
    for key, packed in tensors.items():
        name, separator, _ = key.partition(".quant_state.")
        if not separator:
            continue
        state = json.loads(bytes(packed.tolist()))
        scales = tensors[f"{name}.absmax"]
        if "nested_offset" in state:
            groups = torch.arange(len(scales)) // state["nested_blocksize"]
            code = tensors[f"{name}.nested_quant_map"]
            scales = code[scales.long()] * tensors[f"{name}.nested_absmax"][groups]
            scales = scales + torch.tensor(state["nested_offset"], dtype=torch.float32)
        pairs = tensors[name].view(-1)
        codes = torch.stack((pairs >> 4, pairs & 15), dim=1).view(-1).long()
        codes = codes[: math.prod(state["shape"])]
        blocks = torch.arange(len(codes)) // state["blocksize"]
        values = tensors[f"{name}.quant_map"][codes] * scales[blocks]
        plain[name] = values.view(state["shape"])
    return plain
