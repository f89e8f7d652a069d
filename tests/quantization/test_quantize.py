"""Whole checkpoints to 4 bits: what is stored, who can load it, what is refused."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit as StockLinear4bit
from safetensors.torch import save_file
from torch import Tensor

import fitlora.step.ops  # noqa: F401  (registers the operators)
from fitlora.checkpoint import Checkpoint
from fitlora.errors import ArtifactError, UserError
from fitlora.model import load_config
from fitlora.quantization import quantize as module
from fitlora.quantization import reading
from fitlora.quantization.codes import quantize_4bit
from fitlora.quantization.layout import QuantSpec, part_names
from fitlora.quantization.quantize import quantize_checkpoint
from fitlora.quantization.writer import ModelWriter
from fitlora.step.linear import Linear4bit
from fitlora.step.skeleton import skeleton
from fitlora.step.weights import CheckpointWeights, fill
from tests.tiny_models import dequantized, read_tensors

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
NF4 = QuantSpec()
UP = "model.layers.0.mlp.up_proj.weight"
Source = Callable[..., Path]
LAYOUTS = [
    ("llama", {"tied": True}),
    ("llama", {"shards": 4}),
    ("llama_odd", {}),
    ("qwen2", {"tied": True, "shards": 3}),
    ("phi3", {"shards": 3}),
    ("mixtral", {}),
]
QUANTIZED = {  # linear layers of two decoder layers
    "llama": 14, "llama_odd": 14, "qwen2": 14, "phi3": 8, "mixtral": 8,
}  # fmt: skip


def quantize(source: Path, target: Path, spec: QuantSpec | None = NF4, **options: Any) -> Path:
    quantize_checkpoint(source, target, spec=spec, device=CPU, **options)
    return target


def copy(source: Path, target: Path, **config: Any) -> Path:
    """A copy that a test may spoil. config: keys of config.json that differ."""
    shutil.copytree(source, target)
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**content, **config}))
    return target


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the tensors of a single-file checkpoint."""
    tensors = read_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


# --- what is stored ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "options"), LAYOUTS)
def test_weights_are_quantized_and_the_rest_is_as_it_was(
    family: str, options: dict[str, Any], source: Source, tmp_path: Path
) -> None:
    folder = source(family, **options)
    target = quantize(folder, tmp_path / "q")
    before, after = read_tensors(folder), read_tensors(target)
    quantized = {name.split(".quant_state.")[0] for name in after if ".quant_state." in name}
    assert len(quantized) == QUANTIZED[family]
    assert ("lm_head.weight" in after) == (not options.get("tied", False))
    assert quantized.isdisjoint({"lm_head.weight", "model.embed_tokens.weight"})
    parts = {part for name in quantized for part in part_names(name, QuantSpec())}
    assert after.keys() == parts | (before.keys() - quantized)
    for name in before.keys() - quantized:
        assert torch.equal(after[name], before[name]), name
    for name, weight in dequantized(after).items():
        if name in quantized:
            error = (weight - before[name].float()).norm() / before[name].float().norm()
            assert 0.02 < error < 0.12, name  # NF4's error on normal noise is about 0.09


@pytest.mark.parametrize(("family", "options"), LAYOUTS[:2])
def test_shards_and_their_index_mirror_the_source(
    family: str, options: dict[str, Any], source: Source, tmp_path: Path
) -> None:
    folder = source(family, **options)
    target = quantize(folder, tmp_path / "q")
    files = sorted(p.name for p in folder.glob("*.safetensors*"))
    assert sorted(p.name for p in target.glob("*.safetensors*")) == files
    if len(files) == 1:
        return
    index = json.loads((target / "model.safetensors.index.json").read_text())
    tensors = read_tensors(target)
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    assert list(index["weight_map"]) == sorted(tensors)
    old = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index["weight_map"].items():
        assert old[name.split(".weight.")[0] + ".weight" if ".weight." in name else name] == file


def test_other_files_and_the_config(source: Source, tmp_path: Path) -> None:
    folder = copy(source("llama"), tmp_path / "s", torch_dtype="float16")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    target = quantize(folder, tmp_path / "q", QuantSpec("fp4", 128, double=False))
    assert not (target / "pytorch_model.bin").exists()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (target / name).read_bytes() == (folder / name).read_bytes()
    old = json.loads((folder / "config.json").read_text())
    new = json.loads((target / "config.json").read_text())
    assert new.pop("quantization_config") == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0,
    }
    assert new == {**old, "torch_dtype": "bfloat16", "dtype": "bfloat16"}


def test_twice_gives_the_same_bytes(source: Source, tmp_path: Path) -> None:
    folder = source("qwen2", tied=True, shards=3)
    first = hashes(quantize(folder, tmp_path / "a"))
    assert first == hashes(quantize(folder, tmp_path / "b" / "deeper"))
    assert len(first) == len(list(folder.iterdir()))
    assert first != hashes(quantize(folder, tmp_path / "c", QuantSpec(double=False)))


def test_the_default_s_bytes_are_those_that_a_gpu_made(tmp_path: Path) -> None:
    found = hashes(quantize(ROOT / "assets/sample_model", tmp_path / "q"))
    compared = []
    for name in ("cpu", "h200"):
        result = json.loads((ROOT / f"benchmarks/results/quantize.{name}.json").read_text())
        for row in result["rows"]:
            if row["measured"] == "bytes":
                assert {k[7:]: v for k, v in row.items() if k.startswith("sha256 ")} == found
                compared.append(row["device"])
    assert sorted(compared) == ["NVIDIA H200", "cpu", "cpu"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("spec", [NF4, QuantSpec("fp4", 128, double=False)], ids=str)
def test_a_gpu_makes_the_same_bytes(
    spec: QuantSpec, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 4096)  # many pieces, each in a used buffer
    for name, folder in (("odd", source("llama_odd")), ("even", source("llama", shards=4))):
        expected = hashes(quantize(folder, tmp_path / f"{name} on the CPU", spec))
        quantize_checkpoint(folder, tmp_path / name, spec=spec, device=torch.device("cuda"))
        assert hashes(tmp_path / name) == expected


def test_a_killed_run_goes_on_after_its_last_shard(
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = source("llama", shards=4)
    expected = hashes(quantize(folder, tmp_path / "whole"))
    count = sum(name.endswith(".safetensors") for name in expected)
    write_shard = ModelWriter.write_shard
    written: list[str] = []

    def until_the_third(writer: ModelWriter, file: str, tensors: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write_shard(writer, file, tensors)
        written.append(file)

    monkeypatch.setattr(module, "SHARDS", 1)
    monkeypatch.setattr(ModelWriter, "write_shard", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        quantize(folder, tmp_path / "q")
    assert not (tmp_path / "q").exists()
    monkeypatch.setattr(ModelWriter, "write_shard", write_shard)
    capsys.readouterr()
    assert hashes(quantize(folder, tmp_path / "q")) == expected
    assert f"2 of {count} shards were done before" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q", "whole"]


def test_the_fingerprint_is_of_the_source_and_of_what_is_asked(
    source: Source, tmp_path: Path
) -> None:
    folder = copy(source("llama", shards=4), tmp_path / "s")

    def key(spec: QuantSpec = NF4) -> str:
        return module._fingerprint(Checkpoint(folder), {}, spec)

    first = key()
    assert first == key() != key(QuantSpec("fp4"))
    file = next(folder.glob("*.safetensors"))
    os.utime(file, ns=(1, 1))
    assert key() != first


def test_pieces_change_nothing(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = source("llama_odd")
    expected = hashes(quantize(folder, tmp_path / "a"))
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 4096)
    assert hashes(quantize(folder, tmp_path / "b")) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_wider_floats_become_bfloat16_and_integers_stay(
    dtype: torch.dtype, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(source("llama", dtype=dtype), tmp_path / "s")
    rewrite(folder, lambda tensors: tensors.update(steps=torch.tensor([7])))
    after = read_tensors(quantize(folder, tmp_path / "q"))
    before = read_tensors(folder)
    assert torch.equal(after["steps"], torch.tensor([7]))
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"].bfloat16())
    name = "model.layers.1.mlp.down_proj.weight"
    expected, _ = quantize_4bit(before[name].view(-1), 64, "nf4")  # not rounded before
    assert torch.equal(after[name][:, 0], expected)
    said = capsys.readouterr().out
    kind = str(dtype).removeprefix("torch.")
    assert f"7 tensors are {kind} and become bfloat16: lm_head.weight, model.embed" in said


def test_sixteen_bits_is_the_source_in_bfloat16(source: Source, tmp_path: Path) -> None:
    folder = source("llama", dtype=torch.float16, shards=3)
    target = quantize(folder, tmp_path / "q", None)
    before, after = read_tensors(folder), read_tensors(target)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.bfloat16()), name
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert sorted(hashes(target)) == sorted(hashes(folder))


def test_experts_in_one_tensor_stay_and_it_is_said(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(source("mixtral"), tmp_path / "q")
    said = capsys.readouterr().out
    assert "4 weights hold many experts in one 3-D tensor and stay in 16 bits" in said
    assert "model.layers.0.mlp.experts.down_proj" in said


def test_kept_layers_stay_in_16_bits(source: Source, tmp_path: Path) -> None:
    folder = source("llama")
    target = quantize(folder, tmp_path / "q", keep=["o_proj", "model.layers.1.mlp.*"])
    kept = ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    kept += [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    assert sorted(config["llm_int8_skip_modules"]) == sorted(["lm_head", *kept])
    before, after = read_tensors(folder), read_tensors(target)
    for name in kept:
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
    assert sum(".quant_state." in name for name in after) == 14 - len(kept)
    with pytest.raises(UserError, match="keep_in_16_bits: o_prj is no part of any linear layer's"):
        quantize(folder, tmp_path / "r", keep=["o_prj"])
    assert not (tmp_path / "r").exists()


# --- who can load it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options", "spec", "keep"),
    [
        ("llama", {"tied": True}, QuantSpec(), ()),
        ("llama", {"shards": 4}, QuantSpec("fp4", 64, double=False), ("o_proj", "*.1.mlp.up_proj")),
        ("qwen2", {"tied": True, "shards": 3}, QuantSpec("nf4", 32, double=False), ()),
        ("phi3", {"shards": 3}, QuantSpec("fp4", 64, double=True), ()),
        ("mixtral", {}, QuantSpec(), ()),
    ],
)
def test_stock_transformers_loads_it(
    family: str,
    options: dict[str, Any],
    spec: QuantSpec,
    keep: tuple[str, ...],
    source: Source,
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    target = quantize(source(family, **options), tmp_path / "q", spec, keep=keep)
    plain = dequantized(read_tensors(target))
    stock = AutoModelForCausalLM.from_pretrained(target, device_map="cpu")
    layers = [(n, m) for n, m in stock.named_modules() if isinstance(m, StockLinear4bit)]
    assert len(layers) == QUANTIZED[family] - (3 if keep else 0)
    for name, layer in layers:
        state = layer.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested) == (
            spec.type, spec.block_size, spec.double
        )  # fmt: skip
        assert layer.compute_dtype == torch.bfloat16
        weight = functional.dequantize_4bit(layer.weight, state)
        assert torch.equal(weight, plain[f"{name}.weight"].bfloat16()), name
    # the same model without any quantization, on the dequantized weights
    bare = copy(target, tmp_path / "bare")
    for file in bare.glob("*.safetensors*"):
        file.unlink()
    config = json.loads((bare / "config.json").read_text())
    del config["quantization_config"]
    (bare / "config.json").write_text(json.dumps(config))
    save_file(
        {n: t.bfloat16() for n, t in plain.items()}, bare / "model.safetensors", {"format": "pt"}
    )
    reference = AutoModelForCausalLM.from_pretrained(bare)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected, found = reference(tokens).logits.float(), stock(tokens).logits.float()
    assert (found - expected).norm() / expected.norm() < 0.01  # bfloat16, in another order


@pytest.mark.parametrize(
    ("family", "options", "spec"),
    [
        ("llama", {"tied": True}, QuantSpec()),
        ("llama", {"shards": 4}, QuantSpec("fp4", 64, double=False)),
        ("qwen2", {"tied": True, "shards": 3}, QuantSpec("nf4", 32, double=False)),
        ("phi3", {"shards": 3}, QuantSpec("fp4", 64, double=True)),
    ],
)
def test_the_step_s_layers_take_it(
    family: str, options: dict[str, Any], spec: QuantSpec, source: Source, tmp_path: Path
) -> None:
    target = quantize(source(family, **options), tmp_path / "q", spec)
    plain = dequantized(read_tensors(target))
    model = skeleton(load_config(target), dtype=torch.bfloat16, spec=spec)
    weights = CheckpointWeights(target, CPU)
    fill(model.named_modules(), weights)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert len(layers) == QUANTIZED[family]
    weights.check(spec)
    for name, layer in layers.items():
        for dtype in (torch.bfloat16, torch.float32):
            expected = plain[f"{name}.weight"].to(dtype)
            assert torch.equal(layer.compute_weight(dtype), expected), name
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in layers:
            assert torch.equal(parameter, plain[name]), name


# --- a source that is 4-bit already --------------------------------------------------------------


def test_a_quantized_source_goes_through(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = quantize(source("llama", shards=4), tmp_path / "a", keep=["o_proj"])
    second = quantize(first, tmp_path / "b", keep=["o_proj"])
    assert hashes(first) == hashes(second)
    assert "quantized in this way already" in capsys.readouterr().out


def test_a_source_that_stock_transformers_quantized_goes_through(
    source: Source, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    stock = AutoModelForCausalLM.from_pretrained(
        source("qwen2"),
        device_map="cpu",
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    stock.save_pretrained(tmp_path / "stock")
    theirs = read_tensors(quantize(tmp_path / "stock", tmp_path / "a"))
    ours = read_tensors(quantize(source("qwen2"), tmp_path / "b"))
    assert theirs.keys() == ours.keys()
    plain = dequantized(theirs)
    for name, weight in dequantized(ours).items():  # codes of scales differ here and there
        assert torch.allclose(weight, plain[name], rtol=0.02, atol=2e-3), name


@pytest.mark.parametrize(
    ("spec", "keep", "message"),
    [
        (QuantSpec("fp4"), (), r"q_proj.weight is nf4 in blocks of 64 with double .* fp4 in"),
        (QuantSpec(block_size=128), (), "asks for nf4 in blocks of 128"),
        (QuantSpec(double=False), (), "asks for nf4 in blocks of 64 without double quantization"),
        (QuantSpec(), ("v_proj",), r"in other layers than .*: model.layers.0.self_attn.v_proj.w"),
        (None, (), "its 16-bit weights are gone"),
    ],
    ids=str,
)
def test_a_source_quantized_otherwise_is_refused(
    spec: QuantSpec | None, keep: tuple[str, ...], message: str, source: Source, tmp_path: Path
) -> None:
    quantize(source("llama"), tmp_path / "a")
    with pytest.raises(UserError, match=message):
        quantize(tmp_path / "a", tmp_path / "b", spec, keep=keep)
    assert not (tmp_path / "b").exists()


def _bf16_storage(tensors: dict[str, Tensor]) -> None:
    tensors[UP] = tensors[UP].view(-1).view(torch.bfloat16).view(-1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{UP}.absmax"), rf"lacks 1 tensor.*{UP}\.absmax"),
        (lambda tensors: tensors[f"{UP}.nested_quant_map"].mul_(2), f"{UP}.* code book"),
        (_bf16_storage, rf"{UP} is stored as torch.bfloat16 \(quant_storage\)"),
    ],
)
def test_a_damaged_4_bit_source_is_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, source: Source, tmp_path: Path
) -> None:
    quantize(source("llama"), tmp_path / "a")
    rewrite(tmp_path / "a", change)
    with pytest.raises(UserError, match=message):
        quantize(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


# --- what is refused -----------------------------------------------------------------------------


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _only_config(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.pop(name))

    return change


def _with(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        rewrite(folder, lambda tensors: tensors.update({name: value(tensors[name])}))

    return change


def _nan(tensor: Tensor) -> Tensor:
    tensor.view(-1)[-1] = float("nan")
    return tensor


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncate, r"model\.safetensors cannot be read"),
        (_only_config, "a config and no weights"),
        (_pickle, "pickle checkpoint is converted by"),
        (_without(UP), f"lacks 1 tensor.*{UP}"),
        (_without("model.norm.weight"), "lacks 1 tensor.*model.norm.weight"),
        (_with(UP, _nan), f"{UP} has values that are not finite"),
        (_with("model.norm.weight", _nan), "model.norm.weight has values that are not finite"),
        (_with(UP, lambda t: t[:-1].clone()), rf"{UP} is \(127, 64\), and .* makes it \(128, 64\)"),
        (_with(UP, lambda t: t.double()), f"{UP} is torch.float64"),
        (_with(UP, lambda t: t.to(torch.float8_e4m3fn)), f"{UP} is stored as F8_E4M3"),
        (_with("model.norm.weight", lambda t: t.double()), "model.norm.weight is float64"),
        (_config(quantization_config={"quant_method": "gptq", "bits": 4}), "already, by gptq"),
        (
            _config(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
            "already, by bitsandbytes to 8 bits",
        ),
        (_config(model_type="unheard_of"), "config.json cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_name_the_thing_and_leave_nothing(
    spoil: Callable[[Path], None], message: str, source: Source, tmp_path: Path
) -> None:
    folder = copy(source("llama"), tmp_path / "s")
    spoil(folder)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=message):
        quantize(folder, tmp_path / "out" / "q")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_refused_late_stops_the_rest(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(source("llama", shards=4), tmp_path / "s")
    read: list[str] = []

    def read_ahead(checkpoint: Checkpoint, name: str, *args: Any, **options: Any) -> Any:
        read.append(name)
        if len(read) == 2:
            raise UserError("the disk is tired")
        return reading.read_ahead(checkpoint, name, *args, **options)

    monkeypatch.setattr(module, "read_ahead", read_ahead)
    monkeypatch.setattr(module, "SHARDS", 1)
    with pytest.raises(UserError, match="the disk is tired"):
        quantize(folder, tmp_path / "q")
    shards = list(Checkpoint(folder).files().values())
    assert len(read) <= len(shards[0]) + 1  # one may have begun
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_a_wide_value_that_bfloat16_cannot_hold_is_named(source: Source, tmp_path: Path) -> None:
    folder = copy(source("llama", dtype=torch.float32), tmp_path / "s")
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(3.4e38))
    with pytest.raises(UserError, match=r"model\.norm\.weight has values that are not finite"):
        quantize(folder, tmp_path / "q")


def test_an_index_that_is_wrong_is_named(source: Source, tmp_path: Path) -> None:
    folder = copy(source("llama", shards=4), tmp_path / "s")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    for file, message in (
        ("../elsewhere.safetensors", "cannot be read|not a plain file"),
        ("missing.safetensors", "missing.safetensors cannot be read"),
        (next(f for f in files if f != index["weight_map"][UP]), f"has no tensor {UP}"),
    ):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], UP: file}}))
        with pytest.raises(ArtifactError, match=message):
            quantize(folder, tmp_path / "q")
    shutil.copy(folder / index["weight_map"][UP], tmp_path / "elsewhere.safetensors")
    path.write_text(
        json.dumps({"weight_map": {**index["weight_map"], UP: "../elsewhere.safetensors"}})
    )
    with pytest.raises(ArtifactError, match="not a plain file"):
        quantize(folder, tmp_path / "q")
    path.write_text("{")
    with pytest.raises(ArtifactError, match=r"index\.json is damaged"):
        quantize(folder, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "s")
    with pytest.raises(UserError, match="GPT2LMHeadModel has no linear layer to quantize"):
        quantize(tmp_path / "s", tmp_path / "q")
