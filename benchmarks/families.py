"""Every causal model that transformers has: does it train as stock transformers computes it?

Of each a tiny one is made from its config's defaults, with few layers of each kind and small widths. In
float32 on the CPU, with weights large enough that tokens matter to each other, three rows' mean loss is
compared with stock transformers', which has each row alone and plain attention; then gradients with
every layer recomputed with those where none is, and a step with dropout is run. The memory of a 4-bit
step on a GPU is estimated beside it. What FitLoRA refuses it says; `stock` is what transformers says of
a tiny config that it cannot run itself, which tells nothing of FitLoRA.

    python -m benchmarks.families --json benchmarks/results/families.cpu.json     # 8 minutes of a core
"""

import argparse
import json
import logging
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.common import write_result
from fitlora.errors import UserError
from fitlora.memory.estimate import Load, trace_step
from fitlora.params import LoraParams, QuantizationParams, TrainParams
from fitlora.step import build
from fitlora.step.network import HandNetwork
from fitlora.step.settings import StepSettings
from fitlora.step.training_step import TrainingStep
from fitlora.step.weights import RandomWeights
from tests.step import steps

SECONDS = 120  # after which a family is given up

# What keys of configs are to be at most, wherever they are.
_NAMES = {
    64: "hidden_size d_model n_embd dim_model embedding_size attention_hidden_size lru_width "
    "max_position_embeddings n_positions n_ctx index_topk",
    96: "intermediate_size ffn_dim d_ff n_inner dim_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
    "shared_intermediate_size",
    32: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size mamba_d_head "
    "moe_shared_expert_intermediate_size mamba_head_dim mamba_headdim",
    16: "head_dim dim_head d_head global_head_dim v_head_dim kv_lora_rank q_lora_rank index_head_dim "
    "linear_key_head_dim linear_value_head_dim",
    8: "rotary_dim qk_rope_head_dim qk_nope_head_dim mamba_d_state state_size ssm_state_size chunk_size "
    "mamba_chunk_size attention_chunk_size hidden_size_per_layer_input",
    6: "sliding_window attention_window_size window_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads linear_num_value_heads mamba_n_heads mamba_num_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts mamba_dt_rank time_step_rank",
    2: "num_key_value_heads linear_num_key_heads num_experts_per_tok moe_topk moe_k encoder_layers "
    "num_experts_per_token num_global_key_value_heads index_n_heads num_encoder_layers",
    1: "n_group topk_group mamba_n_groups n_groups first_k_dense_replace",
    0: "num_kv_shared_layers",
    steps.VOCABULARY: "vocab_size vocab_size_per_layer_input mamba_d_ssm",  # 128
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "n_layers", "num_blocks")
_DECODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
    "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer",
    "xlm-roberta", "xlm-roberta-xl", "prophetnet",
)  # fmt: skip
# What a family's tiny config needs beside that.
_CHANGES: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in _DECODERS},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16}, "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "bamba": {"attn_layer_indices": [1]},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "minimax": {"layer_types": ["full_attention", "linear_attention"]},
    "ministral": {"head_dim": 16}, "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
}  # fmt: skip


def tiny(family: str) -> Any:
    """A config of the family; raises what its class does where the sizes do not go together."""
    kind = CONFIG_MAPPING[family]
    content = {**_shrunk(kind().to_dict()), **_CHANGES.get(family, {})}
    content.pop("transformers_version", None)
    return kind.from_dict(content)


def _shrunk(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a config and of those in it, in small; its layers are the first of each kind."""
    small = {
        key: min(value, _SIZES[key]) if isinstance(value, int) and key in _SIZES else value
        for key, value in content.items()
    }
    small |= {key: value for key, value in _TOKENS.items() if key in content}
    if content.get("sliding_window", 0) is None:
        small["sliding_window"] = _SIZES["sliding_window"]
    if "qk_rope_head_dim" in small:  # latent attention
        small["head_dim"], small["num_key_value_heads"] = 8, small["num_attention_heads"]
    for key, value in content.items():
        if key.endswith("_config") and isinstance(value, dict) and key != "per_layer_config":
            small[key] = _shrunk(value)
    name = next((name for name in _LAYERS if isinstance(content.get(name), int)), None)
    if name is None:
        return small
    depth = content[name]
    small[name] = count = min(depth, max(2, len(set(content.get("layer_types") or ()))))
    for key, value in content.items():
        if isinstance(value, list) and len(value) == depth > count:
            first = {str(entry): entry for entry in reversed(value)}
            small[key] = [*reversed(first.values()), *value][:count]
    if content.get("per_layer_config"):
        small["per_layer_config"] = {
            count - 1: _shrunk(next(iter(content["per_layer_config"].values())))
        }
    return small


class Lively(RandomWeights):
    """Noise that is large enough for tokens to matter to each other."""

    def frozen(self, name: str, like: Tensor) -> Tensor:
        out = super().frozen(name, like)
        if out.dim() > 1 and out.is_floating_point():
            out.normal_(0.0, 1.2 / out.shape[-1] ** 0.5, generator=self._generator)
        return out


def settings(bits: int, dropout: float) -> StepSettings:
    lora = LoraParams(r=4, dropout=dropout)
    return StepSettings(QuantizationParams.model_validate({"bits": bits}), lora, TrainParams())


def step(
    family: str, *, recomputed: bool, dropout: float = 0.0, blank: bool = False
) -> TrainingStep:
    """blank: whether adapters change nothing yet."""
    plan = steps.plan(micro_batch_size=3, recompute_layers=(0, 1) if recomputed else ())
    weights, noise = Lively(torch.device("cpu")), torch.Generator().manual_seed(0)
    # float32, where rounding hides nothing, is refused for experts: a GPU has no such products
    with patch.object(build, "expert_names", return_value=[]):
        made = build.build_step(tiny(family), plan, settings(16, dropout), weights)
    for name, parameter in made.adapters.items():
        if "lora_B" in name and not blank:
            parameter.data.normal_(0.0, 0.05, generator=noise)
    return made


def stock_loss(made: TrainingStep, config: Any) -> float:
    """Of stock transformers on the step's weights, which has each row alone."""
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    parts = [*made.model.named_parameters(remove_duplicate=False), *made.model.named_buffers()]
    given = {name.replace(".base_layer", ""): part for name, part in parts}
    total, count = 0.0, 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(given[name])
        for name, buffer in model.named_buffers():
            if name in given:
                buffer.copy_(given[name])
        for row in steps.sequences(3, 1):
            logits = model(input_ids=torch.tensor([row.tokens]), use_cache=False).logits[0, :-1]
            wanted = torch.tensor(row.learned[1:], dtype=torch.bool)
            targets = torch.tensor(row.tokens[1:])[wanted]
            total += float(nn.functional.cross_entropy(logits[wanted], targets, reduction="sum"))
            count += len(targets)
    return total / count


def trained(family: str) -> dict[str, Any]:
    """How it goes through a step, and how far off that is."""
    rows = steps.sequences(3, 1)
    made = step(family, recomputed=False, blank=True)
    total, count = made.evaluate(rows)
    loss = stock_loss(made, tiny(family))
    by_hand = isinstance(made.network, HandNetwork)
    plain, again = (steps.gradients(step(family, recomputed=r), rows) for r in (False, True))
    result = step(family, recomputed=True, dropout=0.1).run(rows, step=0, learning_rate=1e-3)
    assert result.updated
    return {
        "way": "by hand" if by_hand else "together" if made.network.together else "alone",
        "loss_off": abs(float(total) / count / loss - 1),
        "recomputing_off": max(
            float((plain[n] - again[n]).abs().max() / plain[n].abs().max())
            for n in plain
            if plain[n].any()
        ),
    }


def estimated(family: str) -> int:
    """Bytes of a step on a GPU at its peak."""
    plan = steps.plan(
        device="cuda", compute_dtype="bfloat16", micro_batch_size=2, recompute_layers=(0,)
    )
    load = Load.uniform(3, 23)
    return trace_step(tiny(family), plan, settings(4, 0.1), load).peak_bytes


def tried(family: str) -> dict[str, Any]:
    """A row; in a process of its own."""
    row: dict[str, Any] = {
        "family": family, "model_type": None, "way": "refused", "loss_off": None,
        "recomputing_off": None, "estimated_bytes": None, "refused": None, "estimate_refused": None,
        "stock": None,
    }  # fmt: skip
    try:
        config = tiny(family)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        row["model_type"] = model.config.model_type
        with torch.no_grad():
            model(input_ids=torch.arange(5)[None], use_cache=False)
    except Exception as error:  # whatever transformers' own code raises
        return {**row, "way": None, "stock": _line(error)}
    try:
        row.update(trained(family))
    except UserError as error:
        row["refused"] = _line(error)
    try:
        row["estimated_bytes"] = estimated(family)
    except UserError as error:
        row["estimate_refused"] = _line(error)
    return row


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]


def _serve(connection: Any, family: str) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    connection.send(tried(family))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", default=sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    processes, rows = multiprocessing.get_context("fork"), []
    for family in args.families:
        ours, theirs = processes.Pipe()
        child = processes.Process(target=_serve, args=(theirs, family))
        child.start()
        theirs.close()
        try:
            rows.append(
                ours.recv() if ours.poll(SECONDS) else {"family": family, "way": "too slow"}
            )
        except EOFError:  # it has said why
            rows.append({"family": family, "way": "internal error"})
        child.kill()
        child.join()
        print(json.dumps(rows[-1]), flush=True)
    if args.json is not None:
        write_result(args.json, "families", rows, device="cpu")


if __name__ == "__main__":
    main()
